"""What models remember of the cells that they learned from, and when that is said."""

from __future__ import annotations

import base64
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scbin
from scbin._errors import ScbinInputWarning
from scbin.tl._seen import N_KEPT, cell_hashes, remembered_cells, share_seen

HOW = {"device": "cpu", "progress": False}
FIT = {**HOW, "max_steps": 0}
BARE = {**HOW, "baselines": "none"}


@pytest.fixture
def plain(toy):
    """The toy cells, tokenized without phenotypes."""
    scbin.pp.tokenize(toy)
    return toy


def codes(call):
    """Codes of the warnings about what the model has seen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [each.message.code for each in caught if isinstance(each.message, ScbinInputWarning)]


# ---- hashes ----------------------------------------------------------------------------------------------------------


def test_hashes_depend_on_the_genes_of_a_cell_alone(trained):
    adata = trained[0].copy()
    tokens, vocabulary = adata.obsm["X_tokens"], trained[1].vocabulary
    hashes = cell_hashes(tokens, vocabulary)
    assert hashes[7] == 0 and len(np.unique(hashes)) == 60  # the seventh cell is empty
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(cell_hashes(tokens[order], vocabulary), hashes[order])
    adata.obs["cell_type"] = adata.obs["cell_type"].to_numpy()[order]
    with pytest.warns(ScbinInputWarning, match="I19"):
        scbin.pp.tokenize(adata, like=trained[1])
    assert (adata.obsm["X_tokens"] != tokens).nnz
    np.testing.assert_array_equal(cell_hashes(adata.obsm["X_tokens"], vocabulary), hashes)


def test_blocks_make_no_difference(trained, monkeypatch):
    tokens, vocabulary = trained[0].obsm["X_tokens"], trained[1].vocabulary
    expected = cell_hashes(tokens, vocabulary)
    monkeypatch.setattr("scbin.tl._seen._BLOCK", 70)
    np.testing.assert_array_equal(cell_hashes(tokens, vocabulary), expected)


def test_a_sample_of_hashes_tells_the_share():
    hashes = np.random.default_rng(0).integers(1, 2**64, 40_000, dtype=np.uint64)
    kept = base64.b64encode(np.sort(hashes[:20_000])[:N_KEPT].astype("<u8").tobytes()).decode()
    assert share_seen(kept, hashes[:5_000]) == 1
    assert share_seen(kept, hashes[20_000:]) == 0
    assert share_seen(kept, hashes[15_000:25_000]) == pytest.approx(0.5, abs=0.1)
    for nothing in (None, "", "no base64", "AAA", 7):
        assert share_seen(nothing, hashes) is None


def test_models_remember_through_files(trained, tmp_path):
    adata, model = trained
    cells = model.training["cells"]
    hashes = cell_hashes(adata.obsm["X_tokens"], model.vocabulary)
    assert share_seen(cells, hashes) == pytest.approx(model.training["n_cells"] / 59)
    model.save(tmp_path / "m")
    assert scbin.Model.load(tmp_path / "m").training["cells"] == cells
    assert remembered_cells(adata.obsm["X_tokens"], model.vocabulary, np.arange(0)) == ""


# ---- warnings --------------------------------------------------------------------------------------------------------


def test_a_model_that_was_not_the_last_one_still_knows_its_cells(plain):
    first = scbin.tl.finetune(plain, "tiny", target="cell_type", **FIT)
    scbin.tl.finetune(plain, "tiny", target="cell_type", **FIT, rebalance=0.5)
    assert codes(lambda: scbin.tl.evaluate(plain, first, **BARE)) == ["E16"]
    copy = plain[::2].copy()
    copy.uns["scbin"] = {key: value for key, value in copy.uns["scbin"].items() if key != "model_id"}
    assert codes(lambda: scbin.tl.evaluate(copy, first, **BARE)) == ["E16"]


def test_another_split_is_noticed(plain):
    model = scbin.tl.finetune(plain, "tiny", target="cell_type", **FIT)
    plain.obs["fold"] = np.where(np.arange(60) % 4, "train", "test")
    assert codes(lambda: scbin.tl.evaluate(plain, model, split_key="fold", **BARE)) == ["E16"]
    scbin.tl.split(plain, target="cell_type", seed=1)
    assert codes(lambda: scbin.tl.evaluate(plain, model, **BARE)) == ["E16"]
    assert codes(lambda: scbin.tl.evaluate(plain, **BARE)) == ["E16"]  # by the predictions that are there now
    model = scbin.tl.finetune(plain, "tiny", target="cell_type", **FIT)
    assert codes(lambda: scbin.tl.evaluate(plain, model, **BARE)) == []
    assert codes(lambda: scbin.tl.evaluate(plain, **BARE)) == []
    scbin.tl.split(plain, target="cell_type", seed=2)
    with pytest.warns(ScbinInputWarning, match=r"E16.*learned 'cell_type' from about \d+% of the cells"):
        scbin.tl.evaluate(plain, model, **BARE)


@pytest.mark.parametrize("phenotypes", [["cell_type"], {"ct": "cell_type"}])
def test_labels_shown_in_pretraining_are_noticed_under_any_name(toy, quick, phenotypes):
    scbin.tl.split(toy, target="cell_type")
    scbin.pp.tokenize(toy, phenotypes=phenotypes)
    model = scbin.tl.finetune(toy, scbin.tl.pretrain(toy, **quick), target="cell_type", **FIT)
    assert codes(lambda: scbin.tl.evaluate(toy, model, **BARE)) == ["E17"]
    toy.obs["side"] = pd.Categorical(np.where(toy.obs["sex"] == "male", "L", "R"))
    other = scbin.tl.finetune(toy, model, target="side", **FIT)
    assert codes(lambda: scbin.tl.evaluate(toy, other, **BARE)) == []


def test_pretraining_on_training_cells_alone_is_clean(toy, quick):
    scbin.tl.split(toy, target="cell_type")
    scbin.pp.tokenize(toy, phenotypes=["cell_type"])
    training = toy[toy.obs["scbin_split"] == "train"].copy()
    model = scbin.tl.pretrain(training, **quick)
    assert codes(lambda: scbin.tl.evaluate(toy, model, target="cell_type", **BARE)) == []
    seen = scbin.tl.pretrain(toy, **quick)
    assert codes(lambda: scbin.tl.evaluate(toy, seen, target="cell_type", **BARE)) == ["E17"]


# ---- hidden genes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def many(toy, quick):
    """Enough cells that pretraining holds some of them out."""
    rng = np.random.default_rng(5)
    adata = ad.concat([toy] * 4, index_unique="-")
    adata.X.data = rng.poisson(adata.X.data).astype(np.float32) + 1
    scbin.pp.tokenize(adata)
    return adata


def genes(adata, model, **arguments):
    return scbin.tl.evaluate(adata, model, target="genes", progress=False, **arguments)["scored_on"].iloc[0]


def test_hidden_genes_are_those_of_cells_that_pretraining_did_not_see(many, quick):
    scbin.tl.split(many)
    model = scbin.tl.pretrain(many, **quick)
    held_out = f"{240 - model.training['n_cells']} cells held out of pretraining"
    assert genes(many, model) == held_out  # not the test cells, which it has seen
    tuned = scbin.tl.finetune(many, model, target="cell_type", **FIT)
    assert genes(many, model) == held_out  # though another model was trained here in the meantime
    assert genes(many, tuned) == held_out
    with pytest.warns(ScbinInputWarning, match=r"E42.*about \d+% of the cells"):
        assert genes(many, model, split_key="scbin_split") == "48 test cells"
    part = many[::2].copy()  # what was held out cannot be known of a part
    with pytest.warns(ScbinInputWarning, match="E42"):
        genes(part, model)


def test_test_cells_that_pretraining_did_not_see_are_asked(many, quick):
    scbin.tl.split(many)
    model = scbin.tl.pretrain(many[many.obs["scbin_split"] != "test"].copy(), **quick)
    assert genes(many, model) == "48 test cells"
    untrained = scbin.tl.finetune(many, "tiny", target="cell_type", **FIT)
    assert genes(many, untrained) == "48 test cells"


def test_models_that_remember_nothing_are_told_by_their_fingerprint(many, quick):
    model = scbin.tl.pretrain(many, **quick)
    del model.training["cells"]
    assert "held out" in genes(many, model)
    many.obs["side"] = np.where(np.arange(240) % 2, "train", "test")
    with pytest.warns(ScbinInputWarning, match=r"E42.*100%"):
        genes(many, model, split_key="side")


def test_where_too_few_cells_are_asked_to_tell_they_may_have_been_seen(toy, quick, monkeypatch):
    monkeypatch.setattr("scbin.tl._seen.N_KEPT", 1)
    scbin.pp.tokenize(toy, phenotypes=["cell_type"])
    model = scbin.tl.pretrain(toy, **quick)
    hashes = cell_hashes(toy.obsm["X_tokens"], model.vocabulary)
    later = np.ones(60, dtype=bool)
    later[np.argsort(hashes)[:20]] = False  # beyond the only hash that is kept nothing is known
    toy.obs["side"] = np.where(later, "test", "train")
    assert share_seen(model.training["cells"], hashes[later]) is None
    with pytest.warns(ScbinInputWarning, match="E42"):
        genes(toy, model, split_key="side")
    assert codes(lambda: scbin.tl.evaluate(toy, model, target="cell_type", split_key="side", **BARE)) == ["E17"]
