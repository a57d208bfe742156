"""Attention within each cell of a pack, registered with transformers so that BERT itself stays stock."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKED = "scbin_packed"
"""Name of the packed attention among the attention implementations of transformers."""

_SCORES = 2**20  # that are made at once, 2 MiB


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each row of a pack begins, on the host for kernels called row by row, on the device for the packed kernel."""

    lengths: list[int]
    cu_seqlens: Tensor  # (B + 1,) int32, on the device
    longest: int


def pack_layout(lengths: np.ndarray, device: torch.device | str = "cpu") -> Layout:
    """Describe rows of these lengths (B,) to the attention.

    Examples
    --------
    >>> pack_layout(np.array([3, 2])).cu_seqlens
    tensor([0, 3, 5], dtype=torch.int32)
    """
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Layout(lengths.tolist(), to_device(bounds, device), int(lengths.max(initial=0)))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device has matrix units for bfloat16, as all have since Ampere."""
    return torch.cuda.get_device_capability(device)[0] >= 8


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """Move a host array to the device; for a GPU through pinned memory and without waiting."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout | None = None,
    key_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each row of a pack: query, key and value are (1, heads, T, d), the result is (1, T, heads, d).

    Without a `layout` this is the ordinary attention over padded batches with their mask. A `key_bias` (T,) is added to the scores
    of each key: the logarithm of a gate. There is no dropout.
    """
    scale, width = query.shape[-1] ** -0.5 if scaling is None else scaling, value.shape[-1]
    if key_bias is not None:
        query, key, value = _biased(query, key, value, key_bias, scale)
    if layout is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scale).transpose(1, 2)
    elif not query.is_cuda:
        out = _row_by_row(query, key, value, layout, scale)
    elif query.dtype != torch.float32 and has_bfloat16(query.device):
        out = _varlen(query, key, value, layout, scale)
    else:
        out = _jagged(query, key, value, layout, scale)
    return out[..., :width], None


def _biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Carry a bias of the keys in one more dimension, which every kernel takes and has a gradient for."""
    width = query.shape[-1]
    more = -(-(width + 1) // 8) * 8 - width  # a multiple of 8, as kernels like it
    query = F.pad(F.pad(query, (0, 1), value=1 / scale), (0, more - 1))
    bias = bias.to(key.dtype).expand(key.shape[:-1])[..., None]
    return query, F.pad(torch.cat([key, bias], dim=-1), (0, more - 1)), F.pad(value, (0, more))


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """One fused call per row: measured faster on CPU than padding with a mask (2-3x) and jagged tensors (5-20x).

    Rows of one length, as the edits of a cell are, need no more than one call; from 150 tokens on sharing one gains nothing.
    """
    n, length = len(layout.lengths), layout.lengths[0]
    if layout.lengths.count(length) == n:
        q, k, v = (tensor[0].unflatten(1, (n, length)).transpose(0, 1) for tensor in (query, key, value))
        return _attend(q, k, v, scale).transpose(1, 2).flatten(0, 1)[None]
    rows = zip(*(tensor.split(layout.lengths, 2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_attend(q, k, v, scale) for q, k, v in rows], dim=2).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend among all keys of a batch (B, heads, L, d): by the fused kernel, but in bfloat16 written out.

    The fused kernel for CPUs is no faster in bfloat16 than in float32; two products with the scores between them are, by up to 2 times,
    if no more scores are made at once than a core holds close. Scores are then rounded as queries and keys have been before.
    """
    if query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    n_queries = max(_SCORES // query[0, ..., 0].numel(), 1)  # of all heads
    n_rows = max(n_queries // query.shape[2], 1)
    rows = zip(*(part.contiguous().split(n_rows) for part in (query * scale, key, value)), strict=True)
    parts = ([torch.softmax(some @ k.mT, dim=-1) @ v for some in q.split(n_queries, 2)] for q, k, v in rows)
    return torch.cat([torch.cat(part, dim=2) for part in parts])


def _jagged(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Attend over all rows in one call, in any precision; CUDA's memory-efficient kernel stands behind it."""
    bounds, parts = layout.cu_seqlens.long(), (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    known: Any = {"min_seqlen": min(layout.lengths), "max_seqlen": layout.longest}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype stage")
        q, k, v = (torch.nested.nested_tensor_from_jagged(part, bounds, **known).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).values()[None]


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Attend over all rows in one kernel, which only CUDA has and only in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, d)
    more = -q.shape[-1] % 8  # the kernel takes multiples of 8
    if more:
        q, k, v = (F.pad(part, (0, more)) for part in (q, k, v))
    if scale != q.shape[-1] ** -0.5:
        q = q * (scale * q.shape[-1] ** 0.5)  # its own scale goes by the width it sees
    bounds = layout.cu_seqlens
    out: Tensor = varlen_attn(q, k, v, bounds, bounds, layout.longest, layout.longest)  # type: ignore[assignment]
    return out[None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
