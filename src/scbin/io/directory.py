"""A model directory, format 2: written at once and whole, read as if a stranger had made it.

| file | what |
|---|---|
| `config.json`, `model.safetensors` | the backbone; of a BERT in the layout of Hugging Face, so that plain transformers opens it |
| `network.json`, `parts.safetensors` | kind and configuration of every part of the network, and the weights of the others |
| `vocabulary.json`, `training.json`, `history.json` | what it reads, how it was trained, what was measured meanwhile |
| `README.md`, `manifest.json` | the model card, for people to edit; size and sha256 of every other file |

Directories of the first edition (format 1) are read too: their network, vocabulary and pooling.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from huggingface_hub import snapshot_download
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import BertConfig, BertForMaskedLM

from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinModelError
from scbin.io.files import MANIFEST, clear_leftovers, recovered, replace_directory, verify_directory, write_directory
from scbin.io.untrusted import (
    MAX_DEPTH,
    MAX_JSON,
    MAX_WEIGHTS,
    check_plain,
    check_weights_there,
    depth,
    downloads,
    make_config,
    parse_json,
    read_json,
    read_tensors,
)
from scbin.nn.backbone import BACKBONES, layer_number
from scbin.nn.batches import BatchCorrection
from scbin.nn.bert import BertBackbone
from scbin.nn.counts import CountHead
from scbin.nn.density import Density
from scbin.nn.labels import GeneHead, LabelHead
from scbin.nn.limits import CONFIG_KEYS
from scbin.nn.network import CellNetwork
from scbin.nn.vector import LatentVector, PooledVector
from scbin.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

FORMAT = 2
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
NETWORK, PARTS_WEIGHTS = "network.json", "parts.safetensors"
VOCABULARY, TRAINING, HISTORY = "vocabulary.json", "training.json", "history.json"
JSONS = (NETWORK, VOCABULARY, TRAINING, HISTORY)
REQUIRED = {WEIGHTS, *JSONS, MANIFEST}
ALLOWED = {*REQUIRED, CONFIG, PARTS_WEIGHTS, CARD}
FIRST = "scbin.json"  # what described a model in the first edition, and what was fitted behind it, by file
LEFT_OUT = {"projection.safetensors": "projection", "decoder.safetensors": "decoder", "head.safetensors": "head"}
# left by git, by downloads and by file managers; never opened
HARMLESS = {".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store"}
MOST_ROWS, MOST_NUMBERS = 20_000, 1_000_000  # of a history
MOST_MODULES = 10_000  # of a part, whatever its configuration says

Content = tuple[CellNetwork, Vocabulary, dict[str, Any], pd.DataFrame]
"""Network, vocabulary, training and history: what a model consists of."""

PARTS: dict[str, dict[str, type[nn.Module]]] = {
    "backbone": BACKBONES,
    "vector": {"pooled": PooledVector, "latent": LatentVector},
    "counts": {"counts": CountHead},
    "labels": {"cells": LabelHead, "genes": GeneHead},
    "batches": {"mutual": BatchCorrection},
    "density": {"cells": Density},
}
"""The parts of a network and the classes of each by kind. A new one has a `kind`, `config()`, plain values, and a classmethod
`from_config(vocabulary, config)`; all that it learns is in its `state_dict`."""

# whatever a constructor may raise for a configuration that somebody made up
FAULTS = (ScbinInputError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def parts_of(network: CellNetwork) -> dict[str, Any]:
    """Return the parts that a network has, the backbone first."""
    return {place: part for place in PARTS if (part := getattr(network, place, None)) is not None}


def describe_parts(network: CellNetwork) -> dict[str, dict[str, Any]]:
    """Return kind and configuration of each part, as plain values."""
    described: dict[str, dict[str, Any]] = {}
    for place, part in parts_of(network).items():
        kind, name = getattr(part, "kind", ""), type(part).__name__
        known: Any = PARTS[place].get(kind)
        if known is not type(part):
            raise ScbinModelError("M05", f"network.{place} is a {name}, no kind of {place} that can be stored.")
        described[place] = {"kind": kind, "config": json.loads(json.dumps(part.config(), allow_nan=False))}
    return described


def own_tensors(module: Any) -> dict[str, Tensor]:
    """Return the tensors of a module by name, each once: those that are tied under the first of their names."""
    names: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    state = module.state_dict()
    return {name: state[name].detach() for name in names.values()}


def _make_part(place: str, entry: Mapping[str, Any], vocabulary: Vocabulary) -> nn.Module:
    """Return a part of the kind and configuration described, with weights that are yet to be read."""
    n_modules = itertools.count()

    def count(*_: Any) -> None:
        if next(n_modules) > MOST_MODULES:
            raise ValueError(f"{place} would have more than {MOST_MODULES:,} modules")

    kind: Any = PARTS[place][entry["kind"]]
    hook = register_module_module_registration_hook(count)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of tensors without elements
            return kind.from_config(vocabulary, entry["config"])
    finally:
        hook.remove()


def _read_parts(file: Path, described: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the described parts with the tensors of a file, whose names begin with the place of their part."""
    with torch.device("meta"):
        blank = {place: own_tensors(_make_part(place, entry, vocabulary)) for place, entry in described.items()}
    # what is stored of a backbone has no prefix: it has a file of its own
    prefix = {place: "" if place == "backbone" else f"{place}." for place in described}
    expected = {prefix[place] + name: t.to("meta") for place in blank for name, t in blank[place].items()}
    if bool(expected) != file.exists():
        raise ScbinModelError("M02", f"{NETWORK} and {file.name} do not belong together. Fetch or save it again.")
    tensors = read_tensors(file, expected) if expected else {}
    with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced at once
        parts = {place: _make_part(place, entry, vocabulary) for place, entry in described.items()}
    for place, part in parts.items():
        state = {name: tensors[prefix[place] + name] for name in blank[place]}
        part.load_state_dict(part.state_dict() | state, strict=True)
    return parts


def assemble(config: BertConfig, tensors: Mapping[str, Tensor]) -> BertForMaskedLM:
    """Return the network with exactly these weights: not one of them is missing, spare or drawn at random."""
    with torch.device("meta"):
        bert = BertForMaskedLM(config)
    first: dict[int, str] = {}  # of tied tensors the first name is stored
    own = {name: first.setdefault(id(t), name) for name, t in bert.state_dict(keep_vars=True).items()}
    bert.load_state_dict({name: tensors[stored] for name, stored in own.items()}, strict=True, assign=True)
    bert.tie_weights()
    embeddings = bert.bert.embeddings
    positions = torch.arange(config.max_position_embeddings)[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
    return bert.eval()


def expected_tensors(config: BertConfig) -> dict[str, Tensor]:
    """Return the tensors that a network of this configuration stores, on the meta device."""
    with torch.device("meta"):
        return own_tensors(BertForMaskedLM(config))


def read_bert(path: Path, vocabulary: Vocabulary) -> Any:
    """Return the BERT in a directory, which has to be as large as the vocabulary needs."""
    config = make_config(read_json(path / CONFIG), CONFIG)
    own, needed = (config.vocab_size, config.max_position_embeddings), (vocabulary.n_tokens, vocabulary.n_positions)
    if own[0] != needed[0] or own[1] < needed[1]:
        what = f"the network in {path} has {own} tokens and positions, its vocabulary {needed}"
        raise ScbinModelError("M04", f"{what}. They do not belong together.")
    return BertBackbone(assemble(config, read_tensors(path / WEIGHTS, expected_tensors(config))))


def write_model(path: Path, content: Content, facts: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Write a model so that its directory appears at once and whole; the card shows `facts`."""
    path, (network, vocabulary, training, history) = path.resolve(), content
    if recovered(path) == path:
        clear_leftovers(path)
    replaces = replaces_model(path, overwrite)
    described, parts, backbone = describe_parts(network), parts_of(network), network.backbone
    del parts["backbone"]
    files: dict[str, Any] = {CARD: model_card(facts).encode()}
    if isinstance(backbone, BertBackbone):
        described["backbone"]["config"] = {}
        config = {key: getattr(backbone.bert.config, key) for key in CONFIG_KEYS}
        config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert", "dtype": "float32"}
        files |= {CONFIG: _json_bytes(config), WEIGHTS: own_tensors(backbone.bert)}
    else:
        files[WEIGHTS] = own_tensors(backbone)
    tensors = {f"{place}.{name}": t for place, part in parts.items() for name, t in own_tensors(part).items()}
    files |= {PARTS_WEIGHTS: tensors} if tensors else {}
    rows = json.loads(thinned(history).to_json(orient="split", index=False, double_precision=15))
    jsons = {NETWORK: {"format": FORMAT, "parts": described}, TRAINING: dict(training), HISTORY: rows}
    files |= {name: _json_bytes(content) for name, content in jsons.items()}
    files[VOCABULARY] = vocabulary.to_json().encode()
    for name in JSONS:
        size, n_levels = len(files[name]), depth(jsons.get(name, {}))
        if size > MAX_JSON or n_levels > MAX_DEPTH:
            own = f"{name} would have {size:,} bytes in {n_levels} levels, of {MAX_JSON:,} in {MAX_DEPTH} that can be read"
            raise ScbinModelError("M05", f"{own}. Keep less in model.training.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScbinModelError("M05", f"{path} could not be written ({error.strerror or error}).") from error
    # the card is for people, who may edit it: the manifest leaves it out
    (replace_directory if replaces else write_directory)(path, files, unlisted={CARD})


def replaces_model(path: Path, overwrite: bool) -> bool:
    """Return whether a model has to make room; refuse to put one in the place of anything else."""
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return False
    if not overwrite:
        raise ScbinModelError("M05", f"{path} exists already. Choose another place, or pass overwrite=True.")
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    foreign = names - ALLOWED - {FIRST, *LEFT_OUT}
    if not names & {NETWORK, FIRST} or foreign:
        found = f" (it holds {min(foreign)!r})" if foreign else ""
        raise ScbinModelError("A04", f"{path} is not a model that scbin wrote{found}. Remove it yourself.")
    return True


def model_card(facts: Mapping[str, str]) -> str:
    """Return the README of a model directory."""
    lines = "\n".join(f"| {name} | {text.replace('|', '/')} |" for name, text in facts.items())
    return (
        "---\nlibrary_name: scbin\ntags:\n- single-cell\n- transcriptomics\n- bert\n---\n\n# A scbin model\n\n"
        f"|  |  |\n|---|---|\n{lines}\n\n"
        '```python\nimport scbin\n\nmodel = scbin.Model.load("this_directory")\n'
        "scbin.pp.tokenize(adata, like=model)\nscbin.tl.embed(adata, model)\n```\n"
    )


def thinned(history: pd.DataFrame) -> pd.DataFrame:
    """Return the history as it is kept with a model: of more than `MOST_ROWS` rows an even choice, first and last among them.

    The rows of validations, which are few and would be missed, make up to half of it. Wide tables are kept to `MOST_NUMBERS`.
    """
    most = max(min(MOST_ROWS, MOST_NUMBERS // max(history.shape[1], 1)), 4)
    if len(history) <= most:
        return history

    def evenly(rows: np.ndarray, most: int) -> np.ndarray:
        return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(np.int64)]

    names = [name for name in history.columns if str(name).startswith("validation_")]
    validated = evenly(np.flatnonzero(history[names].notna().any(axis=1)), most // 2)
    return history.iloc[np.union1d(evenly(np.arange(len(history)), most - len(validated)), validated)]


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()


def read_model(path: Path) -> Content:
    """Return network, vocabulary, training and history of a directory, after every check that needs no trust in it.

    Nothing in the directory is executed and nothing of the file system beside it is read. Memory is asked for only when the
    declared shapes have been compared with the weights that are there.
    """
    first = (path / FIRST).exists() and not (path / NETWORK).exists()
    try:
        return _read_format_1(path) if first else _read_format_2(path)
    except ScbinModelError:
        raise
    except FAULTS as error:
        raise ScbinModelError("M02", f"{path} does not describe a model ({str(error)[:80]}).") from error


def _read_format_2(path: Path) -> Content:
    check_directory(path, REQUIRED, ALLOWED)
    about, _, training, table = (read_json(path / name) for name in JSONS)
    if about["format"] != FORMAT or set(about) != {"format", "parts"}:
        raise ScbinModelError("M02", f"{NETWORK} in {path} is not of format {FORMAT}; it needs another scbin version.")
    described = about["parts"]
    if not {"backbone", "vector"} <= set(described) <= set(PARTS):
        raise ValueError("a network has a backbone, a vector and perhaps " + ", ".join(list(PARTS)[2:]))
    for place, entry in described.items():
        if set(entry) != {"kind", "config"} or entry["kind"] not in PARTS[place]:
            raise ValueError(f"{place} is of no known kind")
    vocabulary, history = Vocabulary.from_json((path / VOCABULARY).read_text()), read_history(table)
    body = described.pop("backbone")
    if (path / CONFIG).exists() != (body["kind"] == "bert"):
        raise ValueError(f"{CONFIG} belongs to a BERT, and to nothing else")
    if body["kind"] == "bert":
        backbone = read_bert(path, vocabulary)
    else:
        backbone = _read_parts(path / WEIGHTS, {"backbone": body}, vocabulary)["backbone"]
    parts = _read_parts(path / PARTS_WEIGHTS, described, vocabulary)
    layer = parts["vector"].layer
    if type(layer) is not int or described["vector"]["config"].get("hidden_size") not in (None, backbone.hidden_size):
        raise ValueError("its vector does not fit its backbone")
    layer_number(layer, backbone.n_layers)
    return CellNetwork(backbone, **parts).eval(), vocabulary, training, history


def _read_format_1(path: Path) -> Content:
    required = {CONFIG, WEIGHTS, FIRST, MANIFEST}
    check_directory(path, required, {*required, CARD, *LEFT_OUT})
    about = read_json(path / FIRST)
    if about["format"] != 1:
        raise ScbinModelError("M02", f"{FIRST} in {path} is not of format 1; it needs another scbin version.")
    vocabulary, pooled = Vocabulary.from_json(json.dumps(about["vocabulary"])), about["readout"]
    backbone, layer = read_bert(path, vocabulary), pooled["layer"]
    if type(layer) is not int:
        raise ValueError("the layer of its cell vector is no number")
    layer_number(layer, backbone.n_layers)
    vector = PooledVector(vocabulary, backbone.hidden_size, pooled["pooling"], layer)
    training, history = dict(about["training"]), read_history(about["history"])
    left = [what for name, what in LEFT_OUT.items() if (path / name).exists()]
    left += ["gene weights"] if pooled.get("gene_weights") else []
    if left:
        text = (
            f"{path} was saved by the first edition of scbin: its network, vocabulary and pooling were read, its "
            f"{', '.join(left)} left out. Its embedding is the pooled hidden states; pretrain again for today's cell vectors."
        )
        warnings.warn(ScbinInputWarning("M06", text), stacklevel=5)
    return CellNetwork(backbone, vector).eval(), vocabulary, training, history


def check_directory(path: Path, required: set[str], allowed: set[str]) -> None:
    """Refuse links, foreign files and missing ones before any is opened, then those that are not what the manifest says."""
    check_weights_there(path, WEIGHTS)
    names, is_download = {entry.name for entry in os.scandir(path)} - HARMLESS, downloads(path) is not None
    missing = required - names
    if missing:
        raise ScbinModelError(
            "M01",
            f"{path} is not a scbin model: {', '.join(sorted(missing))} is not in it. For a model published by others see "
            "Model.from_geneformer, Model.from_polygene and Model.from_perturbgene.",
        )
    for name in sorted(names):
        if name in allowed:
            check_plain(path / name, MAX_WEIGHTS if name.endswith(".safetensors") else MAX_JSON)
        elif not is_download:  # a download may hold what others fetched of the same repository
            raise ScbinModelError("M03", f"{path} holds {name!r}, which does not belong into a model. Remove it first.")
    fault: str | None = f"{MANIFEST} does not list the files of a model"
    try:  # a manifest may leave a file out, or name one elsewhere that is not to be opened
        files = parse_json(read_json(path / MANIFEST)["manifest"].encode())["files"]
        kinds = {(type(entry["size"]), type(entry["sha256"])) for entry in files.values()}
        if set(files) == names & allowed - {MANIFEST, CARD} and kinds == {(int, str)}:
            fault = verify_directory(path, links=is_download, ignored={CARD})
    except ScbinModelError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    if fault:
        raise ScbinModelError("M02", f"the model in {path} is damaged: {fault}. Fetch or save it again.")


def read_history(fields: Mapping[str, Any]) -> pd.DataFrame:
    """Return the table again, numbers only; what was not measured is NaN."""
    columns = fields["columns"]
    if not all(type(name) is str for name in columns) or len(set(columns)) != len(columns):
        raise ValueError("the columns of the history need names of their own")
    frame = pd.DataFrame(fields["data"], columns=columns)
    return frame.astype({name: "float64" for name in columns if frame[name].dtype.kind not in "if"})


HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?")


def local_directory(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the directory that a path names; for `"owner/name"` or `"owner/name@revision"` of the hub, that of its download.

    Without a revision only the cache is looked at, so that a misspelt path never becomes a request to a server; a commit that is
    in the cache is not asked for again.
    """
    directory = recovered(Path(path)) if revision is None else Path(path)
    found = HUB_ID.fullmatch(path) if isinstance(path, str) and not os.path.lexists(directory) else None
    if revision is not None and (found is None or found[2] is not None):
        what = "is no 'owner/name' of the hub, or a path on this machine"
        raise ScbinInputError("A03", f"revision={revision!r} was given, but {str(path)[:200]!r} {what}.")
    if found is None:
        return directory
    hub_id, revision = found[1], revision or found[2]
    is_commit = revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None
    # whether only to look into the cache: first, where that is enough, and then not
    for cached in [True] * (revision is None or is_commit) + [False] * (revision is not None):
        try:
            return Path(
                snapshot_download(hub_id, revision=revision, allow_patterns=sorted(ALLOWED), local_files_only=cached)
            )
        except (OSError, ValueError) as error:
            fault = error
    if revision is None:
        what = "is neither a directory nor in the cache of the Hugging Face hub. To fetch it, say which state of it: "
        what += f"Model.load({hub_id!r}, revision='...') with the hash of a commit."
    else:
        what = f"at {revision!r} could not be fetched from the Hugging Face hub ({type(fault).__name__}: {str(fault)[:120]}). "
        what += "Check name, revision and connection."
    raise ScbinModelError("M01", f"{hub_id} {what}") from fault
