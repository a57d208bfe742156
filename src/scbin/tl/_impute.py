"""`tl.impute`: expected expression of every gene in every cell."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy import sparse
from tqdm.auto import tqdm

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, gene_names, read_tokens, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.model import count_head, resolve_model
from scbin.nn.density import expected_shares
from scbin.nn.embedding import token_expression
from scbin.nn.run import embed as embed_tokens
from scbin.tl._labels import MaskedPhenotypes
from scbin.tokens.tokens import MemoryTokens

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.nn.network import CellNetwork

VALUES_AT_ONCE = 2**22  # of cells x genes
FOLDS = 10


@_docs.shared
@checked
def impute(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    genes: str | Sequence[str] | None = None,
    observed: Literal["keep", "hide"] = "keep",
    phenotypes: Literal["hide", "show"] = "hide",
    tokens_key: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Add a layer with the expression that the model expects of each cell.

    For looking at a gene that was counted too rarely. The model places the cell by all its genes, and the count head says
    how much of each gene a cell of this place and depth expresses. It is an expectation, smoother than data: do not test for
    differences on it.

    Parameters
    ----------
    {tokenized}
    {model}
    genes
        Names of genes, as in `var_names`. Default: all that the model knows.
    observed
        For genes that a cell does express: `"keep"` their value, or `"hide"` them and put the expectation there too. Genes
        are left out a tenth at a time, so that no gene contributes to its own number; this takes ten times as long.
    {phenotypes_shown}
    {tokens_key}
    {device}
    {precision}
    {token_budget}
    {progress}
    {key_added}
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.layers["scbin_imputed"]`
        CSR float32 (cells, genes) in the unit of the tokens: counts at the depth of the cell, or log1p values. Genes that the
        model does not know, or that `genes` leaves out, have no value; cells without tokens have NaN.
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
    if token_budget < 1:
        raise ScbinInputError("A02", f"token_budget is {token_budget}; it needs to be at least 1.")
    key = _keys.IMPUTED if key_added is None else key_added
    check_writable(adata, "layers", key)
    chosen = resolve_model(model, adata)
    vocabulary, tokens = chosen.vocabulary, read_tokens(adata, chosen.vocabulary, tokens_key)
    count_head(chosen, 'Tokenize with encoding="bins" and pretrain to impute.')
    names = gene_names(adata, vocabulary)
    asked = np.arange(len(vocabulary.genes)) if genes is None else np.array(names.resolve(genes), dtype=np.int64)
    asked = asked[names.columns[asked] >= 0]
    if not len(asked):
        raise ScbinInputError("A06", "none of the genes to impute is a column of adata.")
    asked = asked[np.argsort(names.columns[asked], kind="stable")]
    read: Any = MaskedPhenotypes(tokens) if phenotypes == "hide" else tokens
    options = {"device": device, "precision": precision, "token_budget": token_budget}
    n_rows, blocks = max(1, VALUES_AT_ONCE // len(vocabulary.genes)), []
    for start in tqdm(range(0, tokens.n_cells, n_rows), desc="imputing", unit="block", disable=not progress):
        part = MemoryTokens(read.take(np.arange(start, min(start + n_rows, tokens.n_cells))), vocabulary)
        dense = _expected(chosen.network, part, asked, hide=observed == "hide", **options)
        bounds, columns = np.arange(len(dense) + 1) * len(asked), np.tile(names.columns[asked], len(dense))
        blocks.append(sparse.csr_matrix((dense.ravel(), columns, bounds), (len(dense), adata.n_vars)))
    target = copied(adata) if copy else adata
    write(target, "layers", key, sparse.vstack(blocks, format="csr"))
    record = {"model": chosen.fingerprint, "genes": len(asked), "observed": observed, "phenotypes": phenotypes}
    write_uns(target, _keys.IMPUTE, json.dumps(record | {"unit": vocabulary.unit}))
    return target if copy else None


def _expected(
    network: CellNetwork, tokens: MemoryTokens, asked: np.ndarray, *, hide: bool, **options: object
) -> np.ndarray:
    """Return the expected expression of the genes asked for (cells, asked) float32, from the other genes where they are hidden."""
    head: Any = network.counts
    vocabulary, rows = tokens.vocabulary, tokens.matrix
    values = token_expression(rows, vocabulary).toarray()
    tables = vocabulary.tables()
    gene = np.maximum(tables.gene_of_id[rows.data], tables.gene_of_position[rows.indices])  # (tokens,) -1: none
    fold = np.random.default_rng(0).permutation(values.shape[1]) % FOLDS if hide else np.zeros(values.shape[1], int)
    result = np.empty((len(values), len(asked)), dtype=np.float32)
    for number in np.unique(fold[asked]):
        seen = (fold != number) if hide else np.ones(len(fold), dtype=bool)
        left, depth = rows.copy(), values[:, seen].sum(axis=1)
        left.data[(gene >= 0) & ~seen[gene]] = 0
        if hide and vocabulary.depth is not None:  # this token tells of the hidden genes too
            at = left.indices == vocabulary.depth.position
            left.data[at] = vocabulary.depth.ids(depth[np.diff(rows.indptr) > 0])
        left.eliminate_zeros()
        shares = expected_shares(
            head, torch.from_numpy(embed_tokens(network, MemoryTokens(left, vocabulary), **options))
        )
        scale = depth / np.maximum(shares[:, seen].sum(axis=1), 1e-12)
        mine = fold[asked] == number
        result[:, mine] = shares[:, asked[mine]] * scale[:, None]
    if not hide:
        result = np.where(values[:, asked] > 0, values[:, asked], result)
    result[tokens.lengths == 0] = np.nan
    return result
