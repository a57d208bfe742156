"""What scbin left in an AnnData, as tables."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from scbin import _docs, _keys
from scbin._adata import check_adata, read_obs, read_tokens, read_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.tokens.phenotypes import age_labels, labels_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

    from scbin.tokens.tokens import Tokens

__all__ = ["evaluate_df", "history_df", "network_df", "perturb_df", "perturbations_df", "tokens_df"]


def __dir__() -> list[str]:
    return __all__


def history_df(source: AnnData | pd.DataFrame | Any) -> pd.DataFrame:
    """Return the training history, one row per logged step.

    Parameters
    ----------
    source
        The trained `Model`, or the `AnnData` on which it was trained.

    Returns
    -------
    A copy of the history. Row 0 is the network at the start, followed by a row per step: `step`, `epoch`, `loss`, each loss
    by name (`loss_genes` ...) and on the held-out cells (`validation_genes` ..., NaN where it was not measured),
    `learning_rate`, `tokens_per_second` and more.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> adata.uns["scbin"] = {"pretrain_history": pandas.DataFrame({"step": [1, 2], "loss": [2.1, 1.9]})}
    >>> float(scbin.get.history_df(adata)["loss"].min())
    1.9
    """
    of_cells = hasattr(source, "uns")
    history = read_uns(source, _keys.HISTORY, pd.DataFrame) if of_cells else getattr(source, "history", source)
    if not isinstance(history, pd.DataFrame) or not {"step", "loss"} <= set(history.columns):
        fix = "Run scbin.tl.pretrain(adata), or pass the model that it returned."
        raise ScbinInputError("A06", f"there is no training history with 'step' and 'loss'. {fix}")
    return history.reset_index(drop=True)


@_docs.shared
def tokens_df(adata: AnnData | Tokens, cell: int | str = 0, *, tokens_key: str | None = None) -> pd.DataFrame:
    """Return the tokens of one cell, in the order of their positions.

    Parameters
    ----------
    {tokenized}
    cell
        Number or name of the cell.
    {tokens_key}

    Returns
    -------
    A table with the columns

    `position`, `token_id`, `text`
        The token, as numbers and in words.
    `kind`, `name`
        `"special"`, `"phenotype"` or `"gene"`, and the name of the phenotype or gene.
    `bin`
        Number of the bin or count token of the gene, 0 for the lowest; NaN for `"rank"`.
    `value`
        The expression that the token stands for.
    `rank`
        Rank of the gene in the cell, from 1; only for `"rank"`, else NaN.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.pp.tokenize(adata, encoding="rank")
    >>> scbin.get.tokens_df(adata)["text"].tolist()[:2]
    ['[CLS]', '[DEPTH 609]']
    """
    tokens = read_tokens(adata, key=tokens_key)
    row, vocabulary = tokens.take(np.array([cell_number(cell, tokens)])).sorted_indices(), tokens.vocabulary
    ids, positions = row.data.astype(np.int64), row.indices.astype(np.int64)
    text = [vocabulary.token_text(int(t), int(p)) for t, p in zip(ids, positions, strict=True)]
    table = pd.DataFrame({"position": positions, "token_id": ids, "text": text, "kind": "special", "name": text})
    for phenotype in vocabulary.phenotypes:
        here = (positions == phenotype.position) & ~np.isin(ids, list(vocabulary.specials.values()))
        table.loc[here, ["kind", "name"]] = "phenotype", phenotype.name
    is_gene, values = vocabulary.is_gene_token(ids), vocabulary.tables()
    genes = np.asarray(vocabulary.genes, dtype=object)[vocabulary.genes_at(ids[is_gene], positions[is_gene])]
    table.loc[is_gene, "kind"], table.loc[is_gene, "name"] = "gene", genes
    table[["bin", "value", "rank"]] = np.nan
    table.loc[is_gene, "value"] = (values.value_of_id[ids] * values.value_of_position[positions])[is_gene]
    if vocabulary.position_is_gene:
        table.loc[is_gene, "bin"] = vocabulary.levels_of(ids[is_gene])
    else:
        table.loc[is_gene, "rank"] = positions[is_gene] - vocabulary.first_gene_position + 1
    return table


def cell_number(cell: int | str, tokens: Tokens) -> int:
    """Return the row of a cell given by number or name."""
    number: Any = next(iter(np.flatnonzero(tokens.names == cell)), tokens.n_cells) if isinstance(cell, str) else cell
    if not -tokens.n_cells <= number < tokens.n_cells:
        fix = f"pass one of adata.obs_names, or a number: the {tokens.n_cells:,} cells count from 0"
        raise ScbinInputError("A06", f"there is no cell {cell!r}; {fix}.")
    return int(number) % tokens.n_cells


def evaluate_df(adata: AnnData, target: str | None = None) -> pd.DataFrame:
    """Return the scores of :func:`scbin.tl.evaluate`: one row per method, one column per score.

    Parameters
    ----------
    adata
        Cells that were scored.
    target
        The target, if there are several. Default: all of them, with `target` as first column.

    Returns
    -------
    A table with the methods as index, scbin first.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> table = {"target": ["cell_type"] * 2, "method": ["scbin", "majority class"], "accuracy": [0.9, 0.4]}
    >>> adata.uns["scbin"] = {"evaluate": pandas.DataFrame(table)}
    >>> float(scbin.get.evaluate_df(adata, "cell_type").loc["scbin", "accuracy"])
    0.9
    """
    table = read_uns(check_adata(adata), _keys.EVALUATE, pd.DataFrame)
    made = list(table.get("target", ()))
    if not made or target not in (None, *made):
        so_far = ", ".join(map(repr, dict.fromkeys(made))) or "nothing"
        raise ScbinInputError("A06", f"evaluated here so far: {so_far}. Call scbin.tl.evaluate(adata, model).")
    table = table if target is None else table[table["target"] == target].drop(columns="target")
    return table.set_index("method").dropna(axis=1, how="all")


def network_df(
    adata: AnnData, genes: str | Sequence[str] | None = None, *, group: str | None = None, key: str | None = None
) -> pd.DataFrame:
    """Return the edges of a network of genes, the strongest first.

    Parameters
    ----------
    adata
        Cells with a network (:func:`scbin.tl.gene_network`).
    genes
        Edges from these genes, such as transcription factors. Default: all edges.
    group
        The network of this group of cells. Default: that of all cells.
    key
        The slot of `varp`. Default: `"scbin_network"`.

    Returns
    -------
    A table with the columns `source`, `target` and `weight`, sorted by the absolute weight.

    Examples
    --------
    >>> import anndata, numpy, scbin
    >>> from scipy.sparse import csr_matrix
    >>> adata = anndata.AnnData(numpy.ones((1, 2)))
    >>> adata.var_names = ["TF", "gene"]
    >>> adata.varp["scbin_network"] = csr_matrix([[0, 0.5], [0, 0]])
    >>> scbin.get.network_df(adata).values.tolist()
    [['TF', 'gene', 0.5]]
    """
    base = _keys.NETWORK if key is None else key
    groups = read_uns(check_adata(adata), base, dict).get("groups", [])
    slot = base if group is None else f"{base}_{groups.index(group)}" if group in groups else ""
    if slot not in adata.varp:
        fix = f"Call scbin.tl.gene_network(adata, model), or name one of its groups: {groups}."
        raise ScbinInputError("A06", f"there is no network {base!r} (group={group!r}). {fix}")
    edges, names = sparse.coo_matrix(adata.varp[slot]), adata.var_names.to_numpy().astype(object)
    table = pd.DataFrame({"source": names[edges.row], "target": names[edges.col], "weight": edges.data})
    if genes is not None:
        asked = [genes] if isinstance(genes, str) else list(genes)
        if unknown := sorted(set(asked) - set(names)):
            raise ScbinInputError("A06", f"{unknown[0]!r} is not in adata.var_names.")
        table = table[table["source"].isin(asked)]
    return table.sort_values("weight", key=np.abs, ascending=False, kind="stable", ignore_index=True)


# ---- predictions beside the truth ------------------------------------------------------------------------------------

Cells = Literal["auto", "all"]
Kind = Literal["class", "number"]


@dataclass(frozen=True, eq=False)
class Column:
    """Labels of cells (or genes) as they were read: the number of each one's class, or its number; NaN where unknown."""

    name: str
    kind: Kind
    values: np.ndarray  # (cells,) or (genes,) float64
    classes: tuple[str, ...] = ()

    @property
    def known(self) -> np.ndarray:
        """Whether the label is known (cells,)."""
        return np.isfinite(self.values)

    def codes(self, rows: np.ndarray) -> np.ndarray:
        """Return the class of some cells as whole numbers; 0 for all where the column is one of numbers."""
        return self.values[rows].astype(np.int64) if self.kind == "class" else np.zeros(len(rows), dtype=np.int64)


def numbers_of(column: pd.Series) -> np.ndarray:
    """Return a column as numbers (cells,), NaN where there is none."""
    values = pd.to_numeric(column.astype(object), errors="coerce").to_numpy(dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def codes_of(texts: Any, classes: Sequence[str]) -> np.ndarray:
    """Return the number of each text's class (n,), NaN where it is none of them."""
    codes = pd.Index(classes, dtype=object).get_indexer(pd.Index(texts, dtype=object))
    return np.where(codes < 0, np.nan, codes)


def true_values(
    column: pd.Series, name: str, kind: str, classes: Sequence[str] = (), age_groups: int | None = None
) -> Column:
    """Return the truth to compare predictions with; labels that the model does not know are classes behind its own.

    With `age_groups`, ages are cut into the classes of the phenotype; what names such a class already stays.
    """
    if kind == "number":
        return Column(name, "number", numbers_of(column))
    labels = labels_of(column, name)
    if age_groups is not None:
        labels = np.where(np.isfinite(codes_of(labels, classes)), labels, age_labels(labels, age_groups)[0])
    names = (*classes, *sorted({str(label) for label in labels if label is not None} - set(classes)))
    return Column(name, "class", codes_of(labels, names), names)


@dataclass(frozen=True)
class Record:
    """What predictions of one target are, as `uns` remembers it."""

    column: str  # of obs, or of var for genes
    asked: str  # what the model was asked for; the entry has another name where key_added= gave it one
    kind: Literal["class", "number", "gene"] = "class"
    classes: tuple[str, ...] = ()
    model: str | None = None  # fingerprint
    age_groups: int | None = None  # years in a class, where the classes are classes of ages
    cells: Mapping[str, str] = field(default_factory=dict)  # the training cells of the model, as it remembers them


def read_record(adata: AnnData) -> dict[str, dict[str, Any]]:
    """Return the whole record, by name."""
    return read_uns(adata, _keys.PREDICT, dict)


def recorded(adata: AnnData, name: str) -> Record:
    """Return what is known of the predictions called `name`: as recorded, else as their column of obs tells."""
    entry = {"column": f"scbin_{name}", "asked": name, **read_record(adata).get(name, {})}
    given = adata.obs.get(entry["column"])
    if given is not None and pd.api.types.is_numeric_dtype(given):
        entry = {"kind": "number", **entry}
    elif given is not None and not entry.get("classes"):
        entry["classes"] = given.astype("category").cat.categories.astype(str)
    return Record(**{**entry, "classes": tuple(entry.get("classes", ()))})


def predicted_targets(adata: AnnData) -> list[str]:
    """Return the names of what was predicted for the cells of an AnnData and is still there."""
    made = {name: recorded(adata, name) for name in read_record(adata)}
    return [name for name, each in made.items() if each.kind != "gene" and each.column in adata.obs]


def truth_of(adata: AnnData, target: str, record: Record) -> str:
    """Return the column of obs that has the truth of predictions, if there is one."""
    return target if target in adata.obs and target != record.column else record.asked


def read_truth(adata: AnnData, target: str, record: Record, truth_key: str | None) -> Column:
    """Return the truth: the column `truth_key`, or the one named after the target or what was asked for."""
    return true_values(
        read_obs(adata, truth_key or truth_of(adata, target, record)),
        target,
        record.kind,
        record.classes,
        record.age_groups,
    )


def read_probabilities(adata: AnnData, record: Record) -> np.ndarray | None:
    """Return the probability of each class of the record for each cell (cells, classes), `None` where there is none.

    Which column is which class is in `uns`. Where that was lost, the predicted classes must be the most probable ones.
    """
    slot = f"{record.column}_probability"
    if slot not in adata.obsm:
        return None
    stored = np.asarray(adata.obsm[slot], dtype=np.float64)
    fits = stored.shape[1] == len(record.classes)
    if fits and record.model is None and record.column in adata.obs:
        own = codes_of(adata.obs[record.column].astype(str), record.classes)
        known = np.flatnonzero(np.isfinite(own) & np.isfinite(stored).all(axis=1))
        fits = bool((stored[known, own[known].astype(int)] >= stored[known].max(axis=1, initial=0) - 1e-3).all())
    if not fits:
        found = f"which class is which column of adata.obsm[{slot!r}] is not known: adata.uns was lost, as in anndata.concat"
        raise ScbinInputError("A06", f"{found}. Keep it with uns_merge='same', or call scbin.tl.predict again.")
    return stored


@dataclass(frozen=True, eq=False)
class Predicted:
    """Predictions of one target for the cells whose truth is known, in the order of the rows.

    For classes `truth` and `predicted` are numbers of `classes`, which first lists what the model knows, then labels that only
    the cells have; `predicted` is -1 where there is none. For numbers both are floats.
    """

    target: str
    kind: Kind
    cells: np.ndarray  # (n,) rows of adata
    truth: np.ndarray  # (n,)
    predicted: np.ndarray  # (n,)
    classes: tuple[str, ...] = ()
    probability: np.ndarray | None = None  # (n, classes) float64, NaN where the cell could not be read


@checked
def read_predicted(adata: AnnData, target: str, *, truth_key: str | None = None, cells: Cells = "auto") -> Predicted:
    """Return the predictions of `target` for the cells whose truth is known: the test cells where there are any, or all."""
    record = recorded(check_adata(adata), target)
    if record.kind == "gene" or record.column not in adata.obs:
        made = ", ".join(map(repr, predicted_targets(adata))) or "none"
        fix = f"Predicted so far: {made}. Call scbin.tl.predict(adata, model, target={record.asked!r})."
        raise ScbinInputError("A06", f"{target!r} was not predicted for these cells. {fix}")
    true, given = read_truth(adata, target, record, truth_key), adata.obs[record.column]
    test = np.zeros(adata.n_obs, dtype=bool)
    if _keys.SPLIT in adata.obs and cells == "auto":
        test = adata.obs[_keys.SPLIT].astype(str).eq("test").to_numpy()
    rows = np.flatnonzero(true.known & test if test.any() else true.known)
    if not len(rows):
        raise ScbinInputError("L01", f"no cell to compare has a known {target!r}: all are missing.")
    if true.kind == "number":
        return Predicted(target, "number", rows, true.values[rows], numbers_of(given)[rows])
    predicted = pd.Index(true.classes, dtype=object).get_indexer(given.iloc[rows].astype(str))
    probability = read_probabilities(adata, record)
    if probability is not None:
        stored = probability[rows]
        probability = np.pad(stored, ((0, 0), (0, len(true.classes) - stored.shape[1])))
        probability[np.isnan(stored).any(axis=1)] = np.nan
    return Predicted(target, "class", rows, true.codes(rows), predicted, true.classes, probability)


# ---- in silico perturbations -----------------------------------------------------------------------------------------

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
        names |= {f"{new}_{state}": f"{old}_{state}" for new, old in ours.items() if f"{old}_{state}" in table}
    if kind == "combined_minus_sum":
        table[["anchor", "gene"]] = table["gene"].str.split(",", expand=True)
    ids = dict(zip(adata.var_names, adata.var.get("ensembl_id", adata.var_names), strict=True))
    for column in {"gene", "anchor", "perturbed", "affected"} & {*table}:
        table[f"{column}_id"] = [",".join(ids.get(part, part) for part in name.split(",")) for name in table[column]]
    return pd.DataFrame({new: table[old] if old in table else table.eval(old) for new, old in names.items()})


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


# ---- measured perturbations ------------------------------------------------------------------------------------------

SLOTS = {
    "measured": (_keys.MEASURED, "fit_perturbations"),
    "predicted": (_keys.MEASURED_PREDICTED, "predict_perturbations"),
    "evaluated": (_keys.MEASURED_EVALUATED, "evaluate_perturbations"),
}


@dataclass(frozen=True, eq=False)
class Screen:
    """What `tl.fit_perturbations` left."""

    table: pd.DataFrame
    change: np.ndarray  # (perturbations, genes)
    genes: np.ndarray
    control: np.ndarray  # mean of the controls (genes,)
    variance: np.ndarray  # of a cell (genes,)
    features: dict[str, np.ndarray]  # (names, d)
    names: np.ndarray  # of the genes with features
    params: dict[str, Any]

    def rows(self, names: Any) -> dict[str, np.ndarray]:
        """Return the features of targets by block (targets, d), NaN where there are none."""
        at = pd.Index(self.names).get_indexer(list(names))
        return {key: np.where((at >= 0)[:, None], block[at], np.nan) for key, block in self.features.items()}


def check_genes(screen: Screen, adata: AnnData) -> None:
    """Raise where the genes of an AnnData are not those that a screen was fitted on, in their order."""
    if list(screen.genes) != list(adata.var_names.astype(str)):
        raise ScbinInputError(
            "A03", "genes are not those of the fit, in their order. Call scbin.tl.fit_perturbations again."
        )


def read_screen(adata: AnnData) -> Screen:
    """Return what `tl.fit_perturbations` left, or say that it is to be called."""
    entry = read_entry(adata, "measured")
    numbers = {name: np.asarray(entry[name], dtype=float) for name in ("change", "control", "variance")}
    features = {name: np.asarray(block, dtype=float) for name, block in entry["features"].items()}
    genes, names = (np.asarray(entry[name], dtype=object) for name in ("genes", "feature_names"))
    kept: dict[str, Any] = {"genes": genes, "features": features, "names": names, "params": entry["params"]}
    return Screen(entry["table"].reset_index(drop=True), **kept | numbers)


def read_entry(adata: AnnData, what: str) -> dict[str, Any]:
    """Return what one of the three verbs left in `uns`, its parameters as a dictionary."""
    key, verb = SLOTS[what]
    entry = check_adata(adata).uns.get(key)
    if not hasattr(entry, "get") or not isinstance(entry.get("table"), pd.DataFrame):
        raise ScbinInputError("A06", f"adata.uns[{key!r}] is not there. Call scbin.tl.{verb}(adata) first.")
    return {**entry, "params": json.loads(str(entry.get("params", "{}")))}


@checked
def perturbations_df(
    adata: AnnData, what: Literal["measured", "predicted", "evaluated"] = "measured", *, reproducible: bool = False
) -> pd.DataFrame:
    """Return measured perturbations, predicted changes, or the scores of predictions, as a table.

    Parameters
    ----------
    adata
        The screen after :func:`scbin.tl.fit_perturbations`, `predict_perturbations` or `evaluate_perturbations`.
    what
        `"measured"`: one row per perturbation, the most reproducible first; `"predicted"`: one per perturbation and gene;
        `"evaluated"`: one per perturbation and method.
    reproducible
        Only perturbations whose change reproduces; not for `"predicted"`.

    Returns
    -------
    A copy of the table, see :doc:`/measured_perturbations`; `attrs["verdict"]` of `"evaluated"` is the verdict in one sentence.

    Raises
    ------
    ScbinInputError
        If there is no such table.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> table = pandas.DataFrame({"perturbation": ["A", "B"], "split_half": [0.1, 0.8], "reproducible": [False, True]})
    >>> adata.uns["scbin_perturbations"] = {"table": table}
    >>> scbin.get.perturbations_df(adata)["perturbation"].tolist()
    ['B', 'A']
    """
    entry = read_entry(adata, what)
    table = entry["table"].copy()
    if reproducible and what != "predicted":
        table = table[table["reproducible"].to_numpy(dtype=bool)]
    if what == "measured":
        table = table.sort_values("split_half", ascending=False, kind="stable")
    if what == "evaluated":
        table.attrs = {"verdict": entry["params"]["verdict"]}
    return table.reset_index(drop=True)
