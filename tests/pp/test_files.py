"""Files of cells into files of tokens: the same as in memory, go on where they were, and say which file is wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scbin
from scbin._errors import ScbinInputError, ScbinInputWarning
from scbin.io import corpus
from scbin.pp import _files

JOINED = {"phenotypes": ["cell_type", "sex"], "n_genes": 25}


@pytest.fixture
def sources(toy, tmp_path):
    """The toy cells in three files, each without some genes of its own, as CSR, CSC and a dense zarr; and what they are joined."""
    parts = [toy[20 * k : 20 * k + 20, [g for g in range(40) if g % 9 != k]].copy() for k in range(3)]
    parts[1].X, parts[2].X = parts[1].X.tocsc(), parts[2].X.toarray()
    parts[0].obs["cell_type"] = (
        parts[0].obs["cell_type"].astype(str).replace("B cell", "plasma cell")
    )  # in this file alone
    names = ["a.h5ad", "b.h5ad", "c.zarr"]
    for name, part in zip(names, parts, strict=True):
        corpus.write_cells(tmp_path / name, part)
    parts[1].X, parts[2].X = parts[1].X.tocsr(), type(parts[0].X)(parts[2].X)
    return [tmp_path / name for name in names], ad.concat(parts, join="outer", merge="same")


def decoded(matrix, vocabulary):
    """Tokens as (cell, gene or position, value), whatever the order of the genes."""
    coo, first = matrix.tocoo(), vocabulary.first_gene_position
    genes = dict(enumerate(vocabulary.genes, first))
    names = [genes.get(c, c if c < first else "end") for c in coo.col.tolist()]
    return set(zip(coo.row.tolist(), names, coo.data.tolist(), strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_of_files_are_those_of_the_joined_cells(sources, tmp_path, workers):
    paths, joined = sources
    out = scbin.pp.tokenize(paths, out=tmp_path / "corpus", workers=workers, **JOINED)
    assert [path.name for path in out] == ["a.h5ad", "b.h5ad", "c.zarr"]
    tokens = scbin.open_tokens(out)
    scbin.pp.tokenize(joined, **JOINED)
    whole = scbin.Vocabulary.from_json(joined.uns["scbin"]["vocabulary"])
    assert set(tokens.vocabulary.genes) == set(whole.genes)
    assert "plasma cell" in tokens.vocabulary.phenotype("cell_type").values
    assert decoded(tokens.take(np.arange(60)), tokens.vocabulary) == decoded(joined.obsm["X_tokens"], whole)
    shard = corpus.read_cells(out[2])
    assert shard.X is None and shard.n_vars == 35 and shard.obs["scbin_status"].tolist() == ["ok"] * 20
    assert scbin.get.tokens_df(shard, cell=0) is not None


@pytest.mark.parametrize("encoding", ["bins", "rank", "binary"])
def test_the_vocabulary_of_files_is_that_of_all_their_cells(tmp_path, toy, encoding):
    """Genes, medians and labels, each exactly those of the joined cells, in blocks and files of any size."""
    toy.obs["cell_type"] = ["rare" if k == 43 else "common" if k % 2 else "other" for k in range(60)]
    for k, rows in enumerate((slice(0, 7), slice(7, 50), slice(50, 60))):
        corpus.write_cells(tmp_path / f"cells_{k}.h5ad", toy[rows].copy())
    how = {"encoding": encoding, "phenotypes": ["cell_type"], "n_genes": 20}
    out = scbin.pp.tokenize(str(tmp_path / "cells_{0..2}.h5ad"), out=tmp_path / "corpus", **how)
    scbin.pp.tokenize(toy, **how)
    assert scbin.open_tokens(out).vocabulary.sha256 == scbin.Vocabulary.from_json(toy.uns["scbin"]["vocabulary"]).sha256


def test_files_are_joined_by_the_names_of_genes(toy, tmp_path):
    """By a column of var, marked in any file, whatever else the columns are, and a gene in two columns as in memory."""
    genes, turned = toy.var_names.to_numpy().copy(), np.random.default_rng(0).permutation(40)
    genes[7] = genes[3]  # twice
    for key, rows, order in (("a", slice(0, 30), np.arange(40)), ("b", slice(30, 60), turned)):
        part = toy[rows, order].copy()
        part.var = pd.DataFrame(
            {"symbol": genes[order], "mine": order < (12 if key == "a" else 5)}, map(str, range(40))
        )
        if key == "b":
            part.var["feature_types"] = np.where(genes[order] == genes[39], "Antibody Capture", "Gene Expression")
        part.X = part.X.log1p()  # which add up only where they are taken back
        part.write_h5ad(tmp_path / f"{key}.h5ad")
    how = {"gene_key": "symbol", "mask_var": "mine"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScbinInputWarning)
        out = scbin.pp.tokenize([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], out=tmp_path / "corpus", **how)
        toy.var["symbol"], toy.var["mine"], toy.X = genes, np.arange(40) < 12, toy.X.log1p()
        scbin.pp.tokenize(toy, **how)
    tokens, whole = scbin.open_tokens(out), scbin.Vocabulary.from_json(toy.uns["scbin"]["vocabulary"])
    assert set(tokens.vocabulary.genes) == set(whole.genes) and len(whole.genes) == 11
    assert decoded(tokens.take(np.arange(60)), tokens.vocabulary) == decoded(toy.obsm["X_tokens"], whole)


def test_a_file_without_cells_is_one_of_the_corpus(toy, tmp_path):
    for name, part in (("a", toy[:0]), ("b", toy)):
        part.copy().write_h5ad(tmp_path / f"{name}.h5ad")
    assert scbin.open_tokens(scbin.pp.tokenize(tmp_path, out=tmp_path / "corpus")).n_cells == 60


def test_files_that_were_read_in_another_way_are_not_taken_for_done(toy, tmp_path):
    toy.obs["turned"] = toy.obs["sex"].astype(str).to_numpy()[::-1]
    toy.write_h5ad(tmp_path / "a.h5ad")
    vocabulary = scbin.open_tokens(
        scbin.pp.tokenize(tmp_path / "a.h5ad", out=tmp_path / "own", phenotypes="sex")
    ).vocabulary
    how = {"out": tmp_path / "again", "like": vocabulary}
    for _ in range(2):
        scbin.pp.tokenize(tmp_path / "a.h5ad", **how, phenotypes="sex")
    with pytest.raises(ScbinInputError, match="A04.*read in another way"):
        scbin.pp.tokenize(tmp_path / "a.h5ad", **how, phenotypes={"sex": "turned"})


def test_an_interrupted_call_goes_on(sources, tmp_path, monkeypatch):
    paths, _ = sources
    write, n = corpus.write_shard, []

    def dies(path, *rest):
        n.append(path)
        if len(n) == 2:
            raise KeyboardInterrupt
        write(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(_files, "write_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            scbin.pp.tokenize(paths, out=tmp_path / "corpus", **JOINED)
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == ["a.h5ad"]  # whole, and no rest of the second
    before = corpus.stamp(tmp_path / "corpus" / "a.h5ad")
    out = scbin.pp.tokenize(paths, out=tmp_path / "corpus", **JOINED)
    assert corpus.stamp(out[0]) == before and scbin.open_tokens(out).n_cells == 60
    with pytest.raises(ScbinInputError, match=r"A04.*another vocabulary"):
        scbin.pp.tokenize(paths, out=tmp_path / "corpus", **{**JOINED, "n_genes": 9})


def test_one_bad_file_is_named_and_the_others_are_done(sources, tmp_path, toy):
    paths, _ = sources
    like = scbin.open_tokens(scbin.pp.tokenize(paths[0], out=tmp_path / "first.h5ad", n_genes=20)).vocabulary
    toy.X.data[5] = np.nan
    corpus.write_cells(tmp_path / "nan.h5ad", toy)
    (tmp_path / "short.h5ad").write_bytes(paths[1].read_bytes()[:3000])
    with pytest.raises(ScbinInputError, match=r"I05.*nan.h5ad.*short.h5ad"):
        scbin.pp.tokenize([tmp_path / "nan.h5ad", tmp_path / "short.h5ad", *paths], out=tmp_path / "corpus", like=like)
    assert scbin.open_tokens(tmp_path / "corpus").n_cells == 60
    with pytest.raises(ScbinInputError, match=r"F01.*short.h5ad"):
        scbin.pp.tokenize([*paths, tmp_path / "short.h5ad"], out=tmp_path / "all")


def test_another_species_is_named(sources, tmp_path, toy):
    paths, _ = sources
    toy.var_names = [f"Mouse{name.lower()}" for name in toy.var_names]
    corpus.write_cells(tmp_path / "mouse.h5ad", toy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scbin.pp.tokenize([*paths, tmp_path / "mouse.h5ad"], out=tmp_path / "mixed")
    assert any(str(w.message).startswith("[I32] 'mouse.h5ad': only 5") for w in caught)
    like = scbin.open_tokens(scbin.pp.tokenize(paths, out=tmp_path / "one", n_genes=20)).vocabulary
    with pytest.raises(ScbinInputError, match=r"mouse.h5ad"):
        scbin.pp.tokenize([tmp_path / "mouse.h5ad", *paths], out=tmp_path / "corpus", like=like)
    assert scbin.open_tokens(tmp_path / "corpus").n_cells == 60  # the rest is done


def test_values_that_cannot_be_read_are_named_with_their_file(sources, tmp_path, toy):
    toy.X.data[5] = -3
    corpus.write_cells(tmp_path / "negative.h5ad", toy)
    with pytest.raises(ScbinInputError, match=r"I04.*cell '0 of negative.h5ad'"):
        scbin.pp.tokenize([*sources[0], tmp_path / "negative.h5ad"], out=tmp_path / "corpus")


def test_a_file_that_changes_while_it_is_read_is_refused(sources, tmp_path, monkeypatch):
    paths, _ = sources
    like = scbin.open_tokens(scbin.pp.tokenize(paths, out=tmp_path / "first", n_genes=20)).vocabulary
    write = corpus.write_shard

    def touched(path, *rest):
        write(path, *rest)
        (paths[1]).write_bytes(paths[1].read_bytes() + b" ")

    with monkeypatch.context() as patched:
        patched.setattr(_files, "write_shard", touched)
        with pytest.raises(ScbinInputError, match=r"F01.*b.h5ad: the file was changed while it was read"):
            scbin.pp.tokenize(paths[1], out=tmp_path / "corpus", like=like)
    assert not list((tmp_path / "corpus").iterdir())

    blocks = _files.iter_blocks

    def slow(adata, layer):
        yield from blocks(adata, layer)
        (paths[0]).write_bytes(paths[0].read_bytes() + b" ")

    monkeypatch.setattr(_files, "iter_blocks", slow)  # between two passes for the vocabulary
    with pytest.raises(ScbinInputError, match=r"F01.*a.h5ad: the file was changed"):
        scbin.pp.tokenize(paths, out=tmp_path / "corpus", n_genes=20)


def test_where_nothing_may_be_written_the_file_is_named(sources, tmp_path, monkeypatch):
    paths, _ = sources
    out = scbin.pp.tokenize(paths, out=tmp_path / "corpus", **JOINED)
    quiet = {"progress": False, "device": "cpu"}
    model = scbin.tl.pretrain(out, preset="tiny", max_steps=1, **quiet)

    def refuses(self, *_, **__):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(type(tmp_path), "mkdir", refuses)
    with pytest.raises(ScbinInputError, match=r"F02.*scbin.a.h5ad could not be written.*Read-only"):
        scbin.tl.embed(out, model, **quiet)
    with pytest.raises(ScbinInputError, match=r"F02.*a.h5ad could not be written.*Read-only"):
        scbin.pp.tokenize(paths, out=tmp_path / "elsewhere", **JOINED)


def test_empty_cells_are_told_once(tmp_path, toy):
    toy.X.data[toy.X.indptr[7] : toy.X.indptr[8]] = 0
    for k in range(2):
        corpus.write_cells(tmp_path / f"s{k}.h5ad", toy)
    with pytest.warns(ScbinInputWarning, match="I19.*2 cells have no counts") as caught:
        scbin.pp.tokenize(str(tmp_path / "s{0..1}.h5ad"), out=tmp_path / "corpus")
    assert sum(each.category is ScbinInputWarning for each in caught) == 1


def test_where_tokens_go(sources, tmp_path, toy):
    paths, _ = sources
    out = scbin.pp.tokenize(paths[:2], out=tmp_path / "z" / "{}.zarr", n_genes=20)
    assert [str(path.relative_to(tmp_path)) for path in out] == ["z/a.zarr", "z/b.zarr"]
    assert (scbin.open_tokens(out).take(np.arange(40)) != scbin.open_tokens(scbin.pp.tokenize(paths[:2], out=tmp_path / "h", n_genes=20)).take(np.arange(40))).nnz == 0  # fmt: skip
    for wrong in ({"out": tmp_path}, {"out": None}, {"out": tmp_path / "x.h5ad"}):
        with pytest.raises(ScbinInputError, match="A02"):
            scbin.pp.tokenize(paths, **wrong)
    with pytest.raises(ScbinInputError, match="A03"):
        scbin.pp.tokenize(toy, out=tmp_path / "x")
    with pytest.raises(ScbinInputError, match="F02"):
        (tmp_path / "file").touch()
        scbin.pp.tokenize(paths, out=tmp_path / "file" / "corpus")


@pytest.mark.filterwarnings("ignore")
def test_dask_workers_make_the_same_tokens(sources, tmp_path):
    distributed = pytest.importorskip("distributed")
    paths, _ = sources
    here = scbin.open_tokens(scbin.pp.tokenize(paths, out=tmp_path / "here", **JOINED))
    with distributed.LocalCluster(
        n_workers=2, processes=False, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        with distributed.Client(cluster) as client:
            there = scbin.open_tokens(scbin.pp.tokenize(paths, out=tmp_path / "there", client=client, **JOINED))
    assert (here.take(np.arange(60)) != there.take(np.arange(60))).nnz == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dask_worker_that_is_killed_changes_nothing(toy, tmp_path):
    """Two workers in processes of their own; one is killed as soon as the first file is there."""
    distributed = pytest.importorskip("distributed")
    for k in range(30):
        corpus.write_cells(tmp_path / f"cells_{k}.h5ad", toy[2 * k : 2 * k + 2].copy())
    paths = str(tmp_path / "cells_{0..29}.h5ad")
    here = scbin.open_tokens(scbin.pp.tokenize(paths, out=tmp_path / "here", **JOINED))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            pids, killed = list(client.run(os.getpid).values()), []

            def kill():
                while not list((tmp_path / "there").glob("*.h5ad")):
                    time.sleep(0.002)
                os.kill(pids[0], signal.SIGKILL)
                killed.append(len(list((tmp_path / "there").glob("*.h5ad"))))

            killer = threading.Thread(target=kill)
            killer.start()
            there = scbin.open_tokens(scbin.pp.tokenize(paths, out=tmp_path / "there", client=client, **JOINED))
            killer.join()
    assert killed[0] < 30 and not list((tmp_path / "there").glob(".tmp-*"))
    assert (here.take(np.arange(60)) != there.take(np.arange(60))).nnz == 0


def test_verbs_take_paths_and_write_beside(sources, tmp_path):
    paths, joined = sources
    out = scbin.pp.tokenize(paths, out=tmp_path / "corpus", **JOINED)
    quiet = {"progress": False, "device": "cpu"}
    model = scbin.tl.pretrain(tmp_path / "corpus", preset="tiny", max_steps=2, **quiet)
    written = scbin.tl.embed(str(tmp_path / "corpus" / "*"), model, **quiet)
    assert written == [path.parent / "scbin" / path.name for path in out]
    assert scbin.tl.predict([str(path) for path in out], model, **quiet) == written
    found = ad.concat([corpus.read_cells(path) for path in written])
    whole = ad.concat([corpus.read_cells(path) for path in out], uns_merge="same")
    scbin.tl.embed(whole, model, **quiet)
    assert found.obs_names.equals(joined.obs_names)
    np.testing.assert_allclose(found.obsm["X_scbin"], whole.obsm["X_scbin"], atol=1e-5)
    scbin.tl.predict(whole, model, **quiet)
    assert found.obs["scbin_cell_type"].tolist() == whole.obs["scbin_cell_type"].tolist()
    tuned = scbin.tl.finetune(scbin.open_tokens(out), "new", target="sex", max_steps=0, **quiet)
    assert tuned.network.labels.targets[0].name == "sex"
    with pytest.warns(ScbinInputWarning, match="L04"):
        tables = [scbin.tl.evaluate(source, tuned, baselines=False, **quiet) for source in (out, whole)]
    assert tables[0].equals(tables[1]) and len(tables[0]) == 1
    genes = list(model.vocabulary.genes[:2])
    moved = scbin.tl.perturb(scbin.open_tokens(out), model, genes=genes, **quiet)
    scbin.tl.perturb(whole, model, genes=genes, **quiet)
    assert moved.n_obs == 60 and scbin.get.perturb_df(moved).equals(scbin.get.perturb_df(whole))
    (written[0]).unlink()
    corpus.write_cells(written[0], found[20:40].copy())
    with pytest.raises(ScbinInputError, match="A04.*other cells"):
        partial(scbin.tl.embed, **quiet)(out, model)
