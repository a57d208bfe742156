"""Mutated model directories, opened in this process under limits: `python campaign_directories.py FOLDER NUMBER SEED`.

Prints what happened as JSON. Each directory is refused with one of scbin's errors, or gives a model whose every tensor is the one
in the file, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from scbin import Model, Vocabulary
from scbin._errors import ScbinInputError, ScbinModelError
from scbin.nn.bert import build_bert
from scbin.nn.files import MANIFEST, manifest_bytes
from scbin.nn.heads import HeadPlan, Target, build_head

MEMORY, SECONDS = 512 * 2**20, 2.0
ARCHIVED = Path(__file__).parents[1] / "archive" / "format_1" / "model_bins"
CONFIG, WEIGHTS, SCBIN, HEAD = "config.json", "model.safetensors", "scbin.json", "head.safetensors"
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
JUNK = [None, True, -1, 0, 1, 7, 0.5, 10**6, 2**31, 2**63, 10**30, "", "x", "\ud800", [], {}, [[1]], {"a": 1}, [0] * 50]


# ---- sound ones ------------------------------------------------------------------------------------------------------


def make_sound(folder: Path) -> dict[str, Path]:
    """Write a model, one with a head, and a published one."""
    genes = [f"GENE{k}" for k in range(12)]
    shutil.copytree(ARCHIVED, folder / "plain")  # with everything that training adds
    ranks = Vocabulary.build("rank", genes, medians=[1.0 + k for k in range(12)], max_length=16)
    plan = HeadPlan("linear", (Target("cell_type", classes=("a", "b", "c")),))
    Model(build_bert(ranks, "tiny", **SHAPE), ranks, head=build_head(plan, 16, 12)).save(folder / "head")
    published = folder / "geneformer"
    layout = Vocabulary.build("rank", genes, medians=[1.0] * 12, max_length=20, layout="geneformer_v2")
    Model(build_bert(layout, "tiny", **SHAPE), layout).save(published)
    for name in (SCBIN, MANIFEST, "README.md"):
        (published / name).unlink()
    tokens = {name: k for k, name in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", *genes])}
    (published / "token_dictionary.pkl").write_bytes(pickle.dumps({k: np.int64(v) for k, v in tokens.items()}))
    (published / "gene_median_dictionary.json").write_text(json.dumps(dict.fromkeys(genes, 1.5)))
    (published / "ensembl_mapping_dict.json").write_text(json.dumps({"A": "GENE1", "GENE2": "GENE2"}))
    return {name: folder / name for name in ("plain", "head", "geneformer")}


def seal(path: Path) -> None:
    """Write a manifest that agrees with the files, as someone would who means harm."""
    entries = {}
    for name in (CONFIG, WEIGHTS, SCBIN, HEAD, "decoder.safetensors", "projection.safetensors"):
        if (path / name).is_file() and not (path / name).is_symlink():
            content = (path / name).read_bytes()
            entries[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_bytes(manifest_bytes(entries))


# ---- what is done to them --------------------------------------------------------------------------------------------


def pick(rng: np.random.Generator, items):
    return list(items)[int(rng.integers(len(items)))]


def files_of(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.is_symlink())


def change_bytes(path: Path, rng: np.random.Generator) -> None:
    file = pick(rng, files_of(path))
    raw = bytearray(file.read_bytes() or b"x")
    # half of the changes go to the first bytes, where headers are
    most = len(raw) if rng.random() < 0.5 else min(len(raw), 400)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(most))
        kind = rng.integers(4)
        if kind == 0:
            raw[at] = rng.integers(256)
        elif kind == 1:
            raw[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del raw[at : at + int(rng.integers(1, 9))]
        else:
            raw[at:at] = raw[: int(rng.integers(1, 9))]
        raw, most = raw or bytearray(b"x"), min(most, len(raw) or 1)
    file.write_bytes(raw)


def change_file(path: Path, rng: np.random.Generator) -> None:
    file, other = pick(rng, files_of(path)), pick(rng, files_of(path))
    kind = rng.integers(9)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_bytes(file.read_bytes()[: int(rng.integers(file.stat().st_size + 1))])
    elif kind == 2:
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n")
    elif kind == 3:
        content = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == 4:
        file.unlink()
        file.symlink_to(pick(rng, ["/dev/zero", "/etc/passwd", "gone", other.name, str(other)]))
    elif kind == 5:
        file.unlink()
        file.mkdir() if rng.random() < 0.5 else os.mkfifo(file)
    elif kind == 6:
        file.rename(path / pick(rng, ["pytorch_model.bin", "x.py", "model.safetensors.index.json", "\udcff", ".git"]))
    elif kind == 7:
        (path / pick(rng, ["extra.py", "pytorch_model.bin", HEAD, ".gitattributes"])).write_bytes(b"\x80\x04.")
    else:
        os.truncate(file, 20 * 2**30)  # a hole: it takes no room


def places(part, place=()):
    yield place
    if isinstance(part, dict | list):
        for key, value in list(part.items() if isinstance(part, dict) else enumerate(part))[:30]:
            yield from places(value, (*place, key))


def change_json(path: Path, rng: np.random.Generator) -> None:
    file = pick(rng, [file for file in files_of(path) if file.suffix == ".json"])
    text = file.read_text()
    kind = rng.integers(6)
    if kind < 4:
        content = json.loads(text)
        for _ in range(rng.integers(1, 3)):
            place = pick(rng, list(places(content))[1:] or [()])
            target = content
            for key in place[:-1]:
                target = target[key]
            if place and rng.random() < 0.2:
                del target[place[-1]]
            elif place and isinstance(target[place[-1]], int) and rng.random() < 0.6:
                target[place[-1]] = int(target[place[-1]]) * pick(rng, [-1, 0, 2, 10, 1000]) + pick(rng, [-1, 0, 1])
            elif place:
                target[place[-1]] = pick(rng, JUNK)
        text = json.dumps(content)
    elif kind == 4:
        inner = pick(
            rng,
            [
                "[" * 100_000,
                "9" * 5000,
                "1e999",
                "NaN",
                '{"a":' * 30 + "1" + "}" * 30,
                '"\\ud800"',
                "[" * 17 + "]" * 17,
            ],
        )
        text = text.replace("{", '{"x": ' + inner + ", ", 1)
    else:
        text = pick(
            rng, ["", "[]", "null", "{}", '"x"', "\ufeff{}", text[:-3], text + text, text.replace(":", ":-", 1)]
        )
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def change_tensors(path: Path, rng: np.random.Generator) -> None:
    file = pick(rng, [file for file in files_of(path) if file.suffix == ".safetensors"])
    tensors = load_file(file)
    name, other = pick(rng, tensors), pick(rng, tensors)
    tensor, kind = tensors[name], rng.integers(11)
    if kind == 0:
        tensors[pick(rng, [name + "x", "model." + name, name.upper(), "classifier.weight"])] = tensors.pop(name)
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors[
            pick(rng, ["extra", "classifier.weight", "bert.pooler.dense.weight", "bert.embeddings.position_ids"])
        ] = tensor
    elif kind == 3:
        tensors[name], tensors[other] = tensors[other], tensor
    elif kind == 4:
        tensors[name] = tensor.T if tensor.ndim == 2 else tensor[:-1]
    elif kind == 5:
        tensors[name] = tensor.to(
            pick(rng, [torch.float64, torch.int64, torch.float16, torch.bfloat16, torch.bool, torch.int8])
        )
    elif kind in (6, 7):
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[int(rng.integers(tensor.numel()))] = pick(
            rng, [float("nan"), float("inf"), -float("inf")]
        )
    elif kind == 8:
        tensors[name] = torch.cat([tensor, tensor])
    elif kind == 9:
        tensors = {f"bert.{key}": value for key, value in tensors.items()}
    else:
        tensors["cls.predictions.decoder.weight"] = tensors.get(
            "bert.embeddings.word_embeddings.weight", tensor
        ) + rng.integers(2)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, file)


def change_header(path: Path, rng: np.random.Generator) -> None:
    file = pick(rng, [file for file in files_of(path) if file.suffix == ".safetensors"])
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    entry = header[pick(rng, [key for key in header if key != "__metadata__"])]
    kind = rng.integers(5)
    if kind == 0:
        entry["shape"] = pick(rng, [[], [2**40], [-1, 4], [2**32, 2**32], ["x"], [1] * 40, 7, [0]])
    elif kind == 1:
        low, high = entry["data_offsets"]
        entry["data_offsets"] = pick(
            rng, [[low, high + 4], [low + 4, high], [high, low], [0, 2**62], [-4, high], [low], "x"]
        )
    elif kind == 2:
        entry["dtype"] = pick(rng, ["F64", "I8", "F8_E4M3", "BOOL", "x", 3, None, "F16"])
    elif kind == 3:
        header["__metadata__"] = pick(rng, [{"format": "pt"}, {"format": 3}, [], {"a": "b" * 100_000}])
    text = json.dumps(header).encode()
    claimed = len(text) if kind < 4 else pick(rng, [0, 1, 2**63, len(text) - 1, len(raw), 2**33])
    file.write_bytes(claimed.to_bytes(8, "little") + text + raw[8 + length :])


CHANGES = (change_bytes, change_file, change_json, change_tensors, change_header)


# ---- opening them ----------------------------------------------------------------------------------------------------


def open_model(path: Path, published: bool) -> Model:
    return Model.from_geneformer(path, dictionaries=path) if published else Model.load(path)


def faults_of(model: Model, path: Path) -> list[str]:
    """Compare every tensor of the model with the file, read on its own."""
    stored = load_file(path / WEIGHTS)
    if model.head is not None:
        head = load_file(path / HEAD) if (path / HEAD).exists() else stored
        names = {"dense.": "bert.pooler.dense.", "output.": "classifier."} if not (path / HEAD).exists() else {}
        own = dict(model.head.state_dict())
        stored |= {f"head.{key}": head.get(_renamed(key, names), torch.zeros(0)) for key in own}
    blank = "cls.predictions.bias" not in stored  # a classifier that was published without its output layer
    state = dict(model.bert.state_dict())
    state |= {f"head.{key}": value for key, value in (model.head.state_dict() if model.head else {}).items()}
    stored["cls.predictions.decoder.weight"] = stored.get("bert.embeddings.word_embeddings.weight")
    stored["cls.predictions.decoder.bias"] = stored.get("cls.predictions.bias")
    wrong = []
    for name, tensor in state.items():
        if blank and name.startswith("cls."):
            continue
        twin = stored.get(name)
        if twin is None or not torch.equal(tensor, twin.to(torch.float32)) or not torch.isfinite(tensor).all():
            wrong.append(name)
    if model.vocabulary.n_tokens != model.config.vocab_size:
        wrong.append("vocabulary")
    repr(model)
    return wrong


def _renamed(name: str, names: dict[str, str]) -> str:
    return next((name.replace(old, new, 1) for old, new in names.items() if name.startswith(old)), name)


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(folder: Path, n: int, seed: int) -> None:
    sys.set_int_max_str_digits(4300)
    torch.set_num_threads(1)
    sound = make_sound(folder)
    for name, path in sound.items():
        assert faults_of(open_model(path, name == "geneformer"), path) == []
    if Path("/proc/self/statm").exists():
        most = address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    rng = np.random.default_rng(seed)
    report: dict = {"loaded": 0, "refused": 0, "seconds": 0.0, "faults": [], "codes": {}}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(n):
        name = list(sound)[k % 3]
        path = folder / "mutant"
        shutil.copytree(sound[name], path)
        change = pick(rng, CHANGES)
        change(path, rng)
        if name != "geneformer" and rng.random() < 0.9 and not any(f.stat().st_size > 2**30 for f in files_of(path)):
            if not (path / MANIFEST).is_symlink() and (path / MANIFEST).is_file():
                seal(path)
        start = time.process_time()
        try:
            model = open_model(path, name == "geneformer")
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
