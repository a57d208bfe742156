"""The compiled loops that look at values and add them up, before anything is encoded."""

from __future__ import annotations

import numpy as np
from numba import njit

from scbin.encoding.kernels import row_sum


@njit(nogil=True, cache=True)
def scan_rows(first, last, indptr, data, indices, n_vars, used, sums):  # type: ignore[no-untyped-def]
    """Look at every stored value. `sums` per row are over the used columns; returns the findings."""
    not_finite = negative = negative_fraction = fractions = zeros = unsorted = outside = stored = 0
    smallest, largest = np.inf, 0.0
    for row in range(first, last):
        before = -1
        total = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            column = indices[k]
            unsorted += column <= before
            before = column
            if column < 0 or column >= n_vars:
                outside += 1
                continue
            if not used[column]:
                continue
            value = np.float64(data[k])
            stored += 1
            if value == 0.0:
                zeros += 1
                continue
            if not np.isfinite(value):
                not_finite += 1
                continue
            fraction = value != np.rint(value)
            fractions += fraction
            if value < 0.0:
                negative += 1
                negative_fraction += fraction
                continue
            smallest = min(smallest, value)
            largest = max(largest, value)
            total += value
        sums[row] = total
    return (
        not_finite, negative, negative_fraction, fractions, zeros, unsorted, outside, stored, smallest, largest,
    )  # fmt: skip


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def scan_rows_fast(first, last, indptr, data, bits, indices, sums, seen):  # type: ignore[no-untyped-def]
    """Take the short way for float32 values without a fault, several at a time: (largest bits, whole, zeros, faulty rows).

    Bits from 0x7f800000 up are negative or not finite, and a row is faulty if its columns do not rise or lie outside: then
    `scan_rows` has to tell what it is.
    """
    highest = np.uint32(0)
    whole = zeros = faulty = np.int64(0)
    for row in range(first, last):
        # slices, because an index that counts from 0 is known to be positive, which lets the loops be vectorised
        values, words = data[indptr[row] : indptr[row + 1]], bits[indptr[row] : indptr[row + 1]]
        columns = indices[indptr[row] : indptr[row + 1]]
        row_highest = np.uint32(0)
        row_whole = row_zeros = down = np.int32(0)
        for k in range(len(values)):
            row_highest = max(row_highest, words[k])
            row_whole += np.int32(values[k] == np.rint(values[k]))
            row_zeros += np.int32(words[k] == np.uint32(0))
        highest = max(highest, row_highest)
        whole += row_whole
        zeros += row_zeros
        sums[row] = row_sum(values)
        for k in range(len(columns) - 1):
            down += np.int32(columns[k + 1] <= columns[k])
        if len(columns) == 0:
            continue
        if down or columns[0] < 0 or columns[-1] >= len(seen):
            faulty += 1
            continue
        for k in range(len(columns)):
            seen[np.uint32(columns[k])] = True
    return highest, whole, zeros, faulty


@njit(nogil=True, cache=True)
def gene_moments(indptr, data, indices, columns, target, log_factor, n_seen, total, squares, largest, raw_sums):  # type: ignore[no-untyped-def]
    """Add the rows to per-gene sums of values per `target` counts. One thread, row by row: the same bits for any blocks."""
    for row in range(len(indptr) - 1):
        row_total = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            if columns[indices[k]] > -2 and data[k] > 0:
                row_total += data[k]
        for k in range(indptr[row], indptr[row + 1]):
            gene = columns[indices[k]]
            value = np.float64(data[k])
            if gene < 0 or not value > 0:
                continue
            raw_sums[gene] += value
            largest[gene] = max(largest[gene], value)
            value = np.expm1(value * log_factor) if log_factor > 0.0 else value * target / row_total
            n_seen[gene] += 1
            total[gene] += value
            squares[gene] += value * value
