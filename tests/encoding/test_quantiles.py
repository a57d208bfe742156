from __future__ import annotations

import numpy as np
import pytest

from scbin.encoding.quantiles import QuantileSketch

SHARES = np.array([0.0, 0.1, 0.5, 0.9, 1.0])


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 6, 30_000), rng.lognormal(1, 1.5, 30_000).astype(np.float32)


def test_exact_equals_numpy(sample):
    groups, values = sample
    sketch = QuantileSketch(7)
    sketch.add(groups, values)
    for group in range(6):
        np.testing.assert_allclose(
            sketch.quantiles(SHARES)[group], np.quantile(values[groups == group], SHARES), rtol=1e-6
        )
    assert np.isnan(sketch.medians()[6])


def test_counted_is_within_a_percent(sample):
    groups, values = sample
    sketch = QuantileSketch(6, exact=100)
    sketch.add(groups, values)
    for group in range(6):
        expected = np.quantile(values[groups == group], SHARES)
        np.testing.assert_allclose(sketch.quantiles(SHARES)[group], expected, rtol=0.02)
        assert sketch.medians()[group] == pytest.approx(expected[2], rel=0.01)


@pytest.mark.parametrize("exact", [100, 10**6])
def test_any_split_and_merge_give_the_same(sample, exact: int):
    groups, values = sample
    whole, left, right = (QuantileSketch(6, exact=exact) for _ in range(3))
    whole.add(groups, values)
    for part in np.array_split(np.arange(len(values)), 7):
        (left if part[0] % 2 else right).add(groups[part], values[part])
    left.merge(right)
    np.testing.assert_array_equal(left.quantiles(SHARES), whole.quantiles(SHARES))
