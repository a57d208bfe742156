"""Rows of tokens laid end to end: packs, without padding anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


@dataclass(frozen=True, eq=False)
class Pack:
    """Several token rows, one behind the other; row i is `[cu_seqlens[i], cu_seqlens[i + 1])`.

    The order of the tokens within a row is free, because every token brings its position. Where `key_lengths` is given, only
    the first `key_lengths[i]` tokens of row i are attended to; the others ask but are not seen.
    """

    input_ids: np.ndarray  # (T,) int64
    position_ids: np.ndarray  # (T,) int64
    cu_seqlens: np.ndarray  # (B + 1,) int32
    cells: np.ndarray  # (B,) int64, the row of the token matrix each row comes from
    key_lengths: np.ndarray | None = None  # (B,) int32

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all rows together."""
        return len(self.input_ids)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.cells)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row (B,)."""
        return np.diff(self.cu_seqlens)


def plan_packs(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Share rows out over as few packs as a token budget allows.

    First fit in order of decreasing length: every row stands in exactly one pack, packs are full but for the last ones, and
    the plan depends on the lengths alone. A row longer than the budget gets a pack of its own; empty rows are left out.

    Parameters
    ----------
    lengths
        Tokens of each row.
    token_budget
        Most tokens a pack may have.

    Returns
    -------
    For each pack, the indices of its rows in increasing order.

    Examples
    --------
    >>> plan_packs(np.array([3, 5, 0, 2]), token_budget=6)
    [array([1]), array([0, 3])]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    filled = np.flatnonzero(lengths)
    if not len(filled):
        return []
    if lengths.sum() <= token_budget:
        return [filled]
    order = filled[np.argsort(-lengths[filled], kind="stable")]
    room = _Room(len(order))
    packs: list[list[int]] = []
    for row in order:
        slot = room.take(int(lengths[row]), token_budget)
        if slot == len(packs):
            packs.append([])
        packs[slot].append(row)
    return [np.sort(np.array(pack, dtype=np.int64)) for pack in packs]


class _Room:
    """Free tokens of each pack in a tree of maxima, so that first fit costs log(packs) a row."""

    def __init__(self, n_most: int):
        self.width = 1 << max(n_most - 1, 0).bit_length()
        self.tree = np.full(2 * self.width, -1, dtype=np.int64)  # -1: not opened yet
        self.n_open = 0

    def take(self, length: int, budget: int) -> int:
        """Return the first pack with room for `length` more tokens, opening one where there is none."""
        if self.tree[1] < length:
            slot, self.n_open = self.n_open, self.n_open + 1
            self._set(slot, max(budget - length, 0))
            return slot
        node = 1
        while node < self.width:
            node = 2 * node if self.tree[2 * node] >= length else 2 * node + 1
        slot = node - self.width
        self._set(slot, int(self.tree[node]) - length)
        return slot

    def _set(self, slot: int, free: int) -> None:
        node = slot + self.width
        self.tree[node] = free
        while node > 1:
            node //= 2
            self.tree[node] = max(self.tree[2 * node], self.tree[2 * node + 1])


def make_pack(tokens: csr_matrix, cells: np.ndarray) -> Pack:
    """Lay the token rows of some cells end to end.

    Parameters
    ----------
    tokens
        Token matrix: column = position, value = token id.
    cells
        Rows of it, in the order they shall have.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> pack = make_pack(csr_matrix([[2, 0, 7], [2, 8, 0]]), np.array([1, 0]))
    >>> pack.input_ids, pack.position_ids, pack.cu_seqlens
    (array([2, 8, 2, 7]), array([0, 1, 0, 2]), array([0, 2, 4], dtype=int32))
    """
    cells = np.asarray(cells, dtype=np.int64)
    starts = tokens.indptr[cells].astype(np.int64)
    lengths = tokens.indptr[cells + 1] - starts
    cu_seqlens, where = ragged_index(starts, lengths)
    return Pack(
        input_ids=tokens.data[where].astype(np.int64),
        position_ids=tokens.indices[where].astype(np.int64),
        cu_seqlens=cu_seqlens,
        cells=cells,
    )


def ragged_index(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds (B + 1,) of segments laid end to end and the flat index (T,) that gathers them."""
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=cu_seqlens[1:])
    where = np.repeat(starts - cu_seqlens[:-1], lengths) + np.arange(cu_seqlens[-1])
    return cu_seqlens.astype(np.int32), where


def take_rows(pack: Pack, rows: np.ndarray) -> tuple[Pack, np.ndarray]:
    """Return some rows of a pack as a pack, with the flat index (T',) of its tokens in the old one."""
    starts = pack.cu_seqlens[rows].astype(np.int64)
    cu_seqlens, where = ragged_index(starts, pack.lengths[rows].astype(np.int64))
    keys = None if pack.key_lengths is None else pack.key_lengths[rows]
    return Pack(pack.input_ids[where], pack.position_ids[where], cu_seqlens, pack.cells[rows], keys), where
