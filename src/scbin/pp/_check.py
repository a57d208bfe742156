"""Say what an AnnData holds and what tokenizing would do, without doing it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pandas as pd

from scbin._anndata import check_adata
from scbin._arguments import flags
from scbin._errors import ScbinInputError, ScbinInputWarning, count
from scbin.pp._fit import Fit
from scbin.pp._plan import Options, prepare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

    from scbin.encoding.values import Values
    from scbin.encoding.vocabulary import Encoding


def check(
    adata: AnnData,
    *,
    encoding: Encoding = "bins",
    values: Values = "auto",
    layer: str | None = None,
    gene_key: str | None = None,
    phenotypes: Sequence[str] | Mapping[str, str] | str | None = None,
    like: Any = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """Print what was found in an AnnData and what `tokenize` would make of it.

    Call it first on data you do not know. Nothing is changed; what would be an error is a row of the table.

    Parameters
    ----------
    adata
        Cells by genes.
    encoding, values, layer, gene_key, phenotypes, like
        As for `tokenize`.
    quiet
        Only return the table.

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
    flags(quiet=quiet)
    fit = Fit(encoding=encoding)
    options = Options(values, layer, gene_key, phenotypes)
    rows: list[tuple[str, str, str]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_adata(adata)
            plan = prepare(adata, like, fit, options)
            result = plan.finish(list(plan.encode()))
            rows += [("ok", "", line.removeprefix("scbin: ")) for line in result.lines]
            rows.append(("ok", "", repr(plan.vocabulary)))
            if like is not None:
                shares = (result.record["overlap_counts"], result.record["overlap_genes"])
                rows.append(("ok", "", "in the vocabulary: {:.0%} of the counts, {:.0%} of the genes.".format(*shares)))
        except ScbinInputError as error:
            rows.append(("error", error.code, str(error).split("] ", 1)[-1]))
    found = [w.message for w in caught if isinstance(w.message, ScbinInputWarning)]
    rows += [("warning", message.code, str(message).split("] ", 1)[-1]) for message in found]
    table = pd.DataFrame(rows, columns=["kind", "code", "finding"])
    if not quiet:
        shape = f"{count(adata.n_obs, 'cell')} x {count(adata.n_vars, 'gene')}" if hasattr(adata, "n_obs") else ""
        print(shape or type(adata).__name__)
        for kind, code, finding in rows:
            print(f"  {kind:8}{code:5}{finding}")
    return table
