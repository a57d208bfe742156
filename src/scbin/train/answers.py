"""What fine-tuning learns: the answers of a head about cells or genes, as an objective of the training loop."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scbin.data.dropping import drop_genes
from scbin.data.masking import EVALUATION, Targets, epoch_order, random_key
from scbin.data.packing import make_pack
from scbin.nn.attention import pack_layout, to_device
from scbin.nn.heads import evidence, gene_values
from scbin.nn.losses import cross_entropy

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from transformers import BertForMaskedLM

    from scbin.data.packing import Pack
    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.attention import Layout
    from scbin.nn.embedding import Weights
    from scbin.nn.heads import Evidence, Head


@dataclass(frozen=True, eq=False)
class Answers:
    """What is known: for each target of a head, one value per cell (or gene), with a weight for each class.

    `values` hold places of classes as float64, or standardised numbers; NaN where nothing is known.
    """

    values: tuple[np.ndarray, ...]  # (cells,) or (genes,), one array per target
    weights: tuple[float, ...]  # of each target in the loss
    class_weights: tuple[np.ndarray | None, ...]  # (classes,), one array per target
    # what outputs are short of while they are learned (classes,): the frequencies of the classes, which answers leave out
    shifts: tuple[np.ndarray | None, ...] = ()

    @property
    def known(self) -> np.ndarray:
        """Whether anything is known (cells,) or (genes,)."""
        return np.isfinite(np.stack(self.values)).any(axis=0)


@dataclass(frozen=True, eq=False)
class AnswerBatch:
    """A pack on the device, with what is asked about it."""

    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,)
    layout: Layout
    rows: Tensor  # (B,)
    evidence: Evidence
    asked: tuple[tuple[int, Tensor, Tensor], ...]  # target, rows (or tokens, for genes) asked about, true answers


class AnswerObjective(nn.Module):
    """The loss of a head's answers, in the form that the training loop asks for.

    Parameters
    ----------
    head
        Trained with the network.
    vocabulary
        Of the tokens. Phenotype slots must be hidden in them.
    weights
        Of each token in its cell's vector.
    answers
        The truth.
    gene_drop
        Share of the gene tokens of a cell that are left out, others in every epoch.
    label_smoothing
        Share of the target spread evenly over the classes.
    layer
        Whose hidden states the head reads.
    sampling
        `"balanced"`: in every epoch cells are drawn so that the classes of the first target come alike often.
    held_out_genes
        For heads on genes: which genes are asked about in validation only (genes,).
    """

    cell_terms: tuple[()] = ()
    cell_weights: tuple[()] = ()
    views: Literal[1] = 1

    def __init__(
        self,
        head: Head,
        vocabulary: Vocabulary,
        weights: Weights,
        answers: Answers,
        *,
        gene_drop: float = 0.3,
        label_smoothing: float = 0.1,
        layer: int = -1,
        sampling: Literal["balanced"] | None = None,
        held_out_genes: np.ndarray | None = None,
    ):
        super().__init__()
        self.head, self.vocabulary, self.token_weights, self.answers = head, vocabulary, weights, answers
        self.gene_drop, self.label_smoothing, self.layer, self.sampling = gene_drop, label_smoothing, layer, sampling
        self.held_out_genes = held_out_genes
        self.tasks = self.names = tuple(target.name for target in head.targets)
        self.task_weights = np.array(answers.weights, dtype=np.float64)
        for number, values in enumerate(answers.class_weights):
            tensor = None if values is None else torch.tensor(values, dtype=torch.float32)
            self.register_buffer(f"class_weights_{number}", tensor, persistent=False)
        for number, values in enumerate(answers.shifts or (None,) * len(self.tasks)):
            tensor = None if values is None else torch.tensor(values, dtype=torch.float32)
            self.register_buffer(f"shift_{number}", tensor, persistent=False)

    def describe(self) -> dict[str, Any]:
        """Return what distinguishes this objective from others, as plain values for JSON."""
        held_out = () if self.held_out_genes is None else (self.held_out_genes.astype(np.float64),)
        given = (*self.answers.class_weights, *self.answers.shifts)
        arrays = [*self.answers.values, *(array for array in given if array is not None), *held_out]
        # rounded, because the same data give numbers on another machine that differ in their last digits
        digest = hashlib.sha256(b"".join(np.round(array.astype(np.float64), 6).tobytes() for array in arrays))
        return {
            "head": self.head.plan.to_dict(),
            "answers": digest.hexdigest(),
            "target_weights": list(self.answers.weights),
            "gene_drop": self.gene_drop,
            "label_smoothing": self.label_smoothing,
            "layer": self.layer,
            "sampling": self.sampling,
        }

    # ---- on the host ------------------------------------------------------------------------------------------------

    def order(self, cells: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return the cells of an epoch in order, a function of (seed, epoch, set of cells)."""
        cells = np.sort(cells)
        values = self.answers.values[0][cells] if self.sampling == "balanced" else np.array([])
        if not np.isfinite(values).any():
            return epoch_order(cells, seed, epoch)
        classes = np.nan_to_num(values, nan=-1).astype(np.int64) + 1
        share = 1 / np.bincount(classes)[classes]
        bits = np.random.Philox(key=np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64))
        return np.random.Generator(bits).choice(cells, len(cells), p=share / share.sum())

    def rows(
        self,
        tokens: csr_matrix,
        cells: np.ndarray,
        seed: int,
        epoch: int,
        *,
        views: Literal[1, 2] | None = None,
        zero_positions: np.ndarray | None = None,
    ) -> tuple[Pack, Targets]:
        """Return the rows of some cells, some genes left out, and what is asked about them."""
        share = 0.0 if epoch == EVALUATION else self.gene_drop
        thinned = drop_genes(tokens, cells, self.vocabulary, share, int(random_key(seed, epoch)))
        pack = replace(make_pack(thinned, np.arange(len(cells))), cells=np.asarray(cells, dtype=np.int64))
        return pack, self._asked(pack, epoch)

    def _asked(self, pack: Pack, epoch: int) -> Targets:
        where, task, labels = [], [], []
        for number, values in enumerate(self.answers.values):
            if self.head.plan.design == "gene":
                genes, _ = gene_values(pack.input_ids, pack.position_ids, self.vocabulary)
                asked = np.isfinite(values)
                if self.held_out_genes is not None:
                    asked &= self.held_out_genes == (epoch == EVALUATION)
                mine = np.flatnonzero(self.vocabulary.is_gene_token(pack.input_ids) & asked[genes])
                true = values[genes[mine]]
            else:
                rows = np.flatnonzero(np.isfinite(values[pack.cells]))
                mine, true = pack.cu_seqlens[:-1][rows].astype(np.int64), values[pack.cells[rows]]
            where.append(mine)
            task.append(np.full(len(mine), number, dtype=np.int64))
            labels.append(true)
        outputs = np.array([target.n_outputs for target in self.head.targets], dtype=np.int64)
        tasks = np.concatenate(task)
        return Targets(
            np.concatenate(where),
            np.concatenate(labels).astype(np.float64),
            np.zeros_like(tasks),
            outputs[tasks],
            tasks,
        )

    def partial_rows(self, *_: Any, **__: Any) -> None:
        """No rows of another kind are asked for."""

    def counts(self, targets: Targets) -> np.ndarray:
        """Return by how much the summed loss of each task is to be divided: its answers, or their class weights."""
        counts = np.bincount(targets.task, minlength=len(self.tasks)).astype(np.float64)
        for number, weights in enumerate(self.answers.class_weights):
            if weights is not None:
                counts[number] = weights[targets.labels[targets.task == number].astype(np.int64)].sum()
        return counts

    def factors(self, counts: np.ndarray) -> np.ndarray:
        """Return by what the summed loss of each task counts (tasks,): the weighted mean of the mean losses."""
        there = counts > 0
        shares = self.task_weights * there / max((self.task_weights * there).sum(), 1e-12)
        return (shares / np.maximum(counts, 1e-12)).astype(np.float32)

    def batch(self, pack: Pack, targets: Targets, rows: np.ndarray, device: torch.device) -> AnswerBatch:
        """Move a pack to the device, with what is asked about it."""
        layout = pack_layout(pack.cu_seqlens, device)
        asked = []
        for number, target in enumerate(self.head.targets):
            mine = targets.task == number
            if not mine.any():
                continue
            where, true = targets.where[mine], targets.labels[mine]
            if target.kind != "gene":
                where = np.searchsorted(pack.cu_seqlens, where, side="right") - 1
            true = true.astype(np.float32 if target.kind == "number" else np.int64)
            asked.append((number, to_device(where.astype(np.int64), device), to_device(true, device)))
        return AnswerBatch(
            to_device(pack.input_ids, device), to_device(pack.position_ids, device), layout, to_device(rows, device),
            evidence(pack, layout, self.token_weights, self.vocabulary, device, 1 - self.gene_drop * self.training),
            tuple(asked),
        )  # fmt: skip

    # ---- on the device ----------------------------------------------------------------------------------------------

    def masked_sums(self, bert: BertForMaskedLM, hidden: Tensor, batch: AnswerBatch) -> Tensor:
        """Return the summed loss of each task (tasks,) over the answers to a pack."""
        sums = [hidden.new_zeros((), dtype=torch.float32)] * len(self.tasks)
        of_cells = None if self.head.plan.design == "gene" else self.head(hidden, batch.evidence)
        for number, where, true in batch.asked:
            target = self.head.targets[number]
            outputs = self.head.of_genes(hidden.index_select(0, where)) if of_cells is None else of_cells[where]
            outputs = outputs[:, self.head.plan.part(target.name)]
            sums[number] = self._score(outputs, true, number).sum()
        return torch.stack(sums)

    def _score(self, outputs: Tensor, true: Tensor, number: int) -> Tensor:
        if self.head.targets[number].kind == "number":
            return (outputs[:, 0] - true).square()
        smoothing = self.label_smoothing if self.training else 0.0
        shift = getattr(self, f"shift_{number}")
        outputs = outputs if shift is None else outputs + shift
        return cross_entropy(outputs, true, smoothing, getattr(self, f"class_weights_{number}"))
