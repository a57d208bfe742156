"""Expression values into bins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin._arguments import shown
from scbin._errors import ScbinInputError, ScbinTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence

LINEAR_START, LINEAR_STEP = 0.1, 0.4  # log1p values per 10,000: 20 bins reach 7.7
MOST_BINS = 65_000
TABLE_SHIFT = 47  # sign, exponent and 5 bits of the mantissa of a float64 are left
TABLE_SIZE = 1 << (63 - TABLE_SHIFT)


@dataclass(frozen=True)
class Bins:
    """How an expression value becomes a bin: bin k is where `edges[k - 1] <= value < edges[k]`, bin 0 is below all edges.

    The edges are increasing; with `zeros="drop"` bin 0 has no tokens (a gene that is not expressed is not in the row) and
    exists only as a label. `reads` says what the values must be; log1p values are natural logs of counts per `target_sum`.
    With `gene_edges` every gene has edges of its own (as many as `edges`, which then hold their means), and with
    `per="cell"` every cell has: the quantiles of its own values, of which `edges` are the shares.
    """

    edges: tuple[float, ...]
    zeros: Literal["drop", "keep"] = "drop"
    reads: Literal["log1p", "counts"] = "log1p"
    target_sum: float = 10_000.0
    per: Literal["all", "gene", "cell"] = "all"
    gene_edges: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        edges = np.asarray(self.edges, dtype=np.float64)
        if edges.ndim != 1 or not len(edges) or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
            raise ScbinInputError("B01", f"bin edges must be finite numbers that increase; these are {self.edges}.")
        if len(edges) > MOST_BINS:
            raise ScbinInputError(
                "B06", f"{len(edges):,} bins are more than the {MOST_BINS:,} that scbin can tell apart."
            )
        if self.per != "cell" and edges[0] <= 0:
            raise ScbinInputError(
                "B02",
                f"the first edge is {edges[0]:g}, but a gene that is not expressed (0) must stay below all edges.",
            )
        if (self.per == "gene") != (self.gene_edges is not None):
            raise ScbinInputError("B03", 'edges per gene need per="gene" and gene_edges.')

    # ---- rules ------------------------------------------------------------------------------------------------------

    @classmethod
    def linear(cls, n_bins: int = 20, *, zeros: Literal["drop", "keep"] = "drop") -> Bins:
        """Return bins of equal width on log1p values: 0.1, 0.5, 0.9 ..."""
        return cls(tuple(round(LINEAR_START + LINEAR_STEP * k, 10) for k in range(n_bins)), zeros)

    @classmethod
    def polygene(cls, n_bins: int = 10) -> Bins:
        """Return Polygene's bins: `n_bins` in all, bin 0 is [0, 0.1), the others are even up to 9; zeros are kept."""
        return cls(tuple(np.linspace(0.1, 9.0, n_bins - 1).tolist()), "keep")

    @classmethod
    def perturbgene(cls, n_edges: int = 10) -> Bins:
        """Return PerturbGene's bins: `n_edges` even edges from 0.1 to 9, zeros are dropped."""
        return cls(tuple(np.linspace(0.1, 9.0, n_edges).tolist()), "drop")

    @classmethod
    def log2(cls, n_bins: int, bin_size: float | None = None, *, zeros: Literal["drop", "keep"] = "keep") -> Bins:
        """Return Bioformers' rule on counts: x up to 8, then 8 + ceil((log2 x - 3) / bin_size); by default a third.

        `bin_size=0.3333333` gives the published numbers, which differ at powers of two from 16 up.
        """
        steps = np.arange(max(0, n_bins - 8))
        # thirds of an octave are exact at powers of two; 2 ** (k * 0.333...) would not be
        upper = 8.0 * (
            2.0 ** (steps // 3) * np.cbrt(2.0) ** (steps % 3) if bin_size is None else 2.0 ** (bin_size * steps)
        )
        edges = [float(k) for k in range(1, min(n_bins, 8) + 1)] + np.nextafter(upper, np.inf).tolist()
        return cls(tuple(edges), zeros, "counts")

    @classmethod
    def counts(cls, n_bins: int, bin_size: float, *, zeros: Literal["drop", "keep"] = "keep") -> Bins:
        """Return bins of equal width on counts: trunc(x / bin_size)."""
        return cls(tuple(float(bin_size * k) for k in range(1, n_bins + 1)), zeros, "counts")

    @classmethod
    def binary(cls, threshold: float = 0.1, *, zeros: Literal["drop", "keep"] = "drop") -> Bins:
        """Return one threshold on log1p values."""
        return cls((float(threshold),), zeros)

    @classmethod
    def cell_quantiles(cls, n_bins: int, *, zeros: Literal["drop", "keep"] = "drop") -> Bins:
        """Return quantiles of each cell's own expressed values, as scGPT does."""
        return cls(tuple(np.linspace(0, 1, n_bins).tolist()) if n_bins > 1 else (0.0,), zeros, per="cell")

    @classmethod
    def from_quantiles(cls, quantiles: np.ndarray, **fields: Any) -> Bins:
        """Return bins from fitted quantiles: (bins,) for all genes, or (genes, bins)."""
        if quantiles.ndim == 1:
            return cls(tuple(np.unique(_tidy(quantiles)).tolist()), **fields)
        quantiles = _tidy(quantiles)
        means = np.maximum.accumulate(quantiles.mean(axis=0)) + 1e-9 * np.arange(quantiles.shape[1])
        return cls(tuple(means.tolist()), per="gene", gene_edges=tuple(map(tuple, quantiles.tolist())), **fields)

    # ---- what others read -------------------------------------------------------------------------------------------

    @property
    def n_bins(self) -> int:
        """Number of bins above bin 0."""
        return len(self.edges)

    @cached_property
    def centres(self) -> np.ndarray:
        """Value each bin stands for (n_bins + 1,): 0, then the middle of each bin; the open last bin repeats its width."""
        middles: np.ndarray = self._middles(np.atleast_2d(np.asarray(self.edges, dtype=np.float64)))[0]
        return middles

    @cached_property
    def gene_centres(self) -> np.ndarray:
        """The same with each gene's own edges where there are such: (genes, n_bins + 1), else (1, n_bins + 1)."""
        return self._middles(self.matrix)

    def _middles(self, edges: np.ndarray) -> np.ndarray:
        """Return the value of each bin, for each row of edges (rows, n_bins + 1)."""
        if edges.shape[1] == 1:
            return np.tile(np.array([0.0, 1.0], dtype=np.float32), (len(edges), 1))
        if self.per == "cell":  # no unit: the share of the cell's expressed genes below
            return np.linspace(0, 1, edges.shape[1] + 1, dtype=np.float32)[None]
        widths = np.diff(edges, axis=1)
        middles = edges + np.column_stack([widths, widths[:, -1]]) / 2
        return np.column_stack([np.zeros(len(edges)), middles]).astype(np.float32)

    @cached_property
    def matrix(self) -> np.ndarray:
        """Edges (1, bins), or (genes, bins)."""
        return np.atleast_2d(np.asarray(self.gene_edges or self.edges, dtype=np.float64))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Bins:
        """Read back `dataclasses.asdict`."""
        own = fields.get("gene_edges")
        return cls(
            **{
                **fields,
                "edges": tuple(fields["edges"]),
                "gene_edges": None if own is None else tuple(tuple(edges) for edges in own),
            }
        )


def make_bins(
    rule: Bins | Sequence[float] | str, n_bins: int, zeros: Literal["drop", "keep"]
) -> Bins | Literal["quantile", "quantile_per_gene", "log2"]:
    """Turn the argument of the face into bins, or into the name of a rule that has to be fitted."""
    if isinstance(rule, Bins):
        return rule
    if not isinstance(rule, str):
        wrong = [edge for edge in rule if not isinstance(edge, Real) or isinstance(edge, bool)]
        if wrong:
            raise ScbinTypeError("A01", f"bins has the edge {shown(wrong[0])}; pass a list of numbers.")
        return Bins(tuple(float(edge) for edge in rule), zeros)
    if n_bins < 1:
        raise ScbinInputError("B04", f"n_bins is {n_bins}; at least one bin is needed.")
    if rule in ("quantile", "quantile_per_gene", "log2"):
        return rule  # type: ignore[return-value]
    made = {
        "linear": lambda: Bins.linear(n_bins, zeros=zeros),
        "quantile_per_cell": lambda: Bins.cell_quantiles(n_bins, zeros=zeros),
        "polygene": Bins.polygene,
        "perturbgene": Bins.perturbgene,
    }
    if rule not in made:
        known = ", ".join(repr(name) for name in (*made, "quantile", "quantile_per_gene", "log2"))
        raise ScbinInputError("B05", f"bins is {rule!r}; choose one of {known}, a list of edges, or a scbin Bins.")
    return made[rule]()


def scaled_edges(bins: Bins, target: float) -> np.ndarray:
    """Edges in the scale that the kernel compares in: counts per `target`, or the logs themselves (`target` = 0)."""
    if bins.per == "cell" or bins.reads == "counts" or target == 0:
        return bins.matrix
    return np.expm1(bins.matrix)


def lookup(edges: np.ndarray) -> np.ndarray:
    """Bin at the start of each interval of float64's upper bits, so that few comparisons are left (TABLE_SIZE,)."""
    starts = (np.arange(TABLE_SIZE, dtype=np.int64) << TABLE_SHIFT).view(np.float64)
    starts = np.where(np.isnan(starts), np.inf, starts)
    return np.searchsorted(edges, starts, side="right").astype(np.uint16)


def _tidy(values: np.ndarray) -> np.ndarray:
    """Six digits are more than a quantile of cells deserves, and do not change with the order of a sum."""
    exponent = np.floor(np.log10(np.maximum(values, 1e-12)))
    return np.round(values / 10.0**exponent, 5) * 10.0**exponent
