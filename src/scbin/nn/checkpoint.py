"""Reading and writing model directories: a directory from a stranger can be refused, never obeyed."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from scbin._errors import ScbinModelError, ScbinTrainingError
from scbin.nn.attention import PACKED
from scbin.nn.files import MANIFEST, check_finite, sync_directory, verify_directory, write_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

CONFIG, WEIGHTS, SCBIN = "config.json", "model.safetensors", "scbin.json"
HEAD, CARD = "head.safetensors", "README.md"  # both may be absent
ALLOWED = {CONFIG, WEIGHTS, SCBIN, HEAD, CARD, MANIFEST}
MAX_JSON, MAX_HEADER, MAX_DEPTH = 64 * 2**20, 8 * 2**20, 16
_LFS = b"version https://git-lfs"


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _real(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: type(value) in {type(v) for v in values} and value in values


# the keys of config.json that are read, and what they may be; whatever else the file says has no effect
CONFIG_KEYS: dict[str, Callable[[Any], bool]] = {
    "vocab_size": _whole(2, 2**20),
    "max_position_embeddings": _whole(1, 65_536),
    "type_vocab_size": _whole(1, 16),
    "num_hidden_layers": _whole(1, 96),
    "hidden_size": _whole(8, 8192),
    "num_attention_heads": _whole(1, 256),
    "intermediate_size": _whole(8, 65_536),
    "hidden_act": _one_of("gelu", "gelu_new", "relu", "silu"),
    "hidden_dropout_prob": _real(0, 1),
    "attention_probs_dropout_prob": _real(0, 1),
    "layer_norm_eps": _real(1e-15, 1e-2),
    "initializer_range": _real(1e-6, 1),
    "pad_token_id": _whole(0, 2**20),
    "tie_word_embeddings": _one_of(True, False),
}
_REQUIRED = (
    *("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads"),
    "intermediate_size",
)


def write_model_directory(
    path: Path,
    bert: BertForMaskedLM,
    about: Mapping[str, Any],
    card: str,
    head: Mapping[str, Tensor] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write network, description, model card and head so that the directory appears at once and whole.

    Plain `transformers.BertForMaskedLM.from_pretrained` opens it too.
    """
    path = path.resolve()
    replaces = replaces_model(path, overwrite)
    tensors = own_tensors(bert)
    check_finite(tensors, "the model")
    config = {key: getattr(bert.config, key) for key in CONFIG_KEYS}
    config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert", "dtype": "float32"}
    files: dict[str, Any] = {
        CONFIG: _json_bytes(config),
        WEIGHTS: tensors,
        SCBIN: _json_bytes(about),
        CARD: card.encode(),
    }
    if head is not None:
        check_finite(head, "the head")
        files[HEAD] = dict(head)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(path, error) from error
    if replaces:
        _replace(path, files)
    else:
        write_directory(path, files)


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


def _replace(path: Path, files: Mapping[str, Any]) -> None:
    """Put a new model in the place of an old one, which stays or comes back where that fails."""
    fresh, old = (path.with_name(f".tmp-{word}-{path.name}-{os.getpid()}") for word in ("new", "old"))
    try:
        write_directory(fresh, files)
        os.rename(path, old)
        try:
            os.rename(fresh, path)
        except OSError:
            os.rename(old, path)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        if path.exists():
            for left in (fresh, old):
                shutil.rmtree(left, ignore_errors=True)


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
    fault = verify_directory(path)
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
    names = {entry.name for entry in os.scandir(path)}
    missing = {CONFIG, WEIGHTS, SCBIN, MANIFEST} - names
    if missing:
        raise ScbinModelError("M04", f"{path} is not a scbin model: {', '.join(sorted(missing))} is not in it.")
    for name in sorted(names):
        if name not in ALLOWED:
            raise ScbinModelError(
                "M05", f"{path} holds {name!r}, which does not belong into a scbin model. Remove it first."
            )
        status = os.lstat(path / name)
        if not stat.S_ISREG(status.st_mode):
            raise ScbinModelError("M05", f"{name} in {path} is a link or no regular file; models are plain files.")
        if name not in (WEIGHTS, HEAD) and status.st_size > MAX_JSON:
            raise ScbinModelError("M06", f"{name} has {status.st_size:,} bytes; at most {MAX_JSON:,} are read.")
        if status.st_size < 1024 and (path / name).read_bytes().startswith(_LFS):
            raise ScbinModelError(
                "M07", f"{name} is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`."
            )


def _check_manifest(path: Path) -> None:
    """Refuse a manifest that leaves a file out or names one elsewhere, before the files it names are opened."""
    try:
        files = _parse(read_json(path)["manifest"].encode())["files"]
        sound = {CONFIG, WEIGHTS, SCBIN} <= set(files) <= ALLOWED - {MANIFEST} and all(
            type(entry["size"]) is int and type(entry["sha256"]) is str for entry in files.values()
        )
        sound &= (HEAD in files) == path.with_name(HEAD).exists()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, ScbinModelError):
            raise
        sound = False
    if not sound:
        raise ScbinModelError("M09", f"{path.name} does not list the files of a model. Fetch or save it again.")


def _parse(text: bytes) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; duplicate keys, NaN, infinity and deep nesting are refused."""
    text = path.read_bytes()
    try:
        content = _parse(text)
    except (ValueError, RecursionError) as error:
        raise ScbinModelError("M08", f"{path.name} is not valid JSON for a model ({str(error)[:80]}).") from error
    if not isinstance(content, dict):
        raise ScbinModelError("M08", f"{path.name} holds a {type(content).__name__}, not an object.")
    if _depth(content) > MAX_DEPTH:
        raise ScbinModelError("M08", f"{path.name} is nested deeper than {MAX_DEPTH} levels.")
    return content


def _depth(content: Any) -> int:
    """Levels of nesting; what the parser let through is shallow enough to be walked."""
    level, depth = [content], 0
    while level:
        depth += 1
        inner = [
            list(part.values()) if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)
        ]
        level = [item for part in inner for item in part if isinstance(item, dict | list)]
    return depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number that JSON knows")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not finite")
    return value


def read_config(path: Path) -> BertConfig:
    """Return our own configuration with the numbers of a config.json, each within its range; its other keys have no effect."""
    content = read_json(path)
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise ScbinModelError("M10", f"{path.name} does not say {', '.join(missing)}.")
    picked = {key: content[key] for key in CONFIG_KEYS if key in content}
    for key, value in picked.items():
        if not CONFIG_KEYS[key](value):
            raise ScbinModelError("M11", f"{path.name} says {key}={str(value)[:40]!r}, which is out of range.")
    if picked["hidden_size"] % picked["num_attention_heads"]:
        raise ScbinModelError("M11", f"{path.name}: hidden_size is not a multiple of num_attention_heads.")
    if picked["intermediate_size"] > 8 * picked["hidden_size"]:
        raise ScbinModelError("M11", f"{path.name}: intermediate_size is more than 8 times hidden_size.")
    if picked.setdefault("pad_token_id", 0) >= picked["vocab_size"]:
        raise ScbinModelError("M11", f"{path.name}: pad_token_id is not a token of the vocabulary.")
    return BertConfig(**picked, attn_implementation=PACKED)  # type: ignore[call-arg]


def load_bert(config: BertConfig, path: Path) -> BertForMaskedLM:
    """Return the network of a configuration with the weights of a safetensors file, which must fit exactly."""
    with torch.device("meta"):
        bert = BertForMaskedLM(config)
    tensors = read_tensors(path, {name: tuple(tensor.shape) for name, tensor in own_tensors(bert).items()})
    aliases = {name: tensors[own] for name, own in _tied(bert).items()}
    bert.load_state_dict({**tensors, **aliases}, strict=True, assign=True)
    bert.tie_weights()
    embeddings = bert.bert.embeddings
    positions = torch.arange(config.max_position_embeddings)[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
    return bert.eval()


def read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in float32: exactly those expected, of their shapes, all numbers finite."""
    _compare(expected, read_header(path), path.name)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ScbinModelError("M14", f"{path.name} cannot be read ({str(error)[:80]}).") from error
    tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ScbinModelError("M15", f"{name} in {path.name} holds NaN or infinity. The model cannot be used.")
    return tensors


def own_tensors(bert: BertForMaskedLM) -> dict[str, Tensor]:
    """Return the tensors of the network by name, each once: tied ones under the name that is stored."""
    tied = _tied(bert)
    return {name: tensor.detach() for name, tensor in bert.state_dict().items() if name not in tied}


def _tied(bert: BertForMaskedLM) -> dict[str, str]:
    """Names of tied tensors, with the name under which each is stored."""
    tied = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    if bert.config.tie_word_embeddings:
        tied["cls.predictions.decoder.weight"] = "bert.embeddings.word_embeddings.weight"
    return tied


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a safetensors file declares, without reading the tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER, size - 8):
            raise ScbinModelError("M13", f"{path.name} is not a safetensors file: its header does not fit into it.")
        text = file.read(length)
    try:
        header = _parse(text)
        header.pop("__metadata__", None)
        shapes = {}
        for name, entry in header.items():
            if entry["dtype"] not in ("F32", "F16", "BF16"):
                raise ScbinModelError("M13", f"{name[:80]} in {path.name} is of type {str(entry['dtype'])[:8]}.")
            shapes[name] = tuple(int(number) for number in entry["shape"])
        return shapes
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ScbinModelError(
            "M13", f"{path.name} has no valid safetensors header ({type(error).__name__})."
        ) from error


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], name: str) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"{len(missing)} are missing ({missing[0][:80]})"] if missing else []
        parts += [f"{len(extra)} do not belong ({extra[0][:80]})"] if extra else []
        raise ScbinModelError(
            "M12", f"the tensors of {name} are not those that config.json describes: {'; '.join(parts)}."
        )
    for tensor, shape in expected.items():
        if found[tensor] != shape:
            raise ScbinModelError(
                "M12", f"{tensor} in {name} has shape {found[tensor]}; config.json describes {shape}."
            )


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()
