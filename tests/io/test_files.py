from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from scbin._errors import ScbinModelError
from scbin.io import files
from scbin.io.files import MANIFEST, clear_leftovers, recovered, replace_directory, verify_directory, write_directory

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3).T,
    "b": torch.tensor(3.0),
    "c": torch.zeros(0, 4),
    "h": torch.ones(3).bfloat16(),
    "flags": torch.tensor([True, False]),
}


def test_what_is_written_is_a_safetensors_file(tmp_path):
    for name in ("new", "again"):
        write_directory(tmp_path / name, {"w.safetensors": TENSORS, "s.json": b"{}"})
    back = load_file(tmp_path / "new" / "w.safetensors")
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name], TENSORS[name]) and back[name].dtype == TENSORS[name].dtype for name in back)
    assert verify_directory(tmp_path / "new") is None
    for name in os.listdir(tmp_path / "new"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("name", ["w.safetensors", "s.json", MANIFEST])
def test_every_damage_is_found_and_named(tmp_path, name):
    write_directory(tmp_path / "d", {"w.safetensors": TENSORS, "s.json": b'{"a": 1}'})
    path = tmp_path / "d" / name
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 13):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert verify_directory(tmp_path / "d") is not None
    path.write_bytes(good[:-1])
    assert name in verify_directory(tmp_path / "d")
    path.unlink()
    assert verify_directory(tmp_path / "d") == f"{name} is missing"
    path.symlink_to(tmp_path)
    assert name in verify_directory(tmp_path / "d")


def test_too_little_room_and_numbers_that_are_not_finite_are_noticed_before(tmp_path, monkeypatch):
    with pytest.raises(ScbinModelError, match=r"M05.*w of .*NaN"):
        write_directory(tmp_path / "d", {"t.safetensors": {"w": torch.tensor([1.0, float("nan")])}})
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ScbinModelError, match=r"M05.*free"):
        write_directory(tmp_path / "d", {"s.json": b"123456"})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_the_tensors(tmp_path):
    """safetensors writes them itself: its error is ours, and nothing is left."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ScbinModelError, match="M05"):
            write_directory(tmp_path / "d", {"w.safetensors": {"w": torch.ones(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_directory(tmp_path / "d", {"s.json": b"123456"})
    assert not list(tmp_path.iterdir())
    (tmp_path / f".tmp-d-{os.getpid()}").mkdir()  # of a killed process that had the same number
    write_directory(tmp_path / "d", {"s.json": b"123456"})
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux exchanges two names at once")
def test_at_every_instant_a_whole_directory_is_there(tmp_path, monkeypatch):
    target, found = tmp_path / "d", []
    write_directory(target, {"s.json": b"old"})

    def watched(call):
        def wrapper(*args, **kwargs):
            found.append(verify_directory(target))
            result = call(*args, **kwargs)
            found.append(verify_directory(target))
            return result

        return wrapper

    for name in ("rename", "fsync", "open"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    monkeypatch.setattr(files, "_exchange", watched(files._exchange))
    replace_directory(target, {"s.json": b"new"})
    assert len(found) > 10 and set(found) == {None}
    assert (target / "s.json").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_what_a_killed_process_left_is_found_and_cleared(tmp_path):
    """Without an exchange there is an instant in which the name is free; whoever comes next finds the new directory."""
    target, number = tmp_path / "d[1]", 2**22 + 1  # beyond the largest number of a process
    fresh, old = tmp_path / f".tmp-new-d[1]-{number}", tmp_path / f".tmp-old-d[1]-{number}"
    for spoiled, content in ((False, b"new"), (True, b"old")):
        write_directory(fresh, {"s.json": b"new"})
        write_directory(old, {"s.json": b"old"})
        if spoiled:
            (fresh / "s.json").write_bytes(b"half")
        assert recovered(target) == target
        assert (target / "s.json").read_bytes() == content
        for name in (f".tmp-d[1]-{number}", f".tmp-.tmp-new-d[1]-{number}-{number}"):
            (tmp_path / name).mkdir()
        others = {f".tmp-d[1]-2-{number}", f".tmp-d[1]-{os.getppid()}", ".tmp-d[1]-x", f".tmp-old-d[1]-2-{number}"}
        for name in others:
            (tmp_path / name).mkdir(exist_ok=True)
        clear_leftovers(target)
        assert {path.name for path in tmp_path.iterdir()} == {"d[1]", *others}
        shutil.rmtree(target)
    assert recovered(target) == target and not target.exists()
    write_directory(fresh, {"s.json": b"new"})  # without the old one beside it the name was given up on purpose
    assert recovered(target) == target and not target.exists()
