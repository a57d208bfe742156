"""`tl.evaluate_perturbations`: how well perturbations that were left out are predicted, beside the mean of the others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, copied, write
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get.measured import Screen, read_screen
from scbin.tl._fit_perturbations import FEWEST_SINGLES, own_genes
from scbin.tl._responses import (
    Rule,
    combine,
    correlations,
    halves,
    kernels,
    pair_kernels,
    ridge,
    smoother,
    sum_cells,
    without_own,
)
from scbin.tl._screen import read_cells, targets_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

FOLDS = 10
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
    """Predict each measured perturbation from the others, by several methods, and say whether that is better than their mean.

    Published deep models were rarely better than the mean change of the other perturbations, so that is what everything stands
    beside. The measured change comes from other control cells (with donors: other donors) than what is learned from, since a shared
    control alone makes all changes resemble each other. Perturbations whose change does not reproduce are set apart: nothing can
    be right or wrong about them.

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
    if list(cells.names) != list(screen.table["perturbation"]) or len(screen.genes) != adata.n_vars:
        raise ScbinInputError("A03", "cells or genes are not those of the fit. Call scbin.tl.fit_perturbations again.")
    table = screen.table[(screen.table["status"] == "measured").to_numpy()]
    sides = _sides(split, screen, list(table["perturbation"]))
    sums = sum_cells(cells.values, cells.group, cells.stratum, cells.donor, int(screen.params["seed"]))
    ways = halves(sums.cells.shape[2], seed)[0]
    scores, kept = [], []
    for half in (ways, ~ways):
        learned = sums.changes(half) if cells.donor is not None else sums.changes(None, half)
        truth = sums.changes(~half) if cells.donor is not None else sums.changes(None, ~half)
        made = _predictions(screen, table, learned[table.index], sides, seed)
        scores.append(_scores(table, truth[table.index], made, own_genes(table["perturbation"], screen.genes)))
        kept.append((truth[table.index], made["scbin"]))
    result = pd.concat(scores).groupby(["perturbation", "method"], sort=False).mean().reset_index()
    columns = ["perturbation", "n_targets", "n_cells", "split_half", "ceiling", "reproducible"]
    result = table[columns].merge(result, on="perturbation")
    params = _verdict(result, seed) | {
        "split": "given" if split else "leave one out",
        "donors": cells.donor is not None,
    }
    observed, predicted = (np.array(part) for part in zip(*kept, strict=True))  # (halves, perturbations, genes)
    missing = ~np.isfinite(observed)  # with donors: a half in which it was not done
    observed = np.where(missing, 0, observed).sum(axis=0) / np.maximum((~missing).sum(axis=0), 1)
    entry = {"table": result, "observed": observed.astype(np.float32), "genes": screen.genes}
    entry |= {"predicted": predicted.mean(axis=0).astype(np.float32)}
    entry |= {"names": table["perturbation"].to_numpy(dtype=object), "params": json.dumps(params)}
    target = copied(adata) if copy else adata
    write(target, "uns", _keys.MEASURED_EVALUATED, entry)
    return target if copy else None


def _sides(split: Any, screen: Screen, measured: list[str]) -> tuple[set[str], set[str]] | None:
    """Return the perturbations to learn from and those to predict, or `None` for each from all others."""
    if split is None:
        return None
    if set(split) != {"train", "test"}:
        raise ScbinInputError("A02", "split needs two lists of perturbations: {'train': [...], 'test': [...]}.")
    names = {}
    for side, labels in split.items():
        found = targets_of(labels, screen.params["control"], [*screen.names, *measured])
        names[side] = {"+".join(each) for each in found.values()}
        unknown = sorted(names[side] - set(measured))
        if unknown:
            raise ScbinInputError("A06", f"{unknown[0]!r} in split[{side!r}] was not measured in enough cells.")
    both = sorted(names["train"] & names["test"])
    if both:
        raise ScbinInputError("L03", f"{both[0]!r} is in both sides of the split; a prediction of it would be no test.")
    if sum("+" not in name for name in names["train"]) < FEWEST_SINGLES or not names["test"]:
        raise ScbinInputError("P02", f"split needs {FEWEST_SINGLES} genes to learn from, and something to predict.")
    return names["train"], names["test"]


def _predictions(
    screen: Screen, table: pd.DataFrame, changes: np.ndarray, sides: tuple[set[str], set[str]] | None, seed: int
) -> dict[str, np.ndarray]:
    """Return what each method predicts for each perturbation (perturbations, genes), NaN for those that it does not."""
    names, weight = table["perturbation"].to_numpy(dtype=object), table["reliability"].fillna(0).to_numpy()
    changes = without_own(np.nan_to_num(changes), own_genes(names, screen.genes))
    shrunk, alone = weight[:, None] * changes, (table["n_targets"] == 1).to_numpy()
    single, pair = np.flatnonzero(alone), np.flatnonzero(~alone)
    alike = {}  # over all perturbations, so that numbers are rows everywhere
    for name, kernel in kernels(screen.rows(names[single])).items():
        alike[name] = np.zeros((len(names),) * 2)
        alike[name][np.ix_(single, single)] = kernel
    methods = ["no change", *MEANS, "nearest neighbours", *(BLOCK_NAMES[name] for name in alike if name in BLOCK_NAMES)]
    made = {name: np.full(changes.shape, np.nan) for name in [*methods, "matching mean", "additive", "scbin"]}
    made["no change"][:] = 0.0
    every, fold = np.arange(len(names)), np.random.default_rng(seed).permutation(len(names)) % FOLDS
    parts = [(fold != f, fold == f, fold >= 0) for f in range(FOLDS)]  # chosen on, predicted, predicted from
    if sides is not None:
        train, test = (np.isin(names, list(side)) for side in sides)
        parts = [(train, test, train)]
    for learn, test, train in parts:
        for kind in (alone, ~alone):
            asked, known = every[test & kind], every[train]
            known = known if kind is not alone else every[train & alone]
            for method, rows in zip(MEANS, (changes, shrunk), strict=True):
                made[method][asked] = smoother(None, Rule(), known, asked) @ rows[known]
        asked, known, on = (every[rows & alone] for rows in (test, train, learn))
        made["scbin"][asked] = ridge(alike, shrunk, changes, weight, on, known, asked)
        for block in alike.keys() & BLOCK_NAMES.keys():
            one = {block: alike[block]}
            made[BLOCK_NAMES[block]][asked] = ridge(one, shrunk, changes, weight, on, known, asked, always=True)
        nearest = alike.get("all", next(iter(alike.values())))
        for i in asked:
            others = known[known != i]
            near = others[np.argsort(-nearest[i, others], kind="stable")[:NEIGHBOURS]]
            made["nearest neighbours"][i] = changes[near if nearest[i, others].any() else others].mean(axis=0)
    if not len(pair):
        return made
    member = shrunk if sides is None else np.where(parts[0][2][:, None], shrunk, np.nan_to_num(made["scbin"]))
    place = {name: k for k, name in enumerate(names)}
    index = np.array([[place[t] for t in name.split("+")] for name in names[pair]])
    base, similar = member[index].sum(axis=1), pair_kernels(alike, member, index)
    for learn, test, train in parts:
        on, asked = np.flatnonzero(learn[pair]), np.flatnonzero(test[pair])
        made["scbin"][pair[asked]] = combine(base, changes[pair[on]], weight[pair[on]], similar, on, asked)
        for i in asked:
            share = np.array([bool(set(name.split("+")) & set(names[index[i]])) for name in names])
            share &= train & (every != pair[i])
            made["matching mean"][pair[i]] = changes[share].mean(axis=0) if share.any() else 0.0
            made["additive"][pair[i]] = changes[index[i]].sum(axis=0) if train[index[i]].all() else np.nan
    return made


def _scores(table: pd.DataFrame, truth: np.ndarray, made: Mapping[str, np.ndarray], own: np.ndarray) -> pd.DataFrame:
    """Return the scores of each prediction against the measured change, own genes left out: one row per perturbation and method."""
    truth = np.where(own, np.nan, truth)
    n_top = min(TOP, max(1, truth.shape[1] // 5))
    size = np.nan_to_num(np.abs(truth), nan=-1)
    top = size >= -np.partition(-size, n_top - 1, axis=1)[:, n_top - 1 : n_top]
    shift, kinds = made["mean of others"], table["n_targets"].to_numpy()
    known = np.isfinite(truth)
    centre = np.nansum(truth, axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)
    filled = np.where(known, truth - centre, 0.0)
    filled /= np.maximum(np.linalg.norm(filled, axis=1, keepdims=True), 1e-12)
    frames = []
    for method, predicted in made.items():
        rows = np.flatnonzero(np.isfinite(predicted).all(axis=1) & np.isfinite(truth).any(axis=1))
        p, t, best = predicted[rows], truth[rows], top[rows]
        like = (p - p.mean(axis=1, keepdims=True)) @ filled[rows].T
        mine, same = np.diag(like)[:, None], kinds[rows][:, None] == kinds[rows]
        np.fill_diagonal(same, False)
        below = ((like < mine) + 0.5 * (like == mine)) * same
        scores = {
            "pearson": correlations(p, t),
            "pearson_top": correlations(p, np.where(best, t, np.nan)),
            "cosine_beyond_mean": correlations(p - shift[rows], t - shift[rows], centre=False),
            "retrieval": below.sum(axis=1) / np.maximum(same.sum(axis=1), 1),
            "sign_agreement": ((np.sign(p) == np.sign(t)) * best).sum(axis=1) / best.sum(axis=1),
            "relative_mse": np.nansum((p - t) ** 2, axis=1) / np.maximum(np.nansum(t**2, axis=1), 1e-12),
        }
        names = table["perturbation"].to_numpy(dtype=object)[rows]
        frames.append(pd.DataFrame({"perturbation": names, "method": method, **scores}))
    return pd.concat(frames, ignore_index=True)


def _verdict(table: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Return the verdict: is the method better than the means (pairs: than the sum), by a sign-flip test over reproducible perturbations."""
    singles = table[table["n_targets"] == 1]
    total, right = singles["perturbation"].nunique(), singles[singles["reproducible"].to_numpy(dtype=bool)]
    n = right["perturbation"].nunique()
    facts: dict[str, Any] = {"n_perturbations": total, "n_reproducible": n}
    if n == 0:
        found = f"none of {total} perturbations is the same in two halves of its cells"
        return facts | {"verdict": f"Nothing is reproducible: {found}, so no method can be judged."}
    wide = right.pivot(index="perturbation", columns="method", values="pearson")
    p_value = max(sign_flip(wide["scbin"] - wide[name], seed) for name in MEANS)
    better, wins = p_value < 0.05 and n >= FEWEST_TO_JUDGE, int((wide["scbin"] > wide["mean of others"]).sum())
    means = {name: round(float(value), 3) for name, value in wide.mean().items() if np.isfinite(value)}
    ceiling = round(float(right.drop_duplicates("perturbation")["ceiling"].mean()), 3)
    text = f"{'Better' if better else 'No better'} than the mean of the others: closer on {wins} of {n} reproducible perturbations"
    text += (
        f" (r {means['scbin']:.2f}; mean {means[MEANS[0]]:.2f}, weighted by reliability {means[MEANS[1]]:.2f}; ceiling "
    )
    text += f"{ceiling:.2f}; p = {p_value:.2g}); {total - n} of {total} do not reproduce."
    text += f" {n} are too few to tell." if n < FEWEST_TO_JUDGE else ""
    facts |= {"p_value": p_value, "wins": wins, "pearson": means, "ceiling": ceiling}
    pairs = table[(table["n_targets"] == 2) & table["reproducible"].to_numpy(dtype=bool)]
    both = pairs.pivot(index="perturbation", columns="method", values="relative_mse")
    if "additive" in both.columns:
        gain = (both["additive"] - both["scbin"]).dropna()
        sure = len(gain) >= FEWEST_TO_JUDGE and sign_flip(gain, seed) < 0.05
        text += f" Pairs: {'better' if sure else 'no better'} than the sum of both genes, closer on {(gain > 0).sum()} of {len(gain)}."
    return facts | {"verdict": text}


def sign_flip(differences: pd.Series, seed: int) -> float:
    """Return the one-sided p value of a mean difference above 0: how often random signs give one as large."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, len(differences)))
    return float((1 + (signs @ differences.to_numpy() >= differences.sum() - 1e-12).sum()) / (1 + FLIPS))
