from __future__ import annotations

import numpy as np
import pytest

import scbin
from scbin._anndata import read_tokens
from scbin.data.places import across_batches, places, shared_and_own


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


def test_shared_and_own_equal_the_matrices_written_out():
    scores = np.random.default_rng(0).normal(size=(300, 9))
    distances = np.linalg.norm(scores[:, None] - scores[None], axis=2)
    near = np.argsort(distances, axis=1)[:, 1:6]
    graph = np.eye(300, dtype=bool)
    for cell, others in enumerate(near):
        graph[cell, others] = graph[others, cell] = True
    walk = graph / graph.sum(axis=1, keepdims=True)
    shared = 0.4 * walk @ scores + 0.6 * walk @ walk @ scores
    own = scores - shared
    around = np.linalg.norm(shared[:, None] - shared[None], axis=2)
    length = 1.6 * np.median(np.sort(around, axis=1)[:, 6])  # a fiftieth of 300
    found = shared_and_own(scores, 5)
    np.testing.assert_allclose(found[0], shared, atol=1e-9)
    np.testing.assert_allclose(found[1], length * own / np.linalg.norm(own, axis=1, keepdims=True), atol=1e-9)


@pytest.mark.parametrize("n_cells", [5, 20, 1200])
def test_all_cells_have_as_much_of_their_own(n_cells):
    shared, own = shared_and_own(np.random.default_rng(1).gamma(1.0, size=(n_cells, 8)))
    assert shared.shape == own.shape == (n_cells, 8)
    lengths = np.linalg.norm(own, axis=1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-9)
    assert (lengths > 0).all()


def test_in_few_directions_there_is_nothing_of_their_own():
    assert shared_and_own(np.random.default_rng(1).normal(size=(100, 7)))[1].shape == (100, 0)


def test_very_few_cells_stay_where_they_are_and_those_that_are_alike_together():
    scores = np.random.default_rng(2).normal(size=(4, 9))
    for some in (scores, scores[:1]):
        shared, own = shared_and_own(some)
        np.testing.assert_array_equal(shared, some)
        np.testing.assert_array_equal(own, 0 * some)
    shared, own = shared_and_own(np.ones((30, 9)))
    np.testing.assert_allclose(shared, 1.0)
    np.testing.assert_allclose(own, 0.0, atol=1e-6)


def test_the_own_part_joins_kinds_and_makes_no_hubs():
    """Two kinds, each along a line and with noise: neighbours come from further along it, and none is everybody's."""
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(0)
    kinds = np.repeat([0, 1], 300)
    scores = rng.normal(size=(600, 12)) * rng.gamma(4, 0.25, size=(600, 1))
    scores[:, 0] += 12 * kinds
    scores[:, 1] += np.tile(np.linspace(0, 6, 300), 2)
    together, own = shared_and_own(scores)

    def around(places):
        return NearestNeighbors(n_neighbors=15).fit(places).kneighbors(return_distance=False)

    both, shared, raw = around(np.hstack([together, own])), around(together), around(scores)
    assert (kinds[both] == kinds[:, None]).all()
    along = np.arange(600)[:, None]
    assert np.abs(both - along).mean() > 1.1 * np.abs(shared - along).mean()
    assert np.bincount(both.ravel(), minlength=600).std() < 0.7 * np.bincount(raw.ravel(), minlength=600).std()


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
    lying, own = places(tokens, vocabulary, 64)
    assert lying.shape == own.shape
    kinds = toy.obs["cell_type"].to_numpy()
    centres = {kind: lying[kinds == kind].mean(axis=0) for kind in np.unique(kinds)}
    nearest = [min(centres, key=lambda kind: np.linalg.norm(cell - centres[kind])) for cell in lying]
    assert (np.array(nearest) == kinds).all()
    np.testing.assert_allclose(lying.mean(axis=0), 0, atol=1.0)


def test_both_parts_fit_into_the_room(toy):
    scbin.pp.tokenize(toy)
    for room in (1, 2, 20):
        shared, own = places(*read_tokens(toy), room)
        assert shared.shape[1] == max(room // 2, 1)
        assert own.shape[1] == (room // 2 if room >= 16 else 0)
