"""Terms on the vectors of cells, against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scbin.train.terms import Contrastive, Denoising


def vectors(n, width, seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32))


@pytest.fixture
def targets():
    targets = np.random.default_rng(0).normal([3, -1, 0, 7], [1, 2, 0.1, 5], size=(20, 4)).astype(np.float32)
    targets[[4, 11]] = np.nan  # cells without tokens
    return targets


def test_denoising_is_the_squared_distance_over_the_variance(targets):
    cells = np.array([3, 0, 19, 7, 8])
    z_a, z_b = vectors(5, 4, 1), vectors(5, 4, 2)
    loss = Denoising(targets, 0.7)(z_a, z_b, cells)
    exact = targets.astype(np.float64)
    known = exact[~np.isnan(exact).any(axis=1)]
    variance = ((known - known.mean(axis=0)) ** 2).sum(axis=1).mean()
    distances = [((z.double().numpy() - exact[cells]) ** 2).sum(axis=1) for z in (z_a, z_b)]
    assert float(loss) == pytest.approx(np.concatenate(distances).mean() / variance, rel=1e-5)


def test_denoising_is_one_for_a_constant_answer_and_none_for_the_right_one(targets):
    cells = np.flatnonzero(~np.isnan(targets).any(axis=1))
    term = Denoising(targets)
    right = torch.from_numpy(targets[cells])
    mean = right.mean(0, keepdim=True).expand_as(right)
    assert float(term(mean, mean, cells)) == pytest.approx(1, rel=1e-5)
    assert float(term(right, right, cells)) == 0
    assert float(term(right, mean, cells)) == pytest.approx(0.5, rel=1e-5)


def test_denoising_pulls_towards_the_target(targets):
    term = Denoising(targets)
    z = vectors(2, 4, 3).requires_grad_()
    term(z, z, np.array([1, 2])).backward()
    away = z.detach() - torch.from_numpy(targets[[1, 2]])
    assert torch.allclose(z.grad / z.grad.norm(), away / away.norm(), atol=1e-6)


def test_denoising_changes_no_targets_and_has_no_parameters(targets):
    before = targets.copy()
    term = Denoising(targets)
    assert np.array_equal(before, targets, equal_nan=True)
    assert not list(term.parameters()) and not term.state_dict()
    assert (term.name, term.weight) == ("denoising", 1.0)


@pytest.mark.parametrize("value", [np.nan, 2.0])
def test_denoising_stays_finite_where_nothing_varies(value):
    term = Denoising(np.full((3, 2), value, dtype=np.float32))
    z = torch.full((3, 2), 2.0)
    assert np.isfinite(float(term(z, z, np.arange(3)))) and np.isfinite(term._scale)


@pytest.mark.parametrize("centred", [True, False])
def test_contrastive_is_info_nce_over_cosines(centred):
    z_a, z_b = vectors(6, 5, 4) + 3, vectors(6, 5, 5) + 3
    a, b = z_a.double().numpy(), z_b.double().numpy()
    if centred:
        mean = np.concatenate([a, b]).mean(axis=0)
        a, b = a - mean, b - mean
    cosines = np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a]) / 0.2
    own = np.diag(cosines)
    truth = (np.log(np.exp(cosines).sum(1)) - own).mean() + (np.log(np.exp(cosines).sum(0)) - own).mean()
    term = Contrastive(0.3, temperature=0.2, centred=centred)
    assert float(term(z_a, z_b, np.arange(6))) == pytest.approx(truth / 2, rel=1e-5)
    assert (term.name, term.weight) == ("contrastive", 0.3)


def test_denoising_of_cells_that_are_all_alike_is_finite_and_small():
    targets = np.tile(np.random.default_rng(0).normal(size=8).astype(np.float32), (5, 1))
    term = Denoising(targets)
    near = torch.from_numpy(targets + 0.01).requires_grad_()
    loss = term(near, near, np.arange(5))
    assert 0 < loss.item() < 1
    loss.backward()
    assert near.grad.abs().max() < 1
