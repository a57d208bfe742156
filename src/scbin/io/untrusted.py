"""Reading files from strangers: names, sizes, JSON, configurations and tensors, each checked before it is believed."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import BertConfig

from scbin._arguments import shown
from scbin._errors import ScbinModelError
from scbin.nn.attention import PACKED
from scbin.nn.limits import CONFIG_KEYS, misfit, shape_misfit

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

MAX_JSON, MAX_WEIGHTS = 64 * 2**20, 64 * 2**30
_REFUSED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".index.json")  # weights as pickles, or in pieces
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32"}
_DTYPES |= {torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL"}


def check_plain(path: Path, most: int) -> None:
    """Refuse what is not a regular file of acceptable size, before it is opened.

    A link is followed only within a download of `huggingface_hub`, which keeps the files of a repository in a folder beside it.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        target, blobs = Path(os.path.realpath(path)), downloads(path.parent)
        if blobs is None or target.parent != blobs.resolve() or not target.exists():
            raise ScbinModelError("M03", f"{path.name} is a link to {shown(str(target))}. Copy the file itself here.")
        status = os.lstat(target)
    if not stat.S_ISREG(status.st_mode) or status.st_size > most:
        raise ScbinModelError("M03", f"{path.name} in {path.parent} is no regular file of at most {most:,} bytes.")
    if status.st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise ScbinModelError("M02", f"{path.name} is a Git LFS pointer. Fetch the file itself with `git lfs pull`.")


def downloads(directory: Path) -> Path | None:
    """Return where `huggingface_hub` keeps the files that a folder of its download links to; `None` for any other folder."""
    here = Path(os.path.abspath(directory))
    for folder in (here, *here.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent / "blobs"
    return None


def check_weights_there(directory: Path, weights: str) -> None:
    """Refuse what is no directory, or has its weights only as pickles, which are never opened, or in pieces."""
    if not directory.is_dir():
        raise ScbinModelError("M01", f"{directory} is not a directory. Pass the directory of a model.")
    names = sorted(os.listdir(directory))
    other = next((name for name in names if name.endswith(_REFUSED)), None)
    if weights not in names and other is not None:
        what = f"{directory} has its weights only as {other[:80]!r}; scbin opens no pickle, which can run code, and no piece"
        fix = f"Where you trust it, convert it to {weights} with transformers (model.save_pretrained)"
        raise ScbinModelError("M03", f"{what}. {fix} and pass that.")


def parse_json(text: bytes) -> dict[str, Any]:
    """Return the object that a JSON text describes; duplicate keys, NaN and infinity are a `ValueError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice in one object")
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
    sizes = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads")
    missing = [key for key in (*sizes, "intermediate_size") if key not in content]
    if missing:
        raise ScbinModelError("M02", f"{name} does not say {', '.join(missing)}.")
    picked = {"pad_token_id": 0} | {key: content[key] for key in CONFIG_KEYS if key in content}
    faults = [
        f"{key} is {str(value)[:40]!r}, it needs to be {words}"
        for key, value in picked.items()
        if (words := misfit(value, CONFIG_KEYS[key]))
    ]
    if not faults and picked["pad_token_id"] >= picked["vocab_size"]:
        faults = ["pad_token_id is not a token of the vocabulary"]
    fault = faults[0] if faults else shape_misfit(picked)
    if fault is not None:
        raise ScbinModelError("M03", f"{name}: {fault}.")
    for key in {"layer_norm_eps", "initializer_range"} & set(picked):  # 1 is a number too, but transformers wants 1.0
        picked[key] = float(picked[key])
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
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ScbinModelError("M02", f"{name} in {path.name} holds NaN or infinity. The model cannot be used.")
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
        raise ScbinModelError("M02", f"{path.name} is not a sound safetensors file ({str(error)[:80]}).") from error
