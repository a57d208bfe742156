"""`tl.predict_perturbations`: what perturbations that were not done would change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scbin import _docs, _keys
from scbin._adata import check_adata, copied, write
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get.measured import Screen, read_screen
from scbin.model import resolve_model
from scbin.tl._fit_perturbations import own_genes
from scbin.tl._responses import combine, kernels, pair_kernels, ridge, without_own
from scbin.tl._screen import read_cells, targets_of

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.model import Model

RATIOS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0)


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
    """Predict the change of every gene after perturbations that were not done, with an interval.

    A single perturbation is predicted from measured ones of genes with similar features, and from their mean as far as features
    foretold nothing. A pair is the sum of its genes, and a synergy where measured pairs showed one. Of a measured
    perturbation you get the measured change, shrunk towards what the others predict by how noisy it is.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.fit_perturbations`.
    model
        The model that was fitted with, or `None`: what was learned from it is kept in `adata`.
    perturbations
        Genes and pairs of genes: `["A", "B", "A+B"]`. Default: all that were measured.
    n_cells
        Make so many cells of each perturbation, from as many control cells whose counts are thinned or added to.
    interval
        Which part of the measured changes the interval is to hold: its width is that of the errors for perturbations left out.
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
        If there is no fit, a perturbation has no feature to predict it from, or cells are asked of data that are no counts.

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
        fix = "Fit with this one, or leave it out."
        raise ScbinInputError("A03", f"the perturbations were not fitted with this model. {fix}")
    asked = _asked(perturbations, screen)
    change, width, measured = predict_changes(screen, asked, interval)
    table = pd.DataFrame({"perturbation": np.repeat(np.array(asked, dtype=object), len(screen.genes))})
    table["gene"] = np.tile(screen.genes, len(asked))
    table["change"], table["low"], table["high"] = change.ravel(), (change - width).ravel(), (change + width).ravel()
    table["kind"] = np.repeat(np.where(measured, "measured", "predicted").astype(object), len(screen.genes))
    made = _cells(adata, screen, asked, change, n_cells, seed) if n_cells else None
    target = copied(adata) if copy else adata
    params = json.dumps({"interval": interval, "model": screen.params.get("model")})
    write(target, "uns", _keys.MEASURED_PREDICTED, {"table": table, "params": params})
    return made if n_cells else target if copy else None


def _asked(perturbations: Any, screen: Screen) -> list[str]:
    """Return the names of the perturbations asked for, as the screen would call them."""
    if perturbations is None:
        return [str(name) for name in screen.table["perturbation"][screen.table["status"] == "measured"]]
    labels = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    if not labels or not all(isinstance(label, str) for label in labels):
        raise ScbinInputError("A02", "perturbations is empty or has names that are no text: pass ['A', 'B', 'A+B'].")
    singles = [name for name in screen.table["perturbation"] if "+" not in name]
    targets = targets_of(labels, screen.params["control"], [*screen.names, *singles])
    for label, each in targets.items():
        if not 1 <= len(each) <= 2:
            raise ScbinInputError("A02", f"{label!r} names {len(each)} targets; pass one gene, or two as 'A+B'.")
    known = np.any([np.isfinite(block).all(axis=1) for block in screen.features.values()], axis=0)
    measured = set(screen.table["perturbation"][screen.table["status"] == "measured"])
    foretold = set(screen.names[known]) | measured
    lacking = sorted({t for each in targets.values() if "+".join(each) not in measured for t in each} - foretold)
    if lacking:
        found = f"{', '.join(map(repr, lacking[:5]))} was not measured alone and has no features to predict it from"
        fix = "Pass features= to scbin.tl.fit_perturbations, a table with these genes."
        raise ScbinInputError("A06", f"{found}: it is no gene of adata, of the model or of your features. {fix}")
    return list(dict.fromkeys("+".join(each) for each in targets.values()))


def predict_changes(screen: Screen, asked: list[str], interval: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the change after each perturbation (asked, genes), half the width of its interval, and whether it was measured."""
    table = screen.table.set_index("perturbation").fillna({"reliability": 0.0})
    usable = table[table["status"] == "measured"]
    singles, measured_pairs = (list(usable.index[usable["n_targets"] == n]) for n in (1, 2))
    new = sorted({t for name in asked for t in name.split("+")} - set(singles))
    targets, train = [*singles, *new], np.arange(len(singles))
    place = {name: k for k, name in enumerate(targets)}
    rows = table.index.get_indexer(singles)
    own = own_genes(targets, screen.genes)
    changes = without_own(screen.change[rows], own[train])
    reliability, noise = table["reliability"].to_numpy()[rows], table["noise"].to_numpy()[rows, None] * screen.variance
    alike = kernels(screen.rows(targets))
    shrunk = reliability[:, None] * changes
    # from the others, where it was measured
    expected = ridge(alike, shrunk, changes, reliability, train, train, np.arange(len(targets)))
    error = expected[train] - changes
    spread = (error**2).mean(axis=0) + 1e-12
    wide = float(np.quantile(np.abs(error) / np.sqrt(spread), interval))
    of_target, doubt = _own_changes(screen, singles, targets)
    expected = np.where(own, of_target[:, None], expected)
    variance = np.where(own, np.maximum(doubt, spread), np.broadcast_to(spread, expected.shape))
    best, left = expected.copy(), variance.copy()
    best[train], left[train] = _posterior(expected[train], variance[train], screen.change[rows], noise)

    members = np.vstack([shrunk, expected[len(singles) :]])
    pairs = [*measured_pairs, *(name for name in asked if "+" in name and name not in measured_pairs)]
    if pairs:
        index = np.array([[place[t] for t in name.split("+")] for name in pairs])
        chosen, at = np.arange(len(measured_pairs)), table.index.get_indexer(measured_pairs)
        own_pairs, base = own_genes(pairs, screen.genes), members[index].sum(axis=1)
        measured, weight = screen.change[at], table["reliability"].to_numpy()[at]
        masked = np.where(own_pairs[chosen], base[chosen], measured)
        every = np.arange(len(pairs))
        both = combine(base, masked, weight, pair_kernels(alike, members, index), chosen, every)
        both = np.where(own_pairs, np.where(own[index], best[index], 0).sum(axis=1), both)
        doubts = left[index].sum(axis=1)
        if len(chosen):
            beyond = ((both[chosen] - masked) ** 2 * ~own_pairs[chosen]).mean(axis=0)
            doubts = np.maximum(doubts, beyond)
            noise = table["noise"].to_numpy()[at, None] * screen.variance
            both[chosen], doubts[chosen] = _posterior(both[chosen], doubts[chosen], measured, noise)
        place |= {name: len(targets) + k for k, name in enumerate(pairs)}
        best, left = np.vstack([best, both]), np.vstack([left, doubts])
    shown = [place[name] for name in asked]
    return best[shown], wide * np.sqrt(left[shown]), np.isin(asked, list(usable.index))


def _posterior(
    expected: np.ndarray, spread: np.ndarray, measured: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return what to believe of measured changes, and its variance, given what others predict and how far that usually is off."""
    real = np.maximum(spread - noise.mean(axis=0), 0.05 * spread)
    weight = real / (real + noise)
    return expected + weight * (measured - expected), real * noise / (real + noise)


def _own_changes(screen: Screen, singles: list[str], targets: list[str]) -> tuple[np.ndarray, float]:
    """Return the change of each target's own gene (targets,), from that of the measured ones, and the variance about it.

    A knock-down takes away a fraction, an activation adds on the log scale. Without any measured, nothing is assumed.
    """
    at = pd.Index(screen.genes).get_indexer(targets)
    level = np.where(at >= 0, screen.control[at], 0.0)
    rows = screen.table.set_index("perturbation")["own_change"].reindex(singles).to_numpy(dtype=float)
    known = np.isfinite(rows) & (level[: len(singles)] > 0)
    if not known.any():
        return np.zeros(len(targets)), 0.0
    rows, before = rows[known], level[: len(singles)][known]
    if screen.params["mode"] == "activation":
        change = np.full(len(targets), max(float(np.median(rows)), 0.0))
    else:
        change = level * float(np.clip(np.median(rows / before), -1, 0))
    return change, float(((rows - change[: len(singles)][known]) ** 2).mean())


def _cells(adata: AnnData, screen: Screen, asked: list[str], change: np.ndarray, n_cells: int, seed: int) -> AnnData:
    """Return predicted cells: control cells whose counts are thinned, or added to, until their mean has changed as predicted."""
    cells = read_cells(adata, screen.params, screen.names)
    if not cells.is_counts:
        raise ScbinInputError(
            "A03", "n_cells= makes counts, but the screen holds log1p values. Fit it with layer= counts."
        )
    rng, controls = np.random.default_rng(seed), np.flatnonzero(cells.group < 0)
    middle = np.median(cells.total[cells.total > 0])
    total = np.maximum(cells.total, 1)

    def counts_of(rows: np.ndarray) -> np.ndarray:
        return np.rint(np.expm1(cells.values[rows].toarray().astype(np.float64)) * total[rows, None] / middle).astype(
            int
        )

    some = rng.permutation(controls)[:500]
    share = (counts_of(some) / total[some, None]).mean(axis=0)

    def changed(counts: np.ndarray, rows: np.ndarray, ratio: Any) -> np.ndarray:
        more = np.maximum(ratio - 1, 0) * share * total[rows, None]
        return rng.binomial(counts, np.broadcast_to(np.minimum(ratio, 1), counts.shape)) + rng.poisson(more)

    before = counts_of(some)
    means = [np.log1p(changed(before, some, r) * middle / total[some, None]).mean(axis=0) for r in RATIOS]
    curve = np.maximum.accumulate(np.array(means) - means[RATIOS.index(1.0)])  # (ratios, genes)
    parts, rows = [], []
    for row in change:
        ratio = np.array([np.interp(d, c, RATIOS) for d, c in zip(row, curve.T, strict=True)])
        drawn = rng.choice(controls, n_cells)
        parts.append(sparse.csr_matrix(changed(counts_of(drawn), drawn, ratio).astype(np.float32)))
        rows.append(cells.rows[drawn])
    obs = adata.obs.iloc[np.concatenate(rows)].copy()
    obs[screen.params["key"]] = pd.Categorical(np.repeat(asked, n_cells))
    obs[_keys.GENERATED] = True
    obs.index = [f"predicted_{k}" for k in range(len(obs))]
    made = ad.AnnData(sparse.vstack(parts, format="csr"), obs=obs, var=adata.var[[]].copy())
    made.uns[_keys.GENERATED] = json.dumps({"generated": True, "from": "predict_perturbations", "seed": seed})
    return made
