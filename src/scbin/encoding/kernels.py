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


def over_rows(kernel: Callable[..., Any], indptr: np.ndarray, *arguments: Any) -> list[Any]:
    """Call `kernel(first, last, indptr, *arguments)` for ranges of rows that hold about equally many values each."""
    n_rows = len(indptr) - 1
    parts = n_threads() if indptr[-1] - indptr[0] > SMALL else 1
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
    ids, positions, lengths, totals, matched, cut, all_used,
):  # fmt: skip
    """Write the genes of each row by value / median, descending, equal values by token id; `cut` is what did not fit.

    Keys are float64 and compared exactly. Two radix passes over the 22 upper bits of the range that a cell's keys span bring
    them nearly into order, an insertion sort within equal 22 bits finishes. `log_factor > 0`: values are logs, undone first.
    """
    n_prefix = prefix.shape[1]
    width = 1
    for row in range(first, last):
        width = max(width, indptr[row + 1] - indptr[row])
    keys, middle = np.empty(width, dtype=np.float64), np.empty(width, dtype=np.float64)
    bits = keys.view(np.int64)
    genes = np.empty(width, dtype=np.int32)
    order, spare = np.empty(width, dtype=np.int64), np.empty(width, dtype=np.int64)
    low_count, high_count = np.empty(BUCKETS, dtype=np.int64), np.empty(BUCKETS, dtype=np.int64)
    for row in range(first, last):
        n = 0
        values, places = data[indptr[row] : indptr[row + 1]], indices[indptr[row] : indptr[row + 1]]
        for k in range(len(values)):  # without a branch: what does not count is overwritten
            gene = columns[np.uint32(places[k])]
            keys[n] = values[k]
            middle[n] = medians[max(gene, 0)]
            genes[n] = gene
            n += (gene >= 0) & (values[k] > 0)
        known = row_sum(keys[:n])
        totals[row] = (
            row_sum(data[indptr[row] : indptr[row + 1]])
            if all_used
            else _sum_used(data, indices, columns, indptr[row], indptr[row + 1])
        )
        matched[row] = known
        if log_factor > 0.0:
            for i in range(n):
                keys[i] = np.expm1(keys[i] * log_factor)
        for i in range(n):
            keys[i] = keys[i] / middle[i]
        smallest, largest = _range(bits, n)
        shift = 0
        while n > 0 and (largest - smallest) >> shift >= BUCKETS * BUCKETS:
            shift += 1
        low_count[:] = 0
        high_count[:] = 0
        for i in range(n):
            q = (largest - bits[i]) >> shift
            spare[i] = (q << 32) | i
            low_count[q & (BUCKETS - 1)] += 1
            high_count[q >> RADIX] += 1
        low_sum = 0
        high_sum = 0
        for b in range(BUCKETS):
            low, high = low_count[b], high_count[b]
            low_count[b] = low_sum
            high_count[b] = high_sum
            low_sum += low
            high_sum += high
        for i in range(n):
            b = (spare[i] >> 32) & (BUCKETS - 1)
            order[low_count[b]] = spare[i]
            low_count[b] += 1
        for i in range(n):
            b = order[i] >> (32 + RADIX)
            spare[high_count[b]] = order[i]
            high_count[b] += 1
        i = 0
        while i < n:
            stop = i + 1
            while stop < n and spare[stop] >> 32 == spare[i] >> 32:
                stop += 1
            if stop - i > 1 and not _is_ordered(spare, i, stop, bits, genes):
                _order_run(spare, i, stop, bits, genes)
            i = stop
        start = offsets[row] + n_prefix
        kept = min(n, max_genes)
        for i in range(kept):
            ids[start + i] = first_id + genes[spare[i] & 0xFFFFFFFF]
            positions[start + i] = n_prefix + i
        lost = 0.0
        if kept < n:
            for k in range(indptr[row], indptr[row + 1]):
                if columns[indices[k]] >= 0 and data[k] > 0:
                    lost += data[k]
            for i in range(kept):
                value = keys[spare[i] & 0xFFFFFFFF] * medians[genes[spare[i] & 0xFFFFFFFF]]
                lost -= np.log1p(value) / log_factor if log_factor > 0.0 else value
        cut[row] = lost
        lengths[row] = _frame(row, start, start + kept, known, prefix, end_id, n_prefix + kept, offsets, ids, positions)


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
def _is_ordered(order, first, last, bits, genes):  # type: ignore[no-untyped-def]
    for i in range(first + 1, last):
        before, here = order[i - 1] & 0xFFFFFFFF, order[i] & 0xFFFFFFFF
        if bits[before] < bits[here] or (bits[before] == bits[here] and genes[before] > genes[here]):
            return False
    return True


@njit(nogil=True, cache=True)
def _order_run(order, first, last, bits, genes):  # type: ignore[no-untyped-def]
    """Sort a run by key descending, then by gene: Shell's sort, so that long runs of equal values stay cheap."""
    gap = 1
    while gap < (last - first) // 9:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(first + gap, last):
            item = order[i]
            key, gene = bits[item & 0xFFFFFFFF], genes[item & 0xFFFFFFFF]
            j = i
            while j >= first + gap:
                other = order[j - gap] & 0xFFFFFFFF
                if bits[other] > key or (bits[other] == key and genes[other] < gene):
                    break
                order[j] = order[j - gap]
                j -= gap
            order[j] = item
        gap //= 3


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
