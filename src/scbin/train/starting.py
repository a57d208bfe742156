"""The convex start of a head: penalties chosen by cross-validation, then one fit per target on the frozen network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_matrix

from scbin.data.splitting import folds_of, share_of
from scbin.nn.embedding import embed_tokens
from scbin.nn.heads import build_head, gene_values
from scbin.nn.prediction import calibrated
from scbin.train.linear import Features, choose_classes, choose_numbers, fit_linear, log_prior

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.embedding import Weights
    from scbin.nn.heads import Head, HeadPlan
    from scbin.train.answers import Answers
    from scbin.train.linear import Choice, Linear

_FOLDS = 4
_MOST_CELLS = 3_000  # more change the choice of penalties little


@dataclass(frozen=True, eq=False)
class Lesson:
    """All that is learned from: tokens whose phenotypes are hidden, and what is known about their cells or genes."""

    tokens: csr_matrix
    vocabulary: Vocabulary
    weights: Weights
    answers: Answers
    training: np.ndarray  # cells
    held_out: np.ndarray  # cells
    groups: np.ndarray | None = None  # (cells,)
    held_out_genes: np.ndarray | None = None  # (genes,)


def expression(tokens: csr_matrix, vocabulary: Vocabulary) -> csr_matrix:
    """Return what a head of design `"wide"` reads directly (cells, genes)."""
    genes, values = gene_values(tokens.data.astype(np.int64), tokens.indices, vocabulary)
    rows = np.repeat(np.arange(tokens.shape[0]), np.diff(tokens.indptr))
    there = values > 0
    shape = (tokens.shape[0], len(vocabulary.genes))
    return csr_matrix((values[there].astype(np.float64), (rows[there], genes[there])), shape=shape)


class ConvexStart:
    """Fits linear heads on a frozen network; what it chose for the training cells holds for every fit.

    Parameters
    ----------
    bert
        The network.
    lesson
        What is learned from.
    plan
        Of the head: `"wide"` or `"linear"`.
    layer
        Whose hidden states the head reads.
    rebalance
        Share of the log frequencies that is taken off the outputs of classes; `None` chooses it.
    device, token_budget
        Of the vectors.
    seed
        Of the folds.
    """

    def __init__(
        self,
        bert: BertForMaskedLM,
        lesson: Lesson,
        plan: HeadPlan,
        *,
        layer: int = -1,
        rebalance: float | None = None,
        device: str = "auto",
        token_budget: int = 32_768,
        seed: int = 0,
    ):
        self.plan, self.lesson, self.rebalance, self.seed = plan, lesson, rebalance, seed
        self.cells = np.sort(np.concatenate([lesson.training, lesson.held_out]))
        tokens = lesson.tokens[self.cells]
        z = embed_tokens(bert, tokens, lesson.weights, layer=layer, device=device, token_budget=token_budget)
        self.z = np.nan_to_num(z).astype(np.float64)  # where no token has a weight, the head too will see zeros
        self.x = expression(tokens, lesson.vocabulary) if plan.design == "wide" else None
        self.places = np.full(lesson.tokens.shape[0], -1)
        self.places[self.cells] = np.arange(len(self.cells))
        self.hidden_size = self.z.shape[1]
        self.centre, self.scale = self._spread(lesson.training)
        self.choices = tuple(self._choose(number) for number in range(len(plan.targets)))

    @property
    def shifts(self) -> tuple[np.ndarray | None, ...]:
        """What each target's outputs are short of, beside the log frequencies of its classes in the training cells."""
        return tuple(self._shift(number, self.lesson.training) for number in range(len(self.plan.targets)))

    @property
    def report(self) -> dict[str, dict[str, object]]:
        """What was chosen, by target."""
        return {
            target.name: {"variances": list(c.variances), "rebalance": c.prior_share, "cross_validated_loss": c.loss}
            for target, c in zip(self.plan.targets, self.choices, strict=True)
        }

    def head(self, cells: np.ndarray) -> Head:
        """Return the head that is fitted to some cells, its temperatures those of the cross-validation."""
        targets = tuple(replace(t, temperature=self._temperature(n)) for n, t in enumerate(self.plan.targets))
        head = build_head(replace(self.plan, targets=targets), self.hidden_size, len(self.lesson.vocabulary.genes))
        fits = [self._fit(number, cells) for number in range(len(targets))]
        with torch.no_grad():
            head.centre.copy_(torch.from_numpy(self.centre))
            head.scale.copy_(torch.from_numpy(self.scale))
            head.output.weight.copy_(torch.from_numpy(np.concatenate([fit.z for fit in fits], axis=1).T.copy()))
            head.output.bias.copy_(torch.from_numpy(np.concatenate([fit.bias for fit in fits])))
            if self.x is not None:
                head.genes.copy_(torch.from_numpy(np.concatenate([fit.x for fit in fits if fit.x is not None], axis=1)))
        return head.eval()

    # ---- one target -------------------------------------------------------------------------------------------------

    def _fit(self, number: int, cells: np.ndarray) -> Linear:
        values, choice = self.lesson.answers.values[number], self.choices[number]
        rows = cells[np.isfinite(values[cells])]
        fit = fit_linear(
            self._features(rows),
            self._answers(number, rows),
            choice.variances,
            cell_weights=self._weights(number, rows),
        )
        shift = self._shift(number, rows)
        return fit if shift is None else replace(fit, bias=fit.bias - shift)

    def _choose(self, number: int) -> Choice:
        target, values = self.plan.targets[number], self.lesson.answers.values[number]
        rows = self._rows(number)
        classes = values[rows].astype(np.int64) if target.kind == "class" else np.zeros(len(rows), dtype=np.int64)
        groups = None if self.lesson.groups is None else self.lesson.groups[rows]
        folds = folds_of(classes, _FOLDS, groups=groups, seed=self.seed)
        if len(np.unique(folds)) < 2:
            folds = folds_of(classes, _FOLDS, seed=self.seed)
        if target.kind == "number":
            return choose_numbers(self._features(rows), values[rows], folds)
        class_weights = self.lesson.answers.class_weights[number]
        return choose_classes(
            self._features(rows), classes, len(target.classes), folds,
            class_weights=class_weights, rebalance=self.rebalance,
        )  # fmt: skip

    def _rows(self, number: int) -> np.ndarray:
        """The training cells that a choice is made on."""
        values = self.lesson.answers.values[number]
        rows = self.lesson.training[np.isfinite(values[self.lesson.training])]
        if len(rows) <= _MOST_CELLS:
            return rows
        classes = values[rows] if self.plan.targets[number].kind == "class" else np.zeros(len(rows))
        return rows[share_of(classes.astype(np.int64), _MOST_CELLS / len(rows), seed=self.seed)]

    def _temperature(self, number: int) -> float:
        if self.plan.targets[number].kind != "class":
            return 1.0
        values = self.lesson.answers.values[number]
        return calibrated(self.choices[number].outputs, values[self._rows(number)].astype(np.int64))

    def _shift(self, number: int, cells: np.ndarray) -> np.ndarray | None:
        """Return what is taken off the outputs of classes for the frequent ones' sake (classes,)."""
        target, share = self.plan.targets[number], self.choices[number].prior_share
        if target.kind != "class" or share == 0:
            return None
        values = self.lesson.answers.values[number][cells]
        known = values[np.isfinite(values)].astype(np.int64)
        return share * log_prior(known, len(target.classes), self.lesson.answers.class_weights[number])

    def _features(self, cells: np.ndarray) -> Features:
        places = self.places[cells]
        return Features((self.z[places] - self.centre) * self.scale, None if self.x is None else self.x[places])

    def _answers(self, number: int, cells: np.ndarray) -> np.ndarray:
        values, target = self.lesson.answers.values[number][cells], self.plan.targets[number]
        return values if target.kind == "number" else np.eye(len(target.classes))[values.astype(np.int64)]

    def _weights(self, number: int, cells: np.ndarray) -> np.ndarray | None:
        weights = self.lesson.answers.class_weights[number]
        return None if weights is None else weights[self.lesson.answers.values[number][cells].astype(np.int64)]

    def _spread(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = self.z[self.places[cells]]
        spread = z.std(axis=0)
        return z.mean(axis=0), np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0)
