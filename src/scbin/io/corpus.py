"""Corpora: tokens in AnnData files, h5ad or zarr, that are read by blocks of rows and need not fit into memory."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from glob import escape, glob
from itertools import chain, groupby
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset, write_elem
from scipy import sparse

from scbin import _keys
from scbin._errors import ScbinError, ScbinInputError
from scbin.io.commit import committed, standing
from scbin.tokens.tokens import philox
from scbin.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
ROWS = 128  # of a block, which is read at once
AT_ONCE = 64  # blocks that are read in one piece, at most
WINDOW = 1280  # blocks among which the cells of an epoch are mixed, at most
SPARE = 128  # blocks that are held beyond these: one that is not done may not be asked for in dozens of steps
HELD = 100_000_000  # tokens that are in memory, and by which there are fewer of these blocks where rows are long
MANY = 4_096  # rows: whoever asks for more is no step, and no block is kept
OPEN_FILES, VALUES = 64, 4_000_000  # at a time; tokens that are written at once
RESULTS = "scbin"  # folder beside the input
FAULTS = (OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError)  # of libraries, on damaged files


# ---- paths ----------------------------------------------------------------------------------------------------------


def is_paths(data: object) -> bool:
    """Whether something names files: a path, a pattern, or several of them."""
    several = data if isinstance(data, list | tuple) and data else [data]
    return all(isinstance(item, str | os.PathLike) for item in several)


def expand(paths: Paths) -> list[Path]:
    """Return the files that paths name, each once: ranges in braces, patterns and folders are written out, in natural order."""
    found: list[Path] = []
    for item in [paths] if isinstance(paths, str | os.PathLike) else paths:
        for path in braces(os.fspath(item)):
            inside = path.is_dir() and path.suffix != ".zarr"
            literal = escape(str(path)) if path.exists() else str(path)  # brackets may be part of a name
            names = glob(f"{literal}/*.h5ad") + glob(f"{literal}/*.zarr") if inside else glob(literal) or [str(path)]
            names.sort(key=lambda name: [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", name)])
            found += map(Path, names)
    if not found:
        raise ScbinInputError("F01", f"no h5ad or zarr file is in {paths!s}.")
    return list(dict.fromkeys(found))


def braces(text: str) -> list[Path]:
    """Write out a range in braces, with its leading zeros.

    Examples
    --------
    >>> [path.name for path in braces("shard_{08..10}.h5ad")]
    ['shard_08.h5ad', 'shard_09.h5ad', 'shard_10.h5ad']
    """
    if (match := re.search(r"\{(\d+)\.\.(\d+)\}", text)) is None:
        return [Path(text)]
    numbers = range(int(match[1]), int(match[2]) + 1)
    return [Path(f"{text[: match.start()]}{n:0{len(match[1])}d}{text[match.end() :]}") for n in numbers]


# ---- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in every error that is raised while it is read."""
    try:
        yield
    except ScbinInputError as error:
        told = error.message if str(path) in error.message else f"{path}: {error.message}"
        raise ScbinInputError(error.code, told) from error
    except ScbinError:
        raise
    except FAULTS as error:
        found = (
            "is not there"
            if not path.exists()
            else f"is damaged, cut short or not an AnnData file ({str(error)[:200]})"
        )
        raise ScbinInputError("F01", f"{path} {found}.") from error


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Open an AnnData file."""
    with naming(path):
        group = zarr.open_group(path, mode="r") if path.is_dir() else h5py.File(path, "r")
        if "obs" not in group:
            raise ScbinInputError("F01", "this is not an AnnData file: it has no obs.")
        yield group


def stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file does."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, before: Sequence[int]) -> None:
    """Refuse a file that is not as it was."""
    if stamp(path) != tuple(before):
        raise ScbinInputError("F01", "the file was changed while it was read. Repeat the call.")


def open_cells(path: Path, layer: str | None = None) -> AnnData:
    """Return the cells of a file, `X` or the layer left on disk and nothing else but obs and var read."""
    place = "X" if layer is None else f"layers/{layer}"
    with reading(path) as group:
        if place not in group:
            raise ScbinInputError("I48", f"there is no {place}; name another with layer=.")
        matrix: Any = sparse_dataset(group[place]) if hasattr(group[place], "keys") else group[place]
        if getattr(matrix, "format", "csr") == "csc":  # rows cannot be had from columns one by one
            matrix = sparse.csr_matrix(matrix.to_memory())
        parts = {name: read_elem(group[name]) for name in ("obs", "var")}
        parts["uns"] = {"log1p": read_elem(group["uns/log1p"])} if "uns/log1p" in group else {}
        return AnnData(matrix, **parts) if layer is None else AnnData(**parts, layers={layer: matrix})


def _stored(path: Path, key: str) -> tuple[Any, Any]:
    """Return the arrays of token ids and positions, open."""
    with reading(path) as group:
        return group["obsm"][key]["data"], group["obsm"][key]["indices"]


class FileTokens:
    """Token rows in AnnData files, of one vocabulary: a kind of :class:`~scbin.tokens.tokens.Tokens`.

    What is in memory are the lengths of the rows and the blocks that were read last; columns of `obs` are read when they are
    asked for. :func:`scbin.open_tokens` makes it.
    """

    def __init__(self, paths: Sequence[Path], vocabulary: Vocabulary | None = None, key: str = _keys.TOKENS):
        self.paths, self.key = list(paths), key
        self.vocabulary: Vocabulary = vocabulary  # type: ignore[assignment]  # the first file's, where none was given
        self._stamps, lengths = [], []
        for path in self.paths:
            with reading(path) as group:
                self._stamps.append(stamp(path))
                lengths.append(self._check(group))
        self.lengths = np.concatenate(lengths)
        sizes = [len(part) for part in lengths]
        self.bounds = np.concatenate([[0], np.cumsum(sizes)])  # first row of each file
        starts = [np.arange(first, first + n, ROWS) for first, n in zip(self.bounds, sizes, strict=False)]
        self._starts = np.concatenate(starts)  # first row of each block
        self._files = np.repeat(np.arange(len(sizes)), [len(part) for part in starts])  # file of each block
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        self._offsets = ends[self._starts] - ends[self.bounds[self._files]]  # where a block starts in its file
        self.window = int(np.clip(HELD / (ROWS * max(ends[-1] / max(self.n_cells, 1), 1)), 1, WINDOW))
        self._arrays, self._lock = lru_cache(OPEN_FILES)(_stored), Lock()
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()

    def _check(self, group: Any) -> np.ndarray:
        """Check what a file says of its tokens; return the lengths of its rows."""
        entry = f"uns/{_keys.UNS}/{_keys.of_tokens(_keys.VOCABULARY, self.key)}"
        if f"obsm/{self.key}" not in group or entry not in group:
            what = f"there are no tokens in obsm[{self.key!r}] with their vocabulary in uns"
            raise ScbinInputError("V01", f"{what}. Call scbin.pp.tokenize(path, out=...).")
        own, tokens = str(read_elem(group[entry])), group[f"obsm/{self.key}"]
        self.vocabulary = self.vocabulary or Vocabulary.from_json(own)
        same = own == self.vocabulary.to_json() or Vocabulary.from_json(own).sha256 == self.vocabulary.sha256
        column = f"obs/{_keys.of_tokens(_keys.ROW_VOCABULARY, self.key)}"
        marks = pd.Series(read_elem(group[column]) if column in group else [], dtype=object).astype(str)
        if not same or (marks != self.vocabulary.mark).any():
            fix = "Tokenize all files in one call, or each with like=model."
            raise ScbinInputError("V03", f"tokens are of another vocabulary than those of the others. {fix}")
        bounds = tokens["indptr"][:].astype(np.int64)
        lengths, sizes = np.diff(bounds), {int(tokens[part].shape[0]) for part in ("data", "indices")}
        sound = bounds[0] == 0 and (lengths >= 0).all() and sizes == {int(bounds[-1])}
        if not sound or int(tokens.attrs["shape"][1]) != self.vocabulary.n_positions:
            raise ScbinInputError("V02", "the row offsets or columns of the tokens do not fit: the file is damaged.")
        return lengths

    @property
    def n_cells(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def names(self) -> pd.Index:
        """Names of the cells, read anew."""
        return pd.Index(self.obs(None).astype(object))

    def obs(self, column: str | None) -> pd.Series:
        """Return a column of `obs` (cells,), `None` for the names, read anew; `KeyError` where a file has none."""
        parts: list[Any] = []
        for path in self.paths:
            with reading(path) as group:
                name = group["obs"].attrs["_index"] if column is None else column
                parts.append(pd.Series(read_elem(group["obs"][name])) if name in group["obs"] else None)
            if parts[-1] is None:
                raise KeyError(f"{column!r} is not a column of obs in {path}")
        return pd.concat(parts, ignore_index=True)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def take(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return some rows, in the order asked for (rows, positions)."""
        if not isinstance(rows, np.ndarray) or rows.dtype.kind != "i":  # lists and masks, as numpy reads them
            rows = np.arange(self.n_cells)[rows]
        blocks = np.searchsorted(self._starts, rows, side="right") - 1
        wanted, v = np.unique(blocks).tolist(), self.vocabulary
        if len(wanted) > self.window + SPARE or len(rows) > MANY:  # a few blocks at a time, and none is kept
            order, parts = np.argsort(rows, kind="stable"), []
            n_parts = max(-(-len(wanted) // min(AT_ONCE, self.window)), -(-len(rows) // MANY))
            for part in np.array_split(order, n_parts):
                parts.append(self.take(rows[part]))
                self._blocks.clear()
            matrix = sparse.vstack(parts, format="csr")
            return matrix if (np.diff(rows) >= 0).all() else matrix[np.argsort(order)]
        data, indices = [np.zeros(0, v.dtype)], [np.zeros(0, np.int32)]
        with self._lock:
            missing = enumerate(block for block in wanted if block not in self._blocks)
            piece = lambda item: (item[1] - item[0], self._files[item[1]], item[0] // AT_ONCE)  # that follow each other
            for run in [[block for _, block in run] for _, run in groupby(missing, piece)]:
                self._read(run[0], run[-1])
            for block, row in zip(blocks.tolist(), (rows - self._starts[blocks]).tolist(), strict=True):
                ids, positions, bounds = self._blocks[block]
                data.append(ids[bounds[row] : bounds[row + 1]])
                indices.append(positions[bounds[row] : bounds[row + 1]])
            for block in wanted:
                self._blocks.move_to_end(block)
            while len(self._blocks) > self.window + SPARE:
                self._blocks.popitem(last=False)
        stored = np.concatenate(data, dtype=v.dtype, casting="unsafe"), np.concatenate(indices, dtype=np.int32)
        bounds = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        matrix = sparse.csr_matrix((*stored, bounds), shape=(len(rows), v.n_positions))
        matrix.sort_indices()
        return matrix

    def _read(self, first: int, last: int) -> None:
        """Read consecutive blocks of a file."""
        file, v, begin = int(self._files[first]), self.vocabulary, int(self._offsets[first])
        lengths = self.lengths[self._starts[first] : min(self._starts[last] + ROWS, self.bounds[file + 1])]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        with naming(self.paths[file]):
            check_unchanged(self.paths[file], self._stamps[file])
            stored = self._arrays(self.paths[file], self.key)
            ids, positions = (part[begin : begin + int(bounds[-1])] for part in stored)
            sound = (
                len(ids) == len(positions) == bounds[-1] and ids.dtype.kind == "u" and ids.max(initial=0) < v.n_tokens
            )
            if not sound or positions.min(initial=0) < 0 or positions.max(initial=0) >= v.n_positions:
                raise ScbinInputError("V02", "some tokens are not of their vocabulary: the file is damaged.")
        ids, positions = ids.astype(np.min_scalar_type(v.n_tokens)), positions.astype(np.min_scalar_type(v.n_positions))
        for block in range(first, last + 1):
            start = int(self._starts[block] - self._starts[first])
            own = bounds[start : start + ROWS + 1]
            part = slice(own[0], own[-1])  # a copy, so that the others can go
            self._blocks[block] = ids[part].copy(), positions[part].copy(), own - own[0]

    def epoch_order(self, cells: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return the cells in the order of one epoch, a function of (seed, epoch, set of cells) that reads block by block.

        The blocks come in a random order, one after the other, and every cell of a block at a random moment of the time in which
        the next hundreds of blocks come. So each step has cells of hundreds of blocks, and each block is read once (those at the
        turn of an epoch twice).
        """
        generator, n_blocks, cells = philox(seed, epoch), len(self._starts), np.sort(cells)
        block = generator.permutation(n_blocks)[np.searchsorted(self._starts, cells, side="right") - 1]
        moment = block + min(self.window, n_blocks) * generator.random(len(cells))
        return cells[np.argsort(moment % n_blocks, kind="stable")]


def open_tokens(paths: Paths, *, tokens_key: str | None = None) -> FileTokens:
    """Open AnnData files with tokens as one corpus, without reading the tokens into memory.

    `tl.pretrain`, `tl.finetune`, `tl.embed` and `tl.predict` take a corpus, or the paths themselves, as in
    `scbin.tl.pretrain("corpus/shard_{0..46}.h5ad")`; `tl.evaluate` and `tl.perturb` read it into memory.

    Parameters
    ----------
    paths
        A file (h5ad or zarr), a folder of such files, a pattern (`"corpus/*.zarr"`), a range (`"shard_{0..46}.h5ad"`), or a list
        of these. All files need to have the same vocabulary.
    tokens_key
        The slot of `obsm` with the tokens. Default: `"X_tokens"`.

    Raises
    ------
    ScbinInputError
        If a file is missing, damaged, not tokenized or tokenized with another vocabulary; the error names it.

    Examples
    --------
    >>> import pathlib, scbin, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> scbin.datasets.pbmc68k_reduced().write_h5ad(folder / "cells.h5ad")
    >>> paths = scbin.pp.tokenize(folder / "cells.h5ad", out=folder / "corpus")
    >>> tokens = scbin.open_tokens(paths)
    >>> tokens.n_cells, tokens.take([5, 3]).shape
    (700, (2, 769))
    """
    return FileTokens(expand(paths), key=_keys.TOKENS if tokens_key is None else tokens_key)


def opened(data: Any, tokens_key: str | None = None) -> Any:
    """Return the corpus that paths name; anything else unchanged."""
    return open_tokens(data, tokens_key=tokens_key) if is_paths(data) else data


# ---- writing --------------------------------------------------------------------------------------------------------


def write_shard(path: Path, key: str, rows: Iterator[sparse.csr_matrix], rest: Any) -> None:
    """Write token rows into a new AnnData file as they come; `rest()` then gives obs, var and uns."""
    file: Any
    how: dict[str, Any]
    if path.suffix == ".zarr":
        file, how = nullcontext(zarr.open_group(path, mode="w", zarr_format=2)), {"chunks": (131_072,)}
    else:
        file, how = h5py.File(path, "w"), {"chunks": (32_768,), "compression": "gzip", "compression_opts": 1}
    with file as group:
        write_elem(group, "obsm", {})
        waiting: list[sparse.csr_matrix] = []
        for part in chain(rows, [None]):  # None: that was all
            waiting += [] if part is None else [part]
            if waiting and (part is None or sum(each.nnz for each in waiting) > VALUES):
                joined = sparse.vstack(waiting, format="csr")
                joined.indptr = joined.indptr.astype(np.int64)
                if key in group["obsm"]:
                    sparse_dataset(group["obsm"][key]).append(joined)
                else:
                    write_elem(group["obsm"], key, joined, dataset_kwargs=how)
                waiting = []
        for name, value in ({"layers": {}, "obsp": {}, "varm": {}, "varp": {}} | rest()).items():
            write_elem(group, name, value)
        group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def read_cells(path: Path) -> AnnData:
    """Read a whole AnnData file into memory."""
    with reading(path) as group:
        return read_elem(group)


def write_cells(target: Path, adata: AnnData) -> None:
    """Write an AnnData, h5ad or zarr by the name, whole or not at all."""
    with committed(target) as temporary:
        if target.suffix == ".zarr":
            write_elem(zarr.open_group(temporary, mode="w", zarr_format=2), "/", adata)
        else:
            adata.write_h5ad(temporary)


def write_beside(path: Path, found: AnnData | pd.DataFrame) -> Path:
    """Write what a verb says of the cells of a file into an AnnData of the same name in the folder `scbin` beside it.

    It has obs and var of the file, too; what earlier calls wrote there stays, if it is of the same cells.
    """
    target = path.parent / RESULTS / path.name
    with reading(path) as group:
        obs, var = read_elem(group["obs"]), read_elem(group["var"])
    before = standing(target)
    adata = read_cells(before) if before.exists() else AnnData(obs=obs, var=var)
    if not adata.obs_names.equals(obs.index):
        raise ScbinInputError("A04", f"{target} has other cells than {path}. Move it away.")
    table = found.obs if isinstance(found, AnnData) else found
    adata.obs = adata.obs.assign(**{str(name): values for name, values in table.items()})
    if isinstance(found, AnnData):
        adata.obsm.update(found.obsm)
        adata.uns[_keys.UNS] = {**adata.uns.get(_keys.UNS, {}), **found.uns.get(_keys.UNS, {})}
    write_cells(target, adata)
    return target
