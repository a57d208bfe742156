"""What is learned from cells before they are tokenized: variable genes, medians, quantiles. One pass over row blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin.encoding.kernels import frozen
from scbin.encoding.scanning import gene_moments

if TYPE_CHECKING:
    from scbin.encoding.quantiles import QuantileSketch
    from scbin.encoding.values import Reading

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # CSR: data, indices, indptr
TARGET = 10_000.0
MEAN_BINS = 20


class GeneMoments:
    """Per gene: cells that express it, mean, variance and maximum of counts per 10,000 (logs are undone first)."""

    def __init__(self, n_genes: int, reading: Reading):
        self._reading = reading
        self.n_obs = 0
        self.n_cells = np.zeros(n_genes, dtype=np.int64)
        self._total, self._squares, self.largest, self.raw_sums = np.zeros((4, n_genes))

    def add(self, block: Rows, columns: np.ndarray) -> None:
        """Take in a block of rows."""
        data, indices, indptr = block
        sums = (self.n_cells, self._total, self._squares, self.largest, self.raw_sums)
        rows = (frozen(indptr), frozen(data), frozen(indices), frozen(columns))
        gene_moments(*rows, TARGET, self._reading.log_factor, *sums)
        self.n_obs += len(indptr) - 1

    @property
    def mean(self) -> np.ndarray:
        """Mean of each gene over all cells (genes,)."""
        return self._total / max(1, self.n_obs)

    @property
    def variance(self) -> np.ndarray:
        """Unbiased variance of each gene over all cells (genes,)."""
        return np.maximum(self._squares / max(1, self.n_obs) - self.mean**2, 0) * self.n_obs / max(1, self.n_obs - 1)

    @property
    def shares(self) -> np.ndarray:
        """Share of all stored counts (or logs) that each gene holds (genes,), to six digits."""
        shares = self.raw_sums / max(self.raw_sums.sum(), 1e-300)
        return np.array([float(f"{share:.6g}") for share in shares])

    def most_variable(self, n_genes: int, *, min_cells: int = 3) -> np.ndarray:
        """Return the indices of the `n_genes` most variable genes, in the order of the columns.

        The rule is scanpy's default (Seurat's): dispersion of counts per 10,000, standardised among genes of like mean; only
        genes that `min_cells` cells express take part.
        """
        if len(self.n_cells) <= n_genes:
            return np.arange(len(self.n_cells))
        seen = np.flatnonzero(self.n_cells >= min(min_cells, max(1, self.n_obs)))
        if len(seen) <= n_genes:
            return seen if len(seen) else np.arange(n_genes)
        scores = _dispersion(self.mean[seen], self.variance[seen])
        scores = np.where(np.isnan(scores), -np.inf, scores)
        return np.sort(seen[np.argsort(-scores, kind="stable")[:n_genes]])


def _dispersion(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Standardise log(variance / mean) within 20 bins of log1p(mean); a bin of one gene gives it 1."""
    ratio = variance / np.where(mean == 0, 1e-12, mean)
    dispersion = np.log(np.where(ratio == 0, np.nan, ratio))
    frame = pd.DataFrame({"value": dispersion, "bin": pd.cut(np.log1p(mean), bins=MEAN_BINS)})
    groups = frame.groupby("bin", observed=True)["value"]
    centre, spread = groups.transform("mean"), groups.transform("std")
    alone = spread.isna()
    spread, centre = spread.where(~alone, centre), centre.where(~alone, 0.0)
    return ((frame["value"] - centre) / spread).to_numpy(dtype=np.float64)


def add_normalised(
    sketch: QuantileSketch,
    block: Rows,
    columns: np.ndarray,
    reading: Reading,
    *,
    logs: bool,
    one_group: bool = False,
) -> None:
    """Put the expressed values of a block, per 10,000 counts, into a sketch by gene; with `logs` as log1p of that."""
    data, indices, indptr = block
    genes = columns[indices]
    values = np.where(genes > -2, np.maximum(data, 0).astype(np.float64), 0.0)
    if reading.log_factor and logs:
        values *= reading.log_factor
    else:
        if reading.log_factor:
            values = np.expm1(values * reading.log_factor)
        rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        sums = np.bincount(rows, weights=values, minlength=len(indptr) - 1)
        values *= (TARGET / np.where(sums > 0, sums, 1.0))[rows]
        if logs:
            values = np.log1p(values)
    kept = (genes >= 0) & (values > 0)
    sketch.add(np.zeros(kept.sum(), dtype=np.int32) if one_group else genes[kept], values[kept])
