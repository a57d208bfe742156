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
    n_rows, n_values = len(indptr) - 1, int(indptr[-1] - indptr[0])
    parts = n_threads() if n_values > SMALL else 1
    if parts == 1:
        return [kernel(0, n_rows, indptr, *arguments)]
    goals = indptr[0] + n_values * np.arange(1, parts) // parts
    cuts = [0, *np.searchsorted(indptr, goals).tolist(), n_rows]
    return list(_pool(parts).map(lambda a, b: kernel(a, b, indptr, *arguments), cuts[:-1], cuts[1:]))


def over_genes(kernel: Callable[..., Any], n_genes: int, *arguments: Any) -> None:
    """Call `kernel(first, last, *arguments)` for even ranges of genes."""
    cuts = np.linspace(0, n_genes, n_threads() + 1).astype(int).tolist()
    list(_pool(n_threads()).map(lambda a, b: kernel(a, b, *arguments), cuts[:-1], cuts[1:]))


# ---- looking at values ----------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def scan_rows(first, last, indptr, data, indices, used, seen, sums):  # type: ignore[no-untyped-def]
    """Look at every stored value of the used columns; `sums` (rows,) are over them, `seen` (columns,) where one is not 0.

    Returns how many values are not finite, negative, fractions, stored, out of order; how many rows of 5 genes and more are
    whole numbers, with one above 1, and how many are not; and the largest value.
    """
    not_finite = negative = fractions = stored = unsorted = whole_rows = broken_rows = 0
    largest = 0.0
    for row in range(first, last):
        before = np.int64(-1)
        n = n_fractions = 0
        total = highest = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            column = indices[k]
            unsorted += column <= before
            before = column
            if not used[column]:
                continue
            value = np.float64(data[k])
            seen[column] |= value != 0.0
            stored += 1
            if not np.isfinite(value):
                not_finite += 1
                continue
            n_fractions += value != np.rint(value)
            if value < 0.0:
                negative += 1
                continue
            n += value > 0.0  # type: ignore[assignment]
            highest = max(highest, value)
            total += value
        sums[row] = total
        fractions += n_fractions
        largest = max(largest, highest)
        whole_rows += n >= 5 and n_fractions == 0 and highest > 1.0
        broken_rows += n >= 5 and n_fractions > 0
    return not_finite, negative, fractions, stored, unsorted, whole_rows, broken_rows, largest


@njit(nogil=True, cache=True)
def row_totals(first, last, indptr, data, indices, columns, totals, matched):  # type: ignore[no-untyped-def]
    """Sum each row over all gene columns and over those of the vocabulary, in float64."""
    for row in range(first, last):
        total = known = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            column = columns[indices[k]]
            value = np.float64(data[k])
            if column > -2 and value > 0.0:
                total += value
                known += value if column >= 0 else 0.0
        totals[row], matched[row] = total, known


@njit(nogil=True, cache=True)
def recover_rows(first, last, indptr, data, indices, columns, slack, counts, exact):  # type: ignore[no-untyped-def]
    """Turn natural logs of scaled counts back into counts: the smallest value of a row is one molecule, or up to four.

    `slack` is the relative error by which a ratio of two values may miss a whole number. `exact` (rows,): whether none misses by
    more; else they are rounded, with the smallest as one.
    """
    for row in range(first, last):
        smallest = np.inf
        for k in range(indptr[row], indptr[row + 1]):
            if columns[indices[k]] > -2 and data[k] > 0:
                smallest = min(smallest, np.float64(data[k]))
        unit = np.expm1(smallest)
        exact[row] = False
        for molecules in range(1, 6):
            fits = molecules < 5
            for k in range(indptr[row], indptr[row + 1]):
                ratio = np.expm1(np.float64(data[k])) / unit * (molecules if fits else 1) if data[k] > 0 else 0.0
                counts[k] = np.rint(ratio)
                if fits and columns[indices[k]] > -2 and abs(ratio - counts[k]) > min(slack * ratio + 1e-4, 0.25):
                    fits = False
                    break
            if fits:
                exact[row] = True
                break
        # the fifth round breaks nowhere: it fills the row with rounded values


# ---- bins -----------------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def bin_rows(  # type: ignore[no-untyped-def]
    first, last, indptr, data, indices, columns, totals, target, edges, table, by_cell, bases, keep, offsets, ids, places, lengths
):  # fmt: skip
    """Write the token of each gene whose bin is above 0, or, with `keep`, of each gene of the vocabulary.

    `target > 0`: a value is compared as value * target / total of its row. `edges` (1 or genes, bins) are in that scale, or, `by_cell`,
    shares of the row's genes; `table` gives the bin at the start of each interval of float64's upper bits. `bases` (genes,) is the
    token id of bin 0 of each gene.
    """
    n_bins = edges.shape[1]
    y = np.empty(1, dtype=np.float64)
    bits = y.view(np.int64)
    own = np.empty(n_bins, dtype=np.float64)
    for row in range(first, last):
        scale = target / totals[row] if target > 0.0 and totals[row] > 0.0 else 1.0
        if by_cell:
            _own_edges(own, indptr[row], indptr[row + 1], data, indices, columns, scale)
        start = out = offsets[row]
        if keep:
            for gene in range(len(bases)):
                ids[start + gene] = bases[gene]
                places[start + gene] = gene
            out = start + len(bases)
        for k in range(indptr[row], indptr[row + 1]):
            gene = columns[indices[k]]
            if gene < 0 or not data[k] > 0:
                continue
            y[0] = data[k] * scale
            if by_cell:
                level = np.searchsorted(own, y[0], side="right")
            elif edges.shape[0] > 1:
                level = np.searchsorted(edges[gene], y[0], side="right")
            else:
                level = np.int64(table[bits[0] >> 47])
                while level < n_bins and y[0] >= edges[0, level]:
                    level += 1
            if keep:
                ids[start + gene] = bases[gene] + level
            elif level > 0:
                ids[out] = bases[gene] + level
                places[out] = gene
                out += 1
        lengths[row] = out - start


@njit(nogil=True, cache=True)
def _own_edges(own, first, last, data, indices, columns, scale):  # type: ignore[no-untyped-def]
    """Fill in the quantiles of a cell's expressed values at even shares."""
    values = np.empty(last - first, dtype=np.float64)
    n = 0
    for k in range(first, last):
        if columns[indices[k]] >= 0 and data[k] > 0:
            values[n] = data[k] * scale
            n += 1
    values = np.sort(values[:n])
    for b in range(len(own)):
        if n > 0:
            place = (n - 1) * (b / (len(own) - 1) if len(own) > 1 else 0.0)
            low = min(int(place), n - 1)
            own[b] = values[low] + (values[min(low + 1, n - 1)] - values[low]) * (place - low)


# ---- ranks ----------------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def rank_rows(  # type: ignore[no-untyped-def]
    first, last, indptr, data, indices, columns, medians, first_id, max_genes, offsets, ids, places, lengths, cut
):  # fmt: skip
    """Write the genes of each row by value / median, descending, equal values by token id; `cut` is the sum that did not fit.

    Keys are float64 and compared exactly. Two radix passes over the upper 20 bits of the range that a cell's keys span bring
    them nearly into order; runs of equal 20 bits are sorted by the keys themselves. `medians` (genes,).
    """
    width = 1
    for row in range(first, last):
        width = max(width, indptr[row + 1] - indptr[row])
    keys, values = np.empty(width, dtype=np.float64), np.empty(width, dtype=np.float64)
    tokens = np.empty(width, dtype=ids.dtype)
    items, spare = np.empty(width, dtype=np.uint64), np.empty(width, dtype=np.uint64)
    for row in range(first, last):
        n = 0
        for k in range(indptr[row], indptr[row + 1]):  # without a branch: what does not count is overwritten
            gene = columns[indices[k]]
            values[n] = data[k]
            keys[n] = values[n] / medians[gene]
            tokens[n] = first_id + gene
            n += (gene >= 0) & (data[k] > 0)
        kept = min(n, max_genes)
        _sort(keys, n, kept, items, spare, tokens)
        start = offsets[row]
        for i in range(kept):
            ids[start + i] = tokens[np.uint32(items[i])]
            places[start + i] = i
        lost = 0.0
        for i in range(kept, n):
            lost += values[np.uint32(items[i])]
        cut[row] = lost
        lengths[row] = kept


@njit(nogil=True, cache=True)
def _sort(keys, n, kept, items, spare, tokens):  # type: ignore[no-untyped-def]
    """Bring `items`, (20 bits of the key, place in `keys`), into the order of the ranks, as far as they are `kept`."""
    bits = keys.view(np.int64)
    smallest, largest = np.int64(2**63 - 1), np.int64(0)
    for i in range(n):
        smallest, largest = min(smallest, bits[i]), max(largest, bits[i])
    shift, low = 0, np.uint64(32)
    while n > 0 and (largest - smallest) >> shift >= BUCKETS * BUCKETS:
        shift += 1
    for i in range(n):
        items[i] = (np.uint64((largest - bits[i]) >> shift) << low) | np.uint64(i)
    _scatter(items, spare, n, low)
    _scatter(spare, items, n, np.uint64(32 + RADIX))
    i = 0
    while i < min(n - 1, kept):
        stop = i + 1
        while stop < n and items[stop] >> low == items[i] >> low:
            stop += 1
        if stop > i + 1:
            _order_run(items, i, stop, keys, tokens)
        i = stop


@njit(nogil=True, cache=True)
def _scatter(items, out, n, shift):  # type: ignore[no-untyped-def]
    """Bring items into the order of ten of their bits, those with equal bits as they come."""
    starts, mask = np.zeros(BUCKETS + 1, dtype=np.int64), np.uint64(BUCKETS - 1)
    for i in range(n):
        starts[((items[i] >> shift) & mask) + np.uint64(1)] += 1
    for b in range(BUCKETS):
        starts[b + 1] += starts[b]
    for i in range(n):
        b = (items[i] >> shift) & mask
        out[starts[b]] = items[i]
        starts[b] += 1


@njit(nogil=True, cache=True)
def _order_run(items, first, last, keys, tokens):  # type: ignore[no-untyped-def]
    """Sort a run by key descending, then by token: Shell's sort, so that long runs of equal values stay cheap."""
    gap = 1
    while gap < (last - first) // 9:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(first + gap, last):
            item = items[i]
            here = np.uint32(item)
            j = i
            while j >= first + gap:
                other = np.uint32(items[j - gap])
                if keys[other] > keys[here] or (keys[other] == keys[here] and tokens[other] < tokens[here]):
                    break
                items[j] = items[j - gap]
                j -= gap
            items[j] = item
        gap //= 3


# ---- around the genes, and over many cells --------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def frame_rows(  # type: ignore[no-untyped-def]
    first, last, indptr, offsets, lengths, ids, places, prefix, end_id, end_position, out_ids, out_positions
):  # fmt: skip
    """Put the specials and phenotypes around the genes of each row that is not empty; ids of 0 in `prefix` do not exist.

    `end_position` is where `end_id` stands, -1 for behind the last gene.
    """
    n_prefix = prefix.shape[1]
    for row in range(first, last):
        out = indptr[row]
        if indptr[row + 1] == out:
            continue
        for p in range(n_prefix):
            if prefix[row, p] > 0:
                out_ids[out] = prefix[row, p]
                out_positions[out] = p
                out += 1
        for k in range(offsets[row], offsets[row] + lengths[row]):
            out_ids[out] = ids[k]
            out_positions[out] = n_prefix + places[k]
            out += 1
        if end_id > 0:
            out_ids[out] = end_id
            out_positions[out] = end_position if end_position >= 0 else n_prefix + lengths[row]


@njit(nogil=True, cache=True)
def gene_moments(indptr, data, indices, columns, totals, target, logs, n_cells, total, squares, largest, raw):  # type: ignore[no-untyped-def]
    """Add the rows to per-gene sums of values per `target` counts. One thread, row by row: the same bits for any blocks."""
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            gene = columns[indices[k]]
            value = np.float64(data[k])
            if gene < 0 or not value > 0:
                continue
            raw[gene] += value
            largest[gene] = max(largest[gene], value)
            value = np.expm1(value) if logs else value * target / totals[row]
            n_cells[gene] += 1
            total[gene] += value
            squares[gene] += value * value


@njit(nogil=True, cache=True)
def pearson_moments(first, last, indptr, data, indices, columns, totals, shares, theta, clip, total, squares):  # type: ignore[no-untyped-def]
    """Add the rows' analytic Pearson residuals to per-gene sums (genes,); `shares` is each gene's part of all counts.

    For a range of genes, row by row: the same bits for any blocks and threads.
    """
    for row in range(len(indptr) - 1):
        for gene in range(first, last):
            mean = totals[row] * shares[gene]
            residual = max(-mean / np.sqrt(mean + mean * mean / theta), -clip) if mean > 0 else 0.0
            total[gene] += residual
            squares[gene] += residual * residual
        for k in range(indptr[row], indptr[row + 1]):
            gene = columns[indices[k]]
            if gene < first or gene >= last or not data[k] > 0:
                continue
            mean = totals[row] * shares[gene]
            spread = np.sqrt(mean + mean * mean / theta)
            nothing = max(-mean / spread, -clip)
            residual = min(max((data[k] - mean) / spread, -clip), clip)
            total[gene] += residual - nothing
            squares[gene] += residual * residual - nothing * nothing
