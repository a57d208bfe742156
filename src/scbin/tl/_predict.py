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
from scbin._adata import check_writable, copied, read_tokens, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError, ScbinTypeError
from scbin.get.predictions import Record, read_record, true_values
from scbin.model import resolve_model
from scbin.nn.labels import GeneHead, gene_outputs, label_outputs
from scbin.nn.run import run
from scbin.tl._edits import gene_names
from scbin.tl._labels import MaskedPhenotypes, has_column, known_split, obs_column
from scbin.tl._leakage import training_cells
from scbin.tl._metrics import fitted_temperature
from scbin.tokens.phenotypes import COLUMNS

if TYPE_CHECKING:
    import os

    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Phenotype

# what is written beside the classes
_COMPANIONS = (("obs", "_probability"), ("obs", "_entropy"), ("obsm", "_probability"))
_RESERVED = {_keys.STATUS, _keys.SPLIT}


class Prediction(NamedTuple):
    """What a model says about one target, one row per cell (or column of `var`)."""

    record: Record
    values: np.ndarray  # (rows, classes) probabilities as float64, or (rows,) numbers; NaN where nothing can be said


@_docs.shared
@checked
def predict(
    adata: AnnData | Tokens,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | Sequence[str] | None = None,
    phenotypes: Literal["hide", "show"] = "hide",
    jointly: bool = True,
    threshold: float | None = None,
    split_key: str | None = None,
    tokens_key: str | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | pd.DataFrame | None:
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
    jointly
        With `"show"` and several phenotypes: mask all of them at once, or (`False`) one at a time while the others are shown.
    threshold
        Abstain where the largest probability is less: the class is NaN then, the probabilities stay.
    split_key
        Column of `obs` with `"validation"` cells, by which the probabilities of phenotypes are calibrated: one temperature each,
        which changes how sure the model is, not the class. Default: `"scbin_split"`. It takes ten of these cells or more with a
        truth in the column named after the phenotype; test cells are never used. A head was calibrated in fine-tuning.
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
        Classes in the order of the columns, model and temperature by target, as JSON.

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
    if threshold is not None and not 0 <= threshold <= 1:
        raise ScbinInputError("A02", f"threshold is {threshold}; a probability lies between 0 and 1.")
    if token_budget < 1:
        raise ScbinInputError("A02", f"token_budget is {token_budget}; it needs to be at least 1.")
    in_adata = isinstance(adata, AnnData)
    chosen = resolve_model(model, adata if in_adata else None)
    names = predictable(target, chosen)
    if key_added is not None and len(names) > 1:
        raise ScbinInputError("A03", f"key_added={key_added!r} names one slot, but {len(names)} targets are predicted.")
    keys = {name: f"scbin_{name}" if key_added is None else key_added for name in names}
    for name, key in keys.items() if in_adata else ():
        if key in _RESERVED:
            raise ScbinInputError("A04", f"{key!r} already means something else; pass key_added= for {name!r}.")
        for slot, suffix in (("obs", ""), *_COMPANIONS):
            slot = slot.replace("obs", "var") if isinstance(chosen.network.labels, GeneHead) else slot
            check_writable(adata, slot, key + suffix)
    tokens = read_tokens(adata, chosen.vocabulary, tokens_key)
    found = predictions(
        adata, chosen, tokens, names, phenotypes=phenotypes, jointly=jointly, split_key=split_key, device=device,
        precision=precision, token_budget=token_budget, progress=progress,
    )  # fmt: skip
    if not in_adata:
        columns: dict[str, Any] = {}
        for each in found:
            columns |= {keys[each.record.asked] + end: values for end, values in _columns(each, threshold).items()}
        return pd.DataFrame(columns, index=None if any(each.record.kind == "gene" for each in found) else tokens.names)
    written = copied(adata) if copy else adata
    write_predictions(written, chosen, found, keys, threshold)
    return written if copy else None


def predictable(target: str | Sequence[str] | None, model: Model) -> list[str]:
    """Return what is to be predicted, by default all that the head or else the phenotypes are about, if the model can."""
    of_head = [each.name for each in _targets(model)]
    slots = [phenotype.name for phenotype in model.vocabulary.phenotypes if phenotype.values]
    if target is None and (of_head or slots):
        return of_head or slots
    names = [target] if isinstance(target, str) else list(target) if isinstance(target, Sequence) else []
    if target is not None and (not names or not all(isinstance(name, str) for name in names)):
        raise ScbinTypeError("A01", f"target is {target!r}; pass a name, or a list of names.")
    unknown = [name for name in names if name not in {*of_head, *slots}]
    if unknown or not names:
        known = ", ".join(repr(each) for each in dict.fromkeys([*of_head, *slots])) or "nothing"
        raise ScbinInputError(
            "M06",
            f"this model cannot predict {unknown[0] if unknown else target!r}; it predicts {known}. Teach it: "
            "scbin.tl.finetune(adata, model, target=...), or pretrain with phenotypes: scbin.pp.tokenize(adata, phenotypes=[...]).",
        )
    return list(dict.fromkeys(names))


def record_of(model: Model, name: str) -> Record:
    """Return what is known of the predictions of a target before they are made."""
    cells, head = training_cells(model, name), model.network.labels
    for number, target in enumerate(_targets(model)):
        if target.name == name:
            kind: Any = "gene" if isinstance(head, GeneHead) else target.kind
            temperature = float(head.temperature[number])  # type: ignore[union-attr,index]
            return Record(f"scbin_{name}", name, kind, target.classes, temperature=temperature, cells=cells)
    phenotype = model.vocabulary.phenotype(name)
    groups = phenotype.age_groups
    return Record(f"scbin_{name}", name, "class", tuple(phenotype.values), age_groups=groups, cells=cells)


def _targets(model: Model) -> tuple[Any, ...]:
    """Return the targets of the head, none where there is no head."""
    head: Any = model.network.labels
    return () if head is None else head.targets


def predictions(
    data: AnnData | Tokens,
    model: Model,
    tokens: Tokens,
    names: Sequence[str],
    *,
    phenotypes: Literal["hide", "show"] = "hide",
    jointly: bool = True,
    split_key: str | None = None,
    truth_key: str | None = None,
    calibrate: bool = True,
    **options: Any,
) -> list[Prediction]:
    """Return what a model says about some targets; `options` are those of `scbin.nn.run.run`."""
    head: Any = model.network.labels
    records = {name: record_of(model, name) for name in names}
    by_head = {target.name for target in _targets(model)} & set(names)
    values: dict[str, np.ndarray] = {}
    if by_head:
        of_genes = isinstance(head, GeneHead)
        outputs = (gene_outputs if of_genes else label_outputs)(model.network, MaskedPhenotypes(tokens), **options)
        if of_genes and isinstance(data, AnnData):  # by column of var
            columns = gene_names(data, model.vocabulary).columns
            by_gene, outputs = outputs, np.full((data.n_vars, outputs.shape[1]), np.nan)
            outputs[columns[columns >= 0]] = by_gene[columns >= 0]
        values = head.predictions(outputs)
    slots = [model.vocabulary.phenotype(name) for name in names if name not in by_head]
    groups = [slots] if jointly or phenotypes == "hide" else [[slot] for slot in slots]
    for group in groups if slots else []:
        masked = MaskedPhenotypes(tokens, None if phenotypes == "hide" else [slot.name for slot in group])
        for slot, logits in zip(group, _phenotype_logits(model, masked, group, **options), strict=True):
            temperature = _phenotype_temperature(data, slot, logits, split_key, truth_key) if calibrate else 1.0
            values[slot.name] = softmax(logits / temperature, axis=1)
            records[slot.name] = replace(records[slot.name], temperature=temperature)
    return [Prediction(records[name], values[name]) for name in names]


def _phenotype_logits(
    model: Model, tokens: Tokens, phenotypes: Sequence[Phenotype], **options: Any
) -> list[np.ndarray]:
    """Return the logits of the values of phenotypes at their own positions (cells, values), NaN for cells without genes."""
    network, vocabulary = model.network, model.vocabulary
    result = [np.full((tokens.n_cells, len(phenotype.values)), np.nan) for phenotype in phenotypes]
    for pack, hidden in run(network, tokens, label="predicting", **options):
        rows, is_gene = pack.rows.cpu().numpy(), vocabulary.is_gene_token(pack.input_ids.cpu().numpy())
        has_genes = np.bincount(rows[is_gene], minlength=pack.n_rows) > 0
        for phenotype, found in zip(phenotypes, result, strict=True):
            where = torch.nonzero(pack.position_ids == phenotype.position)[:, 0]
            with torch.inference_mode():
                logits = network.backbone.logits(hidden[where].float(), phenotype.first_id, phenotype.stop_id)
            own = rows[where.cpu().numpy()]
            found[pack.cells[own]] = np.where(has_genes[own, None], logits.float().cpu(), np.nan)
    return result


def _phenotype_temperature(
    data: AnnData | Tokens, phenotype: Phenotype, logits: np.ndarray, split_key: str | None, truth_key: str | None
) -> float:
    """Return the temperature that validation cells with a truth ask for; 1 where fewer than ten of them say."""
    key = _keys.SPLIT if split_key is None else split_key
    names = [truth_key] if truth_key else [*COLUMNS.get(phenotype.name, (phenotype.name,))[::-1], phenotype.name]
    name = next((name for name in names if has_column(data, name)), None)
    split = known_split(data, key) if name is not None and has_column(data, key) else None
    if name is None or split is None:
        return 1.0
    try:
        true = true_values(obs_column(data, name), name, "class", phenotype.values, phenotype.age_groups)
    except ScbinInputError:  # a column of that name that holds no labels
        return 1.0
    known = split.validation & true.known & (np.nan_to_num(true.values) < len(phenotype.values))
    rows = np.flatnonzero(known & np.isfinite(logits).all(axis=1))
    return fitted_temperature(logits[rows], true.codes(rows))


# ---- writing --------------------------------------------------------------------------------------------------------


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
    for each in found:
        record, key = each.record, keys[each.record.asked]
        slot, matrices = ("var", "varm") if record.kind == "gene" else ("obs", "obsm")
        for suffix, column in _columns(each, threshold).items():
            write(adata, slot, key + suffix, column)
        if record.kind == "number":
            for companion, suffix in _COMPANIONS:  # of classes that went by this name before
                write(adata, companion, key + suffix, None)
        else:
            write(adata, matrices, f"{key}_probability", each.values.astype(np.float32))
        entries[key.removeprefix("scbin_")] = asdict(replace(record, column=key, model=fingerprint))
    write_uns(adata, _keys.PREDICT, json.dumps(entries))
