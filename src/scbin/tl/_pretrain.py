"""`tl.pretrain`: a model from tokenized cells."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin import _keys
from scbin._anndata import check_adata, read_obs, read_tokens, warn, write_obsm, write_uns
from scbin._arguments import flags, paths, whole_numbers
from scbin._errors import ScbinInputError, count
from scbin.data.masking import MaskingScheme
from scbin.model import Model
from scbin.nn.checkpoint import replaces_model
from scbin.nn.embedding import hide_phenotypes
from scbin.nn.presets import preset as preset_named
from scbin.nn.presets import preset_for
from scbin.nn.readout import Readout
from scbin.tl._embed import embedding_key
from scbin.tl._model import remember
from scbin.tl._seen import remembered_cells
from scbin.train.distributed import is_first_process, joined_world
from scbin.train.objective import MaskedLoss
from scbin.train.pretraining import Recipe, pretrain_tokens
from scbin.train.settings import TrainSettings
from scbin.train.setup import embed_together, split

if TYPE_CHECKING:
    import os

    from anndata import AnnData

    from scbin.nn.device import Precision
    from scbin.nn.embedding import Pooling
    from scbin.nn.presets import Preset
    from scbin.train.pretraining import Pretrained


def pretrain(
    adata: AnnData,
    *,
    preset: str | Preset = "auto",
    hidden_size: int | None = None,
    num_hidden_layers: int | None = None,
    num_attention_heads: int | None = None,
    intermediate_size: int | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    cells_per_step: int | None = None,
    learning_rate: float | None = None,
    gene_table: Literal["svd", "random"] = "svd",
    gene_table_rank: int = 30,
    gene_mask_prob: float = 0.15,
    phenotype_mask_prob: float = 0.5,
    masking: MaskingScheme | None = None,
    loss: MaskedLoss | None = None,
    masked_weight: float = 1.0,
    denoising_weight: float = 1.0,
    contrastive_weight: float = 0.1,
    pooling: Pooling = "weighted",
    projection: bool = True,
    batch_key: str | None = None,
    validation_share: float = 0.05,
    token_budget: int = 32_768,
    device: str = "auto",
    precision: Precision = "auto",
    gradient_checkpointing: bool = False,
    compile: bool = False,
    seed: int = 0,
    save_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    tensorboard: str | os.PathLike[str] | None = None,
    wandb: str | None = None,
    progress: bool = True,
    tokens_key: str | None = None,
    key_added: str | None = None,
) -> Model:
    """Train a BERT on the cells and give each cell its vector.

    The model learns to predict hidden genes (and phenotypes, where the tokens have some) from the rest of a cell, and to
    recognise two random halves of one cell among those of other cells. It starts from what the data themselves say: the
    embedding of each gene is its loading in a truncated SVD. Labels are used only if you tokenized them.

    Parameters
    ----------
    adata
        Tokenized cells (:func:`scbin.pp.tokenize`).
    preset
        Size and optimiser settings by name: `"tiny"` (a minute or two on a laptop), `"small"`, `"base"` (for a GPU), or those
        of published systems such as `"geneformer-v1-6l"`; see `scbin.nn.presets.PRESETS`. `"auto"` takes tiny up to 20,000
        cells, small up to 200,000, and base beyond. A `Preset` of your own is taken too.
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size
        Parts of the network's shape, over the preset's.
    epochs
        Times every cell is seen. Default: the preset's.
    max_steps
        Stop after so many steps of the optimiser.
    cells_per_step
        Cells whose gradients make one step. Default: the preset's.
    learning_rate
        Its peak. Default: the preset's.
    gene_table
        Start of the gene embeddings: the data's own truncated `"svd"`, or `"random"`.
    gene_table_rank
        Components of that SVD, at most the hidden size.
    gene_mask_prob, phenotype_mask_prob
        Share of the genes, and of the phenotypes, that are hidden and to be predicted.
    masking
        All details of what is hidden; replaces the two above.
    loss
        How predictions are scored: label smoothing, ordinal or binary losses, class weights.
    masked_weight, denoising_weight, contrastive_weight
        Weights of the terms of the loss: predicting what is hidden, finding the place of a cell from half of its genes, and
        recognising the two halves of a cell among others. 0 leaves one out.
    pooling
        How the vectors of a cell's tokens become the cell's vector: `"weighted"` by expression, `"mean"` or `"cls"`.
    projection
        Learn a last step of the embedding, from the vector of a cell to its place among the cells that are like it. `False` leaves
        the network's own vector.
    batch_key
        Column of `obs` with the batch of each cell: kinds of cells that batches share then lie together in the embedding. The
        network itself sees no batches, so new cells of any batch can be embedded.
    validation_share
        Share of the cells that are held out to report the loss on; the weights never see them.
    token_budget
        Most tokens to go through the network at once. Lower it to save memory; but for the draws of dropout, what is learned
        stays the same.
    device
        `"auto"` takes cuda, then mps, then cpu. Naming a device that is not there is an error.
    precision
        Of the matrix products; `"auto"` takes bfloat16 where it helps.
    gradient_checkpointing
        Trade a third of the speed for memory, for long cells and large networks.
    compile
        Let `torch.compile` fuse parts of the network.
    seed
        The same seed, data and machine give the same model.
    save_dir
        Directory for checkpoints, written so that a crash at any instant costs at most the steps since the last one; the
        finished model is saved as its subdirectory `model`.
    checkpoint_every
        Steps between checkpoints. Default: an epoch.
    resume
        Go on from the newest sound checkpoint in `save_dir`.
    tensorboard, wandb
        Directory for TensorBoard, and name of a Weights & Biases project.
    progress
        Show a progress bar with loss, speed and time left.
    tokens_key
        The slot of `obsm` with the tokens. Default: `"X_tokens"`.
    key_added
        Name of the slot for the embedding. Default: `"X_scbin"`.

    Returns
    -------
    The trained :class:`scbin.Model`, with its `history`. Sets the following fields:

    `adata.obsm['X_scbin' | key_added]`
        One float32 vector per cell (cells, hidden size), NaN for cells without tokens. Phenotype tokens are hidden for it, so
        that labels cannot leak into it.
    `adata.uns['scbin']['pretrain']`
        How the model was trained, as JSON.
    `adata.uns['scbin']['pretrain_history']`
        Losses, learning rate and speed of every step, as a `DataFrame`.

    Raises
    ------
    ScbinInputError
        If the cells are not tokenized, fewer than two have tokens, or an argument is out of range. Nothing is written then.

    Notes
    -----
    Masked modelling follows BERT and Geneformer :cite:p:`theodoris2023`; the contrastive term is InfoNCE over two random
    halves of a cell's genes, as in SimCLR. Batches are brought together by mutual nearest neighbours :cite:p:`haghverdi2018`.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:200].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=3, progress=False)
    >>> adata.obsm["X_scbin"].shape, len(model.history)
    ((200, 64), 3)
    """
    check_adata(adata)
    tokens, vocabulary = read_tokens(adata, key=tokens_key)
    key = embedding_key(adata, key_added)
    paths(optional=True, save_dir=save_dir, tensorboard=tensorboard)
    if save_dir is not None:
        replaces_model(Path(save_dir) / "model", overwrite=True)  # raises now rather than after hours of training
    n_cells = int(np.count_nonzero(np.diff(tokens.indptr)))
    if n_cells < 2:
        raise ScbinInputError("I47", f"training needs at least 2 cells with tokens; here are {n_cells}.")
    flags(projection=projection)
    batches = None if batch_key is None else _batches(adata, batch_key, projection)
    shape: dict[str, Any] = {"hidden_size": hidden_size, "num_hidden_layers": num_hidden_layers}
    shape |= {"num_attention_heads": num_attention_heads, "intermediate_size": intermediate_size}
    whole_numbers(optional=True, **shape)
    fitting = preset_for(n_cells)
    preset = fitting if preset == "auto" else preset
    chosen = replace(preset_named(preset), **{name: value for name, value in shape.items() if value is not None})
    recipe = Recipe(
        gene_table=gene_table,
        gene_table_rank=gene_table_rank,
        masking=masking or MaskingScheme(gene_mask_prob=gene_mask_prob, phenotype_mask_prob=phenotype_mask_prob),
        loss=loss or MaskedLoss(),
        masked_weight=masked_weight,
        denoising_weight=denoising_weight,
        contrastive_weight=contrastive_weight,
        pooling=pooling,
        projection=projection,
    )
    settings = TrainSettings(
        epochs=chosen.epochs if epochs is None else epochs,
        max_steps=max_steps,
        cells_per_step=chosen.cells_per_step if cells_per_step is None else cells_per_step,
        token_budget=token_budget,
        learning_rate=chosen.learning_rate if learning_rate is None else learning_rate,
        schedule=chosen.schedule,
        warmup=chosen.warmup,
        weight_decay=chosen.weight_decay,
        clip=chosen.clip,
        precision=chosen.precision if precision == "auto" else precision,
        device=device,
        seed=seed,
        validation_share=validation_share,
        save_dir=None if save_dir is None else Path(save_dir),
        checkpoint_every=checkpoint_every,
        resume=resume,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        progress=progress,
        tensorboard=None if tensorboard is None else Path(tensorboard),
        wandb=wandb,
    )
    training, _ = split(tokens, None, settings)
    if epochs is None:
        steps_asked = replace(chosen, cells_per_step=settings.cells_per_step)
        settings = replace(settings, epochs=steps_asked.epochs_for(len(training)))
    _warn_if_too_large(chosen, n_cells, fitting)
    result = pretrain_tokens(tokens, vocabulary, chosen, recipe, settings, cell_names=adata.obs_names, batches=batches)
    gene_weights = None if result.gene_weights is None else tuple(float(weight) for weight in result.gene_weights)
    model = Model(
        result.bert,
        vocabulary,
        Readout(pooling, gene_weights=gene_weights if pooling == "weighted" else None),
        {
            **_summary(preset, chosen, recipe, settings, result),
            "cells": remembered_cells(tokens, vocabulary, training),
        },
        result.history,
        decoder=result.decoder,
        projection=result.projection,
    )
    if save_dir is not None and is_first_process():
        model.save(Path(save_dir) / "model", overwrite=True)
    hidden = hide_phenotypes(tokens, vocabulary)
    with joined_world() as world:
        embedding = embed_together(
            result.bert, hidden, model.weights(), world, device=device, token_budget=token_budget
        )
    _write(adata, key, model.place(embedding), model, save_dir)
    return model


def _batches(adata: AnnData, batch_key: str, projection: bool) -> np.ndarray:
    """Return the batch of each cell; those without one count as one more batch."""
    batches = read_obs(adata, batch_key).astype(str).to_numpy()
    if not projection:
        raise ScbinInputError(
            "T24", "batch_key brings batches together in the projection; leave projection=True with it."
        )
    names, counts = np.unique(batches, return_counts=True)
    if len(names) < 2 or counts.min() < 2:
        least = f"; {names[counts.argmin()]!r} has {count(int(counts.min()), 'cell')}" if len(names) > 1 else ""
        raise ScbinInputError(
            "T25",
            f"obs[{batch_key!r}] has {count(len(names), 'batch', 'batches')}{least}. It takes two batches or more of at least "
            "2 cells each; leave batch_key out where there is nothing to bring together.",
        )
    return batches


def _warn_if_too_large(chosen: Preset, n_cells: int, fitting: str) -> None:
    """Warn where even twice the cells would be too few for the network."""
    enough = preset_named(preset_for(2 * n_cells))
    if chosen.n_encoder_weights > enough.n_encoder_weights:
        warn(
            "T19",
            f"{count(n_cells, 'cell')} with tokens are few for a network of {chosen.n_encoder_weights:,} weights in its "
            f"layers; it may learn less than a smaller one. preset={fitting!r} fits them.",
        )


def _summary(
    preset: str | Preset, chosen: Preset, recipe: Recipe, settings: TrainSettings, result: Pretrained
) -> dict[str, Any]:
    """Return plain values that say how a model came about."""
    last = result.history.iloc[-1] if len(result.history) else {"step": -1, "epoch": -1}
    return {
        "preset": preset if isinstance(preset, str) else "custom",
        "n_cells": result.n_cells,
        "steps": int(last["step"]) + 1,
        "epochs": int(last["epoch"]) + 1,
        "network": asdict(chosen),
        "recipe": asdict(recipe),
        "settings": settings.learned(),
    }


def _write(
    adata: AnnData, key: str, embedding: np.ndarray, model: Model, save_dir: str | os.PathLike[str] | None
) -> None:
    identifier = model.fingerprint
    remember(identifier, model)
    write_obsm(adata, key, embedding)
    write_uns(adata, _keys.PRETRAIN, json.dumps(model.training))
    write_uns(adata, _keys.HISTORY, model.history.copy())
    write_uns(adata, _keys.MODEL_ID, identifier)
    write_uns(adata, _keys.MODEL_PATH, "" if save_dir is None else str(Path(save_dir).resolve() / "model"))
