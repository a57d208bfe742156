"""The model as users hold it: saved and loaded without loss, shown without surprise."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scbin import Model, Vocabulary, _keys
from scbin import model as module
from scbin._errors import ScbinInputError, ScbinModelError, ScbinTypeError
from scbin.model import remember, resolve_model
from scbin.nn.network import build_network
from scbin.nn.presets import Network


def make(seed=0, **fields):
    vocabulary = Vocabulary.build("rank", ["A", "B"], phenotypes={"<b>x|y</b>": ["<script>alert(1)</script>"]})
    network = build_network(vocabulary, Network(1, 8, 16, 2), "bert", seed=seed, vector_options={"size": 3, "width": 4})
    return Model(network, vocabulary, **fields)


@pytest.fixture
def model():
    return make(training={"steps": 3, "n_cells": 1200})


def test_copies_are_equal_and_independent(model):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.fingerprint == model.fingerprint and repr(other) == repr(model)
        with torch.no_grad():
            next(other.network.backbone.parameters()).add_(1)
        assert other.fingerprint != model.fingerprint


def test_the_fingerprint_is_of_vocabulary_configuration_and_weights(model):
    assert make().fingerprint == model.fingerprint != make(seed=1).fingerprint
    before = model.fingerprint
    for tensor in (model.network.backbone.bert.cls.predictions.bias, model.network.counts.scale):
        with torch.no_grad():
            tensor[0] += 1
            assert model.fingerprint != before
            tensor[0] -= 1
    assert model.fingerprint == before
    model.network.vector.options["layer"] = 0
    assert model.fingerprint != before
    vocabulary = Vocabulary.build("rank", ["A", "C"], phenotypes={"<b>x|y</b>": ["<script>alert(1)</script>"]})
    assert Model(make().network, vocabulary).fingerprint != before


def test_parameters_are_counted_once(model):
    own = {id(parameter): parameter.numel() for parameter in model.network.parameters()}
    assert model.n_parameters == sum(own.values())


def test_what_it_says_of_itself(model):
    history = pd.DataFrame({"step": [0, 3], "validation_cell_type": [2.0, 1.5], "validation_sex": [np.nan, np.nan]})
    model = Model(model.network, model.vocabulary, model.training, history)
    lines = repr(model).splitlines()
    assert lines[0] == "scbin Model"
    facts = {name: text.strip() for name, text in (line.strip().split("  ", 1) for line in lines[1:])}
    assert facts["encoding"] == "rank, 2 genes"
    assert facts["network"].startswith("bert, 1 layers, hidden size 8, ")
    assert facts["cell vector"] == "3 numbers, latent, layer -1"
    assert facts["trained"] == "on 1,200 cells, 3 steps"
    assert facts["held-out loss, cell type"] == "2.000 at first, 1.500 at last"
    assert "held-out loss, sex" not in facts and repr(make()).endswith(" not at all")


def test_names_from_the_data_are_escaped(model, tmp_path):
    model.save(str(tmp_path / "model"))
    assert "x/y" in (tmp_path / "model" / "README.md").read_text()  # a bar would end the cell of the table
    assert repr(Model.load(str(tmp_path / "model"))) == repr(model)
    assert len(Model.load(tmp_path / "model").history) == 0


def test_what_json_cannot_hold_is_made_plain_at_once(tmp_path):
    training = {"steps": np.int64(3), "rate": np.float32(0.5), "betas": (0.9, 0.99), "at": Path("x"), "w": np.ones(2)}
    model = make(training=training)
    assert model.training == {"steps": 3, "rate": 0.5, "betas": [0.9, 0.99], "at": "x", "w": [1.0, 1.0]}
    assert json.loads(json.dumps(model.training)) == model.training
    assert make(training={"loss": float("nan"), "all": [np.float32("inf"), 1.0]}).training == {
        "loss": None,
        "all": [None, 1.0],
    }
    model.save(tmp_path / "model")
    assert Model.load(tmp_path / "model").training == model.training


def test_a_long_history_is_thinned_so_that_it_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("scbin.io.directory.MOST_ROWS", 3_000)
    history = pd.DataFrame(np.random.default_rng(0).normal(size=(9_000, 20)))
    history.columns = ["step", "loss", "validation_genes", *(f"loss_{i}" for i in range(17))]
    history["step"] = np.arange(9_000)
    validated = np.arange(9_000) % 997 == 996
    history.loc[~validated, "validation_genes"] = np.nan
    make(history=history).save(tmp_path / "model")
    kept = Model.load(tmp_path / "model").history
    assert 2990 < len(kept) < 3020 and kept["step"].diff().max() <= 4
    assert (kept["step"].iloc[0], kept["step"].iloc[-1]) == (0, 8_999)
    assert set(kept["step"][kept["validation_genes"].notna()]) == set(np.flatnonzero(validated))
    own = history.iloc[kept["step"].astype(int)].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, own, check_dtype=False)


def test_which_model_a_verb_means(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_session", {})
    adata = ad.AnnData(np.ones((2, 2)))
    assert resolve_model(model, adata) is model
    model.save(tmp_path / "model")
    assert resolve_model(tmp_path / "model", adata).fingerprint == model.fingerprint
    with pytest.raises(ScbinTypeError, match="A01"):
        resolve_model(3, adata)
    for container in (adata, None):
        with pytest.raises(ScbinInputError, match="M01"):
            resolve_model(None, container)
    with pytest.raises(ScbinModelError, match=r"M01.*revision"):
        resolve_model("owner/name-of-a-model-that-is-not-there", adata)
    adata.uns[_keys.UNS] = {_keys.MODEL_ID: model.fingerprint, _keys.MODEL_PATH: str(tmp_path / "model")}
    assert resolve_model(None, adata).fingerprint == model.fingerprint
    remember(model.fingerprint, model)
    assert resolve_model(None, adata) is model
    for k in range(4):  # the last four are kept
        remember(str(k), model)
    assert resolve_model(None, adata) is not model
    make(seed=1).save(tmp_path / "model", overwrite=True)
    with pytest.raises(ScbinInputError, match=r"M01.*another model"):
        resolve_model(None, adata)
