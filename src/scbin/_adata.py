"""Between AnnData and arrays: checking what came in, reading matrices by row blocks, writing slots."""

from __future__ import annotations

import difflib
import itertools
import json
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from scbin import _keys
from scbin._arguments import instances, shown
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTypeError, count
from scbin.tokens.genes import find_genes, strip_version
from scbin.tokens.tokens import MemoryTokens, Tokens
from scbin.tokens.values import Block
from scbin.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

REPLACED = 0.05  # share of the genes in tokens without a value in the matrix, from which it is another one
BLOCK = 500_000  # stored values per row block: a few megabytes, which a core holds close
OWN = (_keys.TOKENS, _keys.EMBEDDING, "scbin_", "X_umap_", "X_scbin_")


# ---- checking -------------------------------------------------------------------------------------------------------


def check_adata(adata: object) -> ad.AnnData:
    """Return `adata` if it is an AnnData with genes, else say what to pass."""
    if not isinstance(adata, ad.AnnData):
        what = "read files by anndata.read_h5ad, join several by anndata.concat, take mdata['rna'] of a MuData"
        raise ScbinTypeError("I55", f"adata is a {type(adata).__name__}, not an AnnData; {what}.")
    if adata.n_vars == 0:
        raise ScbinInputError("I48", f"adata has no genes (its shape is {adata.shape}).")
    entry = adata.uns.get(_keys.UNS, {})
    if not isinstance(entry, Mapping):
        found = f"adata.uns[{_keys.UNS!r}] is a {type(entry).__name__} that scbin did not write"
        raise ScbinInputError("A04", f"{found}, so it is not replaced. Keep it under another name.")
    return adata


def read_obs(adata: ad.AnnData, key: str) -> pd.Series:
    """Return the column `key` of obs, or `"slot.column"` of a matrix in obsm; if there is none, name the closest ones."""
    if key in adata.obs.columns:
        return adata.obs[key]
    if (column := obsm_column(adata, str(key))) is not None:
        return column
    close = difflib.get_close_matches(str(key), map(str, adata.obs.columns), cutoff=0.0)
    found = ", ".join(map(repr, close)) or "none"
    raise ScbinInputError("A06", f"{key!r} is not a column of adata.obs. The closest ones are: {found}.")


def obsm_column(adata: ad.AnnData, key: str) -> pd.Series | None:
    """Return the column `"slot.column"` of a matrix in obsm, None where there is none."""
    tables = (obsm_columns(adata, slot) for slot in adata.obsm if key.startswith(f"{slot}."))
    return next((table[key] for table in tables if key in table), None)


def obsm_columns(adata: ad.AnnData, slot: str) -> pd.DataFrame:
    """Return the columns of a matrix in obsm, named `"slot.column"`: by its own names, or by number."""
    matrix: Any = adata.obsm[slot]
    table = pd.DataFrame(matrix.toarray() if sparse.issparse(matrix) else matrix).set_axis(adata.obs_names, axis=0)
    return table.add_prefix(f"{slot}.")


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
    instances(str, "a text", tokens_key=key)
    entries, entry = adata.uns.get(_keys.UNS, {}), _keys.of_tokens(_keys.VOCABULARY, key)
    if key not in adata.obsm:
        there = [slot for slot in adata.obsm if _keys.of_tokens(_keys.VOCABULARY, slot) in entries]
        fix = f"pass tokens_key={there[0]!r}, which holds tokens" if there else "call scbin.pp.tokenize(adata)"
        raise ScbinInputError("V01", f"adata.obsm has no {key!r}: the cells are not tokenized; {fix}.")
    own = Vocabulary.from_json(str(entries[entry])) if entry in entries else vocabulary
    if own is None:
        found = f"adata.obsm[{key!r}] is there but adata.uns['scbin'][{entry!r}] is not: anndata.concat drops uns"
        fix = "Join with anndata.concat(adatas, uns_merge='same'), or tokenize again."
        raise ScbinInputError("V02", f"{found}. {fix}")
    _same_vocabulary(own, vocabulary)
    marks = adata.obs.get(_keys.of_tokens(_keys.ROW_VOCABULARY, key), pd.Series(dtype=str)).astype(str)
    if (foreign := int((marks != own.mark).sum())) > 0:
        found = f"{count(foreign, 'row')} of adata.obsm[{key!r}] are of another vocabulary than {own!r}"
        raise ScbinInputError("V03", f"{found}. Tokenize the cells together, or each part with like=model.")
    matrix = sparse.csr_matrix(adata.obsm[key])
    fits = matrix.shape[1] == own.n_positions and matrix.dtype.kind == "u"
    if not fits or (matrix.nnz and int(matrix.data.max()) >= own.n_tokens):
        found = f"adata.obsm[{key!r}] ({matrix.shape[1]:,} columns of {matrix.dtype}) does not fit its vocabulary"
        need = f"{own.n_positions:,} columns of {own.dtype}, ids below {own.n_tokens:,}"
        raise ScbinInputError("V02", f"{found} ({need}). Tokenize the cells again, those that were joined together.")
    tokens = MemoryTokens(matrix if matrix.has_sorted_indices else matrix.sorted_indices(), own, adata.obs)
    _warn_if_replaced(adata, tokens, read_uns(adata, _keys.of_tokens(_keys.TOKENIZE, key), dict).get("layer", False))
    return tokens


def _warn_if_replaced(adata: ad.AnnData, tokens: MemoryTokens, layer: Any) -> None:
    """Warn where the matrix has nothing at many places at which tokens say that a gene is expressed: other cells or counts.

    Normalising, logs, scaling and leaving out cells or genes change nothing of that. It is looked at in up to a hundred cells, where
    the matrix is in memory by rows and, by the record (`layer`, False without one), the one that was tokenized.
    """
    if adata.isbacked or not isinstance(layer, str | None):
        return
    rows = np.unique(np.linspace(0, max(adata.n_obs - 1, 0), min(100, adata.n_obs)).astype(np.int64))
    vocabulary, part = tokens.vocabulary, tokens.take(rows)
    matrix: Any = adata.X if layer is None else adata.layers.get(layer)
    if not isinstance(matrix, np.ndarray | sparse.csr_matrix | sparse.csr_array):
        return
    matrix = matrix[rows]
    said = vocabulary.is_gene_token(part.data) & (vocabulary.levels_of(part.data) > 0)
    cells = np.repeat(np.arange(len(rows)), np.diff(part.indptr))[said]
    once = ~adata.var_names.duplicated(keep=False)
    places = pd.Series(np.flatnonzero(once), adata.var_names[once])
    column_of = places.reindex(vocabulary.genes, fill_value=-1).to_numpy()
    at = column_of[vocabulary.genes_at(part.data[said], part.indices[said])]
    values = np.asarray(matrix[cells[at >= 0], at[at >= 0]]) if (at >= 0).any() else np.zeros(0)
    if values.size and (share := float(np.mean(values == 0))) > REPLACED:
        name = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        found = f"{name} is zero at {share:.0%} of the genes in the cells' tokens"
        warn("V02", f"{found}: other cells or counts than were tokenized. If it was replaced, tokenize again.")


def _same_vocabulary(own: Vocabulary, vocabulary: Vocabulary | None) -> None:
    """Refuse tokens of another vocabulary than the one asked for."""
    if vocabulary is not None and own.sha256 != vocabulary.sha256:
        found = f"the tokens were made with another vocabulary ({own!r}) than the one asked for ({vocabulary!r})"
        raise ScbinInputError("V03", f"{found}. Call scbin.pp.tokenize(adata, like=model).")


# ---- matrices by row blocks -----------------------------------------------------------------------------------------


def iter_blocks(adata: ad.AnnData, layer: str | None = None, *, block_values: int | None = None) -> Iterator[Block]:
    """Go through X or a layer of any container by consecutive rows: zeros, order and duplicates are left as they are stored.

    Nothing points outside the arrays: compiled loops would read other memory.
    """
    matrix = matrix_of(adata, layer)
    if getattr(matrix, "format", None) == "csc":
        matrix = matrix.to_memory() if isinstance(matrix, CSCDataset) else matrix
        _check_sound(matrix, *matrix.shape[::-1])
        matrix = sparse.csr_matrix(matrix)
    stored: Any = None
    n_rows, per_row = matrix.shape
    if isinstance(matrix, CSRDataset) or sparse.issparse(matrix):
        stored = SimpleNamespace(**matrix.group) if isinstance(matrix, CSRDataset) else matrix
        indptr = stored.indptr[:].astype(np.int64)
        per_row = int(indptr[-1]) // max(1, n_rows)
    step = int(np.clip((block_values or BLOCK) // max(1, per_row), 1, 65_536))
    cuts = np.cumsum((0, *matrix.chunks[0])).tolist() if hasattr(matrix, "dask") else [*range(0, n_rows, step), n_rows]
    for start, stop in itertools.pairwise(cuts):
        if stored is None:
            rows = matrix[start:stop]
            yield _block(start, rows.compute() if hasattr(rows, "dask") else rows)
            continue
        bounds = indptr[start : stop + 1]
        here = slice(int(bounds[0]), int(bounds[-1]))
        rows = {"data": stored.data[here], "indices": stored.indices[here], "indptr": bounds - bounds[0]}
        yield _block(start, SimpleNamespace(**rows, shape=(stop - start, matrix.shape[1])))


def _block(start: int, rows: Any) -> Block:
    """Return rows, dense or compressed, as the kernels take them: float32 where it holds every value, int32 columns."""
    if not isinstance(rows, SimpleNamespace):
        if rows.dtype.kind == "f" and rows.dtype not in (np.float32, np.float64):  # half or foreign, not for scipy
            rows = rows.astype(np.float32 if rows.dtype.itemsize <= 4 else np.float64)
        rows = sparse.csr_matrix(rows.astype(rows.dtype.newbyteorder("="), copy=False))
    _check_sound(rows, *rows.shape)
    data = rows.data
    if data.dtype not in (np.float32, np.float64):
        small = data.dtype.itemsize <= 2 or not data.size or (data.dtype.kind != "f" and abs(data).max() < 2**24)
        data = data.astype(np.float32 if small else np.float64)
    return Block(start, data, np.asarray(rows.indices, np.int32), rows.indptr.astype(np.int64), rows.shape[1])


def _check_sound(rows: Any, n: int, n_others: int) -> None:
    """Refuse compressed rows that point outside of their arrays."""
    indptr, indices = rows.indptr, rows.indices
    rises = len(indptr) == n + 1 and indptr[0] == 0 and bool((indptr[1:] >= indptr[:-1]).all())
    inside = not len(indices) or (indices.min() >= 0 and indices.max() < n_others)
    if not (rises and inside and indptr[-1] <= min(len(indices), len(rows.data))):
        found = "indptr does not increase from 0 to the number of stored values, or an index is out of range"
        raise ScbinInputError("I43", f"the sparse matrix is damaged: its {found}.")


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
    name, kind = "X" if layer is None else f"layers[{layer!r}]", type(matrix).__name__
    other = sparse.issparse(matrix) and matrix.format not in ("csr", "csc")
    if other or isinstance(matrix, np.ma.MaskedArray | np.matrix) or len(getattr(matrix, "shape", ())) != 2:
        raise ScbinInputError("I13", f"{name} is a {kind}, not read; use csr_matrix({name}), if masked .filled(0).")
    if matrix.dtype.kind not in "biuf":
        raise ScbinInputError("I13", f"{name} has dtype {matrix.dtype}, no number type; use astype('float32').")
    return matrix


def gene_columns(adata: ad.AnnData) -> np.ndarray:
    """Return which columns are gene counts (n_vars,): all, or those that `var["feature_types"]` calls Gene Expression."""
    kinds = adata.var.get("feature_types", pd.Series(index=adata.var_names, dtype=str))
    genes = kinds.astype(str).to_numpy() == "Gene Expression"
    return genes if genes.any() else np.ones(adata.n_vars, dtype=bool)


# ---- genes by name --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneNames:
    """The genes of a model under the names that `adata` has for them."""

    names: tuple[str, ...]  # of each gene of the model, as in var_names where it stands there
    columns: np.ndarray  # (genes,) its column in adata, -1 where it has none
    places: dict[str, int]  # every name that is understood, to the gene

    def by_column(self, values: np.ndarray, n_vars: int, dtype: Any = np.float32) -> np.ndarray:
        """Return what is known of the genes (genes, ...) by column of adata (columns, ...), NaN for others."""
        there, result = self.columns >= 0, np.full((n_vars, *values.shape[1:]), np.nan, dtype=dtype)
        result[self.columns[there]] = values[there]
        return result

    def resolve(self, wanted: str | Iterable[Any], what: str = "genes") -> list[int]:
        """Return the genes that names mean, in order and once each; name the closest ones for a name that is unknown."""
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in wanted:
            instances(str, "names of genes", **{what: name})
        found = [self.places.get(name, self.places.get(strip_version(name), -1)) for name in wanted]
        unknown = [name for name, place in zip(wanted, found, strict=True) if place < 0]
        if unknown:
            by_upper = {known.upper(): known for known in self.places}
            close = ", ".join(repr(by_upper[name]) for name in difflib.get_close_matches(unknown[0].upper(), by_upper))
            what = f"{unknown[0]!r} is not a gene of the model ({len(unknown):,} such names). Closest: {close or 'nothing'}"
            raise ScbinInputError("A06", f"{what}. If adata has it, tokenize and train with it: n_genes=, mask_var=.")
        return list(dict.fromkeys(found))


def gene_names(adata: ad.AnnData, vocabulary: Vocabulary) -> GeneNames:
    """Match the columns of `adata` with the genes of a model: by the names that were tokenized, else by those that fit best."""
    index, aliases = {gene: k for k, gene in enumerate(vocabulary.genes)}, vocabulary.aliases

    def genes_of(labels: Iterable[object]) -> np.ndarray:
        names = [strip_version(label) if isinstance(label, str) else "" for label in labels]
        return find_genes(np.array(names, dtype=object), vocabulary)

    own = [str(name) for name in adata.var_names]
    texts = [column for column in adata.var if adata.var[column].dtype.kind not in "biufc"]
    others = [adata.var[column].astype(object) for column in texts]
    labels_of = dict(zip([None, *texts], [own, *others], strict=True))
    best = genes_of(labels_of.get(read_uns(adata, _keys.TOKENIZE, dict).get("gene_key", ""), []))
    if not (best >= 0).any():
        best = max(map(genes_of, labels_of.values()), key=lambda genes: len(np.unique(genes[genes >= 0])))
    columns = np.full(len(index), -1, dtype=np.int64)
    known = np.flatnonzero(best >= 0)[::-1]
    columns[best[known]] = known  # the first of several columns of one gene
    places = {alias: index[gene] for alias, gene in aliases.items() if gene in index}
    for labels in [*others, own]:
        places |= {str(name): int(gene) for name, gene in zip(labels, best, strict=True) if gene >= 0}
    names = tuple(own[c] if c >= 0 else gene for c, gene in zip(columns, vocabulary.genes, strict=True))
    return GeneNames(names, columns, places | index)


# ---- writing --------------------------------------------------------------------------------------------------------


def check_writable(adata: ad.AnnData, slot: str, key: str) -> None:
    """Raise if `adata.<slot>[key]` exists and scbin did not write it, or if files cannot have a slot of this name."""
    instances(str, "a text", key_added=key)
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
        written = {*_written(adata), f"{slot}/{key}"}
        write_uns(adata, _keys.WRITTEN, sorted(written))


def write_tokens(adata: ad.AnnData, tokens: Any, vocabulary: Vocabulary, status: Any, key: str = _keys.TOKENS) -> None:
    """Write token rows with the status of each, and their vocabulary, whole and as a mark of every row."""
    text, marks = vocabulary.to_json(), pd.Categorical([vocabulary.mark] * adata.n_obs)
    write(adata, "obsm", key, tokens)
    write(adata, "obs", _keys.STATUS, status)
    write(adata, "obs", _keys.of_tokens(_keys.ROW_VOCABULARY, key), marks)
    write_uns(adata, _keys.of_tokens(_keys.VOCABULARY, key), text)


def write_uns(adata: ad.AnnData, key: str, value: Any) -> None:
    """Set `uns["scbin"][key]`, what a verb notes of its run; a `dict` or `list` is kept as JSON."""
    make_real(adata)
    kept = json.dumps(value) if isinstance(value, dict | list) else value
    adata.uns[_keys.UNS] = {**adata.uns.get(_keys.UNS, {}), key: kept}


def write_entry(adata: ad.AnnData, key: str, params: dict[str, Any], **parts: Any) -> None:
    """Set `uns[key]`, results with `params`, how they were made, as JSON."""
    write(adata, "uns", key, {**parts, "params": json.dumps(params)})


def read_uns(adata: ad.AnnData, key: str, kind: Any) -> Any:
    """Return `uns["scbin"][key]`, a `dict` or `list` (kept as JSON) or a table, or an empty one; refuse anything else."""
    entries = adata.uns.get(_keys.UNS, {})
    found = entries.get(key) if isinstance(entries, Mapping) else entries
    if found is None:
        return kind()
    if kind in (dict, list):
        with suppress(ValueError, RecursionError):
            found = json.loads(str(found))
    if not isinstance(found, kind):
        wrong = f"adata.uns['scbin'][{key!r}] ({shown(found)}) is not what scbin wrote there"
        raise ScbinInputError("A04", f"{wrong}. Delete it, or call the function again that makes it.")
    return found


def _written(adata: ad.AnnData) -> list[str]:
    """Return the slots that scbin wrote under names that the user chose."""
    return [slot for slot in read_uns(adata, _keys.WRITTEN, list) if isinstance(slot, str)]


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
