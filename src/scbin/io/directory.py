"""A model directory, format 2: written at once and whole, read as untrusted input.

| file | what |
|---|---|
| `config.json`, `model.safetensors` | the backbone; of a BERT in the layout of Hugging Face, so that plain transformers opens it |
| `network.json`, `parts.safetensors` | kind and configuration of every part of the network, and the weights of the others |
| `vocabulary.json`, `training.json`, `history.json` | what it reads, how it was trained, what was measured meanwhile |
| `README.md`, `manifest.json` | the model card, for people to edit; size and sha256 of every other file |

Directories of the first edition (format 1) are read too: their network, vocabulary and pooling.
"""

from __future__ import annotations

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
from transformers import BertConfig, BertForMaskedLM

from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinModelError
from scbin.io.commit import standing
from scbin.io.files import MANIFEST, check_directory, make_config, read_json, read_tensors, write_directory
from scbin.nn.backbone import BACKBONES, layer_number
from scbin.nn.batches import BatchCorrection
from scbin.nn.bert import BertBackbone
from scbin.nn.counts import CountHead, Density
from scbin.nn.labels import GeneHead, LabelHead
from scbin.nn.network import CellNetwork
from scbin.nn.presets import CONFIG_KEYS
from scbin.nn.vector import LatentVector, PooledVector
from scbin.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

FORMAT = 2
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
NETWORK, PARTS_WEIGHTS, VOCABULARY = "network.json", "parts.safetensors", "vocabulary.json"
JSONS = (NETWORK, VOCABULARY, "training.json", "history.json")
REQUIRED = {WEIGHTS, *JSONS, MANIFEST}
ALLOWED = {*REQUIRED, CONFIG, PARTS_WEIGHTS, CARD}
# what described a model in the first edition, and what was fitted behind it
FIRST, LEFT_OUT = "scbin.json", ("projection.safetensors", "decoder.safetensors", "head.safetensors")
MOST_ROWS = 20_000  # of a history

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

CARD_TEXT = (
    "---\nlibrary_name: scbin\ntags:\n- single-cell\n- transcriptomics\n- {kind}\n---\n\n# A scbin model\n\n|  |  |\n|---|---|\n{table}\n\n"
    "Data sets, their licences, and what the model is not for: *please fill in.*\n\n"
    '## How to use it\n\n```python\nimport scbin\n\nmodel = scbin.Model.load("this_directory")  # from the hub: "owner/name", revision="..."\n'
    "scbin.pp.tokenize(adata, like=model)\nscbin.tl.embed(adata, model)\n{predict}```\n"
)


# ---- parts ----------------------------------------------------------------------------------------------------------


def parts_of(network: CellNetwork) -> dict[str, Any]:
    """Return the parts that a network has, the backbone first."""
    return {place: part for place in PARTS if (part := getattr(network, place, None)) is not None}


def describe_parts(network: CellNetwork) -> dict[str, dict[str, Any]]:
    """Return kind and configuration of each part, as plain values."""
    described: dict[str, dict[str, Any]] = {}
    for place, part in parts_of(network).items():
        if type(part) not in PARTS[place].values():
            raise ScbinModelError(
                "M05", f"network.{place}, a {type(part).__name__}, is not of a kind that can be saved."
            )
        described[place] = {"kind": part.kind, "config": json.loads(json.dumps(part.config(), allow_nan=False))}
    return described


def own_tensors(module: Any) -> dict[str, Tensor]:
    """Return the tensors of a module by name, each once: those that are tied under the first of their names."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}


def _make_part(place: str, entry: Mapping[str, Any], vocabulary: Vocabulary) -> Any:
    """Return a part of the kind and configuration described, with weights that are yet to be read."""
    kind: Any = PARTS[place][entry["kind"]]
    with warnings.catch_warnings(action="ignore"):  # torch warns of tensors without elements
        return kind.from_config(vocabulary, entry["config"])


def _read_parts(file: Path, described: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the described parts with the tensors of a file, whose names begin with the place of their part."""
    # what is stored of a backbone has no prefix: it has a file of its own
    prefix = {place: "" if place == "backbone" else f"{place}." for place in described}
    with torch.device("meta"):
        blanks = {place: own_tensors(_make_part(place, entry, vocabulary)) for place, entry in described.items()}
    expected = {prefix[place] + name: tensor.to("meta") for place in blanks for name, tensor in blanks[place].items()}
    tensors = read_tensors(file, expected) if expected or file.exists() else {}
    with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced at once
        parts = {place: _make_part(place, entry, vocabulary) for place, entry in described.items()}
    for place, part in parts.items():
        part.load_state_dict({name: tensors[prefix[place] + name] for name in blanks[place]}, strict=False)
    return parts


def assemble(config: BertConfig, tensors: Mapping[str, Tensor]) -> BertForMaskedLM:
    """Return the network with exactly the weights that `expected_tensors` names: none of them is drawn at random."""
    with torch.device("meta"):
        bert = BertForMaskedLM(config)
    bert.load_state_dict(tensors, strict=False, assign=True)
    bert.tie_weights()
    positions = torch.arange(config.max_position_embeddings)[None]
    bert.bert.embeddings.register_buffer("position_ids", positions, persistent=False)
    bert.bert.embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
    return bert.eval()


def expected_tensors(config: BertConfig) -> dict[str, Tensor]:
    """Return the tensors that a network of this configuration stores, on the meta device."""
    with torch.device("meta"):
        return own_tensors(BertForMaskedLM(config))


# ---- writing --------------------------------------------------------------------------------------------------------


def write_model(path: Path, content: Content, facts: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Write a model so that its directory appears at once and whole; the card shows `facts`."""
    path, (network, vocabulary, training, history) = path.resolve(), content
    check_replaceable(path, overwrite)
    described, parts = describe_parts(network), parts_of(network)
    files: dict[str, Any] = {WEIGHTS: own_tensors(parts.pop("backbone")), VOCABULARY: vocabulary.to_json().encode()}
    if isinstance(network.backbone, BertBackbone):
        bert, described["backbone"]["config"] = network.backbone.bert, {}
        config = {key: getattr(bert.config, key) for key in CONFIG_KEYS}
        config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert", "dtype": "float32"}
        files |= {CONFIG: _json_bytes(config), WEIGHTS: own_tensors(bert)}
    tensors = {f"{place}.{name}": t for place, part in parts.items() for name, t in own_tensors(part).items()}
    files |= {PARTS_WEIGHTS: tensors} if tensors else {}
    rows = json.loads(thinned(history).to_json(orient="split", index=False, double_precision=15))
    written = ({"format": FORMAT, "parts": described}, training, rows)
    files |= {name: _json_bytes(each) for name, each in zip((NETWORK, *JSONS[2:]), written, strict=True)}
    lines = (f"| {name} | {text.replace('|', '/')} |" for name, text in facts.items())
    fields = {
        "kind": network.backbone.kind,
        "predict": "" if network.labels is None else "scbin.tl.predict(adata, model)\n",
    }
    files[CARD] = CARD_TEXT.format(table="\n".join(lines), **fields).encode()
    write_directory(path, files, unlisted={CARD})  # the card is for people, who may edit it


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Refuse to put a model in the place of another that was not given up, or of anything else, or where nothing can be written."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK):
        raise ScbinModelError("M05", f"{path} cannot be written: {folder} is read-only, or belongs to someone else.")
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise ScbinModelError("M05", f"{path} exists already. Choose another place, or pass overwrite=True.")
    names = set(os.listdir(path)) if path.is_dir() else set()
    if names - ALLOWED - {FIRST, *LEFT_OUT} or not names & {NETWORK, FIRST}:
        raise ScbinModelError(
            "A04", f"{path} is not a model written by scbin, or contains other files. Remove it yourself."
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
        network, *rest = _read_format_1(path) if first else _read_format_2(path)
        if type(network.vector.layer) is not int:
            raise ValueError("the layer of its cell vector is not a number")
        layer_number(network.vector.layer, network.backbone.n_layers)
    except ScbinModelError:
        raise
    except FAULTS as error:
        raise ScbinModelError("M02", f"{path} does not describe a model ({str(error)[:80]}).") from error
    return network.eval(), *rest


def _read_format_2(path: Path) -> Content:
    check_directory(path, REQUIRED, ALLOWED, unlisted={CARD})
    about, _, training, history = (read_json(path / name) for name in JSONS)
    vocabulary, described = Vocabulary.from_json((path / VOCABULARY).read_text()), about["parts"]
    body, is_bert = described.pop("backbone"), (path / CONFIG).exists()
    fits = set(about) == {"format", "parts"} and about["format"] == FORMAT and is_bert == (body["kind"] == "bert")
    if not fits or not {"vector"} <= set(described) <= set(PARTS):
        raise ValueError(f"{NETWORK} is not of format {FORMAT}, or has parts that do not belong together")
    bodies = {} if is_bert else _read_parts(path / WEIGHTS, {"backbone": body}, vocabulary)
    backbone = _read_bert(path, vocabulary) if is_bert else bodies["backbone"]
    if described["vector"]["config"].get("hidden_size") not in (None, backbone.hidden_size):
        raise ValueError("its vector does not fit its backbone")
    parts = _read_parts(path / PARTS_WEIGHTS, described, vocabulary)
    return CellNetwork(backbone, **parts), vocabulary, training, read_history(history)


def _read_format_1(path: Path) -> Content:
    required = {CONFIG, WEIGHTS, FIRST, MANIFEST}
    check_directory(path, required, {*required, CARD, *LEFT_OUT}, unlisted={CARD})
    about = read_json(path / FIRST)
    vocabulary, pooled = Vocabulary.from_json(json.dumps(about["vocabulary"])), about["readout"]
    backbone = _read_bert(path, vocabulary)
    vector = PooledVector(vocabulary, backbone.hidden_size, pooled["pooling"], pooled["layer"])
    left = [name.split(".")[0] for name in LEFT_OUT if (path / name).exists()]
    left += ["gene weights"] if pooled.get("gene_weights") else []
    if left:
        text = f"{path} was saved by scbin 0.1: {', '.join(left)} left out, as this version has no such parts. Pretrain again."
        warnings.warn(ScbinInputWarning("M06", text), stacklevel=5)
    return CellNetwork(backbone, vector), vocabulary, dict(about["training"]), read_history(about["history"])


def _read_bert(path: Path, vocabulary: Vocabulary) -> Any:
    """Return the BERT in a directory, which has to be as large as the vocabulary needs."""
    config = make_config(read_json(path / CONFIG), CONFIG)
    own, needed = (config.vocab_size, config.max_position_embeddings), (vocabulary.n_tokens, vocabulary.n_positions)
    if own[0] != needed[0] or own[1] < needed[1]:
        what = f"the network in {path} has {own} tokens and positions, its vocabulary {needed}"
        raise ScbinModelError("M04", f"{what}. They do not belong together.")
    return BertBackbone(assemble(config, read_tensors(path / WEIGHTS, expected_tensors(config))))


def read_history(fields: Mapping[str, Any]) -> pd.DataFrame:
    """Return the table again, numbers only; what was not measured is NaN."""
    frame = pd.DataFrame(fields["data"], columns=fields["columns"])
    return frame.astype({name: "float64" for name in frame if frame[name].dtype.kind not in "if"})


def local_directory(path: str | os.PathLike[str], revision: str | None = None, *, geneformer: bool = False) -> Path:
    """Return the directory that a path names; for `"owner/name"` of the hub, that of its download.

    Without a revision only the cache is looked at, so that a misspelt path never becomes a request to a server. Of Geneformer, a
    folder of the repository is named too, `"owner/name/folder"`, and its dictionaries are fetched with it.
    """
    place, form = standing(Path(path)), "/".join([r"(\w[\w.-]{0,95})"] * (3 if geneformer else 2))
    names = re.fullmatch(form, path) if isinstance(path, str) else None
    if names is None or os.path.lexists(place):
        if revision is not None:
            text = "'owner/name/folder'" if geneformer else "'owner/name'"
            raise ScbinInputError(
                "A03", f"revision= was given, but {str(path)[:200]!r} is a path, not {text} of the hub."
            )
        return place
    owner, name, *folder = names.groups()
    files = [f"{folder[0]}/{CONFIG}", f"{folder[0]}/{WEIGHTS}", "geneformer/*.pkl"] if geneformer else sorted(ALLOWED)
    options: dict[str, Any] = {"allow_patterns": files, "local_files_only": revision is None}
    try:
        return Path(snapshot_download(f"{owner}/{name}", revision=revision, **options), *folder)
    except (OSError, ValueError) as error:
        what = f"{path} is not a directory, and could not be read from the Hugging Face hub or its cache ({str(error)[:120]})"
        fix = "Pass the revision to fetch: Model.load('owner/name', revision='...') with the hash of a commit"
        raise ScbinModelError("M01", f"{what}. {fix}.") from error
