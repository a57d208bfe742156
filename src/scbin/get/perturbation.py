"""What perturbations did, one row per gene or pair of genes."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from scbin import _keys
from scbin._arguments import checked
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from anndata import AnnData

SIGNIFICANT = 0.05
# Geneformer's columns, made of ours, by the column (or the goal) that tells what a table is
_GENE = "Gene=gene Gene_name=gene Ensembl_ID=gene_id"
_GENEFORMER = {
    "difference": f"{_GENE} Test_avg_shift=shift Null_avg_shift=null_shift Test_vs_null_avg_shift=difference "
    "Test_vs_null_pval=p_value Test_vs_null_FDR=fdr N_Detections_test=n_cells N_Detections_null=n_cells_null Sig=1*(fdr<.05)",
    "impact": f"{_GENE} Test_avg_shift=1-shift Impact_component=1*impact Impact_component_percent=100*impact_share "
    "N_Detections=n_cells",
    "affected": "Perturbed=perturbed Gene_name=perturbed Ensembl_ID=perturbed_id Affected=affected Affected_gene_name=affected "
    "Affected_Ensembl_ID=affected_id Cosine_sim_mean=1-shift N_Detections=n_cells",
    "goal": f"{_GENE} Shift_to_goal_end=shift Goal_end_vs_random_pval=p_value Goal_end_FDR=fdr N_Detections=n_cells Sig=1*(fdr<.05)",
    "combined_minus_sum": "Anchor=anchor Anchor_name=anchor Anchor_Ensembl_ID=anchor_id "
    f"{_GENE} Anchor_shift=1-anchor_shift Test_token_shift=1-gene_shift Sum_of_indiv_shifts=1-anchor_shift-gene_shift "
    "Combo_shift=1-shift Combo_minus_sum_shift=-combined_minus_sum N_Detections=n_cells",
    "gene": f"{_GENE} Test_avg_shift=1-shift N_Detections=n_cells",
}


@checked
def perturb_df(
    adata: AnnData,
    *,
    key: str | None = None,
    min_cells: int = 5,
    style: Literal["scbin", "geneformer"] = "scbin",
) -> pd.DataFrame:
    """Return the table of an in silico perturbation.

    If there is a goal, genes are sorted by how directly they move cells there (`alignment`), else by `effect_size` or `shift`.
    Affected genes are not sorted.

    Parameters
    ----------
    adata
        Cells after `scbin.tl.perturb`.
    key
        Entry of `uns`. Default: `"scbin_perturb"`.
    min_cells
        Leave out rows with fewer cells, which are often extreme by chance.
    style
        `"geneformer"` uses the column names of Geneformer's statistics: shifts to a goal as they are, else cosines (1 is no
        effect). Ensembl ids come from `adata.var["ensembl_id"]`, if there are any.

    Returns
    -------
    A copy of the table. See :doc:`/perturbation` for its columns; `attrs["what"]` says what it is.

    Raises
    ------
    ScbinInputError
        If there is no such table.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> table = pandas.DataFrame({"gene": ["A", "B", "C"], "n_cells": [9, 7, 1], "shift": [0.01, 0.04, 0.9]})
    >>> adata.uns["scbin_perturb"] = {"table": table, "params": "{}"}
    >>> scbin.get.perturb_df(adata)["gene"].tolist()
    ['B', 'A']
    """
    table, params = read_perturbation(adata, key)
    table = table[table["n_cells"] >= min_cells] if "n_cells" in table else table
    order = () if "affected" in table else ("alignment", "effect_size", "difference", "shift")
    sort_by = [name for name in order if name in table and table[name].notna().any()][:1]
    if sort_by:
        table = table.sort_values(sort_by, ascending=False, kind="stable")
    table = table.reset_index(drop=True)
    table.attrs["what"] = "association shift of a network that has seen no perturbation"
    return table if style == "scbin" else _geneformer(table, params, adata)


def _geneformer(table: pd.DataFrame, params: dict[str, Any], adata: AnnData) -> pd.DataFrame:
    """Put a table under Geneformer's names."""
    if params.get("level", "cell") not in ("cell", "gene"):
        raise ScbinInputError("A03", f"Geneformer has no table for level={params['level']!r}. Use style='scbin'.")
    tells = {*table} | ({"goal"} if params.get("goal") else set())
    kind = next(name for name in _GENEFORMER if name in tells)
    names = dict(each.split("=") for each in _GENEFORMER[kind].split())
    for state in [name[9:] for name in table if name.startswith("shift_to_") and name != "shift_to_start"]:
        ours = {"Shift_to_alt_end": "shift_to", "Alt_end_vs_random_pval": "p_value", "Alt_end_FDR": "fdr"}
        names |= {f"{new}_{state}": f"`{old}_{state}`" for new, old in ours.items() if f"{old}_{state}" in table}
    if kind == "combined_minus_sum":
        table[["anchor", "gene"]] = table["gene"].str.split(",", expand=True)
    ids = dict(zip(adata.var_names, adata.var.get("ensembl_id", adata.var_names), strict=True))
    for column in {"gene", "anchor", "perturbed", "affected"} & {*table}:
        table[f"{column}_id"] = [",".join(ids.get(part, part) for part in name.split(",")) for name in table[column]]
    return pd.DataFrame({new: table.eval(old) for new, old in names.items()})


def read_perturbation(adata: AnnData, key: str | None = None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a copy of the table and the parameters of a perturbation."""
    key = _keys.PERTURB if key is None else key
    entry = adata.uns.get(key)
    table: Any = entry.get("table") if hasattr(entry, "get") else None
    with suppress(ValueError):
        params = json.loads(str(entry.get("params", "{}"))) if isinstance(table, pd.DataFrame) else None
        if isinstance(params, dict):
            return table.copy(), params
    found = f"adata.uns[{key!r}] holds no perturbation that scbin wrote"
    raise ScbinInputError("A06", f"{found}. Run scbin.tl.perturb(adata, model) first.")
