"""Vectors of genes and phenotypes, attention, networks and associations, each against an oracle of its own."""

from __future__ import annotations

import copy
import json

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.covariance import ledoit_wolf
from sklearn.metrics.pairwise import cosine_similarity

import scbin
from scbin._adata import read_tokens
from scbin._errors import ScbinInputError
from scbin.nn.packs import pack_rows
from scbin.tl._labels import MaskedPhenotypes

QUIET = {"device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def bert(quick):
    """Toy cells, one without a group and one empty, and a BERT of two steps."""
    adata = toy_cells()
    adata.X.data[adata.X.indptr[7] : adata.X.indptr[8]] = 0
    with pytest.warns(scbin.ScbinInputWarning, match="I19"):
        scbin.pp.tokenize(adata, phenotypes=["cell_type", "sex"])
    adata.obs["part"] = np.where(np.arange(60) % 2, "a/b", "c")
    adata.obs.loc["cell3", "part"] = None
    return adata, scbin.tl.pretrain(adata, **quick, backbone="bert")


def toy_cells():
    rng, kind = np.random.default_rng(0), np.arange(60) % 3
    rate = np.full((60, 40), 0.6)
    for k in range(3):
        rate[kind == k, 10 * k : 10 * k + 10] = 6.0
    adata = ad.AnnData(rng.poisson(rate).astype(np.float32))
    adata.X = csr_matrix(adata.X)
    adata.var_names = [f"GENE{i}" for i in range(40)]
    adata.obs_names = [f"cell{i}" for i in range(60)]
    adata.obs["cell_type"] = np.array(["T cell", "B cell", "monocyte"])[kind]
    adata.obs["sex"] = np.array(["male", "female"])[np.arange(60) % 2]
    adata.obs["donor"] = np.arange(60) % 5
    return adata


@pytest.fixture(scope="module")
def counts():
    """Toy cells and a default model, trained a little."""
    adata = toy_cells()
    scbin.pp.tokenize(adata, phenotypes=["cell_type"])
    return adata, scbin.tl.pretrain(adata, preset="tiny", max_steps=30, **QUIET)


def states(adata, model):
    """Ids, positions, hidden states of all layers and attention of each cell, by plain transformers."""
    plain = copy.deepcopy(model.network.backbone.bert)
    plain.set_attn_implementation("eager")
    tokens = adata.obsm["X_tokens"].tocsr().copy()
    tokens.data[np.isin(tokens.indices, [p.position for p in model.vocabulary.phenotypes])] = model.vocabulary.mask_id
    for row in tokens:
        if not row.nnz:
            yield None
            continue
        ids, positions = torch.tensor(row.data.astype(int))[None], torch.tensor(row.indices.astype(int))[None]
        with torch.inference_mode():
            out = plain.bert(ids, position_ids=positions, output_attentions=True, output_hidden_states=True)
        genes = np.array(
            [model.vocabulary.first_gene_position <= p < model.vocabulary.first_gene_position + 40 for p in row.indices]
        )
        yield row.indices[genes] - model.vocabulary.first_gene_position, genes, out


# ---- vectors ---------------------------------------------------------------------------------------------------------


def test_vectors_of_genes_are_means_of_plain_transformers_states(bert):
    adata, model = bert
    made = scbin.tl.embed_genes(adata[:, ::-1].copy(), model, groupby="part", copy=True, **QUIET)
    found = {}
    for cell, of in enumerate(states(adata, model)):
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


# ---- attention and networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [None, 1])
def test_attention_is_that_of_plain_transformers(bert, head):
    adata, model = bert
    found = scbin.tl.attention(adata, model, cells=["cell9", 7, 0], head=head, device="cpu")
    assert found[1].nnz == 0
    every = list(states(adata, model))
    columns = adata.var_names.get_indexer(model.vocabulary.genes)
    for cell, matrix in ((9, found[0]), (0, found[2])):
        genes, is_gene, out = every[cell]
        weights = out.attentions[-1][0].numpy()
        weights = (weights.mean(axis=0) if head is None else weights[head])[np.ix_(is_gene, is_gene)]
        np.testing.assert_allclose(matrix.toarray()[np.ix_(columns[genes], columns[genes])], weights, atol=1e-5)
        assert matrix.nnz == len(genes) ** 2


def test_attention_is_refused_where_there_is_none(bert, counts):
    with pytest.raises(ScbinInputError, match="M04"):
        scbin.tl.attention(*counts, cells=[0])
    for wrong in ({"layer": 0}, {"layer": 5}, {"head": 2}):
        with pytest.raises(ScbinInputError, match="A02"):
            scbin.tl.attention(*bert, cells=[0], **wrong)


def test_the_network_by_attention_is_a_mean_by_group(bert):
    adata, model = bert
    made = scbin.tl.gene_network(adata, model, method="attention", groupby="part", n_edges=None, copy=True, **QUIET)
    own = np.flatnonzero((adata.obs["part"] == "a/b").to_numpy())
    matrices = scbin.tl.attention(adata, model, cells=own.tolist(), device="cpu")
    total, both = sum(m.toarray() for m in matrices), sum((m != 0).toarray() for m in matrices)
    mean = np.divide(total, both, out=np.zeros_like(total), where=both > 0).T
    np.fill_diagonal(mean, 0)
    np.testing.assert_allclose(made.varp["scbin_network_0"].toarray(), mean, atol=1e-6)
    table = scbin.get.network_df(made, group="a/b")
    assert table["weight"].is_monotonic_decreasing and len(table) == (mean != 0).sum()
    with pytest.raises(ScbinInputError, match="A06"):
        scbin.get.network_df(made, group="b")


@pytest.mark.parametrize("groupby", [None, "sex"])
def test_covariance_is_that_of_expected_expression(counts, groupby):
    adata, model = counts
    made = scbin.tl.gene_network(adata, model, groupby=groupby, n_edges=None, copy=True, **QUIET)
    kept = np.ones(60, bool) if groupby is None else (adata.obs["sex"] == "male").to_numpy()
    covariance = np.cov(np.log1p(1e4 * expected(adata, model)[kept]).T)
    np.fill_diagonal(covariance, 0)
    slot = "scbin_network" if groupby is None else "scbin_network_1"
    np.testing.assert_allclose(made.varp[slot].toarray(), covariance, atol=1e-4 * np.abs(covariance).max())


def test_effects_are_close_to_those_of_deleted_genes(counts):
    """The genes are taken out of the cells, and these are read again, by `tl.perturb`."""
    adata, model = counts
    made = scbin.tl.gene_network(adata, model, method="effect", n_edges=None, copy=True, **QUIET)
    weights = made.varp["scbin_network"].toarray()
    scbin.tl.perturb(made, model, genes=list(adata.var_names[[0, 15, 33]]), level="expression", **QUIET)
    for name, table in made.uns["scbin_perturb"]["table"].groupby("perturbed"):
        row = weights[adata.var_names.get_loc(name)][adata.var_names.get_indexer(table["affected"])]
        # a gene is a twentieth of these cells: far from a small change
        assert np.corrcoef(row, -table["shift"])[0, 1] > 0.85


def test_effects_are_slopes_of_gates(counts):
    """A little less of one gene, by finite differences."""
    adata, model = counts
    made = scbin.tl.gene_network(adata, model, method="effect", n_edges=None, copy=True, **QUIET)
    tokens = MaskedPhenotypes(read_tokens(adata)).take(np.arange(60))
    pack, network, gene = pack_rows(tokens, np.arange(60)), model.network, 15
    gates, steps = (pack.position_ids == model.vocabulary.first_gene_position + gene).float(), []
    for step in (0.0, -0.01):
        with torch.inference_mode():
            hidden = network.backbone.encode(pack, network.vector.layer, gates=step * gates)
            steps.append(network.vector(hidden, pack, gates=step * gates).double().numpy())
    has = np.unique(pack.rows[gates > 0].numpy())
    columns = adata.var_names.get_indexer(model.vocabulary.genes)
    share = 1e4 * expected(adata, model)[:, columns]
    change = (steps[0] - steps[1])[has].mean(axis=0) / 0.01
    effect = (
        (network.counts.loadings * network.counts.scale).detach().numpy() @ change * (share / (1 + share)).mean(axis=0)
    )
    effect[gene] = 0
    row = made.varp["scbin_network"].toarray()[columns[gene]][columns]
    np.testing.assert_allclose(row, effect, rtol=0.05, atol=0.02 * np.abs(effect).max())


def expected(adata, model):
    """Shares that the head expects (cells, genes) by column, by numpy."""
    made = scbin.tl.embed(adata, model, key_added="z", copy=True, **QUIET)
    head = model.network.counts
    loadings, bias = (head.loadings * head.scale).detach().numpy(), head.bias.detach().numpy()[0]
    order = [model.vocabulary.genes.index(gene) for gene in adata.var_names]
    return softmax(made.obsm["z"] @ loadings.T + bias, axis=1)[:, order]


def test_networks_survive_files_and_keep_the_strongest(counts, tmp_path):
    adata, model = counts
    adata = adata.copy()
    scbin.tl.gene_network(adata, model, method="similarity", n_edges=4, **QUIET)
    scbin.tl.embed_genes(adata, model, groupby="sex", **QUIET)
    unit = adata.copy()
    scbin.tl.embed_genes(unit, model, vectors="loadings")
    centred = unit.varm["scbin_genes"] - unit.varm["scbin_genes"].mean(axis=0, dtype=float)
    cosine = cosine_similarity(centred)
    np.fill_diagonal(cosine, 0)
    for row, kept in zip(cosine, adata.varp["scbin_network"].toarray(), strict=True):
        assert set(np.flatnonzero(kept)) == set(np.argsort(-np.abs(row))[:4])
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert (back.varp["scbin_network"] != adata.varp["scbin_network"]).nnz == 0
    np.testing.assert_array_equal(back.varm["scbin_genes_groups"], adata.varm["scbin_genes_groups"])
    assert set(scbin.get.network_df(back, "GENE3")["source"]) == {"GENE3"}
    assert len(scbin.pl.gene_network(back, n_edges=9).texts) > 3


def test_similarity_by_group_is_the_cosine_of_mean_states(counts):
    adata, model = counts
    made = scbin.tl.gene_network(adata, model, method="similarity", groupby="sex", n_edges=None, copy=True, **QUIET)
    vectors = scbin.tl.embed_genes(adata, model, groupby="sex", copy=True, **QUIET).varm["scbin_genes_groups"][:, 1]
    cosine = cosine_similarity(vectors - vectors.mean(axis=0, dtype=float))
    np.fill_diagonal(cosine, 0)
    np.testing.assert_allclose(made.varp["scbin_network_1"].toarray(), cosine, atol=1e-5)


def test_nothing_is_written_where_a_method_is_not_possible(counts, quick):
    adata, model = counts
    keys = (set(adata.varp), set(adata.varm), set(adata.uns["scbin"]))
    with pytest.raises(ScbinInputError, match="M04"):
        scbin.tl.gene_network(adata, model, method="attention", **QUIET)
    assert keys == (set(adata.varp), set(adata.varm), set(adata.uns["scbin"]))
    ranked = adata.copy()
    scbin.pp.tokenize(ranked, encoding="rank")
    of_ranks = scbin.tl.pretrain(ranked, **quick)
    with pytest.raises(ScbinInputError, match="M06"):
        scbin.tl.gene_network(ranked, of_ranks, **QUIET)


# ---- associations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("donor_key", [None, "donor", "lone"])
def test_associations_are_t_tests_of_what_the_head_expects(counts, donor_key):
    adata, model = counts
    adata = adata.copy()
    is_t = (adata.obs["cell_type"] == "T cell").to_numpy()
    adata.obs["lone"] = [f"{kind}{i % 4}" for kind, i in zip(is_t, np.arange(60) // 3, strict=True)]
    table = scbin.tl.gene_association(adata, model, groupby="cell_type", groups="T cell", donor_key=donor_key, **QUIET)
    head = model.network.counts
    z = scbin.tl.embed(adata, model, key_added="z", copy=True, **QUIET).obsm["z"]
    sides = [z[is_t], z[~is_t]]
    if donor_key is not None:
        donors = adata.obs[donor_key].to_numpy()
        sides = [np.array([z[of & (donors == d)].mean(axis=0) for d in np.unique(donors[of])]) for of in (is_t, ~is_t)]
    loadings, bias = (head.loadings * head.scale).detach().numpy(), head.bias.detach().numpy()[0]
    logs = [np.log2(1e4 * softmax(side @ loadings.T + bias, axis=1) + 0.1) for side in sides]
    if donor_key == "donor":
        test = stats.ttest_rel(*logs)
    else:
        test = stats.ttest_ind(*logs, equal_var=False)
    interval = test.confidence_interval()
    table = table.set_index("gene").loc[list(model.vocabulary.genes)]
    np.testing.assert_allclose(table["log_fold_change"], logs[0].mean(axis=0) - logs[1].mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(table["lower"], interval.low, atol=1e-3)
    np.testing.assert_allclose(table["upper"], interval.high, atol=1e-3)
    np.testing.assert_allclose(table["p_value"], test.pvalue, rtol=0.02, atol=1e-8)
    assert set(table["unit"]) == {{None: "cell", "donor": "paired donor", "lone": "donor"}[donor_key]}
    x = np.expm1(np.log1p(adata.X.toarray() / np.maximum(adata.X.toarray().sum(1, keepdims=True), 1) * 1e4))
    plain = np.log2(x[is_t].mean(0) + 0.1) - np.log2(x[~is_t].mean(0) + 0.1)
    np.testing.assert_allclose(table.loc[adata.var_names, "plain_log_fold_change"], plain, atol=1e-4)


def test_associations_need_a_count_head_and_two_of_each(counts, bert, quick):
    adata, model = counts
    with pytest.raises(ScbinInputError, match="A06"):
        scbin.tl.gene_association(adata, model, groupby="cell_type", groups="NK cell", **QUIET)
    one = adata.copy()
    one.obs["odd"] = np.where(np.arange(60) == 0, "one", "others")
    with pytest.raises(ScbinInputError, match="P02"):
        scbin.tl.gene_association(one, model, groupby="odd", **QUIET)
