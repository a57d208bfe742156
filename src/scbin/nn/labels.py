"""Heads for labels: classes and numbers of cells, classes of genes, after fine-tuning."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor, nn

from scbin._errors import ScbinInputError
from scbin.nn.packs import Expression, gene_values, row_sums, weighted_sums
from scbin.nn.run import run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

LARGEST = 10.0  # scaled expression: a gene that few cells have should not decide alone


@dataclass(frozen=True)
class Target:
    """One thing that a head predicts: classes in the order of the outputs, or a number, which is `mean + scale * output`."""

    name: str  # of the column that it was learned from
    kind: Literal["class", "number"] = "class"
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        fits = self.kind == ("class" if self.classes else "number") and 0 < self.scale < math.inf
        texts = all(type(text) is str for text in (self.name, *self.classes))
        if not fits or not texts or len(set(self.classes)) != len(self.classes):
            raise ScbinInputError(
                "M04", f"{self} is not a valid target: classes are distinct strings, and a number has none."
            )

    @property
    def n_outputs(self) -> int:
        """Number of outputs: one per class, or one for a number."""
        return len(self.classes) or 1


class _Head(nn.Module):
    """What both heads share: targets, each one's outputs and temperature, and a linear map of a standardised vector."""

    temperature: Tensor
    vector_mean: Tensor
    vector_scale: Tensor

    def __init__(self, vocabulary: Vocabulary, size: int, targets: Sequence[Any]):
        super().__init__()
        self.targets = tuple(each if isinstance(each, Target) else Target(**each) for each in targets)
        names = [target.name for target in self.targets]
        if not names or len(set(names)) != len(names):
            raise ScbinInputError("M04", f"a head needs targets of different names, not {names[:5]}.")
        self.register_buffer("temperature", torch.ones(len(names)))  # (targets,)
        self.register_buffer("vector_mean", torch.zeros(size))
        self.register_buffer("vector_scale", torch.ones(size))
        self.output = nn.Linear(size, self.n_outputs)
        self.tokens = Expression(vocabulary)

    @property
    def n_outputs(self) -> int:
        """Number of outputs of all targets together."""
        return sum(target.n_outputs for target in self.targets)

    def part(self, number: int) -> slice:
        """Return which outputs belong to a target, by its number."""
        start = sum(target.n_outputs for target in self.targets[:number])
        return slice(start, start + self.targets[number].n_outputs)

    def predictions(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return calibrated probabilities (n, classes), or numbers (n,) in their own unit, by target."""
        result = {}
        for number, target in enumerate(self.targets):
            own = np.asarray(outputs[:, self.part(number)], dtype=np.float64)
            calibrated = softmax(own / float(self.temperature[number]), axis=1)
            result[target.name] = own[:, 0] * target.scale + target.mean if target.kind == "number" else calibrated
        return result

    @classmethod
    def from_config(cls, vocabulary: Vocabulary, config: Mapping[str, Any]) -> Self:
        """Build a head without its weights; stored ones may say that they pool no hidden states."""
        return cls(vocabulary, **{name: value for name, value in config.items() if name != "pooled_size"})

    def _plain(self) -> list[dict[str, Any]]:
        return [{**asdict(target), "classes": list(target.classes)} for target in self.targets]


class LabelHead(_Head):
    """Classes and numbers of cells: linear in the cell's vector and in expression.

    Parameters
    ----------
    vocabulary
        Of the tokens.
    vector_size
        Numbers in a cell's vector.
    targets
        What is predicted.
    expression
        Whether the log expression of each gene is read directly.
    hidden
        `"tanh"` or `"relu"`: a hidden layer of this kind on the vector, as in the classifiers that Geneformer and PerturbGene publish.
    dropout
        On the vector, while training.
    """

    kind: ClassVar[str] = "cells"
    gene_scale: Tensor

    def __init__(
        self,
        vocabulary: Vocabulary,
        vector_size: int,
        targets: Sequence[Any],
        *,
        expression: bool = True,
        hidden: Literal["tanh", "relu"] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__(vocabulary, vector_size, targets)
        self.hidden, self.dropout = hidden, nn.Dropout(dropout)
        self.activation = {"tanh": nn.Tanh, "relu": nn.ReLU, None: nn.Identity}[hidden]()
        self.dense = nn.Linear(vector_size, vector_size) if hidden else nn.Identity()
        self.genes: nn.Parameter | None = None
        if expression:
            self.register_buffer("gene_scale", torch.ones(len(vocabulary.genes)))
            self.genes = nn.Parameter(torch.zeros(len(vocabulary.genes), self.n_outputs))

    def config(self) -> dict[str, Any]:
        """Return plain values from which `from_config` builds the same head."""
        # pooled_size has one value; it stays so that stored models stay what they are
        parts = {"expression": self.genes is not None, "hidden": self.hidden, "pooled_size": 0}
        return {"vector_size": len(self.vector_mean), "targets": self._plain(), **parts, "dropout": self.dropout.p}

    def forward(self, vector: Tensor, pack: Pack, kept: float = 1.0) -> Tensor:
        """Return the outputs (B, outputs) from the vectors (B, size) of a pack, in float32.

        `kept` is the fraction of the genes that was not left out at random.
        """
        with torch.autocast(vector.device.type, enabled=False):
            z = (torch.nan_to_num(vector.float()) - self.vector_mean) * self.vector_scale
            outputs: Tensor = self.output(self.dropout(self.activation(self.dense(z))))
            if self.genes is not None:
                genes, values = self.tokens(pack)
                scaled = (values * self.gene_scale[genes]).clamp_max(LARGEST) / kept
                outputs = outputs + weighted_sums(self.genes, pack, scaled, genes)
        return outputs


class GeneHead(_Head):
    """Classes of genes: linear in a gene's hidden state and in simple features of the gene, which the head keeps.

    Parameters
    ----------
    vocabulary
        Of the tokens.
    hidden_size
        Width of the hidden states.
    targets
        What is predicted, classes only.
    n_features
        Simple features of each gene; 0: none.
    """

    kind: ClassVar[str] = "genes"
    features: Tensor

    def __init__(self, vocabulary: Vocabulary, hidden_size: int, targets: Sequence[Any], *, n_features: int = 0):
        super().__init__(vocabulary, hidden_size, targets)
        if any(target.kind != "class" for target in self.targets):
            raise ScbinInputError("M04", "a head on genes predicts classes, not numbers.")
        self.register_buffer("features", torch.zeros(len(vocabulary.genes), n_features))
        self.genes = nn.Parameter(torch.zeros(n_features, self.n_outputs))

    def config(self) -> dict[str, Any]:
        """Return plain values from which `from_config` builds the same head."""
        sizes = {"hidden_size": len(self.vector_mean), "n_features": self.features.shape[1]}
        return {**sizes, "targets": self._plain()}

    def forward(self, hidden: Tensor, genes: Tensor) -> Tensor:
        """Return the outputs (M, outputs) for hidden states (M, hidden) of tokens of some genes (M,), in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            outputs: Tensor = self.output((hidden.float() - self.vector_mean) * self.vector_scale)
            return outputs + self.features[genes] @ self.genes


# ---- over all cells -------------------------------------------------------------------------------------------------


def label_outputs(network: Any, tokens: Tokens, **options: Any) -> np.ndarray:
    """Return the outputs of the head for each cell (cells, outputs), NaN for cells without genes; `options` are those of `run`."""
    head: Any = network.labels
    result = np.full((tokens.n_cells, head.n_outputs), np.nan, dtype=np.float32)
    for pack, hidden in run(network, tokens, layer=network.vector_layer, label="predicting", **options):
        with torch.inference_mode():
            genes, _ = gene_values(head.tokens, pack.input_ids, pack.position_ids)
            outputs = head(network.vector(hidden, pack), pack).float()
            outputs[row_sums((genes >= 0).float(), pack) == 0] = float("nan")
        result[pack.cells] = outputs.cpu().numpy()
    return result


def gene_outputs(network: Any, tokens: Tokens, **options: Any) -> np.ndarray:
    """Return the mean outputs of the head for each gene over its tokens (genes, outputs), NaN for genes without any."""
    head: Any = network.labels
    n_genes = len(head.features)
    sums, counts = np.zeros((n_genes, head.n_outputs)), np.zeros((n_genes, 1))
    for pack, hidden in run(network, tokens, layer=network.gene_layer, label="reading genes", **options):
        with torch.inference_mode():
            genes, _ = gene_values(head.tokens, pack.input_ids, pack.position_ids)
            hidden, genes = hidden[genes >= 0], genes[genes >= 0]
            own = hidden.new_zeros(sums.shape, dtype=torch.float32).index_add_(0, genes, head(hidden, genes))
        counts[:, 0] += np.bincount(genes.cpu().numpy(), minlength=n_genes)
        sums += own.cpu().numpy()
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
