"""Training from files: as from memory but for the order, the same for any number of processes, and from any point on."""

from __future__ import annotations

import json
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

import scbin
from scbin.io import corpus
from scbin.train.loop import EXIT_RESUMABLE

QUIET = {"preset": "tiny", "device": "cpu", "progress": False}


@pytest.fixture
def files(toy, tmp_path, monkeypatch):
    """The toy cells, tokenized, in three files, with blocks of 4 rows and few of them in memory."""
    monkeypatch.setattr(corpus, "ROWS", 4)
    monkeypatch.setattr(corpus, "WINDOW", 5)
    for k in range(3):
        corpus.write_cells(tmp_path / f"cells_{k}.h5ad", toy[20 * k : 20 * k + 20].copy())
    scbin.pp.tokenize(str(tmp_path / "cells_{0..2}.h5ad"), out=tmp_path / "corpus", phenotypes=["cell_type"])
    return tmp_path / "corpus"


def weights(model):
    return {name: tensor.numpy() for name, tensor in model.network.state_dict().items()}


def training(**changes):
    return scbin.Training(
        **{"cells_per_step": 8, "epochs": 3, "patience": None, "held_out": 0.1, "validate_every": 5, **changes}
    )


def test_files_teach_what_memory_teaches(files):
    """In steps of all cells the order plays no part."""
    tokens = scbin.open_tokens(files)
    memory = scbin.tokens.tokens.MemoryTokens(tokens.take(np.arange(60)), tokens.vocabulary)
    how = training(cells_per_step=64, epochs=4)
    one, two = (scbin.tl.pretrain(source, training=how, **QUIET) for source in (tokens, memory))
    assert two.history["loss"].to_numpy() == pytest.approx(one.history["loss"].to_numpy(), rel=1e-5, nan_ok=True)
    assert one.training["cells"] == two.training["cells"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("points", [(1, 6, 8), (7, 14)], ids=str)
def test_killed_and_resumed_gives_the_same_bits(files, tmp_path, points):
    whole = scbin.tl.pretrain(files, training=training(), **QUIET)

    for point in points:

        def kill(row, point=point):
            if row["step"] == point and "loss" in row:
                raise Killed

        with pytest.raises(Killed):
            scbin.tl.pretrain(
                files, training=training(checkpoint_every=1, callbacks=(kill,)), save_dir=tmp_path / "run", **QUIET
            )
    found = scbin.tl.pretrain(files, training=training(checkpoint_every=1), save_dir=tmp_path / "run", **QUIET)
    for name, array in weights(whole).items():
        np.testing.assert_array_equal(weights(found)[name], array, err_msg=name)


@pytest.mark.parametrize("n_kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_and_resumed_gives_the_same_bits(tmp_path, n_kills):
    script = Path(__file__).with_name("campaigns.py")
    command = [sys.executable, script, "kill", str(n_kills), tmp_path, "files"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] >= n_kills and result["same_bits"] == result["runs"] > 0, result


def launch(files, out, *options, node=None, wait=True):
    """Start the command `scbin pretrain`: alone, or as one node of two under an agent of torchrun that has a port for the others."""
    agent = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --local-addr 127.0.0.1 --rdzv-endpoint".split()
    command = [sys.executable, *([*agent, node] if node else []), "-m", "scbin", "pretrain", files, "--out", out]
    small = "--preset tiny --device cpu --progress false --training.patience null --training.cells_per_step 8".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*map(str, command), *small, *options], env=environment, stderr=subprocess.PIPE, text=True
    )
    if wait:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
    return process


def test_two_nodes_learn_what_one_process_learns(files, tmp_path):
    """Two agents of torchrun, as on two machines, meet on an address of this one; each has one process."""
    options = ("--training.epochs", "3")
    launch(files, tmp_path / "model1", *options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    nodes = [launch(files, tmp_path / "model2", *options, node=place, wait=False) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], errors
    one, two = (scbin.Model.load(tmp_path / f"model{n}") for n in (1, 2))
    for name, array in weights(one).items():
        if "density" not in name:
            np.testing.assert_allclose(weights(two)[name], array, atol=1e-5, err_msg=name)
    assert torch.isfinite(two.network.density.vectors).all()


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(files, tmp_path):
    options = ("--training.epochs", "40", "--training.checkpoint_every", "5", "--save_dir", str(tmp_path / "run"))
    process = launch(files, tmp_path / "model", *options, wait=False)
    while not list((tmp_path / "run").glob("step-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == EXIT_RESUMABLE and not (tmp_path / "model").exists()
    launch(files, tmp_path / "model", *options)
    launch(files, tmp_path / "whole", *options[:2])
    one, two = (weights(scbin.Model.load(tmp_path / name)) for name in ("model", "whole"))
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array, err_msg=name)
