"""Two processes under torchrun, on gloo, against one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from scbin._errors import ScbinTrainingError
from scbin.io.files import verify_directory
from scbin.train.distributed import World
from scbin.train.loop import EXIT_RESUMABLE

SCRIPT = Path(__file__).with_name("campaigns.py")


def launch(n_processes, out, n_steps, save_dir="-", cells_per_step=32, stop_after=0):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    parts = (SCRIPT, "distributed", out, n_steps, cells_per_step, save_dir, stop_after)
    command = [*(torchrun if n_processes > 1 else [sys.executable]), *parts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    if stop_after:
        assert done.returncode != 0 and not out.exists()
        return None
    assert done.returncode == 0, done.stderr
    return np.load(out)


def test_two_processes_learn_what_one_learns(tmp_path):
    """Steps of 32 cells leave a ragged last step; over 50 steps losses agree to 1e-6 and weights to 1e-5."""
    one, two = (launch(n, tmp_path / f"{n}.npz", 50) for n in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-6, abs=1e-6, nan_ok=True)
    assert np.abs(two["weights"] - one["weights"]).max() < 1e-5


@pytest.mark.slow
def test_a_run_moves_between_one_and_two_processes(tmp_path):
    whole = launch(1, tmp_path / "whole.npz", 12, tmp_path / "whole")
    for n_processes, stop_after in ((1, 4), (2, 8), (1, 0)):
        moved = launch(n_processes, tmp_path / "moved.npz", 12, tmp_path / "run", stop_after=stop_after)
    assert np.abs(moved["weights"] - whole["weights"]).max() < 1e-5


@pytest.mark.slow
def test_a_process_without_cells(tmp_path):
    """Steps of one cell leave the second process with nothing, and nobody waits."""
    one, two = (launch(n, tmp_path / f"{n}.npz", 6, cells_per_step=1) for n in (1, 2))
    assert np.abs(two["weights"] - one["weights"]).max() < 1e-5


@contextmanager
def two_ranks(tmp_path, *more):
    """Two processes without a launcher, after their first checkpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, SCRIPT, "distributed", tmp_path / "out.npz", "100000", "32", tmp_path / "run", *more]
    ranks = []
    for rank in ("0", "1"):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **world, "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    try:
        for _ in range(600):
            if list((tmp_path / "run").glob("step-*")):
                break
            time.sleep(0.1)
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_saves(tmp_path):
    """The second process alone is told to stop; both leave with the status of a requeue."""
    with two_ranks(tmp_path) as ranks:
        ranks[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=60)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [EXIT_RESUMABLE, EXIT_RESUMABLE], errors
    assert verify_directory(max((tmp_path / "run").glob("step-*"))) is None


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up(tmp_path):
    """The first process ends by itself, after the minutes that the user set, and its checkpoint is sound."""
    with two_ranks(tmp_path, "0", "0.1") as ranks:
        ranks[1].send_signal(signal.SIGSTOP)
        assert b"Timed out" in ranks[0].communicate(timeout=60)[1] and ranks[0].returncode not in (0, EXIT_RESUMABLE)
    assert any(verify_directory(path) is None for path in (tmp_path / "run").glob("step-*"))


def test_alone_everything_stays_as_it_is():
    cells, alone = np.arange(11), World()
    assert np.array_equal(np.concatenate([World(rank, 3).share(cells) for rank in range(3)]), cells)
    assert alone.sum(cells) is cells and alone.gather(3) == [3]
    assert alone.device("cpu") == torch.device("cpu")


def test_processes_that_train_something_else_are_told(monkeypatch):
    World().check_same("this")
    monkeypatch.setattr(World, "gather", lambda world, value: [value, "that"])
    with pytest.raises(ScbinTrainingError, match="T04.*2 processes"):
        World(0, 2).check_same("this")
