"""The `"rank"` encoding: a token says which gene, its position the rank in the cell, as in Geneformer."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._errors import ScbinInputError
from scbin.tokens.fit import gene_medians
from scbin.tokens.kernels import frozen, rank_rows
from scbin.tokens.vocabulary import ENCODINGS, END, Encoding, GeneTokens

if TYPE_CHECKING:
    from scbin.tokens.fit import Cells
    from scbin.tokens.rules import Tokenization
    from scbin.tokens.values import Rows
    from scbin.tokens.vocabulary import Vocabulary


class RankEncoding(Encoding):
    """Genes by value / median, descending; equal values by token id."""

    position_is_gene = False
    id_is_gene = True

    def fit(self, cells: Cells, rule: Any, asked: Tokenization) -> dict[str, Any]:
        """Take every gene with a median: those asked for, or fitted."""
        if asked.medians is None:
            medians = gene_medians(cells)
        else:
            for gene, median in asked.medians.items():
                if not (isinstance(median, Real) and 0 < median < np.inf):
                    raise ScbinInputError("A02", f"the median of {gene!r} is {median!r}, no finite number above 0.")
            medians = np.array([asked.medians.get(gene, 0.0) for gene in cells.genes])
        kept = np.flatnonzero(np.nan_to_num(medians) > 0)
        if not len(kept):
            raise ScbinInputError("V04", "no gene has a positive median: every cell is empty.")
        return {"genes": kept, "medians": medians[kept].tolist()}

    def encode(self, vocabulary: Vocabulary, rows: Rows) -> GeneTokens:
        """Return the genes of each row in the order of their ranks."""
        medians = np.ones(len(vocabulary.genes)) if vocabulary.medians is None else np.asarray(vocabulary.medians)
        if rows.logs:
            rows = replace(rows, data=np.expm1(rows.data.astype(np.float64)), logs=False)
        ids, places = np.empty(len(rows.data), dtype=vocabulary.dtype), np.empty(len(rows.data), dtype=np.int32)
        lengths, cut = np.zeros(rows.n, dtype=np.int64), np.zeros(rows.n)
        sizes = (vocabulary.first_gene_id, vocabulary.n_gene_positions - (END in vocabulary.specials))
        middle = frozen(np.append(medians, [1.0, 1.0]))  # genes -1 and -2 are read too, without an effect
        offsets = rows.indptr[:-1]
        rows.kernel(rank_rows, middle, *sizes, frozen(offsets), ids, places, lengths, cut)
        return GeneTokens(ids, places, offsets, lengths, cut)

    def level_values(self, vocabulary: Vocabulary) -> np.ndarray:
        """Return that a gene which has a rank is expressed; its position says how much."""
        return np.array([0.0, 1.0])


ENCODINGS["rank"] = RankEncoding()
