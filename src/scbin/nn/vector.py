"""From hidden states and visible expression to one vector per cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scbin._errors import ScbinInputError
from scbin.nn.embedding import Expression, row_sums, token_weights, weighted_sums
from scbin.nn.latent import LatentReader, padded, padding

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.nn.packs import Pack
    from scbin.tokens.vocabulary import Vocabulary

Pooling = Literal["weighted", "mean", "cls", "first"]
TYPICAL = 4.0  # log-normalised expression of a gene that is expressed


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
        if pooling == "weighted":
            weights = token_weights(vocabulary)
        elif pooling == "mean":
            weights = vocabulary.is_gene_token(ids)
        elif pooling == "cls":
            if "[CLS]" not in vocabulary.specials:
                raise ScbinInputError("A02", 'these tokens have no [CLS]; use pooling="mean".')
            weights = ids == vocabulary.specials["[CLS]"]
        elif pooling == "first":
            weights = np.ones(vocabulary.n_tokens)
        else:
            raise ScbinInputError("A02", f"pooling is {pooling!r}; choose 'weighted', 'mean', 'cls' or 'first'.")
        self.register_buffer("weights", torch.from_numpy(weights.astype(np.float32)), persistent=False)  # (tokens,)

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
    of the data, with both signs since a rectifier follows. Latent queries read the hidden states of the backbone by
    cross-attention. Both go through one more layer into the vector. All in float32, also under autocast.
    """

    kind = "latent"
    centre: Tensor

    def __init__(
        self,
        vocabulary: Vocabulary,
        hidden_size: int,
        size: int = 30,
        *,
        width: int = 128,  # of the hidden layers
        latents: int = 8,  # 0 reads the expression alone
        rounds: int = 2,
        most_read: int | None = 128,  # tokens of a cell, drawn anew in each step of pretraining; otherwise all are read
        dropout: float = 0.2,  # in pretraining
        layer: int = -1,
    ):
        super().__init__()
        self.hidden_size, self.size, self.width, self.layer = hidden_size, size, width, layer
        self.latents, self.rounds, self.most_read, self.dropout = latents, rounds, most_read, float(dropout)
        n_genes = len(vocabulary.genes)
        self.expression = Expression(vocabulary)
        first = nn.Linear(n_genes, width)
        self.genes = nn.Parameter(first.weight.detach().T.contiguous())  # (genes, width), as a table that is looked up
        self.bias = nn.Parameter(first.bias.detach())
        self.register_buffer("centre", torch.zeros(n_genes))  # mean expression of the cells it starts from
        self.reader = LatentReader(hidden_size, latents, rounds) if latents else None
        self.read = nn.Linear(latents * hidden_size, width) if latents else None
        self.inner = nn.Linear(width * (2 if latents else 1), width)
        self.outer = nn.Linear(width, size)

    def config(self) -> dict[str, Any]:
        """Return plain values from which `from_config` builds the same module."""
        names = ("hidden_size", "size", "width", "latents", "rounds", "most_read", "dropout", "layer")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, vocabulary: Vocabulary, config: dict[str, Any]) -> LatentVector:
        """Build the module that `config` describes, without its weights."""
        return cls(vocabulary, **config)

    def forward(
        self, hidden: Tensor | None, pack: Pack, gates: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Return one vector per row of a pack (B, size).

        `gates` (T,) are logarithms of factors on the expression of the tokens and on the attention that they receive. In training,
        dropout and the tokens to read are functions of `noise` (B,) int64, so that they are the same in any pack and process;
        without it nothing is random.
        """
        noise = noise if self.training else None
        with torch.autocast(pack.input_ids.device.type, enabled=False):
            genes, values = self.expression(pack, gates)
            opened = values if gates is None else values * gates.float().exp()
            inputs = [weighted_sums(self.genes, pack, opened, genes) + (self.bias - self.centre @ self.genes)]
            if self.reader is not None and self.read is not None and hidden is not None:
                kept = None if noise is None or self.most_read is None else _some(pack, noise, self.most_read)
                # a gene is read in proportion to its expression
                read = self.reader(hidden.float(), pack, gates, values / TYPICAL, kept=kept).flatten(1)
                inputs.append(self._dropped(self.read(read), noise, 1))
            inner = self.inner(self._dropped(F.relu(torch.cat(inputs, dim=1)), noise, 2))
            return self.outer(self._dropped(F.relu(inner), noise, 3))

    def _dropped(self, states: Tensor, noise: Tensor | None, layer: int) -> Tensor:
        """Apply dropout to the states of each row (B, width)."""
        if noise is None or not self.dropout:
            return states
        counters = layer * 2**32 + torch.arange(states.shape[1], device=states.device)
        return states * (hashed(noise[:, None] + counters) >= self.dropout) / (1 - self.dropout)

    @torch.no_grad()
    def start_from(self, directions: np.ndarray, spreads: np.ndarray, means: np.ndarray) -> None:
        """Start at principal components: directions (genes, k), deviations of the scores (k,), means of the genes (genes,)."""
        k = min(directions.shape[1], self.width // 2)
        least = 0.01 * spreads.max()  # what hardly varies is not blown up
        scaled = torch.from_numpy((directions[:, :k] / spreads[:k].clip(least)).astype("float32")).to(self.genes)
        self.genes[:, :k], self.genes[:, k : 2 * k] = scaled, -scaled
        self.bias[: 2 * k] = 0
        self.centre.copy_(torch.from_numpy(means.astype("float32")))


def _some(pack: Pack, noise: Tensor, most: int) -> Tensor:
    """Return so many tokens of each row at random (B, L), the first one always; -1 where a row has no more."""
    starts, (place, shape) = pack.layout.cu_seqlens[:-1].long(), padding(pack)
    draws = hashed(noise[pack.rows] + pack.position_ids).index_fill(0, starts, -1.0)
    drawn, at = padded(draws, place, shape, 2.0).topk(min(most, shape[1]), largest=False)
    return torch.where(drawn < 2, starts[:, None] + at, -1)


def hashed(keys: Tensor) -> Tensor:
    """Return one number in [0, 1) for each int64, float32: the finaliser of splitmix64, on any device."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * (factor - 2**64)
    keys = keys ^ ((keys >> 31) & ((1 << 33) - 1))
    return ((keys >> 40) & 0xFFFFFF).float() / 2**24
