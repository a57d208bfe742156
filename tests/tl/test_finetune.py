"""`tl.finetune`, `tl.predict` and `tl.split` as users call them."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import scbin
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTypeError
from scbin.tl._sides import Sides, donors_kept_apart, given_sides

HOW = {"device": "cpu", "progress": False}
FIT = {**HOW, "max_steps": 0}  # the regression alone


@pytest.fixture
def ready(cells, trained):
    """Cells with every slot filled, tokenized for the model, with their types hidden from it."""
    scbin.pp.tokenize(cells, like=trained[1])
    cells.obs["age"] = np.where(cells.obs["cell_type"] == "B cell", 60.0, 30.0) + np.arange(60) % 3
    cells.obs["donor_id"] = pd.Categorical([f"d{i}" for i in np.arange(60) // 10])
    cells.var["tf"] = pd.Categorical(np.where(np.arange(40) < 20, "yes", "no"))
    return cells


@pytest.fixture(scope="module")
def tuned(trained):
    """A model fine-tuned on the toy cells for two targets."""
    adata = trained[0].copy()
    adata.obs["age"] = np.where(adata.obs["cell_type"] == "B cell", 60.0, 30.0)
    model = scbin.tl.finetune(
        adata, trained[1], target={"cell_type": 1.0, "age": 0.5}, kind={"age": "number"}, epochs=1, **HOW
    )
    return adata, model


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


def test_its_slots_are_written_and_no_others(ready, trained, untouched):
    then = untouched(ready)
    before = {name: tensor.clone() for name, tensor in trained[1].bert.state_dict().items()}
    fingerprint = trained[1].fingerprint
    model = scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="donor_id", epochs=1, **HOW)
    then.check(obs={"scbin_split"}, uns={"finetune", "finetune_history", "model_id", "model_path"})
    assert trained[1].fingerprint == fingerprint and trained[1].head is None
    assert all(torch.equal(before[name], tensor) for name, tensor in trained[1].bert.state_dict().items())
    assert model.head.targets[0].classes == ("B cell", "T cell", "monocyte")
    sides = ready.obs["scbin_split"]
    assert list(sides.cat.categories) == ["train", "validation", "test"] and not (sides == "test").any()
    by_donor = pd.crosstab(ready.obs["donor_id"], sides)
    assert ((by_donor > 0).sum(axis=1) == 1).all() and (sides == "validation").any()
    record = json.loads(ready.uns["scbin"]["finetune"])
    assert record["targets"] == {"cell_type": "class"} and record["split_key"] == "donor_id"


def test_the_same_call_gives_the_same_model_and_a_seed_another(ready, trained):
    how = {**HOW, "target": "cell_type", "split_key": "donor_id", "epochs": 1}
    first, again = (scbin.tl.finetune(ready, trained[1], **how).fingerprint for _ in range(2))
    assert first == again


def test_the_phenotype_that_is_learned_is_hidden_in_its_slot(ready, trained):
    model = scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="donor_id", **FIT)
    told = ready.copy()
    slot = model.vocabulary.phenotype("cell_type")
    tokens = told.obsm["X_tokens"]
    tokens.data[tokens.indices == slot.position] = slot.first_id + 1
    again = scbin.tl.finetune(told, trained[1], target="cell_type", split_key="donor_id", **FIT)
    assert again.fingerprint == model.fingerprint
    scbin.tl.predict(ready, model, **HOW)
    scbin.tl.predict(told, model, **HOW)
    np.testing.assert_array_equal(told.obsm["scbin_cell_type_probability"], ready.obsm["scbin_cell_type_probability"])


def test_test_cells_are_never_looked_at(ready, trained):
    scbin.tl.split(ready, split_key="donor_id", test_share=0.3, seed=1)
    spoiled = ready.copy()
    test = (spoiled.obs["scbin_split"] == "test").to_numpy()
    labels = spoiled.obs["cell_type"].astype(str).to_numpy()
    labels[test] = "T cell"
    spoiled.obs["cell_type"] = labels
    how = {**FIT, "target": "cell_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScbinInputWarning)
        models = [scbin.tl.finetune(adata, trained[1], **how) for adata in (ready, spoiled)]
    assert models[0].fingerprint == models[1].fingerprint
    assert (ready.obs["scbin_split"] == "test").to_numpy().tolist() == test.tolist()


def test_from_scratch_and_of_genes(ready):
    model = scbin.tl.finetune(ready, "new", target="tf", level="gene", max_steps=2, **HOW)
    scbin.tl.predict(ready, model, **HOW)
    assert list(ready.var["scbin_tf"].cat.categories) == ["no", "yes"]
    assert ready.varm["scbin_tf_probability"].shape == (40, 2) and "scbin_tf" not in ready.obs


def test_missing_labels_are_left_out_and_counted(ready, trained):
    labels = ready.obs["cell_type"].astype(object)
    labels.iloc[:3] = [np.nan, "", "unknown"]
    ready.obs["cell_type"] = labels
    scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="donor_id", **FIT)
    assert json.loads(ready.uns["scbin"]["finetune"])["without_label"] == {"cell_type": 3}
    assert ready.obs["scbin_split"].isna().sum() == 3


def test_donors_on_both_sides_are_pointed_out(ready, trained):
    with pytest.warns(ScbinInputWarning, match="F22.*split_key='donor_id'"):
        scbin.tl.finetune(ready, trained[1], target="cell_type", **FIT)


@pytest.mark.parametrize(
    ("code", "x", "arguments"),
    [
        ("F12", np.linspace(0, 1, 60), {"target": "x"}),
        (
            "F12.*60 different numbers, from 0 to 59.59",
            pd.Categorical(np.arange(60) + np.arange(60) / 100),
            {"target": "x"},
        ),
        ("F12", [f"{x:.3f}" for x in np.arange(60) / 7], {"target": "x"}),
        ("F13", "one", {"target": "x"}),
        ("F13", "unknown", {"target": "x"}),
        ("F18", ["old"] * 60, {"target": "x", "kind": "number"}),
        ("F17", 3.0, {"target": "x", "kind": "number"}),
        ("I35", None, {"target": "celltype"}),
        ("I35", None, {"target": "nothing", "level": "gene"}),
        ("F10", None, {"target": []}),
        ("F10", None, {"target": {"cell_type": -1}}),
        ("F10", None, {"target": "cell_type", "kind": {"age": "number"}}),
        ("F04", None, {"target": "cell_type", "freeze": 9}),
        ("F07", None, {"target": "cell_type", "head": "mlp"}),
        ("F02", None, {"target": "cell_type", "head": "deep"}),
        ("F25", None, {"target": "cell_type", "validation_share": 1.0}),
        ("F25", None, {"target": "cell_type", "rebalance": 2.0}),
        ("F26", None, {"target": "cell_type", "class_weights": {"NK": 2.0}}),
        ("F26", None, {"target": "cell_type", "class_weights": "even"}),
        ("A02", None, {"target": "cell_type", "level": "donor"}),
        ("A02", None, {"target": "cell_type", "kind": "text"}),
        ("F10", None, {"target": "cell_type", "kind": None}),
        ("F26", None, {"target": "cell_type", "class_weights": {"B cell": "a"}}),
        ("F29", None, {"target": "tf", "level": "gene", "head": "mlp"}),
        ("F40", None, {"target": "tf", "level": "gene", "sampling": "balanced"}),
        ("F33", None, {"target": "cell/type"}),
        ("F34", None, {"target": "cell_type", "lora": "yes"}),
    ],
)
def test_what_cannot_be_learned_is_refused_and_nothing_written(ready, trained, untouched, code, x, arguments):
    if x is not None:
        ready.obs["x"] = x
    then = untouched(ready)
    with pytest.raises((ScbinInputError, ScbinTypeError), match=code):
        scbin.tl.finetune(ready, trained[1], **{"split_key": "donor_id", **FIT, **arguments})
    then.check()


def test_none_is_a_class_and_what_is_no_label_is_named(ready, trained):
    ready.obs["treatment"] = np.array(["none", "IFN"])[np.arange(60) % 2]
    model = scbin.tl.finetune(ready, trained[1], target="treatment", split_key="donor_id", **FIT)
    assert model.head.targets[0].classes == ("IFN", "none")
    ready.obs["treatment"] = np.array(["NA", "IFN"])[np.arange(60) % 2]
    with pytest.raises(ScbinInputError, match=r"F13.*No label are: 'NA' \(\d\d\)"):
        scbin.tl.finetune(ready, trained[1], target="treatment", split_key="donor_id", **FIT)


def test_words_among_numbers_are_shown_as_they_are(ready, trained):
    ready.obs["x"] = np.where(np.arange(60) < 3, "old", "3")
    with pytest.raises(ScbinInputError, match=r"F18.*none: 'old'\."):
        scbin.tl.finetune(ready, trained[1], target="x", kind="number", **FIT)


def test_weights_are_those_of_labels_whatever_their_type(ready, trained):
    ready.obs["y"] = np.arange(60) % 2
    how = {**FIT, "target": "y", "split_key": "donor_id"}
    weights = ({0: 1.0, 1: 9.0}, {"0": 1.0, "1": 9.0}, {np.int64(0): 1, 1.0: np.float32(9)}, None)
    models = [scbin.tl.finetune(ready, trained[1], class_weights=each, **how).fingerprint for each in weights]
    assert models[0] == models[1] == models[2] != models[3]
    with pytest.raises(ScbinInputError, match=r"F26.*names 7"):
        scbin.tl.finetune(ready, trained[1], class_weights={7: 1.0}, **how)


def test_numbers_of_numpy_are_numbers(ready):
    plain = {
        "seed": 3,
        "epochs": 1,
        "max_steps": 1,
        "freeze": 1,
        "dropout": 0.5,
        "gene_drop": 0.5,
        "cells_per_step": 16,
    }
    numpys = {name: np.asarray(value)[()] for name, value in plain.items()}
    how = {**HOW, "target": "cell_type", "split_key": "donor_id", "label_smoothing": np.float32(0.25)}
    models = [scbin.tl.finetune(ready, "tiny", **each, **how) for each in (plain, numpys)]
    assert models[0].fingerprint == models[1].fingerprint
    assert models[0].training["finetune"] == models[1].training["finetune"]


def test_the_history_is_that_of_the_last_model(ready, trained):
    how = {**HOW, "target": "cell_type", "split_key": "donor_id"}
    scbin.tl.finetune(ready, trained[1], epochs=1, **how)
    assert "finetune_history" in ready.uns["scbin"]
    scbin.tl.finetune(ready, trained[1], max_steps=0, **how)
    assert "finetune_history" not in ready.uns["scbin"] and "vocabulary" in ready.uns["scbin"]


def test_rare_classes_are_named_and_can_be_left_out(ready, trained):
    labels = ready.obs["cell_type"].astype(str)
    labels.iloc[5] = "NK"
    ready.obs["cell_type"] = labels.to_numpy()
    how = {**FIT, "target": "cell_type", "split_key": "donor_id"}
    with pytest.warns(ScbinInputWarning, match=r"F14.*'NK' \(1\)"):
        model = scbin.tl.finetune(ready, trained[1], **how)
    assert "NK" in model.head.targets[0].classes
    model = scbin.tl.finetune(ready, trained[1], **how, fewest=2)
    assert "NK" not in model.head.targets[0].classes


def test_checkpoints_and_the_finished_model(ready, trained, tmp_path):
    how = {**HOW, "target": "cell_type", "split_key": "donor_id", "epochs": 1, "save_dir": tmp_path}
    model = scbin.tl.finetune(ready, trained[1], **how)
    assert scbin.Model.load(tmp_path / "model").fingerprint == model.fingerprint
    with pytest.raises(ScbinInputError, match="T34"):
        scbin.tl.finetune(ready, trained[1], **how)
    assert scbin.tl.finetune(ready, trained[1], **how, resume=True).fingerprint == model.fingerprint


# ---- predicting -----------------------------------------------------------------------------------------------------


def test_predictions_are_written_and_survive_files(tuned, untouched, tmp_path):
    adata, model = tuned[0].copy(), tuned[1]
    then = untouched(adata)
    scbin.tl.predict(adata, model, **HOW)
    names = {"scbin_cell_type", "scbin_cell_type_probability", "scbin_cell_type_entropy", "scbin_age"}
    then.check(obs=names, obsm={"scbin_cell_type_probability"}, uns={"predict"})
    p = adata.obsm["scbin_cell_type_probability"]
    assert p.dtype == np.float32 and p.shape == (60, 3) and np.isnan(p[7]).all()
    np.testing.assert_allclose(np.delete(p, 7, 0).sum(1), 1, atol=1e-5)
    given = adata.obs["scbin_cell_type"]
    assert given.isna().sum() == 1 and list(given.cat.categories) == ["B cell", "T cell", "monocyte"]
    assert (given == adata.obs["cell_type"]).sum() > 50
    assert np.corrcoef(np.delete(adata.obs["scbin_age"], 7), np.delete(adata.obs["age"], 7))[0, 1] > 0.7
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_series_equal(back.obs["scbin_cell_type"], given)
    record = json.loads(back.uns["scbin"]["predict"])["cell_type"]
    assert record["model"] == model.fingerprint and record["classes"] == ["B cell", "T cell", "monocyte"]


def test_a_saved_model_predicts_the_same_and_cells_alone_too(tuned, tmp_path):
    adata, model = tuned[0].copy(), tuned[1]
    model.save(tmp_path / "m")
    scbin.tl.predict(adata, model, **HOW)
    part = adata[20:23].copy()
    scbin.tl.predict(part, tmp_path / "m", token_budget=10, **HOW)
    np.testing.assert_allclose(
        part.obsm["scbin_cell_type_probability"], adata.obsm["scbin_cell_type_probability"][20:23], atol=1e-5
    )


def test_labels_are_transferred_to_data_with_other_genes(tuned):
    model = tuned[1]
    new = tuned[0][:, ::-1].copy()[:30, 5:].copy()
    del new.obsm["X_tokens"], new.uns["scbin"], new.obs["scbin_status"], new.obs["scbin_split"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScbinInputWarning)  # of genes that are not there, and of the empty cell
        scbin.pp.tokenize(new, like=model)
    scbin.tl.predict(new, model, **HOW)
    assert (new.obs["scbin_cell_type"] == new.obs["cell_type"]).mean() > 0.8


def test_phenotypes_are_read_at_their_hidden_slots(trained):
    adata, model = trained[0].copy(), trained[1]
    scbin.tl.predict(adata, model, **HOW)
    assert set(adata.obs["scbin_sex"].cat.categories) == {"female", "male"}
    vocabulary = model.vocabulary
    tokens = adata.obsm["X_tokens"].toarray()[0].astype(np.int64)
    places = np.flatnonzero(tokens)
    ids = tokens[places]
    for phenotype in vocabulary.phenotypes:
        ids[places == phenotype.position] = vocabulary.mask_id
    import copy

    plain = copy.deepcopy(model.bert)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        logits = plain(torch.tensor(ids)[None], position_ids=torch.tensor(places)[None]).logits[0]
    sex = vocabulary.phenotype("sex")
    own = logits[places == sex.position, sex.first_id : sex.stop_id].double().softmax(1)[0]
    np.testing.assert_allclose(adata.obsm["scbin_sex_probability"][0], own, atol=1e-5)


def test_what_is_shown_matters_only_where_it_is_shown(trained):
    adata, model = trained[0].copy(), trained[1]
    other = adata.copy()
    slot = model.vocabulary.phenotype("cell_type")
    tokens = other.obsm["X_tokens"]
    tokens.data[tokens.indices == slot.position] = slot.first_id

    def both(**how):
        results = []
        for each in (adata, other):
            written = scbin.tl.predict(
                each, model, target=how.pop("target", ["sex", "cell_type"]), copy=True, **how, **HOW
            )
            results.append(np.delete(written.obsm["scbin_sex_probability"], 7, 0))
        return results

    np.testing.assert_array_equal(*both())
    np.testing.assert_array_equal(*both(phenotypes="show"))
    assert not np.array_equal(*both(phenotypes="show", jointly=False))


def test_a_threshold_abstains(tuned):
    adata, model = tuned[0].copy(), tuned[1]
    scbin.tl.predict(adata, model, target="cell_type", threshold=1.0, **HOW)
    p = adata.obs["scbin_cell_type_probability"]
    assert (adata.obs["scbin_cell_type"].isna() == ~(p >= 1.0)).all() and p.isna().sum() == 1


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("F31", {"target": "tissue"}),
        ("F31", {"target": []}),
        ("F30", {"threshold": 2}),
        ("F32", {"key_added": "mine"}),
        ("I54", {"target": "age", "key_added": "sex"}),
        ("A02", {"phenotypes": "tell"}),
    ],
)
def test_what_cannot_be_predicted_is_refused_and_nothing_written(tuned, untouched, code, arguments):
    adata, model = tuned[0].copy(), tuned[1]
    then = untouched(adata)
    with pytest.raises((ScbinInputError, ScbinTypeError), match=code):
        scbin.tl.predict(adata, model, **arguments, **HOW)
    then.check()


def test_a_model_that_knows_nothing_says_how_to_teach_it(toy):
    scbin.pp.tokenize(toy)
    model = scbin.tl.pretrain(toy, preset="tiny", hidden_size=16, max_steps=1, **HOW)
    with pytest.raises(ScbinInputError, match="F31.*finetune"):
        scbin.tl.predict(toy, model, **HOW)


# ---- splitting ------------------------------------------------------------------------------------------------------


def test_a_split_by_donor_is_recognised_by_its_donors(ready):
    donor = ready.obs["donor_id"].astype(str).to_numpy()
    scbin.tl.split(ready, split_key="donor_id", test_share=0.3, validation_share=0.2)
    sides = given_sides(ready, None)
    assert (donors_kept_apart(ready, sides) == donor).all()
    one_side = Sides(np.ones(60, dtype=bool), np.zeros(60, dtype=bool), np.zeros(60, dtype=bool))
    assert donors_kept_apart(ready, one_side) is None
    with pytest.warns(ScbinInputWarning, match="F22"):
        scbin.tl.split(ready)
    assert donors_kept_apart(ready, given_sides(ready, None)) is None
    ready.obs["donor_id"] = "d0"
    assert donors_kept_apart(ready, sides) is None


def test_donors_stand_on_one_side(ready):
    tests = []
    for fold in range(3):
        scbin.tl.split(ready, target="cell_type", split_key="donor_id", n_folds=3, fold=fold)
        sides = ready.obs["scbin_split"]
        assert ((pd.crosstab(ready.obs["donor_id"], sides) > 0).sum(axis=1) == 1).all()
        tests.append((sides == "test").to_numpy())
    assert (np.sum(tests, axis=0) == 1).all()


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("F20", {"test_share": 0.0}),
        ("F20", {"test_share": 0.6, "validation_share": 0.5}),
        ("F20", {"n_folds": 3, "fold": 3}),
        ("F21", {"split_key": "donor_id", "n_folds": 7}),
        ("F23", {"target": "single"}),
        ("I35", {"split_key": "donor"}),
    ],
)
def test_splits_that_cannot_be_are_refused(ready, untouched, code, arguments):
    ready.obs["single"] = ["one", *["more"] * 59]
    then = untouched(ready)
    with pytest.raises(ScbinInputError, match=code):
        scbin.tl.split(ready, **arguments)
    then.check()


def test_classes_of_held_out_cells_alone_are_learned_with_balanced_weights(ready, trained):
    del ready.obs["donor_id"]
    ready.obs["side"] = np.where(ready.obs["cell_type"] == "monocyte", "validation", "train")
    ready.obs.loc[ready.obs_names[:6], "side"] = "validation"
    model = scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="side", class_weights="balanced", **FIT)
    scbin.tl.predict(ready, model, **HOW)
    known = ready.obs["scbin_status"] == "ok"
    given = ready.obs["scbin_cell_type"][known]
    assert given.notna().all() and (given[ready.obs["cell_type"][known] == "monocyte"] == "monocyte").mean() > 0.8
