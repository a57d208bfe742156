from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scbin.data.loadings import gene_loadings, token_expression
from scbin.encoding.bins import Bins
from scbin.encoding.vocabulary import Vocabulary

GENES = [f"g{i}" for i in range(12)]


@pytest.fixture
def bins() -> Vocabulary:
    return Vocabulary.build("bins", GENES, bins=Bins((0.1, 1.0, 2.0, 3.0)))


def random_tokens(vocabulary: Vocabulary, n_cells: int = 60) -> tuple[sp.csr_matrix, np.ndarray]:
    generator = np.random.default_rng(0)
    levels = generator.integers(0, 5, (n_cells, len(GENES))) * (generator.random((n_cells, len(GENES))) < 0.6)
    tokens = np.zeros((n_cells, vocabulary.n_positions), dtype=np.uint16)
    tokens[:, 0] = vocabulary.specials["[CLS]"]
    genes = vocabulary.gene_positions
    tokens[:, genes] = np.where(levels, vocabulary.first_gene_id + levels, 0)
    return sp.csr_matrix(tokens), levels


def test_expression_is_the_centre_of_each_bin(bins):
    tokens, levels = random_tokens(bins)
    np.testing.assert_array_equal(token_expression(tokens, bins).toarray(), bins.bins.centres[levels])


def test_expression_of_ranked_genes_is_presence():
    vocabulary = Vocabulary.build("rank", GENES, max_length=8)
    first = vocabulary.first_gene_id
    tokens = sp.csr_matrix(np.array([[2, 4, first + 3, first, 3]], dtype=np.uint16))
    assert token_expression(tokens, vocabulary).toarray()[0].nonzero()[0].tolist() == [0, 3]


def test_loadings_equal_a_dense_svd_of_the_standardised_matrix(bins):
    tokens, levels = random_tokens(bins)
    dense = bins.bins.centres[levels].astype(np.float64)
    standard = (dense - dense.mean(0)) / dense.std(0)
    _, values, vectors = np.linalg.svd(standard, full_matrices=False)
    loadings = gene_loadings(tokens, bins, 5)
    np.testing.assert_allclose(np.abs(loadings.directions), np.abs(vectors[:5].T), atol=1e-6)
    np.testing.assert_allclose(loadings.spreads, values[:5] / np.sqrt(len(dense)), rtol=1e-6)
    np.testing.assert_allclose(loadings.scale, 1 / dense.std(0), rtol=1e-6)


def test_weighted_rows_of_the_table_say_what_the_svd_says(bins):
    """Sum over genes of expression x weight x unit row is, up to a shift and a factor, the scores of the SVD."""
    tokens, levels = random_tokens(bins)
    loadings = gene_loadings(tokens, bins, 5)
    table = loadings.table()
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    expression = bins.bins.centres[levels].astype(np.float64)
    read = expression @ (unit * loadings.weights()[:, None])
    scores = (expression * loadings.scale) @ loadings.directions * np.sqrt(loadings.spreads / loadings.spreads[0])
    read, scores = read - read.mean(0), scores - scores.mean(0)
    np.testing.assert_allclose(read / np.linalg.norm(read), scores / np.linalg.norm(scores), atol=1e-6)


def test_a_gene_that_no_cell_expresses_has_no_loading_and_no_nan(bins):
    tokens, _ = random_tokens(bins)
    dense = tokens.toarray()
    dense[:, bins.gene_positions[4]] = 0
    loadings = gene_loadings(sp.csr_matrix(dense), bins, 5)
    assert np.isfinite(loadings.table()).all()
    assert (loadings.table()[4] == 0).all()
    assert 0 < loadings.weights()[4] < 1e-5  # counts only in a cell that has no other


def test_a_gene_of_few_cells_does_not_own_them(bins):
    tokens, _ = random_tokens(bins)
    dense = tokens.toarray()
    dense[1:, bins.gene_positions[4]] = 0
    weights = gene_loadings(sp.csr_matrix(dense), bins, 5).weights()
    assert weights[4] <= 5 * np.median(weights) + 1e-9


def test_two_cells_are_enough(bins):
    tokens, _ = random_tokens(bins, n_cells=2)
    loadings = gene_loadings(tokens, bins, 5)
    assert np.isfinite(loadings.table()).all()
    assert np.isfinite(loadings.weights()).all()
