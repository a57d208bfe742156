from __future__ import annotations

import numpy as np
import pytest

import scbin
from scbin._anndata import read_tokens
from scbin.data.places import across_batches, places, with_neighbors


@pytest.fixture
def two_batches():
    """Three kinds of cells in each of two batches that lie apart, and one that the second batch lacks."""
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(4), 40)
    batches = np.tile([0, 1], 80)
    batches[kinds == 3] = 0
    centres = 10 * np.eye(4, 6)
    scores = centres[kinds] + rng.normal(size=(160, 6)) + np.where(batches[:, None] == 1, [0, 0, 0, 0, 4, -4], 0)
    return scores, kinds, batches


def test_neighbours_equal_the_matrix_written_out():
    scores = np.random.default_rng(0).normal(size=(30, 4))
    distances = np.linalg.norm(scores[:, None] - scores[None], axis=2)
    near = np.argsort(distances, axis=1)[:, 1:6]
    graph = np.eye(30, dtype=bool)
    for cell, others in enumerate(near):
        graph[cell, others] = graph[others, cell] = True
    walk = graph / graph.sum(axis=1, keepdims=True)
    expected = 0.15 * scores + 0.35 * walk @ scores + 0.5 * walk @ walk @ scores
    np.testing.assert_allclose(with_neighbors(scores, 5), expected, atol=1e-12)


def test_few_cells_have_few_neighbours():
    assert with_neighbors(np.ones((1, 3))).shape == (1, 3)
    np.testing.assert_allclose(with_neighbors(np.array([[0.0], [2.0]])).mean(), 1.0)


def test_kinds_that_batches_share_come_together_and_others_stay(two_batches):
    scores, kinds, batches = two_batches
    joined = across_batches(scores, batches)

    def gap(places, kind):
        mine = kinds == kind
        return np.linalg.norm(places[mine & (batches == 0)].mean(0) - places[mine & (batches == 1)].mean(0))

    for kind in range(3):
        assert gap(scores, kind) > 5
        assert gap(joined, kind) < 1.5
    centres = np.array([joined[kinds == kind].mean(axis=0) for kind in range(4)])
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=2)[np.triu_indices(4, 1)]
    assert distances.min() > 8  # as before, about the root of 200
    np.testing.assert_array_equal(joined, across_batches(scores, np.array(["a", "b"])[batches]))


def test_one_batch_alone_stays_where_it_is(two_batches):
    scores = two_batches[0]
    np.testing.assert_array_equal(across_batches(scores, np.zeros(len(scores))), scores)


def test_places_of_tokens_tell_the_kinds_apart(toy):
    scbin.pp.tokenize(toy)
    tokens, vocabulary = read_tokens(toy)
    lying = places(tokens, vocabulary)
    kinds = toy.obs["cell_type"].to_numpy()
    centres = {kind: lying[kinds == kind].mean(axis=0) for kind in np.unique(kinds)}
    nearest = [min(centres, key=lambda kind: np.linalg.norm(cell - centres[kind])) for cell in lying]
    assert (np.array(nearest) == kinds).all()
    np.testing.assert_allclose(lying.mean(axis=0), 0, atol=1.0)
