from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from scbin._errors import ScbinInputError
from scbin.nn.bert import bert_config
from scbin.train.history import Board, History, peak_flops, step_flops


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
