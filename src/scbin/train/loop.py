"""The training loop."""

from __future__ import annotations

import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scbin._errors import ScbinInputError, ScbinTrainingError, ScbinTrainingWarning
from scbin.data.masking import EVALUATION
from scbin.nn.attention import to_device
from scbin.nn.device import resolve_precision
from scbin.train.best import Best
from scbin.train.distributed import World, joined_world
from scbin.train.history import Board, History, peak_flops
from scbin.train.memory import fit_budget, is_out_of_memory
from scbin.train.pending import Pending
from scbin.train.schedule import build_optimizer, learning_rate_factor, set_learning_rate
from scbin.train.setup import own_device, ready, seen_genes, split
from scbin.train.signals import StopRequest, stop_requests
from scbin.train.state import Checkpoints, Progress, collect_state, fingerprint, restore_state
from scbin.train.step import Share, StepLosses, Stepper, prepare_share, private_generators

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    import pandas as pd
    from scipy.sparse import csr_matrix
    from transformers import BertForMaskedLM

    from scbin.train.objective import Objective
    from scbin.train.settings import TrainSettings

# activations stay in the caches and the allocator's hands: 1.05x (tiny) to 1.75x (base) measured
_PACK_TOKENS_CPU = 4096
_MOST_SKIPPED = 3  # non-finite steps in a row


def train(
    bert: BertForMaskedLM,
    objective: Objective,
    tokens: csr_matrix,
    settings: TrainSettings,
    *,
    cells: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    cell_names: Sequence[str] | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> pd.DataFrame:
    """Train a network, in place.

    What is learned is a function of the data, the settings and the objective: not of the token budget, of the number of
    processes, or of having been interrupted. Under `torchrun` every process calls this with the same arguments.

    Parameters
    ----------
    bert
        The network.
    objective
        What to learn.
    tokens
        Token matrix; empty rows are left out.
    settings
        How to train.
    cells
        Rows to train on. Default: all that are not empty. A share of them is held out for validation.
    held_out
        Rows to validate on, instead of that share.
    cell_names
        Names of the rows, for messages.
    on_step
        Called with the record of every step, on the first process.

    Returns
    -------
    The history: one row per step with step, epoch, loss, loss per task (`loss_genes` ...), learning rate, gradient norm,
    cells and tokens per second, whether the step was skipped, and validation losses (`validation_genes` ...).
    """
    with joined_world() as world, ready(bert, settings):
        run = _Run(
            bert,
            objective,
            tokens,
            settings,
            world,
            cells=cells,
            held_out=held_out,
            cell_names=cell_names,
            on_step=on_step,
        )
        checkpoints = None if settings.save_dir is None else Checkpoints(settings.save_dir, settings.keep)
        try:
            if checkpoints is not None and world.is_first:
                checkpoints.open()
            world.barrier()
            with stop_requests(checkpoints is not None) as request, private_generators(run.device):
                return run.go(checkpoints, request)
        finally:
            if checkpoints is not None:
                checkpoints.close()


class _Run:
    """The pieces of a run, and where it is."""

    def __init__(
        self,
        bert: BertForMaskedLM,
        objective: Objective,
        tokens: csr_matrix,
        settings: TrainSettings,
        world: World,
        *,
        cells: np.ndarray | None,
        held_out: np.ndarray | None,
        cell_names: Sequence[str] | None,
        on_step: Callable[[dict[str, float]], None] | None,
    ):
        self.settings, self.world, self.tokens = settings, world, tokens
        self.objective, self.bert, self.cell_names, self.on_step = objective, bert, cell_names, on_step
        self.device = own_device(settings.device, world)
        self.dtype = resolve_precision(settings.precision, self.device, bert.config)
        self.training, self.held_out = split(tokens, cells, settings, held_out)
        self.pack_tokens = _PACK_TOKENS_CPU if self.device.type == "cpu" else None
        self.zero_positions = seen_genes(tokens[self.training], objective)
        bert.to(self.device)  # type: ignore[arg-type]
        objective.to(self.device).train()
        world.broadcast([p.data for p in [*bert.parameters(), *objective.parameters()]])
        named = [(f"{prefix}.{n}", p) for prefix, m in self.modules.items() for n, p in m.named_parameters()]
        self.optimizer = build_optimizer([(n, p) for n, p in named if p.requires_grad], settings)
        self.stepper = Stepper(
            bert, objective, world, self.device, self.dtype, settings.seed, checkpoint=settings.gradient_checkpointing
        )
        self.steps_per_epoch = -(-len(self.training) // settings.cells_per_step)
        self.n_steps = settings.epochs * self.steps_per_epoch
        if settings.max_steps is not None:
            self.n_steps = min(self.n_steps, settings.max_steps)
        weights = dict(zip(objective.tasks, objective.task_weights, strict=True))
        self.best = None if settings.patience is None else Best(self.modules, weights, settings.patience)
        self.step, self.budget, self.n_skipped = 0, settings.token_budget, 0
        self.history = History()
        self.streak: list[np.ndarray] = []  # cells of the non-finite steps in a row
        self._order: tuple[int, np.ndarray] = (-1, self.training)
        self._peak = peak_flops(self.device)

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def go(self, checkpoints: Checkpoints | None, request: StopRequest) -> pd.DataFrame:
        identity = self.identity() if checkpoints is not None else {}
        if checkpoints is not None:
            self.resume(checkpoints, identity)
        self.budget = fit_budget(self, self.budget)
        every = self.settings.checkpoint_every or self.steps_per_epoch
        board = Board(self.settings, self.n_steps, self.step, self.world.is_first)
        pending: Pending | None = None
        self.clock = time.perf_counter()
        if self.best is not None and self.step == 0:
            self.best.look(self.validate())
        try:
            with ThreadPoolExecutor(1) as ahead:
                prepared: Future[Share] | None = None
                while self.step < self.n_steps and not (self.best is not None and self.best.exhausted):
                    share = self.prepare(self.step) if prepared is None else prepared.result()
                    on_gpu = self.device.type == "cuda"
                    last = self.step + 1 == self.n_steps
                    prepared = ahead.submit(self.prepare, self.step + 1) if on_gpu and not last else None
                    totals = self.world.sum_host(np.append(share.counts, request.signal is not None))
                    if totals[-1]:
                        self.settle(pending, board)
                        self.save(checkpoints, identity)
                        request.obey()
                    taken = self.take_step(share, totals[:-1])
                    self.settle(pending, board)
                    pending = taken
                    self.step += 1
                    at_rest = self.step % every == 0 or self.step == self.n_steps or self.validates()
                    if not on_gpu or at_rest:
                        self.lap(pending)
                        validation = self.validate() if self.validates() else {}
                        self.settle(pending, board, validation)
                        pending = None
                        if self.best is not None and validation:
                            self.best.look(validation)
                    if self.step % every == 0 or self.step == self.n_steps:
                        self.save(checkpoints, identity)
                    if at_rest:
                        self.clock = time.perf_counter()
            if self.world.sum_host(np.array([float(request.signal is not None)]))[0]:  # during the last step
                self.save(checkpoints, identity)
                request.obey()
        finally:
            board.close()
        if self.best is not None:
            self.best.restore()
        return self.history.frame()

    def prepare(self, step: int) -> Share:
        """Mask and pack this process's share of a step; needs nothing but (seed, step)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self.objective.order(self.training, self.settings.seed, epoch))
        n = self.settings.cells_per_step
        cells = self._order[1][within * n : (within + 1) * n]
        return self.share(cells, epoch)

    def share(self, cells: np.ndarray, epoch: int) -> Share:
        """Mask and pack this process's part of some cells."""
        return prepare_share(
            self.objective, self.tokens, cells, self.world, seed=self.settings.seed, epoch=epoch,
            token_budget=self.budget, pack_tokens=self.pack_tokens, zero_positions=self.zero_positions,
        )  # fmt: skip

    def take_step(self, share: Share, totals: np.ndarray) -> Pending:
        """Compute the gradients and move the weights, unless something is not finite."""
        losses = self.gradients(share, totals)
        factor = learning_rate_factor(self.step, self.n_steps, self.settings.warmup, self.settings.schedule)
        set_learning_rate(self.optimizer, self.settings.learning_rate * factor)
        norm, finite = self.update(losses)
        per_task = losses.tasks / to_device(np.maximum(totals, 1e-12).astype(np.float32), self.device)
        numbers = torch.cat([torch.stack([losses.total, norm, finite.float()]), per_task, losses.cell_terms])
        names = [name for name, total in zip(self.objective.tasks, totals, strict=True) if total]
        return Pending(self.step, share, numbers, names, self.settings.learning_rate * factor)

    def gradients(self, share: Share, totals: np.ndarray) -> StepLosses:
        """Compute the gradients; alone, a step that runs out of memory is tried again with half the token budget."""
        while True:
            try:
                return self.stepper.gradients(share, totals, self.step)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.world.size > 1:
                    raise
                self.halve_budget(share, error)
            cells = share.cells
            share = self.share(cells, self.step // self.steps_per_epoch)

    def halve_budget(self, share: Share, error: RuntimeError) -> None:
        """Go on with half the token budget, or say which cell does not fit."""
        longest = max(int(pack.lengths.max()) for pack, *_ in share.packs)
        if self.budget <= longest:
            raise ScbinTrainingError(
                "T60",
                f"one cell of {longest:,} tokens does not fit into the memory of {self.device}. Use a smaller network, "
                "gradient_checkpointing=True, or a shorter max_length.",
            ) from error
        self.budget = max(self.budget // 2, longest)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        told = f"out of memory: going on with at most {self.budget:,} tokens at once. But for dropout, this changes nothing."
        warnings.warn(ScbinTrainingWarning("T61", told), stacklevel=2)

    def update(self, losses: StepLosses) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip and take the optimiser's step if loss and gradient are finite; returns the norm and whether they were."""
        gradients = [p.grad for p in self.stepper.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(losses.total) & torch.isfinite(norm)
        clip = self.settings.clip
        if self.device.type == "cuda":
            # nothing here waits for the GPU: the optimiser itself skips where found_inf is set
            if clip is not None:
                torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:
            if clip is not None and norm > clip:
                torch._foreach_mul_(gradients, clip / (norm + 1e-6))
            self.optimizer.step()
        return norm, finite

    # ---- the record -------------------------------------------------------------------------------------------------

    def lap(self, pending: Pending) -> None:
        """Note when the numbers of a step are there; validating and saving are no part of its time."""
        pending.wait()
        now = time.perf_counter()
        pending.seconds, self.clock = now - self.clock, now

    def settle(self, pending: Pending | None, board: Board, validation: dict[str, float] | None = None) -> None:
        """Read the numbers of a step, one step late on a GPU, and count the steps that were not finite."""
        if pending is None:
            return
        if not pending.seconds:
            self.lap(pending)
        seconds = pending.seconds
        total, norm, finite, *rest = pending.numbers.tolist()
        losses = dict(zip(self.objective.names, rest, strict=True))
        row: dict[str, float] = {"step": pending.step, "epoch": pending.step // self.steps_per_epoch, "loss": total}
        shown = {*pending.names, *(name for name in self.objective.names if name not in self.objective.tasks)}
        row |= {f"loss_{name}": value for name, value in losses.items() if name in shown}
        row |= {"learning_rate": pending.learning_rate, "gradient_norm": norm, "skipped": int(not finite)}
        n_cells, n_tokens = len(pending.share.cells), pending.share.n_tokens * self.world.size
        row |= {"cells_per_second": n_cells / seconds, "tokens_per_second": n_tokens / seconds}
        if self._peak is not None:
            row["mfu"] = pending.share.flops(self.bert.config) / seconds / self._peak
        row |= validation or {}
        self.history.add(row)
        if self.world.is_first:
            board.show(row)
            if self.on_step is not None:
                self.on_step(row)
        self._count_skipped(bool(finite), pending.share.cells)

    def _count_skipped(self, finite: bool, cells: np.ndarray) -> None:
        if finite:
            self.streak = []
            return
        self.n_skipped += 1
        self.streak.append(cells)
        if len(self.streak) < _MOST_SKIPPED:
            return
        names = [
            str(cell if self.cell_names is None else self.cell_names[cell]) for cell in np.concatenate(self.streak)
        ]
        shown = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
        raise ScbinTrainingError(
            "T62",
            f"loss or gradient was not finite in {_MOST_SKIPPED} steps in a row; none of them changed the weights. Try a "
            f"smaller learning_rate or precision='float32'. Their cells: {shown}",
        )

    def validates(self) -> bool:
        """Whether the held-out cells are looked at after the steps taken so far."""
        every = self.settings.validate_every or self.steps_per_epoch
        return len(self.held_out) > 0 and (self.step % every == 0 or self.step == self.n_steps)

    def validate(self) -> dict[str, float]:
        """Return the loss of each task on the held-out cells, whose masks never change."""
        self.bert.eval()
        self.objective.eval()
        sums, counts = np.zeros((2, len(self.objective.tasks)))
        for first in range(0, len(self.held_out), 256):
            cells = self.world.share(self.held_out[first : first + 256])
            share = prepare_share(
                self.objective, self.tokens, cells, World(), seed=self.settings.seed, epoch=EVALUATION,
                token_budget=self.budget, pack_tokens=self.pack_tokens, zero_positions=self.zero_positions, views=1,
            )  # fmt: skip
            sums += self.stepper.evaluate(share).double().cpu().numpy()
            counts += share.counts
        self.bert.train()
        self.objective.train()
        sums, counts = self.world.sum_host(np.stack([sums, counts]))
        return {f"validation_{name}": s / n for name, s, n in zip(self.objective.tasks, sums, counts, strict=True) if n}

    # ---- the state --------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be gone on with."""
        tokens = self.tokens
        return {
            "settings": self.settings.learned(),
            "objective": self.objective.describe(),
            "network": {key: getattr(self.bert.config, key) for key in _NETWORK},
            "vocabulary": self.objective.vocabulary.sha256,
            "data": fingerprint(tokens.indptr, tokens.indices, tokens.data, self.training, self.held_out),
        }

    def resume(self, checkpoints: Checkpoints, identity: dict[str, Any]) -> None:
        """Go on from the newest good checkpoint, if that is asked for and there is one."""
        found = -1
        if self.world.is_first:
            if checkpoints.steps() and not self.settings.resume:
                raise ScbinInputError(
                    "T34",
                    f"{checkpoints.directory} holds a run already: pass resume=True to go on with it, or another save_dir.",
                )
            newest = checkpoints.newest()
            found = -1 if newest is None else newest
        found = int(self.world.sum_host(np.array([found if self.world.is_first else 0.0]))[0])
        if found < 0:
            return
        progress, tensors, history = checkpoints.load(found, identity)
        restore_state(tensors, self.modules, self.optimizer)
        self.step, self.budget, self.n_skipped = progress.step, progress.token_budget, progress.n_skipped
        self.history = History.from_dict(history)

    def save(self, checkpoints: Checkpoints | None, identity: dict[str, Any]) -> None:
        """Write a checkpoint; the other processes wait."""
        if checkpoints is None:
            return
        if self.world.is_first:
            progress = Progress(self.step, self.budget, self.n_skipped)
            checkpoints.save(progress, collect_state(self.modules, self.optimizer), identity, self.history.to_dict())
        self.world.barrier()

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """What is trained."""
        best = getattr(self, "best", None)  # there is none while it is being made
        return {"bert": self.bert, "objective": self.objective, **({} if best is None else {"best": best})}


_NETWORK = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "hidden_act", "vocab_size"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings"),
)
