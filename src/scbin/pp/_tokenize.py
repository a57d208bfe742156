"""Turn cells into tokens."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from scbin import _keys
from scbin._anndata import check_adata, check_writable, make_real, read_obs, warn, write_obs, write_obsm, write_uns
from scbin._errors import ScbinInputError
from scbin.encoding.encode import Encoded, Encoder
from scbin.encoding.genes import GeneMatch, clean_names, match_genes
from scbin.encoding.phenotypes import AGE_COLUMNS, age_labels, labels_of, token_ids
from scbin.encoding.vocabulary import Encoding, Layout, Vocabulary
from scbin.pp._fit import BinRule, Fit, fit_vocabulary
from scbin.pp._source import Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData

    from scbin.encoding.bins import Bins
    from scbin.encoding.values import Reading, Values

logger = logging.getLogger(__name__)

WARN_OVERLAP, LEAST_OVERLAP = 0.8, 0.2
RECORD = "tokenize"


def tokenize(
    adata: AnnData,
    *,
    encoding: Encoding = "bins",
    values: Values = "auto",
    layer: str | None = None,
    gene_key: str | None = None,
    phenotypes: Sequence[str] | Mapping[str, str] | str | None = None,
    like: Any = None,
    n_genes: int = 2000,
    mask_var: str | None = "highly_variable",
    bins: Bins | Sequence[float] | BinRule | None = None,
    n_bins: int = 20,
    threshold: float = 0.1,
    zeros: Literal["drop", "keep"] = "drop",
    layout: Layout = "scbin",
    max_length: int | None = None,
    medians: Mapping[str, float] | None = None,
    age_groups: Literal[10, 20] | None = None,
    case: Literal["exact", "upper"] = "exact",
    duplicates: Literal["sum", "error"] = "sum",
    force: bool = False,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Turn each cell into a row of tokens, ready for a model.

    Call it on raw counts or on log1p values; which of the two the matrix holds is found out from its values and said in one
    line. The matrix itself is only read, by blocks of rows, so backed and dask data stream.

    Parameters
    ----------
    adata
        Cells by genes.
    encoding
        What a token says: `"bins"` how much of a gene, `"binary"` whether a gene is expressed, `"rank"` which gene comes
        at this rank of the cell, `"gene_bins"` gene and amount jointly.
    values
        What the matrix holds; `"auto"` decides from the values.
    layer
        The layer to read instead of `X`.
    gene_key
        Column of `var` with the gene names; `var_names` by default.
    phenotypes
        Columns of `obs` that become control tokens: a list, or `{category: column}`.
    like
        A model, a vocabulary or a model directory: use its vocabulary, matching genes by name. The arguments that would shape a
        new vocabulary are ignored then.
    n_genes
        Number of highly variable genes to use where `var[mask_var]` does not say which; not for `"rank"`.
    mask_var
        Boolean column of `var` that marks the genes to use; `None` ignores it.
    bins
        How values become bins: a rule (`"linear"`, `"quantile"`, `"quantile_per_gene"`, `"quantile_per_cell"`, `"log2"` on
        counts, `"polygene"`, `"perturbgene"`), a list of edges, or a `Bins`. By default linear, for `"gene_bins"` log2.
    n_bins
        Number of bins above zero, for the rules that leave it open.
    threshold
        Smallest log1p value that counts as expressed, for `"binary"`.
    zeros
        `"drop"`: a gene that is not expressed has no token. `"keep"`: it has the token of bin 0.
    layout
        Special tokens of `"rank"`: scbin's, or those of Geneformer V1, V2 or BioNeMo.
    max_length
        Longest row in tokens; the genes with the largest values are kept.
    medians
        Median of each gene for `"rank"`; fitted from the data by default.
    age_groups
        Cut ages (`age` or `development_stage`) into classes of so many years; by default their text is the label.
    case
        `"upper"` compares gene names in upper case.
    duplicates
        What to do where several columns are one gene.
    force
        Go on where less than 20 % of the counts are in the vocabulary of `like`.
    key_added
        Name in `obsm` instead of `"X_tokens"`.
    copy
        Return a changed copy instead of changing `adata`.

    Returns
    -------
    `None` if `copy=False`, else an `AnnData`. Sets the following fields:

    `adata.obsm["X_tokens"]`
        Token ids, CSR (cells, positions).
    `adata.obs["scbin_status"]`
        "ok", or why a cell has no tokens: "empty" or "no_vocab_gene".
    `adata.uns["scbin"]["vocabulary"]`
        What the ids and positions mean, as JSON.
    `adata.uns["scbin"]["tokenize"]`
        What the matrix was taken for, and how the genes matched, as JSON.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.pp.tokenize(adata, phenotypes={"cell_type": "bulk_labels"})
    >>> adata.obsm["X_tokens"].shape
    (700, 769)
    """
    check_adata(adata)
    fit = Fit(encoding, bins, n_bins, threshold, zeros, n_genes, mask_var, layout, max_length, medians)
    options = Options(values, layer, gene_key, phenotypes, age_groups, case, duplicates, force)
    key = key_added or _keys.TOKENS
    check_writable(adata, "obsm", key)
    plan = prepare(adata, like, fit, options)
    encoded = list(plan.encode())
    result = plan.finish(encoded)
    target = adata.copy() if copy else adata
    make_real(target)
    write_obsm(target, key, result.tokens)
    write_obs(target, _keys.STATUS, result.status)
    write_uns(target, _keys.VOCABULARY, plan.vocabulary.to_json())
    write_uns(target, RECORD, json.dumps(result.record))
    logger.info(result.line)
    return target if copy else None


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


@dataclass(frozen=True)
class Result:
    """Everything that is written, made before anything is."""

    tokens: sparse.csr_matrix
    status: pd.Categorical
    record: dict[str, Any]
    line: str


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

    def encode(self) -> Iterator[Encoded]:
        """Yield the tokens of consecutive row blocks."""
        encoder = Encoder(self.vocabulary, self.match.columns, self.reading)
        for block in self.source.blocks():
            ids = self.phenotype_ids[block.start : block.start + block.n_rows]
            yield encoder.encode(block.data, block.indices, block.indptr, ids)

    def finish(self, encoded: Sequence[Encoded]) -> Result:
        """Join the blocks, say which cells have no tokens and how much of the counts the vocabulary covers."""
        totals = np.concatenate([np.zeros(0), *(part.totals for part in encoded)])
        matched = np.concatenate([np.zeros(0), *(part.matched for part in encoded)])
        tokens = _joined(encoded, self.vocabulary)
        codes = np.where(totals <= 0, 1, np.where(np.diff(tokens.indptr) == 0, 2, 0))
        status = pd.Categorical.from_codes(codes, categories=["ok", "empty", "no_vocab_gene"])
        record = {**self.record, "cells": len(codes), "tokens": int(tokens.nnz)}
        record["empty"], record["no_vocab_gene"] = int((codes == 1).sum()), int((codes == 2).sum())
        cut = np.concatenate([np.zeros(0), *(part.cut for part in encoded)])
        record["cut_cells"], record["cut_share"] = int((cut > 0).sum()), _share(cut.sum(), matched.sum())
        record["counts_in_vocabulary"] = _share(matched.sum(), totals.sum())
        return Result(tokens, status, record, _line(self, record))


def _share(part: float, whole: float) -> float:
    return round(float(part / whole), 6) if whole > 0 else 0.0


def _joined(encoded: Sequence[Encoded], vocabulary: Vocabulary) -> sparse.csr_matrix:
    if len(encoded) == 1:
        return encoded[0].tokens
    if not encoded:
        return sparse.csr_matrix((0, vocabulary.n_positions), dtype=vocabulary.dtype)
    return sparse.vstack([part.tokens for part in encoded], format="csr", dtype=vocabulary.dtype)


def _line(plan: Plan, record: dict[str, Any]) -> str:
    hint = plan.source.suggest_counts() if plan.reading.kind == "log1p" else None
    return (
        f"scbin: {plan.source.name} read as {plan.reading.text}{'' if hint is None else '; ' + hint.rstrip('.')}. "
        f"{record['cells']:,} cells, {record['tokens']:,} tokens, {len(plan.vocabulary.genes):,} genes."
    )


def prepare(adata: AnnData, like: Any, fit: Fit, options: Options) -> Plan:
    """Check everything, decide what the values are, match or choose the genes. Nothing is written."""
    vocabulary: Vocabulary | None = None if like is None else getattr(like, "vocabulary", like)
    source = Source(adata, options.layer)
    scan = source.scan()
    reading = source.read(scan, options.values)
    names = _gene_names(adata, options.gene_key)
    match = match_genes(
        names,
        None if vocabulary is None else vocabulary.genes,
        used=source.used,
        case=options.case,
        duplicates=options.duplicates,
    )
    columns = _phenotype_columns(adata, options.phenotypes, vocabulary)
    labels = {name: _labels(adata, column, options.age_groups) for name, column in columns.items()}
    if vocabulary is None:
        vocabulary = fit_vocabulary(source, reading, match, labels, fit)
        match = _onto(match, vocabulary)
    for code, message in (*reading.warnings, *match.warnings):
        warn(code, message)
    record = {"values": reading.kind, "text": reading.text, "layer": options.layer, "encoding": vocabulary.encoding}
    ids = np.zeros((adata.n_obs, len(vocabulary.phenotypes)), dtype=np.int64)
    for k, phenotype in enumerate(vocabulary.phenotypes):
        ids[:, k] = phenotype.missing_id
        if phenotype.name in labels:
            ids[:, k], unseen = token_ids(labels[phenotype.name], phenotype)
            if unseen:
                listed = ", ".join(f"{value!r} ({n})" for value, n in list(unseen.items())[:3])
                warn("I36", f"{len(unseen)} labels of {phenotype.name!r} are new to the vocabulary: {listed}.")
    return Plan(source, reading, match, vocabulary, ids, record, options.force)


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


def _phenotype_columns(adata: AnnData, phenotypes: Any, vocabulary: Vocabulary | None) -> dict[str, str]:
    """Return {category: obs column}: as asked, or, for a vocabulary, the columns of its own names that exist."""
    if phenotypes is None and vocabulary is not None:
        found = {}
        for phenotype in vocabulary.phenotypes:
            names = AGE_COLUMNS if phenotype.name == "age" else (phenotype.name,)
            found |= {phenotype.name: name for name in names if name in adata.obs.columns}
        return found
    if isinstance(phenotypes, str):
        phenotypes = [phenotypes]
    if not hasattr(phenotypes, "items"):
        phenotypes = {("age" if name == "development_stage" else name): name for name in phenotypes or ()}
    for column in phenotypes.values():
        read_obs(adata, column)
    if vocabulary is not None:
        for name in phenotypes:
            vocabulary.phenotype(name)
    return dict(phenotypes)


def _labels(adata: AnnData, column: str, age_groups: int | None) -> np.ndarray:
    if age_groups is None or column not in AGE_COLUMNS:
        return labels_of(read_obs(adata, column), column)
    labels, unread = age_labels(labels_of(read_obs(adata, column), column), age_groups)
    if unread:
        listed = ", ".join(f"{text!r} ({n})" for text, n in list(unread.items())[:3])
        warn("I39", f"{len(unread)} labels of {column!r} name no age and became [NO_AGE]: {listed}.")
    return labels
