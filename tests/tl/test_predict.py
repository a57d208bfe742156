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
