"""`tl.embed`: vectors of cells."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch

from scbin import _docs, _keys
from scbin._adata import check_writable, copied, read_tokens, write, write_uns
from scbin._arguments import checked, choices
from scbin._errors import ScbinInputError
from scbin.model import resolve_model
from scbin.nn.backbone import layer_number
from scbin.nn.network import CellNetwork
from scbin.nn.run import embed as embed_tokens
from scbin.nn.run import run
from scbin.nn.vector import PooledVector
from scbin.tl._edits import gene_names
from scbin.tl._labels import MaskedPhenotypes, has_column, obs_column

if TYPE_CHECKING:
    import os

    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.nn.vector import Pooling
    from scbin.tokens.tokens import Tokens


@_docs.shared
@checked
def embed(
    adata: ad.AnnData | Tokens,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    pooling: Pooling | None = None,
    layer: int | None = None,
    phenotypes: Literal["hide", "show"] = "hide",
    genes: bool = False,
    tokens_key: str | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> ad.AnnData | None:
    """Give every cell its vector, for neighbours, UMAP, clustering or a classifier.

    The vector of a cell depends on its tokens and the model alone: not on the other cells, their order, the token budget or,
    to 1e-5 in float32, the device. Where the model was trained with a `batch_key`, it depends on the cell's batch too, if `obs` has
    that column.

    Parameters
    ----------
    adata
        Tokenized cells; new ones by `scbin.pp.tokenize(adata, like=model)`. Tokens that are not in an AnnData
        (:class:`scbin.tokens.tokens.Tokens`) give a new one.
    {model}
    pooling
        Instead of the model's own vector, a mean of the hidden states of the cell's tokens: `"weighted"` by expression, `"mean"` over
        the genes, or `"cls"`.
    layer
        Instead of the model's own vector, the pooled hidden states of a layer: -1 the last one, -2 the one before (Geneformer's
        habit), 0 the embeddings.
    {phenotypes_shown}
    genes
        Give every gene its vector too: the mean of its token's hidden states over the cells that express it.
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

    `adata.obsm["X_scbin"]`
        One float32 vector per cell; NaN for cells without tokens (see `obs["scbin_status"]`).
    `adata.varm["scbin_genes"]`
        With `genes=True`: one float32 vector per gene (genes, hidden size); NaN for genes that the model does not read or no cell
        expresses. With `key_added` it is called `f"{key_added}_genes"`.
    `adata.var["scbin_n_cells"]`
        With it: how many cells that mean is over.
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
    choices({"pooling": (None, "weighted", "mean", "cls")}, pooling=pooling)
    if token_budget < 1:
        raise ScbinInputError("A02", f"token_budget is {token_budget}; it needs to be at least 1.")
    in_adata = adata if isinstance(adata, ad.AnnData) else None
    chosen = resolve_model(model, in_adata)
    tokens = read_tokens(adata, chosen.vocabulary, tokens_key)
    key = embedding_key(in_adata, key_added)
    gene_key = _keys.GENES if key_added is None else f"{key_added}_genes"
    if in_adata is not None and genes:
        check_writable(in_adata, "varm", gene_key)
        check_writable(in_adata, "var", _keys.N_CELLS)
    shown: Any = MaskedPhenotypes(tokens) if phenotypes == "hide" else tokens
    how: dict[str, Any] = {"device": device, "precision": precision, "token_budget": token_budget, "progress": progress}

    network = _with_vector(chosen, pooling, layer)
    vectors = corrected(network, embed_tokens(network, shown, **how), adata, chosen.training.get("batch_key"))
    of_genes = mean_gene_vectors(network, shown, **how) if genes else None

    if in_adata is None:
        target = ad.AnnData(obs=pd.DataFrame(index=pd.Index(tokens.names).astype(str)))
        if of_genes is not None:
            target = ad.AnnData(obs=target.obs, var=pd.DataFrame(index=list(chosen.vocabulary.genes)))
    else:
        target = copied(in_adata) if copy else in_adata
    if of_genes is not None:
        columns = gene_names(target, chosen.vocabulary).columns
        in_var = np.full((target.n_vars, of_genes[0].shape[1]), np.nan, dtype=np.float32)
        counts = np.zeros(target.n_vars, dtype=np.int64)
        in_var[columns[columns >= 0]], counts[columns[columns >= 0]] = (part[columns >= 0] for part in of_genes)
        write(target, "varm", gene_key, in_var)
        write(target, "var", _keys.N_CELLS, counts)
    write(target, "obsm", key, vectors)
    own = network is chosen.network
    params = {
        "model": chosen.fingerprint,
        "pooling": getattr(network.vector, "pooling", None),
        "layer": network.vector.layer,
    }
    params |= {"phenotypes": phenotypes, "own_vector": own, "precision": precision}
    write_uns(target, _keys.EMBED, json.dumps(params))
    return target if copy or in_adata is None else None


def _with_vector(model: Model, pooling: Pooling | None, layer: int | None) -> CellNetwork:
    """Return the model's network, or one with another pooling of the same backbone."""
    backbone, own = model.network.backbone, model.network.vector
    own_layer, own_pooling = int(own.layer), getattr(own, "pooling", None)
    number = layer_number(own_layer if layer is None else layer, backbone.n_layers)
    # a learned vector has no pooling: a layer that is named then means pooled hidden states
    if pooling in (None, own_pooling) and (
        layer is None or (own_pooling and number == layer_number(own_layer, backbone.n_layers))
    ):
        return model.network
    vector = PooledVector(model.vocabulary, backbone.hidden_size, pooling or own_pooling or "weighted", layer=number)
    return CellNetwork(backbone, vector.to(next(model.network.parameters()).device))


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
        codes = {name: code for code, name in enumerate(correction.batches)}
        own = np.array([codes.get(name, -1) for name in obs_column(data, batch_key).astype(str)])
    moved, filled = vectors.copy(), np.flatnonzero(np.isfinite(vectors).all(axis=1))
    with torch.inference_mode():
        moved[filled] = correction(torch.from_numpy(vectors[filled]), torch.from_numpy(own[filled])).numpy()
    return moved


def mean_gene_vectors(network: CellNetwork, tokens: Tokens, **how: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean hidden state of each gene's token over the cells that express it (genes, hidden), and their number (genes,)."""
    vocabulary = tokens.vocabulary
    sums = torch.zeros(len(vocabulary.genes), network.backbone.hidden_size, dtype=torch.float64)
    counts = np.zeros(len(vocabulary.genes), dtype=np.int64)
    layer: Any = network.vector.layer
    for pack, hidden in run(network, tokens, layer=layer, label="embedding genes", **how):
        ids, positions = pack.input_ids.cpu().numpy(), pack.position_ids.cpu().numpy()
        at = np.flatnonzero(vocabulary.is_gene_token(ids))
        of = vocabulary.genes_at(ids[at], positions[at])
        sums.index_add_(0, torch.from_numpy(of), hidden[torch.from_numpy(at).to(hidden.device)].cpu().double())
        counts += np.bincount(of, minlength=len(counts))
    means = np.where(counts[:, None] > 0, sums.numpy() / np.maximum(counts, 1)[:, None], np.nan)
    return means.astype(np.float32), counts


def embedding_key(adata: ad.AnnData | None, key_added: str | None) -> str:
    """Return the slot for an embedding, if it may be written."""
    key = _keys.EMBEDDING if key_added is None else key_added
    check_writable(ad.AnnData() if adata is None else adata, "obsm", key)
    entries = {} if adata is None else adata.uns.get(_keys.UNS, {})
    if key == _keys.TOKENS or _keys.of_tokens(_keys.VOCABULARY, key) in entries:
        raise ScbinInputError("A04", f"key_added={key!r} is where tokens stand. Choose another name for the embedding.")
    return key
