"""What a step computes from its cells: masked modelling, and terms on the vectors of whole cells."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from scbin._arguments import choices, instances, numbers, plain, shown
from scbin._errors import ScbinInputError
from scbin.data.masking import MaskingScheme, Targets, epoch_order, mask_rows, task_names
from scbin.nn.attention import Layout, pack_layout, to_device
from scbin.nn.bert import logits_at
from scbin.nn.losses import binary_cross_entropy, cross_entropy, gaussian_ordinal
from scbin.nn.pooling import pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_matrix
    from transformers import BertForMaskedLM

    from scbin.data.packing import Pack
    from scbin.encoding.vocabulary import Vocabulary


_CHOICES = {"kind": ("cross_entropy", "ordinal", "binary"), "over": ("group", "vocabulary")}


@dataclass(frozen=True)
class MaskedLoss:
    """How a prediction at a hidden position is scored.

    Parameters
    ----------
    kind
        `"cross_entropy"`; `"ordinal"`: a bell over the bins, near misses cost less; `"binary"`: one logit per gene. The last
        two score genes; phenotypes keep the cross entropy.
    label_smoothing
        Share of the target, from 0 to below 1, spread evenly over the group (or the vocabulary, see `over`). It belongs to the
        cross entropy: beside `"ordinal"` and `"binary"` it concerns the phenotypes alone.
    sigma
        Width of the bell in bins.
    over
        Probabilities sum to one over the position's `"group"`, or over the whole `"vocabulary"` as in the seeds.
    class_weights
        For a task, one weight per value of its group, such as `{"cell_type": [0.2, 1.8]}`; none below 0, not all of them 0.
    task_weights
        Weight of a position by task, not below 0: `"genes"` or the name of a phenotype. Default 1.

    Examples
    --------
    >>> MaskedLoss("ordinal", sigma=0.7).over
    'group'
    """

    kind: Literal["cross_entropy", "ordinal", "binary"] = "cross_entropy"
    label_smoothing: float = 0.0
    sigma: float = 1.0
    over: Literal["group", "vocabulary"] = "group"
    class_weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    task_weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, plain(getattr(self, item.name)))
        choices(_CHOICES, kind=self.kind, over=self.over)
        numbers(label_smoothing=self.label_smoothing, sigma=self.sigma)
        if not 0 <= self.label_smoothing < 1:
            raise ScbinInputError(
                "T68", f"label_smoothing is {self.label_smoothing}; it needs to be from 0 to below 1."
            )
        if not 0 < self.sigma < float("inf"):
            raise ScbinInputError("T68", f"sigma is {self.sigma}; the width of the bell is a number of bins above 0.")
        instances(Mapping, "a dict by task", class_weights=self.class_weights, task_weights=self.task_weights)
        by_class = {task: _weights(f"class_weights[{task!r}]", values) for task, values in self.class_weights.items()}
        by_task = {task: _weights(f"task_weights[{task!r}]", [value])[0] for task, value in self.task_weights.items()}
        object.__setattr__(self, "class_weights", by_class)
        object.__setattr__(self, "task_weights", by_task)
        for task, values in by_class.items():
            if not any(values):
                raise ScbinInputError(
                    "T68", f"class_weights[{task!r}] has no weight above 0: there is nothing to learn."
                )

    def check(self, vocabulary: Vocabulary) -> None:
        """Raise where the vocabulary has no such task, or none that this loss can score."""
        known = task_names(vocabulary)
        for name in {*self.class_weights, *self.task_weights} - set(known):
            raise ScbinInputError("T40", f"{name!r} is not something to predict here. There are: {', '.join(known)}.")
        sizes = {phenotype.name: len(phenotype.values) for phenotype in vocabulary.phenotypes}
        sizes |= {"genes": vocabulary.n_levels or vocabulary.n_gene_ids, "specials": vocabulary.n_tokens}
        for name, weights in self.class_weights.items():
            if len(weights) != sizes[name]:
                raise ScbinInputError(
                    "T69", f"class_weights[{name!r}] has {len(weights)} weights; {name} has {sizes[name]} values here."
                )
        if self.label_smoothing and self.kind != "cross_entropy" and not vocabulary.phenotypes:
            raise ScbinInputError(
                "T41",
                f"label_smoothing belongs to the cross entropy, and here kind={self.kind!r} scores all there is to predict. "
                "Leave one of them out.",
            )
        if self.kind == "ordinal" and vocabulary.encoding == "rank":
            raise ScbinInputError("T41", 'kind="ordinal" needs bins that follow one another; ranked genes do not.')
        if self.kind == "binary" and vocabulary.n_levels != 2:
            raise ScbinInputError(
                "T41", f'kind="binary" needs two levels per gene; this vocabulary has {vocabulary.n_levels}.'
            )
        if self.over == "vocabulary" and (self.kind != "cross_entropy" or self.class_weights):
            raise ScbinInputError("T41", 'over="vocabulary" goes with plain cross entropy alone.')


def _weights(name: str, values: Any) -> tuple[float, ...]:
    """Return weights as plain numbers; none may be below 0."""
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.tolist()
    instances((list, tuple), "a list of weights", **{name: values})
    for value in values:
        numbers(**{name: value})
    if not all(0 <= value < float("inf") for value in values):
        raise ScbinInputError("T68", f"{name} is {shown(values)}; weights are finite and not below 0.")
    return tuple(float(value) for value in values)


@dataclass(frozen=True, eq=False)
class Batch:
    """A pack and its targets on the device."""

    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,)
    layout: Layout
    rows: Tensor  # (B,) which rows of the process's share these are
    where: Tensor  # (M,)
    labels: Tensor  # (M,) within the group
    segments: tuple[tuple[int, int, int, int, int], ...]  # (first, last, task, start, stop) of targets with one group
    starts: Tensor | None  # (M,) where groups differ from target to target
    n_tokens: int


class Objective(nn.Module):
    """What is to be learned, as a sum of named, weighted terms.

    Masked modelling predicts hidden genes and phenotypes within the group of their position. Cell terms score the pooled
    vectors of two views of every cell: any module with a `name`, a `weight` and `forward(z_a, z_b, cells) -> scalar`, where
    the vectors (N, H) are those of all cells of the step, over packs and processes. Parameters of such a module are trained
    and kept in checkpoints; they do not become part of the network.

    Parameters
    ----------
    vocabulary
        Of the tokens.
    scheme
        What is hidden.
    loss
        How predictions are scored.
    masked_weight
        Weight of masked modelling.
    cell_terms
        Terms on cell vectors; with none, each cell is one row and no views are formed.
    token_weights
        Weight of each token id in a cell's vector (tokens,). Default: 1 for genes and bins, 0 for everything else.
    position_weights
        Weight of each position in it (positions,), a factor on the former. Default: 1.
    origin
        What the weights were computed by, as plain values. Where it is given it stands for them in `describe`: the same data give
        weights on another machine that differ in their last digits.

    Examples
    --------
    >>> from scbin.encoding.vocabulary import Vocabulary
    >>> from scbin.train.terms import Contrastive
    >>> vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    >>> Objective(vocabulary, cell_terms=[Contrastive(0.5)]).names
    ('genes', 'specials', 'contrastive')
    """

    layer = -1  # whose hidden states are read

    def __init__(
        self,
        vocabulary: Vocabulary,
        scheme: MaskingScheme | None = None,
        loss: MaskedLoss | None = None,
        *,
        masked_weight: float = 1.0,
        cell_terms: Sequence[nn.Module] = (),
        token_weights: np.ndarray | None = None,
        position_weights: np.ndarray | None = None,
        origin: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.origin = origin
        self.vocabulary, self.scheme, self.loss = vocabulary, scheme or MaskingScheme(), loss or MaskedLoss()
        self.loss.check(vocabulary)
        self.masked_weight = masked_weight
        self.cell_terms = nn.ModuleList(term for term in cell_terms if term.weight)
        self.tasks = task_names(vocabulary)
        self.names = (*self.tasks, *(str(term.name) for term in self.cell_terms))
        if token_weights is None:
            token_weights = vocabulary.is_gene_token(np.arange(vocabulary.n_tokens)).astype(np.float32)
        weights = torch.from_numpy(np.asarray(token_weights, dtype=np.float32))
        self.register_buffer("token_weights", weights, persistent=False)
        places = np.ones(vocabulary.n_positions) if position_weights is None else np.asarray(position_weights)
        self.register_buffer("position_weights", torch.from_numpy(places.astype(np.float32)), persistent=False)
        self.task_weights = np.array([self.loss.task_weights.get(task, 1.0) for task in self.tasks])
        for task, values in self.loss.class_weights.items():
            name = f"class_weights_{self.tasks.index(task)}"
            self.register_buffer(name, torch.tensor(list(values), dtype=torch.float32), persistent=False)

    @property
    def views(self) -> Literal[1, 2]:
        """Rows per cell."""
        return 2 if len(self.cell_terms) else 1

    def describe(self) -> dict[str, Any]:
        """Return what distinguishes this objective from others, as plain values for JSON."""
        terms: list[dict[str, Any]] = []
        for term in self.cell_terms:
            given = {key: value for key, value in vars(term).items() if isinstance(value, (int, float, str))}
            given = {key: value for key, value in given.items() if key != "training" and not key.startswith("_")}
            terms.append({**given, "class": type(term).__name__})
        weights = [np.asarray(w.cpu()).tobytes() for w in (self.token_weights, self.position_weights)]
        hashes = [hashlib.sha256(w).hexdigest() for w in weights]
        return {
            "scheme": asdict(self.scheme),
            "loss": asdict(self.loss),
            "masked_weight": self.masked_weight,
            "cell_terms": terms,
            "pooling_weights": hashes if self.origin is None else dict(self.origin),
        }

    def order(self, cells: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Return the cells of an epoch in order, a function of (seed, epoch, set of cells)."""
        return epoch_order(cells, seed, epoch)

    # ---- on the host ------------------------------------------------------------------------------------------------

    def rows(
        self,
        tokens: csr_matrix,
        cells: np.ndarray,
        seed: int,
        epoch: int,
        *,
        views: Literal[1, 2] | None = None,
        zero_positions: np.ndarray | None = None,
    ) -> tuple[Pack, Targets]:
        """Return the masked rows of some cells and what is to be predicted in them."""
        return mask_rows(
            tokens, cells, self.vocabulary, self.scheme, seed=seed, epoch=epoch, views=views or self.views,
            zero_positions=zero_positions,
        )  # fmt: skip

    def factors(self, counts: np.ndarray) -> np.ndarray:
        """Return by what the summed loss of each task counts (tasks,), given the targets of each in the whole step."""
        weighted = self.task_weights * counts
        factors = self.masked_weight * self.task_weights / max(weighted.sum(), 1e-12)
        return factors.astype(np.float32)

    def counts(self, targets: Targets) -> np.ndarray:
        """Return by how much the summed loss of each task is to be divided: its targets, or their class weights."""
        counts = np.bincount(targets.task, minlength=len(self.tasks)).astype(np.float64)
        for task in self.loss.class_weights:
            number = self.tasks.index(task)
            mine = targets.task == number
            weights = np.asarray(self.loss.class_weights[task], dtype=np.float64)
            counts[number] = weights[targets.labels[mine] - targets.start[mine]].sum()
        return counts

    def batch(self, pack: Pack, targets: Targets, rows: np.ndarray, device: torch.device) -> Batch:
        """Move a pack to the device, with its targets cut into runs that share a group."""
        start, stop = targets.start, targets.stop
        if self.loss.over == "vocabulary":
            start, stop = np.zeros_like(start), np.full_like(stop, self.vocabulary.n_tokens)
        change = np.flatnonzero(np.diff(targets.task)) + 1
        segments, mixed = [], False
        for first, last in zip([0, *change], [*change, len(targets)], strict=True):
            if last > first:
                same = bool((start[first:last] == start[first]).all())
                mixed |= not same
                low, high = (int(start[first]), int(stop[first])) if same else (-1, int(stop[first] - start[first]))
                segments.append((int(first), int(last), int(targets.task[first]), low, high))
        return Batch(
            input_ids=to_device(pack.input_ids, device),
            position_ids=to_device(pack.position_ids, device),
            layout=pack_layout(pack.cu_seqlens, device, pack.key_lengths),
            rows=to_device(rows, device),
            where=to_device(targets.where, device),
            labels=to_device(targets.labels - start, device),
            segments=tuple(segments),
            starts=to_device(start, device) if mixed else None,
            n_tokens=pack.n_tokens,
        )

    # ---- on the device ----------------------------------------------------------------------------------------------

    def masked_sums(self, bert: BertForMaskedLM, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the summed loss of each task (tasks,) over the targets of a pack."""
        picked = hidden.index_select(0, batch.where)  # (M, H)
        sums: list[Tensor | None] = [None] * len(self.tasks)
        for first, last, task, start, stop in batch.segments:
            rows, labels = picked[first:last], batch.labels[first:last]
            if start >= 0:
                logits = logits_at(bert, rows, start, stop)
            else:
                logits = _gathered_logits(bert, rows, batch.starts[first:last], stop)  # type: ignore[index]
            sums[task] = self._score(logits, labels, task).sum()
        zero = picked.new_zeros((), dtype=torch.float32)
        return torch.stack([zero if value is None else value.float() for value in sums])

    def _score(self, logits: Tensor, labels: Tensor, task: int) -> Tensor:
        weights = getattr(self, f"class_weights_{task}", None)
        if task == 0 and self.loss.kind == "ordinal":
            return gaussian_ordinal(logits, labels, self.loss.sigma, weights)
        if task == 0 and self.loss.kind == "binary":
            return binary_cross_entropy(logits, labels, weights)
        return cross_entropy(logits, labels, self.loss.label_smoothing, weights)

    def pooled(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the vector of each row (B, H)."""
        weights = self.token_weights[batch.input_ids] * self.position_weights[batch.position_ids]  # type: ignore[index]
        return pool(hidden, batch.layout, weights)

    def cell_losses(self, z: Tensor, cells: np.ndarray) -> Tensor:
        """Return the cell terms (terms,), unweighted, from the vectors of both views in turn (2 N, H)."""
        return torch.stack([term(z[0::2], z[1::2], cells) for term in self.cell_terms])

    @property
    def cell_weights(self) -> list[float]:
        """Weights of the cell terms."""
        return [float(term.weight) for term in self.cell_terms]  # type: ignore[arg-type]


def _gathered_logits(bert: BertForMaskedLM, hidden: Tensor, starts: Tensor, n_values: int) -> Tensor:
    """Return logits (M, n_values) where each target has a group of its own, as genes with bins of their own have."""
    head = bert.cls.predictions
    ids = starts[:, None] + torch.arange(n_values, device=starts.device)  # (M, n_values)
    rows = nn.functional.embedding(ids, head.decoder.weight)  # (M, n_values, H)
    transformed = head.transform(hidden)
    return torch.einsum("mh,mkh->mk", transformed, rows.to(transformed.dtype)) + head.decoder.bias[ids]
