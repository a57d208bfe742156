"""The model as users hold it: saved and loaded without loss, shown without surprise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from scbin import Model, Vocabulary
from scbin._errors import ScbinInputError
from scbin.nn.bert import build_bert
from scbin.nn.readout import Readout


@pytest.fixture(scope="module")
def loaded(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    trained[1].save(str(path))
    return Model.load(str(path))


@pytest.fixture(scope="module")
def bare():
    vocabulary = Vocabulary.build("rank", ["A", "B"], phenotypes={"<b>x|y</b>": ["<script>alert(1)</script>"]})
    return Model(build_bert(vocabulary, "tiny", hidden_size=16), vocabulary)


def test_saved_and_loaded_is_the_same(trained, loaded):
    _, model = trained
    assert loaded.fingerprint == model.fingerprint
    assert loaded.vocabulary == model.vocabulary
    assert loaded.readout == model.readout and len(model.readout.gene_weights) == 40
    assert loaded.training == model.training
    pd.testing.assert_frame_equal(loaded.history, model.history, rtol=1e-14)
    assert repr(loaded) == repr(model)


def test_the_card_says_what_it_is(trained, tmp_path):
    trained[1].save(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "library_name: scbin" in card and "| encoding | bins, 40 genes, 20 bins |" in card


def test_the_fingerprint_is_of_vocabulary_readout_and_weights(bare):
    digest = hashlib.sha256(f"{bare.vocabulary.sha256} {Readout()}".encode())
    tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    for name, tensor in bare.bert.state_dict().items():
        if name not in tied:
            digest.update(name.encode() + tensor.numpy().tobytes())
    assert bare.fingerprint == digest.hexdigest()
    other = Model(bare.bert, bare.vocabulary, Readout("cls"))
    assert other.fingerprint != bare.fingerprint
    with torch.no_grad():
        bias = bare.bert.cls.predictions.bias
        bias[0] += 1
        assert bare.fingerprint != digest.hexdigest()
        bias[0] -= 1
    assert bare.fingerprint == digest.hexdigest()


def test_parameters_are_counted_once(bare):
    assert bare.n_parameters == sum(parameter.numel() for parameter in bare.bert.parameters())


def test_what_a_trained_model_says_of_itself(trained):
    lines = repr(trained[1]).splitlines()
    assert lines[0] == "scbin Model"
    facts = dict(line.strip().split("  ", 1) for line in lines[1:])
    facts = {name: text.strip() for name, text in facts.items()}
    assert facts["encoding"] == "bins, 40 genes, 20 bins"
    assert facts["phenotypes"] == "sex (2 values), cell_type (3 values)"
    assert facts["network"].startswith("BERT, 2 layers, hidden size 32, 4 heads, ")
    assert facts["embedding"] == "32 numbers per cell, weighted pooling, layer -1"
    assert "steps 3" in facts["trained"]
    assert {"held-out loss, genes", "held-out loss, cell type", "held-out loss, sex"} <= set(facts)


def test_what_an_untrained_model_says_of_itself(bare):
    assert repr(bare).endswith(" not at all")
    without = pd.DataFrame({"step": [0], "validation_genes": [np.nan]})
    assert "held-out" not in repr(Model(bare.bert, bare.vocabulary, history=without))


def test_names_from_the_data_are_escaped(bare, tmp_path):
    html = bare._repr_html_()
    assert "&lt;b&gt;x|y&lt;/b&gt;" in html and "<b>x" not in html
    bare.save(tmp_path / "model")
    assert "x/y" in (tmp_path / "model" / "README.md").read_text()  # a bar would end the cell of the table
    assert repr(Model.load(tmp_path / "model")) == repr(bare)
    assert len(Model.load(tmp_path / "model").history) == 0


def test_what_json_cannot_hold_is_made_plain_at_once(bare, tmp_path):
    training = {"steps": np.int64(3), "rate": np.float32(0.5), "betas": (0.9, 0.99), "at": Path("x"), "w": np.ones(2)}
    model = Model(bare.bert, bare.vocabulary, training=training)
    assert model.training == {"steps": 3, "rate": 0.5, "betas": [0.9, 0.99], "at": "x", "w": [1.0, 1.0]}
    assert json.loads(json.dumps(model.training)) == model.training
    model.save(tmp_path / "model")
    assert Model.load(tmp_path / "model").training == model.training
    model = Model(bare.bert, bare.vocabulary, training={"loss": float("nan"), "all": [np.float32("inf"), 1.0]})
    assert model.training == {"loss": None, "all": [None, 1.0]}
    model.save(tmp_path / "model", overwrite=True)
    assert Model.load(tmp_path / "model").training == model.training
    with pytest.raises(ScbinInputError, match="M19"):
        Model(bare.bert, bare.vocabulary, training={"f": object()})


@pytest.mark.parametrize(("n_columns", "most"), [(3, 20_000), (400, 2_500)])
def test_a_long_history_is_thinned_so_that_it_can_be_read_again(bare, tmp_path, n_columns, most):
    rows = 3 * most
    history = pd.DataFrame(np.random.default_rng(0).normal(size=(rows, n_columns)))
    history.columns = ["step", "loss", "validation_genes", *(f"loss_{i}" for i in range(n_columns - 3))]
    history["step"] = np.arange(rows)
    validated = np.arange(rows) % 997 == 996
    history.loc[~validated, "validation_genes"] = np.nan
    model = Model(bare.bert, bare.vocabulary, history=history)
    model.save(tmp_path / "model")
    assert (tmp_path / "model" / "scbin.json").stat().st_size < 40 * 2**20
    kept = Model.load(tmp_path / "model").history
    assert most // 2 < len(kept) <= most and len(model.history) == rows
    assert kept["step"].iloc[0] == 0 and kept["step"].iloc[-1] == rows - 1
    assert kept["step"].diff().max() <= 4
    assert set(kept["step"][kept["validation_genes"].notna()]) == set(np.flatnonzero(validated))
    pd.testing.assert_frame_equal(
        kept, history.iloc[kept["step"].astype(int)].reset_index(drop=True), check_dtype=False
    )
