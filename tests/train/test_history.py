from __future__ import annotations

import importlib.util
import json
import sys
import types
import warnings

import pytest
import torch

from scbin._errors import ScbinInputError
from scbin.nn.bert import bert_config
from scbin.train.history import Board, History, peak_flops, step_flops
from scbin.train.loop import train


def test_a_history_survives_json():
    history = History()
    history.add({"step": 0, "epoch": 0, "loss": 1.5, "skipped": 0})
    history.add({"step": 1, "epoch": 0, "loss": float("nan"), "skipped": 1, "validation_genes": 0.25})
    back = History.from_dict(json.loads(json.dumps(history.to_dict(), allow_nan=False))).frame()
    assert back.drop(columns="loss").equals(history.frame().drop(columns="loss"))
    assert back["loss"].isna().tolist() == [False, True]
    assert back["step"].dtype == "int64"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_boards_that_are_not_installed_are_named(small, name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ScbinInputError, match=f"T32.*{name}"):
        Board(small.settings(**{name: "runs"}), 3, 0, is_first=True)
    Board(small.settings(**{name: "runs"}), 3, 0, is_first=False).close()


def rows(n):
    return [{"step": k, "loss": 1.0 / (k + 1), "loss_genes": 2.0, "gradient_norm": float("nan")} for k in range(n)]


def test_tensorboard_gets_every_finite_number(small, tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        board = Board(small.settings(tensorboard=tmp_path / "runs"), 3, 0, is_first=True)
        for row in rows(3):
            board.show(row)
        board.close()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        written = EventAccumulator(str(tmp_path / "runs"))
        written.Reload()
    assert written.Tags()["scalars"] == ["loss", "loss_genes"]
    assert [(e.step, e.value) for e in written.Scalars("loss")] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]


class Wandb(types.ModuleType):
    """Stands in for the package: remembers what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.projects, self.logged, self.finished = [], [], 0

    def init(self, project):
        self.projects.append(project)
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1


def test_wandb_gets_every_finite_number(small, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    board = Board(small.settings(wandb="cells"), 2, 0, is_first=True)
    for row in rows(2):
        board.show(row)
    board.close()
    assert wandb.projects == ["cells"] and wandb.finished == 1
    assert wandb.logged == [(0, {"loss": 1.0, "loss_genes": 2.0}), (1, {"loss": 0.5, "loss_genes": 2.0})]


def test_a_run_reports_its_steps_and_only_the_first_process_does(small, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    history = train(small.bert(), small.objective(), small.tokens, small.settings(wandb="cells", max_steps=2))
    assert [step for step, _ in wandb.logged] == [0, 1] and wandb.finished == 1
    assert [numbers["loss"] for _, numbers in wandb.logged] == history["loss"].tolist()
    Board(small.settings(wandb="cells", tensorboard="runs"), 2, 0, is_first=False).close()
    assert wandb.projects == ["cells"]


def test_the_bar_shows_loss_and_rates(small, capsys):
    board = Board(small.settings(progress=True), 3, 0, is_first=True)
    board.show({"step": 0, "loss": 0.5, "cells_per_second": 1200.0, "tokens_per_second": 34_000.0})
    board.close()
    shown = capsys.readouterr().err
    assert "1/3" in shown and "loss=0.5" in shown and "34,000" in shown


def test_operations_are_those_of_the_formula(small):
    c = bert_config(small.vocabulary, "geneformer-v1-6l")
    per_token = 6 * (8 * 256**2 + 4 * 256 * 512) + 6 * 4 * 1000 * 256 + 2 * 256 * 100
    assert step_flops(c, 1000.0**2, 1000.0, 100.0 * 1000) == pytest.approx(3 * 1000 * per_token)
    assert peak_flops(torch.device("cpu")) is None
