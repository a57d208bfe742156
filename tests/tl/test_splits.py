"""Who learns and who is asked: splits, the columns that tell of them, and donors through all that is divided further."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

import scbin
from scbin._errors import ScbinInputError, ScbinInputWarning
from scbin.tl import _finetune, _search_trials
from scbin.tl._folds import plan_folds
from scbin.tl._sides import donors_kept_apart, given_sides, named_sides

HOW = {"device": "cpu", "progress": False, "max_steps": 0}


@pytest.fixture
def ready(cells, trained):
    """Cells of twelve mice, tokenized for the model."""
    scbin.pp.tokenize(cells, like=trained[1])
    cells.obs["mouse"] = pd.Categorical([f"m{i}" for i in np.arange(60) // 5])
    return cells


@pytest.fixture
def lessons(monkeypatch):
    """What fine-tuning learned from, call by call."""
    found, real = [], _finetune.finetune_tokens

    def seen(bert, plan, lesson, *rest, **how):
        found.append(lesson)
        return real(bert, plan, lesson, *rest, **how)

    monkeypatch.setattr(_finetune, "finetune_tokens", seen)
    return found


def one_side_each(groups, sides):
    table = pd.crosstab(np.asarray(groups), np.asarray(sides.astype(str)))
    return ((table.drop(columns="nan", errors="ignore") > 0).sum(axis=1) <= 1).all()


# ---- donors beside a split ------------------------------------------------------------------------------------------


def test_test_cells_stay_out_where_donors_are_named_again(ready, trained, lessons):
    scbin.tl.split(ready, split_key="mouse", test_share=0.3, validation_share=0.2)
    before = ready.obs["scbin_split"].copy()
    spoiled = ready.copy()
    labels = spoiled.obs["cell_type"].astype(str)
    labels[before == "test"] = "T cell"
    spoiled.obs["cell_type"] = labels
    models = [
        scbin.tl.finetune(adata, trained[1], target="cell_type", split_key="mouse", **HOW) for adata in (ready, spoiled)
    ]
    assert models[0].fingerprint == models[1].fingerprint
    pd.testing.assert_series_equal(ready.obs["scbin_split"], before)
    test = np.flatnonzero(before == "test")
    assert not np.isin(test, np.concatenate([lessons[0].training, lessons[0].held_out])).any()
    assert (lessons[0].groups == ready.obs["mouse"].astype(str)).all()


def test_validation_goes_by_the_donors_named_where_the_split_does_not(ready, trained):
    scbin.tl.split(ready, seed=2)
    test = (ready.obs["scbin_split"] == "test").to_numpy()
    with pytest.warns(ScbinInputWarning, match="F22.*'mouse'"):
        scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="mouse", validation_share=0.3, **HOW)
    sides = ready.obs["scbin_split"]
    assert ((sides == "test") == test).all() and (sides == "validation").any()
    assert one_side_each(ready.obs["mouse"][~test], sides[~test])


def test_a_search_leaves_test_cells_out_where_donors_are_named(ready):
    scbin.tl.split(ready, split_key="mouse", test_share=0.3, validation_share=0.2)
    sides = _search_trials.sides_of_search(ready, "cell_type", "class", "mouse", 0.2, 0)
    own = ready.obs["scbin_split"].astype(str).to_numpy()
    assert set(own[sides.test]) == {"validation"} and set(own[sides.training | sides.held_out]) == {"train"}


# ---- other words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("Train", "Val", "Test"), id="capitals"),
        pytest.param(("training", "valid", "testing"), id="endings"),
        pytest.param(("train", "dev", "held out"), id="dev"),
        pytest.param((" TRAIN", "Validation ", "hold-out"), id="spaces"),
    ],
)
def test_usual_words_for_sides_are_understood(ready, trained, words):
    own = np.array(["train", "validation", "test"])
    ready.obs["mine"] = np.array(words)[np.arange(60) % 5 // 2]
    scbin.tl.finetune(ready, trained[1], target="sex", split_key="mine", **HOW)
    there = ready.obs["scbin_split"].notna().to_numpy()
    assert there.sum() >= 59
    assert (ready.obs["scbin_split"].astype(str)[there] == own[np.arange(60) % 5 // 2][there]).all()
    folds = plan_folds(ready, np.arange(60), None, "mine")
    assert folds.test.tolist() == np.flatnonzero(np.arange(60) % 5 // 2 == 2).tolist() and not folds.cut


def test_a_half_understood_split_is_refused(ready, trained, untouched):
    ready.obs["mine"] = np.array(["train", "eval"])[np.arange(60) % 2]
    then = untouched(ready)
    with pytest.raises(ScbinInputError, match=r"F27.*'eval'"):
        scbin.tl.finetune(ready, trained[1], target="sex", split_key="mine", **HOW)
    with pytest.raises(ScbinInputError, match="F27"):
        plan_folds(ready, np.arange(60), None, "mine")
    then.check()


def test_a_column_that_marks_one_side_is_refused():
    with pytest.raises(ScbinInputError, match="F27.*'is_train'.*'True'"):
        named_sides(pd.Series([True, False]), "is_train")
    assert named_sides(pd.Series([True, False]), "treated") is None


def test_donors_are_no_sides():
    for names in (["a", "b"], ["test", "pilot"], [np.nan, np.nan], [1, 2]):
        assert named_sides(pd.Series(names), "x") is None
    assert named_sides(pd.Series(["test", None, "unknown"]), "x").tolist() == ["test", "", ""]


# ---- donors are remembered ------------------------------------------------------------------------------------------


def test_the_column_that_a_split_went_by_is_remembered(ready, trained, lessons, tmp_path):
    scbin.tl.split(ready, split_key="mouse", test_share=0.3, validation_share=0, seed=np.int64(1))
    record = json.loads(ready.uns["scbin"]["split"])
    assert record["split_key"] == "mouse" and record["seed"] == 1
    ready.write_h5ad(tmp_path / "a.h5ad")
    scbin.tl.finetune(ready, trained[1], target="cell_type", validation_share=0.3, **HOW)
    assert (lessons[0].groups == ready.obs["mouse"].astype(str)).all()
    assert len(lessons[0].held_out) and one_side_each(ready.obs["mouse"], ready.obs["scbin_split"])


def test_it_is_forgotten_where_it_no_longer_holds(ready):
    scbin.tl.split(ready, split_key="mouse")
    assert donors_kept_apart(ready, given_sides(ready, None)) is not None
    moved = ready.copy()
    moved.obs["mouse"] = np.roll(moved.obs["mouse"].astype(str), 3)
    assert donors_kept_apart(moved, given_sides(moved, None)) is None
    gone = ready.copy()
    del gone.obs["mouse"]
    assert donors_kept_apart(gone, given_sides(gone, None)) is None
    with pytest.warns(ScbinInputWarning, match="F22.*'mouse'"):
        scbin.tl.split(ready)
    assert json.loads(ready.uns["scbin"]["split"])["split_key"] is None


@pytest.mark.parametrize("known", [True, False], ids=["split", "split_key"])
def test_trials_and_what_is_made_of_the_best_keep_the_donors(ready, trained, lessons, known):
    pytest.importorskip("optuna")
    if known:
        scbin.tl.split(ready, split_key="mouse")
    found = scbin.tl.search(
        ready, trained[1], target="cell_type", split_key=None if known else "mouse", n_trials=1, validation_share=0.3,
        space={"rebalance": [0.5]}, **HOW,
    )  # fmt: skip
    model_cells = np.concatenate([lessons[0].training, lessons[0].held_out])
    mice = ready.obs["mouse"].astype(str).to_numpy()
    assert (lessons[0].groups == mice).all() and not set(mice[lessons[0].training]) & set(mice[lessons[0].held_out])
    scbin.tl.finetune(ready, trained[1], **found.best)
    assert (lessons[1].groups == mice).all() and set(model_cells) < set(range(60))


# ---- sides stay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation_share", [0.2, 0.0])
def test_a_target_that_few_cells_have_leaves_the_split_to_the_next(ready, trained, lessons, validation_share):
    scbin.tl.split(ready, split_key="mouse", validation_share=validation_share)
    before = ready.obs["scbin_split"].copy()
    ready.obs["few"] = ready.obs["sex"].astype(object).where(np.arange(60) % 4 < 2)
    scbin.tl.finetune(ready, trained[1], target="few", **HOW)
    after = ready.obs["scbin_split"]
    assert after.notna().all() and ((after == "test") == (before == "test")).all()
    assert one_side_each(ready.obs["mouse"], after)
    scbin.tl.finetune(ready, trained[1], target="sex", **HOW)
    # all but test cells, and the one without tokens
    assert len(lessons[1].training) + len(lessons[1].held_out) >= (before != "test").sum() - 1
    assert len(lessons[1].training) > len(lessons[0].training)


# ---- splits that cannot be ------------------------------------------------------------------------------------------


def test_two_donors_do_without_validation(ready):
    ready.obs["half"] = np.where(np.arange(60) < 30, "a", "b")
    with pytest.raises(ScbinInputError, match=r"F21.*validation_share=0"):
        scbin.tl.split(ready, split_key="half")
    scbin.tl.split(ready, split_key="half", validation_share=0)
    assert ready.obs["scbin_split"].value_counts().to_dict() == {"train": 30, "test": 30, "validation": 0}


def test_no_donor_left_to_validate_on(ready):
    ready.obs["uneven"] = np.array(["a", "b", *["c"] * 58])
    with pytest.raises(ScbinInputError, match="F21.*'c'"):
        scbin.tl.split(ready, split_key="uneven")


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        pytest.param("F20", {"n_folds": 2, "validation_share": 0.6}, id="folds_and_validation"),
        pytest.param("F28", {"split_key": "sides"}, id="a_split_for_donors"),
    ],
)
def test_splits_that_cannot_be_are_refused(ready, untouched, code, arguments):
    ready.obs["sides"] = np.where(np.arange(60) < 30, "train", "test")
    then = untouched(ready)
    with pytest.raises(ScbinInputError, match=code):
        scbin.tl.split(ready, **arguments)
    then.check()
