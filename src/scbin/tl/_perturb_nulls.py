"""What a gene's shift is compared with: other genes of the same expression and detection, or chosen ones. Arrays only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from scipy.sparse import csr_matrix

N_NULL = 100
FEWEST_NULL = 5  # with fewer genes nobody knows how widely genes alike scatter


def null_genes(
    names: np.ndarray, tested: np.ndarray, expression: csr_matrix, null: str | Sequence[str] | np.ndarray, *, seed: int
) -> np.ndarray:
    """Return for each gene the indices of those it is compared with (genes, at most N_NULL or chosen); -1 is nobody.

    A gene is never among its own, and neither is one that was not tested.
    """
    if isinstance(null, str):
        if null != "matched":
            raise ScbinInputError("P50", f"null is {null!r}; choose 'matched', or pass the names of the null genes.")
        return matched_genes(expression, tested, seed=seed)
    return chosen_genes(names, tested, np.asarray(null))


def matched_genes(expression: csr_matrix, tested: np.ndarray, *, n_null: int = N_NULL, seed: int = 0) -> np.ndarray:
    """Return the tested genes nearest to each in mean expression and in the share of cells that express it.

    Both are taken as ranks among the tested genes, so that neither unit counts; ties are broken at random by `seed`.
    """
    from scipy.spatial import cKDTree
    from scipy.stats import rankdata

    n_genes, candidates = len(tested), np.flatnonzero(tested)
    result = np.full((n_genes, max(min(n_null, len(candidates) - 1), 0)), -1)
    if result.shape[1] == 0:
        return result
    n_cells = max(expression.shape[0], 1)
    mean = np.asarray(expression.sum(axis=0), dtype=np.float64).ravel()[candidates] / n_cells
    detection = np.bincount(expression.indices[expression.data > 0], minlength=n_genes)[candidates] / n_cells
    ranks = np.column_stack([rankdata(mean), rankdata(detection)])
    ranks += np.random.default_rng(seed).uniform(-1e-3, 1e-3, ranks.shape)
    nearest = cKDTree(ranks).query(ranks, k=result.shape[1] + 1)[1]
    own = nearest == np.arange(len(candidates))[:, None]
    own[~own.any(axis=1), -1] = True  # a gene is nearest to itself; were it not, the farthest goes
    result[candidates] = candidates[nearest[~own].reshape(len(candidates), -1)]
    return result


def chosen_genes(names: np.ndarray, tested: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return the null genes that the user named, for each gene without itself."""
    known = {str(name): i for i, name in enumerate(names)}
    wanted = [str(name) for name in null.tolist()]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ScbinInputError(
            "P51",
            f"{len(unknown)} of the {len(wanted)} null genes are not among the tested ones, first {unknown[0]!r}. "
            "Name genes that were perturbed too.",
        )
    chosen = np.unique([known[name] for name in wanted if tested[known[name]]])
    result = np.tile(chosen, (len(names), 1))
    result[result == np.arange(len(names))[:, None]] = -1
    return result.astype(np.int64)


def median(values: np.ndarray) -> np.ndarray:
    """Median over the last axis without the NaNs; NaN where there is nothing else."""
    ordered = np.sort(values, axis=-1)  # NaN last
    n = np.isfinite(ordered).sum(axis=-1, keepdims=True)
    if ordered.shape[-1] == 0:
        return np.full(values.shape[:-1], np.nan)
    low = np.take_along_axis(ordered, np.maximum((n - 1) // 2, 0), axis=-1)
    high = np.take_along_axis(ordered, np.minimum(n // 2, ordered.shape[-1] - 1), axis=-1)
    return np.where(n > 0, (low + high) / 2, np.nan)[..., 0]


def spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation over the last axis as the median deviation tells it: hits among the null genes do not widen it.

    Where more than half of the values are equal this is zero, and the usual standard deviation takes its place.
    """
    robust = 1.4826 * median(np.abs(values - median(values)[..., None]))
    known = np.isfinite(values)
    n = known.sum(axis=-1)
    mean = np.where(known, values, 0.0).sum(axis=-1) / np.maximum(n, 1)
    square = np.where(known, (values - mean[..., None]) ** 2, 0.0).sum(axis=-1) / np.maximum(n - 1, 1)
    return np.where(robust > 0, robust, np.where(n > 1, np.sqrt(square), np.nan))


def chunks(null: np.ndarray, n_rows: int = 1, most: int = 4_000_000) -> Iterator[slice]:
    """Slices of genes, so that (rows, genes, null genes) values fit into tens of megabytes."""
    step = max(1, most // max(1, n_rows * null.shape[1]))
    for start in range(0, len(null), step):
        yield slice(start, start + step)


def gathered(values: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Values (..., genes) of each gene's null genes (..., len(null), null genes); NaN for nobody."""
    padded = np.concatenate([values, np.full((*values.shape[:-1], 1), np.nan)], axis=-1)
    return padded[..., null]
