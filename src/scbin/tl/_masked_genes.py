"""Masked prediction of genes on held-out cells, beside models of frequency, depth and principal components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.stats import nbinom

from scbin._errors import ScbinInputError
from scbin.nn.counts import CountHead, enough_cells, triples
from scbin.nn.packs import log_normalised, token_expression
from scbin.nn.run import embed, run
from scbin.tl._metrics import gene_scores
from scbin.tl._split import cell_hashes
from scbin.tokens.tokens import MemoryTokens
from scbin.train.randomness import hash_uniform, random_key
from scbin.train.start import components
from scbin.train.task import EVALUATION

if TYPE_CHECKING:
    from scbin.model import Model
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

GENE_MASK = 0.15
_MOST_CELLS, _TOKENS = 2_000, 4_096
_MASKS, _POSITIONS = 21, 2**20  # a stream of random numbers of its own; more than a row has positions
_COMPONENTS, _CELLS_PER_COMPONENT, _PRIOR = 30, 20, 20.0  # the last is the precision of the loadings' prior


@dataclass(frozen=True, eq=False)
class MaskedCells:
    """Cells with some of their genes masked, and what stood there."""

    tokens: MemoryTokens
    rows: np.ndarray  # (M,) row of each masked token
    keys: np.ndarray  # (M,) its gene, or where positions are ranks its rank
    levels: np.ndarray  # (M,) the bin that stood there, or the gene
    starts: np.ndarray  # (M,) first token id of its group

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
    masked = rows.copy()
    masked.data[at] = vocabulary.mask_id
    return MaskedCells(
        MemoryTokens(masked, vocabulary), owner[at], *_levels_of(rows.indices[at], rows.data[at], vocabulary)
    )


def _levels_of(positions: np.ndarray, ids: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, ...]:
    """Return which gene (or rank) some tokens are about, at which level, and where their group starts."""
    positions = positions.astype(np.int64)
    starts = np.asarray(vocabulary.group_start)[positions].astype(np.int64)
    return positions - int(vocabulary.gene_positions[0]), ids - starts, starts


def score_masked_genes(
    model: Model, tokens: Tokens, train: np.ndarray, test: np.ndarray, seed: int, **options: Any
) -> dict[str, dict[str, float]]:
    """Return the scores of the model and of simple models on masked genes of test cells, by method.

    All of them are given only the visible genes, and that the masked genes are expressed (where zeros have no tokens).
    """
    generator, vocabulary = np.random.default_rng(seed), tokens.vocabulary
    train, test = (np.sort(generator.permutation(part)[:_MOST_CELLS]) for part in (train, test))
    shown = MemoryTokens(tokens.take(train), vocabulary)
    learned = mask_cells(shown, np.arange(len(train)), GENE_MASK, seed)
    asked = mask_cells(tokens, test, GENE_MASK, seed)
    if not len(asked.levels):
        raise ScbinInputError("P02", "no gene of a test cell was masked; take more cells.")
    head: Any = model.network.counts
    by_rank = "rank" if vocabulary.unit == "order" else "gene"
    simple = {f"most frequent per {by_rank}": _frequencies(shown.matrix, asked)}
    if vocabulary.unit == "counts":
        counts = token_expression(shown.matrix, vocabulary)
        simple["gene x depth"] = _depth_model(counts, learned, asked, 0, seed)
        simple["gene x depth x PCA scores"] = _depth_model(counts, learned, asked, _COMPONENTS, seed)
    if vocabulary.unit == "counts" and head is not None:
        own = _by_head(head, torch.from_numpy(embed(model.network, asked.tokens, **options)), asked)
    else:
        own = _by_logits(model, asked, options)
    return {method: gene_scores(asked.levels, *found) for method, found in {"scbin": own, **simple}.items()}


def fit_dispersion(
    network: Any, tokens: Tokens, cells: np.ndarray, batches: np.ndarray | None, *, seed: int, device: str
) -> None:
    """Fit how far the counts of every gene spread around what a cell's other genes predict; it hardly moves in training."""
    rng, head = np.random.default_rng(seed), network.counts
    cells = np.sort(rng.permutation(cells)[: enough_cells(len(tokens.vocabulary.genes))])
    shown = MemoryTokens(tokens.take(cells), tokens.vocabulary)
    masked = mask_cells(shown, np.arange(len(cells)), 0.5, seed)
    counts = token_expression(shown.matrix, tokens.vocabulary)
    asked = (counts.toarray() == 0) & (rng.random(counts.shape) < 0.5)  # of the zeros as many
    asked[masked.rows, masked.keys] = True
    vectors = torch.from_numpy(embed(network, masked.tokens, device=device, precision="float32"))
    codes = None if batches is None else torch.from_numpy(batches[cells])
    head.fit_dispersion(head.log_mean(vectors, _log_depth(counts), codes).detach(), counts, asked)


def _log_depth(counts: csr_matrix) -> torch.Tensor:
    """Return the log depth of each cell (cells,)."""
    depth = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    return torch.from_numpy(np.log(depth).astype(np.float32))


# ---- methods: the most probable level of each masked token (M,), and the log probability of the true one (M,) ---------


def _by_logits(model: Model, asked: MaskedCells, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Ask the backbone at the masked tokens."""
    backbone, vocabulary = model.network.backbone, model.vocabulary
    best, logs = np.zeros(len(asked.levels), dtype=np.int64), np.zeros(len(asked.levels))
    bounds = np.searchsorted(asked.rows, np.arange(asked.tokens.n_cells + 1))
    n_levels = int((np.asarray(vocabulary.group_stop) - vocabulary.group_start)[vocabulary.gene_positions].max())
    options = {**options, "token_budget": _TOKENS}  # each of them may have as many logits as there are genes
    for pack, hidden in run(model.network, asked.tokens, label="masked genes", **options):
        own = np.concatenate([np.arange(bounds[cell], bounds[cell + 1]) for cell in pack.cells])
        if not len(own):
            continue
        at_genes = torch.isin(pack.position_ids, torch.as_tensor(vocabulary.gene_positions, device=hidden.device))
        states, starts = hidden[(pack.input_ids == vocabulary.mask_id) & at_genes].float(), asked.starts[own]
        first = int(starts[0])
        ids = torch.from_numpy(starts[:, None] + np.arange(n_levels)).to(hidden.device) if np.ptp(starts) else None
        with torch.inference_mode():
            logits = backbone.logits(states, first, first + n_levels, ids=ids).float().cpu()
            if vocabulary.bins is not None and vocabulary.bins.zeros == "drop":  # all masked genes are expressed
                logits[:, 0] = -torch.inf
        scores = logits.log_softmax(dim=1).numpy()
        best[own], logs[own] = scores.argmax(axis=1), scores[np.arange(len(own)), asked.levels[own]]
    return best, logs


def _frequencies(rows: csr_matrix, asked: MaskedCells) -> tuple[np.ndarray, np.ndarray]:
    """Give each gene its most frequent bin in the training cells, or each rank its most frequent gene."""
    is_gene = asked.tokens.vocabulary.is_gene_token(rows.data)
    keys, levels, _ = _levels_of(rows.indices[is_gene], rows.data[is_gene], asked.tokens.vocabulary)
    shape = tuple(max(both[0].max(), both[1].max()) + 1 for both in ((keys, asked.keys), (levels, asked.levels)))
    table = csr_matrix((np.ones(len(keys)), (keys, levels)), shape=shape)
    sizes, overall = np.asarray(table.sum(axis=1)).ravel(), np.asarray(table.sum(axis=0)).ravel() + 1e-9
    best = np.where(sizes > 0, np.asarray(table.argmax(axis=1)).ravel(), overall.argmax())
    own = np.asarray(table[asked.keys, asked.levels]).ravel() + overall[asked.levels] / overall.sum()
    return best[asked.keys], np.log(own / (sizes[asked.keys] + 1))  # one more, of the average


def _depth_model(
    counts: csr_matrix, learned: MaskedCells, asked: MaskedCells, rank: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a negative binomial of gene times depth, times principal components of the visible genes, to the training cells."""
    before, after = (torch.zeros(each.tokens.n_cells, 1) for each in (learned, asked))
    if rank:
        parts = [log_normalised(each.visible(), asked.tokens.vocabulary) for each in (learned, asked)]
        found = components(parts[0], max(1, min(rank, counts.shape[0] // _CELLS_PER_COMPONENT)), seed=seed)
        scores = [((part - found.means[0]) @ found.directions) / found.spreads for part in parts]
        before, after = (torch.from_numpy(np.asarray(each)).float() for each in scores)
    total = np.asarray(counts.sum(axis=0)).ravel() + 1e-2
    head = CountHead(counts.shape[1], before.shape[1])
    head.bias.data[0] = torch.from_numpy(np.log(total / total.sum()))
    log_depth, molecules = _log_depth(counts), triples(counts)
    learn = [head.bias, head.loadings, head.log_dispersion]
    optimizer = torch.optim.LBFGS(learn, max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        likelihood = head.log_likelihood(head.log_mean(before, log_depth), *molecules)
        loss = -likelihood.mean() + _PRIOR / (2 * len(before)) * head.loadings.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    head.log_dispersion.data.clamp_(-5, 7)
    return _by_head(head, after, asked)


def _by_head(head: CountHead, vectors: torch.Tensor, asked: MaskedCells) -> tuple[np.ndarray, np.ndarray]:
    """Ask a count head, given the vectors of the cells (cells, size).

    The depth of a cell is that at which its visible genes are expected as often as they were seen.
    """
    bins: Any = asked.tokens.vocabulary.bins
    with torch.inference_mode():
        z = vectors.to(head.loadings.device)
        rates = head.log_mean(z, z.new_zeros(len(z))).softmax(dim=1).cpu().numpy()  # up to depth
        size = head.log_dispersion.exp().cpu().numpy().astype(np.float64)[asked.keys, None]
    shown = np.ones(rates.shape, dtype=bool)
    shown[asked.rows, asked.keys] = False
    depth = np.asarray(asked.visible().sum(axis=1)).ravel() / np.maximum((rates * shown).sum(axis=1), 1e-12)
    mu = np.maximum(depth[asked.rows] * rates[asked.rows, asked.keys], 1e-8).astype(np.float64)[:, None]
    # level k holds the counts from ceil(edge k - 1) to below ceil(edge k)
    below = nbinom.cdf(np.ceil(np.asarray(bins.matrix, dtype=np.float64)[0]) - 1, size, size / (size + mu))
    probability = np.maximum(np.diff(below, axis=1, prepend=0, append=1), 1e-12)  # (M, levels)
    if bins.zeros == "drop":
        probability[:, 0] = 0
    probability /= probability.sum(axis=1, keepdims=True)
    true = probability[np.arange(len(probability)), asked.levels]
    return probability.argmax(axis=1), np.log(np.maximum(true, 1e-12))
