"""`tl.finetune`: train a model on the labels of cells or genes."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import StandardScaler
from torch import nn

from scbin import _docs, _keys
from scbin._adata import read_tokens, warn, write
from scbin._arguments import checked, instances
from scbin._errors import ScbinInputError
from scbin.io.corpus import opened
from scbin.model import Model, resolve_model
from scbin.nn.backbone import seeded
from scbin.nn.labels import LARGEST, GeneHead, LabelHead, Target, gene_outputs, label_outputs
from scbin.nn.network import build_network
from scbin.nn.presets import preset_for
from scbin.nn.run import embed
from scbin.tl._gene_vectors import mean_gene_vectors
from scbin.tl._labels import MaskedPhenotypes, balanced_weights, cell_columns, gene_labels
from scbin.tl._pretrain import note_model
from scbin.tl._probe import Probe, Scaler, fit_probe, fitted_temperature, log_expression, losses_of, some_of
from scbin.tl._split import Split, hold_out, read_split, remembered_cells, suits, warn_of_donors
from scbin.train.adapters import adapted
from scbin.train.distributed import is_first_process
from scbin.train.labels import Labels
from scbin.train.loop import train
from scbin.train.pretraining import Pretraining
from scbin.train.settings import Finetuning, Training
from scbin.train.start import start

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from scbin.get import Column, Kind
    from scbin.io.corpus import Paths
    from scbin.nn.network import CellNetwork
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

NEW = "new"
_RATE, _EPOCHS, _STEPS, _CELLS_PER_STEP = 3e-4, 8, 400, 32  # epochs, but about as many steps at most
_MOST_HELD_OUT, _MOST_FOR_GENES, _MOST_FOR_FEATURES = 2_000, 2_000, 10_000  # cells
# standard errors that a gain on held-out cells must exceed: the best epoch was chosen on the same cells
_CLEARLY = 2.0
# what a probe reads: the weight of the standardised vector, and whether the standardised genes
_ALONE = (0.0, True)
_READS = [_ALONE, (3.0, True), (1.0, False)]
_LOADINGS = 30


@_docs.shared
@checked
def finetune(
    adata: AnnData | Tokens | Paths,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | Sequence[str] | Mapping[str, Sequence[str]],
    kind: Kind | Mapping[str, Kind] = "class",
    level: Literal["cell", "gene"] = "cell",
    split_key: str | None = None,
    class_weights: Literal["balanced"] | None = "balanced",
    freeze: int = 0,
    lora: bool = False,
    finetuning: Finetuning | None = None,
    training: Training | None = None,
    max_steps: int | None = None,
    tokens_key: str | None = None,
    save_dir: str | os.PathLike[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Model:
    """Train a model on the labels of cells (their type, the age of a donor) or of genes.

    The head starts from a linear probe: the mean of scikit-learn's logistic (or ridge) regressions on the log expression of each
    gene, on the cell vector, and on both, or the first alone if that is better in cross-validation (by donor if the split is by
    donor). Network and head are then trained together, with some genes of every cell left out at random. The result is kept only
    if the loss on held-out cells is better by more than two standard errors. The same probe without the network is printed for
    comparison. Phenotype tokens are masked, so that no label leaks through its own token.

    Parameters
    ----------
    {tokenized}
    model
        A :class:`scbin.Model`, or the path of one; it does not change. `"new"` is an untrained network that starts from the data.
        Default: the model trained on these cells, if there is one, else a new one.
    target
        Column of `obs`, a matrix in `obsm` (each column is a number to learn, such as a protein), or several of them. Cells without
        a label are left out: NaN, and `""`, `"unknown"`, `"nan"`, `"na"`, `"n/a"` and `"<NA>"` in any case. With `level="gene"`
        `{class: genes}`, or a column of `var`.
    kind
        `"class"` or `"number"`, such as an age; also by column.
    level
        `"cell"`, or `"gene"` for labels of genes. Their head starts from simple features of expression, which were better than
        hidden states.
    split_key
        Column of `obs` with donors or batches, each of which is then in training or in validation; or with `"train"`,
        `"validation"` and `"test"`. Default: `"scbin_split"`, from :func:`scbin.tl.split`, whose test cells are not used.
    class_weights
        `"balanced"`: every class has the same weight in the loss.
    freeze
        Number of layers of the backbone, from the first, that do not change.
    lora
        Train low-rank adapters of a BERT instead of its weights, and merge them at the end. Needs `scbin[lora]`.
    finetuning
        How labels are held out and learned (:class:`scbin.Finetuning`).
    {training}
    max_steps
        Maximum number of steps; 0 keeps the linear probe and does not change the network.
    {tokens_key}
    {save_dir}
    {device}
    {seed}
    {progress}

    Returns
    -------
    A new :class:`scbin.Model` with a head for labels, and the `history` of its training. Sets the following fields:

    `adata.obs["scbin_split"]`
        `"train"`, `"validation"` or `"test"`.
    `adata.uns["scbin"]["finetune"]`
        How the model was made and its held-out losses, as JSON.
    `adata.uns["scbin"]["finetune_history"]`
        Losses of every step, as a `DataFrame`; empty if there was no training.

    Raises
    ------
    ScbinInputError
        If a column is missing, looks continuous although classes are expected, or has only one class.

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
    settings = finetuning or Finetuning()
    instances(Finetuning, "a scbin.Finetuning", finetuning=settings)
    instances(Training, "a scbin.Training", optional=True, training=training)
    adata = opened(adata, tokens_key)
    old = start_model(model, adata)
    tokens = read_tokens(adata, None if old is None else old.vocabulary, tokens_key)
    columns, weights, split, used = _learned(adata, tokens, target, kind, level, split_key, settings.validation, seed)
    masked = MaskedPhenotypes(tokens)
    network: Any = _new_network(masked, used, seed) if old is None else copy.deepcopy(old.network)
    if not 0 <= freeze <= network.backbone.n_layers:
        raise ScbinInputError("A02", f"freeze is {freeze}; this network has {network.backbone.n_layers} layers.")
    n = int(used.train.sum())
    training = _complete(training or Training(), max_steps, n)
    options = {"device": device, "token_budget": training.token_budget}
    if level == "gene":
        items = _genes(network, masked, columns, used, settings.validation, seed, options)
    else:
        items = _cells(network, masked, columns, used, seed, options)
    if class_weights is None:
        items.class_weights = [np.ones_like(each) for each in items.class_weights]
    losses = {"without network": items.losses(items.probe(), weights)}
    items.install()
    losses["linear probe"] = items.losses(items.outputs(), weights)
    kept, history = "linear probe", pd.DataFrame()
    if max_steps != 0:
        untouched = {name: each.cpu().clone() for name, each in network.state_dict().items()}
        layer = network.gene_layer if level == "gene" else network.vector_layer
        task = items.task(tokens.vocabulary, layer, settings, weights)
        how: dict[str, Any] = {"cells": np.flatnonzero(used.open), "held_out": np.flatnonzero(used.validation)}
        how |= {"save_dir": save_dir, "device": device, "seed": seed, "progress": progress}
        with _partly_frozen(network, freeze), adapted(network.backbone, {} if lora else None, seed=seed):
            history = train(network, task, masked, training, **how)
        outputs = items.outputs()
        losses["fine-tuned"] = items.losses(outputs, weights)
        if _clearly_better(losses["linear probe"] - losses["fine-tuned"]):
            kept = "fine-tuned"
            network.density = network.batches = None  # they belong to the vectors of before
            items.calibrate(outputs)
        else:
            network.load_state_dict(untouched)
    if kept == "linear probe":
        items.refit()

    means = {name: float(loss.mean()) for name, loss in losses.items() if len(loss)}
    report = {"kept": kept, "held_out_loss": means, "probe": items.report, "steps": max(len(history) - 1, 0)}
    report |= {"level": level, "split_key": split_key, "finetuning": asdict(settings), "training": training.learned()}
    report |= {"targets": {column.name: column.kind for column in columns}, "n_cells": n}
    report |= {"n_held_out": int(used.validation.sum()), "cells": remembered_cells(tokens, np.flatnonzero(used.open))}
    described = {} if old is None else old.training
    result = Model(network.eval(), tokens.vocabulary, {**described, "finetune": report}, history)
    if progress and is_first_process():
        told = ", ".join(f"{loss:.3f} {name}" for name, loss in means.items()) or "not known"
        print(f"scbin: held-out loss {told}; kept the {kept}.")
    note_model(result, adata, save_dir, _keys.FINETUNE, result.training["finetune"])
    if isinstance(adata, AnnData):
        write(adata, "obs", _keys.SPLIT, split.column())
    return result


# ---- where it starts ------------------------------------------------------------------------------------------------


def start_model(model: Model | str | os.PathLike[str] | None, data: AnnData | Tokens) -> Model | None:
    """Return the model to start from, `None` for a new one."""
    adata = data if isinstance(data, AnnData) else None
    known = adata is not None and adata.uns.get(_keys.UNS, {}).get(_keys.MODEL_ID)
    return None if model == NEW or (model is None and not known) else resolve_model(model, adata)


def _learned(
    data: AnnData | Tokens,
    tokens: Tokens,
    target: Any,
    kind: Any,
    level: str,
    split_key: str | None,
    fraction: float,
    seed: int,
) -> tuple[list[Column], list[float], Split, Split]:
    """Return what is learned and the weights of its columns; the split of all cells, and of those that can be used."""
    given, usable, weights = read_split(data, split_key), tokens.lengths > 0, [1.0]
    if level == "gene":
        columns = [gene_labels(data, target, tokens.vocabulary)]
    else:
        columns, weights = cell_columns(data, target, kind, usable, given.open)
        usable = np.any([column.known for column in columns], axis=0)
    by_class = level == "cell" and columns[0].kind == "class"
    split = _divided(given, usable, columns[0].values if by_class else np.zeros(len(usable)), fraction, seed)
    used = replace(split, train=split.train & usable, validation=split.validation & usable)
    if used.train.sum() < 2:
        need = "they need tokens, a label, and to be in the training part"
        raise ScbinInputError("L03", f"{used.train.sum()} cells to train on: {need}.")
    if level == "cell" and (given.donors is None or split.donors is not None):  # else they were warned of
        warn_of_donors(data, used, split_key)
    return columns, weights, split, used


def _divided(split: Split, usable: np.ndarray, strata: np.ndarray, fraction: float, seed: int) -> Split:
    """Return a split with validation cells drawn from the usable ones, strata alike, where it has none.

    By donor where donors are kept apart, if what they leave can be learned from, and they can judge it.
    """
    if not fraction or (split.validation & usable).any():
        return replace(split, train=split.open & ~split.validation)
    rows, held_out, donors = np.flatnonzero(split.open & usable), split.validation.copy(), split.donors
    classes, how = np.nan_to_num(strata[rows], nan=-1), dict[str, Any](most=_MOST_HELD_OUT, seed=seed)
    drawn = hold_out(classes, fraction, donors=None if donors is None else donors[rows], **how)
    if donors is not None and drawn.any() and suits(classes, drawn) < 2:
        found = "there are too few donors or batches, or their labels differ too much, to hold some of them out"
        warn("L03", f"{found}: cells of all of them are held out, and scores are too good for new ones.")
        donors, drawn = None, hold_out(classes, fraction, **how)
    held_out[rows[drawn]] = True
    if donors is not None:  # unlabelled cells of held-out donors go with them
        held_out |= split.open & np.isin(donors, donors[held_out])
    return replace(split, train=split.open & ~held_out, validation=held_out, donors=donors)


def _complete(training: Training, max_steps: int | None, n_cells: int) -> Training:
    """Return the settings to train on so many cells, with those of fine-tuning where nothing was chosen."""
    training = replace(training, max_steps=max_steps) if max_steps else training
    training = training.filled(learning_rate=_RATE, cells_per_step=_CELLS_PER_STEP, warmup=0.1)
    epochs = max(1, min(_EPOCHS, round(_STEPS * (training.cells_per_step or 1) / n_cells)))
    return training.filled(epochs=epochs).complete()


def _clearly_better(gain: np.ndarray) -> bool:
    """Whether the losses of held-out items fell by more than chance; where there are none, training is believed."""
    return bool(not len(gain) or gain.mean() > _CLEARLY * gain.std() / np.sqrt(len(gain)))


def _new_network(tokens: Tokens, split: Split, seed: int) -> CellNetwork:
    """Return an untrained network that starts from the training cells."""
    cells = np.flatnonzero(split.train)
    network = build_network(tokens.vocabulary, preset_for(len(cells)), seed=seed)
    start(network, Pretraining(tokens.vocabulary), tokens, cells, seed=seed)
    return network


@contextmanager
def _partly_frozen(network: Any, freeze: int) -> Iterator[None]:
    """For a while keep the first layers of the backbone as they are, and the weights of genes, as good as their penalty made them."""
    parts, n_layers = network.backbone.modules(), network.backbone.n_layers
    layers: Any = next((part for part in parts if isinstance(part, nn.ModuleList) and len(part) == n_layers), [])
    genes: list[Any] = [network.labels.genes] if isinstance(network.labels, LabelHead) else []
    for weight in genes + [weight for layer in layers[:freeze] for weight in layer.parameters()]:
        weight.requires_grad_(False)
    yield
    network.requires_grad_(True)


# ---- cells and genes ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Items:
    """Labelled cells or genes, one row each, with the head that learns them: probes for its start, losses of held-out ones."""

    columns: list[Column]
    rows: np.ndarray  # (items,) cells or genes, where they stand in the columns
    held_out: np.ndarray  # (items,) bool
    donors: np.ndarray | None  # (items,)
    vectors: np.ndarray  # (items, size): cell vectors, or mean hidden states of genes
    features: csr_matrix  # (items, features): log expression, or simple features of genes
    scaler: Scaler
    outputs: Callable[[], np.ndarray]  # of the network for held-out items (held out, outputs)
    seed: int

    def __post_init__(self) -> None:
        self.head: Any = None
        self.targets: list[Target] = []
        self.values: list[np.ndarray] = []  # by target: class, or standardised number, NaN where unknown (items,)
        self.class_weights: list[np.ndarray] = []
        self.probes: list[dict[tuple[float, bool], Probe]] = []
        self.scales: list[float] = []  # by target: temperature, or factor of a number
        self.report: dict[str, Any] = {}
        for column in self.columns:
            values = column.values[self.rows]
            known = values[~self.held_out & np.isfinite(values)]
            unit = {"mean": float(known.mean()), "scale": float(known.std()) or 1.0} if column.kind == "number" else {}
            self.targets.append(target := Target(column.name, column.kind, column.classes, **unit))
            self.values.append((values - target.mean) / target.scale)
            codes = known.astype(np.int64) if target.classes else np.zeros(len(known), dtype=np.int64)
            self.class_weights.append(balanced_weights(codes, target.n_outputs))

    def task(self, vocabulary: Vocabulary, layer: int | None, settings: Finetuning, weights: list[float]) -> Labels:
        """Return what the trainer learns."""
        n_rows, of_genes = len(self.columns[0].values), isinstance(self.head, GeneHead)
        values = np.full((len(self.values), n_rows), np.nan)
        values[:, self.rows] = self.values
        held_out = np.isin(np.arange(n_rows), self.rows[self.held_out]) if of_genes else None
        how: dict[str, Any] = {"class_weights": self.class_weights, "held_out": held_out, "layer": layer}
        return Labels(self.head, vocabulary, list(values), settings, weights=weights, **how)

    def probe(self) -> np.ndarray:
        """Fit probes and keep, by target, their mean or the one without the network; return what that says of held-out items."""
        outputs = []
        for number in range(len(self.targets)):
            reads = _READS if isinstance(self.head, LabelHead) else [_ALONE]
            fitted = {each: self._fit(number, ~self.held_out, each) for each in reads}
            alone = {_ALONE: fitted[_ALONE]}
            outputs.append(alone[_ALONE].outputs(self._features(self.held_out, _ALONE)))
            found = [(*self._cross_validated(number, probes), probes) for probes in (fitted, alone)]
            _, scale, kept = min(found, key=lambda each: each[0])
            self.probes.append(kept)
            self.scales.append(scale)
            about = {"reads": list(map(list, kept)), "strengths": [probe.strength for probe in kept.values()]}
            self.report[self.targets[number].name] = about
        return np.hstack(outputs)

    def _cross_validated(self, number: int, probes: dict[Any, Probe]) -> tuple[float, float]:
        """Return the cross-validated loss of the mean of some probes, and the temperature, or factor of a number, that it then has."""
        said, truth = np.mean([probe.held_out for probe in probes.values()], axis=0), next(iter(probes.values())).truth
        n_classes = len(self.targets[number].classes)
        if n_classes:
            scale = fitted_temperature(said, truth)
            return float(losses_of(said / scale, truth, n_classes).mean()), scale
        scale = float(said[:, 0] @ truth / max(float((said**2).sum()), 1e-12))  # each is drawn to 0 by its penalty
        return float(losses_of(said * scale, truth, 0).mean()), scale

    def refit(self) -> None:
        """Fit the probes to all items, held out or not, and put them into the head."""
        everything = np.ones_like(self.held_out)
        for number, probes in enumerate(self.probes):
            again = {reads: self._fit(number, everything, reads, probe.strength) for reads, probe in probes.items()}
            self.probes[number] = again
        self.install()

    @torch.no_grad()
    def install(self) -> None:
        """Put the mean of the probes into the head."""
        head, size = self.head, self.vectors.shape[1]
        head.vector_mean.copy_(torch.from_numpy(self.scaler.mean))
        head.vector_scale.copy_(torch.from_numpy(self.scaler.factor))
        if isinstance(head, LabelHead):
            head.gene_scale.copy_(torch.from_numpy(self.scaler.gene_factor))
        for parameter in (head.output.weight, head.output.bias, head.genes):
            parameter.zero_()
        for number, (target, probes, scale) in enumerate(zip(self.targets, self.probes, self.scales, strict=True)):
            part = head.part(number)
            head.temperature[number] = scale if target.classes else 1.0
            for (weight, genes), probe in probes.items():
                share = (1.0 if target.classes else scale) / len(probes)
                weights = torch.from_numpy(probe.weights * share).float()
                head.output.bias[part] += torch.from_numpy(probe.bias * share).float()
                if weight:
                    head.output.weight[part] += weights[:size].T * weight
                if genes:
                    head.genes[:, part] += weights[size if weight else 0 :]

    def losses(self, outputs: np.ndarray, weights: list[float]) -> np.ndarray:
        """Return the loss of each held-out item with a label: log loss and squared error by their weights, which have mean 1."""
        total, amount = np.zeros(len(outputs)), np.zeros(len(outputs))
        for number, target in enumerate(self.targets):
            true, own = self.values[number][self.held_out], outputs[:, self.head.part(number)].astype(np.float64)
            at = np.flatnonzero(np.isfinite(true) & np.isfinite(own).all(axis=1))
            true = true[at].astype(np.int64) if target.classes else true[at]
            weight = weights[number] * (self.class_weights[number][true] if target.classes else np.ones(len(at)))
            total[at] += weight * losses_of(own[at], true, len(target.classes))
            amount[at] += weight
        return total[amount > 0] / amount[amount > 0].mean() if amount.any() else np.zeros(0)

    def calibrate(self, outputs: np.ndarray) -> None:
        """Set the temperatures by the outputs for the held-out items."""
        for number, target in enumerate(self.targets):
            true = self.values[number][self.held_out]
            if target.classes:
                own, known = outputs[:, self.head.part(number)], np.isfinite(true)
                temperature = fitted_temperature(own[known], true[known].astype(np.int64), fewest=30)
                self.head.temperature[number] = temperature

    def _features(self, rows: np.ndarray, reads: tuple[float, bool]) -> Any:
        weight, genes = reads
        return self.scaler.features(self.vectors[rows], self.features[rows] if genes else None, weight)

    def _fit(self, number: int, rows: np.ndarray, reads: tuple[float, bool], strength: float | None = None) -> Probe:
        rows = rows & np.isfinite(self.values[number])
        how: dict[str, Any] = {"class_weights": self.class_weights[number], "strength": strength, "seed": self.seed}
        how["donors"] = None if self.donors is None else self.donors[rows]
        values, n_classes = self.values[number][rows], len(self.targets[number].classes)
        return fit_probe(self._features(rows, reads), values, n_classes, **how)


def _cells(
    network: Any, tokens: Tokens, columns: list[Column], split: Split, seed: int, options: dict[str, Any]
) -> _Items:
    """Return the labelled cells, and give the network a head for them."""
    rows = np.flatnonzero(split.open)
    held_out, donors = split.validation[rows], None if split.donors is None else split.donors[rows]
    vectors = np.nan_to_num(embed(network, tokens, rows=rows, **options)[rows])
    expression, asked = log_expression(tokens, rows), rows[held_out]
    scaler = Scaler.fit(vectors[~held_out], expression[~held_out])
    outputs = lambda: label_outputs(network, tokens, rows=asked, **options)[asked]
    items = _Items(columns, rows, held_out, donors, vectors, expression, scaler, outputs, seed)
    with seeded(seed):
        items.head = network.labels = LabelHead(tokens.vocabulary, network.vector.size, items.targets)
    return items


def _genes(
    network: Any, tokens: Tokens, columns: list[Column], split: Split, fraction: float, seed: int, options: Any
) -> _Items:
    """Return the labelled genes that some cells express, and give the network a head for them."""
    every = np.flatnonzero(split.open)
    cells, simple = every[some_of(len(every), _MOST_FOR_GENES, seed)], gene_features(tokens, every, seed)
    hidden, _ = mean_gene_vectors(network, tokens, rows=cells, **options)
    rows = np.flatnonzero(columns[0].known & np.isfinite(hidden).all(axis=1))
    held_out = hold_out(columns[0].codes(rows), fraction, seed=seed)
    features, asked = csr_matrix(simple[rows]), rows[held_out]
    scaler = replace(Scaler.fit(hidden[rows], features), gene_factor=np.ones(simple.shape[1], dtype=np.float32))
    outputs = lambda: gene_outputs(network, tokens, rows=cells, **options)[asked]
    items = _Items(columns, rows, held_out, None, hidden[rows], features, scaler, outputs, seed)
    with seeded(seed):
        items.head = network.labels = GeneHead(
            tokens.vocabulary, hidden.shape[1], items.targets, n_features=simple.shape[1]
        )
    items.head.features.copy_(torch.from_numpy(simple))
    return items


def gene_features(tokens: Tokens, cells: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return what expression alone says of genes (genes, features): mean, detection rate, spread and principal directions, scaled.

    By all these cells, or 10,000. Singular vectors are exact: those of a randomized SVD change with its seed, and what they say, too.
    """
    expression = log_expression(tokens, cells[some_of(len(cells), _MOST_FOR_FEATURES, seed)])
    mean = np.asarray(expression.mean(axis=0)).ravel()
    detected = np.asarray((expression > 0).mean(axis=0)).ravel()
    variance = np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean**2
    rank = max(min(_LOADINGS, min(expression.shape) - 1), 1)
    loadings = TruncatedSVD(rank, algorithm="arpack", random_state=seed).fit(expression).components_.T
    features = np.column_stack([mean, detected, np.sqrt(np.maximum(variance, 0)), loadings])
    return np.clip(StandardScaler().fit_transform(features), -LARGEST, LARGEST).astype(np.float32)
