"""The compiled loops: one pass over the rows of a CSR block each, threads over rows, nothing written in place.

Plain `nogil` functions on a thread pool instead of `prange`: they compile in a third of the time, are safe beside other
threads, and the results cannot depend on the number of threads.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import config, njit

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = 100_000  # stored values below which threads cost more than they bring
RADIX = 10
BUCKETS = 1 << RADIX
STEP = 32  # neighbours compared at a time, without a branch
LONGEST_SHORT = 1 << (32 - 2 * RADIX)  # keys of a row whose places fit beside 20 bits of the key into 32 bits


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="scbin")


def n_threads() -> int:
    """Threads the kernels use: `NUMBA_NUM_THREADS`, at most the cores this process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(cores, int(vars(config)["NUMBA_NUM_THREADS"])))


def frozen(array: np.ndarray) -> np.ndarray:
    """Return a contiguous read-only view, so that each kernel is compiled once, for read-only input."""
    array = np.ascontiguousarray(array).view()
    array.flags.writeable = False
    return array


def over_rows(kernel: Callable[..., Any], indptr: np.ndarray, *arguments: Any, threads: int | None = None) -> list[Any]:
    """Call `kernel(first, last, indptr, *arguments)` for ranges of rows that hold about equally many values each.

    `threads`: how many ranges, unless there is too little to do; all that may be used by default.
    """
    n_rows = len(indptr) - 1
    parts = (threads or n_threads()) if indptr[-1] - indptr[0] > SMALL else 1
    goals = indptr[0] + (indptr[-1] - indptr[0]) * np.arange(1, parts) // parts
    cuts = np.concatenate([[0], np.searchsorted(indptr, goals), [n_rows]])
    ranges = [(int(a), int(b)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    if parts == 1:
        return [kernel(a, b, indptr, *arguments) for a, b in ranges]
    return list(_pool(parts).map(lambda ab: kernel(*ab, indptr, *arguments), ranges))


@njit(nogil=True, cache=True)
def bin_rows(  # type: ignore[no-untyped-def]
    first, last, indptr, data, indices, columns, target, factor, edges, table, bases, keep, prefix, end_id, offsets,
    ids, positions, lengths, totals, matched, levels_by_cell, all_used,
):  # fmt: skip
    """Write one token per gene whose bin is above 0, or, with `keep`, one per gene of the vocabulary.

    `target > 0`: a value is compared as value * target / (sum of its row), else as value * factor. `edges` (1 or genes, bins)
    are in that scale; `table` gives the bin at the start of each interval of float64's upper bits. `bases` (genes,) is the
    token id of bin 0 of each gene.
    """
    n_genes = len(bases)
    n_prefix = prefix.shape[1]
    n_bins = edges.shape[1]
    per_gene = edges.shape[0] > 1
    y = np.empty(1, dtype=np.float64)
    bits = y.view(np.int64)
    own = np.empty(n_bins, dtype=np.float64)
    for row in range(first, last):
        known = 0.0
        n_known = 0
        if all_used:
            total = row_sum(data[indptr[row] : indptr[row + 1]])
        else:
            total = _sum_used(data, indices, columns, indptr[row], indptr[row + 1])
        scale = factor
        if target > 0.0 and total > 0.0:
            scale = target / total
        if levels_by_cell:
            values = np.empty(indptr[row + 1] - indptr[row], dtype=np.float64)
            for k in range(indptr[row], indptr[row + 1]):
                if columns[indices[k]] >= 0 and data[k] > 0:
                    values[n_known] = data[k] * scale
                    n_known += 1
            if n_known > 0:
                values = np.sort(values[:n_known])
            for b in range(n_bins):
                if n_known > 0:
                    place = (n_known - 1) * (b / (n_bins - 1) if n_bins > 1 else 0.0)
                    low = min(int(place), n_known - 1)
                    high = min(low + 1, n_known - 1)
                    own[b] = values[low] + (values[high] - values[low]) * (place - low)
        out = offsets[row] + n_prefix
        start = out
        if keep:
            for gene in range(n_genes):
                ids[start + gene] = bases[gene]
                positions[start + gene] = n_prefix + gene
            out = start + n_genes
        for k in range(indptr[row], indptr[row + 1]):
            gene = columns[indices[k]]
            value = data[k]
            if gene < 0 or not value > 0:
                continue
            known += value
            y[0] = value * scale
            if levels_by_cell:
                level = np.searchsorted(own, y[0], side="right")
            elif per_gene:
                level = np.searchsorted(edges[gene], y[0], side="right")
            else:
                level = np.int64(table[bits[0] >> 47])
                while level < n_bins and y[0] >= edges[0, level]:
                    level += 1
            if keep:
                ids[start + gene] = bases[gene] + level
            elif level > 0:
                ids[out] = bases[gene] + level
                positions[out] = n_prefix + gene
                out += 1
        totals[row] = total
        matched[row] = known
        lengths[row] = _frame(row, start, out, known, prefix, end_id, n_prefix + n_genes, offsets, ids, positions)


@njit(nogil=True, cache=True)
def rank_rows(  # type: ignore[no-untyped-def]
    first, last, indptr, data, indices, columns, log_factor, medians, first_id, max_genes, prefix, end_id, offsets,
    ids, positions, lengths, totals, matched, cut, all_used, all_known,
):  # fmt: skip
    """Write the genes of each row by value / median, descending, equal values by token id; `cut` is what did not fit.

    Keys are float64 and compared exactly. Two radix passes over the upper 20 bits of the range that a cell's keys span bring
    them nearly into order; runs of equal 20 bits are sorted by the keys themselves. `medians` are by column, 0 for a column
    without a gene; `log_factor > 0`: values are logs, undone first; `all_known`: all columns have genes, all values are positive.
    """
    n_prefix = prefix.shape[1]
    width = 1
    for row in range(first, last):
        width = max(width, indptr[row + 1] - indptr[row])
    keys, tokens = np.empty(width, dtype=np.float64), np.empty(width, dtype=ids.dtype)
    where = np.arange(width, dtype=np.int32)
    short, spare_short = np.empty(width, dtype=np.uint32), np.empty(width, dtype=np.uint32)
    wide = width if width > LONGEST_SHORT else 1
    long, spare_long = np.empty(wide, dtype=np.uint64), np.empty(wide, dtype=np.uint64)
    low_count, high_count = np.empty(BUCKETS, dtype=np.int32), np.empty(BUCKETS, dtype=np.int32)
    for row in range(first, last):
        values, places = data[indptr[row] : indptr[row + 1]], indices[indptr[row] : indptr[row + 1]]
        n = len(values)
        known = 0.0
        if not all_known:
            n = 0
            for k in range(len(values)):  # without a branch: what does not count is overwritten
                where[n] = k
                n += (columns[np.uint32(places[k])] >= 0) & (values[k] > 0)
            for i in range(n):
                known += values[where[i]]
        total = row_sum(values) if all_used else _sum_used(data, indices, columns, indptr[row], indptr[row + 1])
        known = total if all_known else known
        totals[row], matched[row] = total, known
        _set_keys(keys, tokens, values, places, where, n, medians, columns, first_id, log_factor, all_known)
        kept = min(n, max_genes)
        start = offsets[row] + n_prefix
        if n <= LONGEST_SHORT:
            _sort(keys, n, kept, short, spare_short, low_count, high_count, tokens)
            cut[row] = _write_ranks(short, n, kept, tokens, values, where, ids[start : start + kept])
        else:
            _sort(keys, n, kept, long, spare_long, low_count, high_count, tokens)
            cut[row] = _write_ranks(long, n, kept, tokens, values, where, ids[start : start + kept])
        here = positions[start : start + kept]
        for i in range(kept):
            here[i] = n_prefix + i
        lengths[row] = _frame(row, start, start + kept, known, prefix, end_id, n_prefix + kept, offsets, ids, positions)


@njit(nogil=True, cache=True, forceinline=True)
def _set_keys(  # type: ignore[no-untyped-def]
    keys, tokens, values, places, where, n, medians, columns, first_id, log_factor, all_known
):  # fmt: skip
    if all_known:  # `where` would say 0, 1, 2 ...
        for i in range(n):
            tokens[i] = first_id + columns[np.uint32(places[i])]
    else:
        for i in range(n):
            tokens[i] = first_id + columns[np.uint32(places[where[i]])]
    if log_factor > 0.0:
        for i in range(n):
            keys[i] = np.expm1(values[where[i]] * log_factor) / medians[np.uint32(places[where[i]])]
    elif all_known:
        for i in range(n):
            keys[i] = values[i] / medians[np.uint32(places[i])]
    else:
        for i in range(n):
            keys[i] = values[where[i]] / medians[np.uint32(places[where[i]])]


@njit(nogil=True, cache=True, forceinline=True)
def _sort(keys, n, kept, items, spare, low_count, high_count, tokens):  # type: ignore[no-untyped-def]
    """Bring `items`, (20 bits of the key, place in `keys`), into the order of the ranks, as far as they are `kept`."""
    low_digit = np.uint32(12 if items.itemsize == 4 else 32)  # where the place in `keys` ends
    high_digit = low_digit + np.uint32(RADIX)
    digit = np.uint32(BUCKETS - 1)
    bits = keys.view(np.int64)
    smallest, largest = _range(bits, n)
    shift = 0
    while n > 0 and (largest - smallest) >> shift >= BUCKETS * BUCKETS:
        shift += 1
    low_count[:] = 0
    high_count[:] = 0
    for i in range(n):
        items[i] = (((largest - bits[i]) >> shift) << low_digit) | i
    for i in range(n):
        low_count[(items[i] >> low_digit) & digit] += 1
        high_count[items[i] >> high_digit] += 1
    low_sum = 0
    high_sum = 0
    for b in range(BUCKETS):
        low, high = low_count[b], high_count[b]
        low_count[b] = low_sum
        high_count[b] = high_sum
        low_sum += low
        high_sum += high
    for i in range(n):
        b = (items[i] >> low_digit) & digit
        place = low_count[b]
        low_count[b] = place + 1
        spare[np.uint32(place)] = items[i]
    for i in range(n):
        b = spare[i] >> high_digit
        place = high_count[b]
        high_count[b] = place + 1
        items[np.uint32(place)] = spare[i]
    done = 0
    for first in range(0, min(n - 1, kept), STEP):
        last = min(first + STEP, n - 1)
        if last == first + STEP:
            equal = np.int32(0)
            for i in range(STEP):
                equal += np.int32(items[first + i] >> low_digit == items[first + i + 1] >> low_digit)
            if equal == 0:
                continue
        i = max(first, done)
        while i < last:
            if items[i] >> low_digit != items[i + 1] >> low_digit:
                i += 1
                continue
            stop = i + 2
            while stop < n and items[stop] >> low_digit == items[i] >> low_digit:
                stop += 1
            _order_run(items, i, stop, keys, tokens)
            i = stop
        done = i


@njit(nogil=True, cache=True)
def _order_run(items, first, last, keys, tokens):  # type: ignore[no-untyped-def]
    """Sort a run by key descending, then by token: Shell's sort, so that long runs of equal values stay cheap."""
    mask = np.int64((1 << 12) - 1 if items.itemsize == 4 else (1 << 32) - 1)
    gap = 1
    while gap < (last - first) // 9:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(first + gap, last):
            item = items[i]
            here = np.int64(item) & mask
            j = i
            while j >= first + gap:
                other = np.int64(items[j - gap]) & mask
                if keys[other] > keys[here]:
                    break
                if keys[other] == keys[here] and tokens[other] < tokens[here]:
                    break
                items[j] = items[j - gap]
                j -= gap
            items[j] = item
        gap //= 3


@njit(nogil=True, cache=True, forceinline=True)
def _write_ranks(items, n, kept, tokens, values, where, ids):  # type: ignore[no-untyped-def]
    """Write the token ids of the first `kept` items; return the sum of the values of the others."""
    mask = np.uint32((1 << 12) - 1 if items.itemsize == 4 else (1 << 32) - 1)
    for i in range(kept):
        ids[i] = tokens[np.uint32(items[i] & mask)]
    lost = 0.0
    for i in range(kept, n):
        lost += values[where[np.uint32(items[i] & mask)]]
    return lost


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def row_sum(values):  # type: ignore[no-untyped-def]
    """Sum in float64; several additions at a time, in an order that depends on the length alone."""
    total = 0.0
    for k in range(len(values)):
        total += np.float64(values[k])
    return total


@njit(nogil=True, cache=True)
def _sum_used(values, indices, columns, first, last):  # type: ignore[no-untyped-def]
    total = 0.0
    for k in range(first, last):
        if columns[indices[k]] > -2:
            total += values[k]
    return total


@njit(nogil=True, cache=True)
def _range(bits, n):  # type: ignore[no-untyped-def]
    smallest, largest = np.int64(2**63 - 1), np.int64(0)
    for i in range(n):
        smallest = min(smallest, bits[i])
        largest = max(largest, bits[i])
    return smallest, largest


@njit(nogil=True, cache=True)
def count_known(first, last, indptr, data, indices, columns, out):  # type: ignore[no-untyped-def]
    """Number of expressed genes of the vocabulary in each row."""
    for row in range(first, last):
        n = 0
        values, places = data[indptr[row] : indptr[row + 1]], indices[indptr[row] : indptr[row + 1]]
        for k in range(len(values)):
            n += (columns[np.uint32(places[k])] >= 0) & (values[k] > 0)
        out[row] = n


@njit(nogil=True, cache=True)
def _frame(row, start, out, known, prefix, end_id, end_position, offsets, ids, positions):  # type: ignore[no-untyped-def]
    """Put the specials and phenotypes around the genes of a row; a row without genes stays empty. Returns its length."""
    if out == start or not known > 0.0:
        return 0
    n_prefix = prefix.shape[1]
    for p in range(n_prefix):
        ids[offsets[row] + p] = prefix[row, p]
        positions[offsets[row] + p] = p
    if end_id > 0:
        ids[out] = end_id
        positions[out] = end_position
        out += 1
    return out - offsets[row]


@njit(nogil=True, cache=True)
def compact(first, last, indptr, offsets, lengths, ids, positions, out_ids, out_positions):  # type: ignore[no-untyped-def]
    """Copy rows of `lengths` at `offsets` to `indptr`, leaving out ids of 0 (a special that this layout does not have)."""
    for row in range(first, last):
        out = indptr[row]
        for k in range(offsets[row], offsets[row] + lengths[row]):
            if ids[k] > 0:
                out_ids[out] = ids[k]
                out_positions[out] = positions[k]
                out += 1
