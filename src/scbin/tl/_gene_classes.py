"""`tl.evaluate(level="gene")`: how well classes of genes can be told, by what a model knows of genes and by simple features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import softmax
from sklearn.metrics import roc_curve
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.preprocessing import StandardScaler

from scbin import _keys
from scbin._adata import read_tokens, write_uns
from scbin._errors import ScbinInputError
from scbin.model import resolve_model
from scbin.nn.labels import LARGEST
from scbin.tl._finetune import gene_features
from scbin.tl._gene_vectors import fixed_gene_vectors, mean_gene_vectors
from scbin.tl._labels import MaskedPhenotypes, balanced_weights, gene_labels
from scbin.tl._metrics import class_scores
from scbin.tl._probe import fit_probe, some_of

if TYPE_CHECKING:
    from anndata import AnnData

N_FOLDS, N_REPEATS, MOST_CELLS = 5, 4, 2_000
GRID = np.linspace(0, 1, 51)  # false positive rates


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
