"""The compiled loops: one pass over the rows of a CSR block each, threads over rows, nothing written in place.

Plain `nogil` functions on a thread pool instead of `prange`: they compile in a third of the time, are safe beside other
threads, and the results cannot depend on the number of threads. Each takes a range of rows, where these begin, what it reads
and what it fills in.
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
loop = njit(nogil=True, cache=True, error_model="numpy")


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="scbin")


def n_threads() -> int:
    """Threads the kernels use: `NUMBA_NUM_THREADS`, at most the cores this process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(cores, int(vars(config)["NUMBA_NUM_THREADS"])))


def over_rows(
    kernel: Callable[..., Any], indptr: np.ndarray, read: tuple[Any, ...], write: Any, *, parts: int | None = None
) -> list[Any]:
    """Call `kernel(first, last, indptr, read, write)` for ranges of rows that hold about equally many values each."""
    n_rows, n_values = len(indptr) - 1, int(indptr[-1] - indptr[0])
    parts = parts or (n_threads() if n_values > SMALL else 1)
    indptr, read = _frozen(indptr), tuple(map(_frozen, read))
    goals = indptr[0] + n_values * np.arange(1, parts) // parts
    cuts = [0, *np.searchsorted(indptr, goals).tolist(), n_rows]
    calls = (map if parts == 1 else _pool(parts).map)(
        lambda a, b: kernel(a, b, indptr, read, write), cuts[:-1], cuts[1:]
    )
    return list(calls)


def _frozen(value: Any) -> Any:
    """Return a contiguous read-only view of an array, so that each kernel is compiled once, for read-only input."""
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value).view()
        value.flags.writeable = False
    return value


@loop
def scan_rows(first, last, indptr, read, write):  # type: ignore[no-untyped-def]
    """Look at every stored value of the used columns; `sums` (rows,) are over them, `seen` (columns,) where one is not 0.

    Returns how many values are not finite, negative, fractions, stored, out of order; how many rows of 5 genes and more are
    whole numbers, with one above 1, and how many are not; and the largest value.
    """
    data, indices, used = read
    sums = write
    not_finite = negative = fractions = stored = unsorted = whole_rows = broken_rows = 0
    largest = 0.0
    for row in range(first, last):
        before = np.int64(-1)
        n = n_fractions = 0
        total = highest = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            column, value = indices[k], np.float64(data[k])
            unsorted += column <= before
            before = column
            if not used[column]:
                continue
            stored += 1
            if not np.isfinite(value):
                not_finite += 1
                continue
            n_fractions += value != np.rint(value)
            negative += value < 0.0  # type: ignore[assignment]
            if value > 0.0:
                n += 1
                highest = max(highest, value)
                total += value
        sums[row] = total
        fractions += n_fractions
        largest = max(largest, highest)
        whole_rows += n >= 5 and n_fractions == 0 and highest > 1.0
        broken_rows += n >= 5 and n_fractions > 0
    return not_finite, negative, fractions, stored, unsorted, whole_rows, broken_rows, largest


@loop
def row_totals(first, last, indptr, read, write):  # type: ignore[no-untyped-def]
    """Sum each row over all gene columns and over those of the vocabulary, in float64."""
    data, indices, columns = read
    totals, matched = write
    for row in range(first, last):
        total = known = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            column = columns[indices[k]]
            value = np.float64(data[k])
            if column > -2 and value > 0.0:
                total += value
                known += value if column >= 0 else 0.0
        totals[row], matched[row] = total, known


@loop
def merge_rows(first, last, indptr, read, write):  # type: ignore[no-untyped-def]
    """Add up the columns of each row that `owner` (columns,) says are one; `logs` are added as what they are logs of.

    In one part: the rows are written one behind the other, `bounds` (rows + 1,) is where each ends.
    """
    data, indices, owner, logs = read
    values, columns, bounds = write
    place, out = np.full(len(owner), -1), 0
    for row in range(first, last):
        start = out
        for k in range(indptr[row], indptr[row + 1]):
            column, value = owner[indices[k]], np.float64(data[k])
            value = np.expm1(value) if logs else value
            if place[column] >= start:  # it has stood in this row
                values[place[column]] += value
                continue
            place[column], columns[out], values[out] = out, column, value
            out += 1
        bounds[row + 1] = out
    if logs:
        values[:out] = np.log1p(values[:out])


@loop
def recover_rows(first, last, indptr, read, write):  # type: ignore[no-untyped-def]
    """Turn natural logs of scaled counts back into counts: the smallest value of a row is one molecule, or up to four.

    `slack` is the relative error by which a ratio of two values may miss a whole number. `exact` (rows,): whether none misses by
    more; else they are rounded, with the smallest as one.
    """
    data, indices, columns, slack = read
    counts, exact = write
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


@loop
def bin_rows(first, last, indptr, read, write):  # type: ignore[no-untyped-def]
    """Write the token of each gene whose bin is above 0, or, with `keep`, of each gene of the vocabulary.

    `target > 0`: a value is compared as value * target / total of its row. `edges` (1 or genes, bins) are in that scale, or, `by_cell`,
    shares of the row's genes. `bases` (genes,) is the token id of bin 0 of each gene.
    """
    data, indices, columns, totals, target, edges, by_cell, bases, keep, offsets = read
    ids, places, lengths = write
    own = edges[0].copy()
    for row in range(first, last):
        scale = target / totals[row] if target > 0.0 and totals[row] > 0.0 else 1.0
        here = slice(indptr[row], indptr[row + 1])
        if by_cell:
            own[:] = _quantiles(data[here], columns[indices[here]], len(own)) * scale
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
            level = np.searchsorted(edges[gene] if edges.shape[0] > 1 else own, data[k] * scale, side="right")
            if keep:
                ids[start + gene] = bases[gene] + level
            elif level > 0:
                ids[out] = bases[gene] + level
                places[out] = gene
                out += 1
        lengths[row] = out - start


@loop
def rank_rows(first, last, indptr, read, write):  # type: ignore[no-untyped-def]
    """Write one integer for each expressed gene, which sorts by value / median, descending, and then by gene, its last bits."""
    data, indices, columns, medians, logs, bits = read
    items, lengths = write
    key = np.empty(1)
    word = key.view(np.int64)  # the same bits: of numbers above 0 they sort alike
    for row in range(first, last):
        out = indptr[row]
        for k in range(indptr[row], indptr[row + 1]):
            gene, value = columns[indices[k]], np.float64(data[k])
            if gene < 0 or not value > 0.0:
                continue
            key[0] = (np.expm1(value) if logs else value) / medians[gene]
            items[out] = (~word[0] & ~bits) | gene
            out += 1
        lengths[row] = out - indptr[row]


@loop
def _quantiles(values, genes, n):  # type: ignore[no-untyped-def]
    """Return `n` quantiles of the expressed values, the least to the largest."""
    values = np.sort(values[(genes >= 0) & (values > 0)]).astype(np.float64)
    if len(values) == 0:
        return np.zeros(n)
    return np.interp(np.linspace(0, len(values) - 1, n), np.arange(len(values)), values)


@loop
def frame_rows(first, last, indptr, read, write):  # type: ignore[no-untyped-def]
    """Put the specials and phenotypes around the genes of each row that is not empty; ids of 0 in `prefix` do not exist.

    `end_position` is where `end_id` stands, -1 for behind the last gene.
    """
    offsets, lengths, ids, places, prefix, end_id, end_position = read
    out_ids, out_positions = write
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


@loop
def gene_moments(first, last, indptr, read, write):  # type: ignore[no-untyped-def]
    """Add the rows to per-gene sums of values per `target` counts. In one part, row by row: the same bits for any blocks."""
    data, indices, columns, totals, target, logs = read
    n_cells, total, squares, largest, raw = write
    for row in range(first, last):
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


@loop
def pearson_moments(first, last, genes, read, write):  # type: ignore[no-untyped-def]
    """Add the rows' analytic Pearson residuals to per-gene sums (genes,); `shares` is each gene's part of all counts.

    For a range of genes instead of rows, row by row: the same bits for any blocks and threads.
    """
    indptr, data, indices, columns, totals, shares, theta, clip = read
    shares, total, squares = shares[first:last], write[0][first:last], write[1][first:last]
    limit = clip * clip
    for row in range(len(indptr) - 1):
        depth = totals[row]
        for gene in range(len(shares)):  # as if nothing were expressed: -mean / sqrt(mean + mean^2 / theta)
            mean = depth * shares[gene]
            square = min(mean * theta / (theta + mean), limit)
            total[gene] -= np.sqrt(square)
            squares[gene] += square
        for k in range(indptr[row], indptr[row + 1]):
            gene = columns[indices[k]] - first
            if 0 <= gene < len(shares) and data[k] > 0:
                mean = depth * shares[gene]
                square = min(mean * theta / (theta + mean), limit)
                residual = min(max((data[k] - mean) / np.sqrt(mean + mean * mean / theta), -clip), clip)
                total[gene] += residual + np.sqrt(square)
                squares[gene] += residual * residual - square
