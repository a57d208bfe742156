"""`tl.split`, and how splits and donors are read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import scbin
from scbin._errors import ScbinInputError, ScbinInputWarning
from scbin.tl._split import folds_of, hold_out, named_parts, read_split


@pytest.fixture
def ready(cells):
    cells.obs["donor_id"] = pd.Categorical([f"d{i}" for i in np.arange(60) // 10])
    return cells


def parts(adata):
    return adata.obs["scbin_split"].astype(str).to_numpy()


def test_fractions_and_classes(ready, untouched):
    del ready.obs["donor_id"]
    then = untouched(ready)
    scbin.tl.split(ready, target="cell_type", test=0.25, validation=0.2)
    then.check(obs={"scbin_split"}, uns={"split"})
    table = pd.crosstab(ready.obs["cell_type"], ready.obs["scbin_split"])
    assert (table["test"] == 5).all() and (table["validation"] == 4).all()
    first = parts(ready)
    scbin.tl.split(ready, target="cell_type", test=0.25, validation=0.2)
    assert (parts(ready) == first).all()
    scbin.tl.split(ready, target="cell_type", test=0.25, validation=0.2, seed=1)
    assert (parts(ready) != first).any()
    assert scbin.tl.split(ready, copy=True) is not ready


@pytest.mark.parametrize("donors", [None, np.repeat(np.arange(10), 9)])
def test_held_out_cells_have_the_classes_in_similar_fractions(donors):
    classes = np.tile([0, 0, 0, 0, 0, 1, 1, 1, 2], 10)
    for seed in range(3):
        held = hold_out(classes, 0.2, donors=donors, seed=seed)
        counts = np.bincount(classes[held], minlength=3)
        assert abs(held.mean() - 0.2) < 0.05 and (np.abs(counts / counts.sum() - [5 / 9, 3 / 9, 1 / 9]) < 0.1).all()
        if donors is not None:
            assert not set(donors[held]) & set(donors[~held])
        folds = folds_of(classes, 5, donors=donors, seed=seed)
        assert set(folds) == set(range(5))
        if donors is not None:
            assert all(len(set(folds[donors == donor])) == 1 for donor in range(10))


def test_donors_are_held_out_whose_classes_others_have_too():
    donors, classes = np.repeat(["a", "b", "c"], 10), np.array([0] * 10 + [0, 1] * 5 + [0] * 10)
    for seed in range(6):
        assert not hold_out(classes, 0.3, donors=donors, seed=seed)[donors == "b"].any()


def test_donors_are_held_out_that_have_the_classes_of_most_cells():
    donors, classes = np.repeat(["a", "b", "c"], 10), np.array([0] * 10 + [0, 1] * 10)
    for seed in range(6):
        assert not hold_out(classes, 0.3, donors=donors, seed=seed)[donors == "a"].any()


def test_small_and_odd_cases():
    assert not hold_out(np.array([0, 1, 2]), 0.5).any()  # classes of one cell are never held out
    assert not hold_out(np.zeros(1), 0.5).any() and not hold_out(np.zeros(10), 0.0).any()
    assert hold_out(np.zeros(1000), 0.5, most=10).sum() == 10
    assert not hold_out(np.zeros(6), 0.5, donors=np.array(["a"] * 6)).any()
    held = hold_out(np.array([0] * 50 + [1]), 0.3)
    assert not held[50] and held.sum() == 15
    assert (folds_of(np.zeros(4), 5, donors=np.array(["a"] * 4)) == 0).all()
    assert len(set(folds_of(np.arange(6), 3))) == 3  # classes of one cell each


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("A02", {"test": 0.0}),
        ("A02", {"test": 0.6, "validation": 0.5}),
        ("A06", {"split_key": "donor"}),
        ("L03.*validation=0", {"split_key": "two"}),
    ],
)
def test_splits_that_cannot_be_are_refused(ready, untouched, code, arguments):
    ready.obs["two"] = np.where(np.arange(60) < 30, "a", "b")
    then = untouched(ready)
    with pytest.raises(ScbinInputError, match=code):
        scbin.tl.split(ready, **arguments)
    then.check()
    scbin.tl.split(ready, split_key="two", test=0.5, validation=0.0)
    assert set(parts(ready)) == {"train", "test"}


# ---- reading --------------------------------------------------------------------------------------------------------


def test_what_names_the_parts():
    words = pd.Series(["train", "test", np.nan, "validation"])
    assert named_parts(words).tolist()[:2] == ["train", "test"] and named_parts(words.astype("category")) is not None
    assert named_parts(pd.Series(["d1", "d2"])) is None and named_parts(pd.Series(["train", "other"])) is None


def test_a_split_by_donor_is_recognised_by_its_donors(ready):
    donor = ready.obs["donor_id"].astype(str).to_numpy()
    scbin.tl.split(ready, split_key="donor_id", test=0.3, validation=0.2)
    split = read_split(ready)
    assert (split.donors == donor).all() and (split.column() == ready.obs["scbin_split"]).all()
    with pytest.warns(ScbinInputWarning, match="L03"):
        scbin.tl.split(ready)
    assert read_split(ready).donors is None
    ready.obs["donor_id"] = "d0"
    assert read_split(ready).donors is None


def test_the_column_that_a_split_went_by_is_remembered(ready):
    ready.obs["plate"] = ready.obs.pop("donor_id")
    scbin.tl.split(ready, split_key="plate", test=0.3)
    assert (read_split(ready).donors == ready.obs["plate"].astype(str)).all()


def test_donors_divide_the_cells_that_are_not_for_testing(ready):
    with pytest.warns(ScbinInputWarning, match="L03"):
        scbin.tl.split(ready, test=0.3, validation=0.2)
    before, split = read_split(ready), read_split(ready, "donor_id")
    assert (split.test == before.test).all() and not split.validation.any() and len(set(split.donors)) == 6
    assert (split.train == before.open).all()


def test_without_a_split_all_cells_are_for_training(ready):
    ready.obs["scbin_split"] = np.where(
        np.arange(60) < 30, "train", "validation"
    )  # what fine-tuning drew, no test cells
    assert read_split(ready).train.all() and read_split(ready).donors is None
    split = read_split(ready, "scbin_split")
    assert split.train.sum() == split.validation.sum() == 30
