"""Between AnnData and arrays: checking what came in, reading matrices by row blocks, writing slots."""

from __future__ import annotations

import difflib
import json
import sys
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from scbin import _keys
from scbin._arguments import shown, texts
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTypeError, count
from scbin.tokens.tokens import MemoryTokens, Tokens
from scbin.tokens.vocabulary import Vocabulary

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
        found = f"adata is a {type(adata).__name__}, not an AnnData"
        raise ScbinTypeError("I55", f"{found}; {advice.get(kind, 'pass an AnnData')}.")
    if adata.n_vars == 0:
        raise ScbinInputError("I48", f"adata has no genes (its shape is {adata.shape}).")
    entry = adata.uns.get(_keys.UNS, {})
    if not isinstance(entry, Mapping):
        found = f"adata.uns[{_keys.UNS!r}] is a {type(entry).__name__} that scbin did not write"
        raise ScbinInputError("A04", f"{found}, so it is not replaced. Keep it under another name.")
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
    raise ScbinInputError("A06", f"{key!r} is not a column of adata.obs. The closest ones are: {found}.")


# ---- tokens ---------------------------------------------------------------------------------------------------------


def read_tokens(data: ad.AnnData | Tokens, vocabulary: Vocabulary | None = None, key: str | None = None) -> Tokens:
    """Return the tokens of an AnnData, `obsm[key]`, or pass on tokens that are some already.

    The vocabulary stored beside them, that of each row (an obs column that survives `anndata.concat`) and the one asked for must
    be the same.
    """
    if not isinstance(data, ad.AnnData) and isinstance(data, Tokens):
        _same_vocabulary(data.vocabulary, vocabulary)
        return data
    adata = check_adata(data)
    key = _keys.TOKENS if key is None else key
    texts(tokens_key=key)
    entries, entry = adata.uns.get(_keys.UNS, {}), _keys.of_tokens(_keys.VOCABULARY, key)
    if key not in adata.obsm:
        call = "scbin.pp.tokenize(adata)" if key == _keys.TOKENS else f"scbin.pp.tokenize(adata, key_added={key!r})"
        others = [slot for slot in adata.obsm if _keys.of_tokens(_keys.VOCABULARY, slot) in entries]
        call += "".join(f", or pass tokens_key={slot!r}, which holds tokens" for slot in others[:1])
        raise ScbinInputError("V01", f"adata.obsm has no {key!r}: the cells are not tokenized. Call {call}.")
    own = Vocabulary.from_json(str(entries[entry])) if entry in entries else vocabulary
    if own is None:
        found = f"adata.obsm[{key!r}] is there but adata.uns['scbin'][{entry!r}] is not: anndata.concat drops uns"
        fix = "Join with anndata.concat(adatas, uns_merge='same'), or tokenize again."
        raise ScbinInputError("V02", f"{found}. {fix}")
    _same_vocabulary(own, vocabulary)
    column = _keys.of_tokens(_keys.ROW_VOCABULARY, key)
    if column in adata.obs.columns:
        of_rows = adata.obs[column].astype(str)
        foreign = int((of_rows != own.sha256[:16]).sum())
        if foreign:
            found = "of several vocabularies" if of_rows.nunique() > 1 else "of another vocabulary"
            found = f"{found} ({count(foreign, 'cell')} not of {own!r}), says obs[{column!r}]"
            fix = "Tokenize the cells together, or each part with like=model."
            raise ScbinInputError("V03", f"the rows of adata.obsm[{key!r}] are {found}. {fix}")
    matrix = adata.obsm[key]
    if matrix.shape[1:] != (own.n_positions,) or matrix.dtype.kind != "u":
        found = f"adata.obsm[{key!r}] has the shape {matrix.shape} and the type {matrix.dtype}"
        need = f"its vocabulary needs {own.n_positions:,} columns of {own.dtype}"
        fix = "joining tables with different vocabularies cuts or widens it. Tokenize the joined data again."
        raise ScbinInputError("V02", f"{found}, but {need}: {fix}")
    matrix = sparse.csr_matrix(matrix)
    matrix = matrix if matrix.has_sorted_indices else matrix.sorted_indices()
    if matrix.nnz and int(matrix.data.max()) >= own.n_tokens:
        raise ScbinInputError("V02", "some tokens have ids that the vocabulary does not know. Tokenize again.")
    return MemoryTokens(matrix, own, adata.obs)


def _same_vocabulary(own: Vocabulary, vocabulary: Vocabulary | None) -> None:
    """Refuse tokens of another vocabulary than the one asked for."""
    if vocabulary is not None and own.sha256 != vocabulary.sha256:
        found = f"the tokens were made with another vocabulary ({own!r}) than the one asked for ({vocabulary!r})"
        raise ScbinInputError("V03", f"{found}. Call scbin.pp.tokenize(adata, like=model).")


# ---- matrices by row blocks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a matrix as the kernels take them: CSR, int32 columns, int64 `indptr` from 0, float values."""

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

    def sorted(self) -> Block:
        """Return the block with sorted, unique columns."""
        matrix = self.csr()
        return Block(self.start, matrix.data, matrix.indices, matrix.indptr.astype(np.int64), self.n_vars)


def iter_blocks(adata: ad.AnnData, layer: str | None = None, *, block_values: int | None = None) -> Iterator[Block]:
    """Go through X or a layer of any container by consecutive rows: zeros, order and duplicates are left as they are stored.

    Nothing points outside the arrays: compiled loops would read other memory.
    """
    if adata.is_view:  # the parent's matrix is read a block at a time; a view of a backed view does not exist
        parent, chosen = adata._adata_ref, np.arange(adata._adata_ref.n_obs)[adata._oidx]
        for start, stop in _cuts(adata.n_obs, adata.n_vars, block_values):
            yield _block(matrix_of(parent[chosen[start:stop], adata._vidx], layer), start)
        return
    matrix = matrix_of(adata, layer)
    n_rows, n_vars = matrix.shape
    if hasattr(matrix, "dask"):
        if len(matrix.chunks[1]) > 1:
            found = f"the dask matrix is chunked along the genes ({count(len(matrix.chunks[1]), 'chunk')})"
            fix = "but cells are read whole. Rechunk it: adata.X = adata.X.rechunk((1000, -1))."
            raise ScbinInputError("I16", f"{found}, {fix}")
        starts = np.cumsum((0, *matrix.chunks[0]))
        for i in range(len(matrix.chunks[0])):
            yield _block(matrix.blocks[i, 0].compute(), int(starts[i]))
        return
    if sparse.issparse(matrix) and matrix.format == "csc":
        _check_indptr(matrix.indptr, n_vars, min(len(matrix.indices), len(matrix.data)))
        _check_indices(matrix.indices, n_rows, "row")
        matrix = sparse.csr_matrix(matrix)
    if isinstance(matrix, CSRDataset) or sparse.issparse(matrix):
        stored: Any = SimpleNamespace(**matrix.group) if isinstance(matrix, CSRDataset) else matrix
        data, indices, indptr = stored.data, stored.indices, stored.indptr[:]
        _check_indptr(indptr, n_rows, min(data.shape[0], indices.shape[0]))
        for start, stop in _cuts(n_rows, int(indptr[-1]) // max(1, n_rows), block_values):
            bounds = indptr[start : stop + 1].astype(np.int64)
            here = slice(int(bounds[0]), int(bounds[-1]))
            yield _arrays(start, data[here], indices[here], bounds - bounds[0], n_vars)
        return
    # dense, or by columns on disk
    per_row = matrix.group["data"].shape[0] // max(1, n_rows) if isinstance(matrix, CSCDataset) else n_vars
    for start, stop in _cuts(n_rows, per_row, block_values):
        yield _block(matrix[start:stop], start)


def _cuts(n_rows: int, values_per_row: int, block_values: int | None) -> Iterator[tuple[int, int]]:
    """Yield the first row of each block and that after its last."""
    step = int(np.clip((block_values or BLOCK) // max(1, values_per_row), 1, 65_536))
    return ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def _block(part: Any, start: int) -> Block:
    """Return some rows of a container, in memory, as a block."""
    if not sparse.issparse(part):
        part = np.asarray(part)
        _check_dtype(part)
        if part.dtype.kind == "f" and (part.dtype.itemsize == 2 or not part.dtype.isnative):  # scipy takes neither
            part = part.astype(np.float32 if part.dtype.itemsize <= 4 else np.float64)
    part = sparse.csr_matrix(part)
    _check_indptr(part.indptr, part.shape[0], min(len(part.indices), len(part.data)))
    return _arrays(start, part.data, part.indices, part.indptr.astype(np.int64), part.shape[1])


def _arrays(start: int, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, n_vars: int) -> Block:
    """Narrow to the types that the kernels are compiled for: float32 where it holds every value, int32 columns."""
    _check_indices(indices, n_vars, "column")
    if data.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        small = data.dtype.itemsize <= 2 or not data.size or (data.dtype.kind != "f" and abs(data).max() < 2**24)
        data = data.astype(np.float32 if small else np.float64)
    return Block(start, data, np.asarray(indices, dtype=np.int32), indptr, n_vars)


def _check_indptr(indptr: np.ndarray, n_rows: int, n_stored: int) -> None:
    """Refuse row offsets that do not rise from 0 to at most the number of stored values."""
    rises = len(indptr) == n_rows + 1 and indptr[0] == 0 and bool(np.all(indptr[1:] >= indptr[:-1]))
    if not rises or indptr[-1] > n_stored:
        found = "its indptr does not rise from 0 to the number of stored values"
        raise ScbinInputError("I43", f"the sparse matrix is damaged: {found}.")


def _check_indices(indices: np.ndarray, n: int, what: str) -> None:
    if len(indices) and not (0 <= indices.min() and indices.max() < n):
        found = f"it has {what} indices from {indices.min()} to {indices.max()}, but {count(n, what)}"
        raise ScbinInputError("I43", f"the sparse matrix is damaged: {found}.")


def layer_names(adata: ad.AnnData) -> list[str]:
    """Return the names of the layers; from anndata 0.13 on `X` is one of them, without a name."""
    return [name for name in adata.layers if name is not None]


def matrix_of(adata: ad.AnnData, layer: str | None) -> Any:
    """Return X or the layer as it is stored, if it is of a kind that can be read."""
    if layer is not None and layer not in adata.layers:
        there = ", ".join(map(repr, layer_names(adata))) or "none"
        raise ScbinInputError("A06", f"layers has no {layer!r}. Available: {there}.")
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ScbinInputError("I48", "adata.X is None: pass layer= with the name of the layer to read.")
    name = "X" if layer is None else f"layers[{layer!r}]"
    fault = None
    if isinstance(matrix, np.ma.MaskedArray):
        fault = f"a masked array; fill the mask: {name}.filled(0)"
    elif isinstance(matrix, np.matrix):
        fault = f"a numpy matrix; use np.asarray({name})"
    elif sparse.issparse(matrix) and matrix.format not in ("csr", "csc"):
        fault = f"a sparse {matrix.format} matrix; use csr_matrix({name})"
    elif not hasattr(matrix, "shape") or len(matrix.shape) != 2:
        fault = f"a {type(matrix).__name__}, not a matrix; use csr_matrix({name})"
    if fault is not None:
        raise ScbinInputError("I13", f"{name} is {fault}.")
    if not isinstance(matrix, CSRDataset | CSCDataset):
        _check_dtype(matrix)
    return matrix


def _check_dtype(matrix: Any) -> None:
    if matrix.dtype.kind not in "biuf":
        found = f"the matrix has dtype {matrix.dtype}, which is no number type"
        raise ScbinInputError("I13", f"{found}; use astype('float32').")


def gene_columns(adata: ad.AnnData) -> np.ndarray:
    """Return which columns are gene counts (n_vars,): all, or those that `var["feature_types"]` calls Gene Expression."""
    genes = np.zeros(adata.n_vars, dtype=bool)
    if "feature_types" in adata.var.columns:
        genes = adata.var["feature_types"].astype(str).to_numpy() == "Gene Expression"
    return genes if genes.any() else np.ones(adata.n_vars, dtype=bool)


# ---- writing --------------------------------------------------------------------------------------------------------


def check_writable(adata: ad.AnnData, slot: str, key: str) -> None:
    """Raise if `adata.<slot>[key]` exists and scbin did not write it, or if files cannot have a slot of this name."""
    texts(key_added=key)
    if not key or "/" in key:
        raise ScbinInputError("A02", f"key_added is {key!r}; pass a name that is not empty and has no '/'.")
    if key in getattr(adata, slot) and not (key.startswith(OWN) or f"{slot}/{key}" in _written(adata)):
        found = f"adata.{slot}[{key!r}] exists and scbin did not write it, so it is not replaced"
        raise ScbinInputError("A04", f"{found}. Choose another name with key_added=.")


def write(adata: ad.AnnData, slot: str, key: str, value: Any) -> None:
    """Set `adata.<slot>[key]`, which must be free or scbin's own; `None` takes it away."""
    check_writable(adata, slot, key)
    make_real(adata)
    if value is not None:
        getattr(adata, slot)[key] = value
    elif key in getattr(adata, slot):
        del getattr(adata, slot)[key]
    if not key.startswith(OWN):
        others = [name for name in _written(adata) if name != f"{slot}/{key}"]
        written = others if value is None else [*others, f"{slot}/{key}"]
        write_uns(adata, _keys.WRITTEN, json.dumps(sorted(written)))


def write_uns(adata: ad.AnnData, key: str, value: Any) -> None:
    """Set `uns["scbin"][key]`, what a verb notes of its run."""
    make_real(adata)
    adata.uns[_keys.UNS] = {**adata.uns.get(_keys.UNS, {}), key: value}


def _written(adata: ad.AnnData) -> list[str]:
    """Return the slots that scbin wrote under names that the user chose."""
    return json.loads(str(adata.uns.get(_keys.UNS, {}).get(_keys.WRITTEN, "[]")))


def make_real(adata: ad.AnnData) -> None:
    """Turn a view into an object of its own, as the first write would, without the warning."""
    if adata.is_view:
        adata._init_as_actual(copied(adata))


def copied(adata: ad.AnnData) -> ad.AnnData:
    """Return a copy in memory."""
    return adata.to_memory() if adata.isbacked else adata.copy()


def warn(code: str, message: str) -> None:
    """Issue one of scbin's own warnings, pointing at the first line outside scbin."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("scbin."):
        level, frame = level + 1, frame.f_back
    warnings.warn(ScbinInputWarning(code, message), stacklevel=level)
