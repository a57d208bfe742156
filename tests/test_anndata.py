"""Reading tokens back, reading matrices by blocks, and writing slots."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scbin._adata import check_writable, iter_blocks, read_obs, read_tokens, write, write_uns
from scbin._errors import ScbinInputError
from scbin.pp import tokenize
from scbin.tokens.tokens import MemoryTokens, Tokens


def code_of(call) -> str:
    with pytest.raises(ScbinInputError) as caught:
        call()
    return caught.value.code


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_are_read_from_an_anndata_or_passed_through(toy: ad.AnnData):
    assert code_of(lambda: read_tokens(toy)) == "V01"
    assert code_of(lambda: read_tokens("path")) == "I55"
    tokenize(toy, key_added="mine")
    with pytest.raises(ScbinInputError, match="tokens_key='mine'"):
        read_tokens(toy)
    tokens = read_tokens(toy, key="mine")
    assert isinstance(tokens, Tokens) and tokens.n_cells == 60
    assert (tokens.names == toy.obs_names).all() and tokens.obs("sex").equals(toy.obs["sex"])
    assert read_tokens(tokens, tokens.vocabulary) is tokens
    other = read_tokens(tokenize(toy, encoding="rank", copy=True)).vocabulary
    for data in (tokens, toy):
        assert code_of(lambda data=data: read_tokens(data, other, "mine")) == "V03"
    rows = np.array([5, 2, 5])
    assert (tokens.take(rows) != toy.obsm["mine"][rows]).nnz == 0
    assert MemoryTokens(tokens.matrix, tokens.vocabulary).names[3] == "3"


def test_the_vocabulary_goes_with_the_cells(toy: ad.AnnData):
    tokenize(toy)
    a, b = toy[:30].copy(), toy[30:].copy()
    assert code_of(lambda: read_tokens(ad.concat([a, b]))) == "V02"
    joined = read_tokens(ad.concat([a, b], uns_merge="same"))
    assert (joined.matrix != toy.obsm["X_tokens"]).nnz == 0
    assert read_tokens(ad.concat([a, b]), joined.vocabulary).matrix.shape == joined.matrix.shape


def test_rows_of_two_vocabularies_are_refused(toy: ad.AnnData, tmp_path):
    """Two samples tokenized by themselves may have tables of one width, but their tokens mean different genes."""
    a, b = toy[:30].copy(), toy[30:].copy()
    tokenize(a, n_genes=10)
    tokenize(b, n_genes=10)
    vocabulary = read_tokens(a).vocabulary
    assert a.obsm["X_tokens"].shape[1] == b.obsm["X_tokens"].shape[1] and vocabulary != read_tokens(b).vocabulary
    for uns_merge in (None, "first"):
        joined = ad.concat([a, b], uns_merge=uns_merge)
        with pytest.raises(ScbinInputError, match="V03.*30 rows.*another vocabulary"):
            read_tokens(joined, vocabulary)
    with pytest.raises(ScbinInputError, match="V03.*of another vocabulary than"):
        read_tokens(joined[30:].copy(), vocabulary)
    assert read_tokens(joined[:30].copy(), vocabulary).n_cells == 30
    joined.obs.loc[joined.obs_names[30:], "scbin_vocabulary"] = np.nan  # cells without tokens of their own
    assert code_of(lambda: read_tokens(joined, vocabulary)) == "V03"
    a.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert isinstance(back.obs["scbin_vocabulary"].dtype, pd.CategoricalDtype)
    assert read_tokens(back).vocabulary == vocabulary


# ---- matrices --------------------------------------------------------------------------------------------------------


def test_damage_on_disk_is_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    for name, place, value in (("indices", 100, 5000), ("indptr", 20, 10**7)):
        ad.AnnData(sparse.random(30, 20, 0.5, format="csr", dtype=np.float32)).write_h5ad(tmp_path / "a.h5ad")
        with h5py.File(tmp_path / "a.h5ad", "r+") as file:
            file[f"X/{name}"][place] = value
        adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
        with pytest.raises(ScbinInputError, match="I43.*damaged"):
            list(iter_blocks(adata))
        adata.file.close()


# ---- slots -----------------------------------------------------------------------------------------------------------


def test_read_obs_names_the_closest(toy: ad.AnnData):
    assert read_obs(toy, "sex").tolist()[:2] == ["male", "female"]
    with pytest.raises(ScbinInputError, match="A06.*'cell_type'"):
        read_obs(toy, "celltype")


def test_foreign_keys_are_not_replaced(toy: ad.AnnData):
    toy.obsm["X_mine"] = np.zeros((60, 2))
    assert code_of(lambda: write(toy, "obsm", "X_mine", np.ones((60, 2)))) == "A04"
    assert code_of(lambda: check_writable(toy, "obs", "sex")) == "A04"
    write(toy, "obsm", "X_other", np.zeros((60, 2)))
    write(toy, "obsm", "X_other", np.ones((60, 2)))
    assert toy.obsm["X_other"].all()
    write(toy, "obsm", "X_other", None)
    assert "X_other" not in toy.obsm


def test_views_become_real_without_a_warning(toy: ad.AnnData):
    view = toy[:10]
    write(view, "obs", "scbin_x", np.zeros(10))  # warnings are errors
    assert not view.is_view
    assert "scbin_x" not in toy.obs
    write_uns(view, "a", "1")
    write_uns(view, "b", "2")
    assert {"a", "b"} <= set(view.uns["scbin"])
