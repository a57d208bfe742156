"""`tl.pretrain` on an AnnData: what it writes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import scbin
from scbin._errors import ScbinInputError
from scbin.nn.presets import PRESETS
from scbin.tokens.vocabulary import Vocabulary
from scbin.train.randomness import held_out_cells
from scbin.train.settings import Loss, Masking, Training

WRITTEN = ("pretrain", "pretrain_history", "model_id", "model_path")


@pytest.fixture
def tokenized(cells):
    scbin.pp.tokenize(cells, phenotypes=["cell_type"])
    return cells


@pytest.mark.parametrize("key", [None, "X_mine"])
def test_its_slots_are_written_and_no_others(tokenized, untouched, quick, key):
    check = untouched(tokenized)
    model = scbin.tl.pretrain(tokenized, **quick, key_added=key)
    check.check(obsm=[key or "X_scbin"], uns=[*WRITTEN, "written"] if key else WRITTEN)
    embedding = tokenized.obsm[key or "X_scbin"]
    assert embedding.shape == (60, model.network.vector.size) and embedding.dtype == np.float32
    assert np.isfinite(embedding).all()
    record = tokenized.uns["scbin"]
    assert json.loads(record["pretrain"]) == model.training and model.training["steps"] == 2
    assert record["pretrain_history"].equals(model.history) and len(model.history) == 3
    assert record["model_id"] == model.fingerprint and record["model_path"] == ""
    assert {"loss", "loss_cell_vector", "tokens_per_second", "validation", "learning_rate"} <= set(model.history)
    scbin.tl.pretrain(tokenized, **quick, key_added=key)  # its own slot may be written again


def test_rows_stay_with_their_cells(trained):
    adata, model = trained
    empty = adata.obs["scbin_status"] == "empty"
    assert empty.sum() == 1 and np.array_equal(np.isnan(adata.obsm["X_scbin"]).all(axis=1), empty)
    order = np.random.default_rng(0).permutation(60)
    again = adata[order].copy()
    scbin.tl.embed(again, model, device="cpu", progress=False)
    np.testing.assert_allclose(again.obsm["X_scbin"], adata.obsm["X_scbin"][order], atol=1e-5)


def test_the_same_seed_gives_the_same_model(tokenized, quick):
    first = scbin.tl.pretrain(tokenized, **quick, seed=4)
    embedding = tokenized.obsm["X_scbin"]
    second = scbin.tl.pretrain(tokenized.copy(), **quick, seed=np.int64(4))
    assert first.fingerprint == second.fingerprint
    scbin.tl.embed(tokenized, second, device="cpu", progress=False)
    assert np.array_equal(tokenized.obsm["X_scbin"], embedding)
    assert scbin.tl.pretrain(tokenized, **quick, seed=5).fingerprint != first.fingerprint


def test_nothing_global_is_changed(tokenized, quick):
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()
    settings = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    scbin.tl.pretrain(tokenized, **quick)
    scbin.tl.embed(tokenized, device="cpu", progress=False)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    state = np.random.get_state()
    assert np.array_equal(state[1], before[2][1]) and state[2:] == before[2][2:]
    assert settings == (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())


def test_views_and_backed_files(tokenized, untouched, quick, tmp_path):
    tokenized.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    model = scbin.tl.pretrain(backed, **quick)
    assert backed.isbacked and backed.obsm["X_scbin"].shape[0] == 60
    backed.file.close()
    parent = untouched(tokenized)
    view = tokenized[::2]
    scbin.tl.pretrain(view, **quick)  # warnings are errors: none about the view
    assert not view.is_view and view.obsm["X_scbin"].shape[0] == 30
    parent.check()
    assert model.fingerprint == scbin.tl.pretrain(tokenized, **quick).fingerprint


def test_a_directory_holds_the_model_and_serves_the_next_session(tokenized, quick, tmp_path, monkeypatch):
    model = scbin.tl.pretrain(tokenized, **quick, save_dir=tmp_path / "run")
    assert scbin.Model.load(tmp_path / "run" / "model").fingerprint == model.fingerprint
    assert tokenized.uns["scbin"]["model_path"] == str((tmp_path / "run" / "model").resolve())
    embedding = tokenized.obsm.pop("X_scbin")
    monkeypatch.setattr("scbin.model._session", {})
    tokenized.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    scbin.tl.embed(back, device="cpu", progress=False)
    assert np.array_equal(back.obsm["X_scbin"], embedding)
    # started again with the same directory, the run finds itself finished
    again = scbin.tl.pretrain(tokenized, **quick, save_dir=tmp_path / "run")
    assert again.fingerprint == model.fingerprint and again.history.equals(model.history)


def test_held_out_cells_do_not_influence_what_is_learned(tokenized, quick):
    held_out = held_out_cells(60, 0.2, 0)
    assert 3 < held_out.sum() < 30
    how = {**quick, "training": Training(cells_per_step=16, held_out=0.2, patience=None)}
    model = scbin.tl.pretrain(tokenized, **how)
    other = tokenized.copy()
    other.X = None  # its cells are not those of these tokens
    tokens = other.obsm["X_tokens"].tolil()
    tokens[np.flatnonzero(held_out)] = tokens[np.flatnonzero(held_out)[0]]
    other.obsm["X_tokens"] = csr_matrix(tokens)
    again = scbin.tl.pretrain(other, **how)
    assert again.fingerprint == model.fingerprint
    assert again.history["validation"].iloc[-1] != model.history["validation"].iloc[-1]


def test_one_line_says_whether_training_helped(tokenized, quick, capsys):
    training = Training(cells_per_step=16, held_out=0.2, learning_rate=3e-3)
    model = scbin.tl.pretrain(tokenized, **{**quick, "training": training, "max_steps": 20, "progress": True})
    printed, start, end = capsys.readouterr().out, *(model.training[key] for key in ("start", "end"))
    validation = model.history["validation"].dropna()
    assert (start, end) == (validation.iloc[0], validation.min()) and end < start
    assert f"{-start:.4f} at the start, {-end:.4f} after" in printed
    still = replace(training, learning_rate=0.0)
    model = scbin.tl.pretrain(tokenized, **{**quick, "training": still, "progress": True})
    assert model.training["start"] == model.training["end"]
    assert "did not help" in capsys.readouterr().out
    none = replace(training, held_out=0.0)
    model = scbin.tl.pretrain(tokenized, **{**quick, "training": none, "progress": True})
    assert model.training["start"] is None and "no cells were held out" in capsys.readouterr().out


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        *(("A02", {"preset": preset}) for preset in ("huge", None)),
        *(("A02", {name: -1}) for name in ("max_steps",)),
        ("A02", {"backbone": "cnn"}),
        ("A02", {"device": "quantum"}),
        *(("A01", {name: 3}) for name in ("backbone", "masking", "loss", "task", "training", "device", "save_dir")),
        *(("A01", {name: 3}) for name in ("progress", "key_added", "tokens_key")),
        *(("A01", {name: value}) for name, value in (("max_steps", 2.0), ("seed", "x"), ("training", {"epochs": 3}))),
        ("A06", {"batch_key": "plate"}),
        *(("A03", {"batch_key": key}) for key in ("one", "lonely")),
        ("A03", {"loss": Loss(weights={"genes": 0, "cell_type": 0, "cell_vector": 0})}),
        ("V01", {"tokens_key": "X_pca2"}),
        *(("A04", {"key_added": key}) for key in ("X_pca", "X_tokens")),
        pytest.param("A02", {"device": "cuda"}, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="here")),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_nothing_is_written(tokenized, untouched, quick, code, arguments):
    tokenized.obs["one"] = "a"
    tokenized.obs["lonely"] = np.where(np.arange(60) == 3, "b", "a")
    check = untouched(tokenized)
    with pytest.raises(ScbinInputError) as caught:
        scbin.tl.pretrain(tokenized, **{**quick, **arguments})
    assert caught.value.code == code
    check.check()


def spoiled(adata, how):
    if how == "untokenized":
        del adata.obsm["X_tokens"], adata.uns["scbin"]
    elif how == "widened":
        adata.obsm["X_tokens"] = adata.obsm["X_tokens"][:, :-1]
    elif how == "foreign ids":
        adata.obsm["X_tokens"].data[3] = 60_000
    elif how == "other vocabulary":
        adata.uns["scbin"] = {"vocabulary": Vocabulary.build("rank", ["A", "B"]).to_json()}
    elif how == "concat":
        return ad.concat([adata[:30], adata[30:]])
    elif how == "no genes":
        return adata[:, :0].copy()
    return adata[: {"no cells": 0, "one cell": 1}.get(how, 60)].copy()


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("V01", "untokenized"),
        *(("V02", how) for how in ("concat", "widened", "foreign ids")),
        ("V0", "other vocabulary"),
        *(("I47", how) for how in ("no cells", "one cell")),
        ("I48", "no genes"),
    ],
)
def test_cells_that_cannot_be_trained_on(tokenized, untouched, quick, code, how):
    adata = spoiled(tokenized, how)
    check = untouched(adata)
    with pytest.raises(ScbinInputError) as caught:
        scbin.tl.pretrain(adata, **quick)
    assert caught.value.code.startswith(code)
    check.check()


@pytest.mark.parametrize("thing", [None, [1], np.zeros((3, 3))], ids=["None", "list", "array"])
def test_what_is_no_anndata(quick, thing):
    with pytest.raises(TypeError, match="I55"):
        scbin.tl.pretrain(thing, **quick)


def test_a_place_for_the_model_that_is_taken_is_refused_before_training(toy, quick, tmp_path):
    scbin.pp.tokenize(toy)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(scbin.ScbinError, match="A04"):
        scbin.tl.pretrain(toy, **quick, save_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# ---- cells and networks of all kinds -----------------------------------------------------------------------------------


def test_few_cells_and_cells_that_are_all_alike(tokenized, quick):
    few = tokenized[:2].copy()
    scbin.tl.pretrain(few, **quick)
    alike = tokenized.copy()
    alike.X = np.tile(tokenized.X[0].toarray(), (60, 1))
    scbin.pp.tokenize(alike)
    scbin.tl.pretrain(alike, **quick)
    for adata in (few, alike):
        assert np.isfinite(adata.obsm["X_scbin"]).all() and len(adata.obsm["X_scbin"]) == adata.n_obs


def test_cells_of_genes_that_never_varied_have_a_vector(toy, quick):
    x = toy.X.toarray()
    x[:, :3] = 0
    new = toy[:2].copy()
    new.X = np.eye(40)[:2].astype(np.float32) * 4  # nothing but such genes
    toy.X = x
    scbin.pp.tokenize(toy)
    model = scbin.tl.pretrain(toy, **quick)
    scbin.pp.tokenize(new, like=model)
    scbin.tl.embed(new, model, progress=False)
    filled = (new.obs["scbin_status"] == "ok").to_numpy()
    assert np.isfinite(new.obsm["X_scbin"][filled]).all()


@pytest.mark.parametrize("backbone", ["bert", "mlp"])
@pytest.mark.parametrize("encoding", ["bins", "binary", "rank", "gene_bins"])
def test_every_encoding_with_every_backbone(toy, quick, encoding, backbone):
    """With hidden genes, which are predicted from the last layer; and with vectors of genes."""
    scbin.pp.tokenize(toy, encoding=encoding, phenotypes=["cell_type"])
    loss, masking = Loss(weights={"genes": 0.3}), Masking(gene_mask_prob=0.3)
    model = scbin.tl.pretrain(toy, **quick, backbone=backbone, loss=loss, masking=masking)
    about = model.training
    assert (model.vocabulary.encoding, about["backbone"]) == (encoding, backbone)
    assert (about["masking"]["gene_mask_prob"], about["loss"]["weights"]) == (0.3, {"genes": 0.3})
    assert {"loss_genes", "loss_cell_type", "loss_cell_vector"} <= set(model.history)
    assert np.isfinite(toy.obsm["X_scbin"]).all()
    scbin.tl.embed_genes(toy, model, device="cpu", progress=False)
    expressed = toy.var["scbin_n_cells"].to_numpy() > 0
    genes = toy.varm["scbin_genes"]
    assert genes.shape == (40, 32) and np.array_equal(np.isfinite(genes).all(axis=1), expressed)
    assert genes[expressed].std(axis=0).min() > 0
    scbin.tl.embed(toy, model, layer=-1, key_added="X_last", device="cpu", progress=False)
    assert toy.obsm["X_last"].shape == (60, 32)


def test_tokens_under_another_key(tokenized, quick):
    expected = scbin.tl.pretrain(tokenized.copy(), **quick)
    scbin.pp.tokenize(tokenized, phenotypes=["cell_type"], key_added="X_b")
    scbin.pp.tokenize(tokenized, encoding="rank")  # has a vocabulary of its own
    model = scbin.tl.pretrain(tokenized, **quick, tokens_key="X_b")
    assert model.fingerprint == expected.fingerprint and model.vocabulary.encoding == "bins"
    first = tokenized.obsm["X_scbin"].copy()
    scbin.tl.embed(tokenized, model, tokens_key="X_b", device="cpu", progress=False)
    np.testing.assert_array_equal(tokenized.obsm["X_scbin"], first)
    with pytest.raises(ScbinInputError, match="V03"):
        scbin.tl.embed(tokenized, model)
    with pytest.raises(ScbinInputError, match="A04"):
        scbin.tl.embed(tokenized, model, tokens_key="X_b", key_added="X_b")


def test_the_preset_fills_what_was_not_chosen(toy, quick):
    scbin.pp.tokenize(toy)
    how = {"device": "cpu", "progress": False, "max_steps": 2}
    model = scbin.tl.pretrain(toy, **how, preset="tiny", training=Training(cells_per_step=25, weight_decay=0.2))
    about = model.training["training"]
    assert (about["cells_per_step"], about["weight_decay"], about["learning_rate"]) == (25, 0.2, 1e-3)
    assert about["epochs"] == 100  # of three steps: "tiny" takes 300 at least
    shape = replace(PRESETS["tiny"], hidden_size=16, num_attention_heads=2)
    model = scbin.tl.pretrain(toy, **how, preset=shape, training=Training(epochs=50, clip=float("inf")))
    assert model.training["training"]["clip"] is None
    assert (model.training["steps"], model.training["training"]["epochs"]) == (2, 50)
    assert (model.training["preset"], model.training["network"]["hidden_size"]) == ("custom", 16)
    assert scbin.tl.pretrain(toy, max_steps=1, device="cpu", progress=False).training["preset"] == "tiny"


def test_batches_come_together(toy, quick):
    toy.obs["batch"] = np.where(np.arange(60) % 2, "b", "a")
    toy.X = toy.X.toarray()
    toy.X[1::2, 30:] += 4  # the second batch has ten genes up in all its cells
    scbin.pp.tokenize(toy)

    def gap(z):
        second = toy.obs["batch"].to_numpy() == "b"
        between = np.linalg.norm(z[second].mean(axis=0) - z[~second].mean(axis=0))
        return between / np.sqrt(z.var(axis=0).sum())

    scbin.tl.pretrain(toy, **quick)
    alone = gap(toy.obsm["X_scbin"])
    model = scbin.tl.pretrain(toy, **quick, batch_key="batch")
    together = toy.obsm["X_scbin"].copy()
    assert gap(together) < 0.5 * alone
    scbin.tl.embed(toy, model, device="cpu", progress=False)  # the column is still there
    np.testing.assert_allclose(toy.obsm["X_scbin"], together, atol=1e-5)
    toy.obs["batch"] = "c"  # a batch that the model does not know
    scbin.tl.embed(toy, model, device="cpu", progress=False)
    assert np.isfinite(toy.obsm["X_scbin"]).all()


PROCESS = """
import os, sys, numpy as np, torch, anndata as ad, scbin
from scbin.nn.presets import Network
from scbin.train.settings import Training
torch.set_num_threads(1)
adata = ad.read_h5ad(sys.argv[1])
training, shape = Training(cells_per_step=16, held_out=0.2), Network(1, 16, 32, 2, hidden_dropout_prob=0.0)
model = scbin.tl.pretrain(adata, preset=shape, training=training, max_steps=6, device="cpu", progress=False)
if os.environ.get("RANK", "0") == "0":
    weights = torch.cat([p.detach().reshape(-1) for p in model.network.parameters()]).numpy()
    np.savez(sys.argv[2], weights=weights, losses=model.history.filter(regex="^(loss|valid)"), z=adata.obsm["X_scbin"])
"""


def test_two_processes_pretrain_what_one_does(tokenized, tmp_path):
    tokenized.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "process.py").write_text(PROCESS)
    found = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        out = str(tmp_path / f"{len(found)}.npz")
        command = [sys.executable, *launcher, str(tmp_path / "process.py"), str(tmp_path / "a.h5ad"), out]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(scbin.__file__).parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found.append(np.load(out))
    one, two = found
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-6, abs=1e-6, nan_ok=True)
    assert np.abs(two["weights"] - one["weights"]).max() < 1e-5
    assert np.nanmax(np.abs(two["z"] - one["z"])) < 1e-3 * np.nanstd(one["z"])
