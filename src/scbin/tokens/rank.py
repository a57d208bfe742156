"""The `"rank"` encoding: a token says which gene, its position the rank in the cell, as in Geneformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._errors import ScbinInputError
from scbin.tokens.fit import gene_medians
from scbin.tokens.kernels import over_rows
from scbin.tokens.vocabulary import ENCODINGS, MOST_GENES, Encoding, GeneTokens

if TYPE_CHECKING:
    from scbin.tokens.fit import Cells
    from scbin.tokens.rules import Tokenization
    from scbin.tokens.values import Rows
    from scbin.tokens.vocabulary import Vocabulary


class RankEncoding(Encoding):
    """Genes by value / median, descending; values that are equal to ten digits by token id."""

    position_is_gene = False
    id_is_gene = True

    def fit(self, cells: Cells, rule: Any, asked: Tokenization) -> dict[str, Any]:
        """Take every gene that a cell expresses, with its median."""
        medians = gene_medians(cells)
        kept = np.flatnonzero(medians > 0)
        if not len(kept):
            raise ScbinInputError("V04", "no gene has a positive median: every cell is empty.")
        return {"genes": kept, "medians": medians[kept].tolist()}

    def encode(self, vocabulary: Vocabulary, rows: Rows) -> GeneTokens:
        """Return the genes of each row in the order of their ranks."""
        medians = np.ones(len(vocabulary.genes)) if vocabulary.medians is None else np.asarray(vocabulary.medians)
        genes = rows.columns[rows.indices]
        at = np.flatnonzero((genes >= 0) & (rows.data > 0))
        genes, values, starts = genes[at], rows.data[at].astype(np.float64), np.searchsorted(at, rows.indptr)
        # one integer for each gene, which sorts by key, descending, and then by gene; its last 18 bits are the gene
        items = ~((np.expm1(values) if rows.logs else values) / medians[genes]).view(np.int64)
        items &= -MOST_GENES
        items |= genes
        over_rows(_sort_rows, starts, (), items)
        places = np.arange(len(items), dtype=np.int32) - np.repeat(starts[:-1].astype(np.int32), np.diff(starts))
        ids = (vocabulary.first_gene_id + (items & (MOST_GENES - 1))).astype(vocabulary.dtype)
        return GeneTokens(ids, places, starts[:-1], np.diff(starts))

    def level_values(self, vocabulary: Vocabulary) -> np.ndarray:
        """Return that a gene which has a rank is expressed; its position says how much."""
        return np.array([0.0, 1.0])


def _sort_rows(first: int, last: int, starts: np.ndarray, _: tuple[()], items: np.ndarray) -> None:
    """Sort each row in place."""
    bounds = starts[first : last + 1].tolist()
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        items[start:stop].sort()


ENCODINGS["rank"] = RankEncoding()
