"""From a token matrix to a network: the recipe, the start from the data, and what held-out cells may not do."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from scbin._errors import ScbinInputError
from scbin.data.masking import split_cells
from scbin.nn.bert import build_bert
from scbin.nn.embedding import embed_tokens, pooling_weights
from scbin.nn.presets import Preset
from scbin.train.pretraining import Recipe, pretrain_tokens

SMALL = Preset(1, 32, 32, 2, hidden_dropout_prob=0.0)


def start(toy, tokens=None, recipe=None, **changes):
    """Pretrain with a learning rate of zero: what comes back is what training began with."""
    settings = toy.settings(**{"max_steps": 1, "learning_rate": 0.0, "cells_per_step": 16, **changes})
    return pretrain_tokens(
        toy.tokens if tokens is None else tokens, toy.vocabulary, SMALL, recipe or Recipe(), settings
    )


def gene_table(toy, bert):
    return bert.bert.embeddings.position_embeddings.weight[toy.vocabulary.gene_positions].detach().numpy()


def replaced(tokens, rows, by):
    dense = tokens.toarray()
    dense[rows] = dense[by]
    return csr_matrix(dense)


@pytest.mark.parametrize(
    "arguments",
    [
        {"gene_table": "pca"},
        {"gene_table_rank": 0},
        {"masked_weight": -1},
        {"denoising_weight": float("nan")},
        {"contrastive_weight": float("inf")},
        {"masked_weight": 0, "denoising_weight": 0, "contrastive_weight": 0},
    ],
    ids=str,
)
def test_recipes_that_make_no_sense(arguments):
    with pytest.raises(ScbinInputError, match="T18") as caught:
        Recipe(**arguments)
    assert next(iter(arguments)) in str(caught.value)


def test_the_loss_is_the_weighted_sum_of_its_terms(small):
    names = ("masked_weight", "denoising_weight", "contrastive_weight")
    whole = start(small, recipe=Recipe(masked_weight=1.0, denoising_weight=1.0, contrastive_weight=1.0)).history.iloc[0]
    parts = {name: whole[f"loss_{name.removesuffix('_weight')}"] for name in names[1:]}
    parts["masked_weight"] = whole["loss"] - sum(parts.values())
    assert min(whole["loss_genes"], whole["loss_cell_type"]) < parts["masked_weight"]
    assert parts["masked_weight"] < max(whole["loss_genes"], whole["loss_cell_type"]) + 1e-6
    both = (
        "denoising_weight",
        "contrastive_weight",
    )  # without them cells are not halved, and other genes are asked for
    for left_out in [(), *combinations(names, 1), *(pair for pair in combinations(names, 2) if pair != both)]:
        weights = {name: 0.0 if name in left_out else 0.5 + 0.1 * i for i, name in enumerate(names)}
        row = start(small, recipe=Recipe(**weights)).history.iloc[0]
        assert row["loss"] == pytest.approx(sum(weights[name] * parts[name] for name in names), rel=1e-4), left_out


def test_what_comes_back(small):
    result = start(small, learning_rate=1e-3, validation_share=0.2)
    assert not result.bert.training and result.bert.device == torch.device("cpu")
    held_out = split_cells(100, 0.2, 0)
    filled = np.diff(small.tokens.indptr) > 0
    assert result.n_cells == int((filled & ~held_out).sum())
    assert result.gene_weights.shape == (30,) and result.gene_weights.mean() == pytest.approx(1)
    assert (result.gene_weights >= 0).all()
    assert len(result.history) == 1


def test_a_random_start_is_that_of_the_network(small):
    result = start(small, recipe=Recipe(gene_table="random"))
    assert result.gene_weights is None
    own = build_bert(small.vocabulary, SMALL, seed=0).state_dict()
    for name, tensor in result.bert.state_dict().items():
        assert torch.equal(tensor, own[name]), name


@pytest.mark.parametrize("layer", [0, -1])
def test_the_start_knows_what_a_dense_svd_knows(small, layer):
    """Cells that lie together among the leading components of the data do so before any training."""
    v = small.vocabulary
    filled = np.diff(small.tokens.indptr) > 0
    dense = small.tokens.toarray()[filled][:, v.gene_positions].astype(np.int64)
    values = np.where(dense > 0, v.bins.centres.astype(np.float64)[np.maximum(dense - v.first_gene_id, 0)], 0.0)
    standard = (values - values.mean(axis=0)) / values.std(axis=0)
    left, spreads, right = np.linalg.svd(standard, full_matrices=False)
    leading = left[:, :2] * spreads[:2]  # three kinds of cells span two directions

    def explained(recipe):
        """Share of the leading components that is linear in the vectors, on cells that the fit did not see."""
        result = start(small, recipe=recipe, validation_share=0.0)
        weights = pooling_weights(v, "weighted", result.gene_weights)
        z = embed_tokens(result.bert, small.tokens, weights, device="cpu", layer=layer)[filled].astype(np.float64)
        z = np.column_stack([z - z.mean(axis=0), np.ones(len(z))])
        fit = np.arange(len(z)) % 2 == 0
        ridge = np.linalg.solve(z[fit].T @ z[fit] + 1e-3 * np.eye(z.shape[1]), z[fit].T @ leading[fit])
        rest = leading[~fit] - z[~fit] @ ridge
        return 1 - (rest**2).sum() / ((leading[~fit] - leading[~fit].mean(axis=0)) ** 2).sum()

    assert explained(Recipe(gene_table_rank=2)) > 0.95
    # and the table itself is spanned by the right singular vectors of the dense matrix
    table = gene_table(small, start(small, recipe=Recipe(gene_table_rank=3), validation_share=0.0).bert)
    basis = right[:3].T
    outside = table - basis @ (basis.T @ table)
    assert np.linalg.norm(outside) < 1e-3 * np.linalg.norm(table)


def test_the_rank_is_at_most_the_hidden_size(small):
    table = gene_table(small, start(small, recipe=Recipe(gene_table_rank=10_000)).bert)
    assert table.shape == (30, 32) and np.linalg.matrix_rank(table) <= 30
    assert np.linalg.matrix_rank(gene_table(small, start(small, recipe=Recipe(gene_table_rank=4)).bert), tol=1e-3) == 4


def test_held_out_cells_do_not_influence_the_start(small):
    held_out = np.flatnonzero(split_cells(100, 0.3, 0))
    trained_on = np.setdiff1d(np.arange(100), [*held_out, 3])
    sound = start(small, validation_share=0.3)
    other = start(small, replaced(small.tokens, held_out, held_out[::-1] * 0 + held_out[0]), validation_share=0.3)
    assert np.array_equal(gene_table(small, sound.bert), gene_table(small, other.bert))
    assert np.array_equal(sound.gene_weights, other.gene_weights)
    changed = start(small, replaced(small.tokens, trained_on[:9], trained_on[9]), validation_share=0.3)
    assert not np.array_equal(gene_table(small, sound.bert), gene_table(small, changed.bert))
    assert not np.array_equal(sound.gene_weights, changed.gene_weights)


def test_held_out_cells_do_not_scale_the_loss(small):
    held_out = np.flatnonzero(split_cells(100, 0.3, 0))
    sound = start(small, validation_share=0.3)
    other = start(small, replaced(small.tokens, held_out, held_out[0]), validation_share=0.3)
    assert sound.history["loss_denoising"].iloc[0] == other.history["loss_denoising"].iloc[0]


def test_genes_of_held_out_cells_alone_are_not_asked_for(small):
    held_out = np.flatnonzero(split_cells(100, 0.3, 0))
    gene = small.vocabulary.gene_positions[5]
    without = small.tokens.toarray()
    without[:, gene] = 0
    only = without.copy()
    only[held_out[np.diff(small.tokens.indptr)[held_out] > 0], gene] = small.vocabulary.first_gene_id + 1
    recipe = Recipe(denoising_weight=0.0)
    a, b = (start(small, csr_matrix(dense), recipe, validation_share=0.3) for dense in (without, only))
    assert a.history["loss_genes"].iloc[0] == b.history["loss_genes"].iloc[0]


def test_labels_do_not_enter_the_targets_of_denoising(small, monkeypatch):
    seen = []
    from scbin.train import pretraining

    real = pretraining.Denoising

    def spy(targets, weight):
        seen.append(targets.copy())
        return real(targets, weight)

    monkeypatch.setattr(pretraining, "Denoising", spy)
    dense = small.tokens.toarray()
    position = small.vocabulary.phenotypes[0].position
    filled = dense[:, position] > 0
    dense[filled, position] = np.roll(dense[filled, position], 1)
    start(small)
    start(small, csr_matrix(dense))
    assert np.array_equal(seen[0], seen[1], equal_nan=True)
    settings = small.settings()
    held_out = split_cells(small.tokens.shape[0], settings.validation_share, settings.seed)
    known = (np.diff(small.tokens.indptr) > 0) & ~held_out
    assert np.array_equal(np.isfinite(seen[0]).all(axis=1), known)
    assert np.isnan(seen[0][~known]).all()


def test_settings_and_recipe_decide_and_nothing_else(small):
    torch.manual_seed(1)
    first = start(small, learning_rate=1e-3, max_steps=2)
    torch.manual_seed(2)
    second = start(small, learning_rate=1e-3, max_steps=2)
    for a, b in zip(first.bert.state_dict().values(), second.bert.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    moved = [
        not torch.equal(a, b) for a, b in zip(first.bert.parameters(), start(small).bert.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) // 2
