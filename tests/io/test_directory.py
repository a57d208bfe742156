"""Model directories: plain transformers opens ours, and ours opens no other than whole and sound ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.sparse import csr_matrix
from transformers import BertForMaskedLM

from scbin import Model, Vocabulary
from scbin._errors import ScbinModelError
from scbin.io.directory import JSONS, PARTS
from scbin.io.files import MANIFEST, manifest_bytes
from scbin.nn.attention import PACKED
from scbin.nn.backbone import seeded
from scbin.nn.batches import BatchCorrection
from scbin.nn.labels import LabelHead
from scbin.nn.network import CellNetwork, build_network
from scbin.nn.packs import pack_rows
from scbin.nn.presets import Network
from scbin.tokens.bins import Bins

CONFIG, WEIGHTS, NETWORK, OTHERS = "config.json", "model.safetensors", "network.json", "parts.safetensors"
FILES = (CONFIG, WEIGHTS, OTHERS, *JSONS)
SHAPE = Network(2, 16, 32, 2, hidden_dropout_prob=0.0)
WORDS, QUERY = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"


def make_network(vocabulary, kind="bert"):
    network = build_network(vocabulary, SHAPE, kind, batches=["a", "b"], vector_options={"size": 8, "width": 16})
    targets = [{"name": "type", "classes": ["B cell", "T cell"]}, {"name": "age", "kind": "number", "mean": 40.0}]
    with seeded(2):
        network.labels = LabelHead(vocabulary, 8, targets, hidden="tanh")
    network.batches = BatchCorrection(3, 8, ["a", "b"])
    return network


@pytest.fixture(scope="module")
def model():
    """A BERT with a count head and labels, and what training leaves; not to be changed."""
    genes = [f"GENE{k}" for k in range(12)]
    vocabulary = Vocabulary.build("bins", genes, phenotypes={"sex": ["female", "male"]}, bins=Bins.linear(5))
    history = pd.DataFrame({"step": [1, 2, 3], "loss": [2.5, 1 / 3, 0.2], "validation_genes": [np.nan, np.nan, 1.0]})
    return Model(make_network(vocabulary), vocabulary, {"steps": 3, "deep": {"list": [[1], [2]]}}, history)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "sound"
    model.save(path)
    return path


@pytest.fixture
def model_dir(saved, tmp_path):
    """A copy of a sound model, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "model")


def seal(path):
    """Write a manifest that agrees with the files, as someone would who means harm."""
    found = {
        file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.name not in (MANIFEST, "README.md")
    }
    entries = {name: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in found.items()}
    (path / MANIFEST).write_bytes(manifest_bytes(entries))


def edit_json(path, name, change):
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))
    seal(path)


def edit_tensors(path, change, name=WEIGHTS):
    tensors = load_file(path / name)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / name)
    seal(path)


def refuse(path, *codes):
    with pytest.raises(ScbinModelError) as caught:
        Model.load(path)
    assert caught.value.code in codes, str(caught.value)
    assert len(str(caught.value)) < 800
    return str(caught.value)


def test_plain_transformers_opens_it_and_gives_the_same_logits(model, saved):
    plain = BertForMaskedLM.from_pretrained(saved).eval()
    assert plain.config._attn_implementation != PACKED
    rng = np.random.default_rng(0)
    rows = csr_matrix(rng.integers(1, model.vocabulary.n_tokens, (4, 15)) * (rng.random((4, 15)) < 0.6))
    longest = int(np.diff(rows.indptr).max())
    ids, positions = torch.zeros(2, 4, longest, dtype=torch.int64)
    for k in range(4):
        row = rows[k]
        ids[k, : row.nnz], positions[k, : row.nnz] = torch.tensor(row.data), torch.tensor(row.indices)
    with torch.no_grad():
        padded = plain(input_ids=ids, position_ids=positions, attention_mask=(ids > 0).long()).logits
        for own in (model, Model.load(saved)):
            backbone = own.network.backbone
            packed = backbone.logits(backbone.encode(pack_rows(rows, np.arange(4))))
            assert (packed - padded[ids > 0]).abs().max() < 1e-5


def test_what_is_loaded_is_whole_and_can_be_trained(model, saved):
    loaded = Model.load(saved)
    network, bert = loaded.network, loaded.network.backbone.bert
    assert loaded.fingerprint == model.fingerprint and loaded.vocabulary == model.vocabulary
    assert loaded.training == model.training and loaded.config == model.config
    pd.testing.assert_frame_equal(loaded.history, model.history)
    assert bert.config._attn_implementation == PACKED and not network.training
    assert not any(tensor.is_meta for tensor in [*network.parameters(), *network.buffers()])
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert bert.cls.predictions.decoder.weight is bert.bert.embeddings.word_embeddings.weight
    assert bert.cls.predictions.decoder.bias is bert.cls.predictions.bias
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])


def test_the_same_model_is_the_same_bytes(saved, tmp_path):
    before = torch.random.get_rng_state()
    Model.load(saved).save(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in (*FILES, MANIFEST, "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("kind", ["bert", "mlp"])
def test_every_kind_of_backbone_is_kept(model, kind, tmp_path):
    other = Model(make_network(model.vocabulary, kind), model.vocabulary)
    other.save(tmp_path / kind)
    loaded = Model.load(tmp_path / kind)
    assert loaded.fingerprint == other.fingerprint and loaded.config["backbone"]["kind"] == kind
    assert type(loaded.network.backbone) is PARTS["backbone"][kind]


def test_a_part_of_an_unknown_kind_is_not_written(model, tmp_path):
    network = CellNetwork(model.network.backbone, torch.nn.Linear(2, 2))
    with pytest.raises(ScbinModelError, match=r"M05.*Linear"):
        Model(network, model.vocabulary).save(tmp_path / "model")


def test_half_precision_is_widened(model_dir):
    edit_tensors(model_dir, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    assert {parameter.dtype for parameter in Model.load(model_dir).network.parameters()} == {torch.float32}


def test_a_path_that_is_no_model(tmp_path):
    refuse(tmp_path / "nowhere", "M01")
    (tmp_path / "empty").mkdir()
    assert "from_geneformer" in refuse(tmp_path / "empty", "M01")
    (tmp_path / "empty" / "pytorch_model.bin").touch()
    assert "save_pretrained" in refuse(tmp_path / "empty", "M01")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damaged_files(saved, tmp_path, name):
    good = (saved / name).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    for k, bad in enumerate([b"", good[: len(good) // 2], bytes(flipped)]):
        path = shutil.copytree(saved, tmp_path / str(k))
        (path / name).write_bytes(bad)
        assert name in refuse(path, "M02")
    (path / name).unlink()
    assert (name if name in (WEIGHTS, *JSONS) else MANIFEST) in refuse(path, "M01", "M02")
    (path / name).symlink_to(saved / name)
    assert name in refuse(path, "M03")


@pytest.mark.parametrize(
    "add",
    [
        lambda path: (path / "modeling_bert.py").write_text("raise SystemExit"),
        lambda path: (path / "README.md").unlink() or os.mkfifo(path / "README.md"),
        lambda path: os.truncate(path / NETWORK, 64 * 2**20 + 1),  # sparse: it takes no room
    ],
    ids=["code", "pipe", "too large"],
)
def test_foreign_files(model_dir, add):
    add(model_dir)
    refuse(model_dir, "M03")


def test_the_model_card_is_for_people_to_edit(model_dir, model):
    assert "library_name: scbin" in (model_dir / "README.md").read_text()
    (model_dir / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    (model_dir / "README.md").write_text("# Mine")
    assert Model.load(model_dir).fingerprint == model.fingerprint
    (model_dir / "README.md").unlink()
    assert Model.load(model_dir).fingerprint == model.fingerprint


def test_a_download_of_the_hub_may_be_links_into_its_own_store(saved, model, tmp_path):
    """`huggingface_hub` keeps files by hash, and folders of links to them; a link anywhere else is refused there too."""
    folder = tmp_path / "models--me--mine"
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc"
    shutil.copytree(saved, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert Model.load(snapshot).fingerprint == model.fingerprint
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(saved / CONFIG)
    refuse(snapshot, "M03")


@pytest.mark.parametrize(
    "change",
    [
        lambda files, secret: files.update({"../secret": secret}),
        lambda files, secret: files.pop(OTHERS),
        lambda files, secret: files[CONFIG].update(size="much"),
    ],
    ids=["elsewhere", "left out", "text for size"],
)
def test_a_manifest_names_the_files_of_the_model_and_no_other(model_dir, change, tmp_path):
    (tmp_path / "secret").write_text("secret")
    entries = json.loads(json.loads((model_dir / MANIFEST).read_bytes())["manifest"])["files"]
    change(entries, {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()})
    (model_dir / MANIFEST).write_bytes(manifest_bytes(entries))
    refuse(model_dir, "M02")


@pytest.mark.parametrize(
    "inner",
    ['1, "x": 1', "NaN", "1e999", "9" * 5000, "[" * 200_000 + "]" * 200_000],
    ids=["duplicate", "nan", "1e999", "digits", "brackets"],
)
def test_json_that_is_none(model_dir, inner):
    for name in (CONFIG, *JSONS):
        text = (model_dir / name).read_text()
        (model_dir / name).write_text(text.replace("{", f'{{"x": {inner}, ', 1))
        seal(model_dir)
        assert name in refuse(model_dir, "M02")
        (model_dir / name).write_text(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("vocab_size", value) for value in (10**8, True, "60", 60.0)),
        *(("num_hidden_layers", 20_000), ("hidden_size", -8), ("num_attention_heads", 5), ("pad_token_id", 10**5)),
        *(("hidden_act", ["gelu"]), ("intermediate_size", 32 * 9), ("layer_norm_eps", 0), ("tie_word_embeddings", 1)),
    ],
)
def test_numbers_out_of_range(model_dir, key, value):
    edit_json(model_dir, CONFIG, lambda content: content.update({key: value}))
    assert key in refuse(model_dir, "M03")
    edit_json(model_dir, CONFIG, lambda content: content.pop("hidden_size"))
    refuse(model_dir, "M02", "M03")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (CONFIG, {"hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 65_536}),
        (CONFIG, {"num_hidden_layers": 96, "hidden_size": 1024, "intermediate_size": 8192}),
        (CONFIG, {"max_position_embeddings": 65_536, "hidden_size": 8192, "intermediate_size": 16}),
        (NETWORK, {"counts": {"n_genes": 10**7, "size": 10**4}}),
        (NETWORK, {"labels": {"vector_size": 60_000}}),
    ],
    ids=["width", "layers", "positions", "counts", "labels"],
)
def test_a_small_file_that_asks_for_gigabytes_gets_none(model_dir, name, changes):
    if name == NETWORK:
        edit_json(model_dir, name, lambda about: [about["parts"][k]["config"].update(v) for k, v in changes.items()])
    else:
        edit_json(model_dir, name, lambda content: content.update(changes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(model_dir, "M03", "M02")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kilobytes


def test_whatever_else_the_configuration_says_has_no_effect(model_dir, model):
    names = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    harm = {"auto_map": {"AutoModel": "modeling.Evil"}, "trust_remote_code": True, "is_decoder": True}
    edit_json(model_dir, CONFIG, lambda content: content.update(dict.fromkeys(names, "org/repo") | harm))
    loaded = Model.load(model_dir)
    assert loaded.fingerprint == model.fingerprint
    config = loaded.network.backbone.bert.config
    assert config._attn_implementation == PACKED and not config.is_decoder and not hasattr(config, "auto_map")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (WEIGHTS, lambda t: t.update(other=t.pop(QUERY))),
        (WEIGHTS, lambda t: t.clear()),
        (WEIGHTS, lambda t: t.update({WORDS: t[WORDS].T})),
        (WEIGHTS, lambda t: t.update({"cls.predictions.decoder.weight": t[WORDS].clone()})),
        (WEIGHTS, lambda t: t.update({QUERY: t[QUERY].to(torch.int64)})),
        (WEIGHTS, lambda t: t[WORDS].view(-1)[-1:].fill_(float("inf"))),
        (OTHERS, lambda t: t.update({"scale": t.pop("counts.scale")})),
        (OTHERS, lambda t: t.update({"counts.scale": t["counts.scale"].double()})),
        (OTHERS, lambda t: t["counts.scale"].fill_(float("nan"))),
    ],
    ids=["renamed", "none", "transposed", "tied twice", "int64", "inf", "without place", "float64", "nan"],
)
def test_tensors_that_are_not_those_described(model_dir, name, change):
    edit_tensors(model_dir, change, name)
    assert name in refuse(model_dir, "M02", "M03")


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.update(format=3),
        lambda about: about.update(secret=1),
        lambda about: about["parts"].pop("vector"),
        lambda about: about["parts"].update(extra=about["parts"]["vector"]),
        lambda about: about["parts"]["vector"].update(kind="counts"),
        lambda about: about["parts"]["vector"]["config"].update(layer=99),
        lambda about: about["parts"]["vector"]["config"].update(hidden_size=17),
        lambda about: about["parts"]["backbone"].update(kind="mlp"),
        lambda about: about["parts"]["labels"]["config"]["targets"][0]["classes"].append("more"),
    ],
    ids=["format", "key", "no vector", "place", "kind", "layer", "width", "backbone", "classes"],
)
def test_networks_that_are_not_possible(model_dir, change):
    edit_json(model_dir, NETWORK, change)
    refuse(model_dir, "M02")


def test_a_vocabulary_that_does_not_fit_the_network(model_dir, model):
    other = replace(model.vocabulary, genes=tuple(f"G{k}" for k in range(13)), gene_shares=None, max_length=99)
    (model_dir / "vocabulary.json").write_text(other.to_json())
    seal(model_dir)
    refuse(model_dir, "M04")


@pytest.fixture
def other(model):
    return Model(model.network, model.vocabulary, training={"name": "other"})


def test_what_is_there_is_replaced_only_when_asked(model_dir, model, other):
    with pytest.raises(ScbinModelError, match=r"M05.*overwrite"):
        other.save(model_dir)
    assert Model.load(model_dir).training == model.training
    other.save(model_dir, overwrite=True)
    assert Model.load(model_dir).training == {"name": "other"}
    assert [entry.name for entry in model_dir.parent.iterdir()] == ["model"]
    other.save(model_dir.parent / "new" / "place", overwrite=True)
    assert Model.load(model_dir.parent / "new" / "place").fingerprint == other.fingerprint


def test_nothing_but_a_model_is_replaced(model, model_dir, tmp_path):
    (tmp_path / "notes").mkdir()
    texts = (tmp_path / "notes" / "thesis.txt", model_dir / "thesis.txt", tmp_path / "file")
    for text in texts:
        text.write_text("three years")
    for path in (tmp_path / "notes", model_dir, tmp_path / "file"):
        with pytest.raises(ScbinModelError, match="A04"):
            model.save(path, overwrite=True)
    assert all(text.read_text() == "three years" for text in texts)
    with pytest.raises(ScbinModelError, match="M05"):
        model.save(tmp_path / "file" / "model")


def test_a_link_to_a_model_stays_one(model, model_dir, tmp_path):
    (tmp_path / "link").symlink_to(model_dir)
    model.save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and Model.load(tmp_path / "link").fingerprint == model.fingerprint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "model"]


@pytest.mark.parametrize(("call", "least"), [("fsync", 5), ("rename", 1), ("replace", 1), ("mkdir", 1)])
def test_a_failing_disk_leaves_the_old_model(model, other, model_dir, monkeypatch, call, least):
    real, n_failures = getattr(os, call), 0
    for n in (*range(1, 12), 10**6):
        left = [n]

        def failing(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, failing)
        try:
            other.save(model_dir, overwrite=True)
        except ScbinModelError as error:
            n_failures += 1
            assert error.code == "M05"
        finally:
            monkeypatch.setattr(os, call, real)
        found = Model.load(model_dir)  # the old one, or where only the last flush failed the new one
        assert found.training in (model.training, other.training)
        assert [entry.name for entry in model_dir.parent.iterdir()] == ["model"]
    assert n_failures >= least and found.training == other.training
