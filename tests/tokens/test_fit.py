"""Variable genes, medians and quantiles against scanpy and numpy."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse

from scbin._adata import iter_blocks
from scbin.tokens import fit
from scbin.tokens.fit import Cells, gene_medians, group_quantiles
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


def cells_of(adata: ad.AnnData, block_values: int | None = None, reading=Reading("counts"), n_genes=300) -> Cells:
    names, columns = tuple(adata.var_names), np.arange(adata.n_vars, dtype=np.int32)
    return Cells(names, columns, reading, lambda: iter_blocks(adata, block_values=block_values), n_genes=n_genes)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # scanpy with pandas 3.1
def test_pearson_residuals_are_scanpys_in_any_blocks(counts):
    few = counts[1:, counts.X.getnnz(axis=0) >= 3].copy()
    found = [cells_of(few, size).choose_genes() for size in (None, 3000)]
    np.testing.assert_array_equal(*found)
    sc.experimental.pp.highly_variable_genes(few, flavor="pearson_residuals", n_top_genes=300)
    np.testing.assert_array_equal(np.flatnonzero(few.var["highly_variable"]), found[0])


def test_dispersion_is_scanpys(counts):
    logs = counts.copy()
    with pytest.warns(UserWarning, match="zero counts"):
        sc.pp.normalize_total(logs, target_sum=1e4)
    sc.pp.log1p(logs)
    found = cells_of(logs, 3000, Reading("log1p")).choose_genes()
    expected = logs[1:].copy()
    expected.var_names = [str(k) for k in range(800)]
    sc.pp.filter_genes(expected, min_cells=3)
    sc.pp.highly_variable_genes(expected, n_top_genes=300)
    chosen = {int(name) for name in expected.var_names[expected.var["highly_variable"]]}
    assert len(chosen & set(found)) >= 296  # one empty cell more here, and float32 there


def test_few_genes_are_all_taken_and_unseen_ones_last(counts):
    assert cells_of(counts, n_genes=800).choose_genes().tolist() == list(range(800))
    assert 5 not in cells_of(counts, n_genes=799).choose_genes()


def test_medians_are_numpys_and_those_of_the_logs(counts):
    x = counts.X.toarray().astype(np.float64)
    per = x / np.maximum(x.sum(axis=1, keepdims=True), 1) * 1e4
    expected = [np.median(per[x[:, g] > 0, g]) if x[:, g].any() else 0.0 for g in range(800)]
    found = gene_medians(cells_of(counts, 3000))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    logs = ad.AnnData(sparse.csr_matrix(np.log1p(per / 7).astype(np.float32)))
    np.testing.assert_array_equal(gene_medians(cells_of(logs, reading=Reading("log1p", exact=True))), found)


def test_quantiles_are_numpys():
    rng = np.random.default_rng(0)
    groups, values = rng.integers(0, 6, 30_000), rng.lognormal(1, 1.5, 30_000).astype(np.float32)
    found = group_quantiles(groups, values, 7, SHARES)
    for group in range(6):
        np.testing.assert_allclose(found[group], np.quantile(values[groups == group], SHARES), rtol=1e-6)
    assert np.isnan(found[6]).all()


def test_of_many_values_medians_are_of_every_second_cell_in_any_blocks(counts, monkeypatch):
    expected = gene_medians(cells_of(counts[::2].copy()))
    monkeypatch.setattr(fit, "MOST_VALUES", counts.X.nnz - 1)
    for size in (None, 3000):
        np.testing.assert_array_equal(gene_medians(cells_of(counts, size)), expected)
