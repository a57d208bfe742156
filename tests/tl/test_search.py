"""A search over settings of fine-tuning: what it tries, keeps and gives back. Trials do not train, so that they take no time."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

import scbin
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTrainingError
from scbin.tl import _search_trials
from scbin.tl._search_space import CELLS, MULTITASK, check_space, default_space
from scbin.train.watching import show, watched

optuna = pytest.importorskip("optuna")
SPACE = {"rebalance": (0.0, 1.0), "gene_drop": [0.1, 0.3]}


@pytest.fixture
def tried(monkeypatch):
    """Trials that train nothing: the score follows the settings; returns the arguments that fine-tuning was called with."""
    calls = []

    def finetune(adata, model, **arguments):
        calls.append(arguments)
        for loss in (1.0, arguments.get("rebalance", 0.0)):
            show({"loss": 0.0, "validation_cell_type": loss})
        if arguments.get("fewest") == 99:
            raise ScbinTrainingError("T62", "loss or gradient was not finite")
        return arguments

    monkeypatch.setattr(_search_trials, "finetune", finetune)
    monkeypatch.setattr(_search_trials, "score", lambda cells, tuned, *rest: 1 - tuned["rebalance"])
    return calls


def run(adata, **arguments):
    return scbin.tl.search(
        adata, **{"target": "cell_type", "space": SPACE, "n_trials": 4, "prune": False, "progress": False, **arguments}
    )


def test_best_is_ready_for_finetune(trained, tried):
    adata = trained[0].copy()
    found = run(adata, model=trained[1], fewest=2)
    assert len(found.trials) == len(tried) == 4
    assert found.trials["macro_f1"].is_monotonic_decreasing
    first = found.trials.iloc[0]
    assert found.best == {
        "rebalance": first["rebalance"],
        "gene_drop": first["gene_drop"],
        "fewest": 2,
        "target": "cell_type",
    }
    assert all(0 <= call["rebalance"] <= 1 and call["gene_drop"] in (0.1, 0.3) for call in tried)
    assert all(call["split_key"] == "scbin_search_split" for call in tried)


def test_interrupted_search_tries_the_same(trained, tried, tmp_path):
    adata, model = trained[0].copy(), trained[1]
    whole = run(adata, model=model, n_trials=5)
    run(adata, model=model, n_trials=2, storage=tmp_path / "a.db")
    n_before = len(tried)
    resumed = run(adata, model=model, n_trials=5, storage=tmp_path / "a.db")
    assert len(tried) == n_before + 3
    pd.testing.assert_frame_equal(whole.trials.drop(columns="seconds"), resumed.trials.drop(columns="seconds"))
    with pytest.raises(ScbinInputError, match="E34"):
        run(adata, model=model, storage=tmp_path / "a.db", seed=1)


def test_lagging_trials_are_given_up(trained, tried):
    found = run(trained[0].copy(), model=trained[1], n_trials=12, prune=True)
    states = found.trials["state"].value_counts()
    assert states["pruned"] >= 1 and states["complete"] >= 4
    assert found.trials["state"].iloc[0] == "complete"


def test_trials_that_fail_are_kept_with_their_reason(trained, tried):
    with pytest.raises(ScbinTrainingError, match=r"E35"):
        run(trained[0].copy(), model=trained[1], n_trials=2, fewest=99)


def test_only_its_table_is_written(trained, tried, untouched, tmp_path):
    adata = trained[0].copy()
    watch = untouched(adata)
    run(adata, model=trained[1])
    watch.check(uns=["search"])
    adata.write_h5ad(tmp_path / "a.h5ad")


def test_sides(toy):
    toy.obs["donor"] = pd.Categorical(np.arange(60) // 6)
    toy.obs.loc["cell0", "cell_type"] = np.nan
    sides = _search_trials.sides_of_search(toy, "cell_type", "class", "donor", 0.2, 0).column()
    assert sides.isna().sum() == 1
    table = pd.crosstab(toy.obs["donor"], np.asarray(sides, dtype=object))
    assert ((table > 0).sum(axis=1) == 1).all() and (table.sum() > 0).all()
    toy.obs["scbin_split"] = pd.Categorical(np.array(["train", "validation", "test"])[np.arange(60) % 3])
    with pytest.warns(ScbinInputWarning, match="F22"):
        sides = _search_trials.sides_of_search(toy, "cell_type", "class", None, 0.2, 0).column()
    sides = np.asarray(sides, dtype=object)
    own = toy.obs["scbin_split"].astype(str).to_numpy()
    assert set(own[sides == "test"]) == {"validation"}  # scored on the data's validation cells
    assert all(side is None or side != side for side in sides[own == "test"])  # test cells stand nowhere


def test_a_real_trial(trained):
    adata = trained[0].copy()
    found = scbin.tl.search(
        adata, trained[1], target=["cell_type", "sex"], n_trials=1, space={"rebalance": [0.0]}, max_steps=0,
        device="cpu", progress=False, validation_share=0.3,
    )  # fmt: skip
    assert list(found.trials["state"]) == ["complete"]
    assert 0 < found.trials["loss"][0] < 10
    assert found.best["target"] == ["cell_type", "sex"]


def test_default_spaces_are_geneformers():
    assert default_space(1, 6) == (CELLS, {"epochs": 1})
    space, fixed = default_space(3, 6)
    assert space == {**MULTITASK, "freeze": (1, 5)} and fixed == {"schedule": "cosine"}
    assert default_space(2, 1)[0]["freeze"] == (0, 0)


@pytest.mark.parametrize(
    ("space", "code"),
    [
        pytest.param({"rate": (0, 1)}, "E31", id="unknown"),
        pytest.param({"epochs": [1]}, "E37", id="fixed_too"),
        pytest.param({"dropout": (1.0, 0.0)}, "E38", id="reversed"),
        pytest.param({"dropout": []}, "E38", id="empty"),
        pytest.param({"dropout": (0, 1, "log")}, "E38", id="log_of_zero"),
        pytest.param({"dropout": 0.5}, "E38", id="no_choice"),
    ],
)
def test_spaces_that_cannot_be_meant(space, code):
    with pytest.raises(ScbinInputError, match=code):
        check_space(space, ["dropout", "epochs"], {"epochs": 2})


def test_columns_of_any_name(trained):
    adata = trained[0].copy()
    adata.obs[0] = 1
    adata.obs["scbin_mine"] = adata.obs["cell_type"]
    found = run(adata, model=trained[1], target="scbin_mine", n_trials=1, max_steps=0, device="cpu")
    assert list(found.trials["state"]) == ["complete"]


def test_numbers_of_numpy_are_numbers(trained, tried, tmp_path):
    space = {
        "cells_per_step": list(np.array([16, 32])),
        "rebalance": (np.float64(0), np.float32(1)),
        "epochs": np.arange(1, 3),
    }
    plain = {"cells_per_step": [16, 32], "rebalance": (0.0, 1.0), "epochs": [1, 2]}
    how = {"model": trained[1], "n_trials": np.int64(2), "seed": np.int32(2), "storage": tmp_path / "a.db"}
    found = run(trained[0].copy(), space=space, **how)
    assert type(found.best["cells_per_step"]) is int
    again = run(trained[0].copy(), space=plain, **{**how, "seed": 2})
    pd.testing.assert_frame_equal(found.trials, again.trials)


def test_errors(trained, monkeypatch):
    adata, model = trained[0].copy(), trained[1]
    adata.obs["age"] = np.arange(60.0)
    with pytest.raises(ScbinInputError, match=r"E39.*'macro_f1' or 'loss'"):
        run(adata, model=model, metric="r2")
    with pytest.raises(ScbinInputError, match=r"E39.*'r2' or 'loss'"):
        run(adata, model=model, target="age", kind="number", metric="macro_f1")
    with pytest.raises(ScbinInputError, match="F33"):
        run(adata, model=model, target="a/b")
    with pytest.raises(ScbinInputError, match="F10"):
        run(adata, model=model, kind=None)
    with pytest.raises(ScbinInputError, match="E31"):
        run(adata, model=model, learning_speed=3)
    with pytest.raises(ScbinInputError, match="E32"):
        run(adata, model=model, n_trials=0)
    with pytest.raises(ScbinInputError, match="E40"):
        run(adata, model=model, validation_share=0.6)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ScbinInputError, match=r"E30.*pip install \"scbin\[search\]\""):
        run(adata, model=model)


def test_watching_ends_with_its_block():
    rows = []
    with watched(rows.append):
        show({"loss": 1.0})
    show({"loss": 2.0})
    assert rows == [{"loss": 1.0}]
