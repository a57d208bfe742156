"""What perturbations did, one row per gene or pair of genes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from scbin import _keys
from scbin._arguments import checked
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

SIGNIFICANT = 0.05
RISING = ("p_value", "fdr", "gene", "perturbed", "affected", "group")


@checked
def perturb_df(
    adata: AnnData,
    *,
    key: str | None = None,
    group: str | None = None,
    sort_by: str | None = "auto",
    min_cells: int = 5,
    style: Literal["scbin", "geneformer"] = "scbin",
) -> pd.DataFrame:
    """Return the table of an in silico perturbation.

    Parameters
    ----------
    adata
        Cells after `scbin.tl.perturb`.
    key
        Entry of `uns`. Default: `"scbin_perturb"`.
    group
        Only the rows of this group of cells, where the perturbation was made by groups.
    sort_by
        Column to sort by, the largest first (p values, FDR and names: the smallest). Missing values come last. `"auto"`: how
        straight a gene moves cells to the goal (`alignment`) where there is a goal, else its `effect_size`, else its `shift`;
        affected genes stay in their order. `None`: as stored.
    min_cells
        Leave out rows that rest on fewer cells: a gene seen in one or two is often the most extreme by chance.
    style
        `"geneformer"` gives the columns that Geneformer's statistics write, under their names: shifts to states as they are, and
        cosines instead of shifts where it reports those (a cosine of 1 is no effect).

    Returns
    -------
    A copy of the table. See :doc:`/perturbation` for its columns; `attrs["what"]` says what it is.

    Raises
    ------
    ScbinInputError
        If there is no such table, group or column.

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
    if group is not None:
        groups = table["group"].astype(str) if "group" in table.columns else pd.Series("", index=table.index)
        if group not in set(groups):
            known = ", ".join(map(repr, dict.fromkeys(groups)))
            raise ScbinInputError("A06", f"the table has no group {group!r}. It has: {known}.")
        table = table[groups == group]
    if sort_by == "auto":
        order = () if "affected" in table.columns else ("alignment", "effect_size", "shift")
        sort_by = next((name for name in order if name in table.columns and table[name].notna().any()), None)
    if sort_by not in (None, *table.columns):
        known = ", ".join(map(repr, table.columns))
        raise ScbinInputError("A06", f"the table has no column {sort_by!r}; it has {known}.")
    if "n_cells" in table.columns:
        table = table[table["n_cells"] >= min_cells]
    if sort_by is not None:
        table = table.sort_values(sort_by, ascending=sort_by in RISING, kind="stable", na_position="last")
    table = table.reset_index(drop=True)
    table.attrs["what"] = "association shift of a network that has seen no perturbation"
    return table if style == "scbin" else _geneformer(table, params, adata)


def read_perturbation(adata: AnnData, key: str | None = None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a copy of the table and the parameters of a perturbation."""
    key = _keys.PERTURB if key is None else key
    entry = adata.uns.get(key)
    table = entry.get("table") if hasattr(entry, "get") else None
    if not isinstance(table, pd.DataFrame):
        raise ScbinInputError(
            "A06", f"adata.uns[{key!r}] holds no table of a perturbation. Run scbin.tl.perturb(adata, model) first."
        )
    try:
        params = json.loads(str(entry.get("params", "{}")))
    except ValueError:
        params = None
    if not isinstance(params, dict):
        raise ScbinInputError("A04", f"adata.uns[{key!r}]['params'] is not what scbin wrote there. Perturb again.")
    return table.copy(), params


def pairs_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of genes that were perturbed two by two ("A,B") with both apart; any other table as it is."""
    parts = table.get("gene", pd.Series(dtype=object)).astype(str).str.split(",")
    if not len(parts) or (parts.str.len() != 2).any():
        return table
    return table.assign(anchor=parts.str[0], partner=parts.str[1], combined_shift=table["shift"])


# ---- Geneformer's columns -------------------------------------------------------------------------------------------


def _geneformer(table: pd.DataFrame, params: Mapping[str, Any], adata: AnnData) -> pd.DataFrame:
    """Put a table under the names that Geneformer gives; which statistic it is, its columns say.

    Without a goal Geneformer reports cosines, 1 - shift: the names of such columns are marked with a minus.
    """
    if params.get("level", "cell") not in ("cell", "gene"):
        raise ScbinInputError("A03", f"Geneformer has no table for level={params['level']!r}. Use style='scbin'.")
    genes, goal = {"gene": ("Gene", "Gene_name", "Ensembl_ID")}, params.get("goal") is not None
    if "combined_minus_sum" in table.columns and not goal:
        table = pairs_of(table).assign(combined_minus_sum=-table["combined_minus_sum"])
        genes = {"anchor": ("Anchor", "Anchor_name", "Anchor_Ensembl_ID"), "partner": genes["gene"]}
        names = {"-Anchor_shift": "anchor_shift", "-Test_token_shift": "gene_shift", "-Combo_shift": "combined_shift"}
        names |= {"-Sum_of_indiv_shifts": "sum_of_shifts", "Combo_minus_sum_shift": "combined_minus_sum"}
    elif "affected" in table.columns:
        genes = {"perturbed": ("Perturbed", "Gene_name", "Ensembl_ID")}
        genes["affected"] = ("Affected", "Affected_gene_name", "Affected_Ensembl_ID")
        names = {"-Cosine_sim_mean": "shift", "Cosine_sim_stdev": "sd"}
    elif "difference" in table.columns:
        names = {"Test_avg_shift": "shift", "Null_avg_shift": "null_shift", "Test_vs_null_avg_shift": "difference"}
        names |= {"Test_vs_null_pval": "p_value", "Test_vs_null_FDR": "fdr"}
        names |= {"N_Detections_test": "n_cells", "N_Detections_null": "n_cells_null"}
    elif "impact" in table.columns:
        table = table.assign(impact=table["impact"].astype(int), impact_share=100 * table["impact_share"])
        names = {"-Test_avg_shift": "shift", "Impact_component": "impact", "Impact_component_percent": "impact_share"}
    elif goal:
        others = [name[9:] for name in table.columns if name.startswith("shift_to_") and name != "shift_to_start"]
        names = {"Shift_to_goal_end": "shift", **{f"Shift_to_alt_end_{name}": f"shift_to_{name}" for name in others}}
        names |= {"Goal_end_vs_random_pval": "p_value"}
        names |= {f"Alt_end_vs_random_pval_{name}": f"p_value_{name}" for name in others} | {"Goal_end_FDR": "fdr"}
        names |= {f"Alt_end_FDR_{name}": f"fdr_{name}" for name in others}
    else:
        names = {"-Test_avg_shift": "shift", "Test_vs_random_pval": "p_value", "Test_vs_random_FDR": "fdr"}
    names |= {} if "difference" in table.columns else {"N_Detections": "n_cells"}
    frame = pd.concat([_named(table[column].astype(str), adata, titles) for column, titles in genes.items()], axis=1)
    for new, old in names.items():
        if old in table.columns:
            frame[new.removeprefix("-")] = 1 - table[old] if new.startswith("-") else table[old]
    if "fdr" in names.values() and "fdr" in table.columns:
        frame["Sig"] = (table["fdr"] < SIGNIFICANT).astype(int)
    return frame


def _named(genes: pd.Series, adata: AnnData, titles: tuple[str, str, str]) -> pd.DataFrame:
    """Return gene, symbol and Ensembl id, as far as `adata.var` tells; several genes in one row are joined by commas."""
    frame = pd.DataFrame({titles[0]: genes.astype(object)})
    symbols = ("gene_symbol", "gene_symbols", "feature_name", "gene_name")
    for title, candidates in zip(
        titles[1:], (symbols, ("ensembl_id", "gene_ids", "gene_id", "feature_id")), strict=True
    ):
        found = next((name for name in candidates if name in adata.var.columns), None)
        of = {} if found is None else dict(zip(adata.var_names, adata.var[found].astype(str), strict=True))
        frame[title] = [",".join(of.get(part, part) for part in name.split(",")) for name in genes]
    return frame
