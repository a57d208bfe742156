"""Everything between the AnnData and the encodings: what is read, with which vocabulary, and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scbin._adata import gene_columns, iter_blocks, layer_names, matrix_of, read_obs, warn
from scbin._arguments import check_fields, instances, texts
from scbin._errors import ScbinInputError, count
from scbin.tokens.encoding import Encoded, Encoder
from scbin.tokens.fit import Cells, Flavor
from scbin.tokens.genes import GeneMatch, clean_names, match_genes
from scbin.tokens.phenotypes import AGE_COLUMNS, age_labels, labels_of, token_ids, values_of
from scbin.tokens.rules import Bins, Tokenization
from scbin.tokens.values import Block, Reading, Scan, Values, read_values
from scbin.tokens.vocabulary import Vocabulary, encoding_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Item = TypeVar("Item")
COUNT_LAYERS = ("counts", "raw_counts", "raw")
WARN_OVERLAP, LEAST_OVERLAP = 0.8, 0.2
# share of the counts that is all; ratio of two shares from which bins move by more than half a bin
ALL_COUNTS, OTHER_TOTALS = 0.999, 1.3
STATUS = ["ok", "empty", "no_vocab_gene"]
WITHOUT_TOKENS = {"empty": ("I19", "no counts at all"), "no_vocab_gene": ("I20", "no gene of the vocabulary")}


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
        if isinstance(like, str | PathLike):
            from scbin.model import Model  # brings torch, which tokenizing itself does not need

            like = Model.load(like)
        vocabulary = getattr(like, "vocabulary", like)
        instances(Vocabulary, "a scbin model, the directory of one, or a vocabulary", optional=True, like=vocabulary)
        if vocabulary is not None and self.encoding not in ("bins", vocabulary.encoding):
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

    def blocks(self) -> Iterator[Block]:
        """Go through the rows; after the scan, all are sorted and without duplicates. On disk, the next block is read meanwhile."""
        blocks = iter_blocks(self.adata, self.layer)
        for block in ahead(blocks) if self.adata.isbacked else blocks:
            yield block.sorted() if block.start in self._unsorted else block

    def scan(self) -> Scan:
        """Look at every stored value."""
        scan = Scan(self.name, self.adata.obs_names, self.adata.var_names, self.used)
        for block in self.blocks():
            if not scan.add(block):
                self._unsorted.add(block.start)
                scan.add(block.sorted())
        return scan

    def read(self, scan: Scan, values: Values) -> Reading:
        """Decide what the values are; an error names the layer that would do."""
        note = self.adata.uns.get("log1p")
        base = note.get("base") if isinstance(note, dict) else None
        try:
            return read_values(scan, values, noted=note is not None, noted_base=None if base is None else float(base))
        except ScbinInputError as error:
            hint = self.suggest_counts()
            if hint is None and error.code == "I03":
                hint = self._suggest(layer_names(self.adata), lambda x: x >= 0, "has no negative values", "read it")
            raise ScbinInputError(error.code, error.message if hint is None else f"{error.message} {hint}") from None

    def suggest_counts(self) -> str | None:
        """Name a layer, or `.raw`, that holds whole, non-negative numbers, if there is one beside this matrix."""
        layers = [layer for layer in COUNT_LAYERS if layer in self.adata.layers]
        return self._suggest(layers, lambda x: (x >= 0) & (x == np.rint(x)), "holds counts", "use them")

    def _suggest(self, layers: list[str], fits: Callable[[Any], Any], what: str, to: str) -> str | None:
        """Name the first of some layers, else `.raw`, that can be read and whose values are finite and fit."""
        raw = [] if self.adata.isbacked or self.adata.raw is None else [None]
        for layer in [*(name for name in layers if name != self.layer), *raw]:
            adata = self.adata if layer is not None else AnnData(self.adata.raw.X)
            with suppress(ScbinInputError):
                if all((fits(block.data) & np.isfinite(block.data)).all() for block in iter_blocks(adata, layer)):
                    if layer is None:
                        return f".raw {what}: adata.raw.to_adata() gives them as an AnnData of its own."
                    return f'layers[{layer!r}] {what}: pass layer="{layer}" to {to}.'
        return None


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Make the next item in a thread while this one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="scbin-read") as reader:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item


# ---- the plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All that is needed to encode the rows of an AnnData, block by block."""

    source: Source
    reading: Reading
    match: GeneMatch
    vocabulary: Vocabulary
    phenotype_ids: np.ndarray  # (cells, phenotypes)
    request: Request
    record: dict[str, Any]

    def encode(self) -> Iterator[Encoded]:
        """Yield the tokens of consecutive row blocks."""
        encoder = Encoder(self.vocabulary, self.match.columns, self.reading)
        for block in self.source.blocks():
            yield encoder.encode(block, self.phenotype_ids[block.start : block.start + block.n_rows])

    def finish(self, encoded: Sequence[Encoded]) -> tuple[sparse.csr_matrix, pd.Categorical, dict[str, Any], list[str]]:
        """Join the blocks; return the tokens, the status of each cell, the record of the run and what to log of it."""
        names = ("totals", "matched", "cut", "status")
        totals, matched, cut, codes = (np.concatenate([[], *(getattr(part, n) for part in encoded)]) for n in names)
        codes = codes.astype(np.int64)
        none = sparse.csr_matrix((0, self.vocabulary.n_positions), dtype=self.vocabulary.dtype)
        tokens = sparse.vstack([none, *(part.tokens for part in encoded)], format="csr")
        record = {
            **self.record,
            "cells": len(codes),
            "tokens": int(tokens.nnz),
            "cut_cells": int((cut > 0).sum()),
            "cut_share": _share(cut.sum(), matched.sum()),
            "counts_in_vocabulary": _share(matched.sum(), totals.sum()),
            **self.check_coverage(matched.sum(), totals.sum(), sum(part.rounded for part in encoded)),
        }
        for status, (code, what) in WITHOUT_TOKENS.items():
            cells = np.flatnonzero(codes == STATUS.index(status))
            if len(cells):
                first = ", ".join(map(repr, self.source.adata.obs_names[cells[:3]])) + " ..." * (len(cells) > 3)
                found = f"{count(len(cells), 'cell has', 'cells have')} {what} ({first})"
                kept = "it keeps its row" if len(cells) == 1 else "they keep their rows"
                warn(
                    code, f"{found}; {kept} without tokens. sc.pp.filter_cells(adata, min_genes=1) removes empty ones."
                )
        return tokens, pd.Categorical.from_codes(codes, categories=STATUS), record, self._lines(record)

    def check_coverage(self, matched: float, totals: float, rounded: int) -> dict[str, float]:
        """Say how many cells had logs of no counts; weigh the genes found by the counts they held where the vocabulary was made."""
        if rounded:
            found = f"{count(rounded, 'cell has logs', 'cells have logs')} that are not those of whole counts"
            warn("I01", f"{found}: rounded to the nearest. layer= with the counts is safer.")
        if self.request.like is None:
            return {}
        shares, found_genes = self.vocabulary.gene_shares, np.unique(self.match.columns[self.match.columns >= 0])
        genes = len(found_genes) / max(1, len(self.vocabulary.genes))
        counts = _share(matched, totals) if totals > 0 else genes
        if shares is not None and sum(shares) > 0:
            counts = _share(np.asarray(shares)[found_genes].sum(), sum(shares))
        found = f"only {counts:.0%} of the counts and {genes:.0%} of the genes of the vocabulary are found here"
        cause = "another annotation or species, or genes filtered away, is the likely cause."
        if self.source.adata.n_obs and counts < WARN_OVERLAP:
            if counts < LEAST_OVERLAP and not self.request.tokenization.force:
                fix = "Pass scbin.Tokenization(force=True) to go on nevertheless."
                raise ScbinInputError("I32", f"{found}; {cause} {fix}")
            warn("I32", f"{found}; {cause}")
        bins = self.vocabulary.bins
        if shares is None or len(set(shares)) == 1:  # not known, as of published models
            return {"overlap_counts": counts, "overlap_genes": round(genes, 6)}
        if totals > 0 and bins is not None and bins.reads == "log1p" and bins.per != "cell":
            self._compare_totals(matched / totals, float(np.asarray(shares)[found_genes].sum()), sum(shares))
        return {"overlap_counts": counts, "overlap_genes": round(genes, 6)}

    def _compare_totals(self, here: float, there: float, all_there: float) -> None:
        """Warn where the totals by which logs are scaled seem to be over other genes than where the vocabulary was made.

        Either table may have lost the genes outside the vocabulary, and what the genes in it hold of the total differs then.
        """
        only_genes = (here > ALL_COUNTS) != (all_there > ALL_COUNTS) and abs(here - there) > 1 - WARN_OVERLAP
        if min(here, there) > 0 and (only_genes or max(here / there, there / here) > OTHER_TOTALS):
            found = f"the genes of the vocabulary hold {here:.2g} of the counts here, but {there:.2g} where it was made"
            cause = "If genes were left out of one of the two tables, cells were scaled by totals over other genes"
            fix = 'tokenize all measured genes, there as here, or use counts, rule="counts"'
            warn("I01", f"{found}. {cause}, and bins are shifted: {fix}.")

    def _lines(self, record: dict[str, Any]) -> list[str]:
        """What was read and made, for the log."""
        source, request, reading = self.source, self.request, self.reading
        hint = source.suggest_counts() if reading.kind == "log1p" else None
        lines = [f"{source.name} read as {reading.text}{'' if hint is None else '; ' + hint.rstrip('.')}."]
        lines += [f"{note}." for note in self.match.notes]
        if request.like is None and request.rule is None and request.encoding == "bins" and not reading.has_counts:
            lines.append('whole counts are not known, so values were binned on the log scale, rule="linear".')
        blank = [p.name for p in self.vocabulary.phenotypes if p.name not in record["phenotypes"]]
        if blank:
            named = ", ".join(map(repr, blank))
            lines.append(f"no column of obs was read for {named}: cells have no such label; name one with phenotypes=.")
        made = f"{count(record['cells'], 'cell')}, {count(record['tokens'], 'token')}, {count(record['genes'], 'gene')}"
        lines.append(f"{made} ({record['genes_zero']:,} without counts here).")
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
    given, source = request.vocabulary, Source(adata, request.layer)
    columns, labels, widths = _labels(adata, request, given)
    match = _match(source, given, request)
    scan = source.scan()
    reading = source.read(scan, request.values)
    vocabulary = given or _fit(source, reading, match, labels, widths, request)
    match = match if given else match.onto(vocabulary.genes)
    _warn_of_values(source, reading, match, vocabulary, is_given=given is not None)
    ids = _phenotype_ids(vocabulary, labels, adata.n_obs, is_given=given is not None)
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
    return Plan(source, reading, match, vocabulary, ids, request, record)


def _labels(adata: AnnData, request: Request, given: Vocabulary | None) -> tuple[dict[str, str], dict, dict[str, int]]:
    """Return by category: the obs column, the labels of the cells, and the width of the age classes where it is of ages.

    For a given vocabulary the columns are by default those of its own names that exist, and the widths are its own.
    """
    asked: Any = () if request.phenotypes is None else request.phenotypes
    if request.phenotypes is None and given is not None:
        own = {p.name: AGE_COLUMNS if p.name == "age" else (p.name,) for p in given.phenotypes}
        asked = {name: c for name, columns in own.items() for c in columns if c in adata.obs.columns}
    names = [asked] if isinstance(asked, str) else asked
    named = asked if isinstance(asked, Mapping) else {"age" if n == "development_stage" else n: n for n in names}
    labels, widths = {}, {}
    for name, column in named.items():
        is_age = column in AGE_COLUMNS or name == "age"
        width = given.phenotype(name).age_groups if given else request.tokenization.age_groups if is_age else None
        labels[name] = labels_of(read_obs(adata, column), column)
        if width is not None:
            widths[name] = width
            labels[name], unread = age_labels(labels[name], width)
            if unread:
                listed = ", ".join(f"{text!r} ({n})" for text, n in list(unread.items())[:3])
                warn("I39", f"{count(len(unread), 'label')} of {column!r} without an age became [NO_AGE]: {listed}.")
    return dict(named), labels, widths


def _match(source: Source, given: Vocabulary | None, request: Request) -> GeneMatch:
    """Match the columns to genes by name."""
    adata, key, fine = source.adata, request.gene_key, request.tokenization
    if key is not None and key not in adata.var.columns:
        there = ", ".join(map(repr, adata.var.columns)) or "none"
        raise ScbinInputError("A06", f"{key!r} is not a column of adata.var. Available: {there}.")
    others = {str(c): adata.var[c].astype(object) for c in adata.var.columns if adata.var[c].dtype.kind not in "biufc"}
    return match_genes(
        clean_names(list(adata.var_names if key is None else adata.var[key].astype(object)), key),
        given,
        used=source.used,
        case=fine.case,
        duplicates=fine.duplicates,
        beside=others if given else {},
        cells=[str(name) for name in adata.obs_names[:2000]],
    )


def _fit(
    source: Source, reading: Reading, match: GeneMatch, labels: Mapping[str, Any], widths: dict, request: Request
) -> Vocabulary:
    """Make a vocabulary from the cells: genes, bins or medians, phenotype values."""
    fine, flavor, encoding = request.tokenization, request.flavor, encoding_of(request.encoding)
    if source.adata.n_obs == 0:
        fix = "Pass the one that the cells shall be read with: like=model."
        raise ScbinInputError("I47", f"there is no cell to make a vocabulary from. {fix}")
    for asked, what in ((fine.depth, "depth=True"), (flavor == "pearson_residuals", f"flavor={flavor!r}")):
        if asked and not reading.counted:
            raise ScbinInputError("A03", f"{what} needs counts, but {source.name} holds {reading.text}.")
    marked = None if request.mask_var is None else _marked_genes(source.adata.var, request.mask_var, match)
    cells = Cells(match.genes, match.columns, reading, source.blocks, marked, request.n_genes, flavor)
    fitted = encoding.fit(cells, request.rule, fine)
    kept = fitted.pop("genes")
    return Vocabulary.build(
        request.encoding,
        [match.genes[k] for k in kept],
        phenotypes={name: values_of(column) for name, column in labels.items()},
        age_groups=widths,
        gene_shares=cells.moments.shares[kept].tolist(),
        max_length=fine.max_length,
        layout="scbin" if encoding.position_is_gene else fine.layout,
        depth=fine.depth if fine.depth is not None else reading.counted and fine.layout == "scbin",
        **fitted,
    )


def _marked_genes(var: pd.DataFrame, mask_var: str, match: GeneMatch) -> np.ndarray:
    """Return the genes that a boolean column of var marks."""
    if mask_var not in var.columns:
        there = ", ".join(repr(str(name)) for name in var.columns if pd.api.types.is_bool_dtype(var[name])) or "none"
        found = f"mask_var={mask_var!r} is not a column of adata.var"
        raise ScbinInputError("A06", f"{found}. Columns of True and False: {there}.")
    marked = var[mask_var]
    if marked.isna().any() or not set(marked.unique()) <= {True, False}:
        found = ", ".join(map(repr, marked.unique()[:3]))
        raise ScbinInputError("A02", f"var[{mask_var!r}] holds {found}, not True and False. Use its .astype(bool).")
    genes = match.columns[marked.to_numpy(dtype=bool)]
    if not (genes >= 0).any():
        raise ScbinInputError("A02", f"var[{mask_var!r}] marks no gene; pass mask_var=None to choose by variance.")
    return np.unique(genes[genes >= 0])


def _warn_of_values(
    source: Source, reading: Reading, match: GeneMatch, vocabulary: Vocabulary, *, is_given: bool
) -> None:
    """Refuse or warn of values that the vocabulary cannot read as they are."""
    if vocabulary.codec.reads(vocabulary) == "counts" and not reading.has_counts:
        found = f"these tokens read counts, but {source.name} holds {reading.text}"
        fix = 'Pass the layer that holds counts, layer=, or rule="linear".'
        raise ScbinInputError("I07" if reading.fractional else "I01", f"{found}. {fix}")
    for code, message in (*reading.warnings, *match.warnings):
        warn(code, message)
    left_out, bins = int((~source.used).sum()), vocabulary.bins
    if left_out:
        columns, was = count(left_out, "column is", "columns are"), "was" if left_out == 1 else "were"
        warn("I33", f"{columns} not 'Gene Expression' in var['feature_types'] and {was} left out.")
    if not source.adata.obs_names.is_unique:
        warn("I24", "obs_names are not unique; cells are told apart by their place in the table.")
    if reading.kind == "log1p":
        unknown = reading.target_sum is None and reading.by != "uns"
        logs = bins if bins is not None and bins.reads == "log1p" and unknown else None
        if logs is not None and not is_given and logs.per != "cell" and reading.exact:
            text = "the cells were normalised to no common sum before the logarithm, or genes are missing: other tables of the"
            warn("I01", f'{text} same cells will have other bins. Tokenize all measured genes, or use rule="counts".')
        if logs is not None and is_given:
            text = "the cells were normalised to no common sum before the logarithm, or genes are missing, those of the"
            fix = f"vocabulary to {logs.target_sum:,.6g}: bins may be shifted. Tokenize the counts instead."
            warn("I01", f"{text} {fix}")
        if is_given and vocabulary.depth is not None and not reading.exact:
            warn("I01", "the vocabulary has a [DEPTH] token, but counts are not known here: it is [NO_DEPTH].")


def _phenotype_ids(vocabulary: Vocabulary, labels: Mapping[str, Any], n_obs: int, *, is_given: bool) -> np.ndarray:
    """Return the control tokens (cells, phenotypes); say which labels are new to a vocabulary, or rare in one that is made."""
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
        counts = pd.Series(labels[phenotype.name]).value_counts()
        few = [f"{value[:60]!r} ({counts[value]})" for value in phenotype.values if 0 < counts.get(value, 0) < 3]
        if few and not is_given:
            found = f"{count(len(few), 'label')} of {phenotype.name!r} with fewer than 3 cells"
            warn("I40", f"there {'is' if len(few) == 1 else 'are'} {found}: {', '.join(few[:3])}.")
    return ids
