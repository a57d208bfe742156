"""The compiled loops against a few lines of numpy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from scbin.tokens.encoding import Encoder
from scbin.tokens.rules import Bins
from scbin.tokens.values import Block, Reading, RowReader
from scbin.tokens.vocabulary import Vocabulary

COUNTS = Reading("counts")
N_GENES = 3000
GENES = [f"G{k}" for k in range(N_GENES)]


def cells(n: int, kind: str) -> sparse.csr_matrix:
    rng = np.random.default_rng(7)
    x = rng.poisson(rng.lognormal(-0.5, 1.5, N_GENES), size=(n, N_GENES)).astype(np.float32)
    if kind == "ties":
        x = np.minimum(x, 1)
    if kind == "wide":  # values over 60 octaves
        x = np.where(x > 0, 2.0 ** rng.integers(-30, 29, x.shape), 0).astype(np.float32)
    x[0] = 0
    return sparse.csr_matrix(x)


def encode(matrix, vocabulary, columns, reading=COUNTS):
    none = np.zeros((matrix.shape[0], 0), dtype=np.int64)
    block = Block(0, matrix.data, matrix.indices, matrix.indptr.astype(np.int64), matrix.shape[1])
    return Encoder(vocabulary, columns, reading).encode(block, none)


def ten_digits(keys):
    """Keys by the upper 34 bits of their mantissas: nearer ones are equal, and go by token."""
    return keys.view(np.int64) >> 18


@pytest.mark.parametrize("kind", ["counts", "ties", "wide"])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("equal_medians", [False, True])
def test_rank_is_a_stable_sort(kind: str, shuffled: bool, equal_medians: bool):
    rng = np.random.default_rng(1)
    medians = np.ones(N_GENES) if equal_medians else np.round(rng.lognormal(0.5, 1, N_GENES), 2) + 0.01
    columns = (rng.permutation(N_GENES) if shuffled else np.arange(N_GENES)).astype(np.int32)
    matrix = cells(20, kind)
    vocabulary = Vocabulary.build("rank", GENES, medians=medians, layout="geneformer_v1", max_length=700)
    tokens = encode(matrix, vocabulary, columns).tokens
    for k in range(20):
        genes, x = columns[matrix[k].indices], matrix[k].data.astype(np.float64)
        order = np.lexsort((genes, -ten_digits(x / medians[genes])))[:700]
        np.testing.assert_array_equal(tokens[k].data - 2, genes[order])
        np.testing.assert_array_equal(tokens[k].indices, np.arange(len(order)))


@pytest.mark.parametrize("max_length", [700, 9000])
@pytest.mark.parametrize("missing", [False, True])
def test_rank_of_rows_longer_than_a_short_sort_holds(max_length: int, missing: bool):
    """Rows of more than 4,096 genes, some columns no genes of the vocabulary, some values zero; cells that are cut are counted."""
    rng = np.random.default_rng(2)
    n = 9000
    x = rng.poisson(1.2, size=(4, n)).astype(np.float32)
    x[1, : n // 2] = 1  # long runs of one value
    x[2] = 1
    columns = rng.permutation(n).astype(np.int32)
    columns[: 50 if missing else 0] = -1
    medians = np.round(rng.lognormal(0.5, 0.3, n), 1)
    matrix = sparse.csr_matrix(np.ones_like(x))
    matrix.data[:] = x.ravel()
    genes = [f"G{k}" for k in range(n)]
    vocabulary = Vocabulary.build("rank", genes, medians=medians, layout="geneformer_v1", max_length=max_length)
    encoded = encode(matrix, vocabulary, columns)
    for k in range(4):
        here = np.flatnonzero((x[k] > 0) & (columns >= 0))
        gene = columns[here]
        order = np.lexsort((gene, -ten_digits(x[k, here].astype(np.float64) / medians[gene])))
        np.testing.assert_array_equal(encoded.tokens[k].data - 2, gene[order[:max_length]])
        assert encoded.seen["cut"][k] == (len(order) > max_length)
        assert encoded.seen["matched"][k] == x[k, here].sum() and encoded.seen["total"][k] == x[k].sum()


@pytest.mark.parametrize("zeros", ["drop", "keep"])
def test_bins_are_digitize(zeros):
    matrix = cells(20, "counts")
    bins = Bins.linear(zeros=zeros)
    vocabulary = Vocabulary.build("bins", GENES, bins=bins)
    tokens = encode(matrix, vocabulary, np.arange(N_GENES, dtype=np.int32)).tokens.toarray()
    x = matrix.toarray()[1:].astype(np.float64)
    levels = np.digitize(np.log1p(x / x.sum(axis=1, keepdims=True) * 1e4), bins.edges)
    expected = np.where((levels > 0) | (zeros == "keep"), levels + vocabulary.first_gene_id, 0)
    np.testing.assert_array_equal(tokens[1:, 2:-1], expected)
    assert not tokens[0].any()


def test_cell_quantiles_are_scgpts():
    matrix = cells(10, "counts")
    n = 7
    vocabulary = Vocabulary.build("bins", GENES, bins=Bins.cell_quantiles(n))
    tokens = encode(matrix, vocabulary, np.arange(N_GENES, dtype=np.int32)).tokens
    for k in range(1, 10):
        x = matrix[k].data.astype(np.float64)
        expected = np.digitize(x, np.quantile(x, np.linspace(0, 1, n)))
        found = tokens[k].data[2:-1] - vocabulary.first_gene_id
        # np.quantile interpolates in another order of operations: neighbours of an edge may differ in the last bit
        assert (found != expected).mean() < 0.01


def test_counts_come_back_from_logs_exactly():
    matrix = cells(30, "counts")
    matrix.data[matrix.indptr[3] : matrix.indptr[4]] += 1  # the smallest value of this cell is two molecules
    scale = np.random.default_rng(3).uniform(50, 2000, 30)
    logs = matrix.copy().astype(np.float32)
    logs.data = np.log1p(matrix.data * np.repeat(scale / np.maximum(matrix.sum(axis=1).A1, 1), np.diff(matrix.indptr)))
    logs.data[logs.indptr[7] : logs.indptr[8]] *= 0.9  # these are the logs of no counts
    block = Block(0, logs.data.astype(np.float32), logs.indices, logs.indptr.astype(np.int64), N_GENES)
    rows = RowReader(np.arange(N_GENES), Reading("log1p", exact=True)).read(block, "counts")
    exact = np.ones(30, dtype=bool)
    exact[7] = False
    assert rows.exact[1:].tolist() == exact[1:].tolist()
    row = np.repeat(np.arange(30), np.diff(matrix.indptr))
    np.testing.assert_array_equal(rows.data[row != 7], matrix.data[row != 7])
    assert (rows.data[row == 7] == np.rint(rows.data[row == 7])).all()
