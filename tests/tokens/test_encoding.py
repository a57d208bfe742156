"""A new encoding is one class: everything else is asked of it."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scbin import pp
from scbin._adata import read_tokens
from scbin.tokens.edits import Edit, GeneRows, edit_rows
from scbin.tokens.vocabulary import ENCODINGS, Encoding, GeneTokens


class Toy(Encoding):
    """Level 1: one or two molecules, level 2: more."""

    def fit(self, cells, rule, asked):
        return {"genes": cells.choose_genes()}

    def reads(self, vocabulary):
        return "counts"

    def n_levels(self, vocabulary):
        return 3

    def level_values(self, vocabulary):
        return np.array([0.0, 1.5, 5.0])

    def encode(self, vocabulary, rows):
        genes = rows.columns[rows.indices]
        kept = (genes >= 0) & (rows.data > 0)
        row = np.repeat(np.arange(rows.n), np.diff(rows.indptr))[kept]
        lengths = np.bincount(row, minlength=rows.n)
        ids = vocabulary.ids_of(genes[kept], 1 + (rows.data[kept] > 2))
        return GeneTokens(ids, genes[kept], np.cumsum(lengths) - lengths, lengths)


@pytest.fixture
def toy_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ENCODINGS, "toy", Toy())
    x = np.random.default_rng(0).poisson(1.2, (20, 12)).astype(np.float32)
    x[4] = 0
    obs = pd.DataFrame({"sex": ["f", "m"] * 10}, index=[f"c{k}" for k in range(20)])
    adata = ad.AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"G{k}x" for k in range(12)]))
    with pytest.warns(UserWarning, match="I19"):
        pp.tokenize(adata, encoding="toy", phenotypes="sex", n_genes=8)
    return x, adata, read_tokens(adata)


def test_tokens_values_groups_and_text(toy_tokens):
    x, adata, tokens = toy_tokens
    v, matrix = tokens.vocabulary, tokens.matrix
    assert len(v.genes) == 8 and v.unit == "counts" and v.depth is not None
    here = x[:, [int(gene[1:-1]) for gene in v.genes]]
    tables = v.tables()
    gene = np.maximum(tables.gene_of_id[matrix.data], tables.gene_of_position[matrix.indices])
    value = tables.value_of_id[matrix.data] * tables.value_of_position[matrix.indices]
    row = np.repeat(np.arange(20), np.diff(matrix.indptr))
    read = np.zeros_like(here)
    read[row[gene >= 0], gene[gene >= 0]] = value[gene >= 0]
    np.testing.assert_array_equal(read, np.array([0, 1.5, 1.5, 5.0])[np.minimum(here, 3).astype(int)])
    is_gene = v.is_gene_token(matrix.data)
    assert (v.genes_at(matrix.data[is_gene], matrix.indices[is_gene]) == gene[is_gene]).all()
    start, stop = v.group_start[matrix.indices[is_gene]], v.group_stop[matrix.indices[is_gene]]
    assert ((start <= matrix.data[is_gene]) & (matrix.data[is_gene] < stop)).all() and (stop - start == 3).all()
    last = matrix.indptr[1] - 2
    text = v.token_text(int(matrix.data[last]), int(matrix.indices[last]))
    assert text == f"{v.genes[gene[last]]}={v.levels_of(matrix.data[[last]])[0]}"
    assert (adata.obs["scbin_status"] == "empty").sum() == 1


def test_edits_and_new_cells(toy_tokens):
    x, adata, tokens = toy_tokens
    v = tokens.vocabulary
    rows = GeneRows(tokens.matrix, v)
    at = v.first_gene_position + 3
    for mode, expected in (("delete", {0: 0, 1: 0, 2: 0}), ("overexpress", {}), ("activate", {0: 1, 1: 2, 2: 2}),
                           ("inhibit", {0: 0, 1: 1, 2: 1}), ("knock_down", {0: 0, 1: 0, 2: 1})):  # fmt: skip
        cells = np.array([0, 1, 2, 3, 5, 6])
        before = tokens.matrix[cells].toarray()[:, at].astype(int)
        after = edit_rows(rows, Edit(mode), cells, np.full(6, 3)).tokens.toarray()[:, at].astype(int)
        level = np.where(before > 0, before - v.first_gene_id, 0)
        highest = np.maximum(
            tokens.matrix[cells].toarray()[:, v.gene_positions].max(axis=1).astype(int) - v.first_gene_id, 0
        )
        wanted = (
            highest.tolist() if mode == "overexpress" else [expected[k] for k in level]
        )  # of counts: the cell's highest
        assert wanted == np.where(after > 0, after - v.first_gene_id, 0).tolist()
    logs = ad.AnnData(np.log1p(x / np.maximum(x.sum(axis=1, keepdims=True), 1) * 1e4), obs=adata.obs, var=adata.var)
    again = pp.check(logs, like=v, quiet=True)
    assert "error" not in set(again["kind"])
