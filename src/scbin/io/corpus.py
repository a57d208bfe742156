"""Corpora: tokens in AnnData files, h5ad or zarr, that are read by blocks of rows and need not fit into memory."""

from __future__ import annotations

import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from glob import glob, has_magic
from itertools import groupby
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
from scbin.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
ROWS = 128  # of a block, which is read at once
WINDOW = 768  # blocks among which the cells of an epoch are mixed, at most
SPARE = 80  # blocks that are held beyond these: one that is not done may not be asked for in dozens of steps
HELD = 50_000_000  # tokens that are in memory, and by which there are fewer of these blocks where rows are long
OPEN_FILES, VALUES = 64, 4_000_000  # at a time; tokens that are written at once
RESULTS = "scbin"  # folder beside the input
FAULTS = (OSError, LookupError, ValueError, RuntimeError, TypeError, AttributeError)  # of libraries, on damaged files
CSR_PARTS = ("data", "indices", "indptr")


# ---- paths ----------------------------------------------------------------------------------------------------------


def is_paths(data: object) -> bool:
    """Whether something names files: a path, a pattern, or several of them."""
    several = data if isinstance(data, list | tuple) and data else [data]
    return all(isinstance(item, str | os.PathLike) for item in several)


def expand(paths: Paths) -> list[Path]:
    """Return the files that paths name, each once: numbers in braces, patterns and folders are written out, in natural order.

    Examples
    --------
    >>> [path.name for path in braces("shard_{0..2}.h5ad")]
    ['shard_0.h5ad', 'shard_1.h5ad', 'shard_2.h5ad']
    """
    found: list[Path] = []
    for item in [paths] if isinstance(paths, str | os.PathLike) else paths:
        named = braces(os.fspath(item))
        for path in named:
            inside = path.is_dir() and not _is_zarr(path)
            pattern = str(path / "*") if inside else str(path)
            matches = [Path(name) for name in glob(pattern)] if has_magic(pattern) else [path]
            kept = [match for match in matches if not inside or match.suffix in (".h5ad", ".zarr")]
            found += sorted(kept, key=lambda p: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", str(p))])
    if not found:
        raise ScbinInputError("F01", f"no file is named by {os.fspath(paths) if isinstance(paths, str) else paths!r}.")
    return list(dict.fromkeys(found))


def braces(text: str) -> list[Path]:
    """Write out a range in braces, `{0..46}`, with its leading zeros."""
    if (match := re.search(r"\{(\d+)\.\.(\d+)\}", text)) is None:
        return [Path(text)]
    numbers = range(int(match[1]), int(match[2]) + 1)
    parts = [f"{text[: match.start()]}{number:0{len(match[1])}d}{text[match.end() :]}" for number in numbers]
    return [path for part in parts for path in braces(part)]


def _is_zarr(path: Path) -> bool:
    return any((path / name).exists() for name in (".zgroup", "zarr.json"))


# ---- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in every error that is raised while it is read."""
    try:
        yield
    except ScbinInputError as error:
        raise ScbinInputError(error.code, f"{path}: {error.message}") from error
    except ScbinError:
        raise
    except FileNotFoundError as error:
        raise ScbinInputError("F01", f"{path} is not there.") from error
    except FAULTS as error:
        found = " ".join(str(error).split())[:200]
        raise ScbinInputError(
            "F01", f"{path} cannot be read; it is damaged, cut short or no AnnData ({found})."
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Open an AnnData file for a while."""
    with naming(path):
        group = open_group(path)
        try:
            yield group
        finally:
            if isinstance(group, h5py.File):
                group.close()


def open_group(path: Path) -> Any:
    """Open an AnnData file for reading; call it within `naming`."""
    if not path.exists():
        raise FileNotFoundError(path)
    group = zarr.open_group(path, mode="r") if path.is_dir() else h5py.File(path, "r")
    if "obs" not in group:
        raise ScbinInputError("F01", "this is no AnnData file: it has no obs.")
    return group


def stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file does."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def open_cells(path: Path, layer: str | None = None) -> AnnData:
    """Return the cells of a file, `X` or the layer left on disk and nothing else but obs and var read."""
    with naming(path):
        group = open_group(path)
        if (layer is None and "X" not in group) or (layer is not None and layer not in group["layers"]):
            raise ScbinInputError(
                "I48", "there is no X; pass layer=." if layer is None else f"layers has no {layer!r}."
            )
        element: Any = group["X"] if layer is None else group["layers"][layer]
        matrix = sparse_dataset(element) if hasattr(element, "keys") else element
        if getattr(matrix, "format", "csr") == "csc":  # rows cannot be had from columns one by one
            matrix = sparse.csr_matrix(matrix.to_memory())
        obs, var = read_elem(group["obs"]), read_elem(group["var"])
        uns = {"log1p": read_elem(group["uns"]["log1p"])} if "log1p" in group.get("uns", {}) else {}
        return AnnData(
            matrix if layer is None else None, obs, var, uns, layers={} if layer is None else {layer: matrix}
        )


def _stored(path: Path, key: str) -> tuple[Any, Any]:
    """Return the arrays of token ids and positions, open."""
    stored = open_group(path)["obsm"][key]
    return stored["data"], stored["indices"]


class FileTokens:
    """Token rows in AnnData files, of one vocabulary: a kind of :class:`~scbin.tokens.tokens.Tokens`.

    What is in memory are the lengths of the rows and the blocks that were read last; columns of `obs` are read when they are
    asked for. :func:`scbin.open_tokens` makes it.
    """

    def __init__(self, paths: Sequence[Path], vocabulary: Vocabulary | None = None, key: str = _keys.TOKENS):
        self.paths, self.key, self._stamps = list(paths), key, [stamp(path) for path in paths if path.exists()]
        self._arrays, self._lock = lru_cache(OPEN_FILES)(_stored), Lock()
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = OrderedDict()
        self.vocabulary: Vocabulary = vocabulary  # type: ignore[assignment]  # the first file's, where none was given
        lengths, text = [], None
        for path in self.paths:
            with reading(path) as group:
                text = self._check(group, text)
                bounds = group["obsm"][key]["indptr"][:].astype(np.int64)
                n_stored = {int(group["obsm"][key][part].shape[0]) for part in CSR_PARTS[:2]}
                lengths.append(np.diff(bounds))
                if bounds[0] != 0 or (lengths[-1] < 0).any() or n_stored != {int(bounds[-1])}:
                    raise ScbinInputError("V02", "the row offsets of the tokens do not fit what is stored.")
        self.lengths = np.concatenate(lengths)
        sizes = np.array([len(part) for part in lengths])
        self.bounds = np.concatenate([[0], np.cumsum(sizes)])  # first row of each file
        starts = [np.arange(first, first + n, ROWS) for first, n in zip(self.bounds, sizes, strict=False)]
        self._starts = np.concatenate(starts)  # first row of each block
        self.window = int(np.clip(HELD / (ROWS * max(self.lengths.mean() if len(self.lengths) else 1, 1)), 1, WINDOW))
        self._files = np.repeat(np.arange(len(sizes)), [len(part) for part in starts])
        tokens = np.concatenate(
            [[0], np.cumsum(np.add.reduceat(self.lengths, self._starts) if len(self._starts) else [])]
        )
        first = np.searchsorted(self._files, self._files)  # first block of the same file
        self._offsets = (tokens[:-1] - tokens[first]).astype(np.int64)  # where a block starts in its file

    def _check(self, group: Any, text: str | None) -> str:
        """Check what a file says of its tokens; return its vocabulary as text."""
        entry = _keys.of_tokens(_keys.VOCABULARY, self.key)
        if self.key not in group.get("obsm", {}) or entry not in group.get("uns", {}).get(_keys.UNS, {}):
            fix = "Call scbin.pp.tokenize(path, out=...)."
            raise ScbinInputError(
                "V01", f"there are no tokens in obsm[{self.key!r}] with their vocabulary in uns. {fix}"
            )
        own = str(read_elem(group["uns"][_keys.UNS][entry]))
        if own != text:
            vocabulary = Vocabulary.from_json(own)
            self.vocabulary = self.vocabulary or vocabulary
            if vocabulary.sha256 != self.vocabulary.sha256:
                fix = "Tokenize all files in one call, or each with like=model."
                raise ScbinInputError("V03", f"the tokens are of another vocabulary than those of the others. {fix}")
        column = _keys.of_tokens(_keys.ROW_VOCABULARY, self.key)
        if column in group["obs"]:
            of_rows = pd.Series(read_elem(group["obs"][column])).astype(str).unique()
            if (of_rows != self.vocabulary.mark).any():
                raise ScbinInputError("V03", f"some rows are of another vocabulary, says obs[{column!r}].")
        shape = tuple(int(n) for n in group["obsm"][self.key].attrs["shape"])
        if shape[1] != self.vocabulary.n_positions:
            raise ScbinInputError("V02", f"the tokens have {shape[1]:,} columns, not those of their vocabulary.")
        return own

    @property
    def n_cells(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def names(self) -> pd.Index:
        """Names of the cells, read anew."""
        return pd.Index(np.concatenate([np.asarray(part, dtype=object) for part in self._columns(None)]))

    def obs(self, column: str) -> pd.Series:
        """Return a column of `obs` (cells,), read anew; `KeyError` where a file has none."""
        parts = [pd.Series(part) for part in self._columns(column)]
        if all(isinstance(part.dtype, pd.CategoricalDtype) for part in parts):
            return pd.Series(pd.api.types.union_categoricals(parts, ignore_order=True))
        return pd.concat(parts, ignore_index=True)

    def _columns(self, column: str | None) -> Iterator[Any]:
        for path in self.paths:
            with reading(path) as group:
                name = group["obs"].attrs["_index"] if column is None else column
                found = read_elem(group["obs"][name]) if name in group["obs"] else None
            if found is None:
                raise KeyError(f"{column!r} is not a column of obs in {path}")
            yield found

    def files(self) -> Iterator[FileTokens]:
        """Yield the tokens of each file by itself."""
        return (FileTokens([path], self.vocabulary, self.key) for path in self.paths)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def take(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return some rows, in the order asked for (rows, positions)."""
        rows = np.arange(self.n_cells)[rows]
        blocks = np.searchsorted(self._starts, rows, side="right") - 1
        wanted, local = np.unique(blocks), rows - self._starts[blocks]
        if len(wanted) > self.window:  # from more blocks than are held, in turn
            order = np.argsort(rows, kind="stable")
            parts = [self.take(rows[part]) for part in np.array_split(order, -(-len(wanted) // self.window))]
            matrix = sparse.vstack(parts, format="csr")
            return matrix if np.array_equal(order, np.arange(len(rows))) else matrix[np.argsort(order)]
        with self._lock:
            self._load([int(block) for block in wanted if int(block) not in self._blocks])
            data, indices = [], []
            for block, row in zip(blocks.tolist(), local.tolist(), strict=True):
                ids, positions, bounds = self._blocks[block]
                data.append(ids[bounds[row] : bounds[row + 1]])
                indices.append(positions[bounds[row] : bounds[row + 1]])
            for block in wanted.tolist():
                self._blocks.move_to_end(block)
            while len(self._blocks) > self.window + SPARE:
                self._blocks.popitem(last=False)
        v = self.vocabulary
        joined = np.concatenate([np.zeros(0, v.dtype), *data]), np.concatenate([np.zeros(0, np.int32), *indices])
        matrix = sparse.csr_matrix(
            (
                joined[0].astype(v.dtype, copy=False),
                joined[1].astype(np.int32),
                np.concatenate([[0], np.cumsum(self.lengths[rows])]),
            ),
            shape=(len(rows), v.n_positions),
        )
        matrix.sort_indices()
        return matrix

    def _load(self, blocks: list[int]) -> None:
        """Read blocks, those that follow each other in a file at once."""
        for _, run in groupby(enumerate(blocks), key=lambda item: (item[1] - item[0], self._files[item[1]])):
            numbers = [block for _, block in run]
            for start in range(0, len(numbers), 64):
                self._read(numbers[start], numbers[min(start + 64, len(numbers)) - 1])

    def _read(self, first: int, last: int) -> None:
        """Read consecutive blocks of a file."""
        file = int(self._files[first])
        stop = min(int(self._starts[last]) + ROWS, int(self.bounds[file + 1]))
        lengths, begin = self.lengths[self._starts[first] : stop], int(self._offsets[first])
        path, v = self.paths[file], self.vocabulary
        with naming(path):
            if stamp(path) != self._stamps[file]:
                raise ScbinInputError("F01", "the file has changed since it was opened.")
            ids, positions = (part[begin : begin + int(lengths.sum())] for part in self._arrays(path, self.key))
            sound = len(ids) == len(positions) == lengths.sum() and ids.dtype.kind == "u"
            if not sound or (
                len(ids) and (ids.max() >= v.n_tokens or positions.min() < 0 or positions.max() >= v.n_positions)
            ):
                raise ScbinInputError("V02", "some tokens are not of their vocabulary: the file is damaged.")
        small = positions.astype(np.uint16) if v.n_positions <= 2**16 else positions
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        for block in range(first, last + 1):
            start = int(self._starts[block] - self._starts[first])
            own = bounds[start : start + ROWS + 1]
            part = slice(own[0], own[-1])
            copied = (ids[part], small[part]) if first == last else (ids[part].copy(), small[part].copy())
            self._blocks[block] = *copied, own - own[0]

    def epoch_order(self, cells: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return the cells in the order of one epoch, a function of (seed, epoch, set of cells) that reads block by block.

        The blocks come in a random order, one after the other, and every cell of a block at a random moment of the time in which
        the next hundreds of blocks come. So each step has cells of hundreds of blocks, and each block is read once (those at the
        turn of an epoch twice).
        """
        bits = np.random.Philox(key=np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64))
        generator, n_blocks, cells = np.random.Generator(bits), len(self._starts), np.sort(cells)
        moment = generator.permutation(n_blocks)[np.searchsorted(self._starts, cells, side="right") - 1].astype(
            np.float64
        )
        moment += min(self.window, n_blocks) * generator.random(len(cells))
        return cells[np.argsort(moment % n_blocks, kind="stable")]


def open_tokens(paths: Paths, *, tokens_key: str | None = None) -> FileTokens:
    """Open AnnData files with tokens as one corpus, without reading the tokens into memory.

    Every verb that takes tokenized cells in memory takes a corpus too, and the paths themselves:
    `scbin.tl.pretrain("corpus/shard_{0..46}.h5ad")`.

    Parameters
    ----------
    paths
        A file (h5ad, or a folder with zarr of any version), a folder of such files, a pattern (`"corpus/*.zarr"`), a range
        (`"shard_{0..46}.h5ad"`), or a list of these. All files need to have the same vocabulary.
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
    """Return the corpus that paths name; whatever is no path as it is."""
    return open_tokens(data, tokens_key=tokens_key) if is_paths(data) else data


# ---- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def committed(target: Path) -> Iterator[Path]:
    """Give a name to write to. It becomes `target` when all went well; else nothing is left of it."""
    temporary = target.with_name(f".tmp-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # of a process that was killed
        yield temporary
        if temporary.is_file():
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        elif target.exists():
            remove(target)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # of a full disk, h5py raises either
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise ScbinInputError(
            "F02", f"{target} could not be written ({reason}). What was there is untouched."
        ) from error
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Take a file or a folder away, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def write_shard(path: Path, key: str, rows: Iterator[sparse.csr_matrix], rest: Any) -> None:
    """Write token rows into a new AnnData file as they come; `rest()` then gives obs, var and uns."""
    is_zarr = path.suffix == ".zarr"
    group: Any = zarr.open_group(path, mode="w", zarr_format=2) if is_zarr else h5py.File(path, "w")
    how: dict[str, Any] = (
        {"chunks": (131_072,)} if is_zarr else {"chunks": (32_768,), "compression": "gzip", "compression_opts": 1}
    )
    write_elem(group, "obsm", {})
    stored: Any = None
    waiting: list[sparse.csr_matrix] = []

    def flush() -> None:
        nonlocal stored
        part = sparse.vstack(waiting, format="csr")
        part.indptr = part.indptr.astype(np.int64)
        if stored is None:
            write_elem(group, f"obsm/{key}", part, dataset_kwargs=how)
            stored = sparse_dataset(group["obsm"][key])
        else:
            stored.append(part)
        waiting.clear()

    for part in rows:
        waiting.append(part)
        if sum(each.nnz for each in waiting) > VALUES:
            flush()
    if waiting:
        flush()
    for name, value in ({"layers": {}, "obsp": {}, "varm": {}, "varp": {}} | rest()).items():
        write_elem(group, name, value)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    if not is_zarr:
        group.close()


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
    adata = read_cells(target) if target.exists() else AnnData(obs=obs, var=var)
    if not adata.obs_names.equals(obs.index):
        raise ScbinInputError("A04", f"{target} has other cells than {path}. Move it away.")
    adata.obs = adata.obs.assign(**dict((found if isinstance(found, pd.DataFrame) else found.obs).items()))
    if isinstance(found, AnnData):
        adata.obsm.update(found.obsm)
        adata.uns[_keys.UNS] = {**adata.uns.get(_keys.UNS, {}), **found.uns.get(_keys.UNS, {})}
    write_cells(target, adata)
    return target
