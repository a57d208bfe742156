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
from scbin.tokens.vocabulary import Vocabulary

ARGUMENTS = {"device": "cpu", "progress": False}


@pytest.fixture
def ready(cells, trained):
    """Cells with every slot filled, tokenized for the model."""
    scbin.pp.tokenize(cells, like=trained[1])
    return cells


@pytest.fixture
def new_session(monkeypatch):
    monkeypatch.setattr("scbin.model._session", {})


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "X_mine"])
@pytest.mark.parametrize("copy", [False, True])
def test_its_slots_are_written_and_no_others(ready, trained, untouched, key, copy):
    check = untouched(ready)
    result = scbin.tl.embed(ready, trained[1], **ARGUMENTS, key_added=key, copy=copy)
    if copy:
        check.check()
        check.adata = result
    else:
        assert result is None
    slot = key or "X_scbin"
    check.check(obsm=[slot], uns=["embed", "written"] if key else ["embed"])
    written = check.adata
    assert written.obsm[slot].shape == (60, 30) and written.obsm[slot].dtype == np.float32
    record = json.loads(written.uns["scbin"]["embed"])
    assert record["model"] == trained[1].fingerprint and record["phenotypes"] == "hide"


def test_embedding_again_gives_what_training_gave_under_any_budget_and_in_any_chunks(trained):
    adata, model = trained
    truth = adata.obsm["X_scbin"]
    again = scbin.tl.embed(adata, model, **ARGUMENTS, copy=True)
    assert np.array_equal(again.obsm["X_scbin"], truth, equal_nan=True)
    for budget in (1, 200):
        small = scbin.tl.embed(adata, model, **ARGUMENTS, copy=True, token_budget=budget).obsm["X_scbin"]
        np.testing.assert_allclose(small, truth, atol=1e-5)
    for rows in (slice(0, 7), slice(40, 20, -1), np.random.default_rng(0).permutation(60)):
        part = adata[rows].copy()
        scbin.tl.embed(part, model, **ARGUMENTS)
        np.testing.assert_allclose(part.obsm["X_scbin"], truth[rows], atol=1e-5)


def test_layer_and_pooling_over_the_models_own(trained):
    adata, model = trained
    made = {None: np.nan_to_num(adata.obsm["X_scbin"])}
    for pooling in ("weighted", "mean", "cls"):
        for layer in (-1, 0):
            copied = scbin.tl.embed(adata, model, **ARGUMENTS, copy=True, pooling=pooling, layer=layer)
            made[pooling, layer] = np.nan_to_num(copied.obsm["X_scbin"])
    parts = [part for name, part in made.items() if name is not None]
    assert all(part.shape == (60, 32) for part in parts)
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(parts) for b in parts[:i])
    again = scbin.tl.embed(
        adata, model, **ARGUMENTS, copy=True, pooling="mean", layer=np.int64(1)
    )  # the last by number
    assert np.array_equal(np.nan_to_num(again.obsm["X_scbin"]), made["mean", -1])


def test_pooled_vectors_are_means_of_plain_transformers_states(trained, quick):
    """The weighted mean of the hidden states of stock BERT, cell by cell."""
    adata = trained[0].copy()
    model = scbin.tl.pretrain(adata, **quick, backbone="bert")
    adata = adata[:, ::-1].copy()  # genes are found by name
    scbin.tl.embed(adata, model, pooling="weighted", **ARGUMENTS)
    tokens, vocabulary = adata.obsm["X_tokens"].tocsr().copy(), model.vocabulary
    tokens.data[np.isin(tokens.indices, [p.position for p in vocabulary.phenotypes])] = vocabulary.mask_id
    cells = []
    bert = copy.deepcopy(model.network.backbone.bert)
    bert.set_attn_implementation("eager")
    for row in tokens:
        if not row.nnz:
            cells.append(np.full(32, np.nan))
            continue
        ids, positions = torch.tensor(row.data.astype(int))[None], torch.tensor(row.indices.astype(int))[None]
        with torch.inference_mode():
            hidden = bert.bert(ids, position_ids=positions).last_hidden_state[0].numpy()
        weights = np.log1p(vocabulary.token_values[row.data])  # the tokens are counts
        cells.append((hidden * weights[:, None]).sum(0) / weights.sum())
    np.testing.assert_allclose(adata.obsm["X_scbin"], cells, atol=1e-5)


@pytest.mark.filterwarnings("ignore:This setting will be removed")  # anndata 0.13
@pytest.mark.parametrize("kind", ["h5ad", "zarr2", "zarr3"])
def test_what_is_written_survives_a_file(ready, trained, quick, tmp_path, kind):
    scbin.tl.pretrain(ready, **quick, seed=1, key_added="X_own")
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
    record = back.uns["scbin"]
    assert set(record) == set(ready.uns["scbin"])
    for key in ("vocabulary", "pretrain", "embed", "model_id", "tokenize"):
        assert str(record[key]) == ready.uns["scbin"][key]
    history = ready.uns["scbin"]["pretrain_history"]
    assert list(record["pretrain_history"].columns) == list(history.columns)
    assert np.array_equal(record["pretrain_history"].to_numpy(float), history.to_numpy(float), equal_nan=True)
    scbin.tl.embed(back, tmp_path / "model", **ARGUMENTS)
    assert np.array_equal(back.obsm["X_scbin"], ready.obsm["X_scbin"])


def test_views_and_backed_files(ready, trained, untouched, tmp_path):
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    truth = ready.obsm.pop("X_scbin")
    parent = untouched(ready)
    view = ready[40:20:-1]
    scbin.tl.embed(view, trained[1], **ARGUMENTS)
    np.testing.assert_allclose(view.obsm["X_scbin"], truth[40:20:-1], atol=1e-5)
    parent.check()
    ready.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    try:
        assert scbin.tl.embed(backed, trained[1], **ARGUMENTS, copy=True).obsm["X_scbin"].shape == (60, 30)
        scbin.tl.embed(backed, trained[1], **ARGUMENTS)
        assert backed.isbacked and np.array_equal(backed.obsm["X_scbin"], truth)
    finally:
        backed.file.close()


@pytest.mark.parametrize("n_cells", [0, 1])
def test_few_cells(ready, trained, n_cells):
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    few = ready[:n_cells].copy()
    scbin.tl.embed(few, trained[1], **ARGUMENTS)
    scbin.tl.embed_genes(few, trained[1], **ARGUMENTS)
    np.testing.assert_allclose(few.obsm["X_scbin"], ready.obsm["X_scbin"][:n_cells], atol=1e-5)
    assert few.obsm["X_scbin"].shape == (n_cells, 30)
    assert few.varm["scbin_genes"].shape == (40, 32 if n_cells else 0)


def test_labels_do_not_leak_into_the_embedding(ready, trained):
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    truth = ready.obsm["X_scbin"].copy()
    shown = scbin.tl.embed(ready, trained[1], **ARGUMENTS, phenotypes="show", pooling="mean", layer=-1, copy=True)
    changed = ready.copy()
    order = np.random.default_rng(0).permutation(60)
    for column in ("cell_type", "sex"):
        changed.obs[column] = ready.obs[column].to_numpy()[order]
    scbin.pp.tokenize(changed, like=trained[1])
    assert (changed.obsm["X_tokens"] != ready.obsm["X_tokens"]).nnz > 20
    scbin.tl.embed(changed, trained[1], **ARGUMENTS)
    assert np.array_equal(changed.obsm["X_scbin"], truth)
    scbin.tl.embed(changed, trained[1], **ARGUMENTS, phenotypes="show", pooling="mean", layer=-1)
    assert np.abs(changed.obsm["X_scbin"] - shown.obsm["X_scbin"]).max() > 1e-5


# ---- which model -----------------------------------------------------------------------------------------------------


def test_the_model_of_this_session_and_of_a_path(ready, trained, quick, tmp_path):
    trained[1].save(tmp_path / "model")
    scbin.tl.embed(ready, trained[1], **ARGUMENTS, key_added="X_truth")
    for path in (tmp_path / "model", str(tmp_path / "model")):
        scbin.tl.embed(ready, path, **ARGUMENTS)
        assert np.array_equal(ready.obsm["X_scbin"], ready.obsm["X_truth"])
    scbin.pp.tokenize(ready)
    scbin.tl.pretrain(ready, **quick)
    truth = ready.obsm.pop("X_scbin")
    scbin.tl.embed(ready, **ARGUMENTS)
    assert np.array_equal(ready.obsm["X_scbin"], truth)


def test_no_model_is_known(ready, untouched, new_session, tmp_path):
    for path in ("", str(tmp_path / "gone")):
        ready.uns["scbin"]["model_path"] = path
        check = untouched(ready)
        with pytest.raises(ScbinInputError, match=r"M01.*model\.save"):
            scbin.tl.embed(ready, **ARGUMENTS)
        check.check()
    with pytest.raises(ScbinModelError):
        scbin.tl.embed(ready, tmp_path / "nowhere", **ARGUMENTS)
    with pytest.raises(TypeError, match="A01"):
        scbin.tl.embed(ready, {"model": 1}, **ARGUMENTS)
    check.check()


# ---- new data --------------------------------------------------------------------------------------------------------


def test_genes_go_by_name_and_tokens_in_any_container(ready, trained):
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    truth, tokens = ready.obsm["X_scbin"].copy(), ready.obsm["X_tokens"]
    order = np.random.default_rng(1).permutation(40)
    other = ad.AnnData(ready.X[:, order].copy(), obs=ready.obs[["cell_type", "sex"]], var=ready.var.iloc[order])
    scbin.pp.tokenize(other, like=trained[1])
    scbin.tl.embed(other, trained[1], **ARGUMENTS)
    assert np.array_equal(other.obsm["X_scbin"], truth)
    for container in (tokens.tocsc(), tokens.toarray(), csr_matrix(tokens.toarray()[:, ::-1])[:, ::-1]):
        ready.obsm["X_tokens"] = container
        scbin.tl.embed(ready, trained[1], **ARGUMENTS)
        assert np.array_equal(ready.obsm["X_scbin"], truth)


def test_joined_cells_need_the_model_but_not_uns(ready, trained, new_session):
    scbin.tl.embed(ready, trained[1], **ARGUMENTS)
    joined = ad.concat([ready[:20], ready[20:]])
    truth = joined.obsm.pop("X_scbin")
    with pytest.raises(ScbinInputError, match="M01"):
        scbin.tl.embed(joined, **ARGUMENTS)
    scbin.tl.embed(joined, trained[1], **ARGUMENTS)
    assert np.array_equal(joined.obsm["X_scbin"], truth)


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        *(("A02", {"pooling": pooling}) for pooling in ("max", 3)),
        *(("A02", {"layer": layer}) for layer in (9, -4)),
        *(("A02", {"precision": precision}) for precision in (32, "float8")),
        *(("A02", given) for given in ({"phenotypes": "some"}, {"device": "quantum"})),
        *(("A01", {"layer": layer}) for layer in ("a", 1.0)),
        *(("A01", {name: 1}) for name in ("copy", "progress", "tokens_key", "device")),
        ("A01", {"token_budget": 2.5}),
        *(("A04", {"key_added": key}) for key in ("X_pca", "X_tokens")),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_nothing_is_written(ready, trained, untouched, code, arguments):
    check = untouched(ready)
    with pytest.raises(ScbinInputError) as caught:
        scbin.tl.embed(ready, trained[1], **{**ARGUMENTS, **arguments})
    assert caught.value.code == code
    check.check()


def test_cells_of_another_vocabulary_or_none(toy, trained, untouched):
    check = untouched(toy)
    with pytest.raises(ScbinInputError, match="V01"):
        scbin.tl.embed(toy, trained[1], **ARGUMENTS)
    check.check()
    scbin.pp.tokenize(toy, encoding="rank")
    check = untouched(toy)
    with pytest.raises(ScbinInputError, match=r"V03.*like=model"):
        scbin.tl.embed(toy, trained[1], **ARGUMENTS)
    check.check()
    toy.uns["scbin"]["vocabulary"] = Vocabulary.build("rank", ["A"]).to_json()
    with pytest.raises(ScbinInputError, match="V03"):
        scbin.tl.embed(toy, trained[1], **ARGUMENTS)
    del toy.uns["scbin"]
    with pytest.raises(ScbinInputError, match="V0"):
        scbin.tl.embed(toy, trained[1], **ARGUMENTS)
    assert check.before.obsm.keys() == toy.obsm.keys()
