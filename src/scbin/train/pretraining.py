"""Pretraining: start a network from what the data say about genes, then teach it to fill in and to recognise cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from scbin._arguments import instances, numbers, whole_numbers
from scbin._errors import ScbinInputError
from scbin.data.loadings import MOST_CELLS, gene_loadings
from scbin.data.masking import MaskingScheme
from scbin.data.places import places
from scbin.nn.bert import build_bert, init_gene_table
from scbin.nn.decoder import can_decode, fit_decoder
from scbin.nn.embedding import embed_tokens, hide_phenotypes, pooling_weights
from scbin.nn.projection import DROPOUT, WIDTH, Projection, fit_projection
from scbin.train.distributed import joined_world
from scbin.train.loop import train
from scbin.train.objective import MaskedLoss, Objective
from scbin.train.setup import embed_together, split
from scbin.train.terms import Contrastive, Denoising

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from scipy.sparse import csr_matrix
    from torch import nn
    from transformers import BertForMaskedLM

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.decoder import Decoder
    from scbin.nn.embedding import Pooling, Weights
    from scbin.nn.presets import Preset
    from scbin.train.distributed import World
    from scbin.train.settings import TrainSettings


@dataclass(frozen=True)
class Recipe:
    """What pretraining starts from and what it asks of the network.

    Parameters
    ----------
    gene_table
        Start of the gene embeddings: the data's own truncated `"svd"`, or `"random"`.
    gene_table_rank
        Components of that SVD, at most the hidden size.
    masking
        What is hidden.
    loss
        How predictions are scored.
    masked_weight, denoising_weight, contrastive_weight
        Weights of masked modelling, of finding a cell's place from half of its genes, and of recognising two halves of a cell.
    pooling
        How the vectors of a cell's tokens become one.
    projection
        Learn the last step, from that vector to the cell's place among its neighbours.
    """

    gene_table: Literal["svd", "random"] = "svd"
    gene_table_rank: int = 30
    masking: MaskingScheme = field(default_factory=MaskingScheme)
    loss: MaskedLoss = field(default_factory=MaskedLoss)
    masked_weight: float = 1.0
    denoising_weight: float = 1.0
    contrastive_weight: float = 0.1
    pooling: Pooling = "weighted"
    projection: bool = True

    def __post_init__(self) -> None:
        weights = ("masked_weight", "denoising_weight", "contrastive_weight")
        whole_numbers(gene_table_rank=self.gene_table_rank)
        numbers(**{name: getattr(self, name) for name in weights})
        instances(MaskingScheme, "a scbin.data.masking.MaskingScheme", masking=self.masking)
        instances(MaskedLoss, "a scbin.train.objective.MaskedLoss", loss=self.loss)
        if self.gene_table not in ("svd", "random"):
            raise ScbinInputError("T18", f"gene_table is {self.gene_table!r}; choose 'svd' or 'random'.")
        if self.gene_table_rank < 1:
            raise ScbinInputError("T18", f"gene_table_rank is {self.gene_table_rank}; it needs to be at least 1.")
        for name in weights:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ScbinInputError("T18", f"{name} is {getattr(self, name)}; it needs a finite number, not below 0.")
        if not any(getattr(self, name) for name in weights):
            raise ScbinInputError("T18", f"{', '.join(weights)} are all 0: there is nothing to learn.")


@dataclass(frozen=True, eq=False)
class Pretrained:
    """What pretraining gives."""

    bert: BertForMaskedLM
    gene_weights: np.ndarray | None  # (genes,)
    history: pd.DataFrame
    n_cells: int  # trained on, without those held out
    decoder: Decoder | None  # None where genes have no places of their own
    projection: Projection | None


def pretrain_tokens(
    tokens: csr_matrix,
    vocabulary: Vocabulary,
    preset: str | Preset,
    recipe: Recipe,
    settings: TrainSettings,
    *,
    cell_names: Sequence[str] | None = None,
    batches: np.ndarray | None = None,
) -> Pretrained:
    """Train a new network on the rows of a token matrix, those of different batches to be brought together.

    Held-out cells enter neither the weights nor the start of the gene table, nor the decoder, nor the projection.
    """
    training, _ = split(tokens, None, settings)
    bert = build_bert(vocabulary, preset, seed=settings.seed)
    with joined_world() as world:
        gene_weights = None
        if recipe.gene_table == "svd":
            table, gene_weights = _gene_table(tokens, vocabulary, training, bert, recipe, settings, world)
            init_gene_table(bert, vocabulary, table, seed=settings.seed)
        weights = pooling_weights(vocabulary, recipe.pooling, gene_weights)
        objective = Objective(
            vocabulary,
            recipe.masking,
            recipe.loss,
            masked_weight=recipe.masked_weight,
            cell_terms=_cell_terms(
                bert, hide_phenotypes(tokens, vocabulary), training, recipe, settings, weights, world
            ),
            token_weights=weights.tokens,
            position_weights=weights.positions,
            origin={name: getattr(recipe, name) for name in ("gene_table", "gene_table_rank", "pooling")},
        )
        history = train(bert, objective, tokens, settings, cell_names=cell_names)
        projection = None
        if recipe.projection:
            projection = _projection(bert, tokens, vocabulary, training, weights, batches, settings, world)
    decoder = None
    if can_decode(vocabulary):
        vectors = partial(
            embed_tokens, bert, weights=weights, device=settings.device, token_budget=settings.token_budget
        )
        decoder = fit_decoder(vectors, tokens[training], vocabulary, seed=settings.seed)
    return Pretrained(bert.cpu().eval(), gene_weights, history, len(training), decoder, projection)


def _gene_table(
    tokens: csr_matrix,
    vocabulary: Vocabulary,
    training: np.ndarray,
    bert: BertForMaskedLM,
    recipe: Recipe,
    settings: TrainSettings,
    world: World,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the start of the gene embeddings (genes, components) and the weights of the genes (genes,)."""

    def on_the_first() -> np.ndarray:
        rank = min(recipe.gene_table_rank, bert.config.hidden_size)
        loadings = gene_loadings(tokens, vocabulary, rank, training, seed=settings.seed)
        return np.column_stack([loadings.table(), loadings.weights()])

    both = world.from_first(on_the_first)
    return both[:, :-1], both[:, -1]


def _projection(
    bert: BertForMaskedLM,
    tokens: csr_matrix,
    vocabulary: Vocabulary,
    training: np.ndarray,
    weights: Weights,
    batches: np.ndarray | None,
    settings: TrainSettings,
    world: World,
) -> Projection:
    """Return the map from the vectors of the trained network to where cells and their neighbours lie in the data."""
    cells = training
    if len(cells) > MOST_CELLS:
        cells = np.sort(np.random.default_rng(settings.seed).choice(cells, MOST_CELLS, replace=False))
    shown = hide_phenotypes(tokens[cells], vocabulary)
    vectors = embed_together(bert, shown, weights, world, device=settings.device, token_budget=settings.token_budget)
    width, dropout = (WIDTH, DROPOUT) if batches is None else (4 * WIDTH, 0.0)  # what tells batches apart is small

    def on_the_first() -> np.ndarray:
        seen = np.isfinite(vectors).all(axis=1)
        among = None if batches is None else batches[cells][seen]
        shared, own = places(shown[seen], vocabulary, bert.config.hidden_size, among, seed=settings.seed)
        fitted = fit_projection(vectors[seen], shared, own, width=width, dropout=dropout, seed=settings.seed)
        return fitted.flat()[None]

    return Projection.from_flat(world.from_first(on_the_first)[0], bert.config.hidden_size)


def _cell_terms(
    bert: BertForMaskedLM,
    tokens: csr_matrix,
    training: np.ndarray,
    recipe: Recipe,
    settings: TrainSettings,
    weights: Weights,
    world: World,
) -> list[nn.Module]:
    """Return the terms on cell vectors; `tokens` hide the phenotypes, so that a label cannot say where its cell lies."""
    terms: list[nn.Module] = [Contrastive(recipe.contrastive_weight)]
    if recipe.denoising_weight:
        start = np.full((tokens.shape[0], bert.config.hidden_size), np.nan, dtype=np.float32)
        start[training] = embed_together(
            bert, tokens[training], weights, world, device=settings.device, token_budget=settings.token_budget
        )
        terms.append(Denoising(start, recipe.denoising_weight))
    return terms
