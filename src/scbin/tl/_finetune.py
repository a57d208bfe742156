"""`tl.finetune`: a model that answers what a column says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin import _keys
from scbin._anndata import check_adata, check_writable, read_tokens, write_obs, write_uns
from scbin._arguments import paths, plain, texts, whole_numbers
from scbin.model import Model
from scbin.nn.checkpoint import replaces_model
from scbin.nn.embedding import hide_phenotypes
from scbin.nn.heads import HeadPlan
from scbin.nn.presets import PRESETS
from scbin.tl._finetune_plan import (
    NEW,
    Reading,
    check_choices,
    epochs_for,
    kinds_of,
    new_model,
    say_what_is_learned,
    summary,
    weights_of_classes,
)
from scbin.tl._model import remember, resolve_model
from scbin.tl._seen import remembered_cells
from scbin.tl._targets import target_weights
from scbin.train.answers import Answers
from scbin.train.distributed import is_first_process
from scbin.train.finetuning import Tuning, check_freeze, finetune_tokens
from scbin.train.settings import TrainSettings
from scbin.train.starting import Lesson

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

    from scbin.nn.device import Precision
    from scbin.nn.heads import Design
    from scbin.tl._sides import Sides
    from scbin.tl._targets import Kinds

_RATE, _RATE_FROM_RANDOM = 3e-5, 2e-4  # of the network
# factors on it: the output may follow the network; the table of genes is as good as its penalty made it, and stays
_HEAD_FASTER = {"objective.head": 3.0, "objective.head.genes": 0.0}


def finetune(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | Sequence[str] | Mapping[str, float],
    kind: Kinds | Mapping[str, Kinds] = "class",
    level: Literal["cell", "gene"] = "cell",
    head: Design | None = None,
    split_key: str | None = None,
    validation_share: float = 0.1,
    fewest: int = 1,
    class_weights: Literal["balanced"] | Mapping[str, float] | None = None,
    sampling: Literal["balanced"] | None = None,
    rebalance: float | None = None,
    freeze: int | Literal["all"] = 0,
    lora: bool | Mapping[str, Any] = False,
    gene_drop: float = 0.3,
    label_smoothing: float = 0.1,
    dropout: float = 0.0,
    epochs: int | None = None,
    max_steps: int | None = None,
    cells_per_step: int = 32,
    learning_rate: float | None = None,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    patience: int | None = 2,
    token_budget: int = 32_768,
    device: str = "auto",
    precision: Precision = "auto",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    save_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    tensorboard: str | os.PathLike[str] | None = None,
    wandb: str | None = None,
    tokens_key: str | None = None,
    gene_key: str | None = None,
    progress: bool = True,
) -> Model:
    """Teach a model to answer what a column says: the type of a cell, its donor's age, the class of a gene.

    The head is linear in two things at once: the vector that the network makes of a cell, and the expression of each of its
    genes. It starts from logistic (or ridge) regressions on either or both, up to three of them added up, which are chosen by
    cross-validation on all cells with a label that are not test cells, by donor where donors are kept apart; then network and
    head are trained together, with some genes of every cell left out at random. What that gives is kept only where the loss on
    the held-out cells is better than the start's by more than two standard errors. That guards against losing what the
    regressions know, but a few dozen held-out cells can err: compare on test cells (:func:`scbin.tl.split`,
    :func:`scbin.tl.evaluate`); `max_steps=0` keeps to the regressions. Phenotype tokens are hidden: a label cannot leak through
    its own slot.

    Parameters
    ----------
    adata
        Tokenized cells. For data the model was not trained on: `scbin.pp.tokenize(adata, like=model)`.
    model
        A :class:`scbin.Model`, or the directory of one; it stays as it is. `"new"`, or the name of a preset, starts from a new
        network whose gene embeddings come from the data. Default: the one trained on these cells.
    target
        Column of `obs` (with `level="gene"` of `var`), several of them, or `{column: weight in the loss}`. Cells without a
        label are left out: NaN, and `""`, `"unknown"`, `"nan"`, `"na"`, `"n/a"` and `"<NA>"` in any case.
    kind
        `"class"`, or `"number"` for a column to be predicted as a number, such as an age; also by column.
    level
        `"cell"`, or `"gene"`: the labels are those of genes, and each cell shows a gene in another context.
    head
        `"wide"`, the default described above; `"linear"`: from the cell's vector alone; `"pooler"`: Geneformer's dense layer on
        the first token; `"mlp"`: PerturbGene's hidden layer on the first token; `"attention"`: a learned weight per token. The
        last three start at random. All are for cells.
    split_key
        Column of `obs` with donors or batches, none of which is then both in training and validation, and whose cells are not
        judged by their own in the cross-validation; or with `"train"`, `"validation"` and `"test"` (the donors that
        :func:`scbin.tl.split` divided by, or a column that evidently names donors who stand on one side each, are then taken
        into account). Default: `"scbin_split"`, where :func:`scbin.tl.split` named test cells there. Test cells are never looked
        at: with a column of donors, those that `"scbin_split"` names stay out too.
    validation_share
        Share of the labelled cells that are held out, to stop early and to calibrate. The regression is fitted to all
        labelled cells again where it is what is kept.
    fewest
        Classes with fewer cells are left out.
    class_weights
        `"balanced"`: every class counts alike in the loss, or `{class: weight}`.
    sampling
        `"balanced"`: cells of rare classes are drawn more often while training.
    rebalance
        How much rare classes are favoured over their frequency, from 0 to 1. Default: what is best for macro-F1 in the
        cross-validation, a quarter or more, half by the score itself and half by what the probabilities promise.
    freeze
        Number of layers that stay as they are, from the first; `"all"`: the network stays, only the head is fitted.
    lora
        Train low-rank adapters in place of the network's weights and merge them in the end; a mapping says more, as
        `peft.LoraConfig` takes it. Needs `scbin[lora]`.
    gene_drop
        Share of a cell's genes that are left out at random, others in every epoch.
    label_smoothing
        Share of the truth that is spread over all classes.
    dropout
        On the cell's vector, while training.
    epochs
        Times every cell is seen. Default: 8, fewer where that would be more than about 400 steps.
    max_steps
        Stop after so many steps; 0 keeps to the regression.
    cells_per_step
        Cells whose gradients make one step.
    learning_rate
        Its peak. Default: 3e-5, or 2e-4 for heads that start at random; the head itself learns three times as fast.
    schedule, warmup, weight_decay
        Of the learning rate and of AdamW.
    patience
        Validations (one per epoch) without a better loss until training stops. `None` trains to the end.
    token_budget
        Most tokens to go through the network at once.
    device
        `"auto"` takes cuda, then mps, then cpu.
    precision
        Of the matrix products; `"auto"` takes bfloat16 where it helps.
    gradient_checkpointing
        Trade a third of the speed for memory.
    seed
        The same seed, data and machine give the same model.
    save_dir, checkpoint_every, resume
        As for :func:`scbin.tl.pretrain`: directory for checkpoints, steps between them, and whether to go on from the newest.
        The finished model is saved as its subdirectory `model`.
    tensorboard, wandb
        Directory for TensorBoard, and name of a Weights & Biases project.
    tokens_key
        The slot of `obsm` with the tokens. Default: `"X_tokens"`.
    gene_key
        With `level="gene"`: column of `var` with the gene names. Default: `var_names`.
    progress
        Show a progress bar.

    Returns
    -------
    A new :class:`scbin.Model` with a `head`, and the `history` of the training. Sets the following fields:

    `adata.obs['scbin_split']`
        `"train"`, `"validation"` or `"test"`; NaN for cells that were not used, unless the split they come from has a side for
        them.
    `adata.uns['scbin']['finetune']`
        How the model was made, as JSON.
    `adata.uns['scbin']['finetune_history']`
        Losses, learning rate and speed of every step, as a `DataFrame`; none where nothing was trained.

    Raises
    ------
    ScbinInputError
        If a column is missing, continuous where classes are meant, holds one class only, or no number where one is meant.

    Notes
    -----
    A head that is linear in raw features and in a network's vector is the "wide and deep" model :cite:p:`cheng2016`; adding up
    the methods that help each other most, found greedily, follows ensemble selection :cite:p:`caruana2004`; taking
    off a share of the log frequencies follows logit adjustment :cite:p:`menon2021`; the adapters are LoRA :cite:p:`hu2022`.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:300].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.finetune(adata, "new", target="bulk_labels", max_steps=0, fewest=3)
    >>> model.head.targets[0].name
    'bulk_labels'
    """
    check_adata(adata)
    weights = target_weights(target)
    kinds = kinds_of(weights, kind)
    seed, freeze, lora, dropout, rebalance = map(plain, (seed, freeze, lora, dropout, rebalance))
    epochs, max_steps, gene_drop, label_smoothing = map(plain, (epochs, max_steps, gene_drop, label_smoothing))
    check_choices(level, head, kinds, sampling, rebalance, lora, validation_share, gene_drop, label_smoothing)
    whole_numbers(seed=seed, fewest=fewest, cells_per_step=cells_per_step)
    whole_numbers(optional=True, epochs=epochs, max_steps=max_steps, patience=patience)
    texts(optional=True, split_key=split_key, gene_key=gene_key)
    paths(optional=True, save_dir=save_dir, tensorboard=tensorboard)
    check_writable(adata, "obs", _keys.SPLIT)
    if save_dir is not None:
        replaces_model(Path(save_dir) / "model", overwrite=True)  # raises now rather than after hours of training
    old = None if isinstance(model, str) and (model == NEW or model in PRESETS) else resolve_model(model, adata)
    tokens, vocabulary = read_tokens(adata, None if old is None else old.vocabulary, key=tokens_key)
    tokens = hide_phenotypes(tokens, vocabulary)
    read = Reading(adata, tokens, vocabulary, level, split_key, gene_key, fewest)
    labels = read.labels(weights, kinds)
    sides = read.sides(labels, validation_share, seed)
    plan = HeadPlan("gene" if level == "gene" else head or "wide", tuple(label.target for label in labels), dropout)
    answers = Answers(
        tuple(label.values for label in labels),
        tuple(label.weight for label in labels),
        tuple(weights_of_classes(label, class_weights, sides.training, level) for label in labels),
    )
    start = new_model(str(model), tokens, vocabulary, sides.training, seed) if old is None else old
    check_freeze(freeze, start.config.num_hidden_layers)
    lesson = Lesson(
        tokens, vocabulary, start.weights(), answers, np.flatnonzero(sides.training), np.flatnonzero(sides.held_out),
        sides.groups, read.held_out_genes(labels, validation_share, seed),
    )  # fmt: skip
    convex = plan.design in ("wide", "linear")
    settings = TrainSettings(
        epochs=epochs_for(len(lesson.training), cells_per_step) if epochs is None else epochs,
        max_steps=max_steps or None,
        cells_per_step=cells_per_step,
        token_budget=token_budget,
        learning_rate=(_RATE if convex else _RATE_FROM_RANDOM) if learning_rate is None else learning_rate,
        rate_scale=_HEAD_FASTER,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        precision=precision,
        device=device,
        seed=seed,
        patience=patience,
        save_dir=None if save_dir is None else Path(save_dir),
        checkpoint_every=checkpoint_every,
        resume=resume,
        gradient_checkpointing=gradient_checkpointing,
        progress=progress,
        tensorboard=None if tensorboard is None else Path(tensorboard),
        wandb=wandb,
    )
    tuning = Tuning(
        train=max_steps != 0,
        gene_drop=gene_drop,
        label_smoothing=label_smoothing,
        freeze=freeze,
        lora=None if lora is False else {} if lora is True else dict(lora),
        sampling=sampling,
        rebalance=rebalance,
        layer=start.readout.layer,
    )
    say_what_is_learned(labels, sides, level)
    result = finetune_tokens(copy.deepcopy(start.bert), plan, lesson, tuning, settings, cell_names=adata.obs_names)
    report = summary(labels, sides, tuning, settings, result, split_key)
    report["cells"] = remembered_cells(tokens, vocabulary, np.flatnonzero(sides.training | sides.held_out))
    training = {**start.training, "finetune": report}
    new = Model(result.bert, vocabulary, start.readout, training, result.history, result.head)
    if save_dir is not None and is_first_process():
        new.save(Path(save_dir) / "model", overwrite=True)
    _write(adata, new, sides, save_dir)
    return new


def _write(adata: AnnData, model: Model, sides: Sides, save_dir: str | os.PathLike[str] | None) -> None:
    identifier = model.fingerprint
    remember(identifier, model)
    write_obs(adata, _keys.SPLIT, sides.column())
    write_uns(adata, _keys.FINETUNE, json.dumps(model.training["finetune"]))
    if len(model.history):
        write_uns(adata, _keys.FINETUNE_HISTORY, model.history.copy())
    else:  # that of an earlier model would be taken for this one's
        entries = adata.uns[_keys.UNS]
        adata.uns[_keys.UNS] = {name: entry for name, entry in entries.items() if name != _keys.FINETUNE_HISTORY}
    write_uns(adata, _keys.MODEL_ID, identifier)
    write_uns(adata, _keys.MODEL_PATH, "" if save_dir is None else str(Path(save_dir).resolve() / "model"))
