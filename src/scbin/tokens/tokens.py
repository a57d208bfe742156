"""Rows of tokens with the vocabulary they are written in, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from scbin.tokens.vocabulary import Vocabulary


@runtime_checkable
class Tokens(Protocol):
    """What the package asks of rows of tokens; :class:`~scbin.tokens.tokens.MemoryTokens` is the first kind.

    A row is a cell, a column is a position and a value is a token id. Whatever holds such rows and answers these five
    questions can be trained on, embedded and asked: an AnnData in memory, files on disk, rows made up for a perturbation.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """What the tokens mean."""

    @property
    def n_cells(self) -> int:
        """Number of rows."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row (cells,), int64; 0 for a cell without tokens."""

    @property
    def names(self) -> pd.Index:
        """Names of the cells."""

    def take(self, rows: np.ndarray) -> csr_matrix:
        """Return some rows, in the order asked for (rows, positions)."""

    def obs(self, column: str) -> pd.Series:
        """Return what is known of the cells under a name (cells,)."""


@dataclass(frozen=True, eq=False)
class MemoryTokens:
    """Token rows in memory, such as those in an AnnData."""

    matrix: csr_matrix
    vocabulary: Vocabulary
    table: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def n_cells(self) -> int:
        """Number of rows."""
        return int(self.matrix.shape[0])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row (cells,), int64."""
        return np.diff(self.matrix.indptr).astype(np.int64)

    @property
    def names(self) -> pd.Index:
        """Names of the cells."""
        return self.table.index if len(self.table.index) == self.n_cells else pd.RangeIndex(self.n_cells).astype(str)

    def take(self, rows: np.ndarray) -> csr_matrix:
        """Return some rows, in the order asked for (rows, positions)."""
        return self.matrix[rows]

    def obs(self, column: str) -> pd.Series:
        """Return what is known of the cells under a name (cells,)."""
        return self.table[column]


class KeptRows:
    """Some rows of tokens, read once and kept; they go by the numbers that they have there."""

    def __init__(self, tokens: Tokens, rows: np.ndarray):
        self.vocabulary, self.n_cells, self.lengths, self.obs = (
            tokens.vocabulary,
            tokens.n_cells,
            tokens.lengths,
            tokens.obs,
        )
        self.tokens, self.rows, self.matrix = tokens, np.sort(rows), tokens.take(np.sort(rows))

    @property
    def names(self) -> pd.Index:
        """Names of the cells."""
        return self.tokens.names

    def take(self, rows: np.ndarray) -> csr_matrix:
        """Return some rows, in the order asked for (rows, positions)."""
        return self.matrix[np.searchsorted(self.rows, rows)]
