"""From the numbers of all pairs to what stands in the AnnData: layer, vectors, table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scbin import _keys
from scbin._anndata import check_writable, make_real, read_obs, write_entry, write_layer, write_obsm
from scbin.tl._perturb_compare import pair_statistics
from scbin.tl._perturb_run import means_of
from scbin.tl._perturb_stats import gene_statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData

    from scbin.encoding.edits import GeneRows
    from scbin.tl._perturb_genes import GeneNames
    from scbin.tl._perturb_measure import Measure
    from scbin.tl._perturb_plan import Plan
    from scbin.tl._perturb_run import Result


@dataclass(frozen=True)
class Slots:
    """Where results go."""

    layer: str
    vectors: str
    uns: str

    @classmethod
    def of(cls, adata: AnnData, key_added: str | None) -> Slots:
        """Return the slots, if they may be written."""
        uns = _keys.PERTURB if key_added is None else f"{key_added}_perturb"
        slots = cls(*_keys.of_perturbation(uns), uns)
        for slot, key in (("layers", slots.layer), ("obsm", slots.vectors), ("uns", slots.uns)):
            check_writable(adata, slot, key)
        return slots


def expression_of(rows: GeneRows) -> sparse.csr_matrix:
    """Return how much of each gene the tokens say (cells, genes): the bin's value, or how near to the first rank it stands."""
    vocabulary = rows.vocabulary
    shape = (rows.tokens.shape[0], len(vocabulary.genes))
    cells, genes = np.divmod(rows.keys, shape[1])
    if vocabulary.bins is None:
        rank = rows.tokens.indices[rows.at] - vocabulary.first_gene_position
        values = 1 - rank / np.maximum(rows.n_genes[cells], 1)
    else:
        values = vocabulary.bins.centres[rows.level]
    kept = rows.level > 0
    return sparse.csr_matrix((values[kept].astype(np.float32), (cells[kept], genes[kept])), shape=shape)


def set_expression(rows: GeneRows, plan: Plan) -> sparse.csr_matrix:
    """Return the expression of each set of genes (cells, sets): the mean over its genes."""
    n_genes = len(rows.vocabulary.genes)
    width = plan.sets.shape[1]
    which = np.repeat(np.arange(len(plan.sets)), width)
    share = sparse.csr_matrix(
        (np.full(plan.sets.size, 1 / width), (plan.sets.ravel(), which)), shape=(n_genes, len(plan.sets))
    )
    return sparse.csr_matrix(expression_of(rows) @ share)


def matrix_of(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Return values as CSR with their zeros kept; NaN is not stored."""
    known = np.isfinite(values)
    rows, columns, values = rows[known], columns[known], values[known].astype(np.float32)
    order = np.lexsort((columns, rows))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    matrix = sparse.csr_matrix((values[order], columns[order].astype(np.int32), indptr), shape=shape)
    matrix.has_sorted_indices = matrix.has_canonical_format = True
    return matrix


@dataclass(frozen=True, eq=False)
class Alone:
    """What each gene of the pairs does alone in the same cells."""

    plan: Plan
    result: Result


def shifts_in(cells: np.ndarray, plan: Plan, result: Result) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Return the shifts of the sets in some cells (cells, sets), and which of the edits those are (edits,)."""
    inside = np.isin(plan.cells, cells)
    at = np.searchsorted(cells, plan.cells[inside])
    shape = (len(cells), len(plan.sets))
    return matrix_of(result.values[inside, 0], at, plan.which[inside], shape), inside


def beyond_the_sum(
    both: sparse.csr_matrix, sets: np.ndarray, alone: Alone, cells: np.ndarray, donors: np.ndarray | None
) -> pd.DataFrame:
    """Return by how much each pair does more than the sum of both genes alone, in some cells; one row per pair."""
    single, _ = shifts_in(cells, alone.plan, alone.result)
    pairs = np.searchsorted(alone.plan.sets[:, 0], sets)
    found = pair_statistics(single, both, pairs, names=alone.plan.names, donors=donors)
    about = ["ci_low", "ci_high", "p_value", "fdr"]
    found = found[["sum_of_shifts", "combined_minus_sum", *about]]
    return found.rename(columns={name: f"combined_minus_sum_{name}" for name in about})


def make_table(
    plan: Plan,
    rows: GeneRows,
    measure: Measure,
    result: Result,
    groups: np.ndarray | None,
    donors: np.ndarray | None,
    null: str | Sequence[str],
    seed: int,
    alone: Alone | None = None,
) -> pd.DataFrame:
    """Return the statistics of every gene or set, by group where there are groups; pairs beside the sum of both `alone`."""
    expression = set_expression(rows, plan)
    tables = []
    for group in [None] if groups is None else sorted(set(groups[np.unique(plan.cells)])):
        chosen = np.unique(plan.cells)
        if groups is not None:
            chosen = chosen[groups[chosen] == group]
        own = None if donors is None else donors[chosen]
        shifts, inside = shifts_in(chosen, plan, result)
        table = gene_statistics(
            shifts,
            names=plan.names,
            expression=expression[chosen],
            donors=own,
            null=null,
            exact=result.exact,
            seed=seed,
        )
        for k, name in enumerate(measure.names[1:] if measure.readout != "expression" else (), start=1):
            table[name] = means_of(result.values[inside, k], plan.which[inside], len(plan.sets))
        if alone is not None:
            table = table.join(beyond_the_sum(shifts, plan.sets, alone, chosen, own))
        if group is not None:
            table.insert(0, "group", pd.Series([str(group)] * len(table), dtype=object))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def write_results(
    adata: AnnData,
    slots: Slots,
    plan: Plan,
    rows: GeneRows,
    named: GeneNames,
    measure: Measure,
    result: Result,
    params: dict[str, Any],
    groupby: str | None,
    donors: np.ndarray | None,
    null: str | Sequence[str],
    place: Callable[[np.ndarray], np.ndarray],
    affected: pd.DataFrame | None = None,
    alone: Alone | None = None,
) -> None:
    """Make everything, then write it; `place` takes vectors to where the embedding puts them."""
    groups = None if groupby is None else read_obs(adata, groupby).astype(object).map(str).to_numpy()
    table = affected
    if affected is None:
        table = make_table(plan, rows, measure, result, groups, donors, null, params["seed"], alone)
    changed = np.isfinite(result.values[:, 0])
    params = {
        **params,
        "method": result.method,
        **result.about,
        "n_edits": int(plan.n_pairs),
        "n_changed": int(changed.sum()),
        "n_cells": len(np.unique(plan.cells)),
        "genes_per_edit": int(plan.sets.shape[1]),
    }
    last = plan.sets[:, -1]
    single = len(np.unique(last)) == len(last) and not plan.together  # one gene, or one beside the anchors
    columns = named.columns[last][plan.which]
    shown = columns >= 0
    layer = matrix_of(
        np.where(shown, result.values[:, 0], np.nan),
        plan.cells,
        np.where(shown, columns, 0),
        (adata.n_obs, adata.n_vars),
    )
    make_real(adata)
    if single and (plan.sets.shape[1] == 1 or params["anchor"]):
        write_layer(adata, slots.layer, layer)
    if measure.keep_vectors:
        vectors = np.full((adata.n_obs, result.values.shape[1] - len(measure.names)), np.nan, dtype=np.float32)
        vectors[plan.cells] = result.values[:, len(measure.names) :]
        write_obsm(adata, slots.vectors, place(vectors))
    entry: dict[str, Any] = {"table": table, "params": json.dumps(params)}
    if measure.readout == "expression":
        columns_of = (result.values[:, k] for k in range(1, len(measure.names)))
        means = [means_of(column, plan.which, len(plan.sets)) for column in columns_of]
        entry["expression"] = np.stack(means, axis=1).astype(np.float32)
        entry["sets"], entry["genes"] = (np.array(names, dtype=object) for names in (plan.names, measure.names[1:]))
    write_entry(adata, slots.uns, entry)
