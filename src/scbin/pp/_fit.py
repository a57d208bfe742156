"""Making a vocabulary from the data: genes, bins or medians, phenotype values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from scbin._arguments import choices, instances, numbers, texts, whole_numbers
from scbin._errors import ScbinInputError, count
from scbin.encoding.bins import Bins, make_bins
from scbin.encoding.encode import unique_columns
from scbin.encoding.fitting import GeneMoments, add_normalised
from scbin.encoding.phenotypes import values_of
from scbin.encoding.quantiles import QuantileSketch
from scbin.encoding.vocabulary import Encoding, Layout, Vocabulary

if TYPE_CHECKING:
    from scbin.encoding.genes import GeneMatch
    from scbin.encoding.values import Reading
    from scbin.pp._source import Source

BinRule = Literal["linear", "quantile", "quantile_per_gene", "quantile_per_cell", "log2", "polygene", "perturbgene"]
Zeros = Literal["drop", "keep"]
CHOICES = {"encoding": get_args(Encoding), "zeros": get_args(Zeros), "layout": get_args(Layout)}


@dataclass(frozen=True)
class Fit:
    """What the user asked of the vocabulary."""

    encoding: Encoding = "bins"
    bins: Bins | Sequence[float] | BinRule | None = None
    n_bins: int = 20
    threshold: float = 0.1
    zeros: Zeros = "drop"
    n_genes: int = 2000
    mask_var: str | None = "highly_variable"
    layout: Layout = "scbin"
    max_length: int | None = None
    medians: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        choices(CHOICES, encoding=self.encoding, zeros=self.zeros, layout=self.layout)
        whole_numbers(n_bins=self.n_bins, n_genes=self.n_genes)
        whole_numbers(optional=True, max_length=self.max_length)
        numbers(threshold=self.threshold)
        texts(optional=True, mask_var=self.mask_var)
        instances(
            (str, Bins, Sequence, np.ndarray), "a rule, a list of edges or a scbin Bins", optional=True, bins=self.bins
        )
        instances(Mapping, "{gene: median}", optional=True, medians=self.medians)


def fit_vocabulary(
    source: Source,
    reading: Reading,
    match: GeneMatch,
    labels: Mapping[str, np.ndarray],
    age_groups: Mapping[str, int],
    fit: Fit,
) -> Vocabulary:
    """Choose genes, fit bins or medians, list the phenotype values."""
    if source.adata.n_obs == 0:
        raise ScbinInputError(
            "E09",
            "there is no cell to make a vocabulary from. Pass the one that the cells shall be read with: like=model.",
        )
    phenotypes = {name: values_of(column) for name, column in labels.items()}
    moments = _moments(source, reading, match)
    if fit.encoding == "rank":
        medians = _medians(source, reading, match) if fit.medians is None else _given(match, fit.medians)
        kept = np.flatnonzero(np.nan_to_num(medians) > 0)
        if not len(kept):
            raise ScbinInputError("E03", "no gene has a positive median: every cell is empty.")
        return Vocabulary.build(
            "rank",
            [match.genes[k] for k in kept],
            phenotypes=phenotypes,
            age_groups=age_groups,
            medians=medians[kept].tolist(),
            max_length=fit.max_length,
            layout=fit.layout,
            gene_shares=moments.shares[kept].tolist(),
        )
    kept = _chosen_genes(source, match, moments, fit)
    return Vocabulary.build(
        fit.encoding,
        [match.genes[k] for k in kept],
        phenotypes=phenotypes,
        age_groups=age_groups,
        bins=_bins(source, reading, match, kept, moments, fit),
        max_length=fit.max_length,
        gene_shares=moments.shares[kept].tolist(),
    )


def _moments(source: Source, reading: Reading, match: GeneMatch) -> GeneMoments:
    columns, add_up = unique_columns(match.columns, len(match.genes), reading)
    moments = GeneMoments(len(match.genes), reading)
    for block in source.blocks():
        rows = (block.data, block.indices, block.indptr)
        moments.add(rows if add_up is None else add_up(*rows), columns)
    return moments


def _chosen_genes(source: Source, match: GeneMatch, moments: GeneMoments, fit: Fit) -> np.ndarray:
    var = source.adata.var
    if fit.mask_var is not None and fit.mask_var in var.columns:
        marked = var[fit.mask_var]
        if marked.isna().any() or not set(marked.unique()) <= {True, False}:
            found = ", ".join(repr(value) for value in marked.unique()[:3])
            raise ScbinInputError(
                "E04", f"var[{fit.mask_var!r}] must hold True and False only; it holds {found}. Use its .astype(bool)."
            )
        genes = match.columns[marked.to_numpy(dtype=bool)]
        if not (genes >= 0).any():
            raise ScbinInputError(
                "E05", f"var[{fit.mask_var!r}] marks no gene; pass mask_var=None to choose by variance."
            )
        return np.unique(genes[genes >= 0])
    if fit.mask_var not in (None, "highly_variable"):
        there = ", ".join(repr(str(name)) for name in var.columns if pd.api.types.is_bool_dtype(var[name])) or "none"
        raise ScbinInputError(
            "E06", f"mask_var={fit.mask_var!r} is not a column of adata.var. Columns of True and False: {there}."
        )
    if fit.n_genes < 1:
        raise ScbinInputError("E07", f"n_genes is {fit.n_genes}; at least one gene is needed.")
    return moments.most_variable(fit.n_genes)


def _bins(source: Source, reading: Reading, match: GeneMatch, kept: np.ndarray, moments: GeneMoments, fit: Fit) -> Bins:
    if fit.encoding == "binary":
        return Bins.binary(fit.threshold, zeros=fit.zeros)
    rule: Any = ("log2" if fit.encoding == "gene_bins" else "linear") if fit.bins is None else fit.bins
    made = make_bins(rule, fit.n_bins, fit.zeros)
    if made == "log2":
        largest = float(moments.largest[kept].max(initial=1.0))
        return _log2_up_to(largest, fit.zeros)
    if isinstance(made, str):
        made = _quantile_bins(source, reading, match, kept, fit, per_gene=made == "quantile_per_gene")
    if reading.kind == "log1p" and reading.target_sum not in (None, made.target_sum) and made.reads == "log1p":
        return replace(made, target_sum=float(reading.target_sum or made.target_sum))
    return made


def _log2_up_to(largest: float, zeros: Literal["drop", "keep"]) -> Bins:
    """As many bins as the largest count needs."""
    many = Bins.log2(200, zeros=zeros)
    return Bins.log2(max(1, int(np.searchsorted(many.edges, largest, side="right"))), zeros=zeros)


def _quantile_bins(
    source: Source, reading: Reading, match: GeneMatch, kept: np.ndarray, fit: Fit, *, per_gene: bool
) -> Bins:
    """Quantiles of the expressed values: the lowest bin begins just above zero, each holds about equally many."""
    columns, add_up = _narrowed(match, kept, reading)
    sketch = QuantileSketch(len(kept) if per_gene else 1)
    for block in source.blocks():
        rows = (block.data, block.indices, block.indptr)
        rows = rows if add_up is None else add_up(*rows)
        add_normalised(sketch, rows, columns, reading, logs=True, one_group=not per_gene)
    quantiles = sketch.quantiles(np.linspace(0, 1, fit.n_bins, endpoint=False))
    lowest = np.nanmin(quantiles, initial=1.0) / 2
    overall = np.where(np.isnan(quantiles), np.linspace(0.1, 8, fit.n_bins)[None, :], quantiles)
    overall[:, 0] = lowest
    overall = np.maximum.accumulate(overall, axis=1)
    return Bins.from_quantiles(overall if per_gene else overall[0], zeros=fit.zeros)


def _narrowed(match: GeneMatch, kept: np.ndarray, reading: Reading) -> Any:
    place = np.full(len(match.genes) + 1, -1, dtype=np.int32)
    place[kept] = np.arange(len(kept))
    columns = np.where(match.columns >= 0, place[match.columns], match.columns).astype(np.int32)
    return unique_columns(columns, len(kept), reading)


def _medians(source: Source, reading: Reading, match: GeneMatch) -> np.ndarray:
    columns, add_up = unique_columns(match.columns, len(match.genes), reading)
    sketch = QuantileSketch(len(match.genes))
    for block in source.blocks():
        rows = (block.data, block.indices, block.indptr)
        add_normalised(sketch, rows if add_up is None else add_up(*rows), columns, reading, logs=False)
    # with 20 bits, count / median of two genes is either equal or further apart than float64 can blur: scaling a cell by a
    # whole number can then never change an order
    mantissa, exponent = np.frexp(sketch.medians())
    return np.ldexp(np.rint(mantissa * 2**20), exponent - 20)


def _given(match: GeneMatch, medians: Mapping[str, float]) -> np.ndarray:
    wrong = [gene for gene, median in medians.items() if not (isinstance(median, Real) and 0 < median < np.inf)]
    if wrong:
        found = count(len(wrong), "median is no finite number above 0", "medians are no finite numbers above 0")
        raise ScbinInputError("E08", f"{found} (the first: that of {wrong[0]!r}, {medians[wrong[0]]!r}).")
    return np.array([medians.get(gene, 0.0) for gene in match.genes])
