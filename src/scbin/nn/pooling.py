"""One vector per cell from the vectors of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scbin.nn.attention import Layout, pack_layout

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def pool(hidden: Tensor, cu_seqlens: np.ndarray | Tensor | Layout, weights: Tensor) -> Tensor:
    """Return the weighted mean (B, H) of the hidden states of each row, in float32.

    Deterministic, and the same whatever else is in the pack. A row whose weights sum to zero gets zeros.

    Parameters
    ----------
    hidden
        Hidden states of a pack (T, H).
    cu_seqlens
        Bounds of its rows (B + 1,), or its `Layout`.
    weights
        Weight of each token (T,).

    Examples
    --------
    >>> import numpy as np
    >>> import numpy as np
    >>> pool(torch.tensor([[1.0], [3.0], [5.0]]), np.array([0, 2, 3]), torch.tensor([1.0, 1.0, 2.0]))
    tensor([[2.],
            [5.]])
    """
    layout = cu_seqlens if isinstance(cu_seqlens, Layout) else pack_layout(cu_seqlens, hidden.device)
    hidden, weights = hidden.to(torch.float32), weights.to(torch.float32)
    if hidden.is_cuda:
        # one thread walks each (row, column): no atomics, so the same bits every time
        lengths = layout.cu_seqlens.diff().to(torch.int64)
        sums = torch.segment_reduce(hidden * weights[:, None], "sum", lengths=lengths, axis=0, unsafe=True)
        totals = torch.segment_reduce(weights[:, None], "sum", lengths=lengths, axis=0, unsafe=True)
    else:
        parts = list(zip(weights.split(layout.lengths), hidden.split(layout.lengths), strict=True))
        sums = torch.cat([part_weights[None] @ part for part_weights, part in parts])  # (B, H)
        totals = torch.stack([part_weights.sum(0, keepdim=True) for part_weights, _ in parts])
    return torch.where(totals > 0, sums / totals.clamp_min(1e-12), 0.0)
