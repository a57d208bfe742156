"""`tl.embed`: vectors of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch

from scbin import _docs, _keys
from scbin._adata import check_writable, copied, read_tokens, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.model import resolve_model
from scbin.nn.backbone import layer_number
from scbin.nn.network import CellNetwork
from scbin.nn.run import embed as embed_tokens
from scbin.nn.vector import PooledVector
from scbin.tl._by_file import adata_of, by_file
from scbin.tl._labels import MaskedPhenotypes, has_column, obs_column

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from scbin.io.corpus import Paths
    from scbin.model import Model
    from scbin.nn.run import Precision
    from scbin.nn.vector import Pooling
    from scbin.tokens.tokens import Tokens


@_docs.shared
@by_file
@checked
def embed(
    adata: ad.AnnData | Tokens | Paths,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    layer: int | None = None,
    pooling: Pooling | None = None,
    phenotypes: Literal["hide", "show"] = "hide",
    tokens_key: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> ad.AnnData | list[Path] | None:
    """Compute the vector of every cell, for neighbours, UMAP, clustering or classification.

    The vector of a cell depends only on its tokens and the model: not on other cells, their order, the token budget or, to 1e-5
    with `precision="float32"`, the device. If the model was trained with a `batch_key`, and `obs` has that column, it also
    depends on the batch.

    Parameters
    ----------
    adata
        Tokenized cells; new ones by `scbin.pp.tokenize(adata, like=model)`. Tokens that are not in an AnnData
        (:class:`scbin.tokens.tokens.Tokens`) give a new one.
    {model}
    layer
        Use the pooled hidden states of a layer instead of the cell vector: -1 the last one, -2 the one before, 0 the embeddings.
    pooling
        How they are pooled: `"weighted"` by expression (default), `"mean"` over the genes, or `"cls"`.
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
    For files (see :func:`scbin.open_tokens`) the paths of those written: for each an AnnData of the same name in the folder `scbin`
    beside it, with obs and var of the file and the fields of `obs` and `obsm` below. Else:

    {returns_copy}

    `adata.obsm["X_scbin"]`
        One float32 vector per cell; NaN for cells without tokens, see `obs["scbin_status"]`.
    `adata.uns["scbin"]["embed"]`
        How it was made, as JSON.

    Raises
    ------
    ScbinInputError
        If the cells are not tokenized, or with another vocabulary than the model's. Nothing is written then.

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
    (100, 30)
    """
    in_adata = adata if isinstance(adata, ad.AnnData) else None
    chosen = resolve_model(model, in_adata)
    tokens = read_tokens(adata, chosen.vocabulary, tokens_key)
    key = embedding_key(in_adata, key_added)
    shown: Any = MaskedPhenotypes(tokens) if phenotypes == "hide" else tokens
    how: dict[str, Any] = {"device": device, "precision": precision, "token_budget": token_budget, "progress": progress}

    network, backbone = chosen.network, chosen.network.backbone
    if layer is not None or pooling is not None:
        own: Any = network.vector
        number = layer_number(own.layer if layer is None else layer, backbone.n_layers)
        how_pooled = pooling or getattr(own, "pooling", None) or "weighted"
        pooled = PooledVector(chosen.vocabulary, backbone.hidden_size, how_pooled, layer=number)
        network = CellNetwork(backbone, pooled).train(network.training)
    vectors = corrected(network, embed_tokens(network, shown, **how), adata, chosen.training.get("batch_key"))

    target = adata_of(tokens) if in_adata is None else copied(in_adata) if copy else in_adata
    write(target, "obsm", key, vectors)
    about = {"model": chosen.fingerprint, "layer": layer, "pooling": pooling, "phenotypes": phenotypes}
    write_uns(target, _keys.EMBED, about)
    return target if copy or in_adata is None else None


def corrected(
    network: CellNetwork, vectors: np.ndarray, data: ad.AnnData | Tokens, batch_key: str | None
) -> np.ndarray:
    """Return vectors of cells as every verb writes them: moved by the network's batch correction, where it has one.

    Heads, and the probe that they start from, read the vectors before this step: it does not change what they say of a cell.
    """
    correction: Any = network.batches
    if correction is None:
        return vectors
    own = np.full(len(vectors), -1)
    if batch_key is not None and has_column(data, batch_key):
        own = pd.Index(correction.batches).get_indexer(obs_column(data, batch_key).astype(str))
    moved, filled = vectors.copy(), np.flatnonzero(np.isfinite(vectors).all(axis=1))
    with torch.inference_mode():
        moved[filled] = correction(torch.from_numpy(vectors[filled]), torch.from_numpy(own[filled])).numpy()
    return moved


def embedding_key(adata: ad.AnnData | None, key_added: str | None) -> str:
    """Return the slot for an embedding, if it may be written."""
    key = _keys.EMBEDDING if key_added is None else key_added
    check_writable(ad.AnnData() if adata is None else adata, "obsm", key)
    entries = {} if adata is None else adata.uns.get(_keys.UNS, {})
    if key == _keys.TOKENS or _keys.of_tokens(_keys.VOCABULARY, key) in entries:
        raise ScbinInputError("A04", f"key_added={key!r} contains the tokens. Choose another name for the embedding.")
    return key
