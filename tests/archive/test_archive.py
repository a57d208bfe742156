"""Files of each version of the format, kept for ever: they load, and give the numbers that were stored with them."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import scbin

QUIET = {"device": "cpu", "progress": False}
FORMATS = sorted(path for path in Path(__file__).parent.iterdir() if path.name.startswith("format_"))


@pytest.fixture(params=FORMATS, ids=lambda path: path.name)
def folder(request):
    return request.param


def test_cells_tokens_and_embeddings(folder):
    adata = ad.read_h5ad(folder / "cells.h5ad")
    model = scbin.Model.load(folder / "model_bins")
    assert model.head is None and model.vocabulary.encoding == "bins" and len(model.history)
    tokens = sparse.load_npz(folder / "tokens.npz")
    again = adata.copy()
    scbin.pp.tokenize(again, like=model)
    for own in (adata.obsm["X_tokens"], again.obsm["X_tokens"]):
        assert own.dtype == tokens.dtype and (own != tokens).nnz == 0
    assert adata.uns["scbin"]["vocabulary"] == model.vocabulary.to_json()
    scbin.tl.embed(again, model, **QUIET)
    np.testing.assert_allclose(again.obsm["X_scbin"], adata.obsm["X_scbin"], atol=1e-5)
    scbin.tl.embed(again, model, pooling="cls", layer=-2, **QUIET)
    np.testing.assert_allclose(again.obsm["X_scbin"], adata.obsm["X_scbin_layer"], atol=1e-5)


def test_ranks(folder):
    adata = ad.read_h5ad(folder / "cells.h5ad")
    model = scbin.Model.load(folder / "model_rank")
    assert (model.readout.pooling, model.readout.layer) == ("cls", -2)
    scbin.pp.tokenize(adata, like=model)
    assert (adata.obsm["X_tokens"] != sparse.load_npz(folder / "tokens_rank.npz")).nnz == 0
    scbin.tl.embed(adata, model, **QUIET)
    np.testing.assert_allclose(adata.obsm["X_scbin"], adata.obsm["X_rank"], atol=1e-5)


def test_a_head(folder):
    adata = ad.read_h5ad(folder / "cells.h5ad")
    model = scbin.Model.load(folder / "model_head")
    assert [target.name for target in model.head.targets] == ["cell_type", "age"]
    scbin.tl.predict(adata, model, target="cell_type", **QUIET)
    predicted = np.asarray(adata.obsm["scbin_cell_type_probability"])
    np.testing.assert_allclose(predicted, adata.obsm["cell_type_probability"], atol=1e-5)


@pytest.mark.parametrize("name", ["model_bins", "model_head", "model_rank"])
def test_written_again_it_is_the_same_bytes(folder, name, tmp_path):
    """Old files stay what they are under a newer version: only the card, which is for people, may differ."""
    scbin.Model.load(folder / name).save(tmp_path / name)
    kept = {path.name for path in (folder / name).iterdir()} - {"README.md"}
    assert kept == {path.name for path in (tmp_path / name).iterdir()} - {"README.md"}
    for file in kept:
        assert (tmp_path / name / file).read_bytes() == (folder / name / file).read_bytes(), file


def test_the_archive_stays_small():
    total = sum(path.stat().st_size for folder in FORMATS for path in folder.rglob("*") if path.is_file())
    assert total < 200_000 * len(FORMATS)
