"""`tl.evaluate`: how good predictions are, beside what simple methods reach on the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, read_tokens, read_uns, warn, write_uns
from scbin._arguments import checked, shown
from scbin._errors import ScbinInputError
from scbin.get.predictions import Record, evaluate_df, predicted_targets, read_predicted, read_truth, recorded
from scbin.model import resolve_model
from scbin.tl._gene_classes import evaluate_gene_classes
from scbin.tl._labels import MaskedPhenotypes
from scbin.tl._leakage import LEAST, fraction_trained_on, hashes_of, warn_of_leakage
from scbin.tl._masked_genes import GENES, score_masked_genes
from scbin.tl._metrics import class_scores, number_scores
from scbin.tl._predict import predictable, predictions, record_of, write_predictions
from scbin.tl._probe import CLASS_BASELINES, NUMBER_BASELINES, baseline_predictions, log_expression
from scbin.tl._split import folds_of, read_split

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from anndata import AnnData

    from scbin.get.predictions import Column, Predicted
    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.tl._split import Split
    from scbin.tokens.tokens import Tokens

N_FOLDS = 5


@_docs.shared
@checked
def evaluate(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | Mapping[str, Any] | None = None,
    level: Literal["cell", "gene"] = "cell",
    truth_key: str | None = None,
    split_key: str | None = None,
    baselines: Sequence[str] | Literal["all", "none"] = "all",
    gene_mask: float = 0.15,
    tokens_key: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    token_budget: int = 32_768,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Score a model's predictions, with simple methods beside it on the same cells.

    A score by itself says little: logistic regression alone tells cell types of blood apart in nine cells of ten. So each table has
    the rows to beat. For classes: the majority class, balanced logistic regression on log expression (C by cross-validation), and
    nearest neighbours among principal components. For numbers: the mean, and ridge regressions on genes and on principal
    components. For masked genes: the most frequent bin of the gene, and negative binomials of gene x depth and of gene x depth x
    PCA scores. They read the same tokens as the model.

    Parameters
    ----------
    adata
        Tokenized cells with the truth in `obs`.
    model
        A :class:`scbin.Model`, or the path of one. Default: the predictions that :func:`scbin.tl.predict` left in `adata`,
        else the model trained on these cells.
    target
        What is predicted; `"genes"` for masked prediction of genes. Default: the model's only target. With `level="gene"`
        `{class: genes}`, or a column of `var`.
    level
        `"gene"`: how well classes of genes can be told by what the model knows of genes (its hidden states, its count head), beside
        simple features of their expression. Logistic regressions, cross-validated over genes four times, with the spread over folds.
    truth_key
        Column of `obs` with the truth. Default: `target`.
    split_key
        Column of `obs` that says which cells are `"train"`, `"validation"` and `"test"`; only the last are scored, the simple
        methods learn from the others. Default: `"scbin_split"`. A column of donors or batches cross-validates the simple methods
        by them; with no split at all, they are cross-validated over cells.
    baselines
        Which simple methods to run, by name.
    gene_mask
        Fraction of the genes to mask, for `target="genes"`.
    {tokens_key}
    {device}
    {precision}
    {token_budget}
    {seed}
    {progress}

    Returns
    -------
    A table with one row per method, scbin first, and one column per score; :func:`scbin.get.evaluate_df` reads it again. Sets
    the following fields, and those of :func:`scbin.tl.predict` if a model is given:

    `adata.uns["scbin"]["evaluate"]`
        The scores of this and earlier targets, as a `DataFrame`.

    For classes, means are over the classes that scored cells have: macro recall is then the balanced accuracy. A cell without a
    prediction counts as wrong; of numbers such cells are left out for all methods. In a cross-validation, pairs of cells for the
    ROC AUC are of the same fold. `calibration_error` compares the probability of the predicted class with how often it is right,
    in 15 bins :cite:p:`guo2017`.

    Raises
    ------
    ScbinInputError
        If there is no truth, nothing to compare, or several targets and none is named.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:300].copy()
    >>> scbin.pp.tokenize(adata)
    >>> scbin.tl.split(adata, target="louvain")
    >>> model = scbin.tl.finetune(adata, "new", target="louvain", max_steps=0, progress=False)
    >>> table = scbin.tl.evaluate(adata, model, progress=False)
    >>> list(table.index)
    ['scbin', 'majority class', 'logistic regression', 'PCA + kNN']
    """
    check_adata(adata)
    if not 0 <= seed < 2**32 or token_budget < 1 or not 0 < gene_mask < 1:
        found = f"seed={seed}, token_budget={token_budget}, gene_mask={gene_mask}"
        raise ScbinInputError("A02", f"{found}: they need to be in [0, 2**32), at least 1, and in (0, 1).")
    options: dict[str, Any] = {"device": device, "precision": precision, "token_budget": token_budget}
    options["progress"] = progress
    split = read_split(adata, split_key)
    if level == "gene":
        return _write(adata, *evaluate_gene_classes(adata, model, target, tokens_key, seed, **options))
    if target == GENES:
        chosen = resolve_model(model, adata)
        masked = MaskedPhenotypes(read_tokens(adata, chosen.vocabulary, tokens_key))
        train, test, how = _cells_for_genes(adata, chosen, masked, split, seed)
        return _write(adata, GENES, score_masked_genes(chosen, masked, train, test, gene_mask, seed, **options), how)

    name, asked, record = _asked(adata, model, target)
    truth, _ = read_truth(adata, name, record, truth_key, classes=record.classes)
    if truth.known.sum() < 2:
        raise ScbinInputError("L01", f"fewer than two cells have a known {name!r}: there is nothing to compare.")
    methods = _methods(baselines, CLASS_BASELINES if truth.kind == "class" else NUMBER_BASELINES)
    fold, how = plan_folds(truth, split, split_key, seed=seed)
    tokens = read_tokens(adata, None if asked is None else asked.vocabulary, tokens_key)
    last, own = adata.uns.get(_keys.UNS, {}).get(_keys.MODEL_ID), record.model if asked is None else asked.fingerprint
    split_known, is_own = bool(split.test.any()), str(last) == own
    warn_of_leakage(tokens, truth, np.flatnonzero(fold >= 0), record.cells, split_known=split_known, own=is_own)
    if asked is not None:
        write_predictions(adata, asked, predictions(asked, tokens, [name], **options), {name: record.column})
    made = read_predicted(adata, name, truth_key=truth_key, cells="all")
    answers = _baselines(tokens, truth, fold, split.donors, methods, seed)
    return _write(adata, name, _scores(made, truth, fold, answers), how)


# ---- what is compared -----------------------------------------------------------------------------------------------


def _asked(
    adata: AnnData, model: Model | str | os.PathLike[str] | None, target: Any
) -> tuple[str, Model | None, Record]:
    """Return which target of which model is scored, and what its predictions are; no model where they are there already."""
    made = predicted_targets(adata)
    if model is None and (target in made or (target is None and len(made) == 1)):
        name = made[0] if target is None else target
        return name, None, recorded(adata, name)
    chosen = resolve_model(model, adata)
    names = predictable(target, chosen)
    record = record_of(chosen, names[0])
    if len(names) != 1 or record.kind == "gene":
        known = f"this model predicts {', '.join(map(repr, names))}, and 'genes' that are masked"
        raise ScbinInputError("A02", f"name one target of cells with target=: {known}.")
    return names[0], chosen, record


def plan_folds(truth: Column, split: Split, split_key: str | None = None, *, seed: int = 0) -> tuple[np.ndarray, str]:
    """Return the fold that scores each cell (cells,), -1 where it is only trained on, -2 where it is not used; and this in words.

    Test cells are one fold. Where there are none, all cells whose truth is known are cut into folds, by donor where `split_key`
    names donors. Simple methods have nothing to choose by validation cells, so these are training cells for them.
    """
    fold = np.where(truth.known & (split.open | split.test), -1, -2)
    rows = np.flatnonzero(fold == -1)
    if split.test.any() or (split_key is not None and split.donors is None):
        fold[truth.known & split.test] = 0
        how = f"{(fold == 0).sum():,} test cells"
    else:
        own = None if split.donors is None else split.donors[rows]
        fold[rows] = folds_of(truth.codes(rows), N_FOLDS, donors=own, seed=seed)
        how = f"{len(rows):,} cells, {fold.max() + 1} folds" + (f" by {split_key}" if split_key else "")
    if not (fold == 0).any() or not ((fold != 0) & (fold > -2)).any():
        found = f"of {len(rows):,} cells with a known truth, {(fold == 0).sum():,} are left to test on"
        raise ScbinInputError("L03", f"{found}; some are needed to train on and some to test on.")
    return fold, how


def _methods(baselines: object, known: tuple[str, ...]) -> tuple[str, ...]:
    names = {"all": known, "none": ()}.get(str(baselines), [baselines] if isinstance(baselines, str) else baselines)
    if not isinstance(names, Sequence) or not set(names) <= set(known):
        raise ScbinInputError("A02", f"baselines is {shown(baselines)}; pass 'all', 'none', or some of {list(known)}.")
    return tuple(names)


def _baselines(
    tokens: Tokens, truth: Column, fold: np.ndarray, donors: np.ndarray | None, methods: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    """Return what each method predicts for each cell that is scored (cells, ...)."""
    answers: dict[str, np.ndarray] = {}
    for number in range(fold.max() + 1) if methods else ():
        train, test = np.flatnonzero((fold > -2) & (fold != number)), np.flatnonzero(fold == number)
        before, after = log_expression(tokens, train), log_expression(tokens, test)
        own = None if donors is None else donors[train]
        for method in methods:
            values = baseline_predictions(method, before, truth, train, after, donors=own, seed=seed)
            answers.setdefault(method, np.full((len(fold), *values.shape[1:]), np.nan))[test] = values
    return answers


def _scores(
    made: Predicted, truth: Column, fold: np.ndarray, answers: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Return the scores of the model and of simple methods on the cells of the folds."""
    rows = np.flatnonzero(fold >= 0)
    at, fold = np.searchsorted(made.cells, rows), fold[rows]
    given = made.predicted[at]
    if truth.kind == "number":
        rows, fold, given = (each[np.isfinite(given)] for each in (rows, fold, given))
        found = {"scbin": given} | {method: values[rows] for method, values in answers.items()}
        return {method: number_scores(truth.values[rows], values, fold) for method, values in found.items()}
    scores = {"scbin": class_scores(made.truth[at], given, None if made.probability is None else made.probability[at])}
    for method, values in answers.items():
        scores[method] = class_scores(truth.codes(rows), values[rows].argmax(axis=1), values[rows], fold)
    return scores


def _cells_for_genes(
    adata: AnnData, model: Model, tokens: Tokens, split: Split, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return cells for the simple models to learn from and cells to mask genes of: test cells, or a third drawn at random."""
    filled = tokens.lengths > 0
    rows, test, how = np.flatnonzero(filled), filled & split.test, "test cells"
    if not test.any():
        how = "cells drawn at random"
        test[rows] = folds_of(np.zeros(len(rows)), 3, seed=seed) == 0
    train, test = np.flatnonzero(filled & split.open & ~test), np.flatnonzero(test)
    if not len(train) or not len(test):
        raise ScbinInputError(
            "L01", f"{len(rows):,} cells have tokens, too few to train on some and to test on others."
        )
    fraction = fraction_trained_on(model.training.get("cells"), hashes_of(tokens, test))
    if fraction is None:
        fraction = float(str(adata.uns.get(_keys.UNS, {}).get(_keys.MODEL_ID)) == model.fingerprint)
    if model.training.get("steps") and fraction >= LEAST:
        found = f"the model was trained on about {fraction:.0%} of the cells whose genes are masked"
        warn("L04", f"{found}. Call scbin.tl.split, and pretrain on the training cells only.")
    return train, test, f"{len(test):,} {how}"


def _write(adata: AnnData, target: str, scores: Mapping[str, Mapping[str, float]], how: str) -> pd.DataFrame:
    """Put the scores beside those of other targets, and return the table."""
    table = pd.DataFrame.from_dict(dict(scores), orient="index").rename_axis("method").reset_index()
    table.insert(0, "target", target)
    before = read_uns(adata, _keys.EVALUATE, pd.DataFrame)
    before = before[before["target"] != target] if "target" in before.columns else before[:0]
    table = pd.concat([before, table.assign(scored_on=how)], ignore_index=True)
    table["scored_on"] = table.pop("scored_on")  # last, after the scores of every target
    write_uns(adata, _keys.EVALUATE, table)
    return evaluate_df(adata, target)
