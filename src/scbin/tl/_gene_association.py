"""`tl.gene_association`: which genes go with a group of cells, by what the count head expects of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from scbin import _docs
from scbin._adata import check_adata, gene_names, read_obs, read_tokens
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.model import count_head, resolve_model
from scbin.nn.density import expected_shares
from scbin.nn.run import embed as embed_tokens
from scbin.tl._genes import groups_of
from scbin.tl._labels import MaskedPhenotypes
from scbin.tl._perturb_statistics import false_discovery_rates
from scbin.tl._probe import log_expression

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.model import Model

PSEUDOCOUNT = 0.1  # per 10,000


@_docs.shared
@checked
def gene_association(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    groupby: str,
    groups: str | Sequence[str] | None = None,
    reference: str = "rest",
    donor_key: str | None = None,
    confidence: float = 0.95,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
) -> pd.DataFrame:
    """Ask the model which genes go with a phenotype: log fold changes of the counts it expects of groups of cells.

    The model places every cell by all its genes, and its count head says how much of each gene such a cell expresses. That is smoother
    than the counts: worth a look for groups of few cells and for genes of few counts. The plain fold change stands beside it.

    Parameters
    ----------
    {tokenized}
    {model}
    groupby
        Column of `obs`: cell types, a disease, a treatment.
    groups
        Which of its groups. Default: all.
    reference
        What they are compared with: `"rest"`, all other cells, or one group.
    donor_key
        Column of `obs` with donors: these are then what is counted, not cells. Where three donors or more have cells on both sides, each is
        compared with itself. Without it cells are taken for independent, and intervals are too narrow for any claim about people.
    confidence
        Of the intervals.
    {tokens_key}
    {device}
    {token_budget}
    {progress}

    Returns
    -------
    A table with a row per group and gene, the largest change first: `log_fold_change` (to base 2), its interval `lower` and `upper`,
    `p_value` (Welch's t test, or the paired one) and `fdr` (Benjamini-Hochberg in each group), `plain_log_fold_change` of the mean
    counts per 10,000, and `n`, `n_reference` and `unit`, what was counted. Nothing is written.

    Raises
    ------
    ScbinInputError
        If the model has no count head, or fewer than two cells or donors are on a side.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:300].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=60, progress=False)
    >>> table = scbin.tl.gene_association(adata, model, groupby="bulk_labels", groups="CD19+ B", progress=False)
    >>> "CD79A" in set(table["gene"][:20])
    True
    """
    check_adata(adata)
    if not 0 < confidence < 1:
        raise ScbinInputError("A02", f"confidence is {confidence}; it lies between 0 and 1.")
    chosen = resolve_model(model, adata)
    head = count_head(chosen, "Pretrain one: scbin.tl.pretrain(adata).")
    tokens = read_tokens(adata, chosen.vocabulary, tokens_key)
    codes, names = groups_of(adata, groupby)
    asked = names if groups is None else [groups] if isinstance(groups, str) else list(groups)
    asked = [name for name in asked if name != reference]
    if not asked:
        raise ScbinInputError("A03", f"there is no group of obs[{groupby!r}] to compare with {reference!r}.")
    for name in (*asked, *([] if reference == "rest" else [reference])):
        if name not in names:
            raise ScbinInputError("A06", f"{name!r} is no group of obs[{groupby!r}]. There are: {', '.join(names)}.")
    codes[tokens.lengths == 0] = -1
    donors = np.arange(adata.n_obs) if donor_key is None else pd.factorize(read_obs(adata, donor_key))[0]
    codes[donors < 0] = -1
    how: dict[str, Any] = {"device": device, "precision": "float32", "token_budget": token_budget, "progress": progress}
    masked: Any = MaskedPhenotypes(tokens)
    vectors = embed_tokens(chosen.network, masked, **how)
    tables = []
    for name in asked:
        here = codes == names.index(name)
        there = (codes >= 0) & ~here if reference == "rest" else codes == names.index(reference)
        sides = [np.flatnonzero(side) for side in (here, there)]
        by = [np.unique(donors[side], return_inverse=True) for side in sides]
        units = [_means(vectors[side], which) for side, (_, which) in zip(sides, by, strict=True)]
        if min(map(len, units)) < 2:
            found = f"{len(units[0])} and {len(units[1])} {'cells' if donor_key is None else 'donors'}"
            raise ScbinInputError("P02", f"{name!r} and {reference!r} have {found}; two on each side are needed.")
        both, *where = np.intersect1d(by[0][0], by[1][0], return_indices=True)
        paired = len(both) >= 3
        units = [unit[at] for unit, at in zip(units, where, strict=True)] if paired else units
        table = fold_changes(head, *units, paired=paired, confidence=confidence)
        plain = [np.asarray(log_expression(tokens, side).expm1().mean(axis=0)).ravel() for side in sides]
        table["plain_log_fold_change"] = np.subtract(*(np.log2(mean + PSEUDOCOUNT) for mean in plain))
        table.insert(0, "gene", np.array(gene_names(adata, chosen.vocabulary).names, dtype=object))
        table.insert(0, "group", name)
        unit = "cell" if donor_key is None else "paired donor" if paired else "donor"
        table = table.assign(n=len(units[0]), n_reference=len(units[1]), unit=unit)
        tables.append(table.sort_values("log_fold_change", ascending=False, kind="stable"))
    return pd.concat(tables, ignore_index=True)


def fold_changes(head: Any, here: np.ndarray, there: np.ndarray, *, paired: bool, confidence: float) -> pd.DataFrame:
    """Return log2 fold changes of what is expected of every gene between cell vectors here and there (units, size), by t tests.

    Welch's, or of pairs.
    """
    if paired:
        change = _log_levels(head, here) - _log_levels(head, there)
        difference, error, freedom = (
            change.mean(axis=0),
            change.std(axis=0, ddof=1) / len(change) ** 0.5,
            len(change) - 1.0,
        )
    else:
        (mean, first), (other, second) = (_moments(head, side) for side in (here, there))
        difference, error = mean - other, np.sqrt(first + second)
        parts = first**2 / (len(here) - 1) + second**2 / (len(there) - 1)
        freedom = (first + second) ** 2 / np.maximum(parts, 1e-300)
    error = np.maximum(error, 1e-12)
    width, p = stats.t.ppf((1 + confidence) / 2, freedom) * error, 2 * stats.t.sf(np.abs(difference) / error, freedom)
    columns = {"log_fold_change": difference, "lower": difference - width, "upper": difference + width}
    return pd.DataFrame({**columns, "p_value": p, "fdr": false_discovery_rates(p)})


def _log_levels(head: Any, vectors: np.ndarray) -> np.ndarray:
    """Return log2 of the counts per 10,000 that the model expects of some units (units, genes)."""
    return np.log2(1e4 * expected_shares(head, torch.from_numpy(vectors)) + PSEUDOCOUNT)


def _moments(head: Any, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of these, and the variance of the mean (genes,), some cells at a time."""
    n, start = len(vectors), _log_levels(head, vectors[:1])[0]
    total = squares = np.zeros(len(start))
    for part in np.array_split(vectors, -(-n // 4_096)):
        values = _log_levels(head, part) - start
        total, squares = total + values.sum(axis=0), squares + (values**2).sum(axis=0)
    return start + total / n, np.maximum(squares - total**2 / n, 0) / (n - 1) / n


def _means(vectors: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Return the mean vector of each donor (donors, size)."""
    sums = np.zeros((which.max(initial=-1) + 1, vectors.shape[1]))
    np.add.at(sums, which, vectors)
    return (sums / np.bincount(which)[:, None]).astype(np.float32) if len(which) else sums
