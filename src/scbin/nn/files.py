"""Directories that are either complete or not there: written aside, hashed, flushed, renamed."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scbin._errors import ScbinModelError, ScbinTrainingError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MANIFEST = "manifest.json"
_CHUNK = 4 * 2**20
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD, and the flag of renameat2
_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16"}

Content = bytes | Mapping[str, "Tensor"]


def write_directory(target: Path, files: Mapping[str, Content], unlisted: Collection[str] = ()) -> None:
    """Write files into a new directory so that it appears at once and whole, or not at all.

    Tensors go into a safetensors file, bytes as they are; `manifest.json` holds size and sha256 of each. After a crash at any
    instant, or a full disk, there is at most a `.tmp-*` beside it.

    Parameters
    ----------
    target
        The directory to be; it must not exist.
    files
        Content by file name.
    unlisted
        Names of files that the manifest leaves out, because they may change later.
    """
    parent = target.parent
    temporary = parent / f".tmp-{target.name}-{os.getpid()}"
    try:
        n_bytes = sum(_size(content) for content in files.values())
        free = shutil.disk_usage(parent).free
        if free < 2 * n_bytes:
            raise ScbinTrainingError(
                "T52",
                f"{target} needs {n_bytes:,} bytes, twice that to be safe, and {free:,} are free. Make room and go on.",
            )
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
        os.mkdir(temporary)
        entries = {name: _write_file(temporary / name, content) for name, content in files.items()}
        listed = {name: entry for name, entry in entries.items() if name not in unlisted}
        _write_file(temporary / MANIFEST, manifest_bytes(listed))
        sync_directory(temporary)
        os.rename(temporary, target)
        sync_directory(parent)
    except OSError as error:
        raise ScbinTrainingError(
            "T52", f"{target} could not be written ({error.strerror or error}). What was written before is untouched."
        ) from error
    finally:  # also when someone pressed Ctrl-C
        shutil.rmtree(temporary, ignore_errors=True)


# ---- a directory in the place of another ------------------------------------------------------------------------------


def replace_directory(target: Path, files: Mapping[str, Content], unlisted: Collection[str] = ()) -> None:
    """Write files into a directory that takes the place of another: at any instant a whole one stands there.

    Where the system can exchange two names at once, killing the process changes nothing about that. Elsewhere there is an
    instant between two renames in which the name is free; `recovered` then finds the new directory beside it.
    """
    fresh, old = (target.with_name(f".tmp-{word}-{target.name}-{os.getpid()}") for word in ("new", "old"))
    try:
        write_directory(fresh, files, unlisted)
        if not _exchange(fresh, target):
            os.rename(target, old)
            try:
                os.rename(fresh, target)
            except BaseException:
                if not target.exists():
                    os.rename(old, target)
                raise
        sync_directory(target.parent)
    finally:
        if target.exists():
            for left in (fresh, old):
                shutil.rmtree(left, ignore_errors=True)


def recovered(target: Path) -> Path:
    """Return a directory, put back into its place if a process was killed while replacing it; beside it if it cannot be moved.

    That is so where nothing stands there and both the old and the new one wait beside it: the new one is whole then.
    """
    if os.path.lexists(target):
        return target
    for path in sorted(target.parent.glob(f".tmp-new-{glob.escape(target.name)}-*")):
        number = path.name.removeprefix(f".tmp-new-{target.name}-")
        old = path.with_name(f".tmp-old-{target.name}-{number}")
        if number.isdigit() and old.is_dir():
            whole = path if verify_directory(path) is None else old
            try:
                os.rename(whole, target)
            except OSError:
                return whole
            return target
    return target


def clear_leftovers(target: Path) -> None:
    """Delete what processes that are gone have left beside a directory they were writing."""
    name = re.escape(target.name)
    for path in target.parent.glob(f".tmp-*{glob.escape(target.name)}-*"):
        own = re.fullmatch(rf"\.tmp-(?:(?:new-|old-)?{name}|\.tmp-new-{name}-\d+)-(\d+)", path.name)
        if own is not None and not _runs(int(own[1])):
            shutil.rmtree(path, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places at once; return False where that cannot be done."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _runs(process: int) -> bool:
    """Whether another process of this number is there; where that cannot be asked, one is."""
    if process == os.getpid():
        return False
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


# ---- what is in a directory ------------------------------------------------------------------------------------------


def manifest_bytes(entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the manifest, one text for one content, so that every one of its bits counts too."""
    text = json.dumps({"files": {name: dict(entry) for name, entry in entries.items()}}, sort_keys=True)
    return json.dumps({"manifest": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True).encode()


def verify_directory(directory: Path, *, links: bool = False, ignored: Collection[str] = ()) -> str | None:
    """Return what is wrong with a directory that `write_directory` made, naming the file, or `None`.

    Links count as what they point to only where `links` says so; files in `ignored` may be changed or gone.
    """
    try:
        raw = (directory / MANIFEST).read_bytes()
        entries = json.loads(json.loads(raw)["manifest"])["files"]
        if manifest_bytes(entries) != raw:
            return f"{MANIFEST} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    for name, entry in entries.items():
        if name in ignored:
            continue
        path = directory / name
        try:
            status = os.stat(path) if links else os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file"
            if status.st_size != entry["size"]:
                return f"{name} has {status.st_size:,} bytes instead of {entry['size']:,}"
            if _hash_file(path) != entry["sha256"]:
                return f"{name} is not what was written (sha256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def sync_directory(directory: Path) -> None:
    """Flush the entries of a directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise if a tensor holds NaN or infinity: such weights are never written."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ScbinModelError("T56", f"{name} of {what} holds NaN or infinity. It was not written.")


def _size(content: Content) -> int:
    if isinstance(content, bytes):
        return len(content)
    return sum(tensor.numel() * tensor.element_size() for tensor in content.values())


def _write_file(path: Path, content: Content) -> dict[str, Any]:
    """Write, hash and flush one file with plain writes: a writable memory map dies of a full disk."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in [content] if isinstance(content, bytes) else _safetensors(content):
            view = memoryview(piece)
            digest.update(view)
            size += len(view)
            while len(view):
                view = view[os.write(descriptor, view[:_CHUNK]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def _safetensors(tensors: Mapping[str, Tensor]) -> Any:
    """Yield a safetensors file piece by piece, so that no second copy of all weights is held."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().astype(np.uint8, copy=False).data


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
