"""Files and folders that are either complete or not there: written aside, flushed, renamed."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from scbin._errors import ScbinError, ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def committed(target: Path, kind: type[ScbinError] = ScbinInputError, code: str = "F02") -> Iterator[Path]:
    """Give a name to write a file or a folder to. It becomes `target` when all went well; else nothing is left of it.

    A folder that is there already waits beside it between two renames, where `standing` finds it if the process was killed.
    """
    temporary, old = (target.with_name(f".tmp-{part}{target.name}") for part in ("", "old-"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # of a process that was killed
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:  # a chunk of zarr that was lost would read as 0
            sync(path)
        if target.is_dir():
            remove(old)
            os.rename(target, old)
        os.replace(temporary, target)
        sync(target.parent)
    except (OSError, RuntimeError) as error:  # of a full disk, h5py raises either
        number = getattr(error, "errno", None)
        found = os.strerror(number) if number else str(error)[:200]
        raise kind(code, f"{target} could not be written ({found}). What was there is untouched.") from error
    finally:  # also when someone pressed Ctrl-C
        remove(temporary)
        if target.exists():
            remove(old)
        elif old.exists():
            os.rename(old, target)


def standing(target: Path) -> Path:
    """Return where a folder is: beside the target, if the process that replaced it was killed between the two renames."""
    old = target.parent / f".tmp-old-{target.name}"
    return old if old.exists() and not target.exists() else target


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if path.is_dir() and os.name == "nt":  # Windows flushes no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Take a file or a folder away, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()
