"""`tl.search`: trials on the same cells, kept in a file, the best ready for `tl.finetune`."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import scbin
from scbin._errors import ScbinInputError, ScbinTrainingError
from scbin.tl._search import _arguments, _search_cells
from scbin.train.labels import Finetuning
from scbin.train.settings import Training

search_module = sys.modules["scbin.tl._search"]
HOW = {"target": "cell_type", "progress": False, "device": "cpu"}
SPACE = {"learning_rate": (1e-4, 1e-1, "log"), "validation": (0.1, 0.3), "freeze": [0, 1, "all"]}


@pytest.fixture
def tried(monkeypatch):
    """A fine-tuning that takes no time: the closer the learning rate to .01, the better."""
    calls = []

    def finetune(adata, model, *, training, finetuning, **how):
        calls.append((training.learning_rate, finetuning.validation, how))
        if training.learning_rate < 2e-4:
            raise ScbinTrainingError("T01", "it went wrong")
        return SimpleNamespace(rate=training.learning_rate)

    finetune.__signature__ = inspect.signature(search_module.finetune)
    monkeypatch.setattr(search_module, "finetune", finetune)
    monkeypatch.setattr(search_module, "_score", lambda cells, model, *rest: -abs(np.log10(model.rate) + 2))
    return calls


def found(trained, adata=None, **how):
    adata = trained[0].copy() if adata is None else adata
    return scbin.tl.search(adata, trained[1], **{**HOW, "space": SPACE, "n_trials": 12, **how})


def test_the_best_is_ready_for_finetune_and_its_table_is_written(trained, tried, untouched):
    adata = trained[0].copy()
    then = untouched(adata)
    trials, best = found(trained, adata, split_key=None)
    then.check(uns={"search"})
    assert len(trials) == 12 and trials["macro_f1"].is_monotonic_decreasing == trials["macro_f1"].notna().all()
    assert best["training"].learning_rate == trials["learning_rate"].iloc[0] and best["target"] == "cell_type"
    assert isinstance(best["finetuning"], Finetuning) and best["device"] == "cpu"
    assert set(trials["state"]) == {"complete", "fail"}


def test_an_interrupted_search_tries_the_same(trained, tried, tmp_path):
    whole = found(trained, n_trials=8).trials
    first = found(trained, n_trials=4, storage=tmp_path / "s.db").trials
    again = found(trained, n_trials=8, storage=tmp_path / "s.db").trials
    assert len(first) == 4
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), whole.drop(columns="seconds"))
    other = found(trained, n_trials=2, storage=tmp_path / "s.db", seed=1).trials  # another search in the same file
    assert len(other) == 2 and not np.isin(other["learning_rate"], whole["learning_rate"]).any()


def test_where_settings_go():
    found = _arguments({"learning_rate": 1e-3, "gene_dropout": 0.1, "freeze": 1, "max_steps": 3})
    assert found == {
        "training": Training(learning_rate=1e-3), "finetuning": Finetuning(gene_dropout=0.1), "freeze": 1, "max_steps": 3
    }  # fmt: skip
    assert _arguments({}) == {}


def test_cells_are_scored_that_no_trial_learns_from(trained):
    adata = trained[0].copy()
    adata.obs["donor_id"] = [f"d{i}" for i in np.arange(60) // 6]
    scbin.tl.split(adata, split_key="donor_id", test=0.2, validation=0.0)
    cells = _search_cells(adata, ("cell_type", "class"), None, None, 0.2, 0)
    parts = cells.obs["scbin_search_split"]
    test = adata.obs["scbin_split"] == "test"
    assert parts[test].isna().all() and set(parts.dropna()) == {"train", "test"}
    assert ((pd.crosstab(adata.obs["donor_id"], parts) > 0).sum(axis=1) <= 1).all()
    assert "X_tokens" in cells.obsm


def test_a_real_trial(trained):
    adata = trained[0].copy()
    space = lambda trial: {"label_smoothing": trial.suggest_float("label_smoothing", 0.0, 0.2)}
    trials, best = scbin.tl.search(adata, trained[1], n_trials=2, space=space, max_steps=1, **HOW)
    assert trials["macro_f1"].between(0.5, 1).all()
    assert scbin.tl.finetune(adata, trained[1], progress=False, **best).network.labels is not None


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("A06", {"space": {"learning_speed": (0, 1)}}),
        ("A06", {"learning_speed": 1}),
        ("A02", {"space": {"learning_rate": (1, 0)}}),
        ("A02", {"space": {"learning_rate": []}}),
        ("A02", {"n_trials": 0}),
        ("A02", {"validation": 0.7}),
        ("A02", {"metric": "accuracy"}),
        ("A03", {"metric": "r2"}),
        ("A06", {"target": "nothing"}),
    ],
)
def test_errors(trained, code, arguments):
    with pytest.raises(ScbinInputError, match=code):
        found(trained, **arguments)
