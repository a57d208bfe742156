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

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from scbin._errors import ScbinModelError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MANIFEST = "manifest.json"
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD, and the flag of renameat2

Content = bytes | Mapping[str, "Tensor"]


def write_directory(target: Path, files: Mapping[str, Content], unlisted: Collection[str] = ()) -> None:
    """Write files, bytes or tensors, into a new directory so that it appears at once and whole, or not at all.

    `manifest.json` holds size and sha256 of each but the `unlisted`, which people may edit. After a crash at any instant, or a full
    disk, there is at most a `.tmp-*` beside it. Weights that are not finite are never written.
    """
    parent = target.parent
    temporary = parent / f".tmp-{target.name}-{os.getpid()}"
    for file, content in files.items():
        for name, tensor in {} if isinstance(content, bytes) else content.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ScbinModelError("M05", f"{name} of {file} holds NaN or infinity. It was not written.")
    try:
        n_bytes = sum(len(c) if isinstance(c, bytes) else sum(t.nbytes for t in c.values()) for c in files.values())
        free = shutil.disk_usage(parent).free
        if free < 2 * n_bytes:
            what = f"needs {n_bytes:,} bytes, twice that to be safe, and {free:,} are free"
            raise ScbinModelError("M05", f"{target} {what}. Make room and go on.")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
        os.mkdir(temporary)
        entries = {name: _write_file(temporary / name, content) for name, content in files.items()}
        listed = {name: entry for name, entry in entries.items() if name not in unlisted}
        _write_file(temporary / MANIFEST, manifest_bytes(listed))
        sync_directory(temporary)
        os.rename(temporary, target)
        sync_directory(parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        what = f"{target} could not be written ({reason}). What was written before is untouched."
        raise ScbinModelError("M05", what) from error
    finally:  # also when someone pressed Ctrl-C
        shutil.rmtree(temporary, ignore_errors=True)


def _write_file(path: Path, content: Content) -> dict[str, Any]:
    """Write, flush and hash one file; neither way of writing maps it into memory, which would die of a full disk."""
    if not isinstance(content, bytes):
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
        save_file(tensors, path, {"format": "pt"})
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if isinstance(content, bytes) else 0), 0o644)
    with open(descriptor, "r+b") as file:
        if isinstance(content, bytes):
            file.write(content)
            file.flush()
        os.fsync(descriptor)
        file.seek(0)
        return {"size": os.fstat(descriptor).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync_directory(directory: Path) -> None:
    """Flush the entries of a directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    except OSError as error:
        what = f"{target} could not be replaced ({error.strerror or error}). A whole model is still there."
        raise ScbinModelError("M05", what) from error
    finally:
        if target.exists():
            for left in (fresh, old):
                shutil.rmtree(left, ignore_errors=True)


def recovered(target: Path) -> Path:
    """Return a directory, put back into its place if a process was killed while replacing it; beside it if it cannot be moved."""
    if os.path.lexists(target):
        return target
    for path in sorted(target.parent.glob(f".tmp-new-{glob.escape(target.name)}-*")):
        number = path.name.removeprefix(f".tmp-new-{target.name}-")
        old = path.with_name(f".tmp-old-{target.name}-{number}")
        if number.isdigit() and old.is_dir():  # both wait beside it: the new one is whole then
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
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform.startswith("linux") else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _runs(process: int) -> bool:
    """Whether another process of this number is there; where that cannot be asked, one is."""
    if process == os.getpid() or os.name != "posix":
        return process != os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


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
    for name in sorted(set(entries) - set(ignored)):
        path, entry = directory / name, entries[name]
        try:
            status = os.stat(path) if links else os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file"
            if status.st_size != entry["size"]:
                return f"{name} has {status.st_size:,} bytes instead of {entry['size']:,}"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return f"{name} is not what was written (sha256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
