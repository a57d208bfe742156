"""From hidden states and visible expression to one vector per cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scbin._errors import ScbinInputError
from scbin.nn.packs import Expression, row_sums, token_weights, weighted_sums

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.nn.packs import Pack
    from scbin.tokens.vocabulary import Vocabulary

Pooling = Literal["weighted", "mean", "cls", "first"]
# width of the hidden layers; dropout in pretraining; whether hidden states are read beside the expression, and of which layer
OPTIONS = {"width": 128, "dropout": 0.2, "reads": True, "layer": -1}
LEAST = 1e-3  # weight of a token without expression in the mean of a cell's hidden states


class PooledVector(nn.Module):
    """A weighted mean of the hidden states of a cell's tokens: by expression, over all genes alike, or of `[CLS]` alone.

    For published models, whose vectors are not trained on their own. `"first"` is the token at the smallest position, whichever it
    is: what published classifiers of cells read.
    """

    kind = "pooled"
    weights: Tensor

    def __init__(self, vocabulary: Vocabulary, hidden_size: int, pooling: Pooling = "weighted", layer: int = -1):
        super().__init__()
        self.pooling, self.layer, self.size = pooling, layer, hidden_size
        ids = np.arange(vocabulary.n_tokens)
        ways = {"weighted": token_weights(vocabulary), "mean": vocabulary.is_gene_token(ids), "first": ids >= 0}
        if "[CLS]" in vocabulary.specials:
            ways["cls"] = ids == vocabulary.specials["[CLS]"]
        if pooling not in ways:
            raise ScbinInputError("A02", f"pooling is {pooling!r}; these tokens have {', '.join(map(repr, ways))}.")
        weights = torch.from_numpy(ways[pooling].astype(np.float32))  # (tokens,)
        self.register_buffer("weights", weights, persistent=False)

    def config(self) -> dict[str, Any]:
        """Return plain values from which `from_config` builds the same module."""
        return {"hidden_size": self.size, "pooling": self.pooling, "layer": self.layer}

    @classmethod
    def from_config(cls, vocabulary: Vocabulary, config: dict[str, Any]) -> PooledVector:
        """Build the module that `config` describes."""
        return cls(vocabulary, **config)

    def forward(self, hidden: Tensor, pack: Pack, gates: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Return one vector per row of a pack (B, hidden); NaN where no token counts.

        `gates` (T,) are logarithms of factors on the weights of the tokens; there is nothing random for `noise`.
        """
        weights = self.weights[pack.input_ids]
        if self.pooling == "first":  # rows are sorted by position
            weights = weights * (torch.arange(len(weights), device=weights.device) == pack.layout.cu_seqlens[pack.rows])
        return pool(hidden, pack, weights if gates is None else weights * gates.exp())


def pool(hidden: Tensor, pack: Pack, weights: Tensor) -> Tensor:
    """Return the mean of the hidden states (T, hidden) of each row, weighted by (T,), in float32 (B, hidden)."""
    totals = row_sums(weights, pack)[:, None]
    return weighted_sums(hidden, pack, weights) / totals.masked_fill(totals == 0, float("nan"))


class LatentVector(nn.Module):
    """The learned cell vector, trained to predict the molecules that were not shown.

    Log-normalised expression enters through a table of one row per gene, whose first columns start at the principal components
    of the data, with both signs since a rectifier follows; beside it, the mean of the hidden states of the backbone, weighted by
    expression. Both go through one more layer into the vector. All in float32, also under autocast.
    """

    kind = "latent"
    centre: Tensor
    is_gene: Tensor

    def __init__(self, vocabulary: Vocabulary, hidden_size: int, size: int = 30, **options: Any):
        super().__init__()
        self.options = {"hidden_size": hidden_size, "size": size, **OPTIONS, **options}
        self.size, self.layer, self.reads = size, self.options["layer"], self.options["reads"]
        n_genes, width = len(vocabulary.genes), self.options["width"]
        self.expression, self.mask_id = Expression(vocabulary), vocabulary.mask_id
        first = nn.Linear(n_genes, width)
        self.genes = nn.Parameter(first.weight.detach().T.contiguous())  # (genes, width), as a table that is looked up
        self.bias = nn.Parameter(first.bias.detach())
        self.register_buffer("centre", torch.zeros(n_genes))  # mean expression of the cells it starts from
        is_gene = torch.from_numpy(vocabulary.tables().gene_of_position >= 0)  # (positions,), not where they are ranks
        self.register_buffer("is_gene", is_gene, persistent=False)
        if self.reads:
            self.read = nn.Linear(hidden_size, width)
        self.inner = nn.Linear(width * (1 + self.reads), width)
        self.outer = nn.Linear(width, size)

    def config(self) -> dict[str, Any]:
        """Return plain values from which `from_config` builds the same module."""
        return dict(self.options)

    @classmethod
    def from_config(cls, vocabulary: Vocabulary, config: dict[str, Any]) -> LatentVector:
        """Build the module that `config` describes, without its weights."""
        return cls(vocabulary, **config)

    def forward(
        self, hidden: Tensor | None, pack: Pack, gates: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Return one vector per row of a pack (B, size).

        `gates` (T,) are logarithms of factors on the expression of the tokens and on their weight in the mean. In training,
        dropout is a function of `noise` (B,) int64, so that it is the same in any pack and process; without it nothing is random.
        """
        noise = noise if self.training else None
        with torch.autocast(pack.input_ids.device.type, enabled=False):
            genes, values = self.expression(pack, gates)
            masked = (pack.input_ids == self.mask_id) & self.is_gene[pack.position_ids]
            known = torch.where(masked, self.centre[genes], values)  # a masked gene is as in the mean cell
            gate = torch.ones_like(known) if gates is None else gates.float().exp()
            inputs = weighted_sums(self.genes, pack, known * gate, genes) + (self.bias - self.centre @ self.genes)
            if self.reads and hidden is not None:
                read = self.read(pool(hidden, pack, (known + LEAST) * gate))
                inputs = torch.cat([inputs, self._dropped(read, noise, 1)], dim=1)
            inner = self.inner(self._dropped(F.relu(inputs), noise, 2))
            return self.outer(self._dropped(F.relu(inner), noise, 3))

    def _dropped(self, states: Tensor, noise: Tensor | None, layer: int) -> Tensor:
        """Apply dropout to the states of each row (B, width)."""
        dropout = self.options["dropout"]
        if noise is None or not dropout:
            return states
        counters = layer * 2**32 + torch.arange(states.shape[1], device=states.device)
        return states * (hashed(noise[:, None] + counters) >= dropout) / (1 - dropout)

    @torch.no_grad()
    def start_from(self, directions: np.ndarray, spreads: np.ndarray, means: np.ndarray) -> None:
        """Start at principal components: directions (genes, k), deviations of the scores (k,), means of the genes (genes,)."""
        k = min(directions.shape[1], self.options["width"] // 2)
        least = 0.01 * spreads.max()  # what hardly varies is not blown up
        scaled = torch.from_numpy((directions[:, :k] / spreads[:k].clip(least)).astype("float32")).to(self.genes)
        self.genes[:, :k], self.genes[:, k : 2 * k] = scaled, -scaled
        self.bias[: 2 * k] = 0
        self.centre.copy_(torch.from_numpy(means.astype("float32")))


def hashed(keys: Tensor) -> Tensor:
    """Return one number in [0, 1) for each int64, float32: the finaliser of splitmix64, on any device."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * (factor - 2**64)
    keys = keys ^ ((keys >> 31) & ((1 << 33) - 1))
    return ((keys >> 40) & 0xFFFFFF).float() / 2**24
