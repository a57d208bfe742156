"""Two processes under torchrun, on gloo, against one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from scbin.nn.files import verify_directory
from scbin.train.distributed import World, _buckets
from scbin.train.signals import EXIT_RESUMABLE

SCRIPT = Path(__file__).with_name("campaigns.py")


def launch(n_processes, out, n_steps=None, save_dir="-", cells_per_step=32, stop_after=0):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    parts = (SCRIPT, "distributed", out, n_steps, cells_per_step, save_dir, stop_after)
    parts = (SCRIPT, "pretrained", out) if n_steps is None else parts
    command = [*(torchrun if n_processes > 1 else [sys.executable]), *parts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if stop_after:
        assert done.returncode != 0 and not out.exists()
        return None
    assert done.returncode == 0, done.stderr
    return np.load(out)


def test_two_processes_learn_what_one_learns(tmp_path):
    """95 cells in steps of 32 leave a ragged last step; over 50 steps losses agree to 1e-6 and weights to 1e-5."""
    one, two = (launch(n, tmp_path / f"{n}.npz", 50) for n in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6, abs=1e-6, nan_ok=True)
    assert np.abs(two["weights"] - one["weights"]).max() < 1e-5


def test_two_processes_pretrain_what_one_does(tmp_path):
    """The gene table is made once, the targets of denoising in shares; the losses agree to 1e-6, the weights to 1e-5.

    Fine-tuning comes after it in the same processes, which can meet only once.
    """
    one, two = (launch(n, tmp_path / f"{n}.npz") for n in (1, 2))
    np.testing.assert_array_equal(two["gene_weights"], one["gene_weights"])
    assert np.abs(two["places"] - one["places"]).max() < 1e-3 * one["places"].std()
    assert np.abs(two["answers"] - one["answers"]).max() < 1e-3
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6, abs=1e-6, nan_ok=True)
    assert np.abs(two["weights"] - one["weights"]).max() < 1e-5


@pytest.mark.slow
def test_a_run_moves_between_one_and_two_processes(tmp_path):
    whole = launch(1, tmp_path / "whole.npz", 12)
    for n_processes, stop_after in ((1, 4), (2, 8), (1, 0)):
        moved = launch(n_processes, tmp_path / "moved.npz", 12, tmp_path / "run", stop_after=stop_after)
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


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_saves(tmp_path):
    """Two processes without a launcher; the second alone is told to stop, both leave with the status of a requeue."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, SCRIPT, "distributed", tmp_path / "out.npz", "100000", "32", tmp_path / "run"]
    ranks = []
    for rank in ("0", "1"):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen(command, env={**os.environ, **world, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
        )
    for _ in range(600):
        if list((tmp_path / "run").glob("step-*")):
            break
        time.sleep(0.1)
    ranks[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [EXIT_RESUMABLE, EXIT_RESUMABLE], errors
    newest = max((tmp_path / "run").glob("step-*"))
    assert verify_directory(newest) is None
