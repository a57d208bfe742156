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

MAX_JSON, MAX_HEADER, MAX_DEPTH, MAX_WEIGHTS = 64 * 2**20, 8 * 2**20, 16, 64 * 2**30
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_HALF = ("F16", "BF16")
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
    if not stat.S_ISREG(status.st_mode):
        raise ScbinModelError("M03", f"{path.name} in {path.parent} is no regular file; models are plain files.")
    if status.st_size > most:
        raise ScbinModelError("M03", f"{path.name} has {status.st_size:,} bytes; at most {most:,} are read.")
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
    names = sorted(entry.name for entry in os.scandir(directory))
    if weights in names:
        return
    pickled = next((name for name in names if name.endswith(_PICKLED)), None)
    if pickled is not None:
        raise ScbinModelError(
            "M03",
            f"{directory} has its weights only as {pickled[:80]!r}, which can run code when it is opened; scbin never opens it. "
            f"Where you trust it, convert it to {weights} with transformers (model.save_pretrained) and pass that.",
        )
    if f"{weights}.index.json" in names:
        raise ScbinModelError("M03", f"{directory} has its weights in several files. Join them into one {weights}.")


def parse_json(text: bytes) -> Any:
    """Return what a JSON text says; duplicate keys, NaN and infinity are a `ValueError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return result

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:20]} is not a finite number")
        return value

    return json.loads(text, object_pairs_hook=unique, parse_constant=number, parse_float=number)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; duplicate keys, NaN, infinity and deep nesting are refused."""
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict) or depth(content) > MAX_DEPTH:
            raise ValueError(f"not an object of at most {MAX_DEPTH} levels")
    except (ValueError, RecursionError) as error:
        raise ScbinModelError("M02", f"{path.name} is not valid JSON for a model ({str(error)[:80]}).") from error
    return content


def depth(content: Any) -> int:
    """Return the levels of nesting, level by level: what the parser let through may still be deep."""
    level, n_levels = [content], 0
    while level:
        n_levels += 1
        inner = [part.values() if isinstance(part, dict) else part for part in level]
        level = [item for part in inner for item in part if isinstance(item, dict | list)]
    return n_levels


_REQUIRED = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads")


def make_config(content: Mapping[str, Any], name: str) -> BertConfig:
    """Return our own configuration with the numbers of a config.json, each within its range; its other keys have no effect."""
    missing = [key for key in (*_REQUIRED, "intermediate_size") if key not in content]
    if missing:
        raise ScbinModelError("M02", f"{name} does not say {', '.join(missing)}.")
    picked = {key: content[key] for key in CONFIG_KEYS if key in content}
    for key, value in picked.items():
        words = misfit(value, CONFIG_KEYS[key])
        if words:
            raise ScbinModelError("M03", f"{name} says {key}={str(value)[:40]!r}; it needs {words}.")
    for key in ("layer_norm_eps", "initializer_range"):  # 1 is a number too, but transformers wants 1.0
        if key in picked:
            picked[key] = float(picked[key])
    fault = shape_misfit(picked)
    if fault is None and picked.setdefault("pad_token_id", 0) >= picked["vocab_size"]:
        fault = "pad_token_id is not a token of the vocabulary"
    if fault is not None:
        raise ScbinModelError("M03", f"{name}: {fault}.")
    return BertConfig(**picked, attn_implementation=PACKED)  # type: ignore[call-arg]


def read_tensors(path: Path, expected: Mapping[str, Tensor], ignored: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file: exactly those expected, of their shapes and types, all numbers finite.

    `expected` are tensors on the meta device. Only when the shapes that the file declares have been compared with them is memory
    asked for. Half precision is widened; tensors named in `ignored` may be there and are left out.
    """
    found, size = read_header(path), path.stat().st_size
    needed = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    if needed > 4 * size + MAX_HEADER:
        raise ScbinModelError("M03", f"the configuration needs {needed:,} bytes of weights; {path.name} has {size:,}.")
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected) - set(ignored))
    if missing or extra:
        counts = f"{len(missing)} are missing, {len(extra)} do not belong (such as {(missing or extra)[0][:80]})"
        raise ScbinModelError("M02", f"the tensors of {path.name} are not those of the configuration: {counts}.")
    for name, tensor in expected.items():
        (dtype, shape), due = found[name], _DTYPES[tensor.dtype]
        if shape != tuple(tensor.shape) or not (dtype == due or (due == "F32" and dtype in _HALF)):
            own = (
                f"is {dtype[:8]} of shape {shown(shape)}, not {due} of {tuple(tensor.shape)} as the configuration says"
            )
            raise ScbinModelError("M02", f"{name} in {path.name} {own}.")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).to(tensor.dtype) for name, tensor in expected.items()}
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ScbinModelError("M02", f"{path.name} cannot be read ({str(error)[:80]}).") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ScbinModelError("M02", f"{name} in {path.name} holds NaN or infinity. The model cannot be used.")
    return tensors


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor that a safetensors file declares, without reading the tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER, size - 8):
            raise ScbinModelError("M02", f"{path.name} is not a safetensors file: its header does not fit into it.")
        text = file.read(length)
    try:
        header = parse_json(text)
        header.pop("__metadata__", None)
        found = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in header.items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        kind = type(error).__name__
        raise ScbinModelError("M02", f"{path.name} has no valid safetensors header ({kind}).") from error
    if 8 + length + end != size:  # before the file is mapped into memory, which takes its length for true
        raise ScbinModelError("M02", f"{path.name} has {size:,} bytes, but its header describes {8 + length + end:,}.")
    return found
