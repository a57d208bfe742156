"""Whether all methods are asked the same, and what cannot be asked."""

from __future__ import annotations

import numpy as np
import pytest

import scbin
from scbin._errors import ScbinInputError, ScbinInputWarning, ScbinTypeError

HOW = {"device": "cpu", "progress": False}
FIT = {**HOW, "max_steps": 0}


def test_a_guess_has_an_area_of_one_half_in_every_cross_validation(toy):
    toy.obs["cell_type"] = np.where(np.arange(60) < 2, "rare", "common")
    toy.obs["scbin_cell_type"] = "common"
    toy.uns["scbin"] = {"predict": '{"cell_type": {"kind": "class", "classes": ["common", "rare"]}}'}
    table = scbin.tl.evaluate(toy, target="cell_type")
    assert table["scored_on"].iloc[0] == "60 cells, 5 folds"
    assert table.loc["majority class", "roc_auc"] == 0.5
    assert table.loc["majority class", "accuracy"] == pytest.approx(58 / 60)


@pytest.fixture
def numbered(toy):
    """Cells with an age, five of them without tokens, and a model that tells it."""
    toy.obs["age"] = np.where(toy.obs["cell_type"] == "B cell", 60.0, 30.0) + np.arange(60) % 7
    toy.X.data[: toy.X.indptr[5]] = 0
    with pytest.warns(ScbinInputWarning, match="I19"):
        scbin.pp.tokenize(toy)
    toy.obs["side"] = np.where(np.arange(60) % 2, "train", "test")
    return toy, scbin.tl.finetune(toy, "tiny", target="age", kind="number", split_key="side", **FIT)


def test_numbers_of_all_methods_are_of_the_same_cells(numbered):
    adata, model = numbered
    age, number = adata.obs["age"].to_numpy(), np.arange(60)
    table = scbin.tl.evaluate(adata, model, split_key="side", **HOW)
    assert (table["n_cells"] == 27).all()
    test = (number % 2 == 0) & (number >= 5)
    expected = np.abs(age[test] - age[number % 2 == 1].mean()).mean()
    assert table.loc["mean", "mae"] == pytest.approx(expected)
    assert table["scored_on"].iloc[0] == "30 test cells, 3 without a prediction left out"
    del adata.obs["scbin_split"]
    with pytest.warns(ScbinInputWarning, match="E16"):
        table = scbin.tl.evaluate(adata, model, **HOW)
    assert (table["n_cells"] == 55).all() and np.isnan(table.loc["mean", "pearson"])


@pytest.mark.parametrize(
    ("kind", "code", "arguments"),
    [
        (ScbinTypeError, "E44.*'all', 'none'", {"baselines": None}),
        (ScbinTypeError, "E44", {"baselines": [1]}),
        (ScbinTypeError, "A01.*seed", {"seed": "a"}),
        (ScbinInputError, "E43.*seed", {"seed": -1}),
        (ScbinInputError, "E43.*n_genes", {"n_genes": 0}),
        (ScbinInputError, "E43.*n_genes", {"n_genes": -5}),
        (ScbinTypeError, "A01.*n_genes", {"n_genes": 2.5}),
        (ScbinTypeError, "A01.*gene_mask_prob", {"gene_mask_prob": "half"}),
        (ScbinTypeError, "A01.*target", {"target": 3}),
        (ScbinInputError, "T30", {"token_budget": 0}),
    ],
)
def test_what_cannot_be_asked_is_refused_and_nothing_written(numbered, untouched, kind, code, arguments):
    adata, model = numbered
    then = untouched(adata)
    with pytest.raises(kind, match=code):
        scbin.tl.evaluate(adata, model, **{"split_key": "side", **HOW, **arguments})
    then.check()


def test_numbers_of_numpy_are_numbers(numbered):
    adata, model = numbered
    how = {"split_key": "side", **HOW}
    plain = scbin.tl.evaluate(adata, model, seed=3, n_genes=20, **how)
    numpy = scbin.tl.evaluate(adata, model, seed=np.int64(3), n_genes=np.int32(20), baselines=plain.index[1:], **how)
    assert plain.equals(numpy)
