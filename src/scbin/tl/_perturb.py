"""What happens to cells when genes are taken away, turned up or turned down."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, gene_names, read_obs, read_tokens, write
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.model import resolve_model
from scbin.nn.embedding import token_expression
from scbin.nn.run import Runner, at_rest
from scbin.tl._edits import States, config, make_plan, perturbed_cells
from scbin.tl._effects import Effects, Level, Measure, Method, affected_genes, in_column, means_of
from scbin.tl._embed import corrected
from scbin.tl._labels import MaskedPhenotypes
from scbin.tl._perturb_statistics import (
    Statistics,
    false_discovery_rates,
    gene_statistics,
    pair_statistics,
    permutation_p_values,
    permuted_means,
)
from scbin.tokens.edits import Edit, GeneRows

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

    from scbin.model import Model
    from scbin.tokens.edits import Mode

CPU_PACK = 6_144  # tokens: a pack whose hidden states stay in the cache of a core is measured faster than a larger one


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
    the vector comes to the mean of the goal's cells. This is the association shift of a network that has seen no perturbation;
    :func:`scbin.tl.fit_perturbations` learns from measured ones.

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
        and `alternatives` to compare with. The origin of the cosines is the mean of the cells of all states.
    groupby
        Column of `obs` with groups of cells, for each of which the table has rows.
    method
        `"exact"`: every edit is a forward of the network. `"screen"`: the effects of all genes of a cell from one forward and a
        few gradients, a hundred times faster; the genes with the largest effects are then computed exactly, and the table says
        which. `"auto"`: exact up to 20,000 edits. `{"name": "screen", "verify": 0.2}` also says the share of genes to verify,
        `max_edits` (10 million), `precision` or `token_budget`.
    statistics
        Fields of :class:`scbin.Statistics`, such as `{"donor_key": "donor"}`: donors as replicates, what genes are compared with,
        permutations of the states, confidence, seed.
    {tokens_key}
    {device}
    {progress}
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
        With `level="gene"` the table has a row per perturbed and affected gene, whose p value asks whether the edit moves it further than
        other genes of the same expression in the same cells. With `level="expression"` also `expression`
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
        found = f"combine={combine}, level={level!r} and states={states!r} do not go together: level='phenotype' needs"
        rule = (
            "states={'key': name of the phenotype}, 'gene' and 'expression' know no states, and combine is 1 or more."
        )
        raise ScbinInputError("A03", f"{found} {rule}")
    slot = _keys.PERTURB if key_added is None else f"{key_added}_perturb"
    layer, obsm = _keys.of_perturbation(slot)
    for kind, key in (("layers", layer), ("obsm", obsm), ("uns", slot)):
        check_writable(adata, kind, key)
    adata = copied(adata) if copy else adata
    chosen = resolve_model(model, adata)
    rows, named = _rows(adata, chosen, tokens_key), gene_names(adata, chosen.vocabulary)
    members = ends.members(adata, rows.n_genes > 0) if ends is not None and level == "cell" else ()
    group, groups = perturbed_cells(adata, rows.n_genes > 0, groupby, ends, members)
    donors = None if judged.donor_key is None else read_obs(adata, judged.donor_key).astype(object).to_numpy()
    asked: dict[str, Any] = {"each": each, "anchor": anchor, "combine": combine, "max_edits": how.max_edits}
    plan = make_plan(rows, named, edit, genes, group, donors=donors, **asked)
    with at_rest(chosen.network):
        runner = Runner(chosen.network, device, how.precision)  # the network stays on the device until the end
        budget = min(how.token_budget, CPU_PACK) if runner.device.type == "cpu" else how.token_budget
        options = {"device": str(runner.device), "precision": how.precision, "token_budget": budget}
        measure = Measure(chosen, rows, level, np.flatnonzero(group >= 0), ends, members, **options)
        if ends is not None and members and judged.n_permutations:
            of_states = None if donors is None else [donors[of] for of in members]
            permuted, kept, number = permuted_means(measure.ends, of_states, judged.n_permutations, judged.seed)
            measure.expected = np.full((len(group), *kept.shape[1:]), np.nan)
            measure.expected[members[1]] = kept - measure.centre
        keep = level == "cell" and plan.together
        effects = Effects(plan, measure, keep=keep, seed=judged.seed, progress=progress)
        if level == "gene":
            tables = affected_genes(effects, judged)
        else:
            alone = _alone(effects.run(how))
            tables = [_table(effects, alone, judged, k) for k in range(len(groups))]
    if ends is not None and measure.expected is not None:
        tables = [_permuted(table, effects, ends, permuted, number, k) for k, table in enumerate(tables)]
    if groupby is not None:
        for name, table in zip(groups, tables, strict=True):
            table.insert(0, "group", name)
    anchors = [anchor] if isinstance(anchor, str) else list(anchor or ())
    params = asdict(edit) | {"model": chosen.fingerprint, "level": level, "alternatives": []}
    params |= {} if ends is None else {name.replace("key", "state_key"): value for name, value in asdict(ends).items()}
    params |= {"groupby": groupby, "donor_key": judged.donor_key, "anchor": anchors, "seed": judged.seed}
    params |= {"precision": str(runner.dtype).removeprefix("torch."), **effects.about}
    params |= {"n_edits": len(plan.cells), "n_cells": len(np.unique(plan.cells))}
    entry = {"table": pd.concat(tables, ignore_index=True), "params": json.dumps(params)}
    if level == "expression":
        change, where = effects.profile.astype(np.float32), np.tile(plan.sets, (len(groups), 1))
        change[np.arange(len(change))[:, None], where] = np.nan  # what was edited is no effect
        sets = np.array(plan.names * len(groups), dtype=object)
        entry |= {"expression": change, "genes": np.array(named.names, dtype=object), "sets": sets}
    by_gene = not plan.together and (plan.sets.shape[1] == 1 or anchors)
    if by_gene and len(np.unique(plan.sets[:, -1])) == len(plan.sets):
        columns = named.columns[plan.genes[:, -1]]
        values = np.where(columns >= 0, effects.values[:, 0], np.nan)
        write(adata, "layers", layer, _stored(values, plan.cells, np.maximum(columns, 0), adata.shape))
    if effects.after is not None:
        vectors = np.full((adata.n_obs, effects.after.shape[1]), np.nan, dtype=np.float32)
        vectors[plan.cells] = effects.after
        write(adata, "obsm", obsm, corrected(chosen.network, vectors, adata, chosen.training.get("batch_key")))
    write(adata, "uns", slot, entry)
    return adata if copy else None


def _rows(adata: AnnData, model: Model, tokens_key: str | None) -> GeneRows:
    """Return the tokens with all phenotypes masked: the model is told nothing about a cell but its genes."""
    tokens = MaskedPhenotypes(read_tokens(adata, model.vocabulary, key=tokens_key))
    return GeneRows(tokens.take(np.arange(adata.n_obs)), model.vocabulary)


def _stored(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """Return values as CSR with their zeros kept; NaN is not stored."""
    known = np.isfinite(values)
    matrix = sparse.csr_matrix((values[known].astype(np.float32), (rows[known], columns[known])), shape=shape)
    matrix.sort_indices()
    return matrix


def _alone(effects: Effects) -> Effects | None:
    """Where cells are edited by pairs of genes, edit them by each gene of these pairs alone."""
    plan = effects.plan
    if effects.measure.level != "cell" or plan.sets.shape[1] != 2 or len(plan.sets) == 1:
        return None
    single, place = np.unique(plan.sets, return_inverse=True)
    edits = np.unique(plan.cells[:, None] * len(single) + place.reshape(plan.sets.shape)[plan.which])
    cells, which = np.divmod(edits, len(single))
    own = replace(plan, sets=single[:, None], cells=cells, which=which)
    return Effects(own, effects.measure, progress=effects.progress).run(Method("exact"))


def _table(effects: Effects, alone: Effects | None, judged: Statistics, group: int) -> pd.DataFrame:
    """Return the statistics of every gene or set in the cells of a group; of pairs also what is beyond the sum of both genes."""
    plan, measure = effects.plan, effects.measure
    cells, n_sets = np.flatnonzero(plan.group == group), len(plan.sets)
    donors = None if plan.donors is None else plan.donors[cells]

    def shifts_of(effects: Effects) -> sparse.csr_matrix:
        plan = effects.plan
        return _stored(effects.values[:, 0], plan.cells, plan.which, (len(plan.group), len(plan.sets)))[cells]

    of_set = (plan.sets.ravel(), np.repeat(np.arange(n_sets), plan.sets.shape[1]))
    in_set = sparse.csr_matrix((np.ones(plan.sets.size), of_set), shape=(len(plan.gene_names), n_sets))
    expression = sparse.csr_matrix(token_expression(plan.rows.tokens[cells], plan.rows.vocabulary) @ in_set)
    about: dict[str, Any] = {"expression": expression, "donors": donors, "statistics": judged}
    about |= {"exact": effects.exact, "limits": measure.limits}
    table = gene_statistics(shifts_of(effects), names=plan.names, **about)
    inside = plan.group[plan.cells] == group
    for k, name in enumerate(measure.names[1:], start=1):
        table[name] = means_of(effects.values[inside, k], plan.which[inside], n_sets)
    if alone is None:
        return table
    pairs = np.searchsorted(alone.plan.sets[:, 0], plan.sets)
    how: dict[str, Any] = {"donors": donors, "confidence": judged.confidence}
    return table.join(pair_statistics(shifts_of(alone), shifts_of(effects), pairs, **how))


def _permuted(
    table: pd.DataFrame, effects: Effects, ends: States, permuted: np.ndarray, labellings: float, group: int
) -> pd.DataFrame:
    """Put the p values of permuted states in the place of those against other genes, for the goal and the alternatives.

    How far a gene moves cells towards a state is the product of its mean movement with the way to that state, so no edit is made
    again. What a cell's own label adds to that, whatever the labels, is taken away.
    """
    measure, profile = effects.measure, effects.profile[group * len(table) : (group + 1) * len(table)]
    moved, own = profile[:, : measure.width], profile[:, measure.width :]
    for k, name in enumerate(ends.names):
        if k == 1 or measure.means is None:  # the start is no end
            continue
        observed, null = ((means[..., k, :] - measure.centre) @ moved.T for means in (measure.means, permuted))
        p_values, suffix = (
            permutation_p_values(observed - own[:, k], null, labellings),
            "" if k == 0 else f"_{in_column(name)}",
        )
        table[f"p_value{suffix}"], table[f"fdr{suffix}"] = p_values, false_discovery_rates(p_values)
        if k == 0:
            table["note"] = table["note"].where(np.isnan(p_values), "")
    return table
