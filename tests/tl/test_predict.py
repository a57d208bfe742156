"""What predictions are called, how they are read again, and what they are compared with."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

import scbin
from scbin._errors import ScbinInputError, ScbinInputWarning
from scbin.get._predicted import read_predicted
from scbin.get._recorded import predicted_targets

HOW = {"device": "cpu", "progress": False}
BARE = {**HOW, "baselines": "none"}


@pytest.fixture(scope="module")
def tuned(trained):
    """The toy cells and a model that was fine-tuned on them for their type and an age."""
    adata = trained[0].copy()
    adata.obs["age"] = np.where(adata.obs["cell_type"] == "B cell", 60.0, 30.0)
    model = scbin.tl.finetune(
        adata, trained[1], target=["cell_type", "age"], kind={"age": "number"}, max_steps=0, **HOW
    )
    return adata, model


# ---- ages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ages(toy, quick):
    years = np.array([15, 34, 52])[np.arange(60) % 3] + np.arange(60) % 4
    toy.obs["age"] = [f"{year}-year-old human stage" for year in years]
    scbin.pp.tokenize(toy, phenotypes=["age"], age_groups=20)
    return toy, scbin.tl.pretrain(toy, **quick), years


def test_true_ages_are_cut_as_the_vocabulary_cut_them(ages):
    adata, model, years = ages
    with pytest.warns(ScbinInputWarning, match="E16"):
        table = scbin.tl.evaluate(adata, model, target="age", **HOW)
    classes = np.select([years < 20, years < 40], ["<20", "20-40"], "40-60")
    assert table.loc["scbin", "accuracy"] == np.mean(adata.obs["scbin_age"].astype(str) == classes)
    assert table.loc["logistic regression", "accuracy"] > 0.9  # of three classes, not of one a year
    found = read_predicted(adata, "age")  # with the record alone
    assert set(found.classes) == {"<20", "20-40", "40-60"}
    assert [found.classes[k] for k in found.truth] == list(classes)
    adata.obs["group"], adata.obs["age"] = classes, "adult stage"
    by_group = read_predicted(adata, "age", truth_key="group")  # names of the classes are the classes
    np.testing.assert_array_equal(by_group.truth, found.truth)
    with pytest.raises(ScbinInputError, match="E14"):
        scbin.tl.evaluate(adata, target="age", **BARE)


# ---- names of slots --------------------------------------------------------------------------------------------------


def test_predictions_under_another_name_are_found_again(tuned):
    adata, model = tuned[0].copy(), tuned[1]
    scbin.tl.predict(adata, model, target="cell_type", key_added="mine", **HOW)
    plain = tuned[0].copy()
    scbin.tl.predict(plain, model, target="cell_type", **HOW)
    assert predicted_targets(adata) == ["mine"]
    for arguments in ({}, {"target": "mine"}, {"target": "mine", "truth_key": "cell_type"}):
        with pytest.warns(ScbinInputWarning, match="E16"):
            table = scbin.tl.evaluate(adata, **arguments, **BARE)
        with pytest.warns(ScbinInputWarning, match="E16"):
            expected = scbin.tl.evaluate(plain, target="cell_type", **BARE)
        pd.testing.assert_frame_equal(table, expected)
    np.testing.assert_array_equal(
        read_predicted(adata, "mine").probability, read_predicted(plain, "cell_type").probability
    )
    scbin.pl.confusion(adata, "mine")
    with pytest.raises(ScbinInputError, match=r"E11.*'cell_type' was not predicted here.*so far: 'mine'"):
        scbin.pl.confusion(adata, "cell_type")


def test_predictions_that_are_gone_are_made_again(tuned):
    adata, model = tuned[0].copy(), tuned[1]
    scbin.tl.predict(adata, model, target="cell_type", **HOW)
    del adata.obs["scbin_cell_type"]
    assert predicted_targets(adata) == []
    with pytest.raises(ScbinInputError, match=r"E11.*so far: none"):
        scbin.pl.confusion(adata, "cell_type")
    with pytest.raises(ScbinInputError, match=r"E22.*'cell_type', 'age'"):
        scbin.tl.evaluate(adata, **BARE)
    with pytest.warns(ScbinInputWarning, match="E16"):
        assert scbin.tl.evaluate(adata, target="cell_type", **BARE).loc["scbin", "n_cells"] == 60


def test_predictions_of_genes_are_not_taken_for_those_of_cells(trained):
    adata = trained[0].copy()
    adata.var["tf"] = np.where(np.arange(40) < 20, "yes", "no")
    model = scbin.tl.finetune(adata, trained[1], target="tf", level="gene", max_steps=1, **HOW)
    scbin.tl.predict(adata, model, **HOW)
    assert predicted_targets(adata) == []
    for arguments in ({}, {"target": "tf"}):
        with pytest.raises(ScbinInputError, match=r"E22.*adata\.var"):
            scbin.tl.evaluate(adata, **arguments, **BARE)
    with pytest.raises(ScbinInputError, match=r"E11.*for genes: see adata\.var\['scbin_tf'\]"):
        scbin.pl.confusion(adata, "tf")


def test_types_of_columns_do_not_matter(tuned):
    adata, model = tuned[0].copy(), tuned[1]
    scbin.tl.predict(adata, model, **HOW)
    other = adata.copy()
    other.obs = other.obs.astype(object)
    unrecorded = other.copy()
    del unrecorded.uns["scbin"]["predict"]
    for name in ("cell_type", "age"):
        expected = read_predicted(adata, name)
        for each in (other, unrecorded):
            found = read_predicted(each, name)
            assert found.kind == expected.kind
            np.testing.assert_allclose(found.truth, expected.truth)
            np.testing.assert_allclose(found.predicted, expected.predicted)
    scbin.pl.confusion(other, "cell_type")
    with pytest.warns(ScbinInputWarning, match="E16"):
        assert "accuracy" in scbin.tl.evaluate(other, target="cell_type", **BARE)


def test_the_record_says_what_stands_where(tuned):
    adata, model = tuned[0].copy(), tuned[1]
    scbin.tl.predict(adata, model, target="age", key_added="years", **HOW)
    record = json.loads(adata.uns["scbin"]["predict"])["years"]
    assert record["column"] == "years" and record["asked"] == "age" and record["kind"] == "number"
    assert scbin.get.gap_df(adata, "years")["truth"].tolist() == adata.obs["age"].tolist()


def test_numbers_take_away_what_stood_beside_classes(tuned, trained):
    adata, model = tuned[0].copy(), tuned[1]
    adata.obs["age_probability"] = 1.0  # the user's own
    for key in (None, "mine"):
        other = adata.copy()
        scbin.tl.predict(other, model, target="cell_type", key_added=key, **HOW)
        name = "scbin_cell_type" if key is None else key
        assert f"{name}_probability" in other.obsm and f"{name}_entropy" in other.obs
        other.obs["cell_type"] = other.obs["age"]
        number = scbin.tl.finetune(other, trained[1], target="cell_type", kind="number", max_steps=0, **HOW)
        scbin.tl.predict(other, number, key_added=key, **HOW)
        assert other.obs[name].dtype.kind == "f" and f"{name}_probability" not in other.obsm
        assert set(other.obs) - set(adata.obs) == {name}
        other.obs["mine_entropy"] = 0.0  # now it is the user's
        if key:
            with pytest.raises(ScbinInputError, match="I54"):
                scbin.tl.predict(other, number, key_added=key, **HOW)


# ---- temperatures of phenotypes --------------------------------------------------------------------------------------


def temperature(adata, name="cell_type"):
    return json.loads(adata.uns["scbin"]["predict"])[name]["temperature"]


def test_phenotypes_are_calibrated_on_validation_cells_alone(trained):
    adata, model = trained[0].copy(), trained[1]
    scbin.tl.predict(adata, model, target="cell_type", **HOW)
    assert temperature(adata) == 1
    side = np.array(["train", "validation", "test"])[np.arange(60) // 3 % 3]
    adata.obs["scbin_split"] = pd.Categorical(side)
    raw = adata.obsm["scbin_cell_type_probability"].astype(np.float64)
    given = adata.obs["scbin_cell_type"]
    names = list(given.cat.categories)
    rng = np.random.default_rng(0)  # right in two cells of three: less sure than cells of three types of their own
    labels = np.where(rng.random(60) < 0.66, given.astype(object).fillna(names[0]), names[1])
    adata.obs["cell_type"] = labels
    spoiled = adata.copy()
    spoiled.obs.loc[side == "test", "cell_type"] = names[2]
    own = adata.copy()
    own.obs["fold"] = own.obs.pop("scbin_split")
    for each, how in ((adata, {}), (spoiled, {}), (own, {"split_key": "fold"})):
        scbin.tl.predict(each, model, target="cell_type", **how, **HOW)
    # the same by trying a grid
    rows = np.flatnonzero((side == "validation") & np.isfinite(raw).all(axis=1))
    truth = np.array([names.index(label) for label in labels])[rows]

    def loss(t):
        p = raw[rows] ** (1 / t)
        return -np.log(p[np.arange(len(rows)), truth] / p.sum(axis=1)).mean()

    grid = np.exp(np.linspace(-3, 3, 3001))
    best = grid[np.argmin([loss(t) for t in grid])]
    assert best != 1 and temperature(adata) == pytest.approx(best, rel=0.01)
    assert temperature(spoiled) == temperature(own) == temperature(adata)
    p = raw ** (1 / best)
    np.testing.assert_allclose(
        adata.obsm["scbin_cell_type_probability"], p / p.sum(axis=1, keepdims=True), rtol=1e-2, atol=1e-4
    )
    pd.testing.assert_series_equal(adata.obs["scbin_cell_type"], given)


def test_scored_cells_never_calibrate(trained):
    adata, model = trained[0].copy(), trained[1]
    adata.obs["scbin_split"] = np.where(np.arange(60) % 2, "train", "validation")  # no test cells: all are scored
    with pytest.warns(ScbinInputWarning, match="E16"):
        scbin.tl.evaluate(adata, model, target="cell_type", **BARE)
    assert temperature(adata) == 1
    scbin.tl.predict(adata, model, target="cell_type", **HOW)
    assert temperature(adata) != 1
    adata.obs["fold"] = np.array(["test", "train", "validation"])[np.arange(60) % 3]
    adata.obs["truth"] = adata.obs.pop("cell_type")
    with pytest.warns(ScbinInputWarning, match="E17"):
        scbin.tl.evaluate(adata, model, target="cell_type", truth_key="truth", split_key="fold", **BARE)
    assert temperature(adata) != 1


def test_few_or_no_labels_leave_the_temperature_alone(trained):
    adata, model = trained[0].copy(), trained[1]
    adata.obs["scbin_split"] = np.where(np.arange(60) < 9, "validation", "train")
    scbin.tl.predict(adata, model, target="cell_type", **HOW)
    assert temperature(adata) == 1
    adata.obs["scbin_split"] = "validation"
    for labels in (np.random.default_rng(0).random(60), "another type"):
        adata.obs["cell_type"] = labels
        scbin.tl.predict(adata, model, target="cell_type", **HOW)
        assert temperature(adata) == 1
