"""The convex start of a head: regressions chosen by cross-validation, then fitted to the frozen network, and added up."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_matrix

from scbin.data.splitting import folds_of, share_of
from scbin.nn.embedding import embed_tokens
from scbin.nn.heads import build_head, gene_values
from scbin.nn.prediction import calibrated
from scbin.train.choosing import by_folds, choose_classes, choose_numbers, log_prior, rebalanced
from scbin.train.linear import Features, blended, fit_linear, spread_of

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.embedding import Weights
    from scbin.nn.heads import Head, HeadPlan
    from scbin.train.answers import Answers
    from scbin.train.choosing import Choice
    from scbin.train.linear import Linear

_FOLDS = 4
_MOST_CELLS = 3_000  # more change the choice of regressions little
_MOST_TO_BALANCE = 20_000  # but how far they lean towards frequent classes depends on the number of cells


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
    """Fits linear heads on a frozen network; what it chose by cross-validation holds for every fit.

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
        self.spread = None if self.x is None else spread_of(self.x[self.places[lesson.training]])
        self.choices = tuple(self._choose(number) for number in range(len(plan.targets)))

    @property
    def shifts(self) -> tuple[np.ndarray | None, ...]:
        """What each target's outputs are short of, beside the log frequencies of its classes in the training cells."""
        return tuple(self._shift(number, self.lesson.training) for number in range(len(self.plan.targets)))

    @property
    def report(self) -> dict[str, dict[str, object]]:
        """What was chosen, by target."""
        return {
            target.name: {
                "regressions": [{**asdict(strength), "weight": weight} for strength, weight in c.members],
                "rebalance": c.prior_share,
                "cross_validated_loss": c.loss,
            }
            for target, c in zip(self.plan.targets, self.choices, strict=True)
        }

    def head(self, cells: np.ndarray) -> Head:
        """Return the head that is fitted to some cells, its temperatures those of the cross-validation."""
        pairs = zip(self.plan.targets, self.choices, strict=True)
        targets = tuple(replace(target, temperature=choice.temperature) for target, choice in pairs)
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
        features, answers, weights = self._features(rows), self._answers(number, rows), self._weights(number, rows)
        fits = [(fit_linear(features, answers, s, cell_weights=weights), weight) for s, weight in choice.members]
        shift = self._shift(number, rows)
        fit = blended(fits)
        return fit if shift is None else replace(fit, bias=fit.bias - shift)

    def _choose(self, number: int) -> Choice:
        rows = self._rows(number, _MOST_CELLS)
        folds = self._folds(number, rows)
        if self.plan.targets[number].kind == "number":
            return choose_numbers(self._features(rows), self.lesson.answers.values[number][rows], folds)
        choice = choose_classes(
            self._features(rows), self._codes(number, rows), len(self.plan.targets[number].classes), folds,
            class_weights=self.lesson.answers.class_weights[number],
        )  # fmt: skip
        return self._balanced(number, choice)

    def _balanced(self, number: int, choice: Choice) -> Choice:
        """Choose how far rare classes are favoured, and the temperature that then fits, on as many cells as can be."""
        rows = self._rows(number, _MOST_TO_BALANCE)
        classes, prior = self._codes(number, rows), self._prior(number, rows)
        outputs = by_folds(
            self._features(rows), self._answers(number, rows), choice.members, self._folds(number, rows),
            cell_weights=self._weights(number, rows),
        )  # fmt: skip
        share = rebalanced(outputs, classes, prior) if self.rebalance is None else self.rebalance
        return replace(choice, prior_share=share, temperature=calibrated(outputs - share * prior, classes))

    def _rows(self, number: int, most: int) -> np.ndarray:
        """The cells that a choice is made on: held-out ones too, which judge training but are fitted to where it fails."""
        rows = self.cells[np.isfinite(self.lesson.answers.values[number][self.cells])]
        if len(rows) <= most:
            return rows
        return rows[share_of(self._codes(number, rows), most / len(rows), seed=self.seed)]

    def _folds(self, number: int, rows: np.ndarray) -> np.ndarray:
        """The fold of each cell, by donor where donors are known."""
        classes = self._codes(number, rows)
        groups = None if self.lesson.groups is None else self.lesson.groups[rows]
        folds = folds_of(classes, _FOLDS, groups=groups, seed=self.seed)
        return folds if len(np.unique(folds)) > 1 else folds_of(classes, _FOLDS, seed=self.seed)

    def _codes(self, number: int, cells: np.ndarray) -> np.ndarray:
        """The class of each cell, 0 where the answer is a number."""
        if self.plan.targets[number].kind == "number":
            return np.zeros(len(cells), dtype=np.int64)
        return self.lesson.answers.values[number][cells].astype(np.int64)

    def _shift(self, number: int, cells: np.ndarray) -> np.ndarray | None:
        """Return what is taken off the outputs of classes for the frequent ones' sake (classes,)."""
        share = self.choices[number].prior_share
        if self.plan.targets[number].kind != "class" or share == 0:
            return None
        return share * self._prior(number, cells[np.isfinite(self.lesson.answers.values[number][cells])])

    def _prior(self, number: int, cells: np.ndarray) -> np.ndarray:
        """The log frequency of each class in some cells that have one (classes,)."""
        n_classes = len(self.plan.targets[number].classes)
        return log_prior(self._codes(number, cells), n_classes, self.lesson.answers.class_weights[number])

    def _features(self, cells: np.ndarray) -> Features:
        places = self.places[cells]
        z = (self.z[places] - self.centre) * self.scale
        return Features(z, None if self.x is None else self.x[places], self.spread)

    def _answers(self, number: int, cells: np.ndarray) -> np.ndarray:
        target = self.plan.targets[number]
        if target.kind == "number":
            return self.lesson.answers.values[number][cells]
        return np.eye(len(target.classes))[self._codes(number, cells)]

    def _weights(self, number: int, cells: np.ndarray) -> np.ndarray | None:
        weights = self.lesson.answers.class_weights[number]
        return None if weights is None else weights[self._codes(number, cells)]

    def _spread(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = self.z[self.places[cells]]
        spread = z.std(axis=0)
        return z.mean(axis=0), np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0)
