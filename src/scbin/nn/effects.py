"""What an edit does beyond the cell's vector: to the vectors of other genes, to predicted phenotypes, to predicted expression."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scbin.nn.attention import to_device
from scbin.nn.bert import logits_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scbin.encoding.vocabulary import Phenotype
    from scbin.nn.perturbation import RowEncoder

N_FOLDS = 5  # parts of the genes that are hidden in turn, so that no gene is predicted from itself


def gene_vectors(encoder: RowEncoder, tokens: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the vectors of all gene tokens (n, H), sorted by row and gene, with the row and the gene of each (n,)."""
    vocabulary = encoder.vocabulary
    rows, genes, vectors = [], [], []
    for chosen, pack, hidden, _ in encoder.packs(tokens, every_token=True):
        at = np.flatnonzero(vocabulary.is_gene_token(pack.input_ids))
        rows.append(np.repeat(chosen, pack.lengths)[at])
        genes.append(vocabulary.genes_at(pack.input_ids[at], pack.position_ids[at]))
        vectors.append(hidden[to_device(at, encoder.device)].float().cpu().numpy())
    if not rows:
        return np.zeros(0, int), np.zeros(0, int), np.zeros((0, encoder.bert.config.hidden_size), np.float32)
    row, gene = np.concatenate(rows), np.concatenate(genes)
    order = np.lexsort((gene, row))
    return np.concatenate(vectors)[order], row[order], gene[order]


def phenotype_probabilities(encoder: RowEncoder, tokens: sparse.csr_matrix, phenotype: Phenotype) -> np.ndarray:
    """Return the probability of each value of a phenotype (rows, values), read where its slot is masked; NaN without a slot."""
    result = np.full((tokens.shape[0], len(phenotype.values)), np.nan, dtype=np.float64)
    for chosen, pack, hidden, _ in encoder.packs(tokens, every_token=True):
        at = np.flatnonzero(pack.position_ids == phenotype.position)
        states = hidden[to_device(at, encoder.device)]
        logits = logits_at(encoder.bert, states, phenotype.first_id, phenotype.stop_id).float().cpu().numpy()
        result[np.repeat(chosen, pack.lengths)[at]] = _softmax(logits)
    return result


def predicted_expression(encoder: RowEncoder, tokens: sparse.csr_matrix, kept: np.ndarray) -> np.ndarray:
    """Return the expression of every gene that the model expects from the other genes (rows, genes).

    The genes are hidden in five parts in turn; each is asked for with a mask that the other tokens do not see. The genes `kept`
    (rows, m), those that were edited, stay visible throughout and are not asked for: NaN.
    """
    vocabulary = encoder.vocabulary
    n_genes = len(vocabulary.genes)
    result = np.full((tokens.shape[0], n_genes), np.nan, dtype=np.float32)
    values = vocabulary.token_values[vocabulary.first_gene_id :][: vocabulary.n_levels].astype(np.float64)
    for masked, n_seen in _masked(encoder, tokens, kept):
        for chosen, pack, hidden, _ in encoder.packs(masked, every_token=True, n_seen=n_seen):
            seen = np.repeat(pack.cu_seqlens[:-1] + n_seen[chosen], pack.lengths)
            at = np.flatnonzero(np.arange(pack.n_tokens) >= seen)
            genes = pack.position_ids[at] - vocabulary.first_gene_position
            starts = vocabulary.group_start[pack.position_ids[at]]
            states = hidden[to_device(at, encoder.device)]
            expected = np.empty(len(at))
            for start in np.unique(starts):  # one group for all genes, or one for each
                mine = np.flatnonzero(starts == start)
                logits = logits_at(encoder.bert, states[to_device(mine, encoder.device)], start, start + len(values))
                expected[mine] = _softmax(logits.float().cpu().numpy()) @ values
            result[np.repeat(chosen, pack.lengths)[at], genes] = expected
    return result


def _masked(
    encoder: RowEncoder, tokens: sparse.csr_matrix, kept: np.ndarray
) -> Iterator[tuple[sparse.csr_matrix, np.ndarray]]:
    """For each part of the genes, yield rows without its tokens and with masks behind them, and how many tokens come before."""
    vocabulary = encoder.vocabulary
    first, n_rows = vocabulary.first_gene_position, tokens.shape[0]
    row = np.repeat(np.arange(n_rows), np.diff(tokens.indptr))
    gene = tokens.indices - first
    is_kept = (gene[:, None] == kept[row]).any(axis=1)
    order = np.random.default_rng(0).permutation(len(vocabulary.genes))
    for part in np.array_split(order, N_FOLDS):
        stays = ~np.isin(gene, part) | is_kept | ~vocabulary.is_gene_token(tokens.data)
        asked_row, asked_gene = np.repeat(np.arange(n_rows), len(part)), np.tile(np.sort(part), n_rows)
        asked = ~(asked_gene[:, None] == kept[asked_row]).any(axis=1)
        rows = np.concatenate([row[stays], asked_row[asked]])
        columns = np.concatenate([tokens.indices[stays], first + asked_gene[asked]])
        ids = np.concatenate([tokens.data[stays], np.full(int(asked.sum()), vocabulary.mask_id, dtype=tokens.dtype)])
        by_row = np.argsort(rows, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_rows))])
        masked = sparse.csr_matrix((ids[by_row], columns[by_row], bounds), shape=tokens.shape)
        yield masked, np.bincount(row[stays], minlength=n_rows)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(axis=1, keepdims=True)
