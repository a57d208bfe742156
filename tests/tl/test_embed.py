"""`tl.embed`: which model is meant, what is written, and that labels cannot leak into an embedding."""

from __future__ import annotations

import copy
import json
import warnings

import anndata as ad
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

import scbin
from scbin._errors import ScbinInputError, ScbinModelError
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.embedding import hide_phenotypes

ARGUMENTS = {"device": "cpu", "progress": False}


@pytest.fixture
def ready(cells, trained):
    """Cells with every slot filled, tokenized for the model."""
    scbin.pp.tokenize(cells, like=trained[1])
    return cells


@pytest.fixture
def new_session(monkeypatch):
    monkeypatch.setattr("scbin.tl._model._session", {})


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "X_mine"])
@pytest.mark.parametrize("copy", [False, True])
def test_its_slots_are_written_and_no_others(ready, trained, untouched, key, copy):
    check = untouched(ready)
    result = scbin.tl.embed(ready, trained[1], **ARGUMENTS, key_added=key, copy=copy)
    slot = key or "X_scbin"
    uns = ["embed", "written"] if key else ["embed"]
    if copy:
        check.check()
        check.adata = result
    else:
        assert result is None
    check.check(obsm=[slot], uns=uns)
    written = check.adata
    assert written.obsm[slot].shape == (60, 32) and written.obsm[slot].dtype == np.float32
    record = json.loads(written.uns["scbin"]["embed"])
    assert record["model"] == trained[1].fingerprint and record["phenotypes"] == "hide"


def test_embedding_again_gives_what_training_gave(trained):
    adata, model = trained
    again = scbin.tl.embed(adata, model, **ARGUMENTS, copy=True)
    assert np.array_equal(again.obsm["X_scbin"], adata.obsm["X_scbin"], equal_nan=True)
    for budget in (1, 200):
        small = scbin.tl.embed(adata, model, **ARGUMENTS, copy=True, token_budget=budget).obsm["X_scbin"]
        np.testing.assert_allclose(small, adata.obsm["X_scbin"], atol=1e-5)


def test_layer_and_pooling_over_the_models_own(trained):
    adata, model = trained
    made = {}
    for pooling in ("weighted", "mean", "cls"):
        for layer in (-1, 0):
            copy = scbin.tl.embed(adata, model, **ARGUMENTS, copy=True, pooling=pooling, layer=layer)
            made[pooling, layer] = np.nan_to_num(copy.obsm["X_scbin"])
    assert np.array_equal(made["weighted", -1], np.nan_to_num(adata.obsm["X_scbin"]))
    parts = list(made.values())
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(parts) for b in parts[:i])


@pytest.mark.parametrize("kind", ["h5ad", "zarr2", "zarr3"])
def test_what_is_written_survives_a_file(ready, trained, tmp_path, kind):
    scbin.tl.pretrain(
        ready, preset="tiny", hidden_size=32, max_steps=2, cells_per_step=16, seed=1, key_added="X_own", **ARGUMENTS
    )
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    trained[1].save(tmp_path / "model")
    if kind == "h5ad":
        ready.write_h5ad(tmp_path / "a.h5ad")
        back = ad.read_h5ad(tmp_path / "a.h5ad")
    else:
        with ad.settings.override(zarr_write_format=int(kind[-1])), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr and anndata remark on formats to come
            ready.write_zarr(tmp_path / "a.zarr")
            back = ad.read_zarr(tmp_path / "a.zarr")
    for key in ("X_scbin", "X_own"):
        assert back.obsm[key].dtype == np.float32 and np.array_equal(back.obsm[key], ready.obsm[key])
    assert (back.obsm["X_tokens"] != ready.obsm["X_tokens"]).nnz == 0
    assert back.obsm["X_tokens"].dtype == ready.obsm["X_tokens"].dtype
    record = back.uns["scbin"]
    assert set(record) == set(ready.uns["scbin"])
    for key in ("vocabulary", "pretrain", "embed", "model_id", "tokenize"):
        assert str(record[key]) == ready.uns["scbin"][key]
    history = ready.uns["scbin"]["pretrain_history"]
    assert list(record["pretrain_history"].columns) == list(history.columns)
    assert np.array_equal(record["pretrain_history"].to_numpy(float), history.to_numpy(float), equal_nan=True)
    scbin.tl.embed(back, tmp_path / "model", **ARGUMENTS)
    assert np.array_equal(back.obsm["X_scbin"], ready.obsm["X_scbin"])


def test_a_view_and_a_backed_file(ready, trained, untouched, tmp_path):
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    truth = ready.obsm.pop("X_scbin")
    parent = untouched(ready)
    view = ready[40:20:-1]
    scbin.tl.embed(view, trained[1], **ARGUMENTS)
    np.testing.assert_allclose(view.obsm["X_scbin"], truth[40:20:-1], atol=1e-5)
    parent.check()
    ready.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    scbin.tl.embed(backed, trained[1], **ARGUMENTS)
    assert backed.isbacked and np.array_equal(backed.obsm["X_scbin"], truth)
    backed.file.close()


def test_a_copy_of_a_backed_file_is_in_memory(ready, trained, tmp_path):
    ready.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    try:
        assert scbin.tl.embed(backed, trained[1], **ARGUMENTS, copy=True).obsm["X_scbin"].shape == (60, 32)
    finally:
        backed.file.close()


@pytest.mark.parametrize("n_cells", [0, 1])
def test_few_cells(ready, trained, n_cells):
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    few = ready[:n_cells].copy()
    scbin.tl.embed(few, trained[1], **ARGUMENTS)
    np.testing.assert_allclose(few.obsm["X_scbin"], ready.obsm["X_scbin"][:n_cells], atol=1e-5)
    assert few.obsm["X_scbin"].shape == (n_cells, 32)


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_labels_do_not_leak_into_the_embedding(ready, trained):
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    truth = ready.obsm["X_scbin"].copy()
    shown = scbin.tl.embed(ready, trained[1], **ARGUMENTS, phenotypes="show", copy=True).obsm["X_scbin"]
    changed = ready.copy()
    order = np.random.default_rng(0).permutation(60)
    for column in ("cell_type", "sex"):
        changed.obs[column] = ready.obs[column].to_numpy()[order]
    scbin.pp.tokenize(changed, like=trained[1])
    assert (changed.obsm["X_tokens"] != ready.obsm["X_tokens"]).nnz > 20
    scbin.tl.embed(changed, trained[1], **ARGUMENTS)
    assert np.array_equal(changed.obsm["X_scbin"], truth)
    scbin.tl.embed(changed, trained[1], **ARGUMENTS, phenotypes="show")
    assert np.abs(changed.obsm["X_scbin"] - shown).max() > 1e-4


# ---- which model -----------------------------------------------------------------------------------------------------


def test_the_model_of_this_session(ready, quick):
    scbin.pp.tokenize(ready)
    scbin.tl.pretrain(ready, **quick)
    truth = ready.obsm.pop("X_scbin")
    scbin.tl.embed(ready, **ARGUMENTS)
    assert np.array_equal(ready.obsm["X_scbin"], truth)


def test_a_path_is_a_model(ready, trained, tmp_path, new_session):
    trained[1].save(tmp_path / "model")
    scbin.tl.embed(ready, trained[1], **ARGUMENTS, key_added="X_scbin_truth")
    for path in (tmp_path / "model", str(tmp_path / "model")):
        scbin.tl.embed(ready, path, **ARGUMENTS)
        assert np.array_equal(ready.obsm["X_scbin"], ready.obsm["X_scbin_truth"])


def test_no_model_is_known(ready, trained, untouched, new_session, tmp_path):
    for path in ("", str(tmp_path / "gone")):
        ready.uns["scbin"]["model_path"] = path
        check = untouched(ready)
        with pytest.raises(ScbinInputError, match=r"M21.*model\.save"):
            scbin.tl.embed(ready, **ARGUMENTS)
        check.check()


def test_what_is_no_model(ready, untouched, tmp_path):
    check = untouched(ready)
    with pytest.raises(ScbinModelError, match="M03"):
        scbin.tl.embed(ready, tmp_path / "nowhere", **ARGUMENTS)
    with pytest.raises(TypeError, match="M20"):
        scbin.tl.embed(ready, {"model": 1}, **ARGUMENTS)
    check.check()


# ---- new data --------------------------------------------------------------------------------------------------------


def test_genes_go_by_name_and_not_by_column(toy, trained):
    scbin.pp.tokenize(toy, like=trained[1])
    scbin.tl.embed(toy, trained[1], **ARGUMENTS)
    order = np.random.default_rng(1).permutation(40)
    other = ad.AnnData(toy.X[:, order].copy(), obs=toy.obs[["cell_type", "sex"]], var=toy.var.iloc[order])
    scbin.pp.tokenize(other, like=trained[1])
    scbin.tl.embed(other, trained[1], **ARGUMENTS)
    assert np.array_equal(other.obsm["X_scbin"], toy.obsm["X_scbin"])


def test_no_genes_in_common(toy, trained, untouched):
    toy.var_names = [f"OTHER{i}" for i in range(40)]
    check = untouched(toy)
    with pytest.raises(ScbinInputError):
        scbin.pp.tokenize(toy, like=trained[1])
    check.check()


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("A02", {"pooling": "max"}),
        ("T14", {"layer": 9}),
        ("T14", {"layer": -4}),
        ("T17", {"phenotypes": "some"}),
        ("A01", {"layer": "a"}),
        ("A01", {"layer": 1.0}),
        ("A01", {"token_budget": 2.5}),
        ("A01", {"progress": "no"}),
        ("A01", {"copy": 1}),
        ("A01", {"tokens_key": 1}),
        ("A01", {"device": 0}),
        ("A02", {"pooling": 3}),
        ("T21", {"precision": 32}),
        ("T20", {"device": "quantum"}),
        ("T21", {"precision": "float8"}),
        ("I54", {"key_added": "X_pca"}),
        ("A04", {"key_added": "X_tokens"}),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_nothing_is_written(ready, trained, untouched, code, arguments):
    check = untouched(ready)
    with pytest.raises(ScbinInputError) as caught:
        scbin.tl.embed(ready, trained[1], **{**ARGUMENTS, **arguments})
    assert caught.value.code == code
    check.check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is here")
def test_a_device_that_is_absent(ready, trained):
    with pytest.raises(ScbinInputError, match=r"T20.*'cuda'"):
        scbin.tl.embed(ready, trained[1], device="cuda", progress=False)
    assert "X_scbin" not in ready.obsm


def test_cells_that_are_not_tokenized(toy, trained, untouched):
    check = untouched(toy)
    with pytest.raises(ScbinInputError, match="T01"):
        scbin.tl.embed(toy, trained[1], **ARGUMENTS)
    check.check()


def test_cells_of_another_vocabulary(toy, trained, untouched):
    scbin.pp.tokenize(toy, encoding="rank")
    check = untouched(toy)
    with pytest.raises(ScbinInputError, match=r"T03.*like=model"):
        scbin.tl.embed(toy, trained[1], **ARGUMENTS)
    toy.uns["scbin"]["vocabulary"] = Vocabulary.build("rank", ["A"]).to_json()
    with pytest.raises(ScbinInputError, match="T03"):
        scbin.tl.embed(toy, trained[1], **ARGUMENTS)
    del toy.uns["scbin"]
    with pytest.raises(ScbinInputError, match="T04"):
        scbin.tl.embed(toy, trained[1], **ARGUMENTS)
    assert check.before.obsm.keys() == toy.obsm.keys()


def test_joined_cells_need_the_model_but_not_uns(ready, trained, new_session):
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    joined = ad.concat([ready[:20], ready[20:]])
    truth = joined.obsm.pop("X_scbin")
    with pytest.raises(ScbinInputError, match="M21"):
        scbin.tl.embed(joined, **ARGUMENTS)
    scbin.tl.embed(joined, trained[1], **ARGUMENTS)
    assert np.array_equal(joined.obsm["X_scbin"], truth)


def test_tokens_in_another_container(ready, trained):
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    truth, tokens = ready.obsm["X_scbin"].copy(), ready.obsm["X_tokens"]
    for other in (tokens.tocsc(), tokens.toarray(), csr_matrix(tokens.toarray()[:, ::-1])[:, ::-1]):
        ready.obsm["X_tokens"] = other
        scbin.tl.embed(ready, trained[1], **ARGUMENTS)
        assert np.array_equal(ready.obsm["X_scbin"], truth)


def test_genes_have_the_mean_of_their_tokens_vectors(trained):
    """Every gene against plain transformers on one cell after the other."""
    adata, model = trained
    adata = adata[:, ::-1].copy()  # genes are found by name
    scbin.tl.embed(adata, model, genes=True, progress=False)
    tokens = hide_phenotypes(adata.obsm["X_tokens"].tocsr(), model.vocabulary)
    found = {gene: [] for gene in adata.var_names}
    bert = copy.deepcopy(model.bert)
    bert.set_attn_implementation("eager")
    for row in tokens:
        if not row.nnz:
            continue
        ids, positions = torch.tensor(row.data.astype(int))[None], torch.tensor(row.indices.astype(int))[None]
        with torch.inference_mode():
            hidden = bert.bert(ids, position_ids=positions).last_hidden_state[0].numpy()
        for position, vector in zip(row.indices, hidden, strict=True):
            if position in model.vocabulary.gene_positions:
                found[model.vocabulary.genes[position - model.vocabulary.first_gene_position]].append(vector)
    assert adata.var["scbin_n_cells"].tolist() == [len(found[gene]) for gene in adata.var_names]
    for gene, vector in zip(adata.var_names, adata.varm["scbin_genes"], strict=True):
        if found[gene]:
            np.testing.assert_allclose(vector, np.mean(found[gene], axis=0), atol=1e-5)
        else:
            assert np.isnan(vector).all()


def test_a_layer_has_two_numbers(ready, trained):
    for layer, key in ((-1, "X_a"), (2, "X_b"), (np.int64(-1), "X_c")):
        scbin.tl.embed(ready, trained[1], layer=layer, key_added=key, **ARGUMENTS)
    assert np.array_equal(ready.obsm["X_a"], ready.obsm["X_b"], equal_nan=True)
    assert np.array_equal(ready.obsm["X_a"], ready.obsm["X_c"], equal_nan=True)
