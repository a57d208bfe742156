"""Reading tokens back, and writing slots."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pytest

from scbin._anndata import check_writable, read_obs, read_tokens, write_obs, write_obsm, write_uns
from scbin._errors import ScbinInputError, ScbinTypeError
from scbin.pp import iter_tokens, tokenize


def code_of(call) -> str:
    with pytest.raises(ScbinInputError) as caught:
        call()
    return caught.value.code


def test_read_tokens_not_tokenized(toy: ad.AnnData):
    assert code_of(lambda: read_tokens(toy)) == "T01"


def test_read_tokens_after_concat(toy: ad.AnnData):
    tokenize(toy)
    a, b = toy[:30].copy(), toy[30:].copy()
    b.obs_names = [f"b{k}" for k in range(30)]
    assert code_of(lambda: read_tokens(ad.concat([a, b]))) == "T02"
    joined, vocabulary = read_tokens(ad.concat([a, b], uns_merge="same"))
    assert (joined != toy.obsm["X_tokens"]).nnz == 0
    assert read_tokens(ad.concat([a, b]), vocabulary)[0].shape == joined.shape


def test_read_tokens_of_another_vocabulary(toy: ad.AnnData):
    other = tokenize(toy, encoding="rank", copy=True)
    tokenize(toy)
    assert code_of(lambda: read_tokens(toy, read_tokens(other)[1])) == "T03"


def test_read_tokens_of_another_width_or_type(toy: ad.AnnData):
    tokenize(toy)
    kept = toy.obsm["X_tokens"]
    toy.obsm["X_tokens"] = kept[:, :20]
    assert code_of(lambda: read_tokens(toy)) == "T04"
    toy.obsm["X_tokens"] = kept.astype(np.float64)
    assert code_of(lambda: read_tokens(toy)) == "T04"


def test_read_obs_names_the_closest(toy: ad.AnnData):
    assert read_obs(toy, "sex").tolist()[:2] == ["male", "female"]
    with pytest.raises(ScbinInputError, match="'cell_type'"):
        read_obs(toy, "celltype")
    with pytest.raises(ScbinTypeError, match="A01.*one name"):
        read_obs(toy, ["sex"])


def test_foreign_keys_are_not_replaced(toy: ad.AnnData):
    toy.obsm["X_mine"] = np.zeros((60, 2))
    assert code_of(lambda: write_obsm(toy, "X_mine", np.ones((60, 2)))) == "I54"
    assert code_of(lambda: check_writable(toy, "obs", "sex")) == "I54"
    write_obsm(toy, "X_other", np.zeros((60, 2)))
    write_obsm(toy, "X_other", np.ones((60, 2)))
    assert toy.obsm["X_other"].all()


def test_views_become_real_without_a_warning(toy: ad.AnnData):
    view = toy[:10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_obs(view, "scbin_x", np.zeros(10))
    assert not view.is_view
    assert "scbin_x" not in toy.obs
    write_uns(view, "a", "1")
    write_uns(view, "b", "2")
    assert {"a", "b"} <= set(view.uns["scbin"])


def test_iter_tokens_equals_tokenize(toy: ad.AnnData, tmp_path):
    tokenize(toy, phenotypes=["sex"])
    _, vocabulary = read_tokens(toy)
    toy.write_h5ad(tmp_path / "toy.h5ad")
    backed = ad.read_h5ad(tmp_path / "toy.h5ad", backed="r")
    parts = list(iter_tokens(backed, like=vocabulary))
    backed.file.close()
    assert (parts[0] != toy.obsm["X_tokens"]).nnz == 0


def test_iter_tokens_notices_a_change_of_values(toy: ad.AnnData, monkeypatch: pytest.MonkeyPatch):
    from scbin import _anndata

    tokenize(toy)
    _, vocabulary = read_tokens(toy)
    mixed = toy.copy()
    x = toy.X.toarray()
    x[30:] = np.log1p(x[30:] / x[30:].sum(axis=1, keepdims=True) * 1e4)
    mixed.X = x
    monkeypatch.setattr(_anndata, "BLOCK", 400)
    assert code_of(lambda: list(iter_tokens(mixed, like=vocabulary))).startswith("I0")
