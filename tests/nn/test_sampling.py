"""Drawing cells: probabilities against what is drawn, and what a cell depends on."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scbin.data.frequencies import logistic
from scbin.encoding.bins import Bins
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.decoder import Decoder, fit_decoder, level_matrix, partial_tokens, phenotype_values
from scbin.nn.sampling import Sampler, bin_chances, choose_values, draw, expression_values, held_to, schedule

N_GENES = 40


def network_of(vocabulary):
    """A stand-in for a network: how much of a cell are two sets of genes that are on or off together."""

    def network(tokens):
        on = level_matrix(tokens, vocabulary).toarray() > 0
        sums = np.column_stack([on[:, :10].sum(axis=1), on[:, 10:20].sum(axis=1), on[:, 20:].sum(axis=1)])
        return (sums / np.maximum(on.sum(axis=1, keepdims=True), 1)).astype(np.float32)

    return network


@pytest.fixture(scope="module", params=["bins", "gene_bins", "binary", "keep"])
def made_of(request):
    """Cells of two types, each in two states that no label tells: the first or the second ten genes are on."""
    rng = np.random.default_rng(0)
    edges = (0.1,) if request.param == "binary" else (0.1, 1.0, 2.0)
    zeros = "keep" if request.param == "keep" else "drop"
    encoding = "bins" if request.param == "keep" else request.param
    vocabulary = Vocabulary.build(
        encoding, [f"G{k}" for k in range(N_GENES)], phenotypes={"t": ["a", "b"]}, bins=Bins(edges, zeros)
    )
    kind, state = rng.integers(0, 2, (2, 600))
    chance = np.full((600, N_GENES), 0.2)
    chance[:, 20:30] = np.where(kind[:, None], 0.8, 0.2)
    chance[:, :10], chance[:, 10:20] = np.where(state, 0.85, 0.1)[:, None], np.where(state, 0.1, 0.85)[:, None]
    levels = rng.integers(1, len(edges) + 1, (600, N_GENES)) * (rng.random((600, N_GENES)) < chance)
    tokens = partial_tokens(levels, np.ones(levels.shape, dtype=bool), vocabulary)
    tokens.data[tokens.indices == 1] = vocabulary.phenotypes[0].first_id + kind
    decoder = fit_decoder(network_of(vocabulary), tokens, vocabulary)
    return levels, kind, tokens, vocabulary, decoder


def test_rows_are_read_back(made_of):
    levels, kind, tokens, vocabulary, _ = made_of
    assert np.array_equal(level_matrix(tokens, vocabulary).toarray(), levels)
    assert np.array_equal(phenotype_values(tokens, vocabulary)[:, 0], kind)
    assert tokens.has_sorted_indices


def test_made_cells_have_the_means_of_their_type_and_the_structure_that_no_label_tells(made_of):
    levels, kind, _, vocabulary, decoder = made_of
    sampler = Sampler(network_of(vocabulary), decoder, vocabulary, steps=8)
    values = np.repeat([[0], [1]], 300, axis=0)
    numbers = np.arange(600)
    made = sampler.sample(values, sampler.sizes(values, 0, numbers), 0, numbers).toarray()
    for value in (0, 1):
        real, new = levels[kind == value] > 0, made[values[:, 0] == value] > 0
        assert new.mean(axis=0) == pytest.approx(real.mean(axis=0), abs=0.13)
    first, second = (made[:, part] > 0 for part in (slice(0, 10), slice(10, 20)))
    assert np.corrcoef(first.sum(axis=1), second.sum(axis=1))[0, 1] < -0.5  # -0.9 in the real cells, 0 without network
    assert made.max() <= vocabulary.n_levels - 1


def test_a_cell_depends_on_the_seed_and_its_number_alone(made_of):
    *_, vocabulary, decoder = made_of
    sampler = Sampler(network_of(vocabulary), decoder, vocabulary, steps=4)
    values, numbers = np.zeros((30, 1), dtype=np.int64), np.arange(30)
    sizes = sampler.sizes(values, 5, numbers)
    whole = sampler.sample(values, sizes, 5, numbers).toarray()
    some = np.array([29, 3, 17])
    assert np.array_equal(sampler.sample(values[some], sizes[some], 5, some).toarray(), whole[some])
    assert not np.array_equal(sampler.sample(values, sizes, 6, numbers).toarray(), whole)


def test_no_gene_helps_to_predict_itself(made_of):
    *_, decoder = made_of
    silent = decoder.odds_weights[:, 30:]  # genes that go with no other
    assert np.abs(silent).max() < 0.5 * np.abs(decoder.odds_weights[:, :20]).mean(axis=1).max()


def test_tensors_give_the_same_decoder_back(made_of):
    *_, vocabulary, decoder = made_of
    tensors = decoder.tensors()
    assert {name: array.shape for name, array in tensors.items()} == Decoder.shapes(vocabulary, decoder.counts(), 3)
    again = Decoder.from_tensors(tensors, vocabulary)
    assert all(np.array_equal(array, again.tensors()[name]) for name, array in tensors.items())
    for wrong in ({}, {"n_combinations": 10**9, "n_scores": 1}, {"n_combinations": 1, "n_scores": 4}):
        with pytest.raises(ValueError):
            Decoder.shapes(vocabulary, wrong, 3)


def test_draws_have_their_chances():
    chances = np.repeat([[0.5, 0.2, 0.3]], 20_000, axis=0)
    drawn = draw(3 * chances, np.random.default_rng(0).random(20_000))
    assert np.bincount(drawn) / 20_000 == pytest.approx([0.5, 0.2, 0.3], abs=0.01)
    assert draw(np.array([[0.0, 1.0, 0.0]]), np.array([0.0])) == [1]


def test_bins_are_a_bell_around_their_mean():
    chances = bin_chances(np.array([4.3, 0.0]), np.array([1.2, 0.3]), 12)
    assert chances.sum(axis=1) == pytest.approx(1)
    assert chances[0] @ np.arange(1, 13) == pytest.approx(4.3, abs=0.02)
    assert chances[1].argmax() == 0 and np.isfinite(bin_chances(np.array([-99.0]), np.array([0.3]), 3)).all()


def test_odds_are_moved_until_they_sum_to_what_is_wanted():
    rng = np.random.default_rng(0)
    odds, rows, wanted = rng.normal(size=60), np.repeat(np.arange(3), 20), np.array([2.0, 10.0, 17.5])
    moved = held_to(odds, rows, wanted)
    assert np.bincount(rows, logistic(moved)) == pytest.approx(wanted, rel=1e-4)
    assert np.ptp((moved - odds)[:20]) < 1e-12


def test_a_schedule_ends_with_everything():
    for steps in (1, 2, 16):
        ends = schedule(steps)
        assert ends[-1] == 1 and (np.diff(ends) > 0).all() and len(ends) == steps


def test_open_values_are_drawn_as_they_came_together():
    class Seen:
        combinations = np.array([[0, 0], [0, 1], [1, 1], [1, -1]])
        counts = np.array([30, 10, 60, 500])

    numbers = np.arange(4_000)
    drawn = choose_values(np.repeat([[-1, 1]], 4_000, axis=0), Seen, 0, numbers)  # type: ignore[arg-type]
    assert (drawn[:, 1] == 1).all() and drawn[:, 0].mean() == pytest.approx(60 / 70, abs=0.02)
    both = choose_values(np.full((4_000, 2), -1), Seen, 0, numbers)  # type: ignore[arg-type]
    assert {tuple(pair) for pair in both} == {(0, 0), (0, 1), (1, 1)}


def test_values_lie_within_their_bins():
    bins = Bins((0.1, 1.0, 2.0))
    vocabulary = Vocabulary.build("bins", ["A", "B"], bins=bins)
    levels = csr_matrix(np.random.default_rng(0).integers(0, 4, (500, 2)))
    values = expression_values(levels, vocabulary, 0, np.arange(500))
    assert np.array_equal(np.searchsorted(bins.edges, values, side="right"), levels.data)
    assert values[levels.data == 2].mean() == pytest.approx(1.5, abs=0.05)
