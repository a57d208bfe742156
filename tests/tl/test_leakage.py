"""The leakage check: which cells a model was trained on, and what is said where it is scored on them."""

from __future__ import annotations

import base64
import warnings

import numpy as np
import pytest

import scbin
from scbin._adata import read_tokens
from scbin._errors import ScbinInputWarning
from scbin.tl import _split
from scbin.tl._split import cell_hashes, fraction_trained_on, hash_blocks, remembered_cells

HOW = {"device": "cpu", "progress": False}


def remembered(hashes):
    return base64.b64encode(np.sort(hashes)[: _split.N_KEPT].astype("<u8").tobytes()).decode()


def evaluated(adata, model, **how):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scbin.tl.evaluate(adata, model, target="cell_type", baselines=False, **how, **HOW)
    return [str(w.message) for w in caught if "L04" in str(w.message)]


@pytest.fixture(scope="module")
def plain(trained):
    """Cells with a split whose tokens say no phenotypes, and a model pretrained on their training part."""
    adata = trained[0].copy()
    del adata.obsm["X_tokens"]
    adata.uns["scbin"] = {}
    adata = adata[adata.obs["scbin_status"] == "ok"].copy()
    scbin.pp.tokenize(adata)
    scbin.tl.split(adata, target="cell_type", test=0.3)
    part = adata[adata.obs["scbin_split"] != "test"].copy()
    model = scbin.tl.finetune(part, "new", target="cell_type", max_steps=0, **HOW)
    return adata, model


def test_hashes_depend_on_the_genes_of_a_cell_alone(trained):
    tokens = read_tokens(trained[0])
    rows, vocabulary = tokens.take(np.arange(60)), tokens.vocabulary
    hashes = cell_hashes(rows, vocabulary)
    assert hashes[7] == 0 and len(np.unique(hashes)) == 60
    told = rows.copy()
    told.data[told.indices == vocabulary.phenotype("sex").position] = vocabulary.mask_id
    np.testing.assert_array_equal(cell_hashes(told, vocabulary), hashes)
    np.testing.assert_array_equal(cell_hashes(rows[[5, 3]], vocabulary), hashes[[5, 3]])
    other = rows.copy()
    other.data[other.indptr[4] - 2] += 1  # a gene of cell 3
    assert (cell_hashes(other, vocabulary) != hashes).nonzero()[0].tolist() == [3]


def test_blocks_make_no_difference(trained, monkeypatch):
    tokens, rows = read_tokens(trained[0]), np.arange(60)
    whole = np.concatenate(list(hash_blocks(tokens, rows)))
    monkeypatch.setattr(_split, "_BLOCK", 7)
    np.testing.assert_array_equal(np.concatenate(list(hash_blocks(tokens, rows))), whole)
    assert remembered_cells(tokens, rows) == remembered_cells(tokens, rows[::-1])


def test_a_sample_of_hashes_tells_the_fraction():
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**63, 40_000).astype(np.uint64)
    kept = remembered(hashes[:20_000])
    assert fraction_trained_on(kept, hashes[:20_000]) == 1
    assert fraction_trained_on(kept, hashes[20_000:]) == 0
    assert fraction_trained_on(kept, hashes[10_000:30_000]) == pytest.approx(0.5, abs=0.1)
    for nothing in ("", None, "not base64!", 3):
        assert fraction_trained_on(nothing, hashes) == 0


def test_a_clean_split_says_nothing_and_another_one_is_noticed(plain, tmp_path):
    adata, model = plain[0].copy(), plain[1]
    assert evaluated(adata, model) == []
    model.save(tmp_path / "m")
    adata.obs["scbin_split"] = np.where(np.arange(adata.n_obs) % 2, "train", "test")
    for known in (model, scbin.Model.load(tmp_path / "m")):  # it remembers through files
        (message,) = evaluated(adata, known)
        assert "trained on 'cell_type' of about" in message
    del adata.obs["scbin_split"]
    assert "scbin.tl.split" in evaluated(adata, model)[0]


def test_labels_shown_in_pretraining_are_noticed(trained):
    adata, model = trained[0].copy(), trained[1]
    scbin.tl.split(adata, target="cell_type", test=0.3)
    tuned = scbin.tl.finetune(adata, model, target="cell_type", max_steps=0, **HOW)
    with pytest.warns(ScbinInputWarning, match="L04.*trained on 'cell_type'"):
        scbin.tl.evaluate(adata, tuned, target="cell_type", baselines=False, **HOW)
