"""`tl.evaluate_perturbations`: how well perturbations that were left out are predicted, beside the mean of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, copied, write_entry
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get import Screen, check_genes, read_screen
from scbin.tl import _responses as responses
from scbin.tl._fit_perturbations import FEWEST_SINGLES
from scbin.tl._responses import own_genes, read_cells, targets_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

TOP = 50  # most changed genes
NEIGHBOURS = 5
FLIPS = 10_000
FEWEST_TO_JUDGE = 5
MEANS = ("mean of others", "weighted mean")
BLOCK_NAMES = {"pca": "ridge on PCA loadings", "model": "ridge on gene vectors of the model"}


@_docs.shared
@checked
def evaluate_perturbations(
    adata: AnnData, *, split: Mapping[str, Sequence[str]] | None = None, seed: int = 0, copy: bool = False
) -> AnnData | None:
    """Predict each measured perturbation from the others by several methods, and compare them with the mean of the others.

    Published deep models were rarely better than the mean change of the other perturbations, which is the baseline here. Measured
    changes are computed with other control cells (or donors) than those used for training, since a shared control makes all
    changes similar. Perturbations whose change does not reproduce are left out of the scores.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.fit_perturbations`, with its cells.
    split
        Instead of leaving out one at a time: `{"train": [...], "test": [...]}`, names of perturbations.
    {seed}
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.uns["scbin_perturbations_evaluated"]`
        `"table"`, one row per perturbation and method (:func:`scbin.get.perturbations_df`); `"observed"` and `"predicted"` changes
        (`"names"`, `"genes"`); and `"params"` as JSON, with the `"verdict"` in one sentence.

    Raises
    ------
    ScbinInputError
        If there is no fit, or the two sides of the split overlap or name what was not measured.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.perturbseq(n_perturbations=10, n_cells=800, n_genes=100, effect=0)
    >>> scbin.tl.fit_perturbations(adata, batch_key="batch")
    >>> scbin.tl.evaluate_perturbations(adata)
    >>> scbin.get.perturbations_df(adata, "evaluated").attrs["verdict"]
    'Nothing is reproducible: none of 10 perturbations is the same in two halves of its cells, so no method can be judged.'
    """
    screen = read_screen(check_adata(adata))
    cells = read_cells(adata, screen.params, screen.names)
    check_genes(screen, adata)
    if list(cells.names) != list(screen.table["perturbation"]):
        raise ScbinInputError("A03", "cells are not those of the fit. Call scbin.tl.fit_perturbations again.")
    table = screen.table[(screen.table["status"] == "measured").to_numpy()]
    sides = None if split is None else _sides(split, screen, list(table["perturbation"]))
    sums = responses.sum_cells(cells.values, cells.group, cells.stratum, cells.donor, int(screen.params["seed"]))
    way = responses.halves(sums.cells.shape[2], int(screen.params["seed"]))[0]
    scores, observed, predicted = [], [], []
    for half in (way, ~way):
        # the other half of the controls, and with donors of the cells too
        kinds = ((half,), (~half,)) if cells.donor is not None else ((slice(None), half), (slice(None), ~half))
        learned, truth = (sums.changes(*kind)[table.index] for kind in kinds)
        made = _predictions(screen, table, learned, sides, seed)
        scores.append(_scores(table, truth, made, own_genes(table["perturbation"], screen.genes)))
        observed.append(truth)
        predicted.append(made["scbin"])
    result = pd.concat(scores).groupby(["perturbation", "method"], sort=False).mean().reset_index()
    columns = ["perturbation", "n_targets", "n_cells", "split_half", "ceiling", "reproducible"]
    result = table[columns].merge(result, on="perturbation")
    params = _verdict(result, seed)
    known = np.isfinite(observed)  # with donors there may be a half in which it was not done
    seen = np.nansum(observed, axis=0) / np.maximum(known.sum(axis=0), 1)
    numbers = {"observed": seen.astype(np.float32), "predicted": np.mean(predicted, axis=0).astype(np.float32)}
    labels = {"genes": screen.genes, "names": table["perturbation"].to_numpy(dtype=object)}
    target = copied(adata) if copy else adata
    write_entry(target, _keys.MEASURED_EVALUATED, params, table=result, **numbers, **labels)
    return target if copy else None


def _sides(split: Mapping[str, Sequence[str]], screen: Screen, measured: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return which perturbations to learn from and which to predict (perturbations,)."""
    if set(split) != {"train", "test"}:
        raise ScbinInputError("A02", "split needs two lists of perturbations: {'train': [...], 'test': [...]}.")
    sides = []
    for labels in (split["train"], split["test"]):
        names = {"+".join(t) for t in targets_of(labels, screen.params["control"], [*screen.names, *measured]).values()}
        if unknown := sorted(names - set(measured)):
            raise ScbinInputError("A06", f"{unknown[0]!r} in split= was not measured in enough cells.")
        sides.append(np.isin(measured, list(names)))
    train, test = sides
    if (train & test).any():
        found = f"{measured[int(np.argmax(train & test))]!r} is in both sides of the split"
        raise ScbinInputError("L03", f"{found}; a prediction of it would be no test.")
    if sum("+" not in name for name in np.array(measured)[train]) < FEWEST_SINGLES or not test.any():
        raise ScbinInputError("P02", f"split needs {FEWEST_SINGLES} genes to learn from, and something to predict.")
    return train, test


def _predictions(
    screen: Screen, table: pd.DataFrame, changes: np.ndarray, sides: tuple[np.ndarray, np.ndarray] | None, seed: int
) -> dict[str, np.ndarray]:
    """Return what each method predicts for each perturbation (perturbations, genes), NaN for those that it does not."""
    names, weight = table["perturbation"].to_numpy(dtype=object), table["ceiling"].fillna(0).to_numpy() ** 2
    changes = responses.without_own(np.nan_to_num(changes), own_genes(names, screen.genes))
    shrunk, alone, every = weight[:, None] * changes, (table["n_targets"] == 1).to_numpy(), np.arange(len(names))
    # over all perturbations, so that numbers are rows everywhere
    features, at = screen.rows(np.where(alone, names, "")), pd.Index(screen.genes).get_indexer(names)
    alike = responses.kernels(features)
    nearest = alike.get("all", next(iter(alike.values())))
    blocks = {title: {name: features[name]} for name, title in BLOCK_NAMES.items() if name in features}
    methods = ["no change", *MEANS, "nearest neighbours", *blocks, "matching mean", "additive", "scbin"]
    made = {name: np.full(changes.shape, np.nan) for name in methods}
    made["no change"][:] = 0.0
    # chosen on, predicted, predicted from
    left_out = [(*part, every >= 0) for part in responses.folds(len(names), seed)]
    parts = left_out if sides is None else [(*sides, sides[0])]
    for learn, test, train in parts:
        asked, known, on = (every[rows & alone] for rows in (test, train, learn))
        for method, rows in zip(MEANS, (changes, shrunk), strict=True):
            for these, base in ((asked, known), (every[test & ~alone], every[train])):
                made[method][these] = responses.smoother(None, responses.MEAN, base, these) @ rows[base]
        made["scbin"][asked] = responses.predict(features, changes, weight, on, known, asked, at)
        for method, block in blocks.items():
            made[method][asked] = responses.predict(block, changes, weight, on, known, asked)
        for i in asked:
            others = known[known != i]
            near = others[np.argsort(-nearest[i, others], kind="stable")[:NEIGHBOURS]]
            made["nearest neighbours"][i] = changes[near if nearest[i, others].any() else others].mean(axis=0)
    pair = every[~alone]
    if not len(pair):
        return made
    member = shrunk if sides is None else np.where(sides[0][:, None], shrunk, np.nan_to_num(made["scbin"]))
    targets, member = pd.Index(names[alone]), member[alone]
    index = np.array([targets.get_indexer(name.split("+")) for name in names[pair]])
    base, similar = member[index].sum(axis=1), responses.pair_kernels(member, len(member), index)
    holds = np.array([[target in name.split("+") for target in targets] for name in names])  # (perturbations, targets)
    for learn, test, train in parts:
        on, asked = np.flatnonzero(learn[pair]), np.flatnonzero(test[pair])
        made["scbin"][pair[asked]] = responses.combine(base, changes[pair[on]], weight[pair[on]], similar, on, asked)
        for i in asked:
            share = holds[:, index[i]].any(axis=1) & train & (every != pair[i])
            made["matching mean"][pair[i]] = changes[share].mean(axis=0) if share.any() else 0.0
            if train[alone][index[i]].all():
                made["additive"][pair[i]] = changes[alone][index[i]].sum(axis=0)
    return made


def _scores(table: pd.DataFrame, truth: np.ndarray, made: Mapping[str, np.ndarray], own: np.ndarray) -> pd.DataFrame:
    """Return the scores of each prediction against the measured change, own genes left out: one row per perturbation and method."""
    truth, shift, kinds = np.where(own, np.nan, truth), made["mean of others"], table["n_targets"].to_numpy()
    size = np.nan_to_num(np.abs(truth), nan=-1)
    n_top = min(TOP, max(1, truth.shape[1] // 5))
    top = size >= -np.partition(-size, n_top - 1, axis=1)[:, n_top - 1 : n_top]
    frames = []
    for method, predicted in made.items():
        rows = np.flatnonzero(np.isfinite(predicted).all(axis=1) & np.isfinite(truth).any(axis=1))
        p, t, best = predicted[rows], truth[rows], top[rows]
        known = np.isfinite(t)
        centred = responses.lengthened(np.where(known, t - (np.nansum(t, axis=1) / known.sum(axis=1))[:, None], 0.0))
        like = (p - p.mean(axis=1, keepdims=True)) @ centred.T
        mine, same = np.diag(like)[:, None], kinds[rows][:, None] == kinds[rows]
        np.fill_diagonal(same, False)
        below = ((like < mine) + 0.5 * (like == mine)) * same
        scores = {
            "perturbation": table["perturbation"].to_numpy(dtype=object)[rows],
            "pearson": responses.correlations(p, t),
            "pearson_top": responses.correlations(p, np.where(best, t, np.nan)),
            "cosine_beyond_mean": responses.correlations(p - shift[rows], t - shift[rows], centre=False),
            "retrieval": below.sum(axis=1) / np.maximum(same.sum(axis=1), 1),
            "sign_agreement": ((np.sign(p) == np.sign(t)) * best).sum(axis=1) / best.sum(axis=1),
            "relative_mse": np.nansum((p - t) ** 2, axis=1) / np.maximum(np.nansum(t**2, axis=1), 1e-12),
        }
        frames.append(pd.DataFrame(scores).assign(method=method))
    return pd.concat(frames, ignore_index=True)


def _verdict(table: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Return the verdict: is the method better than the means (pairs: than the sum), by a sign-flip test over reproducible perturbations."""
    total = table[table["n_targets"] == 1]["perturbation"].nunique()
    table = table[table["reproducible"].to_numpy(dtype=bool)]
    wide = table[table["n_targets"] == 1].pivot(index="perturbation", columns="method", values="pearson")
    n, facts = len(wide), {"n_perturbations": total, "n_reproducible": len(wide)}
    if n == 0:
        found = f"none of {total} perturbations is the same in two halves of its cells"
        return facts | {"verdict": f"Nothing is reproducible: {found}, so no method can be judged."}
    p_value = max(sign_flip(wide["scbin"] - wide[name], seed) for name in MEANS)
    word = "Better" if p_value < 0.05 and n >= FEWEST_TO_JUDGE else "No better"
    wins, ceiling = int((wide["scbin"] > wide[MEANS[0]]).sum()), table[table["n_targets"] == 1]["ceiling"].mean()
    r, mean, weighted = (wide[name].mean() for name in ("scbin", *MEANS))
    text = f"{word} than the mean of the others: closer on {wins} of {n} reproducible perturbations (r {r:.2f}; mean "
    text += f"{mean:.2f}, weighted by reliability {weighted:.2f}; ceiling {ceiling:.2f}; p = {p_value:.2g}); "
    text += f"{total - n} of {total} do not reproduce."
    text += f" {n} are too few to tell." if n < FEWEST_TO_JUDGE else ""
    both = table[table["n_targets"] == 2].pivot(index="perturbation", columns="method", values="relative_mse")
    if "additive" in both:
        gain = (both["additive"] - both["scbin"]).dropna()
        sure = "better" if len(gain) >= FEWEST_TO_JUDGE and sign_flip(gain, seed) < 0.05 else "no better"
        text += f" Pairs: {sure} than the sum of both genes, closer on {(gain > 0).sum()} of {len(gain)}."
    return facts | {"p_value": p_value, "ceiling": round(float(ceiling), 3), "verdict": text}


def sign_flip(differences: pd.Series, seed: int) -> float:
    """Return the one-sided p value of a mean difference above 0: how often random signs give one as large."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, len(differences)))
    return float((1 + (signs @ differences.to_numpy() >= differences.sum() - 1e-12).sum()) / (1 + FLIPS))
