"""`scbin check`: what is wrong with a file from a stranger, found out in a process that may crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from scbin._errors import ScbinInputError
from scbin._stored import Finding, shown, size_of

if TYPE_CHECKING:
    from pathlib import Path

GIGABYTE = 2**30
WALKER = [sys.executable, "-m", "scbin._walk_file"]
# no threads whose stacks count, no locks in the stranger's folder, no plugins from wherever
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"),
    "HDF5_USE_FILE_LOCKING": "FALSE",
    "HDF5_PLUGIN_PRELOAD": "::",
}


def check_file(path: Path, *, memory: float = 8.0, seconds: int = 600, like: str | None = None) -> int:
    """Print what is wrong with an h5ad file or a zarr directory, and for a sound one what `scbin.pp.check` says.

    The file is looked at in a child process with limits of memory and time, so that a file that crashes HDF5, hangs it or asks
    for terabytes is a line of the report.

    Parameters
    ----------
    path
        The file or directory.
    memory
        Most memory for the child, in GiB.
    seconds
        Most time for it.
    like
        A model directory that the data are to be matched with.

    Returns
    -------
    0 if it is sound, 1 if something is wrong.
    """
    if not path.exists():
        raise ScbinInputError("M56", f"{str(path)!r} is not there.")
    if memory <= 0 or seconds < 1:
        raise ScbinInputError("M56", f"memory is {memory} and seconds {seconds}; both need to be above 0.")
    limits = [str(int(memory * GIGABYTE)), str(seconds)]
    lines, end = run_child(["walk", str(path), *limits], seconds)
    found = [Finding(*entry) for entry in lines[-1].get("findings", [])] if lines else []
    shape = lines[-1].get("shape") if lines else None
    if end is not None:
        at = next((line["at"] for line in reversed(lines) if "at" in line), "")
        found = [Finding(end[0], at or "the file", end[1])]
    wrong = [finding for finding in found if finding.wrong]
    what = f"{shape[0]:,} cells x {shape[1]:,} genes, " if shape else ""
    verdict = "sound" if not wrong else f"{len(wrong)} {'thing is' if len(wrong) == 1 else 'things are'} wrong"
    print(f"{path.name}: {what}{size_of(_size(path))}, {verdict}")
    for finding in found:
        print(f"  {'error' if finding.wrong else 'note':8}{finding.code:5}{shown(finding.where, 200)} {finding.text}")
    if wrong:
        return 1
    return _say_check(path, limits, seconds, like)


def _say_check(path: Path, limits: list[str], seconds: int, like: str | None) -> int:
    lines, end = run_child(["check", str(path), *limits, *([] if like is None else [like])], seconds)
    rows = lines[-1].get("rows", []) if end is None and lines else []
    if end is not None:
        rows = [["error", *end]]
    for kind, code, finding in rows:
        print(f"  {kind:8}{code:5}{finding}")
    return int(any(kind == "error" for kind, *_ in rows))


def run_child(arguments: list[str], seconds: int) -> tuple[list[dict[str, Any]], tuple[str, str] | None]:
    """Return what the child printed, and code and words for how it ended if that was not well."""
    try:
        done = subprocess.run(
            [*WALKER, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **ENVIRONMENT},
            timeout=2 * seconds + 10,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return _lines(error.stdout), ("M53", f"reading it was not over after {2 * seconds + 10} seconds")
    lines = _lines(done.stdout)
    if done.returncode == -getattr(signal, "SIGXCPU", 0) or done.returncode == -getattr(signal, "SIGKILL", 0):
        return lines, ("M53", f"reading it took more than {seconds} seconds or was killed")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return lines, ("M52", f"crashes the library that reads it ({name})")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        code, what = ("M54", "needs more memory than allowed") if "MemoryError" in last else ("M52", "cannot be walked")
        return lines, (code, f"{what} ({shown(last)})")
    return lines, None


def _lines(text: str | bytes | None) -> list[dict[str, Any]]:
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text or ""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut short, where the child was killed
            continue
    return [line for line in found if isinstance(line, dict)]


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)
