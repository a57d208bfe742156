"""`tl.finetune`: what is learned, from which cells, and what is kept."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

import scbin
from scbin._adata import read_tokens
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTypeError
from scbin.nn.run import embed
from scbin.tl._labels import MaskedPhenotypes
from scbin.tl._probe import log_expression
from scbin.train.settings import Training

module = sys.modules["scbin.tl._finetune"]
HOW = {"device": "cpu", "progress": False}
PROBE = {**HOW, "max_steps": 0}  # the linear probe alone
TRAIN = {**HOW, "training": Training(epochs=1, cells_per_step=32)}


@pytest.fixture
def ready(cells, trained):
    """Cells with every slot filled, tokenized for the model."""
    scbin.pp.tokenize(cells, like=trained[1])
    cells.obs["age"] = np.where(cells.obs["cell_type"] == "B cell", 60.0, 30.0) + np.arange(60) % 3
    cells.obs["donor_id"] = pd.Categorical([f"d{i}" for i in np.arange(60) // 10])
    cells.var["tf"] = pd.Categorical(np.where(np.arange(40) < 20, "yes", "no"))
    return cells


def report(adata):
    return json.loads(adata.uns["scbin"]["finetune"])


# ---- what is written ------------------------------------------------------------------------------------------------


def test_its_slots_are_written_and_the_model_stays_as_it_was(ready, trained, untouched):
    then = untouched(ready)
    before = {name: tensor.clone() for name, tensor in trained[1].network.state_dict().items()}
    fingerprint = trained[1].fingerprint
    model = scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="donor_id", **TRAIN)
    then.check(obs={"scbin_split"}, uns={"finetune", "finetune_history", "model_id", "model_path"})
    assert trained[1].fingerprint == fingerprint and trained[1].network.labels is None
    assert all(torch.equal(before[name], tensor) for name, tensor in trained[1].network.state_dict().items())
    assert model.network.labels.targets[0].classes == ("B cell", "T cell", "monocyte")
    split = ready.obs["scbin_split"]
    assert list(split.cat.categories) == ["train", "validation", "test"] and not (split == "test").any()
    by_donor = pd.crosstab(ready.obs["donor_id"], split)
    assert ((by_donor > 0).sum(axis=1) == 1).all() and (split == "validation").any()
    found = report(ready)
    assert found["targets"] == {"cell_type": "class"} and found["split_key"] == "donor_id"
    assert list(found["held_out_loss"]) == ["without network", "linear probe", "fine-tuned"]


@pytest.mark.parametrize("small", [True, False], ids=["two classes held out", "half of the cells"])
def test_cells_are_held_out_where_donors_cannot_be(ready, trained, small):
    kind = ready.obs["cell_type"].astype(str).to_numpy()
    part = (np.arange(60) < 24) & (kind != "B cell") if small else kind == "B cell"
    ready.obs["study"] = np.where(part, "a", "b")
    with pytest.warns(ScbinInputWarning, match="L03.*too few donors"):
        model = scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="study", **PROBE)
    for name in ("train", "validation"):
        assert {*kind[(ready.obs["scbin_split"] == name).to_numpy()]} == {*kind}
    scbin.tl.predict(ready, model, progress=False)
    assert (ready.obs["scbin_cell_type"].astype(str) == kind).mean() > 0.5


def test_one_line_says_what_came_out(ready, trained, capsys):
    scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="donor_id", device="cpu", max_steps=0)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 and out[0].startswith("scbin: held-out loss") and "without network" in out[0]


def test_the_history_is_that_of_the_last_model(ready, trained):
    how = {"target": "cell_type", "split_key": "donor_id"}
    scbin.tl.finetune(ready, trained[1], **how, **TRAIN)
    assert len(ready.uns["scbin"]["finetune_history"])
    scbin.tl.finetune(ready, trained[1], **how, **PROBE)
    assert not len(ready.uns["scbin"]["finetune_history"]) and "vocabulary" in ready.uns["scbin"]


def test_the_same_call_gives_the_same_model_and_goes_on_where_it_had_ended(ready, trained, tmp_path):
    how = {**TRAIN, "target": "cell_type", "split_key": "donor_id"}
    model = scbin.tl.finetune(ready, trained[1], **how)
    for _ in range(2):
        assert scbin.tl.finetune(ready, trained[1], save_dir=tmp_path, **how).fingerprint == model.fingerprint
    assert scbin.Model.load(tmp_path / "model").fingerprint == model.fingerprint


# ---- the probe ------------------------------------------------------------------------------------------------------


def test_the_probe_is_the_mean_of_logistic_regressions_of_scikit_learn(ready, trained):
    model = scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="donor_id", class_weights=None, **PROBE)
    found = report(ready)["probe"]["cell_type"]
    tokens, train = MaskedPhenotypes(read_tokens(ready)), (ready.obs["scbin_split"] == "train").to_numpy()
    z, x = embed(model.network, tokens, device="cpu"), log_expression(tokens, np.arange(60)).toarray()
    z, x = (z - z[train].mean(0)) / z[train].std(0), np.minimum(x / x[train].std(0), 10)
    known = ready.obs["scbin_split"].notna().to_numpy()
    labels, logs = ready.obs["cell_type"].astype(str).to_numpy()[known], []
    for (weight, genes), strength in zip(found["reads"], found["strengths"], strict=True):
        features = np.hstack([z * weight] * (weight > 0) + [x] * genes)[known]
        theirs = LogisticRegression(C=strength, max_iter=2000, tol=1e-6).fit(features, labels)
        logs.append(theirs.predict_log_proba(features))
    assert found["reads"] in ([[0, True]], [[0, True], [3, True], [1, False]])
    scbin.tl.predict(ready, model, **HOW)
    ours = ready.obsm["scbin_cell_type_probability"][known] ** float(model.network.labels.temperature[0])
    np.testing.assert_allclose(ours / ours.sum(1, keepdims=True), softmax(np.mean(logs, axis=0), axis=1), atol=0.01)


def test_numbers_and_several_targets(ready, trained):
    model = scbin.tl.finetune(
        ready, trained[1], target=["cell_type", "age"], kind={"age": "number"}, split_key="donor_id", **TRAIN
    )
    scbin.tl.predict(ready, model, **HOW)
    assert np.corrcoef(ready.obs["scbin_age"], ready.obs["age"])[0, 1] > 0.8
    assert (ready.obs["scbin_cell_type"] == ready.obs["cell_type"]).mean() > 0.9
    assert report(ready)["targets"] == {"cell_type": "class", "age": "number"}


def test_columns_of_a_matrix_are_numbers_that_share_its_weight(ready, trained):
    high = (ready.obs["cell_type"] == "B cell").to_numpy(dtype=float)
    values = np.column_stack([high, 1 - high]) + np.random.default_rng(0).normal(0, 0.1, (60, 2))
    ready.obsm["protein"] = pd.DataFrame(values, columns=["CD3", "CD19"], index=ready.obs_names)
    ready.obsm["X.two"] = values[:, ::-1]
    how = {"target": ["protein", "X.two"], "kind": "number", "split_key": "donor_id"}
    model = scbin.tl.finetune(ready, trained[1], **how, **PROBE)
    targets = [target.name for target in model.network.labels.targets]
    assert targets == ["protein.CD3", "protein.CD19", "X.two.0", "X.two.1"]
    scbin.tl.predict(ready, model, **HOW)
    assert np.corrcoef(ready.obs["scbin_protein.CD3"], high)[0, 1] > 0.9
    np.testing.assert_allclose(ready.obs["scbin_protein.CD3"], ready.obs["scbin_X.two.1"], atol=1e-5)
    with pytest.warns(ScbinInputWarning, match="L04"):
        table = scbin.tl.evaluate(ready, model, target="protein.CD19", split_key="donor_id", **HOW)
    assert table.loc["scbin", "r2"] > table.loc["mean", "r2"]
    with pytest.raises(ScbinInputError, match="A06.*'protein'"):
        scbin.tl.finetune(ready, trained[1], target="protein", **PROBE)


def test_training_is_kept_only_where_held_out_cells_say_so(ready, trained):
    how = {"target": "cell_type", "split_key": "donor_id"}
    probe = scbin.tl.finetune(ready, trained[1], **how, **PROBE)
    model = scbin.tl.finetune(ready, trained[1], training=Training(epochs=1, learning_rate=1e-9), **HOW, **how)
    assert report(ready)["kept"] == "linear probe" and model.fingerprint == probe.fingerprint
    state = {name: tensor for name, tensor in model.network.state_dict().items() if name.startswith("backbone")}
    assert all(torch.equal(trained[1].network.state_dict()[name], tensor) for name, tensor in state.items())


def test_frozen_layers_stay_and_are_free_afterwards(ready, quick):
    bert = scbin.tl.pretrain(ready, backbone="bert", **quick)
    how = {**HOW, "target": "cell_type", "split_key": "donor_id"}
    fast, seen = Training(epochs=1, learning_rate=1e-2, patience=None), []
    weights = lambda: {n: p.detach().clone() for n, p in bert.network.backbone.named_parameters() if ".layer." in n}
    before = weights()
    spy = lambda network: seen.append({n: p.requires_grad for n, p in network.backbone.named_parameters()})
    with pytest.MonkeyPatch.context() as patch:
        real = module.train
        patch.setattr(module, "train", lambda network, *a, **k: (spy(network), real(network, *a, **k))[1])
        model = scbin.tl.finetune(ready, bert, freeze=1, training=fast, **how)
    assert all(needs == (".layer.0." not in name) for name, needs in seen[0].items())
    assert all(p.requires_grad for p in model.network.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in weights().items())


def test_genes(ready, trained):
    model = scbin.tl.finetune(ready, trained[1], target="tf", level="gene", **TRAIN)
    scbin.tl.predict(ready, model, **HOW)
    assert list(ready.var["scbin_tf"].cat.categories) == ["no", "yes"]
    assert ready.varm["scbin_tf_probability"].shape == (40, 2) and "scbin_tf" not in ready.obs
    assert (ready.var["scbin_tf"] == ready.var["tf"]).mean() > 0.6
    classes = {"a": list(ready.var_names[:12]), "b": [*ready.var_names[12:30], "not a gene"]}
    model = scbin.tl.finetune(ready, trained[1], target=classes, level="gene", **PROBE)
    assert model.network.labels.targets[0].name == "gene_class"
    with pytest.raises(ScbinInputError, match="L01.*two of them"):
        scbin.tl.finetune(ready, trained[1], target={"a": ["GENE1"], "b": ["GENE1"]}, level="gene", **PROBE)


def test_a_new_network_starts_from_the_data(ready):
    del ready.uns["scbin"]["tokenize"]
    ready.uns["scbin"].pop("model_id", None)
    model = scbin.tl.finetune(ready, target="cell_type", split_key="donor_id", **PROBE)
    again = scbin.tl.finetune(ready, "new", target="cell_type", split_key="donor_id", **PROBE)
    assert model.fingerprint == again.fingerprint
    assert scbin.tl.finetune(ready, target="age", kind="number", split_key="donor_id", **PROBE).training["finetune"]
    tokens = read_tokens(ready)
    direct = scbin.tl.finetune(tokens, "new", target="cell_type", split_key="donor_id", **PROBE)
    assert direct.fingerprint == model.fingerprint  # without an AnnData


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_the_phenotype_that_is_learned_is_masked(ready, trained):
    model = scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="donor_id", **PROBE)
    told = ready.copy()
    slot = model.vocabulary.phenotype("cell_type")
    tokens = told.obsm["X_tokens"]
    tokens.data[tokens.indices == slot.position] = slot.first_id + 1
    again = scbin.tl.finetune(told, trained[1], target="cell_type", split_key="donor_id", **PROBE)
    assert again.fingerprint == model.fingerprint
    scbin.tl.predict(ready, model, **HOW)
    scbin.tl.predict(told, model, **HOW)
    np.testing.assert_array_equal(told.obsm["scbin_cell_type_probability"], ready.obsm["scbin_cell_type_probability"])


def test_test_cells_are_never_looked_at(ready, trained):
    scbin.tl.split(ready, split_key="donor_id", test=0.3, seed=1)
    spoiled = ready.copy()
    test = (spoiled.obs["scbin_split"] == "test").to_numpy()
    labels = spoiled.obs["cell_type"].astype(str).to_numpy()
    labels[test] = "T cell"
    spoiled.obs["cell_type"] = labels
    models = [scbin.tl.finetune(adata, trained[1], target="cell_type", **PROBE) for adata in (ready, spoiled)]
    assert models[0].fingerprint == models[1].fingerprint
    assert (ready.obs["scbin_split"] == "test").to_numpy().tolist() == test.tolist()


def test_missing_labels_are_left_out(ready, trained):
    labels = ready.obs["cell_type"].astype(object)
    labels.iloc[:3] = [np.nan, "", "unknown"]
    ready.obs["cell_type"] = labels
    scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="donor_id", **PROBE)
    assert report(ready)["n_cells"] + report(ready)["n_held_out"] == 57
    scbin.tl.split(ready, split_key="donor_id", test=0.3)
    part = ready.obs["scbin_split"].astype(str)
    scbin.tl.finetune(ready, trained[1], target="cell_type", **PROBE)
    assert ready.obs["scbin_split"].astype(str).iloc[0] == part.iloc[0]  # they keep their part of a split


def test_donors_in_two_parts_are_pointed_out(ready, trained):
    with pytest.warns(ScbinInputWarning, match="L03.*split_key='donor_id'"):
        scbin.tl.finetune(ready, trained[1], target="cell_type", **PROBE)


def test_none_is_a_class_and_what_is_no_label_is_named(ready, trained):
    ready.obs["treatment"] = np.array(["none", "IFN"])[np.arange(60) % 2]
    model = scbin.tl.finetune(ready, trained[1], target="treatment", split_key="donor_id", **PROBE)
    assert model.network.labels.targets[0].classes == ("IFN", "none")
    ready.obs["treatment"] = np.array(["NA", "IFN"])[np.arange(60) % 2]
    with pytest.raises(ScbinInputError, match=r"L01.*'NA'.*not count as labels"):
        scbin.tl.finetune(ready, trained[1], target="treatment", split_key="donor_id", **PROBE)


def test_rare_classes_are_named(ready, trained):
    labels = ready.obs["cell_type"].astype(str)
    labels.iloc[5] = "NK"
    ready.obs["cell_type"] = labels.to_numpy()
    how = {**PROBE, "target": "cell_type", "split_key": "donor_id"}
    with pytest.warns(ScbinInputWarning, match=r"L02.*'NK' \(1\)"):
        model = scbin.tl.finetune(ready, trained[1], **how)
    assert "NK" in model.network.labels.targets[0].classes


def test_classes_of_held_out_cells_alone_are_learned_in_the_end(ready, trained):
    del ready.obs["donor_id"]
    ready.obs["part"] = np.where(ready.obs["cell_type"] == "monocyte", "validation", "train")
    ready.obs.loc[ready.obs_names[:6], "part"] = "validation"
    model = scbin.tl.finetune(ready, trained[1], target="cell_type", split_key="part", **PROBE)
    scbin.tl.predict(ready, model, **HOW)
    is_mono = ready.obs["cell_type"] == "monocyte"
    assert (ready.obs["scbin_cell_type"][is_mono] == "monocyte").mean() > 0.8


@pytest.mark.parametrize(
    ("code", "x", "arguments"),
    [
        ("I42", np.linspace(0, 1, 60), {"target": "x"}),
        ("I42.*60 different", pd.Categorical(np.arange(60) + np.arange(60) / 100), {"target": "x"}),
        ("L01", "one", {"target": "x"}),
        ("L01", "unknown", {"target": "x"}),
        ("L01", 3.0, {"target": "x", "kind": "number"}),
        ("A06", None, {"target": "celltype"}),
        ("A06", None, {"target": "nothing", "level": "gene"}),
        ("A02", None, {"target": []}),
        ("A02", None, {"target": "cell_type", "kind": {"age": "number"}}),
        ("A02", None, {"target": "cell_type", "freeze": 9}),
        ("A02", None, {"target": "cell_type", "class_weights": "even"}),
        ("A02", None, {"target": "cell_type", "level": "donor"}),
        ("A02", None, {"target": "cell_type", "kind": None}),
        ("A01", None, {"target": "cell_type", "lora": "yes"}),
        ("A01", None, {"target": "cell_type", "finetuning": {"validation": 0.2}}),
    ],
)
def test_what_cannot_be_learned_is_refused_and_nothing_written(ready, trained, untouched, code, x, arguments):
    if x is not None:
        ready.obs["x"] = x
    then = untouched(ready)
    with pytest.raises((ScbinInputError, ScbinTypeError), match=code):
        scbin.tl.finetune(ready, trained[1], **{"split_key": "donor_id", **PROBE, **arguments})
    then.check()
