from __future__ import annotations

import numpy as np
import pytest

import scbin
from scbin import ScbinInputError
from scbin.tokens.tokens import MemoryTokens

ENCODINGS = ["bins", "binary", "rank", "gene_bins"]


@pytest.fixture(params=ENCODINGS)
def cells(toy, request):
    toy.obs["cell_type"] = toy.obs["cell_type"].cat.rename_categories({"T cell": "$T_4$"})
    toy.obs.loc["cell1", "sex"] = np.nan
    scbin.pp.tokenize(toy, encoding=request.param, phenotypes=["cell_type", "sex"])
    return toy


def test_picture_names_what_the_model_reads(cells):
    table = scbin.get.tokens_df(cells, "cell1")
    ax = scbin.pl.tokens(cells, "cell1", n_genes=40)
    ax.figure.canvas.draw()
    words = {text.get_text() for text in ax.texts}
    assert {"B cell", "not given", "[CLS]"} <= words
    assert set(table.loc[table["kind"] == "gene", "name"]) <= words
    n = (table["kind"] == "gene").sum()
    assert ax.get_title(loc="left") == f"Cell cell1: {len(table)} tokens, {n} genes"


def test_strongest_genes_come_first_and_the_rest_is_counted(toy):
    scbin.pp.tokenize(toy)
    ax = scbin.pl.tokens(toy, 3, n_genes=5)
    genes = [text.get_text() for text in ax.texts if text.get_text().startswith("GENE")]
    row = toy.X[3].toarray().ravel()
    value = scbin.get.tokens_df(toy, 3).set_index("name")["value"].filter(like="GENE")
    assert value[genes].tolist() == sorted(value, reverse=True)[:5]
    assert f"{(row > 0).sum() - 5} of them not shown" in ax.get_title(loc="left")


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
    with pytest.raises(ScbinInputError, match="A02.*n_genes"):
        scbin.pl.tokens(toy, n_genes=0)
