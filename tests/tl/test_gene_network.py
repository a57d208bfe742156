"""Networks of genes, attention and associations, each against an oracle of its own."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from scipy import stats
from scipy.special import softmax
from sklearn.metrics.pairwise import cosine_similarity

import scbin
from scbin._adata import read_tokens
from scbin._errors import ScbinInputError
from scbin.nn.packs import pack_rows
from scbin.tl._labels import MaskedPhenotypes

QUIET = {"device": "cpu", "progress": False}


@pytest.mark.parametrize("head", [None, 1])
def test_attention_is_that_of_plain_transformers(bert, eager, head):
    adata, model = bert
    found = scbin.tl.attention(adata, model, cells=["cell9", 7, 0], head=head, device="cpu")
    assert found[1].nnz == 0
    columns = adata.var_names.get_indexer(model.vocabulary.genes)
    for cell, matrix in ((9, found[0]), (0, found[2])):
        genes, is_gene, out = eager[cell]
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
    made = scbin.tl.gene_network(adata, model, method="covariance", groupby=groupby, n_edges=None, copy=True, **QUIET)
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
    """A little more and less of one gene, by central differences."""
    adata, model = counts
    made = scbin.tl.gene_network(adata, model, method="effect", n_edges=None, copy=True, **QUIET)
    tokens = MaskedPhenotypes(read_tokens(adata)).take(np.arange(60))
    pack, network, gene = pack_rows(tokens, np.arange(60)), model.network, 15
    gates, steps = (pack.position_ids == model.vocabulary.first_gene_position + gene).float(), []
    for step in (0.001, -0.001):  # relu has kinks
        with torch.inference_mode():
            hidden = network.backbone.encode(pack, network.vector.layer, gates=step * gates)
            steps.append(network.vector(hidden, pack, gates=step * gates).double().numpy())
    has = np.unique(pack.rows[gates > 0].numpy())
    columns = adata.var_names.get_indexer(model.vocabulary.genes)
    share = 1e4 * expected(adata, model)[:, columns]
    change = (steps[0] - steps[1])[has].mean(axis=0) / 0.002
    effect = (
        (network.counts.loadings * network.counts.scale).detach().numpy() @ change * (share / (1 + share)).mean(axis=0)
    )
    effect[gene] = 0
    row = made.varp["scbin_network"].toarray()[columns[gene]][columns]
    np.testing.assert_allclose(row, effect, rtol=5e-3, atol=2e-3 * np.abs(effect).max())


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
    scbin.tl.gene_network(adata, model, n_edges=4, **QUIET)
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
    ax = scbin.pl.gene_network(back, "GENE3", n_edges=3)
    assert {text.get_text() for text in ax.texts if text.get_fontweight() == "bold"} == {"GENE3"} and len(ax.texts) == 4
    lines = [each for each in scbin.pl.gene_network(back, n_edges=9).collections if isinstance(each, LineCollection)]
    assert len(lines[0].get_paths()) == 9  # none twice, there and back


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
        scbin.tl.gene_network(ranked, of_ranks, method="covariance", **QUIET)
    scbin.tl.gene_network(ranked, of_ranks, **QUIET)  # the default asks nothing of a model


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
