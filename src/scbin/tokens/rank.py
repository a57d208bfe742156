"""The `"rank"` encoding: a token says which gene, its position the rank in the cell, as in Geneformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._errors import ScbinInputError
from scbin.tokens.fit import gene_medians
from scbin.tokens.kernels import over_rows, rank_rows
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
        if rule is not None or cells.marked is not None:
            raise ScbinInputError(
                "A03", 'encoding="rank" takes all expressed genes, by rank: leave out rule= and mask_var=.'
            )
        medians = gene_medians(cells)
        kept = np.flatnonzero(medians > 0)
        if not len(kept):
            raise ScbinInputError("V04", "no gene has a positive median: every cell is empty.")
        return {"genes": kept, "medians": medians[kept].tolist()}

    def encode(self, vocabulary: Vocabulary, rows: Rows) -> GeneTokens:
        """Return the genes of each row in the order of their ranks."""
        medians = np.ones(len(vocabulary.genes)) if vocabulary.medians is None else np.asarray(vocabulary.medians)
        items, lengths, bits = np.empty(len(rows.data), np.int64), np.empty(rows.n, np.int64), MOST_GENES - 1
        read = (rows.data, rows.indices, rows.columns, medians, rows.logs, bits)
        over_rows(rank_rows, rows.indptr, read, (items, lengths))
        over_rows(_sort_rows, rows.indptr, (lengths,), items)
        places = np.arange(len(items)) - np.repeat(rows.indptr[:-1], np.diff(rows.indptr))
        ids = (vocabulary.first_gene_id + (items & bits)).astype(vocabulary.dtype)
        return GeneTokens(ids, places.astype(np.int32), rows.indptr[:-1], lengths)

    def level_values(self, vocabulary: Vocabulary) -> np.ndarray:
        """Return that a gene which has a rank is expressed; its position says how much."""
        return np.array([0.0, 1.0])


def _sort_rows(first: int, last: int, indptr: np.ndarray, read: tuple[np.ndarray], items: np.ndarray) -> None:
    """Sort the genes of each row in place."""
    for start, length in zip(indptr[first:last].tolist(), read[0][first:last].tolist(), strict=True):
        items[start : start + length].sort()


ENCODINGS["rank"] = RankEncoding()
