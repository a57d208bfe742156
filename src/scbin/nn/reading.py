"""A network reads rows of tokens, a pack at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from tqdm.auto import tqdm

from scbin.data.packing import make_pack, plan_packs
from scbin.nn.attention import pack_layout, to_device
from scbin.nn.bert import encode_pack
from scbin.nn.device import resolve_device, resolve_precision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scipy.sparse import csr_matrix
    from torch import Tensor
    from transformers import BertForMaskedLM

    from scbin.data.packing import Pack
    from scbin.nn.attention import Layout
    from scbin.nn.device import Precision


class How(TypedDict, total=False):
    """How a network reads rows."""

    layer: int
    device: str
    precision: Precision
    token_budget: int
    progress: bool


def hidden_packs(
    bert: BertForMaskedLM,
    tokens: csr_matrix,
    *,
    kept: np.ndarray | None = None,
    layer: int = -1,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    progress: bool = False,
    what: str = "predicting",
) -> Iterator[tuple[np.ndarray, Pack, Layout, Tensor]]:
    """Yield rows, their pack, its layout and its hidden states (T, H); rows without tokens are left out.

    The network is on the device, without gradients, for the time of the iteration.

    Parameters
    ----------
    bert
        The network.
    tokens
        Token matrix.
    kept
        Whether each row is read (cells,). Default: all are.
    layer
        Whose hidden states: -1 the last, -2 the one before, 0 the embeddings.
    device, precision
        Where, and in which precision of the matrix products.
    token_budget
        Most tokens to go through the network at once.
    progress, what
        Whether a progress bar is shown, and its text.
    """
    target = resolve_device(device)
    lengths = np.diff(tokens.indptr) if kept is None else np.where(kept, np.diff(tokens.indptr), 0)
    mixed = products_in(precision, device, bert)
    home, was_training = bert.device, bert.training
    bert.to(target).eval()  # type: ignore[arg-type]
    try:
        packs = plan_packs(lengths, token_budget)
        for rows in tqdm(packs, desc=what, unit="pack", disable=not progress or len(packs) < 2):
            pack = make_pack(tokens, rows)
            layout = pack_layout(pack.cu_seqlens, target)
            input_ids, position_ids = to_device(pack.input_ids, target), to_device(pack.position_ids, target)
            with torch.inference_mode(), mixed:
                hidden = encode_pack(bert, input_ids, position_ids, layout, layer)
            yield rows, pack, layout, hidden
    finally:
        bert.to(home).train(was_training)  # type: ignore[arg-type]


def products_in(precision: Precision, device: str, bert: BertForMaskedLM) -> torch.autocast:
    """Return the context in which matrix products are computed in a precision."""
    target = resolve_device(device)
    dtype = resolve_precision(precision, target, bert.config)
    return torch.autocast(target.type, dtype, enabled=dtype != torch.float32)
