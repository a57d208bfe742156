from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import scbin
from scbin import ScbinInputError


@pytest.fixture
def pair(embedded):
    made = embedded[:20].copy()
    made.obs["scbin_generated"] = True
    return embedded[20:].copy(), made


def test_real_cells_are_dots_and_generated_ones_rings(pair):
    real, made = pair
    before = (set(real.obsm), set(made.obsm), set(real.uns))
    ax = scbin.pl.generated(real, made, color="cell_type")
    dots, rings = ax.collections
    assert len(dots.get_offsets()) == 40 and len(rings.get_offsets()) == 20
    assert len(rings.get_facecolors()) == 0 and ax.get_title() == "cell_type"
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["real", "generated", "B cell", "T cell", "monocyte"]
    assert before == (set(real.obsm), set(made.obsm), set(real.uns))


def test_cells_without_embedding_and_axes_of_the_user(pair):
    pair[1].obsm["X_scbin"][:5] = np.nan
    ax = plt.subplots()[1]
    assert scbin.pl.generated(*pair, ax=ax, title="mine") is ax and ax.get_title() == "mine"
    assert len(ax.collections[1].get_offsets()) == 15


def test_what_does_not_fit_is_refused(pair):
    real, made = pair
    with pytest.raises(ScbinInputError, match="A02.*scbin_generated"):
        scbin.pl.generated(made, real)
    made.obsm["X_scbin"] = made.obsm["X_scbin"][:, :5]
    with pytest.raises(ScbinInputError, match="I53.*different models"):
        scbin.pl.generated(real, made)
    made.obsm["X_scbin"] = real.obsm["X_scbin"][:20]
    with pytest.raises(ScbinInputError, match="celltype"):
        scbin.pl.generated(real, made, color="celltype")
