"""One step: from cells to gradients that do not depend on packs or processes."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from scbin.data.masking import split_pack
from scbin.nn.attention import to_device
from scbin.nn.bert import encode_pack
from scbin.train.history import step_flops

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scipy.sparse import csr_matrix
    from torch import Tensor, nn
    from transformers import BertConfig, BertForMaskedLM

    from scbin.data.masking import Targets
    from scbin.data.packing import Pack
    from scbin.train.distributed import World
    from scbin.train.objective import Batch, Objective


@dataclass(frozen=True, eq=False)
class Share:
    """What one process does in a step, still on the host."""

    packs: list[tuple[Pack, Targets, np.ndarray]]
    counts: np.ndarray  # (tasks,)
    cells: np.ndarray  # all cells of the step
    row_counts: list[int]  # rows of each process
    n_tokens: int
    fits: bool  # whether all packs together are within the token budget

    def flops(self, config: BertConfig) -> float:
        """Operations that it needs."""
        lengths = np.concatenate([pack.lengths for pack, *_ in self.packs] or [np.zeros(1)]).astype(np.float64)
        logits = sum(float((targets.stop - targets.start).sum()) for _, targets, _ in self.packs)
        return step_flops(config, float((lengths**2).sum()), float(lengths.sum()), logits)


def prepare_share(
    objective: Objective,
    tokens: csr_matrix,
    cells: np.ndarray,
    world: World,
    *,
    seed: int,
    epoch: int,
    token_budget: int,
    pack_tokens: int | None = None,
    zero_positions: np.ndarray | None = None,
    views: Literal[1, 2] | None = None,
) -> Share:
    """Mask this process's part of the cells of a step and plan its packs, of `pack_tokens` where less than the budget."""
    shares = np.array_split(cells, world.size)
    views = views or objective.views
    pack, targets = objective.rows(tokens, shares[world.rank], seed, epoch, views=views, zero_positions=zero_positions)
    packs = split_pack(pack, targets, min(token_budget, pack_tokens or token_budget))
    row_counts = [len(share) * views for share in shares]
    fits = pack.n_tokens <= token_budget
    return Share(packs, objective.counts(targets), cells, row_counts, pack.n_tokens, fits)


@contextmanager
def private_generators(device: torch.device) -> Iterator[None]:
    """Put torch's generators back as they were: the user's own random numbers do not feel the training."""
    cuda = [device] if device.type == "cuda" else []
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=cuda):
        yield
    if mps is not None:
        torch.mps.set_rng_state(mps)


def seed_generators(device: torch.device, *numbers: int) -> None:
    """Seed torch as a function of the numbers, such as (seed, step, pack, process)."""
    seed = int(np.random.SeedSequence([number % 2**63 for number in numbers]).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@dataclass(frozen=True, eq=False)
class StepLosses:
    """Losses of a step over all processes, on the device: summed per task, cell terms, and the weighted whole."""

    tasks: Tensor  # (tasks,)
    cell_terms: Tensor  # (terms,)
    total: Tensor  # ()


class Stepper:
    """Computes the gradients of a step; holds what stays the same from step to step."""

    def __init__(
        self,
        bert: BertForMaskedLM,
        objective: Objective,
        world: World,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        *,
        checkpoint: bool = False,
    ):
        self.bert, self.objective, self.world = bert, objective, world
        self.device, self.dtype, self.seed = device, dtype, seed
        self.checkpoint = checkpoint
        self.parameters: list[nn.Parameter] = [*bert.parameters(), *objective.parameters()]

    def _encode(self, batch: Batch) -> Tensor:
        return encode_pack(
            self.bert,
            batch.input_ids,
            batch.position_ids,
            batch.layout,
            self.objective.layer,
            checkpoint=self.checkpoint,
        )

    @torch.enable_grad()
    def gradients(self, share: Share, total_counts: np.ndarray, step: int) -> StepLosses:
        """Leave the gradient of the step's loss in the parameters, the same for any packs and number of processes.

        The masked loss is a sum over targets divided by the count of the whole step. A cell term needs the vectors of all
        cells at once: they are collected over packs and processes, the term's gradient with respect to them is taken, and the
        backward of each pack carries it in. Where the activations of all packs fit into the token budget they are kept from
        the first forward; else that one is done without gradients and each pack goes through twice.
        """
        objective = self.objective
        for parameter in self.parameters:
            parameter.grad = None
        factors = to_device(objective.factors(total_counts), self.device)
        batches = [objective.batch(*pack, self.device) for pack in share.packs]
        cell_values = torch.zeros(len(objective.cell_terms), device=self.device)
        sums = torch.zeros(len(objective.tasks), device=self.device)
        z_gradient, kept = None, {}
        if objective.views == 2:
            if share.fits:
                kept = {number: self._forward(batch, step, number) for number, batch in enumerate(batches)}
            cell_values, z_gradient = self._cell_gradient(batches, kept, share, step)
        for number, batch in enumerate(batches):
            task_sums, z = kept.pop(number) if kept else self._forward(batch, step, number)
            loss = (task_sums * factors).sum()
            if z is not None and z_gradient is not None:
                loss = loss + (z * z_gradient[batch.rows]).sum()
            loss.backward()
            sums += task_sums.detach()
        self.world.sum_gradients(self.parameters)
        self.world.sum_device(sums)
        return StepLosses(sums, cell_values, (sums * factors).sum() + self._weigh(cell_values))

    @torch.no_grad()
    def evaluate(self, share: Share) -> Tensor:
        """Return the summed loss of each task over this process's share."""
        sums = torch.zeros(len(self.objective.tasks), device=self.device)
        for pack in share.packs:
            batch = self.objective.batch(*pack, self.device)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                hidden = self._encode(batch)
                sums += self.objective.masked_sums(self.bert, hidden, batch)
        return sums

    def _weigh(self, cell_values: Tensor) -> Tensor:
        return sum(
            (w * value for w, value in zip(self.objective.cell_weights, cell_values, strict=True)),
            cell_values.new_zeros(()),
        )

    def _forward(
        self, batch: Batch, step: int, number: int, *, vectors_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the summed losses of a pack and, where there are views, the vectors of its rows."""
        seed_generators(self.device, self.seed, step, number, self.world.rank)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self._encode(batch)
            none = hidden.new_zeros(len(self.objective.tasks))
            sums = none if vectors_only else self.objective.masked_sums(self.bert, hidden, batch)
        return sums, self.objective.pooled(hidden, batch) if self.objective.views == 2 else None

    def _cell_gradient(
        self, batches: list[Batch], kept: dict[int, tuple[Tensor, Tensor | None]], share: Share, step: int
    ) -> tuple[Tensor, Tensor]:
        """Return the cell terms over all cells of the step and their gradient at this process's rows."""
        mine = sum(share.row_counts[: self.world.rank])
        n_rows = share.row_counts[self.world.rank]
        z = torch.zeros(n_rows, self.bert.config.hidden_size, device=self.device)
        with torch.no_grad():
            for number, batch in enumerate(batches):
                _, part = kept[number] if kept else self._forward(batch, step, number, vectors_only=True)
                if part is not None:
                    z[batch.rows] = part.detach()
        z = self.world.gather_rows(z, share.row_counts).requires_grad_()
        seed_generators(self.device, self.seed, step, -1)
        values = self.objective.cell_losses(z, share.cells)
        self._weigh(values).backward()
        if not self.world.is_first:  # every process has computed the whole term: its own parameters count once
            for parameter in self.objective.parameters():
                parameter.grad = None
        gradient = z.grad if z.grad is not None else torch.zeros_like(z)
        return values.detach(), gradient[mine : mine + n_rows]
