"""Checkpoints: damage of every kind is found, and what was killed goes on to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scbin._errors import ScbinInputError, ScbinModelError, ScbinTrainingError, ScbinTrainingWarning
from scbin.train.checkpoint import Checkpoints

FILES = ["state.safetensors", "state.json", "history.json", "manifest.json"]
DAMAGES = ["missing", "empty", "halved", "zeroed tail", "one bit", "older file"]


def weights(network):
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    network, history = small.run(save_dir=directory, checkpoint_every=2)
    return directory, network, history


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_by_name_and_the_checkpoint_before_is_used(small, finished, tmp_path, name, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    older, newest = sorted((tmp_path / "run").glob("step-*"))
    path = newest / name
    good = path.read_bytes()
    tail = min(4096, len(good) // 2)
    bit = bytearray(good)
    bit[len(good) // 2] ^= 4
    bad = {
        "empty": b"",
        "halved": good[: len(good) // 2],
        "zeroed tail": good[:-tail] + bytes(tail),
        "one bit": bytes(bit),
        "older file": (older / name).read_bytes(),
    }
    path.unlink()
    if damage != "missing":
        path.write_bytes(bad[damage])
    # an older manifest does not fit the files it stands beside: one of them is named
    with pytest.warns(ScbinTrainingWarning, match=r"T03.*damaged.*tried instead") as warned:
        network, history = small.run(save_dir=tmp_path / "run", checkpoint_every=2)
    assert name in str(warned[0].message) or (name == "manifest.json" and damage == "older file")
    assert older.name[-2:] in str(warned[0].message)
    assert torch.equal(weights(network), weights(finished[1])) and len(history) == len(finished[2])
    assert (tmp_path / "run" / f".bad-{newest.name}").is_dir()


def test_a_checkpoint_of_another_network(small, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(ScbinModelError, match=r"T03.*hidden_size was 16, is 32"):
        small.run(small.network(hidden_size=32), task=small.task(32), save_dir=tmp_path / "run")


def test_the_directory_of_a_model_takes_no_checkpoints(small, tmp_path):
    (tmp_path / "scbin.json").write_text("{}")
    with pytest.raises(ScbinInputError, match=r"A03.*is a saved model"):
        small.run(save_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scbin.json"]
    with pytest.raises(ScbinModelError, match=r"M05.*cannot be used"):
        small.run(save_dir=tmp_path / "scbin.json")


def test_one_run_per_directory(small, tmp_path):
    with Checkpoints(tmp_path), pytest.raises(ScbinTrainingError, match=f"T03.*{tmp_path}"):
        small.run(save_dir=tmp_path)
    kept = tmp_path / ".tmp-new-model-1"  # part of a model, which `Model.load` may need
    for path in (tmp_path / ".tmp-step-00000009-1", kept):
        path.mkdir()
    small.run(save_dir=tmp_path, epochs=1)
    assert list(tmp_path.glob(".tmp-*")) == [kept]


@pytest.mark.parametrize(("call", "last"), [("fsync", 8), ("replace", 5)])
def test_a_full_disk_stops_the_run_and_keeps_the_last_good_state(small, finished, tmp_path, monkeypatch, call, last):
    """The n-th call fails, for many n: the error has a code, and the run goes on to the same bits."""
    real = getattr(os, call)
    for n in (0, 2, last):
        directory, left = tmp_path / str(n), [n]

        def full(*arguments, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        monkeypatch.setattr(os, call, full)
        with pytest.raises(ScbinModelError, match="M05.*No space left"):
            small.run(save_dir=directory, checkpoint_every=2)
        monkeypatch.setattr(os, call, real)
        network, _ = small.run(save_dir=directory, checkpoint_every=2)
        assert torch.equal(weights(network), weights(finished[1]))


def test_the_same_run_writes_the_same_files_three_integers_and_tensors_and_no_pickle(small, finished, tmp_path):
    small.run(save_dir=tmp_path, checkpoint_every=2)
    for one in sorted(finished[0].glob("step-*")):
        for name in ("state.safetensors", "state.json"):
            assert (one / name).read_bytes() == (tmp_path / one.name / name).read_bytes()
    assert sorted(path.name for path in one.iterdir()) == sorted(FILES)
    state = json.loads((one / "state.json").read_text())
    assert (state["run"]["seed"], state["epoch"], state["step"]) == (0, 3, 12)


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    with pytest.raises(ScbinModelError, match="NaN"):
        Checkpoints(tmp_path).save({"step": 1}, {"weights.a": torch.tensor([1.0, float("nan")])}, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_kills", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_sigkill_at_any_instant_ends_in_the_same_bits(tmp_path, n_kills):
    script = Path(__file__).with_name("campaigns.py")
    done = subprocess.run([sys.executable, script, "kill", str(n_kills), tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] >= n_kills and result["runs"] > 1
    assert result["same_bits"] == result["runs"], result
    assert result["inside_a_save"] > n_kills / 20, result
