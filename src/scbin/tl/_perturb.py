"""What happens to cells when genes are taken away, turned up or turned down."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, read_obs, read_tokens, write
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.model import resolve_model
from scbin.nn.run import Runner, at_rest
from scbin.tl._edits import Plan, States, Statistics, config, gene_names, make_plan, perturbed_cells
from scbin.tl._effects import (
    CPU_PACK,
    Job,
    Level,
    Method,
    affected_genes,
    in_column,
    make_measure,
    means_of,
    permutation_p_values,
    permuted_means,
    run_effects,
    unit,
)
from scbin.tl._embed import corrected
from scbin.tl._perturb_statistics import (
    false_discovery_rates,
    gene_statistics,
    pair_statistics,
)
from scbin.tokens.edits import Edit, GeneRows

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

    from scbin.model import Model
    from scbin.tl._effects import Effects, Measure
    from scbin.tokens.edits import Mode


@_docs.shared
@checked
def perturb(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    genes: str | Sequence[str] | Sequence[tuple[str, ...]] | None = None,
    mode: Mode | Mapping[str, Any] = "delete",
    each: bool = True,
    combine: int = 1,
    anchor: str | Sequence[str] | None = None,
    level: Level = "cell",
    states: Mapping[str, Any] | None = None,
    groupby: str | None = None,
    method: str | Mapping[str, Any] = "auto",
    statistics: Statistics | Mapping[str, Any] | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Edit genes in cells and measure how far each cell moves, or how much closer it comes to a goal.

    By default every expressed gene is deleted in turn in every cell. An edit is a change of the cell's tokens, and the model reads
    the cell again: the effect is how its vector moves. With states, say diseased and healthy, the effect is how much closer
    the vector comes to the mean of the goal's cells.

    Parameters
    ----------
    {tokenized}
    {model}
    genes
        A gene, or a list of genes, each in turn; a list of tuples edits the genes of a tuple together. Default: every
        expressed gene of every cell in turn.
    mode
        `"delete"`; `"overexpress"` (the top bin, the cell's highest count, or the first rank); `"inhibit"` and `"activate"` by
        `k` bins, or quartiles of the ranks: `{"mode": "inhibit", "k": 2}`; `"knock_down"` by a `fraction` of the expression. What
        turns a gene up is also done in cells that lack it, if you name the gene.
    each
        `False` edits the whole list at once, in the cells that express all of it (in all cells where genes are turned up).
    combine
        2 edits all pairs of `genes`, 3 all triples. The table of pairs says what each does beyond the sum of both genes alone.
    anchor
        A gene that is edited along with each of the others, in the cells that express it.
    level
        What is measured: the vector of the `"cell"`; the vectors of the other genes of the cell, `"gene"`: which genes an edit
        affects; the probabilities that the model gives to the values of a `"phenotype"` (`states={"key": "cell_type"}`), or
        just to its value `goal`; or the `"expression"` of every gene that the model expects of the cell.
    states
        From which cells to which others, a mapping such as `{"key": "disease", "start": "ill", "goal": "healthy"}`: the column of
        `obs`, the state whose cells are perturbed (default: all cells in none of the others), the one they shall come to,
        `alternatives` to compare with, and `centre`, the origin of the cosines: the mean of the cells of all `"states"` (the
        default), of all `"cells"`, or `None`.
    groupby
        Column of `obs` with groups of cells, for each of which the table has rows.
    method
        `"exact"`: every edit is a forward of the network. `"screen"`: the effects of all genes of a cell from one forward and a
        few gradients, a hundred times faster; the genes with the largest effects are then computed exactly, and the table says
        which. `"auto"`: exact up to 20,000 edits. `{"name": "screen", "verify": 0.2}` also says the share of genes to verify,
        `max_edits` (10 million), `precision` (`"float32"`) or `token_budget`.
    statistics
        Fields of :class:`scbin.Statistics`, such as `{"donor_key": "donor"}`: donors as replicates, what genes are compared with,
        permutations of the states, confidence, seed.
    {tokens_key}
    {device}
    progress
        Say how long it will take, and show a progress bar.
    key_added
        Names of the slots: `"x"` gives `layers["x_shift"]`, `obsm["X_x_perturbed"]` and `uns["x_perturb"]`. Default: `"scbin"`.
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.layers['scbin_shift']`
        CSR (cells, genes): effect of each gene on each cell, 1 - cosine, or the change of the cosine to the goal. What is stored
        was edited; the rest was not. With an anchor, of both genes together. Not for tuples, pairs or a list at once.
    `adata.obsm['X_scbin_perturbed']`
        For a list at once: where the cells lie afterwards (cells, size), beside `X_scbin`; NaN for cells that were not edited.
    `adata.uns['scbin_perturb']`
        `table`, one row per gene or set of genes (see :func:`scbin.get.perturb_df`), and `params`, how it was made, as JSON.
        With `level="gene"` the table has a row per perturbed and affected gene. With `level="expression"` also `expression`
        (rows of the table, genes of the model), the mean change of the log1p counts per 10,000, and the names `sets` and `genes`.

    Raises
    ------
    ScbinInputError
        If a gene is unknown to the model or expressed in none of the cells, a state or group has no cells, or the edits are more
        than `max_edits`. Nothing is written then.

    Notes
    -----
    In silico perturbation follows Geneformer :cite:p:`theodoris2023`, for every encoding and with donors as replicates.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:60].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> scbin.tl.perturb(adata, model, genes=["CST3", "NKG7"], progress=False)
    >>> sorted(scbin.get.perturb_df(adata)["gene"])
    ['CST3', 'NKG7']
    >>> adata.layers["scbin_shift"].shape == adata.shape
    True
    """
    check_adata(adata)
    edit, how, judged = config(Edit, mode), config(Method, method), config(Statistics, statistics)
    ends: States | None = None if states is None else config(States, states)
    if combine < 1 or (level == "phenotype" and ends is None) or (level in ("gene", "expression") and ends is not None):
        raise ScbinInputError(
            "A03",
            f"combine={combine}, level={level!r} and states={states!r} do not go together: level='phenotype' needs "
            "states={'key': name of the phenotype}, 'gene' and 'expression' know no states, and combine is 1 or more.",
        )
    slot = _keys.PERTURB if key_added is None else f"{key_added}_perturb"
    layer, obsm = _keys.of_perturbation(slot)
    for kind, key in (("layers", layer), ("obsm", obsm), ("uns", slot)):
        check_writable(adata, kind, key)
    adata = copied(adata) if copy else adata
    chosen = resolve_model(model, adata)
    rows, named = _rows(adata, chosen, tokens_key), gene_names(adata, chosen.vocabulary)
    readable = rows.n_genes > 0
    members = ends.members(adata, readable) if ends is not None and level == "cell" else ()
    cells = perturbed_cells(adata, readable, groupby, ends, members)
    requested = {"each": each, "anchor": anchor, "combine": combine, "max_edits": how.max_edits}
    plan = make_plan(rows, named, cells, edit, genes, **requested)
    names, group = np.array([None], dtype=object), np.where(np.isin(np.arange(adata.n_obs), cells), 0, -1)
    if groupby is not None:
        names, group[cells] = np.unique(read_obs(adata, groupby).iloc[cells].astype(str), return_inverse=True)
    with at_rest(chosen.network):
        runner = Runner(chosen.network, device, how.precision)
        budget = min(how.token_budget, CPU_PACK) if runner.device.type == "cpu" else how.token_budget
        job = Job(plan, rows, edit, runner, budget, group, judged.donors(adata), judged.seed, progress)
        measure = make_measure(chosen, rows, level, cells, ends, members, job.how)
        alone: tuple[Plan, Effects] | None = None
        if level == "gene":
            effects, tables = affected_genes(job, named.names)
        else:
            effects = run_effects(job, measure, how, keep=level == "cell" and plan.together)
        if level == "cell" and plan.sets.shape[1] == 2 and len(plan.sets) > 1:
            alone = _alone(job, measure, named.names)
    if level != "gene":
        tables = [_table(job, measure, effects, judged, k, alone) for k in range(len(names))]
    if measure.goal is not None and ends is not None and judged.n_permutations:
        donors = None if job.donors is None else [job.donors[of] for of in members]
        permuted = permuted_means(measure.goal.vectors, donors, judged.n_permutations, judged.seed)
        tables = [_permuted(table, measure, effects, ends, permuted, k) for k, table in enumerate(tables)]
    if groupby is not None:
        tables = [
            pd.concat({name: table}, names=["group"]).reset_index("group")
            for name, table in zip(names, tables, strict=True)
        ]
    anchors = [anchor] if isinstance(anchor, str) else list(anchor or ())
    params = asdict(edit) | {"model": chosen.fingerprint, "level": level, "alternatives": []}
    params |= {} if ends is None else {name.replace("key", "state_key"): value for name, value in asdict(ends).items()}
    params |= {"groupby": groupby, "donor_key": judged.donor_key, "anchor": anchors, "seed": judged.seed}
    params |= {"precision": how.precision, "method": effects.method, **effects.about}
    params |= {"n_edits": len(plan.cells), "n_cells": len(np.unique(plan.cells))}
    entry = {"table": pd.concat(tables, ignore_index=True), "params": json.dumps(params)}
    if level == "expression":
        entry |= _expression(job, effects, named.names)
    if (
        (plan.sets.shape[1] == 1 or anchors)
        and not plan.together
        and len(np.unique(plan.sets[:, -1])) == len(plan.sets)
    ):
        columns = named.columns[plan.genes[:, -1]]
        values = np.where(columns >= 0, effects.values[:, 0], np.nan)
        write(adata, "layers", layer, _stored(values, plan.cells, np.maximum(columns, 0), adata.shape))
    if effects.after is not None:
        vectors = np.full((adata.n_obs, effects.after.shape[1]), np.nan, dtype=np.float32)
        vectors[plan.cells] = effects.after
        write(adata, "obsm", obsm, corrected(chosen.network, vectors, adata, chosen.training.get("batch_key")))
    write(adata, "uns", slot, entry)
    return adata if copy else None


def _expression(job: Job, effects: Effects, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the mean change of the expected expression of all genes but the edited ones, by group and set."""
    if effects.profile is None:
        return {}
    change, n_groups = effects.profile.astype(np.float32), job.n_slots // len(job.plan.sets)
    change[np.arange(len(change))[:, None], np.tile(job.plan.sets, (n_groups, 1))] = np.nan
    sets = np.array(job.plan.names * n_groups, dtype=object)
    return {"expression": change, "genes": np.array(names, dtype=object), "sets": sets}


def _rows(adata: AnnData, model: Model, tokens_key: str | None) -> GeneRows:
    """Return the tokens with all phenotypes masked: the model is told nothing about a cell but its genes."""
    matrix = read_tokens(adata, model.vocabulary, key=tokens_key).take(np.arange(adata.n_obs))
    hidden = [phenotype.position for phenotype in model.vocabulary.phenotypes]
    matrix.data[np.isin(matrix.indices, hidden)] = model.vocabulary.mask_id
    return GeneRows(matrix, model.vocabulary)


def _stored(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Return values as CSR with their zeros kept; NaN is not stored."""
    known = np.isfinite(values)
    matrix = sparse.csr_matrix((values[known].astype(np.float32), (rows[known], columns[known])), shape=shape)
    matrix.sort_indices()
    return matrix


def _table(
    job: Job,
    measure: Measure,
    effects: Effects,
    judged: Statistics,
    group: int,
    alone: tuple[Plan, Effects] | None,
) -> pd.DataFrame:
    """Return the statistics of every gene or set in the cells of a group; of pairs also what is beyond the sum of both genes."""
    plan, rows, vocabulary = job.plan, job.rows, job.rows.vocabulary
    cells = np.flatnonzero(job.group == group)
    donors = None if job.donors is None else job.donors[cells]

    def shifts_of(plan: Plan, effects: Effects) -> sparse.csr_matrix:
        shape = (len(job.group), len(plan.sets))
        return _stored(effects.values[:, 0], plan.cells, plan.which, shape)[cells]

    tables, (at, genes) = vocabulary.tables(), np.divmod(rows.keys, len(vocabulary.genes))
    values = tables.value_of_id[rows.tokens.data[rows.at]] * tables.value_of_position[rows.tokens.indices[rows.at]]
    shape = (rows.tokens.shape[0], len(vocabulary.genes))
    expression = sparse.csr_matrix((values * (rows.level > 0), (at, genes)), shape=shape)[cells]
    of_set = (np.repeat(np.arange(len(plan.sets)), plan.sets.shape[1]), plan.sets.ravel())
    in_set = sparse.csr_matrix((np.ones(plan.sets.size), of_set), shape=(len(plan.sets), shape[1]))
    shifts = shifts_of(plan, effects)
    table = gene_statistics(
        shifts,
        names=plan.names,
        expression=sparse.csr_matrix(expression @ in_set.T),
        donors=donors,
        statistics=judged,
        exact=effects.exact,
        limits=measure.limits,
    )
    inside = job.group[plan.cells] == group
    for k, name in enumerate(measure.names[1:], start=1):
        table[name] = means_of(effects.values[inside, k], plan.which[inside], len(plan.sets))
    if alone is not None:
        pairs, single = np.searchsorted(alone[0].sets[:, 0], plan.sets), shifts_of(*alone)
        how: dict[str, Any] = {"names": alone[0].names, "donors": donors, "confidence": judged.confidence}
        found = pair_statistics(single, shifts, pairs, **how)
        about = {name: f"combined_minus_sum_{name}" for name in ("ci_low", "ci_high", "p_value", "fdr")}
        table = table.join(found[["sum_of_shifts", "combined_minus_sum", *about]].rename(columns=about))
    return table


def _alone(job: Job, measure: Measure, names: tuple[str, ...]) -> tuple[Plan, Effects]:
    """Make the edits of each gene of the pairs alone, in the cells in which one of its pairs is edited."""
    plan = job.plan
    single, place = np.unique(plan.sets, return_inverse=True)
    edits = np.unique(plan.cells[:, None] * len(single) + place.reshape(plan.sets.shape)[plan.which])
    own = Plan.of(job.rows, names, single[:, None], *np.divmod(edits, len(single)))
    return own, run_effects(replace(job, plan=own), measure, Method("exact"))


def _permuted(
    table: pd.DataFrame, measure: Measure, effects: Effects, ends: States, permuted: np.ndarray, group: int
) -> pd.DataFrame:
    """Put the p values of permuted states in the place of those against other genes, for the goal and the alternatives.

    The mean shift of a gene is the product of its mean movement with the direction of the state, so no edit is made again.
    """
    if effects.profile is None or measure.goal is None:
        return table
    moved, centre = effects.profile[group * len(table) : (group + 1) * len(table)], measure.goal.centre
    for k, name in enumerate(ends.names):
        if k == 1:  # the start is no end
            continue
        observed, null = moved @ unit(measure.goal.means[k], centre), unit(permuted[:, k], centre) @ moved.T
        p_values, suffix = permutation_p_values(observed, null), "" if k == 0 else f"_{in_column(name)}"
        table[f"p_value{suffix}"], table[f"fdr{suffix}"] = p_values, false_discovery_rates(p_values)
        if k == 0:
            table["note"] = table["note"].where(np.isnan(p_values), "")
    return table
