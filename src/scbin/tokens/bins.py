"""The encodings in which every gene has a position, and its token a level: `"bins"`, `"binary"` and `"gene_bins"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin.tokens.fit import quantile_edges
from scbin.tokens.kernels import bin_rows, frozen
from scbin.tokens.rules import Bins, lookup, make_bins
from scbin.tokens.vocabulary import ENCODINGS, Encoding, GeneTokens

if TYPE_CHECKING:
    from scbin.tokens.fit import Cells
    from scbin.tokens.rules import Tokenization
    from scbin.tokens.values import Rows
    from scbin.tokens.vocabulary import Vocabulary


class BinEncoding(Encoding):
    """How much of a gene there is, as a bin that all genes share: counts, bins of log1p values, or quantiles."""

    default_rules = ("counts", "linear")  # where counts are known, and where they are not

    def fit(self, cells: Cells, rule: Any, asked: Tokenization) -> dict[str, Any]:
        """Choose genes, and fit the edges of the rules that have to be fitted."""
        default = self.default_rules[not cells.reading.has_counts]
        bins = make_bins(default if rule is None else rule, asked.n_bins, asked.zeros)
        genes = cells.choose_genes()
        if bins == "log2":  # as many bins as the largest count needs
            largest = cells.moments.largest[genes].max(initial=1.0)
            bins = Bins.log2(int(np.searchsorted(Bins.log2(200).edges, largest, side="right")), zeros=asked.zeros)
        elif isinstance(bins, str):
            edges = quantile_edges(cells, genes, asked.n_bins, per_gene=bins == "quantile_per_gene")
            bins = Bins.from_quantiles(edges, zeros=asked.zeros)
        return {"genes": genes, "bins": bins}

    def encode(self, vocabulary: Vocabulary, rows: Rows) -> GeneTokens:
        """Return one token per gene whose bin is above 0, or, where zeros are kept, per gene."""
        bins = vocabulary.bins
        assert bins is not None
        n_genes, keep = len(vocabulary.genes), bins.zeros == "keep"
        target = bins.target_sum if bins.reads == "log1p" and not rows.logs else 0.0
        edges = bins.matrix if bins.per == "cell" or target == 0 else np.expm1(bins.matrix)
        bases = vocabulary.ids_of(np.arange(n_genes, dtype=np.int64), 0)
        offsets = np.arange(rows.n) * n_genes if keep else rows.indptr[:-1]
        room = rows.n * n_genes if keep else len(rows.data)
        ids, places = np.empty(room, dtype=vocabulary.dtype), np.empty(room, dtype=np.int32)
        lengths = np.zeros(rows.n, dtype=np.int64)
        tables = (frozen(edges), frozen(lookup(edges[0])), bins.per == "cell", frozen(bases), keep)
        rows.kernel(bin_rows, frozen(rows.totals), target, *tables, frozen(offsets), ids, places, lengths)
        return GeneTokens(ids, places, offsets, lengths)

    def knocked_down(
        self, vocabulary: Vocabulary, genes: np.ndarray, levels: np.ndarray, fraction: float
    ) -> np.ndarray:
        """Return the bin of what is left of the value that a bin stands for: its middle, as counts."""
        bins = vocabulary.bins
        assert bins is not None
        if bins.per == "cell":  # quantiles have no unit: the place among the cell's expressed genes shrinks
            return np.floor(levels * (1 - fraction) + 1e-9).astype(levels.dtype)
        own = genes if bins.per == "gene" else np.zeros_like(genes)
        value = bins.gene_centres.astype(np.float64)[own, levels]
        left = np.log1p(np.expm1(value) * (1 - fraction)) if bins.reads == "log1p" else value * (1 - fraction)
        return np.minimum((bins.matrix[own] <= left[..., None]).sum(axis=-1), levels)


class BinaryEncoding(BinEncoding):
    """Whether a gene is expressed: one threshold on log1p values."""

    def fit(self, cells: Cells, rule: Any, asked: Tokenization) -> dict[str, Any]:
        """Choose genes; the threshold is asked for."""
        return {"genes": cells.choose_genes(), "bins": Bins.binary(asked.threshold, zeros=asked.zeros)}


class GeneBinEncoding(BinEncoding):
    """Gene and bin jointly, as in Bioformers: every gene has token ids of its own."""

    id_is_gene = True
    default_rules = ("log2", "log2")


ENCODINGS.update(bins=BinEncoding(), binary=BinaryEncoding(), gene_bins=GeneBinEncoding())
