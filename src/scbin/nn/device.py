"""Where to compute, and how exactly."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import torch

from scbin._arguments import instances
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from transformers import BertConfig

Precision = Literal["auto", "float32", "bfloat16"]
_log = logging.getLogger(__name__)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device asked for; `"auto"` takes cuda, then mps, then cpu, and logs its choice.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    instances((str, torch.device), "a text, such as 'cuda'", device=device)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if str(device) == "auto":
        name = next(name for name, here in present.items() if here)
        _log.info("computing on %s", name)
        return torch.device(name)
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ScbinInputError(
            "T20", f"{device!r} is not the name of a device; use 'auto', 'cuda', 'mps' or 'cpu'."
        ) from error
    if not present.get(chosen.type, False) or (
        chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()
    ):
        here = ", ".join(repr(name) for name, is_here in present.items() if is_here)
        raise ScbinInputError("T20", f"device {str(device)!r} is not on this machine. Here: {here}; 'auto' chooses.")
    return chosen


def resolve_precision(precision: Precision, device: torch.device, config: BertConfig) -> torch.dtype:
    """Return the type of the matrix products; `"auto"` takes bfloat16 where it was measured to help.

    That is on CUDA since Ampere, and on CPUs with matrix units for bfloat16 from a hidden size of 256 on: below, the
    conversions cost more than the products save.
    """
    if precision == "float32":
        return torch.float32
    if precision == "bfloat16":
        return torch.bfloat16
    if precision != "auto":
        raise ScbinInputError("T21", f"precision is {precision!r}; choose 'auto', 'float32' or 'bfloat16'.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    wide = config.hidden_size >= 256 and config.hidden_size // config.num_attention_heads >= 32
    return torch.bfloat16 if device.type == "cpu" and wide and _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe()) if probe is not None else False
