"""`tl.impute`: expected expression of genes that a cell does not show."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import sparse
from tqdm.auto import tqdm

from scbin import _keys
from scbin._anndata import check_adata, check_writable, copied, read_tokens, write_layer, write_uns
from scbin._arguments import choices, flags, whole_numbers
from scbin._errors import ScbinInputError
from scbin.data._mask_kernel import hash_uniform
from scbin.data.frequencies import logistic
from scbin.data.masking import random_key
from scbin.nn.decoder import fit_decoder, level_matrix, partial_tokens, phenotype_values
from scbin.nn.embedding import embed_tokens
from scbin.nn.sampling import bin_chances
from scbin.tl._model import resolve_model
from scbin.tl._perturb_genes import gene_names

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from anndata import AnnData

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.model import Model
    from scbin.nn.decoder import Decoder, Vectors

_VALUES_AT_ONCE = 2**21  # of cells x genes
_FOLDS = 10


def impute(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    genes: str | Sequence[str] | None = None,
    observed: Literal["keep", "hide"] = "keep",
    phenotypes: Literal["hide", "show"] = "hide",
    tokens_key: str | None = None,
    device: str = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Say what each cell would be expected to express of the genes it shows nothing of.

    For looking at a gene that was counted too rarely. The number for a gene in a cell is the probability that a cell of this
    size and place expresses it, times its mean where it is expressed; the network says the place, from all other genes of the
    cell. It is an expectation, smoother than data: do not test for differences on it.

    Parameters
    ----------
    adata
        Tokenized cells (`scbin.pp.tokenize(adata, like=model)`).
    model
        A :class:`scbin.Model` that reads bins, or the directory of one. Default: the one trained on these cells.
    genes
        Names of the genes to impute. Default: all that the model knows.
    observed
        For genes that a cell does express: `"keep"` the value that its token stands for (the middle of the bin), or `"hide"` the
        gene and put the expectation there too. Genes are hidden a tenth at a time.
    phenotypes
        `"show"` lets the phenotypes that were tokenized decide too how often a gene is expressed. By default cells with other
        labels are treated alike.
    tokens_key
        The slot of `obsm` with the tokens. Default: `"X_tokens"`.
    device
        `"auto"` takes cuda, then mps, then cpu.
    token_budget
        Most tokens to go through the network at once.
    progress
        Show a progress bar.
    key_added
        Name of the layer. Default: `"scbin_imputed"`.
    copy
        Return a copy instead of writing into `adata`.

    Returns
    -------
    Returns `None` if `copy=False`, else returns an `AnnData` object. Sets the following fields:

    `adata.layers['scbin_imputed' | key_added]`
        CSR float32 (cells, genes) in the unit of the bins, log1p of counts per 10,000 by default. Genes that the model does not
        know, or that `genes` leaves out, have no value; cells without tokens have NaN. `X` stays as it is.
    `adata.uns['scbin']['impute']`
        How it was imputed, as JSON.

    Raises
    ------
    ScbinInputError
        If the cells are not tokenized, the model reads ranks, or a gene is unknown. Nothing is written then.

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
    choices({"observed": ("keep", "hide"), "phenotypes": ("hide", "show")}, observed=observed, phenotypes=phenotypes)
    flags(progress=progress, copy=copy)
    whole_numbers(token_budget=token_budget)
    if token_budget < 1:
        raise ScbinInputError("S05", f"token_budget is {token_budget}; it needs to be at least 1.")
    key = _keys.IMPUTED if key_added is None else key_added
    check_writable(adata, "layers", key)
    adata = copied(adata) if copy else adata
    chosen = resolve_model(model, adata)
    tokens, vocabulary = read_tokens(adata, chosen.vocabulary, key=tokens_key)
    if not vocabulary.position_is_gene:
        raise ScbinInputError(
            "S02",
            'this model reads genes by rank, and ranks do not say how much a gene is expressed. Tokenize with encoding="bins" '
            "and pretrain to impute.",
        )
    names = gene_names(adata, vocabulary)
    asked = np.arange(len(vocabulary.genes)) if genes is None else np.array(names.resolve(genes), dtype=np.int64)
    asked = asked[names.columns[asked] >= 0]
    if not len(asked):
        raise ScbinInputError("S10", "none of the genes to impute is a column of adata.")
    vectors: Vectors = partial(
        embed_tokens,
        chosen.bert,
        weights=chosen.weights(),
        layer=chosen.readout.layer,
        device=device,
        token_budget=token_budget,
    )
    decoder = chosen.decoder or fit_decoder(vectors, tokens, vocabulary)
    columns = names.columns[asked]
    layer = _layer(vectors, decoder, tokens, vocabulary, asked, columns, adata.n_vars, observed, phenotypes, progress)
    write_layer(adata, key, layer)
    own = "the model's" if chosen.decoder is not None else "fitted to these cells"
    record = {"model": chosen.fingerprint, "genes": len(asked), "observed": observed, "phenotypes": phenotypes}
    write_uns(adata, _keys.IMPUTE, json.dumps(record | {"decoder": own}))
    return adata if copy else None


def _layer(
    vectors: Vectors,
    decoder: Decoder,
    tokens: sparse.csr_matrix,
    vocabulary: Vocabulary,
    asked: np.ndarray,
    columns: np.ndarray,
    n_vars: int,
    observed: str,
    phenotypes: str,
    progress: bool,
) -> sparse.csr_matrix:
    """Return the imputed values as a layer, a block of cells at a time."""
    n_rows = max(1, _VALUES_AT_ONCE // len(vocabulary.genes))
    order = np.argsort(columns, kind="stable")
    blocks = []
    for start in tqdm(range(0, tokens.shape[0], n_rows), desc="imputing", unit="block", disable=not progress):
        part = tokens[start : start + n_rows]
        levels = level_matrix(part, vocabulary).toarray()
        values = phenotype_values(part, vocabulary)
        values = values if phenotypes == "show" else np.full_like(values, -1)
        expected = expected_expression(vectors, decoder, vocabulary, levels, values, hide=observed == "hide")
        if observed == "keep":
            expected = np.where(levels > 0, np.take_along_axis(_centres(vocabulary).T, levels, axis=0), expected)
        expected[np.diff(part.indptr) == 0] = np.nan
        dense = expected[:, asked[order]].astype(np.float32)
        bounds = np.arange(len(dense) + 1) * len(order)
        blocks.append(
            sparse.csr_matrix((dense.ravel(), np.tile(columns[order], len(dense)), bounds), (len(dense), n_vars))
        )
    return sparse.csr_matrix(sparse.vstack(blocks))


def expected_expression(
    vectors: Vectors, decoder: Decoder, vocabulary: Vocabulary, levels: np.ndarray, values: np.ndarray, *, hide: bool
) -> np.ndarray:
    """Return the expected value of each gene (cells, genes), given the others.

    Without `hide` each cell is read once, whole, which is right for genes that it does not express: they are not in it.
    """
    sizes = (levels > 0).sum(axis=1)
    fold = (hash_uniform(random_key(0, 0), np.arange(levels.shape[1]), 0) * _FOLDS).astype(np.int64) if hide else None
    result = np.zeros(levels.shape)
    for number in range(_FOLDS if hide else 1):
        mine = np.ones(levels.shape[1], dtype=bool) if fold is None else fold == number
        shown = np.broadcast_to(np.ones(len(mine), dtype=bool) if fold is None else ~mine, levels.shape)
        share = np.full(len(levels), 1.0 if fold is None else float((~mine).mean()))
        seen = vectors(partial_tokens(levels, shown, vocabulary))
        odds, mean = decoder.genes(values, sizes, decoder.scores(seen, values, share, vocabulary), vocabulary)
        chance = logistic(odds[:, mine])
        result[:, mine] = chance * _mean_value(mean[:, mine], decoder.spread()[mine], vocabulary, np.flatnonzero(mine))
    return result


def _mean_value(mean: np.ndarray, spread: np.ndarray, vocabulary: Vocabulary, genes: np.ndarray) -> np.ndarray:
    """Return the mean of what bins stand for (cells, genes), by their mean and spread."""
    n_bins = vocabulary.n_levels - 1
    centres = _centres(vocabulary)[genes, 1:]
    result = np.empty(mean.shape)
    for k in range(len(genes)):
        result[:, k] = bin_chances(mean[:, k], np.full(len(mean), spread[k]), n_bins) @ centres[k]
    return result


def _centres(vocabulary: Vocabulary) -> np.ndarray:
    """Return the value that each bin of each gene stands for (genes, bins + 1)."""
    bins = vocabulary.bins
    assert bins is not None
    return np.broadcast_to(bins.gene_centres, (len(vocabulary.genes), vocabulary.n_levels))
