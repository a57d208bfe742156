"""Everything between the AnnData and the encodings: what is read, with which vocabulary, and what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin._adata import gene_columns, iter_blocks, layer_names, read_obs, warn
from scbin._arguments import check_fields, instances
from scbin._errors import ScbinInputError, count
from scbin.tokens.encoding import Encoder
from scbin.tokens.fit import Cells
from scbin.tokens.genes import GeneMatch, clean_names, match_genes, some
from scbin.tokens.phenotypes import AGE_COLUMNS, age_labels, labels_of, token_ids, values_of
from scbin.tokens.rules import Bins, Tokenization
from scbin.tokens.values import Block, Reading, Scan, Values, read_values
from scbin.tokens.vocabulary import Vocabulary, encoding_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from scipy import sparse

    from scbin.tokens.rules import Layout

WARN_OVERLAP, LEAST_OVERLAP = 0.8, 0.2
# share of the counts that is all; ratio of two shares from which bins move by more than half a bin
ALL_COUNTS, OTHER_TOTALS = 0.999, 1.3
STATUS = ["ok", "empty", "no_vocab_gene"]
WITHOUT_TOKENS = {"empty": ("I19", "no counts at all"), "no_vocab_gene": ("I20", "no gene of the vocabulary")}


@dataclass(frozen=True)
class Request:
    """What the user asked for; the names are the arguments of `tokenize`."""

    encoding: str = "bins"
    rule: Any = None
    phenotypes: Any = None
    like: Any = None
    layer: str | None = None
    values: Values = "auto"
    gene_key: str | None = None
    n_genes: int = 2000
    mask_var: str | None = None
    tokenization: Any = None

    def __post_init__(self) -> None:
        check_fields(self)
        encoding_of(self.encoding)
        instances((str, Bins, Sequence, np.ndarray), "a rule, a list of edges or a Bins", optional=True, rule=self.rule)
        instances(Tokenization, "a scbin.Tokenization", optional=True, tokenization=self.tokenization)
        object.__setattr__(self, "tokenization", self.tokenization or Tokenization())
        what = "a column of obs, a list of columns, or {category: column}"
        instances((str, Mapping, Sequence, np.ndarray, pd.Index), what, optional=True, phenotypes=self.phenotypes)
        for column in self._named:
            instances(str, "a text", phenotypes=column)
        if len(self.columns or {}) < len(self._named):
            fix = "Name the category of each: phenotypes={'age': 'age', 'stage': 'development_stage'}"
            raise ScbinInputError("A03", f"two of the columns {self._named} are the same category. {fix}.")
        if self.n_genes < 1:
            raise ScbinInputError("A02", f"n_genes is {self.n_genes}; at least one gene is needed.")

    @property
    def _named(self) -> list[Any]:
        """The columns of obs that were named."""
        asked = () if self.phenotypes is None else self.phenotypes
        return list(asked.values() if isinstance(asked, Mapping) else np.atleast_1d(np.asarray(asked, dtype=object)))

    @property
    def columns(self) -> dict[str, str] | None:
        """The column of obs of each category that was asked for, None if that was left open."""
        asked = self.phenotypes
        if asked is None or isinstance(asked, Mapping):
            return asked if asked is None else dict(asked)
        return {"age" if name == "development_stage" else name: name for name in self._named}

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

    def stored(self) -> Iterator[Block]:
        """Go through the rows as they are stored."""
        return iter_blocks(self.adata, self.layer)

    def blocks(self) -> Iterator[Block]:
        """Go through the rows; after the scan, all are sorted and without duplicates. On disk, the next block is read meanwhile."""
        blocks = self.stored()
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
        """Decide what the values are; an error names what else there is."""
        try:
            return read_values(scan, values, self.adata.uns.get("log1p"))
        except ScbinInputError as error:
            there = [f"layer={name!r}" for name in layer_names(self.adata) if name != self.layer]
            there += [] if self.adata.isbacked or self.adata.raw is None else ["adata.raw.to_adata()"]
            hint = f" Also here: {', '.join(there)}." if there else ""
            raise ScbinInputError(error.code, f"{error.message}{hint}") from None


def ahead(items: Iterator[Block]) -> Iterator[Block]:
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
    columns: dict[str, str]  # of obs, by phenotype
    seen: list[pd.DataFrame] = field(default_factory=list)  # of the blocks that were encoded, see `Encoded`

    def encode(self) -> Iterator[sparse.csr_matrix]:
        """Yield the tokens of consecutive row blocks."""
        encoder = Encoder(self.vocabulary, self.match.columns, self.reading)
        for block in self.source.blocks():
            tokens, seen = encoder.encode(block, self.phenotype_ids[block.start : block.start + block.n_rows])
            self.seen.append(seen)
            yield tokens
        if not self.seen:
            yield self.vocabulary.matrix(
                np.zeros(0, self.vocabulary.dtype), np.zeros(0, np.int32), np.zeros(1, np.int64)
            )

    def finish(self) -> tuple[pd.Categorical, dict[str, Any]]:
        """Return the status of each cell and the record of the run when all rows are encoded; warn of what is missing."""
        none = pd.DataFrame(
            {name: np.zeros(0, dtype=np.int64) for name in ("total", "matched", "cut", "rounded", "status")}
        )
        seen = pd.concat(self.seen or [none])
        if n := int(seen["rounded"].sum()):
            found = f"{count(n, 'cell has logs', 'cells have logs')} that are not those of whole counts"
            warn("I01", f"{found}: rounded to the nearest. layer= with the counts is safer.")
        record: dict[str, Any] = {
            "values": self.reading.text,
            "layer": self.request.layer,
            "gene_key": self.request.gene_key,
            "phenotypes": self.columns,
            "cut_cells": int(seen["cut"].sum()),
            "counts_in_vocabulary": _share(seen["matched"].sum(), seen["total"].sum()),
        }
        if self.request.like is not None:
            record |= self._overlap(record["counts_in_vocabulary"] if seen["total"].sum() > 0 else None)
        return pd.Categorical.from_codes(seen["status"].to_numpy(), categories=STATUS), record

    def _overlap(self, here: float | None) -> dict[str, float]:
        """Weigh the genes found by the counts they held where the vocabulary was made; warn if much is missing.

        `here` is the share of the counts of these cells that lies in the vocabulary, None where there are none.
        """
        columns, bins, shares = (
            self.match.columns,
            self.vocabulary.bins,
            np.asarray(self.vocabulary.gene_shares or [0.0]),
        )
        found_genes = np.unique(columns[columns >= 0])
        genes = len(found_genes) / max(1, len(self.vocabulary.genes))
        counts, known = genes if here is None else here, shares.sum() > 0
        there = float(shares[found_genes].sum()) if known else 0.0
        counts = _share(there, shares.sum()) if known else counts
        if self.source.adata.n_obs and counts < WARN_OVERLAP:
            found = f"only {counts:.0%} of the counts and {genes:.0%} of the genes of the vocabulary are found here"
            found += "; another annotation or species, or genes filtered away, is the likely cause."
            if counts < LEAST_OVERLAP and not self.request.tokenization.force:
                fix = "Pass scbin.Tokenization(force=True) to continue anyway."
                raise ScbinInputError("I32", f"{found} {fix}")
            warn("I32", found)
        measured = known and len(set(shares)) > 1  # those of published models are not
        comparable = self.reading.counted  # shares of logs are others
        if measured and comparable and here is not None and bins and bins.reads == "log1p" and bins.per != "cell":
            _compare_totals(here, there, shares.sum())
        return {"overlap_counts": counts, "overlap_genes": round(genes, 6)}

    def lines(self, n_tokens: int, record: dict[str, Any]) -> list[str]:
        """What was read and made, for the log."""
        request, genes = self.request, self.vocabulary.genes
        lines = [f"{self.source.name} read as {self.reading.text}."]
        if request.like is None and request.rule is None and request.encoding == "bins" and not self.reading.has_counts:
            lines.append('whole counts are not known, so values were binned on the log scale, rule="linear".')
        if blank := [p.name for p in self.vocabulary.phenotypes if p.name not in self.columns]:
            lines.append(
                f"no column of obs was read for {some(blank)}: cells have no such label; name one with phenotypes=."
            )
        made = ((self.source.adata.n_obs, "cell"), (n_tokens, "token"), (len(genes), "gene"))
        lines.append(f"{', '.join(count(*each) for each in made)}.")
        if record["cut_cells"]:
            lines.append(
                f"{count(record['cut_cells'], 'cell')} had more genes than fit: those with the least values were left out."
            )
        return lines


def _share(part: float, whole: float) -> float:
    return round(float(part / whole), 6) if whole > 0 else 0.0


def _compare_totals(here: float, there: float, all_there: float) -> None:
    """Warn where the totals by which logs are scaled seem to be over other genes than where the vocabulary was made.

    Either table may have lost the genes outside the vocabulary, and what the genes in it hold of the total differs then.
    """
    only_genes = (here > ALL_COUNTS) != (all_there > ALL_COUNTS) and abs(here - there) > 1 - WARN_OVERLAP
    if min(here, there) > 0 and (only_genes or max(here / there, there / here) > OTHER_TOTALS):
        found = f"the genes of the vocabulary hold {here:.2g} of the counts here, but {there:.2g} where it was made"
        cause = "If genes were left out of one of the two tables, cells were scaled by totals over other genes"
        fix = 'tokenize all measured genes, there as here, or use counts, rule="counts"'
        warn("I01", f"{found}. {cause}, and bins are shifted: {fix}.")


def warn_without_tokens(status: pd.Categorical) -> None:
    """Say how many cells have no tokens, and why."""
    for kind, (code, what) in WITHOUT_TOKENS.items():
        if n := int((status == kind).sum()):
            found = f"{count(n, 'cell has', 'cells have')} {what}"
            warn(
                code,
                f"{found}; without tokens, they keep their rows. sc.pp.filter_cells(adata, min_genes=1) removes them.",
            )


def prepare(adata: AnnData, request: Request, source: Source | None = None) -> Plan:
    """Check everything, decide what the values are, match or choose the genes. Nothing is written."""
    given, source = request.vocabulary, source or Source(adata, request.layer)
    columns, labels, widths = _labels(adata, request, given)
    match = match_genes(named_columns(source.adata.var, request.gene_key), given, used=source.used)
    reading = source.read(source.scan(), request.values)
    vocabulary = given
    if vocabulary is None:
        vocabulary, match = _fit(source, reading, match, labels, widths, request)
    _warn_of_values(source, reading, match, vocabulary, is_given=given is not None)
    ids = _phenotype_ids(vocabulary, labels, adata.n_obs)
    return Plan(source, reading, match, vocabulary, ids, request, columns)


def _labels(adata: AnnData, request: Request, given: Vocabulary | None) -> tuple[dict[str, str], dict, dict[str, int]]:
    """Return by category: the obs column, the labels of the cells, and the width of the age classes where it is of ages.

    For a given vocabulary the columns are by default those of its own names that exist, and the widths are its own.
    """
    named = request.columns or {}
    if request.columns is None and given is not None:
        own = {p.name: AGE_COLUMNS if p.name == "age" else (p.name,) for p in given.phenotypes}
        named = {name: c for name, columns in own.items() for c in columns if c in adata.obs.columns}
    labels, widths = {}, {}
    for name, column in named.items():
        is_age = column in AGE_COLUMNS or name == "age"
        width = given.phenotype(name).age_groups if given else request.tokenization.age_groups if is_age else None
        labels[name] = labels_of(read_obs(adata, column), column, numbers=width is not None)
        if width is not None:
            widths[name] = width
            labels[name], unread = age_labels(labels[name], width)
            _warn_of_labels("I39", f"of {column!r} in no class of ages became [NO_AGE]", unread)
    return named, labels, widths


def named_columns(var: pd.DataFrame, key: str | None) -> np.ndarray:
    """Return the name of the gene in each column (n_vars,), from var_names or a column of var; None for an empty one of these."""
    if key is not None and key not in var.columns:
        there = ", ".join(map(repr, var.columns)) or "none"
        raise ScbinInputError("A06", f"{key!r} is not a column of adata.var. Available: {there}.")
    return clean_names(var.index if key is None else var[key].astype(object), key)


def _fit(
    source: Source, reading: Reading, match: GeneMatch, labels: Mapping[str, Any], widths: dict, request: Request
) -> tuple[Vocabulary, GeneMatch]:
    """Make a vocabulary from the cells: genes, bins or medians, phenotype values."""
    fine, encoding = request.tokenization, encoding_of(request.encoding)
    if source.adata.n_obs == 0:
        fix = "Pass the vocabulary to use: like=model."
        raise ScbinInputError("I47", f"there is no cell to make a vocabulary from. {fix}")
    if fine.depth and not reading.counted:
        raise ScbinInputError("A03", f"depth=True needs counts, but {source.name} holds {reading.text}.")
    marked = None if request.mask_var is None else _marked_genes(source.adata.var, request.mask_var, match)
    cells = Cells(match.genes, match.columns, reading, source.blocks, marked, request.n_genes)
    fitted = encoding.fit(cells, request.rule, fine)
    kept = fitted.pop("genes")
    match = match.onto(kept)
    layout: Layout = "scbin" if encoding.position_is_gene else fine.layout
    vocabulary = Vocabulary.build(
        request.encoding,
        match.genes,
        phenotypes={name: values_of(column) for name, column in labels.items()},
        age_groups=widths,
        gene_shares=cells.shares(kept),
        max_length=fine.max_length,
        layout=layout,
        depth=fine.depth if fine.depth is not None else reading.counted and layout == "scbin",
        **fitted,
    )
    return vocabulary, match


def _marked_genes(var: pd.DataFrame, mask_var: str, match: GeneMatch) -> np.ndarray:
    """Return the genes that a boolean column of var marks."""
    marks = {name: marks_of(var, name) for name in var.columns if pd.api.types.is_bool_dtype(var[name])}
    marking = [name for name, marked in marks.items() if (match.columns[marked] >= 0).any()]
    if mask_var not in marking:
        there = ", ".join(map(repr, marking)) or "none"
        raise ScbinInputError("A06", f"{mask_var!r} is not a boolean column of var. Available: {there}.")
    genes = match.columns[marks[mask_var]]
    return np.unique(genes[genes >= 0])


def marks_of(var: pd.DataFrame, name: str) -> np.ndarray:
    """Return which genes a boolean column of var marks (n_vars,); what is missing does not."""
    return var[name].fillna(False).to_numpy(dtype=bool)


def _warn_of_values(
    source: Source, reading: Reading, match: GeneMatch, vocabulary: Vocabulary, *, is_given: bool
) -> None:
    """Refuse or warn of values that the vocabulary cannot read as they are."""
    bins = vocabulary.bins
    if vocabulary.codec.reads(vocabulary) == "counts" and not reading.has_counts:
        found = f"these tokens read counts, but {source.name} holds {reading.text}"
        fix = 'Pass the layer that holds counts, layer=, or rule="linear".'
        raise ScbinInputError("I07" if reading.fractional else "I01", f"{found}. {fix}")
    for code, message in reading.warnings:
        warn(code, message)
    if match.repeated:
        found = count(len(match.repeated), "gene stands", "genes stand")
        warn("I22", f"{found} in several columns ({some(match.repeated)}); their columns were added up.")
    if left_out := int((~source.used).sum()):
        warn("I33", f"{left_out:,} of the columns are not 'Gene Expression' in var['feature_types'] and were left out.")
    if reading.kind == "log1p":
        unknown = reading.target_sum is None and not reading.by.startswith("uns")
        logs = bins is not None and bins.reads == "log1p" and bins.per != "cell"
        if unknown and logs and (is_given or reading.exact):
            text = "the cells were normalised to no common sum before the logarithm, or genes are missing"
            fix = 'tokenize all measured genes, or counts, rule="counts"'
            warn("I01", f"{text}: these bins are not those that other tables of the same cells have; {fix}.")
        if is_given and vocabulary.depth is not None and not reading.exact:
            warn("I01", "the vocabulary has a [DEPTH] token, but counts are not known here: it is [NO_DEPTH].")


def _phenotype_ids(vocabulary: Vocabulary, labels: Mapping[str, Any], n_obs: int) -> np.ndarray:
    """Return the control tokens (cells, phenotypes); say which labels are new to the vocabulary."""
    ids = np.zeros((n_obs, len(vocabulary.phenotypes)), dtype=np.int64)
    for k, phenotype in enumerate(vocabulary.phenotypes):
        ids[:, k] = phenotype.missing_id
        if phenotype.name in labels:
            ids[:, k], unseen = token_ids(labels[phenotype.name], phenotype)
            what = f"of {phenotype.name!r}, new to the vocabulary, became [NO_{phenotype.name.upper()}]"
            _warn_of_labels("I36", what, unseen)
    return ids


def _warn_of_labels(code: str, what: str, labels: Mapping[str, int]) -> None:
    """Warn of some labels, if there are any, with the number of their cells."""
    if labels:
        listed = ", ".join(f"{text[:60]!r} ({n})" for text, n in list(labels.items())[:3])
        warn(code, f"{count(len(labels), 'label')} {what}: {listed}.")
