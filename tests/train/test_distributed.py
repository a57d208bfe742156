"""Two processes under torchrun, on gloo, against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scbin.train.distributed import World, _buckets

SCRIPT = Path(__file__).with_name("campaigns.py")


def launch(n_processes, out, n_steps, save_dir="-", cells_per_step=32):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    command = [
        *(torchrun if n_processes > 1 else [sys.executable]),
        SCRIPT,
        "distributed",
        out,
        n_steps,
        cells_per_step,
        save_dir,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return np.load(out)


def test_two_processes_learn_what_one_learns(tmp_path):
    """95 cells in steps of 32 leave a ragged last step; over 50 steps losses agree to 1e-6 and weights to 1e-5."""
    one, two = (launch(n, tmp_path / f"{n}.npz", 50) for n in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6, abs=1e-6, nan_ok=True)
    assert np.abs(two["weights"] - one["weights"]).max() < 1e-5


@pytest.mark.slow
def test_a_run_moves_between_one_and_two_processes(tmp_path):
    whole = launch(1, tmp_path / "whole.npz", 12)
    for n_processes, n_steps in ((1, 4), (2, 8), (1, 12)):
        moved = launch(n_processes, tmp_path / "moved.npz", n_steps, tmp_path / "run")
    assert np.abs(moved["weights"] - whole["weights"]).max() < 1e-5


@pytest.mark.slow
def test_a_process_without_cells(tmp_path):
    """Steps of one cell leave the second process with nothing, and nobody waits."""
    one, two = (launch(n, tmp_path / f"{n}.npz", 6, cells_per_step=1) for n in (1, 2))
    assert np.abs(two["weights"] - one["weights"]).max() < 1e-5


def test_shares_cover_every_cell_once():
    cells = np.arange(11)
    parts = [World(rank, 3).share(cells) for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), cells)
    parameters = [torch.nn.Parameter(torch.zeros(3 * 2**20)) for _ in range(7)]
    buckets = list(_buckets(parameters))
    assert [p for bucket in buckets for p in bucket] == parameters and len(buckets) > 1
