"""Other ways to read shifts: against null cells, as a mixture, gene by gene, and pairs against single genes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin._errors import ScbinInputError
from scbin.tl._perturb_stats import average, benjamini_hochberg, random_effects_weights, summarise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_matrix

FEWEST_FOR_MIXTURE = 4


def vs_null(
    test: csr_matrix,
    null: csr_matrix,
    *,
    names: Sequence[str] | np.ndarray,
    test_donors: np.ndarray | Sequence[str] | None = None,
    null_donors: np.ndarray | Sequence[str] | None = None,
) -> pd.DataFrame:
    """Compare each gene's shifts in the cells of interest with its shifts in null cells.

    Without donors this is the rank-sum test over cells that Geneformer makes; with donors of both, Welch's t test over the donors'
    means, which does not take ten cells of one donor for ten witnesses.

    Parameters
    ----------
    test, null
        Shifts (cells, genes) of the two sets of cells; stored means perturbed.
    names
        Of the genes.
    test_donors, null_donors
        Donor of each cell.

    Returns
    -------
    A table: `gene`, `shift`, `null_shift`, `difference`, `p_value` (NaN where either side has too few replicates), `fdr`,
    `n_cells`, `n_cells_null`, `replicates`.
    """
    names = np.asarray(names, dtype=object)
    if not len(names) == test.shape[1] == null.shape[1]:
        raise ScbinInputError("P53", f"{test.shape[1]} and {null.shape[1]} genes for {len(names)} names.")
    if (test_donors is None) != (null_donors is None):
        raise ScbinInputError("P55", "donors are needed for both sets of cells, or for neither.")
    with_donors = test_donors is not None
    ours, theirs = summarise(test, test_donors), summarise(null, null_donors)
    shift, null_shift = average(ours.mean, ours.variance, ours)[0], average(theirs.mean, theirs.variance, theirs)[0]
    if with_donors:
        p_values = _welch(ours.mean, theirs.mean)
    else:
        p_values = _rank_sums(test.tocsc(), null.tocsc())
    return pd.DataFrame(
        {
            "gene": names.astype(str).astype(object),
            "shift": shift,
            "null_shift": null_shift,
            "difference": shift - null_shift,
            "p_value": p_values,
            "fdr": benjamini_hochberg(p_values),
            "n_cells": ours.n_cells.sum(axis=0).astype(np.int64),
            "n_cells_null": theirs.n_cells.sum(axis=0).astype(np.int64),
            "replicates": np.full(len(names), "donors" if with_donors else "cells", dtype=object),
        }
    )


def _rank_sums(test: csr_matrix, null: csr_matrix) -> np.ndarray:
    from scipy.stats import ranksums

    p_values = np.full(test.shape[1], np.nan)
    for gene in range(test.shape[1]):
        ours, theirs = (m.data[m.indptr[gene] : m.indptr[gene + 1]].astype(np.float64) for m in (test, null))
        ours, theirs = ours[np.isfinite(ours)], theirs[np.isfinite(theirs)]
        if len(ours) and len(theirs):
            p_values[gene] = ranksums(ours, theirs).pvalue
    return p_values


def _welch(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Two-sided p of Welch's t test over the rows of both (genes,); NaN below two rows on a side."""
    from scipy.stats import t

    (mean_a, error_a, freedom_a), (mean_b, error_b, freedom_b) = _moments(ours), _moments(theirs)
    total = error_a + error_b
    known = (freedom_a > 0) & (freedom_b > 0) & (total > 0)
    total = np.where(known, total, 1.0)
    parts = error_a**2 / np.maximum(freedom_a, 1) + error_b**2 / np.maximum(freedom_b, 1)
    degrees = total**2 / np.where(known, parts, 1.0)
    return np.where(known, 2 * t.sf(np.abs(mean_a - mean_b) / np.sqrt(total), degrees), np.nan)


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, its squared error and degrees of freedom over the known rows of each column."""
    known = np.isfinite(values)
    n = known.sum(axis=0)
    mean = np.where(known, values, 0.0).sum(axis=0) / np.maximum(n, 1)
    square = np.where(known, (values - mean) ** 2, 0.0).sum(axis=0)
    return mean, square / np.maximum((n - 1) * n, 1), n - 1


def mixture(shifts: csr_matrix, *, names: Sequence[str] | np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Split genes into those that move cells and those that do not: two Gaussians on the genes' mean cosines.

    The component of the lower mean cosine is the impact component, whichever the fit found first. A cosine below both means
    belongs to it, one above both does not, and between them the posterior decides.

    Parameters
    ----------
    shifts
        1 - cosine of each cell under each perturbation (cells, genes); stored means perturbed.
    names
        Of the genes.
    seed
        Of the fit.

    Returns
    -------
    A table: `gene`, `n_cells`, `shift`, `impact` (whether the gene's mean lies in the impact component), `impact_share` (share of
    its cells that do), sorted as given.
    """
    from sklearn.mixture import GaussianMixture

    names = np.asarray(names, dtype=object)
    replicates = summarise(shifts, None)
    mean = replicates.mean[0]
    known = np.isfinite(mean)
    if len(names) != shifts.shape[1]:
        raise ScbinInputError("P53", f"{shifts.shape[1]} genes for {len(names)} names.")
    if known.sum() < FEWEST_FOR_MIXTURE or np.ptp(mean[known]) == 0:
        raise ScbinInputError(
            "P56",
            f"a mixture of two needs {FEWEST_FOR_MIXTURE} genes or more with different shifts; here are {known.sum()}.",
        )
    unit = mean[known].std()  # shifts of 1e-4 would drown in the fit's floor for variances
    fitted = GaussianMixture(2, random_state=seed).fit((1 - mean[known, None]) / unit)
    means = fitted.means_[:, 0]
    low = int(np.argmin(means))

    def is_impact(values: np.ndarray) -> np.ndarray:
        cosines = (1 - values) / unit
        posterior = fitted.predict(cosines[:, None]) == low if len(cosines) else np.empty(0, dtype=bool)
        return np.where(cosines <= means.min(), True, np.where(cosines >= means.max(), False, posterior))

    impact = np.zeros(len(names), dtype=bool)
    impact[known] = is_impact(mean[known])
    stored = np.isfinite(shifts.data)
    counts = np.bincount(
        shifts.indices[stored], weights=is_impact(shifts.data[stored].astype(np.float64)), minlength=len(names)
    )
    n = replicates.n_cells[0]
    share = np.where(n > 0, counts / np.maximum(n, 1), np.nan)
    return pd.DataFrame(
        {"gene": names.astype(str).astype(object), "n_cells": n, "shift": mean, "impact": impact, "impact_share": share}
    )


def aggregate(
    values: np.ndarray, perturbed: np.ndarray | Sequence[str], affected: np.ndarray | Sequence[str]
) -> pd.DataFrame:
    """Mean and spread of many values by the gene that was perturbed and the gene (or cell) that was affected.

    Parameters
    ----------
    values
        One number per cell, perturbed and affected gene.
    perturbed, affected
        What each number belongs to.

    Returns
    -------
    A table in the order in which the pairs first come: `perturbed`, `affected`, `shift`, `sd` (of the population, as
    Geneformer's), `n_cells`. NaN is not counted.
    """
    frame = pd.DataFrame(
        {
            "perturbed": np.asarray(perturbed, dtype=object),
            "affected": np.asarray(affected, dtype=object),
            "value": np.asarray(values, dtype=np.float64),
        }
    )
    grouped = frame.groupby(["perturbed", "affected"], sort=False, dropna=False)["value"]
    table = pd.DataFrame({"shift": grouped.mean(), "sd": grouped.std(ddof=0), "n_cells": grouped.count()})
    return table.reset_index()


def pair_statistics(
    single: csr_matrix,
    combined: csr_matrix,
    pairs: Sequence[tuple[int, int]] | np.ndarray,
    *,
    names: Sequence[str] | np.ndarray,
    donors: np.ndarray | Sequence[str] | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Say of each pair of genes whether both together move cells more than the sum of either alone.

    Only cells in which the pair and both genes were perturbed count, and each is compared with itself.

    Parameters
    ----------
    single
        Shifts under single perturbations (cells, genes).
    combined
        Shifts under the pairs (cells, pairs).
    pairs
        Indices of the two genes of each pair: the anchor and the other.
    names
        Of the genes.
    donors
        Donor of each cell; `None`: cells are the replicates.
    level
        Of the interval.

    Returns
    -------
    A table: `anchor`, `gene`, `n_cells`, `n_donors`, `anchor_shift`, `gene_shift`, `sum_of_shifts`, `combined_shift`,
    `combined_minus_sum` with `ci_low`, `ci_high`, `p_value` and `fdr` (is it zero?), `replicates`.
    """
    from scipy import sparse, stats

    names, chosen = np.asarray(names, dtype=object), np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    if combined.shape != (single.shape[0], len(chosen)) or len(names) != single.shape[1]:
        raise ScbinInputError("P53", f"{combined.shape} shifts of pairs do not belong to {len(chosen)} pairs.")
    first, second = (_stored(single[:, chosen[:, k]]) for k in range(2))
    both = _stored(combined)
    known = np.isfinite(first) & np.isfinite(second) & np.isfinite(both)
    cells, of = np.nonzero(known)
    excess = sparse.csr_matrix(((both - first - second)[known], (cells, of)), shape=known.shape)
    replicates = summarise(excess, donors)
    weights = random_effects_weights(replicates.mean, replicates.variance)
    mean, error, freedom = average(replicates.mean, replicates.variance, replicates, weights)
    shift = {}
    for name, values in {"anchor": first, "gene": second, "combined": both}.items():
        part = summarise(sparse.csr_matrix((values[known], (cells, of)), shape=known.shape), donors)
        # the weights of the difference for its parts too, so that they add up
        shift[name] = average(part.mean, part.variance, part, weights)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = np.where(error > 0, 2 * stats.t.sf(np.abs(mean / error), freedom), np.nan)
    margin = stats.t.ppf((1 + level) / 2, freedom) * error
    n_donors = (replicates.n_cells > 0).sum(axis=0) if donors is not None else np.zeros(len(chosen))
    return pd.DataFrame(
        {
            "anchor": names[chosen[:, 0]].astype(str).astype(object),
            "gene": names[chosen[:, 1]].astype(str).astype(object),
            "n_cells": replicates.n_cells.sum(axis=0).astype(np.int64),
            "n_donors": n_donors.astype(np.int64),
            "anchor_shift": shift["anchor"],
            "gene_shift": shift["gene"],
            "sum_of_shifts": shift["anchor"] + shift["gene"],
            "combined_shift": shift["combined"],
            "combined_minus_sum": mean,
            "ci_low": mean - margin,
            "ci_high": mean + margin,
            "p_value": p_value,
            "fdr": benjamini_hochberg(p_value),
            "replicates": np.full(len(chosen), "cells" if donors is None else "donors", dtype=object),
        }
    )


def _stored(matrix: csr_matrix) -> np.ndarray:
    """Dense, NaN where nothing is stored; a stored zero stays zero."""
    dense = np.full(matrix.shape, np.nan)
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    dense[rows, matrix.indices] = matrix.data
    return dense
