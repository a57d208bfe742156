"""`tl.embed`: vectors of cells."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin import _keys
from scbin._anndata import (
    check_adata,
    check_writable,
    copied,
    read_tokens,
    write_obsm,
    write_uns,
    write_var,
    write_varm,
)
from scbin._arguments import flags, whole_numbers
from scbin._errors import ScbinInputError
from scbin.nn.embedding import embed_tokens, hide_phenotypes, mean_gene_vectors
from scbin.tl._model import resolve_model
from scbin.tl._perturb_genes import gene_names

if TYPE_CHECKING:
    import os

    from anndata import AnnData

    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.nn.embedding import Pooling


def embed(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    pooling: Pooling | None = None,
    layer: int | None = None,
    phenotypes: Literal["hide", "show"] = "hide",
    projection: bool = True,
    genes: bool = False,
    tokens_key: str | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Give every cell its vector, for neighbours, UMAP, clustering or a classifier.

    The vector of a cell depends on its tokens and the model alone: not on the other cells, their order, the token budget or,
    to 1e-5 in float32, the device.

    Parameters
    ----------
    adata
        Tokenized cells. For data the model was not trained on: `scbin.pp.tokenize(adata, like=model)`.
    model
        A :class:`scbin.Model`, or the directory of one. Default: the one trained on these cells.
    pooling
        How the vectors of a cell's tokens become one: `"weighted"` by expression, `"mean"` over the genes, or `"cls"`.
        Default: as the model was trained.
    layer
        Which hidden states: -1 the last layer, -2 the one before (Geneformer's habit), 0 the embeddings. Default: as the
        model says.
    phenotypes
        `"hide"` shows the model `[MASK]` instead of every phenotype token, so that labels cannot leak into the embedding.
        `"show"` shows them: then cells of one label lie together because you said so.
    tokens_key
        The slot of `obsm` with the tokens. Default: `"X_tokens"`.
    projection
        Take the model's last step, from the vector of the network to the cell's place among others; `False` leaves the vector as
        it is, which is also what another `pooling` or `layer` than the model's gives.
    genes
        Give every gene its vector too: the mean of its token's vectors over the cells that express it.
    device
        `"auto"` takes cuda, then mps, then cpu.
    precision
        `"bfloat16"` is faster on recent GPUs and good to about 1e-3.
    token_budget
        Most tokens to go through the network at once. Changes memory and speed, not numbers.
    progress
        Show a progress bar.
    key_added
        Name of the slot. Default: `"X_scbin"`.
    copy
        Return a copy instead of writing into `adata`.

    Returns
    -------
    Returns `None` if `copy=False`, else returns an `AnnData` object. Sets the following fields:

    `adata.obsm['X_scbin' | key_added]`
        One float32 vector per cell (cells, hidden size); NaN for cells without tokens (see `obs['scbin_status']`).
    `adata.varm['scbin_genes']`
        With `genes=True`: one float32 vector per gene (genes, hidden size); NaN for genes that the model does not read or no cell
        expresses. With `key_added` it is called `f'{key_added}_genes'`.
    `adata.var['scbin_n_cells']`
        With it: how many cells that mean is over.
    `adata.uns['scbin']['embed']`
        How it was made, as JSON.

    Raises
    ------
    ScbinInputError
        If the cells are not tokenized, or with another vocabulary than the model's.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> train, test = adata[:300].copy(), adata[300:400].copy()
    >>> scbin.pp.tokenize(train)
    >>> model = scbin.tl.pretrain(train, preset="tiny", max_steps=2, progress=False)
    >>> scbin.pp.tokenize(test, like=model)
    >>> scbin.tl.embed(test, model)
    >>> test.obsm["X_scbin"].shape
    (100, 64)
    """
    check_adata(adata)
    whole_numbers(token_budget=token_budget)
    whole_numbers(optional=True, layer=layer)
    flags(progress=progress, copy=copy, projection=projection, genes=genes)
    if phenotypes not in ("hide", "show"):
        raise ScbinInputError("T17", f"phenotypes is {phenotypes!r}; choose 'hide' or 'show'.")
    if token_budget < 1:
        raise ScbinInputError("T30", f"token_budget is {token_budget}; it needs to be at least 1.")
    adata = copied(adata) if copy else adata
    chosen = resolve_model(model, adata)
    tokens, vocabulary = read_tokens(adata, chosen.vocabulary, key=tokens_key)
    key = embedding_key(adata, key_added)
    gene_key = _keys.GENES if key_added is None else f"{key_added}_genes"
    if genes:
        check_writable(adata, "varm", gene_key)
        check_writable(adata, "var", _keys.N_CELLS)
    readout = chosen.readout
    pooling = pooling or readout.pooling
    n_states = chosen.bert.config.num_hidden_layers + 1  # -1 and the number of the last layer are one
    layer = readout.layer if layer is None else int(layer)
    same_state = layer % n_states == readout.layer % n_states and pooling == readout.pooling
    projects = projection and chosen.projection is not None and same_state
    tokens = hide_phenotypes(tokens, vocabulary) if phenotypes == "hide" else tokens
    how: dict[str, Any] = {"device": device, "precision": precision, "token_budget": token_budget, "progress": progress}
    embedding = embed_tokens(chosen.bert, tokens, chosen.weights(pooling), layer=layer, **how)
    of_genes = mean_gene_vectors(chosen.bert, tokens, vocabulary, layer=layer, **how) if genes else None
    if of_genes is not None:
        _write_genes(adata, gene_key, *of_genes, gene_names(adata, vocabulary).columns)
    write_obsm(adata, key, chosen.place(embedding) if projects else embedding)
    params = {
        "model": chosen.fingerprint,
        "pooling": pooling,
        "layer": layer,
        "phenotypes": phenotypes,
        "projection": projects,
    }
    write_uns(adata, _keys.EMBED, json.dumps({**params, "precision": precision}))
    return adata if copy else None


def _write_genes(adata: AnnData, key: str, vectors: np.ndarray, n_cells: np.ndarray, columns: np.ndarray) -> None:
    """Write the vectors of the model's genes and their numbers of cells into the rows of var that they stand in."""
    there = columns >= 0
    in_var = np.full((adata.n_vars, vectors.shape[1]), np.nan, dtype=np.float32)
    in_var[columns[there]] = vectors[there]
    counts = np.zeros(adata.n_vars, dtype=np.int64)
    counts[columns[there]] = n_cells[there]
    write_varm(adata, key, in_var)
    write_var(adata, _keys.N_CELLS, counts)


def embedding_key(adata: AnnData, key_added: str | None) -> str:
    """Return the slot for an embedding, if it may be written."""
    key = _keys.EMBEDDING if key_added is None else key_added
    check_writable(adata, "obsm", key)
    if key == _keys.TOKENS or _keys.of_tokens(_keys.VOCABULARY, key) in adata.uns.get(_keys.UNS, {}):
        raise ScbinInputError("A04", f"key_added={key!r} is where tokens stand. Choose another name for the embedding.")
    return key
