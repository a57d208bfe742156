"""`tl.impute` as users call it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scbin
from scbin import ScbinInputError
from scbin.nn.packs import token_expression

QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def learned(trained):
    """The toy cells, one of them empty, and a model that has learned their types."""
    training = scbin.Training(cells_per_step=16, epochs=100)
    model = scbin.tl.pretrain(
        trained[0], preset="tiny", backbone="mlp", training=training, max_steps=60, key_added="X_learned", **QUIET
    )
    return trained[0], model


@pytest.fixture
def cells(learned):
    return learned[0].copy(), learned[1]


def test_expressed_genes_keep_their_value_and_others_get_an_expectation(cells):
    adata, model = cells
    x = adata.X.copy()
    scbin.tl.impute(adata, model, **QUIET)
    layer = adata.layers["scbin_imputed"]
    assert layer.shape == adata.shape and layer.dtype == np.float32 and (adata.X != x).nnz == 0
    dense, empty = layer.toarray(), np.diff(adata.obsm["X_tokens"].indptr) == 0
    assert empty.sum() == 1 and np.isnan(dense[empty]).all() and np.isfinite(dense[~empty]).all()
    expected = token_expression(adata.obsm["X_tokens"], model.vocabulary).toarray()
    on = (expected > 0) & ~empty[:, None]
    assert dense[on] == pytest.approx(expected[on])
    assert (dense[~empty] > 0).all()


def test_an_expectation_is_what_the_count_head_says_at_the_depth_of_the_cell(cells):
    adata, model = cells
    scbin.tl.impute(adata, model, **QUIET)
    head, z = model.network.counts, torch.from_numpy(adata.obsm["X_learned"])
    with torch.no_grad():
        shares = head.log_mean(z, torch.zeros(len(z))).softmax(dim=1).numpy()
    seen = token_expression(adata.obsm["X_tokens"], model.vocabulary).toarray()
    absent = (seen == 0) & (seen.sum(axis=1) > 0)[:, None]
    expected = shares * seen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(adata.layers["scbin_imputed"].toarray()[absent], expected[absent], rtol=1e-4)


def test_some_genes_and_a_copy_that_goes_to_disk(cells, tmp_path):
    adata, model = cells
    new = scbin.tl.impute(adata, model, genes=["GENE3", "GENE1"], copy=True, key_added="mine", **QUIET)
    assert "mine" not in adata.layers
    new.write_h5ad(tmp_path / "a.h5ad")
    stored = new.layers["mine"]
    assert stored.nnz == 2 * adata.n_obs and set(stored.indices) == {1, 3} and stored.has_sorted_indices
    scbin.tl.impute(adata, model, token_budget=50, **QUIET)
    all_genes = adata.layers["scbin_imputed"][:, [1, 3]].toarray()
    assert new.layers["mine"][:, [1, 3]].toarray() == pytest.approx(all_genes, rel=1e-4, nan_ok=True)
    scbin.tl.impute(adata, genes="GENE3", **QUIET)  # the model of these cells, and one gene needs no list
    assert set(adata.layers["scbin_imputed"].indices) == {3}


def test_hidden_phenotypes_do_not_matter(cells):
    adata, model = cells
    part = adata[:6, ::-1].copy()  # genes are matched by name
    scbin.tl.impute(part, model, **QUIET)
    other = part.copy()
    other.obsm["X_tokens"] = part.obsm["X_tokens"].copy()
    for phenotype in model.vocabulary.phenotypes:
        at = other.obsm["X_tokens"].indices == phenotype.position
        other.obsm["X_tokens"].data[at] = phenotype.missing_id
    scbin.tl.impute(other, model, **QUIET)
    own = part.layers["scbin_imputed"].toarray()
    np.testing.assert_array_equal(own, other.layers["scbin_imputed"].toarray())
    scbin.tl.impute(adata, model, **QUIET)
    np.testing.assert_allclose(own[:, ::-1], adata.layers["scbin_imputed"][:6].toarray(), rtol=1e-4)


def test_what_cannot_be_imputed_is_refused(cells, toy):
    adata, model = cells
    for arguments, text in (
        ({"genes": ["GEN1"]}, "A06.*GEN1"),
        ({"copy": 1}, "A01.*copy"),
    ):
        with pytest.raises(ScbinInputError, match=text):
            scbin.tl.impute(adata, model, **(QUIET | arguments))
    scbin.pp.tokenize(toy, encoding="rank")
    ranks = scbin.tl.pretrain(toy, preset="tiny", max_steps=1, **QUIET)
    with pytest.raises(ScbinInputError, match="M06.*rank"):
        scbin.tl.impute(toy, ranks, **QUIET)
    assert "scbin_imputed" not in adata.layers and "scbin_imputed" not in toy.layers
