"""What a model knows of single genes and phenotypes: their vectors, and how far these lie from each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.spatial.distance import pdist, squareform
from sklearn.covariance import LedoitWolf

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, gene_names, read_obs, read_tokens, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.model import resolve_model
from scbin.nn.run import gene_tokens, run
from scbin.tl._labels import MaskedPhenotypes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from scbin.model import Model
    from scbin.nn.network import CellNetwork
    from scbin.tokens.tokens import Tokens


@_docs.shared
@checked
def embed_genes(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    vectors: Literal["context", "static", "loadings"] = "context",
    groupby: str | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Compute a vector for every gene, for classes or a map of genes. For neighbours of genes see :func:`scbin.tl.gene_network`.

    A default model (`backbone="mlp"`) trains its count head, but not the hidden states of tokens: use `"loadings"`. Hidden states
    are meaningful if genes were masked in pretraining (`masking=scbin.Masking()`), and in published models.

    Parameters
    ----------
    {tokenized}
    {model}
    vectors
        `"context"`: the mean hidden state of the gene's token over the cells that express it, behind the layer that the cell vector
        reads, or the last one where it reads none. `"static"`: the gene's row in the input table, the same in every cell.
        `"loadings"`: the gene's loadings in the count head.
    groupby
        Column of `obs`, for means in each group of cells, too. For `"context"`.
    {reading}
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
        Number of cells in each mean; for `"context"`.
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
    for slot in (key, f"{key}_groups"):
        check_writable(adata, "varm", slot)
    chosen, (codes, groups) = resolve_model(model, adata), groups_of(adata, groupby)
    names = gene_names(adata, chosen.vocabulary)
    if vectors == "context":
        tokens: Any = MaskedPhenotypes(read_tokens(adata, chosen.vocabulary, tokens_key))
        how: dict[str, Any] = {"device": device, "precision": "float32", "token_budget": token_budget}
        states = hidden_states(chosen.network, tokens, progress=progress, **how)
        means, n_cells = means_by_gene(states, codes, len(groups), len(names.columns))
        values = means[-1]
    else:
        values = fixed_gene_vectors(chosen, vectors)
    target = copied(adata) if copy else adata
    write(target, "varm", key, names.by_column(values, target.n_vars))
    grouped = None if groupby is None else names.by_column(means[:-1].swapaxes(0, 1), target.n_vars)
    write(target, "varm", f"{key}_groups", grouped)
    if vectors == "context":
        counts = names.by_column(n_cells[-1], target.n_vars, np.float64)
        write(target, "var", _keys.N_CELLS, np.nan_to_num(counts).astype(np.int64))
    about = {"model": chosen.fingerprint, "vectors": vectors, "groupby": groupby, "groups": groups}
    write_uns(target, key, about)
    return target if copy else None


def embed_phenotypes(model: Model | str | os.PathLike[str]) -> pd.DataFrame:
    """Return the vectors of all values of all phenotypes, from their tokens.

    Their neighbours show which tissues, diseases or ages are similar to a model that was pretrained with them.

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
    table = chosen.network.backbone.tables()[0].detach().cpu().numpy()
    slots = chosen.vocabulary.phenotypes
    rows = {(slot.name, value): table[slot.first_id + k] for slot in slots for k, value in enumerate(slot.values)}
    if not rows:
        raise ScbinInputError("M06", "this model reads no phenotypes. Tokenize with phenotypes=[...] and pretrain.")
    return pd.DataFrame(list(rows.values()), index=pd.MultiIndex.from_tuples(rows, names=["phenotype", "value"]))


@checked
def vector_distances(
    vectors: AnnData | pd.DataFrame,
    *,
    metric: Literal["mahalanobis", "cosine", "variance"] = "mahalanobis",
    key: str | None = None,
) -> pd.DataFrame:
    """Return the distances between vectors of genes or of phenotypes, or the variance of each vector.

    Use them for a map or a clustering of genes. For the neighbours of a gene see :func:`scbin.tl.gene_network`.

    Parameters
    ----------
    vectors
        Cells after :func:`scbin.tl.embed_genes`, or a table with a row for each vector, such as that of
        :func:`scbin.tl.embed_phenotypes`.
    metric
        `"mahalanobis"`: with the covariance of all vectors, shrunk as by Ledoit and Wolf, since it may have no inverse.
        `"cosine"`: 1 - cosine. `"variance"`: the variance of the numbers of each vector; small if a model knows little about a
        gene.
    key
        Of `varm`. Default: `"scbin_genes"`.

    Returns
    -------
    A square table, or one with the column `variance`. Genes without a vector are left out.

    Raises
    ------
    ScbinInputError
        If there are no vectors, or fewer than two.

    Notes
    -----
    As in Polygene, where the covariance is not shrunk.

    Examples
    --------
    >>> import pandas, scbin
    >>> table = pandas.DataFrame([[0.0, 1.0], [0.0, 2.0], [3.0, 0.0]], index=["A", "B", "C"])
    >>> scbin.tl.vector_distances(table, metric="cosine").loc["A"].tolist()
    [0.0, 0.0, 1.0]
    """
    if isinstance(vectors, AnnData):
        slot = _keys.GENES if key is None else key
        if slot not in vectors.varm:
            raise ScbinInputError("A06", f"adata.varm has no {slot!r}. Run scbin.tl.embed_genes(adata, model) first.")
        vectors = pd.DataFrame(np.asarray(vectors.varm[slot]), index=vectors.var_names)
    table = vectors.astype(np.float64).dropna()
    if len(table) < 2:
        raise ScbinInputError("A02", f"{len(table)} of the {len(vectors)} vectors are known; two are needed.")
    if metric == "variance":
        return table.var(axis=1, ddof=0).to_frame("variance")
    whitening = {"VI": LedoitWolf().fit(table).precision_} if metric == "mahalanobis" else {}
    return pd.DataFrame(squareform(pdist(table, metric, **whitening)), index=table.index, columns=table.index)


# ---- below ----------------------------------------------------------------------------------------------------------


def groups_of(adata: AnnData, groupby: str | None) -> tuple[np.ndarray, list[str]]:
    """Return the group of each cell (cells,), -1 where it has none, and the names of the groups; 0 and no names without `groupby`."""
    if groupby is None:
        return np.zeros(adata.n_obs, dtype=np.int64), []
    codes, names = pd.factorize(read_obs(adata, groupby).astype(object).map(str, na_action="ignore"), sort=True)
    return codes, list(names)


def hidden_states(network: CellNetwork, tokens: Tokens, **how: Any) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
    """Yield the hidden states of tokens of genes (n, hidden), their genes and their cells (n,)."""
    for pack, hidden in run(network, tokens, layer=network.gene_layer, label="embedding genes", **how):
        at, genes, cells = gene_tokens(pack, tokens.vocabulary)
        yield hidden[torch.from_numpy(at).to(hidden.device)], genes, cells


def means_by_gene(
    parts: Iterable[tuple[Tensor, np.ndarray, np.ndarray]], codes: np.ndarray, n_groups: int, n_genes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return means of vectors by group of cells and gene (groups + 1, genes, size), NaN where there are none, and over how many.

    The last group are all cells.
    """
    sums, counts = torch.zeros(0, 0), np.zeros((n_groups + 1) * n_genes, dtype=np.int64)
    for vectors, genes, cells in parts:
        if not len(sums):
            sums = torch.zeros(len(counts), vectors.shape[1], dtype=torch.float64)
        place = genes + codes[cells] % (n_groups + 1) * n_genes  # cells without a group in the last one
        sums.index_add_(0, torch.from_numpy(place), vectors.cpu().double())
        counts += np.bincount(place, minlength=len(counts))
    by_group, n = sums.numpy().reshape(n_groups + 1, n_genes, -1), counts.reshape(n_groups + 1, n_genes)
    by_group[-1], n[-1] = by_group.sum(axis=0), n.sum(axis=0)
    return (by_group / np.where(n > 0, n, np.nan)[..., None]).astype(np.float32), n


def mean_gene_vectors(network: CellNetwork, tokens: Tokens, **how: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean hidden state of each gene's token over the cells that express it (genes, hidden), and their number (genes,)."""
    states, codes = hidden_states(network, tokens, **how), np.zeros(tokens.n_cells, dtype=np.int64)
    means, n_cells = means_by_gene(states, codes, 0, len(tokens.vocabulary.genes))
    return means[0], n_cells[0]


def fixed_gene_vectors(model: Model, vectors: str) -> np.ndarray:
    """Return the vectors of genes that are the same in every cell (genes, size)."""
    network, vocabulary = model.network, model.vocabulary
    if vectors == "loadings":
        if network.counts is None:
            raise ScbinInputError("M06", "this model has no count head, so genes have no loadings. Use 'context'.")
        return (network.counts.loadings * network.counts.scale).detach().cpu().numpy()
    ids, places = (table.detach().cpu().numpy() for table in network.backbone.tables())
    by_position, n_genes = vocabulary.position_is_gene, len(vocabulary.genes)
    return places[vocabulary.gene_positions] if by_position else ids[vocabulary.first_gene_id :][:n_genes]
