"""`tl.predict`: what a model says about cells, or about genes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.special import softmax
from scipy.stats import entropy

from scbin import _docs, _keys
from scbin._adata import check_writable, copied, gene_names, read_tokens, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError, ScbinTypeError
from scbin.get.predictions import Record, read_record
from scbin.model import resolve_model
from scbin.nn.labels import GeneHead, gene_outputs, label_outputs
from scbin.nn.run import run
from scbin.tl._by_file import by_file
from scbin.tl._labels import MaskedPhenotypes
from scbin.tl._leakage import training_cells

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from scbin.io.corpus import Paths
    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Phenotype


class Prediction(NamedTuple):
    """What a model says about one target, one row per cell (or gene of the model)."""

    record: Record
    values: np.ndarray  # (rows, classes) probabilities as float64, or (rows,) numbers; NaN where nothing can be said


@_docs.shared
@by_file
@checked
def predict(
    adata: AnnData | Tokens | Paths,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | Sequence[str] | None = None,
    phenotypes: Literal["hide", "show"] = "hide",
    threshold: float | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | pd.DataFrame | list[Path] | None:
    """Predict labels: what a model was fine-tuned for, or any phenotype among its tokens.

    A fine-tuned model answers by its head. Otherwise the phenotype's token is masked and the model fills it in, as in its
    training. New data with other genes are matched by name first, which makes label transfer two lines:
    `scbin.pp.tokenize(new, like=model)`, `scbin.tl.predict(new, model)`.

    Parameters
    ----------
    {tokenized}
    {model}
    target
        What to predict, one name or several. Default: all targets of the head or, without a head, all phenotypes.
    phenotypes
        `"hide"` tells the model nothing about the cells but their genes. `"show"` shows it the phenotypes that are not asked
        for: the cell type given the tissue. Heads are always told nothing.
    threshold
        Abstain where the largest probability is less: the class is NaN then, the probabilities stay.
    {tokens_key}
    {device}
    {precision}
    {token_budget}
    {progress}
    key_added
        Name in place of `"scbin_<target>"`, where one target is predicted.
    {copy}

    Returns
    -------
    For files (see :func:`scbin.open_tokens`) the paths of those written: for each an AnnData of the same name in the folder `scbin`
    beside it, with obs and var of the file and the fields of `obs` and `obsm` below. Else:

    {returns_copy}

    For targets of genes the fields are in `var` and `varm`. For tokens without an AnnData, a `DataFrame` with the columns of `obs`.

    `adata.obs["scbin_<target>"]`
        The most probable class (categorical), or the number; NaN for cells without tokens, and where the model abstained.
    `adata.obs["scbin_<target>_probability"]`
        Probability of that class.
    `adata.obs["scbin_<target>_entropy"]`
        Entropy of the probabilities over its maximum: 0 for one sure class, 1 where all are equally probable.
    `adata.obsm["scbin_<target>_probability"]`
        Probabilities of all classes, float32 (cells, classes).
    `adata.uns["scbin"]["predict"]`
        Classes in the order of the columns and model by target, as JSON.

    Raises
    ------
    ScbinInputError
        If the model knows no such target, or the cells are tokenized with another vocabulary.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> train, new = adata[:400].copy(), adata[400:].copy()
    >>> scbin.pp.tokenize(train)
    >>> model = scbin.tl.finetune(train, "new", target="louvain", max_steps=0, progress=False)
    >>> scbin.pp.tokenize(new, like=model)
    >>> scbin.tl.predict(new, model, progress=False)
    >>> new.obsm["scbin_louvain_probability"].shape
    (300, 11)
    """
    if not 0 <= (threshold or 0) <= 1 or token_budget < 1:
        given = f"threshold={threshold} and token_budget={token_budget}"
        raise ScbinInputError("A02", f"{given}: a probability lies between 0 and 1, and a budget is at least 1.")
    in_adata = isinstance(adata, AnnData)
    chosen = resolve_model(model, adata if in_adata else None)
    names = predictable(target, chosen)
    if key_added is not None and len(names) > 1:
        raise ScbinInputError("A03", f"key_added={key_added!r} names one slot, but {len(names)} targets are predicted.")
    keys = {name: f"scbin_{name}" if key_added is None else key_added for name in names}
    for name, key in keys.items() if in_adata else ():
        if key in (_keys.STATUS, _keys.SPLIT):
            raise ScbinInputError("A04", f"{key!r} already means something else; pass key_added= for {name!r}.")
        table, matrices = _slots(record_of(chosen, name))
        for slot, suffix in ((table, ""), (table, "_probability"), (table, "_entropy"), (matrices, "_probability")):
            check_writable(adata, slot, key + suffix)
    tokens = read_tokens(adata, chosen.vocabulary, tokens_key)
    options: dict[str, Any] = {"device": device, "precision": precision, "token_budget": token_budget}
    found = predictions(chosen, tokens, names, phenotypes=phenotypes, progress=progress, **options)
    if isinstance(adata, AnnData):
        written = copied(adata) if copy else adata
        write_predictions(written, chosen, found, keys, threshold)
        return written if copy else None
    columns: dict[str, Any] = {}
    for each in found:
        columns |= {keys[each.record.asked] + end: values for end, values in _columns(each, threshold).items()}
    return pd.DataFrame(columns, index=chosen.vocabulary.genes if found[0].record.kind == "gene" else tokens.names)


def predictable(target: str | Sequence[str] | None, model: Model) -> list[str]:
    """Return what is to be predicted, by default all that the head or else the phenotypes are about, if the model can."""
    of_head = [each.name for each in _targets(model)]
    slots = [phenotype.name for phenotype in model.vocabulary.phenotypes if phenotype.values]
    names = [target] if isinstance(target, str) else (of_head or slots) if target is None else target
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ScbinTypeError("A01", f"target is {target!r}; pass a name, or a list of names.")
    unknown = [name for name in names if name not in {*of_head, *slots}]
    if unknown or not names:
        known = ", ".join(map(repr, dict.fromkeys([*of_head, *slots]))) or "nothing"
        found = f"this model cannot predict {unknown[0] if unknown else target!r}; it predicts {known}"
        fix = "scbin.tl.finetune(adata, model, target=...), or pretrain with phenotypes: scbin.pp.tokenize(adata, phenotypes=[...])"
        raise ScbinInputError("M06", f"{found}. Teach it: {fix}.")
    return list(dict.fromkeys(names))


def record_of(model: Model, name: str) -> Record:
    """Return what is known of the predictions of a target before they are made."""
    cells, of_genes = training_cells(model, name), isinstance(model.network.labels, GeneHead)
    for target in _targets(model):
        if target.name == name:
            return Record(f"scbin_{name}", name, "gene" if of_genes else target.kind, target.classes, cells=cells)
    phenotype = model.vocabulary.phenotype(name)
    values, groups = tuple(phenotype.values), phenotype.age_groups
    return Record(f"scbin_{name}", name, "class", values, age_groups=groups, cells=cells)


def _targets(model: Model) -> tuple[Any, ...]:
    """Return the targets of the head, none where there is no head."""
    head: Any = model.network.labels
    return () if head is None else head.targets


def predictions(
    model: Model, tokens: Tokens, names: Sequence[str], *, phenotypes: Literal["hide", "show"] = "hide", **options: Any
) -> list[Prediction]:
    """Return what a model says about some targets; `options` are those of `scbin.nn.run.run`."""
    head: Any = model.network.labels
    by_head = {target.name for target in _targets(model)} & set(names)
    values: dict[str, np.ndarray] = {}
    if by_head:
        outputs = gene_outputs if isinstance(head, GeneHead) else label_outputs
        values = head.predictions(outputs(model.network, MaskedPhenotypes(tokens), **options))
    slots = [model.vocabulary.phenotype(name) for name in names if name not in by_head]
    if slots:
        masked = MaskedPhenotypes(tokens, None if phenotypes == "hide" else [slot.name for slot in slots])
        values |= _phenotype_probabilities(model, masked, slots, **options)
    return [Prediction(record_of(model, name), values[name]) for name in names]


def _phenotype_probabilities(
    model: Model, tokens: Tokens, phenotypes: Sequence[Phenotype], **options: Any
) -> dict[str, np.ndarray]:
    """Return the probabilities of the values of phenotypes at their own positions (cells, values), NaN for cells without genes."""
    network, vocabulary = model.network, model.vocabulary
    logits = {phenotype.name: np.full((tokens.n_cells, len(phenotype.values)), np.nan) for phenotype in phenotypes}
    for pack, hidden in run(network, tokens, label="predicting", **options):
        rows, is_gene = pack.rows.cpu().numpy(), vocabulary.is_gene_token(pack.input_ids.cpu().numpy())
        has_genes = np.bincount(rows[is_gene], minlength=pack.n_rows) > 0
        for phenotype in phenotypes:
            where = torch.nonzero(pack.position_ids == phenotype.position)[:, 0]
            with torch.inference_mode():
                found = network.backbone.logits(hidden[where].float(), phenotype.first_id, phenotype.stop_id)
            own = rows[where.cpu().numpy()]
            logits[phenotype.name][pack.cells[own]] = np.where(has_genes[own, None], found.float().cpu(), np.nan)
    return {name: softmax(each, axis=1) for name, each in logits.items()}


# ---- writing --------------------------------------------------------------------------------------------------------


def _slots(record: Record) -> tuple[str, str]:
    """Return where predictions are written: labels, and probabilities of all classes."""
    return ("var", "varm") if record.kind == "gene" else ("obs", "obsm")


def _columns(found: Prediction, threshold: float | None) -> dict[str, Any]:
    """Return the columns that predictions become, by the end of their names."""
    record, values = found
    if record.kind == "number":
        return {"": values}
    known = np.isfinite(values).all(axis=1)
    filled = np.where(known[:, None], values, 1.0)
    largest = np.where(known, filled.max(axis=1), np.nan)
    sure = known if threshold is None else known & (largest >= threshold)
    spread = entropy(filled, axis=1) / max(np.log(filled.shape[1]), 1e-12)
    return {
        "": pd.Categorical.from_codes(np.where(sure, filled.argmax(axis=1), -1), categories=list(record.classes)),
        "_probability": largest.astype(np.float32),
        "_entropy": np.where(known, spread, np.nan).astype(np.float32),
    }


def write_predictions(
    adata: AnnData, model: Model, found: Sequence[Prediction], keys: dict[str, str], threshold: float | None = None
) -> None:
    """Write predictions into their slots, and add to what earlier calls recorded."""
    entries, fingerprint = read_record(adata), model.fingerprint
    for record, values in found:
        key, (table, matrices) = keys[record.asked], _slots(record)
        if record.kind == "gene":  # by column of var
            columns = gene_names(adata, model.vocabulary).columns
            by_gene, values = values, np.full((adata.n_vars, values.shape[1]), np.nan)
            values[columns[columns >= 0]] = by_gene[columns >= 0]
        for suffix, column in _columns(Prediction(record, values), threshold).items():
            write(adata, table, key + suffix, column)
        if record.kind != "number":
            write(adata, matrices, f"{key}_probability", values.astype(np.float32))
        entries[key.removeprefix("scbin_")] = asdict(replace(record, column=key, model=fingerprint))
    write_uns(adata, _keys.PREDICT, json.dumps(entries))
