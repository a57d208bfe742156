"""What a network learns without labels: hidden genes, hidden phenotypes, and a cell vector that predicts unseen molecules."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from scbin._errors import ScbinInputError
from scbin.nn.losses import Loss
from scbin.nn.packs import plan_packs
from scbin.train.masking import Masking, extra_zeros, mask_rows, masked_losses
from scbin.train.randomness import cell_keys, random_key
from scbin.train.splitting import split_rows
from scbin.train.task import Batch

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from scbin.nn.network import CellNetwork
    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary
    from scbin.train.masking import Hidden

CELL_VECTOR = "cell_vector"


@dataclass(frozen=True, eq=False)
class Unseen:
    """The hidden half of the molecules of the cells in a pack."""

    rows: Tensor  # (N,) int64, the row of the pack
    genes: Tensor  # (N,) int64
    counts: Tensor  # (N,) float32, above 0
    log_depth: Tensor  # (B,) float32, log of what is hidden of each cell
    batch: Tensor | None  # (B,) int64
    asked: Tensor | None  # (B, genes) bool; None: all genes
    noise: Tensor  # (B,) int64, a function of (seed, epoch, cell) that dropout comes from


@dataclass(frozen=True, eq=False)
class Targets:
    """What is asked about a pack."""

    where: Tensor  # (M,) int64, hidden tokens, ordered by loss
    labels: Tensor  # (M,) int64, within the group
    starts: Tensor  # (M,) int64, first id of the group
    segments: tuple[tuple[int, int, int, int, int], ...]  # (loss, first, last, start, size); start -1: groups differ
    unseen: Unseen | None


class Pretraining(nn.Module):
    """The task of pretraining: predict hidden genes and phenotypes, and from the cell vector the molecules that were not shown.

    Where the cell vector is trained, the counts of every cell are split at random into a visible and a hidden half,
    `visible ~ Binomial(count, q)`, anew in each epoch. The network reads the visible half alone, with some of its tokens
    masked; the vector it gives the cell has to predict the hidden half, the masked tokens are predicted at their positions.

    Parameters
    ----------
    vocabulary
        Of the tokens.
    masking
        What is masked. Where counts are split, the default masks phenotypes alone: the cell vector predicts every gene as it is.
    loss
        How masked tokens are scored, and the weight of each loss. Whoever gives it gets masked genes, too.
    cell_vector
        Train the cell vector, unless the weight of its loss is 0; the network needs a count head.
    visible
        Smallest and largest fraction q of the molecules that are shown; drawn for each cell.
    batches
        Number of the batch of each cell (cells,), as the count head knows them.
    zero_positions
        Positions of genes that may be asked for as unexpressed. Default: all genes.
    layer
        Whose hidden states are read, where no token is masked, `None` for none; masked tokens are predicted from the last.

    Examples
    --------
    >>> from scbin.tokens.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    >>> Pretraining(vocabulary).losses
    ('genes', 'cell_vector')
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        masking: Masking | None = None,
        loss: Loss | None = None,
        *,
        cell_vector: bool = True,
        visible: tuple[float, float] = (0.3, 0.9),
        batches: np.ndarray | None = None,
        zero_positions: np.ndarray | None = None,
        layer: int | None = -1,
    ):
        super().__init__()
        cell_vector = cell_vector and (loss is None or loss.weights.get(CELL_VECTOR, 1.0) > 0)
        splits_counts = cell_vector and vocabulary.unit == "counts"
        usual = Masking(gene_mask_prob=0.0) if splits_counts and loss is None else Masking()
        self.vocabulary, self.masking, self.score = vocabulary, masking or usual, loss or Loss()
        self.visible, self.batches, self.zero_positions = visible, batches, zero_positions
        self.masked = masked_losses(vocabulary)
        asks = dict.fromkeys(self.masked, True) | {CELL_VECTOR: cell_vector, "specials": self.masking.mask_specials}
        asks["genes"] = bool(self.masking.gene_mask_prob or self.score.positions == "all")
        self.losses = tuple(name for name, asked in asks.items() if asked)
        self.score.check(vocabulary, (*self.losses, CELL_VECTOR))
        self.weights = tuple(float(self.score.weights.get(name, 1.0)) for name in self.losses)
        if not any(self.weights):
            raise ScbinInputError("A03", "the weights of all losses are 0: there is nothing to learn.")
        self.watched = CELL_VECTOR if cell_vector else None
        self.layer = layer if self.losses == (CELL_VECTOR,) else -1

    def describe(self) -> dict[str, Any]:
        """Return what tells this task from others, as plain values."""
        plain = {"losses": list(self.losses), "visible": list(self.visible), "batches": self.batches is not None}
        return {"masking": asdict(self.masking), "loss": asdict(self.score), **plain}

    # ---- on the host ------------------------------------------------------------------------------------------------

    def prepare(self, tokens: Tokens, cells: np.ndarray, *, seed: int, epoch: int, token_budget: int) -> Batch:
        """Split the counts of some cells, mask tokens of the visible half, and note what is asked."""
        cells = np.asarray(cells, dtype=np.int64)
        rows, molecules, asked = tokens.take(cells), None, None
        if CELL_VECTOR in self.losses:
            rows, molecules, asked = split_rows(rows, cells, self.vocabulary, self.visible, seed=seed, epoch=epoch)
        noise = cell_keys(random_key(seed, epoch), cells)
        growth = 1 + self.masking.gene_mask_prob * extra_zeros(self.vocabulary, self.masking)
        how: Any = {"seed": seed, "epoch": epoch, "zero_positions": self.zero_positions}
        how["score_all"] = self.score.positions == "all"
        packs, counts = [], np.zeros(len(self.losses))
        for part in plan_packs(np.ceil(np.diff(rows.indptr) * growth), token_budget):
            pack, hidden = mask_rows(rows[part], cells[part], self.vocabulary, self.masking, **how)
            unseen = None
            if molecules is not None:
                unseen = self._unseen(molecules[part], cells[part], None if asked is None else asked[part], noise[part])
                counts[-1] += float(unseen.counts.sum(dtype=torch.float64))
            numbers = [self.masked.index(name) for name in self.losses if name != CELL_VECTOR]
            counts[: len(numbers)] += np.bincount(hidden.loss, minlength=len(self.masked))[numbers]
            packs.append((pack, self._targets(hidden, unseen)))
        return Batch(packs, counts)

    def _unseen(self, molecules: csr_matrix, cells: np.ndarray, asked: np.ndarray | None, noise: np.ndarray) -> Unseen:
        """Return the hidden molecules of the rows of a pack as tensors."""
        counts, depth = molecules.tocoo(), np.asarray(molecules.sum(axis=1, dtype=np.float64)).ravel()
        return Unseen(
            rows=torch.from_numpy(counts.row.astype(np.int64)),
            genes=torch.from_numpy(counts.col.astype(np.int64)),
            counts=torch.from_numpy(counts.data),
            log_depth=torch.from_numpy(np.log(np.maximum(depth, 1)).astype(np.float32)),
            batch=None if self.batches is None else torch.from_numpy(self.batches[cells].astype(np.int64)),
            asked=None if asked is None else torch.from_numpy(asked),
            noise=torch.from_numpy(noise),
        )

    def _targets(self, hidden: Hidden, unseen: Unseen | None) -> Targets:
        """Put what is asked about a pack into tensors, hidden tokens in runs that share a group."""
        start, stop = hidden.start, hidden.stop
        if self.score.over == "vocabulary":
            start, stop = np.zeros_like(start), np.full_like(stop, self.vocabulary.n_tokens)
        segments = []
        for loss in np.unique(hidden.loss):
            first, last = np.searchsorted(hidden.loss, (loss, loss + 1)).tolist()
            same, size = bool((start[first:last] == start[first]).all()), int(stop[first] - start[first])
            segments.append((int(loss), first, last, int(start[first]) if same else -1, size))
        where, labels = torch.from_numpy(hidden.where), torch.from_numpy(hidden.labels - start)
        return Targets(where, labels, torch.from_numpy(start), tuple(segments), unseen)

    # ---- on the device ----------------------------------------------------------------------------------------------

    def loss(self, network: CellNetwork, hidden: Tensor | None, pack: Pack, targets: Targets) -> Tensor:
        """Return the summed loss of each name (losses,) over what is asked about a pack."""
        sums = dict.fromkeys(self.losses, torch.zeros((), device=pack.input_ids.device))
        for number, first, last, start, size in targets.segments:
            assert hidden is not None  # where tokens are masked, a layer is read
            states, name = hidden[targets.where[first:last]], self.masked[number]
            if start >= 0:
                logits = network.backbone.logits(states, start, start + size)
            else:  # each gene has bins of its own
                starts = targets.starts[first:last, None]
                logits = network.backbone.logits(states, ids=starts + torch.arange(size, device=starts.device))
            sums[name] = self.score.score(logits, targets.labels[first:last], genes=name == "genes").sum()
        if targets.unseen is not None:
            sums[CELL_VECTOR] = self._unseen_loss(network, hidden, pack, targets.unseen)
        return torch.stack([sums[name] for name in self.losses])

    def _unseen_loss(self, network: CellNetwork, hidden: Tensor | None, pack: Pack, unseen: Unseen) -> Tensor:
        """Return minus the log likelihood of the hidden half under what the cell vector predicts."""
        head = network.counts
        if head is None:
            raise ScbinInputError("M04", "this network has no count head, which the cell vector is trained by.")
        if network.vector.layer == 0 and self.layer == -1:
            hidden = network.backbone.embed(pack)
        with torch.autocast(pack.input_ids.device.type, enabled=False):
            z = network.vector(hidden, pack, noise=unseen.noise)
            log_mean = head.log_mean(z, unseen.log_depth, unseen.batch)
            return -head.log_likelihood(log_mean, unseen.rows, unseen.genes, unseen.counts, unseen.asked).sum()
