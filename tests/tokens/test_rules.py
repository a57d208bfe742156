from __future__ import annotations

import math

import numpy as np
import pytest

from scbin._errors import ScbinInputError
from scbin.tokens.rules import Bins
from scbin.tokens.vocabulary import Vocabulary


def level(bins: Bins, x: float) -> int:
    return int(np.searchsorted(bins.edges, x, side="right"))


def test_counts_are_exact_to_16_and_then_steps_of_15_percent():
    bins = Bins.counts()
    assert [level(bins, x) for x in range(17)] == list(range(17))
    assert bins.edges[-1] >= 10_000
    steps = np.divide(bins.edges[20:], bins.edges[19:-1])
    assert (steps > 1.13).all() and (steps < 1.18).all()
    assert bins.centres[:17].tolist() == list(range(17))
    for k in range(17, bins.n_bins):  # the geometric middle of the counts of a bin
        assert bins.centres[k] == pytest.approx(math.sqrt(bins.edges[k - 1] * (bins.edges[k] - 1)))


@pytest.mark.parametrize("x", [*range(1, 300), 512, 1023, 1024, 1025, 2**15, 2**15 + 1])
def test_log2_against_exact_integers(x: int):
    exact = x if x <= 8 else 8 + next(k for k in range(100) if x**3 <= 8**3 * 2**k)
    assert level(Bins.log2(60), x) == exact
    seed = x if x <= 8 else math.ceil((math.log2(x) - 3) / 0.3333333) + 8
    assert level(Bins.log2(60, bin_size=0.3333333), x) == seed


def test_log2_published_values():
    assert [level(Bins.log2(40), x) for x in (1, 7, 8, 9, 10, 11, 16, 32, 64)] == [1, 7, 8, 9, 9, 10, 11, 14, 17]
    seed = Bins.log2(40, bin_size=0.3333333)
    assert [level(seed, x) for x in (9, 10, 11, 16, 32, 64)] == [9, 9, 10, 12, 15, 18]
    assert Bins.log2(40).centres[:11] == pytest.approx([*range(9), math.sqrt(90), math.sqrt(11 * 12)])


def test_edges_must_increase_from_above_zero():
    wrong = [(), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (np.nan,), (1.0, np.inf), tuple(range(1, 70_000))]
    for edges in wrong:
        with pytest.raises(ScbinInputError, match="A02"):
            Bins(edges)


@pytest.mark.parametrize(
    "bins",
    [
        *(Bins.counts(), Bins.linear(), Bins.polygene(), Bins.log2(27), Bins.cell_quantiles(8), Bins.binary()),
        Bins.from_quantiles(np.array([[0.5, 1.0], [0.7, 2.0]])),
    ],
)
def test_json_round_trip(bins: Bins):
    vocabulary = Vocabulary.build("bins", ["A1", "B2"], bins=bins, gene_shares=[0.25, 0.75])
    again = Vocabulary.from_json(vocabulary.to_json())
    assert (again, again.sha256) == (vocabulary, vocabulary.sha256)
    assert len(bins.centres) == bins.n_bins + 1
    assert (np.diff(bins.centres) > 0).all()


def test_quantiles_of_genes_have_the_middles_of_their_mean_edges():
    bins = Bins.from_quantiles(np.array([[1.0, 2.0, 4.0], [0.5, 0.6, 0.7]]))
    edges = (bins.matrix[0] + bins.matrix[1]) / 2
    assert bins.edges == pytest.approx(edges) and bins.centres[1] == pytest.approx((edges[0] + edges[1]) / 2)
    assert Bins.binary().centres.tolist() == [0.0, 1.0]
