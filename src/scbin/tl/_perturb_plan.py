"""What `tl.perturb` is to do: which genes are edited together in which cells, and how far to which states."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._anndata import read_obs, warn
from scbin._errors import ScbinInputError, count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.encoding.edits import Edit, GeneRows
    from scbin.tl._perturb_genes import GeneNames

ALL_AT_ONCE = 2_000_000  # lookups of (cell, set) pairs held in memory at a time


@dataclass(frozen=True, eq=False)
class Plan:
    """All (cell, set of genes) pairs to run, sorted so that equally long cells, and edits that are most alike, follow each other."""

    sets: np.ndarray  # (sets, m) genes of the model that are edited together
    names: tuple[str, ...]  # of the sets
    cells: np.ndarray  # (pairs,) rows of adata
    which: np.ndarray  # (pairs,) the set of each pair
    together: bool  # one list of genes at once

    @property
    def genes(self) -> np.ndarray:
        """Genes of each pair (pairs, m)."""
        return self.sets[self.which]

    @property
    def n_pairs(self) -> int:
        """Number of edited rows."""
        return len(self.cells)


@dataclass(frozen=True)
class States:
    """Cells by state: where they start, where they shall go, and other ends."""

    key: str
    names: tuple[str, ...]  # goal, start, alternatives
    members: tuple[np.ndarray, ...]  # rows of each


# ---- cells ----------------------------------------------------------------------------------------------------------


def chosen_cells(
    adata: AnnData, readable: np.ndarray, groupby: str | None, groups: str | Sequence[str] | None, states: States | None
) -> np.ndarray:
    """Return the rows to perturb: those with tokens, of the groups, in the start state."""
    chosen = readable.copy()
    if groups is not None and groupby is None:
        raise ScbinInputError(
            "P36", "groups= names groups of cells; pass groupby= with the column of adata.obs they are in."
        )
    if groupby is not None:
        labels = read_obs(adata, groupby).astype(object).map(str).to_numpy()
        wanted = (
            sorted(set(labels))
            if groups is None
            else [str(g) for g in ([groups] if isinstance(groups, str) else groups)]
        )
        for group in wanted:
            if not (readable & (labels == group)).any():
                raise ScbinInputError("P25", f"group {group!r} is empty: {_with_counts(labels, readable, groupby)}")
        chosen &= np.isin(labels, wanted)
    if states is not None:
        start = np.zeros(len(chosen), dtype=bool)
        start[states.members[1]] = True
        if not (chosen & start).any():
            raise ScbinInputError(
                "P37",
                f"none of the {count(int(chosen.sum()), 'cell')} of the groups is in the start state {states.names[1]!r}. Choose "
                "groups that have such cells.",
            )
        chosen &= start
    if not chosen.any():
        raise ScbinInputError("P38", "no cell has tokens (see adata.obs['scbin_status']). Tokenize cells with counts.")
    return np.flatnonzero(chosen)


def read_states(
    adata: AnnData,
    readable: np.ndarray,
    state_key: str | None,
    start: str | None,
    goal: str | None,
    alternatives: str | Sequence[str] | None,
) -> States | None:
    """Return the states asked for, if any; every one must have cells that can be read."""
    if state_key is None:
        if start is not None or goal is not None or alternatives is not None:
            raise ScbinInputError(
                "P39", "start, goal and alternatives are states; pass state_key= with their column of adata.obs."
            )
        return None
    labels = read_obs(adata, state_key).astype(object).map(str).to_numpy()
    if goal is None:
        raise ScbinInputError("P40", f"pass the state to go to, goal=. {_with_counts(labels, readable, state_key)}")
    others = [alternatives] if isinstance(alternatives, str) else list(alternatives or ())
    named = [str(goal), *([] if start is None else [str(start)]), *(str(other) for other in others)]
    if len(set(named)) < len(named):
        raise ScbinInputError("P41", f"goal, start and alternatives must be different states; these are {named}.")
    for name in named:
        if not (readable & (labels == name)).any():
            raise ScbinInputError(
                "P26", f"no cell with tokens is in the state {name!r}. {_with_counts(labels, readable, state_key)}"
            )
    members = {name: np.flatnonzero(readable & (labels == name)) for name in named}
    if start is None:
        rest = readable & ~np.isin(labels, named)
        if not rest.any():
            raise ScbinInputError("P42", f"all cells are in the goal state {goal!r}: none is left to be perturbed.")
        members[""] = np.flatnonzero(rest)
    names = (str(goal), "" if start is None else str(start), *(str(other) for other in others))
    return States(state_key, names, tuple(members[name] for name in names))


def _with_counts(labels: np.ndarray, readable: np.ndarray, key: str) -> str:
    values, numbers = np.unique(labels[readable], return_counts=True)
    order = np.argsort(-numbers, kind="stable")[:6]
    listed = ", ".join(f"{str(values[k])!r} ({numbers[k]:,})" for k in order) + (" ..." if len(values) > 6 else "")
    return f"adata.obs[{key!r}] has, with tokens: {listed or 'nothing'}."


# ---- genes and pairs ------------------------------------------------------------------------------------------------


def make_plan(
    rows: GeneRows,
    genes: GeneNames,
    cells: np.ndarray,
    edit: Edit,
    wanted: Any,
    *,
    each: bool,
    anchor: str | Sequence[str] | None,
    combine: int,
    max_edits: int,
) -> Plan:
    """Return the pairs of a request; refuse what cannot be found or is too much."""
    anchors = genes.resolve([anchor] if isinstance(anchor, str) else anchor or (), "anchor")
    if wanted is None and combine == 1:
        sets, pairs = _each_expressed(rows, cells, anchors, edit, max_edits)
    else:
        sets = _listed(rows, genes, cells, wanted, each=each, anchors=anchors, combine=combine, max_edits=max_edits)
        pairs = _pairs_of(rows, cells, sets, edit, max_edits)
    names = tuple(",".join(genes.names[gene] for gene in row) for row in sets)
    _check_found(rows, genes, pairs[1], sets, names, edit, wanted is not None, len(cells))
    return _sorted(rows, sets, names, *pairs, together=len(sets) == 1 and sets.shape[1] > 1)


def singles_of(plan: Plan, rows: GeneRows, genes: GeneNames) -> Plan:
    """Each gene of the pairs alone, in the cells in which one of its pairs is edited."""
    single, place = np.unique(plan.sets, return_inverse=True)
    place = place.reshape(plan.sets.shape)
    edits = np.unique(plan.cells[:, None] * len(single) + place[plan.which])
    cells, which = np.divmod(edits, len(single))
    return _sorted(rows, single[:, None], tuple(genes.names[gene] for gene in single), cells, which, together=False)


def _sorted(
    rows: GeneRows, sets: np.ndarray, names: tuple[str, ...], cells: np.ndarray, which: np.ndarray, *, together: bool
) -> Plan:
    lengths = np.diff(rows.tokens.indptr)[cells]
    place, _ = rows.find(cells, sets[which, -1])  # neighbours in a row leave rows that are most alike
    order = np.lexsort((which, place, cells, lengths))
    return Plan(sets, names, cells[order], which[order], together)


def _each_expressed(
    rows: GeneRows, cells: np.ndarray, anchors: list[int], edit: Edit, max_edits: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Every expressed gene in turn, together with the anchors in the cells that hold them all."""
    at, found = rows.expressed()
    kept = np.isin(at, cells)
    if anchors:
        holding = (rows.find(cells[:, None], np.array(anchors)[None])[1] > 0).all(axis=1)
        kept = np.isin(at, cells[holding | edit.inserts]) & ~np.isin(found, anchors)
    at, found = at[kept], found[kept]
    _refuse_too_many(len(at), max_edits)
    used, which = np.unique(found, return_inverse=True)
    sets = np.concatenate([np.tile(np.array(anchors, dtype=np.int64), (len(used), 1)), used[:, None]], axis=1)
    return sets, (at, which.reshape(-1))


def _listed(
    rows: GeneRows,
    genes: GeneNames,
    cells: np.ndarray,
    wanted: Any,
    *,
    each: bool,
    anchors: list[int],
    combine: int,
    max_edits: int,
) -> np.ndarray:
    """The sets of genes that a list, a list of tuples or a number of genes to combine stands for (sets, m)."""
    if wanted is None:
        at, found = rows.expressed()
        single = np.unique(found[np.isin(at, cells)]).tolist()
        items: list[Any] = []
    else:
        items = [wanted] if isinstance(wanted, str) else list(wanted)
        if not items:
            raise ScbinInputError(
                "P31", "genes is empty; name at least one gene, or leave it out for every expressed gene."
            )
        single = [] if any(isinstance(item, tuple) for item in items) else genes.resolve(items)
    if items and not single:
        rows_of = [tuple(genes.resolve([item] if isinstance(item, str) else item)) for item in items]
    elif not each:
        rows_of = [tuple(single)]
    else:
        _refuse_too_many(comb(len(single), combine), max_edits)
        rows_of = list(itertools.combinations(single, combine))
    rows_of = [(*anchors, *(gene for gene in row if gene not in anchors)) for row in rows_of]
    widths = {len(row) for row in rows_of}
    if anchors:  # the anchor with itself is no pair
        rows_of = [row for row in rows_of if len(row) == max(widths)]
    elif len(widths) > 1:
        raise ScbinInputError(
            "P32", f"the combinations in genes have different sizes ({sorted(widths)}); run each size by itself."
        )
    return np.array(list(dict.fromkeys(rows_of)), dtype=np.int64)


def _pairs_of(
    rows: GeneRows, cells: np.ndarray, sets: np.ndarray, edit: Edit, max_edits: int
) -> tuple[np.ndarray, np.ndarray]:
    """All cells with all sets where genes come in, else the cells that express all genes of a set."""
    if edit.inserts:
        _refuse_too_many(len(cells) * len(sets), max_edits)
        return np.repeat(cells, len(sets)), np.tile(np.arange(len(sets)), len(cells))
    at, which, n = [], [], 0
    step = max(1, ALL_AT_ONCE // max(1, sets.size))
    for start in range(0, len(cells), step):
        part = cells[start : start + step]
        row, column = np.nonzero((rows.find(part[:, None, None], sets[None])[1] > 0).all(axis=2))
        at.append(part[row])
        which.append(column)
        n += len(row)
        _refuse_too_many(n, max_edits, at_least=start + step < len(cells))
    return np.concatenate(at), np.concatenate(which)


def _refuse_too_many(n: int, max_edits: int, *, at_least: bool = False) -> None:
    if n > max_edits:
        raise ScbinInputError(
            "P27",
            f"this makes {'at least ' if at_least else ''}{n:,} edits, each a forward of the network, but max_edits is "
            f"{max_edits:,}. Name fewer genes, restrict the cells (groupby=, groups=), or raise max_edits=.",
        )


def _check_found(
    rows: GeneRows,
    genes: GeneNames,
    which: np.ndarray,
    sets: np.ndarray,
    names: tuple[str, ...],
    edit: Edit,
    listed: bool,
    n_cells: int,
) -> None:
    lacking = [names[k] for k in np.flatnonzero(np.bincount(which, minlength=len(sets)) == 0)]
    if not lacking and len(which):
        return
    shown = ", ".join(repr(name) for name in lacking[:3]) + (" ..." if len(lacking) > 3 else "")
    verb = "is" if len(lacking) == 1 else "are"
    found = f"{shown} {verb} expressed in none of the {count(n_cells, 'cell')}"
    if sets.shape[1] > 1:
        found = f"none of the {count(n_cells, 'cell')} expresses all genes of {shown}"
    advice = f"so there is nothing to {edit.mode.replace('_', ' ')}. Choose other cells or genes"
    insert = ', or mode="overexpress", which also puts genes into cells that lack them'
    if len(which) == 0:
        raise ScbinInputError("P24", f"{found if lacking else 'no gene is expressed'}, {advice}{insert}.")
    warn("P24", f"{found}: {count(len(lacking), 'row')} of the table will be empty.")
