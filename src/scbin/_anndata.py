"""Between AnnData and arrays: checking what came in, reading matrices by row blocks, writing slots."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from scbin import _keys
from scbin._arguments import shown, texts
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTypeError, count
from scbin._sparse import DiskRows, check_columns, check_offsets, check_structure
from scbin.encoding.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

BLOCK = 500_000  # stored values per row block: a few megabytes, which a core holds close
OWN = (_keys.TOKENS, _keys.EMBEDDING, "scbin_", "X_umap_", "X_scbin_")


# ---- checking -------------------------------------------------------------------------------------------------------


def check_adata(adata: object) -> ad.AnnData:
    """Return `adata` if it is an AnnData with genes, else say what to pass."""
    if not isinstance(adata, ad.AnnData):
        advice = {
            "MuData": 'pass one modality: mdata["rna"]',
            "list": "join them first: anndata.concat(adatas)",
            "DataFrame": "wrap it: anndata.AnnData(frame)",
            "str": "read it first: anndata.read_h5ad(path)",
            "NoneType": "functions that change an AnnData in place return None; pass the AnnData itself",
        }
        kind = type(adata).__name__
        kind = "str" if kind.endswith("Path") else kind
        raise ScbinTypeError(
            "I55", f"adata is a {type(adata).__name__}, not an AnnData; {advice.get(kind, 'pass an AnnData')}."
        )
    if adata.n_vars == 0:
        raise ScbinInputError("I48", f"adata has no genes (its shape is {adata.shape}).")
    entry = adata.uns.get(_keys.UNS, {})
    if not isinstance(entry, Mapping):
        raise ScbinInputError(
            "I54",
            f"adata.uns[{_keys.UNS!r}] is a {type(entry).__name__} that scbin did not write, so it is not replaced. "
            "Keep it under another name.",
        )
    return adata


def read_obs(adata: ad.AnnData, key: str) -> pd.Series:
    """Return the column `key` of obs; if there is none, name the closest ones."""
    if not isinstance(key, Hashable):
        raise ScbinTypeError("A01", f"{shown(key)} is no name of a column of adata.obs; pass one name.")
    if key in adata.obs.columns:
        return adata.obs[key]
    names = [str(name) for name in adata.obs.columns]
    close = difflib.get_close_matches(str(key), names, n=3, cutoff=0.0) or names[:3]
    found = ", ".join(repr(name) for name in close) or "none"
    raise ScbinInputError("I35", f"{key!r} is not a column of adata.obs. The closest ones are: {found}.")


def read_tokens(
    adata: ad.AnnData, vocabulary: Vocabulary | None = None, *, key: str | None = None
) -> tuple[sparse.csr_matrix, Vocabulary]:
    """Return the token matrix (cells, positions) in `obsm[key]` and its vocabulary, checked against each other."""
    check_adata(adata)
    key = _keys.TOKENS if key is None else key
    texts(tokens_key=key)
    if key not in adata.obsm:
        raise ScbinInputError(
            "T01", f"adata.obsm has no {key!r}: the cells are not tokenized. Call {_tokenize_call(adata, key)}."
        )
    entry = _keys.of_tokens(_keys.VOCABULARY, key)
    stored = adata.uns.get(_keys.UNS, {}).get(entry)
    own = None if stored is None else Vocabulary.from_json(str(stored))
    if own is not None and vocabulary is not None and own.sha256 != vocabulary.sha256:
        raise ScbinInputError(
            "T03",
            f"the tokens were made with another vocabulary ({own!r}) than the one asked for ({vocabulary!r}). "
            "Call scbin.pp.tokenize(adata, like=model).",
        )
    vocabulary = own or vocabulary
    if vocabulary is None:
        raise ScbinInputError(
            "T02",
            f"adata.obsm[{key!r}] is there but adata.uns['scbin'][{entry!r}] is not: anndata.concat drops uns. "
            "Join with anndata.concat(adatas, uns_merge='same'), or tokenize again.",
        )
    return _checked_tokens(adata.obsm[key], vocabulary, key), vocabulary


def _tokenize_call(adata: ad.AnnData, key: str) -> str:
    """Return the line that makes the tokens, and the slots where there are some already."""
    entries = adata.uns.get(_keys.UNS, {})
    others = [slot for slot in adata.obsm if slot != key and _keys.of_tokens(_keys.VOCABULARY, slot) in entries]
    call = "scbin.pp.tokenize(adata)" if key == _keys.TOKENS else f"scbin.pp.tokenize(adata, key_added={key!r})"
    return call + "".join(f", or pass tokens_key={slot!r}, which holds tokens" for slot in others[:1])


def _checked_tokens(tokens: Any, vocabulary: Vocabulary, key: str) -> sparse.csr_matrix:
    if not sparse.issparse(tokens):
        tokens = sparse.csr_matrix(np.asarray(tokens))
    if tokens.shape[1] != vocabulary.n_positions or tokens.dtype.kind != "u":
        raise ScbinInputError(
            "T04",
            f"adata.obsm[{key!r}] has {count(tokens.shape[1], 'column')} of {tokens.dtype}, but its vocabulary needs "
            f"{vocabulary.n_positions:,} of {vocabulary.dtype}: joining tables with different vocabularies cuts or widens it. "
            "Tokenize the joined data again.",
        )
    tokens = sparse.csr_matrix(tokens)
    if not tokens.has_sorted_indices:
        tokens = tokens.sorted_indices()
    if tokens.nnz and int(tokens.data.max()) >= vocabulary.n_tokens:
        raise ScbinInputError("T05", "some tokens have ids that the vocabulary does not know. Tokenize again.")
    return tokens


# ---- matrices by row blocks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a matrix as CSR arrays; `indptr` is int64 and starts at 0."""

    start: int
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    n_vars: int

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    def csr(self) -> sparse.csr_matrix:
        """Return a canonical CSR matrix: sorted, no duplicates, no stored zeros. The source is not touched."""
        matrix = sparse.csr_matrix((self.data, self.indices, self.indptr), shape=(self.n_rows, self.n_vars), copy=True)
        matrix.has_canonical_format = False
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return matrix


def iter_blocks(
    adata: ad.AnnData, layer: str | None = None, *, block_values: int | None = None
) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Go through X or a layer of any container as (first row, canonical CSR of consecutive rows)."""
    for block in raw_blocks(adata, layer, block_values=block_values):
        yield block.start, block.csr()


def raw_blocks(
    adata: ad.AnnData, layer: str | None = None, *, block_values: int | None = None, passing: int = 0
) -> Iterator[Block]:
    """Go through the matrix as it is stored: explicit zeros, order and duplicates are left as they are.

    `passing`: the caller makes sure that no column index points outside, and lets go of each block before so many more are asked
    for; 0: the columns are checked here, and blocks may be kept.
    """
    block_values = block_values or BLOCK
    if adata.is_view:  # the parent's matrix is read a block at a time; a view of a backed view does not exist
        parent = adata._adata_ref
        chosen = np.arange(parent.n_obs)[adata._oidx]
        rows = _rows_per_block(adata.n_vars, block_values)
        for start in range(0, adata.n_obs, rows):
            part = parent[chosen[start : start + rows], adata._vidx]
            yield _block(matrix_of(part, layer), start, start, part.n_obs, view=True)
        return
    matrix = matrix_of(adata, layer)
    if isinstance(matrix, CSRDataset):
        yield from _disk_blocks(matrix, block_values, passing)
        return
    if sparse.issparse(matrix) and matrix.format == "csc":
        check_structure(matrix.indptr, matrix.indices, matrix.data, matrix.shape[::-1])
        matrix = sparse.csr_matrix(matrix)
    if hasattr(matrix, "dask"):
        yield from _dask_blocks(matrix)
        return
    if sparse.issparse(matrix):
        check_structure(matrix.indptr, matrix.indices, matrix.data, matrix.shape, columns=not passing)
    n_rows, stored = matrix.shape[0], _stored(matrix)
    rows = _rows_per_block(max(1, stored // max(1, n_rows)), block_values)
    for start in range(0, n_rows, rows):
        yield _block(matrix, start, 0, min(rows, n_rows - start))


def _disk_blocks(matrix: CSRDataset, block_values: int, passing: int) -> Iterator[Block]:
    n_rows, n_vars = matrix.shape
    with DiskRows(matrix.group, reuse=passing) as stored:
        check_offsets(stored.indptr, n_rows, stored.n_stored)
        rows = _rows_per_block(max(1, int(stored.indptr[-1]) // max(1, n_rows)), block_values)
        for start in range(0, n_rows, rows):
            indptr = stored.indptr[start : start + rows + 1].astype(np.int64)
            data, indices = stored.read(int(indptr[0]), int(indptr[-1]))
            if not passing:
                check_columns(indices, n_vars)
            yield _arrays(start, data, indices, indptr - indptr[0], n_vars)


def _rows_per_block(values_per_row: int, block_values: int) -> int:
    return int(np.clip(block_values // max(1, values_per_row), 1, 65_536))


def _stored(matrix: Any) -> int:
    if isinstance(matrix, CSRDataset | CSCDataset):
        return int(matrix.group["data"].shape[0])
    return int(matrix.nnz) if sparse.issparse(matrix) else int(np.prod(matrix.shape, dtype=np.int64))


def _block(matrix: Any, start: int, offset: int, n_rows: int, *, view: bool = False) -> Block:
    """Rows `start - offset` to `+ n_rows` of a container as a block that begins at row `start` of the whole."""
    first = start - offset
    if sparse.issparse(matrix) and matrix.format == "csr" and not view:
        indptr = matrix.indptr[first : first + n_rows + 1].astype(np.int64)
        low, high = int(indptr[0]), int(indptr[-1])
        return _arrays(start, matrix.data[low:high], matrix.indices[low:high], indptr - low, matrix.shape[1])
    part = matrix if view else matrix[first : first + n_rows]
    if not sparse.issparse(part):
        part = np.asarray(part)
        _check_dtype(part)
        if part.dtype.kind == "f" and (part.dtype.itemsize == 2 or not part.dtype.isnative):  # scipy takes neither
            part = part.astype(np.float32 if part.dtype.itemsize <= 4 else np.float64)
    part = sparse.csr_matrix(part)
    check_structure(part.indptr, part.indices, part.data, part.shape)
    return _arrays(start, part.data, part.indices, part.indptr.astype(np.int64), part.shape[1])


def _arrays(start: int, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, n_vars: int) -> Block:
    """Narrow to the types that the kernels are compiled for: float32 where it holds every value, int32 columns."""
    if data.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        small = data.dtype.itemsize <= 2 or not data.size or (data.dtype.kind != "f" and abs(data).max() < 2**24)
        data = data.astype(np.float32 if small else np.float64)
    return Block(start, data, np.asarray(indices, dtype=np.int32), indptr, n_vars)


def _dask_blocks(matrix: Any) -> Iterator[Block]:
    if len(matrix.chunks[1]) > 1:
        raise ScbinInputError(
            "I16",
            f"the dask matrix is chunked along the genes ({count(len(matrix.chunks[1]), 'chunk')}), but cells are read whole. "
            "Rechunk it: adata.X = adata.X.rechunk((1000, -1)).",
        )
    start = 0
    for i in range(len(matrix.chunks[0])):
        part = matrix.blocks[i, 0].compute()
        n_rows = part.shape[0]
        yield _block(part, start, start, n_rows, view=not (sparse.issparse(part) and part.format == "csr"))
        start += n_rows


def layer_names(adata: ad.AnnData) -> list[str]:
    """Return the names of the layers; from anndata 0.13 on `X` is one of them, without a name."""
    return [name for name in adata.layers if name is not None]


def matrix_of(adata: ad.AnnData, layer: str | None) -> Any:
    """Return X or the layer as it is stored, if it is of a kind that can be read."""
    if layer is not None and layer not in adata.layers:
        there = ", ".join(map(repr, layer_names(adata))) or "none"
        raise ScbinInputError("I35", f"layers has no {layer!r}. Available: {there}.")
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ScbinInputError("I48", "adata.X is None: pass layer= with the name of the layer to read.")
    name = "X" if layer is None else f"layers[{layer!r}]"
    if isinstance(matrix, np.ma.MaskedArray):
        raise ScbinInputError("I13", f"{name} is a masked array; fill the mask: {name}.filled(0).")
    if isinstance(matrix, np.matrix):
        raise ScbinInputError("I13", f"{name} is a numpy matrix; use np.asarray({name}).")
    if sparse.issparse(matrix) and matrix.format not in ("csr", "csc"):
        raise ScbinInputError("I13", f"{name} is a sparse {matrix.format} matrix; use csr_matrix({name}).")
    if not hasattr(matrix, "shape") or len(matrix.shape) != 2:
        raise ScbinInputError("I13", f"{name} is a {type(matrix).__name__}, not a matrix; use csr_matrix({name}).")
    if not isinstance(matrix, CSRDataset | CSCDataset):
        _check_dtype(matrix)
    return matrix


def _check_dtype(matrix: Any) -> None:
    if matrix.dtype.kind not in "biuf":
        raise ScbinInputError(
            "I13", f"the matrix has dtype {matrix.dtype}, which is no number type; use astype('float32')."
        )


# ---- writing --------------------------------------------------------------------------------------------------------


def check_writable(adata: ad.AnnData, slot: str, key: str) -> None:
    """Raise if `adata.<slot>[key]` exists and scbin did not write it, or if files cannot have a slot of this name."""
    texts(key_added=key)
    if not key or "/" in key:
        raise ScbinInputError("A03", f"key_added is {key!r}; pass a name that is not empty and has no '/'.")
    own = key.startswith(OWN) or f"{slot}/{key}" in _written(adata)
    if key in getattr(adata, slot) and not own:
        raise ScbinInputError(
            "I54",
            f"adata.{slot}[{key!r}] exists and scbin did not write it, so it is not replaced. "
            "Choose another name with key_added=.",
        )


def write_obsm(adata: ad.AnnData, key: str, value: Any) -> None:
    """Set `obsm[key]`, which must be free or scbin's own."""
    _write(adata, "obsm", key, value)


def write_obs(adata: ad.AnnData, key: str, value: Any) -> None:
    """Set the obs column `key`, which must be free or scbin's own."""
    _write(adata, "obs", key, value)


def write_layer(adata: ad.AnnData, key: str, value: Any) -> None:
    """Set `layers[key]`, which must be free or scbin's own."""
    _write(adata, "layers", key, value)


def write_entry(adata: ad.AnnData, key: str, value: Any) -> None:
    """Set `uns[key]`, an entry of its own beside `uns["scbin"]`, which must be free or scbin's own."""
    _write(adata, "uns", key, value)


def write_var(adata: ad.AnnData, key: str, value: Any) -> None:
    """Set the var column `key`, which must be free or scbin's own."""
    _write(adata, "var", key, value)


def write_varm(adata: ad.AnnData, key: str, value: Any) -> None:
    """Set `varm[key]`, which must be free or scbin's own."""
    _write(adata, "varm", key, value)


def remove_own(adata: ad.AnnData, slot: str, key: str) -> None:
    """Take `adata.<slot>[key]` away if it is there; it must be scbin's own."""
    check_writable(adata, slot, key)
    if key not in getattr(adata, slot):
        return
    make_real(adata)
    del getattr(adata, slot)[key]
    if not key.startswith(OWN):
        write_uns(adata, _keys.WRITTEN, json.dumps(sorted(set(_written(adata)) - {f"{slot}/{key}"})))


def write_uns(adata: ad.AnnData, key: str, value: Any) -> None:
    """Set `uns["scbin"][key]`."""
    make_real(adata)
    adata.uns[_keys.UNS] = {**adata.uns.get(_keys.UNS, {}), key: value}


def make_real(adata: ad.AnnData) -> None:
    """Turn a view into an object of its own, as the first write would, without the warning."""
    if adata.is_view:
        adata._init_as_actual(copied(adata))


def copied(adata: ad.AnnData) -> ad.AnnData:
    """Return a copy in memory."""
    return adata.to_memory() if adata.isbacked else adata.copy()


def _write(adata: ad.AnnData, slot: str, key: str, value: Any) -> None:
    check_writable(adata, slot, key)
    make_real(adata)
    getattr(adata, slot)[key] = value
    if not key.startswith(OWN):
        write_uns(adata, _keys.WRITTEN, json.dumps(sorted({*_written(adata), f"{slot}/{key}"})))


def _written(adata: ad.AnnData) -> list[str]:
    return json.loads(str(adata.uns.get(_keys.UNS, {}).get(_keys.WRITTEN, "[]")))


def warn(code: str, message: str) -> None:
    """Issue one of scbin's own warnings, pointing at the caller's line."""
    warnings.warn(ScbinInputWarning(code, message), stacklevel=4)
