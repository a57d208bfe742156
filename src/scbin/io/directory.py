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
from scbin.io.files import MANIFEST, recovered, verify_directory, write_directory
from scbin.io.untrusted import (
    MAX_JSON,
    MAX_WEIGHTS,
    check_plain,
    check_weights_there,
    downloads,
    make_config,
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
# what described a model in the first edition, and what was fitted behind it
FIRST, LEFT_OUT = "scbin.json", ("projection.safetensors", "decoder.safetensors", "head.safetensors")
# left by git, by downloads and by file managers; never opened
HARMLESS = {".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store"}
MOST_ROWS = 20_000  # of a history
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


# ---- parts ----------------------------------------------------------------------------------------------------------


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
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}


def _make_part(place: str, entry: Mapping[str, Any], vocabulary: Vocabulary) -> Any:
    """Return a part of the kind and configuration described, with weights that are yet to be read."""
    n_modules = itertools.count()

    def stop(*_: Any) -> None:
        if next(n_modules) > MOST_MODULES:
            raise ValueError(f"{place} would have more than {MOST_MODULES:,} modules")

    kind: Any = PARTS[place][entry["kind"]]
    # torch warns of tensors without elements
    with register_module_module_registration_hook(stop), warnings.catch_warnings(action="ignore"):
        return kind.from_config(vocabulary, entry["config"])


def _read_parts(file: Path, described: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the described parts with the tensors of a file, whose names begin with the place of their part."""
    # what is stored of a backbone has no prefix: it has a file of its own
    prefix = {place: "" if place == "backbone" else f"{place}." for place in described}
    expected: dict[str, Tensor] = {}
    with torch.device("meta"):
        for place, entry in described.items():
            blank = own_tensors(_make_part(place, entry, vocabulary))
            expected |= {prefix[place] + name: tensor.to("meta") for name, tensor in blank.items()}
    if bool(expected) != file.exists():
        raise ScbinModelError("M02", f"{NETWORK} and {file.name} do not belong together. Fetch or save it again.")
    tensors = read_tensors(file, expected) if expected else {}
    with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced at once
        parts = {place: _make_part(place, entry, vocabulary) for place, entry in described.items()}
    for place, part in parts.items():
        state = part.state_dict()
        part.load_state_dict(state | {name: tensors.get(prefix[place] + name, state[name]) for name in state})
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


# ---- writing --------------------------------------------------------------------------------------------------------


def write_model(path: Path, content: Content, facts: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Write a model so that its directory appears at once and whole; the card shows `facts`."""
    path, (network, vocabulary, training, history) = recovered(path.resolve()), content
    replaces = replaces_model(path, overwrite)
    described, parts, backbone = describe_parts(network), parts_of(network), network.backbone
    del parts["backbone"]
    files: dict[str, Any] = {CARD: model_card(facts).encode(), VOCABULARY: vocabulary.to_json().encode()}
    if isinstance(backbone, BertBackbone):
        described["backbone"]["config"] = {}
        config = {key: getattr(backbone.bert.config, key) for key in CONFIG_KEYS}
        config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert", "dtype": "float32"}
        files |= {CONFIG: _json_bytes(config), WEIGHTS: own_tensors(backbone.bert)}
    else:
        files[WEIGHTS] = own_tensors(backbone)
    tensors = {f"{place}.{name}": t for place, part in parts.items() for name, t in own_tensors(part).items()}
    files |= {PARTS_WEIGHTS: tensors} if tensors else {}
    files |= {NETWORK: _json_bytes({"format": FORMAT, "parts": described}), TRAINING: _json_bytes(training)}
    rows = json.loads(thinned(history).to_json(orient="split", index=False, double_precision=15))
    files[HISTORY] = _json_bytes(rows)
    for name in JSONS:
        if len(files[name]) > MAX_JSON:
            what = f"{name} would have {len(files[name]):,} bytes, of {MAX_JSON:,} that can be read"
            raise ScbinModelError("M05", f"{what}. Keep less in model.training.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScbinModelError("M05", f"{path} could not be written ({error.strerror or error}).") from error
    write_directory(path, files, unlisted={CARD}, replace=replaces)  # the card is for people, who may edit it


def replaces_model(path: Path, overwrite: bool) -> bool:
    """Return whether a model has to make room; refuse to put one in the place of anything else."""
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return False
    if not overwrite:
        raise ScbinModelError("M05", f"{path} exists already. Choose another place, or pass overwrite=True.")
    names = set(os.listdir(path)) if path.is_dir() else set()
    foreign = names - ALLOWED - {FIRST, *LEFT_OUT}
    if foreign or not names & {NETWORK, FIRST}:
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
    """Return a history as it is kept with a model: of a long one about `MOST_ROWS` rows, and all rows of validations."""
    at = np.arange(len(history))
    even = (at % max(1, -(-len(history) // MOST_ROWS)) == 0) | (at == len(history) - 1)
    return history[even | history.filter(like="validation_").notna().any(axis=1).to_numpy(dtype=bool)]


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()


# ---- reading --------------------------------------------------------------------------------------------------------


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
    vocabulary, body = Vocabulary.from_json((path / VOCABULARY).read_text()), described.pop("backbone")
    if (path / CONFIG).exists() != (body["kind"] == "bert"):
        raise ValueError(f"{CONFIG} belongs to a BERT, and to nothing else")
    if body["kind"] == "bert":
        backbone = _read_bert(path, vocabulary)
    else:
        backbone = _read_parts(path / WEIGHTS, {"backbone": body}, vocabulary)["backbone"]
    parts = _read_parts(path / PARTS_WEIGHTS, described, vocabulary)
    if described["vector"]["config"].get("hidden_size") not in (None, backbone.hidden_size):
        raise ValueError("its vector does not fit its backbone")
    return _checked(CellNetwork(backbone, **parts)), vocabulary, training, read_history(table)


def _read_format_1(path: Path) -> Content:
    required = {CONFIG, WEIGHTS, FIRST, MANIFEST}
    check_directory(path, required, {*required, CARD, *LEFT_OUT})
    about = read_json(path / FIRST)
    if about["format"] != 1:
        raise ScbinModelError("M02", f"{FIRST} in {path} is not of format 1; it needs another scbin version.")
    vocabulary, pooled = Vocabulary.from_json(json.dumps(about["vocabulary"])), about["readout"]
    backbone = _read_bert(path, vocabulary)
    vector = PooledVector(vocabulary, backbone.hidden_size, pooled["pooling"], pooled["layer"])
    left = [name.split(".")[0] for name in LEFT_OUT if (path / name).exists()]
    left += ["gene weights"] if pooled.get("gene_weights") else []
    if left:
        text = (
            f"{path} was saved by the first edition of scbin: its network, vocabulary and pooling were read, its "
            f"{', '.join(left)} left out. Its embedding is the pooled hidden states; pretrain again for today's cell vectors."
        )
        warnings.warn(ScbinInputWarning("M06", text), stacklevel=5)
    network = _checked(CellNetwork(backbone, vector))
    return network, vocabulary, dict(about["training"]), read_history(about["history"])


def _read_bert(path: Path, vocabulary: Vocabulary) -> Any:
    """Return the BERT in a directory, which has to be as large as the vocabulary needs."""
    config = make_config(read_json(path / CONFIG), CONFIG)
    own, needed = (config.vocab_size, config.max_position_embeddings), (vocabulary.n_tokens, vocabulary.n_positions)
    if own[0] != needed[0] or own[1] < needed[1]:
        what = f"the network in {path} has {own} tokens and positions, its vocabulary {needed}"
        raise ScbinModelError("M04", f"{what}. They do not belong together.")
    return BertBackbone(assemble(config, read_tensors(path / WEIGHTS, expected_tensors(config))))


def _checked(network: CellNetwork) -> CellNetwork:
    """Return a network whose vector reads a layer that its backbone has."""
    if type(network.vector.layer) is not int:
        raise ValueError("the layer of its cell vector is no number")
    layer_number(network.vector.layer, network.backbone.n_layers)
    return network.eval()


def check_directory(path: Path, required: set[str], allowed: set[str]) -> None:
    """Refuse links, foreign files and missing ones before any is opened, then those that are not what the manifest says."""
    check_weights_there(path, WEIGHTS)
    names, is_download = set(os.listdir(path)) - HARMLESS, downloads(path) is not None
    if required - names:
        what = f"{path} is not a scbin model: {', '.join(sorted(required - names))} is not in it"
        fix = (
            "For a model published by others see Model.from_geneformer, Model.from_polygene and Model.from_perturbgene"
        )
        raise ScbinModelError("M01", f"{what}. {fix}.")
    foreign = sorted(names - allowed)
    if foreign and not is_download:  # a download may hold what others fetched of the same repository
        raise ScbinModelError("M03", f"{path} holds {foreign[0]!r}, which does not belong to a model. Remove it first.")
    for name in sorted(names & allowed):
        check_plain(path / name, MAX_WEIGHTS if name.endswith(".safetensors") else MAX_JSON)
    fault = verify_directory(path, names & allowed - {MANIFEST, CARD}, links=is_download)
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

    Without a revision only the cache is looked at, so that a misspelt path never becomes a request to a server.
    """
    directory = recovered(Path(path))
    found = HUB_ID.fullmatch(path) if isinstance(path, str) and not os.path.lexists(directory) else None
    if revision is not None and (found is None or found[2] is not None):
        what = "is no 'owner/name' of the hub, or a path on this machine"
        raise ScbinInputError("A03", f"revision={revision!r} was given, but {str(path)[:200]!r} {what}.")
    if found is None:
        return directory
    hub_id, revision = found[1], revision or found[2]
    options: dict[str, Any] = {"allow_patterns": sorted(ALLOWED), "local_files_only": revision is None}
    try:
        return Path(snapshot_download(hub_id, revision=revision, **options))
    except (OSError, ValueError) as error:
        what = f"is neither a directory nor, at {revision or 'main'!r}, to be had from the Hugging Face hub ({str(error)[:120]})"
        fix = f"Say which state of it to fetch: Model.load({hub_id!r}, revision='...') with the hash of a commit"
        raise ScbinModelError("M01", f"{hub_id} {what}. {fix}.") from error
