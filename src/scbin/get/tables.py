"""The training history and the tokens of a cell, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import read_tokens, read_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError, ScbinTypeError

if TYPE_CHECKING:
    from anndata import AnnData

    from scbin.tokens.tokens import Tokens


def history_df(source: AnnData | pd.DataFrame | Any) -> pd.DataFrame:
    """Return the training history, one row per logged step.

    Parameters
    ----------
    source
        The `Model` that was trained, or the `AnnData` that it was trained on.

    Returns
    -------
    A copy of the history. Row 0 is the network at its start, then there is a row per step: `step`, `epoch`, `loss`, each loss
    by name (`loss_genes` ...) and on the held-out cells (`validation_genes` ..., NaN where it was not measured),
    `learning_rate`, `tokens_per_second` and more.

    Raises
    ------
    ScbinInputError
        If there is no history, or it has no column `"step"` or `"loss"`.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> adata.uns["scbin"] = {"pretrain_history": pandas.DataFrame({"step": [1, 2], "loss": [2.1, 1.9]})}
    >>> float(scbin.get.history_df(adata)["loss"].min())
    1.9
    """
    history = getattr(source, "history", source)
    if hasattr(source, "uns"):
        history = read_uns(source, _keys.HISTORY, pd.DataFrame)
    if not isinstance(history, pd.DataFrame):
        raise ScbinTypeError("A01", f"a Model or an AnnData is needed here, not a {type(source).__name__}.")
    if history.empty or not {"step", "loss"} <= set(history.columns):
        found = f"it has {len(history)} rows of {', '.join(map(repr, history.columns)) or 'no column'}"
        fix = "Run scbin.tl.pretrain(adata), or pass the model that it returned"
        raise ScbinInputError("A06", f"there is no training history with 'step' and 'loss': {found}. {fix}.")
    return history.reset_index(drop=True)


@_docs.shared
@checked
def tokens_df(adata: AnnData | Tokens, cell: int | str = 0, *, tokens_key: str | None = None) -> pd.DataFrame:
    """Return what the model reads of one cell: one row per token, in the order of the positions.

    Parameters
    ----------
    {tokenized}
    cell
        The cell, by number or by name.
    {tokens_key}

    Returns
    -------
    A table with the columns

    `position`, `token_id`
        What the model gets.
    `text`
        The same in words.
    `kind`, `name`
        `"special"`, `"phenotype"` or `"gene"`, and which phenotype or gene.
    `bin`
        Number of the bin or count token of the gene, 0 for the lowest; NaN for `"rank"`.
    `value`
        The expression that the token stands for.
    `rank`
        1 for the gene that comes first in the cell; only for `"rank"`, else NaN.

    Raises
    ------
    ScbinInputError
        If the cells are not tokenized, or there is no such cell.

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
    tables, is_gene = vocabulary.tables(), vocabulary.is_gene_token(ids)
    kind, name = np.where(is_gene, "gene", "special").astype(object), np.array(text, dtype=object)
    for phenotype in vocabulary.phenotypes:
        here = (positions == phenotype.position) & ~np.isin(ids, list(vocabulary.specials.values()))
        kind[here], name[here] = "phenotype", phenotype.name
    name[is_gene] = np.asarray(vocabulary.genes, dtype=object)[vocabulary.genes_at(ids[is_gene], positions[is_gene])]
    level, rank = np.full((2, len(ids)), np.nan)
    value = np.where(is_gene, tables.value_of_id[ids] * tables.value_of_position[positions], np.nan)
    if vocabulary.position_is_gene:
        level[is_gene] = vocabulary.levels_of(ids[is_gene])
    else:
        rank[is_gene] = positions[is_gene] - vocabulary.first_gene_position + 1
    columns = {"position": positions, "token_id": ids, "text": text, "kind": kind, "name": name}
    return pd.DataFrame({**columns, "bin": level, "value": value, "rank": rank})


def cell_number(cell: int | str, tokens: Tokens) -> int:
    """Return the row of a cell given by number or name."""
    number: Any = next(iter(np.flatnonzero(tokens.names == cell)), tokens.n_cells) if isinstance(cell, str) else cell
    if not -tokens.n_cells <= number < tokens.n_cells:
        fix = f"pass one of adata.obs_names, or a number: the {tokens.n_cells:,} cells count from 0"
        raise ScbinInputError("A06", f"there is no cell {cell!r}; {fix}.")
    return int(number) % tokens.n_cells
