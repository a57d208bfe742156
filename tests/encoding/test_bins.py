from __future__ import annotations

import math

import numpy as np
import pytest

from scbin._errors import ScbinInputError
from scbin.encoding.bins import TABLE_SHIFT, Bins, lookup, make_bins
from scbin.encoding.vocabulary import Vocabulary


def level(bins: Bins, x: float) -> int:
    return int(np.searchsorted(bins.edges, x, side="right"))


def test_polygene_edges():
    expected = [0.1, 1.2125, 2.325, 3.4375, 4.55, 5.6625, 6.775, 7.8875, 9.0]
    np.testing.assert_allclose(Bins.polygene().edges, expected, atol=1e-12)
    assert Bins.polygene().zeros == "keep"
    assert [level(Bins.polygene(), x) for x in (0, 0.0999, 0.1, 8.99, 9.0, 20)] == [0, 0, 1, 8, 9, 9]


def test_perturbgene_edges():
    np.testing.assert_array_equal(Bins.perturbgene().edges, np.linspace(0.1, 9.0, 10))
    assert Bins.perturbgene().zeros == "drop"


def test_log2_published_values():
    thirds = Bins.log2(40)
    assert [level(thirds, x) for x in (1, 7, 8, 9, 10, 11, 16, 32, 64)] == [1, 7, 8, 9, 9, 10, 11, 14, 17]
    seed = Bins.log2(40, bin_size=0.3333333)
    assert [level(seed, x) for x in (9, 10, 11, 16, 32, 64)] == [9, 9, 10, 12, 15, 18]


@pytest.mark.parametrize("x", [*range(1, 300), 512, 1023, 1024, 1025, 2**15, 2**15 + 1])
def test_log2_against_exact_integers(x: int):
    exact = x if x <= 8 else 8 + next(k for k in range(100) if x**3 <= 8**3 * 2**k)
    assert level(Bins.log2(60), x) == exact
    seed = x if x <= 8 else math.ceil((math.log2(x) - 3) / 0.3333333) + 8
    assert level(Bins.log2(60, bin_size=0.3333333), x) == seed


def test_linear_on_counts():
    assert [level(Bins.counts(9, 2.0), x) for x in (0, 1, 2, 3, 4, 17, 18, 99)] == [0, 0, 1, 1, 2, 8, 9, 9]


def test_lookup_never_overshoots():
    edges = np.sort(np.random.default_rng(0).lognormal(size=40))
    values = np.random.default_rng(1).lognormal(sigma=4, size=2000)
    table = lookup(edges)
    starts = table[values.view(np.int64) >> TABLE_SHIFT]
    exact = np.searchsorted(edges, values, side="right")
    assert (starts <= exact).all()
    assert (exact - starts).max() <= 20


@pytest.mark.parametrize("edges", [(), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (np.nan,), (1.0, np.inf)])
def test_edges_must_increase_from_above_zero(edges):
    with pytest.raises(ScbinInputError):
        Bins(edges)


def test_limits():
    with pytest.raises(ScbinInputError, match="B06"):
        Bins(tuple(range(1, 70_000)))
    with pytest.raises(ScbinInputError, match="V12"):
        Vocabulary.build("rank", ["A1"], medians=[1.0], max_length=3)


def test_unknown_rule_names_the_known():
    with pytest.raises(ScbinInputError, match="quantile_per_cell"):
        make_bins("squares", 5, "drop")


@pytest.mark.parametrize(
    "bins",
    [
        Bins.linear(),
        Bins.polygene(),
        Bins.log2(27),
        Bins.cell_quantiles(8),
        Bins.from_quantiles(np.array([[0.5, 1.0], [0.7, 2.0]])),
    ],
)
def test_json_round_trip(bins: Bins):
    vocabulary = Vocabulary.build("bins", ["A1", "B2"], bins=bins, gene_shares=[0.25, 0.75])
    again = Vocabulary.from_json(vocabulary.to_json())
    assert again == vocabulary
    assert again.sha256 == vocabulary.sha256
    assert len(bins.centres) == bins.n_bins + 1
    assert (np.diff(bins.centres) > 0).all()


def test_each_gene_has_the_middles_of_its_own_edges():
    edges = np.array([[1.0, 2.0, 4.0], [0.5, 0.6, 0.7]])
    bins = Bins.from_quantiles(edges)
    assert bins.gene_centres == pytest.approx(np.array([[0, 1.5, 3, 5], [0, 0.55, 0.65, 0.75]]))
    assert np.array_equal(Bins.linear(5).gene_centres, Bins.linear(5).centres[None])
    assert np.array_equal(Bins.cell_quantiles(5).gene_centres, Bins.cell_quantiles(5).centres[None])
    assert Bins.binary().gene_centres.tolist() == [[0.0, 1.0]]
