"""`tl.finetune`: teach a model the labels of cells or genes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix
from scipy.special import log_softmax
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import StandardScaler
from torch import nn

from scbin import _docs, _keys
from scbin._adata import check_writable, read_tokens, write
from scbin._arguments import checked, instances, shown
from scbin._errors import ScbinInputError
from scbin.io.corpus import opened
from scbin.model import Model, remember, resolve_model
from scbin.nn.backbone import seeded
from scbin.nn.labels import LARGEST, GeneHead, LabelHead, Target, gene_outputs, label_outputs
from scbin.nn.network import build_network
from scbin.nn.presets import preset_for
from scbin.nn.run import embed
from scbin.tl._genes import mean_gene_vectors
from scbin.tl._labels import (
    MaskedPhenotypes,
    cell_labels,
    class_weights_of,
    gene_labels,
    kinds_of,
    obs_column,
    target_weights,
    with_columns,
)
from scbin.tl._leakage import remembered_cells
from scbin.tl._probe import Probe, Scaler, fit_classes, fit_numbers, fitted_temperature, log_expression, log_loss_of
from scbin.tl._split import Split, hold_out, read_split, warn_of_donors
from scbin.train.adapters import adapted
from scbin.train.distributed import is_first_process
from scbin.train.labels import CellLabels, Finetuning, GeneLabels
from scbin.train.loop import train
from scbin.train.pretraining import Pretraining
from scbin.train.settings import Training
from scbin.train.start import start

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from scbin.get.predictions import Column, Kind
    from scbin.io.corpus import Paths
    from scbin.nn.network import CellNetwork
    from scbin.tokens.tokens import Tokens

NEW = "new"
_RATE, _EPOCHS, _STEPS, _CELLS_PER_STEP = 3e-4, 8, 400, 32  # epochs, but about as many steps at most
_MOST_HELD_OUT, _MOST_FOR_GENES = 2_000, 2_000  # cells
# standard errors that a gain on held-out cells must exceed: the best epoch was chosen on the same cells
_CLEARLY = 2.0
# what a probe reads: the weight of the standardised vector, and whether the standardised genes
_ALONE, _BESIDE, _VECTOR = (0.0, True), (3.0, True), (1.0, False)
_LOADINGS = 30


@_docs.shared
@checked
def finetune(
    adata: AnnData | Tokens | Paths,
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

    The head starts from a linear probe: the mean of scikit-learn's logistic (or ridge) regressions on the log expression of each gene,
    on the cell's vector, and on both, or the first alone where that is better. Everything is chosen by cross-validation, by donor where donors are kept apart. Then network and head are
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
        Column of `obs`, a matrix in `obsm` (each column is a number to learn, such as a protein), several of them, or `{name: weight in the loss}`. Cells without a label are left out: NaN, and `""`,
        `"unknown"`, `"nan"`, `"na"`, `"n/a"` and `"<NA>"` in any case. With `level="gene"` `{class: genes}`, or a column of `var`.
    kind
        `"class"` or `"number"`, such as an age; also by column.
    level
        `"cell"`, or `"gene"`: labels are those of genes. The head reads simple features of their expression, which were measured to be
        better than hidden states; these it reads with `finetuning=scbin.Finetuning(expression=False)`.
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
    starts_random = settings.hidden is not None and level == "cell"
    if starts_random and max_steps == 0:
        raise ScbinInputError("A03", "a head with a hidden layer starts at random: it needs max_steps above 0.")
    adata = opened(adata, tokens_key)
    old = start_model(model, adata)
    tokens = read_tokens(adata, None if old is None else old.vocabulary, tokens_key)
    if isinstance(adata, AnnData):
        check_writable(adata, "obs", _keys.SPLIT)
    labels = _read_labels(adata, tokens, level, target, kind, split_key, class_weights, settings.validation, seed)
    split, masked = labels.split, MaskedPhenotypes(tokens)
    network: Any = _new_network(masked, split, seed) if old is None else copy.deepcopy(old.network)
    n_layers = network.backbone.n_layers
    if freeze != "all" and not 0 <= freeze <= n_layers:
        raise ScbinInputError("A02", f"freeze is {freeze}; pass 'all', or 0 to {n_layers}, the layers of this network.")
    training = _complete(training, max_steps, int(split.train.sum()))

    options = {"device": device, "token_budget": training.token_budget}
    items = (_genes if level == "gene" else _cells)(network, masked, labels, settings, options, seed)
    losses = {"without network": items.losses(items.probe())}
    if not starts_random:
        items.install()
    losses["linear probe"] = items.losses(items.outputs())
    kept, history = "linear probe", pd.DataFrame()
    if max_steps != 0 and (freeze != "all" or starts_random):
        untouched = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
        with _changeable(network, freeze, lora, seed):
            history = train(
                network, items.task, masked, training, cells=np.flatnonzero(split.open),
                held_out=np.flatnonzero(split.validation), save_dir=save_dir, device=device, seed=seed, progress=progress,
            )  # fmt: skip
        outputs = items.outputs()
        losses["fine-tuned"] = items.losses(outputs)
        if starts_random or _is_better(losses["fine-tuned"], losses["linear probe"]):
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
    report |= {"targets": {column.name: column.kind for column in labels.columns}}
    report |= {"n_cells": int(split.train.sum()), "n_held_out": int(split.validation.sum())}
    report["cells"] = remembered_cells(tokens, np.flatnonzero(split.open))
    described = {} if old is None else dict(old.training)
    result = Model(network.eval(), tokens.vocabulary, {**described, "finetune": report}, history)
    if progress and is_first_process():
        told = ", ".join(f"{loss:.3f} {name}" for name, loss in means.items()) or "not known"
        print(f"scbin: held-out loss {told}; kept the {kept}.")
    if save_dir is not None and is_first_process():
        result.save(Path(save_dir) / "model", overwrite=True)
    if isinstance(adata, AnnData):
        _write(adata, result, labels.whole, save_dir)
    return result


# ---- what is asked for ----------------------------------------------------------------------------------------------


def start_model(model: Model | str | os.PathLike[str] | None, data: AnnData | Tokens) -> Model | None:
    """Return the model to start from, `None` for a new one."""
    adata = data if isinstance(data, AnnData) else None
    entry = {} if adata is None else adata.uns.get(_keys.UNS, {})
    if model == NEW or (model is None and not (isinstance(entry, Mapping) and entry.get(_keys.MODEL_ID))):
        return None
    return resolve_model(model, adata)


class _Labels(NamedTuple):
    """Labels as they were read, and the cells to learn them from."""

    columns: list[Column]
    weights: list[float]  # of the columns
    class_weights: list[np.ndarray]  # by column, of each class (classes,)
    split: Split
    whole: Split  # the same for cells that are not used, too


def _read_labels(
    data: AnnData | Tokens, tokens: Tokens, level: str, target: Any, kind: Any, split_key: str | None, class_weights: Any,
    fraction: float, seed: int,
) -> _Labels:  # fmt: skip
    """Read the labels, and take or draw the cells to learn them (or to read genes in) and to validate on."""
    known, usable = read_split(data, split_key), tokens.lengths > 0
    if level == "gene":
        if kind != "class":
            raise ScbinInputError("A03", f"kind is {shown(kind)}, but genes are learned as classes.")
        columns, weights = [gene_labels(data, target, tokens.vocabulary)], {"": 1.0}
    else:
        weights = target_weights(target)
        every = with_columns(data, weights, kinds_of(weights, kind))
        weights = {name: weight for name, (weight, _) in every.items()}
        columns = [cell_labels(obs_column(data, name), name, of, usable, known.open) for name, (_, of) in every.items()]
        usable = np.any([column.known for column in columns], axis=0)
    held_out, donors, test = known.validation.copy(), known.donors, known.test
    if fraction and not (held_out & usable).any():
        rows = np.flatnonzero(known.open & usable)
        by_class = level == "cell" and columns[0].kind == "class"
        strata = np.nan_to_num(columns[0].values[rows], nan=-1) if by_class else np.zeros(len(rows))
        own = None if donors is None else donors[rows]
        held_out[rows[hold_out(strata, fraction, donors=own, most=_MOST_HELD_OUT, seed=seed)]] = True
        if donors is not None:  # unlabelled cells of held-out donors go with them
            held_out |= known.open & np.isin(donors, donors[held_out])
    train = known.open & ~held_out
    split, whole = Split(train & usable, held_out & usable, test, donors), Split(train, held_out, test)
    if (n := int(split.train.sum())) < 2:
        raise ScbinInputError(
            "L03", f"{n} cells to train on: they need tokens, a label, and to be in the training part."
        )
    if level == "cell":
        warn_of_donors(data, split, split_key)
    learned = [column.known & split.train if level == "cell" else column.known for column in columns]
    by_column = [class_weights_of(column, class_weights, each) for column, each in zip(columns, learned, strict=True)]
    is_named = (known.test | known.validation).any()  # cells that are not used now keep their part
    return _Labels(columns, list(weights.values()), by_column, split, whole if is_named else split)


def _new_network(tokens: Tokens, split: Split, seed: int) -> CellNetwork:
    """Return an untrained network that starts from the training cells."""
    cells = np.flatnonzero(split.train)
    network = build_network(tokens.vocabulary, preset_for(len(cells)), seed=seed)
    start(network, Pretraining(tokens.vocabulary), tokens, cells, seed=seed)
    return network


def _complete(training: Training | None, max_steps: int | None, n_cells: int) -> Training:
    """Return the settings with fine-tuning's own values where nothing was chosen."""
    training = Training() if training is None else training
    training = replace(training, max_steps=max_steps) if max_steps else training
    training = training.filled(learning_rate=_RATE, cells_per_step=_CELLS_PER_STEP, warmup=0.1)
    epochs = max(1, min(_EPOCHS, round(_STEPS * (training.cells_per_step or 1) / max(n_cells, 1))))
    return training.filled(epochs=epochs).complete()


def _is_better(after: np.ndarray, before: np.ndarray) -> bool:
    """Whether losses fell by more than chance, or nobody can say."""
    gain = before - after
    return not len(gain) or bool(gain.mean() > _CLEARLY * gain.std() / np.sqrt(len(gain)))


@contextmanager
def _changeable(network: Any, freeze: Any, lora: bool | Mapping[str, Any], seed: int) -> Iterator[None]:
    """Let the first layers of the backbone (or all but the head) stay as they are, or train adapters, for a while."""
    backbone: Any = network.backbone
    parts = [backbone, network.vector]
    if freeze != "all":
        lists = [
            part for part in backbone.modules() if isinstance(part, nn.ModuleList) and len(part) == backbone.n_layers
        ]
        if freeze and not lists:
            raise ScbinInputError("A02", "this backbone has no layers to freeze one by one; use freeze='all', or 0.")
        parts = list(lists[0][:freeze]) if freeze else []
    still = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    if isinstance(network.labels, LabelHead) and network.labels.genes is not None:
        still.append(network.labels.genes)  # as good as its penalty made it
    try:
        for parameter in still:
            parameter.requires_grad_(False)
        with adapted(backbone, dict(lora) if isinstance(lora, Mapping) else {} if lora else None, seed=seed):
            yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


# ---- cells and genes ------------------------------------------------------------------------------------------------


def _cross_validated(probes: Sequence[Probe], kind: Kind) -> tuple[float, float]:
    """Return the cross-validated loss of the mean of some probes, and the temperature, or factor of a number, that it then has."""
    said, truth = np.mean([probe.held_out for probe in probes], axis=0), probes[0].truth
    if not len(truth):
        return np.nan, 1.0
    if kind == "class":
        scale = fitted_temperature(said, truth)
        return float(log_loss_of(said / scale, truth).mean()), scale
    scale = float(said[:, 0] @ truth / max(float((said**2).sum()), 1e-12))  # each is drawn to 0 by its penalty
    return float(np.square(truth - said[:, 0] * scale).mean()), scale


@dataclass(eq=False)
class _Items:
    """Labelled cells or genes, one row each, with the head that learns them: probes for its start, losses of held-out ones."""

    task: CellLabels
    labels: _Labels
    head: Any
    rows: np.ndarray  # (items,) cells or genes
    held_out: np.ndarray  # (items,) bool
    donors: np.ndarray | None  # (items,)
    vectors: np.ndarray  # (items, size): cell vectors, or mean hidden states of genes
    features: csr_matrix  # (items, features): log expression, or simple features of genes
    scaler: Scaler
    reads: list[tuple[float, bool]]  # what a probe may read: weight of the vectors, and whether features
    outputs: Callable[[], np.ndarray]  # of the network for held-out items (held out, outputs)
    seed: int
    report: dict[str, Any] = field(default_factory=dict)
    probes: list[dict[tuple[float, bool], Probe]] = field(default_factory=list)  # by target
    scales: list[float] = field(default_factory=list)  # by target: temperature, or factor of a number

    def probe(self) -> np.ndarray:
        """Fit the probes of each target and keep their mean, or the one without the network; return what that says of held-out items."""
        outputs = []
        for number, target in enumerate(self.head.targets):
            fitted = {reads: self._fit(number, ~self.held_out, reads) for reads in dict.fromkeys([_ALONE, *self.reads])}
            outputs.append(fitted[_ALONE].outputs(self._features(self.held_out, _ALONE)))
            ways = [self.reads, [_ALONE]] if _ALONE in self.reads else [self.reads]
            found = [_cross_validated([fitted[reads] for reads in way], target.kind) for way in ways]
            best = int(np.nanargmin([loss for loss, _ in found])) if np.isfinite(found[0][0]) else 0
            self.probes.append({reads: fitted[reads] for reads in ways[best]})
            self.scales.append(found[best][1])
            strengths = [probe.strength for probe in self.probes[-1].values()]
            losses = {
                "without_network": _cross_validated([fitted[_ALONE]], target.kind)[0],
                "cross_validated_loss": found[best][0],
            }
            self.report[target.name] = {
                "reads": [list(reads) for reads in ways[best]],
                "strengths": strengths,
                **losses,
            }
        return np.hstack(outputs)

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
        if isinstance(head, LabelHead) and head.genes is not None:
            head.gene_scale.copy_(torch.from_numpy(self.scaler.gene_factor))
        for number, (probes, scale) in enumerate(zip(self.probes, self.scales, strict=True)):
            part, is_class = head.part(number), head.targets[number].kind == "class"
            head.temperature[number] = scale if is_class else 1.0
            head.output.weight[part], head.output.bias[part] = 0.0, 0.0
            if head.genes is not None:
                head.genes[:, part] = 0.0
            for (weight, genes), probe in probes.items():
                share = (1.0 if is_class else scale) / len(probes)
                weights = torch.from_numpy(probe.weights * share).float()
                head.output.bias[part] += torch.from_numpy(probe.bias * share).float()
                if weight:
                    head.output.weight[part] += weights[:size].T * weight
                if genes:
                    head.genes[:, part] += weights[size if weight else 0 :]

    def losses(self, outputs: np.ndarray) -> np.ndarray:
        """Return the loss of each held-out item with a label: log loss and squared error by their weights, which have mean 1."""
        total, amount = np.zeros(len(outputs)), np.zeros(len(outputs))
        for number, target in enumerate(self.head.targets):
            true, own = self._values(number)[self.held_out], outputs[:, self.head.part(number)].astype(np.float64)
            at = np.flatnonzero(np.isfinite(true) & np.isfinite(own).all(axis=1))
            weight = np.full(len(at), self.labels.weights[number])
            if target.kind == "number":
                loss = np.square(own[at, 0] - true[at])
            else:
                codes = true[at].astype(np.int64)
                loss = -log_softmax(own[at], axis=1)[np.arange(len(at)), codes]
                weight *= self.labels.class_weights[number][codes]
            total[at] += weight * loss
            amount[at] += weight
        return total[amount > 0] / amount[amount > 0].mean() if amount.any() else np.zeros(0)

    def calibrate(self, outputs: np.ndarray) -> None:
        """Set the temperatures by the outputs for the held-out items."""
        for number, target in enumerate(self.head.targets):
            true = self._values(number)[self.held_out]
            if target.kind == "class":
                own, known = outputs[:, self.head.part(number)], np.isfinite(true)
                temperature = fitted_temperature(own[known], true[known].astype(np.int64), fewest=30)
                self.head.temperature[number] = temperature

    def _values(self, number: int) -> np.ndarray:
        """Return the class, or the standardised number, of each item; NaN where it is unknown."""
        target = self.head.targets[number]
        return (self.labels.columns[number].values[self.rows] - target.mean) / target.scale

    def _features(self, rows: np.ndarray, reads: tuple[float, bool]) -> Any:
        weight, genes = reads
        return self.scaler.features(self.vectors[rows], self.features[rows] if genes else None, weight)

    def _fit(self, number: int, rows: np.ndarray, reads: tuple[float, bool], strength: float | None = None) -> Probe:
        target, values = self.head.targets[number], self._values(number)
        rows = rows & np.isfinite(values)
        donors, features = None if self.donors is None else self.donors[rows], self._features(rows, reads)
        options: dict[str, Any] = {"donors": donors, "strength": strength, "seed": self.seed}
        if target.kind == "number":
            return fit_numbers(features, values[rows], **options)
        weights = self.labels.class_weights[number]
        return fit_classes(features, values[rows].astype(np.int64), target.n_outputs, class_weights=weights, **options)


def _cells(
    network: Any, tokens: Tokens, labels: _Labels, settings: Finetuning, options: dict[str, Any], seed: int
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
            dropout=settings.dropout,
        )  # fmt: skip
    task = CellLabels(
        head, tokens.vocabulary, [(column.values - t.mean) / t.scale for column, t in zip(labels.columns, targets, strict=True)],
        weights=labels.weights, class_weights=labels.class_weights, gene_dropout=settings.gene_dropout,
        label_smoothing=settings.label_smoothing, layer=network.vector.layer,
    )  # fmt: skip
    rows, asked = np.flatnonzero(split.open), np.flatnonzero(split.validation)
    vectors, expression = embed(network, tokens, rows=rows, **options)[rows], log_expression(tokens, rows)
    held_out, donors = split.validation[rows], None if split.donors is None else split.donors[rows]
    scaler = Scaler.fit(np.nan_to_num(vectors[~held_out]), expression[~held_out])
    return _Items(
        task, labels, head, rows, held_out, donors, np.nan_to_num(vectors), expression, scaler,
        [_ALONE, _BESIDE, _VECTOR] if settings.expression else [_VECTOR],
        lambda: label_outputs(network, tokens, rows=asked, **options)[asked], seed,
    )  # fmt: skip


def _genes(
    network: Any, tokens: Tokens, labels: _Labels, settings: Finetuning, options: dict[str, Any], seed: int
) -> _Items:
    """Return the labelled genes that some cells express, and give the network a head for them."""
    column, cells = labels.columns[0], np.flatnonzero(labels.split.open)
    cells = np.sort(np.random.default_rng(seed).permutation(cells)[:_MOST_FOR_GENES])
    features = gene_features(log_expression(tokens, cells), seed)
    targets, size = [Target(column.name, "class", column.classes)], network.backbone.hidden_size
    network.labels = head = GeneHead(tokens.vocabulary, size, targets, n_features=features.shape[1])
    head.features.copy_(torch.from_numpy(features))
    hidden, _ = mean_gene_vectors(network, tokens, network.vector.layer, rows=cells, **options)
    rows = np.flatnonzero(column.known & np.isfinite(hidden).all(axis=1))
    held_out = hold_out(column.codes(rows), settings.validation, seed=seed)
    if len(np.unique(column.codes(rows[~held_out]))) < 2:
        raise ScbinInputError("L02", f"the cells express genes of one class of {column.name!r} only.")
    asked, own = rows[held_out], csr_matrix(features[rows])
    task = GeneLabels(
        head, tokens.vocabulary, [column.values], class_weights=labels.class_weights,
        held_out=np.isin(np.arange(len(hidden)), asked), gene_dropout=settings.gene_dropout,
        label_smoothing=settings.label_smoothing, layer=network.vector.layer,
    )  # fmt: skip
    scaler = replace(Scaler.fit(hidden[rows], own), gene_factor=np.ones(own.shape[1], dtype=np.float32))
    return _Items(
        task, labels, head, rows, held_out, None, hidden[rows], own, scaler, [_ALONE] if settings.expression else [_VECTOR],
        lambda: gene_outputs(network, tokens, rows=cells, **options)[asked], seed,
    )  # fmt: skip


def gene_features(expression: csr_matrix, seed: int = 0) -> np.ndarray:
    """Return what expression alone says of genes (genes, features): mean, detection rate, spread and principal directions, scaled."""
    mean = np.asarray(expression.mean(axis=0)).ravel()
    detected = np.asarray((expression > 0).mean(axis=0)).ravel()
    variance = np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean**2
    rank = max(min(_LOADINGS, min(expression.shape) - 1), 1)
    loadings = TruncatedSVD(rank, random_state=seed).fit(expression).components_.T
    features = np.column_stack([mean, detected, np.sqrt(np.maximum(variance, 0)), loadings])
    return np.clip(StandardScaler().fit_transform(features), -LARGEST, LARGEST).astype(np.float32)


def _write(adata: AnnData, model: Model, split: Split, save_dir: Any) -> None:
    identifier = model.fingerprint
    remember(identifier, model)
    write(adata, "obs", _keys.SPLIT, split.column())
    entries = {**adata.uns.get(_keys.UNS, {}), _keys.FINETUNE: json.dumps(model.training["finetune"])}
    entries.pop(_keys.FINETUNE_HISTORY, None)  # that of an earlier model would be taken for this one's
    entries |= {_keys.FINETUNE_HISTORY: model.history.copy()} if len(model.history) else {}
    path = "" if save_dir is None else str(Path(save_dir).resolve() / "model")
    adata.uns[_keys.UNS] = entries | {_keys.MODEL_ID: identifier, _keys.MODEL_PATH: path}
