"""The training loop."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scbin._errors import ScbinInputError, ScbinTrainingError, ScbinTrainingWarning
from scbin.nn.run import Runner
from scbin.train.checkpoint import Checkpoints, collect_state, fingerprint, named_state, restore_state
from scbin.train.distributed import World, joined_world
from scbin.train.history import History, boards
from scbin.train.masking import epoch_order, held_out_cells
from scbin.train.task import EVALUATION, Batch, map_tensors, to_device

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pandas as pd
    from torch import Tensor

    from scbin.nn.network import CellNetwork
    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens
    from scbin.train.settings import Training
    from scbin.train.task import Task

EXIT_RESUMABLE = 75
"""Exit status of a run that was asked to stop and has saved its state: start it again with the same `save_dir`."""

# on a CPU activations stay in the caches and the allocator's hands: 1.05x (tiny) to 1.75x (base) measured
_CPU_TOKENS = 4096
_MOST_SKIPPED = 3  # non-finite steps in a row
_VALIDATED_AT_ONCE = 256  # cells
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def train(
    network: CellNetwork,
    task: Task,
    tokens: Tokens,
    training: Training,
    *,
    cells: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    save_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
    callbacks: Sequence[Callable[[Mapping[str, float]], None]] = (),
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
        Directory for checkpoints.
    resume
        Go on from the newest sound checkpoint there; `False` is an error where there are checkpoints.
    device
        Where to compute.
    seed
        Of the order of the cells, of what is hidden, of the held-out cells and of dropout.
    progress
        Show a progress bar.
    callbacks
        Called with the record of every step and of every validation, in the first process.

    Returns
    -------
    The history: row 0 is the network at its start, row k says what step k was like. Columns: step, epoch, loss, the losses by
    name (`loss_genes` ...), gradient norm, whether the step was skipped, learning rate, cells and tokens per second, the
    validation losses by name (`validation_genes` ...) and the one that decides which weights are kept (`validation`).
    """
    home = next(network.parameters()).device
    with joined_world(training.timeout) as world:
        where = world.device(device)
        store = None if save_dir is None else Checkpoints(save_dir, training.keep_checkpoints)
        with (
            store if store is not None and world.is_first else nullcontext(),
            StopRequest(store is not None) as stop,
            _private_generators(where),
            _trainable(network, task, training),
        ):
            world.barrier()
            try:
                trainer = Trainer(network, task, tokens, training, world, where, seed, cells, held_out)
                trainer.store, trainer.stop = store, stop
                trainer.callbacks = [*callbacks, *training.callbacks] if world.is_first else []
                return trainer.run(resume=resume, progress=progress)
            finally:
                for module in (network, task):
                    module.to(home).eval()  # type: ignore[union-attr]


class Trainer:
    """A run: its parts, where it is, and the loop. Its state is three integers: seed, epoch and step."""

    def __init__(
        self,
        network: CellNetwork,
        task: Task,
        tokens: Tokens,
        training: Training,
        world: World,
        device: torch.device,
        seed: int,
        cells: np.ndarray | None = None,
        held_out: np.ndarray | None = None,
    ):
        self.network, self.tokens, self.world, self.device, self.seed = network, tokens, world, device, seed
        self.task: Any = task.to(device)  # type: ignore[attr-defined]
        self.cells, self.held_out = split_cells(tokens, training, seed, cells, held_out)
        how: Any = training.complete()  # nothing in it is None that a preset could fill
        self.training, self.runner = how, Runner(network, device, how.precision)
        self.layer: int | None = getattr(task, "layer", -1)  # whose hidden states the task reads; None: it reads none
        for module in (network, self.task):
            world.broadcast(module.train())
        self.weights = named_state({"network": network, "task": self.task})
        trained = [(name, p) for name, p in self.weights.items() if p.requires_grad]
        self.parameters: list[Any] = [p for _, p in trained]
        self.optimizer: Any = build_optimizer(trained, how)
        self.steps_per_epoch = -(-len(self.cells) // how.cells_per_step)
        most = math.inf if how.max_steps is None else how.max_steps
        self.n_steps = int(min(how.epochs * self.steps_per_epoch, most))
        self.validate_every = how.validate_every or max(25, self.n_steps // 12)
        self.checkpoint_every = how.checkpoint_every or self.steps_per_epoch
        self.patience = math.inf if how.patience is None else how.patience  # validations without a better loss
        self.step, self.budget, self.history = 0, how.token_budget, History()
        self.validations: list[float] = []
        self.best: dict[str, Tensor] = {}  # the weights when the validation loss was least
        self.store: Checkpoints | None = None
        self.stop = StopRequest()
        self.callbacks: list[Callable[[Mapping[str, float]], None]] = []
        self._order: tuple[int, np.ndarray] = (-1, self.cells)
        self._ahead: tuple[int, int, Future[Batch]] | None = None  # step, budget, its batch
        self._pending: tuple[dict[str, float], np.ndarray, Tensor, Any] | None = None

    @torch.enable_grad()
    def run(self, *, resume: bool = True, progress: bool = True) -> pd.DataFrame:
        """Go on from wherever the run is to its end."""
        training, world, on_gpu = self.training, self.world, self.device.type == "cuda"
        self.resume(resume)
        shown: list[Any] = []
        with ThreadPoolExecutor(1) as self.thread:
            try:
                if world.is_first:
                    shown += boards(training, self.n_steps, self.step, progress)
                self.callbacks = [*shown, *self.callbacks]
                self.fit_memory()
                if self.step == 0 and len(self.held_out):
                    self.validate()
                self.clock = time.perf_counter()

                while self.step < self.n_steps and self.since_best < self.patience:
                    batch = self.next_batch()
                    *counts, asked = world.sum_host(np.append(batch.counts, self.stop.signal is not None))
                    if asked:
                        break

                    # the gradient of the sum over what is asked / its count, both over all packs and processes
                    cells = world.share(self.cells_of(self.step))
                    losses, batch = self.gradients(batch, np.array(counts), cells)
                    factor = learning_rate_factor(self.step, self.n_steps, training.warmup, training.schedule)
                    rate = training.learning_rate * factor
                    for group in self.optimizer.param_groups:
                        group["lr"] = rate * group["factor"]
                    gradients = [p.grad for p in self.parameters if p.grad is not None]
                    norm = torch.nn.utils.get_total_norm(gradients) if gradients else losses.new_zeros(())
                    torch.nn.utils.clip_grads_with_norm_(self.parameters, training.clip, norm)
                    finite = torch.isfinite(losses).all() & torch.isfinite(norm)
                    if on_gpu:  # nothing here waits for the GPU: the optimiser itself skips where found_inf is set
                        self.optimizer.found_inf = (~finite).float()
                        self.optimizer.step()
                    elif finite:
                        self.optimizer.step()
                    self.step += 1

                    self.settle()  # on a GPU the step before, whose numbers are here by now
                    numbers = torch.cat([torch.stack([losses.sum(), norm, finite.float()]), losses])
                    self.note(batch, np.array(counts), numbers, rate)
                    last = self.step == self.n_steps
                    validates = len(self.held_out) > 0 and (last or self.step % self.validate_every == 0)
                    saves = last or self.step % self.checkpoint_every == 0
                    if validates or saves or not on_gpu:
                        self.settle()
                    if validates:
                        self.validate()
                    if saves or self.since_best >= self.patience:
                        self.save()
                    if validates or saves:  # which is no part of the time of the next step
                        self.clock = time.perf_counter()

                self.settle()
                if world.sum_host(np.array([float(self.stop.signal is not None)]))[0]:
                    self.save()
                    self.stop.obey()
            finally:
                for callback in shown:
                    callback.close()
        with torch.no_grad():
            for name, tensor in self.best.items():
                self.weights[name].copy_(tensor)
        return self.history.frame()

    def gradients(
        self, batch: Batch, counts: np.ndarray, cells: np.ndarray, world: World | None = None
    ) -> tuple[Tensor, Batch]:
        """Leave the gradient of a step in the parameters, the same for any packs and number of processes.

        Returns the weighted losses over all processes by name, each divided by its count, on the device. Alone, a step that runs
        out of memory is tried again with half the token budget; the batch of these cells that was used is returned too.
        """
        world = self.world if world is None else world
        factors = np.array(self.task.weights) * (counts > 0) / np.maximum(counts, 1e-12)
        on_device = to_device(_pinned(torch.from_numpy(factors.astype(np.float32)), self.device), self.device)
        while True:
            try:
                for parameter in self.parameters:
                    parameter.grad = None
                sums = torch.zeros(len(factors), device=self.device)
                for number, packed in enumerate(batch.packs):
                    _seed_generators(self.device, self.seed, self.step, number, world.rank)
                    losses = self.losses_of(packed)
                    if losses.requires_grad:  # not where nothing is asked
                        (losses * on_device).sum().backward()
                    sums += losses.detach()
                    del losses
                break
            except RuntimeError as error:
                if world.size > 1 or not any(words in str(error) for words in _OUT_OF_MEMORY):
                    raise  # one process of several that tries again would leave the others waiting
                self.halve_budget(max(max(pack.layout.lengths) for pack, _ in batch.packs), error)
            batch = self.thread.submit(self.prepare, cells, self.step // self.steps_per_epoch, self.budget).result()
        world.sum_gradients(self.parameters)
        return world.sum_device(sums) * on_device, batch

    def losses_of(self, packed: tuple[Pack, Any]) -> Tensor:
        """Return the summed losses of a pack (losses,), from the host to the device and through the network."""
        pack, targets = to_device(packed, self.device)
        checkpoint: dict[str, Any] = {"checkpoint": True} if self.training.gradient_checkpointing else {}
        hidden = None if self.layer is None else self.runner(pack, self.layer, **checkpoint)
        with self.runner.autocast():
            return self.task.loss(self.network, hidden, pack, targets).float()

    # ---- batches ----------------------------------------------------------------------------------------------------

    def next_batch(self) -> Batch:
        """Return what this process does in the step; that of the next one is prepared in a thread meanwhile."""

        def begin(step: int) -> tuple[int, int, Future[Batch]]:
            share, epoch = self.world.share(self.cells_of(step)), step // self.steps_per_epoch
            return step, self.budget, self.thread.submit(self.prepare, share, epoch, self.budget)

        fits = self._ahead is not None and self._ahead[:2] == (self.step, self.budget)
        ahead = self._ahead if self._ahead is not None and fits else begin(self.step)
        self._ahead = begin(self.step + 1) if self.step + 1 < self.n_steps else None
        return ahead[2].result()

    def prepare(self, cells: np.ndarray, epoch: int, budget: int) -> Batch:
        """Hide tokens of some cells and pack them. Always called in the same thread, because numba may not be in two."""
        budget = min(budget, _CPU_TOKENS) if self.device.type == "cpu" and self.layer is not None else budget
        batch = self.task.prepare(self.tokens, cells, seed=self.seed, epoch=epoch, token_budget=budget)
        return Batch(_pinned(batch.packs, self.device), batch.counts)

    def cells_of(self, step: int) -> np.ndarray:
        """Return the cells of a step over all processes, a function of (seed, step)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        current, order = self._order
        if current != epoch:
            ordered = getattr(self.task, "order", None) or getattr(self.tokens, "order", None) or epoch_order
            order = ordered(self.cells, self.seed, epoch)
            self._order = epoch, order
        n = self.training.cells_per_step
        return order[within * n : (within + 1) * n]

    # ---- memory -----------------------------------------------------------------------------------------------------

    def fit_memory(self) -> None:
        """Try the largest pack forward and backward on a GPU, so that memory is short now, in every process, or never."""
        if self.device.type != "cuda":
            return
        lengths = self.tokens.lengths[self.cells]
        order = np.argsort(-lengths, kind="stable")
        n = int(np.searchsorted(np.cumsum(lengths[order]), self.budget)) + 1
        cells = self.cells[order[: min(n, self.training.cells_per_step)]]
        batch = self.thread.submit(self.prepare, cells, self.step // self.steps_per_epoch, self.budget).result()
        self.gradients(batch, np.maximum(batch.counts, 1), cells, World())
        self.budget = self.world.min_host(self.budget)
        for parameter in self.parameters:
            parameter.grad = None

    def halve_budget(self, longest: int, error: RuntimeError) -> None:
        """Go on with half the token budget, or say which cell does not fit."""
        if self.budget <= longest:
            told = f"one cell of {longest:,} tokens does not fit into the memory of {self.device}."
            advice = "Use a smaller network, gradient_checkpointing=True, or fewer genes."
            raise ScbinTrainingError("T02", f"{told} {advice}") from error
        self.budget = max(self.budget // 2, longest)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        told = f"out of memory: going on with at most {self.budget:,} tokens at once. But for dropout, this changes nothing."
        warnings.warn(ScbinTrainingWarning("T02", told), stacklevel=2)

    # ---- the record -------------------------------------------------------------------------------------------------

    def note(self, batch: Batch, counts: np.ndarray, numbers: Tensor, rate: float) -> None:
        """Keep the numbers of a step; on a GPU they travel to the host while the next step is launched."""
        n_tokens = sum(sum(pack.layout.lengths) for pack, _ in batch.packs) * self.world.size
        row = {"step": self.step, "epoch": (self.step - 1) // self.steps_per_epoch, "learning_rate": rate}
        row |= {"cells_per_second": len(self.cells_of(self.step - 1)), "tokens_per_second": n_tokens}
        arrived = None
        if numbers.is_cuda:
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending = row, counts, numbers, arrived

    def settle(self) -> None:
        """Record the step whose numbers were kept, and stop the run where too many in a row were not finite."""
        if self._pending is None:
            return
        known, counts, numbers, arrived = self._pending
        self._pending = None
        if arrived is not None:
            arrived.synchronize()
        now = time.perf_counter()
        seconds, self.clock = max(now - self.clock, 1e-9), now
        total, norm, finite, *losses = numbers.tolist()
        row = {"step": known["step"], "epoch": known["epoch"], "loss": total}
        for name, weight, n, loss in zip(self.task.losses, self.task.weights, counts, losses, strict=True):
            if n and weight:
                row[f"loss_{name}"] = loss / weight
        row |= {"gradient_norm": norm, "skipped": int(not finite), "learning_rate": known["learning_rate"]}
        row |= {name: known[name] / seconds for name in ("cells_per_second", "tokens_per_second")}
        self.history.add(row, self.callbacks)
        last = self.history.rows[-_MOST_SKIPPED:]
        if len(last) == _MOST_SKIPPED and all(before.get("skipped") for before in last):
            cells = np.concatenate([self.cells_of(int(before["step"]) - 1) for before in last])
            names = [str(name) for name in self.tokens.names[cells[:20]]]
            raise ScbinTrainingError(
                "T01",
                f"loss or gradient was not finite in {_MOST_SKIPPED} steps in a row; none of them changed the weights. Try a "
                f"smaller learning_rate or precision='float32'. Their cells: {', '.join(names)}{' ...' * (len(cells) > 20)}",
            )

    def validate(self) -> None:
        """Score the held-out cells, whose masks never change, and keep the weights if they are the best so far."""
        for module in (self.network, self.task):
            module.eval()
        parts = np.split(self.held_out, range(_VALIDATED_AT_ONCE, len(self.held_out), _VALIDATED_AT_ONCE))
        shares = [self.world.share(part) for part in parts]
        sums, n = torch.zeros(len(self.task.losses), device=self.device), np.zeros(len(self.task.losses))
        following = self.thread.submit(self.prepare, shares[0], EVALUATION, self.budget)
        for number in range(1, len(shares) + 1):
            batch = following.result()
            if number < len(shares):
                following = self.thread.submit(self.prepare, shares[number], EVALUATION, self.budget)
            n += batch.counts
            with torch.no_grad():
                for packed in batch.packs:
                    sums += self.losses_of(packed)
        for module in (self.network, self.task):
            module.train()
        total, n = self.world.sum_host(np.stack([sums.double().cpu().numpy(), n]))
        means = {name: t / c for name, t, c in zip(self.task.losses, total, n, strict=True) if c}
        weighted = sum(w * means.get(name, 0.0) for name, w in zip(self.task.losses, self.task.weights, strict=True))
        watched = means.get(getattr(self.task, "watched", None) or "", weighted)
        epoch = max(self.step - 1, 0) // self.steps_per_epoch
        row = {"step": self.step, "epoch": epoch, **{f"validation_{name}": mean for name, mean in means.items()}}
        self.history.add({**row, "validation": float(watched)}, self.callbacks)
        self.validations.append(float(watched))
        if self.patience < math.inf and self.since_best == 0:
            self.best = {name: tensor.detach().clone() for name, tensor in self.weights.items()}

    @property
    def since_best(self) -> int:
        """Validations since the one with the least loss."""
        losses = [loss if math.isfinite(loss) else math.inf for loss in self.validations]
        return len(losses) - 1 - int(np.argmin(losses)) if losses else 0

    # ---- the state --------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return what must be the same for a run to be gone on with."""
        task, backbone = self.task, self.network.backbone
        own = task.describe() if hasattr(task, "describe") else {}
        return {
            "seed": self.seed,
            "training": self.training.learned(),
            "task": {"losses": list(task.losses), "weights": [float(w) for w in task.weights], **own},
            "network": {"backbone": backbone.config(), "size": sum(tensor.numel() for tensor in self.weights.values())},
            "vocabulary": self.tokens.vocabulary.sha256,
            "data": fingerprint(self.tokens, self.cells, self.held_out),
        }

    def resume(self, wanted: bool = True) -> None:
        """Go on from the newest sound checkpoint, if there is one; all processes have to train the same."""
        self.about, found = self.describe(), 0
        self.world.check_same(json.dumps(self.about, sort_keys=True))
        if self.store is None:
            return
        if self.world.is_first:
            if self.store.steps() and not wanted:
                told = f"{self.store.directory} holds a run already: pass resume=True to go on with it, or another save_dir."
                raise ScbinInputError("A03", told)
            newest = self.store.newest()
            found = -1 if newest is None else newest
        found = int(self.world.sum_host(np.array([found]))[0])
        if found >= 0:
            state, tensors, history = self.store.load(found, self.about)
            left = restore_state(tensors, self.weights, self.optimizer)
            self.best = {name.removeprefix("best."): tensor.to(self.device) for name, tensor in left.items()}
            self.step, self.budget, self.history = state["step"], state["token_budget"], History(history)
            self.validations = [loss for _, loss in self.history.values("validation")]

    def save(self) -> None:
        """Write a checkpoint; the other processes wait."""
        if self.store is None:
            return
        if self.world.is_first:
            tensors = collect_state(self.weights, self.optimizer)
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
            place = {"seed": self.seed, "epoch": self.step // self.steps_per_epoch, "step": self.step}
            state = {**place, "token_budget": self.budget, "run": self.about}
            self.store.save(state, tensors, self.history.to_dict())
        self.world.barrier()


# ---- cells, rates, generators, signals ----------------------------------------------------------------------------------


def split_cells(
    tokens: Tokens, training: Training, seed: int, cells: np.ndarray | None = None, held_out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and those held out: the ones given, or a fraction that depends on (seed, cell) alone."""
    filled = np.flatnonzero(tokens.lengths)
    cells = filled if cells is None else np.intersect1d(np.asarray(cells), filled)
    if held_out is not None:
        cells, held_out = np.setdiff1d(cells, held_out), np.intersect1d(held_out, filled)
    else:
        fraction = min(training.held_out, training.most_held_out / max(len(cells), 1))
        chosen = held_out_cells(tokens.n_cells, fraction, seed)[cells]
        chosen[:1] &= not chosen.all()
        cells, held_out = cells[~chosen], cells[chosen]
    if not len(cells):
        told = "there is no cell to train on: every token row is empty or held out. See obs['scbin_status']."
        raise ScbinInputError("I47", told)
    return cells, held_out


def learning_rate_factor(step: int, n_steps: int, warmup: float, schedule: str) -> float:
    """Return the fraction of the peak learning rate at a step (counted from 0).

    Examples
    --------
    >>> [learning_rate_factor(step, 10, 2, "linear") for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    n_warm = math.ceil(warmup * n_steps) if warmup < 1 else int(warmup)
    if step < n_warm:
        return (step + 1) / n_warm
    if schedule == "constant":
        return 1.0
    progress = (step - n_warm) / max(n_steps - n_warm, 1)
    return max(1 - progress, 0.0) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def build_optimizer(named: list[tuple[str, Tensor]], training: Training) -> torch.optim.AdamW:
    """Return a fused AdamW whose groups are by factor on the learning rate and by weight decay; biases and norms have none."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in named:
        decays = parameter.ndim > 1 and not name.endswith("bias")
        key = _factor(name, training.rates or {}), (training.weight_decay or 0.0) if decays else 0.0
        groups.setdefault(key, []).append(parameter)
    by_group = [{"params": p, "weight_decay": decay, "factor": factor} for (factor, decay), p in groups.items()]
    rate = training.learning_rate or 0.0
    return torch.optim.AdamW(by_group, lr=rate, betas=training.betas, eps=training.epsilon, fused=True)


def _factor(name: str, rates: Mapping[str, float]) -> float:
    """Return the factor on the learning rate of a parameter: that of the longest part its name begins with."""
    parts = name.split(".")[1:]  # without "network" or "task"
    fitting = [part for part in rates if parts[: part.count(".") + 1] == part.split(".")]
    return float(rates[max(fitting, key=len)]) if fitting else 1.0


@contextmanager
def _trainable(network: CellNetwork, task: Any, training: Training) -> Iterator[None]:
    """Freeze what is not to move, and compile, for the time of a run.

    The biases of the keys are frozen: they move every score of a query alike, so their gradient is zero but for rounding, which
    AdamW would blow up to full steps that differ from machine to machine.
    """
    modules, rates, backbone = {"network": network, "task": task}, training.rates or {}, network.backbone
    named = [(f"{prefix}.{name}", p) for prefix, module in modules.items() for name, p in module.named_parameters()]
    for part in rates:
        if not any(_factor(name, {part: -1.0}) < 0 for name, _ in named):
            parts = ", ".join(sorted({name.split(".")[1] for name, _ in named}))
            raise ScbinInputError("A06", f"rates has {part!r}, but no parameter begins so. The network has: {parts}.")
    fixed = [p for name, p in named if name.endswith(".key.bias") or _factor(name, rates) == 0]
    fixed = [p for p in fixed if p.requires_grad]
    blocks = backbone.named_modules() if training.compile else []  # type: ignore[attr-defined]
    compiled = [block for name, block in blocks if name.endswith((".intermediate", ".output"))]
    for parameter in fixed:
        parameter.requires_grad_(False)
    for block in compiled:
        block.compile(dynamic=True)
    try:
        yield
    finally:
        for parameter in fixed:
            parameter.requires_grad_(True)
        for block in compiled:
            block._compiled_call_impl = None


@contextmanager
def _private_generators(device: torch.device) -> Iterator[None]:
    """Put torch's generators back as they were: the user's own random numbers do not feel the training."""
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    if mps is not None:
        torch.mps.set_rng_state(mps)


def _seed_generators(device: torch.device, *numbers: int) -> None:
    """Seed torch as a function of (seed, step, pack, process)."""
    seed = int(np.random.SeedSequence([number % 2**63 for number in numbers]).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _pinned(value: Any, device: torch.device) -> Any:
    """Return tensors in memory from which a GPU can copy without waiting."""
    return map_tensors(value, lambda tensor: tensor.pin_memory()) if device.type == "cuda" else value


class StopRequest:
    """Which signal asked the run to stop, if one did; as a context manager it listens to SIGTERM, SIGUSR1 and Ctrl-C.

    Only the main thread may listen, and only runs with a directory have something to save: otherwise nothing is set.
    """

    def __init__(self, active: bool = False) -> None:
        self.signal: int | None = None
        names = ("SIGTERM", "SIGUSR1", "SIGINT")
        listens = active and threading.current_thread() is threading.main_thread()
        self.numbers = [getattr(signal, name) for name in names if listens and hasattr(signal, name)]

    def __enter__(self) -> StopRequest:
        self.former = {number: signal.signal(number, self.note) for number in self.numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: Any = None) -> None:
        """Remember the signal; a second Ctrl-C does not wait for the end of the step."""
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def obey(self) -> None:
        """Leave as the signal asks."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(EXIT_RESUMABLE)
