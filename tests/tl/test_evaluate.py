"""`tl.evaluate`: scores of the right cells, honest simple methods beside them, and masked genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import nbinom
from sklearn.metrics import accuracy_score, f1_score

import scbin
from scbin._adata import read_tokens
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTypeError
from scbin.nn.counts import CountHead
from scbin.tl._labels import MaskedPhenotypes
from scbin.tl._masked_genes import _by_head, mask_cells, score_masked_genes
from scbin.tl._metrics import gene_scores
from scbin.tokens.rules import Tokenization

HOW = {"device": "cpu", "progress": False}
BARE = {**HOW, "baselines": False}
CLASSES = ["scbin", "majority class", "logistic regression"]


@pytest.fixture(scope="module")
def tuned(trained):
    """Cells with a split, and a model that was fine-tuned on the training part for a type and an age."""
    adata = trained[0].copy()
    adata.obs["age"] = np.where(adata.obs["cell_type"] == "B cell", 60.0, 30.0) + np.arange(60) % 3
    scbin.tl.split(adata, target="cell_type", test=0.3)
    model = scbin.tl.finetune(
        adata, trained[1], target=["cell_type", "age"], kind={"age": "number"}, max_steps=0, **HOW
    )
    return adata, model


@pytest.fixture
def quiet(recwarn):
    """For models that were shown the phenotypes of test cells in pretraining, as the fixture was."""
    with pytest.warns(ScbinInputWarning):
        yield


@pytest.mark.usefixtures("quiet")
def test_scores_are_those_of_the_test_cells(tuned, untouched):
    adata, model = tuned[0].copy(), tuned[1]
    then = untouched(adata)
    table = scbin.tl.evaluate(adata, model, target="cell_type", **HOW)
    names = {"scbin_cell_type", "scbin_cell_type_probability"}
    then.check(obs=names, obsm={"scbin_cell_type_probability"}, uns={"predict", "evaluate"})
    test = (adata.obs["scbin_split"] == "test").to_numpy()
    assert list(table.index) == CLASSES and (table["n_cells"] == test.sum()).all()
    true, given = (adata.obs[name][test].astype(str) for name in ("cell_type", "scbin_cell_type"))
    assert table.loc["scbin", "accuracy"] == accuracy_score(true, given)
    assert table.loc["scbin", "macro_f1"] == pytest.approx(
        f1_score(true, given, average="macro", labels=sorted(set(true)))
    )
    assert table.loc["logistic regression", "accuracy"] > 0.9 > 0.5 > table.loc["majority class", "accuracy"]
    numbers = scbin.tl.evaluate(adata, model, target="age", **HOW)
    assert list(numbers.index) == ["scbin", "mean", "ridge on genes"]
    assert numbers.loc["scbin", "r2"] > 0.8 and numbers.loc["ridge on genes", "r2"] > 0.8 > numbers.loc["mean", "r2"]
    assert set(scbin.get.evaluate_df(adata)["target"]) == {"cell_type", "age"}


@pytest.mark.usefixtures("quiet")
def test_test_labels_teach_nothing(tuned):
    tables = []
    for spoiled in (False, True):
        adata = tuned[0].copy()
        adata.obs["truth"] = adata.obs["cell_type"].astype(str)
        if spoiled:
            adata.obs.loc[adata.obs["scbin_split"] == "test", "truth"] = "T cell"
        scbin.tl.evaluate(adata, tuned[1], target="cell_type", truth_key="truth", **HOW)
        tables.append(scbin.get.evaluate_df(adata, "cell_type"))
    true_fraction = (tuned[0].obs["cell_type"][tuned[0].obs["scbin_split"] == "test"] == "T cell").mean()
    assert tables[1].loc["logistic regression", "accuracy"] == pytest.approx(true_fraction, abs=0.1)
    assert tables[0].loc["logistic regression", "accuracy"] > 0.9


def test_without_a_split_all_cells_are_scored_with_a_warning(tuned):
    adata, model = tuned[0].copy(), tuned[1]
    del adata.obs["scbin_split"], adata.uns["scbin"]["split"]
    with pytest.warns(ScbinInputWarning, match="L04.*scbin.tl.split"):
        table = scbin.tl.evaluate(adata, model, target="cell_type", **HOW)
    assert (table["n_cells"] == 60).all()
    adata.obs["donor_id"] = [f"d{i}" for i in np.arange(60) // 10]
    with pytest.warns(ScbinInputWarning, match="L04"):
        table = scbin.tl.evaluate(adata, model, target="cell_type", split_key="donor_id", **HOW)
    assert table.loc["logistic regression", "accuracy"] > 0.8


def test_tables_are_kept_and_survive_writing(tuned, tmp_path):
    adata, model = tuned[0].copy(), tuned[1]
    with pytest.warns(ScbinInputWarning, match="L04"):
        scbin.tl.evaluate(adata, model, target="cell_type", **BARE)
    scbin.tl.evaluate(adata, model, target="age", **HOW)
    scbin.tl.evaluate(adata, model, target="age", **HOW)
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(scbin.get.evaluate_df(back), scbin.get.evaluate_df(adata), check_dtype=False)
    assert len(scbin.get.evaluate_df(adata)) == 4


def test_true_ages_are_cut_as_the_vocabulary_cut_them(toy, quick):
    years = np.array([15, 34, 52])[np.arange(60) % 3] + np.arange(60) % 4
    toy.obs["age"] = [f"{year}-year-old human stage" for year in years]
    scbin.pp.tokenize(toy, phenotypes=["age"], tokenization=Tokenization(age_groups=20))
    model = scbin.tl.pretrain(toy, **quick)
    with pytest.warns(ScbinInputWarning, match="L04"):
        table = scbin.tl.evaluate(toy, model, target="age", **HOW)
    classes = np.select([years < 20, years < 40], ["<20", "20-40"], "40-60")
    assert table.loc["scbin", "accuracy"] == np.mean(toy.obs["scbin_age"].astype(str) == classes)
    assert table.loc["logistic regression", "accuracy"] > 0.9  # of three classes, not of one a year


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("A02", {"target": None}),
        ("M06", {"target": "tissue"}),
        ("A06", {"target": "cell_type", "truth_key": "celltype"}),
        ("A01", {"target": "cell_type", "baselines": 3}),
        ("L03", {"target": "cell_type", "split_key": "part"}),
        ("L03", {"target": "cell_type", "truth_key": "nothing"}),
    ],
)
def test_errors_write_nothing(tuned, untouched, code, arguments):
    adata, model = tuned[0].copy(), tuned[1]
    adata.obs["part"], adata.obs["nothing"] = "train", ""
    then = untouched(adata)
    with pytest.raises((ScbinInputError, ScbinTypeError), match=code):
        scbin.tl.evaluate(adata, model, **arguments, **HOW)
    then.check()


# ---- masked genes ---------------------------------------------------------------------------------------------------


def test_masks_depend_on_the_seed_and_the_tokens_of_a_cell_alone(trained):
    tokens = MaskedPhenotypes(read_tokens(trained[0]))
    one, other = (mask_cells(tokens, np.array(rows), 0.3, seed=1) for rows in ([3, 4, 5], [5, 3]))
    assert (one.keys[one.rows == 2] == other.keys[other.rows == 0]).all()
    assert (one.levels[one.rows == 0] == other.levels[other.rows == 1]).all()
    again = mask_cells(tokens, np.array([3, 4, 5]), 0.3, seed=2)
    assert len(again.keys) != len(one.keys) or (again.keys != one.keys).any()
    n_genes = tokens.vocabulary.is_gene_token(tokens.take(np.array([3, 4, 5])).data).sum()
    assert 0.1 < len(one.keys) / n_genes < 0.5
    hidden = one.tokens.matrix.data == tokens.vocabulary.mask_id
    assert hidden.sum() == len(one.keys) + 3 * len(tokens.vocabulary.phenotypes)


def test_levels_are_those_of_a_negative_binomial(trained):
    tokens = MaskedPhenotypes(read_tokens(trained[0]))
    asked = mask_cells(tokens, np.arange(6), 0.4, seed=0)
    n_genes = len(tokens.vocabulary.genes)
    rates = np.log(np.random.default_rng(0).dirichlet(np.ones(n_genes), 6)).astype(np.float32)
    head = CountHead(n_genes, 6, dispersion=2.0)
    head.loadings.data, head.bias.data = torch.from_numpy(rates.T.copy()), torch.zeros(1, n_genes)
    best, logs = _by_head(head, torch.eye(6), asked)
    k = int(np.flatnonzero(asked.levels <= 3)[0])
    row, gene = asked.rows[k], asked.keys[k]
    visible = asked.visible().toarray()[row]
    shown = np.setdiff1d(np.arange(n_genes), asked.keys[asked.rows == row])
    mu = visible.sum() / np.exp(rates[row, shown]).sum() * np.exp(rates[row, gene])
    pmf = nbinom.pmf(np.arange(1, 500), 2.0, 2.0 / (2.0 + mu))
    assert logs[k] == pytest.approx(np.log(pmf[asked.levels[k] - 1] / pmf.sum()), rel=1e-4)
    assert best[k] == 1 + pmf[:10].argmax() or best[k] > 10


def test_simple_models_of_genes_know_what_they_should(trained):
    adata, model = trained
    tokens = MaskedPhenotypes(read_tokens(adata))
    filled = np.flatnonzero(tokens.lengths)
    scores = score_masked_genes(model, tokens, filled[:40], filled[40:], seed=0, device="cpu")
    assert list(scores) == ["scbin", "most frequent per gene", "gene x depth", "gene x depth x PCA scores"]
    # which type a cell is of decides how much of a gene it has, and neither genes nor depth say so
    assert scores["gene x depth x PCA scores"]["log_loss"] < scores["gene x depth"]["log_loss"] - 0.1
    assert all(np.isfinite(each["log_loss"]) for each in scores.values())


@pytest.mark.parametrize("encoding", ["rank", "binary", "gene_bins"])
def test_every_encoding_can_be_asked_for_genes(toy, quick, encoding):
    scbin.pp.tokenize(toy, encoding=encoding)
    model = scbin.tl.pretrain(toy, **quick)
    with pytest.warns(ScbinInputWarning, match="L04"):
        table = scbin.tl.evaluate(toy, model, target="genes", **HOW)
    assert table.index[0] == "scbin" and table["log_loss"].notna().all()


def test_genes_are_masked_in_test_cells_and_cells_trained_on_are_noticed(trained, quick):
    adata, model = trained[0].copy(), trained[1]
    with pytest.warns(ScbinInputWarning, match="L04"):
        table = scbin.tl.evaluate(adata, model, target="genes", **HOW)
    adata.obs["part"] = np.where(np.arange(60) < 30, "train", "test")
    clean = scbin.tl.pretrain(adata[:30].copy(), **quick)
    table = scbin.tl.evaluate(adata, clean, target="genes", split_key="part", **HOW)
    assert table["n_genes"].gt(0).all()


def test_scores_of_levels_against_a_loop():
    rng = np.random.default_rng(0)
    truth, given = rng.integers(0, 12, 300), rng.integers(0, 12, 300)
    scores = gene_scores(truth, given, np.full(300, -1.5))
    pairs = list(zip(truth, given, strict=True))
    assert scores["exact"] == np.mean([a == b for a, b in pairs])
    assert scores["within_one"] == np.mean([abs(a - b) <= 1 for a, b in pairs])
    assert scores["log_loss"] == 1.5
