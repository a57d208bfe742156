"""`tl.impute`: expected expression of every gene in every cell."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, gene_names, read_tokens, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.model import count_head, resolve_model
from scbin.nn.density import expected_shares
from scbin.nn.embedding import token_expression
from scbin.nn.run import embed as embed_tokens
from scbin.tl._labels import MaskedPhenotypes

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.model import Model

CELLS_AT_ONCE = 2_048


@_docs.shared
@checked
def impute(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    genes: str | Sequence[str] | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Add a layer with the expression that the model expects in each cell.

    Use it to plot genes that were rarely detected. The count head predicts each gene from the cell vector and the depth. Detected
    genes keep their values. Expected values are smoother than data, so do not use them in statistical tests. Phenotype tokens are
    hidden.

    Parameters
    ----------
    {tokenized}
    {model}
    genes
        Names of genes, as in `var_names`. Default: all genes of the model.
    {tokens_key}
    {device}
    {token_budget}
    {progress}
    {key_added}
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.layers["scbin_imputed"]`
        CSR float32 (cells, genes) in the unit of the tokens: counts at the depth of the cell, or log1p values. Genes that the
        model does not know, or that are not in `genes`, have no value; cells without tokens have NaN.
    `adata.uns["scbin"]["impute"]`
        How it was imputed, as JSON.

    Raises
    ------
    ScbinInputError
        If the cells are not tokenized, the model has no count head or reads ranks, or a gene is unknown. Nothing is written
        then.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:200].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> scbin.tl.impute(adata, model, genes=["CD8A", "CD79A"], progress=False)
    >>> adata.layers["scbin_imputed"].nnz
    400
    """
    check_adata(adata)
    key = _keys.IMPUTED if key_added is None else key_added
    check_writable(adata, "layers", key)
    chosen = resolve_model(model, adata)
    vocabulary, tokens = chosen.vocabulary, read_tokens(adata, chosen.vocabulary, tokens_key)
    head = count_head(chosen, 'Tokenize with encoding="bins" and pretrain to impute.')
    names = gene_names(adata, vocabulary)
    asked = np.arange(len(vocabulary.genes)) if genes is None else np.array(names.resolve(genes), dtype=np.int64)
    asked = asked[names.columns[asked] >= 0]
    if not len(asked):
        raise ScbinInputError("A06", "none of the genes to impute is a column of adata.")
    asked = asked[np.argsort(names.columns[asked], kind="stable")]
    options = {"device": device, "token_budget": token_budget, "progress": progress}
    vectors, blocks = embed_tokens(chosen.network, MaskedPhenotypes(tokens), **options), []
    for start in range(0, tokens.n_cells, CELLS_AT_ONCE):
        rows = tokens.take(np.arange(start, min(start + CELLS_AT_ONCE, tokens.n_cells)))
        values = token_expression(rows, vocabulary).toarray()
        shares = expected_shares(head, torch.from_numpy(vectors[start : start + len(values)]))
        expected = np.where(values > 0, values, shares * values.sum(axis=1, keepdims=True))[:, asked].astype(np.float32)
        expected[np.diff(rows.indptr) == 0] = np.nan
        bounds, columns = np.arange(len(values) + 1) * len(asked), np.tile(names.columns[asked], len(values))
        blocks.append(sparse.csr_matrix((expected.ravel(), columns, bounds), (len(values), adata.n_vars)))
    target = copied(adata) if copy else adata
    write(target, "layers", key, sparse.vstack(blocks, format="csr"))
    record = {"model": chosen.fingerprint, "genes": len(asked), "unit": vocabulary.unit}
    write_uns(target, _keys.IMPUTE, json.dumps(record))
    return target if copy else None
