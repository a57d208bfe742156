"""The record of a run, and who is shown it."""

from __future__ import annotations

import json

from scbin.train.history import ProgressBar, history_frame


def test_a_history_survives_json():
    rows = [
        {"step": 0, "epoch": 0, "validation": 2.0},
        {"step": 1, "epoch": 0, "loss": 0.1 + 0.2, "skipped": 0},
        {"step": 2, "epoch": 0, "loss": float("nan"), "skipped": 1, "validation": float("inf")},
    ]
    frame = history_frame(rows)
    assert history_frame(json.loads(json.dumps(rows))).equals(frame)
    assert frame["step"].dtype == "int64" and frame["skipped"].tolist() == [0, 0, 1]
    assert list(frame)[:3] == ["step", "epoch", "loss"] and list(history_frame([])) == ["step", "epoch", "loss"]


def test_a_run_reports_its_steps(small):
    told = []
    _, history = small.run(callbacks=[told.append], max_steps=2, held_out=0.2)
    assert [row["step"] for row in told] == [0, 1, 2, 2]
    assert [row["loss"] for row in told if "loss" in row] == history["loss"].dropna().tolist()


def test_the_bar_shows_loss_and_rates(capsys):
    bar = ProgressBar(3)
    bar({"step": 0, "validation": 1.0})
    bar({"step": 1, "loss": 0.5, "cells_per_second": 1200.0, "tokens_per_second": 34_000.0})
    bar({"step": 1, "validation": 1.0})
    bar.bar.close()
    shown = capsys.readouterr().err
    assert "1/3" in shown and "loss=0.5" in shown and "34,000" in shown
