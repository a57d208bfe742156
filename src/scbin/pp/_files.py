"""Files of cells into files of tokens: one after the other or side by side, a block of rows in memory at a time."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata.io import read_elem
from joblib import Parallel, delayed

from scbin import _keys
from scbin._adata import check_adata, gene_columns, iter_blocks, read_obs, warn
from scbin._errors import ScbinInputError, ScbinInputWarning
from scbin.io.commit import committed
from scbin.io.corpus import check_unchanged, expand, naming, open_cells, reading, stamp, write_shard
from scbin.pp._plan import STATUS, Source, marks_of, named_columns, prepare, warn_without_tokens
from scbin.tokens.genes import some

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData

    from scbin.io.corpus import Paths
    from scbin.pp._plan import Request
    from scbin.tokens.values import Block
    from scbin.tokens.vocabulary import Vocabulary

SUFFIXES = (".h5ad", ".zarr")


def tokenize_files(paths: Paths, out: Any, key: str, request: Request, workers: int, client: Any) -> list[Path]:
    """Tokenize files into files; return the paths of these. What an earlier call finished is left as it is.

    A file that cannot be tokenized is named by the error that is raised when all others are done.
    """
    sources = expand(paths)
    targets = _targets(sources, out)
    vocabulary = request.vocabulary or vocabulary_of(sources, request)
    one = partial(tokenize_file, key=key, request=replace(request, like=vocabulary, rule=None, mask_var=None))
    if client is not None:
        done = client.gather(client.map(one, sources, targets, pure=False))
    else:
        done = Parallel(workers)(delayed(one)(*pair) for pair in zip(sources, targets, strict=True))
    of_files: dict[tuple[str, str], list[str]] = {}
    for source, result in zip(sources, done, strict=True):
        for each in result["warnings"]:
            of_files.setdefault(each, []).append(source.name)
    for (code, text), names in of_files.items():
        warn(code, f"{some(names)}: {text}")
    codes = np.concatenate([result["status"] for result in done])
    warn_without_tokens(pd.Categorical.from_codes(codes, categories=STATUS))
    if failed := [result["error"] for result in done if result["error"]]:
        found = "; ".join(text for _, text in failed[:3])
        raise ScbinInputError(failed[0][0], f"{found} The other files are done; repeat the call to continue.")
    return targets


def _targets(sources: list[Path], out: Any) -> list[Path]:
    """Return where the tokens of each file go."""
    if out is None:
        raise ScbinInputError("A02", "out is None; name the folder for the files with tokens, or 'corpus/{}.zarr'.")
    out = Path(out)
    if out.suffix in SUFFIXES:
        targets = [out.with_name(out.name.replace("{}", source.stem)) for source in sources]
    else:
        targets = [out / source.name for source in sources]
    clash = {target.resolve() for target in targets} & {source.resolve() for source in sources}
    if len(set(targets)) < len(targets) or clash or not {target.suffix for target in targets} <= set(SUFFIXES):
        raise ScbinInputError(
            "A02",
            f"out={str(out)!r} gives two files the same name, the name of an input, or a name without .h5ad or .zarr.",
        )
    return targets


# ---- the vocabulary -------------------------------------------------------------------------------------------------


def vocabulary_of(sources: Sequence[Path], request: Request) -> Vocabulary:
    """Make a vocabulary from all cells of some files, in passes over them: no sum, and no choice of genes, is that of a part."""
    source = Joined(sources, request)
    return prepare(source.adata, request, source).vocabulary


class Joined(Source):
    """The matrices of several files as one, with the union of their genes: each pass reads the files one after the other.

    A column is known by its gene, whether it holds gene counts, and which of the columns of this gene it is in its file.
    """

    def __init__(self, paths: Sequence[Path], request: Request):
        self.paths, labels, sizes, uns = paths, [], [], dict[str, Any]()
        columns, self.stamps = list((request.columns or {}).values()), list[tuple[int, ...]]()
        tables, which = list[pd.DataFrame](), []  # most files have the same genes
        for path in paths:
            with naming(path):
                self.stamps.append(stamp(path))
                adata = check_adata(open_cells(path, request.layer))
                labels.append(pd.DataFrame({column: read_obs(adata, column).array for column in columns}))
                table = _columns_of(adata, request)
            which.append(next((k for k, each in enumerate(tables) if each.equals(table)), len(tables)))
            tables += [table] if which[-1] == len(tables) else []
            sizes.append(adata.n_obs)
            uns = uns or dict(adata.uns)
        self.bounds, whole = np.cumsum([0, *sizes]), pd.concat(tables)
        places = whole.groupby(["gene", "is_gene", "copy"], sort=False, dropna=False).ngroup().to_numpy(np.int32)
        of_tables = np.split(places, np.cumsum([len(table) for table in tables])[:-1])
        self.places = [of_tables[k] for k in which]  # of the columns of each file in the union
        first = whole[~pd.Series(places).duplicated().to_numpy()]
        var = pd.DataFrame({"feature_types": np.where(first["is_gene"], "Gene Expression", "other")}, first.index)
        if request.gene_key is not None:
            var[request.gene_key] = first["gene"]
        if "marked" in whole:
            var[request.mask_var] = whole["marked"].eq(True).groupby(places).any().to_numpy()
        parts: Any = {
            "uns": uns,
            "layers": {},
            "isbacked": True,
            "obs": pd.concat(labels, ignore_index=True),
            "var": var,
        }
        shape = {"n_obs": int(self.bounds[-1]), "n_vars": len(var), "obs_names": self, "var_names": var.index}
        super().__init__(SimpleNamespace(**parts, **shape), request.layer)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, cell: int) -> str:
        file = int(np.searchsorted(self.bounds, cell, side="right")) - 1
        return f"{cell - self.bounds[file]} of {self.paths[file].name}"

    def stored(self) -> Iterator[Block]:
        """Go through the rows as they are stored, their columns those of the union."""
        for path, first, before, places in zip(self.paths, self.bounds, self.stamps, self.places, strict=False):
            with naming(path):
                check_unchanged(path, before)
                adata = open_cells(path, self.layer)
                for block in iter_blocks(adata, self.layer):
                    here: Any = {"start": int(first) + block.start, "indices": places[block.indices]}
                    yield replace(block, **here, n_vars=self.adata.n_vars)


def _columns_of(adata: AnnData, request: Request) -> pd.DataFrame:
    """Return what the columns of a file are: gene, whether they hold gene counts, which column of this gene, and marked genes."""
    table = pd.DataFrame({"gene": named_columns(adata.var, request.gene_key)}, adata.var_names)
    table["is_gene"] = gene_columns(adata)
    table["copy"] = table.groupby(["gene", "is_gene"], dropna=False).cumcount()
    name = request.mask_var
    if name is not None and name in adata.var and pd.api.types.is_bool_dtype(adata.var[name]):
        table["marked"] = marks_of(adata.var, name)
    return table


# ---- one file -------------------------------------------------------------------------------------------------------


def tokenize_file(source: Path, target: Path, *, key: str, request: Request) -> dict[str, Any]:
    """Write the tokens of one file, unless they are there; return its warnings, the status of its cells, and its error."""
    result: dict[str, Any] = {"warnings": [], "status": np.zeros(0, np.int8), "error": None}
    asked = {name: getattr(request, name) for name in ("values", "gene_key", "columns")}
    about: dict[str, Any] = {"source": source.name, "layer": request.layer, "asked": asked}
    try:
        with naming(source), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            about["stamp"] = list(stamp(source))
            if target.exists():
                _check_done(target, key, request, about)
                return result
            adata = open_cells(source, request.layer)
            plan = prepare(adata, request)

            def rest() -> dict[str, Any]:
                status, record = plan.finish()
                result["status"] = status.codes
                marks = pd.Categorical([plan.vocabulary.mark] * adata.n_obs)
                row_vocabulary = _keys.of_tokens(_keys.ROW_VOCABULARY, key)
                obs = adata.obs.assign(**{_keys.STATUS: status, row_vocabulary: marks})
                entries = {_keys.VOCABULARY: plan.vocabulary.to_json(), _keys.TOKENIZE: json.dumps(record | about)}
                uns = {_keys.UNS: {_keys.of_tokens(name, key): text for name, text in entries.items()}}
                return {"obs": obs, "var": adata.var, "uns": uns}

            with committed(target) as temporary:
                write_shard(temporary, key, plan.encode(), rest)
                check_unchanged(source, about["stamp"])
        found = [w.message for w in caught if isinstance(w.message, ScbinInputWarning)]
        result["warnings"] = [(w.code, w.message) for w in found]
    except ScbinInputError as error:
        result["error"] = (error.code, error.message)
    return result


def _check_done(target: Path, key: str, request: Request, about: dict[str, Any]) -> None:
    """Refuse to continue where the file that is there is of other cells, another vocabulary, or was read in another way."""
    with reading(target) as group:
        entries = read_elem(group["uns"]).get(_keys.UNS, {})
        record = json.loads(str(entries.get(_keys.of_tokens(_keys.TOKENIZE, key), "{}")))
        same = str(entries.get(_keys.of_tokens(_keys.VOCABULARY, key))) == request.like.to_json()
        if not same or {name: record.get(name) for name in about} != about:
            found = "is there already, with tokens of other cells, of another vocabulary, or read in another way"
            raise ScbinInputError("A04", f"{found}. Move it, or choose another out=.")
