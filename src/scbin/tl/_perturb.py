"""What happens to cells when genes are taken away, turned up or turned down."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, gene_names, read_obs, read_tokens, write, write_entry
from scbin._arguments import checked, config
from scbin._errors import ScbinInputError
from scbin.model import count_head, resolve_model
from scbin.nn.packs import token_expression
from scbin.nn.run import Runner, at_rest
from scbin.tl import _perturb_statistics as judging
from scbin.tl._by_file import in_memory
from scbin.tl._effects import (
    Effects,
    Measure,
    Method,
    States,
    affected_genes,
    in_column,
    make_plan,
    means_of,
    perturbed_cells,
)
from scbin.tl._embed import corrected
from scbin.tl._labels import MaskedPhenotypes
from scbin.tl._perturb_statistics import Statistics
from scbin.tokens.edits import Edit, GeneRows

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData

    from scbin.io.corpus import FileTokens, Paths
    from scbin.model import Model
    from scbin.tokens.edits import Mode

PACK = 32_768  # tokens that go through the network at once
CPU_PACK = 6_144  # on a CPU: where hidden states stay in the cache of a core it is measured faster


@_docs.shared
@in_memory
@checked
def perturb(
    adata: AnnData | FileTokens | Paths,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    genes: str | Sequence[str] | Sequence[tuple[str, ...]] | None = None,
    mode: Mode | Mapping[str, Any] = "delete",
    each: bool = True,
    combine: int = 1,
    level: Literal["cell", "gene", "phenotype", "expression"] = "cell",
    states: Mapping[str, Any] | None = None,
    method: Method = "auto",
    verify: float = 0.1,
    statistics: Statistics | Mapping[str, Any] | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Edit genes in cells and measure how far each cell moves, or how much closer it comes to a goal.

    By default every expressed gene is deleted in turn in every cell. An edit changes the tokens of the cell, the model reads the
    cell again, and the effect is how far its vector moves. With states, such as diseased and healthy, the effect is how much
    closer the vector comes to the mean of the goal's cells. The network has seen no perturbations, so effects are associations;
    :func:`scbin.tl.fit_perturbations` learns from measured ones.

    Parameters
    ----------
    adata
        Tokenized cells, see :func:`scbin.pp.tokenize`. Files of them (see :func:`scbin.open_tokens`) are read into memory as one
        AnnData, which is then returned.
    {model}
    genes
        A gene, a list of genes, edited in turn, or a list of tuples of genes, edited together. Default: every expressed gene in
        turn.
    mode
        `"delete"`; `"overexpress"` (the top bin, the cell's highest count, or the first rank); `"inhibit"` and `"activate"` by
        `k` bins, or quartiles of the ranks: `{"mode": "inhibit", "k": 2}`; `"knock_down"` by a `fraction` of the expression.
        Genes that you name are turned up also in cells that do not express them.
    each
        `False` edits the whole list at once, in the cells that express all of it (in all cells where genes are turned up).
    combine
        2 edits all pairs of `genes`, 3 all triples. The table of pairs has their effect beyond the sum of both genes.
    level
        What is measured: the vector of the `"cell"`; of the other genes of the cell, which an edit affects, their vectors (`"gene"`) or
        the `"expression"` that the model expects; or the probabilities that it gives to the values of a `"phenotype"`
        (`states={"key": "cell_type"}`), or just to its value `goal`.
    states
        A mapping such as `{"key": "disease", "start": "ill", "goal": "healthy"}`: the column of `obs`, the state whose cells are
        perturbed (default: all cells in no other state), the goal, and `alternatives` to compare with. The mean of the cells of
        all states is subtracted before cosines are computed.
    method
        `"exact"`: the network runs on every edited cell. `"screen"`: the effects of all genes of a cell are estimated from one
        pass and a few gradients, about five times faster in the benchmarks; the genes with the largest effects are then
        computed exactly, as the table says. `"auto"`: exact up to 20,000 edits.
    verify
        Fraction of the genes that a screen computes exactly.
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
        CSR (cells, genes): effect of each gene on each cell, 1 - cosine, or the change of the cosine to the goal, stored for all
        edits. For single genes, and for effects on the cell or its phenotype.
    `adata.obsm['X_scbin_perturbed']`
        For genes edited together: the vectors afterwards (cells, size), to compare with `X_scbin`; NaN for cells that were not
        edited.
    `adata.uns['scbin_perturb']`
        `table`, one row per gene or set of genes (see :func:`scbin.get.perturb_df`), and `params`, how it was made, as JSON.
        With `level="gene"` or `"expression"` the table has a row per perturbed and affected gene: how far its vector moves, or by how
        much log1p of its counts per 10,000 changes, and whether that is more than for other genes of the same expression in the same cells.

    Raises
    ------
    ScbinInputError
        If a gene is unknown to the model or expressed in none of the cells, a state has no cells, or the edits are more
        than 10 million. Nothing is written then.

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
    adata = check_adata(adata)
    edit, judged = config(Edit, mode), config(Statistics, statistics)
    ends: States | None = None if states is None else config(States, states)
    of_genes = level in ("gene", "expression")
    fits = level == "cell" or of_genes == (ends is None)
    if combine < 1 or not 0 <= verify <= 1 or not fits:
        rule = "combine is 1 or more, verify a share, 'phenotype' needs states={'key': ...}, 'gene' and 'expression' have none"
        raise ScbinInputError("A03", f"{combine=}, {verify=}, {level=} and {states=} do not go together: {rule}.")
    slot = _keys.PERTURB if key_added is None else f"{key_added}_perturb"
    layer, obsm = _keys.of_perturbation(slot)
    for kind, key in (("layers", layer), ("obsm", obsm), ("uns", slot)):
        check_writable(adata, kind, key)
    adata = copied(adata) if copy else adata
    chosen = resolve_model(model, adata)
    if level == "expression":
        count_head(chosen, 'Use level="gene", or tokenize as "bins" and pretrain.')
    rows, named = _rows(adata, chosen, tokens_key), gene_names(adata, chosen.vocabulary)
    members = ends.members(adata, rows.n_genes > 0) if ends is not None and level == "cell" else ()
    cells = perturbed_cells(adata, rows.n_genes > 0, ends, members)
    donors = None if judged.donor_key is None else read_obs(adata, judged.donor_key).to_numpy(dtype=object)
    plan = make_plan(rows, named, edit, genes, cells, donors=donors, each=each, combine=combine)
    together, permuted = plan.sets.shape[1] > 1 and len(plan.sets) == 1, None
    with at_rest(chosen.network):
        runner = Runner(chosen.network, device)  # the network stays on the device until the end
        budget = CPU_PACK if runner.device.type == "cpu" else PACK
        options: dict[str, Any] = {"device": str(runner.device), "precision": "auto", "token_budget": budget}
        measure = Measure(chosen, rows, cells, ends, members, progress=progress, **options)
        if members and judged.n_permutations:
            of_states = None if donors is None else [donors[of] for of in members]
            permuted, kept, number = judging.permuted_means(measure.ends, of_states, judged.n_permutations, judged.seed)
            measure.expected = np.full((adata.n_obs, *kept.shape[1:]), np.nan)
            measure.expected[members[1]] = kept - measure.centre
        effects = Effects(plan, measure, keep=level == "cell" and together, seed=judged.seed, progress=progress)
        if of_genes:
            table = affected_genes(effects, level, judged)
        else:
            effects.run(method, verify)
            pairs = level == "cell" and plan.sets.shape[1] == 2 and (combine == 2 or not together)
            alone = _alone(effects) if pairs else None
            table = _table(effects, alone, judged)
    if ends is not None and permuted is not None:
        _permute(table, effects, ends, permuted, number)
    about: dict[str, Any] = {} if ends is None else {"state_key": ends.key, "goal": ends.goal, "start": ends.start}
    about |= {"alternatives": [] if ends is None else list(ends.alternatives), "level": level}
    about |= {"method": "screen" if effects.screened else "exact", "donor_key": judged.donor_key, "seed": judged.seed}
    about |= {"model": chosen.fingerprint, "n_edits": len(plan.cells), "n_cells": len(np.unique(plan.cells))}
    shifts = vectors = None
    if plan.sets.shape[1] == 1 and not of_genes:
        columns = named.columns[plan.genes[:, 0]]
        values = np.where(columns >= 0, effects.values[:, 0], np.nan)
        shifts = _stored(values, plan.cells, np.maximum(columns, 0), adata.shape)
    if together and effects.after is not None:
        vectors = np.full((adata.n_obs, effects.after.shape[1]), np.nan, dtype=np.float32)
        vectors[plan.cells] = effects.after
        vectors = corrected(chosen.network, vectors, adata, chosen.training.get("batch_key"))
    write(adata, "layers", layer, shifts)  # those of an earlier call are taken away
    write(adata, "obsm", obsm, vectors)
    write_entry(adata, slot, asdict(edit) | about, table=table)
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


def _alone(effects: Effects) -> Effects:
    """Where cells are edited by pairs of genes, edit them by each gene of these pairs alone."""
    plan = effects.plan
    single, place = np.unique(plan.sets, return_inverse=True)
    edits = np.unique(plan.cells[:, None] * len(single) + place.reshape(plan.sets.shape)[plan.which])
    cells, which = np.divmod(edits, len(single))
    own = replace(plan, sets=single[:, None], cells=cells, which=which)
    return Effects(own, effects.measure, progress=effects.progress).run("exact")


def _table(effects: Effects, alone: Effects | None, judged: Statistics) -> pd.DataFrame:
    """Return the statistics of every gene or set; of pairs also what is beyond the sum of both genes."""
    plan, measure = effects.plan, effects.measure
    cells, n_sets = plan.chosen, len(plan.sets)
    donors = None if plan.donors is None else plan.donors[cells]

    def shifts_of(effects: Effects) -> sparse.csr_matrix:
        plan, shape = effects.plan, (len(effects.measure.originals), len(effects.plan.sets))
        return _stored(effects.values[:, 0], plan.cells, plan.which, shape)[cells]

    of_set = (plan.sets.ravel(), np.repeat(np.arange(n_sets), plan.sets.shape[1]))
    in_set = sparse.csr_matrix((np.ones(plan.sets.size), of_set), shape=(len(plan.gene_names), n_sets))
    expression = sparse.csr_matrix(token_expression(plan.rows.tokens[cells], plan.rows.vocabulary) @ in_set)
    summary = judging.summarise(shifts_of(effects), donors)
    table = judging.gene_statistics(summary, plan.names, expression, judged, limits=measure.limits)
    table["exact"] = effects.exact
    for k, name in enumerate(measure.names[1:], start=1):
        table[name] = means_of(effects.values[:, k], plan.which, n_sets)
    if alone is None:
        return table
    pairs = np.searchsorted(alone.plan.sets[:, 0], plan.sets)
    return table.join(judging.pair_statistics(shifts_of(alone), shifts_of(effects), pairs, donors, judged.confidence))


def _permute(table: pd.DataFrame, effects: Effects, ends: States, permuted: np.ndarray, labellings: float) -> None:
    """Put the p values of permuted states in the place of those against other genes, for the goal and the alternatives.

    How far a gene moves cells towards a state is the product of its mean movement with the way to that state, so no edit is made
    again. What a cell's own label adds to that, whatever the labels, is taken away.
    """
    measure, sums = effects.measure, effects.sums
    mean = sums[:, :-1] / np.where(sums[:, -1:] > 0, sums[:, -1:], np.nan)
    moved, own = np.split(mean, [permuted.shape[-1]], axis=1)
    for k, name in enumerate(ends.names):
        if k != 1:  # the start is no end
            observed, null = ((means[..., k, :] - measure.centre) @ moved.T for means in (measure.means, permuted))
            p_values = judging.permutation_p_values(observed - own[:, k], null, labellings)
            suffix = "" if k == 0 else f"_{in_column(name)}"
            table[f"p_value{suffix}"], table[f"fdr{suffix}"] = p_values, judging.false_discovery_rates(p_values)
