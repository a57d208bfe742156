"""From hidden states and visible expression to one vector per cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scbin._errors import ScbinInputError
from scbin.nn.embedding import Expression, row_sums, token_weights, weighted_sums

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.nn.packs import Pack
    from scbin.tokens.vocabulary import Vocabulary

Pooling = Literal["weighted", "mean", "cls", "first"]
TYPICAL = 4.0  # log-normalised expression of a gene that is expressed
# width of the hidden layers; latents, of which 0 read the expression alone; tokens of a cell that are read, drawn anew in each
# step of pretraining (otherwise all); dropout in pretraining
OPTIONS = {"width": 128, "latents": 8, "rounds": 2, "most_read": 128, "dropout": 0.2, "layer": -1}


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
    of the data, with both signs since a rectifier follows. Latent queries read the hidden states of the backbone by
    cross-attention. Both go through one more layer into the vector. All in float32, also under autocast.
    """

    kind = "latent"
    centre: Tensor
    is_gene: Tensor

    def __init__(self, vocabulary: Vocabulary, hidden_size: int, size: int = 30, **options: Any):
        super().__init__()
        self.options = {"hidden_size": hidden_size, "size": size, **OPTIONS, **options}
        self.size, self.layer, self.latents = size, self.options["layer"], self.options["latents"]
        n_genes, width = len(vocabulary.genes), self.options["width"]
        self.expression, self.mask_id = Expression(vocabulary), vocabulary.mask_id
        first = nn.Linear(n_genes, width)
        self.genes = nn.Parameter(first.weight.detach().T.contiguous())  # (genes, width), as a table that is looked up
        self.bias = nn.Parameter(first.bias.detach())
        self.register_buffer("centre", torch.zeros(n_genes))  # mean expression of the cells it starts from
        is_gene = torch.from_numpy(vocabulary.tables().gene_of_position >= 0)  # (positions,), not where they are ranks
        self.register_buffer("is_gene", is_gene, persistent=False)
        if self.latents:
            self.reader = LatentReader(hidden_size, self.latents, self.options["rounds"])
            self.read = nn.Linear(self.latents * hidden_size, width)
        self.inner = nn.Linear(width * (2 if self.latents else 1), width)
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

        `gates` (T,) are logarithms of factors on the expression of the tokens and on the attention that they receive. In training,
        dropout and the tokens to read are functions of `noise` (B,) int64, so that they are the same in any pack and process;
        without it nothing is random.
        """
        noise = noise if self.training else None
        with torch.autocast(pack.input_ids.device.type, enabled=False):
            genes, values = self.expression(pack, gates)
            masked = (pack.input_ids == self.mask_id) & self.is_gene[pack.position_ids]
            known = torch.where(masked, self.centre[genes], values)  # a masked gene is as in the mean cell
            opened = known if gates is None else known * gates.float().exp()
            inputs = weighted_sums(self.genes, pack, opened, genes) + (self.bias - self.centre @ self.genes)
            if self.latents and hidden is not None:
                tokens = tokens_of(pack, noise, self.options["most_read"])
                # a gene is read in proportion to its expression
                read = self.read(self.reader(hidden.float(), gates, values / TYPICAL, tokens).flatten(1))
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


class LatentRound(nn.Module):
    """Latents read the tokens, then each other, then think.

    Tokens are keys and values themselves, so that none of them goes through a linear map of its own: what usually projects
    keys and values is part of the queries and of what is made of the result.
    """

    def __init__(self, n: int, n_heads: int = 2):
        super().__init__()
        self.n_heads, self.scale = n_heads, n**-0.5
        self.norm, self.norm_self = nn.LayerNorm(n), nn.LayerNorm(n)
        self.query, self.read = nn.Linear(n, n_heads * n), nn.Linear(n_heads * n, n)
        self.qkv, self.out = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.feed_forward = nn.Sequential(nn.LayerNorm(n), nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))

    def forward(self, latents: Tensor, tokens: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        """Return the latents (B, m, hidden) after they have read the tokens (B, L, hidden).

        The bias (B, 1, L) is added to the scores, the weights (B, 1, L) are factors on what is read.
        """
        query = self.query(self.norm(latents)).unflatten(-1, (self.n_heads, -1)).flatten(1, 2)  # (B, m * heads, hidden)
        attention = torch.softmax(torch.bmm(query, tokens.transpose(1, 2)) * self.scale + bias, dim=-1)
        read = torch.bmm(attention * weights, tokens).unflatten(1, (-1, self.n_heads)).flatten(2)
        latents = latents + self.read(read)  # (B, m, hidden)
        parts = self.qkv(self.norm_self(latents)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in parts)
        latents = latents + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return latents + self.feed_forward(latents)


class LatentReader(nn.Module):
    """Learned queries that read the states of each row of a pack, at a cost of tokens times queries."""

    def __init__(self, hidden_size: int, latents: int, rounds: int):
        super().__init__()
        self.latents = nn.Parameter(0.5 * torch.randn(latents, hidden_size))
        self.rounds = nn.ModuleList(LatentRound(hidden_size) for _ in range(rounds))
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, states: Tensor, gates: Tensor | None, weights: Tensor, tokens: Tensor) -> Tensor:
        """Return the latents of each row (B, m, hidden) from the states (T, hidden).

        `gates` (T,) are added to the scores of the tokens, `weights` (T,) are factors on what is read from them. The `tokens` (B, L)
        of each row are read; -1 is none.
        """
        at, latents = tokens.clamp_min(0), self.latents.expand(len(tokens), -1, -1)
        read = states.index_select(0, at.flatten()).unflatten(0, at.shape)
        bias = torch.zeros_like(weights) if gates is None else gates.float()
        bias = bias[at].masked_fill(tokens < 0, float("-inf"))[:, None]
        for one in self.rounds:
            latents = one(latents, read, bias, weights[at][:, None])
        return self.norm(latents)


def tokens_of(pack: Pack, noise: Tensor | None = None, most: int = 0) -> Tensor:
    """Return the tokens of each row (B, L), -1 where it has no more; given `noise`, so many at random and the first one always."""
    rows, starts, shape = pack.rows, pack.layout.cu_seqlens[:-1].long(), (pack.n_rows, pack.layout.longest)
    every = torch.arange(pack.n_tokens, device=rows.device)
    place, filler = every - starts[rows] + rows * shape[1], every.new_full((shape[0] * shape[1],), -1)
    if noise is None:
        return filler.index_copy(0, place, every).unflatten(0, shape)
    draws = hashed(noise[rows] + pack.position_ids).index_fill(0, starts, -1.0)
    drawn, at = (filler + 3.0).index_copy(0, place, draws).unflatten(0, shape).topk(min(most, shape[1]), largest=False)
    return torch.where(drawn < 2, starts[:, None] + at, -1)


def hashed(keys: Tensor) -> Tensor:
    """Return one number in [0, 1) for each int64, float32: the finaliser of splitmix64, on any device."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * (factor - 2**64)
    keys = keys ^ ((keys >> 31) & ((1 << 33) - 1))
    return ((keys >> 40) & 0xFFFFFF).float() / 2**24
