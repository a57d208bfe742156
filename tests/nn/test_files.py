from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from scbin._errors import ScbinTrainingError
from scbin.nn.files import MANIFEST, verify_directory, write_directory

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(3.0),
    "c": torch.zeros(0, 4),
    "h": torch.ones(3).bfloat16(),
}


def test_what_is_written_is_a_safetensors_file(tmp_path):
    write_directory(tmp_path / "new", {"w.safetensors": TENSORS, "s.json": b"{}"})
    back = load_file(tmp_path / "new" / "w.safetensors")
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name], TENSORS[name]) and back[name].dtype == TENSORS[name].dtype for name in back)
    assert verify_directory(tmp_path / "new") is None
    write_directory(tmp_path / "again", {"w.safetensors": TENSORS, "s.json": b"{}"})
    for name in os.listdir(tmp_path / "new"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("name", ["w.safetensors", "s.json", MANIFEST])
def test_every_damage_is_found_and_named(tmp_path, name):
    write_directory(tmp_path / "d", {"w.safetensors": TENSORS, "s.json": b'{"a": 1}'})
    path = tmp_path / "d" / name
    good = path.read_bytes()
    for bad in (b"", good[: len(good) // 2], good[:-4] + b"\0\0\0\0", good + b"\n"):
        path.write_bytes(bad)
        assert name in verify_directory(tmp_path / "d")
    for bit in range(0, 8 * len(good), 7):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert verify_directory(tmp_path / "d") is not None
    path.unlink()
    assert verify_directory(tmp_path / "d") == f"{name} is missing"
    path.symlink_to(tmp_path)
    assert name in verify_directory(tmp_path / "d")


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_nothing_behind(tmp_path, monkeypatch, call, code):
    real = getattr(os, call)
    for n in range(1, 9):
        left = [n]

        def failing(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        target = tmp_path / f"{call}{n}"
        monkeypatch.setattr(os, call, failing)
        try:
            write_directory(target, {"w.safetensors": TENSORS, "s.json": b"{}"})
        except ScbinTrainingError as error:
            assert error.code == "T52"
        finally:
            monkeypatch.setattr(os, call, real)
        # whole or not there
        assert not target.exists() or verify_directory(target) is None
        assert not list(tmp_path.glob(".tmp-*"))


def test_too_little_room_is_noticed_before(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ScbinTrainingError, match="T52"):
        write_directory(tmp_path / "d", {"s.json": b"123456"})
    assert not list(tmp_path.iterdir())
