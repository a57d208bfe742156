"""The same tokens from every container, and nothing of the caller's changes."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scbin import _anndata
from scbin._anndata import iter_blocks, read_tokens
from scbin._errors import ScbinInputError
from scbin.pp import tokenize

sys.path.insert(0, str(Path(__file__).parent))
from conftest import CONTAINERS, in_container

ENCODINGS = ["bins", "rank", "gene_bins"]


@pytest.fixture
def plain() -> ad.AnnData:
    x = np.random.default_rng(3).poisson(0.8, size=(23, 40)).astype(np.float32)
    x[5] = 0
    obs = pd.DataFrame({"kind": np.repeat(["a", "b"], [11, 12])}, index=[f"cell{k}" for k in range(23)])
    return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"GENE{k}x" for k in range(40)]))


def fingerprint(adata: ad.AnnData) -> dict[str, str]:
    """A deep hash of everything but what tokenize documents as written."""

    def of(value) -> str:
        if hasattr(value, "indptr"):
            parts = [value.data, value.indices, value.indptr]
            text = f"{type(value)} {value.shape} " + " ".join(str(p.dtype) + of(np.asarray(p)) for p in parts)
            return hashlib.sha256(text.encode()).hexdigest()
        array = np.asarray(value)
        content = array.tobytes() if array.dtype != object else repr(array.tolist()).encode()
        return hashlib.sha256(content + str((array.dtype, array.shape, array.flags.c_contiguous)).encode()).hexdigest()

    own = {"scbin_status"}
    obs = adata.obs[[c for c in adata.obs.columns if c not in own]]
    return {
        "X": of(adata.X),
        "obs": of(obs.to_numpy()) + str(obs.dtypes.to_dict()) + of(obs.index),
        "var": of(adata.var.to_numpy()) + of(adata.var.index),
        **{f"layer {key}": of(adata.layers[key]) for key in adata.layers},
        "uns": repr({k: v for k, v in adata.uns.items() if k != "scbin"}),
        "obsm": repr([key for key in adata.obsm if key != "X_tokens"]),
    }


@pytest.mark.filterwarnings("ignore::scbin._errors.ScbinInputWarning")
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", CONTAINERS)
def test_same_tokens(plain: ad.AnnData, kind: str, encoding: str, tmp_path: Path):
    expected = tokenize(plain, encoding=encoding, phenotypes=["kind"], copy=True)
    adata = in_container(plain, kind, tmp_path)
    tokenize(adata, encoding=encoding, phenotypes=["kind"])
    out, vocabulary = read_tokens(adata)
    reference, its_vocabulary = read_tokens(expected)
    assert vocabulary == its_vocabulary
    assert (out.indptr == reference.indptr).all()
    assert (out.indices == reference.indices).all()
    assert (out.data == reference.data).all()
    assert out.dtype == reference.dtype
    assert adata.obs["scbin_status"].tolist() == expected.obs["scbin_status"].tolist()


@pytest.mark.filterwarnings("ignore::scbin._errors.ScbinInputWarning")
@pytest.mark.parametrize("kind", ["dense_c", "csr_matrix", "csc_matrix", "csr_array", "read_only"])
@pytest.mark.parametrize("fails", [False, True])
def test_caller_is_unchanged(plain: ad.AnnData, kind: str, fails: bool, tmp_path: Path):
    adata = in_container(plain, kind, tmp_path)
    adata.layers["log"] = np.log1p(plain.X)
    adata.uns["note"] = {"a": 1}
    before = fingerprint(adata)
    if fails:
        with pytest.raises(ScbinInputError):
            tokenize(adata, phenotypes=["absent"])
        assert "scbin_status" not in adata.obs
        assert "scbin" not in adata.uns
    else:
        tokenize(adata)
    assert fingerprint(adata) == before


@pytest.mark.filterwarnings("ignore::scbin._errors.ScbinInputWarning")
@pytest.mark.parametrize("kind", CONTAINERS)
def test_block_size_does_not_matter(plain: ad.AnnData, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = tokenize(plain, copy=True)
    monkeypatch.setattr(_anndata, "BLOCK", 100)
    adata = in_container(plain, kind, tmp_path)
    tokenize(adata)
    assert (adata.obsm["X_tokens"] != expected.obsm["X_tokens"]).nnz == 0
    assert adata.uns["scbin"]["vocabulary"] == expected.uns["scbin"]["vocabulary"]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_iter_blocks(plain: ad.AnnData, kind: str, tmp_path: Path):
    adata = in_container(plain, kind, tmp_path)
    parts = list(iter_blocks(adata, block_values=100))
    np.testing.assert_array_equal(np.vstack([part.toarray() for _, part in parts]), plain.X)
    assert [start for start, _ in parts] == np.cumsum([0] + [part.shape[0] for _, part in parts[:-1]]).tolist()
    assert all(part.has_canonical_format for _, part in parts)
