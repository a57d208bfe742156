from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

import scbin
from scbin._errors import ScbinInputError


@pytest.fixture
def pair(embedded):
    made = embedded[:20].copy()
    made.obs["scbin_generated"] = True
    return embedded[20:].copy(), made


def test_real_cells_are_dots_and_made_ones_rings(pair):
    real, made = pair
    before = (set(real.obsm), set(made.obsm), set(real.uns))
    ax = scbin.pl.generated(real, made, color="cell_type")
    dots, rings = ax.collections
    assert len(dots.get_offsets()) == 40 and len(rings.get_offsets()) == 20
    assert len(rings.get_facecolors()) == 0 and ax.get_title() == "cell_type"
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["real", "generated", "B cell", "T cell", "monocyte"]
    assert before == (set(real.obsm), set(made.obsm), set(real.uns))
    plt.close(ax.figure)


def test_axes_of_the_user_are_used(pair):
    figure, ax = plt.subplots()
    assert scbin.pl.generated(*pair, ax=ax, title="mine") is ax and ax.get_title() == "mine"
    plt.close(figure)


def test_what_does_not_fit_is_refused(pair):
    real, made = pair
    with pytest.raises(ScbinInputError, match="S11"):
        scbin.pl.generated(made, real)
    made.obsm["X_scbin"] = made.obsm["X_scbin"][:, :5]
    with pytest.raises(ScbinInputError, match="S12"):
        scbin.pl.generated(real, made)
    made.obsm["X_scbin"] = real.obsm["X_scbin"][:20]
    with pytest.raises(ScbinInputError, match="I35"):
        scbin.pl.generated(real, made, color="celltype")
