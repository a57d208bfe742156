"""Files of cells into files of tokens: one after the other or side by side, a block of rows in memory at a time."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem
from joblib import Parallel, delayed
from scipy import sparse

from scbin import _keys
from scbin._adata import check_adata, iter_blocks, matrix_of, read_obs, warn
from scbin._errors import ScbinInputError, ScbinInputWarning, count
from scbin.io.corpus import committed, expand, naming, open_cells, reading, stamp, write_shard
from scbin.pp._plan import LEAST_OVERLAP, STATUS, WITHOUT_TOKENS, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scbin.io.corpus import Paths
    from scbin.pp._plan import Request

SAMPLE, RUN = 20_000, 16  # cells that a vocabulary is made from; rows of them that follow each other


def tokenize_files(paths: Paths, out: Any, key: str, request: Request, workers: int, client: Any) -> list[Path]:
    """Tokenize files into files; return the paths of these. What an earlier call finished is left as it is.

    A file that cannot be tokenized is named by the error that is raised when all others are done.
    """
    sources = expand(paths)
    targets = _targets(sources, out)
    vocabulary = request.vocabulary
    if vocabulary is None:
        vocabulary = prepare(sampled(sources, request), request).vocabulary
    one = partial(tokenize_file, key=key, request=replace(request, like=vocabulary, rule=None, mask_var=None))
    if client is not None:
        done = client.gather(client.map(one, sources, targets, pure=False))
    else:
        done = Parallel(workers)(delayed(one)(*pair) for pair in zip(sources, targets, strict=True))
    told: Counter[tuple[str, str]] = Counter()
    for each in done:
        told.update(each["warnings"])
    for (code, text), n in told.items():
        warn(code, text if n == 1 else f"{text} ({n} files)")
    counts: Counter[str] = sum((each["status"] for each in done), Counter())
    for status, (code, what) in WITHOUT_TOKENS.items():
        if counts[status]:
            warn(
                code, f"{count(counts[status], 'cell has', 'cells have')} {what}; they keep their rows, without tokens."
            )
    failed = [each["error"] for each in done if each["error"]]
    if failed:
        others = (
            f" ({count(len(failed) - 1, 'other file')} too: {'; '.join(text for _, text in failed[1:4])})"
            if failed[1:]
            else ""
        )
        raise ScbinInputError(
            failed[0][0], f"{failed[0][1]}{others} The other files are done; the same call goes on from there."
        )
    return targets


def _targets(sources: list[Path], out: Any) -> list[Path]:
    """Return where the tokens of each file go."""
    if out is None:
        raise ScbinInputError("A02", "out is None; name the folder for the files with tokens, or 'corpus/{}.zarr'.")
    out = Path(out)
    if "{}" in out.name:
        targets = [out.with_name(out.name.replace("{}", source.stem)) for source in sources]
    elif len(sources) == 1 and out.suffix in (".h5ad", ".zarr"):
        targets = [out]
    else:
        targets = [out / source.name for source in sources]
    clash = {target.resolve() for target in targets} & {source.resolve() for source in sources}
    named = {target.suffix for target in targets} <= {".h5ad", ".zarr"} and out.suffix not in (".h5ad", ".zarr")
    if len(set(targets)) < len(targets) or clash or not (named or targets == [out] or "{}" in out.name):
        raise ScbinInputError("A02", f"out={str(out)!r} gives two files one name, an input's, or no h5ad or zarr.")
    return targets


# ---- the vocabulary -------------------------------------------------------------------------------------------------


def sampled(sources: list[Path], request: Request) -> AnnData:
    """Return cells of all files with the union of their genes: all, or a random part with every label in it, the same each time.

    Of more than 20,000 cells, runs of 16 rows are drawn over all files: reading a part of a file costs the same for any size.
    """
    asked: Any = () if request.phenotypes is None else request.phenotypes
    columns = [asked] if isinstance(asked, str) else list(asked.values() if hasattr(asked, "values") else asked)
    n_runs = np.array([-(-_n_cells(path) // RUN) for path in sources])
    drawn = np.arange(n_runs.sum())
    if len(drawn) * RUN > SAMPLE:
        drawn = np.random.default_rng(0).permutation(drawn)[: SAMPLE // RUN]
    parts, obs, var = [], [], []
    uns: dict[str, Any] = {}
    for path, first, n in zip(sources, np.cumsum(n_runs) - n_runs, n_runs, strict=True):
        adata = open_cells(path, request.layer)
        uns = uns or dict(adata.uns)
        with naming(path):
            check_adata(adata)
            of_runs = np.unique(drawn[(drawn >= first) & (drawn < first + n)] - first)
            labels = [np.flatnonzero(~read_obs(adata, column).duplicated().to_numpy()) // RUN for column in columns]
            runs = np.unique(np.concatenate([of_runs, *labels]).astype(np.int64))
            rows = (runs[:, None] * RUN + np.arange(RUN)).ravel()
            rows = rows[rows < adata.n_obs]
            parts.append(_rows(adata, request.layer, rows))
            obs.append(adata.obs.iloc[rows][columns])
            var.append(_genes(adata, request))
    _check_overlap(sources, var, request)
    union = pd.concat(var)
    union = union[~union.index.duplicated()]
    moved = [
        sparse.csr_matrix(
            (part.data, union.index.get_indexer(own.index)[part.indices], part.indptr), (part.shape[0], len(union))
        )
        for part, own in zip(parts, var, strict=True)
    ]
    matrix, frame = (
        sparse.vstack(moved, format="csr"),
        union.set_axis(pd.Index(union.index.get_level_values(0).astype(str)), axis=0),
    )
    layers = {} if request.layer is None else {request.layer: matrix}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that occur twice, which tokenizing looks at itself
        # a cell goes by its number: files may well have the same barcodes
        named = pd.concat(obs).set_axis(pd.RangeIndex(matrix.shape[0]).astype(str), axis=0)
        return AnnData(matrix if request.layer is None else None, named, frame, uns, layers=layers)


def _n_cells(path: Path) -> int:
    with reading(path) as group:
        return int(group["obs"][group["obs"].attrs["_index"]].shape[0])


def _rows(adata: AnnData, layer: str | None, rows: np.ndarray) -> sparse.csr_matrix:
    """Return some rows, increasing, of a matrix on disk."""
    if len(rows) == adata.n_obs:
        parts = [block.csr() for block in iter_blocks(adata, layer)]
    else:
        matrix, cuts = matrix_of(adata, layer), np.flatnonzero(np.diff(rows) > 1) + 1
        parts = [sparse.csr_matrix(matrix[int(run[0]) : int(run[-1]) + 1]) for run in np.split(rows, cuts) if len(run)]
    none = sparse.csr_matrix((0, adata.n_vars), dtype=np.float32)
    return sparse.vstack([none, *parts], format="csr")


def _genes(adata: AnnData, request: Request) -> pd.DataFrame:
    """Return what tokenizing reads of the genes of a file, by name and by how often the name was there before."""
    kept = [name for name in ("feature_types", request.mask_var, request.gene_key) if name in adata.var.columns]
    names = (
        pd.Series(adata.var[request.gene_key] if request.gene_key in kept else adata.var_names).astype(str).to_numpy()
    )
    index = pd.MultiIndex.from_arrays([names, pd.Series(names).groupby(names).cumcount()])
    return adata.var[kept].set_axis(index, axis=0)


def _check_overlap(sources: list[Path], genes: list[pd.DataFrame], request: Request) -> None:
    """Refuse a file whose genes the others do not have: it is of another species or annotation."""
    files_of = pd.concat([own.index.to_series() for own in genes]).groupby(level=[0, 1]).size()
    for path, own in zip(sources, genes, strict=True):
        shared = float((files_of.reindex(own.index) > 1).mean())
        if len(sources) > 1 and shared < LEAST_OVERLAP and not request.tokenization.force:
            cause = "another species or annotation is the likely cause. Tokenize such files apart."
            raise ScbinInputError("I32", f"{path}: only {shared:.0%} of its genes are in any other file; {cause}")


# ---- one file -------------------------------------------------------------------------------------------------------


def tokenize_file(source: Path, target: Path, *, key: str, request: Request) -> dict[str, Any]:
    """Write the tokens of one file, unless they are there; return its warnings, the cells of each status, and its error."""
    result: dict[str, Any] = {"warnings": [], "status": Counter(), "error": None}
    try:
        with naming(source), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            about: dict[str, Any] = {"source": source.name, "stamp": list(stamp(source)), "layer": request.layer}
            if target.exists():
                _check_done(target, key, request, about)
                return result
            adata = open_cells(source, request.layer)
            plan, codes = prepare(adata, request), []
            seen: Counter[str] = Counter()

            def rows() -> Iterator[sparse.csr_matrix]:
                for part in plan.encode():
                    codes.append(part.status)
                    seen.update(
                        totals=part.totals.sum(),
                        matched=part.matched.sum(),
                        rounded=part.rounded,
                        tokens=part.tokens.nnz,
                    )
                    yield part.tokens

            def rest() -> dict[str, Any]:
                status = pd.Categorical.from_codes(np.concatenate([np.zeros(0, np.int64), *codes]), categories=STATUS)
                result["status"] = Counter(status.value_counts().to_dict())
                coverage = plan.check_coverage(seen["matched"], seen["totals"], seen["rounded"])
                record = plan.record | {"cells": adata.n_obs, "tokens": int(seen["tokens"]), **coverage, **about}
                obs = adata.obs.assign(**{
                    _keys.STATUS: status,
                    _keys.of_tokens(_keys.ROW_VOCABULARY, key): pd.Categorical([plan.vocabulary.mark] * adata.n_obs),
                })  # fmt: skip
                entries = {_keys.VOCABULARY: plan.vocabulary.to_json(), _keys.TOKENIZE: json.dumps(record)}
                uns = {_keys.UNS: {_keys.of_tokens(name, key): text for name, text in entries.items()}}
                return {"obs": obs, "var": adata.var, "uns": uns}

            with committed(target) as temporary:
                write_shard(temporary, key, rows(), rest)
                if tuple(about["stamp"]) != stamp(source):
                    raise ScbinInputError("F01", "the file was changed while it was read. Tokenize it again.")
        found = [w.message for w in caught if isinstance(w.message, ScbinInputWarning)]
        result["warnings"] = [(w.code, w.message) for w in found]
    except ScbinInputError as error:
        result["error"] = (error.code, error.message)
    return result


def _check_done(target: Path, key: str, request: Request, about: dict[str, Any]) -> None:
    """Refuse to go on where the file that is there is of other cells, or of another vocabulary."""
    with reading(target) as group:
        entries = read_elem(group["uns"]).get(_keys.UNS, {})
        record = json.loads(str(entries.get(_keys.of_tokens(_keys.TOKENIZE, key), "{}")))
        same = str(entries.get(_keys.of_tokens(_keys.VOCABULARY, key))) == request.like.to_json()
        if not same or {name: record.get(name) for name in about} != about:
            found = "is there already, with tokens of other cells or of another vocabulary"
            raise ScbinInputError("A04", f"{found}. Take it away, or choose another out.")
