"""A perturbation screen as it lies in an AnnData: names of perturbations, controls, strata and normalised expression."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scbin._adata import read_obs, warn
from scbin._errors import ScbinInputError, count
from scbin.pp._plan import Source
from scbin.tokens.phenotypes import labels_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from anndata import AnnData

FEWEST_CONTROLS = 5  # in a batch (of a donor); cells of batches with fewer are left out
BETWEEN = re.compile(r"\s*(?:\|+|[+;,&])\s*")
GUIDE = re.compile(r"^(.+?)(?:[-_. ](sg|g|guide|gRNA)|[-_. ]|(?<=[A-Z0-9])(s?g))\d+$")
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
    labels, genes = list(labels), {*genes, control}
    known = genes | {label for label in labels if not BETWEEN.search(label) and "_" not in label}

    def gene(part: str) -> str:
        found = GUIDE.match(part)
        return found[1] if found and part not in genes and (found[2] or found[3] or found[1] in known) else part

    made = {}
    for label in labels:
        parts, halves = [part for part in BETWEEN.split(label.strip()) if part], label.split("_")
        if len(parts) == 1 and gene(label) == label not in genes and len(halves) == 2:
            if all(gene(half) in known or NO_TARGET.match(half) for half in halves):
                parts = halves
        named = {gene(part) for part in parts} - {control}
        made[label] = tuple(sorted(name for name in named if len(parts) == 1 or not NO_TARGET.match(name)))
    return made


def read_cells(adata: AnnData, params: Mapping[str, Any], known: Iterable[str] = ()) -> Cells:
    """Return the cells of a screen; `params` are the arguments of `tl.fit_perturbations`, `known` further names of genes."""
    key, control, donor_key = params["key"], params["control"], params["donor_key"]
    labels = labels_of(read_obs(adata, key), key)
    distinct = sorted({label for label in labels if label is not None})
    targets = targets_of(distinct, control, [*adata.var_names, *known])
    if all(targets.values()):
        like = [label for label in distinct if NO_TARGET.match(label)] or distinct[:5]
        found = f"no cell of obs[{key!r}] is {control!r}"
        raise ScbinInputError("A06", f"{found}. Pass control= the unperturbed cells: {', '.join(map(repr, like))}?")
    name_of = {label: "+".join(each) for label, each in targets.items()}  # "": control
    named = pd.Series(labels, dtype=object).map(name_of)
    part = {name: labels_of(read_obs(adata, name), name) for name in (donor_key, params["batch_key"]) if name}
    columns = {name: np.asarray(column, dtype=object) for name, column in part.items()}
    frame = pd.DataFrame({"all": 0, **columns}, index=range(adata.n_obs))
    together = frame.groupby(list(frame)).ngroup().fillna(-1).to_numpy(dtype=np.int64)  # -1: unknown
    keep = named.notna().to_numpy() & (together >= 0)
    controls = np.bincount(together[keep & (named == "").to_numpy()], minlength=together.max(initial=0) + 1)
    few = keep & (controls[together] < FEWEST_CONTROLS)
    rows = np.flatnonzero(keep & ~few)
    names = sorted(set(named.iloc[rows]) - {""})
    if not names:
        found = f"no batch or donor has perturbed cells and {FEWEST_CONTROLS} controls"
        raise ScbinInputError("P02", f"{found}. Leave batch_key= or donor_key= out, or pass more cells.")
    if few.any():
        found = f"{count(int(few.sum()), 'cell')} of batches with fewer than {FEWEST_CONTROLS} controls"
        warn("P02", f"{found} are left out.")
    group = pd.Index(names).get_indexer(named.iloc[rows])
    stratum = np.unique(together[rows], return_inverse=True)[1]
    donor = None if donor_key is None else pd.factorize(frame[donor_key].iloc[rows], sort=True)[0]
    if donor is not None and donor.max() < 1:
        raise ScbinInputError("P02", f"all cells are of one donor in obs[{donor_key!r}]. Leave donor_key= out.")
    values, is_counts, total = read_expression(adata, params, rows, group, names)
    return Cells(values, tuple(names), group, stratum, donor, rows, is_counts, total)


def own_genes(names: Any, genes: np.ndarray) -> np.ndarray:
    """Return which genes are targets of each perturbation (perturbations, genes) bool."""
    return np.array([np.isin(genes, name.split("+")) for name in names]).reshape(len(names), len(genes))


def read_expression(
    adata: AnnData, params: Mapping[str, Any], rows: np.ndarray, group: np.ndarray, names: list[str]
) -> tuple[sparse.csr_matrix, bool, np.ndarray]:
    """Return log1p of expression at equal depth of some cells, whether they are counts, and their depths.

    The depth of a cell is that of its genes without its targets, which count with their share in controls: when an abundant target goes
    down, all other genes would seem to go up.
    """
    source = Source(adata, params["layer"])
    reading = source.read(source.scan(), "auto")
    matrix = sparse.vstack([block.csr() for block in source.blocks()], format="csr")[rows].astype(np.float32)
    if logs := reading.kind == "log1p":
        matrix.data = np.expm1(matrix.data * np.float32(np.log(reading.base)))
    total = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
    if logs and reading.target_sum is None:  # of some genes: the depth is not known
        return matrix.log1p(), False, total
    if params["total_key"] is not None and not logs:
        total = pd.to_numeric(read_obs(adata, params["total_key"]), errors="coerce").to_numpy(dtype=float)[rows]
        if not (np.isfinite(total) & (total > 0)).all():
            raise ScbinInputError("I05", f"obs[{params['total_key']!r}] is not a number above 0 for every cell.")
    own = sparse.csr_matrix(np.vstack([own_genes(names, adata.var_names.to_numpy(str)), np.zeros(adata.n_vars, bool)]))
    usual = own @ np.asarray(matrix[group < 0].sum(axis=0)).ravel() / max(total[group < 0].sum(), 1.0)
    others = total - np.asarray(matrix.multiply(own[group]).sum(axis=1)).ravel()
    total = np.where(others > 0, others / (1 - usual[group]), total)
    scale = np.median(total[total > 0]) / np.maximum(total, 1e-12)
    matrix.data = np.log1p(matrix.data * np.repeat(scale, np.diff(matrix.indptr)).astype(np.float32))
    return matrix, not logs, total
