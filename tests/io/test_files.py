from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from scbin._errors import ScbinModelError
from scbin.io.commit import standing
from scbin.io.files import MANIFEST, verify_directory, write_directory

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
    assert name in verify_directory(tmp_path / "d")
    path.symlink_to(tmp_path)
    assert name in verify_directory(tmp_path / "d")


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(ScbinModelError, match=r"M05.*w of .*NaN"):
        write_directory(tmp_path / "d", {"t.safetensors": {"w": torch.tensor([1.0, float("nan")])}})
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
    (tmp_path / ".tmp-d").mkdir()  # of a killed process
    write_directory(tmp_path / "d", {"s.json": b"123456"})
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_at_every_instant_a_whole_directory_is_there(tmp_path, monkeypatch):
    """Under its name, or for the instant between two renames beside it."""
    target, found = tmp_path / "d[1]", []
    write_directory(target, {"s.json": b"old"})

    def watched(call):
        def wrapper(*args, **kwargs):
            found.append(verify_directory(standing(target)))
            result = call(*args, **kwargs)
            found.append(verify_directory(standing(target)))
            return result

        return wrapper

    with monkeypatch.context() as patched:
        for name in ("rename", "replace", "fsync", "open"):
            patched.setattr(os, name, watched(getattr(os, name)))
        write_directory(target, {"s.json": b"new"})
    assert len(found) > 10 and set(found) == {None}
    assert (target / "s.json").read_bytes() == b"new" and [path.name for path in tmp_path.iterdir()] == ["d[1]"]
