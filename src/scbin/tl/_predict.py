"""`tl.predict` and `tl.roll_up`: what a model says about cells, or about genes, and how specific it can be."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.special import softmax

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, gene_names, read_tokens, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError
from scbin.get import Record, read_probabilities, read_record, recorded
from scbin.model import resolve_model
from scbin.nn.labels import GeneHead, gene_outputs, label_outputs
from scbin.nn.run import run
from scbin.tl._by_file import adata_of, by_file
from scbin.tl._labels import MaskedPhenotypes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from scbin.io.corpus import Paths
    from scbin.model import Model
    from scbin.nn.run import Precision
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Phenotype


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
) -> AnnData | list[Path] | None:
    """Predict the labels for which a model was fine-tuned, or any phenotype among its tokens.

    A fine-tuned model uses its head. Otherwise the token of the phenotype is masked and predicted, as in training. Label transfer
    to new data with other genes takes two lines: `scbin.pp.tokenize(new, like=model)`, `scbin.tl.predict(new, model)`.

    Parameters
    ----------
    {tokenized}
    {model}
    target
        What to predict, one name or several. Default: all targets of the head or, without a head, all phenotypes.
    phenotypes
        `"hide"`: the model sees only genes. `"show"`: it also sees the phenotypes that are not predicted, such as the tissue for
        the cell type. Heads never see phenotypes.
    threshold
        Set the class to NaN if the largest probability is lower. The probabilities are kept.
    {tokens_key}
    {device}
    {precision}
    {token_budget}
    {progress}
    key_added
        Name instead of `"scbin_<target>"`, for a single target.
    {copy}

    Returns
    -------
    For files (see :func:`scbin.open_tokens`) the paths of those written: for each an AnnData of the same name in the folder `scbin`
    beside it, with obs and var of the file and the fields of `obs` and `obsm` below. Else:

    {returns_copy}

    For targets of genes the fields are in `var` and `varm`. Tokens that are not in an AnnData give a new one.

    `adata.obs["scbin_<target>"]`
        The most probable class (categorical), or the number; NaN for cells without tokens or below `threshold`.
    `adata.obs["scbin_<target>_probability"]`
        Probability of that class.
    `adata.obsm["scbin_<target>_probability"]`
        Probabilities of all classes, float32 (cells, classes).
    `adata.uns["scbin"]["predict"]`
        Classes in the order of the columns and model by target, as JSON.

    Raises
    ------
    ScbinInputError
        If the model does not know the target, or the cells are tokenized with another vocabulary.

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
    in_adata = adata if isinstance(adata, AnnData) else None
    chosen = resolve_model(model, in_adata)
    names = predictable(target, chosen)
    if key_added is not None and len(names) > 1:
        raise ScbinInputError("A03", f"key_added={key_added!r} names one slot, but {len(names)} targets are predicted.")
    keys = {name: key_added or f"scbin_{name}" for name in names}
    check_free(keys.values())
    tokens = read_tokens(adata, chosen.vocabulary, tokens_key)
    written = adata_of(tokens) if in_adata is None else in_adata
    slots = ("obs", "obsm", "var", "varm") if isinstance(chosen.network.labels, GeneHead) else ("obs", "obsm")
    for slot, key, end in product(slots, keys.values(), ("", "_probability")):
        check_writable(written, slot, key + end)
    options: dict[str, Any] = {"device": device, "precision": precision, "token_budget": token_budget}
    found = predictions(chosen, tokens, names, phenotypes=phenotypes, progress=progress, **options)
    written = copied(written) if copy else written
    write_predictions(written, chosen, found, keys, threshold)
    return written if copy or in_adata is None else None


def predictable(target: str | Sequence[str] | None, model: Model) -> list[str]:
    """Return what is to be predicted, by default all that the head or else the phenotypes are about, if the model can."""
    of_head = [each.name for each in _targets(model)]
    slots = [phenotype.name for phenotype in model.vocabulary.phenotypes if phenotype.values]
    names = [target] if isinstance(target, str) else (of_head or slots) if target is None else list(target)
    if not names or not set(names) <= {*of_head, *slots}:
        known = ", ".join(map(repr, dict.fromkeys([*of_head, *slots]))) or "nothing"
        fix = "scbin.tl.finetune(adata, model, target=...), or pretrain with phenotypes: scbin.pp.tokenize(adata, phenotypes=[...])"
        raise ScbinInputError(
            "M06", f"this model cannot predict {target!r}; it predicts {known}. To train it on this target: {fix}."
        )
    return list(dict.fromkeys(names))


def record_of(model: Model, name: str) -> Record:
    """Return what is known of the predictions of a target before they are made."""
    known: dict[str, Any] = {"column": f"scbin_{name}", "asked": name}
    for target in _targets(model):
        if target.name == name:
            kind: Any = "gene" if isinstance(model.network.labels, GeneHead) else target.kind
            return Record(**known, kind=kind, classes=target.classes)
    phenotype = model.vocabulary.phenotype(name)
    return Record(**known, classes=tuple(phenotype.values), age_groups=phenotype.age_groups)


def _targets(model: Model) -> tuple[Any, ...]:
    """Return the targets of the head, none where there is no head."""
    return getattr(model.network.labels, "targets", ())


def predictions(
    model: Model, tokens: Tokens, names: Sequence[str], *, phenotypes: Literal["hide", "show"] = "hide", **options: Any
) -> dict[str, np.ndarray]:
    """Return what a model says about some targets; `options` are those of `scbin.nn.run.run`.

    Probabilities (cells, classes) as float64, or numbers (cells,); NaN where nothing can be said. Or of genes of the model.
    """
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
    return values


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


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_predictions(
    adata: AnnData, model: Model, found: dict[str, np.ndarray], keys: dict[str, str], threshold: float | None = None
) -> None:
    """Write predictions into their slots, and add to what earlier calls recorded."""
    entries, fingerprint = read_record(adata), model.fingerprint
    for name, key in keys.items():
        record, values = record_of(model, name), found[name]
        table, matrices = ("var", "varm") if record.kind == "gene" else ("obs", "obsm")
        if record.kind == "gene":
            values = gene_names(adata, model.vocabulary).by_column(values, adata.n_vars, np.float64)
        if record.kind == "number":
            write(adata, table, key, values)
        else:
            largest = values.max(axis=1)  # NaN where nothing can be said
            codes = np.where(largest >= (threshold or 0), np.nan_to_num(values).argmax(axis=1), -1)
            write(adata, table, key, pd.Categorical.from_codes(codes, categories=list(record.classes)))
            write(adata, table, f"{key}_probability", largest.astype(np.float32))
            write(adata, matrices, f"{key}_probability", values.astype(np.float32))
        entries[key.removeprefix("scbin_")] = asdict(replace(record, column=key, model=fingerprint))
    write_uns(adata, _keys.PREDICT, entries)


# ---- labels along an ontology ---------------------------------------------------------------------------------------


@_docs.shared
def roll_up(
    adata: AnnData, target: str, parents: Mapping[str, str], *, threshold: float = 0.5, copy: bool = False
) -> AnnData | None:
    """Give every cell the most specific term of an ontology that is probable enough.

    The probability of a term is the sum over the predicted classes below it: a cell that is a CD4 or a CD8 T cell is a T cell.

    Parameters
    ----------
    adata
        Cells with predicted classes (:func:`scbin.tl.predict`).
    target
        What was predicted.
    parents
        The parent of each term, `{"CD4 T cell": "T cell", "T cell": "lymphocyte"}`; of a table, `dict(table[["term", "parent"]].values)`.
        A term without a parent is a root.
    threshold
        Minimum probability of a term.
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.obs["scbin_<target>_rolled"]`
        The term with the fewest classes below it among those that reach the threshold; NaN if none does.
    `adata.obs["scbin_<target>_rolled_probability"]`
        Its probability.

    Raises
    ------
    ScbinInputError
        If classes were not predicted, or a term is its own ancestor.

    Examples
    --------
    >>> import anndata, numpy, pandas, scbin
    >>> adata = anndata.AnnData(numpy.ones((2, 2)))
    >>> adata.obs["scbin_type"] = pandas.Categorical(["CD4", "B"], categories=["B", "CD4", "CD8"])
    >>> adata.obsm["scbin_type_probability"] = numpy.array([[0.1, 0.5, 0.4], [0.9, 0.1, 0.0]])
    >>> scbin.tl.roll_up(adata, "type", {"CD4": "T", "CD8": "T"}, threshold=0.8)
    >>> adata.obs["scbin_type_rolled"].tolist()
    ['T', 'B']
    """
    record = recorded(check_adata(adata), target)
    probabilities = read_probabilities(adata, record)
    if probabilities is None or not record.classes:
        told = f"adata.obsm has no '{record.column}_probability': predict classes first with scbin.tl.predict."
        raise ScbinInputError("A06", told)
    terms, below = classes_below(record.classes, parents)
    of_terms = probabilities @ below.T  # (cells, terms), NaN where a cell has none
    # of terms with equally many classes the more probable one
    size = np.where(of_terms >= threshold - 1e-9, below.sum(axis=1) - of_terms / 2, np.inf)
    chosen = np.where(np.isfinite(size.min(axis=1)), size.argmin(axis=1), -1)
    probability = np.where(chosen < 0, np.nan, of_terms[np.arange(len(chosen)), chosen])
    changed = copied(adata) if copy else adata
    rolled = pd.Categorical.from_codes(chosen, categories=terms).remove_unused_categories()
    write(changed, "obs", f"{record.column}_rolled", rolled)
    write(changed, "obs", f"{record.column}_rolled_probability", probability.astype(np.float32))
    return changed if copy else None


def check_free(columns: Iterable[str]) -> None:
    """Raise where predictions would replace a column of obs that means something else."""
    if clash := {_keys.STATUS, _keys.SPLIT} & set(columns):
        raise ScbinInputError(
            "A04", f"{min(clash)!r} already means something else; pass key_added= to scbin.tl.predict."
        )


def classes_below(classes: tuple[str, ...], parents: Mapping[str, str]) -> tuple[list[str], np.ndarray]:
    """Return the terms at or above some classes, and which classes each holds (terms, classes)."""
    tree = nx.DiGraph([(term, parent) for term, parent in parents.items() if isinstance(parent, str)])
    tree.add_nodes_from(classes)
    if not nx.is_directed_acyclic_graph(tree):
        raise ScbinInputError("L01", f"a term is its own ancestor: {nx.find_cycle(tree)}.")
    above = [{name} | nx.descendants(tree, name) for name in classes]
    terms = [*classes, *sorted(set().union(*above) - set(classes))]
    return terms, np.array([[term in each for each in above] for term in terms])
