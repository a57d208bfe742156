from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf

from scbin.nn.projection import Projection, fit_projection


@pytest.fixture(scope="module")
def cells():
    """Vectors of cells, and places that are no linear function of them."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 16)).astype(np.float32)
    places = np.column_stack([vectors[:, 0], vectors[:, 1], np.abs(vectors[:, 2]), vectors[:, 3] * 3 + 5])
    return vectors, places


@pytest.fixture(scope="module")
def fitted(cells):
    return fit_projection(*cells, dropout=0.0)


def test_distances_between_places_are_kept(cells, fitted):
    vectors, places = cells
    placed = fitted(vectors)
    assert placed.shape == (600, 16)
    assert placed.dtype == np.float32
    pairs = np.random.default_rng(1).integers(0, 600, (2, 2000))
    true, found = (np.linalg.norm(x[pairs[0]] - x[pairs[1]], axis=1) for x in (places, placed))
    assert np.corrcoef(true, found)[0, 1] > 0.99


def test_equals_the_formula_in_float64(cells, fitted):
    vectors = cells[0].astype(np.float64)
    part = {name: array.astype(np.float64) for name, array in fitted.tensors().items()}
    standard = (vectors - part["centre"]) * part["scale"]
    inner = standard @ part["inner"] + part["inner_bias"]
    hidden = inner * 0.5 * (1 + erf(inner / np.sqrt(2)))
    expected = standard @ part["linear"] + hidden @ part["outer"] + part["bias"]
    np.testing.assert_allclose(fitted(cells[0]), expected, atol=2e-5)


def test_a_cell_is_placed_alone_as_among_others(cells, fitted):
    alone = np.concatenate([fitted(cells[0][i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(alone, fitted(cells[0])[:20], atol=1e-5)


def test_unknown_stays_unknown(cells, fitted):
    vectors = cells[0][:3].copy()
    vectors[1] = np.nan
    assert np.isnan(fitted(vectors)).all(axis=1).tolist() == [False, True, False]


def test_the_seed_decides_and_no_global_generator_moves(cells):
    before = torch.random.get_rng_state()
    one, two, other = (fit_projection(*cells, n_steps=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    for name, array in one.tensors().items():
        np.testing.assert_array_equal(array, two.tensors()[name])
    assert not np.array_equal(one.linear, other.linear)


def test_flat_and_back(fitted):
    again = Projection.from_flat(fitted.flat(), 16)
    assert {name: array.shape for name, array in again.tensors().items()} == Projection.shapes(16, 128, 0)
    for name, array in fitted.tensors().items():
        np.testing.assert_array_equal(array, again.tensors()[name])


def test_more_places_than_numbers_and_constant_vectors():
    rng = np.random.default_rng(0)
    assert fit_projection(rng.normal(size=(50, 4)), rng.normal(size=(50, 9)))(np.zeros((2, 4))).shape == (2, 4)
    flat = fit_projection(np.ones((50, 4)), rng.normal(size=(50, 2)))(np.ones((3, 4)))
    assert np.isfinite(flat).all()


@pytest.fixture(scope="module")
def with_own(cells):
    """Two shared directions, and three of what cells have for themselves, at one length."""
    vectors, places = cells
    own = vectors[:, 4:7] + np.abs(vectors[:, 7:10])
    own *= 2.5 / np.linalg.norm(own, axis=1, keepdims=True)
    return vectors, np.hstack([places[:, :2], own]), fit_projection(vectors, places[:, :2], own, dropout=0.0)


def test_all_cells_new_ones_too_get_the_same_length_of_their_own(with_own):
    vectors, places, fitted = with_own
    new = np.random.default_rng(5).normal(size=(200, 16)).astype(np.float32) * 3
    for each in (vectors, new):
        np.testing.assert_allclose(np.linalg.norm(fitted(each) @ fitted.own.T, axis=1), 2.5, rtol=1e-5)
    np.testing.assert_allclose(fitted.own @ fitted.own.T, np.eye(3), atol=1e-6)
    plain = Projection.from_tensors({k: v for k, v in fitted.tensors().items() if k not in ("own", "length")})
    shared = np.eye(16) - fitted.own.T @ fitted.own
    np.testing.assert_allclose(fitted(new) @ shared, plain(new) @ shared, atol=1e-5)
    cosines = ((fitted(new) @ fitted.own.T) * (plain(new) @ fitted.own.T)).sum(1)
    np.testing.assert_allclose(cosines, 2.5 * np.linalg.norm(plain(new) @ fitted.own.T, axis=1), rtol=1e-4)


def test_distances_with_own_parts_are_kept(with_own):
    vectors, places, fitted = with_own
    pairs = np.random.default_rng(1).integers(0, 600, (2, 2000))
    true, found = (np.linalg.norm(x[pairs[0]] - x[pairs[1]], axis=1) for x in (places, fitted(vectors)))
    assert np.corrcoef(true, found)[0, 1] > 0.97


def test_own_parts_are_stored_and_cut_with_the_places(with_own):
    vectors, places, fitted = with_own
    again = Projection.from_flat(fitted.flat(), 16)
    np.testing.assert_array_equal(again(vectors), fitted(vectors))
    assert fitted.describe() == {"width": 128, "own": 3}
    narrow = fit_projection(vectors[:, :4], places[:, :2], places[:, 2:], n_steps=5)
    assert narrow.n_own == 2  # of five numbers four are kept
    assert fit_projection(vectors[:, :2], places[:, :2], places[:, 2:], n_steps=5).describe() == {"width": 128}


def test_cells_without_anything_of_their_own(with_own):
    vectors, places, _ = with_own
    fitted = fit_projection(vectors, places[:, :2], np.zeros((600, 3)), n_steps=20)
    np.testing.assert_allclose(fitted(vectors) @ fitted.own.T, 0, atol=1e-5)
    assert np.isnan(fitted(np.full((1, 16), np.nan, dtype=np.float32))).all()
