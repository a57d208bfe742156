"""`get.tokens_df`: the tokens of one cell, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin._anndata import read_tokens
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scbin.encoding.vocabulary import Vocabulary


def tokens_df(
    adata: AnnData | csr_matrix,
    cell: int | str = 0,
    *,
    vocabulary: Vocabulary | None = None,
    tokens_key: str | None = None,
) -> pd.DataFrame:
    """Return what the model reads of one cell: one row per token, in the order of the positions.

    Parameters
    ----------
    adata
        A tokenized AnnData, or a token matrix together with its `vocabulary`.
    cell
        The cell, by number or by name.
    vocabulary
        What the tokens mean. Default: the one stored in `adata`.
    tokens_key
        The slot of `obsm` with the tokens. Default: `"X_tokens"`.

    Returns
    -------
    A table with the columns

    `position`, `token_id`
        What the model gets.
    `text`
        The same in words.
    `kind`, `name`
        `"special"`, `"phenotype"` or `"gene"`, and which phenotype or gene.
    `bin`, `value`
        Bin of expression and the value it stands for (NaN where the encoding has none).
    `rank`
        1 for the gene that comes first in the cell; only for `"rank"`, else NaN.

    Examples
    --------
    >>> import numpy, scbin
    >>> from scipy.sparse import csr_matrix
    >>> from scbin.encoding.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.build("rank", ["CD3E", "LYZ"], max_length=6)
    >>> tokens = csr_matrix(numpy.array([[2, 4, 6, 5, 3, 0]]))
    >>> scbin.get.tokens_df(tokens, vocabulary=vocabulary)["text"].tolist()
    ['[CLS]', '[START]', 'LYZ', 'CD3E', '[END]']
    """
    names = None
    if hasattr(adata, "obsm"):
        tokens, vocabulary = read_tokens(adata, vocabulary, key=tokens_key)
        names = adata.obs_names
    else:
        tokens = adata
    if vocabulary is None:
        raise ScbinInputError("P08", "a bare token matrix does not say what its tokens mean: pass vocabulary=.")
    row = tokens[cell_number(cell, tokens.shape[0], names)]
    order = np.argsort(row.indices)
    return describe_row(row.indices[order].astype(np.int64), row.data[order].astype(np.int64), vocabulary)


def cell_number(cell: int | str, n_cells: int, names: pd.Index | None = None) -> int:
    """Return the row of a cell given by number or name."""
    if isinstance(cell, str):
        found = np.flatnonzero(names == cell) if names is not None else np.empty(0, dtype=np.int64)
        if len(found) == 0:
            raise ScbinInputError("P09", f"there is no cell called {cell!r}. Pass one of adata.obs_names, or a number.")
        return int(found[0])
    if not -n_cells <= cell < n_cells:
        raise ScbinInputError("P09", f"there is no cell number {cell}: the {n_cells:,} cells are numbered from 0.")
    return int(cell) % n_cells


def describe_row(positions: np.ndarray, token_ids: np.ndarray, vocabulary: Vocabulary) -> pd.DataFrame:
    """Say in words what each token of one row means."""
    n = len(token_ids)
    is_gene = vocabulary.is_gene_token(token_ids)
    name = np.array(
        [vocabulary.token_text(int(t), int(p)) for t, p in zip(token_ids, positions, strict=True)], dtype=object
    )
    table = pd.DataFrame({"position": positions, "token_id": token_ids, "text": name.copy()})
    kind = np.where(is_gene, "gene", "special").astype(object)
    for phenotype in vocabulary.phenotypes:
        here = (positions == phenotype.position) & ~np.isin(token_ids, list(vocabulary.specials.values()))
        kind[here], name[here] = "phenotype", phenotype.name
    level, value, rank = np.full((3, n), np.nan)
    genes = np.asarray(vocabulary.genes, dtype=object)
    relative = token_ids[is_gene] - vocabulary.first_gene_id
    if vocabulary.position_is_gene:
        name[is_gene] = genes[positions[is_gene] - vocabulary.first_gene_position]
        level[is_gene] = relative % vocabulary.n_levels
        value[is_gene] = vocabulary.token_values[token_ids[is_gene]]
    else:
        name[is_gene] = genes[relative]
        rank[is_gene] = positions[is_gene] - vocabulary.first_gene_position + 1
    return table.assign(kind=kind, name=name, bin=level, value=value, rank=rank)
