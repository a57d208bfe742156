"""The structure of an h5ad file or a zarr directory, looked at before anything in it is read."""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MOST_PARTS, DEEPEST, MOST_FILES = 100_000, 32, 2_000_000
LARGE, MOST_RATIO = 2**30, 2_000  # bytes declared; how often more than what is stored
MOST_JSON = 64 * 2**20
HDF5_FILTERS = {1, 2, 3, 4, 5, 6, 32000}  # deflate, shuffle, fletcher32, szip, nbit, scaleoffset, lzf
HDF5_PLUGINS = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32015: "zstd", 32026: "blosc2"}
ZARR_CODECS = {
    *(
        "zlib",
        "gzip",
        "zstd",
        "lz4",
        "blosc",
        "bz2",
        "lzma",
        "shuffle",
        "delta",
        "vlen-utf8",
        "vlen-bytes",
        "vlen-array",
    ),
    *(
        "bytes",
        "crc32",
        "crc32c",
        "adler32",
        "fletcher32",
        "transpose",
        "sharding_indexed",
        "fixedscaleoffset",
        "packbits",
    ),
    *("bitround", "quantize", "categorize", "astype", "base64", "zfpy", "pcodec"),
}


@dataclass(frozen=True)
class Finding:
    """One thing about a file; `wrong` ones make it unfit."""

    code: str
    where: str
    text: str
    wrong: bool = True


class Unreadable(Exception):
    """The file cannot even be opened."""

    def __init__(self, code: str, where: str, text: str):
        super().__init__(text)
        self.finding = Finding(code, where, text)


@dataclass
class Stored:
    """What can be read of a file: arrays and groups by their place, with everything that leads elsewhere left out."""

    parts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    root: Any = None

    def add(self, code: str, where: str, text: str, *, wrong: bool = True) -> None:
        """Note a finding."""
        self.findings.append(Finding(code, where or "the file", text, wrong))

    def attribute(self, where: str, name: str) -> Any:
        """Return an attribute of a part, text as text; None where there is none or it is too large."""
        try:
            attributes = self.parts[where].attrs
            if name not in attributes or _too_large(attributes, name):
                return None
            value = attributes[name]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError):
            return None
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _too_large(attributes: Any, name: str) -> bool:
    if not hasattr(attributes, "get_id"):  # zarr keeps attributes as JSON, whose size was looked at
        return False
    return math.prod(attributes.get_id(name).shape) > 1_000_000


def shown(text: Any, most: int = 80) -> str:
    """Return text from a stranger so that it cannot do anything to a terminal."""
    return repr(str(text)[:most]) if not str(text)[:most].isprintable() else f"'{str(text)[:most]}'"


def declared(
    stored: Stored, where: str, shape: tuple[int, ...], chunks: tuple[int, ...], width: int, n_bytes: int
) -> None:
    """Note an array that claims to be far larger than what is stored of it, or whose pieces are."""
    whole, piece = math.prod(shape) * width, math.prod(chunks) * width if chunks else 0
    if any(length < 0 for length in (*shape, *chunks)) or (chunks and 0 in chunks and 0 not in shape):
        stored.add("M44", where, f"has shape {shape} in pieces of {chunks}")
    elif whole > LARGE and whole > MOST_RATIO * max(n_bytes, 1):
        stored.add("M44", where, f"declares {size_of(whole)}, but stores {size_of(n_bytes)}")
    elif piece > LARGE:
        stored.add("M44", where, f"is stored in pieces of {size_of(piece)}, each of which has to be read whole")


def size_of(n_bytes: float) -> str:
    """Return a size in words.

    Examples
    --------
    >>> size_of(3.6 * 2**40), size_of(23_000)
    ('3.6 TiB', '22 KiB')
    """
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024 or unit == "TiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:,.1f} {unit}" if n_bytes < 10 and unit != "bytes" else f"{n_bytes:,.0f} {unit}"


# ---- HDF5 ------------------------------------------------------------------------------------------------------------


def open_hdf5(path: Path, say: Callable[[str], None]) -> Stored:
    """Open an HDF5 file and look at every link, shape and filter in it, following none of them outside."""
    import h5py

    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise Unreadable("M40", "the file", "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if not h5py.is_hdf5(path):
        raise Unreadable("M40", "the file", "is no HDF5 file (it may be cut, or of another format)")
    try:
        stored = Stored(root=h5py.File(path, "r", locking=False))
    except (OSError, RuntimeError) as error:
        raise Unreadable("M40", "the file", f"cannot be opened ({shown(error)})") from error
    todo: list[tuple[str, Any, int]] = [("", stored.root, 0)]
    seen: set[Any] = set()
    while todo:
        where, group, depth = todo.pop()
        say(where)
        try:
            for name in group:
                if len(stored.parts) >= MOST_PARTS:
                    raise Unreadable("M44", "the file", f"has more than {MOST_PARTS:,} parts")
                place = f"{where}/{name}" if where else name
                part = _follow(stored, group, name, place, seen)
                if part is None:
                    continue
                stored.parts[place] = part
                if isinstance(part, h5py.Group):
                    if depth >= DEEPEST:
                        stored.add("M44", place, f"lies deeper than {DEEPEST} levels")
                    else:
                        todo.append((place, part, depth + 1))
                elif isinstance(part, h5py.Dataset):
                    say(place)
                    _look_at_dataset(stored, place, part)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            stored.add("M43", where, f"cannot be read ({shown(error)})")
    return stored


def _follow(stored: Stored, group: Any, name: str, place: str, seen: set[Any]) -> Any:
    """Return what a name in a group stands for, unless it leads elsewhere or back."""
    import h5py

    link = group.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        stored.add(
            "M41", place, f"is a link into another file, {shown(link.filename)}; whatever it holds would be read"
        )
        return None
    if isinstance(link, h5py.SoftLink):
        stored.add("M42", place, f"is a link to {shown(link.path)}; anndata writes none")
        return None
    part = group[name]
    address = h5py.h5o.get_info(part.id).addr
    if address in seen or address == h5py.h5o.get_info(stored.root.id).addr:
        stored.add("M42", place, "is a second name for another part; followed without care it has no end")
        return None
    seen.add(address)
    return part


def _look_at_dataset(stored: Stored, place: str, dataset: Any) -> None:
    import h5py

    if dataset.external:
        stored.add("M41", place, f"keeps its values in another file, {shown(dataset.external[0][0])}")
        return
    if dataset.is_virtual:
        files = sorted({source.file_name for source in dataset.virtual_sources()})
        stored.add("M41", place, f"is put together from other places, {shown(', '.join(files))}")
        return
    plist = dataset.id.get_create_plist()
    for k in range(plist.get_nfilters()):
        code = plist.get_filter(k)[0]
        if code in HDF5_PLUGINS:
            stored.add("M46", place, f"needs the plugin {HDF5_PLUGINS[code]} to be read", wrong=False)
        elif code not in HDF5_FILTERS:
            stored.add("M46", place, f"asks for the filter number {code}, a plugin that is not known")
    if h5py.check_ref_dtype(dataset.dtype) is not None:
        stored.add("M42", place, "holds references to other parts")
    elif dataset.dtype.kind == "V" and dataset.dtype.names is None:
        stored.add("M46", place, f"holds opaque bytes ({shown(dataset.dtype)})")
    declared(
        stored, place, tuple(dataset.shape or ()), tuple(dataset.chunks or ()), dataset.dtype.itemsize,
        dataset.id.get_storage_size(),
    )  # fmt: skip


# ---- zarr ------------------------------------------------------------------------------------------------------------


def open_zarr(path: Path, say: Callable[[str], None]) -> Stored:
    """Open a zarr directory after looking at every file in it by name, type and size, and at all metadata as text."""
    import zarr

    stored = Stored()
    n_files = 0
    for folder, names, files in os.walk(path, followlinks=False):
        where = os.path.relpath(folder, path).replace(os.sep, "/").removeprefix(".")
        say(where)
        n_files += len(files)
        if n_files > MOST_FILES:
            raise Unreadable("M44", "the directory", f"has more than {MOST_FILES:,} files")
        for name in [*names, *files]:
            mode = os.lstat(os.path.join(folder, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
                stored.add("M41", f"{where}/{name}".lstrip("/"), f"is {kind}; nothing outside the directory is read")
        if not stored.findings:
            for name in sorted({".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json"} & set(files)):
                _look_at_metadata(stored, folder, name, where)
    if not {"zarr.json", ".zgroup"} & set(os.listdir(path)):
        raise Unreadable("M40", "the directory", "is no zarr directory: it has neither zarr.json nor .zgroup")
    if stored.findings:
        return stored
    try:
        stored.root = zarr.open_group(path, mode="r", use_consolidated=False)
        stored.parts = {str(place): part for place, part in stored.root.members(max_depth=DEEPEST)}
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError, RuntimeError) as error:
        raise Unreadable("M43", "the directory", f"cannot be opened ({shown(error)})") from error
    return stored


def _look_at_metadata(stored: Stored, folder: str, name: str, where: str) -> None:
    file = os.path.join(folder, name)
    place = f"{where}/{name}".lstrip("/")
    if os.path.getsize(file) > MOST_JSON:
        stored.add("M44", place, f"has {size_of(os.path.getsize(file))} of metadata")
        return
    try:
        with open(file, "rb") as opened:
            content = json.loads(opened.read())
    except (ValueError, RecursionError) as error:
        stored.add("M43", place, f"is not JSON ({shown(error)})")
        return
    if not isinstance(content, dict):
        stored.add("M43", place, "is not metadata of zarr")
        return
    inner = (
        content.get("metadata")
        if name == ".zmetadata"
        else (content.get("consolidated_metadata") or {}).get("metadata")
    )
    entries = {place: content} | {f"{place}: {key}": value for key, value in (inner or {}).items()}
    for key, entry in entries.items():
        if isinstance(entry, dict) and not key.endswith(".zattrs") and isinstance(entry.get("shape"), list):
            _look_at_array(stored, key, entry, folder if key == place else None)


def _look_at_array(stored: Stored, place: str, entry: Mapping[str, Any], folder: str | None) -> None:
    for codec in _codecs(entry):
        if codec == "pickle":
            stored.add("M46", place, "keeps its values as pickles, which can run code when they are read")
        elif codec not in ZARR_CODECS:
            stored.add("M46", place, f"asks for the codec {shown(codec)}, which is not known")
    try:
        shape = tuple(int(length) for length in entry["shape"])
        grid = entry["chunks"] if "chunks" in entry else entry["chunk_grid"]["configuration"]["chunk_shape"]
        chunks = tuple(int(length) for length in grid)
        width = _width(entry)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        stored.add("M43", place, f"does not describe an array ({type(error).__name__})")
        return
    if folder is not None:
        n_bytes = sum(
            os.lstat(os.path.join(inner, file)).st_size for inner, _, files in os.walk(folder) for file in files
        )
        declared(stored, place, shape, chunks, width, n_bytes)


def _codecs(entry: Mapping[str, Any]) -> list[str]:
    """Return the names of all codecs and filters that a description of an array asks for."""
    found, todo = [], [entry.get("filters"), entry.get("compressor"), entry.get("codecs")]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            found.append(str(part.get("id", part.get("name"))).lower().removeprefix("numcodecs."))
            todo.append((part.get("configuration") or {}).get("codecs"))
    return found


def _width(entry: Mapping[str, Any]) -> int:
    import numpy as np

    name = entry.get("dtype", entry.get("data_type"))
    try:
        return int(np.dtype(name).itemsize)
    except TypeError:  # text and other types that zarr adds to those of numpy
        return 8
