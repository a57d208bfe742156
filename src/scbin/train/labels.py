"""What fine-tuning learns: labels of cells, and classes of genes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from scbin._arguments import check_fields
from scbin._errors import ScbinInputError
from scbin.nn.losses import cross_entropy
from scbin.nn.packs import pack_rows, plan_packs
from scbin.train.randomness import hash_uniform, random_key
from scbin.train.task import EVALUATION, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scbin.nn.labels import GeneHead, LabelHead
    from scbin.nn.network import CellNetwork
    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

_DROPOUT = 14  # a stream of random numbers of its own
_POSITIONS = 2**20  # more than a row has


@dataclass(frozen=True)
class Finetuning:
    """How labels are held out and learned.

    Parameters
    ----------
    validation
        Fraction of the labelled cells (or genes) that are held out, to stop early, to choose and to calibrate.
    gene_dropout
        Fraction of the genes of a cell that are left out at random, others in every epoch.
    label_smoothing
        Fraction of each label that is spread evenly over all classes.
    dropout
        On the cell's vector.
    expression
        Whether the head reads the expression of each gene beside the cell's vector. A head with a hidden layer does not.
    hidden
        A hidden layer on the cell's vector, `"tanh"` as in Geneformer's classifier or `"relu"` as in PerturbGene's. It starts at
        random, not from the linear probe.

    Examples
    --------
    >>> Finetuning(validation=0.2).gene_dropout
    0.3
    """

    validation: float = 0.1
    gene_dropout: float = 0.3
    label_smoothing: float = 0.1
    dropout: float = 0.0
    expression: bool = True
    hidden: Literal["tanh", "relu"] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("validation", "gene_dropout", "label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ScbinInputError("A02", f"{name} is {getattr(self, name)}; it needs to be in [0, 1).")
        object.__setattr__(self, "expression", self.expression and not self.hidden)


def drop_genes(rows: csr_matrix, cells: np.ndarray, vocabulary: Vocabulary, fraction: float, key: int) -> csr_matrix:
    """Return token rows with a fraction of their genes left out, as a function of (key, cell, position).

    Control tokens stay, and so does one gene of every cell.
    """
    if fraction == 0:
        return rows
    owner = np.repeat(np.arange(len(cells)), np.diff(rows.indptr))
    items = np.asarray(cells, dtype=np.int64)[owner] * _POSITIONS + rows.indices
    number = np.where(vocabulary.is_gene_token(rows.data), hash_uniform(np.uint64(key), items, _DROPOUT), -1.0)
    largest = np.full(len(cells), -1.0)
    np.maximum.at(largest, owner, number)
    kept = (number < 0) | (number >= np.minimum(fraction, largest)[owner])
    indptr = np.concatenate([[0], np.cumsum(np.bincount(owner[kept], minlength=len(cells)))])
    return csr_matrix((rows.data[kept], rows.indices[kept], indptr), shape=rows.shape)


class CellLabels(nn.Module):
    """Classes and numbers of cells, several targets at once.

    Parameters
    ----------
    head
        The head of the network that is trained.
    vocabulary
        Of the tokens, whose phenotypes must be masked.
    values
        For each target the class, or the standardised number, of each cell (cells,); NaN where it is unknown.
    weights
        Of each target in the loss. Default: 1.
    class_weights
        For each target the weight of each class (classes,), or None.
    gene_dropout, label_smoothing
        As in :class:`Finetuning`.
    layer
        Whose hidden states are read.
    """

    def __init__(
        self,
        head: LabelHead | GeneHead,
        vocabulary: Vocabulary,
        values: Sequence[np.ndarray],
        *,
        weights: Sequence[float] | None = None,
        class_weights: Sequence[np.ndarray | None] | None = None,
        gene_dropout: float = 0.3,
        label_smoothing: float = 0.1,
        layer: int = -1,
    ):
        super().__init__()
        self.targets, self.vocabulary, self.layer = head.targets, vocabulary, layer
        self.parts = [head.part(number) for number in range(len(head.targets))]
        self.values = np.stack([np.asarray(each, dtype=np.float32) for each in values])  # (targets, cells or genes)
        self.losses = tuple(target.name for target in head.targets)
        self.weights = tuple(weights or [1.0] * len(self.losses))
        self.gene_dropout, self.label_smoothing = gene_dropout, label_smoothing
        of_classes = class_weights or [None] * len(self.losses)
        self.class_weights = [
            torch.ones(target.n_outputs) if each is None else torch.as_tensor(each, dtype=torch.float32)
            for target, each in zip(head.targets, of_classes, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """Return what a resumed run must have too, as plain values."""
        digest = hashlib.sha256(np.round(self.values, 4).tobytes())
        for weights in self.class_weights:
            digest.update(np.round(weights.numpy(), 4).tobytes())
        settings = {"gene_dropout": self.gene_dropout, "label_smoothing": self.label_smoothing}
        return {"targets": list(self.losses), "weights": list(self.weights), "labels": digest.hexdigest(), **settings}

    def prepare(self, tokens: Tokens, cells: np.ndarray, *, seed: int, epoch: int, token_budget: int) -> Batch:
        """Leave out some genes of some cells, and note what is known of the cells."""
        cells = np.asarray(cells, dtype=np.int64)
        fraction = 0.0 if epoch == EVALUATION else self.gene_dropout
        rows = drop_genes(tokens.take(cells), cells, self.vocabulary, fraction, int(random_key(seed, epoch)))
        packs, counts = [], np.zeros(len(self.losses))
        for chosen in plan_packs(np.diff(rows.indptr), token_budget):
            pack = pack_rows(rows[chosen], cells[chosen])
            targets, labels = self.ask(pack, epoch)
            packs.append((pack, targets))
            counts += [float(self._weights(k, own[torch.isfinite(own)]).sum()) for k, own in enumerate(labels)]
        return Batch(packs, counts)

    def ask(self, pack: Pack, epoch: int) -> tuple[Any, Tensor]:
        """Return what the loss asks about a pack, and the labels in it (targets, B), NaN where nothing is known."""
        labels = torch.from_numpy(self.values[:, pack.cells])
        return labels, labels

    def loss(self, network: CellNetwork, hidden: Any, pack: Pack, targets: Any) -> Tensor:
        """Return the summed loss of each target (losses,) for a pack."""
        kept = 1.0 - self.gene_dropout if network.training else 1.0
        outputs = network.labels(network.vector(hidden, pack), pack, kept)  # type: ignore[misc]
        return self.score(outputs, targets, network.training)

    def score(self, outputs: Tensor, labels: Tensor, training: bool) -> Tensor:
        """Return the summed loss of each target (losses,), given outputs (B, outputs) and labels (targets, B)."""
        sums, smoothing = [], self.label_smoothing if training else 0.0
        for target, part, own, weights in zip(self.targets, self.parts, labels, self.class_weights, strict=True):
            known, truth = torch.isfinite(own), torch.nan_to_num(own)
            if target.kind == "number":
                scores = (outputs[:, part][:, 0] - truth).square()
            else:
                scores = cross_entropy(outputs[:, part], truth.long(), smoothing, weights.to(outputs.device))
            sums.append(torch.where(known, scores, 0.0).sum())  # nothing is picked out, which a GPU would wait for
        return torch.stack(sums)

    def _weights(self, number: int, labels: Tensor) -> Tensor:
        """Return by how much each known label counts (n,); the summed losses are divided by it."""
        is_class = self.targets[number].kind == "class"
        return self.class_weights[number][labels.long()] if is_class else torch.ones(len(labels))


class GeneLabels(CellLabels):
    """Classes of genes: each token of a labelled gene is asked about, in the context of its cell.

    `values` are by gene of the vocabulary (genes,). Genes that are `held_out` (genes,) are asked about in validation only, the
    others in training only. The further parameters are those of :class:`CellLabels`.
    """

    def __init__(
        self,
        head: GeneHead,
        vocabulary: Vocabulary,
        values: Sequence[np.ndarray],
        *,
        held_out: np.ndarray | None = None,
        **options: Any,
    ):
        super().__init__(head, vocabulary, values, **options)
        self.held_out = np.zeros(self.values.shape[1], dtype=bool) if held_out is None else held_out

    def describe(self) -> dict[str, Any]:
        """Return what a resumed run must have too, as plain values."""
        return {**super().describe(), "held_out": hashlib.sha256(self.held_out.tobytes()).hexdigest()}

    def ask(self, pack: Pack, epoch: int) -> tuple[Any, Tensor]:
        """Return which tokens are asked about (M,), their genes (M,) and what these are (targets, M); and the last alone."""
        ids, positions = pack.input_ids.numpy(), pack.position_ids.numpy()
        is_gene = self.vocabulary.is_gene_token(ids)
        genes = np.where(is_gene, self.vocabulary.genes_at(ids, positions), 0)
        asked = is_gene & np.asarray(np.isfinite(self.values).any(axis=0))[genes]
        if self.held_out.any():
            asked &= self.held_out[genes] == (epoch == EVALUATION)
        where, labels = np.flatnonzero(asked), torch.from_numpy(self.values[:, genes[asked]])
        return (torch.from_numpy(where), torch.from_numpy(genes[asked]), labels), labels

    def loss(self, network: CellNetwork, hidden: Any, pack: Pack, targets: Any) -> Tensor:
        """Return the summed loss of each target (losses,) for a pack."""
        where, genes, labels = targets
        return self.score(network.labels(hidden[where], genes), labels, network.training)  # type: ignore[misc]
