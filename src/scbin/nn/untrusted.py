"""Reading files from strangers: names, sizes, JSON, configurations and tensors, each checked before it is believed."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertConfig

from scbin._errors import ScbinModelError
from scbin.nn.attention import PACKED
from scbin.nn.limits import CONFIG_KEYS, misfit

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

MAX_JSON, MAX_HEADER, MAX_DEPTH, MAX_WEIGHTS = 64 * 2**20, 8 * 2**20, 16, 64 * 2**30
_LFS = b"version https://git-lfs"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


# ---- files -----------------------------------------------------------------------------------------------------------


def check_plain(path: Path, most: int) -> None:
    """Refuse what is not a regular file of acceptable size, before it is opened.

    A link is followed only within a download of `huggingface_hub`, which keeps the files of a repository in a folder beside it.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        target, blobs = Path(os.path.realpath(path)), downloads(path.parent)
        if blobs is None or target.parent != blobs.resolve():
            raise ScbinModelError(
                "M30",
                f"{path.name} is a link to {str(target)[:80]!r}. Links are not followed: copy the file itself here.",
            )
        status = os.lstat(target)
    if not stat.S_ISREG(status.st_mode):
        raise ScbinModelError("M05", f"{path.name} in {path.parent} is no regular file; models are plain files.")
    if status.st_size > most:
        raise ScbinModelError("M06", f"{path.name} has {status.st_size:,} bytes; at most {most:,} are read.")
    if status.st_size < 1024 and path.read_bytes().startswith(_LFS):
        raise ScbinModelError(
            "M07", f"{path.name} is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`."
        )


def downloads(directory: Path) -> Path | None:
    """Return where `huggingface_hub` keeps the files that a folder of its download links to; `None` for any other folder."""
    here = Path(os.path.abspath(directory))
    for folder in (here, *here.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent / "blobs"
    return None


def refuse_pickles(directory: Path, weights: str) -> None:
    """Say so where a directory has weights, but only as pickles, which are never opened."""
    names = sorted(entry.name for entry in os.scandir(directory))
    if weights in names:
        return
    pickled = next((name for name in names if name.endswith(_PICKLED)), None)
    if pickled is not None:
        raise ScbinModelError(
            "M31",
            f"{directory} has its weights only as {pickled[:80]!r}, whose format can run code when it is opened; scbin never "
            f"opens it. Where you trust it, convert it to {weights} with transformers (model.save_pretrained) and pass that.",
        )
    if f"{weights}.index.json" in names:
        raise ScbinModelError(
            "M35", f"{directory} has its weights in several files. Join them into one {weights} and pass that."
        )


# ---- JSON ------------------------------------------------------------------------------------------------------------


def parse_json(text: bytes) -> Any:
    """Return what a JSON text says; duplicate keys, NaN and infinity are a `ValueError`."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; duplicate keys, NaN, infinity and deep nesting are refused."""
    text = path.read_bytes()
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise ScbinModelError("M08", f"{path.name} is not valid JSON for a model ({str(error)[:80]}).") from error
    if not isinstance(content, dict):
        raise ScbinModelError("M08", f"{path.name} holds a {type(content).__name__}, not an object.")
    if depth(content) > MAX_DEPTH:
        raise ScbinModelError("M08", f"{path.name} is nested deeper than {MAX_DEPTH} levels.")
    return content


def depth(content: Any) -> int:
    """Return the levels of nesting; what the parser let through is shallow enough to be walked."""
    level, n_levels = [content], 0
    while level:
        n_levels += 1
        inner = [
            list(part.values()) if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)
        ]
        level = [item for part in inner for item in part if isinstance(item, dict | list)]
    return n_levels


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


# ---- config.json -----------------------------------------------------------------------------------------------------


_REQUIRED = (
    *("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads"),
    "intermediate_size",
)


def read_config(path: Path) -> BertConfig:
    """Return our own configuration with the numbers of a config.json, each within its range; its other keys have no effect."""
    return make_config(read_json(path), path.name)


def make_config(content: Mapping[str, Any], name: str) -> BertConfig:
    """Return a configuration with the numbers picked from a JSON object, each within its range."""
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise ScbinModelError("M10", f"{name} does not say {', '.join(missing)}.")
    picked = {key: content[key] for key in CONFIG_KEYS if key in content}
    for key, value in picked.items():
        if not CONFIG_KEYS[key](value):
            raise ScbinModelError("M11", f"{name} says {key}={str(value)[:40]!r}, which is out of range.")
    for key in ("layer_norm_eps", "initializer_range"):  # 1 is a number too, but transformers wants 1.0
        if key in picked:
            picked[key] = float(picked[key])
    fault = misfit(picked)
    if fault is not None:
        raise ScbinModelError("M11", f"{name}: {fault}.")
    if picked.setdefault("pad_token_id", 0) >= picked["vocab_size"]:
        raise ScbinModelError("M11", f"{name}: pad_token_id is not a token of the vocabulary.")
    return BertConfig(**picked, attn_implementation=PACKED)  # type: ignore[call-arg]


# ---- tensors ---------------------------------------------------------------------------------------------------------


def read_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]], ignored: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file in float32: exactly those expected, of their shapes, all numbers finite.

    Only when the shapes that the file declares have been compared is memory asked for. Tensors named in `ignored` may be there
    and are left out.
    """
    _compare(expected, read_header(path, ignored), path)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ScbinModelError("M14", f"{path.name} cannot be read ({str(error)[:80]}).") from error
    tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items() if name in expected}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ScbinModelError("M15", f"{name} in {path.name} holds NaN or infinity. The model cannot be used.")
    return tensors


def read_header(path: Path, ignored: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a safetensors file declares, without reading the tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(MAX_HEADER, size - 8):
            raise ScbinModelError("M13", f"{path.name} is not a safetensors file: its header does not fit into it.")
        text = file.read(length)
    try:
        header = parse_json(text)
        header.pop("__metadata__", None)
        shapes, end = {}, 0
        for name, entry in header.items():
            end = max(end, int(entry["data_offsets"][1]))
            if name in ignored:
                continue
            if entry["dtype"] not in ("F32", "F16", "BF16"):
                raise ScbinModelError("M13", f"{name[:80]} in {path.name} is of type {str(entry['dtype'])[:8]}.")
            shapes[name] = tuple(int(number) for number in entry["shape"])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        if isinstance(error, ScbinModelError):
            raise
        raise ScbinModelError(
            "M13", f"{path.name} has no valid safetensors header ({type(error).__name__})."
        ) from error
    if 8 + length + end != size:  # before the file is mapped into memory, which takes its length for true
        raise ScbinModelError("M14", f"{path.name} has {size:,} bytes, but its header describes {8 + length + end:,}.")
    return shapes


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    needed, there = sum(4 * math.prod(shape) for shape in expected.values()), path.stat().st_size
    if needed > 4 * there + MAX_HEADER:
        raise ScbinModelError(
            "M34",
            f"config.json asks for {needed:,} bytes of weights, but {path.name} has {there:,}. They do not belong together.",
        )
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [f"{len(missing)} are missing ({missing[0][:80]})"] if missing else []
        parts += [f"{len(extra)} do not belong ({extra[0][:80]})"] if extra else []
        raise ScbinModelError(
            "M12", f"the tensors of {path.name} are not those that config.json describes: {'; '.join(parts)}."
        )
    for tensor, shape in expected.items():
        if found[tensor] != shape:
            raise ScbinModelError(
                "M33", f"{tensor} in {path.name} has shape {str(found[tensor])[:80]}; config.json describes {shape}."
            )
