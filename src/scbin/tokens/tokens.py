"""Rows of tokens with the vocabulary they are written in, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from scbin.tokens.vocabulary import Vocabulary


@runtime_checkable
class Tokens(Protocol):
    """What the package asks of rows of tokens; :class:`~scbin.tokens.tokens.MemoryTokens` is the first kind.

    A row is a cell, a column is a position and a value is a token id. Whatever holds such rows and answers these seven
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

    def epoch_order(self, cells: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return rows in the order of one epoch of training, a function of (seed, epoch, set of rows)."""


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

    def epoch_order(self, cells: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return rows in the order of one epoch."""
        return philox(seed, epoch).permutation(np.sort(cells))


def philox(seed: int, epoch: int) -> np.random.Generator:
    """Return a generator whose numbers are a function of (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64)))


class KeptRows:
    """Some rows of tokens, read once and kept; they go by the numbers that they have there."""

    def __init__(self, tokens: Tokens, rows: np.ndarray):
        self.tokens, self.rows, self.matrix = tokens, np.sort(rows), tokens.take(np.sort(rows))

    def __getattr__(self, name: str) -> Any:
        """Return what is asked of the tokens themselves."""
        return getattr(self.tokens, name)

    def take(self, rows: np.ndarray) -> csr_matrix:
        """Return some rows, in the order asked for (rows, positions)."""
        return self.matrix[np.searchsorted(self.rows, rows)]
