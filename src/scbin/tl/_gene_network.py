"""`tl.gene_network`: which genes go together, or act on each other, in the eyes of a model."""

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
from scbin.nn.packs import pack_rows, plan_packs
from scbin.nn.run import Runner, at_rest, gene_tokens
from scbin.nn.run import embed as embed_tokens
from scbin.tl._attention import attention_of
from scbin.tl._genes import GeneVectors, fixed_gene_vectors, gene_sums, groups_of, mean_of, unit_vectors
from scbin.tl._labels import MaskedPhenotypes

if TYPE_CHECKING:
    import os

    from anndata import AnnData

    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.nn.network import CellNetwork
    from scbin.tokens.tokens import Tokens

DEPTH, MOST_CELLS, FEWEST = 10_000.0, 5_000, 3


@_docs.shared
@checked
def gene_network(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    method: Literal["covariance", "effect", "similarity", "attention"] = "covariance",
    groupby: str | None = None,
    vectors: GeneVectors = "loadings",
    layer: int = -1,
    n_edges: int | None = 50,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Draw a network of genes from a model: genes that it expects together, that act on each other in it, or look alike to it.

    None of them is regulation. Against known targets of transcription factors all are close to plain co-expression; the page on
    knowledge has the numbers.

    Parameters
    ----------
    {tokenized}
    {model}
    method
        `"covariance"`: how what the model expects of both genes varies together over the cells, co-expression without the noise of
        counting. `"effect"`: by how much the presence of a gene in a cell raises what the model expects of each other gene, the mean
        over the cells that express it; from gradients, so the effect of a little more of it. Both in log1p counts per 10,000.
        `"similarity"`: the cosine of the vectors of both genes less the mean over all genes. `"attention"`: how much the other gene's
        token attends to it, the mean over the cells that express both; for models with a BERT.
    groupby
        Column of `obs`: a network for each group of cells.
    vectors
        For `"similarity"`, see :func:`scbin.tl.embed_genes`; with `groupby` it takes `"context"`.
    layer
        For `"attention"`, and for `"similarity"` by `"context"`.
    n_edges
        Keep so many edges from each gene, the strongest; `None` keeps all.
    {tokens_key}
    {device}
    {token_budget}
    {progress}
    {key_added}
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.varp["scbin_network"]`
        CSR float32 (genes, genes), from the gene in the row to the gene in the column. With `groupby` there is one for each group,
        `"scbin_network_0"` and so on; :func:`scbin.get.network_df` reads them by name.
    `adata.uns["scbin"]["scbin_network"]`
        How it was made, and the names of the groups in order, as JSON.

    Raises
    ------
    ScbinInputError
        If the model cannot tell: attention needs a BERT, covariance and effects a count head and tokens that say how much. Nothing is written then.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:200].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> scbin.tl.gene_network(adata, model, n_edges=5, progress=False)
    >>> scbin.get.network_df(adata).columns.tolist()
    ['source', 'target', 'weight']
    """
    check_adata(adata)
    if n_edges is not None and n_edges < 1:
        raise ScbinInputError("A02", f"n_edges is {n_edges}; keep 1 from each gene or more, or None for all.")
    if method == "similarity" and groupby is not None and vectors != "context":
        raise ScbinInputError("A03", f"vectors={vectors!r} are the same in every cell: groupby needs 'context'.")
    key = _keys.NETWORK if key_added is None else key_added
    codes, groups = groups_of(adata, groupby)
    slots = [key] if groupby is None else [f"{key}_{k}" for k in range(len(groups))]
    for slot in slots:
        check_writable(adata, "varp", slot)
    chosen = resolve_model(model, adata)
    tokens: Any = MaskedPhenotypes(read_tokens(adata, chosen.vocabulary, tokens_key))
    codes = codes if groupby is not None else np.zeros(adata.n_obs, dtype=np.int64)
    how: dict[str, Any] = {"device": device, "precision": "float32", "token_budget": token_budget, "progress": progress}
    found: Any
    if method == "covariance":
        found = [np.cov(each.T) for each in expected_logs(chosen, tokens, codes, len(slots), **how)]
    elif method == "effect":
        found = effects(chosen, tokens, codes, len(slots), **how)
    elif method == "attention":
        found = mean_attention(chosen.network, tokens, codes, len(slots), layer, **how)
    elif vectors == "context":
        means = mean_of(*gene_sums(chosen.network, tokens, codes, len(slots), layer, **how))[:-1]
        found = np.stack([unit_vectors(each) @ unit_vectors(each).T for each in means])
    else:
        unit = unit_vectors(fixed_gene_vectors(chosen, vectors))
        found = (unit @ unit.T)[None]
    columns = gene_names(adata, chosen.vocabulary).columns
    target = copied(adata) if copy else adata
    for slot, weights in zip(slots, found, strict=True):
        write(target, "varp", slot, strongest(weights, columns, target.n_vars, n_edges))
    about = {"model": chosen.fingerprint, "method": method, "vectors": vectors, "groupby": groupby, "groups": groups}
    write_uns(target, key, json.dumps(about | {"layer": layer, "n_edges": n_edges}))
    return target if copy else None


def expected_logs(model: Model, tokens: Tokens, codes: np.ndarray, n_groups: int, **how: Any) -> list[np.ndarray]:
    """Return the log1p counts per 10,000 that the model expects of cells of each group (cells, genes), of 5,000 at most."""
    head = count_head(model, "Take another method, or tokenize as 'bins' and pretrain.")
    result = []
    for group in range(n_groups):
        cells = np.flatnonzero((codes == group) & (tokens.lengths > 0))
        if len(cells) < FEWEST:
            raise ScbinInputError("P02", f"a group has {len(cells)} cells with tokens; {FEWEST} are needed.")
        cells = cells[:: -(-len(cells) // MOST_CELLS)]
        vectors = embed_tokens(model.network, tokens, rows=cells, **how)[cells]
        result.append(np.log1p(DEPTH * expected_shares(head, torch.from_numpy(vectors))))
    return result


def effects(model: Model, tokens: Tokens, codes: np.ndarray, n_groups: int, **how: Any) -> np.ndarray:
    """Return by how much each gene raises what is expected of each other (groups, genes, genes); NaN where no cell has it."""
    logs = expected_logs(model, tokens, codes, n_groups, **how)
    steepness = np.stack([-np.expm1(-each).mean(axis=0) for each in logs])  # of log1p counts by log counts
    slopes = mean_of(*presence_slopes(model.network, tokens, codes, n_groups, **how))[:-1]
    return slopes @ fixed_gene_vectors(model, "loadings").T * steepness[:, None]


def presence_slopes(
    network: CellNetwork, tokens: Tokens, codes: np.ndarray, n_groups: int, *, device: str, precision: Precision,
    token_budget: int, progress: bool,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Return by how much each gene moves the vectors of the cells that have it, to first order: sums (groups + 1, genes, size), cells.

    A gate on a token, 1 there and 0 away, scales its expression and the attention that it gets; this is the slope at 1.
    """
    vocabulary, vector = tokens.vocabulary, network.vector
    n_genes = len(vocabulary.genes)
    sums, counts = np.zeros(((n_groups + 1) * n_genes, vector.size)), np.zeros((n_groups + 1) * n_genes, dtype=np.int64)
    with at_rest(network):
        runner = Runner(network, device, precision)
        for cells in tqdm(plan_packs(tokens.lengths, token_budget), desc="genes", unit="pack", disable=not progress):
            pack = pack_rows(tokens.take(cells), cells, runner.device)
            gates = torch.zeros(pack.n_tokens, device=runner.device, requires_grad=True)  # logarithms
            with torch.enable_grad():
                z = vector(runner(pack, vector.layer, gates=gates).float(), pack, gates=gates).float()
                slopes = [torch.autograd.grad(each, gates, retain_graph=True)[0] for each in z.sum(dim=0)]
            at, genes, cell = gene_tokens(pack, vocabulary)
            place = genes + (codes[cell] % (n_groups + 1)) * n_genes
            of_place = sparse.csr_matrix((np.ones(len(at)), (place, np.arange(len(at)))), shape=(len(sums), len(at)))
            sums += of_place @ torch.stack(slopes, dim=1).cpu().numpy()[at].astype(np.float64)
            counts += np.bincount(place, minlength=len(counts))
    return sums.reshape(n_groups + 1, n_genes, -1), counts.reshape(n_groups + 1, n_genes)


def mean_attention(
    network: CellNetwork, tokens: Tokens, codes: np.ndarray, n_groups: int, layer: int, *, progress: bool, **how: Any
) -> np.ndarray:
    """Return the mean attention to each gene (rows) of each other (columns) by group (groups, genes, genes); NaN: never together."""
    n_genes, rows = len(tokens.vocabulary.genes), np.flatnonzero(codes >= 0)
    sums, counts = np.zeros((2, n_groups, n_genes, n_genes), dtype=np.float32)
    found = attention_of(network, tokens, rows, layer, **how)
    for cell, genes, weights in tqdm(found, total=len(rows), desc="attention", unit="cell", disable=not progress):
        sums[codes[cell]][np.ix_(genes, genes)] += weights.T
        counts[codes[cell]][np.ix_(genes, genes)] += 1
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def strongest(weights: np.ndarray, columns: np.ndarray, n_vars: int, n_edges: int | None) -> sparse.csr_matrix:
    """Return the strongest edges of each gene (genes, genes) by column of adata; none to itself, none that is NaN."""
    here = np.flatnonzero(columns >= 0)
    weights = np.nan_to_num(weights[np.ix_(here, here)].astype(np.float32))
    np.fill_diagonal(weights, 0)
    if n_edges is not None and n_edges < len(here):
        least = np.partition(np.abs(weights), len(here) - n_edges, axis=1)[:, len(here) - n_edges]
        weights[np.abs(weights) < least[:, None]] = 0
    row, column = np.nonzero(weights)
    return sparse.csr_matrix((weights[row, column], (columns[here][row], columns[here][column])), (n_vars, n_vars))
