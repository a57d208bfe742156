"""`tl.impute` as users call it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.sparse import csr_matrix

import scbin
from scbin._errors import ScbinInputError

QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture
def cells(trained):
    return trained[0].copy(), trained[1]


def test_expressed_genes_keep_their_bin_and_others_get_an_expectation(cells):
    adata, model = cells
    x = adata.X.copy()
    scbin.tl.impute(adata, model, **QUIET)
    layer = adata.layers["scbin_imputed"]
    assert layer.shape == adata.shape and layer.dtype == np.float32 and (adata.X != x).nnz == 0
    dense, empty = layer.toarray(), np.diff(adata.obsm["X_tokens"].indptr) == 0
    assert empty.sum() == 1 and np.isnan(dense[empty]).all() and np.isfinite(dense[~empty]).all()
    expected = scbin.data.loadings.token_expression(adata.obsm["X_tokens"], model.vocabulary).toarray()
    on = (expected > 0) & ~empty[:, None]
    assert dense[on] == pytest.approx(expected[on])
    assert (dense[~empty] > 0).all()


def test_a_type_that_expresses_a_gene_is_given_more_of_it(cells):
    adata, model = cells
    scbin.tl.impute(adata, model, observed="hide", phenotypes="show", **QUIET)
    own = adata.layers["scbin_imputed"].toarray()
    kept = np.diff(adata.obsm["X_tokens"].indptr) > 0
    kinds = adata.obs["cell_type"].astype(str).to_numpy()
    for k, kind in enumerate(("T cell", "B cell", "monocyte")):
        block = own[:, 10 * k : 10 * k + 10].mean(axis=1)
        assert block[kept & (kinds == kind)].mean() > 1.2 * block[kept & (kinds != kind)].mean()


def test_the_number_of_a_gene_does_not_depend_on_the_gene(cells):
    """With `observed="hide"` a gene's own count must not show in its expectation."""
    adata, model = cells
    scbin.tl.impute(adata, model, observed="hide", genes=["GENE0"], **QUIET)
    before = adata.layers["scbin_imputed"].toarray()[:, 0]
    cell, tokens = 0, adata.obsm["X_tokens"].toarray()
    place, first = model.vocabulary.first_gene_position, model.vocabulary.first_gene_id
    assert tokens[cell, place] > first
    tokens[cell, place] = first + (1 if tokens[cell, place] != first + 1 else 5)
    adata.obsm["X_tokens"] = csr_matrix(tokens)
    scbin.tl.impute(adata, model, observed="hide", genes=["GENE0"], **QUIET)
    assert adata.layers["scbin_imputed"].toarray()[cell, 0] == pytest.approx(before[cell], rel=1e-4)


def test_some_genes_and_a_copy(cells):
    adata, model = cells
    new = scbin.tl.impute(adata, model, genes=["GENE3", "GENE1"], copy=True, key_added="mine", **QUIET)
    assert "mine" not in adata.layers
    stored = new.layers["mine"]
    assert stored.nnz == 2 * adata.n_obs and set(stored.indices) == {1, 3} and stored.has_sorted_indices
    scbin.tl.impute(adata, model, token_budget=50, **QUIET)
    all_genes = adata.layers["scbin_imputed"][:, [1, 3]].toarray()
    assert new.layers["mine"][:, [1, 3]].toarray() == pytest.approx(all_genes, rel=1e-4, nan_ok=True)


def test_what_is_written_goes_to_disk(cells, tmp_path):
    adata, model = cells
    scbin.tl.impute(adata, model, **QUIET)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr and anndata remark on formats to come
        adata.write_zarr(tmp_path / "a.zarr")


def test_models_without_a_decoder_fit_one_to_the_cells(cells):
    adata, model = cells
    scbin.tl.impute(adata, model, **QUIET)
    own = adata.layers["scbin_imputed"].toarray()
    decoder, model.decoder = model.decoder, None
    try:
        scbin.tl.impute(adata, model, **QUIET)
    finally:
        model.decoder = decoder
    fitted = adata.layers["scbin_imputed"].toarray()
    kept = np.isfinite(own)
    assert np.corrcoef(own[kept], fitted[kept])[0, 1] > 0.9 and "fitted" in adata.uns["scbin"]["impute"]


def test_what_cannot_be_imputed_is_refused(cells, toy, quick):
    adata, model = cells
    with pytest.raises(ScbinInputError, match="P22"):
        scbin.tl.impute(adata, model, genes=["GEN1"], **QUIET)
    with pytest.raises(ScbinInputError, match="A02"):
        scbin.tl.impute(adata, model, observed="both", **QUIET)
    scbin.pp.tokenize(toy, encoding="rank")
    ranks = scbin.tl.pretrain(toy, **quick)
    with pytest.raises(ScbinInputError, match="S02"):
        scbin.tl.impute(toy, ranks, **QUIET)
    assert "scbin_imputed" not in adata.layers and "scbin_imputed" not in toy.layers


def test_genes_with_edges_of_their_own_keep_their_own_values(toy, quick):
    strong = np.where(np.arange(40) % 2, 1.0, 20.0)
    toy.X = csr_matrix(toy.X.multiply(strong), dtype=np.float32)
    scbin.pp.tokenize(toy, bins="quantile_per_gene", n_bins=8)
    model = scbin.tl.pretrain(toy, **quick)
    scbin.tl.impute(toy, model, **QUIET)
    kept, bins = toy.layers["scbin_imputed"].toarray(), model.vocabulary.bins
    level = np.zeros(toy.shape, dtype=int)
    tokens = toy.obsm["X_tokens"][:, model.vocabulary.gene_positions].toarray().astype(int)
    level[tokens > 0] = tokens[tokens > 0] - model.vocabulary.first_gene_id
    low = np.take_along_axis(bins.matrix.T, np.maximum(level - 1, 0), axis=0)
    on = (level > 0) & (level < 8)
    high = np.take_along_axis(bins.matrix.T, np.minimum(level, 7), axis=0)
    assert on.sum() > 200 and (kept[on] >= low[on] - 1e-6).all() and (kept[on] <= high[on] + 1e-6).all()


def test_one_gene_needs_no_list(cells):
    adata, model = cells
    scbin.tl.impute(adata, model, genes="GENE3", **QUIET)
    assert set(adata.layers["scbin_imputed"].indices) == {3}
