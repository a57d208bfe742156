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
from safetensors.torch import load_file

from scbin._arguments import shown
from scbin._errors import ScbinInputError, ScbinModelError, ScbinTrainingError, ScbinTrainingWarning
from scbin.io.files import Content, sync_directory, verify_directory, write_directory

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from scbin.tokens.tokens import Tokens

FORMAT, KEPT = 3, 2  # of the files; newest checkpoints that stay
_TENSORS, _STATE, _HISTORY = "state.safetensors", "state.json", "history.json"


class Checkpoints:
    """The checkpoints of one run in a directory, `step-00000120` and so on; the newest that verifies counts.

    As a context manager it keeps other runs out of the directory and clears away what a killed run left half-written.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)

    def __enter__(self) -> Checkpoints:
        if any((self.directory / name).exists() for name in ("network.json", "scbin.json")):  # format 2, format 1
            told = "is a saved model; checkpoints beside its files would make it unreadable. Give save_dir= another directory."
            raise ScbinInputError("A03", f"{self.directory} {told}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.directory / ".lock", "a")
        except OSError as error:
            told = f"{self.directory} cannot be used for checkpoints ({error.strerror})."
            raise ScbinModelError("M05", told) from error
        try:
            if fcntl is not None:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.lock.close()
            told = f"another run is writing to {self.directory}. Wait for it, or give this one a directory of its own."
            raise ScbinTrainingError("T03", told) from error
        except OSError as error:
            told = f"files in {self.directory} cannot be locked ({error.strerror}): see to it that no other run writes there."
            warnings.warn(ScbinTrainingWarning("T05", told), stacklevel=3)
        for stale in self.directory.glob(".tmp-step-*"):
            shutil.rmtree(stale, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.close()

    def save(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], history: Sequence[Any]) -> None:
        """Write a checkpoint of `state["step"]`, then let go of older ones."""
        target = self._path(state["step"])
        if target.exists():
            return
        about = {"format": FORMAT, "torch": torch.__version__, "threads": torch.get_num_threads(), **state}
        files: dict[str, Content] = {
            _TENSORS: tensors,
            _STATE: json.dumps(about, sort_keys=True, allow_nan=False).encode(),
            _HISTORY: json.dumps(history).encode(),  # with NaN, which skipped steps have
        }
        write_directory(target, files)
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
                state = json.loads((path / _STATE).read_text())
                if state.get("format") != FORMAT:  # of use to the version that wrote it: it stays where it is
                    told = f"{path} is a checkpoint of format {state.get('format')}; this version of scbin reads {FORMAT}. Go on"
                    raise ScbinModelError("T03", f"{told} with the version that wrote it, or use another save_dir.")
                if state.get("step") == step:
                    return step
                fault = f"{_STATE} is of step {state.get('step')}"
            aside = path.with_name(f".bad-{path.name}")  # out of the way, and yet there to be looked at
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            sync_directory(self.directory)
            older = [f"step {s} is tried instead" for s in self.steps() if s < step]
            told = f"checkpoint {path} is damaged: {fault}. It was set aside as {aside.name}; "
            warnings.warn(ScbinTrainingWarning("T03", told + (older or ["there is no older one"])[-1]), stacklevel=2)
        return None

    def load(self, step: int, run: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], list[Any]]:
        """Return state, tensors and history of a step that `newest` has verified; it must belong to the same run."""
        path = self._path(step)
        state = json.loads((path / _STATE).read_text())
        differences = _differences(state["run"], json.loads(json.dumps(run)))
        if differences:
            told = f"{path} belongs to another run; resumed runs must have the same data and settings. Different: "
            raise ScbinModelError("T03", f"{told}{'; '.join(differences)}. Use these settings, or another save_dir.")
        return state, load_file(path / _TENSORS), json.loads((path / _HISTORY).read_text())

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
    tensors = {f"weights.{name}": tensor.detach() for name, tensor in weights.items()}
    for name, tensor in weights.items():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state.get(tensor, {}).items()}
    return tensors


@torch.no_grad()
def restore_state(
    tensors: dict[str, Tensor], weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Write back what `collect_state` returned; returns the tensors that are left over."""
    for name, tensor in weights.items():
        tensor.copy_(tensors.pop(f"weights.{name}"))
        moments = {key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
        if moments["step"] in tensors:
            optimizer.state[tensor] = {key: tensors.pop(own).to(tensor.device) for key, own in moments.items()}
    return tensors


def fingerprint(tokens: Tokens, cells: np.ndarray, held_out: np.ndarray) -> str:
    """Return the sha256 of who is trained on and held out, and of the tokens of a few thousand cells."""
    rows = np.unique(np.linspace(0, max(tokens.n_cells - 1, 0), min(tokens.n_cells, 4096)).astype(np.int64))
    matrix = tokens.take(rows)
    digest = hashlib.sha256(tokens.vocabulary.sha256.encode())
    for array in (tokens.lengths, cells, held_out, matrix.indices, matrix.data):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).view(np.uint8).data)
    return digest.hexdigest()
