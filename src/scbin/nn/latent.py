"""A few latent queries read the tokens of a cell: attention that costs tokens times latents instead of tokens squared."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from scbin.nn.backbone import TableBackbone

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.nn.packs import Pack
    from scbin.nn.presets import Network
    from scbin.tokens.vocabulary import Vocabulary


class LatentRound(nn.Module):
    """Latents read the tokens, then each other, then think.

    Tokens are keys and values themselves, so that none of them goes through a linear map of its own: what usually projects
    keys and values is part of the queries and of what is made of the result.
    """

    def __init__(self, hidden_size: int, n_heads: int, inner: int):
        super().__init__()
        self.n_heads, self.scale, n = n_heads, hidden_size**-0.5, hidden_size
        self.norm, self.norm_self = nn.LayerNorm(n), nn.LayerNorm(n)
        self.query, self.read = nn.Linear(n, n_heads * n), nn.Linear(n_heads * n, n)
        self.qkv, self.out = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.feed_forward = nn.Sequential(nn.LayerNorm(n), nn.Linear(n, inner), nn.GELU(), nn.Linear(inner, n))

    def forward(self, latents: Tensor, tokens: Tensor, bias: Tensor, weights: Tensor | None) -> Tensor:
        """Return the latents (B, m, hidden) after they have read the tokens (B, L, hidden).

        The bias (B, 1, L) is added to the scores, the weights (B, 1, L) are factors on what is read.
        """
        query = self.query(self.norm(latents)).unflatten(-1, (self.n_heads, -1)).flatten(1, 2)  # (B, m * heads, hidden)
        attention = torch.softmax(torch.bmm(query, tokens.transpose(1, 2)).float() * self.scale + bias, dim=-1)
        attention = (attention if weights is None else attention * weights).to(tokens.dtype)
        read = torch.bmm(attention, tokens).unflatten(1, (-1, self.n_heads)).flatten(2)  # (B, m, heads * hidden)
        latents = latents + self.read(read)
        q, k, v = (heads_of(part, self.n_heads) for part in self.qkv(self.norm_self(latents)).chunk(3, dim=-1))
        latents = latents + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return latents + self.feed_forward(latents)


class LatentReader(nn.Module):
    """Learned queries that read the states of each row of a pack: (T, hidden) becomes (B, latents, hidden)."""

    def __init__(self, hidden_size: int, latents: int = 8, rounds: int = 2, n_heads: int = 2, inner: int | None = None):
        super().__init__()
        self.latents = nn.Parameter(0.5 * torch.randn(latents, hidden_size))
        self.rounds = nn.ModuleList(LatentRound(hidden_size, n_heads, inner or 2 * hidden_size) for _ in range(rounds))
        self.norm = nn.LayerNorm(hidden_size)

    def forward(
        self,
        states: Tensor,
        pack: Pack,
        gates: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        kept: Tensor | None = None,
        n_rounds: int | None = None,
    ) -> Tensor:
        """Return the latents of each row after some of the rounds (B, m, hidden).

        `gates` (T,) are added to the scores of the tokens, `weights` (T,) are factors on what is read from them. Only the
        tokens `kept` (B, L) of each row are read, -1 is none; default: all.
        """
        gates = torch.zeros(pack.n_tokens, device=states.device) if gates is None else gates.float()
        if kept is None:
            place, shape = padding(pack)
            tokens, bias = padded(states, place, shape), padded(gates, place, shape, float("-inf"))
            weights = None if weights is None else padded(weights, place, shape)
        else:
            at = kept.clamp_min(0)
            tokens = states.index_select(0, at.flatten()).unflatten(0, at.shape)
            bias, weights = gates[at].masked_fill(kept < 0, float("-inf")), None if weights is None else weights[at]
        bias, weights = bias[:, None], None if weights is None else weights[:, None]  # (B, 1, L)
        latents = self.latents.expand(pack.n_rows, -1, -1)
        for one in self.rounds[:n_rounds]:
            latents = one(latents, tokens, bias, weights)
        return self.norm(latents)


def heads_of(states: Tensor, n_heads: int) -> Tensor:
    """Split the last dimension over heads: (B, n, hidden) becomes (B, heads, n, hidden / heads)."""
    return states.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def padding(pack: Pack) -> tuple[Tensor, tuple[int, int]]:
    """Return where each token stands in a padded batch (T,), and the shape of that (B, L)."""
    rows, size = pack.rows, pack.layout.longest
    starts = pack.layout.cu_seqlens[:-1].long()
    return torch.arange(len(rows), device=rows.device) - starts[rows] + rows * size, (pack.n_rows, size)


def padded(values: Tensor, place: Tensor, shape: tuple[int, int], filler: float = 0.0) -> Tensor:
    """Lay values (T, ...) out in rows of the same length (B, L, ...)."""
    flat = values.new_full((shape[0] * shape[1], *values.shape[1:]), filler)
    return flat.index_copy(0, place, values).unflatten(0, shape)


class LatentBackbone(TableBackbone):
    """Latents read the tokens of a cell, and each token reads the latents: linear in the number of tokens.

    One layer is one round of the latents. The hidden state of a token is its embedding and what it reads in the latents; tokens
    are queries themselves, as they are keys and values before.
    """

    kind = "latent"
    vector_options: ClassVar = {"layer": 0}  # the cell vector has latents of its own, which read the embeddings

    def __init__(self, vocabulary: Vocabulary, preset: Network, latents: int = 8):
        super().__init__(vocabulary, preset, latents=latents)
        self.n_heads, hidden_size = preset.num_attention_heads, preset.hidden_size
        self.reader = LatentReader(hidden_size, latents, self.n_layers, self.n_heads, preset.intermediate_size)
        self.key_value = nn.Linear(hidden_size, 2 * self.n_heads * hidden_size)
        self.norm_out = nn.LayerNorm(hidden_size)

    def forward(self, states: Tensor, pack: Pack, n_layers: int, gates: Tensor | None) -> Tensor:
        """Return the states (T, hidden) behind some rounds of the latents."""
        if n_layers == 0:
            return states
        latents = self.reader(states, pack, gates, n_rounds=n_layers)  # (B, m, hidden)
        keys, values = (
            heads_of(part, self.n_heads).flatten(1, 2) for part in self.key_value(latents).chunk(2, dim=-1)
        )  # (B, heads * m, hidden)
        place, shape = padding(pack)
        queries = padded(states, place, shape)
        scores = torch.bmm(queries, keys.transpose(1, 2).to(queries.dtype)) * self.hidden_size**-0.5
        attention = torch.softmax(scores.unflatten(-1, (self.n_heads, -1)), dim=-1).flatten(2)
        read = torch.bmm(attention.to(values.dtype), values).flatten(0, 1).index_select(0, place)  # (T, hidden)
        return self.norm_out(states + read)
