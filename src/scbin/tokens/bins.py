"""The encodings in which every gene has a position, and its token a level: `"bins"`, `"binary"` and `"gene_bins"`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin.tokens.fit import quantile_edges
from scbin.tokens.kernels import bin_rows, over_rows
from scbin.tokens.rules import Bins, make_bins
from scbin.tokens.vocabulary import ENCODINGS, Encoding, GeneTokens

if TYPE_CHECKING:
    from scbin.tokens.fit import Cells
    from scbin.tokens.rules import Tokenization
    from scbin.tokens.values import Rows
    from scbin.tokens.vocabulary import Vocabulary


class BinEncoding(Encoding):
    """How much of a gene there is, as a bin: counts, bins of log1p values, or quantiles."""

    def __init__(self, of_counts: Any, of_logs: Any, *, id_is_gene: bool = False):
        self.default_rules, self.id_is_gene = (of_counts, of_logs), id_is_gene

    def fit(self, cells: Cells, rule: Any, asked: Tokenization) -> dict[str, Any]:
        """Choose genes, and fit the edges of the rules that have to be fitted."""
        default = self.default_rules[not cells.reading.has_counts]
        bins = make_bins(default if rule is None else rule, asked.n_bins, asked.zeros)
        genes = cells.choose_genes()
        if bins == "log2":  # as many bins as the largest count needs
            largest = max(1.0, cells.moments["largest"].iloc[genes].max())
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
        scales = (rows.totals, target, edges, bins.per == "cell")
        read = (rows.data, rows.indices, rows.columns, *scales, bases, keep, offsets)
        over_rows(bin_rows, rows.indptr, read, (ids, places, lengths))
        return GeneTokens(ids, places, offsets, lengths)


ENCODINGS["bins"] = BinEncoding("counts", "linear")
ENCODINGS["binary"] = BinEncoding([0.1], [0.1])  # whether a gene is expressed: one threshold on log1p values
ENCODINGS["gene_bins"] = BinEncoding("log2", "log2", id_is_gene=True)  # jointly with the gene, as in Bioformers
