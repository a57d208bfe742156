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
from safetensors import safe_open

from scbin._arguments import shown
from scbin._errors import ScbinInputError, ScbinModelError, ScbinTrainingError, ScbinTrainingWarning
from scbin.io.files import Content, sync_directory, verify_directory, write_directory

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Mapping
    from io import TextIOWrapper

    from torch import Tensor, nn

    from scbin.tokens.tokens import Tokens

FORMAT = 2
_TENSORS, _STATE, _HISTORY = "state.safetensors", "state.json", "history.json"
_MODEL = "scbin.json"  # what a saved model has and a directory of checkpoints has not


class Checkpoints:
    """The checkpoints of one run in a directory, `step-00000120` and so on; the newest that verifies counts.

    As a context manager it keeps other runs out of the directory and clears away what a killed run left half-written.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        self.directory, self.keep = Path(directory), keep
        self._lock: TextIOWrapper | None = None

    def __enter__(self) -> Checkpoints:
        if (self.directory / _MODEL).exists():
            told = "is a saved model; checkpoints beside its files would make it unreadable. Give save_dir= another directory."
            raise ScbinInputError("A03", f"{self.directory} {told}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.directory / ".lock", "a")
        except OSError as error:
            told = f"{self.directory} cannot be used for checkpoints ({error.strerror})."
            raise ScbinModelError("M05", told) from error
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.__exit__()
            told = f"another run is writing to {self.directory}. Wait for it, or give this one a directory of its own."
            raise ScbinTrainingError("T03", told) from error
        except OSError as error:
            told = f"{self.directory} lies where files cannot be locked ({error.strerror}): see to it that no other run writes there."
            warnings.warn(ScbinTrainingWarning("T05", told), stacklevel=3)
        for pattern in (".tmp-step-*", ".tmp-old-[0-9]*"):
            for stale in self.directory.glob(pattern):
                shutil.rmtree(stale, ignore_errors=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ---- writing ----------------------------------------------------------------------------------------------------

    def save(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], history: Mapping[str, Any]) -> None:
        """Write a checkpoint of `state["step"]`, then let go of those beyond `keep`."""
        target = self._path(state["step"])
        if target.exists():
            if verify_directory(target) is None:
                return
            self._set_aside(target)
        about = {"format": FORMAT, "torch": torch.__version__, "threads": torch.get_num_threads(), **state}
        files: dict[str, Content] = {
            _TENSORS: tensors,
            _STATE: json.dumps(about, sort_keys=True, allow_nan=False).encode(),
            _HISTORY: json.dumps(history).encode(),  # with NaN, which skipped steps have
        }
        write_directory(target, files)
        for old in self.steps()[: -self.keep]:
            # renamed first: a half-deleted one must not look like a checkpoint
            condemned = self.directory / f".tmp-old-{old}-{os.getpid()}"
            try:
                os.rename(self._path(old), condemned)
            except OSError:
                continue  # an old checkpoint too many is no reason to stop
            shutil.rmtree(condemned, ignore_errors=True)

    # ---- reading ----------------------------------------------------------------------------------------------------

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
            aside = self._set_aside(path)
            older = [s for s in self.steps() if s < step]
            next_one = f"step {older[-1]} is tried instead" if older else "there is no older one"
            told = f"checkpoint {path} is damaged: {fault}. It was set aside as {aside.name}; {next_one}."
            warnings.warn(ScbinTrainingWarning("T03", told), stacklevel=2)
        return None

    def load(self, step: int, run: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
        """Return state, tensors and history of a step that `newest` has verified; it must belong to the same run."""
        path = self._path(step)
        state = json.loads((path / _STATE).read_text())
        differences = _differences(state["run"], json.loads(json.dumps(run)))
        if differences:
            told = f"{path} belongs to another run; resumed runs must have the same data and settings. Different: "
            raise ScbinModelError("T03", f"{told}{'; '.join(differences)}. Use these settings, or another save_dir.")
        with safe_open(path / _TENSORS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return state, tensors, json.loads((path / _HISTORY).read_text())

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _set_aside(self, path: Path) -> Path:
        """Rename a damaged checkpoint, so that it is out of the way and yet there to be looked at."""
        taken = {aside.name for aside in self.directory.glob(".bad-*")}
        names = (f".bad-{path.name}{f'-{number}' if number else ''}" for number in range(len(taken) + 1))
        aside = self.directory / next(name for name in names if name not in taken)
        os.rename(path, aside)
        sync_directory(self.directory)
        return aside


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return what differs between two descriptions of a run, one line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        parts = ((before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in sorted({*before, *now}))
        return [line for part in parts for line in _differences(*part)]
    return [] if before == now else [f"{name} was {shown(before)}, is {shown(now)}"]


# ---- the state of networks and optimisers as named tensors ------------------------------------------------------------


def named_state(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of some modules by name, those that are shared once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in modules.items():
        persistent = module.state_dict(keep_vars=True)
        buffers = [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]
        for name, tensor in [*module.named_parameters(), *buffers]:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}.{name}"] = tensor
    return found


def collect_state(weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and the moments of the optimiser by name."""
    tensors = {f"weights.{name}": tensor.detach() for name, tensor in weights.items()}
    for name, tensor in weights.items():
        for key, value in sorted(optimizer.state.get(tensor, {}).items()):
            tensors[f"optimizer.{key}.{name}"] = value.detach()
    return tensors


@torch.no_grad()
def restore_state(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Write back what `collect_state` returned; returns the tensors that are left over."""
    left = dict(tensors)
    for name, tensor in weights.items():
        saved = left.pop(f"weights.{name}", None)
        if saved is None or saved.shape != tensor.shape:
            raise ScbinModelError("T03", f"the checkpoint does not hold {name} of shape {tuple(tensor.shape)}.")
        tensor.copy_(saved)
        keys = [key for key in left if key.startswith("optimizer.") and key.split(".", 2)[2] == name]
        if keys:
            optimizer.state[tensor] = {key.split(".")[1]: left.pop(key).to(tensor.device) for key in keys}
    return left


def fingerprint(tokens: Tokens, cells: np.ndarray, held_out: np.ndarray) -> str:
    """Return the sha256 of who is trained on and held out, and of the tokens of a few thousand cells."""
    rows = np.unique(np.linspace(0, max(tokens.n_cells - 1, 0), min(tokens.n_cells, 4096)).astype(np.int64))
    matrix = tokens.take(rows)
    digest = hashlib.sha256(tokens.vocabulary.sha256.encode())
    for array in (tokens.lengths, cells, held_out, matrix.indices, matrix.data):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).view(np.uint8).data)
    return digest.hexdigest()
