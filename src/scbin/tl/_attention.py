"""`tl.attention`: how much the genes of a cell attend to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse

from scbin import _docs
from scbin._adata import check_adata, gene_names, read_tokens
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get.tables import cell_number
from scbin.model import resolve_model
from scbin.nn.backbone import layer_number
from scbin.nn.bert import BertBackbone
from scbin.nn.run import run
from scbin.tl._labels import MaskedPhenotypes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from anndata import AnnData

    from scbin.model import Model
    from scbin.nn.network import CellNetwork
    from scbin.tokens.tokens import Tokens


@_docs.shared
@checked
def attention(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    cells: int | str | Sequence[int | str],
    layer: int = -1,
    head: int | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
) -> list[sparse.csr_matrix]:
    """Return the attention among the genes of some cells, of a model with a BERT.

    It is what the network reads, not how genes regulate each other: see what networks by attention are worth before you interpret it.

    Parameters
    ----------
    {tokenized}
    {model}
    cells
        Which cells, by number or name.
    layer
        Of which layer, from 1; -1 is the last.
    head
        Of which head, from 0. Default: the mean over all heads.
    {tokens_key}
    {device}
    {token_budget}

    Returns
    -------
    For each cell a CSR matrix (genes, genes) by the columns of `adata`: in row i, how the token of gene i shares its attention out among
    the genes of the cell. What goes to `[CLS]` and other control tokens is left out, so that rows sum to less than 1. For means over groups
    of cells see :func:`scbin.tl.gene_network`.

    Raises
    ------
    ScbinInputError
        If the backbone is no BERT, or has no such layer or head.

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
    tokens = read_tokens(adata, chosen.vocabulary, tokens_key)
    several = [cells] if isinstance(cells, int | str) else list(cells)
    rows = np.array([cell_number(cell, tokens) for cell in several], dtype=np.int64)
    columns, result = gene_names(adata, chosen.vocabulary).columns, {}
    how: dict[str, Any] = {"device": device, "precision": "float32", "token_budget": token_budget}
    masked: Any = MaskedPhenotypes(tokens)
    for cell, genes, weights in attention_of(chosen.network, masked, np.unique(rows), layer, head, **how):
        place = np.repeat(columns[genes], len(genes)), np.tile(columns[genes], len(genes))
        kept = (place[0] >= 0) & (place[1] >= 0)
        result[cell] = sparse.csr_matrix((weights.ravel()[kept], (place[0][kept], place[1][kept])), (adata.n_vars,) * 2)
    empty = sparse.csr_matrix((adata.n_vars, adata.n_vars), dtype=np.float32)
    return [result.get(row, empty) for row in rows.tolist()]


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
        found = f"layer={layer}, head={head}: there are layers 1 to {backbone.n_layers} and heads 0 to {n_heads - 1}"
        raise ScbinInputError("A02", f"{found}.")
    layers: Any = backbone.bert.bert.encoder.layer
    own = layers[number - 1].attention.self
    for pack, hidden in run(network, tokens, rows=rows, layer=number - 1, label="reading attention", **how):
        ids, positions = pack.input_ids.cpu().numpy(), pack.position_ids.cpu().numpy()
        with torch.inference_mode():  # (heads, T, d)
            parts = (linear(hidden.float()) for linear in (own.query, own.key))
            query, key = (part.unflatten(-1, (n_heads, -1)).swapaxes(0, 1) for part in parts)
        start = 0
        for cell, length in zip(pack.cells.tolist(), pack.layout.lengths, strict=True):
            part, start = slice(start, start + length), start + length
            at = np.flatnonzero(vocabulary.is_gene_token(ids[part]))
            genes = torch.from_numpy(at).to(query.device)
            with torch.inference_mode():
                scores = query[:, part][:, genes] @ key[:, part].mT * query.shape[-1] ** -0.5
                weights = scores.softmax(dim=-1)[..., genes]
                chosen = weights.mean(dim=0) if head is None else weights[head]
            yield cell, vocabulary.genes_at(ids[part][at], positions[part][at]), chosen.cpu().numpy()
