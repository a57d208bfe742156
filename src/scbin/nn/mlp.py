"""No attention: each token sees itself and the mean of its cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn

from scbin.nn.backbone import TableBackbone
from scbin.nn.embedding import row_sums, token_weights, weighted_sums

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.nn.packs import Pack
    from scbin.nn.presets import Network
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
        return states + self.out(nn.functional.gelu(self.own(normed) + cell[pack.rows]))


class MlpBackbone(TableBackbone):
    """Blocks that read each token and the mean of its row, in which genes count by their expression and other tokens as 1."""

    kind = "mlp"
    vector_options: ClassVar = {"latents": 0, "layer": 0}  # the cell vector reads the expression alone
    weights: Tensor

    def __init__(self, vocabulary: Vocabulary, preset: Network):
        super().__init__(vocabulary, preset)
        self.layers = nn.ModuleList(
            MlpLayer(self.hidden_size, preset.intermediate_size) for _ in range(preset.num_hidden_layers)
        )
        weights = np.where(vocabulary.is_gene_token(np.arange(vocabulary.n_tokens)), token_weights(vocabulary), 1)
        self.register_buffer("weights", torch.from_numpy(weights.astype(np.float32)), persistent=False)  # (tokens,)

    def forward(self, states: Tensor, pack: Pack, n_layers: int, gates: Tensor | None) -> Tensor:
        """Return the states (T, hidden) behind some layers."""
        weights = self.weights[pack.input_ids]
        weights = weights if gates is None else weights * gates.exp()
        weights = weights / row_sums(weights, pack).clamp_min(1e-12)[pack.rows]
        for layer in self.layers[:n_layers]:
            states = layer(states, pack, weights)
        return states
