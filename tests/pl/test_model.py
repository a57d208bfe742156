"""What a model reads of a cell, and its losses."""

from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import scbin
from scbin import ScbinInputError
from scbin.tokens.tokens import MemoryTokens


@pytest.fixture(params=["bins", "binary", "rank", "gene_bins"])
def cells(toy, request):
    toy.obs.loc["cell1", "sex"] = np.nan
    scbin.pp.tokenize(toy, encoding=request.param, phenotypes=["cell_type", "sex"])
    return toy


def test_picture_names_what_the_model_reads(cells):
    table = scbin.get.tokens_df(cells, "cell1")
    ax = scbin.pl.tokens(cells, "cell1", n_genes=40)
    ax.figure.canvas.draw()
    words = {text.get_text().split("\n")[0] for text in ax.texts}
    n = (table["kind"] == "gene").sum()
    assert words == set(table.loc[table["kind"] == "gene", "name"])
    title, control = ax.get_title(loc="left").split("\n")
    assert title == f"Cell cell1: {len(table)} tokens; the first {n} of {n} genes"
    assert {"[CLS]", "cell_type: B cell", "sex: NO_SEX"} <= set(control.split("   "))


def test_strongest_genes_come_first(toy):
    scbin.pp.tokenize(toy)
    ax = scbin.pl.tokens(toy, 3, n_genes=5)
    genes = [text.get_text().split("\n")[0] for text in ax.texts]
    value = scbin.get.tokens_df(toy, 3).set_index("name")["value"].filter(like="GENE")
    assert value[genes].tolist() == sorted(value, reverse=True)[:5]
    assert f"the first 5 of {len(value)} genes" in ax.get_title(loc="left")


def test_any_tokens_and_errors(toy):
    scbin.pp.tokenize(toy)
    vocabulary = scbin.Vocabulary.from_json(toy.uns["scbin"]["vocabulary"])
    matrix = toy.obsm["X_tokens"][:3].copy()
    matrix.data[matrix.indptr[2] :] = 0
    matrix.eliminate_zeros()
    tokens = MemoryTokens(matrix, vocabulary)
    assert scbin.pl.tokens(tokens, -2).get_title(loc="left").startswith("Cell 1:")
    for cell, text in [(3, "A06"), ("AAAC-1", "A06"), (2, "I19")]:
        with pytest.raises(ScbinInputError, match=text):
            scbin.pl.tokens(tokens, cell)


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
    ax = scbin.pl.training(SimpleNamespace(history=history), ax=plt.subplots()[1])
    measured = next(line for line in ax.lines if len(line.get_xdata()) == 11)
    np.testing.assert_array_equal(measured.get_xdata(), np.arange(0, 201, 20))
    assert set(ax.lines[-1].get_ydata()) == {2.5}
    assert names(ax) == ["genes, training", "genes, held-out cells", "genes, at the start"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "loss")


def test_history_without_any_validation(history):
    ax = scbin.pl.training(history.drop(columns="validation_genes"))
    assert (names(ax), ax.get_ylabel()) == (["training"], "loss")
    scbin.pl.training(history.assign(validation_genes=np.nan)).figure.canvas.draw()


def test_each_loss_has_a_colour(history):
    ax = scbin.pl.training(history[1:].assign(loss_sex=0.6, validation_sex=0.7, loss_other=2.0))
    assert names(ax) == ["genes, training", "genes, held-out cells", "sex, training", "sex, held-out cells"]
    colours = [handle.get_color() for handle in ax.get_legend().legend_handles]
    assert colours[0] == colours[1] != colours[2] == colours[3]
