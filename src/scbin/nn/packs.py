"""Rows of tokens laid end to end, without padding; what tokens say of expression; sums over rows."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import nn

from scbin.nn.attention import Layout, pack_layout, to_device
from scbin.tokens.values import TARGET

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Pack:
    """Several token rows, one behind the other, on one device.

    Every token brings its position, so the order within a row is free. `cells` says which row of the tokens each row of the
    pack comes from.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64
    layout: Layout  # where each row begins
    cells: np.ndarray  # (B,) int64
    gates: Tensor | None = None  # (T,) logarithms added to the attention that each token receives

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.cells)

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all rows together."""
        return len(self.input_ids)

    @property
    def rows(self) -> Tensor:
        """The row that each token belongs to (T,)."""
        lengths = torch.diff(self.layout.cu_seqlens).long()
        numbers = torch.arange(self.n_rows, device=lengths.device)
        return torch.repeat_interleave(numbers, lengths, output_size=self.n_tokens)


def make_pack(
    ids: np.ndarray, positions: np.ndarray, lengths: np.ndarray, cells: np.ndarray, device: torch.device | str = "cpu"
) -> Pack:
    """Put token ids and positions (T,) of rows of these lengths (B,) on a device as a pack."""
    ids, positions, cells = (np.asarray(part, dtype=np.int64) for part in (ids, positions, cells))
    return Pack(to_device(ids, device), to_device(positions, device), pack_layout(np.asarray(lengths), device), cells)


def pack_rows(rows: csr_matrix, cells: np.ndarray, device: torch.device | str = "cpu") -> Pack:
    """Lay token rows end to end.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> pack = pack_rows(csr_matrix([[2, 0, 7], [2, 8, 0]]), np.array([0, 1]))
    >>> pack.input_ids, pack.position_ids, pack.layout.lengths
    (tensor([2, 7, 2, 8]), tensor([0, 2, 0, 1]), [2, 2])
    """
    return make_pack(rows.data, rows.indices, np.diff(rows.indptr), cells, device)


def plan_packs(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Share rows out over few packs within a token budget; empty rows are left out.

    Rows are sorted by length and cut where the budget is full, so that the plan depends on the lengths alone. A row longer
    than the budget gets a pack of its own.

    Examples
    --------
    >>> plan_packs(np.array([3, 5, 0, 2]), token_budget=6)
    [array([1]), array([0, 3])]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    cuts, filled = [], 0
    for place, length in enumerate(lengths[order].tolist()):
        if filled and filled + length > token_budget:
            cuts.append(place)
            filled = 0
        filled += length
    return [np.sort(part) for part in np.split(order, cuts)] if len(order) else []


# ---- what tokens say of expression, and sums over the rows of a pack ------------------------------------------------


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
