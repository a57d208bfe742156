"""Cells of different batches brought together: mutual nearest neighbours on the cell vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse
from sklearn.neighbors import NearestNeighbors
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scbin.tokens.vocabulary import Vocabulary

MOST_CELLS, MOST_ANCHORS = 10_000, 4_000  # that are compared; that are remembered
MUTUAL, NEAR, ROUNDS = 20, 80, 5  # many pairs: a way that cells of a kind share, not that of one of them


class BatchCorrection(nn.Module):
    """Moves cell vectors to where their kind lies in the other batches.

    Cells of two batches that are mutual nearest neighbours are taken for the same kind; each moves half the way to its
    partners, and the cells around it move along, a few times over. A kind that one batch lacks has no partners and stays
    (Haghverdi et al. 2018). What is remembered are a few thousand cells and how far each moved: any cell moves as those of
    its batch that lie near it.
    """

    kind = "mutual"
    centre: Tensor
    anchors: Tensor
    moves: Tensor
    codes: Tensor

    def __init__(self, n_anchors: int, size: int, batches: Sequence[str]):
        super().__init__()
        self.batches = tuple(str(name) for name in batches)
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("anchors", torch.zeros(n_anchors, size))
        self.register_buffer("moves", torch.zeros(n_anchors, size))
        self.register_buffer("codes", torch.zeros(n_anchors, dtype=torch.int64))

    def config(self) -> dict[str, Any]:
        """Return plain values from which `from_config` builds the same module."""
        return {"n_anchors": len(self.anchors), "size": len(self.centre), "batches": list(self.batches)}

    @classmethod
    def from_config(cls, vocabulary: Vocabulary, config: dict[str, Any]) -> BatchCorrection:
        """Build the module that `config` describes, without what it remembers."""
        return cls(**config)

    @classmethod
    def fit(cls, vectors: np.ndarray, codes: np.ndarray, batches: Sequence[str], *, seed: int = 0) -> BatchCorrection:
        """Learn how cell vectors (cells, size), NaN for cells without one, have to move.

        `codes` (cells,) are the numbers of their batches, `batches` the names of these.
        """
        order = np.random.default_rng(seed).permutation(np.flatnonzero(np.isfinite(vectors).all(axis=1)))
        chosen = np.sort(order[:MOST_CELLS])
        kept = torch.from_numpy(np.isin(chosen, order[:MOST_ANCHORS]))
        own, scores = torch.from_numpy(codes[chosen]), torch.from_numpy(vectors[chosen].astype(np.float64))
        made = cls(int(kept.sum()), vectors.shape[1], batches)
        if len(scores):
            made.centre.copy_(scores.mean(0))
            scores = scores - scores.mean(0)
            made.anchors.copy_(scores[kept])
            made.moves.copy_((across_batches(scores, own) - scores)[kept])
            made.codes.copy_(own[kept])
        return made

    def forward(self, vectors: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return the vectors (B, size), moved; `batch` (B,) is the number of each cell's batch, -1 where it is none of those known.

        A cell of an unknown batch moves as the nearest cells of all batches.
        """
        if not len(self.anchors):
            return vectors
        directions, known = _directions(vectors.float() - self.centre), _directions(self.anchors)
        codes = torch.full((len(vectors),), -1, device=vectors.device) if batch is None else batch.to(vectors.device)
        moved = vectors.clone()
        for code in codes.unique().tolist():
            rows, same = torch.nonzero(codes == code)[:, 0], self.codes == code
            pool = same if bool(same.any()) else torch.ones_like(same)
            moved[rows] += _moves(directions[rows], known[pool], self.moves[pool]).to(vectors.dtype)
        return moved


def across_batches(scores: Tensor, codes: Tensor) -> Tensor:
    """Return centred vectors (cells, size) moved so that the same kinds of cells of different batches lie together."""
    for _ in range(ROUNDS if len(codes.unique()) > 1 else 0):
        directions, move = _directions(scores), torch.zeros_like(scores)
        for code in codes.unique():
            mine, others = torch.nonzero(codes == code)[:, 0], torch.nonzero(codes != code)[:, 0]
            there, back = _nearest(directions[mine], directions[others]), _nearest(directions[others], directions[mine])
            mutual = sparse.csr_matrix(there.multiply(back.T))
            n_partners = np.diff(mutual.indptr)
            paired = np.flatnonzero(n_partners)
            if len(paired):
                partners = sparse.diags(1 / n_partners[paired]) @ mutual[paired] @ scores[others].numpy()
                anchors = mine[torch.from_numpy(paired)]
                move[mine] = _moves(directions[mine], directions[anchors], torch.from_numpy(partners) - scores[anchors])
        scores = scores + move / 2
    return scores


def _moves(directions: Tensor, anchors: Tensor, ways: Tensor) -> Tensor:
    """Return how cells move (B, size): as the anchors near them, by a Gaussian as wide as a third of these lie."""
    found = []
    for part in directions.split(2048):
        far, near = torch.cdist(part, anchors).topk(min(NEAR, len(anchors)), largest=False)
        width = far[:, far.shape[1] // 3, None].clamp_min(1e-9)
        weights = torch.softmax(-0.5 * (far / width).square(), dim=1)  # (rows, near)
        found.append((weights[:, :, None] * ways[near]).sum(1))
    return torch.cat(found)


def _directions(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _nearest(cells: Tensor, among: Tensor) -> sparse.csr_matrix:
    """Return which of some vectors are nearest to each cell (cells, among)."""
    search = NearestNeighbors(n_neighbors=min(MUTUAL, len(among))).fit(among.numpy())
    return search.kneighbors_graph(cells.numpy())
