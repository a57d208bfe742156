"""Model directories: plain transformers opens ours, and ours opens no other than whole and sound ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from scbin import Model
from scbin._errors import ScbinModelError, ScbinTrainingError
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn import files
from scbin.nn.attention import PACKED
from scbin.nn.bert import encode_pack, logits_at
from scbin.nn.checkpoint import read_model_directory
from scbin.nn.files import MANIFEST, manifest_bytes
from scbin.nn.untrusted import make_config

FILES = ("config.json", "model.safetensors", "scbin.json")


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "sound"
    trained[1].save(path)
    return path


@pytest.fixture
def model_dir(saved, tmp_path):
    """A copy of a sound model, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "model")


def seal(path):
    """Write a manifest that agrees with the files, as someone would who means harm."""
    entries = {}
    for file in sorted(path.iterdir()):
        if file.name != MANIFEST:
            content = file.read_bytes()
            entries[file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_bytes(manifest_bytes(entries))


def edit_json(path, name, **changes):
    content = json.loads((path / name).read_text())
    content.update(changes)
    (path / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    seal(path)


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    seal(path)


def refuse(path, code):
    with pytest.raises(ScbinModelError) as caught:
        Model.load(path)
    assert caught.value.code in ([code] if isinstance(code, str) else code)
    assert len(str(caught.value)) < 800
    return str(caught.value)


# ---- the sound one ---------------------------------------------------------------------------------------------------


def test_plain_transformers_opens_it_and_gives_the_same_logits(trained, saved):
    adata, model = trained
    plain = BertForMaskedLM.from_pretrained(saved).eval()
    assert plain.config._attn_implementation != PACKED
    rows = [adata.obsm["X_tokens"][i] for i in (0, 7, 3, 20)]
    rows = [row for row in rows if row.nnz]
    longest = max(row.nnz for row in rows)
    ids, positions = np.zeros((2, len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : row.nnz], positions[i, : row.nnz] = row.data, row.indices
    ids, positions = torch.from_numpy(ids), torch.from_numpy(positions)
    with torch.no_grad():
        padded = plain(input_ids=ids, position_ids=positions, attention_mask=(ids > 0).long()).logits
        bounds = np.concatenate([[0], np.cumsum([row.nnz for row in rows])])
        for bert in (model.bert, Model.load(saved).bert):
            packed = logits_at(bert, encode_pack(bert, ids[ids > 0], positions[ids > 0], bounds))
            assert (packed - padded[ids > 0]).abs().max() < 1e-5


def test_what_is_loaded_is_whole_and_can_be_trained(trained, saved):
    bert, about = read_model_directory(saved)
    assert bert.config._attn_implementation == PACKED and not bert.training
    assert set(about) == {"format", "vocabulary", "readout", "training", "history", "decoder", "projection"}
    tensors = [*bert.parameters(), *bert.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert all(parameter.requires_grad for parameter in bert.parameters())
    assert bert.cls.predictions.decoder.weight is bert.bert.embeddings.word_embeddings.weight
    assert bert.cls.predictions.decoder.bias is bert.cls.predictions.bias
    for name, tensor in trained[1].bert.state_dict().items():
        assert torch.equal(tensor, bert.state_dict()[name])


def test_the_same_model_is_the_same_bytes(saved, tmp_path):
    Model.load(saved).save(tmp_path / "again")
    for name in (*FILES, MANIFEST, "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(model_dir, dtype):
    edit_tensors(model_dir, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    assert {parameter.dtype for parameter in Model.load(model_dir).bert.parameters()} == {torch.float32}


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_path_that_is_no_model(tmp_path):
    refuse(tmp_path / "nowhere", "M03")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file", "M03")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "M04")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damaged_files(saved, tmp_path, name):
    good = (saved / name).read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    for i, bad in enumerate([b"", good[: len(good) // 2], good[:-4] + b"\0\0\0\0", bytes(flipped)]):
        path = shutil.copytree(saved, tmp_path / str(i))
        (path / name).write_bytes(bad)
        assert name in refuse(path, ("M08", "M09") if name == MANIFEST else "M09")
    (path / name).unlink()
    assert name in refuse(path, "M04")
    (path / name).symlink_to(saved / name)
    assert name in refuse(path, "M30")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("sealed", [False, True])
def test_git_lfs_pointers_are_named_as_such(model_dir, name, sealed):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    if sealed and name != MANIFEST:
        (model_dir / name).write_text(pointer)
        seal(model_dir)
    (model_dir / name).write_text(pointer)
    message = refuse(model_dir, "M07")
    assert name in message and "git lfs pull" in message


@pytest.mark.parametrize(
    ("code", "add"),
    [
        ("M05", lambda path: (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")),
        ("M05", lambda path: (path / "modeling_bert.py").write_text("raise SystemExit")),
        ("M05", lambda path: (path / "more").mkdir()),
        ("M05", lambda path: (path / "README.md").unlink() or os.mkfifo(path / "README.md")),
        ("M30", lambda path: (path / "README.md").unlink() or (path / "README.md").symlink_to("/dev/zero")),
        ("M31", lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin")),
        ("M35", lambda path: (path / "model.safetensors").rename(path / "model.safetensors.index.json")),
    ],
    ids=["pickle", "code", "folder", "pipe", "device", "only a pickle", "index"],
)
def test_foreign_files(model_dir, code, add):
    add(model_dir)
    refuse(model_dir, code)


def test_the_model_card_is_for_people_to_edit(model_dir, trained):
    (model_dir / "README.md").write_text("# My model\n\nTrained on a rainy day.\n")
    (model_dir / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    assert Model.load(model_dir).fingerprint == trained[1].fingerprint
    (model_dir / "README.md").unlink()
    assert Model.load(model_dir).fingerprint == trained[1].fingerprint


def test_a_download_of_the_hub_may_be_links_into_its_own_store(saved, trained, tmp_path):
    """`huggingface_hub` keeps files by hash, and folders of links to them; a link anywhere else is refused there too."""
    folder = tmp_path / "models--me--mine"
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc"
    shutil.copytree(saved, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (snapshot / "notes.txt").write_text("what others fetched of the same repository")
    assert Model.load(snapshot).fingerprint == trained[1].fingerprint
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(saved / "config.json")
    refuse(snapshot, "M30")


def test_a_file_that_is_too_large_to_be_true(model_dir):
    os.truncate(model_dir / "scbin.json", 64 * 2**20 + 1)  # sparse: it takes no room
    refuse(model_dir, "M06")


@pytest.mark.parametrize(
    "change",
    [
        lambda files, out: files.update({str(out): {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}),
        lambda files, out: files.update({"../secret": {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}),
        lambda files, out: files.pop("config.json"),
        lambda files, out: files["config.json"].pop("size"),
        lambda files, out: files["config.json"].update(size="much"),
        lambda files, out: files.update({"scbin.json": {}}),
    ],
    ids=["absolute", "parent", "left out", "no size", "text for size", "nothing"],
)
def test_a_manifest_names_the_files_of_the_model_and_no_other(model_dir, change, tmp_path):
    (tmp_path / "secret").write_text("secret")
    entries = json.loads(json.loads((model_dir / MANIFEST).read_bytes())["manifest"])["files"]
    change(entries, tmp_path / "secret")
    (model_dir / MANIFEST).write_bytes(manifest_bytes(entries))
    refuse(model_dir, "M09")


@pytest.mark.parametrize("text", ["[]", "{}", '{"manifest": 3}', '{"manifest": "[]"}', '{"manifest": "{"}'])
def test_a_manifest_of_another_form(model_dir, text):
    (model_dir / MANIFEST).write_text(text)
    assert refuse(model_dir, "M08" if text == "[]" else "M09")


# ---- JSON, behind a manifest that agrees -----------------------------------------------------------------------------

DEEP = 200_000


@pytest.mark.parametrize("name", ["config.json", "scbin.json"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("{", '{"format": 1, "format": 1, ', 1),
        lambda text: text.replace("{", '{"x": NaN, ', 1),
        lambda text: text.replace("{", '{"x": -Infinity, ', 1),
        lambda text: text.replace("{", '{"x": 1e999, ', 1),
        lambda text: text.replace("{", '{"x": ' + "9" * 5000 + ", ", 1),
        lambda text: text.replace("{", '{"x": ' + "[" * DEEP + "]" * DEEP + ", ", 1),
        lambda text: text.replace("{", '{"x": ' + '{"a":' * DEEP + "1" + "}" * DEEP + ", ", 1),
        lambda text: text.replace("{", '{"x": ' + "[" * 17 + "]" * 17 + ", ", 1),
        lambda text: text[:-2],
        lambda text: f"[{text}]",
        lambda text: "\udcff",
        lambda text: "",
    ],
    ids=[
        *("duplicate", "nan", "infinity", "1e999", "digits", "brackets", "objects", "depth"),
        *("cut", "list", "bytes", "empty"),
    ],
)
def test_json_that_is_none(model_dir, name, spoil):
    text = spoil((model_dir / name).read_text())
    (model_dir / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    seal(model_dir)
    assert name in refuse(model_dir, "M08")


# ---- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**8},
        {"vocab_size": True},
        {"vocab_size": "60"},
        {"vocab_size": 60.0},
        {"num_hidden_layers": 20_000},
        {"num_hidden_layers": 0},
        {"hidden_size": -8},
        {"hidden_size": 8 * 10**9},
        {"hidden_size": [32]},
        {"num_attention_heads": 5},
        {"num_attention_heads": 0},
        {"intermediate_size": 32 * 9},
        {"max_position_embeddings": 10**6},
        {"type_vocab_size": 10**9},
        {"hidden_act": "gelu_python"},
        {"hidden_act": ["gelu"]},
        {"hidden_dropout_prob": 1.5},
        {"attention_probs_dropout_prob": -0.1},
        {"layer_norm_eps": 0},
        {"initializer_range": 10**400},
        {"pad_token_id": 10**5},
        {"pad_token_id": None},
        {"tie_word_embeddings": 1},
    ],
)
def test_numbers_out_of_range(model_dir, changes):
    if changes == {"initializer_range": 10**400}:
        sys.set_int_max_str_digits(0)
        try:
            edit_json(model_dir, "config.json", **changes)
        finally:
            sys.set_int_max_str_digits(4300)
    else:
        edit_json(model_dir, "config.json", **changes)
    assert next(iter(changes)) in refuse(model_dir, "M11")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_numbers_left_out(model_dir, key):
    edit_json(model_dir, "config.json", **{key: ...})
    assert key in refuse(model_dir, "M10")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 2**20, "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 65_536},
        {"num_hidden_layers": 96, "hidden_size": 1024, "intermediate_size": 8192},
        {"max_position_embeddings": 65_536, "hidden_size": 8192, "intermediate_size": 16},
    ],
)
def test_a_small_file_that_asks_for_gigabytes_gets_none(model_dir, changes):
    edit_json(model_dir, "config.json", **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(model_dir, "M34")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kilobytes


def test_whatever_else_the_configuration_says_has_no_effect(model_dir, trained):
    edit_json(
        model_dir,
        "config.json",
        attn_implementation="org/repo",
        _attn_implementation="org/repo",
        _attn_implementation_internal="org/repo",
        auto_map={"AutoModel": "modeling.Evil"},
        trust_remote_code=True,
        is_decoder=True,
        architectures=["Evil"],
        quantization_config={"quant_method": "bitsandbytes"},
    )
    model = Model.load(model_dir)
    assert model.fingerprint == trained[1].fingerprint
    assert model.config._attn_implementation == PACKED
    assert not model.config.is_decoder and not hasattr(model.config, "auto_map")


# ---- tensors ---------------------------------------------------------------------------------------------------------

WORDS, QUERY = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("M12", lambda t: t.update(other=t.pop(QUERY))),
        ("M12", lambda t: t.update({f"model.{name}": t.pop(name) for name in list(t)})),
        ("M12", lambda t: t.update(extra=torch.zeros(3))),
        ("M12", lambda t: t.pop(QUERY)),
        ("M12", lambda t: t.clear()),
        ("M33", lambda t: t.update({QUERY: t[QUERY][:-1]})),
        ("M33", lambda t: t.update({WORDS: t[WORDS].T})),
        ("M33", lambda t: t.update({QUERY: t[QUERY][None]})),
        ("M12", lambda t: t.update({"cls.predictions.decoder.weight": t[WORDS].clone()})),
        ("M13", lambda t: t.update({QUERY: t[QUERY].double()})),
        ("M13", lambda t: t.update({QUERY: t[QUERY].to(torch.int64)})),
        ("M15", lambda t: t[QUERY].view(-1)[5:6].fill_(float("nan"))),
        ("M15", lambda t: t[WORDS].view(-1)[-1:].fill_(float("inf"))),
    ],
    ids=[
        *("renamed", "all renamed", "extra", "missing", "none", "cut", "transposed", "widened", "tied twice"),
        *("float64", "int64", "nan", "inf"),
    ],
)
def test_tensors_that_are_not_those_of_the_configuration(model_dir, code, change):
    edit_tensors(model_dir, change)
    refuse(model_dir, code)


def rewrite_header(path, change):
    raw = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = change(json.loads(raw[8 : 8 + length]))
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    seal(path)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("M13", lambda h: json.dumps({**h, WORDS: {**h[WORDS], "shape": [0]}}).replace("[0]", "[1e999]").encode()),
        ("M13", lambda h: json.dumps({**h, WORDS: {**h[WORDS], "shape": "large"}}).encode()),
        ("M13", lambda h: json.dumps({**h, WORDS: 3}).encode()),
        ("M13", lambda h: json.dumps(list(h)).encode()),
        ("M13", lambda h: json.dumps(h).replace("{", '{"a": 1, "a": 2, ', 1).encode()),
        ("M13", lambda h: b"[" * DEEP),
        ("M13", lambda h: b"\xff" * 64),
        ("M13", lambda h: b""),
        ("M14", lambda h: json.dumps({**h, WORDS: {**h[WORDS], "data_offsets": h[QUERY]["data_offsets"]}}).encode()),
        ("M14", lambda h: json.dumps({**h, WORDS: {**h[WORDS], "data_offsets": [0, 10**15]}}).encode()),
    ],
    ids=[
        *("1e999", "text for shape", "number", "list", "duplicate", "brackets", "bytes", "empty"),
        *("overlap", "beyond the end"),
    ],
)
def test_headers_that_are_none(model_dir, code, change):
    rewrite_header(model_dir, change)
    refuse(model_dir, code)


def test_weights_cut_short(model_dir):
    path = model_dir / "model.safetensors"
    raw = path.read_bytes()
    for size, code in ((len(raw) - 40, "M14"), (200, "M13"), (5, "M13"), (0, "M13")):
        path.write_bytes(raw[:size])
        seal(model_dir)
        refuse(model_dir, code)
    path.write_bytes((10**12).to_bytes(8, "little") + raw[8:])
    seal(model_dir)
    refuse(model_dir, "M13")


def test_bytes_changed_at_random_are_refused_or_harmless(model_dir, trained):
    path = model_dir / "model.safetensors"
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    rng = np.random.default_rng(0)
    sound = trained[1].bert.state_dict()
    loaded = 0
    for _ in range(150):
        bad = bytearray(good)
        for where in rng.integers(0, header, rng.integers(1, 4)):
            bad[where] = rng.integers(0, 256)
        path.write_bytes(bad)
        seal(model_dir)
        try:
            bert = Model.load(model_dir).bert
        except ScbinModelError:
            continue
        loaded += 1  # spaces in the header, or two tensors of one shape exchanged: never a random weight
        for tensor in bert.state_dict().values():
            assert any(tensor.shape == own.shape and torch.equal(tensor, own) for own in sound.values())
    assert loaded < 50


# ---- scbin.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("M16", {"secret": 1}),
        ("M16", {"history": ...}),
        ("M16", {"format": 2}),
        ("M17", {"vocabulary": {"format": 1}}),
        ("M17", {"vocabulary": "genes"}),
        ("M17", {"readout": {"pooling": "max"}}),
        ("M17", {"readout": {"pooling": ["cls"]}}),
        ("M17", {"readout": {"layer": 9}}),
        ("M17", {"readout": {"layer": "last"}}),
        ("M17", {"readout": {"layer": True}}),
        ("M17", {"readout": {"gene_weights": [1.0]}}),
        ("M17", {"readout": {"gene_weights": [-1.0] * 40}}),
        ("M17", {"readout": {"gene_weights": [10**400] * 40}}),
        ("M17", {"readout": {"unknown": 1}}),
        ("M17", {"readout": []}),
        ("M17", {"training": [1, 2]}),
        ("M17", {"history": []}),
        ("M17", {"history": {"columns": ["a"], "data": [[1, 2]]}}),
        ("M17", {"history": {"columns": ["a", "a"], "data": [[1, 2]]}}),
        ("M17", {"history": {"columns": ["a"], "data": [["x"]]}}),
    ],
)
def test_descriptions_that_are_none(model_dir, code, changes):
    edit_json(model_dir, "scbin.json", **changes)
    refuse(model_dir, code)


@pytest.mark.parametrize("n_genes", [3, 39, 41])
def test_a_vocabulary_that_does_not_fit_the_network(model_dir, trained, n_genes):
    own = trained[1].vocabulary
    phenotypes = {phenotype.name: phenotype.values for phenotype in own.phenotypes}
    other = Vocabulary.build("rank", [f"G{i}" for i in range(n_genes)], phenotypes=phenotypes)
    edit_json(model_dir, "scbin.json", vocabulary=json.loads(other.to_json()))
    refuse(model_dir, "M18")


@pytest.mark.parametrize("junk", [0, 1, 64, 10**9, 128.0, True, "128", None])
@pytest.mark.parametrize("part", ["width", "own"])
def test_a_projection_of_another_size_than_described_is_refused(model_dir, part, junk):
    described = Model.load(model_dir).projection.describe()
    assert described["width"] == 128
    assert 1 < described["own"] < 64
    edit_json(model_dir, "scbin.json", projection=described | {part: junk})
    with pytest.raises(ScbinModelError):
        Model.load(model_dir)


def test_any_part_of_a_description_may_be_anything(saved, monkeypatch):
    """Every value of scbin.json in turn becomes junk: it loads, or it is refused by name."""
    bert, about = read_model_directory(saved)
    text = json.dumps(about)

    def places(part, path=()):
        yield path
        inner = list(part.items()) if isinstance(part, dict) else list(enumerate(part)) if type(part) is list else []
        for key, value in inner[:4] if type(part) is list else inner:
            yield from places(value, (*path, key))

    tried = 0
    for place in list(places(about))[1:]:
        for junk in (None, -1, 10**30, 0.5, "x", [], {}, [[1]], True):
            spoiled = json.loads(text)
            target = spoiled
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = junk
            monkeypatch.setattr("scbin.model.read_model_directory", lambda path, about=spoiled: (bert, about))
            tried += 1
            try:
                repr(Model.load(saved))
            except ScbinModelError as error:
                assert error.code in ("M16", "M17", "M18", "M33"), place
    assert tried > 500


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_what_is_there_is_replaced_only_when_asked(model_dir, trained):
    _, model = trained
    other = Model(model.bert, model.vocabulary, training={"name": "other"})
    with pytest.raises(ScbinModelError, match="M01"):
        other.save(model_dir)
    assert Model.load(model_dir).fingerprint == model.fingerprint
    other.save(model_dir, overwrite=True)
    assert Model.load(model_dir).training == {"name": "other"}
    assert [entry.name for entry in model_dir.parent.iterdir()] == ["model"]
    other.save(model_dir.parent / "new" / "place", overwrite=True)
    assert Model.load(model_dir.parent / "new" / "place").fingerprint == other.fingerprint


def test_nothing_but_a_model_is_replaced(trained, model_dir, tmp_path):
    _, model = trained
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("three years")
    (model_dir / "thesis.txt").write_text("three years")
    (tmp_path / "file").write_text("three years")
    for path in (tmp_path / "notes", model_dir, tmp_path / "file"):
        with pytest.raises(ScbinModelError, match="M02"):
            model.save(path, overwrite=True)
    for path in (tmp_path / "notes" / "thesis.txt", model_dir / "thesis.txt", tmp_path / "file"):
        assert path.read_text() == "three years"
    with pytest.raises(ScbinTrainingError, match="T52"):
        model.save(tmp_path / "file" / "model")
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    assert Model.load(tmp_path / "empty").fingerprint == model.fingerprint


def test_a_link_to_a_model_stays_one(trained, model_dir, tmp_path):
    (tmp_path / "link").symlink_to(model_dir)
    trained[1].save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and Model.load(tmp_path / "link").fingerprint == trained[1].fingerprint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "model"]


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "renames", "mkdir", "open"])
def test_a_failing_disk_leaves_the_old_model(trained, model_dir, monkeypatch, call):
    _, model = trained
    least = {"mkdir": 1, "rename": 1, "renames": 3}.get(call, 5)
    if call == "renames":  # on a system that cannot exchange two names
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
        call = "rename"
    other = Model(model.bert, model.vocabulary, training={"name": "other"})
    real, failures = getattr(os, call), 0
    for n in (*range(1, 9), 13, 21, 34, 55, 10**6):
        left = [n]

        def failing(*args, left=left, **kwargs):
            counts = call != "open" or bool(args[1] & os.O_CREAT)  # clearing up opens directories, too
            left[0] -= counts
            if counts and left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, failing)
        try:
            other.save(model_dir, overwrite=True)
        except ScbinTrainingError as error:
            failures += 1
            assert error.code == "T52"
        finally:
            monkeypatch.setattr(os, call, real)
        found = Model.load(model_dir)  # the old one, or where only the last flush failed the new one
        assert found.fingerprint in (model.fingerprint, other.fingerprint)
        assert [entry.name for entry in model_dir.parent.iterdir()] == ["model"]
    assert failures >= least
    assert Model.load(model_dir).training == {"name": "other"}


def test_a_save_that_was_killed_between_two_renames(trained, model_dir, monkeypatch):
    _, model = trained
    number = 2**22 + 1  # beyond the largest number of a process
    model.save(model_dir.with_name(f".tmp-new-model-{number}"))
    model_dir.rename(model_dir.with_name(f".tmp-old-model-{number}"))
    with monkeypatch.context() as readonly:
        readonly.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "read-only")))
        assert Model.load(model_dir).fingerprint == model.fingerprint
    assert not model_dir.exists()
    monkeypatch.chdir(model_dir.parents[1])  # where its path looks like the name of a model on the hub
    assert Model.load(f"{model_dir.parent.name}/model").fingerprint == model.fingerprint
    assert model_dir.exists()
    model_dir.rename(model_dir.with_name(f".tmp-new-model-{number}"))
    with pytest.raises(ScbinModelError, match="M01"):
        model.save(model_dir)
    model.save(model_dir, overwrite=True)
    assert [entry.name for entry in model_dir.parent.iterdir()] == ["model"]


def test_a_description_too_large_to_be_read_is_not_written(trained, tmp_path, monkeypatch):
    nested = json.loads("[" * 15 + "]" * 15)
    with pytest.raises(ScbinModelError, match="M66"):
        Model(trained[1].bert, trained[1].vocabulary, training={"nested": nested}).save(tmp_path / "model")
    Model(trained[1].bert, trained[1].vocabulary, training={"nested": nested[0]}).save(tmp_path / "model")
    assert Model.load(tmp_path / "model").training == {"nested": nested[0]}
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setattr("scbin.nn.checkpoint.MAX_JSON", 10_000)
    with pytest.raises(ScbinModelError, match="M66"):
        Model(trained[1].bert, trained[1].vocabulary, training={"note": "x" * 10_000}).save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["projection.safetensors", "decoder.safetensors"])
def test_a_part_that_the_manifest_leaves_out(model_dir, name):
    entries = json.loads(json.loads((model_dir / MANIFEST).read_bytes())["manifest"])["files"]
    del entries[name]
    (model_dir / MANIFEST).write_bytes(manifest_bytes(entries))
    refuse(model_dir, "M09")


def test_a_projection_may_be_as_large_as_weights(model_dir, monkeypatch):
    size = (model_dir / "projection.safetensors").stat().st_size
    larger = max(path.stat().st_size for path in model_dir.iterdir() if path.suffix == ".json")
    assert size > larger
    monkeypatch.setattr("scbin.nn.checkpoint.MAX_JSON", (size + larger) // 2)
    assert Model.load(model_dir).projection is not None


def test_weights_that_are_not_finite_are_not_written(trained, model_dir):
    model = Model.load(model_dir)
    with torch.no_grad():
        model.bert.bert.embeddings.LayerNorm.weight[0] = float("nan")
    for path in (model_dir, model_dir.parent / "new"):
        with pytest.raises(ScbinModelError, match="T56"):
            model.save(path, overwrite=True)
    assert Model.load(model_dir).fingerprint == trained[1].fingerprint
    assert not (model_dir.parent / "new").exists()


def test_whole_numbers_do_where_a_real_one_is_meant():
    content = {
        "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 10, "hidden_act": "gelu", "initializer_range": 1, "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "type_vocab_size": 2,
    }  # fmt: skip
    assert make_config(content, "config.json").initializer_range == 1.0
