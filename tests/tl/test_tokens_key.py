"""Tokens under another key are the same tokens, for everything that reads them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import scbin
from scbin import get, pl, tl

KEY = "X_b"
CPU = {"device": "cpu", "progress": False}


@pytest.fixture
def pair(toy, quick):
    """The same cells twice: tokens where they usually are; under a key, beside tokens of another vocabulary."""
    usual, keyed = toy, toy.copy()
    scbin.pp.tokenize(usual, phenotypes=["cell_type"])
    scbin.pp.tokenize(keyed, phenotypes=["cell_type"], key_added=KEY)
    scbin.pp.tokenize(keyed, encoding="rank")
    model = tl.pretrain(usual, **quick)
    assert tl.pretrain(keyed, **quick, tokens_key=KEY).fingerprint == model.fingerprint
    return (usual, {}), (keyed, {"tokens_key": KEY}), model


def written(adata):
    """Everything that a model wrote, by slot."""
    slots = {f"obs/{name}": adata.obs[name].to_numpy() for name in adata.obs if str(name).startswith("scbin_")}
    slots |= {
        f"obsm/{name}": np.asarray(adata.obsm[name])
        for name in adata.obsm
        if not str(name).startswith(("X_tokens", KEY))
    }
    return slots | {f"layers/{name}": adata.layers[name].toarray() for name in adata.layers if "scbin" in name}


VERBS = {
    "embed": lambda adata, model, **key: tl.embed(adata, model, genes=True, **CPU, **key),
    "predict": lambda adata, model, **key: tl.predict(adata, model, target="cell_type", **CPU, **key),
    "evaluate": lambda adata, model, **key: tl.evaluate(
        adata, model, target="cell_type", baselines="none", split_key="sex", **CPU, **key
    ),
    "evaluate genes": lambda adata, model, **key: tl.evaluate(adata, model, target="genes", **CPU, **key),
    "impute": lambda adata, model, **key: tl.impute(adata, model, genes=list(adata.var_names[:3]), **CPU, **key),
    "perturb": lambda adata, model, **key: tl.perturb(adata, model, genes=list(adata.var_names[:3]), **CPU, **key),
    "finetune": lambda adata, model, **key: (
        tl.finetune(adata, model, target="cell_type", max_steps=2, **CPU, **key).fingerprint
    ),
    "search": lambda adata, model, **key: tl.search(
        adata, model, target="cell_type", n_trials=1, max_steps=2, **CPU, **key
    ).trials.drop(columns="seconds"),
    "tokens_df": lambda adata, model, **key: get.tokens_df(adata, 3, **key),
    "tokens": lambda adata, model, **key: [text.get_text() for text in pl.tokens(adata, 3, **key).texts],
}


@pytest.mark.filterwarnings("ignore::scbin._errors.ScbinInputWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_a_key_changes_nothing_but_where_tokens_are(pair, verb):
    *sides, model = pair
    (first, there), (second, here) = [(VERBS[verb](adata, model, **key), written(adata)) for adata, key in sides]
    if isinstance(first, pd.DataFrame):
        pd.testing.assert_frame_equal(first, second)
    else:
        assert first == second
    assert there.keys() == here.keys()
    for name in there:
        np.testing.assert_array_equal(there[name], here[name], err_msg=name)
