"""`get.perturb_df`: what perturbations did, one row per gene or pair of genes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

SIGNIFICANT = 0.05
RISING = ("p_value", "fdr", "permutation_p_value", "gene", "anchor", "perturbed", "affected", "group")


def perturb_df(
    adata: AnnData,
    *,
    key: str | None = None,
    group: str | None = None,
    sort_by: str | None = "shift",
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
        Column to sort by, the largest first (p values, FDR and names: the smallest). Missing values come last; equal ones stay
        in the order of the genes. `None`: as stored. Where the column is absent (pairs, affected genes) rows stay as stored.
    style
        `"geneformer"` gives the columns that Geneformer's statistics write, under their names: shifts to states as they are, and
        cosines instead of shifts where it reports those (a cosine of 1 is no effect).

    Returns
    -------
    A copy of the table. See :doc:`/perturbation` for its columns.

    Raises
    ------
    ScbinInputError
        If there is no such table, group or column.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> table = pandas.DataFrame({"gene": ["A", "B"], "n_cells": [9, 7], "shift": [0.01, 0.04]})
    >>> adata.uns["scbin_perturb"] = {"table": table, "params": "{}"}
    >>> scbin.get.perturb_df(adata)["gene"].tolist()
    ['B', 'A']
    """
    table, params = read_perturbation(adata, key)
    if group is not None:
        table = _of_group(table, group)
    if style not in ("scbin", "geneformer"):
        raise ScbinInputError("P69", f"style is {style!r}; choose 'scbin' or 'geneformer'.")
    if sort_by is not None and sort_by not in table.columns and sort_by != "shift":
        known = ", ".join(map(repr, table.columns))
        raise ScbinInputError("P58", f"the table has no column {sort_by!r}. Available: {known}.")
    if sort_by in table.columns:
        table = table.sort_values(sort_by, ascending=sort_by in RISING, kind="stable", na_position="last")
    table = table.reset_index(drop=True)
    return table if style == "scbin" else _geneformer(table, params, adata)


def read_perturbation(adata: AnnData, key: str | None = None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a copy of the table and the parameters of a perturbation."""
    key = _keys.PERTURB if key is None else key
    entry = adata.uns.get(key)
    table = entry.get("table") if hasattr(entry, "get") else None
    if not isinstance(table, pd.DataFrame):
        raise ScbinInputError(
            "P57",
            f"adata.uns[{key!r}] holds no table of a perturbation. Run scbin.tl.perturb(adata, model) first.",
        )
    params = json.loads(str(entry.get("params", "{}")))
    return table.copy(), params if isinstance(params, dict) else {}


def pairs_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of genes that were perturbed two by two ("A,B") as one of pairs; any other table as it is."""
    if "anchor" in table.columns or "gene" not in table.columns:
        return table
    parts = table["gene"].astype(str).str.split(",")
    if len(table) == 0 or not (parts.str.len() == 2).all():
        return table
    pairs = table.assign(anchor=parts.str[0].astype(object), gene=parts.str[1].astype(object))
    return pairs if "combined_shift" in pairs.columns else pairs.assign(combined_shift=pairs["shift"])


def _of_group(table: pd.DataFrame, group: str) -> pd.DataFrame:
    if "group" not in table.columns:
        raise ScbinInputError("P70", f"group={group!r}, but the perturbation was not made by groups of cells.")
    groups = table["group"].astype(str)
    if not (groups == str(group)).any():
        known = ", ".join(repr(name) for name in dict.fromkeys(groups))
        raise ScbinInputError("P71", f"the table has no group {group!r}. It has: {known}.")
    return table[(groups == str(group)).to_numpy()]


# ---- Geneformer's columns -------------------------------------------------------------------------------------------


def _geneformer(table: pd.DataFrame, params: Mapping[str, Any], adata: AnnData) -> pd.DataFrame:
    """Put a table under the names that Geneformer gives; which statistic it is, its columns say."""
    columns = set(table.columns)
    readout = params.get("readout", "embedding")
    if readout != "embedding":
        raise ScbinInputError(
            "P72", f"Geneformer has no table for effects on the {readout} that a model predicts. Use style='scbin'."
        )
    if {"anchor", "combined_shift"} <= columns:
        return _pairs(table, adata)
    if {"perturbed", "affected"} <= columns:
        return _affected(table, adata)
    names = _named(table["gene"], adata)
    cosine = 1 - table["shift"]
    if "difference" in columns:
        result = {
            "Test_avg_shift": table["shift"],
            "Null_avg_shift": table["null_shift"],
            "Test_vs_null_avg_shift": table["difference"],
            "Test_vs_null_pval": table["p_value"].fillna(1.0),
            "Test_vs_null_FDR": table["fdr"].fillna(1.0),
            "N_Detections_test": table["n_cells"],
            "N_Detections_null": table["n_cells_null"],
        }
        return _significant(names.assign(**result), "Test_vs_null_FDR", "Test_vs_null_avg_shift")
    if "impact" in columns:
        result = {
            "Test_avg_shift": cosine,
            "Impact_component": table["impact"].astype(int),
            "Impact_component_percent": 100 * table["impact_share"],
            "N_Detections": table["n_cells"],
        }
        order = ["Impact_component", "Test_avg_shift"]
        return names.assign(**result).sort_values(order, ascending=[False, True], kind="stable", ignore_index=True)
    if params.get("goal") is not None:
        return _goal(table, names)
    result = {"Test_avg_shift": cosine}
    if "p_value" in columns:
        result |= {"Test_vs_random_pval": table["p_value"], "Test_vs_random_FDR": table["fdr"]}
    names = names.assign(**result, N_Detections=table["n_cells"])
    return _significant(names, "Test_vs_random_FDR", "Test_avg_shift", rising=True) if "fdr" in columns else names


def _goal(table: pd.DataFrame, names: pd.DataFrame) -> pd.DataFrame:
    """`goal_state_shift`: shifts to the goal and to the alternatives."""
    others = [str(name).removeprefix("shift_to_") for name in table.columns if str(name).startswith("shift_to_")]
    others = [name for name in others if name != "start"]  # Geneformer tells of ends alone
    result = {"Shift_to_goal_end": table["shift"]}
    result |= {f"Shift_to_alt_end_{name}": table[f"shift_to_{name}"] for name in others}
    if "p_value" not in table.columns:
        return names.assign(**result, N_Detections=table["n_cells"])
    result["Goal_end_vs_random_pval"] = table["p_value"]
    for name in others:
        if f"p_value_{name}" in table.columns:
            result[f"Alt_end_vs_random_pval_{name}"] = table[f"p_value_{name}"]
    result["Goal_end_FDR"] = table["fdr"]
    for name in others:
        if f"fdr_{name}" in table.columns:
            result[f"Alt_end_FDR_{name}"] = table[f"fdr_{name}"]
    return _significant(names.assign(**result, N_Detections=table["n_cells"]), "Goal_end_FDR", "Shift_to_goal_end")


def _significant(frame: pd.DataFrame, fdr: str, shift: str, *, rising: bool = False) -> pd.DataFrame:
    """Add `Sig`, and sort as Geneformer does: significant ones first, then by shift."""
    frame = frame.assign(Sig=np.where(frame[fdr] < SIGNIFICANT, 1, 0))
    return frame.sort_values(
        ["Sig", shift, fdr], ascending=[False, rising, True], kind="stable", na_position="last", ignore_index=True
    )


def _pairs(table: pd.DataFrame, adata: AnnData) -> pd.DataFrame:
    """Pairs in cosines: the sum of two shifts s, t is the cosine 1 - (s + t)."""
    anchor, gene = _named(table["anchor"], adata), _named(table["gene"], adata)
    return pd.DataFrame(
        {
            "Anchor": anchor["Gene"],
            "Anchor_name": anchor["Gene_name"],
            "Anchor_Ensembl_ID": anchor["Ensembl_ID"],
            **{name: gene[name] for name in gene},
            "Anchor_shift": 1 - table["anchor_shift"],
            "Test_token_shift": 1 - table["gene_shift"],
            "Sum_of_indiv_shifts": 1 - table["sum_of_shifts"],
            "Combo_shift": 1 - table["combined_shift"],
            "Combo_minus_sum_shift": -table["combined_minus_sum"],
            "N_Detections": table["n_cells"],
        }
    )


def _affected(table: pd.DataFrame, adata: AnnData) -> pd.DataFrame:
    """`aggregate_gene_shifts`: rows of whole cells first."""
    perturbed, affected = _named(table["perturbed"], adata), _named(table["affected"], adata)
    frame = pd.DataFrame(
        {
            "Perturbed": perturbed["Gene"],
            "Gene_name": perturbed["Gene_name"],
            "Ensembl_ID": perturbed["Ensembl_ID"],
            "Affected": affected["Gene"],
            "Affected_gene_name": affected["Gene_name"],
            "Affected_Ensembl_ID": affected["Ensembl_ID"],
            "Cosine_sim_mean": 1 - table["shift"],
            "Cosine_sim_stdev": table["sd"] if "sd" in table.columns else np.nan,
            "N_Detections": table["n_cells"],
        }
    )
    is_cell = frame["Affected"].isin(["cell", "cell_emb"])
    return pd.concat([frame[is_cell], frame[~is_cell]], ignore_index=True)


def _named(genes: pd.Series, adata: AnnData) -> pd.DataFrame:
    """Gene, its symbol and its Ensembl id, as far as `adata.var` tells; several genes in one row are joined by commas."""
    index = adata.var_names.astype(str)
    symbols = ensembl = pd.Series(index, index=index)
    for column in ("gene_symbol", "gene_symbols", "feature_name", "gene_name"):
        if column in adata.var.columns:
            symbols = pd.Series(adata.var[column].astype(str).to_numpy(), index=index)
            break
    for column in ("ensembl_id", "gene_ids", "gene_id", "feature_id"):
        if column in adata.var.columns:
            ensembl = pd.Series(adata.var[column].astype(str).to_numpy(), index=index)
            break
    symbol, identifier = (dict(zip(index, values, strict=True)) for values in (symbols, ensembl))
    names = genes.astype(str)

    def translated(text: str, table: Mapping[str, str]) -> str:
        return table[text] if text in table else ",".join(table.get(part, part) for part in text.split(","))

    return pd.DataFrame(
        {
            "Gene": names.astype(object),
            "Gene_name": [translated(name, symbol) for name in names],
            "Ensembl_ID": [translated(name, identifier) for name in names],
        },
        index=genes.index,
    )
