"""How expression becomes tokens: the finer choices, and the rules by which values become bins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from scbin._arguments import check_fields, numbers, shown
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

Zeros = Literal["drop", "keep"]
Layout = Literal["scbin", "geneformer_v1", "geneformer_v2", "bionemo"]
Rule = Literal[
    "counts", "linear", "quantile", "quantile_per_gene", "quantile_per_cell", "log2", "polygene", "perturbgene"
]
LINEAR_START, LINEAR_STEP = 0.1, 0.4  # log1p values per 10,000: 20 bins reach 7.7
EXACT_COUNTS, COUNT_STEP, LARGEST_COUNT = 16, 1.15, 10_000
MOST_BINS = 65_000


@dataclass(frozen=True)
class Tokenization:
    """Further options of :func:`scbin.pp.tokenize`; the defaults suit most data.

    Parameters
    ----------
    n_bins
        Number of bins above zero, for rules without a fixed number (`"linear"`, `"quantile"` ...).
    zeros
        `"drop"`: a gene that is not expressed has no token. `"keep"`: it has the token of bin 0.
    layout
        Special tokens of `encoding="rank"`: scbin's, or those of Geneformer V1, V2 or BioNeMo.
    max_length
        Maximum number of tokens per row; the genes with the largest values are kept.
    depth
        Whether each cell gets a `[DEPTH]` token, a level of its total counts. By default wherever counts are known and the
        layout is scbin's.
    age_groups
        Bin ages (`age` or `development_stage`) into classes of so many years; by default their text is the label.
    force
        Continue if less than 20 % of the counts are in the vocabulary of `like`.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.pp.tokenize(adata, tokenization=Tokenization(n_bins=10, zeros="keep"))
    >>> adata.obsm["X_tokens"].shape
    (700, 769)
    """

    n_bins: int = 20
    zeros: Zeros = "drop"
    layout: Layout = "scbin"
    max_length: int | None = None
    depth: bool | None = None
    age_groups: Literal[10, 20] | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.n_bins < 1:
            raise ScbinInputError("A02", f"n_bins is {self.n_bins}; at least one bin is needed.")
        if self.max_length is not None and self.max_length < 1:
            raise ScbinInputError("A02", f"max_length is {self.max_length}; a row has at least one token.")


@dataclass(frozen=True)
class Bins:
    """How an expression value becomes a bin: bin k is where `edges[k - 1] <= value < edges[k]`, bin 0 is below all edges.

    The edges are increasing; with `zeros="drop"` bin 0 has no tokens (a gene that is not expressed is not in the row) and
    exists only as a label. `reads` says what the values must be; log1p values are natural logs of counts per `target_sum`.
    With `gene_edges` every gene has edges of its own (as many as `edges`, which then hold their means), and with
    `per="cell"` every cell has: the quantiles of its own values, of which `edges` are the shares.
    """

    edges: tuple[float, ...]
    zeros: Zeros = "drop"
    reads: Literal["log1p", "counts"] = "log1p"
    target_sum: float = 10_000.0
    per: Literal["all", "gene", "cell"] = "all"
    gene_edges: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        edges = np.asarray(self.edges, dtype=np.float64)
        object.__setattr__(self, "edges", tuple(edges.ravel().tolist()))
        rise = 0 < len(edges) <= MOST_BINS and np.isfinite(edges).all() and (np.diff(edges) > 0).all()
        if not rise or (self.per != "cell" and edges[0] <= 0):  # 0, not expressed, must stay below all edges
            need = f"1 to {MOST_BINS:,} finite numbers above 0 that increase"
            raise ScbinInputError("A02", f"bin edges must be {need}; these are {shown(self.edges)}.")
        if (self.per == "gene") != (self.gene_edges is not None) or self.matrix.shape[1] != len(edges):
            raise ScbinInputError("A03", 'edges per gene need per="gene" and gene_edges, as many as edges.')

    # ---- rules ------------------------------------------------------------------------------------------------------

    @classmethod
    def counts(cls, *, zeros: Zeros = "drop") -> Bins:
        """Return the molecules themselves: bin 1 is one molecule, exact up to 16, then steps of about 15 % to 10,000."""
        edges = [float(k) for k in range(1, EXACT_COUNTS + 2)]
        while edges[-1] < LARGEST_COUNT:
            edges.append(max(edges[-1] + 1, float(round(edges[-1] * COUNT_STEP))))
        return cls(tuple(edges), zeros, "counts")

    @classmethod
    def linear(cls, n_bins: int = 20, *, zeros: Zeros = "drop") -> Bins:
        """Return bins of equal width on log1p values: 0.1, 0.5, 0.9 ..."""
        return cls(tuple(round(LINEAR_START + LINEAR_STEP * k, 10) for k in range(n_bins)), zeros)

    @classmethod
    def polygene(cls, n_bins: int = 10) -> Bins:
        """Return Polygene's bins: `n_bins` in all, bin 0 is [0, 0.1), the others are even up to 9; zeros are kept."""
        return cls(tuple(np.linspace(0.1, 9.0, n_bins - 1).tolist()), "keep")

    @classmethod
    def perturbgene(cls, n_edges: int = 10) -> Bins:
        """Return PerturbGene's bins: `n_edges` even edges from 0.1 to 9, zeros are dropped."""
        return cls(tuple(np.linspace(0.1, 9.0, n_edges).tolist()))

    @classmethod
    def log2(cls, n_bins: int, bin_size: float | None = None, *, zeros: Zeros = "keep") -> Bins:
        """Return Bioformers' rule on counts: x up to 8, then 8 + ceil((log2 x - 3) / bin_size); by default a third.

        `bin_size=0.3333333` gives the published numbers, which differ at powers of two from 16 up.
        """
        steps = np.arange(max(0, n_bins - 8))
        # thirds of an octave are exact at powers of two; 2 ** (k * 0.333...) would not be
        exact = 2.0 ** (steps // 3) * np.cbrt(2.0) ** (steps % 3)
        upper = 8.0 * (exact if bin_size is None else 2.0 ** (bin_size * steps))
        edges = [float(k) for k in range(1, min(n_bins, 8) + 1)] + np.nextafter(upper, np.inf).tolist()
        return cls(tuple(edges), zeros, "counts")

    @classmethod
    def binary(cls, threshold: float = 0.1, *, zeros: Zeros = "drop") -> Bins:
        """Return one threshold on log1p values."""
        return cls((float(threshold),), zeros)

    @classmethod
    def cell_quantiles(cls, n_bins: int, *, zeros: Zeros = "drop") -> Bins:
        """Return quantiles of each cell's own expressed values, as scGPT does."""
        return cls(tuple(np.linspace(0, 1, n_bins).tolist()), zeros, per="cell")

    @classmethod
    def from_quantiles(cls, quantiles: np.ndarray, **fields: Any) -> Bins:
        """Return bins from fitted quantiles: (bins,) for all genes, or (genes, bins)."""
        quantiles = six_digits(quantiles)
        if quantiles.ndim == 1:
            return cls(tuple(np.unique(quantiles).tolist()), **fields)
        means = np.maximum.accumulate(quantiles.mean(axis=0)) + 1e-9 * np.arange(quantiles.shape[1])
        return cls(tuple(means.tolist()), per="gene", gene_edges=tuple(map(tuple, quantiles.tolist())), **fields)

    # ---- what others read -------------------------------------------------------------------------------------------

    @property
    def n_bins(self) -> int:
        """Number of bins above bin 0."""
        return len(self.edges)

    @cached_property
    def matrix(self) -> np.ndarray:
        """Edges (1, bins), or (genes, bins)."""
        return np.atleast_2d(np.asarray(self.gene_edges or self.edges, dtype=np.float64))

    @cached_property
    def centres(self) -> np.ndarray:
        """Value each bin stands for (n_bins + 1,): 0, then its middle.

        The middle of counts is the geometric mean of the first and the last count of the bin; the open last bin repeats the
        width of the one before.
        """
        edges = np.asarray(self.edges)
        if self.per == "cell":  # no unit: the share of the cell's expressed genes below
            return np.linspace(0, 1, self.n_bins + 1, dtype=np.float32)
        if self.reads == "counts":
            after = [*edges[1:], edges[-1] * (edges[-1] / edges[-2] if self.n_bins > 1 else 2.0)]
            first = np.ceil(edges)
            middles = np.sqrt(first * np.maximum(np.ceil(after) - 1, first))
        else:
            widths = np.diff(edges)
            middles = edges + np.append(widths, widths[-1:]) / 2 if self.n_bins > 1 else np.ones(1)
        return np.append(0.0, middles).astype(np.float32)


def make_bins(rule: Bins | Sequence[float] | str, n_bins: int, zeros: Zeros) -> Bins | str:
    """Turn the argument of the face into bins, or into the name of a rule that has to be fitted."""
    if isinstance(rule, Bins):
        return rule
    if not isinstance(rule, str):
        numbers(**{f"rule[{k}]": edge for k, edge in enumerate(rule)})
        return Bins(tuple(map(float, rule)), zeros)
    made = {"counts": Bins.counts(zeros=zeros), "linear": Bins.linear(n_bins, zeros=zeros)}
    made |= {"quantile_per_cell": Bins.cell_quantiles(n_bins, zeros=zeros)}
    made |= {"polygene": Bins.polygene(), "perturbgene": Bins.perturbgene()}
    if rule not in get_args(Rule):
        known = ", ".join(map(repr, get_args(Rule)))
        raise ScbinInputError("A02", f"rule is {rule!r}; choose one of {known}, or a list of edges.")
    return made.get(rule, rule)


def six_digits(values: np.ndarray) -> np.ndarray:
    """Round values above 0 to six digits, which do not change with the order of a sum."""
    scale = 10.0 ** (5 - np.floor(np.log10(np.maximum(values, 1e-12))))
    return np.rint(values * scale) / scale
