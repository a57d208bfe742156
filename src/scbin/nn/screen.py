"""Effects of many edits of a cell at once: gates on its tokens, and gradients instead of forwards.

Give every token a gate g that scales how much it is attended to (log g is added to the scores of its key) and how much it counts
in the cell's vector. At g = 1 nothing changes, at g = 0 the token is not there. Where a position is a gene, taking a gene out
closes a gate and putting it in, or into another bin, opens one. What a gate does to the mean over tokens is written down
exactly; what it does through attention is its gradient, along the few directions that matter. Where positions are ranks, a deletion
also moves the later genes: that is computed exactly at a few ranks and interpolated between them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from scbin.data.packing import make_pack, plan_packs
from scbin.encoding.edits import Edit, GeneRows, level_ids, new_levels
from scbin.nn.attention import pack_layout, to_device
from scbin.nn.bert import encode_pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scbin.nn.perturbation import RowEncoder

OPENING = (
    1e-3  # share of a cell's attention that all closed gates together may get: not seen in float32, but has a gradient
)
N_NODES = 16  # ranks at which the shift of the later genes is computed exactly


def can_screen(rows: GeneRows, edit: Edit, genes: np.ndarray) -> bool:
    """Whether there is a screen for these edits: single genes, and only deletions where tokens are ranked."""
    return genes.shape[1] == 1 and (rows.vocabulary.position_is_gene or edit.mode == "delete")


@dataclass(frozen=True, eq=False)
class Gated:
    """Cells with the tokens that edits would bring laid behind their own, and what each edit opens and closes."""

    tokens: sparse.csr_matrix  # (cells, positions): columns are not unique, an edited gene stands there twice
    own: np.ndarray  # (cells,) tokens of each row that are its own; the others have closed gates
    old: np.ndarray  # (pairs,) token that the edit takes out, as place in tokens.data; -1: none
    new: np.ndarray  # (pairs,) token that it brings in; -1: none
    changed: np.ndarray  # (pairs,)


def gate_edits(rows: GeneRows, edit: Edit, cells: np.ndarray, which: np.ndarray, genes: np.ndarray) -> Gated:
    """Lay out cells and edits of one gene each.

    Parameters
    ----------
    rows
        The token rows.
    edit
        What is done.
    cells
        Rows to lay out (cells,).
    which, genes
        For each pair, the place of its cell in `cells`, in increasing order, and the gene.
    """
    vocabulary = rows.vocabulary
    ids, positions, _, bounds = rows.take(cells)
    at, level = rows.find(cells[which], genes)
    old = np.where(at >= 0, at - rows.tokens.indptr[cells].astype(np.int64)[which] + bounds[which], -1)
    if vocabulary.bins is None:
        new, comes = np.zeros_like(level), np.zeros(len(which), dtype=bool)
        changed = old >= 0
    else:
        new = new_levels(vocabulary, edit, genes, level)
        changed = new != level
        comes = changed & ((new > 0) | (vocabulary.bins.zeros == "keep"))
    n_new = np.bincount(which[comes], minlength=len(cells))
    starts = np.concatenate([[0], np.cumsum(np.diff(bounds) + n_new)])
    own_at = np.arange(len(ids)) + np.repeat(starts[:-1] - bounds[:-1], np.diff(bounds))
    before = np.concatenate([[0], np.cumsum(n_new)])[:-1]
    new_at = np.full(len(which), -1)
    new_at[comes] = (starts[:-1] + np.diff(bounds) - before)[which[comes]] + np.arange(comes.sum())
    data, indices = np.empty(starts[-1], dtype=np.int64), np.empty(starts[-1], dtype=np.int64)
    data[own_at], indices[own_at] = ids, positions
    data[new_at[comes]] = level_ids(vocabulary, genes, new)[comes]
    indices[new_at[comes]] = vocabulary.first_gene_position + genes[comes]
    shift = np.repeat(starts[:-1] - bounds[:-1], np.diff(bounds))
    old = np.where(changed & (old >= 0), old + shift[np.maximum(old, 0)] if len(shift) else old, -1)
    shape = (len(cells), vocabulary.n_positions)
    return Gated(sparse.csr_matrix((data, indices, starts), shape=shape), np.diff(bounds), old, new_at, changed)


def screen_vectors(
    encoder: RowEncoder,
    rows: GeneRows,
    edit: Edit,
    cells: np.ndarray,
    genes: np.ndarray,
    directions: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Estimate the vectors of edited cells: one forward and one gradient for each direction, for all edits of a cell.

    Parameters
    ----------
    encoder
        The network, entered.
    rows
        The cells.
    edit
        What is done.
    cells, genes
        The pairs, sorted by cell (pairs,).
    directions
        From rows and their vectors (cells, H), the orthonormal directions (cells, R, H) along which attention may move them.

    Yields
    ------
    Places of the pairs, vectors of their cells before and after (pairs, H), and which pairs the edit changes.
    """
    distinct, first, n_pairs = np.unique(cells, return_index=True, return_counts=True)
    more = (
        0
        if edit.mode == "delete" and (rows.vocabulary.bins is None or rows.vocabulary.bins.zeros == "drop")
        else n_pairs
    )
    lengths = np.diff(rows.tokens.indptr)[distinct] + more
    with _frozen(encoder):
        for chosen in plan_packs(lengths, encoder.token_budget):
            pairs = np.concatenate([np.arange(first[c], first[c] + n_pairs[c]) for c in chosen])
            which = np.repeat(np.arange(len(chosen)), n_pairs[chosen])
            gated = gate_edits(rows, edit, distinct[chosen], which, genes[pairs])
            before, after = _through_gates(encoder, gated, which, partial(directions, distinct[chosen]))
            if not rows.vocabulary.position_is_gene:
                after += _rank_shifts(encoder, rows, distinct[chosen], which, genes[pairs], before)
            yield pairs, before[which], after, gated.changed


def _through_gates(
    encoder: RowEncoder, gated: Gated, which: np.ndarray, directions: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of cells (cells, H), and of their edits (pairs, H), without the shift of ranks."""
    device, n_cells = encoder.device, gated.tokens.shape[0]
    pack = make_pack(gated.tokens, np.arange(n_cells))
    layout = pack_layout(pack.cu_seqlens, device)
    row = np.repeat(np.arange(n_cells), pack.lengths)
    is_own = np.arange(pack.n_tokens) - pack.cu_seqlens[:-1][row] < gated.own[row]
    closed = OPENING / np.maximum(pack.lengths - gated.own, 1)  # (cells,) gates of what is not there yet
    gates = to_device(np.where(is_own, 0.0, np.log(closed)[row]).astype(np.float32), device).requires_grad_()
    weights = encoder.weights.of(pack.input_ids, pack.position_ids).astype(np.float64)
    totals = np.bincount(row, weights * is_own, n_cells)
    shares = to_device((weights * is_own / np.maximum(totals, 1e-12)[row]).astype(np.float32), device)
    with torch.enable_grad(), torch.autocast(device.type, encoder.dtype, enabled=encoder.dtype != torch.float32):
        ids, positions = to_device(pack.input_ids, device), to_device(pack.position_ids, device)
        hidden = encode_pack(encoder.bert, ids, positions, layout, encoder.layer, key_bias=gates).float()
        parts = zip(shares.split(layout.lengths), hidden.split(layout.lengths), strict=True)
        z = torch.stack([share @ part for share, part in parts])  # (cells, H)
        vectors = z.detach().cpu().numpy()
        bases = directions(vectors)  # (cells, R, H)
        turned = (z[:, None] * to_device(bases.astype(np.float32), device)).sum(dim=2)  # (cells, R)
        n_directions = turned.shape[1]
        slopes = np.zeros((pack.n_tokens, n_directions))
        for r in range(n_directions):
            (slope,) = torch.autograd.grad(turned[:, r].sum(), gates, retain_graph=r + 1 < n_directions)
            slopes[:, r] = slope.cpu().numpy()
    slopes /= np.where(is_own, 1.0, closed[row])[:, None]
    slopes = np.append(slopes, np.zeros((1, n_directions)), axis=0)  # place -1: no token
    states = np.append(hidden.detach().cpu().numpy(), np.zeros((1, hidden.shape[1]), np.float32), axis=0)
    weights = np.append(weights, 0.0)
    out, into = weights[gated.old][:, None], weights[gated.new][:, None]
    left = totals[which][:, None] - out + into
    with np.errstate(invalid="ignore", divide="ignore"):
        pooled = (totals[which][:, None] * vectors[which] - out * states[gated.old] + into * states[gated.new]) / left
    pooled[(left <= 1e-9 * totals[which][:, None])[:, 0]] = np.nan  # nothing is left to be read
    moved = slopes[gated.new] - slopes[gated.old]  # (pairs, R)
    return vectors, pooled + np.einsum("pr,prh->ph", moved, bases[which])


def _rank_shifts(
    encoder: RowEncoder, rows: GeneRows, cells: np.ndarray, which: np.ndarray, genes: np.ndarray, vectors: np.ndarray
) -> np.ndarray:
    """How cells move (pairs, H) when all that stands behind a gene moves up one rank: exact at nodes, linear between."""
    first = rows.vocabulary.first_gene_position
    at, _ = rows.find(cells[which], genes)
    rank = rows.tokens.indices[at].astype(np.int64) - first
    nodes = [np.unique(np.linspace(0, n - 1, min(N_NODES, n)).round().astype(np.int64)) for n in rows.n_genes[cells]]
    owner = np.repeat(np.arange(len(cells)), [len(node) for node in nodes])
    node = np.concatenate(nodes)
    ids, positions, pair, bounds = rows.take(cells[owner])
    positions = positions - (positions > first + node[pair])
    moved = sparse.csr_matrix((ids, positions, bounds), shape=(len(node), rows.tokens.shape[1]))
    shifts = encoder.vectors(moved) - vectors[owner]
    starts = np.concatenate([[0], np.cumsum([len(one) for one in nodes])])
    result = np.empty((len(which), shifts.shape[1]), dtype=np.float64)
    for c in range(len(cells)):
        part, mine = slice(starts[c], starts[c + 1]), which == c
        above = np.clip(np.searchsorted(nodes[c], rank[mine], side="right"), 1, max(len(nodes[c]) - 1, 1))
        low, high = np.maximum(above - 1, 0), np.minimum(above, len(nodes[c]) - 1)
        span = np.maximum(nodes[c][high] - nodes[c][low], 1)
        share = ((rank[mine] - nodes[c][low]) / span)[:, None]
        result[mine] = (1 - share) * shifts[part][low] + share * shifts[part][high]
    return result


@contextmanager
def _frozen(encoder: RowEncoder) -> Iterator[None]:
    """Take the weights out of the gradients for a while."""
    trained = [parameter for parameter in encoder.bert.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
