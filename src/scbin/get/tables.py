"""The training history, the tokens of a cell, scores and networks, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from scbin import _docs, _keys
from scbin._adata import check_adata, read_tokens, read_uns
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.tokens.tokens import Tokens


def history_df(source: AnnData | pd.DataFrame | Any) -> pd.DataFrame:
    """Return the training history, one row per logged step.

    Parameters
    ----------
    source
        The trained `Model`, or the `AnnData` on which it was trained.

    Returns
    -------
    A copy of the history. Row 0 is the network at the start, followed by a row per step: `step`, `epoch`, `loss`, each loss
    by name (`loss_genes` ...) and on the held-out cells (`validation_genes` ..., NaN where it was not measured),
    `learning_rate`, `tokens_per_second` and more.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> adata.uns["scbin"] = {"pretrain_history": pandas.DataFrame({"step": [1, 2], "loss": [2.1, 1.9]})}
    >>> float(scbin.get.history_df(adata)["loss"].min())
    1.9
    """
    of_cells = hasattr(source, "uns")
    history = read_uns(source, _keys.HISTORY, pd.DataFrame) if of_cells else getattr(source, "history", source)
    if not isinstance(history, pd.DataFrame) or not {"step", "loss"} <= set(history.columns):
        fix = "Run scbin.tl.pretrain(adata), or pass the model that it returned."
        raise ScbinInputError("A06", f"there is no training history with 'step' and 'loss'. {fix}")
    return history.reset_index(drop=True)


@_docs.shared
def tokens_df(adata: AnnData | Tokens, cell: int | str = 0, *, tokens_key: str | None = None) -> pd.DataFrame:
    """Return the tokens of one cell, in the order of their positions.

    Parameters
    ----------
    {tokenized}
    cell
        Number or name of the cell.
    {tokens_key}

    Returns
    -------
    A table with the columns

    `position`, `token_id`, `text`
        The token, as numbers and in words.
    `kind`, `name`
        `"special"`, `"phenotype"` or `"gene"`, and the name of the phenotype or gene.
    `bin`
        Number of the bin or count token of the gene, 0 for the lowest; NaN for `"rank"`.
    `value`
        The expression that the token stands for.
    `rank`
        Rank of the gene in the cell, from 1; only for `"rank"`, else NaN.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.pp.tokenize(adata, encoding="rank")
    >>> scbin.get.tokens_df(adata)["text"].tolist()[:2]
    ['[CLS]', '[DEPTH 609]']
    """
    tokens = read_tokens(adata, key=tokens_key)
    row, vocabulary = tokens.take(np.array([cell_number(cell, tokens)])).sorted_indices(), tokens.vocabulary
    ids, positions = row.data.astype(np.int64), row.indices.astype(np.int64)
    text = [vocabulary.token_text(int(t), int(p)) for t, p in zip(ids, positions, strict=True)]
    table = pd.DataFrame({"position": positions, "token_id": ids, "text": text, "kind": "special", "name": text})
    for phenotype in vocabulary.phenotypes:
        here = (positions == phenotype.position) & ~np.isin(ids, list(vocabulary.specials.values()))
        table.loc[here, ["kind", "name"]] = "phenotype", phenotype.name
    is_gene, values = vocabulary.is_gene_token(ids), vocabulary.tables()
    genes = np.asarray(vocabulary.genes, dtype=object)[vocabulary.genes_at(ids[is_gene], positions[is_gene])]
    table.loc[is_gene, "kind"], table.loc[is_gene, "name"] = "gene", genes
    table[["bin", "value", "rank"]] = np.nan
    table.loc[is_gene, "value"] = (values.value_of_id[ids] * values.value_of_position[positions])[is_gene]
    if vocabulary.position_is_gene:
        table.loc[is_gene, "bin"] = vocabulary.levels_of(ids[is_gene])
    else:
        table.loc[is_gene, "rank"] = positions[is_gene] - vocabulary.first_gene_position + 1
    return table


def cell_number(cell: int | str, tokens: Tokens) -> int:
    """Return the row of a cell given by number or name."""
    number: Any = next(iter(np.flatnonzero(tokens.names == cell)), tokens.n_cells) if isinstance(cell, str) else cell
    if not -tokens.n_cells <= number < tokens.n_cells:
        fix = f"pass one of adata.obs_names, or a number: the {tokens.n_cells:,} cells count from 0"
        raise ScbinInputError("A06", f"there is no cell {cell!r}; {fix}.")
    return int(number) % tokens.n_cells


def evaluate_df(adata: AnnData, target: str | None = None) -> pd.DataFrame:
    """Return the scores of :func:`scbin.tl.evaluate`: one row per method, one column per score.

    Parameters
    ----------
    adata
        Cells that were scored.
    target
        The target, if there are several. Default: all of them, with `target` as first column.

    Returns
    -------
    A table with the methods as index, scbin first.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> table = {"target": ["cell_type"] * 2, "method": ["scbin", "majority class"], "accuracy": [0.9, 0.4]}
    >>> adata.uns["scbin"] = {"evaluate": pandas.DataFrame(table)}
    >>> float(scbin.get.evaluate_df(adata, "cell_type").loc["scbin", "accuracy"])
    0.9
    """
    table = read_uns(check_adata(adata), _keys.EVALUATE, pd.DataFrame)
    made = list(table.get("target", ()))
    if not made or target not in (None, *made):
        so_far = ", ".join(map(repr, dict.fromkeys(made))) or "nothing"
        raise ScbinInputError("A06", f"evaluated here so far: {so_far}. Call scbin.tl.evaluate(adata, model).")
    table = table if target is None else table[table["target"] == target].drop(columns="target")
    return table.set_index("method").dropna(axis=1, how="all")


def network_df(
    adata: AnnData, genes: str | Sequence[str] | None = None, *, group: str | None = None, key: str | None = None
) -> pd.DataFrame:
    """Return the edges of a network of genes, the strongest first.

    Parameters
    ----------
    adata
        Cells with a network (:func:`scbin.tl.gene_network`).
    genes
        Edges from these genes, such as transcription factors. Default: all edges.
    group
        The network of this group of cells. Default: that of all cells.
    key
        The slot of `varp`. Default: `"scbin_network"`.

    Returns
    -------
    A table with the columns `source`, `target` and `weight`, sorted by the absolute weight.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> from scipy.sparse import csr_matrix
    >>> adata = anndata.AnnData(numpy.ones((1, 2)))
    >>> adata.var_names = ["TF", "gene"]
    >>> adata.varp["scbin_network"] = csr_matrix([[0, 0.5], [0, 0]])
    >>> scbin.get.network_df(adata).values.tolist()
    [['TF', 'gene', 0.5]]
    """
    base = _keys.NETWORK if key is None else key
    groups = read_uns(check_adata(adata), base, dict).get("groups", [])
    slot = base if group is None else f"{base}_{groups.index(group)}" if group in groups else ""
    if slot not in adata.varp:
        fix = f"Call scbin.tl.gene_network(adata, model), or name one of its groups: {groups}."
        raise ScbinInputError("A06", f"there is no network {base!r} (group={group!r}). {fix}")
    edges, names = sparse.coo_matrix(adata.varp[slot]), adata.var_names.to_numpy().astype(object)
    table = pd.DataFrame({"source": names[edges.row], "target": names[edges.col], "weight": edges.data})
    if genes is not None:
        asked = [genes] if isinstance(genes, str) else list(genes)
        if unknown := sorted(set(asked) - set(names)):
            raise ScbinInputError("A06", f"{unknown[0]!r} is not in adata.var_names.")
        table = table[table["source"].isin(asked)]
    return table.sort_values("weight", key=np.abs, ascending=False, kind="stable", ignore_index=True)
