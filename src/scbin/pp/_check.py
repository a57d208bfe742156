"""Say what an AnnData holds and what tokenizing would do, without doing it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pandas as pd

from scbin._adata import check_adata
from scbin._arguments import checked
from scbin._errors import ScbinInputError, ScbinInputWarning, count
from scbin.pp._plan import Request, prepare, warn_without_tokens

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def check(adata: AnnData, *, quiet: bool = False, **arguments: Any) -> pd.DataFrame:
    """Check an AnnData, and print what :func:`scbin.pp.tokenize` would do with it.

    Call it first on new data. Nothing is changed, and errors are rows of the table.

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
        except ScbinInputError as error:
            rows.append(("error", error.code, error.message))
    found = [w.message for w in caught if isinstance(w.message, ScbinInputWarning)]
    table = pd.DataFrame(rows + [("warning", w.code, w.message) for w in found], columns=["kind", "code", "finding"])
    if not quiet:
        print(f"{count(adata.n_obs, 'cell')} x {count(adata.n_vars, 'gene')}" if hasattr(adata, "n_obs") else adata)
        for kind, code, finding in table.itertuples(index=False):
            print(f"  {kind:8}{code:5}{finding}")
    return table
