"""What a network learns without labels: hidden genes, hidden phenotypes, and a cell vector that predicts unseen molecules."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scbin._errors import ScbinInputError
from scbin.nn.counts import triples
from scbin.nn.packs import plan_packs
from scbin.train.masking import extra_zeros, mask_rows, masked_losses, split_rows
from scbin.train.randomness import cell_keys, random_key
from scbin.train.settings import Loss, Masking
from scbin.train.task import Batch

if TYPE_CHECKING:
    from scbin.nn.network import CellNetwork
    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

CELL_VECTOR, VISIBLE = "cell_vector", (0.3, 0.9)  # smallest and largest fraction of the molecules that are shown


@dataclass(frozen=True, eq=False)
class Targets:
    """What is asked about a pack: hidden tokens (M,), ordered by loss, and the hidden half of the molecules of its cells."""

    where: Tensor  # (M,) int64
    labels: Tensor  # (M,) int64, within the group
    starts: Tensor  # (M,) int64, first id of the group
    segments: list[tuple[int, int, int, int, int]]  # (loss, first, last, start, size); start -1: groups differ
    molecules: (
        tuple[Tensor, Tensor, Tensor] | None
    )  # (N,) row of the pack, gene, count above 0; None: nothing is hidden
    log_depth: Tensor | None  # (B,) float32, log of what is hidden of each cell
    batch: Tensor | None  # (B,) int64
    asked: Tensor | None  # (B, genes) bool; None: all genes
    noise: Tensor  # (B,) int64, a function of (seed, epoch, cell) that dropout comes from


class Pretraining(nn.Module):
    """The task of pretraining: predict hidden genes and phenotypes, and from the cell vector the molecules that were not shown.

    Where the cell vector is trained, the counts of every cell are split at random into a visible and a hidden half,
    `visible ~ Binomial(count, q)` with a q from .3 to .9, anew in each epoch. The network reads the visible half alone, with some of its tokens
    masked; the vector it gives the cell has to predict the hidden half, the masked tokens are predicted at their positions.

    Parameters
    ----------
    vocabulary
        Of the tokens.
    masking
        What is masked. Where counts are split, the default masks phenotypes alone: the cell vector predicts every gene as it is.
    loss
        How masked tokens are scored, and the weight of each loss. Whoever gives it gets masked genes, too. The cell vector is trained
        unless the weight of its loss is 0; the network needs a count head.
    batches
        Number of the batch of each cell (cells,), as the count head knows them.
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
        batches: np.ndarray | None = None,
        layer: int | None = -1,
    ):
        super().__init__()
        cell_vector = loss is None or loss.weights.get(CELL_VECTOR, 1.0) > 0
        splits_counts = cell_vector and vocabulary.unit == "counts"
        usual = Masking(gene_mask_prob=0.0) if splits_counts and loss is None else Masking()
        self.vocabulary, self.masking, self.score = vocabulary, masking or usual, loss or Loss()
        self.batches, self.masked = batches, masked_losses(vocabulary)
        self.zero_positions: np.ndarray | None = None  # of genes that may be asked for as unexpressed; None: all
        asks = dict.fromkeys(self.masked, True) | {CELL_VECTOR: cell_vector, "specials": self.masking.mask_specials}
        asks["genes"] = bool(self.masking.gene_mask_prob or self.score.positions == "all")
        self.losses = tuple(name for name, asked in asks.items() if asked)
        if unknown := set(self.score.weights) - {*self.losses, CELL_VECTOR}:
            told = f"{min(unknown)!r} is not predicted here. Available: {', '.join(self.losses)}."
            raise ScbinInputError("A06", told)
        self.weights = tuple(float(self.score.weights.get(name, 1.0)) for name in self.losses)
        if not any(self.weights):
            raise ScbinInputError("A03", "the weights of all losses are 0: there is nothing to learn.")
        if self.score.kind == "ordinal" and not vocabulary.n_levels:
            raise ScbinInputError("A03", 'kind="ordinal" needs bins that follow one another; these tokens have none.')
        self.watched = CELL_VECTOR if cell_vector else None
        self.layer = layer if self.losses == (CELL_VECTOR,) else -1

    def describe(self) -> dict[str, Any]:
        """Return what tells this task from others, as plain values."""
        asked = {"losses": list(self.losses), "batches": self.batches is not None}
        return {"masking": asdict(self.masking), "loss": asdict(self.score), **asked}

    # ---- on the host ------------------------------------------------------------------------------------------------

    def prepare(self, tokens: Tokens, cells: np.ndarray, *, seed: int, epoch: int, token_budget: int) -> Batch:
        """Split the counts of some cells, mask tokens of the visible half, and note what is asked."""
        rows, molecules, asked = tokens.take(cells), None, None
        if CELL_VECTOR in self.losses:
            rows, molecules, asked = split_rows(rows, cells, self.vocabulary, VISIBLE, seed=seed, epoch=epoch)
        noise = cell_keys(random_key(seed, epoch), cells)
        growth = 1 + self.masking.gene_mask_prob * extra_zeros(self.vocabulary, self.masking)
        how: Any = {"seed": seed, "epoch": epoch, "zero_positions": self.zero_positions}
        how["score_all"] = self.score.positions == "all"
        numbers = [self.masked.index(name) for name in self.losses if name != CELL_VECTOR]
        packs, counts = [], np.zeros(len(self.losses))
        for part in plan_packs(np.ceil(np.diff(rows.indptr) * growth), token_budget):
            pack, hidden = mask_rows(rows[part], cells[part], self.vocabulary, self.masking, **how)
            counts[: len(numbers)] += np.bincount(hidden.loss, minlength=len(self.masked))[numbers]
            start, stop, segments = hidden.start, hidden.stop, []
            if self.score.over == "vocabulary":
                start, stop = np.zeros_like(start), np.full_like(stop, self.vocabulary.n_tokens)
            for loss in np.unique(hidden.loss):
                first, last = np.searchsorted(hidden.loss, (loss, loss + 1)).tolist()
                same, size = bool((start[first:last] == start[first]).all()), int(stop[first] - start[first])
                segments.append((int(loss), first, last, int(start[first]) if same else -1, size))
            found = log_depth = None
            if molecules is not None:
                own = molecules[part]
                found, depth = triples(own), np.asarray(own.sum(axis=1, dtype=np.float64)).ravel()
                counts[-1] += depth.sum()
                log_depth = np.log(np.maximum(depth, 1)).astype(np.float32)
            batch = None if self.batches is None else self.batches[cells[part]]
            of_cells = (found, log_depth, batch, None if asked is None else asked[part], noise[part])
            parts: Any = (hidden.where, hidden.labels - start, start, segments, *of_cells)
            tensors: Any = (torch.from_numpy(each) if isinstance(each, np.ndarray) else each for each in parts)
            targets = Targets(*tensors)
            packs.append((pack, targets))
        return Batch(packs, counts)

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
            how: Any = {"reduction": "sum", "label_smoothing": self.score.label_smoothing}
            labels = targets.labels[first:last]
            if name == "genes" and self.score.kind == "ordinal":  # sums to one at the lowest and highest bins, too
                off = torch.arange(size, device=labels.device) - labels[:, None]
                labels = torch.softmax(-(off**2) / (2 * self.score.sigma**2), dim=1)
            sums[name] = F.cross_entropy(logits.float(), labels, **how)
        if targets.molecules is not None and targets.log_depth is not None:
            head = network.counts
            if head is None:
                raise ScbinInputError("M04", "this network has no count head, which the cell vector is trained by.")
            if network.vector_layer == 0 and self.layer == -1:
                hidden = network.backbone.embed(pack)
            with torch.autocast(pack.input_ids.device.type, enabled=False):
                z = network.vector(hidden, pack, noise=targets.noise)
                log_mean = head.log_mean(z, targets.log_depth, targets.batch)
                sums[CELL_VECTOR] = -head.log_likelihood(log_mean, *targets.molecules, targets.asked).sum()
        return torch.stack([sums[name] for name in self.losses])
