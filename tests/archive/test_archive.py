"""Files of each version of the format, kept for ever: they load, and give the numbers that were stored with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import scbin
from scbin._errors import ScbinInputWarning, ScbinModelError
from scbin.nn.network import CellNetwork
from scbin.nn.run import embed
from scbin.nn.vector import PooledVector
from scbin.tokens.tokens import MemoryTokens

HERE = Path(__file__).parent
FIRST = HERE / "format_1"
OTHERS = sorted(path for path in HERE.glob("format_*") if path != FIRST)


def vectors(network, adata, model):
    tokens = MemoryTokens(adata.obsm["X_tokens"], model.vocabulary)
    return embed(network, tokens, device="cpu", precision="float32")


def test_cells_and_tokens_of_the_first_edition():
    adata, tokens = ad.read_h5ad(FIRST / "cells.h5ad"), sparse.load_npz(FIRST / "tokens.npz")
    with pytest.warns(ScbinInputWarning, match=r"M06.*projection, decoder, gene weights left out"):
        model = scbin.Model.load(FIRST / "model_bins")
    assert model.vocabulary.encoding == "bins" and len(model.history) and model.training["steps"] == 2
    again = adata.copy()
    scbin.pp.tokenize(again, like=model)
    for own in (adata.obsm["X_tokens"], again.obsm["X_tokens"]):
        assert own.dtype == tokens.dtype and (own != tokens).nnz == 0
    network = CellNetwork(model.network.backbone, PooledVector(model.vocabulary, 16, "cls", -2))
    # its embeddings hid the phenotypes
    hidden = again.obsm["X_tokens"].toarray()
    for phenotype in model.vocabulary.phenotypes:
        hidden[:, phenotype.position] = model.vocabulary.mask_id
    again.obsm["X_tokens"] = sparse.csr_matrix(hidden)
    np.testing.assert_allclose(vectors(network, again, model), adata.obsm["X_scbin_layer"], atol=1e-5)


def test_ranks_of_the_first_edition(tmp_path):
    adata, model = ad.read_h5ad(FIRST / "cells.h5ad"), scbin.Model.load(FIRST / "model_rank")
    vector = model.network.vector
    assert (vector.pooling, vector.layer) == ("cls", -2)
    scbin.pp.tokenize(adata, like=model)
    assert (adata.obsm["X_tokens"] != sparse.load_npz(FIRST / "tokens_rank.npz")).nnz == 0
    np.testing.assert_allclose(vectors(model.network, adata, model), adata.obsm["X_rank"], atol=1e-5)
    path = shutil.copytree(FIRST / "model_rank", tmp_path / "model")
    model.save(path, overwrite=True)  # today's format in its place
    assert scbin.Model.load(path).fingerprint == model.fingerprint and not (path / "scbin.json").exists()


def test_a_head_of_the_first_edition_is_left_out(tmp_path):
    with pytest.warns(ScbinInputWarning, match=r"M06.*head"):
        assert scbin.Model.load(FIRST / "model_head").network.labels is None
    path = shutil.copytree(FIRST / "model_rank", tmp_path / "model")
    (path / "more.py").touch()
    with pytest.raises(ScbinModelError, match="M03"):
        scbin.Model.load(path)


@pytest.mark.parametrize("kind", ["bert", "mlp"])
@pytest.mark.parametrize("folder", OTHERS, ids=lambda path: path.name)
def test_later_formats(folder, kind, tmp_path):
    adata, model = ad.read_h5ad(folder / "cells.h5ad"), scbin.Model.load(folder / f"model_{kind}")
    tokens = sparse.load_npz(folder / "tokens.npz")
    assert (adata.obsm["X_tokens"] != tokens).nnz == 0
    scbin.pp.tokenize(adata, like=model)
    assert (adata.obsm["X_tokens"] != tokens).nnz == 0
    np.testing.assert_allclose(vectors(model.network, adata, model), adata.obsm[f"X_{kind}"], atol=1e-5)
    # old files stay what they are under a newer version: only the card, which is for people, may differ
    model.save(tmp_path / "model")
    kept = {path.name for path in (folder / f"model_{kind}").iterdir()} - {"README.md"}
    assert kept == {path.name for path in (tmp_path / "model").iterdir()} - {"README.md"}
    for file in kept:
        assert (tmp_path / "model" / file).read_bytes() == (folder / f"model_{kind}" / file).read_bytes(), file


def test_the_archive_stays_small():
    folders = [FIRST, *OTHERS]
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 250_000 * len(folders)
