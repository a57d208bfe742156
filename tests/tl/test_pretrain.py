"""`tl.pretrain` on an AnnData: what it writes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import scbin
from scbin._errors import ScbinInputError, ScbinInputWarning
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.presets import preset as preset_named

WRITTEN = ("pretrain", "pretrain_history", "model_id", "model_path")


@pytest.fixture
def tokenized(cells):
    scbin.pp.tokenize(cells, phenotypes=["cell_type"])
    return cells


@pytest.mark.parametrize("key", [None, "X_mine", "X_scbin_2"])
def test_its_slots_are_written_and_no_others(tokenized, untouched, quick, key):
    check = untouched(tokenized)
    model = scbin.tl.pretrain(tokenized, **quick, key_added=key)
    key = key or "X_scbin"
    check.check(obsm=[key], uns=[*WRITTEN, "written"] if key == "X_mine" else WRITTEN)
    embedding = tokenized.obsm[key]
    assert embedding.shape == (60, 32) and embedding.dtype == np.float32 and np.isfinite(embedding).all()
    record = tokenized.uns["scbin"]
    assert json.loads(record["pretrain"]) == model.training
    assert record["pretrain_history"].equals(model.history) and len(model.history) == 2
    assert record["model_id"] == model.fingerprint and record["model_path"] == ""
    assert {"loss", "tokens_per_second", "validation_genes", "learning_rate"} <= set(model.history)
    scbin.tl.pretrain(tokenized, **quick, key_added=key)  # its own slot may be written again


def test_rows_stay_with_their_cells(trained):
    adata, model = trained
    adata = adata.copy()
    empty = adata.obs["scbin_status"] == "empty"
    assert empty.sum() == 1
    assert np.array_equal(np.isnan(adata.obsm["X_scbin"]).all(axis=1), empty)
    order = np.random.default_rng(0).permutation(60)
    again = adata[order].copy()
    scbin.tl.embed(again, model, device="cpu", progress=False)
    np.testing.assert_allclose(again.obsm["X_scbin"], adata.obsm["X_scbin"][order], atol=1e-5)
    assert np.array_equal(again.obsm["X_scbin"], again[adata.obs_names].obsm["X_scbin"][order], equal_nan=True)


def test_the_same_seed_gives_the_same_model(tokenized, quick):
    first = scbin.tl.pretrain(tokenized, **quick, seed=4)
    embedding = tokenized.obsm["X_scbin"]
    second = scbin.tl.pretrain(tokenized.copy(), **quick, seed=4)
    assert first.fingerprint == second.fingerprint
    scbin.tl.embed(tokenized, second, device="cpu", progress=False)
    assert np.array_equal(tokenized.obsm["X_scbin"], embedding)
    assert scbin.tl.pretrain(tokenized, **quick, seed=5).fingerprint != first.fingerprint


def test_no_global_generator_moves(tokenized, quick):
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()
    scbin.tl.pretrain(tokenized, **quick)
    scbin.tl.embed(tokenized, device="cpu", progress=False)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    state = np.random.get_state()
    assert np.array_equal(state[1], before[2][1]) and state[2:] == before[2][2:]


def test_neither_threads_nor_gradients_are_switched(tokenized, quick):
    before = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    scbin.tl.pretrain(tokenized, **quick)
    assert before == (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())


def test_a_view_becomes_an_object_of_its_own(tokenized, untouched, quick):
    parent = untouched(tokenized)
    view = tokenized[::2]
    assert view.is_view
    scbin.tl.pretrain(view, **quick)  # warnings are errors: none about the view
    assert not view.is_view and view.obsm["X_scbin"].shape == (30, 32)
    parent.check()


def test_a_backed_file_is_trained_on(tokenized, quick, tmp_path):
    tokenized.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    model = scbin.tl.pretrain(backed, **quick)
    assert backed.isbacked and backed.obsm["X_scbin"].shape == (60, 32)
    backed.file.close()
    assert model.fingerprint == scbin.tl.pretrain(tokenized, **quick).fingerprint


def test_a_directory_holds_the_model_and_serves_the_next_session(tokenized, quick, tmp_path, monkeypatch):
    model = scbin.tl.pretrain(tokenized, **quick, save_dir=tmp_path / "run")
    assert scbin.Model.load(tmp_path / "run" / "model").fingerprint == model.fingerprint
    assert tokenized.uns["scbin"]["model_path"] == str((tmp_path / "run" / "model").resolve())
    embedding = tokenized.obsm.pop("X_scbin")
    monkeypatch.setattr("scbin.tl._model._session", {})
    tokenized.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    scbin.tl.embed(back, device="cpu", progress=False)
    assert np.array_equal(back.obsm["X_scbin"], embedding)
    again = scbin.tl.pretrain(tokenized, **quick, save_dir=tmp_path / "run", resume=True)
    assert again.fingerprint == model.fingerprint


@pytest.mark.parametrize(
    "denoising_weight",
    [0.0, pytest.param(1.0)],
)
def test_held_out_cells_do_not_influence_what_is_learned(tokenized, quick, denoising_weight):
    from scbin.data.masking import split_cells

    held_out = split_cells(60, 0.2, 0)
    assert 3 < held_out.sum() < 30
    model = scbin.tl.pretrain(tokenized, **quick, validation_share=0.2, denoising_weight=denoising_weight)
    other = tokenized.copy()
    tokens = other.obsm["X_tokens"].tolil()
    tokens[np.flatnonzero(held_out)] = tokens[np.flatnonzero(held_out)[0]]
    other.obsm["X_tokens"] = csr_matrix(tokens)
    again = scbin.tl.pretrain(other, **quick, validation_share=0.2, denoising_weight=denoising_weight)
    assert again.fingerprint == model.fingerprint
    assert again.history["validation_genes"].iloc[-1] != model.history["validation_genes"].iloc[-1]


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("T18", {"contrastive_weight": -1}),
        ("T18", {"denoising_weight": float("nan")}),
        ("T18", {"masked_weight": 0, "denoising_weight": 0, "contrastive_weight": 0}),
        ("T18", {"gene_table": "pca"}),
        ("T18", {"gene_table_rank": 0}),
        ("T10", {"preset": "huge"}),
        ("T10", {"preset": None}),
        ("T12", {"hidden_size": 30}),
        ("A02", {"pooling": "max"}),
        ("T20", {"device": "quantum"}),
        ("T21", {"precision": "float8"}),
        ("T30", {"max_steps": 0}),
        ("T30", {"token_budget": 0}),
        ("T30", {"learning_rate": -1.0}),
        ("T30", {"learning_rate": float("nan")}),
        ("T30", {"validation_share": 1.0}),
        ("T30", {"epochs": -1}),
        ("T31", {"resume": True}),
        ("T35", {"checkpoint_every": 5}),
        ("A01", {"epochs": 1.5}),
        ("A01", {"epochs": "3"}),
        ("A01", {"max_steps": 2.0}),
        ("A01", {"cells_per_step": True}),
        ("A01", {"token_budget": None}),
        ("A01", {"seed": "x"}),
        ("A01", {"learning_rate": "fast"}),
        ("A01", {"validation_share": None}),
        ("A01", {"masking": 3}),
        ("A01", {"loss": "ordinal"}),
        ("A01", {"denoising_weight": "1"}),
        ("A01", {"gene_table_rank": 2.5}),
        ("A01", {"hidden_size": "big"}),
        ("A01", {"num_hidden_layers": 1.5}),
        ("A01", {"device": 3}),
        ("A01", {"save_dir": 3}),
        ("A01", {"tensorboard": True}),
        ("A01", {"wandb": 3}),
        ("A01", {"resume": "yes"}),
        ("A01", {"progress": 1}),
        ("A01", {"key_added": 3}),
        ("A01", {"tokens_key": 3}),
        ("A03", {"key_added": ""}),
        ("A03", {"key_added": "a/b"}),
        ("T01", {"tokens_key": "X_pca2"}),
        ("I54", {"key_added": "X_pca"}),
        pytest.param("T30", {"epochs": 0}),
        pytest.param("T30", {"cells_per_step": 0}),
        ("A04", {"key_added": "X_tokens"}),
        pytest.param(
            "T12",
            {"num_attention_heads": 0},
        ),
        pytest.param(
            "T12",
            {"hidden_size": 0},
        ),
        pytest.param("T30", {"seed": -1}),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_nothing_is_written(tokenized, untouched, quick, code, arguments):
    check = untouched(tokenized)
    with pytest.raises(ScbinInputError) as caught:
        scbin.tl.pretrain(tokenized, **{**quick, **arguments})
    assert caught.value.code == code
    check.check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is here")
def test_a_device_that_is_absent(tokenized, untouched, quick):
    check = untouched(tokenized)
    with pytest.raises(ScbinInputError, match=r"T20.*'cuda'.*Here: .*'cpu'"):
        scbin.tl.pretrain(tokenized, **{**quick, "device": "cuda"})
    check.check()


def test_numbers_of_numpy_are_numbers(tokenized, quick):
    arguments = {"max_steps": np.int64(2), "learning_rate": np.float32(1e-3), "epochs": np.int32(1)}
    model = scbin.tl.pretrain(tokenized, **{**quick, **arguments})
    assert json.loads(tokenized.uns["scbin"]["pretrain"])["settings"]["max_steps"] == 2
    assert model.training["settings"]["learning_rate"] == pytest.approx(1e-3)


def bare(adata):
    del adata.obsm["X_tokens"], adata.uns["scbin"]
    return adata


def widened(adata):
    adata.obsm["X_tokens"] = adata.obsm["X_tokens"][:, :-1]
    return adata


def foreign_ids(adata):
    adata.obsm["X_tokens"].data[3] = 60_000
    return adata


def without_vocabulary(adata):
    return ad.concat([adata[:30], adata[30:]])


def other_vocabulary(adata):
    other = Vocabulary.build("rank", ["A", "B"])
    adata.uns["scbin"] = {"vocabulary": other.to_json()}
    return adata


@pytest.mark.parametrize(
    ("code", "spoil"),
    [
        ("T01", bare),
        ("T02", without_vocabulary),
        ("T04", widened),
        ("T04", other_vocabulary),
        ("T05", foreign_ids),
        ("I47", lambda adata: adata[:0].copy()),
        ("I47", lambda adata: adata[:1].copy()),
        ("I48", lambda adata: adata[:, :0].copy()),
    ],
    ids=["untokenized", "concat", "widened", "other vocabulary", "foreign ids", "no cells", "one cell", "no genes"],
)
def test_cells_that_cannot_be_trained_on(tokenized, untouched, quick, code, spoil):
    spoiled = spoil(tokenized)
    check = untouched(spoiled)
    with pytest.raises(ScbinInputError) as caught:
        scbin.tl.pretrain(spoiled, **quick)
    assert caught.value.code == code
    check.check()


@pytest.mark.parametrize("thing", [None, "a.h5ad", [1], np.zeros((3, 3))], ids=["None", "path", "list", "array"])
def test_what_is_no_anndata(quick, thing):
    with pytest.raises(TypeError, match="I55"):
        scbin.tl.pretrain(thing, **quick)


def test_two_cells_are_enough(tokenized, quick):
    few = tokenized[:2].copy()
    scbin.tl.pretrain(few, **quick)
    assert few.obsm["X_scbin"].shape == (2, 32) and np.isfinite(few.obsm["X_scbin"]).all()


def test_a_place_for_the_model_that_is_taken_is_refused_before_training(toy, tmp_path):
    scbin.pp.tokenize(toy)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(scbin.ScbinError, match="M02"):
        scbin.tl.pretrain(toy, preset="tiny", max_steps=1, save_dir=tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_entry_of_somebody_else_in_uns_is_refused_and_kept(toy):
    toy.uns["scbin"] = "mine"
    with pytest.raises(scbin.ScbinError, match="I54"):
        scbin.pp.tokenize(toy)
    assert toy.uns["scbin"] == "mine"
    assert "X_tokens" not in toy.obsm


def test_tokens_under_another_key(tokenized, quick):
    expected = scbin.tl.pretrain(tokenized.copy(), **quick)
    scbin.pp.tokenize(tokenized, phenotypes=["cell_type"], key_added="X_b")
    scbin.pp.tokenize(tokenized, encoding="rank")  # has a vocabulary of its own
    model = scbin.tl.pretrain(tokenized, **quick, tokens_key="X_b")
    assert model.fingerprint == expected.fingerprint and model.vocabulary.encoding == "bins"
    first = tokenized.obsm["X_scbin"].copy()
    scbin.tl.embed(tokenized, model, tokens_key="X_b", device="cpu", progress=False)
    np.testing.assert_array_equal(tokenized.obsm["X_scbin"], first)
    with pytest.raises(ScbinInputError, match="T03"):
        scbin.tl.embed(tokenized, model)
    del tokenized.obsm["X_tokens"]
    with pytest.raises(ScbinInputError, match="T01.*tokens_key='X_b'"):
        scbin.tl.embed(tokenized, model)
    with pytest.raises(ScbinInputError, match="A04"):
        scbin.tl.embed(tokenized, model, tokens_key="X_b", key_added="X_b")


def test_a_network_too_large_for_the_cells_is_named(tokenized, quick):
    with pytest.warns(ScbinInputWarning, match="T19.*60 cells.*preset='tiny'"):
        scbin.tl.pretrain(tokenized, **{**quick, "hidden_size": 256, "max_steps": 1})


def test_the_projection_is_part_of_the_model(cells, quick, tmp_path):
    scbin.pp.tokenize(cells)
    model = scbin.tl.pretrain(cells, **quick)
    model.save(tmp_path / "model")
    loaded = scbin.Model.load(tmp_path / "model")
    assert loaded.fingerprint == model.fingerprint
    scbin.tl.embed(cells, loaded, key_added="again", progress=False)
    np.testing.assert_allclose(cells.obsm["again"], cells.obsm["X_scbin"], atol=1e-5)
    scbin.tl.embed(cells, loaded, key_added="own", projection=False, progress=False)
    np.testing.assert_allclose(loaded.place(cells.obsm["own"]), cells.obsm["X_scbin"], atol=1e-5)
    about = json.loads((tmp_path / "model" / "scbin.json").read_text())
    assert about["projection"] == {"width": 128, "own": model.projection.n_own}
    lengths = np.linalg.norm(cells.obsm["X_scbin"] @ model.projection.own.T, axis=1)
    np.testing.assert_allclose(lengths[np.isfinite(lengths)], model.projection.length.item(), rtol=1e-4)
    bare = scbin.tl.pretrain(cells, projection=False, **quick)
    assert bare.projection is None
    np.testing.assert_allclose(cells.obsm["X_scbin"], cells.obsm["own"], atol=1e-5)


def test_batches_come_together(toy, quick):
    toy.obs["batch"] = np.where(np.arange(60) % 2, "b", "a")
    toy.X = toy.X.toarray()
    toy.X[1::2, 30:] += 4  # the second batch has ten genes up in all its cells
    scbin.pp.tokenize(toy)

    def gap(**arguments):
        scbin.tl.pretrain(toy, **quick, **arguments)
        z, second = toy.obsm["X_scbin"], toy.obs["batch"].to_numpy() == "b"
        between = np.linalg.norm(z[second].mean(axis=0) - z[~second].mean(axis=0))
        return between / np.sqrt(z.var(axis=0).sum())

    assert gap(batch_key="batch") < 0.5 * gap()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"batch_key": "plate"}, "I35"),
        ({"batch_key": "one"}, "T25"),
        ({"batch_key": "lonely"}, "T25"),
        ({"batch_key": "sex", "projection": False}, "T24"),
    ],
)
def test_batches_that_cannot_be_brought_together(toy, quick, arguments, code):
    toy.obs["one"] = "a"
    toy.obs["lonely"] = np.where(np.arange(60) == 3, "b", "a")
    scbin.pp.tokenize(toy)
    with pytest.raises(scbin.ScbinError) as caught:
        scbin.tl.pretrain(toy, **quick, **arguments)
    assert caught.value.code == code
    assert "X_scbin" not in toy.obsm


def test_default_epochs_make_the_fewest_steps_and_the_record_says_what_was_done(toy, tmp_path):
    scbin.pp.tokenize(toy)
    preset = replace(
        preset_named("tiny"), hidden_size=16, num_attention_heads=2, cells_per_step=64, epochs=1, fewest_steps=7
    )
    model = scbin.tl.pretrain(toy, preset=preset, cells_per_step=25, validation_share=0.2, progress=False, device="cpu")
    assert model.training["steps"] >= 7 and model.training["steps"] < 7 + 3
    model = scbin.tl.pretrain(toy, preset=preset, max_steps=2, epochs=50, progress=False, device="cpu")
    assert (model.training["steps"], model.training["epochs"]) == (2, 2)


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
    assert (new.obs["scbin_status"] == "ok").all() and np.isfinite(new.obsm["X_scbin"]).all()


def test_cells_that_are_all_alike(toy, quick):
    toy.X = np.tile(toy.X[0].toarray(), (60, 1))
    scbin.pp.tokenize(toy)
    scbin.tl.pretrain(toy, **quick)
    assert np.isfinite(toy.obsm["X_scbin"]).all()
