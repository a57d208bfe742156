"""Heads: what a network answers about whole cells, or about the genes in them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scbin._errors import ScbinInputError
from scbin.nn.attention import to_device
from scbin.nn.pooling import pool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scbin.data.packing import Pack
    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.attention import Layout
    from scbin.nn.embedding import Weights

Kind = Literal["class", "number", "gene"]
Design = Literal["wide", "linear", "pooler", "mlp", "attention", "gene"]

DESIGNS: tuple[Design, ...] = ("wide", "linear", "pooler", "mlp", "attention", "gene")
MOST_TARGETS, MOST_CLASSES = 1_000, 100_000
_MLP_DROPOUT = 0.2  # PerturbGene's


@dataclass(frozen=True)
class Target:
    """One thing a head answers.

    Parameters
    ----------
    name
        The column it was learned from.
    kind
        `"class"`: one of several classes of a cell; `"number"`: a number of a cell; `"gene"`: a class of a gene.
    classes
        Names of the classes, in the order of the outputs.
    mean, scale
        Of the numbers it was trained on: an output times `scale` plus `mean` is a prediction.
    temperature
        By which the outputs are divided before they become probabilities, so that these are as sure as they are right.
    """

    name: str
    kind: Kind = "class"
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        numbers = (self.mean, self.scale, self.temperature)
        if type(self.name) is not str or self.kind not in ("class", "number", "gene"):
            raise ScbinInputError("F01", f"a target needs a name and a kind; got {self.name!r} and {self.kind!r}.")
        if not all(type(value) is str for value in self.classes) or len(set(self.classes)) != len(self.classes):
            raise ScbinInputError("F01", f"the classes of {self.name!r} need to be different texts.")
        if (self.kind == "number") == bool(self.classes) or len(self.classes) > MOST_CLASSES:
            raise ScbinInputError("F01", f"{self.name!r} of kind {self.kind!r} has {len(self.classes)} classes.")
        if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers) or min(numbers[1:]) <= 0:
            raise ScbinInputError("F01", f"mean, scale and temperature of {self.name!r} are {numbers}.")

    @property
    def n_outputs(self) -> int:
        """Numbers that the head computes for it."""
        return 1 if self.kind == "number" else len(self.classes)


@dataclass(frozen=True)
class HeadPlan:
    """Everything that decides the shape of a head: it goes to JSON and back, the weights go into a file of their own.

    Parameters
    ----------
    design
        `"wide"`: linear in the cell's vector and in the expression of each of its genes; `"linear"`: in the vector alone;
        `"pooler"`: Geneformer's, a dense layer with tanh on the first token; `"mlp"`: PerturbGene's, a hidden layer on the
        first token; `"attention"`: a learned weight per token; `"gene"`: linear on the vector of each gene's token.
    targets
        What it answers.
    dropout
        On the vector, while training.
    """

    design: Design
    targets: tuple[Target, ...]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.design not in DESIGNS:
            raise ScbinInputError("F02", f"head is {self.design!r}; choose one of {', '.join(map(repr, DESIGNS))}.")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ScbinInputError("F02", f"the dropout of a head is {self.dropout!r}; it needs to be in [0, 1).")
        names = [target.name for target in self.targets]
        if not 0 < len(names) <= MOST_TARGETS or len(set(names)) != len(names):
            raise ScbinInputError("F02", f"a head needs targets of different names; got {names[:5]}.")
        if any((target.kind == "gene") != (self.design == "gene") for target in self.targets):
            raise ScbinInputError("F02", f"a head of design {self.design!r} cannot answer all of {names[:5]}.")

    @property
    def n_outputs(self) -> int:
        """Numbers that the head computes for each cell, over all targets."""
        return sum(target.n_outputs for target in self.targets)

    def part(self, name: str) -> slice:
        """Return which of the outputs belong to a target."""
        start = 0
        for target in self.targets:
            if target.name == name:
                return slice(start, start + target.n_outputs)
            start += target.n_outputs
        known = ", ".join(repr(target.name) for target in self.targets)
        raise ScbinInputError("F03", f"this model's head does not know {name!r}. It answers: {known}.")

    def target(self, name: str) -> Target:
        """Return the target called `name`."""
        self.part(name)
        return next(target for target in self.targets if target.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> HeadPlan:
        """Read back `to_dict`; whatever does not belong there is an error."""
        if set(fields) != {"design", "targets", "dropout"}:
            raise ScbinInputError("F02", f"a head is described by design, targets and dropout, not {sorted(fields)}.")
        targets = tuple(Target(**target) for target in fields["targets"])
        return cls(fields["design"], targets, fields["dropout"])


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a head reads beside the hidden states, on the device: all a function of the tokens."""

    layout: Layout
    weights: Tensor  # (T,) of each token in its cell's vector
    genes: Tensor  # (T,) int64, the gene each token speaks of; 0 where none
    values: Tensor  # (T,) float32, how much of it; 0 where none


def evidence(
    pack: Pack, layout: Layout, weights: Weights, vocabulary: Vocabulary, device: torch.device | str, kept: float = 1.0
) -> Evidence:
    """Return what a head reads beside the hidden states of a pack.

    `kept` is the share of the tokens that were not dropped: those that are there then count so much more.
    """
    genes, values = gene_values(pack.input_ids, pack.position_ids, vocabulary)
    return Evidence(
        layout,
        to_device(weights.of(pack.input_ids, pack.position_ids), device),
        to_device(genes, device),
        to_device(values / np.float32(kept), device),
    )


def gene_values(token_ids: np.ndarray, positions: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Return gene (T,) and expression (T,) that tokens stand for; for ranks a number that falls from 1 with the rank."""
    is_gene = vocabulary.is_gene_token(token_ids)
    genes = vocabulary.genes_at(token_ids, positions)
    if vocabulary.position_is_gene:
        values = vocabulary.token_values[token_ids]
    else:
        rank = np.maximum(positions - vocabulary.first_gene_position, 0)
        values = 1 / np.log2(rank + 2.0)
    return np.where(is_gene, genes, 0).astype(np.int64), np.where(is_gene, values, 0).astype(np.float32)


class Head(nn.Module):
    """Weights of a `HeadPlan`. Cells: `head(hidden, evidence)` gives (B, outputs); genes: `head.output(hidden)`.

    Every output of a cell is a function of its own tokens alone. All in float32, also under autocast.

    Parameters
    ----------
    plan
        Its shape.
    hidden_size
        Of the network.
    n_genes
        Of the vocabulary.

    Examples
    --------
    >>> head = Head(HeadPlan("linear", (Target("cell_type", classes=("B cell", "T cell")),)), 8, 100)
    >>> head.targets[0].classes
    ('B cell', 'T cell')
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, plan: HeadPlan, hidden_size: int, n_genes: int):
        super().__init__()
        self.plan = plan
        self.dropout = nn.Dropout(plan.dropout)
        if plan.design in ("wide", "linear", "gene"):
            self.register_buffer("centre", torch.zeros(hidden_size))
            self.register_buffer("scale", torch.ones(hidden_size))
        if plan.design == "wide":
            self.genes = nn.Parameter(torch.zeros(n_genes, plan.n_outputs))
        if plan.design in ("pooler", "mlp"):
            self.dense = nn.Linear(hidden_size, hidden_size)
        if plan.design == "attention":
            self.query = nn.Linear(hidden_size, 1)
        self.output = nn.Linear(hidden_size, plan.n_outputs)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What it answers."""
        return self.plan.targets

    def forward(self, hidden: Tensor, evidence: Evidence) -> Tensor:
        """Return the outputs (B, outputs) for the cells of a pack with hidden states (T, H)."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, layout = hidden.float(), evidence.layout
            if self.plan.design in ("wide", "linear"):
                z = self.standardised(pool(hidden, layout, evidence.weights))
                out: Tensor = self.output(self.dropout(z))
                return out + self.bag(evidence) if self.plan.design == "wide" else out
            if self.plan.design == "attention":
                return self.output(self.dropout(pool(hidden, layout, _attention(self.query(hidden)[:, 0], layout))))
            first = hidden.index_select(0, layout.cu_seqlens[:-1].long())
            if self.plan.design == "pooler":
                return self.output(self.dropout(torch.tanh(self.dense(first))))
            return self.output(F.dropout(torch.relu(self.dense(first)), _MLP_DROPOUT, self.training))

    def of_genes(self, hidden: Tensor) -> Tensor:
        """Return the outputs (M, outputs) for the hidden states (M, H) of genes."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.output(self.dropout(self.standardised(hidden.float())))

    def standardised(self, z: Tensor) -> Tensor:
        """Return vectors with mean 0 and variance 1 over the cells that were trained on."""
        return (z - self.centre) * self.scale

    def bag(self, evidence: Evidence) -> Tensor:
        """Return what the genes say directly (B, outputs): the row of each in the table times its expression, summed."""
        starts = evidence.layout.cu_seqlens[:-1].long()
        return F.embedding_bag(evidence.genes, self.genes, starts, mode="sum", per_sample_weights=evidence.values)


def _attention(scores: Tensor, layout: Layout) -> Tensor:
    """Return the softmax of the scores (T,) within each row."""
    return torch.cat([torch.softmax(part, 0) for part in scores.split(layout.lengths)])


def build_head(plan: HeadPlan, hidden_size: int, n_genes: int, *, seed: int = 0) -> Head:
    """Build a head with random weights (the table of genes starts at zero); no global generator moves."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        return Head(plan, hidden_size, n_genes)


def head_shapes(plan: HeadPlan, hidden_size: int, n_genes: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a head, without making one."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Head(plan, hidden_size, n_genes).state_dict().items()}


def head_from(plan: HeadPlan, tensors: Mapping[str, Tensor], hidden_size: int, n_genes: int) -> Head:
    """Return a head with the weights given, which must be exactly those of the plan."""
    with torch.device("meta"):
        head = Head(plan, hidden_size, n_genes)
    head.load_state_dict(dict(tensors), strict=True, assign=True)
    return head.eval()
