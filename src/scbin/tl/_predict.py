"""`tl.predict`: what a model says about cells, or about genes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._anndata import (
    check_adata,
    check_writable,
    copied,
    read_tokens,
    remove_own,
    write_obs,
    write_obsm,
    write_uns,
    write_var,
    write_varm,
)
from scbin._arguments import choices, numbers, texts, whole_numbers
from scbin._errors import ScbinInputError, ScbinTypeError
from scbin.get._recorded import read_record
from scbin.nn.embedding import hide_phenotypes
from scbin.nn.prediction import answer_cells, answer_genes, answer_phenotypes, entropy, hide_slots, shares
from scbin.tl._calibrate import judges_of
from scbin.tl._model import resolve_model
from scbin.tl._seen import learned_from
from scbin.tl._targets import gene_places

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.nn.heads import Kind
    from scbin.tl._calibrate import Judges

# what stands beside the classes
COMPANIONS = (("obs", "_probability"), ("obs", "_entropy"), ("obsm", "_probability"))
_RESERVED = {_keys.STATUS, _keys.SPLIT}


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of which model; the fields are the arguments of `predict`."""

    model: Model
    names: list[str]
    phenotypes: Literal["hide", "show"] = "hide"
    jointly: bool = True
    threshold: float | None = None
    tokens_key: str | None = None
    gene_key: str | None = None
    key_added: str | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says about one target, one row per cell (or gene)."""

    name: str
    kind: Kind | Literal["phenotype"]
    classes: tuple[str, ...]
    values: np.ndarray  # (rows, classes) probabilities as float64, or (rows,) numbers; NaN where nothing can be said
    temperature: float = 1.0
    age_groups: int | None = None  # years in a class, where the classes are those that ages are cut into


def predict(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | Sequence[str] | None = None,
    phenotypes: Literal["hide", "show"] = "hide",
    jointly: bool = True,
    threshold: float | None = None,
    split_key: str | None = None,
    tokens_key: str | None = None,
    gene_key: str | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    progress: bool = True,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Let a model say what cells are: what it was fine-tuned for, or any phenotype among its tokens.

    A fine-tuned model answers by its head. Without one, the slot of a phenotype is hidden and the model fills it in, as in its
    training, among the values that the phenotype has. New data with other genes are matched by name first, which makes label
    transfer two lines: `scbin.pp.tokenize(new, like=model)`, `scbin.tl.predict(new, model)`.

    Parameters
    ----------
    adata
        Tokenized cells.
    model
        A :class:`scbin.Model`, or the directory of one. Default: the one trained on these cells.
    target
        What to predict, one name or several. Default: all that the model's head answers or, without a head, all phenotypes.
    phenotypes
        `"hide"` tells the model nothing about the cells but their genes. `"show"` shows it the phenotypes that are not asked
        for: the cell type given the tissue. Heads are always told nothing.
    jointly
        With `"show"` and several phenotypes: hide all of them at once, or (`False`) one at a time while the others are shown.
    threshold
        Abstain where the largest probability is less: the class is NaN then, the probabilities stay.
    split_key
        Column of `obs` with `"validation"` cells, by which the probabilities of phenotypes are calibrated where there is no head
        for them: one temperature each, which changes how sure the model says it is, not which class it gives. Default:
        `"scbin_split"`. It takes ten of these cells or more with a truth in the column of the phenotype's name; test cells are
        never used. A head was calibrated in fine-tuning.
    tokens_key
        The slot of `obsm` with the tokens. Default: `"X_tokens"`.
    gene_key
        For heads on genes: column of `var` with the gene names. Default: `var_names`.
    device
        `"auto"` takes cuda, then mps, then cpu.
    precision
        `"bfloat16"` is faster on recent GPUs and good to about 1e-3.
    token_budget
        Most tokens to go through the network at once. Changes memory and speed, not numbers.
    progress
        Show a progress bar.
    key_added
        Name in place of `"scbin_<target>"`, where one target is predicted.
    copy
        Return a copy instead of writing into `adata`.

    Returns
    -------
    Returns `None` if `copy=False`, else returns an `AnnData` object. Sets the following fields, for heads on genes in `var` and
    `varm` in place of `obs` and `obsm`:

    `adata.obs['scbin_<target>']`
        The most probable class (categorical), or the number; NaN for cells without tokens, and where the model abstained.
    `adata.obs['scbin_<target>_probability']`, `adata.obs['scbin_<target>_entropy']`
        Probability of that class, and how undecided the model is: 0 for one sure class, 1 for all alike.
    `adata.obsm['scbin_<target>_probability']`
        Probabilities of all classes, float32 (cells, classes).
    `adata.uns['scbin']['predict']`
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
    >>> model = scbin.tl.finetune(train, "new", target="bulk_labels", max_steps=0)
    >>> scbin.pp.tokenize(new, like=model)
    >>> scbin.tl.predict(new, model)
    >>> new.obsm["scbin_bulk_labels_probability"].shape
    (300, 10)
    """
    check_adata(adata)
    choices({"phenotypes": ("hide", "show")}, phenotypes=phenotypes)
    texts(optional=True, key_added=key_added, gene_key=gene_key, split_key=split_key)
    numbers(optional=True, threshold=threshold)
    whole_numbers(token_budget=token_budget)
    if threshold is not None and not 0 <= threshold <= 1:
        raise ScbinInputError("F30", f"threshold is {threshold}; a probability lies between 0 and 1.")
    chosen = resolve_model(model, adata)
    judges = judges_of(adata, split_key)
    asked = Asked(chosen, _names(target, chosen), phenotypes, jointly, threshold, tokens_key, gene_key, key_added)
    how = {"device": device, "precision": precision, "token_budget": token_budget, "progress": progress}
    return write_answers(adata, asked, judges, copy=copy, **how)


def write_answers(
    adata: AnnData, asked: Asked, judges: Judges | None, *, copy: bool = False, **how: Any
) -> AnnData | None:
    """Ask the model and write what it says; without judges the probabilities of phenotypes are as the network gives them."""
    if how["token_budget"] < 1:
        raise ScbinInputError("T30", f"token_budget is {how['token_budget']}; it needs to be at least 1.")
    chosen, names = asked.model, asked.names
    keys = _slots(adata, chosen, names, asked.key_added)
    tokens, _ = read_tokens(adata, chosen.vocabulary, key=asked.tokens_key)
    answers = [
        *_from_head(adata, chosen, [name for name in names if _in_head(chosen, name)], tokens, asked.gene_key, how),
        *_from_slots(adata, asked, [name for name in names if not _in_head(chosen, name)], tokens, judges, how),
    ]
    adata = copied(adata) if copy else adata
    for answer in answers:
        _write(adata, keys[answer.name], answer, asked.threshold)
    _record(adata, answers, keys, chosen)
    return adata if copy else None


# ---- what is asked --------------------------------------------------------------------------------------------------


def _in_head(model: Model, name: str) -> bool:
    return model.head is not None and name in {target.name for target in model.head.targets}


def _names(target: str | Sequence[str] | None, model: Model) -> list[str]:
    heads = [] if model.head is None else [each.name for each in model.head.targets]
    slots = [phenotype.name for phenotype in model.vocabulary.phenotypes if phenotype.values]
    if target is None:
        names = heads or slots
        if not names:
            raise ScbinInputError(
                "F31",
                "this model has neither a head nor phenotypes, so there is nothing to predict. Fine-tune it first: "
                "model = scbin.tl.finetune(adata, model, target='cell_type').",
            )
        return names
    names = [target] if isinstance(target, str) else list(target) if hasattr(target, "__iter__") else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ScbinTypeError("F31", f"target is {target!r}; pass a name, or a list of names.")
    for name in names:
        if name not in heads and name not in slots:
            known = ", ".join(repr(each) for each in dict.fromkeys([*heads, *slots])) or "nothing"
            raise ScbinInputError(
                "F31",
                f"this model does not know {name!r}; it can predict {known}. Teach it: scbin.tl.finetune(adata, model, "
                f"target={name!r}), or pretrain with the phenotype: scbin.pp.tokenize(adata, phenotypes=[{name!r}]).",
            )
    return list(dict.fromkeys(names))


def _slots(adata: AnnData, model: Model, names: list[str], key_added: str | None) -> dict[str, str]:
    """Return the name of the slot of each target, if they may all be written."""
    if key_added is not None and len(names) > 1:
        raise ScbinInputError("F32", f"key_added={key_added!r} names one slot, but {len(names)} targets are predicted.")
    keys = {name: f"scbin_{name}" if key_added is None else key_added for name in names}
    for name, key in keys.items():
        if key in _RESERVED:
            raise ScbinInputError("F32", f"{key!r} already means something else; pass key_added= for {name!r}.")
        on_genes = model.head is not None and _in_head(model, name) and model.head.plan.design == "gene"
        for slot, suffix in (("obs", ""), *COMPANIONS):
            check_writable(adata, slot.replace("obs", "var") if on_genes else slot, key + suffix)
    return keys


# ---- what is answered -----------------------------------------------------------------------------------------------


def _from_head(
    adata: AnnData, model: Model, names: list[str], tokens: csr_matrix, gene_key: str | None, how: dict[str, Any]
) -> Iterator[Answer]:
    if not names or model.head is None:
        return
    head, vocabulary = model.head, model.vocabulary
    hidden = hide_phenotypes(tokens, vocabulary)
    layer = model.readout.layer
    if head.plan.design == "gene":
        by_gene, _ = answer_genes(model.bert, head, hidden, vocabulary, layer=layer, **how)
        places = gene_places(adata, vocabulary, gene_key)
        outputs = np.where((places >= 0)[:, None], by_gene[np.maximum(places, 0)], np.nan)
    else:
        outputs = answer_cells(model.bert, head, hidden, vocabulary, model.weights(), layer=layer, **how)
    for name in names:
        target, own = head.plan.target(name), outputs[:, head.plan.part(name)]
        if target.kind == "number":
            yield Answer(name, target.kind, (), own[:, 0].astype(np.float64) * target.scale + target.mean)
        else:
            values = shares(own, target.temperature)
            yield Answer(name, target.kind, target.classes, values, target.temperature)


def _from_slots(
    adata: AnnData,
    asked: Asked,
    names: list[str],
    tokens: csr_matrix,
    judges: Judges | None,
    how: dict[str, Any],
) -> Iterator[Answer]:
    vocabulary = asked.model.vocabulary
    together = [names] if asked.jointly or asked.phenotypes == "hide" else [[name] for name in names]
    for group in together if names else []:
        hidden = _hidden(tokens, vocabulary, asked.phenotypes, group)
        logits = answer_phenotypes(asked.model.bert, hidden, vocabulary, group, **how)
        for name in group:
            slot = vocabulary.phenotype(name)
            temperature = 1.0 if judges is None else judges.temperature(adata, slot, logits[name])
            values = shares(logits[name], temperature)
            yield Answer(name, "phenotype", slot.values, values, temperature, slot.age_groups)


def _hidden(tokens: csr_matrix, vocabulary: Vocabulary, phenotypes: str, names: list[str]) -> csr_matrix:
    return hide_phenotypes(tokens, vocabulary) if phenotypes == "hide" else hide_slots(tokens, vocabulary, names)


# ---- what is written ------------------------------------------------------------------------------------------------


def _write(adata: AnnData, key: str, answer: Answer, threshold: float | None) -> None:
    on_genes = answer.kind == "gene"
    write, write_matrix = (write_var, write_varm) if on_genes else (write_obs, write_obsm)
    if answer.kind == "number":
        write(adata, key, answer.values)
        for slot, suffix in COMPANIONS:  # of classes that went by this name before
            remove_own(adata, slot, key + suffix)
        return
    readable = np.isfinite(answer.values).all(axis=1)
    largest = np.where(readable, np.nan_to_num(answer.values).max(axis=1), np.nan)
    sure = readable if threshold is None else readable & (largest >= threshold)
    codes = np.where(sure, np.nan_to_num(answer.values).argmax(axis=1), -1)
    write(adata, key, pd.Categorical.from_codes(codes, categories=list(answer.classes)))
    write(adata, f"{key}_probability", largest.astype(np.float32))
    write(adata, f"{key}_entropy", np.where(readable, entropy(np.nan_to_num(answer.values)), np.nan).astype(np.float32))
    write_matrix(adata, f"{key}_probability", answer.values.astype(np.float32))


def _record(adata: AnnData, answers: list[Answer], keys: dict[str, str], model: Model) -> None:
    """Add to what earlier calls recorded."""
    fingerprint = model.fingerprint
    record = read_record(adata)
    for answer in answers:
        column = keys[answer.name]
        entry: dict[str, Any] = {
            "asked": answer.name,
            "column": column,
            "classes": list(answer.classes),
            "model": fingerprint,
            "kind": answer.kind if answer.kind in ("number", "gene") else "class",
            "temperature": answer.temperature,
            "learned": learned_from(model, answer.name),
        }
        if answer.age_groups is not None:
            entry["age_groups"] = answer.age_groups
        record[column.removeprefix("scbin_")] = entry
    write_uns(adata, _keys.PREDICT, json.dumps(record))
