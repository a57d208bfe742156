from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import scbin
from scbin import ScbinInputError


@pytest.fixture
def history():
    step = np.arange(201)
    table = pd.DataFrame({"step": step, "epoch": (step + 19) // 20, "loss": 1 + 1 / np.maximum(step, 1), "rate": 0.5})
    table["loss_genes"], table["validation_genes"] = table["loss"], np.where(step % 20 == 0, 1.5, np.nan)
    table.loc[0, ["loss", "loss_genes", "validation_genes"]] = np.nan, np.nan, 2.5
    return table


def names(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_validation_is_drawn_where_it_was_measured_and_the_start_is_a_line(history):
    ax = scbin.pl.training(SimpleNamespace(history=history))
    measured = next(line for line in ax.lines if len(line.get_xdata()) == 11)
    np.testing.assert_array_equal(measured.get_xdata(), np.arange(0, 201, 20))
    assert set(ax.lines[-1].get_ydata()) == {2.5}
    assert names(ax) == ["training", "held-out cells", "at the start"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step (10 epochs)", "loss: genes")


def test_other_columns(history):
    assert names(scbin.pl.training(history, columns=["rate"], ax=plt.subplots()[1])) == ["rate"]
    for columns, text in ((["lost"], r"A06.*'lost'.*'rate'"), ([], "A06.*empty")):
        with pytest.raises(ScbinInputError, match=text):
            scbin.pl.training(history, columns=columns)


def test_history_without_any_validation(history):
    ax = scbin.pl.training(history.drop(columns="validation_genes"))
    assert (names(ax), ax.get_ylabel()) == (["training"], "loss")
    scbin.pl.training(history.assign(validation_genes=np.nan)).figure.canvas.draw()


def test_each_loss_has_a_colour(history):
    ax = scbin.pl.training(history[1:].assign(loss_sex=0.6, validation_sex=0.7, loss_other=2.0))
    assert names(ax) == ["genes, training", "genes, held-out cells", "sex, training", "sex, held-out cells"]
    colours = [handle.get_color() for handle in ax.get_legend().legend_handles]
    assert colours[0] == colours[1] != colours[2] == colours[3]
