from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from scbin.nn.batches import BatchCorrection


@pytest.fixture(scope="module")
def two_batches():
    """Four kinds of cells in two batches that lie apart; the last kind is in the first batch alone."""
    rng = np.random.default_rng(0)
    centres = 6 * rng.normal(size=(4, 12))
    kind, batch = rng.integers(0, 4, 900), rng.integers(0, 2, 900)
    batch[kind == 3] = 0
    vectors = centres[kind] + rng.normal(size=(900, 12)) + np.outer(batch, 3 * rng.normal(size=12))
    return vectors.astype(np.float32), kind, batch


def mixing(vectors, kind, batch):
    """Of each shared kind, how well the batch can be told by its neighbours; 0.5 is not at all."""
    found = []
    for k in range(3):
        x, y = vectors[kind == k], batch[kind == k]
        found.append(KNeighborsClassifier(10).fit(x[::2], y[::2]).score(x[1::2], y[1::2]))
    return np.mean(found)


def test_batches_mix_and_kinds_stay_apart(two_batches):
    vectors, kind, batch = two_batches
    correction = BatchCorrection.fit(vectors[:600], batch[:600], ["a", "b"])
    moved = correction(torch.from_numpy(vectors), torch.from_numpy(batch)).numpy()
    for part in (slice(0, 600), slice(600, 900)):  # cells it was fitted on, and new ones
        assert mixing(vectors[part], kind[part], batch[part]) > 0.95
        assert mixing(moved[part], kind[part], batch[part]) < 0.75
    score = KNeighborsClassifier(10).fit(moved[:600], kind[:600]).score(moved[600:], kind[600:])
    assert score > 0.97
    alone = kind == 3  # has no partners, and goes no farther than the others
    way = np.linalg.norm(moved - vectors, axis=1)
    assert way[alone].mean() < 1.5 * way[~alone].mean()


def test_cells_of_unknown_batches_move_with_their_neighbours(two_batches):
    vectors, _, batch = two_batches
    correction = BatchCorrection.fit(vectors, batch, ["a", "b"])
    some = torch.from_numpy(vectors[:50])
    assert torch.allclose(correction(some), correction(some, torch.full((50,), -1)))
    assert torch.allclose(correction(some)[:7], correction(some[:7]), atol=1e-5)


def test_it_is_read_back_from_its_configuration(two_batches):
    vectors, _, batch = two_batches
    vectors = vectors.copy()
    vectors[5] = np.nan
    correction = BatchCorrection.fit(vectors, batch, ["a", "b"], seed=3)
    again = BatchCorrection.from_config(None, correction.config())
    again.load_state_dict(correction.state_dict())
    some = torch.from_numpy(vectors[10:30])
    assert torch.equal(again(some), correction(some)) and again.batches == ("a", "b")


def test_one_batch_or_no_cells_move_nothing():
    vectors = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    still = BatchCorrection.fit(vectors, np.zeros(50, dtype=int), ["a"])
    assert torch.allclose(still(torch.from_numpy(vectors)), torch.from_numpy(vectors))
    empty = BatchCorrection.fit(vectors[:0], np.zeros(0, dtype=int), ["a"])
    assert torch.equal(empty(torch.from_numpy(vectors)), torch.from_numpy(vectors))
