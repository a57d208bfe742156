"""`tl.predict`: what predictions are called, and how they are read again."""

from __future__ import annotations

import copy
import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import scbin
from scbin._adata import read_tokens
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTypeError
from scbin.get import predicted_targets, read_predicted

HOW = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def tuned(trained):
    """The toy cells and a model fine-tuned on them for their type and an age."""
    adata = trained[0].copy()
    adata.obs["age"] = np.where(adata.obs["cell_type"] == "B cell", 60.0, 30.0)
    model = scbin.tl.finetune(
        adata, trained[1], target=["cell_type", "age"], kind={"age": "number"}, max_steps=0, **HOW
    )
    return adata, model


# ---- heads ----------------------------------------------------------------------------------------------------------


def test_predictions_are_written_and_survive_files(tuned, untouched, tmp_path):
    adata, model = tuned[0].copy(), tuned[1]
    then = untouched(adata)
    scbin.tl.predict(adata, model, **HOW)
    names = {"scbin_cell_type", "scbin_cell_type_probability", "scbin_age"}
    then.check(obs=names, obsm={"scbin_cell_type_probability"}, uns={"predict"})
    p = adata.obsm["scbin_cell_type_probability"]
    assert p.dtype == np.float32 and p.shape == (60, 3) and np.isnan(p[7]).all()
    np.testing.assert_allclose(np.delete(p, 7, 0).sum(1), 1, atol=1e-5)
    given = adata.obs["scbin_cell_type"]
    assert given.isna().sum() == 1 and list(given.cat.categories) == ["B cell", "T cell", "monocyte"]
    assert (given == adata.obs["cell_type"]).sum() > 50
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_series_equal(back.obs["scbin_cell_type"], given)
    record = json.loads(back.uns["scbin"]["predict"])["cell_type"]
    assert record["model"] == model.fingerprint and record["classes"] == ["B cell", "T cell", "monocyte"]


def test_columns_of_probabilities_are_those_of_their_classes(tuned):
    adata, model = tuned[0].copy(), tuned[1]
    scbin.tl.predict(adata, model, **HOW)
    whole = read_predicted(adata, "cell_type")
    del adata.uns["scbin"]["predict"]  # as joining loses it
    np.testing.assert_array_equal(read_predicted(adata, "cell_type").probability, whole.probability)
    turned, fewer = adata.copy(), adata[adata.obs["scbin_cell_type"] != "B cell"].copy()
    turned.obs["scbin_cell_type"] = turned.obs["scbin_cell_type"].cat.reorder_categories(whole.classes[::-1])
    fewer.obs["scbin_cell_type"] = fewer.obs["scbin_cell_type"].cat.remove_unused_categories()
    for cells in (turned, fewer):
        for read in (read_predicted, lambda *given: scbin.tl.roll_up(*given, {"T cell": "lymphocyte"})):
            with pytest.raises(ScbinInputError, match="A06.*uns was lost"):
                read(cells, "cell_type")


def test_no_column_that_means_something_else_is_replaced(tuned):
    adata = tuned[0].copy()
    adata.obs["status"] = adata.obs["cell_type"].astype(str)
    model = scbin.tl.finetune(adata, tuned[1], target="status", max_steps=0, **HOW)
    before = adata.obs["scbin_status"].copy()
    for verb in (scbin.tl.predict, scbin.tl.evaluate):
        with pytest.raises(ScbinInputError, match="A04.*scbin_status"):
            verb(adata, model, target="status", **HOW)
    pd.testing.assert_series_equal(adata.obs["scbin_status"], before)
    for call in (lambda: scbin.tl.split(adata, seed=-1), lambda: scbin.tl.evaluate(adata, model, seed=-1)):
        with pytest.raises(ScbinInputError, match="A02.*seed is -1"):
            call()


def test_a_saved_model_predicts_the_same_and_cells_alone_too(tuned, tmp_path):
    adata, model = tuned[0].copy(), tuned[1]
    model.save(tmp_path / "m")
    scbin.tl.predict(adata, model, **HOW)
    part = adata[20:23].copy()
    scbin.tl.predict(part, tmp_path / "m", token_budget=10, **HOW)
    np.testing.assert_allclose(
        part.obsm["scbin_cell_type_probability"], adata.obsm["scbin_cell_type_probability"][20:23], atol=1e-5
    )
    new = scbin.tl.predict(read_tokens(adata), model, **HOW)  # of tokens a new one, and nothing is written
    assert list(new.obs_names) == list(adata.obs_names)
    pd.testing.assert_series_equal(new.obs["scbin_cell_type"], adata.obs["scbin_cell_type"])


def test_labels_are_transferred_to_data_with_other_genes(tuned):
    new = tuned[0][:, ::-1].copy()[:30, 5:].copy()
    del new.obsm["X_tokens"], new.uns["scbin"]
    new.obs = new.obs[["cell_type"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScbinInputWarning)  # of genes that are not there, and of the empty cell
        scbin.pp.tokenize(new, like=tuned[1])
    scbin.tl.predict(new, tuned[1], **HOW)
    assert (new.obs["scbin_cell_type"] == new.obs["cell_type"]).mean() > 0.8


def test_a_threshold_abstains(tuned):
    adata, model = tuned[0].copy(), tuned[1]
    scbin.tl.predict(adata, model, target="cell_type", **HOW)
    middle = float(adata.obs["scbin_cell_type_probability"].median())
    scbin.tl.predict(adata, model, target="cell_type", threshold=middle, **HOW)
    p = adata.obs["scbin_cell_type_probability"]
    assert (adata.obs["scbin_cell_type"].isna() == ~(p >= middle)).all() and p.isna().sum() == 1


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("M06", {"target": "tissue"}),
        ("M06", {"target": []}),
        ("M06", {"target": [3]}),
        ("A03", {"key_added": "mine"}),
        ("A04", {"target": "age", "key_added": "sex"}),
        ("A04", {"target": "age", "key_added": "scbin_status"}),
        ("A02", {"phenotypes": "tell"}),
    ],
)
def test_what_cannot_be_predicted_is_refused_and_nothing_written(tuned, untouched, code, arguments):
    adata, model = tuned[0].copy(), tuned[1]
    then = untouched(adata)
    with pytest.raises((ScbinInputError, ScbinTypeError), match=code):
        scbin.tl.predict(adata, model, **arguments, **HOW)
    then.check()


def test_a_model_that_knows_nothing_says_how_to_teach_it(toy, quick):
    scbin.pp.tokenize(toy)
    with pytest.raises(ScbinInputError, match="M06.*finetune"):
        scbin.tl.predict(toy, scbin.tl.pretrain(toy, **quick), **HOW)


# ---- phenotypes -----------------------------------------------------------------------------------------------------


def test_phenotypes_are_read_at_their_masked_tokens(trained, quick):
    adata = trained[0].copy()
    model = scbin.tl.pretrain(adata, backbone="bert", **quick)
    scbin.tl.predict(adata, model, **HOW)
    assert set(adata.obs["scbin_sex"].cat.categories) == {"female", "male"}
    vocabulary = model.vocabulary
    tokens = adata.obsm["X_tokens"].toarray()[0].astype(np.int64)
    positions = np.flatnonzero(tokens)
    ids = tokens[positions]
    for phenotype in vocabulary.phenotypes:
        ids[positions == phenotype.position] = vocabulary.mask_id
    plain = copy.deepcopy(model.network.backbone.bert)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        logits = plain(torch.tensor(ids)[None], position_ids=torch.tensor(positions)[None]).logits[0]
    sex = vocabulary.phenotype("sex")
    own = logits[positions == sex.position, sex.first_id : sex.stop_id].double().softmax(1)[0]
    np.testing.assert_allclose(adata.obsm["scbin_sex_probability"][0], own, atol=1e-5)


def test_what_is_shown_matters_only_where_it_is_shown(trained):
    adata, model = trained[0].copy(), trained[1]
    other = adata.copy()
    slot = model.vocabulary.phenotype("cell_type")
    tokens = other.obsm["X_tokens"]
    tokens.data[tokens.indices == slot.position] = slot.first_id

    def both(**how):
        results = []
        for each in (adata, other):
            how = {"target": ["sex", "cell_type"], **how}
            written = scbin.tl.predict(each, model, copy=True, **how, **HOW)
            results.append(np.delete(written.obsm["scbin_sex_probability"], 7, 0))
        return results

    np.testing.assert_array_equal(*both())
    np.testing.assert_array_equal(*both(phenotypes="show"))
    assert not np.array_equal(*both(phenotypes="show", target="sex"))


# ---- names of slots -------------------------------------------------------------------------------------------------


def test_predictions_under_another_name_are_found_again(tuned):
    adata, plain, model = tuned[0].copy(), tuned[0].copy(), tuned[1]
    scbin.tl.predict(adata, model, target="cell_type", key_added="mine", **HOW)
    scbin.tl.predict(plain, model, target="cell_type", **HOW)
    assert predicted_targets(adata) == ["mine"]
    np.testing.assert_array_equal(
        read_predicted(adata, "mine").probability, read_predicted(plain, "cell_type").probability
    )
    with pytest.raises(ScbinInputError, match=r"A06.*'cell_type' was not predicted for these cells.*so far: 'mine'"):
        read_predicted(adata, "cell_type")
    del plain.obs["scbin_cell_type"]
    assert predicted_targets(plain) == []
    scbin.tl.predict(adata, model, target="age", key_added="years", **HOW)
    record = json.loads(adata.uns["scbin"]["predict"])["years"]
    assert record["column"] == "years" and record["asked"] == "age" and record["kind"] == "number"


def test_types_of_columns_do_not_matter(tuned):
    adata, model = tuned[0].copy(), tuned[1]
    scbin.tl.predict(adata, model, **HOW)
    other = adata.copy()
    unrecorded = adata.copy()
    other.obs = other.obs.astype(object)
    del unrecorded.uns["scbin"]["predict"]
    for name in ("cell_type", "age"):
        expected = read_predicted(adata, name)
        for each in (other, unrecorded):
            found = read_predicted(each, name)
            assert found.kind == expected.kind
            np.testing.assert_allclose(found.truth, expected.truth)
            np.testing.assert_allclose(found.predicted, expected.predicted)
