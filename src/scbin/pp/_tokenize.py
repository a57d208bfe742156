"""`pp.tokenize` and `pp.check`: cells into tokens."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import pandas as pd
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, write_tokens, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinError, ScbinInputError, ScbinInputWarning, count
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

    The matrix may hold raw counts or log1p values; which of the two is inferred from the values. Log1p values that can be turned
    back into counts exactly are read as counts. The matrix is read in blocks of rows, which may be backed or dask arrays, and
    does not change.

    Parameters
    ----------
    adata
        Cells by genes; or files, see :func:`scbin.open_tokens` for how to name them. Files are read in blocks, so they need not
        fit into memory. Their genes are joined by name, and one vocabulary is made from all cells.
    out
        For files: the folder for the files with tokens, which keep their names, or a pattern with `{}` for the name, such as
        `"corpus/{}.zarr"`. They have obs, var and tokens, but not the matrix. Existing files are not made again, so repeat an
        interrupted call to continue it.
    encoding
        What a token means: the amount of a gene (`"bins"`), whether a gene is expressed (`"binary"`), the gene at a rank
        (`"rank"`), or gene and amount (`"gene_bins"`).
    rule
        How values become bins. `"counts"`, the default for `"bins"` where counts are known: one molecule is bin 1, two are bin
        2, exact to 16, then in steps of 15 %. `"linear"`, the default else: bins of log1p values. `"log2"`, the default for
        `"gene_bins"`: counts, as Bioformers. Also `"quantile"`, `"quantile_per_gene"`, `"quantile_per_cell"`, `"polygene"`,
        `"perturbgene"`, a list of edges, or a `Bins`.
    phenotypes
        Columns of `obs` that become control tokens: a list, or `{category: column}`.
    like
        A model, a vocabulary or a model directory, whose vocabulary is used. Genes are matched by name, and arguments for a new
        vocabulary are ignored.
    {layer}
    values
        What the matrix holds: `"counts"` or `"log1p"`; `"auto"` decides from the values.
    gene_key
        Column of `var` with the gene names; `var_names` by default.
    n_genes
        Number of highly variable genes to use; not for `"rank"`. They are chosen by Pearson residuals, as
        :func:`scanpy.experimental.pp.highly_variable_genes` does, where counts are known, else by dispersion.
    mask_var
        Boolean column of `var` with the genes to use instead of the most variable ones, such as scanpy's `"highly_variable"`.
    tokenization
        Further options, see :class:`scbin.Tokenization`.
    key_added
        Name in `obsm` instead of `"X_tokens"`, which is also appended to the names of the vocabulary in `obs` and `uns`;
        `obs["scbin_status"]` is that of the last call. Pass it to other functions as `tokens_key=`.
    workers
        Number of processes that tokenize files in parallel.
    client
        A `dask.distributed.Client` whose workers tokenize the files; they need the files under the same paths. Needs
        `scbin[dask]`.
    {copy}

    Returns
    -------
    For files, the paths of the files written, each an AnnData with the fields below. Otherwise:

    {returns_copy}

    `adata.obsm["X_tokens"]`
        Token ids, CSR (cells, positions).
    `adata.obs["scbin_status"]`
        "ok", or why the cell has no tokens: "empty" or "no_vocab_gene".
    `adata.obs["scbin_vocabulary"]`
        Fingerprint of the vocabulary, which stays with each cell through `anndata.concat` and subsetting.
    `adata.uns["scbin"]["vocabulary"]`
        The vocabulary, as JSON.
    `adata.uns["scbin"]["tokenize"]`
        The unit of the matrix and how the genes matched, as JSON.

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
    blocks = tqdm(plan.encode(), desc="tokenizing", unit="block", disable=None)  # a bar in terminals
    tokens = sparse.vstack(list(blocks), format="csr")
    status, record = plan.finish()
    warn_without_tokens(status)
    target = copied(adata) if copy else adata
    write_tokens(target, tokens, plan.vocabulary, status, key)
    write_uns(target, _keys.of_tokens(_keys.TOKENIZE, key), record)
    for line in plan.lines(tokens.nnz, record):
        logger.info(f"scbin: {line}")
    return target if copy else None


# ---- the check ------------------------------------------------------------------------------------------------------


@checked
def check(adata: AnnData, *, quiet: bool = False, **arguments: Any) -> pd.DataFrame:
    """Check an AnnData, and print what :func:`scbin.pp.tokenize` would do with it.

    Call it first on new data. Nothing is changed, and errors of the data are rows of the table.

    Parameters
    ----------
    adata
        Cells by genes.
    quiet
        Only return the table.
    **arguments
        Those of :func:`scbin.pp.tokenize` that shape the tokens, such as `encoding`, `layer`, `phenotypes` or `like`.

    Returns
    -------
    A table with the columns `kind` ("ok", "warning", "error"), `code` and `finding`.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> table = scbin.pp.check(adata, phenotypes={"cell_type": "bulk_labels"}, quiet=True)
    >>> table["kind"].unique().tolist()
    ['ok']
    """
    request = Request(**arguments)
    rows: list[tuple[str, str, str]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            plan = prepare(check_adata(adata), request)
            n_tokens = sum(part.nnz for part in plan.encode())
            status, record = plan.finish()
            warn_without_tokens(status)
            rows += [("ok", "", line) for line in (*plan.lines(n_tokens, record), repr(plan.vocabulary))]
        except ScbinError as error:
            rows.append(("error", error.code, error.message))
    found = [w.message for w in caught if isinstance(w.message, ScbinInputWarning)]
    table = pd.DataFrame(rows + [("warning", w.code, w.message) for w in found], columns=["kind", "code", "finding"])
    if not quiet:
        print(f"{count(adata.n_obs, 'cell')} x {count(adata.n_vars, 'gene')}" if hasattr(adata, "n_obs") else adata)
        for kind, code, finding in table.itertuples(index=False):
            print(f"  {kind:8}{code:5}{finding}")
    return table
