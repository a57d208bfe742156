"""Reading and writing model directories: a directory from a stranger can be refused, never obeyed."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import BertForMaskedLM

from scbin._errors import ScbinModelError, ScbinTrainingError
from scbin.nn.files import (
    MANIFEST,
    check_finite,
    clear_leftovers,
    recovered,
    replace_directory,
    verify_directory,
    write_directory,
)
from scbin.nn.limits import CONFIG_KEYS
from scbin.nn.untrusted import (
    MAX_DEPTH,
    MAX_JSON,
    MAX_WEIGHTS,
    check_plain,
    depth,
    downloads,
    parse_json,
    read_config,
    read_json,
    read_tensors,
    refuse_pickles,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import BertConfig

CONFIG, WEIGHTS, SCBIN = "config.json", "model.safetensors", "scbin.json"
# all of these may be absent
PARTS = PROJECTION, HEAD, DECODER = "projection.safetensors", "head.safetensors", "decoder.safetensors"
CARD = "README.md"
ALLOWED = {CONFIG, WEIGHTS, SCBIN, *PARTS, CARD, MANIFEST}
# left by git, by downloads and by file managers; never opened
HARMLESS = {".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store"}


def write_model_directory(
    path: Path,
    bert: BertForMaskedLM,
    about: Mapping[str, Any],
    card: str,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    overwrite: bool = False,
) -> None:
    """Write network, description, model card and other parts by file so that the directory appears at once and whole.

    Plain `transformers.BertForMaskedLM.from_pretrained` opens it too.
    """
    path = path.resolve()
    if recovered(path) == path:
        clear_leftovers(path)
    replaces = replaces_model(path, overwrite)
    tensors = own_tensors(bert)
    check_finite(tensors, "the model")
    config = {key: getattr(bert.config, key) for key in CONFIG_KEYS}
    config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert", "dtype": "float32"}
    text = _json_bytes(about)
    if len(text) > MAX_JSON or depth(about) > MAX_DEPTH:
        raise ScbinModelError(
            "M66",
            f"what describes the model has {len(text):,} bytes as JSON in {depth(about)} levels, and at most {MAX_JSON:,} in "
            f"{MAX_DEPTH} can be read again. Keep less in model.training.",
        )
    files: dict[str, Any] = {
        CONFIG: _json_bytes(config),
        WEIGHTS: tensors,
        SCBIN: text,
        CARD: card.encode(),  # for people, who may edit it: the manifest leaves it out
    }
    for name, part in parts.items():
        check_finite(part, name)
        files[name] = dict(part)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(path, error) from error
    if replaces:
        _write_over(path, files)
    else:
        write_directory(path, files, unlisted={CARD})


def replaces_model(path: Path, overwrite: bool) -> bool:
    """Return whether a model has to make room; refuse to put one in the place of anything else."""
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return False
    if not overwrite:
        raise ScbinModelError("M01", f"{path} exists already. Choose another place, or pass overwrite=True.")
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if SCBIN not in names or names - ALLOWED:
        foreign = f" (it holds {min(names - ALLOWED)!r})" if names - ALLOWED else ""
        raise ScbinModelError(
            "M02", f"{path} is not a model that scbin wrote{foreign}; it is not overwritten. Remove it yourself."
        )
    return True


def _write_over(path: Path, files: Mapping[str, Any]) -> None:
    try:
        replace_directory(path, files, unlisted={CARD})
    except OSError as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: OSError) -> ScbinTrainingError:
    return ScbinTrainingError(
        "T52", f"{path} could not be written ({error.strerror or error}). What was written before is untouched."
    )


def read_model_directory(path: Path) -> tuple[BertForMaskedLM, dict[str, Any]]:
    """Return network and description of a model directory, after every check that needs no trust in it.

    Nothing in the directory is executed and nothing of the file system beside it is read. Memory is asked for only when the
    declared shapes have been compared with the weights that are there.
    """
    check_files(path)
    _check_manifest(path / MANIFEST)
    fault = verify_directory(path, links=downloads(path) is not None, ignored={CARD})
    if fault:
        raise ScbinModelError("M09", f"the model in {path} is damaged: {fault}. Fetch or save it again.")
    about = read_json(path / SCBIN)
    config = read_config(path / CONFIG)
    bert = load_bert(config, path / WEIGHTS)
    return bert, about


def check_files(path: Path) -> None:
    """Refuse links, foreign files and missing ones before any is opened."""
    if not path.is_dir():
        raise ScbinModelError("M03", f"{path} is not a directory. Pass the directory that model.save(...) wrote.")
    names = {entry.name for entry in os.scandir(path)} - HARMLESS
    refuse_pickles(path, WEIGHTS)
    missing = {CONFIG, WEIGHTS, SCBIN, MANIFEST} - names
    if missing:
        raise ScbinModelError(
            "M04",
            f"{path} is not a scbin model: {', '.join(sorted(missing))} is not in it. For a model published by others see "
            "Model.from_geneformer, Model.from_polygene and Model.from_perturbgene.",
        )
    for name in sorted(names):
        if name in ALLOWED:
            check_plain(path / name, MAX_WEIGHTS if name in (WEIGHTS, *PARTS) else MAX_JSON)
        elif downloads(path) is None:  # a download may hold what others fetched of the same repository
            raise ScbinModelError(
                "M05", f"{path} holds {name!r}, which does not belong into a scbin model. Remove it first."
            )


def _check_manifest(path: Path) -> None:
    """Refuse a manifest that leaves a file out or names one elsewhere, before the files it names are opened."""
    try:
        files = parse_json(read_json(path)["manifest"].encode())["files"]
        sound = {CONFIG, WEIGHTS, SCBIN} <= set(files) <= ALLOWED - {MANIFEST} and all(
            type(entry["size"]) is int and type(entry["sha256"]) is str for entry in files.values()
        )
        sound &= all((name in files) == path.with_name(name).exists() for name in PARTS)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, ScbinModelError):
            raise
        sound = False
    if not sound:
        raise ScbinModelError("M09", f"{path.name} does not list the files of a model. Fetch or save it again.")


def load_bert(config: BertConfig, path: Path) -> BertForMaskedLM:
    """Return the network of a configuration with the weights of a safetensors file, which must fit exactly."""
    return assemble(config, read_tensors(path, expected_shapes(config)))


def expected_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a network of this configuration stores, without making one."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in own_tensors(BertForMaskedLM(config)).items()}


def assemble(config: BertConfig, tensors: Mapping[str, Tensor]) -> BertForMaskedLM:
    """Return the network with exactly these weights: not one of them is missing, spare or drawn at random."""
    with torch.device("meta"):
        bert = BertForMaskedLM(config)
    aliases = {name: tensors[own] for name, own in _tied(bert).items()}
    bert.load_state_dict({**tensors, **aliases}, strict=True, assign=True)
    bert.tie_weights()
    embeddings = bert.bert.embeddings
    positions = torch.arange(config.max_position_embeddings)[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
    return bert.eval()


def own_tensors(bert: BertForMaskedLM) -> dict[str, Tensor]:
    """Return the tensors of the network by name, each once: tied ones under the name that is stored."""
    tied = _tied(bert)
    return {name: tensor.detach() for name, tensor in bert.state_dict().items() if name not in tied}


def _tied(bert: BertForMaskedLM) -> dict[str, str]:
    """Names of tied tensors, with the name under which each is stored; an untied output layer has both of its own."""
    if not bert.config.tie_word_embeddings:
        return {}
    return {
        "cls.predictions.decoder.bias": "cls.predictions.bias",
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    }


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()
