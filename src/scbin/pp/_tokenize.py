"""Turn cells into tokens."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, write_tokens, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.io.corpus import is_paths
from scbin.pp._files import tokenize_files
from scbin.pp._plan import Request, prepare, warn_without_tokens

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from scbin.io.corpus import Paths
    from scbin.tokens.rules import Bins, Rule, Tokenization
    from scbin.tokens.values import Values

logger = logging.getLogger(__name__)


@_docs.shared
@checked
def tokenize(
    adata: AnnData | Paths,
    *,
    out: str | os.PathLike[str] | None = None,
    encoding: str = "bins",
    rule: Bins | Sequence[float] | Rule | None = None,
    phenotypes: Sequence[str] | Mapping[str, str] | str | None = None,
    like: Any = None,
    layer: str | None = None,
    values: Values = "auto",
    gene_key: str | None = None,
    n_genes: int = 2000,
    mask_var: str | None = None,
    tokenization: Tokenization | None = None,
    key_added: str | None = None,
    workers: int = 1,
    client: Any = None,
    copy: bool = False,
) -> AnnData | list[Path] | None:
    """Turn each cell into a row of tokens, ready for a model.

    Call it on raw counts or on log1p values; which of the two the matrix holds is found out from its values and said in one
    line. Log1p values from which the counts can be had back exactly are read as counts. The matrix itself is only read, by
    blocks of rows, so backed and dask data stream.

    Parameters
    ----------
    adata
        Cells by genes; or files of them, see :func:`scbin.open_tokens` for how they can be named. Files are read by blocks, so they need
        not fit into memory. Their genes are united by name; a vocabulary is made from all cells.
    out
        For files: the folder to write files with tokens to, under the same names, or a name with `{}` in it for that of each file,
        `"corpus/{}.zarr"`. They have obs, var and tokens, not the matrix. A file that is there is not made again, so a call that was
        interrupted is repeated to continue.
    encoding
        What a token says: `"bins"` how much of a gene, `"binary"` whether a gene is expressed, `"rank"` which gene comes
        at this rank of the cell, `"gene_bins"` gene and amount jointly.
    rule
        How values become bins. `"counts"`, the default for `"bins"` where counts are known: one molecule is bin 1, two are bin
        2, exact to 16, then in steps of 15 %. `"linear"`, the default else: bins of log1p values. `"log2"`, the default for
        `"gene_bins"`: counts, as Bioformers. Also `"quantile"`, `"quantile_per_gene"`, `"quantile_per_cell"`, `"polygene"`,
        `"perturbgene"`, a list of edges, or a `Bins`.
    phenotypes
        Columns of `obs` that become control tokens: a list, or `{category: column}`.
    like
        A model, a vocabulary or a model directory: use its vocabulary, matching genes by name. The arguments that would shape a
        new vocabulary are ignored then.
    {layer}
    values
        What the matrix holds: `"counts"` or `"log1p"`; `"auto"` decides from the values.
    gene_key
        Column of `var` with the gene names; `var_names` by default.
    n_genes
        Number of highly variable genes to use; not for `"rank"`. They are chosen by Pearson residuals, as
        :func:`scanpy.experimental.pp.highly_variable_genes` does, where counts are known, else by dispersion.
    mask_var
        Boolean column of `var` that marks the genes to use instead of the most variable ones, such as `"highly_variable"`, which
        all of scanpy's rules write.
    tokenization
        Finer choices, see :class:`scbin.Tokenization`.
    key_added
        Name in `obsm` instead of `"X_tokens"`; the entries of `obs` and `uns` then have `_` and this name behind theirs. Pass it
        on as `tokens_key=`.
    workers
        Processes that tokenize files side by side.
    client
        A `dask.distributed.Client`, whose workers then do it; they have to see the files under the same paths. Needs `scbin[dask]`.
    {copy}

    Returns
    -------
    For files the paths of those written, each an AnnData with the fields below. Else:

    {returns_copy}

    `adata.obsm["X_tokens"]`
        Token ids, CSR (cells, positions).
    `adata.obs["scbin_status"]`
        "ok", or why a cell has no tokens: "empty" or "no_vocab_gene".
    `adata.obs["scbin_vocabulary"]`
        Fingerprint of the vocabulary, which stays with each cell when tables are joined or cut.
    `adata.uns["scbin"]["vocabulary"]`
        What the ids and positions mean, as JSON.
    `adata.uns["scbin"]["tokenize"]`
        What the matrix was taken for, and how the genes matched, as JSON.

    Raises
    ------
    ScbinInputError
        If the matrix cannot be read as counts or log1p values, genes do not match, or an argument is out of range.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.pp.tokenize(adata, phenotypes={"cell_type": "bulk_labels"})
    >>> adata.obsm["X_tokens"].shape
    (700, 770)
    """
    asked = Request(encoding, rule, phenotypes, like, layer, values, gene_key, n_genes, mask_var, tokenization)
    key, files = _keys.TOKENS if key_added is None else key_added, is_paths(adata)
    if not files and out is not None:
        raise ScbinInputError("A03", "out= is for files; tokens of an AnnData go into its obsm.")
    check_writable(AnnData() if files else check_adata(adata), "obsm", key)
    if not isinstance(adata, AnnData):
        return tokenize_files(adata, out, key, asked, workers, client)
    plan = prepare(adata, asked)
    none = sparse.csr_matrix((0, plan.vocabulary.n_positions), dtype=plan.vocabulary.dtype)
    blocks = tqdm(plan.encode(), desc="tokenizing", unit="block", disable=None)  # a bar in terminals
    tokens = sparse.vstack([none, *blocks], format="csr")
    status, record = plan.finish()
    warn_without_tokens(status)
    target = copied(adata) if copy else adata
    write_tokens(target, tokens, plan.vocabulary, status, key)
    write_uns(target, _keys.of_tokens(_keys.TOKENIZE, key), json.dumps(record))
    for line in plan.lines(tokens.nnz, record):
        logger.info(f"scbin: {line}")
    return target if copy else None
