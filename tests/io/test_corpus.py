"""Tokens in files give the rows of tokens in memory, in an order that is a function of seed and epoch."""

from __future__ import annotations

import shutil
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.stats import entropy

import scbin
from scbin._errors import ScbinInputError
from scbin.io import corpus
from scbin.tokens.tokens import KeptRows, Tokens


@pytest.fixture
def shards(toy, tmp_path):
    """The toy cells, tokenized, in three files of 20 cells: two h5ad and a zarr."""
    scbin.pp.tokenize(toy, phenotypes=["cell_type"])
    paths = [tmp_path / "shard_0.h5ad", tmp_path / "shard_1.h5ad", tmp_path / "shard_2.zarr"]
    for k, path in enumerate(paths):
        corpus.write_cells(path, toy[20 * k : 20 * k + 20].copy())
    return toy, paths


def test_rows_names_and_columns_are_those_in_memory(shards, monkeypatch):
    monkeypatch.setattr(corpus, "ROWS", 8)  # blocks end within files
    adata, paths = shards
    tokens = scbin.open_tokens(paths)
    assert isinstance(tokens, Tokens) and tokens.n_cells == 60
    assert np.array_equal(tokens.lengths, np.diff(adata.obsm["X_tokens"].indptr))
    for rows in (np.arange(60), np.array([59, 0, 21, 21, 7]), np.array([], dtype=int), np.arange(60) % 7 == 0):
        found = tokens.take(rows)
        assert (found != adata.obsm["X_tokens"][rows]).nnz == 0 and found.dtype == tokens.vocabulary.dtype
    assert tokens.names.equals(adata.obs_names)
    assert tokens.obs("cell_type").tolist() == adata.obs["cell_type"].tolist()
    with pytest.raises(KeyError):
        tokens.obs("nothing")
    held = KeptRows(tokens, np.array([50, 3]))
    assert (held.take(np.array([50, 3])) != adata.obsm["X_tokens"][[50, 3]]).nnz == 0 and held.names.equals(
        tokens.names
    )


def test_rows_of_more_blocks_than_are_held(shards, monkeypatch):
    """In any order, and nothing of them stays in memory."""
    for name, value in {"ROWS": 4, "WINDOW": 2, "SPARE": 1, "AT_ONCE": 2}.items():
        monkeypatch.setattr(corpus, name, value)
    adata, paths = shards
    tokens = scbin.open_tokens(paths)
    for rows in (np.arange(60), np.random.default_rng(0).integers(0, 60, 90)):
        assert (tokens.take(rows) != adata.obsm["X_tokens"][rows]).nnz == 0 and not tokens._blocks


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_of_both_versions_and_in_shards(shards, tmp_path, zarr_format):
    import zarr
    from anndata.io import write_elem

    adata, _ = shards
    group = zarr.open_group(tmp_path / "one.zarr", mode="w", zarr_format=zarr_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what will be anndata's default
        write_elem(group, "/", adata)
    how = {"chunks": (64,), **({"shards": (640,)} if zarr_format == 3 else {})}
    write_elem(group["obsm"], "X_tokens", adata.obsm["X_tokens"], dataset_kwargs=how)
    assert (scbin.open_tokens(tmp_path / "one.zarr").take(np.arange(60)) != adata.obsm["X_tokens"]).nnz == 0


def test_paths_are_written_out(tmp_path):
    for name in ("s_10.h5ad", "s_2.h5ad", "s_1.h5ad", "notes.txt"):
        (tmp_path / name).touch()
    expected = ["s_1.h5ad", "s_2.h5ad", "s_10.h5ad"]
    for asked in (tmp_path, str(tmp_path / "*.h5ad"), [tmp_path / name for name in expected]):
        assert [path.name for path in corpus.expand(asked)] == expected
    assert [path.name for path in corpus.expand("s_{08..11}.h5ad")] == [f"s_{k:02d}.h5ad" for k in range(8, 12)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScbinInputError, match="F01"):
        corpus.expand(tmp_path / "empty")
    with pytest.raises(ScbinInputError, match=r"F01.*zarr is not there"):
        scbin.open_tokens(str(tmp_path / "*.zarr"))


def test_blocks_are_read_once_and_few_are_held(shards, monkeypatch):
    monkeypatch.setattr(corpus, "ROWS", 4)
    monkeypatch.setattr(corpus, "WINDOW", 3)
    tokens = scbin.open_tokens(shards[1])
    reads: list[int] = []
    read = tokens._read
    monkeypatch.setattr(tokens, "_read", lambda first, last: (reads.extend(range(first, last + 1)), read(first, last)))
    order = tokens.epoch_order(np.arange(60), 0, 0)
    for start in range(0, 60, 4):
        tokens.take(order[start : start + 4])
    assert set(reads) == set(range(15)) and len(reads) <= 15 + 5


def test_an_epoch_is_a_function_of_seed_and_epoch_and_mixes_the_files(tmp_path, toy):
    rows = (np.arange(24_000) // 2_400) * 6 + np.arange(24_000) % 6  # plate by plate
    obs = pd.DataFrame({"plate": [f"p{row // 6}" for row in rows]}, index=np.arange(24_000).astype(str))
    toy = ad.AnnData(toy.X[rows], obs, toy.var)
    scbin.pp.tokenize(toy, n_genes=5)
    corpus.write_cells(tmp_path / "cells.h5ad", toy)
    tokens, cells = scbin.open_tokens(tmp_path / "cells.h5ad"), np.arange(0, 24_000)
    order = tokens.epoch_order(cells, 3, 1)
    assert np.array_equal(np.sort(order), cells)
    assert np.array_equal(order, tokens.epoch_order(cells[::-1], 3, 1))
    assert not np.array_equal(order, tokens.epoch_order(cells, 3, 2))

    def mixed(rows):
        codes = toy.obs["plate"].astype("category").cat.codes.to_numpy()[rows]
        return np.mean([entropy(np.bincount(codes[k : k + 128])) for k in range(0, 23_000, 128)])

    shuffled = np.random.default_rng(0).permutation(24_000)
    assert mixed(order) > 0.99 * mixed(shuffled) and mixed(cells) < 0.2 * mixed(shuffled)


def error_of(paths, code, *words):
    with pytest.raises(ScbinInputError, match=code) as caught:
        tokens = scbin.open_tokens(paths)
        tokens.take(np.arange(tokens.n_cells))
    for word in words:
        assert word in str(caught.value)


def test_faults_name_the_file(shards, tmp_path, toy):
    _, paths = shards
    assert scbin.open_tokens(paths).n_cells == 60
    error_of([*paths, tmp_path / "missing.h5ad"], "F01", "missing.h5ad")
    (tmp_path / "text.h5ad").write_text("these are no cells")
    error_of([*paths, tmp_path / "text.h5ad"], "F01", "text.h5ad")
    whole = paths[1].read_bytes()
    (tmp_path / "short.h5ad").write_bytes(whole[: len(whole) // 2])
    error_of([paths[0], tmp_path / "short.h5ad"], "F01", "short.h5ad")
    shutil.copytree(paths[2], tmp_path / "hole.zarr")
    stored = [path for path in (tmp_path / "hole.zarr/obsm/X_tokens/data").rglob("*") if path.name != ".zarray"]
    next(path for path in stored if path.is_file() and path.name[0] != ".").write_bytes(b"broken")
    error_of([paths[0], tmp_path / "hole.zarr"], "F01|V02", "hole.zarr")
    corpus.write_cells(tmp_path / "raw.h5ad", ad.AnnData(toy.X, toy.obs, toy.var))
    error_of([paths[0], tmp_path / "raw.h5ad"], "V01", "raw.h5ad")
    scbin.pp.tokenize(toy, n_genes=10)
    corpus.write_cells(tmp_path / "other.h5ad", toy)
    error_of([paths[0], tmp_path / "other.h5ad"], "V03", "other.h5ad")


def test_damaged_rows_and_changed_files_are_noticed(shards, tmp_path):
    _, paths = shards
    for part, value in (("indices", 9_999), ("data", 255)):
        shutil.copy(paths[0], tmp_path / f"{part}.h5ad")
        with h5py.File(tmp_path / f"{part}.h5ad", "r+") as file:
            file["obsm/X_tokens"][part][3] = value
        error_of(tmp_path / f"{part}.h5ad", "V02", f"{part}.h5ad")
    shutil.copy(paths[0], tmp_path / "offsets.h5ad")
    with h5py.File(tmp_path / "offsets.h5ad", "r+") as file:
        file["obsm/X_tokens/indptr"][2] = 7_000
    error_of(tmp_path / "offsets.h5ad", "V02", "row offsets")
    tokens = scbin.open_tokens(paths[1])
    shutil.copy(paths[0], paths[1])
    with pytest.raises(ScbinInputError, match="F01.*changed"):
        tokens.take(np.arange(3))


def test_what_cannot_be_written_leaves_nothing(tmp_path, toy, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ScbinInputError, match="F02"):
        corpus.write_cells(tmp_path / "file" / "cells.h5ad", toy)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ad.AnnData, "write_h5ad", full)
    with pytest.raises(ScbinInputError, match="F02.*No space left"):
        corpus.write_cells(tmp_path / "cells.h5ad", toy)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
