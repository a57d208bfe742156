"""Networks of genes from a model, its attention, and the genes that it associates with groups of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats
from sklearn.metrics.pairwise import cosine_similarity
from tqdm.auto import tqdm

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, gene_names, read_obs, read_tokens, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get import cell_number
from scbin.model import count_head, resolve_model
from scbin.nn.backbone import layer_number
from scbin.nn.bert import BertBackbone
from scbin.nn.counts import expected_shares
from scbin.nn.run import embed as embed_tokens
from scbin.nn.run import gene_tokens, run
from scbin.tl._gene_vectors import fixed_gene_vectors, groups_of, hidden_states, means_by_gene
from scbin.tl._labels import MaskedPhenotypes
from scbin.tl._perturb_statistics import false_discovery_rates
from scbin.tl._probe import log_expression, some_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from torch import Tensor

    from scbin.model import Model
    from scbin.nn.network import CellNetwork
    from scbin.tokens.tokens import Tokens

DEPTH, PSEUDOCOUNT, MOST_CELLS, FEWEST = 10_000.0, 0.1, 5_000, 3


@_docs.shared
@checked
def gene_network(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    method: Literal["similarity", "covariance", "effect", "attention"] = "similarity",
    groupby: str | None = None,
    n_edges: int | None = 50,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Compute a network of genes that have similar vectors, vary together, or affect each other in the model.

    None of them is regulation. Against known targets of transcription factors the default is the best of the four, and level
    with plain correlation of counts: see :doc:`/knowledge` for the numbers.

    Parameters
    ----------
    {tokenized}
    {model}
    method
        `"similarity"`: the cosine of the vectors of both genes less the mean over all genes: of the loadings of the count head, the same
        for any cells, or of mean hidden states where there is none or a `groupby`. `"covariance"`: how what the model expects of both
        genes varies together over the cells, co-expression without the noise of counting. `"effect"`: by how much the presence of a gene
        in a cell raises what the model expects of each other gene, the mean over the cells that express it; from gradients, so the effect
        of a little more of it. Both in log1p counts per 10,000. `"attention"`: how much the other gene's token attends to it in the last
        layer, the mean over the cells that express both; for models with a BERT.
    groupby
        Column of `obs`: a network for each group of cells. `"covariance"` tells groups apart best.
    n_edges
        Number of edges to keep from each gene, the strongest; 0 or `None` keeps all.
    {reading}
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
        If the model cannot tell: attention needs a BERT, covariance and effects a count head and tokens that say how much. Nothing is
        written then.

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
    key = _keys.NETWORK if key_added is None else key_added
    codes, groups = groups_of(adata, groupby)
    slots = [key] if groupby is None else [f"{key}_{k}" for k in range(len(groups))]
    for slot in slots:
        check_writable(adata, "varp", slot)
    chosen = resolve_model(model, adata)
    tokens: Any = MaskedPhenotypes(read_tokens(adata, chosen.vocabulary, tokens_key))
    how: dict[str, Any] = {"device": device, "precision": "float32", "token_budget": token_budget, "progress": progress}
    n_groups, n_genes = len(slots), len(chosen.vocabulary.genes)
    found: Any
    if method == "attention":
        found = mean_attention(chosen.network, tokens, codes, n_groups, **how)
    elif method != "similarity":
        logs = expected_logs(chosen, tokens, codes, n_groups, **how)
        if method == "covariance":
            found = [np.cov(each.T) for each in logs]
        else:
            steepness = np.stack([-np.expm1(-each).mean(axis=0) for each in logs])  # of log1p counts by log counts
            slopes = means_by_gene(presence_slopes(chosen.network, tokens, **how), codes, n_groups, n_genes)[0][:-1]
            found = slopes @ fixed_gene_vectors(chosen, "loadings").T * steepness[:, None]
    elif chosen.network.counts is not None and groupby is None:
        found = [cosines(fixed_gene_vectors(chosen, "loadings"))]
    else:
        states = hidden_states(chosen.network, tokens, **how)
        found = [cosines(each) for each in means_by_gene(states, codes, n_groups, n_genes)[0][:-1]]
    columns = gene_names(adata, chosen.vocabulary).columns
    target = copied(adata) if copy else adata
    for slot, weights in zip(slots, found, strict=True):
        write(target, "varp", slot, strongest(weights, columns, target.n_vars, n_edges))
    about = {"model": chosen.fingerprint, "method": method, "groupby": groupby, "groups": groups, "n_edges": n_edges}
    write_uns(target, key, about)
    return target if copy else None


@_docs.shared
@checked
def attention(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    cells: Sequence[int | str],
    layer: int = -1,
    head: int | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
) -> list[sparse.csr_matrix]:
    """Return the attention between the genes of some cells, for a model with a BERT.

    Attention is not regulation: see :doc:`/knowledge` for how networks made from it compare with known targets.

    Parameters
    ----------
    {tokenized}
    {model}
    cells
        Numbers or names of cells.
    layer
        The layer, from 1; -1 is the last.
    head
        The head, from 0. Default: the mean over all heads.
    {tokens_key}
    {device}
    {token_budget}

    Returns
    -------
    For each cell a CSR matrix (genes, genes) in the order of `adata.var_names`; row i has the attention of gene i to each gene of
    the cell. Attention to control tokens is left out, so rows sum to less than 1. For means over groups of cells see
    :func:`scbin.tl.gene_network`.

    Raises
    ------
    ScbinInputError
        If the backbone is not a BERT, or has no such layer or head.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:50].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, backbone="bert", preset="tiny", max_steps=1, progress=False)
    >>> [matrix.shape for matrix in scbin.tl.attention(adata, model, cells=[0, 7])]
    [(765, 765), (765, 765)]
    """
    check_adata(adata)
    chosen = resolve_model(model, adata)
    tokens: Any = MaskedPhenotypes(read_tokens(adata, chosen.vocabulary, tokens_key))
    rows = [cell_number(cell, tokens) for cell in cells]
    columns, n = gene_names(adata, chosen.vocabulary).columns, adata.n_vars
    found = dict.fromkeys(rows, sparse.csr_matrix((n, n), dtype=np.float32))
    how: dict[str, Any] = {"device": device, "precision": "float32", "token_budget": token_budget}
    for cell, genes, weights in attention_of(chosen.network, tokens, np.unique(rows), layer, head, **how):
        found[cell] = by_columns(weights, columns[genes], n)
    return [found[row] for row in rows]


@_docs.shared
@checked
def gene_association(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    groupby: str,
    groups: str | Sequence[str] | None = None,
    reference: str = "rest",
    donor_key: str | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
) -> pd.DataFrame:
    """Find genes associated with a phenotype: log fold changes of expected counts between groups of cells.

    Expected counts come from the count head, given the cell vector. They are smoother than counts, which helps with small groups
    and rarely detected genes. The table also has the fold change of the counts.

    Parameters
    ----------
    {tokenized}
    {model}
    groupby
        Column of `obs`: cell types, a disease, a treatment.
    groups
        The groups to compare. Default: all.
    reference
        What they are compared with: all other cells (`"rest"`), or one group.
    donor_key
        Column of `obs` with donors, who are then the replicates. If three or more donors have cells in both groups, the test is
        paired. Without donors, cells are treated as independent, and intervals are too narrow for statements about people.
    {reading}

    Returns
    -------
    A table with a row per group and gene, the largest change first: `log_fold_change` (to base 2), its 95 % interval `lower` and
    `upper`, `p_value` (Welch's t test, or the paired one) and `fdr` (Benjamini-Hochberg in each group), `plain_log_fold_change`
    of the mean counts per 10,000, and `n`, `n_reference` and `unit`: the numbers of donors, or of cells, of which at most 5,000
    per group are used. Nothing is written.

    Raises
    ------
    ScbinInputError
        If the model has no count head, or fewer than two cells or donors are on a side.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:300].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=60, progress=False)
    >>> table = scbin.tl.gene_association(adata, model, groupby="bulk_labels", groups="CD19+ B", progress=False)
    >>> "CD79A" in set(table["gene"][:20])
    True
    """
    check_adata(adata)
    chosen = resolve_model(model, adata)
    head = count_head(chosen, "Pretrain one: scbin.tl.pretrain(adata).")
    tokens: Any = MaskedPhenotypes(read_tokens(adata, chosen.vocabulary, tokens_key))
    codes, names = groups_of(adata, groupby)
    asked = names if groups is None else [groups] if isinstance(groups, str) else list(groups)
    if unknown := sorted({*asked, reference} - {*names, "rest"}):
        found = f"{unknown[0]!r} is not a group of obs[{groupby!r}]"
        raise ScbinInputError("A06", f"{found}. Available: {', '.join(names)}.")
    donors = np.arange(adata.n_obs) if donor_key is None else pd.factorize(read_obs(adata, donor_key))[0]
    usable = (tokens.lengths > 0) & (codes >= 0) & (donors >= 0)
    how: dict[str, Any] = {"device": device, "precision": "float32", "token_budget": token_budget, "progress": progress}
    vectors, genes, tables = embed_tokens(chosen.network, tokens, **how), gene_names(adata, chosen.vocabulary).names, []
    for name in (name for name in asked if name != reference):
        here = codes == names.index(name)
        there = ~here if reference == "rest" else codes == names.index(reference)
        sides = [np.flatnonzero(usable & side) for side in (here, there)]
        units = [pd.DataFrame(vectors[side], index=donors[side]) for side in sides]
        if donor_key is None:
            units = [unit.iloc[some_of(len(unit), MOST_CELLS, 0)] for unit in units]
        units = [unit.groupby(level=0).mean() for unit in units]  # of donors, or cells, one each
        if min(map(len, units)) < 2:
            found = f"{len(units[0])} and {len(units[1])} {'cells' if donor_key is None else 'donors'}"
            raise ScbinInputError("P02", f"{name!r} and {reference!r} have {found}; two on each side are needed.")
        both = units[0].index.intersection(units[1].index)
        paired = donor_key is not None and len(both) >= 3
        units = [unit.loc[both] for unit in units] if paired else units
        shares = [expected_shares(head, torch.from_numpy(unit.to_numpy(dtype=np.float32, copy=True))) for unit in units]
        logs = [np.log2(DEPTH * share + PSEUDOCOUNT) for share in shares]
        test: Any = stats.ttest_rel(*logs) if paired else stats.ttest_ind(*logs, equal_var=False)
        plain = [np.log2(log_expression(tokens, side).expm1().mean(axis=0) + PSEUDOCOUNT) for side in sides]
        table = pd.DataFrame({"group": name, "gene": np.array(genes, dtype=object)})
        table["log_fold_change"] = logs[0].mean(axis=0) - logs[1].mean(axis=0)
        table["lower"], table["upper"] = test.confidence_interval()
        table["p_value"], table["fdr"] = test.pvalue, false_discovery_rates(test.pvalue)
        table["plain_log_fold_change"] = np.ravel(plain[0] - plain[1])
        table["n"], table["n_reference"] = map(len, units)
        table["unit"] = "cell" if donor_key is None else "paired donor" if paired else "donor"
        tables.append(table.sort_values("log_fold_change", ascending=False, kind="stable"))
    if not tables:
        raise ScbinInputError("A03", f"there is no group to compare with {reference!r}; name others with groups=.")
    return pd.concat(tables, ignore_index=True)


# ---- below ----------------------------------------------------------------------------------------------------------


def expected_logs(model: Model, tokens: Tokens, codes: np.ndarray, n_groups: int, **how: Any) -> list[np.ndarray]:
    """Return the log1p counts per 10,000 that the model expects of cells of each group (cells, genes), of 5,000 at most."""
    head, result = count_head(model, "Use another method, or tokenize as 'bins' and pretrain."), []
    for group in range(n_groups):
        cells = np.flatnonzero((codes == group) & (tokens.lengths > 0))
        if len(cells) < FEWEST:
            raise ScbinInputError("P02", f"a group has {len(cells)} cells with tokens; {FEWEST} are needed.")
        cells = cells[:: -(-len(cells) // MOST_CELLS)]
        vectors = embed_tokens(model.network, tokens, rows=cells, **how)[cells]
        result.append(np.log1p(DEPTH * expected_shares(head, torch.from_numpy(vectors))))
    return result


def presence_slopes(
    network: CellNetwork, tokens: Tokens, **how: Any
) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
    """Yield by how much tokens of genes move the vector of their cell, to first order (n, size), their genes and their cells (n,).

    A gate on a token, 1 there and 0 away, scales its expression and the attention that it gets; this is the slope at 1.
    """
    for pack, _ in run(network, tokens, layer=None, label="reading genes", **how):
        gates = torch.zeros(pack.n_tokens, device=pack.input_ids.device, requires_grad=True)  # logarithms
        with torch.enable_grad():
            hidden = network.backbone.encode(pack, network.vector.layer, gates=gates)
            z = network.vector(hidden, pack, gates=gates)
            slopes = [torch.autograd.grad(each, gates, retain_graph=True)[0] for each in z.sum(dim=0)]
        at, genes, cells = gene_tokens(pack, tokens.vocabulary)
        yield torch.stack(slopes, dim=1).cpu()[torch.from_numpy(at)], genes, cells


def attention_of(
    network: CellNetwork, tokens: Tokens, rows: np.ndarray, layer: int = -1, head: int | None = None, **how: Any
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield cells with their genes (n,) and the attention among these (n, n) float32, query by key; cells without tokens are left out."""
    backbone, vocabulary = network.backbone, tokens.vocabulary
    if not isinstance(backbone, BertBackbone):
        found = f"this model's backbone is {backbone.kind!r}, in which no gene attends to another"
        raise ScbinInputError("M04", f"{found}. Pretrain with backbone='bert', or load a published BERT.")
    number, n_heads = layer_number(layer, backbone.n_layers), backbone.bert.config.num_attention_heads
    if number < 1 or (head is not None and not 0 <= head < n_heads):
        found = f"there are layers 1 to {backbone.n_layers} and heads 0 to {n_heads - 1}"
        raise ScbinInputError("A02", f"layer={layer}, head={head}: {found}.")
    layers: Any = backbone.bert.bert.encoder.layer
    own = layers[number - 1].attention.self
    for pack, hidden in run(network, tokens, rows=rows, layer=number - 1, label="reading attention", **how):
        ids, positions = pack.input_ids.cpu().numpy(), pack.position_ids.cpu().numpy()
        parts = (linear(hidden.float()) for linear in (own.query, own.key))  # without gradients, as `run` is
        query, key = (part.unflatten(-1, (n_heads, -1)).swapaxes(0, 1) for part in parts)  # (heads, T, d)
        stops = np.cumsum(pack.layout.lengths)
        for cell, start, stop in zip(pack.cells.tolist(), stops - pack.layout.lengths, stops, strict=True):
            at = start + np.flatnonzero(vocabulary.is_gene_token(ids[start:stop]))
            genes = torch.from_numpy(at).to(query.device)
            scores = query[:, genes] @ key[:, start:stop].mT * query.shape[-1] ** -0.5
            weights = scores.softmax(dim=-1)[..., genes - start]
            chosen = weights.mean(dim=0) if head is None else weights[head]
            yield cell, vocabulary.genes_at(ids[at], positions[at]), chosen.cpu().numpy()


def mean_attention(
    network: CellNetwork, tokens: Tokens, codes: np.ndarray, n_groups: int, *, progress: bool, **how: Any
) -> np.ndarray:
    """Return the mean attention to each gene (rows) of each other (columns) by group (groups, genes, genes); NaN: never together."""
    n_genes, rows = len(tokens.vocabulary.genes), np.flatnonzero(codes >= 0)
    sums, counts = np.zeros((2, n_groups, n_genes, n_genes), dtype=np.float32)
    found = attention_of(network, tokens, rows, **how)
    for cell, genes, weights in tqdm(found, total=len(rows), desc="attention", unit="cell", disable=not progress):
        sums[codes[cell]][np.ix_(genes, genes)] += weights.T
        counts[codes[cell]][np.ix_(genes, genes)] += 1
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def cosines(vectors: np.ndarray) -> np.ndarray:
    """Return the cosines between vectors of genes (genes, size) less their mean; 0 for genes without one."""
    return cosine_similarity(np.nan_to_num(vectors - np.nanmean(vectors, axis=0, dtype=np.float64)))


def strongest(weights: np.ndarray, columns: np.ndarray, n_vars: int, n_edges: int | None) -> sparse.csr_matrix:
    """Return the strongest edges of each gene (genes, genes) by column of adata; none to itself, none that is NaN."""
    weights = np.where(columns >= 0, np.nan_to_num(weights.astype(np.float32)), 0)
    np.fill_diagonal(weights, 0)
    if n_edges is not None and 0 < n_edges < len(columns):
        size = np.abs(weights)
        weights[size < np.partition(size, -n_edges, axis=1)[:, -n_edges, None]] = 0
    return by_columns(weights, columns, n_vars)


def by_columns(weights: np.ndarray, columns: np.ndarray, n_vars: int) -> sparse.csr_matrix:
    """Return weights among genes (n, n) at their columns of adata (n,), -1: none."""
    row, column = np.nonzero(np.where((columns >= 0) & (columns[:, None] >= 0), weights, 0))
    return sparse.csr_matrix((weights[row, column], (columns[row], columns[column])), (n_vars, n_vars))
