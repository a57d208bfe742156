"""The files of a model: written whole and with a manifest, read as untrusted input, each checked before it is used."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig

from scbin._arguments import shown
from scbin._errors import ScbinModelError
from scbin.io.commit import committed
from scbin.nn.attention import PACKED
from scbin.nn.presets import CONFIG_KEYS, misfit, shape_misfit

MANIFEST = "manifest.json"
# left by git, by downloads and by file managers; never opened
HARMLESS = {".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store"}

Content = bytes | Mapping[str, Tensor]
MAX_JSON, MAX_WEIGHTS = 64 * 2**20, 64 * 2**30
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32"}
_DTYPES |= {torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL"}


# ---- writing --------------------------------------------------------------------------------------------------------


def write_directory(target: Path, files: Mapping[str, Content], unlisted: Collection[str] = ()) -> None:
    """Write files, bytes or tensors, into a directory so that it appears at once and whole, or not at all.

    `manifest.json` holds size and sha256 of each but the `unlisted`, which people may edit. What was there before is replaced.
    Weights that are not finite are never written.
    """
    with committed(target, ScbinModelError, "M05") as temporary:
        os.mkdir(temporary)
        entries = {name: _write_file(temporary / name, content) for name, content in files.items()}
        _write_file(temporary / MANIFEST, manifest_bytes({k: v for k, v in entries.items() if k not in unlisted}))


def _write_file(path: Path, content: Content) -> dict[str, Any]:
    """Write and hash one file; neither way of writing maps it into memory, which would die of a full disk."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif (bad := not_finite(content)) is not None:
        raise ScbinModelError("M05", f"{bad} of {path.name} holds NaN or infinity. It was not written.")
    else:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in content.items()}, path, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return _entry(path)


def _entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or `None`."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return next((name for name, tensor in floats.items() if not bool(torch.isfinite(tensor).all())), None)


def manifest_bytes(entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the manifest, one text for one content, so that every one of its bits counts too."""
    text = json.dumps({"files": entries}, sort_keys=True)
    return json.dumps({"manifest": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True).encode()


def verify_directory(directory: Path, names: Collection[str] | None = None) -> str | None:
    """Return what is wrong with a directory that `write_directory` made, naming the file, or `None`.

    Where `names` are given, the manifest must list these and no others.
    """
    try:
        raw = (directory / MANIFEST).read_bytes()
        entries = json.loads(json.loads(raw)["manifest"])["files"]
        if manifest_bytes(entries) != raw or (names is not None and set(entries) != set(names)):
            return f"{MANIFEST} is damaged, or does not list these files"
        for name, entry in sorted(entries.items()):
            path = directory / name
            if not path.is_file() or path.stat().st_size != entry["size"] or _entry(path) != entry:
                return f"{name} is not what was written (it is missing, or its size or sha256 differ)"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} or a file it lists cannot be read ({error!r:.80})"
    return None


# ---- reading --------------------------------------------------------------------------------------------------------


def check_directory(path: Path, required: set[str], allowed: set[str], unlisted: set[str]) -> None:
    """Refuse links, foreign files and missing ones before any is opened, then those that are not what the manifest says."""
    names = set(os.listdir(path)) - HARMLESS if path.is_dir() else set()
    if required <= names and names - allowed:
        what = f"{path} holds {min(names - allowed)!r}, which does not belong to a model"
        raise ScbinModelError("M03", f"{what}. Remove it first.")
    check_files(path, required, names)
    fault = verify_directory(path, names - {MANIFEST} - unlisted)
    if fault:
        raise ScbinModelError("M02", f"the model in {path} is damaged: {fault}. Fetch or save it again.")


def check_files(directory: Path, required: Collection[str], others: Collection[str] = ()) -> None:
    """Refuse a directory that lacks a file, or in which one is not a plain file, before any is opened."""
    missing = sorted(set(required) - set(os.listdir(directory) if directory.is_dir() else ()))
    if missing:
        what = f"{directory} is not a model of this kind: {', '.join(missing)} is not there"
        fix = "For models of other packages see Model.from_geneformer, from_polygene, from_perturbgene. Pickled weights (*.bin) are never opened"
        raise ScbinModelError(
            "M01", f"{what}. {fix}: where you trust them, convert them with transformers' save_pretrained."
        )
    for name in sorted({*required, *others}):
        check_plain(directory / name, MAX_WEIGHTS if name.endswith(".safetensors") else MAX_JSON)


def check_plain(path: Path, most: int) -> None:
    """Refuse what is not a regular file of acceptable size, before it is opened.

    A link is followed only within a download of `huggingface_hub`: from a folder in `snapshots` into `blobs` beside it.
    """
    real, folders = Path(os.path.realpath(path)), Path(os.path.abspath(path)).parents
    blobs = [Path(os.path.realpath(folder.parent / "blobs")) for folder in folders if folder.name == "snapshots"]
    if (path.is_symlink() and real.parent not in blobs) or not real.is_file() or real.stat().st_size > most:
        raise ScbinModelError(
            "M03", f"{path.name} in {path.parent} is a link, or not a file of at most {most:,} bytes."
        )
    if real.stat().st_size < 1024 and real.read_bytes().startswith(b"version https://git-lfs"):
        raise ScbinModelError("M02", f"{path.name} is a Git LFS pointer. Fetch the file itself with `git lfs pull`.")


def parse_json(text: bytes) -> dict[str, Any]:
    """Return the object that a JSON text describes; duplicate keys, NaN and infinity are a `ValueError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice in one object")
        return dict(pairs)

    def number(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text[:20]} is not a finite number")
        return float(text)

    content = json.loads(text, object_pairs_hook=unique, parse_constant=number, parse_float=number)
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    try:
        return parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ScbinModelError("M02", f"{path.name} is not valid JSON for a model ({str(error)[:80]}).") from error


def make_config(content: Mapping[str, Any], name: str) -> BertConfig:
    """Return our own configuration with the numbers of a config.json, each within its range; its other keys have no effect."""
    picked = {"pad_token_id": 0} | {key: content[key] for key in CONFIG_KEYS if key in content}
    for key, value in picked.items():
        if (words := misfit(value, CONFIG_KEYS[key])) is not None:
            raise ScbinModelError("M03", f"{name}: {key} is {str(value)[:40]!r}, it needs to be {words}.")
        picked[key] = float(value) if isinstance(CONFIG_KEYS[key][0], float) else value  # transformers wants 1.0, not 1
    shape = {key: getattr(BertConfig(), key) for key in CONFIG_KEYS} | picked
    fault = shape_misfit(shape)
    if fault is not None or shape["pad_token_id"] >= shape["vocab_size"]:
        raise ScbinModelError("M03", f"{name}: {fault or 'pad_token_id is not a token of the vocabulary'}.")
    return BertConfig(**picked, attn_implementation=PACKED)  # type: ignore[call-arg]


def read_tensors(path: Path, expected: Mapping[str, Tensor], ignored: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file: exactly those expected, of their shapes and types, all numbers finite.

    `expected` are tensors on the meta device. Only when the shapes that the file declares have been compared with them is memory
    asked for. Half precision is widened; tensors named in `ignored` may be there and are left out.
    """
    found = read_header(path)
    odd = sorted(set(expected) ^ (set(found) - (set(ignored) - set(expected))))
    if odd:
        what = f"{len(odd)} are missing or do not belong (such as {odd[0][:80]})"
        raise ScbinModelError("M02", f"the tensors of {path.name} are not those of the configuration: {what}.")
    for name, tensor in expected.items():
        (dtype, shape), due = found[name], _DTYPES[tensor.dtype]
        if shape != tuple(tensor.shape) or dtype not in ((due, "F16", "BF16") if due == "F32" else (due,)):
            what = f"{dtype} of shape {shown(shape)}, not {due} of {tuple(tensor.shape)} as the configuration says"
            raise ScbinModelError("M02", f"{name} in {path.name} is {what}.")
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name).to(tensor.dtype) for name, tensor in expected.items()}
    if (bad := not_finite(tensors)) is not None:
        raise ScbinModelError("M02", f"{bad} in {path.name} holds NaN or infinity. The model cannot be used.")
    return tensors


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor of a safetensors file, which fill it exactly, without reading the tensors."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _opened(path: Path) -> Any:
    """Return a safetensors file, opened: its library has compared the header with the length of the file."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, MemoryError) as error:
        raise ScbinModelError("M02", f"{path.name} is not a valid safetensors file ({str(error)[:80]}).") from error
