"""Checkpoints: the whole state of a run, so that going on is the same as never having stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from scbin._arguments import shown
from scbin._errors import ScbinInputError, ScbinModelError, ScbinTrainingError, ScbinTrainingWarning
from scbin.io.commit import sync
from scbin.io.files import verify_directory, write_directory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from scbin.tokens.tokens import Tokens

KEPT = 2  # newest checkpoints that stay
_TENSORS, _STATE, _HISTORY = "state.safetensors", "state.json", "history.json"


class Checkpoints:
    """The checkpoints of one run in a directory, `step-00000120` and so on; the newest that verifies counts.

    As a context manager it keeps other runs out of the directory and clears away what a killed run left half-written.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.lock = FileLock(self.directory / ".lock")

    def __enter__(self) -> Checkpoints:
        if any((self.directory / name).exists() for name in ("network.json", "scbin.json")):  # format 2, format 1
            told = "is a saved model; checkpoints beside its files would make it unreadable. Give save_dir= another directory."
            raise ScbinInputError("A03", f"{self.directory} {told}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(blocking=False)
        except Timeout as error:
            told = f"another run is writing to {self.directory}. Wait for it, or give this one a directory of its own."
            raise ScbinTrainingError("T03", told) from error
        except OSError as error:
            told = f"{self.directory} cannot be used for checkpoints ({error.strerror})."
            raise ScbinModelError("M05", told) from error
        for stale in self.directory.glob(".tmp-step-*"):
            shutil.rmtree(stale, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def save(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], history: Sequence[Any]) -> None:
        """Write a checkpoint of `state["step"]`, then let go of older ones."""
        target = self._path(state["step"])
        if not target.exists():
            about = json.dumps(state, sort_keys=True, allow_nan=False).encode()
            # a history may have NaN: skipped steps do
            write_directory(target, {_TENSORS: tensors, _STATE: about, _HISTORY: json.dumps(history).encode()})
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self._path(old), ignore_errors=True)  # half-deleted it does not verify, and goes next time

    def steps(self) -> list[int]:
        """Return the steps there are checkpoints of, in order, damaged ones included."""
        found = (path.name.removeprefix("step-") for path in self.directory.glob("step-*"))
        return sorted(int(number) for number in found if number.isdigit())

    def newest(self) -> int | None:
        """Return the newest step whose checkpoint verifies, setting damaged ones aside with a warning."""
        for step in reversed(self.steps()):
            path = self._path(step)
            fault = verify_directory(path)
            if fault is None:
                return step
            aside = path.with_name(f".bad-{path.name}")  # out of the way, and yet there to be looked at
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            sync(self.directory)
            told = f"checkpoint {path} is damaged: {fault}. It was set aside as {aside.name}; "
            told += (
                ", ".join(f"step {older} is tried instead" for older in self.steps()[-1:]) or "there is no older one"
            )
            warnings.warn(ScbinTrainingWarning("T03", told), stacklevel=2)
        return None

    def load(self, step: int, run: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[Any]]:
        """Return tensors and history of a step that `newest` has verified; it must belong to the same run."""
        path = self._path(step)
        differences = _differences(json.loads((path / _STATE).read_text())["run"], json.loads(json.dumps(run)))
        if differences:
            told = f"{path} belongs to another run; resumed runs must have the same data and settings. Different: "
            raise ScbinModelError("T03", f"{told}{'; '.join(differences)}. Use these settings, or another save_dir.")
        return load_file(path / _TENSORS), json.loads((path / _HISTORY).read_text())

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return what differs between two descriptions of a run, one line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        parts = ((before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in sorted({*before, *now}))
        return [line for part in parts for line in _differences(*part)]
    return [] if before == now else [f"{name} was {shown(before)}, is {shown(now)}"]


# ---- the state of networks and optimisers as named tensors ------------------------------------------------------------


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, those that are shared once."""
    persistent = module.state_dict()
    return {n: t for n, t in [*module.named_parameters(), *module.named_buffers()] if n in persistent}


def collect_state(weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and the moments of the optimiser by name."""
    moments = {f"{key}.{n}": m for n, t in weights.items() for key, m in optimizer.state.get(t, {}).items()}
    return {f"weights.{name}": tensor.detach() for name, tensor in weights.items()} | moments


@torch.no_grad()
def restore_state(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write back what `collect_state` returned."""
    for name, tensor in weights.items():
        tensor.copy_(tensors[f"weights.{name}"])
        if f"step.{name}" in tensors:
            moments = {key: tensors[f"{key}.{name}"].to(tensor.device) for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[tensor] = moments


def fingerprint(tokens: Tokens, cells: np.ndarray, held_out: np.ndarray) -> str:
    """Return the sha256 of who is trained on and held out, and of the tokens of a few thousand cells."""
    rows = np.unique(np.linspace(0, max(tokens.n_cells - 1, 0), min(tokens.n_cells, 4096)).astype(np.int64))
    matrix = tokens.take(rows)
    digest = hashlib.sha256(tokens.vocabulary.sha256.encode())
    for array in (tokens.lengths, cells, held_out, matrix.indices, matrix.data):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).view(np.uint8).data)
    return digest.hexdigest()
