"""The density draws cells like those it was fitted to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

import scbin
from scbin import ScbinInputError
from scbin._adata import read_tokens
from scbin.nn import counts as module
from scbin.nn.counts import CountHead, Density
from scbin.nn.packs import token_expression


def values_of(tokens, cells):
    """Number of each cell's value of each phenotype, from its labels (cells, phenotypes)."""
    columns = [pd.Categorical(tokens.obs(p.name), categories=p.values).codes for p in tokens.vocabulary.phenotypes]
    return np.stack(columns, axis=1)[cells].astype(np.int64)


def generators(n, seed=0):
    return [np.random.default_rng([seed, k]) for k in range(n)]


def head_for(tokens):
    return CountHead(len(tokens.vocabulary.genes), 3)


@pytest.fixture
def fitted(toy):
    """Tokens, vectors in which each type has a correlation of its own, and the density of both."""
    toy.obs.loc["cell3", "sex"] = np.nan
    scbin.pp.tokenize(toy, phenotypes=["cell_type", "sex"])
    tokens, rng = read_tokens(toy), np.random.default_rng(0)
    kind = toy.obs["cell_type"].cat.codes.to_numpy()
    vectors = rng.normal(size=(60, 3)) @ np.diag([1, 0.3, 0.3]) @ np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    vectors[:, 0] += 8 * kind
    vectors[0] = np.nan
    return tokens, vectors.astype(np.float32), Density.fit(head_for(tokens), tokens, vectors.astype(np.float32))


def test_drawn_cells_have_the_moments_of_their_type(fitted):
    tokens, vectors, density = fitted
    cell_type = [p.name for p in tokens.vocabulary.phenotypes].index("cell_type")
    real = values_of(tokens, np.arange(60))[:, cell_type]
    for kind in range(3):
        wanted = np.full((400, 2), -1)
        wanted[:, cell_type] = kind
        drawn, log_depth, values = density.draw(wanted, generators(400))
        mine = vectors[(real == kind) & np.isfinite(vectors).all(axis=1)]
        assert (values[:, cell_type] == kind).all() and (values >= 0).all()
        np.testing.assert_allclose(drawn.mean(axis=0), mine.mean(axis=0), atol=0.25)
        assert np.corrcoef(drawn.T)[0, 1] == pytest.approx(np.corrcoef(mine.T)[0, 1], abs=0.15)
        assert set(log_depth) <= set(density.log_depth.numpy())
    assert np.isfinite(density.vectors.numpy()).all() and len(density.vectors) == 59
    depth = np.asarray(tokens.matrix[1:].sum(axis=1)).ravel()  # bins grow with counts, and so does their sum
    assert np.corrcoef(np.sort(density.log_depth.numpy()), np.sort(depth))[0, 1] > 0.9


def test_a_draw_depends_on_its_generator_alone_and_is_no_copy(fitted):
    _, vectors, density = fitted
    wanted = np.full((6, 2), -1)
    drawn = density.draw(wanted, generators(6))[0]
    np.testing.assert_array_equal(density.draw(wanted[4:], generators(6)[4:])[0], drawn[4:])
    assert np.abs(drawn[:, None] - vectors[None, 1:]).sum(axis=2).min() > 1e-3


def test_open_values_come_as_often_as_they_were(fitted, monkeypatch):
    tokens, vectors, _ = fitted
    monkeypatch.setattr(module, "MOST_CELLS", 20)
    monkeypatch.setattr(module, "FEWEST_PER_VALUE", 4)
    common = np.flatnonzero(np.arange(60) % 3 != 1)
    cells = np.sort(np.concatenate([common, [1, 4, 7]]))  # B cells are rare
    density = Density.fit(head_for(tokens), tokens, vectors, cells=cells)
    cell_type = [p.name for p in tokens.vocabulary.phenotypes].index("cell_type")
    true = values_of(tokens, cells)[:, cell_type]
    assert 20 <= len(density.vectors) < len(cells) and density.weights.sum() == pytest.approx(len(cells), abs=3)
    drawn = density.draw(np.full((2000, 2), -1), generators(2000))[2][:, cell_type]
    expected = np.bincount(true, minlength=3) / len(true)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 2000, expected, atol=0.05)


def test_a_combination_that_never_was_is_the_sum_of_its_effects(fitted):
    tokens, _, _ = fitted
    names = [p.name for p in tokens.vocabulary.phenotypes]
    sex, cell_type = names.index("sex"), names.index("cell_type")
    values = values_of(tokens, np.arange(60))
    vectors = np.stack([5.0 * values[:, sex], 3.0 * values[:, cell_type], np.zeros(60)], axis=1).astype(np.float32)
    cells = np.flatnonzero((values[:, cell_type] != 1) | (values[:, sex] != 1))
    wanted = np.full((30, 2), 1)
    drawn = Density.fit(head_for(tokens), tokens, vectors, cells=cells).draw(wanted, generators(30))[0]
    np.testing.assert_allclose(drawn.mean(axis=0), [5, 3, 0], atol=1.0)


def test_config_and_state_build_it_again(fitted):
    tokens, _, density = fitted
    again = Density.from_config(tokens.vocabulary, density.config())
    again.load_state_dict(density.state_dict())
    wanted = np.full((3, 2), -1)
    np.testing.assert_array_equal(again.draw(wanted, generators(3))[0], density.draw(wanted, generators(3))[0])
    with pytest.raises(ScbinInputError, match="M04"):
        Density.from_config(tokens.vocabulary, {**density.config(), "n_values": [5]})


def test_expected_means_are_those_of_each_value(fitted):
    """A head that knows nothing of the genes is corrected until every value of a phenotype has its own means."""
    tokens, _, density = fitted
    parts = (density.vectors, density.log_depth, density.values)
    vectors, log_depth, values = (part.numpy() for part in parts)
    expected = density.expected(head_for(tokens), vectors, log_depth, values)
    np.testing.assert_allclose(expected.sum(axis=1), np.exp(log_depth), rtol=1e-5)
    cells = np.argsort(np.random.default_rng(0).permutation(np.arange(1, 60)))  # those of `fit`, in their own order
    expression = token_expression(tokens.take(np.arange(1, 60)), tokens.vocabulary).toarray()
    for column in values.T:
        for value in np.unique(column):
            mine = column == value
            seen, made = expression[mine[cells]].sum(axis=0), expected[mine].sum(axis=0)
            assert np.abs(np.log((made + 1) / (seen + 1))).max() < 0.35  # one count is added to both
            assert np.corrcoef(made, seen)[0, 1] > 0.99


def test_dispersion_is_found_again():
    """Counts drawn with a known theta around known means."""
    rng, theta = np.random.default_rng(0), np.array([0.5, 2.0, 10.0, 0.2])
    mean = rng.uniform(1, 20, size=(3000, 4))
    counts = csr_matrix(rng.poisson(mean * rng.gamma(theta, size=mean.shape) / theta).astype(np.float32))
    head = CountHead(4, 1)
    head.fit_dispersion(torch.from_numpy(np.log(mean)).float(), counts)
    np.testing.assert_allclose(head.log_dispersion.detach(), np.log(theta), atol=0.1)
