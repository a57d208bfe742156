"""Losses: what a prediction costs, each as one value per target so that sums over packs and processes are exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Return -log softmax(logits)_label (M,), with label smoothing over the K columns and class weights on request.

    With class weights the mean is the sum of this over the sum of `class_weights[labels]`, as in torch.

    Parameters
    ----------
    logits
        (M, K), within the group of the targets.
    labels
        (M,), 0 to K - 1.
    smoothing
        Share of the target spread evenly over the K columns.
    class_weights
        (K,).

    Examples
    --------
    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([4.])
    """
    return F.cross_entropy(
        _exact(logits), labels, reduction="none", label_smoothing=smoothing, weight=_like(class_weights, logits)
    )


def gaussian_ordinal(logits: Tensor, labels: Tensor, sigma: float = 1.0, class_weights: Tensor | None = None) -> Tensor:
    """Return the cross entropy (M,) with a target that is a bell around the true bin: near misses cost less.

    The target is exp(-(k - label)^2 / (2 sigma^2)) over the bins of the group, scaled to sum to one (also at the ends).
    """
    logits = _exact(logits)
    bins = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
    target = torch.softmax(-((bins - labels[:, None]) ** 2) / (2 * sigma**2), dim=1)
    loss = -(target * F.log_softmax(logits, dim=1)).sum(1)
    return loss if class_weights is None else loss * _like(class_weights, loss)[labels]  # type: ignore[index]


def binary_cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the binary cross entropy (M,) of "expressed"; its one logit is that of bin 1 minus that of bin 0."""
    logits = _exact(logits)
    loss = F.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], labels.to(logits.dtype), reduction="none")
    return loss if class_weights is None else loss * _like(class_weights, loss)[labels]  # type: ignore[index]


def info_nce(z_a: Tensor, z_b: Tensor, temperature: float = 0.1, centred: bool = True) -> Tensor:
    """Return the contrastive loss of two views: each view must find its cell's other view among all others of the step.

    Parameters
    ----------
    z_a, z_b
        Vectors of the first and second view of the same cells (N, H).
    temperature
        Of the softmax over cosines.
    centred
        Take off the mean of all vectors first; without it all cosines sit near 1.

    Examples
    --------
    >>> z = 10 * torch.eye(4)
    >>> bool(info_nce(z, z) < info_nce(z, z.flip(0)))
    True
    """
    z_a, z_b = _exact(z_a), _exact(z_b)
    if centred:
        mean = (z_a.mean(0) + z_b.mean(0)) / 2
        z_a, z_b = z_a - mean, z_b - mean
    cosines = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T / temperature  # (N, N)
    labels = torch.arange(len(cosines), device=cosines.device)
    return (F.cross_entropy(cosines, labels) + F.cross_entropy(cosines.T, labels)) / 2


def _exact(values: Tensor) -> Tensor:
    """Half precision is for matrix products; a softmax is taken in float32."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _like(weights: Tensor | None, other: Tensor) -> Tensor | None:
    if weights is None:
        return None
    return weights.to(device=other.device, dtype=_exact(other).dtype)
