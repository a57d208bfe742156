"""`tl.pretrain`: a model from tokenized cells."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import read_tokens, write, write_uns
from scbin._arguments import checked, instances
from scbin._errors import ScbinInputError, count
from scbin.io.corpus import opened
from scbin.io.directory import check_replaceable
from scbin.model import Model, remember
from scbin.nn.batches import BatchCorrection
from scbin.nn.counts import Density
from scbin.nn.network import build_network
from scbin.nn.presets import Network, preset_for
from scbin.nn.presets import preset as preset_named
from scbin.nn.run import embed as embed_tokens
from scbin.tl._embed import corrected, embedding_key
from scbin.tl._labels import MaskedPhenotypes, obs_column
from scbin.tl._masked_genes import fit_dispersion
from scbin.tl._split import remembered_cells
from scbin.tokens.tokens import MemoryTokens
from scbin.train.distributed import is_first_process, joined_world
from scbin.train.history import stage
from scbin.train.loop import split_cells, train
from scbin.train.pretraining import Pretraining
from scbin.train.settings import Loss, Masking, Training
from scbin.train.start import MOST_CELLS, start
from scbin.train.task import Task

if TYPE_CHECKING:
    import os

    from scbin.io.corpus import Paths
    from scbin.nn.network import CellNetwork
    from scbin.tokens.tokens import Tokens

_log = logging.getLogger(__name__)


@_docs.shared
@checked
def pretrain(
    adata: ad.AnnData | Tokens | Paths,
    *,
    preset: str | Network = "auto",
    backbone: str = "mlp",
    batch_key: str | None = None,
    masking: Masking | None = None,
    loss: Loss | None = None,
    task: Task | None = None,
    training: Training | None = None,
    max_steps: int | None = None,
    tokens_key: str | None = None,
    key_added: str | None = None,
    save_dir: str | os.PathLike[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Model:
    """Train a network on the cells and compute the vector of each cell.

    The network computes the cell vector from a part of the cell's molecules, and has to predict the rest from it. It also
    predicts masked phenotypes, if the tokens have any, and masked genes, if `masking` or `loss` is given or the data are not
    counts. Training starts at the principal components of the data and stops when the loss on held-out cells no longer falls; the
    likelihood at the start and at the end is printed. Labels are used only if you tokenized them.

    Parameters
    ----------
    adata
        Tokenized cells, see :func:`scbin.pp.tokenize`. Files of them (:func:`scbin.open_tokens`), their paths, or any other
        :class:`scbin.tokens.tokens.Tokens` are trained on too; then nothing is written.
    preset
        Size and optimiser settings by name: `"tiny"` (a minute or two on a laptop), `"small"`, `"base"` (for a GPU), or those of
        published systems such as `"geneformer-v1-6l"`; or a :class:`scbin.Network`. `"auto"` chooses by the number of cells.
    backbone
        The network that reads the tokens: `"mlp"`, which reads the expression of all genes together, or `"bert"`, stock BERT.
        It takes 20 to 40 times as long, and attention was not better in benchmarks. Add your own to
        `scbin.nn.backbone.BACKBONES`.
    batch_key
        Column of `obs` with the batch of each cell (a study, a chemistry, a donor). Differences between batches are then removed
        from the cell vector.
    masking
        Which tokens are hidden, see :class:`scbin.Masking`.
    loss
        What is learned, and the weights of the losses, see :class:`scbin.Loss`.
    task
        A :class:`scbin.train.task.Task` of your own, which then replaces `masking` and `loss`.
    {training}
    max_steps
        Stop after so many steps.
    {tokens_key}
    {key_added}
    {save_dir}
    {device}
    {seed}
    {progress}

    Returns
    -------
    The trained :class:`scbin.Model`, with its `history`. Sets the following fields:

    `adata.obsm["X_scbin"]`
        One float32 vector per cell, NaN for cells without tokens. Phenotype tokens are hidden, so that labels cannot leak into
        it.
    `adata.uns["scbin"]["pretrain"]`
        How the model was trained, as JSON.
    `adata.uns["scbin"]["pretrain_history"]`
        Losses, learning rate and speed of every step, as a `DataFrame`.

    Raises
    ------
    ScbinInputError
        If the cells are not tokenized, fewer than two have tokens, or an argument is out of range. Nothing is written then.
    ScbinTrainingError
        If the loss or the gradient is not finite three times in a row, or there is not enough memory for one cell.

    Notes
    -----
    Masked modelling follows BERT and Geneformer :cite:p:`theodoris2023`. Batches are aligned by mutual nearest neighbours
    :cite:p:`haghverdi2018`. Under `torchrun` all processes train together.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:200].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=3, progress=False)
    >>> adata.obsm["X_scbin"].shape, model.training["steps"]
    ((200, 30), 3)
    """
    training = training or Training()
    instances(Training, "a scbin.Training", training=training)
    instances(Masking, "a scbin.Masking", optional=True, masking=masking)
    instances(Loss, "a scbin.Loss", optional=True, loss=loss)
    instances(Task, "a task with losses, weights, prepare and loss", optional=True, task=task)
    training = training if max_steps is None else replace(training, max_steps=max_steps)
    adata = opened(adata, tokens_key)
    in_adata = adata if isinstance(adata, ad.AnnData) else None
    tokens = read_tokens(adata, key=tokens_key)
    key = embedding_key(in_adata, key_added)
    if save_dir is not None:
        check_replaceable(Path(save_dir) / "model", overwrite=True)  # raises now rather than after hours of training
    n_cells = int(np.count_nonzero(tokens.lengths))
    if n_cells < 2:
        raise ScbinInputError("I47", f"training needs at least 2 cells with tokens; here are {n_cells}.")
    batches, codes = _batches(adata, batch_key)
    name = "custom" if isinstance(preset, Network) else preset_for(n_cells) if preset == "auto" else preset
    shape = preset if isinstance(preset, Network) else preset_named(name)
    cells, held_out = split_cells(tokens, training, seed)
    training = training.for_preset(name, len(cells))

    network = build_network(tokens.vocabulary, shape, backbone, batches=batches or ("all",), seed=seed)
    own = Pretraining(tokens.vocabulary, masking, loss, batches=codes, layer=network.vector_layer)
    with joined_world(training.timeout) as world:  # computed once; the trainer gives the weights to all processes
        if world.is_first:
            with stage("computing principal components", shown=progress):
                start(network, own, tokens, cells, codes, seed=seed)
        own.zero_positions = world.gather(own.zero_positions)[0]
    learned: Any = own if task is None else task
    where: dict[str, Any] = {"save_dir": save_dir, "device": device, "seed": seed, "progress": progress}
    history = train(network, learned, tokens, training, cells=cells, held_out=held_out, **where)
    about = {"preset": name, "backbone": backbone, "network": asdict(shape), "seed": seed, "batch_key": batch_key}
    about |= {"masking": asdict(own.masking), "loss": asdict(own.score), "training": training.learned()}
    about |= {"n_cells": len(cells), "cells": remembered_cells(tokens, cells)}

    if in_adata is None and len(cells) > MOST_CELLS:  # for all that follows a part of a corpus will do
        some = np.sort(np.random.default_rng(seed).choice(cells, MOST_CELLS, replace=False))
        tokens, cells = MemoryTokens(tokens.take(some), tokens.vocabulary), np.arange(len(some))
        codes = None if codes is None else codes[some]
    if network.counts is not None and tokens.vocabulary.unit == "counts":
        with stage("estimating dispersions", shown=progress):
            fit_dispersion(network, tokens, cells, codes, seed=seed, device=device)
    vectors = _embedded(network, tokens, training, device, progress)
    if network.counts is not None:
        network.density = Density.fit(network.counts, tokens, vectors, cells=cells, seed=seed)
    if codes is not None:
        network.batches = BatchCorrection.fit(vectors[cells], codes[cells], batches, seed=seed)
        vectors = vectors if in_adata is None else corrected(network, vectors, adata, batch_key)

    outcome, line = _outcome(history, getattr(learned, "watched", None), training.patience)
    model = Model(network, tokens.vocabulary, about | outcome, history)
    if is_first_process():
        _log.info(line)
        if progress:
            print(line)
    note_model(model, adata, save_dir, _keys.PRETRAIN, model.training)
    if in_adata is not None:
        write(in_adata, "obsm", key, vectors)
    return model


def note_model(model: Model, data: Any, save_dir: str | os.PathLike[str] | None, verb: str, about: Any) -> None:
    """Save a model that was trained, and write how; note for the verbs that follow which one it is."""
    path = None if save_dir is None else Path(save_dir).resolve() / "model"
    if path is not None and is_first_process():
        model.save(path, overwrite=True)
    identifier = model.fingerprint
    remember(identifier, model)
    if isinstance(data, ad.AnnData):
        write_uns(data, verb, about)
        write_uns(data, f"{verb}_history", model.history.copy())
        write_uns(data, _keys.MODEL_ID, identifier)
        write_uns(data, _keys.MODEL_PATH, str(path or ""))


def _embedded(network: CellNetwork, tokens: Tokens, training: Training, device: str, progress: bool) -> np.ndarray:
    """Return the vectors of all cells (cells, size), phenotypes hidden; every process embeds a part of them."""
    with joined_world(training.timeout) as world:
        rows, hidden = np.arange(tokens.n_cells), MaskedPhenotypes(tokens)
        options: dict[str, Any] = {"device": str(world.device(device)), "token_budget": training.token_budget}
        options["progress"], own = progress and world.is_first, world.share(rows)
        vectors = embed_tokens(network, hidden, rows=own, precision="float32", **options)[own]
        return np.concatenate(world.gather(vectors))


def _batches(data: ad.AnnData | Tokens, batch_key: str | None) -> tuple[list[str], np.ndarray | None]:
    """Return the names of the batches and the number of each cell's (cells,); cells without one count as one more batch."""
    if batch_key is None:
        return [], None
    labels = obs_column(data, batch_key).astype(str).to_numpy()
    names, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(names) < 2 or counts.min() < 2:
        need = "it takes two batches or more, of at least 2 cells each"
        raise ScbinInputError("A03", f"obs[{batch_key!r}] has {count(len(names), 'batch', 'batches')}: {need}.")
    return names.tolist(), codes.astype(np.int64)


def _outcome(history: pd.DataFrame, watched: str | None, patience: int | None) -> tuple[dict[str, Any], str]:
    """Return how long training took and the watched loss on held-out cells before and after it, and in a line whether it helped."""
    n_steps, n_epochs = (int(history[name].max()) if len(history) else 0 for name in ("step", "epoch"))
    outcome = {"steps": n_steps, "epochs": n_epochs + bool(len(history)), "start": None, "end": None}
    steps, losses = count(n_steps, "step"), history.get("validation", pd.Series(dtype=float)).dropna()
    if losses.empty:
        return outcome, f"trained for {steps}; no cells were held out to say whether it helped."
    first, last = float(losses.iloc[0]), float(losses.iloc[-1])
    kept = last if patience is None else float(losses.min())
    what = f"log likelihood of held-out cells ({watched or 'all losses'})"
    line = f"{what}: {-first:.4f} at the start, {-kept:.4f} after training ({steps})."
    if kept >= first:
        which = "they were kept all the same" if patience is None else "the weights of the start were kept"
        line = f"Training did not help: {what} was {-first:.4f} at the start and {-last:.4f} after {steps}; {which}."
    return outcome | {"start": first, "end": kept}, line
