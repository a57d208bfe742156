"""Vectors of genes and phenotypes, and distances between them, each against an oracle of its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.covariance import ledoit_wolf
from sklearn.metrics.pairwise import cosine_similarity

import scbin
from scbin._errors import ScbinInputError

QUIET = {"device": "cpu", "progress": False}


def test_vectors_of_genes_are_means_of_plain_transformers_states(bert, eager):
    adata, model = bert
    made = scbin.tl.embed_genes(adata[:, ::-1].copy(), model, groupby="part", copy=True, **QUIET)
    found = {}
    for cell, of in enumerate(eager):
        for gene, vector in zip(of[0], of[2].last_hidden_state[0].numpy()[of[1]], strict=True) if of else ():
            for group in ("all", adata.obs["part"].iloc[cell]):
                found.setdefault((model.vocabulary.genes[gene], group), []).append(vector)
    groups = json.loads(made.uns["scbin"]["scbin_genes"])["groups"]
    assert groups == ["a/b", "c"] and made.varm["scbin_genes_groups"].shape == (40, 2, 32)
    for k, gene in enumerate(made.var_names):
        assert made.var["scbin_n_cells"].iloc[k] == len(found.get((gene, "all"), []))
        for group, vector in (
            ("all", made.varm["scbin_genes"][k]),
            *zip(groups, made.varm["scbin_genes_groups"][k], strict=True),
        ):
            mean = np.mean(found[gene, group], axis=0) if (gene, group) in found else np.full(32, np.nan)
            np.testing.assert_allclose(vector, mean, atol=1e-5)


def test_static_vectors_and_loadings(counts):
    adata, model = counts
    head, order = model.network.counts, [model.vocabulary.genes.index(gene) for gene in adata.var_names]
    made = scbin.tl.embed_genes(adata, model, vectors="loadings", copy=True)
    expected = (head.loadings * head.scale).detach().numpy()[order]
    np.testing.assert_allclose(made.varm["scbin_genes"], expected)
    places = model.network.backbone.tables()[1].detach().numpy()
    made = scbin.tl.embed_genes(adata, model, vectors="static", copy=True)
    np.testing.assert_array_equal(
        made.varm["scbin_genes"], places[model.vocabulary.first_gene_position + np.array(order)]
    )
    with pytest.raises(ScbinInputError, match="A03"):
        scbin.tl.embed_genes(adata, model, vectors="loadings", groupby="sex")


def test_vectors_of_phenotypes_are_rows_of_the_token_table(bert):
    table = scbin.tl.embed_phenotypes(bert[1])
    assert table.loc["sex"].index.tolist() == ["female", "male"] and table.shape == (5, 32)
    slot = bert[1].vocabulary.phenotype("sex")
    words = bert[1].network.backbone.tables()[0].detach().numpy()
    np.testing.assert_array_equal(table.loc[("sex", "male")], words[slot.first_id + slot.values.index("male")])


def test_distances_are_those_of_scipy_with_a_shrunk_covariance(bert):
    table = scbin.tl.embed_phenotypes(bert[1])
    adata = scbin.tl.embed_genes(bert[0], bert[1], copy=True, **QUIET)
    adata.varm["scbin_genes"][3] = np.nan
    genes = adata.varm["scbin_genes"][np.arange(40) != 3].astype(float)
    for vectors, given in ((table.to_numpy(dtype=float), table), (genes, adata)):
        far = scbin.tl.vector_distances(given)
        inverse = np.linalg.inv(ledoit_wolf(vectors)[0])
        np.testing.assert_allclose(far, cdist(vectors, vectors, "mahalanobis", VI=inverse), atol=1e-6)
        cosine = scbin.tl.vector_distances(given, metric="cosine")
        np.testing.assert_allclose(1 - cosine, cosine_similarity(vectors), atol=1e-9)
        variance = scbin.tl.vector_distances(given, metric="variance")["variance"]
        np.testing.assert_allclose(variance, vectors.var(axis=1))
        assert far.index.equals(far.columns) and far.index.equals(variance.index)
    with pytest.raises(ScbinInputError, match="A06"):
        scbin.tl.vector_distances(adata, key="X")
    with pytest.raises(ScbinInputError, match="A02"):
        scbin.tl.vector_distances(table[:1])
