"""Turn cells into tokens."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, Literal

from scbin import _keys
from scbin._anndata import check_adata, check_writable, copied, make_real, write_obs, write_obsm, write_uns
from scbin._arguments import flags
from scbin._errors import ScbinInputError
from scbin.pp._fit import Fit
from scbin.pp._plan import Options, prepare, stream

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData
    from scipy import sparse

    from scbin.encoding.bins import Bins
    from scbin.encoding.values import Values
    from scbin.encoding.vocabulary import Encoding, Layout
    from scbin.pp._fit import BinRule

logger = logging.getLogger(__name__)


def tokenize(
    adata: AnnData,
    *,
    encoding: Encoding = "bins",
    values: Values = "auto",
    layer: str | None = None,
    gene_key: str | None = None,
    phenotypes: Sequence[str] | Mapping[str, str] | str | None = None,
    like: Any = None,
    n_genes: int = 2000,
    mask_var: str | None = "highly_variable",
    bins: Bins | Sequence[float] | BinRule | None = None,
    n_bins: int = 20,
    threshold: float = 0.1,
    zeros: Literal["drop", "keep"] = "drop",
    layout: Layout = "scbin",
    max_length: int | None = None,
    medians: Mapping[str, float] | None = None,
    age_groups: Literal[10, 20] | None = None,
    case: Literal["exact", "upper"] = "exact",
    duplicates: Literal["sum", "error"] = "sum",
    force: bool = False,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Turn each cell into a row of tokens, ready for a model.

    Call it on raw counts or on log1p values; which of the two the matrix holds is found out from its values and said in one
    line. The matrix itself is only read, by blocks of rows, so backed and dask data stream.

    Parameters
    ----------
    adata
        Cells by genes.
    encoding
        What a token says: `"bins"` how much of a gene, `"binary"` whether a gene is expressed, `"rank"` which gene comes
        at this rank of the cell, `"gene_bins"` gene and amount jointly.
    values
        What the matrix holds; `"auto"` decides from the values.
    layer
        The layer to read instead of `X`.
    gene_key
        Column of `var` with the gene names; `var_names` by default.
    phenotypes
        Columns of `obs` that become control tokens: a list, or `{category: column}`.
    like
        A model, a vocabulary or a model directory: use its vocabulary, matching genes by name. The arguments that would shape a
        new vocabulary are ignored then.
    n_genes
        Number of highly variable genes to use where `var[mask_var]` does not say which; not for `"rank"`.
    mask_var
        Boolean column of `var` that marks the genes to use; `None` ignores it.
    bins
        How values become bins: a rule (`"linear"`, `"quantile"`, `"quantile_per_gene"`, `"quantile_per_cell"`, `"log2"` on
        counts, `"polygene"`, `"perturbgene"`), a list of edges, or a `Bins`. By default linear, for `"gene_bins"` log2.
    n_bins
        Number of bins above zero, for the rules that leave it open.
    threshold
        Smallest log1p value that counts as expressed, for `"binary"`.
    zeros
        `"drop"`: a gene that is not expressed has no token. `"keep"`: it has the token of bin 0.
    layout
        Special tokens of `"rank"`: scbin's, or those of Geneformer V1, V2 or BioNeMo.
    max_length
        Longest row in tokens; the genes with the largest values are kept.
    medians
        Median of each gene for `"rank"`; fitted from the data by default.
    age_groups
        Cut ages (`age` or `development_stage`) into classes of so many years; by default their text is the label. The
        vocabulary remembers it for new data.
    case
        `"upper"` compares gene names in upper case.
    duplicates
        What to do where several columns are one gene.
    force
        Go on where less than 20 % of the counts are in the vocabulary of `like`.
    key_added
        Name in `obsm` instead of `"X_tokens"`; the entries of `uns` then have `_` and this name behind theirs. Pass it on as
        `tokens_key=`.
    copy
        Return a changed copy instead of changing `adata`.

    Returns
    -------
    `None` if `copy=False`, else an `AnnData`. Sets the following fields:

    `adata.obsm["X_tokens"]`
        Token ids, CSR (cells, positions).
    `adata.obs["scbin_status"]`
        "ok", or why a cell has no tokens: "empty" or "no_vocab_gene".
    `adata.uns["scbin"]["vocabulary"]`
        What the ids and positions mean, as JSON.
    `adata.uns["scbin"]["tokenize"]`
        What the matrix was taken for, and how the genes matched, as JSON.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.pp.tokenize(adata, phenotypes={"cell_type": "bulk_labels"})
    >>> adata.obsm["X_tokens"].shape
    (700, 769)
    """
    check_adata(adata)
    flags(copy=copy)
    fit = Fit(encoding, bins, n_bins, threshold, zeros, n_genes, mask_var, layout, max_length, medians)
    options = Options(values, layer, gene_key, phenotypes, age_groups, case, duplicates, force)
    key = _tokens_key(adata, key_added)
    plan = prepare(adata, like, fit, options)
    result = plan.finish(list(plan.encode()))
    target = copied(adata) if copy else adata
    make_real(target)
    write_obsm(target, key, result.tokens)
    write_obs(target, _keys.STATUS, result.status)
    write_uns(target, _keys.of_tokens(_keys.VOCABULARY, key), plan.vocabulary.to_json())
    write_uns(target, _keys.of_tokens(_keys.TOKENIZE, key), json.dumps(result.record))
    for line in result.lines:
        logger.info(line)
    return target if copy else None


def _tokens_key(adata: AnnData, key_added: str | None) -> str:
    """Return the slot for the tokens, if it may be written."""
    key = _keys.TOKENS if key_added is None else key_added
    check_writable(adata, "obsm", key)
    if key.startswith((_keys.EMBEDDING, "X_umap_", "scbin_")):
        raise ScbinInputError(
            "A04", f"key_added={key!r} is where embeddings stand. Choose another name for the tokens."
        )
    return key


def iter_tokens(
    adata: AnnData,
    *,
    like: Any,
    values: Values = "auto",
    layer: str | None = None,
    gene_key: str | None = None,
    phenotypes: Sequence[str] | Mapping[str, str] | str | None = None,
    case: Literal["exact", "upper"] = "exact",
    duplicates: Literal["sum", "error"] = "sum",
    force: bool = False,
) -> Iterator[sparse.csr_matrix]:
    """Yield the tokens of consecutive row blocks, for data whose tokens do not fit into memory.

    The matrix is read once; that it holds what its first block holds is checked on the way, and an error raised after some
    blocks means that they must not be used. Nothing is written to `adata`.

    Parameters
    ----------
    adata
        Cells by genes, in memory, backed or with a dask matrix.
    like
        A model or a vocabulary.
    values, layer, gene_key, phenotypes, case, duplicates, force
        As for `tokenize`.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.pp.tokenize(adata)
    >>> vocabulary = scbin.Vocabulary.from_json(adata.uns["scbin"]["vocabulary"])
    >>> [part.shape for part in scbin.pp.iter_tokens(adata, like=vocabulary)]
    [(700, 768)]
    """
    check_adata(adata)
    options = Options(values, layer, gene_key, phenotypes, None, case, duplicates, force)
    for part in stream(adata, like, options):
        yield part.tokens
