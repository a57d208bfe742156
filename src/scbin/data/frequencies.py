"""How often and how much each gene is expressed, by phenotype: what a network that makes cells starts from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.special import expit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scbin.encoding.vocabulary import Vocabulary

MOST_COMBINATIONS = 1_000
_SWEEPS = 10
_PSEUDO = 0.5  # cells' worth of the overall frequency that each value is given
_SMALLEST_SPREAD = 0.3  # of bins, in bins
_FURTHEST = 12.0  # log odds


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Additive models over phenotype values: log odds of expression, mean bin where expressed, and size of a cell.

    Row 0 of `log_odds`, `bin_mean` and `size_mean` is all cells; the others are what each phenotype value adds, values in the
    order of the vocabulary. With one phenotype that is each value's own frequency; with several, main effects.
    """

    log_odds: np.ndarray  # (1 + values, genes) float32
    bin_mean: np.ndarray  # (1 + values, genes) float32
    bin_spread: np.ndarray  # (genes,) float32
    bin_slope: np.ndarray  # (1,) float32, bins per unit of log size
    size_mean: np.ndarray  # (1 + values,) float32, of the log of the number of expressed genes
    size_spread: np.ndarray  # (1 + values,) float32
    combinations: (
        np.ndarray
    )  # (combinations, phenotypes) int32, number of the value within its phenotype; -1 is missing
    counts: np.ndarray  # (combinations,) int32, cells of each

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {item.name: np.asarray(getattr(self, item.name)) for item in fields(self)}

    @staticmethod
    def shapes(vocabulary: Vocabulary, n_combinations: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array for a vocabulary."""
        n_rows, n_genes = 1 + n_values(vocabulary), len(vocabulary.genes)
        shapes: dict[str, tuple[int, ...]] = {"log_odds": (n_rows, n_genes), "bin_mean": (n_rows, n_genes)}
        shapes |= {"bin_spread": (n_genes,), "bin_slope": (1,), "size_mean": (n_rows,), "size_spread": (n_rows,)}
        return shapes | {"combinations": (n_combinations, len(vocabulary.phenotypes)), "counts": (n_combinations,)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> Frequencies:
        """Read back `tensors`, of the right shapes; a ValueError says what cannot be meant."""
        whole = {name: np.asarray(tensors[name], dtype=np.int32) for name in ("combinations", "counts")}
        result = cls(**{item.name: np.asarray(tensors[item.name]) for item in fields(cls)} | whole)
        numbers = np.array([len(phenotype.values) for phenotype in vocabulary.phenotypes])
        inside = (result.combinations >= -1).all() and (result.combinations < numbers).all()
        if not inside or (result.counts < 1).any() or (result.bin_spread <= 0).any() or (result.size_spread < 0).any():
            raise ValueError("the frequencies name values that the vocabulary does not have")
        return result

    def rows_of(self, values: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Return which rows add up for each combination of values (cells, 1 + phenotypes); missing ones add row 0 no more."""
        starts = np.cumsum([1, *(len(phenotype.values) for phenotype in vocabulary.phenotypes)])[:-1]
        return np.where(values >= 0, values + starts, -1)

    def sizes(self, values: np.ndarray, vocabulary: Vocabulary, normal: np.ndarray) -> np.ndarray:
        """Return a number of expressed genes for each cell, from standard normal numbers (cells,)."""
        rows = self.rows_of(values, vocabulary)
        mean = self.size_mean[0] + np.where(rows >= 0, self.size_mean[rows], 0).sum(axis=1)
        known = (rows >= 0).sum(axis=1)
        logs = np.where(rows >= 0, np.log(np.maximum(self.size_spread[rows], 1e-3)), 0).sum(axis=1)
        spread = np.where(known > 0, np.exp(logs / np.maximum(known, 1)), self.size_spread[0])
        return np.clip(np.exp(mean + spread * normal), 1, self.log_odds.shape[1])

    def priors(self, values: np.ndarray, sizes: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
        """Return log odds and mean bin of each gene for some cells, each (cells, genes).

        The log odds are moved alike for all genes of a cell until its expected number of expressed genes is its size.

        Parameters
        ----------
        values
            Number of the value of each phenotype (cells, phenotypes); -1 where it is missing.
        sizes
            Number of expressed genes (cells,).
        vocabulary
            Of the phenotypes.
        """
        unique, back = np.unique(values, axis=0, return_inverse=True)
        rows = self.rows_of(unique, vocabulary)
        odds, mean = (sum_rows(table, rows) for table in (self.log_odds, self.bin_mean))
        expected = logistic(odds).sum(axis=1)  # (combinations,)
        back = back.ravel()
        shift = _shifts(odds, back, sizes)
        distance = np.log(np.maximum(sizes, 1)) - np.log(np.maximum(expected, 1))[back]
        return odds[back] + shift[:, None], mean[back] + (self.bin_slope * distance)[:, None]


def logistic(log_odds: np.ndarray) -> np.ndarray:
    """Return the probabilities of log odds."""
    return np.asarray(expit(log_odds))


def sum_rows(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return row 0 of a table plus those that each cell names (cells, columns); -1 names none."""
    out = np.repeat(table[:1], len(rows), axis=0)
    for column in rows.T:
        out += np.where(column[:, None] >= 0, table[column], 0)
    return out


def n_values(vocabulary: Vocabulary) -> int:
    """Number of values of all phenotypes together."""
    return sum(len(phenotype.values) for phenotype in vocabulary.phenotypes)


def _shifts(odds: np.ndarray, back: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return for each cell what to add to its log odds so that they sum to its size: bisection on (cells,) numbers."""
    n_genes = odds.shape[1]
    sizes = np.clip(sizes, 1e-3, n_genes - 1e-3)
    grid = np.linspace(-_FURTHEST, _FURTHEST, 97)  # the sum is smooth: a table of it per combination is enough
    table = np.stack([logistic(odds + step).sum(axis=1) for step in grid], axis=1)
    shift = np.empty(len(sizes))
    for combination in np.unique(back):
        mine = back == combination
        shift[mine] = np.interp(np.log(sizes[mine]), np.log(table[combination]), grid)
    return shift


def fit_frequencies(levels: sparse.csr_matrix, values: np.ndarray, vocabulary: Vocabulary) -> Frequencies:
    """Count how often and how much genes are expressed in cells of each phenotype value.

    Parameters
    ----------
    levels
        Bin of each expressed gene (cells, genes).
    values
        Number of the value of each phenotype (cells, phenotypes); -1 where it is missing.
    vocabulary
        Of the phenotypes.
    """
    combinations, number, counts = np.unique(values, axis=0, return_inverse=True, return_counts=True)
    kept = np.sort(np.argsort(-counts, kind="stable")[:MOST_COMBINATIONS])
    cells = np.isin(number.ravel(), kept)
    number = np.searchsorted(kept, number.ravel()[cells])
    levels, combinations, counts = levels[cells].astype(np.float64), combinations[kept], counts[kept]
    member = sparse.csr_matrix((np.ones(len(number)), (number, np.arange(len(number)))), (len(counts), len(number)))
    on = levels.copy()
    on.data = (levels.data > 0).astype(np.float64)
    n_on, first, second = (
        _dense(member @ part) for part in (on, levels, levels.multiply(levels))
    )  # (combinations, genes)
    groups = [
        np.flatnonzero(combinations[:, n] == value)
        for n, p in enumerate(vocabulary.phenotypes)
        for value in range(len(p.values))
    ]
    log_odds = _fit_log_odds(n_on, counts.astype(np.float64), groups)
    bin_mean, fitted = fit_means(first, n_on, groups)
    squared = (second - 2 * fitted * first + fitted**2 * n_on).sum(axis=0) / np.maximum(n_on.sum(axis=0), 1)
    n_genes = np.log(np.maximum(np.asarray(on.sum(axis=1)).ravel(), 1))
    size_mean, expected_size = fit_means((member @ n_genes)[:, None], counts[:, None].astype(np.float64), groups)
    residual = n_genes - expected_size[number, 0]
    spreads = [_spread(residual)]
    spreads += [_spread(residual[np.isin(number, group)]) if len(group) else spreads[0] for group in groups]
    tokens_size = np.repeat(residual, np.diff(levels.indptr))
    off = levels.data - fitted[np.repeat(number, np.diff(levels.indptr)), levels.indices]
    slope = float(tokens_size @ off / max(float(tokens_size @ tokens_size), 1e-9))
    return Frequencies(
        log_odds.astype(np.float32),
        bin_mean.astype(np.float32),
        np.maximum(np.sqrt(np.maximum(squared, 0)), _SMALLEST_SPREAD).astype(np.float32),
        np.array([slope], dtype=np.float32),
        size_mean[:, 0].astype(np.float32),
        np.array(spreads, dtype=np.float32),
        combinations.astype(np.int32),
        counts.astype(np.int32),
    )


def _spread(values: np.ndarray) -> float:
    """Return the standard deviation as the middle two thirds show it: a few broken cells shall not widen a type."""
    low, high = np.quantile(values, [0.16, 0.84]) if len(values) else (0.0, 0.0)
    return float(high - low) / 2


def _dense(matrix: sparse.spmatrix) -> np.ndarray:
    return np.asarray(matrix.todense())


def _fit_log_odds(n_on: np.ndarray, counts: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """Main effects on log odds (1 + values, genes): each value's expected number of cells becomes the observed one."""
    overall = np.clip(n_on.sum(axis=0) / counts.sum(), 1e-5, 1 - 1e-5)
    base = np.log(overall / (1 - overall))
    effects = np.zeros((len(groups), n_on.shape[1]))
    odds = np.repeat(base[None], len(n_on), axis=0)
    for _ in range(_SWEEPS):
        for effect, group in zip(effects, groups, strict=True):
            if not len(group):
                continue
            n = counts[group].sum() + _PSEUDO
            share = (n_on[group].sum(axis=0) + _PSEUDO * overall) / n
            model = (counts[group] @ logistic(odds[group]) + _PSEUDO * overall) / n
            step = np.log(share / model * (1 - np.minimum(model, 1 - 1e-6)) / (1 - np.minimum(share, 1 - 1e-6)))
            step = np.clip(step, -4, 4)
            effect += step
            odds[group] += step
        np.clip(effects, -_FURTHEST, _FURTHEST, out=effects)
    return np.vstack([base, effects])


def fit_means(sums: np.ndarray, counts: np.ndarray, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Main effects on a mean (1 + values, columns), and what they give for each combination."""
    base = sums.sum(axis=0) / np.maximum(counts.sum(axis=0), 1)
    effects = np.zeros((len(groups), sums.shape[1]))
    fitted = np.repeat(base[None], len(sums), axis=0)
    for _ in range(_SWEEPS):
        for effect, group in zip(effects, groups, strict=True):
            if not len(group):
                continue
            left = (sums[group] - counts[group] * fitted[group]).sum(axis=0)
            step = left / (counts[group].sum(axis=0) + _PSEUDO)
            effect += step
            fitted[group] += step
    return np.vstack([base, effects]), fitted
