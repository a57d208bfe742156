"""What a perturbation measures, and how: exactly, a forward for each edit, or by a screen whose best are made exactly."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from scbin._arguments import check_fields
from scbin._errors import ScbinInputError, count
from scbin.nn.density import expected_shares
from scbin.nn.embedding import token_expression
from scbin.nn.gates import Screen, can_screen
from scbin.nn.run import Runner, embed, gene_tokens, run
from scbin.tl._perturb_statistics import donor_codes, gene_statistics
from scbin.tl._predict import predictions, record_of
from scbin.tokens.edits import edit_rows, shortened
from scbin.tokens.tokens import MemoryTokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.tl._edits import Plan, States
    from scbin.tl._perturb_statistics import Statistics
    from scbin.tokens.edits import GeneRows

Level = Literal["cell", "gene", "phenotype", "expression"]
AUTO_EXACT = 20_000  # edits up to which "auto" makes every one exactly
FEWEST_RANDOM = 5  # genes drawn to see what a screen missed
DEPTH = 10_000.0  # counts of a cell for which the expression is expected
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """How effects are computed; the choices are described in :func:`scbin.tl.perturb`."""

    name: Literal["auto", "exact", "screen"] = "auto"
    verify: float = 0.1  # share of the genes of a screen that is computed exactly, and a tenth as many at random
    max_edits: int = 10_000_000
    precision: Precision = "auto"
    token_budget: int = 32_768

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.verify <= 1 or self.token_budget < 1:
            wrong = f"verify={self.verify} is a share, token_budget={self.token_budget} 1 or more."
            raise ScbinInputError("A02", wrong)


# ---- how far a vector moved -----------------------------------------------------------------------------------------


def unit(vectors: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """Return vectors of length 1, seen from a centre, in float64."""
    vectors = np.asarray(vectors, dtype=np.float64) - (0.0 if centre is None else centre)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)


def cosine_shift(before: np.ndarray, after: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """Return 1 - cosine of each row with its partner, without the cancellation near a cosine of 1."""
    return 0.5 * ((unit(after, centre) - unit(before, centre)) ** 2).sum(axis=-1)


def alignment(before: np.ndarray, after: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return the cosine of the way that each row went with a direction: 1 is straight there, however far; NaN for no way."""
    way = np.asarray(after, dtype=np.float64) - before
    return np.where(way.any(axis=-1), unit(way) @ unit(direction), np.nan)


def joined(directions: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return directions and others (cells, n, size) as orthonormal ones."""
    both = np.concatenate([directions, others], axis=1)[:, : directions.shape[2]]
    return np.linalg.qr(both.transpose(0, 2, 1))[0].transpose(0, 2, 1)


# ---- what is measured -----------------------------------------------------------------------------------------------


class Measure:
    """What is read of a cell before and after an edit, and the numbers that compare the two.

    `names` are those of the numbers of each edit, the first is the shift, which lies within `limits`. Beside them `width` numbers
    are averaged over the cells of a set. `options` are those of `scbin.nn.run.run`.
    """

    def __init__(
        self,
        model: Model,
        rows: GeneRows,
        level: Level,
        cells: np.ndarray,
        states: States | None = None,
        members: tuple[np.ndarray, ...] = (),  # the cells of each state
        **options: Any,
    ):
        self.model, self.vocabulary, self.level, self.states, self.options = (
            model,
            rows.vocabulary,
            level,
            states,
            options,
        )
        self.names: tuple[str, ...] = ("shift",)
        self.limits, self.width = (0.0, 2.0), 0
        self.means: Any = None  # mean vector of each state (states, size)
        self.expected: Any = None  # direction of each state that a cell's own label alone makes (rows, states, size)
        if level == "expression":
            if model.network.counts is None:
                why = 'level="expression" needs a model with a count head, as scbin.tl.pretrain makes on counts.'
                raise ScbinInputError("M06", why)
            self.limits, self.width = (0.0, np.inf), len(rows.vocabulary.genes)
        if level == "phenotype" and states is not None:
            values = record_of(model, states.key).classes
            if states.goal not in (None, *values):
                known = ", ".join(map(repr, values[:6])) + (" ..." if len(values) > 6 else "")
                raise ScbinInputError("A06", f"{states.goal!r} is no value of {states.key!r}, which has: {known}.")
            self.wanted = None if states.goal is None else values.index(states.goal)
            self.limits = (0.0 if self.wanted is None else -1.0, 1.0)
            self.names = ("shift", *(f"change_of_{in_column(value)}" for value in values))
        used = np.unique(np.concatenate([cells, *members]))
        found = self.read(rows.tokens[used])
        self.originals = np.full((rows.tokens.shape[0], found.shape[1]), np.nan, dtype=np.float32)
        self.originals[used] = found
        if members and states is not None:
            self.ends = [self.originals[of] for of in members]
            self.means = np.stack([np.nanmean(part.astype(np.float64), axis=0) for part in self.ends])
            within = self.originals[np.unique(np.concatenate(members))]
            self.centre = np.nanmean(within.astype(np.float64), axis=0)  # the origin of the cosines
            others = (f"shift_to_{in_column(name)}" for name in states.alternatives)
            self.names = ("shift", "shift_to_start", *others, "alignment")
            self.limits, self.width = (-2.0, 2.0), found.shape[1]

    def read(self, tokens: sparse.csr_matrix) -> np.ndarray:
        """Return what is compared (rows, features): vectors, probabilities, or the logarithm of expected counts."""
        given = MemoryTokens(tokens, self.vocabulary)
        if self.level == "phenotype" and self.states is not None:
            return predictions(self.model, given, [self.states.key], **self.options)[0].values
        vectors = embed(self.model.network, given, **self.options)
        if self.level == "expression" and self.model.network.counts is not None:
            return np.log1p(DEPTH * expected_shares(self.model.network.counts, torch.from_numpy(vectors)))
        return vectors

    def compare(self, before: np.ndarray, after: np.ndarray, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers of features before and after (n, names) when `genes` were edited, and what is averaged (n, width)."""
        nothing = np.empty((len(before), 0))
        if self.means is not None:
            moved = unit(after, self.centre) - unit(before, self.centre)
            straight = alignment(before, after, self.means[0] - self.means[1])
            return np.column_stack([moved @ unit(self.means, self.centre).T, straight]), moved
        if self.level == "cell":
            return cosine_shift(before, after)[:, None], nothing
        change = after.astype(np.float64) - before
        if self.level == "phenotype":
            shift = np.abs(change).sum(axis=1) / 2 if self.wanted is None else change[:, self.wanted]
            return np.column_stack([shift, change]), nothing
        change[np.arange(len(change))[:, None], genes] = 0.0
        n_others = max(change.shape[1] - genes.shape[1], 1)
        return np.abs(change).sum(axis=1, keepdims=True) / n_others, change

    def slopes(self, _: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Return the gradients of the cosines to the states at some vectors, made orthonormal (cells, states, size)."""
        at, directions = unit(vectors, self.centre), unit(self.means, self.centre)
        gradients = directions[None] - (at @ directions.T)[:, :, None] * at[:, None]
        return np.linalg.qr(gradients.transpose(0, 2, 1))[0].transpose(0, 2, 1)


def in_column(name: str) -> str:
    """Return a name as it can stand in the name of a column; files cannot have a slash there."""
    return name.replace("/", "-")


# ---- running --------------------------------------------------------------------------------------------------------


class Effects:
    """The numbers of every edit of a plan, and how they came about."""

    def __init__(
        self, plan: Plan, measure: Measure, *, keep: bool = False, seed: int = 0, progress: bool = False
    ) -> None:
        self.plan, self.measure, self.seed, self.progress = plan, measure, seed, progress
        n, n_slots = len(plan.cells), (int(plan.group.max()) + 1) * len(plan.sets)
        self.values = np.full((n, len(measure.names)), np.nan, dtype=np.float32)  # NaN where an edit changed nothing
        self.after = np.full((n, measure.originals.shape[1]), np.nan, dtype=np.float32) if keep else None
        self.exact = np.ones(len(plan.sets), dtype=bool)
        self.about: dict[str, Any] = {"method": "exact"}
        self.slots = plan.group[plan.cells] * len(plan.sets) + plan.which  # (edits,) group and set
        n_own = 0 if measure.expected is None else measure.expected.shape[1]
        self.sums = np.zeros((n_slots, measure.width + n_own + 1))  # of what the measure averages, and of the weights
        self.weights = np.ones(n)  # cells count alike, or donors do
        if plan.donors is not None and measure.width:
            codes = donor_codes(plan.donors)
            _, which, sizes = np.unique(
                self.slots * len(codes) + codes[plan.cells], return_inverse=True, return_counts=True
            )
            self.weights = np.where(codes[plan.cells] >= 0, 1.0 / sizes[which], 0.0)

    @property
    def profile(self) -> np.ndarray:
        """What the measure averages, by group and set (slots, width), and what of it is expected; NaN where there is none."""
        return self.sums[:, :-1] / np.where(self.sums[:, -1:] > 0, self.sums[:, -1:], np.nan)

    def run(self, method: Method) -> Effects:
        """Make all edits, exactly or by the screen with its best exactly."""
        plan, network = self.plan, self.measure.model.network
        can = self.measure.level == "cell" and can_screen(network, plan.rows, plan.edit, plan.sets)
        if method.name == "screen" and not can:
            found = f"mode={plan.edit.mode!r} of {count(plan.sets.shape[1], 'gene')} at once in {plan.rows.vocabulary.encoding!r}"
            advice = (
                "only for single genes and the cell's vector, and in 'rank' only for deletions. Use method=\"exact\"."
            )
            raise ScbinInputError("P01", f"there is no screen for {found} tokens: {advice}")
        by_screen = method.name == "screen" or (method.name == "auto" and can and len(plan.cells) > AUTO_EXACT)
        n_cells = count(len(np.unique(plan.cells)), "cell")
        _log.info("%s in %s, %s", count(len(plan.cells), "edit"), n_cells, "screened" if by_screen else "exact")
        if by_screen:
            self.estimate()
            self.verify(method.verify)
        else:
            self.compute(np.arange(len(plan.cells)))
        return self

    def blocks(self, edits: np.ndarray, label: str = "perturbing") -> Iterator[np.ndarray]:
        """Yield some edits at a time, as many as fit into sixteen packs."""
        lengths = np.diff(self.plan.rows.tokens.indptr)[self.plan.cells[edits]].astype(np.int64)
        stops = np.flatnonzero(np.diff(np.cumsum(lengths) // (16 * self.measure.options["token_budget"]))) + 1
        with tqdm(total=len(edits), desc=label, unit="edit", disable=not self.progress) as bar:
            for part in np.split(edits, stops):
                yield part
                bar.update(len(part))

    def compute(self, edits: np.ndarray, label: str = "perturbing") -> None:
        """Read every edited row; an edit that pushes genes out of a row is compared with the row that lost as many."""
        plan, measure = self.plan, self.measure
        for at in self.blocks(edits, label):
            cells = plan.cells[at]
            edited = edit_rows(plan.rows, plan.edit, cells, plan.genes[at])
            before = measure.originals[cells]
            cut = np.flatnonzero(edited.n_cut)
            if len(cut):  # many edits share an original that lost as many genes
                kinds = np.stack([cells[cut], edited.n_cut[cut]], axis=1)
                kinds, which = np.unique(kinds, axis=0, return_inverse=True)
                before[cut] = measure.read(shortened(plan.rows, kinds[:, 0], kinds[:, 1]))[which.reshape(-1)]
            after = np.full(before.shape, np.nan, dtype=before.dtype)
            after[edited.changed] = measure.read(edited.tokens[np.flatnonzero(edited.changed)])
            self._take(at, before, after)

    def estimate(self) -> None:
        """Estimate the effects of all edits of single genes by the screen."""
        plan, measure, cells, genes = self.plan, self.measure, self.plan.cells, self.plan.genes[:, 0]
        runner = Runner(measure.model.network, measure.options["device"], measure.options["precision"])
        screen = Screen(runner, plan.rows, plan.edit, measure.options["token_budget"])
        directions: Any = measure.slopes
        if measure.means is None or measure.expected is not None:  # permuted states lie in other directions
            axes = screen.directions(cells, genes, measure.originals, seed=self.seed)
            directions = axes if measure.means is None else lambda *at: joined(measure.slopes(*at), axes(*at))
        with tqdm(total=len(cells), desc="screening", unit="edit", disable=not self.progress) as bar:
            for at, before, after, changed in screen.estimate(cells, genes, directions):
                self._take(at, before, np.where(changed[:, None], after, np.nan))
                bar.update(len(at))
        self.about["method"] = "screen"

    def verify(self, share: float) -> None:
        """Compute the genes with the largest effects exactly, and a few at random, which tell how many were missed."""
        which, n_sets = self.plan.which, len(self.plan.sets)
        screened = means_of(self.values[:, 0], which, n_sets)
        order = np.argsort(-np.abs(np.nan_to_num(screened)), kind="stable")
        n_top = min(n_sets, math.ceil(share * n_sets))
        n_random = min(n_sets - n_top, max(FEWEST_RANDOM, math.ceil(share * n_sets / 10))) if n_top else 0
        top, others = order[:n_top], order[n_top:]
        drawn = np.random.default_rng(self.seed).choice(others, n_random, replace=False)
        self.exact = np.isin(np.arange(n_sets), np.concatenate([top, drawn]))
        self.sums[np.tile(self.exact, len(self.sums) // n_sets)] = 0.0
        self.compute(np.flatnonzero(self.exact[which]), "verifying")
        self.about |= {"verified": int(n_top), "drawn": int(n_random)}
        if n_random > 2:
            found = means_of(self.values[:, 0], which, n_sets)
            rho = spearmanr(found[drawn], screened[drawn], nan_policy="omit").statistic
            late = np.nanmean(np.abs(found[drawn]) > np.nanquantile(np.abs(found[top]), 0.5))
            self.about["spearman_random"] = round(float(rho), 4)
            self.about["estimated_missed"] = round(float(late * (len(others) - n_random)), 1)

    def _take(self, at: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        """Take in what was read before and after some edits."""
        self.values[at], moved = self.measure.compare(before, after, self.plan.genes[at])
        if self.measure.expected is not None:
            own = (moved[:, None] * self.measure.expected[self.plan.cells[at]]).sum(axis=2)
            moved = np.column_stack([moved, own])
        if self.after is not None:
            self.after[at] = after
        known = np.flatnonzero(np.isfinite(self.values[at, 0]))
        where = (self.slots[at][known], np.arange(len(known)))
        by_slot = sparse.csr_matrix((self.weights[at][known], where), shape=(len(self.sums), len(known)))
        self.sums += by_slot @ np.column_stack([moved[known], np.ones(len(known))])


def means_of(values: np.ndarray, which: np.ndarray, n: int) -> np.ndarray:
    """Return the mean of the known values of each of `n` groups, NaN where there are none."""
    return pd.Series(values, dtype=np.float64).groupby(which).mean().reindex(range(n)).to_numpy()


# ---- the other genes of a cell --------------------------------------------------------------------------------------


def affected_genes(effects: Effects, judged: Statistics) -> list[pd.DataFrame]:
    """Make all edits and return a table for each group: how they move the vectors of the other genes of their cells.

    The rows are pairs of a perturbed set and an affected gene, those of "cell", the mean over all genes, first. p values compare a
    gene with the other affected genes of its expression, FDR is among the affected genes of a set.
    """
    plan, values, n_genes = effects.plan, effects.values, len(effects.plan.gene_names)
    donor = np.zeros(len(plan.group), dtype=np.int64) if plan.donors is None else donor_codes(plan.donors)
    n_donors = int(donor.max()) + 1
    n_places = n_donors + int((donor < 0).any())  # the last one is nobody's
    moments = np.zeros(
        (3, len(effects.sums) * n_places * (n_genes + 1))
    )  # number, sum and squares; gene 0 is the whole cell
    for at in effects.blocks(np.arange(len(plan.cells))):
        edited = edit_rows(plan.rows, plan.edit, plan.cells[at], plan.genes[at])
        changed = np.flatnonzero(edited.changed)
        after, edit, gene = gene_vectors(effects.measure, edited.tokens[changed])
        edit = changed[edit]
        distinct, of = np.unique(plan.cells[at], return_inverse=True)
        before, row, known = gene_vectors(effects.measure, plan.rows.tokens[distinct])
        place = pd.Index(row * n_genes + known).get_indexer(of.reshape(-1)[edit] * n_genes + gene)
        kept = (place >= 0) & ~(plan.genes[at][edit] == gene[:, None]).any(axis=1)
        shifts, edit, gene = cosine_shift(before[place[kept]], after[kept]), edit[kept], gene[kept]
        values[at, 0] = means_of(shifts, edit, len(at))
        whole = np.flatnonzero(np.isfinite(values[at, 0]))
        slots = ((effects.slots[at] * n_places + donor[plan.cells[at]] % n_places) * (n_genes + 1))[
            np.concatenate([edit, whole])
        ]
        where = slots + np.concatenate([gene + 1, np.zeros(len(whole), dtype=np.int64)])
        every = np.concatenate([shifts, values[at[whole], 0]])
        moments += [np.bincount(where, weights=every**k, minlength=moments.shape[1]) for k in range(3)]
    names, perturbed, tables = (
        np.array(["cell", *plan.gene_names], dtype=object),
        np.array(plan.names, dtype=object),
        [],
    )
    by_group = moments.reshape(3, -1, len(plan.sets), n_places, n_genes + 1).swapaxes(0, 1)
    for group, by_donor in enumerate(by_group):
        n, total, squares = by_donor.sum(axis=2)
        found = _judged(by_donor[:, :, :n_donors, 1:], plan, group, judged)
        row, column = np.nonzero(n)
        order = np.lexsort((column, row, column > 0))
        row, column = row[order], column[order]
        counts = n[row, column]
        mean = total[row, column] / counts
        columns = {"perturbed": perturbed[row], "affected": names[column], "shift": mean}
        columns["sd"] = np.sqrt(np.maximum(squares[row, column] / counts - mean**2, 0))
        columns |= {name: values[row, column] for name, values in found.items()}
        tables.append(pd.DataFrame({**columns, "n_cells": counts.astype(np.int64)}))
    return tables


def _judged(moments: np.ndarray, plan: Plan, group: int, judged: Statistics) -> dict[str, np.ndarray]:
    """Return effect sizes, p values and FDR (sets, 1 + genes), NaN for the whole cell, from moments (3, sets, donors, genes)."""
    cells = np.flatnonzero(plan.group == group)
    expression = token_expression(plan.rows.tokens[cells], plan.rows.vocabulary)
    about: dict[str, Any] = {
        "names": plan.gene_names,
        "expression": expression,
        "statistics": judged,
        "limits": (0.0, 2.0),
    }
    about["donors"] = None if plan.donors is None else plan.donors[cells]
    made: dict[str, list[np.ndarray]] = {"effect_size": [], "p_value": [], "fdr": []}
    for n, total, squares in moments.swapaxes(0, 1):  # (donors, genes) each
        mean = total / np.where(n > 0, n, np.nan)
        variance = np.maximum(squares - n * mean**2, 0) / np.where(n > 1, n - 1, np.nan)
        table = gene_statistics((mean, np.sqrt(variance / np.maximum(n, 1)), n.astype(np.int64)), **about)
        for name, values in made.items():
            values.append(np.append(np.nan, table[name].to_numpy()))
    return {name: np.stack(values) for name, values in made.items()}


def gene_vectors(measure: Measure, tokens: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the vectors of all gene tokens (n, hidden), with the row and the gene of each (n,).

    They are read where the cell's vector is, or behind the last layer if that reads embeddings, which see no other gene.
    """
    network, vocabulary = measure.model.network, measure.vocabulary
    vectors, rows, genes = [np.zeros((0, network.backbone.hidden_size), np.float32)], [], []
    for pack, hidden in run(
        network, MemoryTokens(tokens, vocabulary), layer=network.vector.layer or -1, **measure.options
    ):
        at, gene, row = gene_tokens(pack, vocabulary)
        vectors.append(hidden[torch.from_numpy(at).to(hidden.device)].float().cpu().numpy())
        rows.append(row)
        genes.append(gene)
    none = np.zeros(0, dtype=np.int64)
    return np.concatenate(vectors), np.concatenate([none, *rows]), np.concatenate([none, *genes])
