from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from scbin._errors import ScbinInputError
from scbin.tl._baselines import (
    CLASS_BASELINES,
    NUMBER_BASELINES,
    BinCounts,
    RankCounts,
    class_probabilities,
    knn_macro_f1,
    logistic_macro_f1,
    pca,
    predicted_numbers,
)


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
    with pytest.raises(ScbinInputError, match=r"I58.*'rare' has 2 of 90"):
        logistic_macro_f1(embedding, np.array(["rare", "rare", *labels[2:]]))


# ---- trained on some cells, asked about others ----------------------------------------------------------------------


def test_class_probabilities_against_scikit_learn(cells):
    matrix, labels = cells
    codes = np.unique(labels, return_inverse=True)[1]
    train, test = csr_matrix(matrix[:60]), csr_matrix(matrix[60:])
    expected = LogisticRegression(max_iter=2000).fit(matrix[:60], codes[:60]).predict_proba(matrix[60:])
    found = class_probabilities("logistic regression", train, codes[:60], test, 3)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    pair = PCA(5).fit(matrix[:60])
    nearest = KNeighborsClassifier(15).fit(pair.transform(matrix[:60]), codes[:60])
    found = class_probabilities("PCA + kNN", train, codes[:60], test, 3)
    np.testing.assert_allclose(found, nearest.predict_proba(pair.transform(matrix[60:])))


@pytest.mark.parametrize("method", CLASS_BASELINES)
def test_classes_that_no_training_cell_has_get_nothing(cells, method):
    matrix, labels = cells
    codes = np.where(labels == "a", 1, 4)
    found = class_probabilities(method, csr_matrix(matrix), codes, csr_matrix(matrix[:7]), 6)
    assert found.shape == (7, 6) and (found[:, [0, 2, 3, 5]] == 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1)
    alone = class_probabilities(method, csr_matrix(matrix), np.full(90, 2), csr_matrix(matrix[:7]), 3)
    np.testing.assert_array_equal(alone, np.tile([0, 0, 1.0], (7, 1)))


def test_numbers_are_learned_from_training_cells():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(80, 6))
    values = matrix @ rng.normal(size=6) + 3
    train, test = csr_matrix(matrix[:60]), csr_matrix(matrix[60:])
    assert (predicted_numbers("mean", train, values[:60], test) == values[:60].mean()).all()
    for method in NUMBER_BASELINES[1:]:
        assert np.corrcoef(predicted_numbers(method, train, values[:60], test), values[60:])[0, 1] > 0.99
    with pytest.raises(ScbinInputError, match="E19"):
        predicted_numbers("guess", train, values[:60], test)


def test_bins_by_frequency():
    count = BinCounts(3, 4)
    count.add(np.array([0, 0, 0, 1, 1, 1, 1]), np.array([1, 1, 3, 2, 2, 0, 1]))
    gene, truth = np.array([0, 1, 2]), np.array([3, 0, 1])
    for method, expected in (
        ("most frequent bin", [1, 1, 1]),
        ("most frequent bin per gene", [1, 2, 1]),  # the last gene was never hidden: what genes are on average
        ("mean bin per gene", [2, 1, 1]),  # with one average gene more each: 1.6, 1.3, 1.4
    ):
        predicted, logs = count.answers(method, gene, truth)
        np.testing.assert_array_equal(predicted, expected)
        assert logs is None or (np.isfinite(logs).all() and (logs < 0).all())


def test_genes_by_rank():
    count = RankCounts(4, 6).fit(np.array([0, 1, 2, 0, 2, 1]), np.array([0, 1, 2, 0, 3, 1]))
    np.testing.assert_array_equal(count.answers("most frequent gene per rank", np.array([0])), [0])
    np.testing.assert_array_equal(count.answers("mean rank", np.array([0, 5])), [0, 2])  # gene 3 was never seen
