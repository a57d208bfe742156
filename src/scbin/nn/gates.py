"""Effects of many edits of a cell at once: gates on its tokens, and gradients instead of forwards.

Give every token a gate g that scales how much attention it receives (log g is added to the scores of its key) and how much it
counts in the cell's vector. At g = 1 nothing changes, at g = 0 the token is not there. Where a position is a gene, taking a gene
out closes a gate, and putting it in, or into another bin, opens one. The gradient of the cell's vector with respect to the gates,
along the few directions that matter, says for all genes at once how far they move the cell. What a gate does to a weighted mean
over tokens is written down exactly. Where positions are ranks a deletion also moves the later genes up: that is computed exactly
at a few ranks and interpolated between them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.interpolate import make_interp_spline

from scbin.nn.attention import to_device
from scbin.nn.packs import make_pack, plan_packs
from scbin.nn.run import embed
from scbin.nn.vector import PooledVector, pool
from scbin.tokens.edits import edit_rows, new_levels
from scbin.tokens.tokens import MemoryTokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scbin.nn.network import CellNetwork
    from scbin.nn.run import Runner
    from scbin.tokens.edits import Edit, GeneRows

    # rows and their vectors to (cells, R, size), orthonormal
    Directions = Callable[[np.ndarray, np.ndarray], np.ndarray]

OPENING = 1e-3  # attention that all closed gates of a cell together may get: not seen in float32, but has a gradient
N_NODES = 16  # ranks at which the shift of the later genes is computed exactly
N_SAMPLE = 64  # edits made exactly to find the directions in which cells move
MOST_DIRECTIONS = 16
LEFT_OUT = 0.06  # share of the edits' movement that may lie outside of the directions; half of it takes twice as many
LEFT_OUT_RANKED = 0.03  # where ranks are, their shift costs more than the directions


def can_screen(network: CellNetwork, rows: GeneRows, edit: Edit, sets: np.ndarray) -> bool:
    """Whether there is a screen: of single genes, only for deletions where tokens are ranked, of vectors that take gates."""
    takes_gates = "gates" in inspect.signature(network.vector.forward).parameters
    return takes_gates and sets.shape[1] == 1 and (rows.vocabulary.position_is_gene or edit.mode == "delete")


@dataclass(frozen=True, eq=False)
class Screen:
    """Edits of single genes in cells, whose effects are estimated from one forward and a few gradients of each cell."""

    runner: Runner
    rows: GeneRows
    edit: Edit
    token_budget: int = 32_768

    def estimate(
        self, cells: np.ndarray, genes: np.ndarray, directions: Directions | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Estimate the vectors of edited cells: one gradient for each direction, for all edits of a cell.

        `cells` and `genes` are the pairs, sorted by cell; along no `directions` only the mean over tokens changes. Yields places of
        the pairs, vectors of their cells before and after (pairs, size), and which pairs the edit changes.
        """
        rows = self.rows
        distinct, first, n_pairs = np.unique(cells, return_index=True, return_counts=True)
        only_out = self.edit.mode == "delete" and not rows.vocabulary.keeps_zeros
        lengths = np.diff(rows.tokens.indptr)[distinct] + (0 if only_out else n_pairs)
        for chosen in plan_packs(lengths, self.token_budget):
            pairs = np.concatenate([np.arange(first[c], first[c] + n_pairs[c]) for c in chosen])
            which, own = np.repeat(np.arange(len(chosen)), n_pairs[chosen]), distinct[chosen]
            gated = gate_edits(rows, self.edit, own, which, genes[pairs])
            before, after = _through_gates(self.runner, gated, which, own, directions)
            if not rows.vocabulary.position_is_gene:
                after += self._rank_shifts(own, which, genes[pairs], before)
            yield pairs, before[which], after, gated.changed

    def directions(self, cells: np.ndarray, genes: np.ndarray, originals: np.ndarray, *, seed: int) -> Directions:
        """Find the directions in which edits move cells beyond the mean over tokens, from a few edits made exactly.

        They are few, and taken to be the same for all cells: the principal axes of the difference between exact vectors and those
        in which the mean over tokens alone has changed.
        """
        drawn = np.sort(np.random.default_rng(seed).choice(len(cells), min(N_SAMPLE, len(cells)), replace=False))
        cells, genes = cells[drawn], genes[drawn]
        exact = self._embed(edit_rows(self.rows, self.edit, cells, genes).tokens)
        pooled = np.empty(exact.shape)
        for pairs, _, after, _ in self.estimate(cells, genes, None):
            pooled[pairs] = after
        known = np.isfinite(exact).all(axis=1) & np.isfinite(pooled).all(axis=1)
        moved = float(((exact - originals[cells])[known] ** 2).sum())
        _, lengths, axes = np.linalg.svd((exact - pooled)[known], full_matrices=False)
        left = np.append(np.cumsum(lengths[::-1] ** 2)[::-1], 0.0)  # squared length beyond the first k axes
        most = LEFT_OUT if self.rows.vocabulary.position_is_gene else LEFT_OUT_RANKED
        cap = MOST_DIRECTIONS if isinstance(self.runner.network.vector, PooledVector) else 2 * MOST_DIRECTIONS
        axes = axes[: min(int(np.argmax(left <= most**2 * moved)), cap)]
        return lambda at, vectors: np.broadcast_to(axes, (len(at), *axes.shape))

    def _rank_shifts(self, cells: np.ndarray, which: np.ndarray, genes: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Return how pairs move (pairs, size) when all that stands behind a gene moves up one rank: exact at nodes, else linear."""
        rows, first = self.rows, self.rows.vocabulary.first_gene_position
        at, _ = rows.find(cells[which], genes)
        rank = rows.tokens.indices[at].astype(np.int64) - first
        nodes = [np.unique(np.linspace(0, n - 1, min(N_NODES, n)).round().astype(int)) for n in rows.n_genes[cells]]
        owner = np.repeat(np.arange(len(cells)), [len(node) for node in nodes])
        ids, positions, pair, bounds = rows.take(cells[owner])
        positions = positions - (positions > first + np.concatenate(nodes)[pair])
        moved = sparse.csr_matrix((ids, positions, bounds), shape=(len(owner), rows.tokens.shape[1]))
        shifts = self._embed(moved) - vectors[owner]
        result = np.empty((len(which), shifts.shape[1]))
        for c, node in enumerate(nodes):
            line = make_interp_spline(node, shifts[owner == c], k=min(1, len(node) - 1))
            result[which == c] = line(rank[which == c])
        return result

    def _embed(self, tokens: sparse.csr_matrix) -> np.ndarray:
        """Return the vectors of some token rows (rows, size)."""
        precision: Any = str(self.runner.dtype).removeprefix("torch.")
        how: dict[str, Any] = {"device": str(self.runner.device), "token_budget": self.token_budget}
        return embed(self.runner.network, MemoryTokens(tokens, self.rows.vocabulary), precision=precision, **how)


class Gated(NamedTuple):
    """Cells with the tokens that edits would bring laid behind their own, and what each edit opens and closes."""

    tokens: sparse.csr_matrix  # (cells, positions): columns are not unique, an edited gene stands there twice
    own: np.ndarray  # (cells,) tokens of each row that are its own; the others have closed gates
    old: np.ndarray  # (pairs,) token that the edit takes out, as place in tokens.data; -1: none
    new: np.ndarray  # (pairs,) token that it brings in; -1: none
    changed: np.ndarray  # (pairs,)


def gate_edits(rows: GeneRows, edit: Edit, cells: np.ndarray, which: np.ndarray, genes: np.ndarray) -> Gated:
    """Lay out cells (cells,) and edits of one gene each; `which` is the place of each pair's cell, in increasing order."""
    vocabulary = rows.vocabulary
    ids, positions, _, bounds = rows.take(cells)
    at, level = rows.find(cells[which], genes)
    old = np.where(at >= 0, at - rows.tokens.indptr[cells].astype(np.int64)[which] + bounds[which], -1)
    if not vocabulary.position_is_gene:
        new, comes, changed = np.zeros_like(level), np.zeros(len(which), dtype=bool), old >= 0
    else:
        new = new_levels(vocabulary, edit, level, rows.highest[cells[which]])
        changed = new != level
        comes = changed & ((new > 0) | vocabulary.keeps_zeros)
    n_own, n_new = np.diff(bounds), np.bincount(which[comes], minlength=len(cells))
    starts = np.concatenate([[0], np.cumsum(n_own + n_new)])
    moved = starts[:-1] - bounds[:-1]  # by how many places each cell's own tokens go back
    own_at = np.arange(len(ids)) + np.repeat(moved, n_own)
    before = np.concatenate([[0], np.cumsum(n_new)])[:-1]
    new_at = np.full(len(which), -1)
    new_at[comes] = (starts[:-1] + n_own - before)[which[comes]] + np.arange(comes.sum())
    data, indices = np.empty((2, starts[-1]), dtype=np.int64)
    data[own_at], indices[own_at] = ids, positions
    data[new_at[comes]] = vocabulary.ids_of(genes, new)[comes]
    indices[new_at[comes]] = vocabulary.first_gene_position + genes[comes]
    old = np.where(changed & (old >= 0), old + moved[which], -1)
    tokens = sparse.csr_matrix((data, indices, starts), shape=(len(cells), vocabulary.n_positions))
    return Gated(tokens, n_own, old, new_at, changed)


def _through_gates(
    runner: Runner, gated: Gated, which: np.ndarray, cells: np.ndarray, directions: Directions | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of cells (cells, size) and of their edits (pairs, size), without the shift of ranks."""
    vector: Any = runner.network.vector
    device = runner.device
    lengths = np.diff(gated.tokens.indptr)
    row = np.repeat(np.arange(len(cells)), lengths)
    pack = make_pack(gated.tokens.data, gated.tokens.indices, lengths, cells, device)
    is_own = np.arange(len(row)) - gated.tokens.indptr[:-1][row] < gated.own[row]
    closed = np.where(is_own, 1.0, (OPENING / np.maximum(lengths - gated.own, 1))[row])
    gates = to_device(np.log(closed).astype(np.float32), device).requires_grad_()
    pooled = isinstance(vector, PooledVector)
    with torch.enable_grad():
        hidden = runner(pack, vector.layer, gates=gates).float()
        if pooled:
            weights = vector.weights[pack.input_ids]
            z = pool(hidden, pack, weights * to_device(is_own.astype(np.float32), device))
        else:
            z = vector(hidden, pack, gates=gates).float()
        before = z.detach().cpu().numpy().astype(np.float64)  # (cells, size)
        bases = np.zeros((len(cells), 0, z.shape[1])) if directions is None else directions(cells, before)
        along = (z[:, None] * to_device(bases.astype(np.float32), device)).sum(dim=(0, 2)) + 0 * gates.sum()  # (R,)
        slopes = np.zeros((len(row) + 1, len(along)))  # the last one, place -1, is no token
        for r, each in enumerate(along):
            slopes[:-1, r] = torch.autograd.grad(each, gates, retain_graph=True)[0].cpu().numpy() / closed
    after = before[which] + np.einsum("pr,prh->ph", slopes[gated.new] - slopes[gated.old], bases[which])
    if pooled:
        own_weights = weights.double().cpu().numpy()
        totals = np.bincount(row, own_weights * is_own, len(cells))[which][:, None]
        states = np.append(hidden.detach().cpu().numpy(), np.zeros((1, hidden.shape[1]), np.float32), axis=0)
        own_weights = np.append(own_weights, 0.0)
        out, into = own_weights[gated.old][:, None], own_weights[gated.new][:, None]
        left = totals - out + into
        away = out * (states[gated.old] - before[which])  # what leaves and comes, seen from the mean
        after += (into * (states[gated.new] - before[which]) - away) / np.where(left > 1e-9 * totals, left, np.nan)
    return before, after
