"""`tl.fit_perturbations`: what measured perturbations do, which of them reproduce, and how to predict others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, copied, gene_names, read_tokens, warn, write_entry
from scbin._arguments import checked
from scbin._errors import ScbinInputError, ScbinTypeError, count
from scbin.model import resolve_model
from scbin.tl._gene_vectors import fixed_gene_vectors, mean_gene_vectors
from scbin.tl._perturb_statistics import false_discovery_rates
from scbin.tl._responses import Cells, Sums, control_features, narrow, own_genes, read_cells, reproducibility, sum_cells
from scbin.tokens.tokens import MemoryTokens

if TYPE_CHECKING:
    import os

    from anndata import AnnData

    from scbin.model import Model

REPRODUCIBLE = 0.3  # smallest split-half correlation, beside an FDR of 5 %
FEWEST_SINGLES = 3


@_docs.shared
@checked
def fit_perturbations(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    key: str = "perturbation",
    control: str = "control",
    donor_key: str | None = None,
    batch_key: str | None = None,
    mode: Literal["crispri", "ko", "activation"] = "crispri",
    features: str | pd.DataFrame | None = None,
    min_cells: int = 10,
    layer: str | None = None,
    total_key: str | None = None,
    seed: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Measure the change of each perturbation of a screen (Perturb-seq) and whether it reproduces, and learn to predict others.

    The change of a perturbation is the mean log expression of its cells minus that of the controls of the same batch and donor.
    It reproduces if two halves of its cells (or donors), each with its own controls, agree more than noise explains.
    :func:`scbin.tl.predict_perturbations` then predicts other perturbations from the measured ones of similar genes. Run
    :func:`scbin.tl.evaluate_perturbations` to see how good these predictions are.

    Parameters
    ----------
    {adata}
    model
        A :class:`scbin.Model` or the path of its directory, whose gene vectors become features of targets. Default: none.
    key
        Column of `obs` with the perturbation: `"A"`, pairs as `"A+B"` or `"A_B"`, guides as `"A_sg1"`.
    control
        Its value for unperturbed cells.
    donor_key
        Column of `obs` with the donor. Donors are then the replicates: the halves have different donors.
    batch_key
        Column of `obs`, such as a batch or a cell line: cells are compared with controls of the same value.
    mode
        `"crispri"` and `"ko"`: the target itself goes down by a fraction, that of the other targets; `"activation"`: it goes up.
    features
        Your own features of genes, such as embeddings of their descriptions: a table of numbers with gene names as index, or the
        name of one in `varm`. Targets that are not genes of `adata` can be predicted from them.
    min_cells
        Perturbations with fewer cells are listed, but nothing is learned from them.
    {layer}
    total_key
        Column of `obs` with the total counts of each cell, where `adata` holds only some of the genes.
    {seed}
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.uns["scbin_perturbations"]`
        `"table"`, one row per perturbation (:func:`scbin.get.perturbations_df`); `"change"` (perturbations, `"genes"`) of log1p
        expression; `"features"` of genes; and `"params"` as JSON.

    Raises
    ------
    ScbinInputError
        If there are no controls, or fewer than three single perturbations with enough cells. Nothing is written then.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.perturbseq(n_perturbations=10, n_cells=800, n_genes=100)
    >>> scbin.tl.fit_perturbations(adata, batch_key="batch")
    >>> bool(scbin.get.perturbations_df(adata)["reproducible"].sum() > 5)
    True
    """
    check_adata(adata)
    if min_cells < 2 or seed < 0:
        raise ScbinInputError("A02", f"min_cells is {min_cells} and seed {seed}; they need to be at least 2 and 0.")
    params: dict[str, Any] = {"key": key, "control": control, "donor_key": donor_key, "batch_key": batch_key}
    params |= {"layer": layer, "total_key": total_key, "mode": mode, "min_cells": min_cells, "seed": seed}
    if not adata.var_names.is_unique:
        raise ScbinInputError("A03", "names of genes occur twice: call adata.var_names_make_unique() first.")
    user = _user_features(adata, features)
    cells = read_cells(adata, params, [] if user is None else user.index)
    genes = np.asarray(adata.var_names.astype(str), dtype=object)
    sums = sum_cells(cells.values, cells.group, cells.stratum, cells.donor, seed)
    table = _table(cells, sums, genes, min_cells, seed)
    measured = table["status"] == "measured"
    if (measured & (table["n_targets"] == 1)).sum() < FEWEST_SINGLES:
        found = f"fewer than {FEWEST_SINGLES} perturbations of one gene have {min_cells} cells or more"
        raise ScbinInputError("P02", f"{found}; learning needs them. Cells with two guides count as pairs.")
    if not measured.all():
        listed = ", ".join(f"{status} ({n})" for status, n in table["status"][~measured].value_counts().items())
        warn("P02", f"nothing is learned from {count(int((~measured).sum()), 'perturbation')}: {listed}.")

    controls = cells.values[np.flatnonzero(cells.group < 0)]
    blocks = {name: pd.DataFrame(block, index=genes) for name, block in control_features(controls).items()}
    if model is not None:
        chosen = resolve_model(model, adata)
        blocks["model"], params["model"] = _gene_vectors(adata, chosen, cells.rows[cells.group < 0]), chosen.fingerprint
    if user is not None:
        blocks["user"] = user
    names = pd.Index(genes).append([block.index for block in blocks.values()]).unique()
    learned = {name: narrow(block.reindex(names).to_numpy(dtype=float)) for name, block in blocks.items()}
    control_mean = np.asarray(controls.mean(axis=0)).ravel()
    numbers = {"change": sums.changes(), "control": control_mean, "variance": sums.variance}
    result: dict[str, Any] = {name: values.astype(np.float32) for name, values in numbers.items()}
    result |= {"features": {name: block.astype(np.float32) for name, block in learned.items()}}
    result |= {"feature_names": np.asarray(names, dtype=object)}
    target = copied(adata) if copy else adata
    write_entry(target, _keys.MEASURED, params, table=table, genes=genes, **result)
    return target if copy else None


def _user_features(adata: AnnData, features: Any) -> pd.DataFrame | None:
    """Return the user's features by gene (genes, d), those of a gene named twice once."""
    if features is None:
        return None
    if not isinstance(features, pd.DataFrame):
        if features not in adata.varm:
            there = ", ".join(map(repr, adata.varm)) or "none"
            raise ScbinTypeError("A01", f"features is neither a DataFrame nor a key of adata.varm. Available: {there}.")
        features = pd.DataFrame(adata.varm[features], index=adata.var_names)
    if not len(features.columns) or not all(kind.kind in "biuf" for kind in features.dtypes):
        raise ScbinInputError("A02", "features need to be numbers: one row per gene, one column per dimension.")
    frame = features.set_axis(features.index.astype(str))
    return frame[~frame.index.duplicated()]


def _gene_vectors(adata: AnnData, model: Model, rows: np.ndarray) -> pd.DataFrame:
    """Return the vectors of the genes of a model by name: loadings of its count head, else mean hidden states in control cells."""
    network, vocabulary = model.network, model.vocabulary
    if network.counts is not None:
        vectors = fixed_gene_vectors(model, "loadings")
    else:
        tokens = read_tokens(adata, vocabulary)
        vectors, _ = mean_gene_vectors(network, MemoryTokens(tokens.take(rows), vocabulary))
    frame = pd.DataFrame(vectors, index=list(gene_names(adata, vocabulary).names))
    return frame[~frame.index.duplicated()]


def _table(cells: Cells, sums: Sums, genes: np.ndarray, min_cells: int, seed: int) -> pd.DataFrame:
    """Return one row per perturbation: its cells, whether it is learned from, whether it reproduces, and what it does to its target."""
    targets = [name.split("+") for name in cells.names]
    n_cells, own, changes = sums.cells.sum(axis=(1, 2)).astype(int), own_genes(cells.names, genes), sums.changes()
    enough = n_cells >= min_cells
    singles = {each[0] for each, known in zip(targets, enough, strict=True) if known and len(each) == 1}
    status = {"too few cells": ~enough, "more than two targets": np.array([len(each) > 2 for each in targets])}
    status["singles not measured"] = np.array([len(each) == 2 and not set(each) <= singles for each in targets])
    r, p_value = (np.where(enough, x, np.nan) for x in reproducibility(sums, own, seed))
    fdr = false_discovery_rates(p_value)
    reliability = 2 * np.clip(r, 0, 1) / (1 + np.clip(r, 0, 1))  # Spearman-Brown: of all cells, from that of halves
    frame: dict[str, Any] = {"perturbation": list(cells.names), "n_targets": [len(each) for each in targets]}
    frame["status"] = np.select(list(status.values()), list(status), "measured").astype(object)
    frame |= {"n_cells": n_cells, "split_half": r, "p_value": p_value, "fdr": fdr, "ceiling": np.sqrt(reliability)}
    frame["reproducible"] = (np.nan_to_num(fdr, nan=1.0) <= 0.05) & (np.nan_to_num(r) >= REPRODUCIBLE)
    frame["own_change"] = [row[mine].mean() if mine.any() else np.nan for row, mine in zip(changes, own, strict=True)]
    return pd.DataFrame(frame | {"noise": sums.noise()})
