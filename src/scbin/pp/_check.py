"""Say what an AnnData holds and what tokenizing would do, without doing it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pandas as pd

from scbin._adata import check_adata
from scbin._arguments import checked
from scbin._errors import ScbinInputError, ScbinInputWarning, count
from scbin.pp._plan import Request, prepare

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def check(adata: AnnData, *, quiet: bool = False, **arguments: Any) -> pd.DataFrame:
    """Print what was found in an AnnData and what :func:`scbin.pp.tokenize` would make of it.

    Call it first on data you do not know. Nothing is changed; what would be an error is a row of the table.

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
            check_adata(adata)
            plan = prepare(adata, request)
            _, _, record, lines = plan.finish(list(plan.encode()))
            rows += [("ok", "", line.removeprefix("scbin: ")) for line in (*lines, repr(plan.vocabulary))]
            if "overlap_genes" in record:
                counts, genes = record["overlap_counts"], record["overlap_genes"]
                rows.append(("ok", "", f"in the vocabulary: {counts:.0%} of the counts, {genes:.0%} of the genes."))
        except ScbinInputError as error:
            rows.append(("error", error.code, error.message))
    found = [w.message for w in caught if isinstance(w.message, ScbinInputWarning)]
    rows += [("warning", message.code, message.message) for message in found]
    if not quiet:
        shape = f"{count(adata.n_obs, 'cell')} x {count(adata.n_vars, 'gene')}" if hasattr(adata, "n_obs") else ""
        print(shape or type(adata).__name__)
        for kind, code, finding in rows:
            print(f"  {kind:8}{code:5}{finding}")
    return pd.DataFrame(rows, columns=["kind", "code", "finding"])
