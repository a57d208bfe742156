"""Which cells, genes and pairs of genes a perturbation edits."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin._adata import read_obs, warn
from scbin._arguments import check_fields, instances
from scbin._errors import ScbinInputError, ScbinTypeError, count
from scbin.tokens.genes import strip_version

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin.tokens.edits import Edit, GeneRows
    from scbin.tokens.vocabulary import Vocabulary

ALL_AT_ONCE = 2_000_000  # lookups of (cell, set) pairs held in memory at a time


def config(kind: Any, value: Any) -> Any:
    """Return a config object from a mapping of its fields, from the value of its first field, or as it is."""
    if isinstance(value, kind):
        return value
    fields = {} if value is None else value
    if isinstance(value, str):
        fields = {next(iter(kind.__dataclass_fields__)): value}
    arguments: dict[str, Any] = {kind.__name__.lower(): fields}
    instances(Mapping, f"a mapping with fields of {kind.__name__}", **arguments)
    unknown = set(fields) - set(kind.__dataclass_fields__)
    if unknown:
        known = ", ".join(kind.__dataclass_fields__)
        raise ScbinInputError("A02", f"{kind.__name__} has no field {min(map(str, unknown))!r}; it has {known}.")
    return kind(**fields)


@dataclass(frozen=True)
class States:
    """From which cells to which others genes shall move cells; described in :func:`scbin.tl.perturb`."""

    key: str
    goal: str | None = None
    start: str | None = None  # whose cells are perturbed; default: all cells in none of the other states
    alternatives: tuple[str, ...] = ()
    centre: Literal["states", "cells"] | None = "states"  # whose mean is the origin of the cosines

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
        labels = read_obs(adata, self.key).astype(object).map(str).to_numpy()
        values, numbers = np.unique(labels[readable], return_counts=True)
        order = np.argsort(-numbers, kind="stable")[:6]
        listed = ", ".join(f"{str(values[k])!r} ({numbers[k]:,})" for k in order) + (" ..." if len(values) > 6 else "")
        found = f"adata.obs[{self.key!r}] has, with tokens: {listed or 'nothing'}."
        if self.goal is None:
            raise ScbinInputError("A03", f"states needs the goal, the state to come to. {found}")
        rest = readable & ~np.isin(labels, [name for name in self.names if name])
        members = tuple(np.flatnonzero(readable & (labels == name) if name else rest) for name in self.names)
        for name, cells in zip(self.names, members, strict=True):
            if name and not len(cells):
                raise ScbinInputError("A06", f"no cell with tokens is in the state {name!r}. {found}")
        if not len(members[1]):
            raise ScbinInputError(
                "P02", f"all cells are in the goal state {self.goal!r}: none is left to be perturbed."
            )
        return members


@dataclass(frozen=True)
class Statistics:
    """How the effects of genes are judged.

    Parameters
    ----------
    donor_key
        Column of `obs` with the donors, who are then the replicates. Default: cells are, which overstates how sure one can be.
    null
        What a gene is compared with: `"matched"`, genes of the same expression and detection, or names of tested genes.
    n_permutations
        Towards a goal, how often the states of the cells are permuted, by donor where there are donors: the p value says how
        often a gene moves cells as far towards the goal of a random labelling. 0: it is compared with other genes instead.
    confidence
        Of the intervals.
    seed
        Of permutations, of genes drawn at random and of ties.
    """

    donor_key: str | None = None
    null: str | Sequence[str] = "matched"
    n_permutations: int = 200
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.confidence < 1 or self.n_permutations < 0:
            wrong = f"confidence={self.confidence} lies between 0 and 1, n_permutations is 0 or more."
            raise ScbinInputError("A02", wrong)
        if isinstance(self.null, str) and self.null != "matched":
            wrong = f"null is {self.null!r}; choose 'matched', or pass a list of names of tested genes."
            raise ScbinInputError("A02", wrong)

    def donors(self, adata: AnnData) -> np.ndarray | None:
        """Return the donor of each cell, or None."""
        return None if self.donor_key is None else read_obs(adata, self.donor_key).astype(object).to_numpy()


def perturbed_cells(
    adata: AnnData, readable: np.ndarray, groupby: str | None, states: States | None, members: tuple[np.ndarray, ...]
) -> np.ndarray:
    """Return the rows to perturb: those that can be read, have a group and are in the start state."""
    chosen = readable if groupby is None else readable & read_obs(adata, groupby).notna().to_numpy()
    if members:
        chosen = chosen & np.isin(np.arange(len(chosen)), members[1])
    elif states is not None and states.start is not None:
        chosen = chosen & (read_obs(adata, states.key).astype(str) == states.start).to_numpy()
    if not chosen.any():
        wrong = (
            "no cell is left to be perturbed: none has tokens (see adata.obs['scbin_status']), a group and the state."
        )
        raise ScbinInputError("P02", wrong)
    return np.flatnonzero(chosen)


# ---- genes by name --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneNames:
    """The genes of a model under the names that `adata` has for them."""

    names: tuple[str, ...]  # of each gene of the model, as in var_names where it stands there
    columns: np.ndarray  # (genes,) its column in adata, -1 where it has none
    places: dict[str, int]  # every name that is understood, to the gene
    others: frozenset[str]  # names in adata that the model does not read

    def resolve(self, wanted: str | Iterable[Any], what: str = "genes") -> list[int]:
        """Return the genes that names mean, in order and once each; name the closest ones for a name that is unknown."""
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in wanted:
            if not isinstance(name, str):
                raise ScbinTypeError("A01", f"{what} holds a {type(name).__name__}; pass names of genes.")
        found = [self.places.get(name, self.places.get(strip_version(name), -1)) for name in wanted]
        unknown = [name for name, place in zip(wanted, found, strict=True) if place < 0]
        if not unknown:
            return list(dict.fromkeys(found))
        listed = ", ".join(repr(name) for name in unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        text = f"the model does not know {len(unknown):,} of the genes named: {listed}."
        unread = [name for name in unknown if name in self.others]
        if unread:
            advice = "Tokenize and train with it: set it in var['highly_variable'], or raise n_genes"
            raise ScbinInputError(
                "A06", f"{text} {unread[0]!r} is in adata, but the model reads other genes. {advice}."
            )
        by_upper = {known.upper(): known for known in self.places}
        upper = unknown[0].upper()
        near = [upper] if upper in by_upper else difflib.get_close_matches(upper, list(by_upper), n=3, cutoff=0.6)
        close = ", ".join(repr(by_upper[match]) for match in near) or "nothing"
        raise ScbinInputError("A06", f"{text} Close to {unknown[0]!r}: {close}.")


def gene_names(adata: AnnData, vocabulary: Vocabulary) -> GeneNames:
    """Match the columns of `adata` with the genes of a model: by var_names, or by the column of `var` that fits best."""
    index, aliases = {gene: k for k, gene in enumerate(vocabulary.genes)}, vocabulary.aliases

    def genes_of(labels: Iterable[object]) -> np.ndarray:
        names = [strip_version(label) if isinstance(label, str) else "" for label in labels]
        known = (n if n in index else aliases.get(n, aliases.get(n.upper(), n.upper())) for n in names)
        return np.array([index.get(name, -1) for name in known], dtype=np.int64)

    shown = [str(name) for name in adata.var_names]
    columns = [column for column in adata.var.columns if adata.var[column].dtype.kind not in "biufc"]
    tried = [genes_of(shown)]
    if (tried[0] >= 0).sum() < len(index):
        tried += [genes_of(adata.var[column].astype(object)) for column in columns]
    best = max(tried, key=lambda genes: len(np.unique(genes[genes >= 0])))
    column_of = np.full(len(index), -1, dtype=np.int64)
    for column in np.flatnonzero(best >= 0)[::-1]:  # the first of several columns of one gene
        column_of[best[column]] = column
    places = {alias: index[gene] for alias, gene in aliases.items() if gene in index}
    for labels in [*(adata.var[column].astype(object) for column in columns), shown]:
        places |= {str(name): int(gene) for name, gene in zip(labels, best, strict=True) if gene >= 0}
    places |= index
    names = tuple(shown[c] if c >= 0 else gene for c, gene in zip(column_of, vocabulary.genes, strict=True))
    return GeneNames(names, column_of, places, frozenset(set(shown) - set(places)))


# ---- pairs of cells and sets of genes -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """All (cell, set of genes) pairs to run, sorted so that equally long cells, and edits that are most alike, follow each other."""

    sets: np.ndarray  # (sets, m) genes of the model that are edited together
    names: tuple[str, ...]  # of the sets
    cells: np.ndarray  # (pairs,) rows of adata
    which: np.ndarray  # (pairs,) the set of each pair

    @property
    def genes(self) -> np.ndarray:
        """Genes of each pair (pairs, m)."""
        return self.sets[self.which]

    @property
    def together(self) -> bool:
        """Whether one set of several genes is all that is edited."""
        return len(self.sets) == 1 and self.sets.shape[1] > 1

    @classmethod
    def of(cls, rows: GeneRows, names: tuple[str, ...], sets: np.ndarray, cells: np.ndarray, which: np.ndarray) -> Plan:
        """Return the plan of some pairs in the order that is fastest."""
        lengths = np.diff(rows.tokens.indptr)[cells]
        place, _ = rows.find(cells, sets[which, -1])  # neighbours in a row leave rows that are most alike
        order = np.lexsort((which, place, cells, lengths))
        return cls(sets, tuple(",".join(names[gene] for gene in row) for row in sets), cells[order], which[order])


def make_plan(
    rows: GeneRows,
    named: GeneNames,
    cells: np.ndarray,
    edit: Edit,
    wanted: Any,
    *,
    each: bool = True,
    anchor: Any = None,
    combine: int = 1,
    max_edits: int = 10_000_000,
) -> Plan:
    """Return the pairs of a request; refuse what cannot be found or is too much.

    A cell is edited if it expresses all genes of a set; where genes come in, every cell is, or by default those that express it.
    """
    anchors = named.resolve(anchor or (), "anchor")
    if wanted is None:
        at, expressed = rows.expressed()
        names = [rows.vocabulary.genes[gene] for gene in np.unique(expressed[np.isin(at, cells)])]
    sets = _gene_sets(named, names if wanted is None else wanted, each, anchors, combine, max_edits)
    needed = sets
    if edit.inserts:
        needed = sets[:, len(anchors) :] if wanted is None else sets[:, :0]
    pairs, n = [], 0
    for part in np.array_split(cells, max(1, len(cells) * sets.size // ALL_AT_ONCE)):
        row, column = np.nonzero((rows.find(part[:, None, None], needed[None])[1] > 0).all(axis=2))
        pairs.append(np.stack([part[row], column]))
        n += len(row)
        _refuse_too_many(n, max_edits)
    at, which = np.concatenate(pairs, axis=1)
    if wanted is None and n:
        used, which = np.unique(which, return_inverse=True)
        sets = sets[used]
    plan = Plan.of(rows, named.names, sets, at, which)
    lacking = [plan.names[k] for k in np.flatnonzero(np.bincount(plan.which, minlength=len(sets)) == 0)]
    if lacking or not n:
        shown = ", ".join(repr(name) for name in lacking[:3]) + (" ..." if len(lacking) > 3 else "")
        what = f"{shown or 'every gene'} is expressed in none of the {count(len(cells), 'cell')}"
        if sets.shape[1] > 1:
            what = f"none of the {count(len(cells), 'cell')} expresses all genes of {shown}"
        advice = 'Choose other cells or genes, or mode="overexpress", which also puts genes into cells that lack them'
        if not n:
            raise ScbinInputError("P02", f"{what}, so there is nothing to {edit.mode.replace('_', ' ')}. {advice}.")
        warn("P02", f"{what}: {count(len(lacking), 'row')} of the table will be empty. {advice}.")
    return plan


def _gene_sets(
    named: GeneNames, wanted: Any, each: bool, anchors: list[int], combine: int, max_edits: int
) -> np.ndarray:
    """Return the sets of genes that names, tuples of names or genes, together or combined, stand for (sets, m)."""
    items = [wanted] if isinstance(wanted, str) else list(wanted)
    if not items:
        raise ScbinInputError("A02", "genes is empty; name at least one, or leave it out for every expressed gene.")
    sets: list[tuple[int, ...]]
    if any(isinstance(item, tuple) for item in items):
        sets = [tuple(named.resolve(item)) for item in items]
    else:
        single = named.resolve(items)
        _refuse_too_many(comb(len(single), combine) if each else 1, max_edits)
        sets = list(itertools.combinations(single, combine)) if each else [tuple(single)]
    widths = {len(row) for row in sets}
    if len(widths) != 1:
        found = sorted(widths) or f"none, from {combine} of {count(len(items), 'gene')}"
        raise ScbinInputError("A03", f"the sets of genes need to have one size; they have {found}. Run each by itself.")
    sets = [(*anchors, *row) for row in sets if not set(row) & set(anchors)]  # the anchor with itself is no pair
    if not sets:
        raise ScbinInputError("A03", "every set of genes holds the anchor; name genes to edit along with it.")
    return np.array(list(dict.fromkeys(sets)), dtype=np.int64)


def _refuse_too_many(n: int, max_edits: int) -> None:
    if n > max_edits:
        found = f"this makes {n:,} edits or more, each a forward of the network, but max_edits is {max_edits:,}."
        raise ScbinInputError("A02", f'{found} Name fewer genes, pass fewer cells, or method={{"max_edits": ...}}.')
