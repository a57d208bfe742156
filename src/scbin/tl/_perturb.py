"""`tl.perturb`: what happens to cells when genes are taken away, turned up or turned down."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from scbin._anndata import check_adata, copied, read_obs, read_tokens
from scbin._arguments import choices, flags, numbers, paths, texts, whole_numbers
from scbin._errors import ScbinInputError
from scbin.encoding.edits import Edit, GeneRows
from scbin.nn.embedding import hide_phenotypes
from scbin.nn.perturbation import RowEncoder
from scbin.tl._model import resolve_model
from scbin.tl._perturb_affected import run_affected
from scbin.tl._perturb_genes import gene_names
from scbin.tl._perturb_measure import Readout, expression_measure, measure_for, phenotype_measure
from scbin.tl._perturb_plan import chosen_cells, make_plan, read_states, singles_of
from scbin.tl._perturb_run import Job, run_job
from scbin.tl._perturb_write import Alone, Slots, write_results

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.encoding.edits import Mode
    from scbin.encoding.vocabulary import Vocabulary
    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.tl._perturb_plan import Plan

MOST_EXPRESSION = 200_000_000  # predicted values held at once
Method = Literal["auto", "exact", "screen"]


def perturb(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    genes: str | Sequence[str] | Sequence[tuple[str, ...]] | None = None,
    mode: Mode = "delete",
    k: int = 1,
    fraction: float = 0.5,
    each: bool = True,
    anchor: str | Sequence[str] | None = None,
    combine: int = 1,
    readout: Readout = "embedding",
    level: Literal["cell", "gene"] = "cell",
    target: str | None = None,
    method: Method = "auto",
    verify: float = 0.1,
    state_key: str | None = None,
    start: str | None = None,
    goal: str | None = None,
    alternatives: str | Sequence[str] | None = None,
    centre: Literal["auto", "states", "cells"] | None = "auto",
    groupby: str | None = None,
    groups: str | Sequence[str] | None = None,
    donor_key: str | None = None,
    null: str | Sequence[str] = "matched",
    gene_key: str | None = None,
    max_edits: int = 10_000_000,
    save_dir: str | os.PathLike[str] | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    seed: int = 0,
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
    adata
        Tokenized cells (`scbin.pp.tokenize(adata, like=model)`).
    model
        A :class:`scbin.Model`, or the directory of one. Default: the one trained on these cells.
    genes
        A gene, or a list of genes, each in turn; a list of tuples edits the genes of a tuple together. Default: every
        expressed gene of every cell in turn.
    mode
        `"delete"`; `"overexpress"` (the top bin, or the first rank); `"inhibit"` and `"activate"` by `k` bins, or quartiles of
        the ranks; `"knock_down"` by `fraction`. What turns a gene up is also done in cells that lack it, if you name the gene.
    k
        Bins, or quartiles of the ranks, for `"inhibit"` and `"activate"`.
    fraction
        Share of the expression that `"knock_down"` takes away; for `"rank"`, of the way to the last rank.
    each
        `False` edits the whole list at once, in the cells that express all of it (in all cells where genes are turned up).
    anchor
        A gene that is edited along with each of the others, in the cells that express it.
    combine
        2 edits all pairs of `genes`, 3 all triples. The table of pairs says what each does beyond the sum of both genes alone.
    readout
        What is read off a cell: its vector, `"embedding"`; the probabilities that the model gives to the values of a
        `"phenotype"`, named by `target`, or just to its value `goal`; or the `"expression"` that it expects of every gene, given
        a part of the others and the edited ones.
    level
        `"gene"` measures the vectors of the other genes of a cell instead of the cell's: which genes an edit affects.
    target
        The phenotype to predict.
    method
        `"exact"`: every edit is a forward of the network. `"screen"`: the effects of all genes of a cell from one forward and a
        few gradients, a hundred times faster; the genes with the largest effects are then computed exactly, and the table says
        which (`exact`). `"auto"`: exact up to 20,000 edits, else the screen where there is one: for effects on the vector of
        single genes, where a position is a gene, and for deletions in `"rank"`.
    verify
        Share of the genes of a screen that is computed exactly: those with the largest effects, and a tenth as many at random.
    state_key, start, goal, alternatives
        Column of `obs` with states, the state whose cells are perturbed (default: all cells in none of the others), the one they
        shall come to, and others to compare with.
    centre
        Origin of the cosines: the mean of the cells of all `"states"`, the mean of all `"cells"`, or `None` for the origin of
        the vectors. Raw cosines all lie near 1. `"auto"`: `"states"` where there are some, else `None`.
    groupby, groups
        Column of `obs` and the groups of cells to perturb; the table is made by group.
    donor_key
        Column of `obs` with the donors, who are the replicates of the statistics. Default: cells are, which overstates how sure
        one can be.
    null
        What a gene is compared with: `"matched"`, genes of the same expression and detection, or names of tested genes.
    gene_key
        Column of `var` with the names of the genes as the model has them. Default: what fits best.
    max_edits
        Refuse to make more edits than this.
    save_dir
        Directory in which finished pieces are kept: the same call goes on where it was interrupted.
    tokens_key
        The slot of `obsm` with the tokens. Default: `"X_tokens"`.
    device
        `"auto"` takes cuda, then mps, then cpu.
    precision
        Of the matrix products. Shifts are small: `"bfloat16"` is faster and keeps the order of the genes, not the third digit.
    token_budget
        Most tokens to go through the network at once. Changes memory and speed, not numbers.
    seed
        Of the genes drawn at random.
    progress
        Say how long it will take, and show a progress bar.
    key_added
        Names of the slots: `"x"` gives `layers["x_shift"]`, `obsm["X_x_perturbed"]` and `uns["x_perturb"]`. Default: `"scbin"`.
    copy
        Return a copy instead of writing into `adata`.

    Returns
    -------
    Returns `None` if `copy=False`, else returns an `AnnData` object. Sets the following fields:

    `adata.layers['scbin_shift']`
        CSR (cells, genes): effect of each gene on each cell, 1 - cosine, or the change of the cosine to the goal. What is stored
        was edited; the rest was not. With an anchor, of both genes together. Not for tuples, pairs or a list at once.
    `adata.obsm['X_scbin_perturbed']`
        For a list at once: where the cells lie afterwards (cells, hidden size), beside `X_scbin`; NaN for cells that were not
        edited. The shift itself is measured on the network's own vector, before the last step of the embedding.
    `adata.uns['scbin_perturb']`
        `table`, one row per gene or set of genes (see :func:`scbin.get.perturb_df`), and `params`, how it was made, as JSON.
        With `level="gene"` the table has a row per perturbed and affected gene. With `readout="expression"` also `expression`
        (sets, genes of the model), the mean change that is expected of each gene, and the names `sets` and `genes`.

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
    allowed = {"method": get_args(Method), "centre": ("auto", "states", "cells", None), "readout": get_args(Readout)}
    choices({**allowed, "level": ("cell", "gene")}, method=method, centre=centre, readout=readout, level=level)
    whole_numbers(k=k, combine=combine, max_edits=max_edits, token_budget=token_budget, seed=seed)
    numbers(fraction=fraction, verify=verify)
    flags(each=each, progress=progress, copy=copy)
    texts(optional=True, state_key=state_key, start=start, goal=goal, groupby=groupby, donor_key=donor_key)
    paths(optional=True, save_dir=save_dir)
    if not 0 <= verify <= 1 or combine < 1 or token_budget < 1:
        raise ScbinInputError(
            "P23",
            f"verify={verify}, combine={combine}, token_budget={token_budget}: a share, and numbers of 1 or more.",
        )
    if centre == "states" and state_key is None:
        raise ScbinInputError("P33", 'centre="states" needs states: pass state_key= and goal=, or another centre.')
    if level == "gene" and method == "screen":
        raise ScbinInputError("P46", 'there is no screen for level="gene". Use method="exact".')
    if (readout == "phenotype") != (target is not None) or (level == "gene" and (readout != "embedding" or state_key)):
        raise ScbinInputError(
            "P34",
            f"readout={readout!r}, target={target!r}, level={level!r} do not go together: target= is the phenotype to read, and "
            'level="gene" is about vectors without states.',
        )
    edit = Edit(mode, int(k), float(fraction))
    slots = Slots.of(adata, key_added)
    adata = copied(adata) if copy else adata
    chosen = resolve_model(model, adata)
    tokens, vocabulary = read_tokens(adata, chosen.vocabulary, key=tokens_key)
    rows = GeneRows(hide_phenotypes(tokens, vocabulary), vocabulary)
    named = gene_names(adata, vocabulary, gene_key)
    donors = None if donor_key is None else read_obs(adata, donor_key).astype(object).to_numpy()
    readable = rows.n_genes > 0
    states = None if readout == "phenotype" else read_states(adata, readable, state_key, start, goal, alternatives)
    cells = chosen_cells(adata, readable, groupby, groups, states)
    plan = make_plan(rows, named, cells, edit, genes, each=each, anchor=anchor, combine=combine, max_edits=max_edits)
    encoder = RowEncoder(
        chosen.bert,
        vocabulary,
        chosen.weights(),
        layer=chosen.readout.layer if readout == "embedding" else -1,
        device=device,
        precision=precision,
        token_budget=token_budget,
    )
    job = Job(plan, rows, edit, method, verify, seed, save_dir, progress)
    with encoder:
        if readout == "phenotype":
            measure = phenotype_measure(encoder, rows, cells, vocabulary.phenotype(str(target)), goal)
        elif readout == "expression":
            _check_expression(vocabulary, plan)
            measure = expression_measure(encoder, rows, cells, named.names)
        else:
            measure = measure_for(encoder, rows, plan, cells, states, centre)
        affected = alone = None
        if level == "gene":
            result, affected = run_affected(job, encoder, named.names)
        else:
            result = run_job(job, encoder, measure, chosen.fingerprint)
            if plan.sets.shape[1] == 2 and readout == "embedding":
                single = singles_of(plan, rows, named)
                each_alone = replace(job, plan=single, method="exact", label="each gene of the pairs alone: ")
                own = replace(measure, keep_vectors=False)
                alone = Alone(single, run_job(each_alone, encoder, own, chosen.fingerprint))
    params = {
        "mode": mode,
        "k": k,
        "fraction": fraction,
        "model": chosen.fingerprint,
        "precision": precision,
        "readout": readout,
        "level": level,
        "target": target,
        "state_key": state_key,
        "start": start,
        "goal": goal,
        "alternatives": [] if states is None else list(states.names[2:]),
        "centre": centre,
        "groupby": groupby,
        "donor_key": donor_key,
        "anchor": [anchor] if isinstance(anchor, str) else list(anchor or ()),
        "seed": seed,
    }
    write_results(
        adata, slots, plan, rows, named, measure, result, params, groupby, donors, null, chosen.place, affected, alone
    )
    return adata if copy else None


def _check_expression(vocabulary: Vocabulary, plan: Plan) -> None:
    """Refuse what has no expression to predict, or more of it than memory."""
    if not vocabulary.position_is_gene:
        raise ScbinInputError(
            "P35",
            'readout="expression" needs tokens that say how much of a gene there is; these are ranks. Use "bins".',
        )
    n = plan.n_pairs * len(vocabulary.genes)
    if n > MOST_EXPRESSION:
        raise ScbinInputError(
            "P45",
            f"{plan.n_pairs:,} edits times {len(vocabulary.genes):,} predicted genes are {n:,} numbers, more than the "
            f"{MOST_EXPRESSION:,} that are held at once. Name fewer genes, or restrict the cells.",
        )
