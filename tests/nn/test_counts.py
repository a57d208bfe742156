"""The negative binomial against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import nbinom

from scbin.nn.counts import CountHead


@pytest.fixture
def head():
    rng = np.random.default_rng(0)
    head = CountHead(7, 3, ["a", "b"])
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.7, parameter.shape)))
        head.batch_weights.copy_(torch.tensor([0.25, 0.75]))
    return head


def numbers(head, n=50):
    rng = np.random.default_rng(1)
    counts = rng.poisson(rng.gamma(0.7, 3, (n, 7)))
    log_mean = rng.normal(0, 1, (n, 7)).astype(np.float32)
    theta = head.log_dispersion.exp().detach().numpy().astype(np.float64)
    mean = np.exp(log_mean.astype(np.float64))
    return counts, torch.from_numpy(log_mean), nbinom.logpmf(counts, theta, theta / (theta + mean))


@pytest.mark.parametrize("some", [False, True])
def test_the_likelihood_of_cells_is_the_sum_over_genes(head, some):
    counts, log_mean, expected = numbers(head)
    asked = np.random.default_rng(2).random(counts.shape) < 0.6 if some else np.ones(counts.shape, dtype=bool)
    rows, genes = np.nonzero(counts * asked)
    triples = (torch.from_numpy(x) for x in (rows, genes, counts[rows, genes].astype(np.float32)))
    got = head.log_likelihood(log_mean, *triples, torch.from_numpy(asked) if some else None)
    assert got.detach().numpy() == pytest.approx((expected * asked).sum(1), rel=1e-4)


def test_mean_of_depth_batch_and_vector(head):
    z, depth = torch.randn(4, 3), torch.tensor([0.0, 1.0, 2.0, 3.0])
    got = head.log_mean(z, depth, torch.tensor([0, 1, -1, 1]))
    w, s, b = head.loadings, head.scale, head.bias
    unknown = (0.25 * b[0].exp() + 0.75 * b[1].exp()).log()
    for i, bias in enumerate((b[0], b[1], unknown, b[1])):
        assert torch.allclose(got[i], depth[i] + bias + (s * z[i]) @ w.T, atol=1e-5)
    assert torch.allclose(head.log_mean(z, depth)[2], got[2], atol=1e-5)


def test_gradients_reach_every_parameter(head):
    rows, genes = torch.arange(50), torch.arange(50) % 7
    log_mean = head.log_mean(torch.randn(50, 3), torch.zeros(50), torch.arange(50) % 2)
    head.log_likelihood(log_mean, rows, genes, torch.full((50,), 2.0)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
