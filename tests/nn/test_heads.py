"""Heads: their outputs against float64 numpy, their files against every way in which they can lie."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForMaskedLM

from scbin import Model
from scbin._errors import ScbinInputError, ScbinModelError
from scbin.nn.checkpoint import HEAD
from scbin.nn.embedding import hide_phenotypes
from scbin.nn.heads import DESIGNS, HeadPlan, Target, build_head, head_shapes
from scbin.nn.prediction import answer_cells, entropy, shares

TARGETS = (Target("cell_type", classes=("B/naive", "T cell", "x")), Target("age", "number", mean=40.0, scale=12.0))


def with_head(model, design="wide", seed=3):
    targets = (Target("tf", "gene", ("no", "yes")),) if design == "gene" else TARGETS
    plan = HeadPlan(design, targets)
    head = build_head(plan, model.config.hidden_size, len(model.vocabulary.genes), seed=seed).eval()
    if design == "wide":
        with torch.no_grad():
            head.genes.normal_(generator=torch.Generator().manual_seed(seed))
    return Model(model.bert, model.vocabulary, model.readout, {}, head=head)


def outputs(model, tokens, **how):
    hidden = hide_phenotypes(tokens, model.vocabulary)
    return answer_cells(model.bert, model.head, hidden, model.vocabulary, model.weights(), device="cpu", **how)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_head_is_saved_and_loaded_without_loss(trained, tmp_path, design):
    model = with_head(trained[1], design)
    model.save(tmp_path / "m")
    loaded = Model.load(tmp_path / "m")
    assert loaded.head.plan == model.head.plan and loaded.fingerprint == model.fingerprint
    assert not loaded.head.training and model.fingerprint != trained[1].fingerprint
    assert "cell_type (3 classes)" in repr(model) or design == "gene"


def test_plain_transformers_opens_the_directory_all_the_same(trained, tmp_path):
    with_head(trained[1]).save(tmp_path / "m")
    plain = BertForMaskedLM.from_pretrained(tmp_path / "m")
    own = trained[1].bert.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in plain.state_dict().items())


def test_a_wide_head_is_the_vector_and_the_genes_added_up(trained):
    adata, base = trained
    model = with_head(base)
    tokens = adata.obsm["X_tokens"]
    head, vocabulary = model.head, model.vocabulary
    import scbin

    copy = adata.copy()
    scbin.tl.embed(copy, base, projection=False, device="cpu", progress=False)
    z = copy.obsm["X_scbin"].astype(np.float64)
    dense = tokens.toarray()[:, vocabulary.gene_positions].astype(np.int64)
    x = vocabulary.token_values.astype(np.float64)[dense] * vocabulary.is_gene_token(dense)
    expected = z @ head.output.weight.double().detach().numpy().T + head.output.bias.double().detach().numpy()
    expected += x @ head.genes.double().detach().numpy()
    got = outputs(model, tokens)
    assert np.isnan(got[7]).all() and not np.isnan(np.delete(got, 7, 0)).any()
    np.testing.assert_allclose(np.delete(got, 7, 0), np.delete(expected, 7, 0), atol=2e-4)


@pytest.mark.parametrize("design", ["wide", "linear", "pooler", "mlp", "attention"])
def test_the_answer_for_a_cell_depends_on_no_other_cell(trained, design):
    model = with_head(trained[1], design)
    tokens = trained[0].obsm["X_tokens"]
    whole = outputs(model, tokens)
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(outputs(model, tokens[order], token_budget=60)[np.argsort(order)], whole, atol=1e-5)
    np.testing.assert_allclose(outputs(model, tokens[11:12])[0], whole[11], atol=1e-5)


def test_a_label_in_its_slot_changes_no_answer(trained):
    model = with_head(trained[1])
    tokens = trained[0].obsm["X_tokens"]
    other = tokens.copy()
    slot = model.vocabulary.phenotype("cell_type")
    other.data[other.indices == slot.position] = slot.first_id
    np.testing.assert_array_equal(outputs(model, other), outputs(model, tokens))


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda head: head.pop("output.bias"), id="missing"),
        pytest.param(lambda head: head.update(extra=torch.zeros(2)), id="extra"),
        pytest.param(lambda head: head.update({"output.bias": torch.zeros(9)}), id="shape"),
        pytest.param(lambda head: head["genes"].fill_(float("nan")), id="nan"),
    ],
)
def test_weights_that_are_not_those_described_are_refused(trained, tmp_path, monkeypatch, change):
    model = with_head(trained[1])
    tensors = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    change(tensors)
    monkeypatch.setattr("scbin.nn.checkpoint.check_finite", lambda *_: None)
    monkeypatch.setattr(type(model.head), "state_dict", lambda self: tensors)
    model.save(tmp_path / "m")
    monkeypatch.undo()
    with pytest.raises(ScbinModelError, match=r"M(12|15|33)"):
        Model.load(tmp_path / "m")


@pytest.mark.parametrize(
    "fields",
    [
        {"design": "other"},
        {"targets": []},
        {"targets": [{"name": "a", "kind": "class", "classes": []}]},
        {"targets": [{"name": "a", "kind": "class", "classes": ["x", "x"]}]},
        {"targets": [{"name": "a", "kind": "class", "classes": ["x", "y"], "temperature": -1}]},
        {"targets": [{"name": "a", "kind": "class", "classes": ["x", 3]}]},
        {"targets": [{"name": "a", "kind": "class", "classes": ["x", "y"], "code": "z"}]},
        {"dropout": 2},
        {"more": 1},
    ],
)
def test_descriptions_that_are_none_are_refused(trained, tmp_path, monkeypatch, fields):
    model = with_head(trained[1])
    plan = {**model.head.plan.to_dict(), **fields}
    monkeypatch.setattr(HeadPlan, "to_dict", lambda self: plan)
    model.save(tmp_path / "m")
    monkeypatch.undo()
    with pytest.raises(ScbinModelError):
        Model.load(tmp_path / "m")


def test_a_head_without_its_description_and_the_reverse(trained, tmp_path):
    model = with_head(trained[1])
    model.save(tmp_path / "m")
    (tmp_path / "m" / HEAD).unlink()
    with pytest.raises(ScbinModelError):
        Model.load(tmp_path / "m")
    trained[1].save(tmp_path / "bare")
    model.save(tmp_path / "whole")
    (tmp_path / "bare" / HEAD).write_bytes((tmp_path / "whole" / HEAD).read_bytes())
    with pytest.raises(ScbinModelError):
        Model.load(tmp_path / "bare")


def test_shapes_are_those_of_the_file(trained, tmp_path):
    model = with_head(trained[1])
    model.save(tmp_path / "m")
    found = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "m" / HEAD).items()}
    plan = HeadPlan.from_dict(json.loads((tmp_path / "m" / "scbin.json").read_text())["head"])
    assert found == head_shapes(plan, 32, 40)


# ---- small things ---------------------------------------------------------------------------------------------------


def test_parts_of_the_outputs_are_found_by_name():
    plan = HeadPlan("wide", TARGETS)
    assert plan.part("cell_type") == slice(0, 3) and plan.part("age") == slice(3, 4) and plan.n_outputs == 4
    with pytest.raises(ScbinInputError, match="F03"):
        plan.part("sex")


def test_shares_and_entropy():
    p = shares(np.array([[0.0, 0.0], [50.0, -50.0]]))
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_allclose(entropy(p), [1, 0], atol=1e-6)
    assert shares(np.array([[2.0, 0.0]]), 2.0)[0, 0] == pytest.approx(1 / (1 + np.exp(-1)))
