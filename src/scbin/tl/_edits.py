"""Which cells, genes and sets of genes a perturbation edits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._adata import read_obs, warn
from scbin._arguments import check_fields, instances
from scbin._errors import ScbinInputError, count

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin._adata import GeneNames
    from scbin.tokens.edits import Edit, GeneRows

AT_ONCE = 2_000_000  # lookups of (cell, set) pairs held in memory at a time
MOST_EDITS = 10_000_000


def config(kind: Any, value: Any) -> Any:
    """Return a config object: as it is, from a mapping of its fields, from the value of its first field, or the default."""
    known = list(kind.__dataclass_fields__)
    fields: Any = {known[0]: value} if isinstance(value, str) else {} if value is None else value
    if isinstance(fields, Mapping) and set(fields) <= set(known):
        return kind(**fields)
    instances(kind, f"a mapping with some of the fields {', '.join(known)}", **{kind.__name__.lower(): value})
    return value


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
