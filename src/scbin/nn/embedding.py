"""Vectors of cells and of genes, from token rows and a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from scbin._arguments import choices
from scbin._errors import ScbinInputError
from scbin.encoding.vocabulary import CLS
from scbin.nn.attention import to_device
from scbin.nn.pooling import pool
from scbin.nn.reading import hidden_packs, products_in

if TYPE_CHECKING:
    from typing import Unpack

    from scipy.sparse import csr_matrix
    from transformers import BertForMaskedLM

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.reading import How

Pooling = Literal["weighted", "mean", "cls"]


@dataclass(frozen=True, eq=False)
class Weights:
    """Weight of a token in its cell's vector: that of its id times that of its position."""

    tokens: np.ndarray  # (tokens,) float32
    positions: np.ndarray  # (positions,) float32

    def of(self, token_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        """Return the weight of each token."""
        return self.tokens[token_ids] * self.positions[position_ids]


def pooling_weights(vocabulary: Vocabulary, pooling: Pooling, gene_weights: np.ndarray | None = None) -> Weights:
    """Return how tokens are weighted in a cell's vector.

    `"weighted"`: by the expression that a gene's token stands for, and by `gene_weights`; `"mean"`: each gene alike; `"cls"`:
    the `[CLS]` token alone.

    Parameters
    ----------
    vocabulary
        Of the tokens.
    pooling
        The rule.
    gene_weights
        One weight per gene (genes,), for `"weighted"`. Default: 1.
    """
    choices({"pooling": get_args(Pooling)}, pooling=pooling)
    ids = np.arange(vocabulary.n_tokens)
    positions = np.ones(vocabulary.n_positions, dtype=np.float32)
    if pooling == "weighted":
        tokens = vocabulary.token_values.copy()
        if gene_weights is not None and vocabulary.position_is_gene:
            positions[vocabulary.gene_positions] = gene_weights
        elif gene_weights is not None:
            tokens[vocabulary.first_gene_id : vocabulary.first_gene_id + vocabulary.n_gene_ids] *= gene_weights
        return Weights(tokens, positions)
    if pooling == "mean":
        return Weights(vocabulary.is_gene_token(ids).astype(np.float32), positions)
    if CLS not in vocabulary.specials:
        raise ScbinInputError("T16", "this vocabulary has no [CLS] token; use pooling='mean'.")
    return Weights((ids == vocabulary.specials[CLS]).astype(np.float32), positions)


def hide_phenotypes(tokens: csr_matrix, vocabulary: Vocabulary) -> csr_matrix:
    """Return the rows with `[MASK]` in every phenotype slot: what the model sees when it is told nothing about a cell."""
    if not vocabulary.phenotypes:
        return tokens
    hidden = tokens.copy()
    hidden.data[np.isin(hidden.indices, [phenotype.position for phenotype in vocabulary.phenotypes])] = (
        vocabulary.mask_id
    )
    return hidden


def mean_gene_vectors(
    bert: BertForMaskedLM, tokens: csr_matrix, vocabulary: Vocabulary, **how: Unpack[How]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of each gene's vectors over the cells that have its token (genes, hidden), and how many have (genes,).

    NaN for genes that no cell has. The further parameters are those of `hidden_packs`.
    """
    n_genes = len(vocabulary.genes)
    sums = torch.zeros(n_genes, bert.config.hidden_size, dtype=torch.float64)
    counts = np.zeros(n_genes, dtype=np.int64)

    for _, pack, _, hidden in hidden_packs(bert, tokens, what="embedding genes", **how):
        at = np.flatnonzero(vocabulary.is_gene_token(pack.input_ids))
        genes = vocabulary.genes_at(pack.input_ids[at], pack.position_ids[at])
        sums.index_add_(0, torch.from_numpy(genes), hidden[to_device(at, hidden.device)].double().cpu())
        counts += np.bincount(genes, minlength=n_genes)
    means = np.where(counts[:, None] > 0, sums.numpy() / np.maximum(counts, 1)[:, None], np.nan)
    return means.astype(np.float32), counts


def embed_tokens(bert: BertForMaskedLM, tokens: csr_matrix, weights: Weights, **how: Unpack[How]) -> np.ndarray:
    """Return one vector per row (cells, hidden), NaN for rows without a weighted token.

    A row's vector is the same whatever other rows there are, in whatever order, under whatever token budget.

    Parameters
    ----------
    bert
        The network; it is on the device afterwards only for the time of the call.
    tokens
        Token matrix.
    weights
        Weight of each token in the mean over its row, from `pooling_weights`.
    how
        Of `hidden_packs`.
    """
    result = np.full((tokens.shape[0], bert.config.hidden_size), np.nan, dtype=np.float32)
    totals = np.add.reduceat(np.append(weights.of(tokens.data, tokens.indices), 0), tokens.indptr[:-1])
    has_vector = totals > 0  # reduceat gives an empty row its neighbour's value, but there is nothing to read in it
    mixed = products_in(how.get("precision", "float32"), how.get("device", "auto"), bert)
    for rows, pack, layout, hidden in hidden_packs(bert, tokens, kept=has_vector, what="embedding", **how):
        own = to_device(weights.of(pack.input_ids, pack.position_ids), hidden.device)
        with torch.inference_mode(), mixed:
            result[rows] = pool(hidden, layout, own).cpu().numpy()
    return result
