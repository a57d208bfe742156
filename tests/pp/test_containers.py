"""The same tokens from every container, and nothing of the caller's changes."""

from __future__ import annotations

import hashlib
import sys
import threading
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scbin import _adata
from scbin._adata import iter_blocks, read_tokens
from scbin._errors import ScbinInputError
from scbin.pp import tokenize
from scbin.pp._plan import Request, prepare
from scbin.tokens import kernels

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

    own = {"scbin_status", "scbin_vocabulary"}
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
def test_i12_i14_i15_i56_same_tokens_in_blocks_of_any_size(
    plain, kind: str, encoding: str, tmp_path: Path, monkeypatch
):
    expected = tokenize(plain, encoding=encoding, phenotypes=["kind"], copy=True)
    monkeypatch.setattr(_adata, "BLOCK", 100)
    adata = in_container(plain, kind, tmp_path)
    tokenize(adata, encoding=encoding, phenotypes=["kind"])
    out, reference = read_tokens(adata).matrix, read_tokens(expected).matrix
    assert read_tokens(adata).vocabulary == read_tokens(expected).vocabulary
    assert (out != reference).nnz == 0
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


@pytest.mark.parametrize("kind", CONTAINERS)
def test_iter_blocks(plain: ad.AnnData, kind: str, tmp_path: Path):
    adata = in_container(plain, kind, tmp_path)
    parts = list(iter_blocks(adata, block_values=100))
    np.testing.assert_array_equal(np.vstack([part.csr().toarray() for part in parts]), plain.X)
    assert [part.start for part in parts] == np.cumsum([0] + [part.n_rows for part in parts[:-1]]).tolist()
    assert all(part.csr().has_canonical_format for part in parts)


@pytest.mark.filterwarnings("ignore::scbin._errors.ScbinInputWarning")
@pytest.mark.parametrize("threads", [1, 2, 9])
def test_threads_and_blocks_do_not_matter(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three hundred cells in some sixty blocks of a file; of some, the columns are not in order or zeros are stored."""
    matrix = sparse.csr_matrix(np.random.default_rng(3).poisson(0.8, size=(300, 90)).astype(np.float32))
    adata = ad.AnnData(matrix.copy(), var=pd.DataFrame(index=[f"GENE{k}x" for k in range(90)]))
    expected = tokenize(adata, encoding="rank", copy=True)
    vocabulary = read_tokens(expected).vocabulary
    for row in (40, 41, 220):
        part = slice(matrix.indptr[row], matrix.indptr[row + 1])
        matrix.indices[part], matrix.data[part] = matrix.indices[part][::-1].copy(), matrix.data[part][::-1].copy()
    adata.X = matrix
    adata.write_h5ad(tmp_path / "many.h5ad")
    monkeypatch.setattr(_adata, "BLOCK", 250)
    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(kernels, "n_threads", lambda: threads)
    backed = ad.read_h5ad(tmp_path / "many.h5ad", backed="r")
    plan = prepare(backed, Request(like=vocabulary))
    parts = list(plan.encode())
    assert len(parts) > 50
    assert (sparse.vstack(parts) != expected.obsm["X_tokens"]).nnz == 0
    some = plan.encode()
    next(some)
    some.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scbin-read")]
    tokenize(backed, encoding="rank")
    assert read_tokens(backed).vocabulary == vocabulary
    backed.file.close()
    adata.X.data[adata.X.indptr[[30, 120, 290]]] = [-1.5, np.nan, np.inf]
    with pytest.raises(ScbinInputError, match=r"I05.*2 values .*cell '120', .*: nan"):
        tokenize(adata)
