"""From shifts of cells to one row per gene: mean, effect, interval, p value. Arrays in, a table out, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scbin._errors import ScbinInputError
from scbin.tl._perturb_nulls import FEWEST_NULL, chunks, gathered, median, null_genes, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_matrix

NO_DONOR = ("", "nan", "none", "unknown")
MAD_EFFICIENCY = 0.37  # share of the null genes that a median deviation is worth, against a standard deviation
MEDIAN_VARIANCE = np.pi / 2  # variance of a median in units of the mean's, for normal values


@dataclass(frozen=True)
class Replicates:
    """Mean shift of every gene in every replicate: rows are donors, or there is one row for all cells."""

    mean: np.ndarray  # (replicates, genes), NaN where the gene was edited in no cell
    variance: np.ndarray  # of these means, from the scatter of cells (replicates, genes)
    n_cells: np.ndarray  # (replicates, genes)
    are_donors: bool


def gene_statistics(
    shifts: csr_matrix,
    *,
    names: Sequence[str] | np.ndarray,
    expression: csr_matrix,
    donors: np.ndarray | Sequence[str] | None = None,
    null: str | Sequence[str] | np.ndarray = "matched",
    exact: bool | np.ndarray = True,
    scale: Literal["auto", "signed", "magnitude"] = "auto",
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Say for each gene how far its perturbation moves cells, and whether genes alike move them as far.

    Every gene is compared with up to 100 other tested genes of the same mean expression and detection, or with a null set that you
    name. With `donors`, each donor counts once: the differences to the null genes' median within each donor are averaged with
    random-effects weights, and their scatter over donors gives the interval. The p value asks whether a random gene of the
    null set would lie as far out, given how widely these genes scatter and how uncertain the gene's own mean is.

    Parameters
    ----------
    shifts
        Shift of each cell under each perturbation (cells, genes). What is stored was perturbed in that cell, also a stored
        zero; NaN counts as not perturbed.
    names
        Of the genes (columns).
    expression
        Expression of the same cells and genes, to match genes by.
    donors
        Donor of each cell; missing, "" and "unknown" are left out. `None`: cells are the replicates.
    null
        `"matched"`, or names of the genes to compare with.
    exact
        Which genes were computed exactly rather than screened (genes,), carried into the table.
    scale
        `"signed"`: shifts have a direction (towards a goal); two-sided tests. `"magnitude"`: shifts are lengths, compared as
        logarithms; one-sided. `"auto"`: magnitude if no shift is negative.
    level
        Of the intervals.
    seed
        Breaks ties among genes of equal expression.

    Returns
    -------
    A table, one row per gene in order: `gene`, `n_cells`, `n_donors`, `shift`, `effect_size` (distance to the null genes'
    median in their standard deviations) with `ci_low` and `ci_high` over the replicates, `p_value`, `fdr`
    (Benjamini-Hochberg), `exact`, `shift_low`, `shift_high`, `null_shift`, `null_low`, `null_high` (where the null genes lie),
    `permutation_p_value` (rank among the null genes), `n_null`, `replicates` ("donors" or "cells") and `note`: why numbers
    are missing.
    """
    names = np.asarray(names, dtype=object)
    _check(shifts, names, expression, donors, level)
    replicates = summarise(shifts, donors)
    signed = _is_signed(shifts, scale)
    n = replicates.n_cells.sum(axis=0)
    others = null_genes(names, n > 0, expression, null, seed=seed)
    measure = _compare(replicates, others, signed=signed, level=level)
    n_replicates = (replicates.n_cells > 0).sum(axis=0)
    table = pd.DataFrame(
        {
            "gene": names.astype(str).astype(object),
            "n_cells": n.astype(np.int64),
            "n_donors": n_replicates.astype(np.int64) if replicates.are_donors else np.zeros(len(n), dtype=np.int64),
            **{name: measure[name] for name in ("shift", "effect_size", "ci_low", "ci_high", "p_value")},
            "fdr": benjamini_hochberg(measure["p_value"]),
            "exact": np.broadcast_to(np.asarray(exact, dtype=bool), n.shape).copy(),
            **{name: measure[name] for name in ("shift_low", "shift_high", "null_shift", "null_low", "null_high")},
            "permutation_p_value": measure["permutation_p_value"],
            "n_null": measure["n_null"].astype(np.int64),
            "replicates": "donors" if replicates.are_donors else "cells",
        }
    )
    table["replicates"] = table["replicates"].astype(object)
    table["note"] = _notes(table, n_replicates)
    return table


def benjamini_hochberg(p_values: np.ndarray) -> np.ndarray:
    """False discovery rate of each p value; NaN stays NaN and is not counted as a test."""
    p_values = np.asarray(p_values, dtype=np.float64)
    fdr = np.full(p_values.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p_values))
    order = known[np.argsort(p_values[known], kind="stable")[::-1]]  # largest first
    n = len(order)
    fdr[order] = np.minimum.accumulate(np.minimum(p_values[order] * n / np.arange(n, 0, -1), 1.0))
    return fdr


def summarise(shifts: csr_matrix, donors: np.ndarray | Sequence[str] | None) -> Replicates:
    """Average the stored shifts of each gene over each donor's cells, or over all cells."""
    n_cells, n_genes = shifts.shape
    codes = np.zeros(n_cells, dtype=np.int64) if donors is None else donor_codes(donors)
    rows = codes[np.repeat(np.arange(n_cells), np.diff(shifts.indptr))]
    values = shifts.data.astype(np.float64)
    used = np.isfinite(values) & (rows >= 0)
    rows, columns, values = rows[used], shifts.indices[used].astype(np.int64), values[used]
    shape = (int(codes.max(initial=0)) + 1, n_genes)
    cell = rows * n_genes + columns
    n = np.bincount(cell, minlength=shape[0] * n_genes).reshape(shape)
    total = np.bincount(cell, weights=values, minlength=shape[0] * n_genes).reshape(shape)
    mean = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    squares = np.bincount(cell, weights=(values - mean.ravel()[cell]) ** 2, minlength=n.size).reshape(shape)
    # one scatter of cells for all donors of a gene: few cells of one donor say little about it
    freedom = np.maximum(n - 1, 0).sum(axis=0)
    scatter = np.where(freedom > 0, squares.sum(axis=0) / np.maximum(freedom, 1), np.nan)
    return Replicates(mean, np.where(n > 0, scatter / np.maximum(n, 1), np.nan), n, donors is not None)


def donor_codes(donors: np.ndarray | Sequence[str]) -> np.ndarray:
    """Number of each cell's donor, -1 where it is not known."""
    names = pd.Series(list(donors), dtype=object)
    missing = names.isna() | names.astype(str).str.strip().str.lower().isin(NO_DONOR)
    codes = pd.Categorical(names.where(~missing, None).map(str, na_action="ignore")).codes.astype(np.int64)
    if not (codes >= 0).any():
        raise ScbinInputError(
            "P52",
            f"none of the {len(names):,} cells has a known donor. Leave donor_key= out, then cells are the replicates.",
        )
    return codes


# ---- the comparison -------------------------------------------------------------------------------------------------


def _compare(replicates: Replicates, others: np.ndarray, *, signed: bool, level: float) -> dict[str, np.ndarray]:
    """Difference of each gene to its null genes on the scale of the test, with all that follows from it."""
    from scipy import stats

    scale = _Linear() if signed else _Logarithm.of(replicates)
    values = scale.forward(replicates.mean)
    variances = replicates.variance * scale.slope(replicates.mean) ** 2
    reference = np.concatenate([median(gathered(values, others[part])) for part in chunks(others, len(values))], axis=1)
    mean, error, freedom = average(values - reference, variances, replicates)
    shift, shift_error, shift_freedom = average(replicates.mean, replicates.variance, replicates)
    null_spread, null_variance, n_null, rank = _null_scatter(mean, error, others, signed=signed)
    enough = n_null >= FEWEST_NULL
    unit = np.where(enough & (null_spread > 0), null_spread, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        # the null genes' scatter holds their own errors already; a gene less certain than they are adds the rest
        between = null_spread**2 * (1 + MEDIAN_VARIANCE / np.maximum(n_null, 1))
        own = np.where(np.isfinite(error), np.maximum(error**2 - null_variance, 0.0), np.nan)
        total = between + own
        degrees = total**2 / (between**2 / (MAD_EFFICIENCY * (n_null - 1)) + own**2 / freedom)  # Satterthwaite
        statistic = np.where(enough & (total > 0), mean / np.sqrt(total), np.nan)
        p_value = 2 * stats.t.sf(np.abs(statistic), degrees) if signed else stats.t.sf(statistic, degrees)
    margin = stats.t.ppf((1 + level) / 2, freedom) * error
    shift_margin = stats.t.ppf((1 + level) / 2, shift_freedom) * shift_error
    centre, band = scale.forward(shift) - mean, stats.norm.ppf((1 + level) / 2) * unit
    return {
        "shift": shift,
        "effect_size": mean / unit,
        "ci_low": (mean - margin) / unit,
        "ci_high": (mean + margin) / unit,
        "p_value": p_value,
        "shift_low": shift - shift_margin,
        "shift_high": shift + shift_margin,
        "null_shift": np.where(enough, scale.back(centre), np.nan),
        "null_low": scale.back(centre - band),
        "null_high": scale.back(centre + band),
        "permutation_p_value": np.where(enough, rank, np.nan),
        "n_null": n_null,
    }


def average(
    values: np.ndarray, variances: np.ndarray, replicates: Replicates, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each gene over its replicates, the error of this mean and its degrees of freedom (genes,).

    Over donors: random-effects weights (DerSimonian and Laird), and the error from the scatter of the donors themselves (Hartung
    and Knapp), which stays honest with few of them. With equal numbers of cells it is the usual mean and t interval.
    """
    if not replicates.are_donors:
        freedom = np.where(replicates.n_cells[0] > 1, replicates.n_cells[0] - 1.0, np.nan)
        return values[0], np.sqrt(np.where(np.isfinite(freedom), variances[0], np.nan)), freedom
    known = np.isfinite(values)
    n = known.sum(axis=0)
    filled = np.where(known, values, 0.0)
    weights = random_effects_weights(values, variances) if weights is None else weights
    total = np.maximum(weights.sum(axis=0), np.finfo(float).tiny)
    mean = np.where(n > 0, (weights * filled).sum(axis=0) / total, np.nan)
    freedom = np.where(n > 1, n - 1.0, np.nan)
    square = (weights * np.where(known, values - mean, 0.0) ** 2).sum(axis=0) / (freedom * total)
    return mean, np.sqrt(square), freedom


def random_effects_weights(values: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """1 / (variance of a donor's mean + variance between donors), 0 for a donor without a value (donors, genes).

    All donors alike where cells tell nothing of the variance of their means.
    """
    known = np.isfinite(values)
    values = np.where(known, values, 0.0)
    usable = known & (variances > 0)
    whole = (usable | ~known).all(axis=0)
    fixed = np.where(usable, 1 / np.where(usable, variances, 1.0), 0.0)
    total = np.maximum(fixed.sum(axis=0), np.finfo(float).tiny)
    centre = (fixed * values).sum(axis=0) / total
    excess = (fixed * (values - centre) ** 2).sum(axis=0) - (known.sum(axis=0) - 1)
    divisor = total - (fixed**2).sum(axis=0) / total
    between = np.where(divisor > 0, np.maximum(excess, 0.0) / np.where(divisor > 0, divisor, 1.0), 0.0)
    weights = np.where(usable, 1 / np.where(usable, variances + between, 1.0), 0.0)
    return np.where(whole, weights, known.astype(np.float64))


def _null_scatter(
    mean: np.ndarray, error: np.ndarray, others: np.ndarray, *, signed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Spread of the null genes, the part of it that is their own error, their number, and a gene's rank among them."""
    scatter, own_error, count, rank = np.full((4, len(mean)), np.nan)
    for part in chunks(others):
        alike = gathered(mean, others[part])  # (genes, null genes)
        scatter[part] = spread(alike)
        own_error[part] = np.nan_to_num(median(gathered(error**2, others[part])))
        count[part] = np.isfinite(alike).sum(axis=-1)
        every = np.concatenate([mean[part, None], alike], axis=-1)
        centred = np.abs(every - median(every)[:, None]) if signed else every
        farther = (centred[:, 1:] >= centred[:, :1] * (1 - 1e-12)).sum(axis=-1)
        rank[part] = np.where(np.isfinite(mean[part]), (farther + 1) / (count[part] + 1), np.nan)
    return scatter, own_error, count, rank


class _Linear:
    """Shifts with a direction are compared as they are."""

    def forward(self, values: np.ndarray) -> np.ndarray:
        return values

    def slope(self, values: np.ndarray) -> np.ndarray:
        return np.ones_like(values)

    def back(self, values: np.ndarray) -> np.ndarray:
        return values


@dataclass(frozen=True)
class _Logarithm:
    """Lengths are compared as logarithms: they scatter by factors, and far out on one side only."""

    floor: float  # lengths below are no length at all

    @classmethod
    def of(cls, replicates: Replicates) -> _Logarithm:
        positive = replicates.mean[replicates.mean > 0]
        return cls(1e-3 * float(np.median(positive)) if positive.size else 1.0)

    def forward(self, values: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(values, self.floor))

    def slope(self, values: np.ndarray) -> np.ndarray:
        return 1 / np.maximum(values, self.floor)

    def back(self, values: np.ndarray) -> np.ndarray:
        return np.exp(values)


# ---- what is asked, what is missing ---------------------------------------------------------------------------------


def _is_signed(shifts: csr_matrix, scale: str) -> bool:
    if scale != "auto":
        return scale == "signed"
    # a cosine's rounding may put a length just below zero
    known = shifts.data[np.isfinite(shifts.data)]
    return bool(known.size and known.min() < -1e-6)


def _notes(table: pd.DataFrame, n_replicates: np.ndarray) -> np.ndarray:
    """Say why a gene has no p value."""
    word = "donor" if (table["replicates"] == "donors").all() else "cell"
    n = n_replicates if word == "donor" else table["n_cells"].to_numpy()
    missing = table["p_value"].isna().to_numpy()
    few = table["n_null"].to_numpy() < FEWEST_NULL
    reasons = [
        (
            table["n_cells"].to_numpy() == 0,
            "perturbed in no cell" if word == "cell" else "perturbed in no cell of a known donor",
        ),
        (n == 1, f"one {word} only: no scatter to judge by"),
        (few, f"fewer than {FEWEST_NULL} genes to compare with"),
        (missing, "nothing varies"),
    ]
    return np.select([why & missing for why, _ in reasons], [text for _, text in reasons], "").astype(object)


def _check(
    shifts: csr_matrix,
    names: np.ndarray,
    expression: csr_matrix,
    donors: np.ndarray | Sequence[str] | None,
    level: float,
) -> None:
    if len(names) != shifts.shape[1] or expression.shape != shifts.shape:
        raise ScbinInputError(
            "P53",
            f"{shifts.shape} shifts, {expression.shape} expression values and {len(names)} gene names do not belong together.",
        )
    if donors is not None and len(donors) != shifts.shape[0]:
        raise ScbinInputError("P53", f"{len(donors)} donors for {shifts.shape[0]} cells.")
    if not 0 < level < 1:
        raise ScbinInputError("P54", f"level is {level}; it lies between 0 and 1, for instance 0.95.")
