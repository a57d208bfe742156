"""How a cell's vector is taken from a network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin.nn.embedding import pooling_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.embedding import Pooling


@dataclass(frozen=True)
class Readout:
    """How a model turns the vectors of a cell's tokens into one.

    Parameters
    ----------
    pooling
        `"weighted"`: mean over the genes, weighted by the expression that their tokens stand for; `"mean"`: each gene alike;
        `"cls"`: the vector of the `[CLS]` token.
    layer
        Index into the hidden states: -1 is the last layer, -2 the one before, 0 the embeddings.
    gene_weights
        Weight of each gene for `"weighted"`, in the order of the vocabulary. `None`: all alike.
    """

    pooling: Pooling = "weighted"
    layer: int = -1
    gene_weights: tuple[float, ...] | None = None


def read_readout(fields: Mapping[str, Any], vocabulary: Vocabulary, n_layers: int) -> Readout:
    """Return the readout again, if it fits the network and the vocabulary."""
    readout = Readout(**fields)
    if type(readout.layer) is not int or not -n_layers - 1 <= readout.layer <= n_layers:
        raise ValueError(f"layer {readout.layer!r} of a network with {n_layers}")
    weights = readout.gene_weights
    if weights is not None:
        weights = tuple(float(weight) for weight in weights)
        if len(weights) != len(vocabulary.genes) or min(weights, default=0.0) < 0:
            raise ValueError(f"{len(weights)} gene weights for {len(vocabulary.genes)} genes")
    pooling_weights(vocabulary, readout.pooling, None if weights is None else np.array(weights, dtype=np.float32))
    return replace(readout, gene_weights=weights)
