"""`tl.search`: trials on the same cells, kept by Optuna, the best ready for `tl.finetune`."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import scbin
from scbin._errors import ScbinTrainingError
from scbin.tl._search import _arguments
from scbin.train.settings import Finetuning, Training

search_module = sys.modules["scbin.tl._search"]
HOW = {"target": "cell_type", "progress": False, "device": "cpu"}


@pytest.fixture
def tried(monkeypatch):
    """A fine-tuning that takes no time: the closer the learning rate to .01, the better."""

    def finetune(adata, model, *, training, **how):
        if training.learning_rate < 2e-4:
            raise ScbinTrainingError("T01", "it went wrong")
        report = {"kept": "probe", "held_out_loss": {"probe": abs(np.log10(training.learning_rate) + 2)}}
        return SimpleNamespace(training={"finetune": report})

    monkeypatch.setattr(search_module, "finetune", finetune)


def space(trial):
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)}


def test_the_best_is_ready_for_finetune_and_its_table_is_written(trained, tried, untouched):
    adata = trained[0].copy()
    then = untouched(adata)
    trials, best = scbin.tl.search(adata, trained[1], space=space, n_trials=12, **HOW)
    then.check(uns={"search"})
    losses = trials["loss"].dropna()
    assert len(trials) == 12 and losses.is_monotonic_increasing and len(losses) < 12
    assert best["training"].learning_rate == trials["learning_rate"].iloc[0]
    assert best["target"] == "cell_type" and best["device"] == "cpu"


def test_optuna_keeps_the_trials(trained, tried, tmp_path):
    how = {**HOW, "space": space, "n_trials": 4, "storage": f"sqlite:///{tmp_path}/s.db"}
    counts = [len(scbin.tl.search(trained[0].copy(), trained[1], **how).trials) for _ in range(2)]
    assert counts == [4, 8]
    trials = scbin.tl.search(trained[0].copy(), trained[1], **how).trials
    assert trials["learning_rate"].nunique() == len(trials) == 12  # no trial is made twice
    assert len(scbin.tl.search(trained[0].copy(), trained[1], **{**how, "target": "sex"}).trials) == 4  # another search


def test_where_settings_go():
    found = _arguments({"learning_rate": 1e-3, "gene_dropout": 0.1, "freeze": 1, "max_steps": 3})
    configs = {"training": Training(learning_rate=1e-3), "finetuning": Finetuning(gene_dropout=0.1)}
    assert found == {**configs, "freeze": 1, "max_steps": 3}
    assert _arguments({}) == {}


def test_a_real_trial(trained):
    adata = trained[0].copy()
    adata.obs["donor_id"] = [f"d{i}" for i in np.arange(60) // 10]
    trials, best = scbin.tl.search(adata, trained[1], n_trials=2, max_steps=1, split_key="donor_id", **HOW)
    assert trials["loss"].between(0, 1).all() and "scbin_split" not in adata.obs
    assert scbin.tl.finetune(adata, trained[1], progress=False, **best).network.labels is not None
