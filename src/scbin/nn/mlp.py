"""The default backbone, without attention: each token sees itself and the mean of its cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from scbin.nn.backbone import layer_number, token_logits
from scbin.nn.packs import row_sums, token_weights, weighted_sums
from scbin.nn.presets import SIZES, Network

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.nn.packs import Pack
    from scbin.tokens.vocabulary import Vocabulary


class MlpLayer(nn.Module):
    """A feed-forward block that reads a token's state and its cell's mean."""

    def __init__(self, hidden_size: int, inner: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.own, self.cell = nn.Linear(hidden_size, inner), nn.Linear(hidden_size, inner, bias=False)
        self.out = nn.Linear(inner, hidden_size)

    def forward(self, states: Tensor, pack: Pack, weights: Tensor) -> Tensor:
        """Return the states (T, hidden) after the block; `weights` (T,) sum to 1 over each row."""
        normed = self.norm(states)
        cell = self.cell(weighted_sums(normed, pack, weights).to(normed.dtype))  # (B, inner)
        return states + self.out(F.gelu(self.own(normed) + cell[pack.rows]))


class MlpBackbone(nn.Module):
    """Blocks that read each token and the mean of its row, in which genes count by their expression and other tokens as 1.

    A token enters as the sum of its own and its position's vector, and logits come from the same table of tokens.
    """

    kind = "mlp"
    vector_options: ClassVar = {"reads": False, "layer": 0}  # the cell vector reads the expression alone
    weights: Tensor

    def __init__(self, vocabulary: Vocabulary, preset: Network):
        super().__init__()
        n, length = preset.hidden_size, max(vocabulary.n_positions, preset.max_length or 0)
        self.sizes = {name: getattr(preset, name) for name in SIZES} | {"max_length": length}
        self.hidden_size, self.n_layers = n, preset.num_hidden_layers
        self.tokens, self.positions = nn.Embedding(vocabulary.n_tokens, n), nn.Embedding(length, n)
        for table in self.tables():
            nn.init.normal_(table, std=0.02)
        self.norm = nn.LayerNorm(n)
        self.transform = nn.Sequential(nn.Linear(n, n), nn.GELU(), nn.LayerNorm(n))
        self.bias = nn.Parameter(torch.zeros(vocabulary.n_tokens))
        self.layers = nn.ModuleList(MlpLayer(n, preset.intermediate_size) for _ in range(self.n_layers))
        weights = np.where(vocabulary.is_gene_token(np.arange(vocabulary.n_tokens)), token_weights(vocabulary), 1)
        self.register_buffer("weights", torch.from_numpy(weights.astype(np.float32)), persistent=False)  # (tokens,)

    @classmethod
    def build(cls, vocabulary: Vocabulary, preset: Network) -> Self:
        """Build one with random weights for a vocabulary."""
        return cls(vocabulary, preset)

    @classmethod
    def from_config(cls, vocabulary: Vocabulary, config: dict[str, Any]) -> Self:
        """Build the shape that `config` describes, without its weights."""
        return cls(vocabulary, Network(**config))

    def config(self) -> dict[str, Any]:
        """Return the shape as plain values."""
        return dict(self.sizes)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return the tables of the token ids and of the positions."""
        return self.tokens.weight, self.positions.weight

    def embed(self, pack: Pack) -> Tensor:
        """Return what goes into the first layer (T, hidden)."""
        return self.norm(self.tokens(pack.input_ids) + self.positions(pack.position_ids))

    def encode(self, pack: Pack, layer: int = -1, *, gates: Tensor | None = None) -> Tensor:
        """Return the hidden states of a pack after one layer (T, hidden)."""
        states, weights = self.embed(pack), self.weights[pack.input_ids]
        weights = weights if gates is None else weights * gates.exp()
        weights = weights / row_sums(weights, pack).clamp_min(1e-12)[pack.rows]
        for block in self.layers[: layer_number(layer, self.n_layers)]:
            states = block(states, pack, weights)
        return states

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None, *, ids: Tensor | None = None) -> Tensor:
        """Return the logits of some token ids at some hidden states (M, K)."""
        return token_logits(self.transform(hidden), self.tokens.weight, self.bias, start, stop, ids)
