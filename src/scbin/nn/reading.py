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
    from collections.abc import Callable

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


def each_pack(
    bert: BertForMaskedLM,
    tokens: csr_matrix,
    use: Callable[[Pack, Tensor, Layout], None],
    *,
    rows: np.ndarray | None = None,
    layer: int = -1,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    progress: bool = False,
    what: str = "embedding",
) -> None:
    """Let a network read all rows, and hand on the hidden states of each pack of them.

    Parameters
    ----------
    bert
        The network; it is on the device afterwards only for the time of the call.
    tokens
        Token matrix.
    use
        Called with each pack, its hidden states (T, hidden) and its layout.
    rows
        Which rows are read (cells,). Default: all.
    layer
        Whose hidden states: -1 the last, -2 the one before, 0 the embeddings.
    device, precision
        Where, and in which precision of the matrix products.
    token_budget
        Most tokens to go through the network at once.
    progress
        Show a progress bar.
    what
        Its text.
    """
    target = resolve_device(device)
    dtype = resolve_precision(precision, target, bert.config)
    lengths = np.diff(tokens.indptr) if rows is None else np.where(rows, np.diff(tokens.indptr), 0)
    home, was_training = bert.device, bert.training
    bert.to(target).eval()  # type: ignore[arg-type]
    try:
        with torch.inference_mode(), torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
            packs = plan_packs(lengths, token_budget)
            for chosen in tqdm(packs, desc=what, unit="pack", disable=not progress or len(packs) < 2):
                pack = make_pack(tokens, chosen)
                layout = pack_layout(pack.cu_seqlens, target)
                input_ids, position_ids = to_device(pack.input_ids, target), to_device(pack.position_ids, target)
                use(pack, encode_pack(bert, input_ids, position_ids, layout, layer), layout)
    finally:
        bert.to(home).train(was_training)  # type: ignore[arg-type]
