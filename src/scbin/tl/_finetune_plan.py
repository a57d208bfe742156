"""What `tl.finetune` makes of its arguments before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin._arguments import choices, numbers, shown
from scbin._errors import ScbinInputError, ScbinTypeError, count
from scbin.data.loadings import gene_loadings
from scbin.data.splitting import share_of
from scbin.encoding.phenotypes import text_of
from scbin.model import Model
from scbin.nn.bert import build_bert, init_gene_table
from scbin.nn.prediction import has_genes
from scbin.nn.presets import preset_for
from scbin.nn.readout import Readout
from scbin.tl._sides import Sides, known_split, warn_of_donors, with_donors
from scbin.tl._targets import Labels, read_cells, read_genes

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.tl._targets import Kinds
    from scbin.train.finetuning import Finetuned, Tuning
    from scbin.train.settings import TrainSettings

_log = logging.getLogger(__name__)

NEW = "new"
_RANK = 30  # components of the SVD that a new network starts from
_MOST_HELD_OUT = 2_000  # cells
_EPOCHS, _STEPS = 8, 400  # epochs, but about as many steps at most: more were not seen to help


@dataclass(frozen=True, eq=False)
class Reading:
    """The cells, and how their labels and sides are read."""

    adata: AnnData
    tokens: csr_matrix
    vocabulary: Vocabulary
    level: Literal["cell", "gene"]
    split_key: str | None
    gene_key: str | None
    fewest: int

    def labels(self, weights: Mapping[str, float], kinds: Mapping[str, Kinds]) -> list[Labels]:
        """Return each target as it is read from its column."""
        if self.level == "gene":
            return [
                read_genes(self.adata, name, self.vocabulary, self.gene_key, weight=weight, fewest=self.fewest)
                for name, weight in weights.items()
            ]
        given, _ = known_split(self.adata, self.split_key)
        learning = np.ones(self.adata.n_obs, dtype=bool) if given is None else given.training | given.held_out
        usable = has_genes(self.tokens, self.vocabulary)
        return [
            read_cells(self.adata, name, kinds[name], usable, learning, weight=weight, fewest=self.fewest)
            for name, weight in weights.items()
        ]

    def sides(self, labels: list[Labels], validation_share: float, seed: int) -> Sides:
        """Return the cells to train on and to validate on: those with a label, as they are divided already or drawn now."""
        usable = has_genes(self.tokens, self.vocabulary)
        if self.level == "cell":
            usable &= np.isfinite(np.stack([label.values for label in labels])).any(axis=0)
        given, groups = known_split(self.adata, self.split_key)
        test, open_to = np.zeros(len(usable), dtype=bool), usable
        if given is not None:
            test, open_to = given.test, (given.training | given.held_out) & usable
            held_out = given.held_out & usable
            if held_out.any() or not validation_share:
                return self._checked(Sides(open_to & ~held_out, held_out, test, groups, given))
        cells = np.flatnonzero(open_to)
        classes = np.zeros(len(cells), dtype=np.int64)
        if self.level == "cell" and labels[0].target.kind == "class":
            classes = np.nan_to_num(labels[0].values[cells], nan=-1).astype(np.int64)
        own = None if groups is None else groups[cells]
        held_out = np.zeros(len(usable), dtype=bool)
        held_out[cells] = share_of(classes, validation_share, groups=own, most=_MOST_HELD_OUT, seed=seed)
        known = None if given is None else with_donors(given, held_out, groups)
        return self._checked(Sides(open_to & ~held_out, held_out, test, groups, known))

    def _checked(self, sides: Sides) -> Sides:
        n = int(sides.training.sum())
        if n < 2:
            raise ScbinInputError(
                "F24",
                f"{count(n, 'cell')} to train on: cells need tokens, a label, and to be on the training side of the split.",
            )
        if self.level == "cell":
            warn_of_donors(self.adata, sides, self.split_key)
        return sides

    def held_out_genes(self, labels: list[Labels], validation_share: float, seed: int) -> np.ndarray | None:
        """Return which genes are asked about in validation only (genes,)."""
        if self.level == "cell":
            return None
        classes = np.nan_to_num(labels[0].values, nan=-1).astype(np.int64)
        held_out = np.zeros(len(classes), dtype=bool)
        known = np.flatnonzero(classes >= 0)
        held_out[known] = share_of(classes[known], validation_share, seed=seed)
        return held_out


def kinds_of(weights: Mapping[str, float], kind: object) -> dict[str, Kinds]:
    """Return what each target is learned as."""
    if not isinstance(kind, str | Mapping):
        raise ScbinTypeError("F10", f"kind is {shown(kind)}; pass 'class', 'number', or {{column: kind}}.")
    kinds: dict[str, Any] = dict.fromkeys(weights, kind if isinstance(kind, str) else "class")
    if not isinstance(kind, str):
        kinds |= kind
    for name, value in kinds.items():
        choices({"kind": ("class", "number")}, kind=value)
        if name not in weights:
            raise ScbinInputError(
                "F10", f"kind names {name!r}, which is no target. Targets: {', '.join(map(repr, weights))}."
            )
    return kinds


def check_choices(
    level: str,
    head: str | None,
    kinds: Mapping[str, str],
    sampling: str | None,
    rebalance: float | None,
    lora: object,
    validation_share: float,
    gene_drop: float,
    label_smoothing: float,
) -> None:
    """Raise for what cannot be meant."""
    choices({"level": ("cell", "gene"), "sampling": (None, "balanced")}, level=level, sampling=sampling)
    if level == "gene" and "number" in kinds.values():
        raise ScbinInputError("F10", "level='gene' learns classes of genes; kind='number' is for cells.")
    if level == "gene" and head not in (None, "gene"):
        raise ScbinInputError(
            "F29",
            f"head={head!r} reads whole cells; with level='gene' the head is linear in the vector of each gene's token. Leave "
            "head out.",
        )
    if level == "gene" and sampling is not None:
        raise ScbinInputError(
            "F40", "sampling='balanced' draws cells by their class; with level='gene' use class_weights='balanced'."
        )
    if not isinstance(lora, bool | Mapping):
        raise ScbinTypeError("F34", f"lora is {shown(lora)}; pass True, False, or a mapping for peft.LoraConfig.")
    shares = {"validation_share": validation_share, "gene_drop": gene_drop, "label_smoothing": label_smoothing}
    numbers(validation_share=validation_share, gene_drop=gene_drop, label_smoothing=label_smoothing)
    numbers(optional=True, rebalance=rebalance)
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ScbinInputError("F25", f"{name} is {value}; it needs to be in [0, 1).")
    if rebalance is not None and not 0 <= rebalance <= 1:
        raise ScbinInputError("F25", f"rebalance is {rebalance}; it needs to be in [0, 1].")


def weights_of_classes(
    label: Labels, class_weights: Literal["balanced"] | Mapping[str, float] | None, training: np.ndarray, level: str
) -> np.ndarray | None:
    """Return the weight of each class in the loss (classes,), with mean 1 over the cells that are learned from."""
    classes = label.target.classes
    if class_weights is None or not classes:
        return None
    values = label.values[training] if level == "cell" else label.values
    counts = np.bincount(values[np.isfinite(values)].astype(np.int64), minlength=len(classes)).astype(np.float64)
    if class_weights == "balanced":
        weights = 1 / np.maximum(counts, 1)  # a class of the held-out cells alone is learned from them in the end
    elif isinstance(class_weights, str) or not hasattr(class_weights, "items"):
        raise ScbinTypeError("F26", f"class_weights is {class_weights!r}; pass 'balanced', {{class: weight}}, or None.")
    else:
        named = {text_of(name): weight for name, weight in class_weights.items()}
        unknown = [name for name in class_weights if text_of(name) not in classes]
        if unknown:
            raise ScbinInputError(
                "F26",
                f"class_weights names {shown(unknown[0])}, which {label.target.name!r} has not. It has: {', '.join(classes)}.",
            )
        for name, weight in named.items():
            if not isinstance(weight, Real):
                raise ScbinTypeError("F26", f"class_weights of {name!r} is {shown(weight)}; pass a number.")
        weights = np.array([float(named.get(name, 1.0)) for name in classes])
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights @ counts > 0):
        raise ScbinInputError(
            "F26", f"class_weights of {label.target.name!r} need finite numbers, not below 0, not all 0."
        )
    scaled: np.ndarray = weights * counts.sum() / (weights @ counts)
    return scaled


def new_model(name: str, tokens: csr_matrix, vocabulary: Vocabulary, training: np.ndarray, seed: int) -> Model:
    """Return a network that has learned nothing, but starts from what the training cells say about genes."""
    cells = np.flatnonzero(training)
    bert = build_bert(vocabulary, preset_for(len(cells)) if name == NEW else name, seed=seed)
    loadings = gene_loadings(tokens, vocabulary, min(_RANK, bert.config.hidden_size), cells, seed=seed)
    init_gene_table(bert, vocabulary, loadings.table(), seed=seed)
    weights = tuple(float(weight) for weight in loadings.weights())
    return Model(bert.eval(), vocabulary, Readout("weighted", gene_weights=weights), {"preset": name})


def epochs_for(n_cells: int, cells_per_step: int) -> int:
    """Return how often to see each of so many cells."""
    return max(1, min(_EPOCHS, round(_STEPS * cells_per_step / max(n_cells, 1))))


def say_what_is_learned(labels: list[Labels], sides: Sides, level: str) -> None:
    """Log what is learned and what was left out, one line per target."""
    for label in labels:
        n = int(np.isfinite(label.values[sides.training] if level == "cell" else label.values).sum())
        what = "a number" if label.target.kind == "number" else count(len(label.target.classes), "class", "classes")
        _log.info(
            "scbin: learning %s (%s) from %s; %s without a label left out.",
            label.target.name, what, count(n, level), count(label.n_missing, level),
        )  # fmt: skip


def summary(
    labels: list[Labels],
    sides: Sides,
    tuning: Tuning,
    settings: TrainSettings,
    result: Finetuned,
    split_key: str | None,
) -> dict[str, Any]:
    """Return plain values that say how a model came about."""
    return {
        "targets": {label.target.name: label.target.kind for label in labels},
        "without_label": {label.target.name: label.n_missing for label in labels},
        "n_cells": int(sides.training.sum()),
        "n_held_out": int(sides.held_out.sum()),
        "split_key": split_key,
        "steps": len(result.history),
        "tuning": asdict(tuning),
        "settings": settings.learned(),
        **result.report,
    }
