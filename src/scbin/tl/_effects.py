"""What a perturbation measures, and how: exactly, a forward for each edit, or by a screen whose best are made exactly."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from functools import cached_property
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
from scbin.nn.gates import MOST_DIRECTIONS, N_NODES, can_screen, principal_directions, screen
from scbin.nn.run import Runner, embed, run
from scbin.tl._perturb_statistics import donor_codes
from scbin.tl._predict import predictions, record_of
from scbin.tokens.edits import edit_rows, shortened
from scbin.tokens.tokens import MemoryTokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.tl._edits import Plan, States
    from scbin.tokens.edits import Edit, GeneRows

Level = Literal["cell", "gene", "phenotype", "expression"]
CPU_PACK = 6_144  # tokens: a pack whose hidden states stay in the cache of a core is measured faster than a larger one
AUTO_EXACT = 20_000  # edits up to which "auto" makes every one exactly
FEWEST_RANDOM = 5  # genes drawn to see what a screen missed
MOST_TABLE = 20_000_000  # (perturbed, affected) pairs that are held as sums
DEPTH = 10_000.0  # counts of a cell for which the expression is expected
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """How effects are computed; the choices are described in :func:`scbin.tl.perturb`."""

    name: Literal["auto", "exact", "screen"] = "auto"
    verify: float = 0.1  # share of the genes of a screen that is computed exactly, and a tenth as many at random
    max_edits: int = 10_000_000
    precision: Precision = "float32"
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


# ---- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Goal:
    """Where the states of the cells lie, and how much closer to them a cell comes."""

    vectors: tuple[np.ndarray, ...]  # of the cells of each state: goal, start, alternatives
    centre: np.ndarray | None

    @cached_property
    def means(self) -> np.ndarray:
        """Mean vector of each state (states, size)."""
        return np.stack([np.nanmean(part.astype(np.float64), axis=0) for part in self.vectors])

    def compare(self, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the changes of the cosines to the states and the alignment, and how far the unit vectors moved."""
        moved = unit(after, self.centre) - unit(before, self.centre)
        straight = alignment(before, after, self.means[0] - self.means[1])
        return np.column_stack([moved @ unit(self.means, self.centre).T, straight]), moved

    def slopes(self, _: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Return the gradients of the cosines at some vectors, made orthonormal (cells, states, size)."""
        at, directions = unit(vectors, self.centre), unit(self.means, self.centre)
        gradients = directions[None] - (at @ directions.T)[:, :, None] * at[:, None]
        return np.linalg.qr(gradients.transpose(0, 2, 1))[0].transpose(0, 2, 1)


def permuted_labels(donors: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the labels of samples (each a donor and a label) permuted.

    Donors with several labels swap theirs; the others pass theirs to other donors.
    """
    n_labels, new = np.bincount(donors)[donors], labels.copy()
    for group in [n_labels == 1, *(donors == donor for donor in np.unique(donors[n_labels > 1]))]:
        new[group] = rng.permutation(new[group])
    return new


def permuted_means(
    vectors: Sequence[np.ndarray], donors: Sequence[np.ndarray] | None, n_permutations: int, seed: int
) -> np.ndarray:
    """Return the mean vectors of states whose labels are permuted (permutations, states, size); NaN vectors do not count.

    With donors, the cells of a donor and a state keep together.
    """
    labels = np.repeat(np.arange(len(vectors)), [len(part) for part in vectors])
    every, rng = np.concatenate(vectors).astype(np.float64), np.random.default_rng(seed)
    codes = np.arange(len(labels)) if donors is None else donor_codes(np.concatenate(list(donors)))
    known = np.isfinite(every).all(axis=1) & (codes >= 0)
    codes, labels, every = np.unique(codes[known], return_inverse=True)[1], labels[known], every[known]
    (donor, label), sample = np.unique(np.stack([codes, labels]), axis=1, return_inverse=True)
    by_sample = sparse.csr_matrix((np.ones(len(labels)), (sample.reshape(-1), np.arange(len(labels)))))
    sums, n = by_sample @ every, np.bincount(sample.reshape(-1))
    result = np.empty((n_permutations, len(vectors), every.shape[1]))
    for p in range(n_permutations):
        where = (permuted_labels(donor, label, rng), np.arange(len(donor)))
        of_state = sparse.csr_matrix((np.ones(len(donor)), where), shape=(len(vectors), len(donor)))
        result[p] = (of_state @ sums) / np.maximum(of_state @ n, 1)[:, None]
    return result


def permutation_p_values(observed: np.ndarray, permuted: np.ndarray) -> np.ndarray:
    """Return how often a shift (genes,) is reached under permuted labels (permutations, genes), two-sided.

    Each gene is measured in its own standard deviation over the labellings, the true one among them, so that one that moves cells
    far does not stand out for that; the scores under permuted labels of all genes are then one null distribution.
    """
    every = np.concatenate([observed[None], permuted])
    centred = every - every.mean(axis=0)
    size = np.sqrt((centred**2).mean(axis=0))
    scores = np.abs(centred) / np.where(size > 1e-12 * max(float(np.nanmax(size, initial=0)), 1e-300), size, np.nan)
    null = np.sort(scores[1:][np.isfinite(scores[1:])])
    reached = len(null) - np.searchsorted(null, scores[0] * (1 - 1e-9), side="left")
    return np.where(np.isfinite(scores[0]), (reached + 1) / (len(null) + 1), np.nan)


@dataclass(frozen=True, eq=False)
class Measure:
    """What is read of a cell before and after an edit, and the numbers that compare the two."""

    level: Level
    names: tuple[str, ...]  # of the numbers of each edit; the first is "shift"
    limits: tuple[float, float]  # of the shift
    read: Callable[[sparse.csr_matrix], np.ndarray]  # token rows to what is compared (n, features)
    originals: np.ndarray  # (rows, features), NaN where not needed
    seconds: float  # for each token, as measured on the originals
    goal: Goal | None = None
    wanted: int | None = None  # the value of a phenotype whose probability counts

    def compare(self, before: np.ndarray, after: np.ndarray, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return numbers of features before and after (n, names) when `genes` were edited, and what is averaged by set (n, w)."""
        if self.goal is not None:
            return self.goal.compare(before, after)
        if self.level in ("cell", "gene"):
            return cosine_shift(before, after)[:, None], None
        change = after.astype(np.float64) - before
        if self.level == "phenotype":
            shift = np.abs(change).sum(axis=1) / 2 if self.wanted is None else change[:, self.wanted]
            return np.column_stack([shift, change]), None
        change[np.arange(len(change))[:, None], genes] = 0.0
        n_others = max(change.shape[1] - genes.shape[1], 1)
        return np.abs(change).sum(axis=1, keepdims=True) / n_others, change


def make_measure(
    model: Model,
    rows: GeneRows,
    level: Level,
    cells: np.ndarray,
    states: States | None,
    members: tuple[np.ndarray, ...],
    how: dict[str, Any],
) -> Measure:
    """Read the cells as they are, and say what an edit is compared by."""
    counts = model.network.counts
    if level == "expression" and counts is None:
        why = 'level="expression" needs a model with a count head, as scbin.tl.pretrain makes on counts.'
        raise ScbinInputError("M06", why)

    def read(tokens: sparse.csr_matrix) -> np.ndarray:
        given = MemoryTokens(tokens, rows.vocabulary)
        if states is not None and level == "phenotype":
            return predictions(given, model, given, [states.key], calibrate=False, **how)[0].values
        vectors = embed(model.network, given, **how)
        if level == "expression" and counts is not None:
            return np.log1p(DEPTH * expected_shares(counts, torch.from_numpy(vectors)))
        return vectors

    everyone = np.flatnonzero(rows.n_genes)
    with_everyone = bool(members) and states is not None and states.centre == "cells"
    used = everyone if with_everyone else np.unique(np.concatenate([cells, *members]))
    start = time.monotonic()
    found = read(rows.tokens[used])
    seconds = (time.monotonic() - start) / max(rows.tokens[used].nnz, 1)
    originals = np.full((rows.tokens.shape[0], found.shape[1]), np.nan, dtype=np.float32)
    originals[used] = found
    about: dict[str, Any] = {"level": level, "read": read, "originals": originals, "seconds": seconds}
    if states is not None and members:
        within = everyone if with_everyone else np.unique(np.concatenate(members))
        centre = None if states.centre is None else np.nanmean(originals[within].astype(np.float64), axis=0)
        others = (f"shift_to_{in_column(name)}" for name in states.alternatives)
        names = ("shift", "shift_to_start", *others, "alignment")
        return Measure(names=names, limits=(-2, 2), goal=Goal(tuple(originals[of] for of in members), centre), **about)
    if states is not None and level == "phenotype":
        values = record_of(model, states.key).classes
        if states.goal not in (None, *values):
            known = ", ".join(map(repr, values[:6])) + (" ..." if len(values) > 6 else "")
            raise ScbinInputError("A06", f"{states.goal!r} is no value of {states.key!r}, which has: {known}.")
        wanted = None if states.goal is None else values.index(states.goal)
        names = ("shift", *(f"change_of_{in_column(value)}" for value in values))
        return Measure(names=names, limits=(0.0 if wanted is None else -1.0, 1.0), wanted=wanted, **about)
    return Measure(names=("shift",), limits=(0.0, np.inf if level == "expression" else 2.0), **about)


def in_column(name: str) -> str:
    """Return a name as it can stand in the name of a column; files cannot have a slash there."""
    return name.replace("/", "-")


# ---- running --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Job:
    """Edits to make and how to make them."""

    plan: Plan
    rows: GeneRows
    edit: Edit
    runner: Runner
    token_budget: int
    group: np.ndarray  # (rows,) group of each cell, -1 where it is not perturbed
    donors: np.ndarray | None  # (rows,)
    seed: int
    progress: bool

    @property
    def how(self) -> dict[str, Any]:
        """Return the options of `run`."""
        precision = "float32" if self.runner.dtype == torch.float32 else "bfloat16"
        return {"device": str(self.runner.device), "precision": precision, "token_budget": self.token_budget}

    @property
    def n_slots(self) -> int:
        """Number of groups times sets."""
        return (int(self.group.max()) + 1) * len(self.plan.sets)

    @cached_property
    def slots(self) -> np.ndarray:
        """Group of cells and set of each pair (pairs,)."""
        return self.group[self.plan.cells] * len(self.plan.sets) + self.plan.which

    @cached_property
    def weights(self) -> np.ndarray:
        """Weight of each pair in the mean of its slot: cells alike, or donors alike (pairs,)."""
        if self.donors is None:
            return np.ones(len(self.slots))
        codes = donor_codes(self.donors)[self.plan.cells]
        _, which, n = np.unique(np.stack([self.slots, codes]), axis=1, return_inverse=True, return_counts=True)
        return np.where(codes >= 0, 1.0 / n[which.reshape(-1)], 0.0)

    def blocks(self, pairs: np.ndarray, label: str = "perturbing") -> Iterator[np.ndarray]:
        """Yield some pairs at a time, as many as fit into sixteen packs."""
        lengths = np.diff(self.rows.tokens.indptr)[self.plan.cells[pairs]].astype(np.int64)
        stops = np.flatnonzero(np.diff(np.cumsum(lengths) // (16 * self.token_budget), append=-1)) + 1
        with tqdm(total=len(pairs), desc=label, unit="edit", disable=not self.progress) as bar:
            for part in np.split(pairs, stops[:-1]) if len(pairs) else ():
                yield part
                bar.update(len(part))


@dataclass(eq=False)
class Effects:
    """The numbers of every pair, and how they came about."""

    values: np.ndarray  # (pairs, names) float32, NaN where an edit changed nothing or left nothing to read
    exact: np.ndarray  # (sets,) bool
    method: Literal["exact", "screen"] = "exact"
    about: dict[str, Any] = field(default_factory=dict)
    after: np.ndarray | None = None  # (pairs, features), kept for a joint perturbation
    sums: np.ndarray | None = None  # (slots, w) weighted sums of what the measure averages by set
    totals: np.ndarray | None = None  # (slots, 1) their weights

    @property
    def profile(self) -> np.ndarray | None:
        """Return the mean by slot of what the measure averages (slots, w), NaN where there is none."""
        if self.sums is None or self.totals is None:
            return None
        return self.sums / np.where(self.totals > 0, self.totals, np.nan)

    def take(self, job: Job, measure: Measure, at: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        """Take in what was read before and after the edits of some pairs."""
        self.values[at], moved = measure.compare(before, after, job.plan.genes[at])
        if self.after is not None:
            self.after[at] = after
        if moved is None:
            return
        if self.sums is None or self.totals is None:
            self.sums, self.totals = np.zeros((job.n_slots, moved.shape[1])), np.zeros((job.n_slots, 1))
        known = np.flatnonzero(np.isfinite(self.values[at, 0]))
        where = (job.slots[at][known], np.arange(len(known)))
        by_slot = sparse.csr_matrix((job.weights[at][known], where), shape=(job.n_slots, len(known)))
        self.sums += by_slot @ moved[known]
        self.totals += by_slot @ np.ones((len(known), 1))


def run_effects(job: Job, measure: Measure, method: Method, *, keep: bool = False) -> Effects:
    """Make all edits, exactly or by the screen with its best exactly; `keep` what is read after the edits."""
    plan = job.plan
    can = measure.level == "cell" and can_screen(job.runner.network, job.rows, job.edit, plan.sets)
    if method.name == "screen" and not can:
        asked = (
            f"mode={job.edit.mode!r} of {count(plan.sets.shape[1], 'gene')} at once in {job.rows.vocabulary.encoding!r}"
        )
        advice = "only for single genes and the cell's vector, and in 'rank' only for deletions. Use method=\"exact\"."
        raise ScbinInputError("P01", f"there is no screen for {asked} tokens, measured so: {advice}")
    by_screen = method.name == "screen" or (method.name == "auto" and can and len(plan.cells) > AUTO_EXACT)
    _announce(job, measure, method, by_screen)
    pairs = np.arange(len(plan.cells))
    values = np.full((len(pairs), len(measure.names)), np.nan, dtype=np.float32)
    after = np.full((len(pairs), measure.originals.shape[1]), np.nan, dtype=np.float32) if keep else None
    effects = Effects(values, np.ones(len(plan.sets), dtype=bool), "screen" if by_screen else "exact", after=after)
    if by_screen:
        _screen(job, measure, effects)
        _verify(job, measure, effects, method.verify)
    else:
        _exact(job, measure, effects, pairs)
    return effects


def _exact(job: Job, measure: Measure, effects: Effects, pairs: np.ndarray, label: str = "perturbing") -> None:
    """Read every edited row; an edit that pushes genes out of a row is compared with the row that lost as many."""
    for at in job.blocks(pairs, label):
        cells = job.plan.cells[at]
        edited = edit_rows(job.rows, job.edit, cells, job.plan.genes[at])
        before = measure.originals[cells]
        cut = np.flatnonzero(edited.n_cut)
        if len(cut):  # many pairs share an original that lost as many genes
            kinds = np.stack([cells[cut], edited.n_cut[cut]], axis=1)
            kinds, which = np.unique(kinds, axis=0, return_inverse=True)
            before[cut] = measure.read(shortened(job.rows, kinds[:, 0], kinds[:, 1]))[which.reshape(-1)]
        todo = np.flatnonzero(edited.changed)
        after = np.full(before.shape, np.nan, dtype=before.dtype)
        after[todo] = measure.read(edited.tokens if len(todo) == len(after) else edited.tokens[todo])
        effects.take(job, measure, at, before, after)


def _screen(job: Job, measure: Measure, effects: Effects) -> None:
    """Estimate the effects of all edits of single genes."""
    cells, genes = job.plan.cells, job.plan.genes[:, 0]
    pairs = (job.runner, job.rows, job.edit, cells, genes)
    if measure.goal is None:
        directions = principal_directions(*pairs, measure.originals, seed=job.seed, token_budget=job.token_budget)
    else:
        directions = measure.goal.slopes
    with tqdm(total=len(cells), desc="screening", unit="edit", disable=not job.progress) as bar:
        for at, before, after, changed in screen(*pairs, directions, token_budget=job.token_budget):
            effects.take(job, measure, at, before, np.where(changed[:, None], after, np.nan))
            bar.update(len(at))


def _verify(job: Job, measure: Measure, effects: Effects, share: float) -> None:
    """Compute the genes with the largest effects exactly, and a few at random, which tell how many were missed."""
    which, n_sets = job.plan.which, len(job.plan.sets)
    screened = means_of(effects.values[:, 0], which, n_sets)
    order = np.argsort(-np.abs(np.nan_to_num(screened)), kind="stable")
    n_top = min(n_sets, math.ceil(share * n_sets))
    n_random = min(n_sets - n_top, max(FEWEST_RANDOM, math.ceil(share * n_sets / 10))) if n_top else 0
    top, others = order[:n_top], order[n_top:]
    drawn = np.random.default_rng(job.seed).choice(others, n_random, replace=False)
    effects.exact = np.isin(np.arange(n_sets), np.concatenate([top, drawn]))
    if effects.sums is not None and effects.totals is not None:
        again = np.tile(effects.exact, job.n_slots // n_sets)
        effects.sums[again], effects.totals[again] = 0.0, 0.0
    _exact(job, measure, effects, np.flatnonzero(effects.exact[which]), "verifying")
    effects.about = {"verified": int(n_top), "drawn": int(n_random)}
    if n_random > 2:
        found = means_of(effects.values[:, 0], which, n_sets)
        rho = spearmanr(found[drawn], screened[drawn], nan_policy="omit").statistic
        late = np.nanmean(np.abs(found[drawn]) > np.nanquantile(np.abs(found[top]), 0.5))
        effects.about["spearman_random"] = round(float(rho), 4)
        effects.about["estimated_missed"] = round(float(late * (len(others) - n_random)), 1)


def means_of(values: np.ndarray, which: np.ndarray, n: int) -> np.ndarray:
    """Return the mean of the known values of each of `n` groups, NaN where there are none."""
    return pd.Series(values, dtype=np.float64).groupby(which).mean().reindex(range(n)).to_numpy()


def _announce(job: Job, measure: Measure, method: Method, by_screen: bool) -> None:
    """Say in one line what is about to be done and for how long."""
    plan, lengths = job.plan, np.diff(job.rows.tokens.indptr)
    cells, tokens = np.unique(plan.cells), float(lengths[plan.cells].sum())
    if by_screen:
        n_slopes = 2 * (MOST_DIRECTIONS if measure.goal is None else len(measure.goal.vectors))
        each = 2 + n_slopes + (0 if job.rows.vocabulary.position_is_gene else N_NODES)
        tokens = each * lengths[cells].sum() + min(1.0, 1.1 * method.verify) * tokens
    seconds = max(1, round(tokens * measure.seconds))
    time_needed = count(seconds, "second") if seconds < 90 else count(round(seconds / 60), "minute")
    edits = f"{count(len(plan.cells), 'edit')} in {count(len(cells), 'cell')}"
    line = f"scbin: {edits}, {'screen' if by_screen else 'exact'}: about {time_needed}."
    (tqdm.write if job.progress else _log.info)(line)


# ---- the other genes of a cell --------------------------------------------------------------------------------------


def affected_genes(job: Job, names: tuple[str, ...]) -> tuple[Effects, list[pd.DataFrame]]:
    """Return how edits move the vectors of the other genes of their cells: their mean for each pair, and a table by group.

    The rows of a table are pairs of a perturbed set and an affected gene, those of "cell", the mean over all genes, first.
    """
    plan, n_genes = job.plan, len(names)
    if job.n_slots * (n_genes + 1) > MOST_TABLE:
        size = f"{job.n_slots:,} perturbed times {n_genes:,} affected genes"
        raise ScbinInputError(
            "A02", f"{size} do not fit into a table of {MOST_TABLE:,} pairs. Name fewer genes to perturb."
        )
    moments = np.zeros((3, job.n_slots * (n_genes + 1)))  # number, sum and squares; gene 0 is the whole cell
    values = np.full((len(plan.cells), 1), np.nan, dtype=np.float32)
    for at in job.blocks(np.arange(len(plan.cells))):
        edited = edit_rows(job.rows, job.edit, plan.cells[at], plan.genes[at])
        changed = np.flatnonzero(edited.changed)
        after, pair, gene = gene_vectors(job, edited.tokens[changed])
        pair = changed[pair]
        distinct, of = np.unique(plan.cells[at], return_inverse=True)
        before, row, known = gene_vectors(job, job.rows.tokens[distinct])
        place = pd.Index(row * n_genes + known).get_indexer(of.reshape(-1)[pair] * n_genes + gene)
        kept = (place >= 0) & ~(plan.genes[at][pair] == gene[:, None]).any(axis=1)
        shifts, pair, gene = cosine_shift(before[place[kept]], after[kept]), pair[kept], gene[kept]
        values[at, 0] = means_of(shifts, pair, len(at))
        whole = np.flatnonzero(np.isfinite(values[at, 0]))
        slots = job.slots[at][np.concatenate([pair, whole])] * (n_genes + 1)
        where = slots + np.concatenate([gene + 1, np.zeros(len(whole), dtype=np.int64)])
        every = np.concatenate([shifts, values[at[whole], 0]])
        moments += [np.bincount(where, weights=every**k, minlength=moments.shape[1]) for k in range(3)]
    n, total, squares = moments.reshape(3, -1, len(plan.sets), n_genes + 1)
    tables = []
    for group in range(len(n)):
        row, column = np.nonzero(n[group])
        order = np.lexsort((column, row, column > 0))
        row, column = row[order], column[order]
        counts = n[group, row, column]
        mean = total[group, row, column] / counts
        spread = np.sqrt(np.maximum(squares[group, row, column] / counts - mean**2, 0))
        affected, perturbed = np.array(["cell", *names], dtype=object), np.array(plan.names, dtype=object)
        columns = {"perturbed": perturbed[row], "affected": affected[column], "shift": mean, "sd": spread}
        tables.append(pd.DataFrame({**columns, "n_cells": counts.astype(np.int64)}))
    return Effects(values, np.ones(len(plan.sets), dtype=bool)), tables


def gene_vectors(job: Job, tokens: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the vectors of all gene tokens (n, hidden), with the row and the gene of each (n,)."""
    network, vocabulary = job.runner.network, job.rows.vocabulary
    vectors, rows, genes = [np.zeros((0, network.backbone.hidden_size), np.float32)], [], []
    for pack, hidden in run(network, MemoryTokens(tokens, vocabulary), layer=network.vector.layer, **job.how):
        ids, positions = pack.input_ids.cpu().numpy(), pack.position_ids.cpu().numpy()
        at = np.flatnonzero(vocabulary.is_gene_token(ids))
        vectors.append(hidden[torch.from_numpy(at).to(hidden.device)].float().cpu().numpy())
        rows.append(pack.cells[pack.rows.cpu().numpy()[at]])
        genes.append(vocabulary.genes_at(ids[at], positions[at]))
    none = np.zeros(0, dtype=np.int64)
    return np.concatenate(vectors), np.concatenate([none, *rows]), np.concatenate([none, *genes])
