"""A perturbation screen as it lies in an AnnData: names of perturbations, controls, strata and normalised expression."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scbin._adata import iter_blocks, read_obs, warn
from scbin._errors import ScbinInputError, count
from scbin.tokens.phenotypes import labels_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from anndata import AnnData

FEWEST_CONTROLS = 5  # in a batch (of a donor); cells of batches with fewer are left out
BETWEEN = re.compile(r"\s*(?:\|+|[+;,&])\s*")
GUIDE = re.compile(r"^(.+?)(?:[-_. ](?:sg|g|guide|gRNA)?|(?<=[A-Z0-9])s?g)\d+$")
NO_TARGET = re.compile(r"^(?:neg|probe|safe|sg)?[-_ ]?(?:ctrl|control|ntc?|non[-_ ]?targeting)[-_ ]?\w{0,4}$", re.I)


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of a screen that are read, in rows of `values`."""

    values: sparse.csr_matrix  # log1p of expression at equal depth
    names: tuple[str, ...]  # of the perturbations, targets joined by "+"
    group: np.ndarray  # (cells,) number of the perturbation, -1: control
    stratum: np.ndarray  # (cells,) batch of a donor
    donor: np.ndarray | None  # (cells,)
    rows: np.ndarray  # (cells,) rows of adata
    is_counts: bool
    total: np.ndarray  # (cells,) counts of each cell


def targets_of(labels: Iterable[str], control: str, genes: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the targets of each label, sorted; none for controls.

    `"A+B"`, `"A || B"`, `"A;B"` and, where both are genes or labels, `"A_B"` are pairs. Guides are named after their gene:
    `"A-1"` is A where A is a gene or label and `"A-1"` is none, `"A_sg1"` and `"Ag1"` are A. Guides without target count as nothing.

    Examples
    --------
    >>> targets_of(["A+B", "B_A", "Ag2", "NTg1", "A+ctrl", "HLA-1"], "NT", ["A", "B"])
    {'A+B': ('A', 'B'), 'B_A': ('A', 'B'), 'Ag2': ('A',), 'NTg1': (), 'A+ctrl': ('A',), 'HLA-1': ('HLA-1',)}
    """
    labels = list(labels)
    genes = set(genes) | {control}
    known = genes | {label for label in labels if not BETWEEN.search(label) and "_" not in label}

    def gene(part: str) -> str:
        found = GUIDE.match(part)
        if part in genes or found is None:
            return part
        named = re.search(r"g(?:uide|RNA)?\d+$", part) is not None
        return found[1] if named or found[1] in known else part

    made = {}
    for label in labels:
        parts = [part for part in BETWEEN.split(label.strip()) if part]
        halves = label.split("_")
        if len(parts) == 1 and gene(label) == label and len(halves) == 2 and label not in genes:
            if all(gene(half) in known or NO_TARGET.match(half) for half in halves):
                parts = halves
        named = {gene(part) for part in parts} - {control}
        several = len(parts) > 1
        made[label] = tuple(sorted(name for name in named if not (several and NO_TARGET.match(name))))
    return made


def read_cells(adata: AnnData, params: Mapping[str, Any], known: Iterable[str] = ()) -> Cells:
    """Return the cells of a screen; `params` are the arguments of `tl.fit_perturbations`, `known` further names of genes."""
    key, control = params["key"], params["control"]
    labels = labels_of(read_obs(adata, key), key)
    distinct = sorted({label for label in labels if label is not None})
    targets = targets_of(distinct, control, [*adata.var_names, *known])
    if not any(not targets[label] for label in distinct):
        like = [label for label in distinct if NO_TARGET.match(label)] or distinct[:5]
        found = f"no cell of obs[{key!r}] is {control!r}"
        raise ScbinInputError("A06", f"{found}. Pass control= the unperturbed cells: {', '.join(map(repr, like))}?")
    code_of = {None: -2} | {label: -1 for label in distinct if not targets[label]}
    names = sorted({"+".join(each) for each in targets.values() if each})
    code_of |= {label: names.index("+".join(targets[label])) for label in distinct if targets[label]}
    group = np.array([code_of[label] for label in labels])

    part: dict[str, np.ndarray] = {}
    for name in ("donor_key", "batch_key"):
        if params[name] is not None:
            column = labels_of(read_obs(adata, params[name]), params[name])
            part[name] = pd.factorize(column, sort=True)[0]  # -1: unknown
    together = np.zeros(adata.n_obs, dtype=np.int64)
    for codes in part.values():
        together = np.where((codes < 0) | (together < 0), -1, together * (codes.max(initial=0) + 1) + codes)
    keep = (group > -2) & (together >= 0)
    controls = np.bincount(together[keep & (group == -1)], minlength=together.max(initial=0) + 1)
    few = keep & (controls[np.maximum(together, 0)] < FEWEST_CONTROLS)
    if (keep & ~few).sum() == 0 or not (group[keep & ~few] >= 0).any():
        found = f"no batch or donor has {FEWEST_CONTROLS} control cells"
        raise ScbinInputError("P02", f"{found}. Leave batch_key= or donor_key= out, or pass more cells.")
    if few.any():
        warn(
            "P02",
            f"{count(int(few.sum()), 'cell')} of batches with fewer than {FEWEST_CONTROLS} controls are left out.",
        )
    rows = np.flatnonzero(keep & ~few)
    donor = None if "donor_key" not in part else np.unique(part["donor_key"][rows], return_inverse=True)[1]
    if donor is not None and donor.max() < 1:
        raise ScbinInputError(
            "P02", f"all cells are of one donor in obs[{params['donor_key']!r}]. Leave donor_key= out."
        )
    values, is_counts, total = read_values(adata, params, rows)
    used = np.unique(group[rows][group[rows] >= 0])
    renumbered = np.full(len(names), -1)
    renumbered[used] = np.arange(len(used))
    group = np.where(group[rows] >= 0, renumbered[group[rows]], -1)
    stratum = np.unique(together[rows], return_inverse=True)[1]
    return Cells(values, tuple(names[k] for k in used), group, stratum, donor, rows, is_counts, total)


def read_values(
    adata: AnnData, params: Mapping[str, Any], rows: np.ndarray
) -> tuple[sparse.csr_matrix, bool, np.ndarray]:
    """Return log1p of expression at equal depth of some cells, whether they are counts, and their totals."""
    matrix = sparse.vstack([block.csr() for block in iter_blocks(adata, params["layer"])], format="csr")[rows]
    values = matrix.data
    if not np.isfinite(values).all():
        raise ScbinInputError("I05", "the expression has NaN or infinite values. Set them to 0 or leave the cells out.")
    if (values < 0).any():
        raise ScbinInputError(
            "I03", "the expression has negative values, as after scaling. Pass counts, or log1p values."
        )
    is_counts = bool((values == np.rint(values)).all())
    total = np.asarray(matrix.sum(axis=1)).ravel()
    if params["total_key"] is not None:
        total = pd.to_numeric(read_obs(adata, params["total_key"]), errors="coerce").to_numpy(dtype=float)[rows]
        if not (np.isfinite(total) & (total > 0)).all():
            raise ScbinInputError("I05", f"obs[{params['total_key']!r}] is not a number above 0 for every cell.")
    matrix = matrix.astype(np.float32)
    if is_counts:
        scale = np.median(total[total > 0]) / np.maximum(total, 1) if (total > 0).any() else total
        matrix = sparse.csr_matrix(sparse.diags(scale.astype(np.float32)) @ matrix)
        matrix.data = np.log1p(matrix.data)
    elif params["total_key"] is not None or values.max(initial=0) > 14:
        raise ScbinInputError("I02", "the expression is neither counts nor log1p values. Pass layer= with counts.")
    return matrix, is_counts, total
