"""Variable genes, medians and quantiles against scanpy and numpy."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse

from scbin._adata import iter_blocks
from scbin.tokens.fit import Cells, QuantileSketch, gene_medians, variable_genes
from scbin.tokens.values import Reading

SHARES = np.array([0.0, 0.1, 0.5, 0.9, 1.0])


@pytest.fixture(scope="module")
def counts() -> ad.AnnData:
    rng = np.random.default_rng(7)
    rate = rng.lognormal(-0.5, 1.5, 800)
    kind = np.where(np.arange(200)[:, None] % 2, rng.lognormal(0, 0.5, 800), 1)
    depth = rng.lognormal(0, 0.4, 200)[:, None]
    x = rng.poisson(rate * kind * depth).astype(np.float32)
    x[0], x[:, 5] = 0, 0
    return ad.AnnData(sparse.csr_matrix(x))


def cells_of(adata: ad.AnnData, block_values: int | None = None, reading=Reading("counts")) -> Cells:
    names, columns = tuple(adata.var_names), np.arange(adata.n_vars, dtype=np.int32)
    return Cells(names, columns, reading, lambda: iter_blocks(adata, block_values=block_values))


def test_pearson_residuals_are_scanpys_in_any_blocks(counts):
    few = counts[1:, counts.X.getnnz(axis=0) >= 3].copy()
    found = [variable_genes(cells_of(few, size), 300, "pearson_residuals") for size in (None, 3000)]
    np.testing.assert_array_equal(*found)
    sc.experimental.pp.highly_variable_genes(few, flavor="pearson_residuals", n_top_genes=300)
    np.testing.assert_array_equal(np.flatnonzero(few.var["highly_variable"]), found[0])


def test_dispersion_is_scanpys(counts):
    found = variable_genes(cells_of(counts, 3000), 300, "dispersion")
    expected = counts[1:].copy()
    expected.var_names = [str(k) for k in range(800)]
    sc.pp.filter_genes(expected, min_cells=3)
    sc.pp.normalize_total(expected, target_sum=1e4)
    sc.pp.log1p(expected)
    sc.pp.highly_variable_genes(expected, n_top_genes=300)
    chosen = {int(name) for name in expected.var_names[expected.var["highly_variable"]]}
    assert len(chosen & set(found)) >= 296  # one empty cell more here, and float32 there


def test_few_genes_are_all_taken_and_unseen_ones_last(counts):
    assert variable_genes(cells_of(counts), 800, "dispersion").tolist() == list(range(800))
    assert 5 not in variable_genes(cells_of(counts), 799, "pearson_residuals")


def test_medians_are_numpys_and_those_of_the_logs(counts):
    x = counts.X.toarray().astype(np.float64)
    per = x / np.maximum(x.sum(axis=1, keepdims=True), 1) * 1e4
    expected = [np.median(per[x[:, g] > 0, g]) if x[:, g].any() else np.nan for g in range(800)]
    found = gene_medians(cells_of(counts, 3000))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    logs = ad.AnnData(sparse.csr_matrix(np.log1p(per / 7).astype(np.float32)))
    np.testing.assert_array_equal(gene_medians(cells_of(logs, reading=Reading("log1p", exact=True))), found)


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 6, 30_000), rng.lognormal(1, 1.5, 30_000).astype(np.float32)


@pytest.mark.parametrize(("exact", "rtol"), [(1 << 24, 1e-6), (100, 0.02)])
def test_quantiles_are_numpys_in_any_split(sample, exact: int, rtol: float):
    groups, values = sample
    whole, parts = QuantileSketch(7, exact=exact), QuantileSketch(7, exact=exact)
    whole.add(groups, values)
    for part in np.array_split(np.arange(len(values)), 7):
        parts.add(groups[part], values[part])
    np.testing.assert_array_equal(whole.quantiles(SHARES), parts.quantiles(SHARES))
    for group in range(6):
        np.testing.assert_allclose(
            whole.quantiles(SHARES)[group], np.quantile(values[groups == group], SHARES), rtol=rtol
        )
    assert np.isnan(whole.quantiles(SHARES)[6]).all()
