"""Where to compute, and how exactly."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, get_args

import torch

from scbin._arguments import choices, instances
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

Precision = Literal["auto", "float32", "bfloat16"]
_PROCESS = os.getpid()
_log = logging.getLogger(__name__)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device asked for; `"auto"` takes cuda, then mps, then cpu, and logs its choice.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    instances((str, torch.device), "a text, such as 'cuda'", device=device)
    if os.getpid() != _PROCESS:  # OpenMP's threads do not survive a fork: torch would wait for them for ever
        torch.set_num_threads(1)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if str(device) == "auto":
        name = next(name for name, here in present.items() if here)
        _log.info("computing on %s", name)
        return torch.device(name)
    try:
        chosen = torch.device(device)
        there = present[chosen.type] and (chosen.type != "cuda" or (chosen.index or 0) < torch.cuda.device_count())
    except (RuntimeError, KeyError) as error:
        raise ScbinInputError("A02", f"{device!r} is not a device; use 'auto', 'cuda', 'mps' or 'cpu'.") from error
    if not there:
        here = ", ".join(repr(name) for name, is_here in present.items() if is_here)
        raise ScbinInputError("A02", f"device {str(device)!r} is not on this machine. Here: {here}; 'auto' chooses.")
    return chosen


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device has matrix units for bfloat16, as all have since Ampere."""
    return torch.cuda.get_device_capability(device)[0] >= 8


def resolve_precision(precision: Precision, device: torch.device, trains: int = 0) -> torch.dtype:
    """Return the type of the matrix products; `"auto"` takes bfloat16 on CUDA since Ampere.

    On CPUs it stays with float32, but for the training of networks: of a hidden size `trains` from 128 on, where there are
    instructions for products in bfloat16. Below, little is gained.
    """
    if precision != "auto":
        choices({"precision": get_args(Precision)}, precision=precision)
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    tells = (getattr(torch.cpu, f"_is_{unit}_supported", lambda: False) for unit in ("amx_tile", "avx512_bf16"))
    on_cpu = device.type == "cpu" and trains >= 128 and any(has_units() for has_units in tells)
    return torch.bfloat16 if on_cpu or (device.type == "cuda" and has_bfloat16(device)) else torch.float32


@contextmanager
def fast_products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """For a while let CUDA compute in TF32 what stays in float32 beside bfloat16; who asks for float32 gets all of its digits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if device.type == "cuda" and dtype != torch.float32:
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
