"""Which cells, genes and sets of genes a perturbation edits."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin._adata import read_obs, warn
from scbin._arguments import check_fields, instances
from scbin._errors import ScbinInputError, count

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin._adata import GeneNames
    from scbin.tokens.edits import Edit, GeneRows

ALL_AT_ONCE = 2_000_000  # lookups of (cell, set) pairs held in memory at a time


def config(kind: Any, value: Any) -> Any:
    """Return a config object: as it is, from a mapping of its fields, from the value of its first field, or the default."""
    if isinstance(value, kind):
        return value
    known = list(kind.__dataclass_fields__)
    fields: Any = {known[0]: value} if isinstance(value, str) else {} if value is None else value
    instances(Mapping, f"a mapping with fields of {kind.__name__}", **{kind.__name__.lower(): fields})
    for name in fields:
        if name not in known:
            raise ScbinInputError("A02", f"{kind.__name__} has no field {name!r}; it has {', '.join(known)}.")
    return kind(**fields)


# ---- cells ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """From which cells to which others genes shall move cells; described in :func:`scbin.tl.perturb`."""

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
        numbers = labels[readable].value_counts().head(6)
        found = f"obs[{self.key!r}] has, with tokens: {', '.join(f'{name!r} ({n:,})' for name, n in numbers.items())}."
        if self.goal is None:
            raise ScbinInputError("A03", f"states needs the goal, the state to come to. {found}")
        rest = ~labels.isin([name for name in self.names if name])
        members = tuple(np.flatnonzero(readable & (labels == name if name else rest)) for name in self.names)
        for name, cells in zip(self.names, members, strict=True):
            if not len(cells):
                where = f"in the state {name!r}" if name else "outside of the goal and the alternatives"
                raise ScbinInputError("A06", f"no cell with tokens is {where}. {found}")
        return members


def perturbed_cells(
    adata: AnnData, readable: np.ndarray, groupby: str | None, states: States | None, members: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, list[str]]:
    """Return the group of each cell, -1 where it is not perturbed, and the names of the groups.

    Those are perturbed that can be read, have a group and are in the start state.
    """
    labels = pd.Series("", index=adata.obs_names) if groupby is None else read_obs(adata, groupby)
    chosen = readable & labels.notna().to_numpy()
    if members:
        chosen &= np.isin(np.arange(len(chosen)), members[1])
    elif states is not None and states.start is not None:
        chosen &= (read_obs(adata, states.key).astype(str) == states.start).to_numpy()
    if not chosen.any():
        raise ScbinInputError(
            "P02", "no cell has all of tokens (see adata.obs['scbin_status']), a group and the state."
        )
    group = np.full(len(chosen), -1)
    names, group[chosen] = np.unique(labels[chosen].astype(str), return_inverse=True)
    return group, names.tolist()


# ---- pairs of cells and sets of genes -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """All edits to make, sorted so that equally long cells, and edits that are most alike, follow each other."""

    rows: GeneRows
    edit: Edit
    gene_names: tuple[str, ...]
    group: np.ndarray  # (rows,) group of each cell, -1 where it is not perturbed
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
    def together(self) -> bool:
        """Whether one set of several genes is all that is edited."""
        return len(self.sets) == 1 and self.sets.shape[1] > 1

    @property
    def names(self) -> list[str]:
        """Names of the sets."""
        return [",".join(self.gene_names[gene] for gene in row) for row in self.sets]


def make_plan(
    rows: GeneRows,
    named: GeneNames,
    edit: Edit,
    wanted: Any,
    group: np.ndarray,
    *,
    donors: np.ndarray | None = None,
    each: bool = True,
    anchor: Any = None,
    combine: int = 1,
    max_edits: int = 10_000_000,
) -> Plan:
    """Return the edits of a request; refuse what cannot be found or is too much.

    A cell is edited if it expresses all genes of a set; where genes come in, every cell is, or by default those that express it.
    """
    cells, anchors, everything = np.flatnonzero(group >= 0), named.resolve(anchor or (), "anchor"), wanted is None
    if everything:
        at, expressed = rows.expressed()
        wanted = [rows.vocabulary.genes[gene] for gene in np.unique(expressed[np.isin(at, cells)])]
    sets = _gene_sets(named, wanted, each, anchors, combine, max_edits)
    needed = sets if not edit.inserts else sets[:, len(anchors) :] if everything else sets[:, :0]
    pairs, n = [], 0
    for part in np.array_split(cells, max(1, len(cells) * sets.size // ALL_AT_ONCE)):
        row, column = np.nonzero((rows.find(part[:, None, None], needed[None])[1] > 0).all(axis=2))
        pairs.append(np.stack([part[row], column]))
        n += len(row)
        _refuse_too_many(n, max_edits)
    at, which = np.concatenate(pairs, axis=1)
    if everything and n:
        used, which = np.unique(which, return_inverse=True)
        sets = sets[used]
    plan = Plan(rows, edit, named.names, group, donors, sets, at, which)
    lacking = np.flatnonzero(np.bincount(which, minlength=len(sets)) == 0)
    if len(lacking):
        shown = ", ".join(repr(plan.names[k]) for k in lacking[:3]) + (" ..." if len(lacking) > 3 else "")
        found = f"{shown}: expressed in none of the {count(len(cells), 'cell')}"
        advice = 'Choose other cells or genes, or mode="overexpress", which also puts genes into cells that lack them.'
        if not n:
            raise ScbinInputError("P02", f"{found}, so there is nothing to {edit.mode.replace('_', ' ')}. {advice}")
        warn("P02", f"{found}; their rows of the table will be empty. {advice}")
    return plan


def _gene_sets(
    named: GeneNames, wanted: Any, each: bool, anchors: list[int], combine: int, max_edits: int
) -> np.ndarray:
    """Return the sets of genes that names, tuples of names or genes, together or combined, stand for (sets, m)."""
    items = [wanted] if isinstance(wanted, str) else list(wanted)
    if any(isinstance(item, tuple) for item in items):
        sets = [tuple(named.resolve(item)) for item in items]
    else:
        single = named.resolve(items)
        _refuse_too_many(comb(len(single), combine) if each else 1, max_edits)
        sets = list(itertools.combinations(single, combine)) if each else [tuple(single)]
    # the anchor with itself is no pair
    sets = list(dict.fromkeys((*anchors, *row) for row in sets if not set(row) & set(anchors)))
    if len({len(row) for row in sets}) != 1 or not sets[0]:
        found = f"{count(len(items), 'name')} of genes, combine={combine} and {count(len(anchors), 'anchor')}"
        raise ScbinInputError("A03", f"{found} make no sets of one size. Name at least one gene besides the anchor.")
    return np.array(sets, dtype=np.int64)


def _refuse_too_many(n: int, max_edits: int) -> None:
    if n > max_edits:
        found = f"this makes {n:,} edits or more, each a forward of the network, but max_edits is {max_edits:,}."
        raise ScbinInputError("A02", f'{found} Name fewer genes, pass fewer cells, or method={{"max_edits": ...}}.')
