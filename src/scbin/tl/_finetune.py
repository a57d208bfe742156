"""`tl.finetune`: teach a model the labels of cells or genes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix
from scipy.special import log_softmax
from sklearn.decomposition import TruncatedSVD
from torch import nn

from scbin import _docs, _keys
from scbin._adata import check_writable, read_tokens, write, write_uns
from scbin._arguments import checked, instances
from scbin._errors import ScbinInputError
from scbin.model import Model, remember, resolve_model
from scbin.nn.backbone import seeded
from scbin.nn.labels import LARGEST, GeneHead, LabelHead, Target, gene_outputs, label_outputs
from scbin.nn.network import build_network
from scbin.nn.presets import preset_for
from scbin.nn.run import embed
from scbin.tl._labels import (
    Labels,
    MaskedPhenotypes,
    Split,
    hold_out,
    kinds_of,
    read_cell_labels,
    read_gene_labels,
    target_weights,
)
from scbin.tl._leakage import remembered_cells
from scbin.tl._metrics import fitted_temperature
from scbin.tl._probe import Probe, Scaler, fit_classes, fit_numbers, log_expression
from scbin.train.adapters import adapted
from scbin.train.distributed import is_first_process
from scbin.train.labels import CellLabels, Finetuning, GeneLabels
from scbin.train.loop import train
from scbin.train.pretraining import Pretraining
from scbin.train.settings import Training
from scbin.train.start import start

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from scbin.get.predictions import Kind
    from scbin.nn.network import CellNetwork
    from scbin.tokens.tokens import Tokens

NEW = "new"
_RATE, _EPOCHS, _STEPS, _CELLS_PER_STEP = 3e-4, 8, 400, 32  # epochs, but about as many steps at most
_MOST_FOR_GENES = 2_000  # cells
# standard errors that a gain on held-out cells must exceed: the best epoch was chosen on the same cells
_CLEARLY = 2.0
# the table of genes is as good as its penalty made it, and stays
_RATES = {"labels.genes": 0.0}
_VECTOR_WEIGHTS = (1.0, 3.0)  # of the standardised vector beside the standardised genes
_LOADINGS = 30


@_docs.shared
@checked
def finetune(
    adata: AnnData | Tokens,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | Sequence[str] | Mapping[str, Any],
    kind: Kind | Mapping[str, Kind] = "class",
    level: Literal["cell", "gene"] = "cell",
    split_key: str | None = None,
    class_weights: Literal["balanced"] | Mapping[str, float] | None = "balanced",
    freeze: int | Literal["all"] = 0,
    lora: bool | Mapping[str, Any] = False,
    finetuning: Finetuning | None = None,
    training: Training | None = None,
    max_steps: int | None = None,
    tokens_key: str | None = None,
    save_dir: str | os.PathLike[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Model:
    """Teach a model the labels of cells (their type, the age of a donor) or of genes.

    The head starts from a linear probe: scikit-learn's logistic (or ridge) regression on the cell's vector and the log expression
    of each gene, its regularization chosen by cross-validation, by donor where donors are kept apart. Then network and head are
    trained together, with some genes of every cell left out at random. That is kept only where held-out cells say so: where their
    loss is better by more than two standard errors. One line says what came out, beside the same probe without the network.
    Phenotype tokens are masked, so that no label leaks through its own token.

    Parameters
    ----------
    {tokenized}
    model
        A :class:`scbin.Model`, or the path of one; it stays as it is. `"new"` takes an untrained network that starts from the data.
        Default: the model trained on these cells, or else a new one.
    target
        Column of `obs`, several of them, or `{column: weight in the loss}`. Cells without a label are left out: NaN, and `""`,
        `"unknown"`, `"nan"`, `"na"`, `"n/a"` and `"<NA>"` in any case. With `level="gene"` `{class: genes}`, or a column of `var`.
    kind
        `"class"` or `"number"`, such as an age; also by column.
    level
        `"cell"`, or `"gene"`: labels are those of genes, which each cell shows in another context.
    split_key
        Column of `obs` with donors or batches, none of which is then both in training and validation; or with `"train"`,
        `"validation"` and `"test"`. Default: `"scbin_split"`, where :func:`scbin.tl.split` named test cells there. Test cells are never
        looked at.
    class_weights
        `"balanced"`: every class counts alike in the loss, or `{class: weight}`.
    freeze
        Number of layers of the backbone that stay as they are, from the first; `"all"`: only the head is fitted.
    lora
        Train low-rank adapters in place of the backbone's weights, and merge them in the end; a mapping goes to
        `peft.LoraConfig`. Needs `scbin[lora]`.
    finetuning
        How labels are held out and learned (:class:`scbin.Finetuning`).
    {training}
    max_steps
        Stop after so many steps; 0 keeps to the linear probe.
    {tokens_key}
    {save_dir}
    {device}
    {seed}
    {progress}

    Returns
    -------
    A new :class:`scbin.Model` with a head for labels, and the `history` of its training. Sets the following fields:

    `adata.obs["scbin_split"]`
        `"train"`, `"validation"` or `"test"`; NaN for cells that were not used.
    `adata.uns["scbin"]["finetune"]`
        How the model was made and its held-out losses, as JSON.
    `adata.uns["scbin"]["finetune_history"]`
        Losses of every step, as a `DataFrame`; none where nothing was trained.

    Raises
    ------
    ScbinInputError
        If a column is missing, looks continuous where classes are meant, or has one class only.

    Notes
    -----
    A head that is linear in expression and in a network's vector is a "wide and deep" model :cite:p:`cheng2016`; adapters are LoRA
    :cite:p:`hu2022`.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:300].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.finetune(adata, "new", target="louvain", max_steps=0, progress=False)
    >>> model.network.labels.targets[0].name
    'louvain'
    """
    settings = Finetuning() if finetuning is None else finetuning
    instances(Finetuning, "a scbin.Finetuning", finetuning=settings)
    instances(Training, "a scbin.Training", optional=True, training=training)
    instances((bool, Mapping), "True, False, or a mapping for peft.LoraConfig", lora=lora)
    weights = target_weights(target) if level == "cell" else {"gene_class": 1.0}
    kinds = kinds_of(weights, kind, level)
    old = start_model(model, adata)
    tokens = read_tokens(adata, None if old is None else old.vocabulary, tokens_key)
    if isinstance(adata, AnnData):
        check_writable(adata, "obs", _keys.SPLIT)
    if level == "gene":
        labels = read_gene_labels(adata, tokens, target, split_key, class_weights, settings.validation, seed)
    else:
        labels = read_cell_labels(adata, tokens, weights, kinds, split_key, class_weights, settings.validation, seed)
    split, masked = labels.split, MaskedPhenotypes(tokens)
    network: Any = _new_network(masked, split, seed) if old is None else copy.deepcopy(old.network)
    n_layers = network.backbone.n_layers
    if freeze != "all" and not 0 <= freeze <= n_layers:
        raise ScbinInputError("A02", f"freeze is {freeze}; pass 'all', or 0 to {n_layers}, the layers of this network.")
    training = _complete(training, max_steps, int(split.train.sum()), level == "cell" and settings.expression)

    options = {"device": device, "token_budget": training.token_budget}
    items = (_cells if level == "cell" else _genes)(network, masked, labels, settings, options, seed)
    losses = {"without network": items.fit(), "linear probe": items.losses(items.outputs())}
    kept, history = "linear probe", pd.DataFrame()
    if items.starts_random and max_steps == 0:
        raise ScbinInputError("A03", "a head with a hidden layer starts at random: it needs max_steps above 0.")
    if max_steps != 0 and (freeze != "all" or items.starts_random):
        untouched = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
        with _changeable(network, freeze, lora, seed):
            history = train(
                network, items.task, masked, training, cells=np.flatnonzero(split.open),
                held_out=np.flatnonzero(split.validation), save_dir=save_dir, device=device, seed=seed, progress=progress,
            )  # fmt: skip
        losses["fine-tuned"] = items.losses(items.outputs())
        if items.starts_random or _is_better(losses["fine-tuned"], losses["linear probe"]):
            kept = "fine-tuned"
            network.density = network.batches = None  # they belong to the vectors of before
            items.calibrate()
        else:
            network.load_state_dict(untouched)
    if kept == "linear probe":
        items.refit()

    means = {name: float(loss.mean()) for name, loss in losses.items() if len(loss)}
    report = {"kept": kept, "held_out_loss": means, "probe": items.report, "steps": max(len(history) - 1, 0)}
    report |= {"level": level, "split_key": split_key, "finetuning": asdict(settings), "training": training.learned()}
    report |= labels.report() | {"cells": remembered_cells(tokens, np.flatnonzero(split.open))}
    described = {} if old is None else dict(old.training)
    result = Model(network.eval(), tokens.vocabulary, {**described, "finetune": report}, history)
    if progress and is_first_process():
        told = ", ".join(f"{loss:.3f} {name}" for name, loss in means.items()) or "not known"
        print(f"scbin: held-out loss {told}; kept the {kept}.")
    if save_dir is not None and is_first_process():
        result.save(Path(save_dir) / "model", overwrite=True)
    if isinstance(adata, AnnData):
        _write(adata, result, split.column(labels.before), save_dir)
    return result


# ---- what is asked for ----------------------------------------------------------------------------------------------


def start_model(model: Model | str | os.PathLike[str] | None, data: AnnData | Tokens) -> Model | None:
    """Return the model to start from, `None` for a new one."""
    adata = data if isinstance(data, AnnData) else None
    entry = {} if adata is None else adata.uns.get(_keys.UNS, {})
    if model == NEW or (model is None and not (isinstance(entry, Mapping) and entry.get(_keys.MODEL_ID))):
        return None
    return resolve_model(model, adata)


def _new_network(tokens: Tokens, split: Split, seed: int) -> CellNetwork:
    """Return an untrained network that starts from the training cells."""
    cells = np.flatnonzero(split.train)
    network = build_network(tokens.vocabulary, preset_for(len(cells)), seed=seed)
    start(network, Pretraining(tokens.vocabulary), tokens, cells, seed=seed)
    return network


def _complete(training: Training | None, max_steps: int | None, n_cells: int, with_genes: bool) -> Training:
    """Return the settings with fine-tuning's own values where nothing was chosen."""
    training = Training() if training is None else training
    training = replace(training, max_steps=max_steps) if max_steps else training
    training = training.filled(learning_rate=_RATE, cells_per_step=_CELLS_PER_STEP, warmup=0.1)
    epochs = max(1, min(_EPOCHS, round(_STEPS * (training.cells_per_step or 1) / max(n_cells, 1))))
    return training.filled(epochs=epochs, rates=_RATES if with_genes else {}).complete()


def _is_better(after: np.ndarray, before: np.ndarray) -> bool:
    """Whether losses fell by more than chance, or nobody can say."""
    gain = before - after
    return not len(gain) or bool(gain.mean() > _CLEARLY * gain.std() / np.sqrt(len(gain)))


@contextmanager
def _changeable(network: Any, freeze: int | Literal["all"], lora: bool | Mapping[str, Any], seed: int) -> Any:
    """Let the first layers of the backbone (or all but the head) stay as they are, or train adapters, for a while."""
    backbone: Any = network.backbone
    still = [*backbone.parameters(), *network.vector.parameters()]
    if freeze != "all":
        lists = [
            each for each in backbone.modules() if isinstance(each, nn.ModuleList) and len(each) == backbone.n_layers
        ]
        if freeze and not lists:
            raise ScbinInputError("A02", "this backbone has no layers to freeze one by one; use freeze='all', or 0.")
        still = [parameter for layer in (lists[0][:freeze] if freeze else []) for parameter in layer.parameters()]
    still = [parameter for parameter in still if parameter.requires_grad]
    try:
        for parameter in still:
            parameter.requires_grad_(False)
        with adapted(backbone, dict(lora) if isinstance(lora, Mapping) else {} if lora else None, seed=seed):
            yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


# ---- cells and genes ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Items:
    """Labelled cells or genes, one row each, with the head that learns them: probes for its start, losses of held-out ones."""

    head: Any
    task: CellLabels
    labels: Labels
    values: list[np.ndarray]  # by target: class or standardised number (items,)
    held_out: np.ndarray  # (items,) bool
    donors: np.ndarray | None  # (items,)
    vectors: np.ndarray  # (items, size): cell vectors, or mean hidden states of genes
    features: csr_matrix  # (items, features): log expression, or simple features of genes
    scaler: Scaler
    choices: list[tuple[float, bool]]  # what a probe may read: weight of the vectors, and whether features
    outputs: Callable[[], np.ndarray]  # of the network for held-out items (held out, outputs)
    starts_random: bool
    seed: int
    report: dict[str, Any] = field(default_factory=dict)
    chosen: list[tuple[float, bool, Probe]] = field(default_factory=list)

    def fit(self) -> np.ndarray:
        """Start the head at the best probe of each target; return the held-out losses of those without the network."""
        outputs = []
        for number, target in enumerate(self.head.targets):
            alone = self._probe(number, ~self.held_out, 0.0, True)
            outputs.append(alone.outputs(self._features(self.held_out, 0.0, True)))
            tried = [
                (*reads, self._probe(number, ~self.held_out, *reads) if reads[0] else alone) for reads in self.choices
            ]
            weight, genes, probe = min(tried, key=lambda each: np.nan_to_num(each[2].loss, nan=np.inf))
            self.chosen.append((weight, genes, probe))
            reads = ["vector"] * (weight > 0) + ["expression"] * genes
            found = {"vector_weight": weight, "strength": probe.strength, "cross_validated_loss": probe.loss}
            self.report[target.name] = {"reads": reads, **found, "without_network": alone.loss}
        if not self.starts_random:
            self._install()
        return self.losses(np.hstack(outputs))

    def refit(self) -> None:
        """Fit the chosen probes to all items, held out or not."""
        everything = np.ones(len(self.held_out), dtype=bool)
        for number, (weight, genes, probe) in enumerate(self.chosen):
            fitted = self._probe(number, everything, weight, genes, probe.strength)
            self.chosen[number] = weight, genes, replace(fitted, temperature=probe.temperature)
        self._install()

    def losses(self, outputs: np.ndarray) -> np.ndarray:
        """Return the loss of each held-out item with a label: log loss and squared error by their weights, which have mean 1."""
        total, amount = np.zeros(len(outputs)), np.zeros(len(outputs))
        for number, target in enumerate(self.head.targets):
            true, own = self.values[number][self.held_out], outputs[:, self.head.part(number)].astype(np.float64)
            at = np.flatnonzero(np.isfinite(true) & np.isfinite(own).all(axis=1))
            weight, by_class = np.full(len(at), self.labels.weights[number]), self.labels.class_weights[number]
            if target.kind == "number":
                loss = np.square(own[at, 0] - true[at])
            else:
                codes = true[at].astype(np.int64)
                loss = -log_softmax(own[at], axis=1)[np.arange(len(at)), codes]
                weight = weight if by_class is None else weight * by_class[codes]
            total[at] += weight * loss
            amount[at] += weight
        return total[amount > 0] / amount[amount > 0].mean() if amount.any() else np.zeros(0)

    def calibrate(self) -> None:
        """Set the temperatures by the held-out items."""
        outputs = self.outputs()
        for number, target in enumerate(self.head.targets):
            true = self.values[number][self.held_out]
            if target.kind == "class":
                own, known = outputs[:, self.head.part(number)], np.isfinite(true)
                temperature = fitted_temperature(own[known], true[known].astype(np.int64), fewest=30)
                self.head.temperature[number] = temperature

    def _features(self, rows: np.ndarray, weight: float, genes: bool) -> Any:
        return self.scaler.features(self.vectors[rows], self.features[rows] if genes else None, weight)

    def _probe(self, number: int, rows: np.ndarray, weight: float, genes: bool, strength: float | None = None) -> Probe:
        target, values = self.head.targets[number], self.values[number]
        rows = rows & np.isfinite(values)
        donors = None if self.donors is None else self.donors[rows]
        options: dict[str, Any] = {"donors": donors, "strength": strength, "seed": self.seed}
        features = self._features(rows, weight, genes)
        if target.kind == "number":
            return fit_numbers(features, values[rows], **options)
        codes, by_class = values[rows].astype(np.int64), self.labels.class_weights[number]
        return fit_classes(features, codes, target.n_outputs, class_weights=by_class, **options)

    @torch.no_grad()
    def _install(self) -> None:
        """Put the chosen probes into the head."""
        head, scaler = self.head, self.scaler
        head.vector_mean.copy_(torch.from_numpy(scaler.mean))
        head.vector_scale.copy_(torch.from_numpy(scaler.factor))
        if isinstance(head, LabelHead) and head.genes is not None:
            head.gene_scale.copy_(torch.from_numpy(scaler.gene_factor))
        for number, (weight, genes, probe) in enumerate(self.chosen):
            part, weights = head.part(number), torch.from_numpy(probe.weights).float()
            size = self.vectors.shape[1] if weight else 0
            head.output.weight[part] = weights[:size].T * weight if weight else 0.0
            head.output.bias[part] = torch.from_numpy(probe.bias).float()
            if head.genes is not None:
                head.genes[:, part] = weights[size:] if genes else 0.0
            head.temperature[number] = probe.temperature


def _cells(
    network: Any, tokens: Tokens, labels: Labels, settings: Finetuning, options: dict[str, Any], seed: int
) -> _Items:
    """Return the labelled cells, and give the network a head for them."""
    split, targets = labels.split, []
    for column in labels.columns:
        known = column.values[split.train & column.known]
        unit = {"mean": float(known.mean()), "scale": float(known.std()) or 1.0} if column.kind == "number" else {}
        targets.append(Target(column.name, column.kind, column.classes, **unit))
    with seeded(seed):
        network.labels = head = LabelHead(
            tokens.vocabulary, network.vector.size, targets, expression=settings.expression, hidden=settings.hidden,
            dropout=settings.dropout, pooled_size=network.backbone.hidden_size if settings.attention else 0,
        )  # fmt: skip
    values = [(column.values - t.mean) / t.scale for column, t in zip(labels.columns, targets, strict=True)]
    task = CellLabels(
        head, tokens.vocabulary, values, weights=labels.weights, class_weights=labels.class_weights,
        gene_dropout=settings.gene_dropout, label_smoothing=settings.label_smoothing, layer=network.vector.layer,
    )  # fmt: skip
    rows, asked = np.flatnonzero(split.open), np.flatnonzero(split.validation)
    vectors, expression = (
        np.nan_to_num(embed(network, tokens, rows=rows, **options)[rows]),
        log_expression(tokens, rows),
    )
    held_out, donors = split.validation[rows], None if split.donors is None else split.donors[rows]
    with_genes = [(weight, True) for weight in (0.0, *_VECTOR_WEIGHTS)] if settings.expression else []
    return _Items(
        head, task, labels, [each[rows] for each in values], held_out, donors, vectors, expression,
        Scaler.fit(vectors[~held_out], expression[~held_out]), [*with_genes, (1.0, False)],
        lambda: label_outputs(network, tokens, rows=asked, **options)[asked], settings.hidden is not None, seed,
    )  # fmt: skip


def _genes(
    network: Any, tokens: Tokens, labels: Labels, settings: Finetuning, options: dict[str, Any], seed: int
) -> _Items:
    """Return the labelled genes that some cells express, and give the network a head for them."""
    column, cells = labels.columns[0], np.flatnonzero(labels.split.open)
    cells = np.sort(np.random.default_rng(seed).permutation(cells)[:_MOST_FOR_GENES])
    features = gene_features(log_expression(tokens, cells), seed)
    targets, size = [Target(column.name, "class", column.classes)], network.backbone.hidden_size
    network.labels = head = GeneHead(tokens.vocabulary, size, targets, n_features=features.shape[1])
    head.features.copy_(torch.from_numpy(features))
    hidden = gene_outputs(network, tokens, hidden_states=True, rows=cells, **options)
    rows = np.flatnonzero(column.known & np.isfinite(hidden).all(axis=1))
    held_out = hold_out(column.codes(rows), settings.validation, seed=seed)
    if len(np.unique(column.codes(rows[~held_out]))) < 2:
        raise ScbinInputError("L02", f"the cells express genes of one class of {column.name!r} only.")
    asked = rows[held_out]
    task = GeneLabels(
        head, tokens.vocabulary, [column.values], class_weights=labels.class_weights,
        held_out=np.isin(np.arange(len(hidden)), asked), gene_dropout=settings.gene_dropout,
        label_smoothing=settings.label_smoothing, layer=network.vector.layer,
    )  # fmt: skip
    vectors, own = hidden[rows].astype(np.float32), csr_matrix(features[rows])
    scaler = replace(Scaler.fit(vectors, own), gene_factor=np.ones(own.shape[1], dtype=np.float32))
    return _Items(
        head, task, labels, [column.values[rows]], held_out, None, vectors, own, scaler, [(0.0, True), (1.0, True)],
        lambda: gene_outputs(network, tokens, rows=cells, **options)[asked], False, seed,
    )  # fmt: skip


def gene_features(expression: csr_matrix, seed: int = 0) -> np.ndarray:
    """Return what expression alone says of genes (genes, features): mean, detection rate, spread and principal directions, scaled."""
    mean = np.asarray(expression.mean(axis=0)).ravel()
    detected = np.asarray((expression > 0).mean(axis=0)).ravel()
    variance = np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean**2
    rank = min(_LOADINGS, min(expression.shape) - 1)
    loadings = TruncatedSVD(max(rank, 1), random_state=seed).fit(expression).components_.T
    features = np.column_stack([mean, detected, np.sqrt(np.maximum(variance, 0)), loadings])
    spread = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    return np.clip(scaled, -LARGEST, LARGEST).astype(np.float32)


def _write(adata: AnnData, model: Model, split: pd.Categorical, save_dir: Any) -> None:
    identifier = model.fingerprint
    remember(identifier, model)
    write(adata, "obs", _keys.SPLIT, split)
    write_uns(adata, _keys.FINETUNE, json.dumps(model.training["finetune"]))
    if len(model.history):
        write_uns(adata, _keys.FINETUNE_HISTORY, model.history.copy())
    else:  # that of an earlier model would be taken for this one's
        entries = adata.uns[_keys.UNS]
        adata.uns[_keys.UNS] = {name: entry for name, entry in entries.items() if name != _keys.FINETUNE_HISTORY}
    write_uns(adata, _keys.MODEL_ID, identifier)
    write_uns(adata, _keys.MODEL_PATH, "" if save_dir is None else str(Path(save_dir).resolve() / "model"))
