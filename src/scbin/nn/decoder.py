"""From the place of a cell back to its genes: what makes and imputes cells, fitted to a trained network in closed form."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from scbin.data._mask_kernel import hash_uniform
from scbin.data.frequencies import MOST_COMBINATIONS, Frequencies, fit_frequencies, fit_means, logistic, sum_rows
from scbin.data.masking import random_key
from scbin.encoding.vocabulary import CLS, END, START, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Vectors = Callable[[sparse.csr_matrix], np.ndarray]  # token rows -> one vector per row, NaN for rows without genes

MOST_CELLS = 2_500  # more change a linear fit little
_MOST_SCORES = 30
_FURTHEST = 4.0  # standard deviations of a score
SHARES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0])
"""Shares of the genes for which it was learned how much of a cell's place they tell."""
_HALF = 5  # of SHARES
_SHOW, _DEAL = range(2)
_FITTING = -3  # stands where training has its epoch
_NEWTON_STEPS = 4
_STIFFNESS = 3.0  # cells' worth of belief that the odds of a gene do not depend on a score
_BIN_STIFFNESS = 100.0  # and its bin: a gene seen in ten cells shall not have thirty slopes


@dataclass(frozen=True, eq=False)
class Decoder:
    """The odds and bins of genes, given phenotypes, size, and what a network says of the genes seen so far.

    The frequencies say what cells of a kind express. The network's vector of a part of a cell, less what its phenotypes make one
    expect, is projected on the directions in which cells of a kind differ; `filters` turn that into the expected scores of the
    whole cell (little is believed where little was seen), and each score moves the log odds and mean bin of each gene.
    """

    frequencies: Frequencies
    centre: np.ndarray  # (1 + values, hidden) float32, mean vector, additive as in the frequencies
    projection: np.ndarray  # (hidden, scores) float32
    odds_weights: np.ndarray  # (scores, genes) float32
    bin_weights: np.ndarray  # (scores, genes) float32
    filters: np.ndarray  # (len(SHARES), scores, scores) float32
    offsets: np.ndarray  # (len(SHARES), scores) float32, mean score of parts of cells

    def scores(self, vectors: np.ndarray, values: np.ndarray, shares: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Return the expected scores of cells (cells, scores) from the vectors of parts of them.

        Parameters
        ----------
        vectors
            Of the genes seen (cells, hidden); NaN where there are none.
        values
            Number of the value of each phenotype (cells, phenotypes); -1 where it is missing.
        shares
            Share of the genes that were looked at (cells,).
        vocabulary
            Of the phenotypes.
        """
        raw = self.raw_scores(vectors, values, vocabulary)
        seen = np.isfinite(raw).all(axis=1)
        place = np.clip(np.interp(shares, SHARES, np.arange(len(SHARES))), 0, len(SHARES) - 1)
        below = np.minimum(place.astype(np.int64), len(SHARES) - 2)
        result = np.zeros_like(raw)
        for knot in np.unique(below[seen]):
            mine = seen & (below == knot)
            part = (place[mine] - knot)[:, None]
            low, high = ((raw[mine] - self.offsets[k]) @ self.filters[k] for k in (knot, knot + 1))
            result[mine] = (1 - part) * low + part * high
        return np.clip(result, -_FURTHEST, _FURTHEST)  # unlike any cell, a part of one says nothing more

    def raw_scores(self, vectors: np.ndarray, values: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
        """Return where vectors lie beside the mean of their kind (cells, scores)."""
        return (vectors - sum_rows(self.centre, self.frequencies.rows_of(values, vocabulary))) @ self.projection

    def genes(
        self, values: np.ndarray, sizes: np.ndarray, scores: np.ndarray, vocabulary: Vocabulary
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return log odds and mean bin of each gene for some cells, each (cells, genes)."""
        odds, mean = self.frequencies.priors(values, sizes, vocabulary)
        odds = odds * _widening(self.odds_weights, np.ones(len(self.odds_weights)))
        return odds + scores @ self.odds_weights, mean + scores @ self.bin_weights

    def spread(self) -> np.ndarray:
        """Return the spread of each gene's bin around its mean, given the scores (genes,)."""
        own = self.frequencies.bin_spread
        return np.sqrt(np.maximum(own**2 - (self.bin_weights**2).sum(axis=0), (own / 2) ** 2))

    def belief(self, share: float) -> np.ndarray:
        """Return how much of each score's variance the genes of so large a share of a cell tell (scores,), from 0 to 1."""
        diagonals = np.clip(np.diagonal(self.filters, axis1=1, axis2=2), 0, 1)  # (len(SHARES), scores)
        shares, diagonals = np.append(0, SHARES), np.vstack([np.zeros(diagonals.shape[1]), diagonals])
        return np.array([np.interp(share, shares, column) for column in diagonals.T])

    # ---- storage ----------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Return what the shapes of `tensors` depend on beside network and vocabulary."""
        return {"n_combinations": len(self.frequencies.counts), "n_scores": self.projection.shape[1]}

    def tensors(self) -> dict[str, np.ndarray]:
        """Return everything as float32 arrays by name."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "frequencies"}
        return {
            name: np.ascontiguousarray(array, dtype=np.float32)
            for name, array in (self.frequencies.tensors() | own).items()
        }

    @staticmethod
    def shapes(vocabulary: Vocabulary, counts: Mapping[str, int], hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of the `tensors`."""
        if set(counts) != {"n_combinations", "n_scores"} or not can_decode(vocabulary):
            raise ValueError("this is not what a decoder of this vocabulary is described by")
        n_combinations, n_scores = counts["n_combinations"], counts["n_scores"]
        if type(n_combinations) is not int or type(n_scores) is not int:
            raise ValueError("counts are whole numbers")
        if not (0 < n_combinations <= MOST_COMBINATIONS and 0 <= n_scores <= hidden_size):
            raise ValueError(f"{n_combinations} combinations and {n_scores} scores cannot be meant")
        shapes = Frequencies.shapes(vocabulary, n_combinations)
        n_rows, n_genes, n_shares = shapes["size_mean"][0], len(vocabulary.genes), len(SHARES)
        shapes |= {"centre": (n_rows, hidden_size), "projection": (hidden_size, n_scores)}
        shapes |= {"odds_weights": (n_scores, n_genes), "bin_weights": (n_scores, n_genes)}
        return shapes | {"filters": (n_shares, n_scores, n_scores), "offsets": (n_shares, n_scores)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> Decoder:
        """Read back `tensors`, of the right shapes; a ValueError says what cannot be meant."""
        own = {item.name: tensors[item.name] for item in fields(cls) if item.name != "frequencies"}
        return cls(Frequencies.from_tensors(tensors, vocabulary), **own)


def can_decode(vocabulary: Vocabulary) -> bool:
    """Whether genes of this vocabulary can be asked for: each has a place of its own, and a bin says how much."""
    return vocabulary.position_is_gene and {CLS, START, END} <= set(vocabulary.specials)


def fit_decoder(vectors: Vectors, tokens: sparse.csr_matrix, vocabulary: Vocabulary, *, seed: int = 0) -> Decoder:
    """Fit a decoder to a network and the cells it was trained on.

    Frequencies are counts. Scores are the leading directions of the network's vectors of whole cells around the means of their
    phenotypes. The weights are a logistic and a linear ridge regression of the genes in one random half of each cell on the
    scores of its other half, and the other way round, so that no gene helps to predict itself.

    Parameters
    ----------
    vectors
        The network as a function from token rows to one vector per row.
    tokens
        Token matrix of the training cells.
    vocabulary
        Of the tokens.
    seed
        Of the halves.
    """
    values = phenotype_values(tokens, vocabulary)
    all_levels = level_matrix(tokens, vocabulary)
    frequencies = fit_frequencies(all_levels, values, vocabulary)
    key = random_key(seed, _FITTING)
    if tokens.shape[0] > MOST_CELLS:
        chosen = np.argsort(hash_uniform(key, np.arange(tokens.shape[0]), _SHOW), kind="stable")[:MOST_CELLS]
        tokens, values, all_levels = tokens[chosen], values[chosen], all_levels[chosen]
    levels = all_levels.toarray()
    everything = np.ones(levels.shape, dtype=bool)
    whole = vectors(partial_tokens(levels, everything, vocabulary)).astype(np.float64)
    filled = np.isfinite(whole).all(axis=1) & (levels > 0).any(axis=1)
    values, levels, whole = values[filled], levels[filled], whole[filled]
    order = hash_uniform(key, np.arange(levels.size), _DEAL).reshape(levels.shape)
    rows = frequencies.rows_of(values, vocabulary)
    groups = [np.flatnonzero((rows == row).any(axis=1)) for row in range(1, len(frequencies.size_mean))]
    centre, expected = fit_means(whole, np.ones((len(whole), 1)), groups)
    residual = whole - expected
    n_scores = max(0, min(_MOST_SCORES, len(whole) // 10, residual.shape[1]))
    spread, directions = np.linalg.eigh(residual.T @ residual / max(len(residual), 1))
    spread, directions = spread[::-1][:n_scores], directions[:, ::-1][:, :n_scores]
    projection = directions / np.sqrt(np.maximum(spread, 1e-12))
    scores = residual @ projection
    blank, n_shares = np.zeros((n_scores, levels.shape[1])), len(SHARES)
    filters, offsets = np.zeros((n_shares, n_scores, n_scores)), np.zeros((n_shares, n_scores))
    decoder = Decoder(frequencies, centre, projection, blank, blank, filters, offsets)
    for k, share in enumerate(SHARES):
        seen = decoder.raw_scores(vectors(partial_tokens(levels, order < share, vocabulary)), values, vocabulary)
        there = np.isfinite(seen).all(axis=1)
        offsets[k] = seen[there].sum(axis=0) / max(int(there.sum()), 1)
        filters[k] = _ridge(np.where(there[:, None], seen - offsets[k], 0), scores)
    fitted = _fit_weights(decoder, vectors, levels, order, values, vocabulary)
    odds_weights, bin_weights = (weights.astype(np.float32) for weights in fitted)
    centre, projection, filters, offsets = (
        array.astype(np.float32) for array in (centre, projection, filters, offsets)
    )
    return Decoder(frequencies, centre, projection, odds_weights, bin_weights, filters, offsets)


def _ridge(seen: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the matrix that turns centred scores of parts of cells into expected scores of whole cells."""
    gram = seen.T @ seen
    stiffness = 0.01 * np.trace(gram) / max(len(gram), 1) + 1e-9
    return np.linalg.solve(gram + stiffness * np.eye(len(gram)), seen.T @ scores)


def _fit_weights(
    decoder: Decoder,
    vectors: Vectors,
    levels: np.ndarray,
    order: np.ndarray,
    values: np.ndarray,
    vocabulary: Vocabulary,
) -> tuple[np.ndarray, np.ndarray]:
    """Regress the genes of one half of each cell on the scores of the other, twice."""
    on = levels > 0
    odds, mean = decoder.frequencies.priors(values, on.sum(axis=1), vocabulary)
    halves, shares = [], np.full(len(values), SHARES[_HALF])
    for shown in (order < 0.5, order >= 0.5):
        part = vectors(partial_tokens(levels, shown, vocabulary))
        halves.append((decoder.scores(part, values, shares, vocabulary), ~shown))
    n_scores = decoder.projection.shape[1]
    odds_weights = np.zeros((n_scores, levels.shape[1]))
    variance = decoder.belief(float(SHARES[_HALF]))
    typical, turn = np.linalg.eigh(sum(scores.T @ scores for scores, _ in halves) / 2)
    for _ in range(_NEWTON_STEPS):
        gradient, curvature = -_STIFFNESS * odds_weights, np.zeros(levels.shape[1])
        wide = odds * _widening(odds_weights, variance)
        for scores, asked in halves:
            chance = logistic(wide + scores @ odds_weights)
            gradient += scores.T @ (asked * (on - chance))
            curvature += (asked * chance * (1 - chance)).mean(axis=0)
        odds_weights += _solve(typical, turn, curvature, gradient)
    gradient, curvature = np.zeros((n_scores, levels.shape[1])), np.zeros(levels.shape[1])
    for scores, asked in halves:
        gradient += scores.T @ (asked * on * (levels - mean))
        curvature += (asked * on).mean(axis=0)
    return odds_weights, _solve(typical, turn, curvature, gradient, _BIN_STIFFNESS)


def _widening(odds_weights: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return by what to multiply log odds (genes,) so that, on average over the scores, the probability stays what it was.

    The mean of a logistic function over a normal variable, by the usual approximation.
    """
    return np.sqrt(1 + np.pi / 8 * (variance @ odds_weights**2))


def _solve(
    typical: np.ndarray, turn: np.ndarray, curvature: np.ndarray, gradient: np.ndarray, stiffness: float = _STIFFNESS
) -> np.ndarray:
    """Solve (curvature of the gene x the scores' own + stiffness) w = gradient for every gene at once."""
    return turn @ ((turn.T @ gradient) / (np.maximum(typical, 0)[:, None] * curvature + stiffness))


# ---- rows ----------------------------------------------------------------------------------------------------------------


def partial_tokens(levels: np.ndarray, shown: np.ndarray, vocabulary: Vocabulary) -> sparse.csr_matrix:
    """Return token rows of parts of cells: `[CLS]`, hidden phenotypes, `[START]`, the genes shown, `[END]`.

    Phenotypes are hidden as they are in an embedding; what they say comes in by the frequencies.

    Parameters
    ----------
    levels
        Bin of each gene (cells, genes).
    shown
        Which genes are shown (cells, genes); unexpressed ones get a token only where the encoding keeps zeros.
    vocabulary
        Of the tokens.
    """
    v, first = vocabulary, vocabulary.first_gene_position
    if v.bins is None or v.bins.zeros == "drop":
        shown = shown & (levels > 0)
    rows, genes = np.nonzero(shown)
    counts = np.bincount(rows, minlength=len(levels))
    head = np.array([v.specials[CLS], *([v.mask_id] * len(v.phenotypes)), v.specials[START]])
    places = np.array([0, *(p.position for p in v.phenotypes), first - 1])
    bounds = np.append(0, np.cumsum(counts + len(head) + 1))
    data, indices = np.empty(bounds[-1], dtype=v.dtype), np.empty(bounds[-1], dtype=np.int32)
    fixed = bounds[:-1, None] + np.arange(len(head))
    data[fixed], indices[fixed] = head, places
    data[bounds[1:] - 1], indices[bounds[1:] - 1] = v.specials[END], v.n_positions - 1
    where = np.arange(len(rows)) + (rows + 1) * len(head) + rows
    data[where], indices[where] = v.group_start[genes + first] + levels[rows, genes], genes + first
    return sparse.csr_matrix((data, indices, bounds), (len(levels), v.n_positions))


def phenotype_values(tokens: sparse.csr_matrix, vocabulary: Vocabulary) -> np.ndarray:
    """Return the number of each phenotype's value (cells, phenotypes); -1 where it is missing."""
    out = np.full((tokens.shape[0], len(vocabulary.phenotypes)), -1, dtype=np.int64)
    for n, phenotype in enumerate(vocabulary.phenotypes):
        is_value = (tokens.data >= phenotype.first_id) & (tokens.data < phenotype.stop_id)
        there = np.flatnonzero((tokens.indices == phenotype.position) & is_value)
        cells = np.searchsorted(tokens.indptr, there, side="right") - 1
        out[cells, n] = tokens.data[there].astype(np.int64) - phenotype.first_id
    return out


def level_matrix(tokens: sparse.csr_matrix, vocabulary: Vocabulary) -> sparse.csr_matrix:
    """Return the bin of each expressed gene (cells, genes)."""
    on = vocabulary.is_gene_token(tokens.data) & (tokens.data > vocabulary.group_start[tokens.indices])
    bounds = np.append(0, np.cumsum(on))[tokens.indptr]
    positions = tokens.indices[on]
    levels = (tokens.data[on] - vocabulary.group_start[positions]).astype(np.int32)
    shape = (tokens.shape[0], len(vocabulary.genes))
    return sparse.csr_matrix((levels, positions - vocabulary.first_gene_position, bounds), shape)
