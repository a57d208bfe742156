"""What tokens say of expression, on the host and on the device, and sums over the rows of a pack."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import nn

from scbin.tokens.values import TARGET

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.nn.packs import Pack
    from scbin.tokens.vocabulary import Vocabulary


def gene_values(tables: Any, ids: Any, positions: Any) -> tuple[Any, Any]:
    """Return the gene of each token (n,), -1 where it is none, and the expression it stands for (n,) float32.

    `tables` are those of the vocabulary for arrays, or an :class:`Expression` for tensors.
    """
    genes = tables.gene_of_id[ids] + tables.gene_of_position[positions] + 1  # one of the two is -1
    return genes, tables.value_of_id[ids] * tables.value_of_position[positions] * (genes >= 0)


def token_expression(rows: csr_matrix, vocabulary: Vocabulary) -> csr_matrix:
    """Return the expression that tokens stand for (cells, genes) float32, in the unit of the vocabulary."""
    genes, values = gene_values(vocabulary.tables(), rows.data, rows.indices)
    shape = (rows.shape[0], len(vocabulary.genes))
    matrix = csr_matrix((values, np.maximum(genes, 0), rows.indptr.copy()), shape)  # indptr changes in place below
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def log_normalised(expression: csr_matrix, vocabulary: Vocabulary) -> csr_matrix:
    """Return log1p of counts per 10,000 (cells, genes) float64; other units as they are."""
    matrix = expression.astype(np.float64)
    if vocabulary.unit == "counts":
        depth = np.maximum(np.asarray(matrix.sum(axis=1)).ravel(), 1)
        matrix.data = np.log1p(matrix.data * np.repeat(TARGET / depth, np.diff(matrix.indptr)))
    return matrix


def token_weights(vocabulary: Vocabulary) -> np.ndarray:
    """Return by how much each token counts in a mean weighted by expression (tokens,)."""
    return np.log1p(vocabulary.token_values) if vocabulary.unit == "counts" else vocabulary.token_values


class Expression(nn.Module):
    """The tables of a vocabulary on the device: the gene of each token of a pack, and how much of it, as log1p values."""

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        tables, self.unit = vocabulary.tables(), vocabulary.unit
        for field in fields(tables):
            self.register_buffer(field.name, torch.from_numpy(getattr(tables, field.name)), persistent=False)

    def forward(self, pack: Pack, gates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return genes (T,) int64, 0 where a token is none, and values (T,) float32, 0 there.

        Counts become log1p of counts per 10,000 of the row; other units stay. `gates` (T,) are logarithms of factors on what
        each token adds to the sum of its row; its own value is not multiplied.
        """
        genes, values = gene_values(self, pack.input_ids, pack.position_ids)
        if self.unit == "counts":
            depth = row_sums(values if gates is None else values * gates.float().exp(), pack)
            values = torch.log1p(values * (TARGET / depth.clamp_min(1.0))[pack.rows])
        return genes.clamp_min(0), values


def row_sums(values: Tensor, pack: Pack) -> Tensor:
    """Return the sums of values (T,) over each row of a pack (B,)."""
    return weighted_sums(torch.ones_like(values)[:, None], pack, values)[:, 0]


def weighted_sums(states: Tensor, pack: Pack, weights: Tensor, index: Tensor | None = None) -> Tensor:
    """Return the sums of states (T, hidden), weighted by (T,), over each row of a pack (B, hidden), in float32.

    Deterministic, and the same whatever else is in the pack. With `index` (T,), token t takes state `index[t]`.
    """
    index = torch.arange(pack.n_tokens, device=states.device) if index is None else index
    offsets = pack.layout.cu_seqlens[:-1].long()
    with torch.autocast(states.device.type, enabled=False):
        return F.embedding_bag(index, states.float(), offsets, mode="sum", per_sample_weights=weights.float())
