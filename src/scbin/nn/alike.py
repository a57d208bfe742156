"""Attention in the first layer for rows that are nearly alike: what all of them have is summed up once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHARED = 4  # tokens of all rows for each token of some, from which on sharing is measured faster
SMALLEST = 1e-30  # a sum of weights below has lost its digits
SCORES = 2**19  # held at once: they stay in the cache of a core


def attend_alike(query: Tensor, key: Tensor, value: Tensor, where: Tensor, scale: float) -> Tensor | None:
    """Attend within each of several equally long rows that are made of the same few tokens more than one row is long.

    Before the first layer a token is the same vector in every row. Numerator and denominator of its softmax are sums over the tokens
    of its row: those over the tokens that stand in all rows are the same everywhere, and each row adds its few others. That is
    exact: nothing is taken away again from a sum.

    Parameters
    ----------
    query, key, value
        Of the different tokens (U, heads, d).
    where
        Which token stands where (rows, N).
    scale
        Of the scores.

    Returns
    -------
    What each token attends to (rows, N, heads x d), float32; `None` where too little is shared, or the scores of a token are so
    far apart that float32 does not hold them.

    Examples
    --------
    >>> q, k, v = torch.randn(3, 10, 2, 4, generator=torch.Generator().manual_seed(0))
    >>> where = torch.stack([torch.arange(9), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9])])
    >>> attend_alike(q, k, v, where, 0.5).shape
    torch.Size([2, 9, 8])
    """
    n_rows, n_tokens = where.shape
    counts = torch.bincount(where.flatten(), minlength=len(query))
    common, others = (torch.nonzero(held)[:, 0] for held in (counts == n_rows, counts < n_rows))
    if n_rows < 2 or len(common) < SHARED * len(others):
        return None
    q, k, v = (tensor.float().transpose(0, 1).contiguous() for tensor in (query * scale, key, value))
    v = F.pad(v, (0, 1), value=1.0)  # the last column sums the weights
    theirs = q @ k[:, others].transpose(1, 2)  # (heads, U, others)
    sums, top = _common_sums(q, k[:, common].transpose(1, 2), v[:, common], theirs.amax(-1, keepdim=True))
    has = torch.zeros(n_rows, len(query), device=where.device).scatter_(1, where, 1.0)[:, others]  # (rows, others)
    sums = theirs.sub_(top).exp_() @ (has[:, None, :, None] * v[:, others]) + sums  # (rows, heads, U, d + 1)
    weights = sums[..., -1:]
    if not bool((weights > SMALLEST).all()):
        return None
    context = (sums[..., :-1] / weights).transpose(1, 2).flatten(0, 1).flatten(1)  # (rows x U, heads x d)
    first = len(query) * torch.arange(n_rows, device=where.device)[:, None]
    return context.index_select(0, (where + first).flatten()).view(n_rows, n_tokens, -1)


def _common_sums(query: Tensor, key: Tensor, value: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Sum exp(score - top) of the common tokens and of their values (heads, U, d + 1); top is the largest score, `least` or more."""
    step = max(1, SCORES // (len(query) * key.shape[-1]))
    sums, tops = [], []
    for some, floor in zip(query.split(step, 1), least.split(step, 1), strict=True):
        scores = some @ key  # (heads, step, common)
        tops.append(torch.maximum(scores.amax(-1, keepdim=True), floor))
        sums.append(scores.sub_(tops[-1]).exp_() @ value)
    return torch.cat(sums, 1), torch.cat(tops, 1)
