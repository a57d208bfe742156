"""The record of a run, and who is shown it."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import warnings

import pytest

from scbin._errors import ScbinInputError
from scbin.train.history import History, ProgressBar, TensorBoard, Wandb


def test_a_history_survives_json():
    history = History()
    history.add({"step": 0, "epoch": 0, "validation": 2.0})
    history.add({"step": 1, "epoch": 0, "loss": 0.1 + 0.2, "skipped": 0})
    history.add({"step": 2, "epoch": 0, "loss": float("nan"), "skipped": 1})
    history.add({"step": 2, "epoch": 0, "validation": float("inf")})  # belongs to the step before
    back = History(json.loads(json.dumps(history.to_dict())))
    assert back.frame().equals(history.frame()) and len(back.frame()) == 3
    assert back.values("validation") == [(0, 2.0), (2, float("inf"))]
    assert back.frame()["step"].dtype == "int64" and back.frame()["skipped"].tolist() == [0, 0, 1]
    assert list(back.frame())[:3] == ["step", "epoch", "loss"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_boards_that_are_not_installed_are_named(small, name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ScbinInputError, match=f"A05.*{name}"):
        small.run(**{name: "runs"})


def rows(n):
    return [{"step": k, "loss": 1.0 / (k + 1), "loss_genes": 2.0, "gradient_norm": float("nan")} for k in range(n)]


def test_tensorboard_gets_every_finite_number(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own imports
        board = TensorBoard(tmp_path / "runs")
        for row in rows(3):
            board(row)
        board.close()
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        written = EventAccumulator(str(tmp_path / "runs"))
        written.Reload()
    assert written.Tags()["scalars"] == ["loss", "loss_genes"]
    assert [(e.step, e.value) for e in written.Scalars("loss")] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]


class FakeWandb(types.ModuleType):
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


def test_a_run_reports_its_steps_to_all_who_asked(small, monkeypatch):
    wandb, told = FakeWandb(), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    how = {"wandb": "cells", "max_steps": 2, "held_out": 0.2}
    _, history = small.run(callbacks=[told.append], **how)
    assert [step for step, _ in wandb.logged] == [0, 1, 2, 2] and wandb.finished == 1
    assert [row["step"] for row in told] == [0, 1, 2, 2]
    losses = [row["loss"] for row in told if "loss" in row]
    assert losses == history["loss"].dropna().tolist()
    Wandb("cells")(rows(1)[0])
    assert wandb.logged[-1] == (0, {"loss": 1.0, "loss_genes": 2.0})  # what is not finite is left out


def test_the_bar_shows_loss_and_rates(capsys):
    bar = ProgressBar(3)
    bar({"step": 0, "validation": 1.0})
    bar({"step": 1, "loss": 0.5, "cells_per_second": 1200.0, "tokens_per_second": 34_000.0})
    bar({"step": 1, "validation": 1.0})
    bar.close()
    shown = capsys.readouterr().err
    assert "1/3" in shown and "loss=0.5" in shown and "34,000" in shown
