"""A backbone, a task and tokens of one's own go through the verbs: each is one class, and nothing in `src` knows of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import scbin
from scbin.nn.backbone import BACKBONES, Backbone, seeded
from scbin.nn.presets import Network
from scbin.tokens.tokens import Tokens
from scbin.train.settings import Training
from scbin.train.task import Task

spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("train") / "toys.py")
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)

SHAPE = Network(1, 16, 32, 2, hidden_dropout_prob=0.0)
QUIET = {"device": "cpu", "progress": False}


@pytest.fixture
def tokenized(toy):
    scbin.pp.tokenize(toy, phenotypes=["cell_type"])
    return toy


@pytest.fixture
def toy_backbone(monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", toys.MeanBackbone)
    return "toy"


def test_the_toys_are_of_their_kinds(tokenized, toy_backbone):
    tokens = scbin._adata.read_tokens(tokenized)
    assert isinstance(toys.ListTokens(tokens.matrix, tokens.vocabulary), Tokens)
    assert isinstance(toys.HideOne(tokens.vocabulary), Task)
    assert isinstance(toys.MeanBackbone(tokens.vocabulary, 8), Backbone)


def test_a_backbone_of_ones_own(tokenized, toy_backbone, tmp_path):
    model = scbin.tl.pretrain(tokenized, preset=SHAPE, backbone="toy", max_steps=5, **QUIET)
    assert model.training["backbone"] == "toy" and model.training["steps"] == 5
    assert np.isfinite(tokenized.obsm["X_scbin"]).all()
    scbin.tl.embed(tokenized, model, key_added="again", **QUIET)
    np.testing.assert_array_equal(tokenized.obsm["again"], tokenized.obsm["X_scbin"])
    scbin.tl.embed(tokenized, model, key_added="pooled", pooling="mean", layer=0, **QUIET)
    scbin.tl.embed_genes(tokenized, model, key_added="pooled_genes", **QUIET)
    assert tokenized.obsm["pooled"].shape == (60, 16) and tokenized.varm["pooled_genes"].shape == (40, 16)
    model.save(tmp_path / "model")
    assert scbin.Model.load(tmp_path / "model").fingerprint == model.fingerprint


def test_a_task_of_ones_own(tokenized):
    vocabulary = scbin._adata.read_tokens(tokenized).vocabulary
    with seeded(0):
        task = toys.HideOne(vocabulary)
    training = Training(learning_rate=0.01, cells_per_step=20, held_out=0.2)
    model = scbin.tl.pretrain(tokenized, preset=SHAPE, task=task, training=training, max_steps=40, **QUIET)
    losses = model.history["validation_token"].dropna()
    assert losses.min() < losses.iloc[0] and model.training["end"] < model.training["start"]
    assert tokenized.obsm["X_scbin"].shape == (60, model.network.vector.size)


def test_tokens_of_ones_own(tokenized):
    """The same rows from another place give the same model and the same vectors; nothing is written."""
    tokens = scbin._adata.read_tokens(tokenized)
    elsewhere = toys.ListTokens(tokens.matrix, tokens.vocabulary)
    how = {"preset": SHAPE, "max_steps": 3, **QUIET}
    model = scbin.tl.pretrain(elsewhere, **how)
    assert model.fingerprint == scbin.tl.pretrain(tokenized, **how).fingerprint
    made = scbin.tl.embed(elsewhere, model, **QUIET)
    assert made.obs_names.tolist() == elsewhere.names.tolist()
    np.testing.assert_array_equal(made.obsm["X_scbin"], tokenized.obsm["X_scbin"])
    assert scbin.tl.pretrain(elsewhere, **how, batch_key="batch").training["batch_key"] == "batch"
    with pytest.raises(scbin.ScbinInputError, match="A06"):
        scbin.tl.pretrain(elsewhere, **how, batch_key="donor")


def test_tokens_backbone_and_task_together(tokenized, toy_backbone):
    tokens = scbin._adata.read_tokens(tokenized)
    task = toys.HideOne(tokens.vocabulary)
    elsewhere = toys.ListTokens(tokens.matrix, tokens.vocabulary)
    model = scbin.tl.pretrain(elsewhere, preset=SHAPE, backbone="toy", task=task, max_steps=2, **QUIET)
    assert np.isfinite(scbin.tl.embed(elsewhere, model, **QUIET).obsm["X_scbin"]).all()
