"""A network on cells: backbone, cell vector and heads in one module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from scbin._arguments import choices
from scbin.nn.backbone import BACKBONES, seeded
from scbin.nn.bert import BertBackbone
from scbin.nn.counts import CountHead
from scbin.nn.mlp import MlpBackbone
from scbin.nn.presets import Network, preset
from scbin.nn.vector import LatentVector, PooledVector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scbin.nn.backbone import Backbone
    from scbin.tokens.vocabulary import Vocabulary

for _kind in (BertBackbone, MlpBackbone):
    BACKBONES[_kind.kind] = _kind


class CellNetwork(nn.Module):
    """All that is learned. A part that a network does not have is `None`.

    Every part has a `kind`, its name among the parts of its place; `config()`, plain values; and `from_config(vocabulary, config)`,
    which builds the same part without its weights.

    Parameters
    ----------
    backbone
        The encoder: token rows to hidden states.
    vector
        Hidden states and visible expression to one vector per cell, with the attributes `layer` (whose hidden states it reads)
        and `size`.
    counts
        Cell vectors to the expected counts of every gene.
    labels
        Cell vectors and expression to classes and numbers, after fine-tuning.
    batches
        Takes the differences between batches out of cell vectors.
    density
        Where the training cells lie, from which new cells are drawn.
    """

    def __init__(
        self,
        backbone: Backbone,
        vector: Any,
        counts: Any = None,
        labels: Any = None,
        batches: Any = None,
        density: Any = None,
    ):
        super().__init__()
        self.backbone, self.vector = backbone, vector
        self.counts: CountHead | None = counts
        self.labels, self.batches, self.density = labels, batches, density

    @property
    def vector_layer(self) -> int | None:
        """Whose hidden states the cell vector is made of, `None` where it reads the expression alone."""
        return self.vector.layer if getattr(self.vector, "reads", True) else None

    @property
    def gene_layer(self) -> int:
        """The layer whose hidden states stand for genes: that of the cell vector, the last where that reads embeddings alone."""
        return int(self.vector.layer) or -1


def build_network(
    vocabulary: Vocabulary,
    shape: str | Network = "tiny",
    backbone: str = "mlp",
    *,
    vector: Literal["latent", "pooled"] = "latent",
    batches: Sequence[str] = ("all",),
    seed: int = 0,
    vector_options: dict[str, Any] | None = None,
) -> CellNetwork:
    """Build a network with random weights; the same seed gives the same weights, and no global generator moves.

    Parameters
    ----------
    vocabulary
        The vocabulary that it reads.
    shape
        A preset by name, or a `Network`.
    backbone
        Kind of the encoder, a name in `BACKBONES`.
    vector
        `"latent"`, the learned cell vector with its count head, or `"pooled"`, a mean of the hidden states.
    batches
        Names of the batches that have gene means of their own in the count head.
    seed
        Of the weights.
    vector_options
        Further arguments of the cell vector, such as `size`, beside those that suit the encoder.

    Examples
    --------
    >>> from scbin.tokens.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    >>> build_network(vocabulary, "tiny", vector_options={"size": 10}).vector.size
    10
    """
    choices({"backbone": tuple(BACKBONES), "vector": ("latent", "pooled")}, backbone=backbone, vector=vector)
    with seeded(seed):
        body, options = BACKBONES[backbone].build(vocabulary, preset(shape)), vector_options or {}
        if vector == "pooled":
            return CellNetwork(body, PooledVector(vocabulary, body.hidden_size, **options))
        cells = LatentVector(vocabulary, body.hidden_size, **{**getattr(body, "vector_options", {}), **options})
        return CellNetwork(body, cells, CountHead(len(vocabulary.genes), cells.size, batches))
