"""A few latent queries read the tokens of a cell: attention that costs tokens times latents instead of tokens squared."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from scbin.nn.backbone import TableBackbone, run_layers

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
        self.n_heads, self.scale = n_heads, hidden_size**-0.5
        self.norm, self.norm_self = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query, self.read = (
            nn.Linear(hidden_size, n_heads * hidden_size),
            nn.Linear(n_heads * hidden_size, hidden_size),
        )
        self.qkv, self.out = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden_size), nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size)
        )

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
        checkpoint: bool = False,
    ) -> Tensor:
        """Return the latents of each row after some of the rounds (B, m, hidden).

        `gates` (T,) are added to the scores of the tokens, `weights` (T,) are factors on what is read from them. Only the
        tokens `kept` (K,) are read; default: all.
        """
        place, size = _padding(pack, kept)
        gates = torch.zeros(pack.n_tokens, device=states.device) if gates is None else gates.float()
        if kept is not None:
            states, gates, weights = states[kept], gates[kept], None if weights is None else weights[kept]
        shape = (pack.n_rows, size)
        bias = _padded(gates, place, shape, float("-inf"))[:, None]  # (B, 1, L)
        weights = None if weights is None else _padded(weights, place, shape)[:, None]
        latents, rounds = self.latents.expand(pack.n_rows, -1, -1), self.rounds[:n_rounds]
        tokens = _padded(states, place, shape)
        return self.norm(run_layers(rounds, latents, tokens, bias, weights, checkpoint=checkpoint))


def heads_of(states: Tensor, n_heads: int) -> Tensor:
    """Split the last dimension over heads: (B, n, hidden) becomes (B, heads, n, hidden / heads)."""
    return states.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def _padding(pack: Pack, kept: Tensor | None = None) -> tuple[Tensor, int]:
    """Return where each token, or each of those kept, stands in a padded batch, and the length of its rows."""
    rows = pack.rows if kept is None else pack.rows[kept]
    if kept is None:
        starts, size = pack.layout.cu_seqlens[:-1].long(), pack.layout.longest
    else:
        sizes = torch.bincount(rows, minlength=pack.n_rows)
        starts, size = torch.cumsum(sizes, 0) - sizes, int(sizes.max())
    return torch.arange(len(rows), device=rows.device) - starts[rows] + rows * size, max(size, 1)


def _padded(values: Tensor, place: Tensor, shape: tuple[int, int], filler: float = 0.0) -> Tensor:
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

    def forward(self, states: Tensor, pack: Pack, n_layers: int, gates: Tensor | None, checkpoint: bool) -> Tensor:
        """Return the states (T, hidden) behind some rounds of the latents."""
        if n_layers == 0:
            return states
        latents = self.reader(states, pack, gates, n_rounds=n_layers, checkpoint=checkpoint)  # (B, m, hidden)
        keys, values = self.key_value(latents).chunk(2, dim=-1)
        keys, values = (heads_of(part, self.n_heads).flatten(1, 2) for part in (keys, values))  # (B, heads * m, hidden)
        place, size = _padding(pack)
        queries = _padded(states, place, (pack.n_rows, size))
        scores = torch.bmm(queries, keys.transpose(1, 2).to(queries.dtype)) * self.hidden_size**-0.5
        attention = torch.softmax(scores.unflatten(-1, (self.n_heads, -1)), dim=-1).flatten(2)
        read = torch.bmm(attention.to(values.dtype), values).flatten(0, 1).index_select(0, place)  # (T, hidden)
        return self.norm_out(states + read)
