"""Each loss against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scbin.nn.losses import binary_cross_entropy, cross_entropy, gaussian_ordinal, info_nce


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    return rng.normal(0, 3, (40, 7)), rng.integers(0, 7, 40), rng.uniform(0.2, 3, 7)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def torched(*arrays):
    return [torch.from_numpy(a if a.dtype == np.int64 else a.astype(np.float32)) for a in arrays]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy(scored, smoothing):
    logits, labels, weights = scored
    target = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
    expected = -(target * log_softmax(logits)).sum(1)
    assert cross_entropy(*torched(logits, labels), smoothing).numpy() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    weighted = -(target * weights * log_softmax(logits)).sum(1)
    got = cross_entropy(*torched(logits, labels), smoothing, torch.from_numpy(weights))
    assert got.numpy() == pytest.approx(weighted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_gaussian_ordinal(scored, sigma):
    logits, labels, weights = scored
    k = np.arange(7)
    bell = np.exp(-((k - labels[:, None]) ** 2) / (2 * sigma**2)) / np.sqrt(2 * np.pi * sigma**2)
    bell /= bell.sum(1, keepdims=True)
    expected = -(bell * log_softmax(logits)).sum(1)
    assert gaussian_ordinal(*torched(logits, labels), sigma).numpy() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    got = gaussian_ordinal(*torched(logits, labels), sigma, torch.from_numpy(weights))
    assert got.numpy() == pytest.approx(expected * weights[labels], rel=1e-6, abs=1e-6)


def test_binary_cross_entropy(scored):
    logits, labels = scored[0][:, :2], scored[1] % 2
    z = logits[:, 1] - logits[:, 0]
    expected = np.where(labels == 1, np.log1p(np.exp(-z)), np.log1p(np.exp(z)))
    assert binary_cross_entropy(*torched(logits, labels)).numpy() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    got = binary_cross_entropy(*torched(logits, labels), torch.tensor([0.5, 2.0]))
    assert got.numpy() == pytest.approx(expected * np.where(labels == 1, 2, 0.5), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("centred", [True, False])
def test_info_nce(centred):
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, (2, 12, 5))
    mean = np.concatenate([a, b]).mean(0) if centred else 0
    x, y = a - mean, b - mean
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    cosines = x @ y.T / 0.1
    expected = -(np.diag(log_softmax(cosines)).mean() + np.diag(log_softmax(cosines.T)).mean()) / 2
    assert float(info_nce(*torched(a, b), 0.1, centred)) == pytest.approx(expected, rel=1e-6)


def test_half_precision_logits_are_scored_in_float32(scored):
    logits, labels = torched(*scored[:2])
    half = logits.to(torch.bfloat16)
    assert torch.equal(cross_entropy(half, labels), cross_entropy(half.float(), labels))
