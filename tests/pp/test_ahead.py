"""Blocks that are worked on beside each other come out as if one after the other."""

from __future__ import annotations

import threading
import time

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from scbin import Vocabulary, _anndata
from scbin._errors import ScbinInputError
from scbin.encoding import kernels
from scbin.pp import iter_tokens, tokenize
from scbin.pp._ahead import ahead, held, in_order


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("scbin-read", "scbin-block"))]


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_results_keep_the_order_of_the_items(blocks: int):
    pauses = np.random.default_rng(0).uniform(0, 0.002, 40)

    def work(k: int) -> int:
        time.sleep(pauses[k])
        return k * k

    assert list(in_order(work, iter(range(40)), blocks)) == [k * k for k in range(40)]
    assert not ours()


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_items_are_let_go_before_so_many_more_are_made(blocks: int):
    """What `held` promises, which says when the arrays of a block may be overwritten."""
    done = np.zeros(60, dtype=bool)

    def items():
        for k in range(60):
            assert done[: max(0, k - held(blocks) + 1)].all()
            yield k

    def work(k: int) -> int:
        time.sleep(0.001)
        done[k] = True
        return k

    assert list(in_order(work, ahead(items()), blocks)) == list(range(60))


@pytest.mark.parametrize("blocks", [1, 3])
def test_an_error_is_raised_in_its_place(blocks: int):
    def work(k: int) -> int:
        if k == 7:
            raise ScbinInputError("I43", "the seventh.")
        return k

    seen = []
    with pytest.raises(ScbinInputError, match="seventh"):
        seen.extend(in_order(work, ahead(iter(range(1, 30))), blocks))
    made = in_order(work, ahead(iter(range(1, 30))), blocks)
    assert [next(made) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ScbinInputError, match="seventh"):
        next(made)
    assert not ours()


def test_who_has_seen_enough_leaves_no_thread_behind():
    made = in_order(lambda k: k, ahead(iter(range(1, 100))), 3)
    assert next(made) == 1
    made.close()
    assert not ours()


@pytest.fixture
def many(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Three hundred cells in some sixty blocks; of some, the columns are not in order or zeros are stored."""
    x = np.random.default_rng(3).poisson(0.8, size=(300, 90)).astype(np.float32)
    matrix = sparse.csr_matrix(x)
    for row in (40, 41, 220):
        part = slice(matrix.indptr[row], matrix.indptr[row + 1])
        matrix.indices[part], matrix.data[part] = matrix.indices[part][::-1].copy(), matrix.data[part][::-1].copy()
    adata = ad.AnnData(sparse.csr_matrix(x))
    adata.var_names = [f"GENE{k}x" for k in range(90)]
    expected = tokenize(adata, encoding="rank", copy=True)
    adata.X = matrix
    adata.X.data[matrix.indptr[100]] = 0
    adata.write_h5ad(tmp_path / "many.h5ad")
    monkeypatch.setattr(_anndata, "BLOCK", 250)
    monkeypatch.setattr(kernels, "SMALL", 0)
    return tmp_path / "many.h5ad", expected


@pytest.mark.filterwarnings("ignore::scbin._errors.ScbinInputWarning")
@pytest.mark.parametrize("threads", [1, 2, 9, 14])
def test_threads_and_blocks_do_not_matter(many, threads: int, monkeypatch: pytest.MonkeyPatch):
    path, expected = many
    vocabulary = Vocabulary.from_json(expected.uns["scbin"]["vocabulary"])
    monkeypatch.setattr(kernels, "n_threads", lambda: threads)
    adata = ad.read_h5ad(path, backed="r")
    parts = list(iter_tokens(adata, like=vocabulary))
    assert len(parts) > 50
    tokens = sparse.vstack(parts).tocsr()
    one = np.delete(np.arange(300), 100)  # the cell that lost a value
    assert (tokens[one] != expected.obsm["X_tokens"][one]).nnz == 0
    tokenize(adata, like=vocabulary)
    assert (adata.obsm["X_tokens"] != tokens).nnz == 0
    adata.file.close()


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_what_is_found_does_not_depend_on_threads(many, threads: int, monkeypatch: pytest.MonkeyPatch):
    path, expected = many
    adata = ad.read_h5ad(path)
    adata.X.data[adata.X.indptr[[30, 120, 290]]] = [-1.5, np.nan, np.inf]
    monkeypatch.setattr(kernels, "n_threads", lambda: threads)
    with pytest.raises(ScbinInputError, match=r"I05.*2 values .*\(cell '120', .*: nan, cell '290', .*: inf\)"):
        tokenize(adata)
    with pytest.raises(ScbinInputError, match="I05"):
        list(iter_tokens(adata, like=Vocabulary.from_json(expected.uns["scbin"]["vocabulary"])))
    assert not ours()
