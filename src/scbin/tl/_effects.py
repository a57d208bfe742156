"""Which cells and genes a perturbation edits, what it measures, and how: a forward for each edit, or a screen whose best are made exactly."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from tqdm.auto import tqdm

from scbin._adata import read_obs, warn
from scbin._arguments import check_fields
from scbin._errors import ScbinInputError, count
from scbin.nn.counts import expected_shares
from scbin.nn.gates import Screen, can_screen
from scbin.nn.packs import token_expression
from scbin.nn.run import Runner, embed, gene_tokens, run
from scbin.tl._perturb_statistics import donor_codes, gene_statistics
from scbin.tl._predict import predictions, record_of
from scbin.tokens.edits import edit_rows, shortened
from scbin.tokens.tokens import MemoryTokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

    from scbin._adata import GeneNames
    from scbin.model import Model
    from scbin.tl._perturb_statistics import Statistics
    from scbin.tokens.edits import Edit, GeneRows

AT_ONCE = 2_000_000  # lookups of (cell, set) pairs held in memory at a time
MOST_EDITS = 10_000_000
AUTO_EXACT = 20_000  # edits up to which "auto" makes every one exactly
DEPTH = 10_000.0  # counts of a cell for which the expression is expected

Method = Literal["auto", "exact", "screen"]


@dataclass(frozen=True)
class States:
    """From which cells to which others genes should move cells; described in :func:`scbin.tl.perturb`."""

    key: str = ""
    goal: str | None = None
    start: str | None = None  # whose cells are perturbed; default: all cells in none of the other states
    alternatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        others = self.alternatives
        object.__setattr__(self, "alternatives", (others,) if isinstance(others, str) else tuple(others))
        check_fields(self)
        named = [name for name in self.names if name]
        if len(set(named)) < len(named):
            raise ScbinInputError("A03", f"goal, start and alternatives must be different states; these are {named}.")

    @property
    def names(self) -> tuple[str, ...]:
        """Goal, start ("" for the rest of the cells) and alternatives."""
        return (self.goal or "", self.start or "", *self.alternatives)

    def members(self, adata: AnnData, readable: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the rows of the cells of each state in `names`; each must have some that can be read."""
        labels = read_obs(adata, self.key).astype(object).map(str)
        rest = ~labels.isin([name for name in self.names if name])
        members = tuple(np.flatnonzero(readable & (labels == name if name else rest)) for name in self.names)
        empty = [name or "(the rest)" for name, cells in zip(self.names, members, strict=True) if not len(cells)]
        if self.goal is None or empty:
            numbers = labels[readable].value_counts().head(6)
            found = f"obs[{self.key!r}] has {', '.join(f'{name!r} ({n:,})' for name, n in numbers.items())} with tokens"
            wrong = f"no cell with tokens is in {empty[0]!r}" if self.goal else "states needs the goal to come to"
            raise ScbinInputError("A06" if self.goal else "A03", f"{wrong}. {found}.")
        return members


def perturbed_cells(
    adata: AnnData, readable: np.ndarray, states: States | None, members: tuple[np.ndarray, ...]
) -> np.ndarray:
    """Return the rows of the cells that can be read and are in the start state."""
    chosen = readable
    if members:
        return members[1]
    if states is not None and states.start is not None:
        chosen = readable & (read_obs(adata, states.key).astype(str) == states.start).to_numpy()
    if not chosen.any():
        raise ScbinInputError("P02", "no cell has tokens (see adata.obs['scbin_status']) and the start state.")
    return np.flatnonzero(chosen)


@dataclass(frozen=True, eq=False)
class Plan:
    """All edits to make, sorted so that equally long cells, and edits that are most alike, follow each other."""

    rows: GeneRows
    edit: Edit
    gene_names: tuple[str, ...]
    chosen: np.ndarray  # rows of the cells that are perturbed
    donors: np.ndarray | None  # (rows,)
    sets: np.ndarray  # (sets, m) genes of the model that are edited together
    cells: np.ndarray  # (edits,) row of each
    which: np.ndarray  # (edits,) set of each

    def __post_init__(self) -> None:
        lengths = np.diff(self.rows.tokens.indptr)[self.cells]
        place, _ = self.rows.find(self.cells, self.sets[self.which, -1])  # neighbours in a row leave rows alike
        order = np.lexsort((self.which, place, self.cells, lengths))
        object.__setattr__(self, "cells", self.cells[order])
        object.__setattr__(self, "which", self.which[order])

    @property
    def genes(self) -> np.ndarray:
        """Genes of each edit (edits, m)."""
        return self.sets[self.which]

    @property
    def names(self) -> list[str]:
        """Names of the sets."""
        return [",".join(self.gene_names[gene] for gene in row) for row in self.sets]


def make_plan(
    rows: GeneRows,
    named: GeneNames,
    edit: Edit,
    wanted: Any,
    cells: np.ndarray,
    *,
    donors: np.ndarray | None = None,
    each: bool = True,
    combine: int = 1,
) -> Plan:
    """Return the edits of a request; refuse what cannot be found or is too much.

    A cell is edited if it expresses all genes of a set; where named genes come in, every cell is.
    """
    everything = wanted is None
    if everything:
        at, expressed = rows.expressed()
        wanted = [rows.vocabulary.genes[gene] for gene in np.unique(expressed[np.isin(at, cells)])]
    sets = _gene_sets(named, wanted, each, combine)
    needed = sets if everything or not edit.inserts else sets[:, :0]
    pairs, n = [], 0
    for part in np.array_split(cells, max(1, len(cells) * sets.size // AT_ONCE)):
        row, column = np.nonzero((rows.find(part[:, None, None], needed[None])[1] > 0).all(axis=2))
        pairs.append(np.stack([part[row], column]))
        n += len(row)
        _refuse_too_many(n)
    at, which = np.concatenate(pairs, axis=1)
    if everything and n:
        used, which = np.unique(which, return_inverse=True)
        sets = sets[used]
    plan = Plan(rows, edit, named.names, cells, donors, sets, at, which)
    lacking = np.flatnonzero(np.bincount(which, minlength=len(sets)) == 0)
    if len(lacking):
        found = f"{', '.join(plan.names[k] for k in lacking[:3])}: expressed in none of the {count(len(cells), 'cell')}"
        if not n:
            raise ScbinInputError("P02", f"{found}, so there is nothing to edit. Choose other cells or genes.")
        warn("P02", f"{found} ({count(len(lacking), 'such row')} of the table will be empty).")
    return plan


def _gene_sets(named: GeneNames, wanted: Any, each: bool, combine: int) -> np.ndarray:
    """Return the sets of genes that names, tuples of names, names together or names combined stand for (sets, m)."""
    items = [wanted] if isinstance(wanted, str) else list(wanted)
    if any(isinstance(item, tuple) for item in items):
        sets = [tuple(named.resolve(item)) for item in items]
    else:
        single = named.resolve(items)
        _refuse_too_many(comb(len(single), combine) if each else 1)
        sets = list(itertools.combinations(single, combine)) if each else [tuple(single)]
    if len({len(row) for row in sets}) != 1 or not sets[0]:
        told = f"genes={items[:5]} and {combine=} make no sets of one size, at least one gene each."
        raise ScbinInputError("A03", told)
    return np.array(list(dict.fromkeys(sets)), dtype=np.int64)


def _refuse_too_many(n: int) -> None:
    if n > MOST_EDITS:
        told = f"this makes {n:,} edits; at most {MOST_EDITS:,} are possible. Use fewer genes or cells."
        raise ScbinInputError("A02", told)


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


def orthonormal(directions: np.ndarray) -> np.ndarray:
    """Return directions (cells, n, size) made orthonormal."""
    return np.linalg.qr(directions[:, : directions.shape[2]].transpose(0, 2, 1))[0].transpose(0, 2, 1)


# ---- what is measured -----------------------------------------------------------------------------------------------


class Measure:
    """What is read of a cell before and after an edit, and the numbers that compare the two.

    It is the cell's vector, or, for states without `members` (their cells), the probabilities of a phenotype. `names` are those of
    the numbers of each edit, the first is the shift, which lies within `limits`. `options` are those of `scbin.nn.run.run`.
    """

    def __init__(
        self,
        model: Model,
        rows: GeneRows,
        cells: np.ndarray,
        states: States | None = None,
        members: tuple[np.ndarray, ...] = (),
        **options: Any,
    ):
        self.model, self.rows, self.options = model, rows, options
        self.phenotype = None if states is None or members else states.key
        self.names: tuple[str, ...] = ("shift",)
        self.limits = (0.0, 2.0)
        self.means: Any = None  # mean vector of each state (states, size)
        self.expected: Any = None  # direction of each state that a cell's own label alone makes (rows, states, size)
        if states is not None and self.phenotype is not None:
            record = record_of(model, states.key)
            if record.kind != "class":
                raise ScbinInputError("A03", f"{states.key!r} is a number; level='phenotype' is for classes.")
            values = record.classes
            if states.goal not in (None, *values):
                told = f"{states.goal!r} is not a value of {states.key!r}. Available: {values[:9]}."
                raise ScbinInputError("A06", told)
            self.wanted = None if states.goal is None else values.index(states.goal)
            self.limits = (0.0 if self.wanted is None else -1.0, 1.0)
            self.names = ("shift", *(f"change_of_{in_column(value)}" for value in values))
        used = np.unique(np.concatenate([cells, *members]))
        found = self.read(rows.tokens[used])
        self.options = {**options, "progress": False}  # edits have a bar of their own
        self.originals = np.full((rows.tokens.shape[0], found.shape[1]), np.nan, dtype=np.float32)
        self.originals[used] = found
        if states is not None and members:
            self.ends = [self.originals[of].astype(np.float64) for of in members]
            self.means = np.stack([np.nanmean(part, axis=0) for part in self.ends])
            within = self.originals[np.unique(np.concatenate(members))]
            self.centre = np.nanmean(within.astype(np.float64), axis=0)  # the origin of the cosines
            others = (f"shift_to_{in_column(name)}" for name in states.alternatives)
            self.names, self.limits = ("shift", "shift_to_start", *others, "alignment"), (-2.0, 2.0)

    def read(self, tokens: sparse.csr_matrix) -> np.ndarray:
        """Return what is compared (rows, features): vectors or probabilities."""
        given = MemoryTokens(tokens, self.rows.vocabulary)
        if self.phenotype is not None:
            return predictions(self.model, given, [self.phenotype], **self.options)[self.phenotype]
        return embed(self.model.network, given, **self.options)

    def compare(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return the numbers of features before and after (n, names)."""
        if self.means is not None:
            straight = alignment(before, after, self.means[0] - self.means[1])
            return np.column_stack([self.way(before, after) @ unit(self.means, self.centre).T, straight])
        if self.phenotype is None:
            return cosine_shift(before, after)[:, None]
        change = after.astype(np.float64) - before
        shift = np.abs(change).sum(axis=1) / 2 if self.wanted is None else change[:, self.wanted]
        return np.column_stack([shift, change])

    def way(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return how the directions of vectors change, seen from the middle of the states (n, size)."""
        return unit(after, self.centre) - unit(before, self.centre)

    def slopes(self, vectors: np.ndarray) -> np.ndarray:
        """Return the gradients of the cosines to the states at some vectors (cells, states, size)."""
        at, directions = unit(vectors, self.centre), unit(self.means, self.centre)
        return directions[None] - (at @ directions.T)[:, :, None] * at[:, None]


def in_column(name: str) -> str:
    """Return a name as it can stand in the name of a column; files cannot have a slash there."""
    return name.replace("/", "-")


# ---- running --------------------------------------------------------------------------------------------------------


class Effects:
    """The numbers of every edit of a plan, and how they came about."""

    def __init__(self, plan: Plan, measure: Measure, *, keep: bool = False, seed: int = 0, progress: bool = False):
        self.plan, self.measure, self.seed, self.progress = plan, measure, seed, progress
        n, size = len(plan.cells), measure.originals.shape[1]
        self.values = np.full((n, len(measure.names)), np.nan, dtype=np.float32)  # NaN where an edit changed nothing
        self.after = np.full((n, size), np.nan, dtype=np.float32) if keep else None
        self.exact, self.screened = np.ones(len(plan.sets), dtype=bool), False
        # of permuted states, sums over the edits of a set: of the way, of what a cell's own label makes of it, and of the weights
        width = 0 if measure.expected is None else size + measure.expected.shape[1] + 1
        self.sums = np.zeros((len(plan.sets), width))
        self.weights = np.ones(n)  # cells count alike, or donors do
        if plan.donors is not None:
            codes = donor_codes(plan.donors)
            by_donor = plan.which * len(codes) + codes[plan.cells]
            _, which, sizes = np.unique(by_donor, return_inverse=True, return_counts=True)
            self.weights = np.where(codes[plan.cells] >= 0, 1.0 / sizes[which], 0.0)

    def run(self, method: Method, verify: float = 0.1) -> Effects:
        """Make all edits, exactly or by the screen with the largest effects made exactly."""
        plan, measure = self.plan, self.measure
        can = measure.phenotype is None and can_screen(measure.model.network, plan.rows, plan.edit, plan.sets)
        if method == "screen" and not can:
            found = f"mode={plan.edit.mode!r} of {count(plan.sets.shape[1], 'gene')} at once"
            advice = "only for single genes and the cell's vector, and of ranks only for deletions. Use method='exact'."
            raise ScbinInputError("P01", f"there is no screen for {found}: {advice}")
        self.screened = method == "screen" or (method == "auto" and can and len(plan.cells) > AUTO_EXACT)
        if self.screened:
            self.estimate()
            n_sets = len(plan.sets)
            screened = np.abs(np.nan_to_num(means_of(self.values[:, 0], plan.which, n_sets)))
            self.exact = np.zeros(n_sets, dtype=bool)
            self.exact[np.argsort(-screened, kind="stable")[: math.ceil(verify * n_sets)]] = True
            self.sums[self.exact] = 0.0
        self.compute(np.flatnonzero(self.exact[plan.which]))
        return self

    def blocks(self, edits: np.ndarray) -> Iterator[np.ndarray]:
        """Yield some edits at a time, as many as fit into sixteen packs."""
        lengths = np.diff(self.plan.rows.tokens.indptr)[self.plan.cells[edits]].astype(np.int64)
        stops = np.flatnonzero(np.diff(np.cumsum(lengths) // (16 * self.measure.options["token_budget"]))) + 1
        with tqdm(total=len(edits), desc="perturbing", unit="edit", disable=not self.progress) as bar:
            for part in np.split(edits, stops):
                yield part
                bar.update(len(part))

    def compute(self, edits: np.ndarray) -> None:
        """Read every edited row; an edit that pushes genes out of a row is compared with the row that lost as many."""
        plan, measure = self.plan, self.measure
        for at in self.blocks(edits):
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
        directions: Any = lambda _, vectors: orthonormal(measure.slopes(vectors))
        if measure.means is None or measure.expected is not None:  # permuted states lie in other directions
            axes = screen.directions(cells, genes, measure.originals, seed=self.seed)
            directions = axes
            if measure.means is not None:
                directions = lambda at, z: orthonormal(np.concatenate([measure.slopes(z), axes(at, z)], axis=1))
        with tqdm(total=len(cells), desc="screening", unit="edit", disable=not self.progress) as bar:
            for at, before, after, changed in screen.estimate(cells, genes, directions):
                self._take(at, before, np.where(changed[:, None], after, np.nan))
                bar.update(len(at))

    def _take(self, at: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        """Take in what was read before and after some edits."""
        self.values[at] = self.measure.compare(before, after)
        if self.after is not None:
            self.after[at] = after
        if self.measure.expected is not None:
            way = self.measure.way(before, after)
            own = (way[:, None] * self.measure.expected[self.plan.cells[at]]).sum(axis=2)
            known = np.flatnonzero(np.isfinite(self.values[at, 0]))
            where = (self.plan.which[at][known], np.arange(len(known)))
            by_set = sparse.csr_matrix((self.weights[at][known], where), shape=(len(self.sums), len(known)))
            self.sums += by_set @ np.column_stack([way, own, np.ones(len(at))])[known]


def means_of(values: np.ndarray, which: np.ndarray, n: int) -> np.ndarray:
    """Return the mean of the known values of each of `n` groups, NaN where there are none."""
    return pd.Series(values, dtype=np.float64).groupby(which).mean().reindex(range(n)).to_numpy()


# ---- the other genes of a cell --------------------------------------------------------------------------------------


def affected_genes(effects: Effects, level: str, judged: Statistics) -> pd.DataFrame:
    """Make all edits and return how they move the other genes of their cells, one row per set and gene.

    p values compare a gene with the other affected genes of its expression, FDR is among the affected genes of a set.
    """
    plan, n_genes, n_sets = effects.plan, len(effects.plan.gene_names), len(effects.plan.sets)
    donor = np.zeros(plan.rows.tokens.shape[0], dtype=np.int64) if plan.donors is None else donor_codes(plan.donors)
    n_donors = int(donor.max()) + 1
    moments = np.zeros((3, n_sets * n_donors * n_genes))  # number, sum and squares
    for at in effects.blocks(np.arange(len(plan.cells))):
        edited = edit_rows(plan.rows, plan.edit, plan.cells[at], plan.genes[at])
        changed = np.flatnonzero(edited.changed)
        after, edit, gene = read_genes(effects.measure, edited.tokens[changed], level)
        edit = changed[edit]
        distinct, of = np.unique(plan.cells[at], return_inverse=True)
        before, row, known = read_genes(effects.measure, plan.rows.tokens[distinct], level)
        place = pd.Index(row * n_genes + known).get_indexer(of.reshape(-1)[edit] * n_genes + gene)
        kept = (place >= 0) & ~(plan.genes[at][edit] == gene[:, None]).any(axis=1) & (donor[plan.cells[at]][edit] >= 0)
        before, after, edit, gene = before[place[kept]], after[kept], edit[kept], gene[kept]
        shifts = cosine_shift(before, after) if level == "gene" else (after - before)[:, 0].astype(np.float64)
        where = (plan.which[at] * n_donors + donor[plan.cells[at]])[edit] * n_genes + gene
        for k in range(3):
            np.add.at(moments[k], where, shifts**k)
    limits, tables = (0.0, 2.0) if level == "gene" else (-np.inf, np.inf), []
    expression = token_expression(plan.rows.tokens[plan.chosen], plan.rows.vocabulary)
    of_sets = moments.reshape(3, n_sets, n_donors, n_genes).swapaxes(0, 1)
    for name, (n, total, squares) in zip(plan.names, of_sets, strict=True):
        mean = total / np.where(n > 0, n, np.nan)  # (donors, genes)
        variance = np.maximum(squares - n * mean**2, 0) / np.where(n > 1, n - 1, np.nan)
        summary = (mean, np.sqrt(variance / np.maximum(n, 1)), n.astype(np.int64))
        table = gene_statistics(summary, plan.gene_names, expression, judged, limits=limits)
        table = table.rename(columns={"gene": "affected"})[n.sum(axis=0) > 0]
        table.insert(0, "perturbed", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def read_genes(measure: Measure, tokens: sparse.csr_matrix, level: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what is compared of genes (n, features), with the row and the gene of each (n,).

    The vectors of all gene tokens, or the logarithm of the counts that are expected of every gene.
    """
    network: Any = measure.model.network
    vocabulary = measure.rows.vocabulary
    given, none = MemoryTokens(tokens, vocabulary), np.zeros(0, dtype=np.int64)
    if level == "expression":
        counts = np.log1p(DEPTH * expected_shares(network.counts, torch.from_numpy(measure.read(tokens))))
        row, gene = np.indices(counts.shape).reshape(2, -1)
        return counts.reshape(-1, 1), row, gene
    vectors, rows, genes = [np.zeros((0, network.backbone.hidden_size), np.float32)], [none], [none]
    for pack, hidden in run(network, given, layer=network.gene_layer, **measure.options):
        at, gene, row = gene_tokens(pack, vocabulary)
        vectors.append(hidden[torch.from_numpy(at).to(hidden.device)].float().cpu().numpy())
        rows.append(row)
        genes.append(gene)
    return np.concatenate(vectors), np.concatenate(rows), np.concatenate(genes)
