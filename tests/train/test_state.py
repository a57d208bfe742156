from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scbin._errors import ScbinModelError, ScbinTrainingError, ScbinTrainingWarning
from scbin.nn.files import write_directory
from scbin.train.loop import train
from scbin.train.state import Checkpoints, Progress

FILES = ["state.safetensors", "state.json", "history.json", "manifest.json"]
DAMAGES = ["missing", "empty", "halved", "zeroed tail", "one bit", "older file"]


def run(small, directory, **changes):
    settings = small.settings(save_dir=directory, checkpoint_every=2, **changes)
    bert = small.bert()
    return bert, train(bert, small.objective(), small.tokens, settings)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    bert, history = run(small, directory)
    return directory, bert, history


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
    with pytest.warns(ScbinTrainingWarning, match=r"T54.*damaged.*tried instead") as warned:
        bert, history = run(small, tmp_path / "run", resume=True)
    assert name in str(warned[0].message) or (name == "manifest.json" and damage == "older file")
    assert older.name[-2:] in str(warned[0].message)
    assert torch.equal(
        torch.cat([p.reshape(-1) for p in bert.parameters()]),
        torch.cat([p.reshape(-1) for p in finished[1].parameters()]),
    )
    assert len(history) == len(finished[2])
    assert (tmp_path / "run" / f".bad-{newest.name}").is_dir()


def test_a_whole_directory_in_the_place_of_another_is_found(small, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    older, newest = sorted((tmp_path / "run").glob("step-*"))
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    with pytest.warns(ScbinTrainingWarning, match=r"T54.*state.json is of step"):
        run(small, tmp_path / "run", resume=True)


@pytest.mark.parametrize(("format", "age"), [(99, "newer"), (0, "older")])
def test_a_checkpoint_of_another_version_is_not_called_damaged(small, finished, tmp_path, format, age):
    shutil.copytree(finished[0], tmp_path / "run")
    newest = sorted((tmp_path / "run").glob("step-*"))[-1]
    files = {name: (newest / name).read_bytes() for name in FILES[:3]}
    files["state.json"] = json.dumps({**json.loads(files["state.json"]), "format": format}).encode()
    shutil.rmtree(newest)
    write_directory(newest, files)
    with pytest.raises(ScbinModelError, match=f"T65.*{age} scbin.*format {format}"):
        run(small, tmp_path / "run", resume=True)
    assert newest.is_dir() and not list((tmp_path / "run").glob(".bad-*"))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def unable(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", unable)
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.warns(ScbinTrainingWarning, match=r"T66.*cannot be locked") as warned:
        checkpoints.open()
    assert len(warned) == 1
    checkpoints.close()


def test_the_directory_of_a_model_takes_no_checkpoints(small, tmp_path):
    (tmp_path / "scbin.json").write_text("{}")
    with pytest.raises(ScbinTrainingError, match=r"T67.*is a saved model"):
        run(small, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scbin.json"]


def test_one_run_per_directory(small, tmp_path):
    first = Checkpoints(tmp_path)
    first.open()
    with pytest.raises(ScbinTrainingError, match=f"T51.*{tmp_path}"):
        run(small, tmp_path)
    first.close()
    kept = tmp_path / ".tmp-new-model-1"  # part of a model, which `Model.load` may need
    for path in (tmp_path / ".tmp-step-00000009-1", tmp_path / ".tmp-old-3-1", kept):
        path.mkdir()
    run(small, tmp_path, epochs=1)
    assert list(tmp_path.glob(".tmp-*")) == [kept]


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_state(small, finished, tmp_path, monkeypatch):
    real, left = os.fsync, [10]

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ScbinTrainingError, match=r"T52.*No space left"):
        run(small, tmp_path)
    monkeypatch.setattr(os, "fsync", real)
    assert len(list(tmp_path.glob("step-*"))) == 1
    bert, _ = run(small, tmp_path, resume=True)
    assert torch.equal(bert.cls.predictions.bias, finished[1].cls.predictions.bias)


def test_same_run_same_file_hashes(small, finished, tmp_path):
    run(small, tmp_path)
    for one in sorted(finished[0].glob("step-*")):
        for name in ("state.safetensors", "state.json"):
            assert (one / name).read_bytes() == (tmp_path / one.name / name).read_bytes()


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    with pytest.raises(ScbinModelError, match="T56"):
        Checkpoints(tmp_path).save(Progress(1, 1), {"weights.a": torch.tensor([1.0, float("nan")])}, {}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_kills", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_sigkill_at_any_instant_ends_in_the_same_bits(tmp_path, n_kills):
    script = Path(__file__).with_name("campaigns.py")
    done = subprocess.run([sys.executable, script, "kill", str(n_kills), tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] >= n_kills and result["runs"] > 1
    assert result["same_bits"] == result["runs"], result
    assert result["inside_a_save"] > n_kills / 20, result
