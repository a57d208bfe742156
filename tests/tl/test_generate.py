"""`tl.generate` as users call it."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import scbin
from scbin import ScbinInputError
from scbin.nn.packs import token_expression
from tests.conftest import toy_cells

QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def trained():
    """The toy cells and a model that has learned their types."""
    adata = toy_cells()
    scbin.pp.tokenize(adata, phenotypes=["cell_type", "sex"])
    return adata, quick(adata, 60)


def quick(adata, steps=1):
    training = scbin.Training(cells_per_step=16, epochs=100)
    return scbin.tl.pretrain(adata, preset="tiny", backbone="mlp", training=training, max_steps=steps, **QUIET)


@pytest.fixture(scope="module")
def made(trained):
    return scbin.tl.generate(trained[1], {"cell_type": "B cell"}, 30, seed=3, **QUIET)


def test_what_is_written(trained, made):
    _, model = trained
    assert made.shape == (30, len(model.vocabulary.genes)) and list(made.var_names) == list(model.vocabulary.genes)
    assert made.obs["scbin_generated"].all() and list(made.obs_names[:2]) == ["generated_0", "generated_1"]
    assert (made.obs["cell_type"] == "B cell").all() and set(made.obs["sex"]) == {"female", "male"}
    record = json.loads(made.uns["scbin_generated"])
    assert record["model"] == model.fingerprint and record["phenotypes"] == {"cell_type": "B cell"}
    assert sparse.issparse(made.X) and made.X.dtype == np.float32 and made.X.data.min() > 0
    assert np.isfinite(made.obsm["X_scbin"]).all() and made.obsm["X_tokens"].shape[0] == 30


def test_the_genes_of_a_type_are_its_own(trained, made):
    adata, _ = trained
    real = adata[adata.obs["cell_type"] == "B cell"].X.toarray().mean(axis=0)
    assert np.corrcoef(np.log1p(real), np.log1p(made.X.toarray()).mean(axis=0))[0, 1] > 0.8


def test_cells_are_a_function_of_seed_and_number(trained, made):
    _, model = trained
    few = scbin.tl.generate(model, {"cell_type": "B cell"}, np.int64(4), seed=np.int64(3), token_budget=60, **QUIET)
    assert (few.X != made.X[:4]).nnz == 0 and few.obs["sex"].tolist() == made.obs["sex"].tolist()[:4]
    assert (scbin.tl.generate(model, {"cell_type": "B cell"}, 4, seed=4, **QUIET).X != few.X).nnz


def test_generated_cells_and_their_model_go_to_disk_and_through_the_verbs(trained, made, tmp_path):
    _, model = trained
    model.save(tmp_path / "model")
    few = scbin.tl.generate(tmp_path / "model", {"cell_type": "B cell"}, 3, seed=3, **QUIET)
    assert (few.X != made.X[:3]).nnz == 0
    made.write_h5ad(tmp_path / "made.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr and anndata remark on formats to come
        made.write_zarr(tmp_path / "made.zarr")
    again = ad.read_h5ad(tmp_path / "made.h5ad")
    before = again.obsm["X_scbin"].copy()
    scbin.tl.embed(again, model, **QUIET)
    assert again.obsm["X_scbin"] == pytest.approx(before, abs=1e-5)


def test_depth_is_what_was_asked_for(trained):
    _, model = trained
    for depth in (50, 400):
        made = scbin.tl.generate(model, {"cell_type": "B cell"}, 60, depth=depth, **QUIET)
        assert made.X.sum(axis=1).mean() == pytest.approx(depth, rel=0.2)


@pytest.mark.parametrize("encoding", ["bins", "binary"])
def test_values_of_models_that_read_no_counts(toy, encoding):
    """Bins of log1p values and binary tokens: as many genes are expressed as in real cells, with the same mean values."""
    toy.X = sparse.csr_matrix(np.log1p(toy.X.multiply(1e4 / toy.X.sum(axis=1)).toarray()), dtype=np.float32)
    scbin.pp.tokenize(toy, encoding=encoding, phenotypes=["cell_type"], rule="linear" if encoding == "bins" else None)
    model = quick(toy, 150 if encoding == "bins" else 1)
    made = scbin.tl.generate(model, {"cell_type": "T cell"}, 60, **QUIET)
    real = token_expression(toy.obsm["X_tokens"][::3], model.vocabulary).toarray()
    own = made.X.toarray()
    assert (own > 0).mean() == pytest.approx((real > 0).mean(), rel=0.3)
    if encoding == "binary":
        assert set(made.X.data) == {1.0}
    else:
        assert np.corrcoef(own.mean(axis=0), real.mean(axis=0))[0, 1] > 0.8
    with pytest.raises(ScbinInputError, match="A03.*depth"):
        scbin.tl.generate(model, {"cell_type": "T cell"}, 2, depth=100, **QUIET)


def test_genes_vary_together_within_a_type():
    """A programme of eight genes that half of the cells run, which no label tells."""
    rng, cells = np.random.default_rng(0), np.arange(300)
    rate = np.ones((300, 40))
    rate[cells % 2 == 0, :8] = 6.0
    adata = ad.AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    adata.var_names = [f"GENE{i}" for i in range(40)]
    adata.obs["cell_type"] = np.where(cells % 3 == 0, "B cell", "T cell")
    scbin.pp.tokenize(adata, phenotypes=["cell_type"])
    made = scbin.tl.generate(quick(adata, 150), {"cell_type": "T cell"}, 300, **QUIET).X.toarray()
    real, within = (np.corrcoef(x.T)[np.triu_indices(40, 1)] for x in (adata.X[cells % 3 > 0].toarray(), made))
    assert np.corrcoef(real, within)[0, 1] > 0.45  # two halves of the real cells: .63
    assert np.corrcoef(made.T)[:8, :8][np.triu_indices(8, 1)].mean() > 0.3
    ratio = made.var(axis=0) / adata.X.toarray()[cells % 3 > 0].var(axis=0)
    assert np.median(ratio) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    ("phenotypes", "arguments", "code", "text"),
    [
        ({"celltype": "B cell"}, {"n_cells": 2}, "A06", "'cell_type'"),
        ({"cell_type": "b cells"}, {"n_cells": 2}, "A06", "'B cell'"),
        ("B cell", {"n_cells": 2}, "A01", "cell_type"),
        ({}, {"n_cells": 0}, "A02", "at least 1"),
        ({}, {"n_cells": 2, "depth": 0}, "A02", "depth"),
        ({}, {"n_cells": 2, "seed": -1}, "A02", "seed"),
        ({}, {"n_cells": 2.5}, "A01", "n_cells"),
    ],
)
def test_what_cannot_be_meant_is_refused(trained, phenotypes, arguments, code, text):
    with pytest.raises(ScbinInputError, match=text) as caught:
        scbin.tl.generate(trained[1], phenotypes, **arguments, **QUIET)
    assert caught.value.code == code


def test_models_that_cannot_generate_say_so(toy, trained):
    for arguments, text in (({}, "phenotypes"), ({"encoding": "rank", "phenotypes": ["cell_type"]}, "rank")):
        scbin.pp.tokenize(toy, **arguments)
        model = quick(toy)
        with pytest.raises(ScbinInputError, match=f"M06.*{text}"):
            scbin.tl.generate(model, {}, 2)
    network = trained[1].network
    density, network.density = network.density, None
    try:
        with pytest.raises(ScbinInputError, match="M06.*density"):
            scbin.tl.generate(trained[1], {}, 2)
    finally:
        network.density = density
    with pytest.raises(ScbinInputError, match="A01"):
        scbin.tl.generate(3, {}, 2)


def test_values_are_read_as_labels_are(toy):
    toy.obs["cluster"] = np.where(np.arange(60) < 45, 1.0, 2.0)
    scbin.pp.tokenize(toy, phenotypes=["cluster"])
    made = scbin.tl.generate(quick(toy), {"cluster": 1.0}, 3, **QUIET)
    assert made.n_obs == 3 and set(made.obs["cluster"]) == {"1"}
