"""`tl.predict_perturbations`: what perturbations that were not done would change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scbin import _docs, _keys
from scbin._adata import check_adata, copied, warn, write_entry
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get import Screen, check_genes, read_screen
from scbin.model import resolve_model
from scbin.tl._responses import (
    combine,
    folds,
    kernels,
    own_genes,
    pair_kernels,
    predict,
    read_cells,
    targets_of,
    without_own,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.model import Model

FAR = 0.1  # of the measured targets are as far from their nearest one


@_docs.shared
@checked
def predict_perturbations(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    perturbations: Sequence[str] | None = None,
    *,
    n_cells: int = 0,
    interval: float = 0.9,
    seed: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Predict the change of every gene after perturbations that were not measured, with an interval.

    A single perturbation is predicted from measured ones of genes with similar features, and from their mean if features do not
    help. A pair is the sum of its genes, plus a synergy if measured pairs have one. For a measured perturbation, the result is
    the measured change, shrunk towards the prediction from the others by its noise.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.fit_perturbations`.
    model
        The model used in the fit, or `None`: what was learned from it is kept in `adata`.
    perturbations
        Genes and pairs of genes: `["A", "B", "A+B"]`. Default: all that were measured.
    n_cells
        Number of cells to generate for each perturbation, from control cells whose counts are thinned or increased.
    interval
        Coverage of the interval. Its width is that of the errors for perturbations that were left out.
    {seed}
    copy
        Return a changed copy instead of changing `adata`; not together with `n_cells`.

    Returns
    -------
    `None`, with `copy=True` a changed copy, with `n_cells` a new AnnData of predicted cells: counts, `obs` of their control cells
    with the perturbation, and `obs["scbin_generated"]`. Sets the following field of `adata`:

    `adata.uns["scbin_perturbations_predicted"]`
        `"table"` with one row per perturbation and gene (:func:`scbin.get.perturbations_df`): `change` of the mean of log1p
        expression, `low`, `high`, and `kind`, `"measured"` or `"predicted"`; `"params"` as JSON.

    Raises
    ------
    ScbinInputError
        If there is no fit, a perturbation has no feature to predict it from, or cells are requested but the data are not counts.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.perturbseq(n_perturbations=10, n_cells=800, n_genes=100)
    >>> scbin.tl.fit_perturbations(adata, batch_key="batch")
    >>> scbin.tl.predict_perturbations(adata, None, ["GENE50", "GENE1+GENE2"])
    >>> scbin.get.perturbations_df(adata, "predicted").shape
    (200, 6)
    """
    if n_cells < 0 or seed < 0 or not 0 < interval < 1:
        raise ScbinInputError("A02", f"{n_cells=}, {seed=}, {interval=}: pass numbers above 0, an interval below 1.")
    if copy and n_cells:
        raise ScbinInputError("A03", "copy=True and n_cells= both return an AnnData; pass one of them.")
    screen = read_screen(check_adata(adata))
    if model is not None and resolve_model(model, adata).fingerprint != screen.params.get("model"):
        raise ScbinInputError("A03", "the perturbations were not fitted with this model. Fit with it, or leave it out.")
    asked = _asked(perturbations, screen)
    change, width, measured = predict_changes(screen, asked, interval)
    if far := far_from_measured(screen, asked):
        named = ", ".join(map(repr, far[:5])) + (", ..." if len(far) > 5 else "")
        found = f"features of {named} resemble those of no measured target as closely as is usual among measured ones"
        warn("P02", f"{found}. Their predictions are extrapolated; measure related genes, or pass other features=.")
    columns = {"change": change, "low": change - width, "high": change + width}
    table = pd.DataFrame({name: values.ravel() for name, values in columns.items()})
    table.insert(0, "perturbation", np.repeat(np.array(asked, dtype=object), len(screen.genes)))
    table.insert(1, "gene", np.tile(screen.genes, len(asked)))
    table["kind"] = np.repeat(np.where(measured, "measured", "predicted").astype(object), len(screen.genes))
    made = _cells(adata, screen, asked, change, n_cells, seed) if n_cells else None
    target = copied(adata) if copy else adata
    params = {"interval": interval, "model": screen.params.get("model")}
    write_entry(target, _keys.MEASURED_PREDICTED, params, table=table)
    return made if n_cells else target if copy else None


def _asked(perturbations: Any, screen: Screen) -> list[str]:
    """Return the names of the perturbations asked for, as the screen would call them."""
    measured = list(screen.table["perturbation"][screen.table["status"] == "measured"])
    labels = [perturbations] if isinstance(perturbations, str) else measured if perturbations is None else perturbations
    targets = targets_of(labels, screen.params["control"], [*screen.names, *(m for m in measured if "+" not in m)])
    known = np.any([np.isfinite(block).all(axis=1) for block in screen.features.values()], axis=0)
    foretold = {*screen.names[known], *measured}
    for label, each in targets.items():
        lacking = [target for target in each if "+".join(each) not in measured and target not in foretold]
        if not 1 <= len(each) <= 2:
            raise ScbinInputError("A02", f"{label!r} names {len(each)} targets; pass one gene, or two as 'A+B'.")
        if lacking:
            found = (
                f"{lacking[0]!r} was not measured alone and is not a gene of adata, of the model or of your features"
            )
            raise ScbinInputError("A06", f"{found}. Pass features= to scbin.tl.fit_perturbations, a table with it.")
    if not targets:
        raise ScbinInputError("A02", "perturbations is empty: pass ['A', 'B', 'A+B'].")
    return list(dict.fromkeys("+".join(each) for each in targets.values()))


def far_from_measured(screen: Screen, asked: list[str]) -> list[str]:
    """Return the targets that resemble their nearest measured one less than nine of ten measured targets resemble theirs."""
    table = screen.table[(screen.table["status"] == "measured").to_numpy()]
    singles = list(table["perturbation"][table["n_targets"] == 1])
    done = set(table["perturbation"])
    others = sorted({target for name in asked if name not in done for target in name.split("+")} - set(singles))
    alike = kernels(screen.rows([*singles, *others]))
    nearest = alike.get("all", next(iter(alike.values())))[:, : len(singles)].copy()
    np.fill_diagonal(nearest, -np.inf)
    best = nearest.max(axis=1)
    far = best[len(singles) :] < np.quantile(best[: len(singles)], FAR)
    return [name for name, is_far in zip(others, far, strict=True) if is_far]


def predict_changes(screen: Screen, asked: list[str], interval: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the change after each perturbation (asked, genes), half the width of its interval, and whether it was measured."""
    usable = screen.table[(screen.table["status"] == "measured").to_numpy()].sort_values("n_targets", kind="stable")
    names, weight = list(usable["perturbation"]), usable["ceiling"].fillna(0).to_numpy() ** 2
    changes, noise = screen.change[usable.index], usable["noise"].to_numpy()[:, None] * screen.variance
    n = int((usable["n_targets"] == 1).sum())
    singles = names[:n]
    targets = singles + sorted({target for name in asked for target in name.split("+")} - set(singles))
    own, train = own_genes(targets, screen.genes), np.arange(n)
    given, at = without_own(changes[:n], own[:n]), pd.Index(screen.genes).get_indexer(targets)
    data = (screen.rows(targets), given, weight[:n])
    expected = predict(*data, train, train, np.arange(len(targets)), at)
    for learn, test in folds(n, 0):  # those that were measured: from the others
        expected[:n][test] = predict(*data, train[learn], train, train[test], at)
    error = expected[:n] - given
    spread = (error**2).mean(axis=0) + 1e-12
    wide = float(np.quantile(np.abs(error) / np.sqrt(spread), interval))
    of_target, doubt = _own_changes(screen, usable[:n], targets)
    best = np.where(own, of_target[:, None], expected)
    left = np.where(own, np.maximum(doubt, spread), np.broadcast_to(spread, best.shape))
    members = np.vstack([weight[:n, None] * given, best[n:]])
    best[:n], left[:n] = _posterior(best[:n], left[:n], changes[:n], noise[:n])

    every = names[n:] + [name for name in asked if "+" in name and name not in names]
    if every:
        index = np.array([[targets.index(target) for target in name.split("+")] for name in every])
        known, own_pairs, base = np.arange(len(names) - n), own_genes(every, screen.genes), members[index].sum(axis=1)
        measured = np.where(own_pairs[known], base[known], changes[n:])
        both = combine(base, measured, weight[n:], pair_kernels(members, n, index), known, np.arange(len(every)))
        doubts = left[index].sum(axis=1)
        both = np.where(own_pairs, np.where(own[index], best[index], 0).sum(axis=1), both)
        if len(known):
            doubts = np.maximum(doubts, ((both[known] - measured) ** 2 * ~own_pairs[known]).mean(axis=0))
            both[known], doubts[known] = _posterior(both[known], doubts[known], changes[n:], noise[n:])
        best, left = np.vstack([best, both]), np.vstack([left, doubts])
    shown = pd.Index([*targets, *every]).get_indexer(asked)
    return best[shown], wide * np.sqrt(left[shown]), np.isin(asked, names)


def _posterior(
    expected: np.ndarray, spread: np.ndarray, measured: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return what to believe of measured changes, and its variance, given what others predict and how far that usually is off."""
    real = np.maximum(spread - noise.mean(axis=0), 0.05 * spread)
    weight = real / (real + noise)
    return expected + weight * (measured - expected), real * noise / (real + noise)


def _own_changes(screen: Screen, singles: pd.DataFrame, targets: list[str]) -> tuple[np.ndarray, float]:
    """Return the change of each target's own gene (targets,), from that of the measured ones, and the variance about it.

    A knock-down takes away a fraction, an activation adds on the log scale. Without any measured, nothing is assumed.
    """
    at = pd.Index(screen.genes).get_indexer(targets)
    level, found = np.where(at >= 0, screen.control[at], 0.0), singles["own_change"].to_numpy(dtype=float)
    known = np.flatnonzero(np.isfinite(found) & (level[: len(found)] > 0))
    if not len(known):
        return np.zeros(len(targets)), 0.0
    if screen.params["mode"] == "activation":
        change = np.full(len(targets), max(float(np.median(found[known])), 0.0))
    else:
        change = level * float(np.clip(np.median(found[known] / level[known]), -1, 0))
    return change, float(((found - change[: len(found)])[known] ** 2).mean())


def _cells(adata: AnnData, screen: Screen, asked: list[str], change: np.ndarray, n_cells: int, seed: int) -> AnnData:
    """Return predicted cells: control cells whose counts are thinned, or added to, by what the change means for the mean control."""
    check_genes(screen, adata)
    cells = read_cells(adata, screen.params, screen.names)
    if not cells.is_counts:
        raise ScbinInputError("A03", "n_cells= needs counts, but the screen holds log1p values. Fit it with layer=.")
    rng, controls = np.random.default_rng(seed), np.flatnonzero(cells.group < 0)
    scale = np.median(cells.total[cells.total > 0]) / np.maximum(cells.total, 1)
    level = np.maximum(screen.control, 1e-6)
    share = np.asarray(cells.values[controls].expm1().mean(axis=0)).ravel()
    parts, rows = [], []
    for row in change:
        ratio = np.expm1(np.maximum(level + row, 0)) / np.expm1(level)
        drawn = rng.choice(controls, n_cells)
        counts = np.rint(cells.values[drawn].expm1().toarray() / scale[drawn, None]).astype(np.int64)
        more = np.maximum(ratio - 1, 0) * share / scale[drawn, None]
        kept = rng.binomial(counts, np.broadcast_to(np.minimum(ratio, 1), counts.shape))
        parts.append(sparse.csr_matrix((kept + rng.poisson(more)).astype(np.float32)))
        rows.append(cells.rows[drawn])
    obs = adata.obs.iloc[np.concatenate(rows)].copy()
    obs[screen.params["key"]] = pd.Categorical(np.repeat(asked, n_cells))
    obs[_keys.GENERATED] = True
    obs.index = [f"predicted_{k}" for k in range(len(obs))]
    made = ad.AnnData(sparse.vstack(parts, format="csr"), obs=obs, var=adata.var[[]].copy())
    made.uns[_keys.GENERATED] = json.dumps({"generated": True, "from": "predict_perturbations", "seed": seed})
    return made
