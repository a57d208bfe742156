"""From shifts of cells to one row per gene, and other questions to shifts that were computed already."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse, special, stats
from scipy.optimize import minimize_scalar

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, iter_blocks, read_obs, write_entry
from scbin._arguments import check_fields, checked, config
from scbin._errors import ScbinInputError
from scbin.get import read_perturbation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

N_NULL = 100  # genes of the same expression that a gene is compared with
FEWEST_NULL = 5  # with fewer nobody knows how widely genes alike scatter
NO_DONOR = ("", "nan", "none", "unknown")
MEDIAN_VARIANCE = np.pi / 2  # variance of a median in units of the mean's, for normal values
MIDDLE = 0.8  # share of the null scores that the empirical null is fitted to: hits lie outside
TAILS = (1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 30.0, 1000.0)  # degrees of freedom that are tried
AS_LIKELY = 1.35  # log likelihood by which a heavier tail may fit worse and is still assumed: 90 % interval


@dataclass(frozen=True)
class Statistics:
    """How the effects of genes are judged.

    Parameters
    ----------
    donor_key
        Column of `obs` with the donors, who are then the replicates. Default: cells, which overstates the certainty.
    null
        What a gene is compared with: `"matched"`, genes of the same expression and detection, or names of tested genes.
    n_permutations
        With a goal, the number of permutations of the states of cells (or donors): the p value says how often a gene moves cells
        as far towards the goal of a random labelling. With 0, it is compared with other genes instead.
    confidence
        Of the intervals.
    seed
        Seed of permutations, random genes and ties.
    """

    donor_key: str | None = None
    null: str | Sequence[str] = "matched"
    n_permutations: int = 200
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        known = not isinstance(self.null, str) or self.null == "matched"
        if not (0 < self.confidence < 1 and self.n_permutations >= 0 and known):
            rule = "confidence lies between 0 and 1, n_permutations is 0 or more, null is 'matched' or a list of genes"
            raise ScbinInputError("A02", f"{self}: {rule}.")


# ---- replicates: donors or cells ------------------------------------------------------------------------------------


def donor_codes(donors: np.ndarray | Sequence[str]) -> np.ndarray:
    """Return the number of each cell's donor, -1 where it is not known."""
    names = pd.Series(list(donors), dtype=object)
    missing = names.isna() | names.astype(str).str.strip().str.lower().isin(NO_DONOR)
    if missing.all():
        raise ScbinInputError("P02", f"none of the {len(names):,} cells has a known donor. Leave donor_key out.")
    return pd.Categorical(names.where(~missing, None).map(str, na_action="ignore")).codes.astype(np.int64)


def summarise(
    shifts: sparse.csr_matrix, donors: np.ndarray | Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, standard error and number of the stored shifts of each gene in each donor's cells, or in one row in all.

    What is not stored or NaN is not counted; the mean is NaN where nothing is, the error where there is one cell.
    """
    codes = np.zeros(shifts.shape[0], dtype=np.int64) if donors is None else donor_codes(donors)
    donor, values = np.repeat(codes, np.diff(shifts.indptr)), shifts.data.astype(np.float64)
    used = np.isfinite(values) & (donor >= 0)
    by_both = pd.Series(values[used]).groupby([donor[used], shifts.indices[used]]).agg(["mean", "sem", "count"])
    shape = {"index": range(codes.max(initial=0) + 1), "columns": range(shifts.shape[1])}
    mean, error, n = (by_both[name].unstack().reindex(**shape).to_numpy() for name in by_both)
    return mean, error, np.nan_to_num(n).astype(np.int64)


# ---- the null -------------------------------------------------------------------------------------------------------


def null_genes(
    names: np.ndarray, tested: np.ndarray, expression: sparse.csr_matrix, null: str | Sequence[str], *, seed: int
) -> np.ndarray:
    """Return for each gene the indices of those it is compared with (genes, N_NULL or chosen); -1 is nobody.

    A gene is never among its own, and neither is one that was not tested. `"matched"` takes the tested genes that are nearest
    in mean expression and in the share of cells that express them, both as ranks.
    """
    from sklearn.neighbors import NearestNeighbors

    if not isinstance(null, str):
        places = pd.Index(names.astype(str)).get_indexer(list(null))
        if (places < 0).any():
            raise ScbinInputError("A06", f"the null gene {null[int(np.argmin(places))]!r} was not perturbed.")
        result = np.tile(np.unique(places[tested[places]]), (len(names), 1))
        result[result == np.arange(len(names))[:, None]] = -1
        return result
    candidates = np.flatnonzero(tested)
    result = np.full((len(tested), max(min(N_NULL, len(candidates) - 1), 0)), -1)
    if result.shape[1]:
        counts = sparse.csc_matrix(expression)
        ranks = stats.rankdata([counts.sum(axis=0).A1[candidates], (counts > 0).sum(axis=0).A1[candidates]], axis=1).T
        ranks = ranks + np.random.default_rng(seed).uniform(-1e-3, 1e-3, ranks.shape)  # ties are broken at random
        nearest = NearestNeighbors(n_neighbors=result.shape[1]).fit(ranks).kneighbors(return_distance=False)
        result[candidates] = candidates[nearest]
    return result


def fit_null(scores: np.ndarray) -> tuple[float, float]:
    """Return scale and degrees of freedom of the t distribution that the middle of the null scores follows.

    Efron's empirical null: of what lies far out, hits among it, only the number counts. Of tails that are about as likely the
    heaviest are taken.
    """
    sizes = np.abs(scores[np.isfinite(scores)])
    edge = np.quantile(sizes, MIDDLE) if len(sizes) else 0.0
    inside = sizes[sizes <= edge]
    if edge <= 0:
        return np.nan, np.nan

    def loss(log_scale: float, freedom: float) -> float:
        beyond = (len(sizes) - len(inside)) * np.log(2 * stats.t.sf(edge / np.exp(log_scale), freedom))
        return float(-stats.t.logpdf(inside, freedom, scale=np.exp(log_scale)).sum() - beyond)

    bounds = (np.log(edge / 1.28) - 3, np.log(edge / 1.28) + 3)
    found = [minimize_scalar(loss, bounds=bounds, args=(freedom,), method="bounded") for freedom in TAILS]
    losses = np.array([each.fun for each in found])
    chosen = int(np.flatnonzero(losses <= losses.min() + AS_LIKELY)[0])
    return float(np.exp(found[chosen].x)), TAILS[chosen]


def false_discovery_rates(p_values: np.ndarray) -> np.ndarray:
    """Return Benjamini and Hochberg's FDR of each p value; NaN stays NaN and is not counted as a test."""
    fdr = np.full(len(p_values), np.nan)
    known = np.isfinite(p_values)
    if known.any():
        fdr[known] = stats.false_discovery_control(p_values[known])
    return fdr


# ---- permuted states -------------------------------------------------------------------------------------------------


def permuted_labels(donors: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the labels of samples (each a donor and a label) permuted.

    Donors with several labels swap theirs; the others pass theirs to other donors.
    """
    n_labels, new = np.bincount(donors)[donors], labels.copy()
    for group in [n_labels == 1, *(donors == donor for donor in np.unique(donors[n_labels > 1]))]:
        new[group] = rng.permutation(new[group])
    return new


def permuted_means(
    vectors: Sequence[np.ndarray], donors: Sequence[np.ndarray] | None, n_permutations: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the mean vectors of states whose labels are permuted (permutations, states, size); NaN vectors do not count.

    With donors, the cells of a donor and a state keep together. Beside them: the means to expect for each cell of state 1 if its own
    label stays (cells, states, size), for it pulls the means of the others away from itself, under any labels; and how many labellings
    there are.
    """
    labels = np.repeat(np.arange(len(vectors)), [len(part) for part in vectors])
    every, rng = np.concatenate(vectors).astype(np.float64), np.random.default_rng(seed)
    codes = np.arange(len(labels)) if donors is None else donor_codes(np.concatenate(list(donors)))
    known = np.isfinite(every).all(axis=1) & (codes >= 0)
    _, sample = np.unique(np.stack([codes, labels])[:, known], axis=1, return_inverse=True)
    sample = sample.reshape(-1)
    first = np.flatnonzero(known)[np.unique(sample, return_index=True)[1]]
    donor, label = np.unique(codes[first], return_inverse=True)[1], labels[first]
    by_sample = sparse.csr_matrix((np.ones(len(sample)), (sample, np.arange(len(sample)))))
    sums = by_sample @ np.column_stack(
        [every[known], np.ones(len(sample))]
    )  # (samples, size + 1), the number of cells last

    def means(sums: np.ndarray) -> np.ndarray:
        return sums[..., :-1] / np.maximum(sums[..., -1:], 1e-9)

    result = np.empty((n_permutations, len(vectors), every.shape[1]))
    for p in range(n_permutations):
        where = (permuted_labels(donor, label, rng), np.arange(len(donor)))
        result[p] = means(sparse.csr_matrix((np.ones(len(donor)), where), shape=(len(vectors), len(donor))) @ sums)
    stratum = np.unique(np.where(np.bincount(donor)[donor] == 1, -1, donor), return_inverse=True)[1]
    state, is_start = np.eye(len(vectors))[label], np.eye(len(vectors))[1]
    size = np.bincount(stratum)[stratum][:, None]
    within = sparse.csr_matrix((np.ones(len(stratum)), (stratum, np.arange(len(stratum)))))  # where labels are permuted
    n_of, here = within @ state, (within @ state)[stratum]  # samples of each state
    total = (within @ sums)[stratum]
    rest = (here / size).T @ sums - (here / size)[:, :, None] * total[:, None]
    own = ((here - is_start) / np.maximum(size - 1, 1))[:, :, None] * (total - sums)[:, None]
    expected = np.full((len(labels), len(vectors), every.shape[1]), np.nan)
    expected[known] = means(rest + own + is_start[:, None] * sums[:, None])[sample]
    log_labellings = special.gammaln(n_of.sum(axis=1) + 1).sum() - special.gammaln(n_of + 1).sum()
    return result, expected[labels == 1], math.exp(min(log_labellings, 700.0))  # beyond, all the same


def permutation_p_values(observed: np.ndarray, permuted: np.ndarray, labellings: float = np.inf) -> np.ndarray:
    """Return how often a shift (genes,) is reached under permuted labels (permutations, genes), two-sided.

    Each gene is measured in its own standard deviation over the labellings, the true one among them, so that one that moves cells
    far does not stand out for that; the scores under permuted labels of all genes are then one null distribution. No labelling, nor its
    mirror, is rarer than one of all `labellings`.
    """
    every = np.concatenate([observed[None], permuted])
    centred = every - every.mean(axis=0)
    size = np.sqrt((centred**2).mean(axis=0))
    scores = np.abs(centred) / np.where(size > 1e-12 * max(float(np.nanmax(size, initial=0)), 1e-300), size, np.nan)
    null = np.sort(scores[1:][np.isfinite(scores[1:])])
    reached = len(null) - np.searchsorted(null, scores[0] * (1 - 1e-9), side="left")
    p_values = np.clip((reached + 1) / (len(null) + 1), min(2 / labellings, 1), 1)
    return np.where(np.isfinite(scores[0]), p_values, np.nan)


# ---- one row per gene -----------------------------------------------------------------------------------------------


def gene_statistics(
    summary: tuple[np.ndarray, np.ndarray, np.ndarray],
    names: Sequence[str] | np.ndarray,
    expression: sparse.csr_matrix,
    judged: Statistics,
    *,
    limits: tuple[float, float] = (0.0, 2.0),
) -> pd.DataFrame:
    """Say for each gene how far its perturbation moves cells, and whether genes alike move them as far.

    A gene is compared with tested genes of the same mean expression and detection, or with a null set: with the median of their
    shifts in each donor, or over cells. Lengths are compared by their logarithms, for they scatter by factors. The interval is that
    of these differences over donors. The p value asks whether a random gene of the null set would lie as far out, against the
    empirical null of all scores, whose tails are as heavy as these genes'.

    `summary` is what :func:`summarise` makes of the shifts, `expression` of the same cells what genes are matched by. `limits` are
    the smallest and largest shift that there can be; with 0 as the smallest, shifts are lengths and tests one-sided.

    The table has a row per gene: `gene`, `n_cells`, `n_donors`, `shift` with `shift_low` and `shift_high`, `effect_size` (distance
    to the null genes' median in their standard deviations) with `ci_low` and `ci_high`, `p_value`, `fdr`, `null_low` and `null_high`
    (where the null genes lie). Statistics are NaN of a gene with one cell (donor) or with fewer than five genes to compare with.
    """
    (means, errors, n_of), by_donor = summary, judged.donor_key is not None
    signed, positive, wide = limits[0] < 0, means[means > 0], (1 + judged.confidence) / 2
    floor = 1e-3 * float(np.median(positive)) if positive.size else 1.0  # shorter ones are none

    def forward(x: np.ndarray) -> np.ndarray:
        return x if signed else np.log(np.maximum(x, floor))

    def back(y: np.ndarray) -> np.ndarray:
        return np.clip(y if signed else np.exp(y), *limits)

    def average(values: np.ndarray, slope: np.ndarray | float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean, standard error and half the interval; over cells the error is that of the shifts times a slope."""
        frame = pd.DataFrame(values)
        error, n = (frame.sem(), frame.count()) if by_donor else (pd.Series(errors[0] * slope), pd.Series(n_of[0]))
        return frame.mean().to_numpy(), error.to_numpy(), stats.t.ppf(wide, (n - 1.0).where(n > 1)) * error.to_numpy()

    n, names = n_of.sum(axis=0), np.asarray(names, dtype=str).astype(object)
    others = null_genes(names, n > 0, expression, judged.null, seed=judged.seed)
    values = forward(means)
    reference = np.stack([_median(_alike(row, others)) for row in values])
    shift, _, shift_margin = average(means)
    slope = 1.0 if signed else 1 / np.maximum(shift, floor)
    mean, error, margin = average(values - reference, slope)
    unit, p_values = _against_null(mean, error, others, judged, signed)
    centre, band = forward(shift) - mean, stats.norm.ppf(wide) * unit
    columns = {"gene": names, "n_cells": n, "n_donors": (n_of > 0).sum(axis=0) * by_donor, "shift": shift}
    columns["shift_low"] = np.minimum(back(forward(shift) - shift_margin * slope), shift)
    columns["shift_high"] = np.maximum(back(forward(shift) + shift_margin * slope), shift)
    columns |= {"effect_size": mean / unit, "ci_low": (mean - margin) / unit, "ci_high": (mean + margin) / unit}
    columns |= {"p_value": p_values, "fdr": false_discovery_rates(p_values)}
    return pd.DataFrame(columns | {"null_low": back(centre - band), "null_high": back(centre + band)})


def _against_null(
    mean: np.ndarray, error: np.ndarray, others: np.ndarray, judged: Statistics, signed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the standard deviation of each gene's null genes, and the p values (genes,)."""
    alike = _alike(mean, others)
    spread, null_variance = _spread(alike), np.nan_to_num(_median(_alike(error**2, others)))
    n_null = np.isfinite(alike).sum(axis=1)
    unit = np.where((n_null >= FEWEST_NULL) & np.isfinite(mean) & (spread > 0), spread, np.nan)
    # the null genes' scatter holds their own errors already; a gene less certain than they are adds the rest
    more = np.where(np.isfinite(error), np.maximum(error**2 - null_variance, 0.0), np.nan)
    score = mean / np.sqrt(unit**2 * (1 + MEDIAN_VARIANCE / np.maximum(n_null, 1)) + more)
    null = score if isinstance(judged.null, str) else score[np.unique(others[others >= 0])]
    width, tail = fit_null(null if signed else null[null > 0])
    p_values = stats.t.sf(np.abs(score) / width, tail) * 2 if signed else stats.t.sf(score / width, tail)
    return unit, p_values


def _alike(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the values (genes,) of each gene's null genes (genes, most), NaN for nobody."""
    return np.append(values, np.nan)[others]


def _median(values: np.ndarray) -> np.ndarray:
    """Return the median of each row without the NaNs; NaN where there is nothing else."""
    return pd.DataFrame(values).median(axis=1).to_numpy()


def _spread(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each row as the median deviation tells it (hits do not widen it), or the usual where that is 0."""
    robust = 1.4826 * _median(np.abs(values - _median(values)[:, None]))
    return np.where(robust > 0, robust, pd.DataFrame(values).std(axis=1))


# ---- other ways to read shifts --------------------------------------------------------------------------------------


def dense(shifts: sparse.csr_matrix) -> np.ndarray:
    """Return shifts (cells, genes) with NaN where nothing is stored; a stored zero is a shift."""
    values = np.full(shifts.shape, np.nan)
    values[np.repeat(np.arange(len(values)), np.diff(shifts.indptr)), shifts.indices] = shifts.data
    return values


def mixture(shifts: sparse.csr_matrix, names: Sequence[str] | np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Split genes into those that move cells and those that do not: two Gaussians on the genes' mean cosines, as in Geneformer.

    `impact` is the component of the lower mean cosine, `impact_share` the share of a gene's cells that lie in it.
    """
    from sklearn.mixture import GaussianMixture

    (mean,), _, (n,) = summarise(shifts, None)
    known = np.isfinite(mean)
    if known.sum() < 4 or np.ptp(mean[known]) == 0:
        raise ScbinInputError("P02", f"a mixture of two needs 4 genes with different shifts; here are {known.sum()}.")
    scale = mean[known].std()  # shifts of 1e-4 would drown in the fit's floor for variances
    fitted = GaussianMixture(2, random_state=seed).fit(-mean[known, None] / scale)
    low, high = np.sort(fitted.means_[:, 0])

    def is_impact(values: np.ndarray) -> np.ndarray:
        """Whether cosines are in the lower component; beyond both means the nearer one has them."""
        cosines = -np.nan_to_num(values, nan=-np.inf).astype(np.float64) / scale
        lower = fitted.predict(np.clip(cosines, low, high)[:, None]) == np.argmin(fitted.means_[:, 0])
        return (cosines <= low) | (lower & (cosines < high))

    cells = np.bincount(shifts.indices, weights=is_impact(shifts.data), minlength=len(mean))
    columns = {"gene": np.asarray(names, dtype=object), "n_cells": n, "shift": mean, "impact": is_impact(mean)}
    return pd.DataFrame(columns | {"impact_share": np.where(n > 0, cells / np.maximum(n, 1), np.nan)})


def vs_null(
    shifts: sparse.csr_matrix, is_null: np.ndarray, names: Sequence[str] | np.ndarray, donors: Any = None
) -> pd.DataFrame:
    """Compare each gene's shifts in cells with those in null cells (cells,): Geneformer's rank-sum test, over cells or donors' means."""
    sides, n = [], []
    for chosen in (~is_null, is_null):
        means, _, n_of = summarise(shifts[chosen], None if donors is None else donors[chosen])
        sides.append(pd.DataFrame(dense(shifts[chosen]) if donors is None else means))
        n.append(n_of.sum(axis=0))
    shift, null_shift = (side.mean() for side in sides)
    tested = (sides[0].notna().any() & sides[1].notna().any()).to_numpy()
    p_values = np.full(len(tested), np.nan)
    p_values[tested] = stats.ranksums(*(side.loc[:, tested] for side in sides), nan_policy="omit").pvalue
    columns = {"gene": np.asarray(names, dtype=object), "n_cells": n[0], "n_cells_null": n[1], "shift": shift}
    columns |= {"null_shift": null_shift, "difference": shift - null_shift, "p_value": p_values}
    return pd.DataFrame(columns | {"fdr": false_discovery_rates(p_values)})


def pair_statistics(
    single: sparse.csr_matrix,
    combined: sparse.csr_matrix,
    pairs: np.ndarray,
    donors: Any = None,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Say of each pair of genes whether both together move cells more than the sum of either alone.

    `single` are shifts by single genes (cells, genes), `combined` by pairs (cells, pairs), `pairs` the columns of both genes. Only
    cells in which the pair and both genes were perturbed count, and each is compared with itself.
    """
    first, second = (pd.DataFrame(dense(single[:, column])) for column in pairs.T)
    excess = pd.DataFrame(dense(combined)) - first - second
    if donors is not None:
        codes = donor_codes(donors)
        frames = (frame.where(excess.notna())[codes >= 0] for frame in (excess, first, second))
        excess, first, second = (frame.groupby(codes[codes >= 0]).mean() for frame in frames)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pairs in one cell, or none
        tested = stats.ttest_1samp(excess, 0.0, axis=0, nan_policy="omit")
        interval = tested.confidence_interval(confidence)
    columns = {"anchor_shift": first.where(excess.notna()).mean(), "gene_shift": second.where(excess.notna()).mean()}
    found = {"": excess.mean(), "_ci_low": interval.low, "_ci_high": interval.high, "_p_value": tested.pvalue}
    found["_fdr"] = false_discovery_rates(np.asarray(tested.pvalue))
    return pd.DataFrame(columns | {f"combined_minus_sum{name}": np.asarray(values) for name, values in found.items()})


# ---- the verb -------------------------------------------------------------------------------------------------------


@_docs.shared
@checked
def perturb_statistics(
    adata: AnnData,
    *,
    statistic: Literal["matched", "mixture", "vs_null"] = "matched",
    null_key: str | None = None,
    statistics: Statistics | Mapping[str, Any] | None = None,
    key: str | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Compute statistics from the shifts of a perturbation again, without the model: other donors, null genes, a mixture.

    For some of the cells, call it on `adata[some].copy()`.

    Parameters
    ----------
    adata
        Cells after :func:`scbin.tl.perturb` of single genes, with `layers["scbin_shift"]`.
    statistic
        `"matched"`: each gene against genes of the same expression and detection. `"mixture"`: two Gaussians on the genes' mean
        cosines split those that move cells from those that do not; for shifts without a goal. `"vs_null"`: each gene's
        shifts against those in null cells, by the rank-sum test over cells or donors' means.
    null_key
        Column of `obs` with `True` for the null cells of `"vs_null"`; all others that were perturbed are compared with them.
    statistics
        A :class:`scbin.Statistics` or a mapping of its fields: donors, null genes, confidence. States are not permuted here.
    key
        Entry of `uns` with the perturbation. Default: `"scbin_perturb"`.
    key_added
        Entry of `uns` to write. Default: that of the perturbation and the statistic, `"scbin_perturb_mixture"`.
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.uns['scbin_perturb_<statistic>' | key_added]`
        `table` and `params`, for `scbin.get.perturb_df(adata, key=...)`.

    Examples
    --------
    >>> import numpy, pandas, scbin
    >>> from scipy.sparse import csr_matrix
    >>> adata = scbin.datasets.pbmc68k_reduced()[:60, :8].copy()
    >>> shifts = numpy.random.default_rng(0).uniform(size=(60, 8)) * [9, 9, 1, 1, 1, 1, 1, 1]
    >>> adata.layers["scbin_shift"] = csr_matrix(0.01 * shifts)
    >>> adata.uns["scbin_perturb"] = {
    ...     "table": pandas.DataFrame({"gene": adata.var_names, "exact": True}),
    ...     "params": "{}",
    ... }
    >>> scbin.tl.perturb_statistics(adata, statistic="mixture")
    >>> int(scbin.get.perturb_df(adata, key="scbin_perturb_mixture")["impact"].sum())
    2
    """
    check_adata(adata)
    judged: Statistics = config(Statistics, statistics)
    key = _keys.PERTURB if key is None else key
    origin, params = read_perturbation(adata, key)
    slot = f"{key}_{statistic}" if key_added is None else key_added
    check_writable(adata, "uns", slot)
    if (statistic == "vs_null") != (null_key is not None):
        raise ScbinInputError("A03", "statistic='vs_null' and null_key= (a column of adata.obs) go together.")
    layer = _keys.of_perturbation(key)[0]
    shifts = sparse.csr_matrix(adata.layers[layer] if layer in adata.layers else (0, 0))  # its stored zeros are kept
    if not shifts.nnz:
        found = f"adata.layers has no {layer!r}, the shift of each cell by each single gene"
        raise ScbinInputError("A06", f"{found}. Run scbin.tl.perturb(adata, model).")
    columns = np.unique(shifts.indices)
    shifts, names = shifts[:, columns], adata.var_names.to_numpy(dtype=str)[columns]
    cells = np.flatnonzero(np.diff(shifts.indptr))
    donors = None if judged.donor_key is None else read_obs(adata, judged.donor_key).to_numpy(dtype=object)[cells]
    if statistic == "mixture":
        table = mixture(shifts[cells], names, judged.seed)
    elif null_key is not None:
        is_null = read_obs(adata, null_key).to_numpy()[cells]
        if is_null.dtype != bool or is_null.all() or not is_null.any():
            found = f"adata.obs[{null_key!r}] has to be True for some of the perturbed cells, and False for others."
            raise ScbinInputError("P02", found)
        table = vs_null(shifts[cells], is_null, names, donors)
    else:
        expression = sparse.vstack([block.csr() for block in iter_blocks(adata)], format="csr")[cells][:, columns]
        limits = (-2.0, 2.0) if shifts.data.min() < -1e-6 else (0.0, 2.0)  # a cosine's rounding may be below zero
        table = gene_statistics(summarise(shifts[cells], donors), names, expression, judged, limits=limits)
        table["exact"] = np.isin(names, origin["gene"][origin["exact"].astype(bool)].astype(str))
    adata = copied(adata) if copy else adata
    asked = {"statistic": statistic, "null_key": null_key, "donor_key": judged.donor_key}
    write_entry(adata, slot, params | asked, table=table)
    return adata if copy else None
