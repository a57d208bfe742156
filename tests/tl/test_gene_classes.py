"""Classes of genes by `tl.evaluate(level="gene")`."""

from __future__ import annotations

from functools import partial

import anndata as ad
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scbin
from scbin._errors import ScbinInputError
from scbin.tl._evaluate import cross_validated
from scbin.tl._probe import fit_probe

QUIET = {"device": "cpu", "progress": False}


def test_scores_are_those_of_scikit_learns_cross_validation(monkeypatch):
    monkeypatch.setattr("scbin.tl._evaluate.fit_probe", partial(fit_probe, strength=0.1))  # else C is chosen, too
    rng = np.random.default_rng(0)
    codes = np.arange(60) % 2
    features = rng.normal(size=(60, 4)) + codes[:, None] * [1.0, 0.5, 0, 0]
    score, curve = cross_validated(features, codes)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced"))
    folds = RepeatedStratifiedKFold(n_splits=5, n_repeats=4, random_state=0)
    aucs = cross_val_score(model, features, codes, scoring="roc_auc", cv=folds)
    np.testing.assert_allclose((score["roc_auc"], score["roc_auc_sd"]), (np.mean(aucs), np.std(aucs, ddof=1)))
    assert curve["fpr"].iloc[[0, -1]].tolist() == [0, 1] and curve["tpr"].iloc[-1] == 1
    assert abs(np.trapezoid(curve["tpr"], curve["fpr"]) - score["roc_auc"]) < 0.05
    chance, _ = cross_validated(rng.normal(size=(60, 4)), codes)
    assert chance["roc_auc"] < 0.7


def test_the_head_is_a_logistic_regression_on_simple_features(toy, quick):
    scbin.pp.tokenize(toy)
    model = scbin.tl.pretrain(toy, **quick)
    genes = list(model.vocabulary.genes)
    classes = {"high": genes[:15], "low": genes[15:30]}
    model = scbin.tl.finetune(toy, model, target=classes, level="gene", max_steps=0, **QUIET)
    scbin.tl.predict(toy, model, **QUIET)
    counts = toy[:, genes].X.toarray().astype(float)
    x = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    _, singular, rows = np.linalg.svd(x, full_matrices=False)
    rank = min(30, min(x.shape) - 1)
    features = np.column_stack([x.mean(axis=0), (x > 0).mean(axis=0), x.std(axis=0), rows[:rank].T])
    features = StandardScaler().fit_transform(features)
    (strength,) = model.training["finetune"]["probe"]["gene_class"]["strengths"]
    oracle = LogisticRegression(C=strength, max_iter=2000).fit(features[:30], np.arange(30) < 15)
    probability = toy.varm["scbin_gene_class_probability"][toy.var_names.get_indexer(genes)]
    odds = np.log(probability[:, 0] / probability[:, 1])
    assert np.corrcoef(odds, oracle.decision_function(features))[0, 1] > 0.99


def test_known_classes_are_told_and_baselines_stand_beside(toy, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("scbin.tl._evaluate.N_REPEATS", 2)
    toy.var["high"] = ["high" if k < 15 else "low" if k < 30 else None for k in range(40)]
    toy.X = toy.X.multiply(np.where(np.arange(40) < 15, 4, 1)).tocsr()
    scbin.pp.tokenize(toy)
    model = scbin.tl.pretrain(toy, **quick)
    table = scbin.tl.evaluate(toy, model, target="high", level="gene", **QUIET)
    simple = ["simple features", "expression mean", "detection", "SVD loadings"]
    assert table.index.tolist() == [*simple, "hidden states", "count loadings"]
    assert table.loc["expression mean", "roc_auc"] > 0.75 and (table["n_genes"] == 30).all()
    of_lists = {"high": toy.var_names[:15].tolist(), "low": toy.var_names[15:30].tolist()}
    other = scbin.tl.evaluate(toy, model, target=of_lists, level="gene", **QUIET)
    np.testing.assert_allclose(other["roc_auc"], table["roc_auc"])
    toy.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert set(back.uns["scbin"]["gene_roc"]["method"]) == set(table.index)
    assert len(scbin.pl.gene_roc(back).lines) == 7 and len(scbin.pl.gene_roc(back, ["detection"]).lines) == 2
    with pytest.raises(ScbinInputError, match="A06"):
        scbin.pl.gene_roc(back, ["magic"])
    with pytest.raises(ScbinInputError, match="L02"):
        few = {"high": toy.var_names[:4].tolist(), "low": toy.var_names[15:30].tolist()}
        scbin.tl.evaluate(toy, model, target=few, level="gene", **QUIET)
