"""Making cells: genes are drawn a part at a time, each part given what the network says of the parts before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.special import ndtri
from tqdm.auto import tqdm

from scbin.data._mask_kernel import hash_uniform
from scbin.data.frequencies import logistic
from scbin.data.masking import random_key
from scbin.nn.decoder import partial_tokens

if TYPE_CHECKING:
    from scbin.data.frequencies import Frequencies
    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.decoder import Decoder, Vectors

# what a random number decides; one stream of numbers each
_COMBINATION, _SIZE, _ORDER, _ON, _LEVEL, _WITHIN, _SCORE = range(7)
_VALUES_AT_ONCE = 2**22  # of cells x genes: bounds the memory; no cell depends on it
_FURTHEST, _HALVINGS = 12.0, 30  # log odds
_SAMPLING = -2  # stands where training has its epoch


def schedule(n_steps: int) -> np.ndarray:
    """Return the share of the genes that are drawn after each step (steps,): few at first, when most is still open.

    Examples
    --------
    >>> schedule(4).round(2)
    array([0.08, 0.29, 0.62, 1.  ])
    """
    return np.append(1 - np.cos(np.pi / 2 * np.arange(1, n_steps) / n_steps), 1.0)


def draw(chances: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return one column per row, drawn by its chances (M, K), which need not sum to one, with numbers in [0, 1) (M,).

    Examples
    --------
    >>> draw(np.array([[0.5, 0.5], [0.1, 0.9]]), np.array([0.4, 0.2]))
    array([0, 1])
    """
    cumulative = np.cumsum(chances.astype(np.float64), axis=1)
    return (uniform[:, None] * cumulative[:, -1:] >= cumulative[:, :-1]).sum(axis=1)


def bin_chances(mean: np.ndarray, spread: np.ndarray, n_bins: int, temperature: float = 1.0) -> np.ndarray:
    """Return the probability (M, n_bins) of each bin above 0: a bell around the mean bin (M,), its spread (M,) in bins."""
    distance = (np.arange(1, n_bins + 1) - mean[:, None]) / spread[:, None]
    log_bell = -(distance**2) / (2 * temperature)
    bell = np.exp(log_bell - log_bell.max(axis=1, keepdims=True))
    return bell / bell.sum(axis=1, keepdims=True)


def choose_values(wanted: np.ndarray, frequencies: Frequencies, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Return the value of every phenotype (cells, phenotypes), drawn where it was left open.

    What is open is drawn together, from the training cells that agree with what is wanted; where there are none, each
    phenotype for itself.

    Parameters
    ----------
    wanted
        Number of the value of each phenotype (cells, phenotypes); -1 where it is open.
    frequencies
        With the combinations of values that there were.
    seed, numbers
        With the number of the cell (cells,) the seed determines the draw.
    """
    values = wanted.copy()
    uniform = hash_uniform(random_key(seed, _SAMPLING), numbers, _COMBINATION)
    table, counts = frequencies.combinations, frequencies.counts.astype(np.float64)
    for pattern in np.unique(wanted, axis=0):
        is_open = pattern < 0
        if not is_open.any():
            continue
        rows = np.flatnonzero((wanted == pattern).all(axis=1))
        agree = (table[:, ~is_open] == pattern[~is_open]).all(axis=1) & (table[:, is_open] >= 0).all(axis=1)
        columns = [np.flatnonzero(is_open)] if agree.any() else [[n] for n in np.flatnonzero(is_open)]
        for column in columns:
            known = agree if agree.any() else (table[:, column] >= 0).all(axis=1)
            if known.any():
                drawn = draw(np.repeat((counts * known)[None], len(rows), axis=0), uniform[rows])
                values[np.ix_(rows, column)] = table[drawn][:, column]
    return values


def held_to(odds: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return log odds (M,) moved alike in each cell until its genes express as many as wanted (cells,), on average."""
    low, high = np.full(len(wanted), -_FURTHEST), np.full(len(wanted), _FURTHEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        few = np.bincount(rows, logistic(odds + middle[rows]), len(wanted)) < wanted
        low, high = np.where(few, middle, low), np.where(few, high, middle)
    return odds + ((low + high) / 2)[rows]


@dataclass(frozen=True, eq=False)
class Sampler:
    """A network with its decoder, and how cells are drawn from them.

    Parameters
    ----------
    vectors
        The network as a function from token rows to one vector per row.
    decoder
        Fitted to it.
    vocabulary
        Of the tokens.
    steps
        Parts in which the genes of a cell are drawn.
    temperature
        Below 1 the likelier is drawn more often still; 1 draws by the probabilities.
    """

    vectors: Vectors
    decoder: Decoder
    vocabulary: Vocabulary
    steps: int = 16
    temperature: float = 1.0

    def sizes(self, values: np.ndarray, seed: int, numbers: np.ndarray) -> np.ndarray:
        """Draw the number of expressed genes of each cell (cells,)."""
        uniform = hash_uniform(random_key(seed, _SAMPLING), numbers, _SIZE)
        normal = ndtri(np.clip(uniform, 1e-4, 1 - 1e-4))
        return self.decoder.frequencies.sizes(values, self.vocabulary, normal)

    def sample(
        self, values: np.ndarray, sizes: np.ndarray, seed: int, numbers: np.ndarray, *, progress: bool = False
    ) -> sparse.csr_matrix:
        """Return the bin of each expressed gene (cells, genes); a cell is a function of (seed, its number) alone.

        Parameters
        ----------
        values
            Number of the value of each phenotype (cells, phenotypes); -1 where it is missing.
        sizes
            Number of genes that each cell is to express, about (cells,).
        seed, numbers
            With the number of the cell (cells,) the seed determines everything drawn.
        progress
            Show a progress bar.
        """
        most = max(1, _VALUES_AT_ONCE // max(1, len(self.vocabulary.genes)))
        parts = np.array_split(np.arange(len(numbers)), max(1, -(-len(numbers) // most)))
        with tqdm(total=len(parts) * self.steps, desc="generating", unit="step", disable=not progress) as bar:
            made = [self._sample(values[part], sizes[part], seed, numbers[part], bar) for part in parts]
        return sparse.csr_matrix(sparse.vstack(made))

    def _sample(
        self, values: np.ndarray, sizes: np.ndarray, seed: int, numbers: np.ndarray, bar: tqdm
    ) -> sparse.csr_matrix:
        shape = (len(numbers), len(self.vocabulary.genes))
        key, n_bins = random_key(seed, _SAMPLING), self.vocabulary.n_levels - 1
        each = (np.asarray(numbers, dtype=np.int64)[:, None] * shape[1] + np.arange(shape[1])).ravel()
        order, is_on, which = (hash_uniform(key, each, what).reshape(shape) for what in (_ORDER, _ON, _LEVEL))
        spreads, n_scores = self.decoder.spread(), self.decoder.projection.shape[1]
        each = (np.asarray(numbers, dtype=np.int64)[:, None] * max(n_scores, 1) + np.arange(n_scores)).ravel()
        chance = ndtri(np.clip(hash_uniform(key, each, _SCORE), 1e-4, 1 - 1e-4)).reshape(len(numbers), n_scores)
        levels = np.zeros(shape, dtype=np.int32)
        ends = schedule(self.steps)
        part_of = np.searchsorted(ends[:-1], order, side="right")
        for step, share in enumerate(np.append(0, ends[:-1])):
            odds, mean = self._ask(levels, part_of < step, values, sizes, share, chance)
            rows, genes = np.nonzero(part_of == step)
            wanted = _share_out(odds, part_of, step, sizes - (levels > 0).sum(axis=1))
            held = held_to(odds[rows, genes], rows, wanted) / self.temperature
            on = is_on[rows, genes] < logistic(held)
            rows, genes = rows[on], genes[on]
            chances = bin_chances(mean[rows, genes], spreads[genes], n_bins, self.temperature)
            levels[rows, genes] = 1 + draw(chances, which[rows, genes])
            bar.update()
        return sparse.csr_matrix(levels)

    def _ask(
        self,
        levels: np.ndarray,
        shown: np.ndarray,
        values: np.ndarray,
        sizes: np.ndarray,
        share: float,
        chance: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return log odds and mean bin of every gene (cells, genes), given the genes shown.

        What these leave open of the scores is up to chance (cells, scores), the same at every step: it decides at first, and
        what the network sees takes over. Without it the genes of one step would not agree with each other.
        """
        scores = np.sqrt(1 - self.decoder.belief(share)) * chance
        if share > 0:
            vectors = self.vectors(partial_tokens(levels, shown, self.vocabulary))
            scores += self.decoder.scores(vectors, values, np.full(len(values), share), self.vocabulary)
        return self.decoder.genes(values, sizes, scores, self.vocabulary)


def _share_out(odds: np.ndarray, part_of: np.ndarray, step: int, left: np.ndarray) -> np.ndarray:
    """Return how many of the genes that a cell has left to express (cells,) are to be among those of a step."""
    chance = logistic(odds)
    still_open = (chance * (part_of >= step)).sum(axis=1)
    return np.maximum(left, 0) * (chance * (part_of == step)).sum(axis=1) / np.maximum(still_open, 1e-12)


def expression_values(levels: sparse.csr_matrix, vocabulary: Vocabulary, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Return a value for each stored bin, drawn evenly within it; the open last bin is as wide as the one before."""
    bins = vocabulary.bins
    if bins is None or bins.n_bins == 1 or bins.per == "cell":
        return vocabulary.token_values[vocabulary.first_gene_id + levels.data]
    edges = np.broadcast_to(bins.matrix, (len(vocabulary.genes), bins.n_bins))
    edges = np.column_stack([edges, 2 * edges[:, -1] - edges[:, -2]])
    rows = np.repeat(np.arange(levels.shape[0]), np.diff(levels.indptr))
    each = np.asarray(numbers, dtype=np.int64)[rows] * levels.shape[1] + levels.indices
    uniform = hash_uniform(random_key(seed, _SAMPLING), each, _WITHIN)
    low, high = edges[levels.indices, levels.data - 1], edges[levels.indices, levels.data]
    return (low + uniform * (high - low)).astype(np.float32)
