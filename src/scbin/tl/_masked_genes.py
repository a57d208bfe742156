"""Masked prediction of genes on held-out cells, beside models of frequency, depth and principal components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.stats import nbinom

from scbin._errors import ScbinInputError
from scbin.nn.counts import CountHead
from scbin.nn.embedding import log_normalised, token_expression
from scbin.nn.run import run
from scbin.tl._leakage import cell_hashes
from scbin.tl._metrics import gene_scores
from scbin.tokens.tokens import MemoryTokens
from scbin.train.randomness import hash_uniform, random_key
from scbin.train.start import components
from scbin.train.task import EVALUATION

if TYPE_CHECKING:
    from scbin.model import Model
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

GENES = "genes"
_MOST_CELLS, _AT_ONCE, _TOKENS = 2_000, 200_000, 4_096
_MASKS, _POSITIONS = 21, 2**20  # a stream of random numbers of its own; more than a row has positions
_COMPONENTS, _CELLS_PER_COMPONENT, _PRIOR, _STEPS = 30, 20, 20.0, 30  # precision of the loadings' prior; steps of LBFGS


@dataclass(frozen=True, eq=False)
class MaskedCells:
    """Cells with some of their genes masked, and what stood there."""

    tokens: MemoryTokens
    rows: np.ndarray  # (M,) row of each masked token
    keys: np.ndarray  # (M,) its gene, or where positions are ranks its rank
    levels: np.ndarray  # (M,) the bin that stood there, or the gene
    starts: np.ndarray  # (M,) first token id of its group
    n_levels: int

    def visible(self) -> csr_matrix:
        """Return the expression of the genes that are not masked (cells, genes)."""
        return token_expression(self.tokens.matrix, self.tokens.vocabulary)


def mask_cells(tokens: Tokens, cells: np.ndarray, fraction: float, seed: int) -> MaskedCells:
    """Mask a fraction of the genes of some cells, as a function of the seed and the tokens of each cell alone."""
    rows, vocabulary = tokens.take(np.asarray(cells)).tocsr(), tokens.vocabulary
    owner = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    items = (cell_hashes(rows, vocabulary)[owner] % np.uint64(2**40)).astype(np.int64) * _POSITIONS + rows.indices
    drawn = hash_uniform(np.uint64(random_key(seed, EVALUATION)), items, _MASKS) < fraction
    at = np.flatnonzero(drawn & vocabulary.is_gene_token(rows.data))
    keys, levels, starts, n_levels = _levels_of(rows.indices[at], rows.data[at], vocabulary)
    masked = rows.copy()
    masked.data[at] = vocabulary.mask_id
    return MaskedCells(MemoryTokens(masked, vocabulary), owner[at], keys, levels, starts, n_levels)


def _levels_of(positions: np.ndarray, ids: np.ndarray, vocabulary: Vocabulary) -> tuple[Any, ...]:
    """Return which gene (or rank) some tokens are about, at which level, where their group starts, and its size."""
    positions = positions.astype(np.int64)
    starts = np.asarray(vocabulary.group_start)[positions].astype(np.int64)
    sizes = np.asarray(vocabulary.group_stop)[positions] - starts
    return positions - int(vocabulary.gene_positions[0]), ids - starts, starts, sizes.max(initial=1)


def score_masked_genes(
    model: Model, tokens: Tokens, train: np.ndarray, test: np.ndarray, fraction: float, seed: int, **options: Any
) -> dict[str, dict[str, float]]:
    """Return the scores of the model and of simple models on masked genes of test cells, by method.

    All hear of the visible genes alone, and of masked genes that they are expressed (where zeros have no tokens).
    """
    generator, vocabulary, head = np.random.default_rng(seed), tokens.vocabulary, model.network.counts
    train, test = (np.sort(generator.permutation(part)[:_MOST_CELLS]) for part in (train, test))
    asked = mask_cells(tokens, test, fraction, seed)
    if not len(asked.levels):
        raise ScbinInputError("P02", "no gene of a test cell was masked; take more cells or a larger gene_mask.")
    learned, counts = mask_cells(tokens, train, fraction, seed), vocabulary.unit == "counts"
    by_rank = "gene" if vocabulary.unit != "order" else "rank"
    found = {"scbin": (_by_counts if counts and head is not None else _by_logits)(model, asked, options)}
    found[f"most frequent per {by_rank}"] = _frequencies(tokens.take(train).tocsr(), asked)
    if counts:
        matrix = token_expression(tokens.take(train), vocabulary)
        found["gene x depth"] = _depth_model(matrix, learned, asked, 0, seed)
        found["gene x depth x PCA scores"] = _depth_model(matrix, learned, asked, _COMPONENTS, seed)
    return {method: gene_scores(asked.levels, best, logs) for method, (best, logs) in found.items()}


# ---- methods: the most probable level of each masked token (M,), and the log probability of the true one (M,) ---------


def _by_counts(model: Model, asked: MaskedCells, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ask the count head."""
    network: Any = model.network
    rates = np.zeros((asked.tokens.n_cells, len(asked.tokens.vocabulary.genes)), dtype=np.float32)
    for pack, hidden in run(network, asked.tokens, layer=network.vector.layer, label="masked genes", **options):
        with torch.inference_mode():
            z = network.vector(hidden, pack)
            rates[pack.cells] = network.counts.log_mean(z, z.new_zeros(len(z))).cpu().numpy()
    return _levels(rates, network.counts.log_dispersion.detach().exp().cpu().numpy(), asked)


def _by_logits(model: Model, asked: MaskedCells, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ask the backbone at the masked tokens."""
    backbone, vocabulary = model.network.backbone, model.vocabulary
    best, logs = np.zeros(len(asked.levels), dtype=np.int64), np.zeros(len(asked.levels))
    bounds = np.searchsorted(asked.rows, np.arange(asked.tokens.n_cells + 1))
    options = {**options, "token_budget": _TOKENS}  # each of them may have as many logits as there are genes
    drops_zeros = vocabulary.bins is not None and vocabulary.bins.zeros == "drop"
    for pack, hidden in run(model.network, asked.tokens, label="masked genes", **options):
        own = np.concatenate([np.arange(bounds[cell], bounds[cell + 1]) for cell in pack.cells])
        if not len(own):
            continue
        at_genes = torch.isin(pack.position_ids, torch.as_tensor(vocabulary.gene_positions, device=hidden.device))
        states = hidden[(pack.input_ids == vocabulary.mask_id) & at_genes].float()
        starts, n = asked.starts[own], asked.n_levels
        differ, ids = (starts != starts[0]).any(), torch.from_numpy(starts[:, None] + np.arange(n)).to(hidden.device)
        with torch.inference_mode():
            logits = (
                backbone.logits(states, int(starts[0]), int(starts[0]) + n, ids=ids if differ else None).float().cpu()
            )
            if drops_zeros:  # all masked genes are expressed
                logits[:, 0] = -torch.inf
        scores = logits.log_softmax(dim=1).numpy()
        best[own], logs[own] = scores.argmax(axis=1), scores[np.arange(len(own)), asked.levels[own]]
    return best, logs


def _frequencies(rows: csr_matrix, asked: MaskedCells) -> tuple[np.ndarray, np.ndarray]:
    """Give each gene its most frequent bin in the training cells, or each rank its most frequent gene."""
    vocabulary = asked.tokens.vocabulary
    is_gene, positions = vocabulary.is_gene_token(rows.data), vocabulary.gene_positions
    keys, levels, *_ = _levels_of(rows.indices[is_gene], rows.data[is_gene], vocabulary)
    shape = (int(positions[-1] - positions[0]) + 1, asked.n_levels)
    table = csr_matrix((np.ones(len(keys)), (keys, levels)), shape=shape)
    overall = np.asarray(table.sum(axis=0)).ravel() + 1e-9
    overall /= overall.sum()
    sizes = np.asarray(table.sum(axis=1)).ravel()
    best = np.where(sizes > 0, np.asarray(table.argmax(axis=1)).ravel(), overall.argmax())
    own = np.asarray(table[asked.keys, asked.levels]).ravel()
    return best[asked.keys], np.log((own + overall[asked.levels]) / (sizes[asked.keys] + 1))  # one more, of the average


def _depth_model(
    counts: csr_matrix, learned: MaskedCells, asked: MaskedCells, rank: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a negative binomial of gene times depth, times principal components of the visible genes, to the training cells."""
    parts = [log_normalised(each.visible(), asked.tokens.vocabulary) for each in (learned, asked)]
    before, after = (torch.zeros(part.shape[0], 1) for part in parts)
    if rank:
        found = components(parts[0], max(1, min(rank, counts.shape[0] // _CELLS_PER_COMPONENT)), seed=seed)
        scores = [((part - found.means[0]) @ found.directions) / found.spreads for part in parts]
        before, after = (torch.from_numpy(np.asarray(each)).float() for each in scores)
    depth = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    total = np.asarray(counts.sum(axis=0)).ravel() + 1e-2
    head = CountHead(counts.shape[1], before.shape[1])
    head.bias.data[0] = torch.from_numpy(np.log(total / total.sum()))
    rows, genes = (torch.from_numpy(each.astype(np.int64)) for each in counts.nonzero())
    values = torch.from_numpy(counts.data).float()
    log_depth = torch.from_numpy(np.log(depth)).float()
    learn = [head.bias, head.loadings, head.log_dispersion]
    optimizer = torch.optim.LBFGS(learn, max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        likelihood = head.log_likelihood(head.log_mean(before, log_depth), rows, genes, values)
        loss = -likelihood.mean() + _PRIOR / (2 * len(depth)) * head.loadings.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        rates = head.log_mean(after, torch.zeros(len(after))).numpy()
        return _levels(rates, head.log_dispersion.clamp(-5, 7).exp().numpy(), asked)


def _levels(log_rates: np.ndarray, theta: np.ndarray, asked: MaskedCells) -> tuple[np.ndarray, np.ndarray]:
    """Turn log rates (cells, genes) into the most probable level of each masked gene, under a negative binomial.

    The depth of a cell is that at which its visible genes are expected as often as they were seen.
    """
    bins = asked.tokens.vocabulary.bins
    if bins is None:
        raise ScbinInputError("V02", "these tokens have no bins of counts.")
    rates, visible = np.exp(log_rates), asked.visible()
    shown = np.ones(rates.shape, dtype=bool)
    shown[asked.rows, asked.keys] = False
    depth = np.asarray(visible.sum(axis=1)).ravel() / np.maximum((rates * shown).sum(axis=1), 1e-12)
    mu = np.maximum(depth[asked.rows] * rates[asked.rows, asked.keys], 1e-8).astype(np.float64)
    size = theta[asked.keys].astype(np.float64)
    # level k holds the counts from ceil(edge k - 1) to below ceil(edge k)
    lower = np.ceil(np.asarray(bins.matrix, dtype=np.float64)[0])
    best, logs = np.zeros(len(mu), dtype=np.int64), np.zeros(len(mu))
    for first in range(0, len(mu), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        n, p = size[part, None], size[part, None] / (size[part, None] + mu[part, None])
        below = np.pad(nbinom.cdf(lower - 1, n, p), ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1)))
        probability = np.maximum(np.diff(below, axis=1), 1e-12)
        if bins.zeros == "drop":
            probability[:, 0] = 0
        probability /= probability.sum(axis=1, keepdims=True)
        best[part] = probability.argmax(axis=1)
        logs[part] = np.log(np.maximum(probability[np.arange(len(probability)), asked.levels[part]], 1e-12))
    return best, logs
