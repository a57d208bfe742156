"""Checkpoints: the whole state of a run, so that going on is the same as never having stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file

from scbin._errors import ScbinModelError, ScbinTrainingError, ScbinTrainingWarning
from scbin.nn.files import Content, check_finite, sync_directory, verify_directory, write_directory

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Mapping
    from io import TextIOWrapper

    from torch import Tensor, nn

FORMAT = 1
_WEIGHTS, _STATE, _HISTORY = "state.safetensors", "state.json", "history.json"
_MODEL = "scbin.json"  # what a saved model has and a directory of checkpoints has not


@dataclass(frozen=True)
class Progress:
    """Where a run is: with the seed, all that order, masks and dropout depend on."""

    step: int
    token_budget: int
    n_skipped: int = 0


class Checkpoints:
    """The checkpoints of one run in a directory, `step-00000120` and so on; the newest that verifies counts."""

    def __init__(self, directory: str | Path, keep: int = 2):
        self.directory, self.keep = Path(directory), keep
        self._lock: TextIOWrapper | None = None

    # ---- one run per directory --------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the directory for this run, and clear away what a killed run left half-written."""
        if (self.directory / _MODEL).exists():
            raise ScbinTrainingError(
                "T67",
                f"{self.directory} is a saved model; checkpoints beside its files would make it unreadable. Give save_dir= another "
                "directory.",
            )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.directory / ".lock", "a")
        except OSError as error:
            raise ScbinTrainingError(
                "T50", f"{self.directory} cannot be used for checkpoints ({error.strerror})."
            ) from error
        self._take()
        for pattern in (".tmp-step-*", ".tmp-old-[0-9]*"):
            for stale in self.directory.glob(pattern):
                shutil.rmtree(stale, ignore_errors=True)

    def _take(self) -> None:
        """Hold the lock of the directory, where its file system has such locks."""
        if fcntl is None or self._lock is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ScbinTrainingError(
                "T51",
                f"another run is writing to {self.directory}. Wait for it, or give this one a directory of its own.",
            ) from error
        except OSError as error:
            warnings.warn(
                ScbinTrainingWarning(
                    "T66",
                    f"{self.directory} lies where files cannot be locked ({error.strerror}): see to it that no other run writes "
                    "there.",
                ),
                stacklevel=3,
            )

    def close(self) -> None:
        """Give the directory free."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ---- writing ----------------------------------------------------------------------------------------------------

    def save(self, progress: Progress, tensors: Mapping[str, Tensor], run: Mapping[str, Any], history: Mapping) -> None:
        """Write a checkpoint, then let go of those beyond `keep`."""
        target = self.directory / f"step-{progress.step:08d}"
        if target.exists() and verify_directory(target) is None:
            return
        if target.exists():
            self._set_aside(target)
        check_finite(tensors, "the checkpoint")
        state = {
            "format": FORMAT,
            "step": progress.step,
            "token_budget": progress.token_budget,
            "n_skipped": progress.n_skipped,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "run": run,
        }
        files: dict[str, Content] = {
            _WEIGHTS: dict(tensors),
            _STATE: json.dumps(state, sort_keys=True, allow_nan=False).encode(),
            _HISTORY: json.dumps(history).encode(),
        }
        write_directory(target, files)
        for old in self.steps()[: -self.keep]:
            self._remove(old)

    def _remove(self, step: int) -> None:
        """Delete an old checkpoint; renamed first, because a half-deleted one must not look like a checkpoint."""
        condemned = self.directory / f".tmp-old-{step}-{os.getpid()}"
        try:
            os.rename(self.directory / f"step-{step:08d}", condemned)
        except OSError:
            return  # an old checkpoint too many is no reason to stop
        shutil.rmtree(condemned, ignore_errors=True)

    # ---- reading ----------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps there are checkpoints of, in order, damaged ones included."""
        found = (path.name.removeprefix("step-") for path in self.directory.glob("step-*"))
        return sorted(int(number) for number in found if number.isdigit())

    def newest(self) -> int | None:
        """Return the newest step whose checkpoint verifies, setting damaged ones aside with a warning."""
        for step in reversed(self.steps()):
            path = self.directory / f"step-{step:08d}"
            fault = verify_directory(path) or _misplaced(path, step)
            if fault is None:
                return step
            aside = self._set_aside(path)
            older = [s for s in self.steps() if s < step]
            next_one = f"step {older[-1]} is tried instead" if older else "there is no older one"
            warnings.warn(
                ScbinTrainingWarning(
                    "T54", f"checkpoint {path} is damaged: {fault}. It was set aside as {aside.name}; {next_one}."
                ),
                stacklevel=2,
            )
        return None

    def load(self, step: int, run: Mapping[str, Any]) -> tuple[Progress, dict[str, Tensor], dict[str, Any]]:
        """Read the checkpoint of a step that `newest` has verified; it must belong to the same run."""
        path = self.directory / f"step-{step:08d}"
        state = json.loads((path / _STATE).read_text())
        differences = _differences(state["run"], json.loads(json.dumps(run)))
        if differences:
            raise ScbinModelError(
                "T55",
                f"{path} belongs to another run; resumed runs must have the same data and settings. Different: "
                f"{'; '.join(differences)}. Use these settings, or another save_dir.",
            )
        progress = Progress(state["step"], state["token_budget"], state["n_skipped"])
        return progress, load_file(path / _WEIGHTS), json.loads((path / _HISTORY).read_text())

    def _set_aside(self, path: Path) -> Path:
        for number in range(1000):
            aside = self.directory / f".bad-{path.name}{f'-{number}' if number else ''}"
            if not aside.exists():
                os.rename(path, aside)
                sync_directory(self.directory)
                return aside
        raise ScbinTrainingError(
            "T50", f"{self.directory} holds a thousand damaged checkpoints; delete its .bad-* first."
        )


def _misplaced(path: Path, step: int) -> str | None:
    """Return what is wrong with a state whose files are whole but not those of this step."""
    state = json.loads((path / _STATE).read_text())
    written = state.get("format")
    if written != FORMAT:  # whole, and of use to the version that wrote it: it stays where it is
        age = "a newer" if isinstance(written, int) and written > FORMAT else "an older"
        raise ScbinModelError(
            "T65",
            f"{path} was written by {age} scbin: it is of format {written}, and this version reads {FORMAT}. Go on with the "
            "version that wrote it, or train anew in another save_dir.",
        )
    return None if state.get("step") == step else f"{_STATE} is of step {state.get('step')}"


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            line for key in keys for line in _differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name} was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- the state of networks and optimisers as named tensors ------------------------------------------------------------


def collect_state(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and optimiser moments by name."""
    tensors = {}
    for name, parameter in _named(modules):
        tensors[f"weights.{name}"] = parameter.detach()
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            tensors[f"optimizer.{key}.{name}"] = value.detach()
    return tensors


def restore_state(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Write back what `collect_state` returned, every tensor and no other."""
    left = dict(tensors)
    with torch.no_grad():
        for name, parameter in _named(modules):
            saved = left.pop(f"weights.{name}", None)
            if saved is None or saved.shape != parameter.shape:
                raise ScbinModelError(
                    "T55", f"the checkpoint does not hold the weights {name} of shape {tuple(parameter.shape)}."
                )
            parameter.copy_(saved)
            moments = {key: left.pop(f"optimizer.{key}.{name}", None) for key in ("exp_avg", "exp_avg_sq", "step")}
            if all(value is not None for value in moments.values()):
                optimizer.state[parameter] = {
                    key: value.to(parameter.device, torch.float32)
                    for key, value in moments.items()
                    if value is not None
                }
    if left:
        raise ScbinModelError("T55", f"the checkpoint holds what this network has not: {', '.join(sorted(left)[:5])}.")


def _named(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    return [(f"{prefix}.{name}", p) for prefix, module in modules.items() for name, p in module.named_parameters()]


def fingerprint(*arrays: np.ndarray) -> str:
    """Return the sha256 of the content of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str((array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
