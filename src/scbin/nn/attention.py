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

from scbin.nn.device import has_bfloat16

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKED = "scbin_packed"
"""Name of the packed attention among the attention implementations of transformers."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each row of a pack begins, on the host for kernels called row by row, on the device for the packed kernel."""

    lengths: list[int]
    cu_seqlens: Tensor  # (B + 1,) int32, on the device
    longest: int
    key_lengths: list[int] | None = None  # None: every token is attended to
    cu_keys: Tensor | None = None
    key_index: Tensor | None = None  # (sum of key_lengths,) int64, the attended tokens


def pack_layout(
    lengths: np.ndarray, device: torch.device | str = "cpu", key_lengths: np.ndarray | None = None
) -> Layout:
    """Describe rows of these lengths (B,) to the attention; of each the first `key_lengths` (B,) tokens are attended to, or all.

    Examples
    --------
    >>> pack_layout(np.array([3, 2])).cu_seqlens
    tensor([0, 3, 5], dtype=torch.int32)
    """
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    known = (lengths.tolist(), to_device(bounds.astype(np.int32), device), int(lengths.max(initial=0)))
    if key_lengths is None:
        return Layout(*known)
    cu_keys = np.concatenate([[0], np.cumsum(key_lengths)])
    index = np.repeat(bounds[:-1] - cu_keys[:-1], key_lengths) + np.arange(cu_keys[-1])
    keys = (to_device(cu_keys.astype(np.int32), device), to_device(index, device))
    return Layout(*known, key_lengths.tolist(), *keys)


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
    dropout: float = 0.0,
    layout: Layout | None = None,
    key_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each row of a pack: query, key and value are (1, heads, T, d), the result is (1, T, heads, d).

    Without a `layout` this is the ordinary attention over padded batches with their mask. A `key_bias` (T,) is added to the scores
    of each key: the logarithm of a gate.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if key_bias is not None:
        biased = _biased(query, key, value, key_bias, scale)
        out, _ = packed_attention(module, *biased, attention_mask, scaling=scale, layout=layout)
        return out[..., : value.shape[-1]], None
    if layout is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scale
        )
    elif not query.is_cuda:
        out = _row_by_row(query, key, value, layout, scale, dropout)
    elif query.dtype != torch.float32 and dropout == 0 and has_bfloat16(query.device):
        return _varlen(query, key, value, layout, scale), None
    else:
        return _jagged(query, key, value, layout, scale, dropout), None
    return out.transpose(1, 2).contiguous(), None


def _biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Carry a bias of the keys in one more dimension, which every kernel takes and has a gradient for."""
    width = query.shape[-1]
    more = -(-(width + 1) // 8) * 8 - width  # a multiple of 8, as kernels like it
    query = F.pad(F.pad(query, (0, 1), value=1 / scale), (0, more - 1))
    bias = bias.to(key.dtype).expand(key.shape[:-1])[..., None]
    return query, F.pad(torch.cat([key, bias], dim=-1), (0, more - 1)), F.pad(value, (0, more))


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float) -> Tensor:
    """One fused call per row: measured faster on CPU than padding with a mask (2-3x) and jagged tensors (5-20x).

    Rows of one length, as the edits of a cell are, need no more than one call.
    """
    n, length = len(layout.lengths), layout.lengths[0]
    if layout.key_lengths is None and layout.lengths.count(length) == n:
        q, k, v = (tensor[0].unflatten(1, (n, length)).transpose(0, 1) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        return out.transpose(0, 1).flatten(1, 2)[None]
    rows = zip(*(tensor.split(layout.lengths, 2) for tensor in (query, key, value)), strict=True)
    parts = (
        F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n], dropout_p=dropout, scale=scale)
        for (q, k, v), n in zip(rows, layout.key_lengths or layout.lengths, strict=True)
    )
    return torch.cat(list(parts), dim=2)


def _jagged(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float) -> Tensor:
    """Attend over all rows in one call, in any precision; CUDA's memory-efficient kernel stands behind it."""
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))  # (T, heads, d)
    cu_keys, key_lengths = layout.cu_seqlens, layout.lengths
    if layout.key_lengths is not None and layout.cu_keys is not None and layout.key_index is not None:
        k, v = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
        cu_keys, key_lengths = layout.cu_keys, layout.key_lengths
    known = ((layout.cu_seqlens, layout.lengths), (cu_keys, key_lengths), (cu_keys, key_lengths))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype stage")
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                part, bounds.long(), min_seqlen=min(lengths), max_seqlen=max(lengths)
            ).transpose(1, 2)
            for part, (bounds, lengths) in zip((q, k, v), known, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2).values().unsqueeze(0)


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Attend over all rows in one kernel, which only CUDA has and only in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, d)
    width, d_value = q.shape[-1], v.shape[-1]
    padded = -(-max(width, d_value) // 8) * 8  # the kernel takes one width for all three, a multiple of 8
    q, k, v = (F.pad(t, (0, padded - t.shape[-1])) if t.shape[-1] != padded else t for t in (q, k, v))
    if scale != padded**-0.5:
        q = q * (scale * padded**0.5)  # its own scale goes by the width it sees
    longest_key, cu_keys = layout.longest, layout.cu_seqlens
    if layout.key_lengths is not None and layout.cu_keys is not None and layout.key_index is not None:
        k, v = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
        longest_key, cu_keys = max(layout.key_lengths), layout.cu_keys
    out: Tensor = varlen_attn(q, k, v, layout.cu_seqlens, cu_keys, layout.longest, longest_key)  # type: ignore[assignment]
    return out[..., :d_value].unsqueeze(0)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
