"""Fine-tuning: a head from a convex fit, then network and head together, kept where held-out cells say it is better."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy.special import log_softmax

from scbin._errors import ScbinInputError
from scbin.nn.heads import build_head, head_from
from scbin.nn.prediction import answer_cells, calibrated
from scbin.train.adapters import adapted
from scbin.train.answers import AnswerObjective
from scbin.train.loop import train
from scbin.train.starting import ConvexStart

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import BertForMaskedLM

    from scbin.nn.heads import Head, HeadPlan
    from scbin.train.settings import TrainSettings
    from scbin.train.starting import Lesson

_FEWEST_TO_CALIBRATE = 30  # cells
# standard errors: the epoch was chosen on the same cells, which flatters it; at one, gains were kept that new cells did not show
_CLEARLY = 2.0


@dataclass(frozen=True)
class Tuning:
    """How a head is fitted and trained, beside the settings of the loop.

    Parameters
    ----------
    gene_drop
        Share of the gene tokens of a cell that are left out at random, others in every epoch.
    label_smoothing
        Share of the target spread evenly over the classes.
    freeze
        Number of layers that stay as they are, from the first; `"all"` leaves the whole network as it is.
    lora
        Settings of low-rank adapters, which are trained in place of the network and merged into it in the end.
    sampling
        `"balanced"`: cells of rare classes are drawn more often.
    rebalance
        Share of the log frequencies of the classes that is taken off the answers; `None` chooses it.
    layer
        Whose hidden states the head reads.
    train
        Whether anything is trained beyond the convex start.
    """

    gene_drop: float = 0.3
    label_smoothing: float = 0.1
    freeze: int | Literal["all"] = 0
    lora: Mapping[str, Any] | None = None
    sampling: Literal["balanced"] | None = None
    rebalance: float | None = None
    layer: int = -1
    train: bool = True


@dataclass(frozen=True, eq=False)
class Finetuned:
    """What fine-tuning gives."""

    bert: BertForMaskedLM
    head: Head
    history: pd.DataFrame
    report: dict[str, Any] = field(default_factory=dict)


def finetune_tokens(
    bert: BertForMaskedLM,
    plan: HeadPlan,
    lesson: Lesson,
    tuning: Tuning,
    settings: TrainSettings,
    *,
    cell_names: Sequence[str] | None = None,
) -> Finetuned:
    """Fit a head and train it together with the network, which is changed in place.

    Linear heads start from a convex fit on the frozen network. What is trained from there is kept only where the held-out
    cells say clearly (by more than two standard errors) that it is better; else the fit is made again on all cells. Where no cells
    are held out, nothing can say so, and training is kept, as it was asked for.
    """
    if plan.design not in ("wide", "linear"):
        if not tuning.train:
            raise ScbinInputError(
                "F07", f"a head of design {plan.design!r} starts at random: it needs max_steps above 0."
            )
        head = build_head(plan, bert.config.hidden_size, len(lesson.vocabulary.genes), seed=settings.seed)
        history = _train(bert, head, lesson, tuning, settings, cell_names)
        return Finetuned(bert, _calibrated(bert, head, lesson, tuning, settings), history)
    start = ConvexStart(
        bert, lesson, plan, layer=tuning.layer, rebalance=tuning.rebalance, device=settings.device,
        token_budget=settings.token_budget, seed=settings.seed,
    )  # fmt: skip
    everyone = start.cells
    if not tuning.train or tuning.freeze == "all":
        return Finetuned(bert, start.head(everyone), pd.DataFrame(), {"start": start.report, "start_kept": True})
    shifted = replace(lesson, answers=replace(lesson.answers, shifts=start.shifts))
    first = start.head(lesson.training)
    losses = _losses(bert, first, shifted, tuning, settings)
    untouched = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    tensors = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    head = head_from(first.plan, tensors, start.hidden_size, len(lesson.vocabulary.genes))
    history = _train(bert, head, shifted, tuning, settings, cell_names)
    report: dict[str, Any] = {"start": start.report, "start_kept": False}
    if len(losses):  # else there is nothing to compare by
        gain = losses - _losses(bert, head, shifted, tuning, settings)
        mean, error = float(gain.mean()), float(gain.std() / np.sqrt(len(gain)))
        report |= {"start_loss": float(losses.mean()), "gain": mean, "gain_error": error}
        report["start_kept"] = mean <= _CLEARLY * error
    if report["start_kept"]:
        bert.load_state_dict(untouched)
        return Finetuned(bert, start.head(everyone), history, report)
    return Finetuned(bert, _calibrated(bert, head, lesson, tuning, settings), history, report)


def _train(
    bert: BertForMaskedLM,
    head: Head,
    lesson: Lesson,
    tuning: Tuning,
    settings: TrainSettings,
    cell_names: Sequence[str] | None,
) -> pd.DataFrame:
    """Train network and head in the loop, in place."""
    objective = AnswerObjective(
        head, lesson.vocabulary, lesson.weights, lesson.answers, gene_drop=tuning.gene_drop,
        label_smoothing=tuning.label_smoothing, layer=tuning.layer, sampling=tuning.sampling,
        held_out_genes=lesson.held_out_genes,
    )  # fmt: skip
    if not len(lesson.held_out):
        settings = replace(settings, patience=None)
    cells = np.concatenate([lesson.training, lesson.held_out])
    try:
        with _resting(bert, tuning.freeze), adapted(bert, tuning.lora, seed=settings.seed):
            # the loop asks for what an objective can do, not for its class
            return train(
                bert,
                objective,  # type: ignore[arg-type]
                lesson.tokens,
                settings,
                cells=cells,
                held_out=lesson.held_out,
                cell_names=cell_names,
            )
    finally:
        bert.cpu()
        head.cpu().eval()


@contextmanager
def _resting(bert: BertForMaskedLM, freeze: int | Literal["all"]) -> Iterator[None]:
    """Let the first layers rest, and the head of masked modelling, which nothing asks here; take that back in the end."""
    layers = bert.bert.encoder.layer
    resting = [p for layer in (layers if freeze == "all" else layers[:freeze]) for p in layer.parameters()]
    if freeze == "all":
        resting += list(bert.bert.embeddings.parameters())
    words = bert.bert.embeddings.word_embeddings.weight
    resting += [p for p in bert.cls.parameters() if p is not words]
    trained = [p for p in resting if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _losses(bert: BertForMaskedLM, head: Head, lesson: Lesson, tuning: Tuning, settings: TrainSettings) -> np.ndarray:
    """Return the loss of each held-out cell (cells,), targets by their weights."""
    answers, cells = lesson.answers, lesson.held_out
    if not len(cells):
        return np.zeros(0)
    outputs = _outputs(bert, head, lesson, tuning, settings)
    total, weights = np.zeros(len(cells)), np.zeros(len(cells))
    for number, target in enumerate(head.targets):
        values, own = answers.values[number][cells], outputs[:, head.plan.part(target.name)]
        known = np.flatnonzero(np.isfinite(values) & np.isfinite(own).all(axis=1))
        if target.kind == "number":
            loss, weight = np.square(own[known, 0] - values[known]), np.ones(len(known))
        else:
            true, shift = values[known].astype(np.int64), answers.shifts[number] if answers.shifts else None
            logs = log_softmax(own[known] if shift is None else own[known] + shift, axis=1)
            by_class = answers.class_weights[number]
            loss = -logs[np.arange(len(known)), true]
            weight = np.ones(len(known)) if by_class is None else by_class[true]
        total[known] += answers.weights[number] * weight * loss
        weights[known] += answers.weights[number] * weight
    return total[weights > 0] / max(float(weights[weights > 0].mean()), 1e-12)


def _outputs(bert: BertForMaskedLM, head: Head, lesson: Lesson, tuning: Tuning, settings: TrainSettings) -> np.ndarray:
    """Return the head's outputs for the held-out cells (cells, outputs), as float64."""
    return answer_cells(
        bert, head, lesson.tokens[lesson.held_out], lesson.vocabulary, lesson.weights, layer=tuning.layer,
        device=settings.device, token_budget=settings.token_budget,
    ).astype(np.float64)  # fmt: skip


def _calibrated(bert: BertForMaskedLM, head: Head, lesson: Lesson, tuning: Tuning, settings: TrainSettings) -> Head:
    """Return the head with temperatures from the held-out cells, where there are enough of them."""
    if head.plan.design == "gene" or len(lesson.held_out) < _FEWEST_TO_CALIBRATE:
        return head
    outputs = _outputs(bert, head, lesson, tuning, settings)
    targets = []
    for number, target in enumerate(head.targets):
        values = lesson.answers.values[number][lesson.held_out]
        known = np.flatnonzero(np.isfinite(values))
        if target.kind == "class" and len(known) >= _FEWEST_TO_CALIBRATE:
            own = outputs[known, head.plan.part(target.name)]
            target = replace(target, temperature=calibrated(own, values[known].astype(np.int64)))
        targets.append(target)
    head.plan = replace(head.plan, targets=tuple(targets))
    return head


def check_freeze(freeze: int | Literal["all"], n_layers: int) -> None:
    """Raise unless `freeze` is a number of layers that the network has, or `"all"`."""
    if freeze != "all" and not (type(freeze) is int and 0 <= freeze <= n_layers):
        raise ScbinInputError(
            "F04", f"freeze is {freeze!r}; this network has {n_layers} layers: pass 0 to {n_layers}, or 'all'."
        )
