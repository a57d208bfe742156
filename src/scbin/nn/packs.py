"""Rows of tokens laid end to end, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from scbin.nn.attention import Layout, pack_layout, to_device

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix
    from torch import Tensor


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
