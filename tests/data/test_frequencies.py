"""Frequencies by phenotype, against counts taken by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scbin.data.frequencies import Frequencies, fit_frequencies, logistic
from scbin.encoding.bins import Bins
from scbin.encoding.vocabulary import Vocabulary

N_GENES = 20


def cells(n_cells=400, seed=0):
    rng = np.random.default_rng(seed)
    vocabulary = Vocabulary.build(
        "bins",
        [f"G{k}" for k in range(N_GENES)],
        phenotypes={"sex": ["f", "m"], "cell_type": ["a", "b", "c"]},
        bins=Bins((0.1, 1.0, 2.0, 3.0)),
    )
    values = np.column_stack([rng.integers(0, 2, n_cells), rng.integers(-1, 3, n_cells)])
    chance = logistic(rng.normal(size=N_GENES) + rng.normal(size=(3, N_GENES))[values[:, 1]])
    levels = rng.integers(1, 5, (n_cells, N_GENES)) * (rng.random((n_cells, N_GENES)) < chance)
    return levels, values, vocabulary


@pytest.fixture(scope="module")
def fitted():
    levels, values, vocabulary = cells()
    return levels, values, vocabulary, fit_frequencies(csr_matrix(levels), values, vocabulary)


def test_one_phenotype_gives_its_own_frequencies(fitted):
    levels, values, _, _ = fitted
    vocabulary = Vocabulary.build(
        "bins", [f"G{k}" for k in range(N_GENES)], phenotypes={"t": ["a", "b", "c"]}, bins=Bins((0.1, 1.0, 2.0, 3.0))
    )
    known = values[:, 1] >= 0
    own = values[known][:, 1:]
    frequencies = fit_frequencies(csr_matrix(levels[known]), own, vocabulary)
    for value in range(3):
        mine = levels[known][own[:, 0] == value]
        odds = frequencies.log_odds[0] + frequencies.log_odds[1 + value]
        assert logistic(odds) == pytest.approx((mine > 0).mean(axis=0), abs=0.01)
        mean = frequencies.bin_mean[0] + frequencies.bin_mean[1 + value]
        seen = (mine > 0).sum(axis=0) > 10
        expected = mine.sum(axis=0) / np.maximum((mine > 0).sum(axis=0), 1)
        assert mean[seen] == pytest.approx(expected[seen], abs=0.15)


def test_main_effects_give_each_value_its_number_of_expressed_cells(fitted):
    levels, values, vocabulary, frequencies = fitted
    rows = frequencies.rows_of(values, vocabulary)
    odds = frequencies.log_odds[0] + sum(np.where(c[:, None] >= 0, frequencies.log_odds[c], 0) for c in rows.T)
    for column, number in ((0, 0), (0, 1), (1, 0), (1, 2)):
        mine = values[:, column] == number
        assert logistic(odds[mine]).mean(axis=0) == pytest.approx((levels[mine] > 0).mean(axis=0), abs=0.02)


def test_the_odds_of_a_cell_sum_to_its_size(fitted):
    _, values, vocabulary, frequencies = fitted
    sizes = np.linspace(1, N_GENES - 2, len(values))
    odds, _ = frequencies.priors(values, sizes, vocabulary)
    assert logistic(odds).sum(axis=1) == pytest.approx(sizes, rel=0.02)


def test_sizes_have_the_mean_and_spread_of_the_cells(fitted):
    levels, values, vocabulary, frequencies = fitted
    normal = np.random.default_rng(1).normal(size=len(values))
    sizes = frequencies.sizes(values, vocabulary, normal)
    true = (levels > 0).sum(axis=1)
    assert sizes.mean() == pytest.approx(true.mean(), rel=0.05)
    assert sizes.std() == pytest.approx(true.std(), rel=0.25)


def test_tensors_give_the_same_frequencies_back(fitted):
    _, _, vocabulary, frequencies = fitted
    tensors = {name: np.asarray(array, dtype=np.float32) for name, array in frequencies.tensors().items()}
    shapes = Frequencies.shapes(vocabulary, len(frequencies.counts))
    assert {name: array.shape for name, array in tensors.items()} == shapes
    again = Frequencies.from_tensors(tensors, vocabulary)
    assert all(np.array_equal(a, again.tensors()[name]) for name, a in frequencies.tensors().items())
    with pytest.raises(ValueError, match="values that the vocabulary"):
        Frequencies.from_tensors({**tensors, "combinations": tensors["combinations"] + 5}, vocabulary)
