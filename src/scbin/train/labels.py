"""What fine-tuning learns: labels of cells, and classes of genes."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scbin.nn.packs import pack_rows, plan_packs
from scbin.train.masking import select
from scbin.train.randomness import GENE_DROPOUT, hash_uniform, random_key
from scbin.train.task import EVALUATION, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_matrix

    from scbin.nn.labels import GeneHead, LabelHead
    from scbin.nn.network import CellNetwork
    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary
    from scbin.train.settings import Finetuning

_POSITIONS = 2**20  # more than a row has


def drop_genes(rows: csr_matrix, cells: np.ndarray, vocabulary: Vocabulary, fraction: float, key: int) -> csr_matrix:
    """Return token rows with a fraction of their genes left out, as a function of (key, cell, position).

    Control tokens stay, and so does one gene of every cell.
    """
    if fraction == 0:
        return rows
    owner = np.repeat(np.arange(len(cells)), np.diff(rows.indptr))
    items = cells[owner] * _POSITIONS + rows.indices
    number = np.where(vocabulary.is_gene_token(rows.data), hash_uniform(np.uint64(key), items, GENE_DROPOUT), -1.0)
    largest = np.full(len(cells), -1.0)
    np.maximum.at(largest, owner, number)
    return select(rows, (number < 0) | (number >= np.minimum(fraction, largest)[owner]))


class Labels(nn.Module):
    """Classes and numbers of cells, several targets at once; or classes of genes, by each of their tokens in its cell.

    Parameters
    ----------
    head
        The head of the network that is trained, on cells or on genes.
    vocabulary
        Of the tokens, whose phenotypes must be masked.
    values
        For each target the class, or the standardised number, of each cell (or gene); NaN where it is unknown.
    settings
        How labels are learned.
    weights
        Of each target in the loss. Default: 1.
    class_weights
        For each target the weight of each class (classes,). Default: 1.
    held_out
        Genes (genes,) that are asked about in validation only, the others in training only. Default: all in both.
    layer
        Whose hidden states are read, `None` for none.
    """

    def __init__(
        self,
        head: LabelHead | GeneHead,
        vocabulary: Vocabulary,
        values: Sequence[np.ndarray],
        settings: Finetuning,
        *,
        weights: Sequence[float] | None = None,
        class_weights: Sequence[np.ndarray] | None = None,
        held_out: np.ndarray | None = None,
        layer: int | None = -1,
    ):
        super().__init__()
        self.targets, self.vocabulary, self.settings, self.layer = head.targets, vocabulary, settings, layer
        self.parts = [head.part(number) for number in range(len(head.targets))]
        self.values = np.stack([np.asarray(each, dtype=np.float32) for each in values])  # (targets, cells or genes)
        self.losses = tuple(target.name for target in head.targets)
        self.weights = tuple(weights or [1.0] * len(self.losses))
        of_classes = class_weights or [np.ones(target.n_outputs) for target in head.targets]
        self.class_weights = [torch.as_tensor(each, dtype=torch.float32) for each in of_classes]
        self.of_genes, self.held_out = head.kind == "genes", held_out

    def describe(self) -> dict[str, Any]:
        """Return what a resumed run must have too, as plain values."""
        numbers = [*self.values, *self.class_weights, np.zeros(0) if self.held_out is None else self.held_out]
        digest = hashlib.sha256(np.round(np.concatenate(numbers), 4).tobytes()).hexdigest()
        how = {name: value for name, value in asdict(self.settings).items() if name != "validation"}
        return {"targets": list(self.losses), "weights": list(self.weights), "labels": digest, **how}

    def prepare(self, tokens: Tokens, cells: np.ndarray, *, seed: int, epoch: int, token_budget: int) -> Batch:
        """Leave out some genes of some cells, and note what is known of the cells."""
        fraction = 0.0 if epoch == EVALUATION else self.settings.gene_dropout
        rows = drop_genes(tokens.take(cells), cells, self.vocabulary, fraction, int(random_key(seed, epoch)))
        packs, counts = [], np.zeros(len(self.losses))
        for chosen in plan_packs(np.diff(rows.indptr), token_budget):
            pack = pack_rows(rows[chosen], cells[chosen])
            targets = self.ask(pack, epoch)
            packs.append((pack, targets))
            for number, own in enumerate(targets[-1]):
                known = own[torch.isfinite(own)]
                is_class = self.targets[number].kind == "class"
                counts[number] += float(self.class_weights[number][known.long()].sum()) if is_class else len(known)
        return Batch(packs, counts)

    def ask(self, pack: Pack, epoch: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return which tokens of a pack are asked about (M,) and their genes (M,), if any; and the labels (targets, M or B)."""
        if not self.of_genes:
            return None, None, torch.from_numpy(self.values[:, pack.cells])
        ids, positions = pack.input_ids.numpy(), pack.position_ids.numpy()
        where = np.flatnonzero(self.vocabulary.is_gene_token(ids))
        genes = self.vocabulary.genes_at(ids[where], positions[where])
        asked: Any = np.isfinite(self.values).any(axis=0)
        if self.held_out is not None:
            asked = asked & (self.held_out == (epoch == EVALUATION))
        where, genes = where[asked[genes]], genes[asked[genes]]
        return torch.from_numpy(where), torch.from_numpy(genes), torch.from_numpy(self.values[:, genes])

    def loss(self, network: CellNetwork, hidden: Any, pack: Pack, targets: Any) -> Tensor:
        """Return the summed loss of each target (losses,) for a pack."""
        (where, genes, labels), training = targets, network.training
        head: Any = network.labels
        if self.of_genes:
            outputs = head(hidden[where], genes)
        else:
            kept = 1.0 - self.settings.gene_dropout if training else 1.0
            outputs = head(network.vector(hidden, pack), pack, kept)
        sums, smoothing = [], self.settings.label_smoothing if training else 0.0
        for target, part, own, weights in zip(self.targets, self.parts, labels, self.class_weights, strict=True):
            known, truth = torch.isfinite(own), torch.nan_to_num(own)
            if target.kind == "number":
                scores = (outputs[:, part][:, 0] - truth).square()
            else:
                classes, how = truth.long(), dict[str, Any](reduction="none", label_smoothing=smoothing)
                scores = F.cross_entropy(outputs[:, part], classes, **how)  # with weights, rare classes got most of it
                scores = scores * weights.to(outputs.device)[classes]
            sums.append(torch.where(known, scores, 0.0).sum())  # nothing is picked out, which a GPU would wait for
        return torch.stack(sums)
