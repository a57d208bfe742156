from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import scbin.pl
from scbin._errors import ScbinInputError
from scbin.pl._training import _running_mean


@pytest.fixture
def history():
    step = np.arange(1, 201)
    return pd.DataFrame(
        {
            "step": step,
            "epoch": (step - 1) // 20 + 1,
            "loss": 1 + 1 / step,
            "validation_loss": np.where(step % 20 == 0, 1.5, np.nan),
            "gene_loss": 0.5,
        }
    )


def test_validation_is_drawn_where_it_was_measured(history):
    ax = scbin.pl.training(history)
    measured = next(line for line in ax.lines if len(line.get_xdata()) == 10)
    np.testing.assert_array_equal(measured.get_xdata(), np.arange(20, 201, 20))
    assert ax.get_xlabel() == "step (10 epochs)"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training", "held-out cells"]


def test_other_columns(history):
    ax = scbin.pl.training(history, columns=["gene_loss"], ax=plt.subplots()[1])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["gene loss"]
    with pytest.raises(ScbinInputError, match=r"P10.*'lost'.*'gene_loss'"):
        scbin.pl.training(history, columns=["lost"])


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(i - 4, 0) : min(i + min(4, i), 49) + 1].mean() for i in range(50)]
    np.testing.assert_allclose(_running_mean(values, 4), expected)


def test_history_without_any_validation(history):
    assert scbin.pl.training(history.drop(columns="validation_loss")).get_legend() is not None
    scbin.pl.training(history.assign(validation_loss=np.nan)).figure.canvas.draw()


def test_tasks_measured_apart_are_drawn_in_pairs(history):
    tasks = history.drop(columns=["validation_loss", "gene_loss"]).assign(
        loss_genes=1.0, validation_genes=history["validation_loss"], loss_sex=0.6, validation_sex=0.7, loss_views=2.0
    )
    ax = scbin.pl.training(tasks)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["genes", "genes, held out", "sex", "sex, held out"]
    colours = [handle.get_color() for handle in ax.get_legend().legend_handles]
    assert colours[0] == colours[1] != colours[2] == colours[3]


def test_one_task_says_in_its_axis_what_was_lost(history):
    ax = scbin.pl.training(history[["step"]].assign(loss=3.0, loss_genes=1.0, validation_genes=1.2))
    assert ax.get_ylabel() == "loss of genes"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training", "held-out cells"]
