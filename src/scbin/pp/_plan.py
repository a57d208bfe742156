"""Everything between the AnnData and the encodings: what is read, with which vocabulary, and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pandas as pd
from scipy import sparse

from scbin._adata import Block, gene_columns, iter_blocks, layer_names, matrix_of, read_obs, warn
from scbin._arguments import check_fields, instances, texts
from scbin._errors import ScbinInputError, ScbinTypeError, count
from scbin.tokens.encoding import Encoded, Encoder
from scbin.tokens.fit import Cells, variable_genes
from scbin.tokens.genes import GeneMatch, clean_names, match_genes
from scbin.tokens.phenotypes import AGE_COLUMNS, age_labels, labels_of, token_ids, values_of
from scbin.tokens.rules import Bins, Tokenization
from scbin.tokens.values import Reading, Scan, Values, read_values
from scbin.tokens.vocabulary import Vocabulary, encoding_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData

Item = TypeVar("Item")
Flavor = Literal["pearson_residuals", "seurat_v3", "dispersion"]
COUNT_LAYERS = ("counts", "raw_counts", "raw")
WARN_OVERLAP, LEAST_OVERLAP = 0.8, 0.2
STATUS = ["ok", "empty", "no_vocab_gene"]


@dataclass(frozen=True)
class Request:
    """What the user asked for; the names are the arguments of `tokenize`. Without a `tokenization` it is the default one."""

    encoding: str = "bins"
    rule: Any = None
    phenotypes: Any = None
    like: Any = None
    layer: str | None = None
    values: Values = "auto"
    gene_key: str | None = None
    n_genes: int = 2000
    flavor: Flavor | None = None
    mask_var: str | None = None
    tokenization: Any = None

    def __post_init__(self) -> None:
        check_fields(self)
        encoding_of(self.encoding)
        instances((str, Bins, Sequence, np.ndarray), "a rule, a list of edges or a Bins", optional=True, rule=self.rule)
        instances(Tokenization, "a scbin.Tokenization", optional=True, tokenization=self.tokenization)
        object.__setattr__(self, "tokenization", self.tokenization or Tokenization())
        what, asked = "a column of obs, a list of columns, or {category: column}", self.phenotypes
        instances((str, Mapping, Sequence, np.ndarray, pd.Index), what, optional=True, phenotypes=asked)
        for column in asked.values() if isinstance(asked, Mapping) else asked if asked is not None else ():
            texts(phenotypes=column)
        if self.n_genes < 1:
            raise ScbinInputError("A02", f"n_genes is {self.n_genes}; at least one gene is needed.")

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary of `like`, which may be a model, its directory or a vocabulary."""
        like = self.like
        if like is None:
            return None
        if isinstance(like, str | PathLike):
            from scbin.model import Model  # brings torch, which tokenizing itself does not need

            like = Model.load(like)
        vocabulary = getattr(like, "vocabulary", like)
        if not isinstance(vocabulary, Vocabulary):
            fix = "pass a scbin model, the directory of one, or a vocabulary"
            raise ScbinTypeError("A01", f"like is a {type(like).__name__}; {fix}.")
        if self.encoding not in ("bins", vocabulary.encoding):
            found = f"encoding={self.encoding!r} was asked for, but like= has {vocabulary.encoding!r}"
            raise ScbinInputError("A03", f"{found}; leave it out.")
        return vocabulary


# ---- the matrix -----------------------------------------------------------------------------------------------------


class Source:
    """The matrix that a verb reads, several times by row blocks: `X`, or a layer."""

    def __init__(self, adata: AnnData, layer: str | None):
        self.adata, self.layer = adata, layer
        self.name = "X" if layer is None else f"layers[{layer!r}]"
        self.used = gene_columns(adata)
        self._unsorted: set[int] = set()

    def scan(self) -> Scan:
        """Look at every stored value."""
        scan = Scan(self.adata.n_obs, np.zeros(self.adata.n_vars, dtype=bool))
        for block in self.blocks():
            if not scan.add(block.start, block.data, block.indices, block.indptr, self.used):
                self._unsorted.add(block.start)
                block = block.sorted()
                scan.add(block.start, block.data, block.indices, block.indptr, self.used)
        return scan

    def blocks(self) -> Iterator[Block]:
        """Go through the rows; after the scan, all are sorted and without duplicates. On disk, the next block is read meanwhile."""
        blocks = iter_blocks(self.adata, self.layer)
        for block in ahead(blocks) if self.adata.isbacked else blocks:
            yield block.sorted() if block.start in self._unsorted else block

    def read(self, scan: Scan, values: Values) -> Reading:
        """Decide what the values are; the errors name places and the layer that would do."""
        adata, note = self.adata, self.adata.uns.get("log1p")
        base = note.get("base") if isinstance(note, dict) else None
        base = None if base is None else float(base)
        places = ", ".join(
            f"cell {str(adata.obs_names[row])!r}, gene {str(adata.var_names[column])!r}: {value:.4g}"
            for row, column, value in scan.not_finite_at or scan.negative_at
        )
        try:
            noted = note is not None
            return read_values(scan, values=values, noted=noted, noted_base=base, name=self.name, places=places)
        except ScbinInputError as error:
            hint = self.suggest_counts()
            if hint is None and error.code == "I03":
                hint = self._suggest(layer_names(adata), lambda x: x >= 0, "has no negative values", "read it")
            if hint is None:
                raise
            raise ScbinInputError(error.code, f"{str(error).split('] ', 1)[1]} {hint}") from None

    def suggest_counts(self) -> str | None:
        """Name a layer, or `.raw`, that holds whole, non-negative numbers, if there is one beside this matrix."""
        layers = [layer for layer in COUNT_LAYERS if layer in self.adata.layers]
        return self._suggest(layers, lambda x: (x >= 0) & (x == np.rint(x)), "holds counts", "use them")

    def _suggest(self, layers: list[str], rule: Callable[[Any], Any], what: str, to: str) -> str | None:
        """Name the first of some layers, else `.raw`, whose values are finite and pass a rule."""
        for layer in layers:
            try:
                parts = (block.data for block in iter_blocks(self.adata, layer))
                if layer != self.layer and all((rule(x) & np.isfinite(x)).all() for x in parts):
                    return f'layers[{layer!r}] {what}: pass layer="{layer}" to {to}.'
            except ScbinInputError:
                continue
        raw = None if self.adata.isbacked else self.adata.raw
        if raw is not None:
            values = np.asarray(raw.X.data if hasattr(raw.X, "nnz") else raw.X)
            if values.dtype.kind in "biuf" and (rule(values) & np.isfinite(values)).all():
                return f".raw {what}: adata.raw.to_adata() gives them as an AnnData of its own."
        return None


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Make the next item in a thread while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="scbin-read") as reader:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item


# ---- phenotypes -----------------------------------------------------------------------------------------------------


def _phenotypes(
    adata: AnnData, request: Request, given: Vocabulary | None
) -> tuple[dict[str, str], dict[str, np.ndarray], dict[str, int]]:
    """Return by category: the obs column, the labels of the cells, and the width of the age classes where it is of ages.

    For a given vocabulary the columns are by default those of its own names that exist, and the widths are its own.
    """
    asked: Any = request.phenotypes
    if asked is None and given is not None:
        own = {p.name: AGE_COLUMNS if p.name == "age" else (p.name,) for p in given.phenotypes}
        asked = {name: c for name, columns in own.items() for c in columns if c in adata.obs.columns}
    asked = [asked] if isinstance(asked, str) else () if asked is None else asked
    named = isinstance(asked, Mapping)
    columns = dict(asked) if named else {("age" if name == "development_stage" else name): name for name in asked}
    if given is not None:
        widths = {name: w for name in columns if (w := given.phenotype(name).age_groups) is not None}
    else:
        width = request.tokenization.age_groups
        widths = {n: width for n, column in columns.items() if width and (column in AGE_COLUMNS or n == "age")}
    labels = {}
    for name, column in columns.items():
        labels[name] = labels_of(read_obs(adata, column), column)
        if name in widths:
            labels[name], unread = age_labels(labels[name], widths[name])
            if unread:
                listed = ", ".join(f"{text!r} ({n})" for text, n in list(unread.items())[:3])
                found = count(len(unread), "label")
                warn("I39", f"{found} of {column!r} without an age became [NO_AGE]: {listed}.")
    return columns, labels, widths


def _phenotype_ids(vocabulary: Vocabulary, labels: Mapping[str, np.ndarray], n_obs: int, *, known: bool) -> np.ndarray:
    """Return the control tokens (cells, phenotypes); say which labels are new to a `known` vocabulary, or rare."""
    ids = np.zeros((n_obs, len(vocabulary.phenotypes)), dtype=np.int64)
    for k, phenotype in enumerate(vocabulary.phenotypes):
        ids[:, k] = phenotype.missing_id
        if phenotype.name not in labels:
            continue
        ids[:, k], unseen = token_ids(labels[phenotype.name], phenotype)
        if unseen:
            listed = ", ".join(f"{value[:60]!r} ({count(n, 'cell')})" for value, n in list(unseen.items())[:3])
            found = f"{count(len(unseen), 'label')} of {phenotype.name!r}, new to the vocabulary"
            warn("I36", f"{found}, became [NO_{phenotype.name.upper()}]: {listed}.")
        counts = np.bincount(ids[:, k], minlength=phenotype.stop_id)[phenotype.first_id : phenotype.stop_id]
        few = [f"{v[:60]!r} ({n})" for v, n in zip(phenotype.values, counts, strict=True) if 0 < n < 3]
        if few and not known:
            found = f"{count(len(few), 'label')} of {phenotype.name!r} with fewer than 3 cells"
            warn("I40", f"there {'is' if len(few) == 1 else 'are'} {found}: {', '.join(few[:3])}.")
    return ids


# ---- genes and vocabulary -------------------------------------------------------------------------------------------


def _match(adata: AnnData, source: Source, given: Vocabulary | None, request: Request) -> GeneMatch:
    """Match the columns to genes by name."""
    if request.gene_key is None:
        names = clean_names(list(adata.var_names), where="adata.var_names", is_column=False)
    elif request.gene_key in adata.var.columns:
        column = adata.var[request.gene_key].astype(object).tolist()
        names = clean_names(column, where=f"adata.var[{request.gene_key!r}]", is_column=True)
    else:
        there = ", ".join(map(repr, adata.var.columns)) or "none"
        raise ScbinInputError("A06", f"{request.gene_key!r} is not a column of adata.var. Available: {there}.")
    others = [c for c in adata.var.columns if given is not None and adata.var[c].dtype.kind not in "biufc"]
    return match_genes(
        names,
        None if given is None else given.genes,
        used=source.used,
        name_map=None if given is None else given.aliases,
        case=request.tokenization.case,
        duplicates=request.tokenization.duplicates,
        beside={str(c): adata.var[c].astype(object).tolist() for c in others},
        cells=[str(name) for name in adata.obs_names[:2000]],
    )


def _fit(
    source: Source, reading: Reading, match: GeneMatch, labels: Mapping[str, np.ndarray], widths: dict, request: Request
) -> tuple[Vocabulary, list[str]]:
    """Make a vocabulary from the cells: genes, bins or medians, phenotype values; say what was chosen in want of counts."""
    if source.adata.n_obs == 0:
        fix = "Pass the one that the cells shall be read with: like=model."
        raise ScbinInputError("I47", f"there is no cell to make a vocabulary from. {fix}")
    fine, notes = request.tokenization, []
    known_counts = reading.kind == "counts" or reading.exact
    if fine.depth and not known_counts:
        raise ScbinInputError("A03", f"depth=True needs counts, but {source.name} holds {reading.text}.")

    def choose(cells: Cells) -> np.ndarray:
        if request.mask_var is not None:
            return _marked_genes(source.adata.var, request.mask_var, match)
        flavor = request.flavor or ("pearson_residuals" if known_counts else "dispersion")
        if flavor != "dispersion" and not known_counts:
            raise ScbinInputError("A03", f"flavor={flavor!r} needs counts, but {source.name} holds {reading.text}.")
        if request.flavor is None and not known_counts and len(match.genes) > request.n_genes:
            notes.append('counts are not known, so genes were chosen by flavor="dispersion"')
        if flavor == "seurat_v3":
            return _seurat_v3_genes(cells, request.n_genes)
        return variable_genes(cells, request.n_genes, flavor)

    encoding = encoding_of(request.encoding)
    cells = Cells(match.genes, match.columns, reading, source.blocks, choose)
    fitted = encoding.fit(cells, request.rule, fine)
    kept = fitted.pop("genes")
    vocabulary = Vocabulary.build(
        request.encoding,
        [match.genes[k] for k in kept],
        phenotypes={name: values_of(column) for name, column in labels.items()},
        age_groups=widths,
        gene_shares=cells.moments.shares[kept].tolist(),
        max_length=fine.max_length,
        layout="scbin" if encoding.position_is_gene else fine.layout,
        depth=fine.depth if fine.depth is not None else known_counts and fine.layout == "scbin",
        **fitted,
    )
    if request.rule is None and request.encoding == "bins" and not reading.has_counts:
        notes.append('whole counts are not known, so values were binned on the log scale, rule="linear"')
    return vocabulary, notes


def _marked_genes(var: pd.DataFrame, mask_var: str, match: GeneMatch) -> np.ndarray:
    """Return the genes that a boolean column of var marks."""
    if mask_var not in var.columns:
        there = ", ".join(repr(str(name)) for name in var.columns if pd.api.types.is_bool_dtype(var[name])) or "none"
        found = f"mask_var={mask_var!r} is not a column of adata.var"
        raise ScbinInputError("A06", f"{found}. Columns of True and False: {there}.")
    marked = var[mask_var]
    if marked.isna().any() or not set(marked.unique()) <= {True, False}:
        found = ", ".join(repr(value) for value in marked.unique()[:3])
        rule = f"var[{mask_var!r}] must hold True and False only"
        raise ScbinInputError("A02", f"{rule}; it holds {found}. Use its .astype(bool).")
    genes = match.columns[marked.to_numpy(dtype=bool)]
    if not (genes >= 0).any():
        raise ScbinInputError("A02", f"var[{mask_var!r}] marks no gene; pass mask_var=None to choose by variance.")
    return np.unique(genes[genes >= 0])


def _seurat_v3_genes(cells: Cells, n_genes: int) -> np.ndarray:
    """Return the genes that scanpy's `flavor="seurat_v3"` chooses; the counts are taken into memory."""
    import scanpy as sc  # takes seconds
    from anndata import AnnData

    parts, n_columns = [], len(cells.genes)
    for rows in cells.rows():
        genes, row = rows.columns[rows.indices], np.repeat(np.arange(rows.n), np.diff(rows.indptr))
        kept = genes >= 0
        parts.append(sparse.csr_matrix((rows.data[kept], (row[kept], genes[kept])), shape=(rows.n, n_columns)))
    counts = AnnData(sparse.vstack(parts, format="csr"))
    try:
        sc.pp.highly_variable_genes(counts, flavor="seurat_v3", n_top_genes=min(n_genes, n_columns))
    except ImportError as error:
        raise ScbinInputError("A05", 'flavor="seurat_v3" needs scikit-misc: pip install scikit-misc.') from error
    return np.flatnonzero(counts.var["highly_variable"].to_numpy())


# ---- all together ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All that is needed to encode the rows of an AnnData, block by block."""

    source: Source
    reading: Reading
    match: GeneMatch
    vocabulary: Vocabulary
    phenotype_ids: np.ndarray  # (cells, phenotypes)
    force: bool
    given: bool  # whether the vocabulary came from elsewhere
    record: dict[str, Any]
    notes: list[str]

    def encode(self) -> Iterator[Encoded]:
        """Yield the tokens of consecutive row blocks."""
        encoder = Encoder(self.vocabulary, self.match.columns, self.reading)
        for block in self.source.blocks():
            yield encoder.encode(block, self.phenotype_ids[block.start : block.start + block.n_rows])

    def finish(self, encoded: Sequence[Encoded]) -> tuple[sparse.csr_matrix, pd.Categorical, dict[str, Any], list[str]]:
        """Join the blocks; return the tokens, the status of each cell, the record of the run and what to log of it."""
        columns = ("totals", "matched", "cut")
        totals, matched, cut = (
            np.concatenate([[0], *(getattr(part, name) for part in encoded)])[1:] for name in columns
        )
        none = sparse.csr_matrix((0, self.vocabulary.n_positions), dtype=self.vocabulary.dtype)
        tokens = sparse.vstack([none, *(part.tokens for part in encoded)], format="csr")
        codes = np.where(totals <= 0, 1, np.where(np.diff(tokens.indptr) == 0, 2, 0))
        record = {
            **self.record,
            "cells": len(codes),
            "tokens": int(tokens.nnz),
            "empty": int((codes == 1).sum()),
            "no_vocab_gene": int((codes == 2).sum()),
            "cut_cells": int((cut > 0).sum()),
            "cut_share": _share(cut.sum(), matched.sum()),
            "counts_in_vocabulary": _share(matched.sum(), totals.sum()),
            "rounded_cells": sum(part.rounded for part in encoded),
        }
        record |= self.check_coverage(matched.sum(), totals.sum(), record["rounded_cells"])
        for code, number, what in (("I19", 1, "no counts at all"), ("I20", 2, "no gene of the vocabulary")):
            cells = np.flatnonzero(codes == number)
            if len(cells):
                names = ", ".join(map(repr, self.source.adata.obs_names[cells[:3]])) + (
                    " ..." if len(cells) > 3 else ""
                )
                found = f"{count(len(cells), 'cell has', 'cells have')} {what} ({names})"
                kept = "it keeps its row" if len(cells) == 1 else "they keep their rows"
                fix = "sc.pp.filter_cells(adata, min_genes=1) removes empty ones."
                warn(code, f"{found}; {kept} without tokens. {fix}")
        return tokens, pd.Categorical.from_codes(codes, categories=STATUS), record, self._lines(record)

    def check_coverage(self, matched: float, totals: float, rounded: int) -> dict[str, float]:
        """Say how many cells had logs of no counts; weigh the genes found by the counts they held where the vocabulary was made."""
        if rounded:
            found = f"{count(rounded, 'cell has logs', 'cells have logs')} that are not those of whole counts"
            warn("I01", f"{found}: rounded to the nearest. layer= with the counts is safer.")
        if not self.given:
            return {}
        shares, found_genes = self.vocabulary.gene_shares, np.unique(self.match.columns[self.match.columns >= 0])
        genes = len(found_genes) / max(1, len(self.vocabulary.genes))
        counts = _share(matched, totals) if totals > 0 else genes
        if shares is not None and sum(shares) > 0:
            counts = _share(np.asarray(shares)[found_genes].sum(), sum(shares))
        found = f"only {counts:.0%} of the counts and {genes:.0%} of the genes of the vocabulary are found here"
        cause = "another annotation or species, or genes filtered away, is the likely cause."
        if self.source.adata.n_obs and counts < WARN_OVERLAP:
            if counts < LEAST_OVERLAP and not self.force:
                fix = "Pass scbin.Tokenization(force=True) to go on nevertheless."
                raise ScbinInputError("I32", f"{found}; {cause} {fix}")
            warn("I32", f"{found}; {cause}")
        return {"overlap_counts": counts, "overlap_genes": round(genes, 6)}

    def _lines(self, record: dict[str, Any]) -> list[str]:
        """What was read and made, for the log."""
        source, n_genes = self.source, len(self.vocabulary.genes)
        hint = source.suggest_counts() if self.reading.kind == "log1p" else None
        lines = [f"{source.name} read as {self.reading.text}{'' if hint is None else '; ' + hint.rstrip('.')}."]
        lines += [f"{note}." for note in (*self.match.notes, *self.notes)]
        found = (count(record["cells"], "cell"), count(record["tokens"], "token"), count(n_genes, "gene"))
        lines.append(f"{', '.join(found)} ({record['genes_zero']:,} without counts here).")
        if record["cut_cells"]:
            cells = count(record["cut_cells"], "cell")
            lines.append(f"{cells} had more genes than fit; {record['cut_share']:.2%} of the counts were cut.")
        if source.adata.isbacked:
            if getattr(matrix_of(source.adata, source.layer), "format", None) == "csc":
                lines.append("the matrix on disk is stored by columns (CSC), slow to read by cells; CSR is faster.")
            lines.append("the file is open for reading; the tokens are in memory until adata.write(...).")
        return [f"scbin: {line}" for line in lines]


def _share(part: float, whole: float) -> float:
    return round(float(part / whole), 6) if whole > 0 else 0.0


def prepare(adata: AnnData, request: Request) -> Plan:
    """Check everything, decide what the values are, match or choose the genes. Nothing is written."""
    given = request.vocabulary
    source = Source(adata, request.layer)
    columns, labels, widths = _phenotypes(adata, request, given)
    match = _match(adata, source, given, request)
    scan = source.scan()
    reading = source.read(scan, request.values)
    vocabulary, notes = (given, []) if given else _fit(source, reading, match, labels, widths, request)
    match = match if given else match.onto(vocabulary.genes)
    record = {
        "values": reading.kind,
        "text": reading.text,
        "base": reading.base,
        "target_sum": reading.target_sum,
        "unit": vocabulary.unit,
        "layer": request.layer,
        "encoding": vocabulary.encoding,
        "genes": len(vocabulary.genes),
        "genes_zero": int((~scan.seen & source.used).sum()),
        "phenotypes": columns,
    }
    _warn_of_values(source, reading, match, vocabulary, given=given is not None)
    ids = _phenotype_ids(vocabulary, labels, adata.n_obs, known=given is not None)
    return Plan(source, reading, match, vocabulary, ids, request.tokenization.force, given is not None, record, notes)


def _warn_of_values(source: Source, reading: Reading, match: GeneMatch, vocabulary: Vocabulary, *, given: bool) -> None:
    """Refuse or warn of values that the vocabulary cannot read as they are."""
    if vocabulary.codec.reads(vocabulary) == "counts" and not reading.has_counts:
        found = f"these tokens read counts, but {source.name} holds {reading.text}"
        fix = 'Pass the layer that holds counts, layer=, or rule="linear".'
        raise ScbinInputError("I07" if reading.fractional else "I01", f"{found}. {fix}")
    found_all = [*reading.warnings, *match.warnings]
    left_out = int((~source.used).sum())
    if left_out:
        columns, was = count(left_out, "column is", "columns are"), "was" if left_out == 1 else "were"
        found_all.append(("I33", f"{columns} not 'Gene Expression' in var['feature_types'] and {was} left out."))
    if not source.adata.obs_names.is_unique:
        found_all.append(("I24", "obs_names are not unique; cells are told apart by their place in the table."))
    if given and reading.kind == "log1p":
        bins = vocabulary.bins
        if bins is not None and bins.reads == "log1p" and reading.target_sum is None and reading.by != "uns":
            text = "the cells were normalised to no common sum before the logarithm, or genes are missing, those of the"
            fix = f"vocabulary to {bins.target_sum:,.6g}: bins may be shifted. Tokenize the counts instead."
            found_all.append(("I01", f"{text} {fix}"))
        if vocabulary.depth is not None and not reading.exact:
            text = "the vocabulary has a [DEPTH] token, but counts are not known here: it is [NO_DEPTH]."
            found_all.append(("I01", text))
    for code, message in found_all:
        warn(code, message)
