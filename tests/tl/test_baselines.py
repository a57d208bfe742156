from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold

from scbin._errors import ScbinInputError
from scbin.tl._baselines import knn_macro_f1, logistic_macro_f1, pca


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b", "c"])[np.arange(90) % 3]
    centres = {"a": 0.0, "b": 1.5, "c": 3.0}
    return rng.normal(size=(90, 5)) + np.array([centres[label] for label in labels])[:, None], labels


def test_pca_against_svd():
    matrix = np.random.default_rng(0).normal(size=(40, 12))
    left, scale, _ = np.linalg.svd(matrix - matrix.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(pca(csr_matrix(matrix), 5)), np.abs(left * scale)[:, :5], atol=1e-4)
    assert pca(matrix, 50).shape == (40, 12)


def test_knn_against_a_loop(cells):
    embedding, labels = cells
    predicted = np.empty_like(labels)
    for train, test in StratifiedKFold(5, shuffle=True, random_state=3).split(embedding, labels):
        for cell in test:
            nearest = train[np.argsort(np.linalg.norm(embedding[train] - embedding[cell], axis=1))[:15]]
            names, counts = np.unique(labels[nearest], return_counts=True)
            predicted[cell] = names[counts.argmax()]
    assert knn_macro_f1(embedding, labels, seed=3) == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_noise_scores_low_and_separated_types_high(cells):
    embedding, labels = cells
    noise = np.random.default_rng(1).normal(size=(90, 5))
    for score in (knn_macro_f1, logistic_macro_f1):
        assert score(embedding, labels) > 0.8
        assert score(noise, labels) < 0.55


def test_rare_label_is_named(cells):
    embedding, labels = cells
    with pytest.raises(ScbinInputError, match=r"I40.*'rare' has 2 of 90"):
        logistic_macro_f1(embedding, np.array(["rare", "rare", *labels[2:]]))
