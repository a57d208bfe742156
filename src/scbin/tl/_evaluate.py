"""`tl.evaluate`: how good predictions are, beside what simple methods reach on the same cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.special import softmax
from sklearn.metrics import roc_curve
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.preprocessing import StandardScaler

from scbin import _docs, _keys
from scbin._adata import check_adata, read_tokens, read_uns, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get import evaluate_df, read_predicted, read_truth
from scbin.model import resolve_model
from scbin.nn.labels import LARGEST
from scbin.tl._by_file import in_memory
from scbin.tl._finetune import gene_features
from scbin.tl._gene_vectors import fixed_gene_vectors, mean_gene_vectors
from scbin.tl._labels import MaskedPhenotypes, balanced_weights, gene_labels
from scbin.tl._masked_genes import score_masked_genes
from scbin.tl._metrics import class_scores, number_scores
from scbin.tl._predict import check_free, predictable, predictions, record_of, write_predictions
from scbin.tl._probe import Scaler, fit_probe, fitted_temperature, log_expression, some_of
from scbin.tl._split import folds_of, read_split, warn_of_leakage

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from anndata import AnnData

    from scbin.get import Column
    from scbin.io.corpus import FileTokens, Paths
    from scbin.model import Model
    from scbin.tl._split import Split
    from scbin.tokens.tokens import Tokens

GENES = "genes"
N_FOLDS, N_REPEATS, MOST_CELLS = 5, 4, 2_000
GRID = np.linspace(0, 1, 51)  # false positive rates


@_docs.shared
@in_memory
@checked
def evaluate(
    adata: AnnData | FileTokens | Paths,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: Any = None,
    level: Literal["cell", "gene"] = "cell",
    truth_key: str | None = None,
    split_key: str | None = None,
    baselines: bool = True,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Score the predictions of a model, and those of simple methods on the same cells.

    A score alone says little: logistic regression finds the type of nine in ten blood cells. So the table has baselines. For
    classes: the majority class, and balanced logistic regression on log expression. For numbers: the mean, and ridge regression.
    The penalties are chosen by cross-validation. For masked genes: the most frequent bin of the gene, and negative binomials of
    gene x depth and of gene x depth x PCA scores. They read the same tokens as the model.

    Parameters
    ----------
    adata
        Tokenized cells with the true values in `obs`. Files (see :func:`scbin.open_tokens`) are read into memory, and nothing is
        written.
    model
        A :class:`scbin.Model`, or the path of one. Default: the model trained on these cells.
    target
        What is predicted; `"genes"` for the prediction of masked genes (15 %). Default: the only target of the model. With
        `level="gene"`: `{class: genes}`, or a column of `var`.
    level
        `"gene"`: how well classes of genes are predicted from hidden states and count loadings, compared with simple features of
        their expression, by logistic regression, cross-validated over genes four times, with the spread over folds.
    truth_key
        Column of `obs` with the truth. Default: `target`.
    split_key
        Column of `obs` with `"train"`, `"validation"` and `"test"`. Test cells are scored, and baselines are fitted on the
        others. Default: `"scbin_split"`. With a column of donors or batches, baselines are cross-validated by donor; without any
        split, over cells.
    baselines
        Whether to run the baselines of classes and numbers of cells. Those of genes are always there.
    {tokens_key}
    {device}
    {token_budget}
    {seed}
    {progress}

    Returns
    -------
    A table with one row per method, scbin first, and one column per score; :func:`scbin.get.evaluate_df` reads it again. Sets
    the following fields, and those of :func:`scbin.tl.predict`:

    `adata.uns["scbin"]["evaluate"]`
        The scores of this and earlier targets, as a `DataFrame`.

    Means are over the classes of the scored cells, so macro recall is the balanced accuracy. A cell without a predicted class
    counts as wrong; cells without a predicted number are left out.

    Raises
    ------
    ScbinInputError
        If there are no true values, nothing to compare, or several targets of which none is named.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:300].copy()
    >>> scbin.pp.tokenize(adata)
    >>> scbin.tl.split(adata, target="louvain")
    >>> model = scbin.tl.finetune(adata, "new", target="louvain", max_steps=0, progress=False)
    >>> table = scbin.tl.evaluate(adata, model, progress=False)
    >>> list(table.index)
    ['scbin', 'majority class', 'logistic regression']
    """
    adata = check_adata(adata)
    options: dict[str, Any] = {"device": device, "token_budget": token_budget, "progress": progress}
    split = read_split(adata, split_key)
    if level == "gene":
        return _write(adata, *evaluate_gene_classes(adata, model, target, tokens_key, seed, **options))
    if target == GENES:
        return _write(adata, GENES, _genes(adata, model, tokens_key, split, seed, options))

    chosen = resolve_model(model, adata)
    names = predictable(target, chosen)
    name, record = names[0], record_of(chosen, names[0])
    if len(names) != 1 or record.kind == "gene":
        raise ScbinInputError("A02", f"name one target of cells with target=: {', '.join(names)}, or 'genes'.")
    check_free([record.column])
    truth = read_truth(adata, name, record, truth_key)
    codes = np.nan_to_num(truth.values) * bool(truth.classes)
    fold = plan_folds(truth.known, codes, split, split_key, seed=seed)
    tokens = read_tokens(adata, chosen.vocabulary, tokens_key)
    warn_of_leakage(tokens, name, np.flatnonzero(fold >= 0), chosen, split_known=bool(split.test.any()))
    write_predictions(adata, chosen, predictions(chosen, tokens, [name], **options), {name: record.column})
    made = read_predicted(adata, name, truth_key=truth_key, cells="all")
    rows = np.flatnonzero(fold >= 0)
    at = np.searchsorted(made.cells, rows)
    answers = simple_predictions(tokens, truth, fold, split.donors, seed) if baselines else {}
    if truth.kind == "number":
        given = {"scbin": made.predicted[at]} | {method: values[rows] for method, values in answers.items()}
        return _write(adata, name, {method: number_scores(made.truth[at], own) for method, own in given.items()})
    probability = None if made.probability is None else made.probability[at]
    scores = {"scbin": class_scores(made.truth[at], made.predicted[at], probability)}
    for method, values in answers.items():
        scores[method] = class_scores(made.truth[at], values[rows].argmax(axis=1), values[rows])
    return _write(adata, name, scores)


# ---- what is compared -----------------------------------------------------------------------------------------------


def plan_folds(
    known: np.ndarray, codes: np.ndarray, split: Split, split_key: str | None = None, *, seed: int = 0
) -> np.ndarray:
    """Return the fold that scores each cell (cells,), -1 where it is only trained on, -2 where it is not used.

    Test cells are one fold. Where there are none, all cells that are `known` (cells,) are cut into folds, by donor where
    `split_key` names donors. Simple methods have nothing to choose by validation cells, so these are training cells for them.
    """
    fold = np.where(known & (split.open | split.test), -1, -2)
    if split.test.any() or (split_key is not None and split.donors is None):
        fold[known & split.test] = 0
    else:
        rows = np.flatnonzero(fold == -1)
        own = None if split.donors is None else split.donors[rows]
        fold[rows] = folds_of(codes[rows], N_FOLDS, donors=own, seed=seed)
    if not (fold == 0).any() or not ((fold != 0) & (fold > -2)).any():
        found = f"of {known.sum():,} cells that can be scored {(fold == 0).sum():,} are left to test on"
        raise ScbinInputError("L03", f"{found}; some are needed to train on and some to test on.")
    return fold


def simple_predictions(
    tokens: Tokens, truth: Column, fold: np.ndarray, donors: np.ndarray | None, seed: int
) -> dict[str, np.ndarray]:
    """Return what simple methods predict for each cell that is scored: probabilities (cells, classes) or numbers (cells,)."""
    n_classes = len(truth.classes)
    names = ("majority class", "logistic regression") if n_classes else ("mean", "ridge on genes")
    found = [np.full((len(fold), n_classes) if n_classes else len(fold), np.nan) for _ in names]
    for number in range(fold.max() + 1):
        train, test = np.flatnonzero((fold > -2) & (fold != number)), np.flatnonzero(fold == number)
        before, after = log_expression(tokens, train), log_expression(tokens, test)
        scaler = Scaler.fit(np.zeros((1, 1)), before)
        before, after = (scaler.features(None, part, 0.0) for part in (before, after))
        values = truth.values[train]
        how: dict[str, Any] = {"donors": None if donors is None else donors[train], "seed": seed}
        if n_classes:
            codes = truth.codes(train)
            probe = fit_probe(before, codes, n_classes, class_weights=balanced_weights(codes, n_classes), **how)
            guess = np.bincount(codes, minlength=n_classes) / len(codes)
            told = softmax(probe.outputs(after) / fitted_temperature(probe.held_out, probe.truth), axis=1)
        else:
            guess, scale = values.mean(), values.std() or 1.0
            told = fit_probe(before, (values - guess) / scale, 0, **how).outputs(after)[:, 0] * scale + guess
        found[0][test], found[1][test] = guess, told
    return dict(zip(names, found, strict=True))


def _genes(
    adata: AnnData, model: Any, tokens_key: str | None, split: Split, seed: int, options: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Return scores of masked genes, of test cells or of a fifth of all."""
    chosen = resolve_model(model, adata)
    tokens = MaskedPhenotypes(read_tokens(adata, chosen.vocabulary, tokens_key))
    fold = plan_folds(tokens.lengths > 0, np.zeros(tokens.n_cells), split, seed=seed)
    train, test = np.flatnonzero((fold > -2) & (fold != 0)), np.flatnonzero(fold == 0)
    warn_of_leakage(tokens, GENES, test, chosen, split_known=bool(split.test.any()))
    return score_masked_genes(chosen, tokens, train, test, seed, **options)


def _write(adata: AnnData, target: str, scores: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """Put the scores beside those of other targets, and return the table."""
    table = pd.DataFrame.from_dict(dict(scores), orient="index").rename_axis("method").reset_index()
    table.insert(0, "target", target)
    before = read_uns(adata, _keys.EVALUATE, pd.DataFrame)
    before = before[before["target"] != target] if "target" in before else before
    table = pd.concat([before, table], ignore_index=True)
    write_uns(adata, _keys.EVALUATE, table)
    return evaluate_df(adata, target)


# ---- classes of genes -----------------------------------------------------------------------------------------------


def evaluate_gene_classes(
    adata: AnnData, model: Any, target: Any, tokens_key: str | None, seed: int, **how: Any
) -> tuple[str, dict[str, dict[str, float]]]:
    """Score logistic regressions by what they read of genes, in 5-fold cross-validation over genes, four times, all on the same folds.

    Returns the name of the classes and the scores of each method. The mean ROC curves go to `uns`.
    """
    chosen = resolve_model(model, adata)
    tokens: Any = MaskedPhenotypes(read_tokens(adata, chosen.vocabulary, tokens_key))
    labels, cells = gene_labels(adata, target, chosen.vocabulary), np.flatnonzero(tokens.lengths)
    simple, cells = gene_features(tokens, cells, seed), cells[some_of(len(cells), MOST_CELLS, seed)]
    hidden, counts = mean_gene_vectors(chosen.network, tokens, rows=cells, **how)
    rows = np.flatnonzero(labels.known & (counts > 0))
    codes = labels.codes(rows)
    if np.bincount(codes, minlength=len(labels.classes)).min() < N_FOLDS:
        need = f"{N_FOLDS} genes of each class that the cells express are needed: {', '.join(labels.classes)}"
        raise ScbinInputError("L02", f"{need}. Tokenize more genes: n_genes=.")
    reads = {"simple features": simple, "expression mean": simple[:, :1], "detection": simple[:, 1:2]}
    reads |= {"SVD loadings": simple[:, 3:], "hidden states": hidden}
    if chosen.network.counts is not None:
        reads["count loadings"] = fixed_gene_vectors(chosen, "loadings")
    made = {name: cross_validated(features[rows], codes, seed) for name, features in reads.items()}
    curves = [curve.assign(target=labels.name, method=name) for name, (_, curve) in made.items()]
    write_uns(adata, _keys.GENE_ROC, pd.concat(curves, ignore_index=True))
    return labels.name, {name: score for name, (score, _) in made.items()}


def cross_validated(features: np.ndarray, codes: np.ndarray, seed: int = 0) -> tuple[dict[str, float], pd.DataFrame]:
    """Return scores of a logistic regression on genes (genes, features), means over folds, and its mean ROC curve."""
    n_classes, found, curves = int(codes.max()) + 1, [], []
    folds = RepeatedStratifiedKFold(n_splits=N_FOLDS, n_repeats=N_REPEATS, random_state=seed)
    for train, test in folds.split(codes, codes):
        scaled = StandardScaler().fit(features[train]).transform(features).clip(-LARGEST, LARGEST)
        weights = balanced_weights(codes[train], n_classes)
        probe = fit_probe(scaled[train], codes[train], n_classes, class_weights=weights, seed=seed)
        probability = softmax(probe.outputs(scaled[test]), axis=1)
        found.append(class_scores(codes[test], probability.argmax(axis=1), probability))
        curves += [np.interp(GRID, *roc_curve(codes[test] == k, probability[:, k])[:2]) for k in range(n_classes)]
    table = pd.DataFrame(found)
    score = {"n_genes": float(len(codes)), "roc_auc": table["roc_auc"].mean(), "roc_auc_sd": table["roc_auc"].std()}
    score |= table[["macro_recall", "macro_f1", "log_loss"]].mean().to_dict()
    return score, pd.DataFrame({"fpr": GRID, "tpr": np.mean(curves, axis=0), "sd": np.std(curves, axis=0)})
