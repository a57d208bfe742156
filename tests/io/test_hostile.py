"""Model directories changed in every way at random: refused by name, or whole. In a process of its own, under limits.

`python test_hostile.py FOLDER NUMBER SEED` prints what happened as JSON. Each directory is refused with one of scbin's errors, or
gives a model whose every tensor is the one in the file, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scbin import Model, Vocabulary
from scbin._errors import ScbinInputError, ScbinModelError
from scbin.io.files import MANIFEST, manifest_bytes
from scbin.nn.labels import LabelHead
from scbin.nn.network import build_network
from scbin.nn.presets import Network

MEMORY, SECONDS = 512 * 2**20, 2.0
CONFIG, WEIGHTS, NETWORK, OTHERS = "config.json", "model.safetensors", "network.json", "parts.safetensors"
SHAPE = Network(2, 16, 32, 2)
JUNK = [None, True, -1, 0, 1, 7, 0.5, 10**6, 2**31, 2**63, 10**30, "", "x", "\ud800", [], {}, [[1]], {"a": 1}, [0] * 50]


@pytest.mark.parametrize("n", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_directories(tmp_path, n):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, str(tmp_path), str(n), str(n)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(n, 300))
    assert done.returncode == 0, done.stderr[-2000:]  # a crash would be a signal
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["faults"] == []
    assert report["loaded"] + report["refused"] == n and report["refused"] > n / 2
    assert report["seconds"] < SECONDS and report["megabytes"] < 512
    assert {"M01", "M02", "M03", "V05"} <= set(report["codes"])


def make_sound(folder):
    """Write a BERT with heads, another kind of network, and a published one."""
    genes = [f"GENE{k}" for k in range(12)]
    ranks = Vocabulary.build("rank", genes, medians=[1.0 + k for k in range(12)], max_length=16)
    for kind in ("bert", "mlp"):
        network = build_network(ranks, SHAPE, kind, vector_options={"size": 4, "width": 8})
        network.labels = LabelHead(ranks, 4, [{"name": "cell_type", "classes": ["a", "b", "c"]}])
        Model(network, ranks, {"steps": 3}).save(folder / kind)
    published = folder / "geneformer"
    layout = Vocabulary.build("rank", genes, medians=[1.0] * 12, max_length=20, layout="geneformer_v2")
    Model(build_network(layout, SHAPE, "bert"), layout).save(published)
    for file in list(published.iterdir()):
        if file.name not in (CONFIG, WEIGHTS):
            file.unlink()
    tokens = {name: k for k, name in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", *genes])}
    (published / "token_dictionary.pkl").write_bytes(pickle.dumps({k: np.int64(v) for k, v in tokens.items()}))
    (published / "gene_median_dictionary.pkl").write_bytes(pickle.dumps(dict.fromkeys(genes, 1.5)))
    (published / "ensembl_mapping_dict.pkl").write_bytes(pickle.dumps({"A": "GENE1", "GENE2": "GENE2"}))
    return {name: folder / name for name in ("bert", "mlp", "geneformer")}


def seal(path):
    """Write a manifest that agrees with the files, as someone would who means harm."""
    found = {
        f.name: f.read_bytes() for f in files_of(path) if f.suffix in (".json", ".safetensors") and f.name != MANIFEST
    }
    entries = {name: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in found.items()}
    (path / MANIFEST).write_bytes(manifest_bytes(entries))


def pick(rng, items):
    items = list(items)
    return items[int(rng.integers(len(items)))]


def files_of(path, suffix=""):
    return sorted(file for file in path.iterdir() if file.is_file() and not file.is_symlink() and suffix in file.suffix)


def change_bytes(path, rng):
    file = pick(rng, files_of(path))
    raw = bytearray(file.read_bytes() or b"x")
    # half of the changes go to the first bytes, where headers are
    most = len(raw) if rng.random() < 0.5 else min(len(raw), 400)
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(most)), rng.integers(3)
        if kind == 0:
            raw[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del raw[at : at + int(rng.integers(1, 9))]
        else:
            raw[at:at] = raw[: int(rng.integers(1, 9))]
        raw, most = raw or bytearray(b"x"), min(most, len(raw) or 1)
    file.write_bytes(raw)


def change_file(path, rng):
    file, other = pick(rng, files_of(path)), pick(rng, files_of(path))
    size, own, others = file.stat().st_size, file.read_bytes(), other.read_bytes()
    names = ["pytorch_model.bin", "x.py", "model.safetensors.index.json", "\udcff", ".git", OTHERS]
    kinds = [
        lambda: file.write_bytes(own[: int(rng.integers(size + 1))]),
        lambda: file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"),
        lambda: (file.write_bytes(others), other.write_bytes(own)),
        lambda: (file.unlink(), file.symlink_to(pick(rng, ["/dev/zero", "/etc/passwd", "gone", str(other)]))),
        lambda: (file.unlink(), file.mkdir()),
        lambda: (file.unlink(), os.mkfifo(file)),
        lambda: file.rename(path / pick(rng, names)),
        lambda: (path / pick(rng, names)).write_bytes(b"\x80\x04."),
        lambda: os.truncate(file, 20 * 2**30),  # a hole: it takes no room
        file.unlink,
    ]
    pick(rng, kinds)()


def places(part, place=()):
    yield place
    if isinstance(part, dict | list):
        for key, value in list(part.items() if isinstance(part, dict) else enumerate(part))[:30]:
            yield from places(value, (*place, key))


def change_json(path, rng):
    file, kind = pick(rng, files_of(path, "json")), rng.integers(6)
    text = file.read_text()
    if kind < 4:
        content = json.loads(text)
        for _ in range(rng.integers(1, 3)):
            *outer, last = pick(rng, list(places(content))[1:] or [("x",)])
            target = content
            for key in outer:
                target = target[key]
            number = target.get(last) if isinstance(target, dict) else target[last]
            if type(number) is int and rng.random() < 0.6:
                target[last] = number * pick(rng, [-1, 0, 2, 10, 1000]) + pick(rng, [-1, 0, 1])
            else:
                target[last] = pick(rng, JUNK)
            if rng.random() < 0.2:
                del target[last]
        text = json.dumps(content)
    elif kind == 4:
        deep = ["[" * 100_000, '{"a":' * 30 + "1" + "}" * 30, "[" * 17 + "]" * 17]
        inner = [*deep, "9" * 5000, "1e999", "NaN", '"\\ud800"']
        text = text.replace("{", '{"x": ' + pick(rng, inner) + ", ", 1)
    else:
        others = ["", "[]", "null", "{}", '"x"', "\ufeff{}", text[:-3], text + text, text.replace(":", ":-", 1)]
        text = pick(rng, others)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def change_tensors(path, rng):
    file = pick(rng, files_of(path, "safetensors"))
    tensors = load_file(file)
    name, other = pick(rng, tensors), pick(rng, tensors)
    tensor, bad = tensors[name], tensors[name].clone().float()
    new = pick(rng, ["extra", "classifier.weight", "bert.pooler.dense.weight", "counts.extra", f"model.{name}"])
    bad.view(-1)[int(rng.integers(tensor.numel()))] = pick(rng, [float("nan"), -float("inf")])
    dtype = pick(rng, [torch.float64, torch.int64, torch.float16, torch.bfloat16, torch.bool])
    changes = [
        *({new: tensor}, {name: tensors[other], other: tensor}, {name: tensor.T if tensor.ndim == 2 else tensor[:-1]}),
        *({name: tensor.to(dtype)}, {name: bad}, {name: torch.cat([tensor, tensor])}),
        {"cls.predictions.decoder.weight": tensor + 1},
    ]
    if rng.random() < 0.3:
        del tensors[name]
    if name in tensors or rng.random() < 0.5:
        tensors |= pick(rng, changes)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file)


def change_header(path, rng):
    file = pick(rng, files_of(path, "safetensors"))
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    entry, kind = header[pick(rng, [key for key in header if key != "__metadata__"])], rng.integers(5)
    low, high = entry["data_offsets"]
    if kind == 0:
        entry["shape"] = pick(rng, [[], [2**40], [-1, 4], [2**32, 2**32], ["x"], [1] * 40, 7, [0]])
    elif kind == 1:
        offsets = [[low, high + 4], [low + 4, high], [high, low], [0, 2**62], [-4, high], [low], "x"]
        entry["data_offsets"] = pick(rng, offsets)
    elif kind == 2:
        entry["dtype"] = pick(rng, ["F64", "I8", "F8_E4M3", "BOOL", "x", 3, None, "F16"])
    elif kind == 3:
        header["__metadata__"] = pick(rng, [{"format": "pt"}, {"format": 3}, [], {"a": "b" * 100_000}])
    text = json.dumps(header).encode()
    claimed = len(text) if kind < 4 else pick(rng, [0, 1, 2**63, len(text) - 1, len(raw), 2**33])
    file.write_bytes(claimed.to_bytes(8, "little") + text + raw[8 + length :])


CHANGES = (change_bytes, change_file, change_json, change_tensors, change_header)


def open_model(path):
    return Model.from_geneformer(path, dictionaries=path) if path.name == "geneformer" else Model.load(path)


def faults_of(model, path):
    """Compare every tensor of the model with the files, read on their own."""
    published, own = path.name == "geneformer", load_file(path / WEIGHTS)
    prefix = "backbone.bert." if model.config["backbone"]["kind"] == "bert" else "backbone."
    stored = {f"{prefix}{name}": tensor for name, tensor in own.items()}
    stored |= load_file(path / OTHERS) if not published else {}
    for theirs, ours in (("bert.pooler.dense", "dense"), ("classifier", "output")):
        stored |= {f"labels.{ours}.{part}": own.get(f"{theirs}.{part}") for part in ("weight", "bias") if published}
    stored["backbone.bert.cls.predictions.decoder.weight"] = own.get("bert.embeddings.word_embeddings.weight")
    stored["backbone.bert.cls.predictions.decoder.bias"] = own.get("cls.predictions.bias")
    wrong = []
    for name, tensor in model.network.state_dict().items():
        made_up = ".cls." in name or name.startswith("labels.")  # of a classifier published without an output layer
        if published and made_up and stored.get(name) is None:
            continue
        twin = stored.get(name)
        if twin is None or not torch.equal(tensor, twin.to(tensor.dtype)) or not torch.isfinite(tensor).all():
            wrong.append(name)
    repr(model)
    return wrong


def main(folder, n, seed):
    torch.set_num_threads(1)
    sound = make_sound(folder)
    for path in sound.values():
        assert faults_of(open_model(path), path) == []
    if Path("/proc/self/statm").exists():
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    rng = np.random.default_rng(seed)
    report = {"loaded": 0, "refused": 0, "seconds": 0.0, "faults": [], "codes": {}}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(n):
        name = list(sound)[k % 3]
        path = shutil.copytree(sound[name], folder / "mutants" / name)
        change = pick(rng, CHANGES)
        change(path, rng)
        if name != "geneformer" and rng.random() < 0.9 and not any(f.stat().st_size > 2**30 for f in files_of(path)):
            if not (path / MANIFEST).is_symlink() and (path / MANIFEST).is_file():
                seal(path)
        start = time.process_time()
        try:
            model = open_model(path)
        except (ScbinModelError, ScbinInputError) as error:
            report["refused"] += 1
            report["codes"][error.code] = report["codes"].get(error.code, 0) + 1
            if len(str(error)) > 1000:
                report["faults"].append(f"{k}: a message of {len(str(error)):,} characters")
        except Exception as error:  # noqa: BLE001 - any other error is what is looked for
            report["faults"].append(f"{k}: {name}, {change.__name__}: {type(error).__name__} {str(error)[:200]}")
        else:
            report["loaded"] += 1
            wrong = faults_of(model, path)
            report["faults"] += [f"{k}: {name}, {change.__name__}: {wrong[:3]}"] if wrong else []
        report["seconds"] = max(report["seconds"], time.process_time() - start)
        shutil.rmtree(path)
    report["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
