"""`tl.embed_genes`, `tl.embed_phenotypes`: vectors of genes and of the values of phenotypes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, gene_names, read_obs, read_tokens, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.model import resolve_model
from scbin.nn.run import gene_tokens, run
from scbin.tl._labels import MaskedPhenotypes

if TYPE_CHECKING:
    import os

    from anndata import AnnData

    from scbin.model import Model
    from scbin.nn.network import CellNetwork
    from scbin.tokens.tokens import Tokens

GeneVectors = Literal["context", "static", "loadings"]


@_docs.shared
@checked
def embed_genes(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    vectors: GeneVectors = "context",
    groupby: str | None = None,
    layer: int | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Give every gene its vector, for classes of genes or a map of them. Its neighbours: :func:`scbin.tl.gene_network`.

    A default model (`backbone="mlp"`) has trained its count head, not the hidden states of its tokens: take `"loadings"` there. Hidden
    states mean something where genes were masked in pretraining (`masking=scbin.Masking()`), or in a published model.

    Parameters
    ----------
    {tokenized}
    {model}
    vectors
        `"context"`: the mean hidden state of the gene's token over the cells that express it. `"static"`: the gene's row in the input
        table, the same in every cell. `"loadings"`: how the expected counts of the gene follow the cell vector.
    groupby
        Column of `obs`: the means in each group of cells, too. For `"context"`.
    layer
        Whose hidden states: -1 the last, -2 the one before, 0 the embeddings. Default: where the model reads its cell vector, or the
        last one if that reads no hidden states.
    {tokens_key}
    {device}
    {token_budget}
    {progress}
    {key_added}
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.varm["scbin_genes"]`
        One float32 vector per gene (genes, size); NaN for genes that the model does not read or no cell expresses.
    `adata.varm["scbin_genes_groups"]`
        With `groupby`: the same by group (genes, groups, size).
    `adata.var["scbin_n_cells"]`
        How many cells a mean is over; for `"context"`.
    `adata.uns["scbin"]["scbin_genes"]`
        How they were made, and the names of the groups in order, as JSON.

    Raises
    ------
    ScbinInputError
        If the cells are not tokenized, or the model has no such vectors. Nothing is written then.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:200].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> scbin.tl.embed_genes(adata, model, vectors="loadings")
    >>> adata.varm["scbin_genes"].shape
    (765, 30)
    """
    check_adata(adata)
    if groupby is not None and vectors != "context":
        raise ScbinInputError("A03", f"vectors={vectors!r} are the same in every cell: groupby needs 'context'.")
    key = _keys.GENES if key_added is None else key_added
    for slot, name in (("varm", key), ("varm", f"{key}_groups"), ("var", _keys.N_CELLS)):
        check_writable(adata, slot, name)
    chosen = resolve_model(model, adata)
    columns = gene_names(adata, chosen.vocabulary).columns
    codes, groups = groups_of(adata, groupby)
    by_group: Any = None
    if vectors == "context":
        tokens: Any = MaskedPhenotypes(read_tokens(adata, chosen.vocabulary, tokens_key))
        how: dict[str, Any] = {
            "device": device,
            "precision": "float32",
            "token_budget": token_budget,
            "progress": progress,
        }
        sums, counts = gene_sums(chosen.network, tokens, codes, len(groups), layer, **how)
        values, by_group = mean_of(sums.sum(axis=0), counts.sum(axis=0)), mean_of(sums, counts)[:-1].swapaxes(0, 1)
    else:
        values = fixed_gene_vectors(chosen, vectors)
    target = copied(adata) if copy else adata
    write(target, "varm", key, _by_column(values, columns, target.n_vars))
    grouped = None if groupby is None else _by_column(by_group, columns, target.n_vars)
    write(target, "varm", f"{key}_groups", grouped)
    if vectors == "context":
        of_columns = _by_column(counts.sum(axis=0)[:, None], columns, target.n_vars)[:, 0]
        write(target, "var", _keys.N_CELLS, np.nan_to_num(of_columns).astype(np.int64))
    about = {"model": chosen.fingerprint, "vectors": vectors, "layer": layer, "groupby": groupby, "groups": groups}
    write_uns(target, key, json.dumps(about))
    return target if copy else None


def embed_phenotypes(model: Model | str | os.PathLike[str]) -> pd.DataFrame:
    """Return the vectors of all values of all phenotypes, as the model has learned them as tokens.

    Neighbours among them say which tissues, diseases or ages the model takes for alike, where it was pretrained with them.

    Parameters
    ----------
    model
        A :class:`scbin.Model`, the path of its directory, or the id of a published one.

    Returns
    -------
    A table with a row for each `phenotype` and `value` (the index), and a column for each number of the vector.

    Raises
    ------
    ScbinInputError
        If the model reads no phenotypes.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:100].copy()
    >>> scbin.pp.tokenize(adata, phenotypes=["phase"])
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> scbin.tl.embed_phenotypes(model).loc["phase"].index.tolist()
    ['G1', 'G2M', 'S']
    """
    chosen = resolve_model(model)
    slots = [slot for slot in chosen.vocabulary.phenotypes if slot.values]
    if not slots:
        raise ScbinInputError("M06", "this model reads no phenotypes. Tokenize with phenotypes=[...] and pretrain.")
    table = chosen.network.backbone.tables()[0].detach().cpu().numpy()
    rows = [(slot.name, value, slot.first_id + k) for slot in slots for k, value in enumerate(slot.values)]
    index = pd.MultiIndex.from_tuples([row[:2] for row in rows], names=["phenotype", "value"])
    return pd.DataFrame(table[[row[2] for row in rows]], index=index)


# ---- below ----------------------------------------------------------------------------------------------------------


def groups_of(adata: AnnData, groupby: str | None) -> tuple[np.ndarray, list[str]]:
    """Return the group of each cell (cells,), -1 where it has none, and the names of the groups."""
    codes = np.full(adata.n_obs, -1)
    if groupby is None:
        return codes, []
    labels = read_obs(adata, groupby)
    known = labels.notna().to_numpy()
    names, codes[known] = np.unique(labels[known].astype(str), return_inverse=True)
    return codes, names.tolist()


def gene_sums(
    network: CellNetwork, tokens: Tokens, codes: np.ndarray, n_groups: int, layer: int | None = None, **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of the hidden states of each gene's token by group of cells (groups + 1, genes, hidden), and how many there are.

    The last group are the cells without one.
    """
    vocabulary, n_genes = tokens.vocabulary, len(tokens.vocabulary.genes)
    sums = torch.zeros((n_groups + 1) * n_genes, network.backbone.hidden_size, dtype=torch.float64)
    counts = np.zeros(len(sums), dtype=np.int64)
    own: Any = network.vector.layer or -1
    for pack, hidden in run(network, tokens, layer=own if layer is None else layer, label="embedding genes", **how):
        at, genes, cell = gene_tokens(pack, vocabulary)
        place = genes + (codes[cell] % (n_groups + 1)) * n_genes
        sums.index_add_(0, torch.from_numpy(place), hidden[torch.from_numpy(at).to(hidden.device)].cpu().double())
        counts += np.bincount(place, minlength=len(counts))
    return sums.numpy().reshape(n_groups + 1, n_genes, -1), counts.reshape(n_groups + 1, n_genes)


def mean_gene_vectors(
    network: CellNetwork, tokens: Tokens, layer: int | None = None, **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean hidden state of each gene's token over the cells that express it (genes, hidden), and their number (genes,)."""
    sums, counts = gene_sums(network, tokens, np.zeros(tokens.n_cells, dtype=np.int64), 0, layer, **how)
    return mean_of(sums[0], counts[0]), counts[0]


def mean_of(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return means (..., genes, hidden) of sums over so many cells (..., genes); NaN where there are none."""
    return (sums / np.where(counts > 0, counts, np.nan)[..., None]).astype(np.float32)


def fixed_gene_vectors(model: Model, vectors: str) -> np.ndarray:
    """Return the vectors of genes that are the same in every cell (genes, size)."""
    network, vocabulary = model.network, model.vocabulary
    n_genes = np.arange(len(vocabulary.genes))
    if vectors == "loadings":
        head: Any = network.counts
        if head is None:
            raise ScbinInputError("M06", "this model has no count head, so genes have no loadings. Take 'context'.")
        return (head.loadings * head.scale).detach().cpu().numpy()
    ids, places = (table.detach().cpu().numpy() for table in network.backbone.tables())
    return places[vocabulary.gene_positions] if vocabulary.position_is_gene else ids[vocabulary.first_gene_id + n_genes]


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of genes (genes, size) less their mean, of length 1; NaN stays."""
    centred = np.asarray(vectors, dtype=np.float64)
    centred = centred - np.nanmean(centred, axis=0) if np.isfinite(centred).any() else centred
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def _by_column(values: np.ndarray, columns: np.ndarray, n_vars: int) -> np.ndarray:
    """Return values of the genes of a model (genes, ...) by column of adata (vars, ...), NaN where there is none."""
    result = np.full((n_vars, *values.shape[1:]), np.nan, dtype=np.float32)
    result[columns[columns >= 0]] = values[columns >= 0]
    return result
