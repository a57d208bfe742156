"""Everything between the AnnData and the compiled loops: what is read, with which vocabulary, and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from scbin._anndata import warn
from scbin._arguments import choices, flags, instances, texts
from scbin._errors import ScbinInputError, ScbinTypeError, count
from scbin.encoding.encode import Encoded, Encoder, join_rows
from scbin.encoding.genes import GeneMatch, clean_names, match_genes
from scbin.encoding.values import Values
from scbin.encoding.vocabulary import Vocabulary
from scbin.pp._ahead import in_order
from scbin.pp._fit import Fit, fit_vocabulary
from scbin.pp._phenotypes import age_widths, cell_labels, phenotype_columns, phenotype_ids
from scbin.pp._source import Source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from scipy import sparse

    from scbin._anndata import Block
    from scbin.encoding.values import Reading, Scan

WARN_OVERLAP, LEAST_OVERLAP = 0.8, 0.2
CHOICES = {
    "values": get_args(Values),
    "age_groups": (10, 20, None),
    "case": ("exact", "upper"),
    "duplicates": ("sum", "error"),
}


@dataclass(frozen=True)
class Options:
    """How the AnnData is to be read."""

    values: Values = "auto"
    layer: str | None = None
    gene_key: str | None = None
    phenotypes: Sequence[str] | Mapping[str, str] | str | None = None
    age_groups: Literal[10, 20] | None = None
    case: Literal["exact", "upper"] = "exact"
    duplicates: Literal["sum", "error"] = "sum"
    force: bool = False

    def __post_init__(self) -> None:
        choices(CHOICES, values=self.values, age_groups=self.age_groups, case=self.case, duplicates=self.duplicates)
        texts(optional=True, layer=self.layer, gene_key=self.gene_key)
        flags(force=self.force)
        what = "a column of obs, a list of columns, or {category: column}"
        asked = self.phenotypes
        instances((str, Mapping, Sequence, np.ndarray, pd.Index), what, optional=True, phenotypes=asked)
        if asked is not None and not isinstance(asked, str):
            for column in asked.values() if isinstance(asked, Mapping) else asked:
                texts(phenotypes=column)


@dataclass(frozen=True)
class Result:
    """Everything that is written, made before anything is."""

    tokens: sparse.csr_matrix
    status: pd.Categorical
    record: dict[str, Any]
    lines: list[str]


@dataclass(frozen=True)
class Plan:
    """All that is needed to encode the rows of an AnnData, block by block."""

    source: Source
    reading: Reading
    match: GeneMatch
    vocabulary: Vocabulary
    phenotype_ids: np.ndarray  # (cells, phenotypes)
    record: dict[str, Any]
    force: bool
    given: bool  # whether the vocabulary came from elsewhere

    def encode(self) -> Iterator[Encoded]:
        """Yield the tokens of consecutive row blocks."""
        encoder = Encoder(self.vocabulary, self.match.columns, self.reading, threads=self.source.threads)

        def work(block: Block) -> Encoded:
            ids = self.phenotype_ids[block.start : block.start + block.n_rows]
            return encoder.encode(block.data, block.indices, block.indptr, ids)

        return in_order(work, self.source.blocks(), self.source.workers)

    def finish(self, encoded: Sequence[Encoded]) -> Result:
        """Join the blocks, say which cells have no tokens and how much of the counts the vocabulary covers."""
        totals = np.concatenate([np.zeros(0), *(part.totals for part in encoded)])
        matched = np.concatenate([np.zeros(0), *(part.matched for part in encoded)])
        cut = np.concatenate([np.zeros(0), *(part.cut for part in encoded)])
        tokens = join_rows([part.tokens for part in encoded], self.vocabulary)
        codes = np.where(totals <= 0, 1, np.where(np.diff(tokens.indptr) == 0, 2, 0))
        status = pd.Categorical.from_codes(codes, categories=["ok", "empty", "no_vocab_gene"])
        record = {
            **self.record,
            "cells": len(codes),
            "tokens": int(tokens.nnz),
            "empty": int((codes == 1).sum()),
            "no_vocab_gene": int((codes == 2).sum()),
            "cut_cells": int((cut > 0).sum()),
            "cut_share": _share(cut.sum(), matched.sum()),
            "counts_in_vocabulary": _share(matched.sum(), totals.sum()),
            "any_counts": bool(totals.any()),
        }
        if self.given:
            self.check_overlap(record)
        self._warn_empty(codes)
        return Result(tokens, status, record, self._lines(record))

    def check_overlap(self, record: dict[str, Any]) -> None:
        """Weigh the genes that were found by the counts they held where the vocabulary was made."""
        shares = self.vocabulary.gene_shares
        found = np.unique(self.match.columns[self.match.columns >= 0])
        by_counts = record["counts_in_vocabulary"] if record["any_counts"] else self.match.share_of_genes
        if shares is not None and sum(shares) > 0:
            by_counts = _share(np.asarray(shares)[found].sum(), sum(shares))
        record["overlap_counts"], record["overlap_genes"] = by_counts, round(self.match.share_of_genes, 6)
        message = (
            f"only {by_counts:.0%} of the counts and {self.match.share_of_genes:.0%} of the genes of the vocabulary are "
            "found here; another annotation or species, or genes filtered away, is the likely cause."
        )
        if record["cells"] and by_counts < LEAST_OVERLAP and not self.force:
            raise ScbinInputError("I32", f"{message} Pass force=True to go on nevertheless.")
        if record["cells"] and by_counts < WARN_OVERLAP:
            warn("I32", message)

    def _warn_empty(self, codes: np.ndarray) -> None:
        for code, number, what in (("I19", 1, "no counts at all"), ("I20", 2, "no gene of the vocabulary")):
            cells = np.flatnonzero(codes == number)
            if len(cells):
                names = ", ".join(repr(str(name)) for name in self.source.adata.obs_names[cells[:3]])
                found = count(len(cells), "cell has", "cells have")
                kept = "it keeps its row" if len(cells) == 1 else "they keep their rows"
                warn(
                    code,
                    f"{found} {what} ({names}{' ...' if len(cells) > 3 else ''}); {kept} without tokens. "
                    "sc.pp.filter_cells(adata, min_genes=1) removes empty ones.",
                )

    def _lines(self, record: dict[str, Any]) -> list[str]:
        """What was read and made, for the log."""
        source, adata = self.source, self.source.adata
        hint = source.suggest_counts() if self.reading.kind == "log1p" else None
        lines = [f"scbin: {source.name} read as {self.reading.text}{'' if hint is None else '; ' + hint.rstrip('.')}."]
        lines += [f"scbin: {note}." for note in self.match.notes]
        lines.append(
            f"scbin: {count(record['cells'], 'cell')}, {count(record['tokens'], 'token')}, "
            f"{count(len(self.vocabulary.genes), 'gene')} ({record['genes_zero']:,} without counts here)."
        )
        if record["cut_cells"]:
            lines.append(
                f"scbin: {count(record['cut_cells'], 'cell')} had more genes than fit; {record['cut_share']:.2%} of the counts "
                "were cut."
            )
        if source.by_column:
            lines.append(
                "scbin: the matrix on disk is stored by columns (CSC), which is slow to read by cells; CSR is faster."
            )
        if adata.isbacked:
            lines.append("scbin: the file is open for reading; the tokens are in memory until adata.write(...).")
        return lines


def _share(part: float, whole: float) -> float:
    return round(float(part / whole), 6) if whole > 0 else 0.0


def prepare(adata: AnnData, like: Any, fit: Fit, options: Options) -> Plan:
    """Check everything, decide what the values are, match or choose the genes. Nothing is written."""
    given = vocabulary_of(like, fit)
    columns = phenotype_columns(adata, options.phenotypes, given)
    source = Source(adata, options.layer)
    match = _match(adata, source, given, options)
    widths = age_widths(columns, options.age_groups, given)
    labels = {name: cell_labels(adata, column, widths.get(name)) for name, column in columns.items()}
    scan = source.scan()
    reading = source.read(scan, options.values)
    _check_bins(reading, given, fit)
    vocabulary = given or fit_vocabulary(source, reading, match, labels, widths, fit)
    match = match if given else _onto(match, vocabulary)
    for code, message in (*reading.warnings, *match.warnings, *_source_warnings(source, reading, given)):
        warn(code, message)
    ids = phenotype_ids(vocabulary, labels, adata.n_obs, known=given is not None)
    record = {
        "values": reading.kind,
        "text": reading.text,
        "base": reading.base,
        "target_sum": reading.target_sum,
        "layer": options.layer,
        "encoding": vocabulary.encoding,
        "genes": len(vocabulary.genes),
        "genes_zero": int(source.n_zero_genes),
        "phenotypes": columns,
    }
    return Plan(source, reading, match, vocabulary, ids, record, options.force, given is not None)


def stream(adata: AnnData, like: Any, options: Options) -> Iterator[Encoded]:
    """Encode with a given vocabulary in one pass: what the values are is read off the first block and checked at the end."""
    given = _vocabulary(like)
    columns = phenotype_columns(adata, options.phenotypes, given)
    source = Source(adata, options.layer)
    match = _match(adata, source, given, options)
    widths = age_widths(columns, options.age_groups, given)
    labels = {name: cell_labels(adata, column, widths.get(name)) for name, column in columns.items()}
    ids = phenotype_ids(given, labels, adata.n_obs, known=True)
    blocks = source.unsorted_blocks()
    block = next(blocks, None)
    if block is None:
        return
    first = source.read(source.look(block)[0], options.values)
    _check_bins(first, given, Fit())
    encoder = Encoder(given, match.columns, first, threads=source.threads)

    def work(block: Block) -> tuple[Scan, Encoded]:
        part, block = source.look(block)
        rows = slice(block.start, block.start + block.n_rows)
        return part, encoder.encode(block.data, block.indices, block.indptr, ids[rows], positive=part.positive)

    scan = source.new_scan()
    totals = matched = 0.0
    for part, encoded in in_order(work, chain([block], blocks), source.workers):
        scan.merge(part)
        totals, matched = totals + encoded.totals.sum(), matched + encoded.matched.sum()
        yield encoded
    reading = source.read(scan, options.values)
    if (reading.kind, reading.base) != (first.kind, first.base):
        raise ScbinInputError(
            "I01",
            f"the first cells hold {first.text}, but all of {source.name} together {reading.text}. Pass values=, or separate "
            "the cells.",
        )
    for code, message in (*reading.warnings, *match.warnings, *_source_warnings(source, reading, given)):
        warn(code, message)
    plan = Plan(source, reading, match, given, ids, {}, options.force, given=True)
    record = {"cells": adata.n_obs, "counts_in_vocabulary": _share(matched, totals), "any_counts": totals > 0}
    plan.check_overlap(record)


def vocabulary_of(like: Any, fit: Fit | None = None) -> Vocabulary | None:
    """Return the vocabulary of a model, or the one given; refuse what asks for another encoding than it has."""
    if like is None:
        return None
    vocabulary = _vocabulary(like)
    if fit is not None and fit.encoding not in ("bins", vocabulary.encoding):
        raise ScbinInputError(
            "E02",
            f"encoding={fit.encoding!r} was asked for, but like= has encoding {vocabulary.encoding!r}; leave it out.",
        )
    return vocabulary


def _vocabulary(like: Any) -> Vocabulary:
    if isinstance(like, str | PathLike):
        from scbin.model import Model  # brings torch, which tokenizing itself does not need

        like = Model.load(like)
    vocabulary = getattr(like, "vocabulary", like)
    if not isinstance(vocabulary, Vocabulary):
        kind = "None" if like is None else f"a {type(like).__name__}"
        raise ScbinTypeError("E01", f"like is {kind}; pass a scbin model, the directory of one, or a vocabulary.")
    return vocabulary


def _match(adata: AnnData, source: Source, given: Vocabulary | None, options: Options) -> GeneMatch:
    texts = [column for column in adata.var.columns if adata.var[column].dtype.kind not in "biufc"]
    return match_genes(
        _gene_names(adata, options.gene_key),
        None if given is None else given.genes,
        used=source.used,
        name_map=None if given is None else given.aliases,
        case=options.case,
        duplicates=options.duplicates,
        beside={**{str(c): adata.var[c].astype(object).tolist() for c in texts}} if given is not None else None,
        cells=[str(name) for name in adata.obs_names[:2000]],
    )


def _check_bins(reading: Reading, given: Vocabulary | None, fit: Fit) -> None:
    """Bins of counts need whole counts."""
    bins = given.bins if given is not None else fit.bins
    default = given is None and fit.encoding == "gene_bins" and bins is None
    on_counts = default or getattr(bins, "reads", None) == "counts" or (isinstance(bins, str) and bins == "log2")
    on_counts = on_counts and (given is not None or fit.encoding in ("bins", "gene_bins"))
    if on_counts and (reading.kind == "log1p" or reading.fractional):
        raise ScbinInputError(
            "I07" if reading.fractional else "I01",
            f"this binning reads counts, but the matrix holds {reading.text}. Pass the layer that holds counts, layer=, or "
            'bins="linear".',
        )


def _source_warnings(source: Source, reading: Reading, given: Vocabulary | None) -> list[tuple[str, str]]:
    found = []
    if source.left_out:
        found.append(
            (
                "I33",
                f"{count(source.left_out, 'column is', 'columns are')} not 'Gene Expression' in var['feature_types'] and "
                f"{'was' if source.left_out == 1 else 'were'} left out.",
            )
        )
    if not source.adata.obs_names.is_unique:
        found.append(("I24", "obs_names are not unique; cells are told apart by their place in the table."))
    if given is not None and given.bins is not None and given.bins.reads == "log1p" and reading.kind == "log1p":
        here, there = reading.target_sum, given.bins.target_sum
        if here is None and reading.by != "uns" or here is not None and abs(here - there) > 1e-2 * there:
            text = "to no common sum" if here is None else f"to {here:,.6g}"
            found.append(
                (
                    "I01",
                    f"the cells were normalised {text} before the logarithm, those of the vocabulary to {there:,.6g}: bins "
                    "may be shifted. Tokenize the counts instead.",
                )
            )
    return found


def _gene_names(adata: AnnData, gene_key: str | None) -> list[str | None]:
    if gene_key is None:
        return clean_names(list(adata.var_names), where="adata.var_names", is_column=False)
    if gene_key not in adata.var.columns:
        there = ", ".join(repr(str(name)) for name in adata.var.columns) or "none"
        raise ScbinInputError("I35", f"{gene_key!r} is not a column of adata.var. Available: {there}.")
    column = adata.var[gene_key].astype(object).tolist()
    return clean_names(column, where=f"adata.var[{gene_key!r}]", is_column=True)


def _onto(match: GeneMatch, vocabulary: Vocabulary) -> GeneMatch:
    """Renumber the columns by the genes that were chosen."""
    index = {gene: k for k, gene in enumerate(vocabulary.genes)}
    place = np.array([index.get(gene, -1) for gene in match.genes] + [-1], dtype=np.int32)
    columns = np.where(match.columns >= 0, place[match.columns], match.columns).astype(np.int32)
    return GeneMatch(columns, vocabulary.genes, match.warnings, match.notes, match.unnamed)
