"""CSR matrices: whether their arrays hold together, and reading them from files straight into arrays of our own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._errors import ScbinInputError, count

if TYPE_CHECKING:
    from types import TracebackType


def check_structure(
    indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, shape: tuple[int, int], *, columns: bool = True
) -> None:
    """Refuse CSR arrays that point outside themselves: compiled loops would read other memory."""
    check_offsets(indptr, shape[0], min(len(indices), len(data)))
    if columns:
        check_columns(indices[: int(indptr[-1])], shape[1])


def check_offsets(indptr: np.ndarray, n_rows: int, n_stored: int) -> None:
    """Refuse row offsets that do not rise from 0 to at most the number of stored values."""
    whole = len(indptr) == n_rows + 1 and indptr[0] == 0 and bool(np.all(indptr[1:] >= indptr[:-1]))
    if not whole or indptr[-1] > n_stored:
        raise ScbinInputError(
            "I43", "the sparse matrix is damaged: its indptr does not rise from 0 to the number of stored values."
        )


def check_columns(indices: np.ndarray, n_columns: int) -> None:
    """Refuse column indices that are none of the matrix."""
    if len(indices) and not (0 <= indices.min() and indices.max() < n_columns):
        raise ScbinInputError(
            "I43",
            f"the sparse matrix is damaged: it has column indices from {indices.min()} to {indices.max()}, but "
            f"{count(n_columns, 'column')}.",
        )


class DiskRows:
    """A CSR matrix in an HDF5 or zarr group.

    Where HDF5 keeps the arrays as they are, neither compressed nor filtered, their bytes are read from the file without
    the library in between: half the time, and other threads run meanwhile. Everything else goes through the library.

    With `reuse`, what `read` returns is overwritten by that many calls from then on: fresh memory for every block would cost as
    much time as filling it.
    """

    def __init__(self, group: Any, *, reuse: int = 0):
        self.indptr: np.ndarray = np.asarray(group["indptr"][:])  # as stored; one number per row
        self._data, self._indices = _Flat(group["data"], reuse=reuse), _Flat(group["indices"], reuse=reuse)

    def __enter__(self) -> DiskRows:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._data.close()
        self._indices.close()

    @property
    def n_stored(self) -> int:
        """Number of values and of column indices there are, whichever is less."""
        return min(self._data.size, self._indices.size)

    def read(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored values and their columns from one place to another."""
        return self._data.read(low, high), self._indices.read(low, high)


class _Flat:
    """A one-dimensional array in a file, read by ranges."""

    def __init__(self, array: Any, *, reuse: int):
        self._array = array
        self._reuse = reuse
        self._spare: list[np.ndarray] = []  # the longest unused first
        self.size = int(array.shape[0])
        self._runs = _plain_runs(array)
        self._file = None if self._runs is None else os.open(array.file.filename, os.O_RDONLY)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def read(self, low: int, high: int) -> np.ndarray:
        """Return the numbers from `low` to `high`."""
        out = self._room(high - low)
        if high > low and not self._read_plain(out, low):
            out = np.asarray(self._array[low:high])
        return out

    def _room(self, n: int) -> np.ndarray:
        if not self._reuse:
            return np.empty(n, dtype=self._array.dtype)
        kept = self._spare.pop(0) if len(self._spare) == self._reuse else np.empty(0, dtype=self._array.dtype)
        kept = kept if len(kept) >= n else np.empty(n + n // 8, dtype=self._array.dtype)
        self._spare.append(kept)
        return kept[:n]

    def _read_plain(self, out: np.ndarray, low: int) -> bool:
        """Fill `out` from the runs in the file; False where one of them does not exist, or is not read whole."""
        if self._file is None or self._runs is None:
            return False
        starts, offsets = self._runs
        width, place, stop = out.itemsize, low, low + len(out)
        view = out.view(np.uint8).data
        number = int(np.searchsorted(starts, low, side="right")) - 1
        while place < stop:
            end = min(int(starts[number + 1]), stop)
            offset = int(offsets[number])
            goal = view[(place - low) * width : (end - low) * width]
            if offset < 0 or os.preadv(self._file, [goal], offset + (place - int(starts[number])) * width) != len(goal):
                return False
            place, number = end, number + 1
        return True


def _plain_runs(array: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Return where the runs of an HDF5 array that lie in one piece begin, and where in the file (-1: nowhere); None if not plain.

    The first array has one number more, which lies behind the last run.
    """
    layout = _layout(array)
    if layout is None:
        return None
    size = int(array.shape[0])
    if array.chunks is None:
        start = array.id.get_offset()
        return None if start is None else (np.array([0, size]), np.array([start], dtype=np.int64))
    piece = int(array.chunks[0])
    offsets = np.full(-(-size // piece), -1, dtype=np.int64)

    def note(chunk: Any) -> None:
        offsets[chunk.chunk_offset[0] // piece] = chunk.byte_offset

    array.id.chunk_iter(note)
    follows = np.zeros(len(offsets), dtype=bool)
    follows[1:] = (np.diff(offsets) == piece * array.dtype.itemsize) & (offsets[1:] > 0)
    first = np.flatnonzero(~follows)
    return np.append(first * piece, max(size, len(offsets) * piece)), offsets[first]


def _layout(array: Any) -> Any | None:
    """Return how an HDF5 array is laid out, if its bytes in the file are its numbers; else None."""
    file: Any = getattr(array, "file", None)
    if not hasattr(os, "preadv") or not hasattr(getattr(array, "id", None), "chunk_iter"):
        return None
    plain = (
        file.mode == "r"  # a file that is written to may hold less than the library knows
        and file.driver == "sec2"
        and file.userblock_size == 0
        and array.dtype.isnative
        and array.dtype.kind in "biuf"
        and not array.is_virtual
        and array.external is None
    )
    layout = array.id.get_create_plist() if plain else None
    return None if layout is None or layout.get_nfilters() else layout
