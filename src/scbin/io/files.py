"""Directories that are either complete or not there: written aside, hashed, flushed, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
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

Content = bytes | Mapping[str, "Tensor"]


def write_directory(
    target: Path, files: Mapping[str, Content], unlisted: Collection[str] = (), *, replace: bool = False
) -> None:
    """Write files, bytes or tensors, into a directory so that it appears at once and whole, or not at all.

    `manifest.json` holds size and sha256 of each but the `unlisted`, which people may edit. With `replace` it takes the place of
    another, which waits beside it between two renames; `recovered` puts that back if the process is killed there. After a crash
    there is at most a `.tmp-*` beside it. Weights that are not finite are never written.
    """
    parent, old = target.parent, _set_aside(target)
    temporary = parent / f".tmp-{target.name}-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
        os.mkdir(temporary)
        entries = {name: _write_file(temporary / name, content) for name, content in files.items()}
        listed = {name: entry for name, entry in entries.items() if name not in unlisted}
        _write_file(temporary / MANIFEST, manifest_bytes(listed))
        sync_directory(temporary)
        if replace:
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(temporary, target)
        sync_directory(parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        what = f"{target} could not be written ({reason}). What was written before is untouched."
        raise ScbinModelError("M05", what) from error
    finally:  # also when someone pressed Ctrl-C
        shutil.rmtree(temporary, ignore_errors=True)
        if replace and recovered(target).exists():
            shutil.rmtree(old, ignore_errors=True)


def _write_file(path: Path, content: Content) -> dict[str, Any]:
    """Write, flush and hash one file; neither way of writing maps it into memory, which would die of a full disk."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ScbinModelError("M05", f"{name} of {path.name} holds NaN or infinity. It was not written.")
        save_file(tensors, path, {"format": "pt"})
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync_directory(directory: Path) -> None:
    """Flush the entries of a directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recovered(target: Path) -> Path:
    """Return a directory, put back into its place if a process was killed while replacing it."""
    if not os.path.lexists(target) and _set_aside(target).is_dir():
        with contextlib.suppress(OSError):
            os.rename(_set_aside(target), target)
    return target


def _set_aside(target: Path) -> Path:
    return target.with_name(f".tmp-old-{target.name}")


def manifest_bytes(entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the manifest, one text for one content, so that every one of its bits counts too."""
    text = json.dumps({"files": {name: dict(entry) for name, entry in entries.items()}}, sort_keys=True)
    return json.dumps({"manifest": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True).encode()


def verify_directory(directory: Path, names: Collection[str] | None = None, *, links: bool = False) -> str | None:
    """Return what is wrong with a directory that `write_directory` made, naming the file, or `None`.

    Where `names` are given, the manifest must list these and no others. Links count as what they point to only with `links`.
    """
    try:
        raw = (directory / MANIFEST).read_bytes()
        entries = json.loads(json.loads(raw)["manifest"])["files"]
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
        if manifest_bytes(entries) != raw:
            return f"{MANIFEST} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    if names is not None and set(listed) != set(names):
        return f"{MANIFEST} does not list the files of a model"
    for name, (size, digest) in sorted(listed.items()):
        try:
            status = os.stat(directory / name) if links else os.lstat(directory / name)
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                return f"{name} is not a file of the size that was written"
            with open(directory / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is not what was written (sha256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None
