"""The training loop."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from scbin._errors import ScbinInputError, ScbinTrainingError, ScbinTrainingWarning
from scbin.nn.run import Runner, fast_products
from scbin.tokens.tokens import KeptRows
from scbin.train.checkpoint import Checkpoints, collect_state, fingerprint, named_state, restore_state
from scbin.train.distributed import World, joined_world
from scbin.train.history import ProgressBar, history_frame
from scbin.train.randomness import held_out_cells
from scbin.train.task import EVALUATION, Batch, map_tensors, to_device

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import pandas as pd
    from torch import Tensor

    from scbin.nn.network import CellNetwork
    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens
    from scbin.train.settings import Training
    from scbin.train.task import Task

EXIT_RESUMABLE = 75
"""Exit status of a run that was asked to stop and has saved its state: start it again with the same `save_dir`."""

_BETAS, _COUNTS_FACTOR = (0.9, 0.99), 5.0  # of AdamW; on the learning rate of the count head
_CPU_TOKENS = 4096  # activations stay in the caches: 1.05x (tiny) to 1.75x (base) measured
_MOST_SKIPPED = 3  # non-finite steps in a row
_MOST_HELD_OUT, _VALIDATED_AT_ONCE, _MOST_KEPT = 2_000, 256, 10_000  # cells
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def train(
    network: CellNetwork,
    task: Task,
    tokens: Tokens,
    training: Training,
    *,
    cells: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    save_dir: str | os.PathLike[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Train a network, in place.

    What is learned is a function of the data, the settings, the task and the seed: not of the token budget, of the number of
    processes, or of having been interrupted. Under `torchrun` every process calls this with the same arguments.

    Parameters
    ----------
    network
        What is trained; it comes back on the device that it was on.
    task
        What it learns.
    tokens
        The cells; those without tokens are left out.
    training
        How it is trained.
    cells
        Rows to train on. Default: all, but for a fraction that is held out for validation.
    held_out
        Rows to validate on, instead of that fraction.
    save_dir
        Directory for checkpoints; the run continues from the newest valid one.
    device
        Where to compute.
    seed
        Of the order of the cells, of what is hidden, of the held-out cells and of dropout.
    progress
        Show a progress bar.

    Returns
    -------
    The history: row 0 is the network at its start, row k says what step k was like. Columns: step, epoch, loss, the losses by
    name (`loss_genes` ...), gradient norm, whether the step was skipped, learning rate, cells and tokens per second, the
    validation losses by name (`validation_genes` ...) and the one that decides which weights are kept (`validation`).
    """
    home = next(network.parameters()).device
    with joined_world(training.timeout) as world, ExitStack() as stack:
        where = world.device(device)
        store = None if save_dir is None else Checkpoints(save_dir)
        if store is not None and world.is_first:
            stack.enter_context(store)
        stop = stack.enter_context(stop_signals(active=store is not None))
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        world.gather()
        rows = split_cells(tokens, training, seed, cells, held_out)
        trainer = Trainer(network, task, tokens, rows, training, world, where, seed)
        stack.enter_context(fast_products(where, trainer.runner.dtype))
        try:
            return trainer.run(store, stop, progress=progress and world.is_first)
        finally:
            trainer.parts.to(home).eval()


class Trainer:
    """A run: its parts, where it is, and the loop. Its state is three integers: seed, epoch and step."""

    def __init__(
        self, network: Any, task: Any, tokens: Tokens, rows: Any, how: Any, world: World, device: Any, seed: int
    ):
        self.network, self.task, self.tokens = network, task, tokens
        self.world, self.device, self.seed = world, device, seed
        self.cells, self.held_out = rows  # those to train on, and those to validate on
        how = how.complete()  # nothing in it is None that a preset could fill
        self.training, self.runner = how, Runner(network, device, how.precision, trains=True)
        self.validated = KeptRows(tokens, self.held_out) if len(self.held_out) <= _MOST_KEPT else tokens
        self.layer: int | None = getattr(task, "layer", -1)  # whose hidden states the task reads; None: it reads none
        small = device.type == "cpu" and self.layer is not None
        self.budget = min(how.token_budget, _CPU_TOKENS) if small else how.token_budget
        self.parts = nn.ModuleDict({"network": network, "task": task}).to(device).train()
        world.broadcast(self.parts)
        self.weights = named_state(self.parts)
        # biases of attention keys stay: they move every score of a query alike, so their gradient is zero but for rounding, which
        # AdamW would blow up to full steps that differ from machine to machine
        trained = {n: w for n, w in self.weights.items() if w.requires_grad and not n.endswith(".key.bias")}
        self.parameters: list[Any] = list(trained.values())
        self.optimizer = build_optimizer(trained, how.learning_rate, how.weight_decay)
        self.steps_per_epoch = math.ceil(len(self.cells) / how.cells_per_step)
        n_steps = how.epochs * self.steps_per_epoch
        self.n_steps = n_steps if how.max_steps is None else min(n_steps, how.max_steps)
        self.validate_every = how.validate_every or max(25, self.n_steps // 12)
        self.checkpoint_every = how.checkpoint_every or self.steps_per_epoch
        self.patience = math.inf if how.patience is None else how.patience  # validations without a better loss
        self.step, self.history = 0, list[dict[str, float]]()
        self.validations: list[float] = []
        self.best: dict[str, Tensor] = {}  # the weights when the validation loss was least
        self.thread = ThreadPoolExecutor(1)  # prepares batches; one, because numba may not be in two

    @torch.enable_grad()
    def run(self, store: Checkpoints | None, stop: list[int], *, progress: bool) -> pd.DataFrame:
        """Go on from wherever the run is to its end, or until `stop` has a signal."""
        training, world = self.training, self.world
        self.resume(store)
        bar = ProgressBar(self.n_steps, self.step, shown=progress)
        self.callbacks = [bar, *training.callbacks] if world.is_first else []
        try:
            if self.step == 0:
                self.validate()
            started, asked = time.perf_counter(), 0.0
            for epoch, cells, batch in self.prepared(self.steps_left()):
                if self.since_best >= self.patience:
                    break
                *counts, asked = world.sum(np.append(batch.counts, float(len(stop) > 0)))
                if asked:
                    break

                # the gradient of the sum over what is asked / its count, both over all packs and processes
                factors = np.array(self.task.weights) * (np.array(counts) > 0) / np.maximum(counts, 1e-12)
                losses = self.summed(batch, cells, epoch, factors)
                world.sum_gradients(self.parameters)
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, training.clip).to(losses.device)
                size, *values = torch.stack([norm, *world.sum(losses)]).tolist()
                rate = training.learning_rate * learning_rate_factor(self.step, self.n_steps, training)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                finite = math.isfinite(size + sum(values))
                if finite:
                    self.optimizer.step()
                self.step += 1

                seconds, n_tokens = time.perf_counter() - started, sum(pack.n_tokens for pack, _ in batch.packs)
                asked_of = zip(self.task.losses, self.task.weights, counts, values, strict=True)
                row: dict[str, float] = {"step": self.step, "epoch": epoch, "loss": sum(values), "gradient_norm": size}
                row |= {"skipped": int(not finite), "learning_rate": rate, "cells_per_second": len(cells) / seconds}
                row |= {"tokens_per_second": n_tokens * world.size / seconds}
                row |= {f"loss_{name}": loss / weight for name, weight, n, loss in asked_of if n and weight}
                self.record(row)
                self.check_finite(cells)
                last = self.step == self.n_steps
                if last or self.step % self.validate_every == 0:
                    self.validate()
                if last or self.step % self.checkpoint_every == 0 or self.since_best >= self.patience:
                    self.save(store)
                started = time.perf_counter()

            if asked or world.sum(np.array([float(len(stop) > 0)]))[0]:
                self.save(store)
                raise KeyboardInterrupt if stop and stop[0] == signal.SIGINT else SystemExit(EXIT_RESUMABLE)
        finally:
            self.thread.shutdown()
            bar.bar.close()
        with torch.no_grad():
            for name, tensor in self.best.items():
                self.weights[name].copy_(tensor)
        return history_frame(self.history)

    def summed(self, batch: Batch, cells: np.ndarray, epoch: int, factors: np.ndarray) -> Tensor:
        """Return the losses of a batch (losses,) times their factors; in training, leave the gradient in the parameters.

        Both are the same for any packs: a batch that runs out of memory is tried again in smaller ones.
        """
        on_device = to_device(_pinned(torch.from_numpy(factors.astype(np.float32)), self.device), self.device)
        while True:
            try:
                sums = torch.zeros(len(factors), device=self.device)
                self.parts.zero_grad()
                for number, packed in enumerate(batch.packs):
                    key = np.random.SeedSequence([self.seed, self.step, number, self.world.rank])
                    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))
                    losses = self.losses_of(packed)
                    if losses.requires_grad:  # not in validation, nor where nothing is asked
                        (losses * on_device).sum().backward()
                    sums += losses.detach()
                    del losses
                return sums * on_device
            except RuntimeError as error:
                self.halve_budget(batch, error)
            # out of the except clause, the tensors of the step that failed are gone
            batch = self.thread.submit(self.prepare, self.world.share(cells), epoch).result()

    def halve_budget(self, batch: Batch, error: RuntimeError) -> None:
        """Go on with half as many tokens at once as this batch had, or raise where it was one cell or the error is another one."""
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise error
        longest, largest = (max(of(pack.layout.lengths) for pack, _ in batch.packs) for of in (max, sum))
        if largest == longest:
            told = f"one cell of {longest:,} tokens does not fit into the memory of {self.device}."
            raise ScbinTrainingError("T02", f"{told} Take a smaller network, or fewer genes.") from error
        self.budget = max(min(self.budget, largest // 2), longest)
        told = f"out of memory: continuing with at most {self.budget:,} tokens at once. Apart from dropout, results do not change."
        warnings.warn(ScbinTrainingWarning("T02", told), stacklevel=2)

    def losses_of(self, packed: tuple[Pack, Any]) -> Tensor:
        """Return the summed losses of a pack (losses,), from the host to the device and through the network."""
        pack, targets = to_device(packed, self.device)
        hidden = None if self.layer is None else self.runner(pack, self.layer)
        with self.runner.autocast():
            return self.task.loss(self.network, hidden, pack, targets).float()

    # ---- batches ----------------------------------------------------------------------------------------------------

    def steps_left(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield epoch and cells, over all processes, of each step that is left: a function of (seed, step)."""
        first, within = divmod(self.step, self.steps_per_epoch)
        orders = ((epoch, self.tokens.epoch_order(self.cells, self.seed, epoch)) for epoch in count(first))
        size = self.training.cells_per_step
        steps = ((epoch, order[k : k + size]) for epoch, order in orders for k in range(0, len(order), size))
        return islice(steps, within, within + self.n_steps - self.step)

    def prepared(self, steps: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray, Batch]]:
        """Yield epoch, cells and this process's batch of each step; the next one is prepared in a thread meanwhile."""
        submitted = ((e, cells, self.thread.submit(self.prepare, self.world.share(cells), e)) for e, cells in steps)
        ahead = next(submitted, None)
        while ahead is not None:
            (epoch, cells, batch), ahead = ahead, next(submitted, None)
            yield epoch, cells, batch.result()

    def prepare(self, cells: np.ndarray, epoch: int) -> Batch:
        """Hide tokens of some cells and pack them."""
        tokens: Any = self.validated if epoch == EVALUATION else self.tokens
        batch = self.task.prepare(tokens, cells, seed=self.seed, epoch=epoch, token_budget=self.budget)
        return Batch(_pinned(batch.packs, self.device), batch.counts)

    # ---- the record -------------------------------------------------------------------------------------------------

    def record(self, row: dict[str, float]) -> None:
        """Add to the history, and show it; what concerns the last step again is added to its row."""
        if self.history and self.history[-1]["step"] == row["step"]:
            self.history[-1] |= row
        else:
            self.history.append(dict(row))
        for callback in self.callbacks:
            callback(dict(row))

    def check_finite(self, cells: np.ndarray) -> None:
        """Stop the run where too many steps in a row were not finite; these are the cells of the last one."""
        last = self.history[-_MOST_SKIPPED:]
        if len(last) == _MOST_SKIPPED and all(row.get("skipped") for row in last):
            told = f"loss or gradient was not finite in {_MOST_SKIPPED} steps in a row; none of them changed the weights. Try a"
            names = ", ".join(str(name) for name in self.tokens.names[cells[:20]])
            told += f" smaller learning_rate or precision='float32'. The cells of the last one: {names}."
            raise ScbinTrainingError("T01", told)

    def validate(self) -> None:
        """Score the held-out cells, whose masks never change, and keep the weights if they are the best so far."""
        if not len(self.held_out):
            return
        parts = np.split(self.held_out, range(_VALIDATED_AT_ONCE, len(self.held_out), _VALIDATED_AT_ONCE))
        sums, n = torch.zeros(len(self.task.losses), device=self.device), np.zeros(len(self.task.losses))
        self.parts.eval()
        with torch.no_grad():
            for epoch, cells, batch in self.prepared((EVALUATION, part) for part in parts):
                n += batch.counts
                sums += self.summed(batch, cells, epoch, np.ones(len(n)))
        self.parts.train()
        total, n = self.world.sum(np.stack([sums.double().cpu().numpy(), n]))
        means = {name: float(t / c) for name, t, c in zip(self.task.losses, total, n, strict=True) if c}
        weighted = sum(w * means.get(name, 0.0) for name, w in zip(self.task.losses, self.task.weights, strict=True))
        row: dict[str, float] = {"step": self.step, "epoch": max(self.step - 1, 0) // self.steps_per_epoch}
        row |= {f"validation_{name}": mean for name, mean in means.items()}
        self.validations.append(means.get(getattr(self.task, "watched", None) or "", weighted))
        self.record(row | {"validation": self.validations[-1]})
        if self.patience < math.inf and self.since_best == 0:
            self.best = {name: tensor.detach().clone() for name, tensor in self.weights.items()}

    @property
    def since_best(self) -> int:
        """Validations since the one with the least loss."""
        losses = np.nan_to_num(self.validations, nan=np.inf)
        return len(losses) - 1 - int(losses.argmin()) if len(losses) else 0

    # ---- the state --------------------------------------------------------------------------------------------------

    def resume(self, store: Checkpoints | None) -> None:
        """Go on from the newest sound checkpoint, if there is one; all processes have to train the same."""
        task = {"losses": list(self.task.losses), "weights": [float(w) for w in self.task.weights]}
        n_weights = sum(tensor.numel() for tensor in self.weights.values())
        self.about = {
            "seed": self.seed,
            "training": self.training.learned(),
            "task": task | (self.task.describe() if hasattr(self.task, "describe") else {}),
            "network": {"backbone": self.network.backbone.config(), "size": n_weights},
            "vocabulary": self.tokens.vocabulary.sha256,
            "data": fingerprint(self.tokens, self.cells, self.held_out),
        }
        self.world.check_same(self.about)
        newest = self.world.gather(store.newest() if store is not None and self.world.is_first else None)[0]
        if newest is not None and store is not None:
            self.step, (tensors, self.history) = newest, store.load(newest, self.about)
            restore_state(tensors, self.weights, self.optimizer)
            self.validations = [row["validation"] for row in self.history if "validation" in row]
            self.best = {n: tensors[f"best.{n}"].to(self.device) for n in self.weights if f"best.{n}" in tensors}

    def save(self, store: Checkpoints | None) -> None:
        """Write a checkpoint; the other processes wait."""
        if store is not None and self.world.is_first:
            best = {f"best.{name}": tensor for name, tensor in self.best.items()}
            about = {"epoch": self.step // self.steps_per_epoch, "step": self.step, "run": self.about}
            store.save(about, collect_state(self.weights, self.optimizer) | best, self.history)
        self.world.gather()


# ---- cells, rates, generators, signals ----------------------------------------------------------------------------------


def split_cells(
    tokens: Tokens, training: Training, seed: int, cells: np.ndarray | None = None, held_out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and those held out: the ones given, or a fraction that depends on (seed, cell) alone."""
    filled = np.flatnonzero(tokens.lengths)
    cells = filled if cells is None else np.intersect1d(cells, filled)
    if held_out is None:
        fraction = min(training.held_out, _MOST_HELD_OUT / max(len(cells), 1))
        held_out = cells[held_out_cells(tokens.n_cells, fraction, seed)[cells]]
        held_out = held_out[len(held_out) == len(cells) :]  # one is left to train on
    cells, held_out = np.setdiff1d(cells, held_out), np.intersect1d(held_out, filled)
    if not len(cells):
        told = "there is no cell to train on: every token row is empty or held out. See obs['scbin_status']."
        raise ScbinInputError("I47", told)
    return cells, held_out


def learning_rate_factor(step: int, n_steps: int, training: Any) -> float:
    """Return the fraction of the peak learning rate at a step, counted from 0."""
    warmup = training.warmup
    n_warm = math.ceil(warmup * n_steps) if warmup < 1 else int(warmup)
    if step < n_warm:
        return (step + 1) / n_warm
    progress = min((step - n_warm) / max(n_steps - n_warm, 1), 1.0)
    return 1 - progress if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(named: dict[str, Tensor], rate: float, decay: float) -> torch.optim.AdamW:
    """Return a fused AdamW. Biases and norms do not decay; the count head learns faster than the rest."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in named.items():
        factor = _COUNTS_FACTOR if name.startswith("network.counts.") else 1.0
        decays = parameter.ndim > 1 and not name.endswith("bias")
        groups.setdefault((factor, decay if decays else 0.0), []).append(parameter)
    by_group = [{"params": p, "factor": factor, "weight_decay": decay} for (factor, decay), p in groups.items()]
    return torch.optim.AdamW(by_group, lr=rate, betas=_BETAS, fused=True)


def _pinned(value: Any, device: torch.device) -> Any:
    """Return tensors in memory from which a GPU can copy without waiting."""
    return map_tensors(value, lambda tensor: tensor.pin_memory()) if device.type == "cuda" else value


@contextmanager
def stop_signals(*, active: bool) -> Iterator[list[int]]:
    """Collect the signals that ask a run to stop: SIGTERM, SIGUSR1 and Ctrl-C; a second Ctrl-C does not wait.

    Only the main thread may listen, and only runs with a directory have something to save: otherwise nothing is set.
    """
    received: list[int] = []

    def note(number: int, frame: Any = None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    listens = active and threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if listens and hasattr(signal, name)]
    former = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
