"""Tokens against files made elsewhere: Geneformer's own for real cells, plain formulas for every other encoding."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scbin import Tokenization, Vocabulary
from scbin._adata import read_tokens
from scbin.io.dictionaries import geneformer_vocabulary
from scbin.pp import tokenize

sys.path.insert(0, str(Path(__file__).parent))
from make_golden import CASES, COUNTS, FOLDER, GENES, arguments_of, make


@pytest.mark.parametrize("case", CASES)
def test_formulas(case: str):
    adata = ad.AnnData(np.array(COUNTS, dtype=np.float32), var=pd.DataFrame(index=GENES))
    arguments, finer = arguments_of(case)
    tokenize(adata, **arguments, tokenization=Tokenization(**finer))
    tokens = read_tokens(adata).matrix
    golden = json.loads((FOLDER / f"{case}.json").read_text())
    rows = [[[int(p), int(t)] for p, t in zip(row.indices, row.data, strict=True)] for row in tokens]
    assert rows == golden
    assert make(case) == golden


def geneformer(shared: Path, version: int) -> Vocabulary:
    corpus = {1: "gc30M", 2: "gc95M"}[version]
    names = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict")
    return geneformer_vocabulary(*(shared / "geneformer" / f"{name}_{corpus}.json" for name in names))


@pytest.mark.parametrize(("version", "n_tokens", "length"), [(1, 25_426, 2048), (2, 20_275, 4096)])
def test_geneformer(shared: Path, version: int, n_tokens: int, length: int):
    vocabulary = geneformer(shared, version)
    assert (vocabulary.n_tokens, vocabulary.max_length) == (n_tokens, length)
    adata = ad.read_h5ad(shared / "data" / "pbmc3k_labelled.h5ad")[:300]
    adata = adata[:, adata.var["ensembl_id"].astype(str).str.startswith("ENSG").to_numpy()].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seven ids stand twice
        tokenize(adata, like=vocabulary, gene_key="ensembl_id")
    tokens = adata.obsm["X_tokens"]
    golden = pd.read_parquet(shared / "golden" / f"geneformer_v{version}_pbmc3k.parquet")
    ids = adata.var["ensembl_id"].astype(str)
    twice = {
        vocabulary.genes.index(gene) + vocabulary.first_gene_id
        for gene in set(ids[ids.duplicated()]) & set(vocabulary.genes)
    }
    keys = scores(adata, vocabulary)
    n_same = 0
    for k, expected in enumerate(golden["input_ids"]):
        row = tokens[k].data.astype(int)
        assert set(row) == set(expected)
        # V1's tokenizer leaves a repeated gene in the cell twice, which is not to be copied
        row, expected = (np.array([t for t in part if t not in twice]) for part in (row, expected))
        moved = row != expected
        n_same += not moved.any()
        np.testing.assert_allclose(keys[k, row[moved]], keys[k, expected[moved]], rtol=1e-6)  # only ties may differ
    assert n_same > 0.97 * len(golden)


def scores(adata: ad.AnnData, vocabulary: Vocabulary) -> np.ndarray:
    """Counts over medians by token id (cells, tokens)."""
    columns = {gene: k + vocabulary.first_gene_id for k, gene in enumerate(vocabulary.genes)}
    out = np.zeros((adata.n_obs, vocabulary.n_tokens))
    counts = adata.X.toarray().astype(np.float64)
    for j, name in enumerate(adata.var["ensembl_id"].astype(str)):
        token = columns.get(vocabulary.aliases.get(name, name))
        if token is not None:
            out[:, token] += counts[:, j] / vocabulary.medians[token - vocabulary.first_gene_id]
    return out


def test_geneformer_symbols_through_the_mapping(shared: Path):
    vocabulary = geneformer(shared, 2)
    adata = ad.read_h5ad(shared / "data" / "pbmc3k_labelled.h5ad")[:50].copy()
    by_id = adata[:, adata.var["ensembl_id"].astype(str).str.startswith("ENSG").to_numpy()].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenize(adata, like=vocabulary)
        tokenize(by_id, like=vocabulary, gene_key="ensembl_id")
    shares = [json.loads(a.uns["scbin"]["tokenize"])["counts_in_vocabulary"] for a in (adata, by_id)]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
