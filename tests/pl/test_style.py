from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from scbin.pl._style import MISSING_COLOUR, PALETTE, palette, shorten


def oklab(colour):
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cone = np.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]) @ linear
    return np.array(
        [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    ) @ np.cbrt(cone)


@pytest.mark.parametrize(("n", "least"), [(10, 0.1), (20, 0.1), (40, 0.09)])
def test_colours_can_be_told_apart(n, least):
    lab = np.array([oklab(colour) for colour in [*palette(n), MISSING_COLOUR]])
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distance[np.triu_indices(n + 1, 1)].min() > least


def test_more_classes_than_colours_start_again():
    assert palette(45)[40:] == list(PALETTE[:5])


@pytest.mark.parametrize(
    ("text", "short"),
    [("B cell", "B cell"), ("a\n b", "a b"), ("abcdefghijklmno", "abcdef…mno"), (1.0, "1.0")],
)
def test_shorten(text, short):
    assert shorten(text, 10) == short
