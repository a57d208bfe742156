"""The compiled loops that look at values and add them up, before anything is encoded."""

from __future__ import annotations

import numpy as np
from numba import njit

from scbin.encoding.kernels import row_sum


@njit(nogil=True, cache=True)
def scan_rows(first, last, indptr, data, indices, n_vars, used, sums, counts):  # type: ignore[no-untyped-def]
    """Look at every stored value. `sums` and `counts` per row are over the used columns; returns the findings."""
    not_finite = negative = negative_fraction = fractions = zeros = unsorted = outside = stored = 0
    smallest, largest = np.inf, 0.0
    for row in range(first, last):
        before = -1
        total = 0.0
        expressed = 0
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
            expressed += 1
        sums[row] = total
        counts[row] = expressed
    return (
        not_finite, negative, negative_fraction, fractions, zeros, unsorted, outside, stored, smallest, largest,
    )  # fmt: skip


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def scan_rows_fast(first, last, indptr, data, bits, indices, sums, counts, seen):  # type: ignore[no-untyped-def]
    """Take the short way for float32 values without a fault, several at a time: (largest bits, whole, zeros, unsorted).

    Bits from 0x7f800000 up are negative or not finite: then `scan_rows` has to tell which.
    """
    # slices, because an index that counts from 0 is known to be positive, which lets the loops be vectorised
    values, words = data[indptr[first] : indptr[last]], bits[indptr[first] : indptr[last]]
    highest = np.uint32(0)
    whole = np.int32(0)
    zeros = np.int32(0)
    for k in range(len(values)):
        highest = max(highest, words[k])
        whole += np.int32(values[k] == np.rint(values[k]))
        zeros += np.int32(words[k] == np.uint32(0))
    unsorted = np.int64(0)
    for row in range(first, last):
        columns = indices[indptr[row] : indptr[row + 1]]
        sums[row] = row_sum(data[indptr[row] : indptr[row + 1]])
        counts[row] = len(columns)
        down = np.int32(0)
        for k in range(len(columns) - 1):
            down += np.int32(columns[k + 1] <= columns[k])
        unsorted += down
        for k in range(len(columns)):
            seen[columns[k]] = True
    if zeros:
        for row in range(first, last):
            for k in range(indptr[row], indptr[row + 1]):
                counts[row] -= bits[k] == 0
    return highest, whole, zeros, unsorted


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
