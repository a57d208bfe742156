"""The compiled loops against a few lines of numpy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from scbin.encoding import kernels
from scbin.encoding.bins import Bins
from scbin.encoding.encode import Encoder
from scbin.encoding.fitting import GeneMoments
from scbin.encoding.values import Reading
from scbin.encoding.vocabulary import Vocabulary

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
    encoder = Encoder(vocabulary, columns, reading)
    return encoder.encode(matrix.data, matrix.indices, matrix.indptr.astype(np.int64), none).tokens


@pytest.mark.parametrize("kind", ["counts", "ties", "wide"])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("equal_medians", [False, True])
def test_rank_is_a_stable_float64_sort(kind: str, shuffled: bool, equal_medians: bool):
    rng = np.random.default_rng(1)
    medians = np.ones(N_GENES) if equal_medians else np.round(rng.lognormal(0.5, 1, N_GENES), 2) + 0.01
    columns = (rng.permutation(N_GENES) if shuffled else np.arange(N_GENES)).astype(np.int32)
    matrix = cells(20, kind)
    vocabulary = Vocabulary.build("rank", GENES, medians=medians, layout="geneformer_v1", max_length=700)
    tokens = encode(matrix, vocabulary, columns)
    for k in range(20):
        genes, x = columns[matrix[k].indices], matrix[k].data.astype(np.float64)
        order = np.lexsort((genes, -(x / medians[genes])))[:700]
        np.testing.assert_array_equal(tokens[k].data - 2, genes[order])
        np.testing.assert_array_equal(tokens[k].indices, np.arange(len(order)))


@pytest.mark.parametrize("max_length", [700, 9000])
@pytest.mark.parametrize("missing", [False, True])
def test_rank_of_rows_longer_than_a_short_sort_holds(max_length: int, missing: bool):
    """Rows of more than 4,096 genes, some columns no genes of the vocabulary, some values zero; what is cut is counted."""
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
    none = np.zeros((4, 0), dtype=np.int64)
    encoded = Encoder(vocabulary, columns, COUNTS).encode(matrix.data, matrix.indices, matrix.indptr, none)
    for k in range(4):
        here = np.flatnonzero((x[k] > 0) & (columns >= 0))
        gene = columns[here]
        order = np.lexsort((gene, -(x[k, here].astype(np.float64) / medians[gene])))
        np.testing.assert_array_equal(encoded.tokens[k].data - 2, gene[order[:max_length]])
        assert encoded.cut[k] == x[k, here[order[max_length:]]].sum()
        assert encoded.matched[k] == x[k, here].sum() and encoded.totals[k] == x[k].sum()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(threads: int, monkeypatch: pytest.MonkeyPatch):
    matrix = cells(40, "counts")
    columns = np.arange(N_GENES, dtype=np.int32)
    vocabulary = Vocabulary.build("rank", GENES, medians=np.linspace(1, 3, N_GENES))
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(kernels, "n_threads", lambda: 1)
    expected = encode(matrix, vocabulary, columns)
    monkeypatch.setattr(kernels, "n_threads", lambda: threads)
    assert (encode(matrix, vocabulary, columns) != expected).nnz == 0


@pytest.mark.parametrize("zeros", ["drop", "keep"])
def test_bins_are_digitize(zeros):
    matrix = cells(20, "counts")
    bins = Bins.linear(zeros=zeros)
    vocabulary = Vocabulary.build("bins", GENES, bins=bins)
    tokens = encode(matrix, vocabulary, np.arange(N_GENES, dtype=np.int32)).toarray()
    x = matrix.toarray()[1:].astype(np.float64)
    levels = np.digitize(np.log1p(x / x.sum(axis=1, keepdims=True) * 1e4), bins.edges)
    expected = np.where((levels > 0) | (zeros == "keep"), levels + vocabulary.first_gene_id, 0)
    np.testing.assert_array_equal(tokens[1:, 2:-1], expected)
    assert not tokens[0].any()


def test_cell_quantiles_are_scgpts():
    matrix = cells(10, "counts")
    n = 7
    vocabulary = Vocabulary.build("bins", GENES, bins=Bins.cell_quantiles(n))
    tokens = encode(matrix, vocabulary, np.arange(N_GENES, dtype=np.int32))
    for k in range(1, 10):
        x = matrix[k].data.astype(np.float64)
        expected = np.digitize(x, np.quantile(x, np.linspace(0, 1, n)))
        found = tokens[k].data[2:-1] - vocabulary.first_gene_id
        # np.quantile interpolates in another order of operations: neighbours of an edge may differ in the last bit
        assert (found != expected).mean() < 0.01


def test_variable_genes_are_scanpys():
    import anndata as ad
    import scanpy as sc

    matrix = cells(200, "counts")
    moments = GeneMoments(N_GENES, COUNTS)
    columns = np.arange(N_GENES, dtype=np.int32)
    for part in (matrix[:90], matrix[90:]):
        moments.add((part.data, part.indices, part.indptr.astype(np.int64)), columns)
    adata = ad.AnnData(matrix[1:].copy())
    adata.var_names = GENES
    sc.pp.filter_genes(adata, min_cells=3)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=500)
    expected = set(adata.var_names[adata.var["highly_variable"]])
    found = {GENES[k] for k in moments.most_variable(500)}
    assert len(found & expected) >= 495  # one empty cell more here, and float32 there


def test_kernels_read_only():
    matrix = cells(5, "counts")
    for part in (matrix.data, matrix.indices, matrix.indptr):
        part.setflags(write=False)
    encode(matrix, Vocabulary.build("bins", GENES, bins=Bins.linear()), np.arange(N_GENES, dtype=np.int32))
