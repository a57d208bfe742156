"""`tl.perturb` as users call it: what it writes, that it equals edited cells embedded one by one, and what it refuses."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scbin
from scbin._adata import gene_names
from scbin._errors import ScbinError, ScbinInputError, ScbinInputWarning
from scbin.model import Model
from scbin.nn.counts import CountHead
from scbin.nn.network import CellNetwork, build_network
from scbin.nn.packs import token_expression
from scbin.nn.presets import Network
from scbin.nn.run import Runner, embed
from scbin.nn.vector import LatentVector, PooledVector
from scbin.tl._effects import Effects, Measure, States, alignment, cosine_shift, make_plan
from scbin.tl._perturb_statistics import Statistics, gene_statistics, summarise
from scbin.tokens.bins import Bins
from scbin.tokens.edits import Edit, GeneRows, edit_rows, shortened
from scbin.tokens.tokens import MemoryTokens
from scbin.tokens.vocabulary import Vocabulary

QUIET = {"progress": False, "device": "cpu"}
KEY = "scbin_perturb"
ENCODINGS = {
    "bins": ("bins", Bins.linear(5)),
    "bins_keep": ("bins", Bins.linear(5, zeros="keep")),
    "binary": ("binary", Bins.binary()),
    "gene_bins": ("gene_bins", Bins(tuple(map(float, range(1, 5))), reads="counts")),
    "rank": ("rank", None),
}
SHAPE = Network(2, 16, 32, 2, initializer_range=0.1, hidden_dropout_prob=0.0)
TYPES = ("T cell", "B cell", "monocyte")


def rows_of(v: Vocabulary, levels: np.ndarray, seed: int = 0) -> sparse.csr_matrix:
    """Token rows with genes at these levels (cells, genes); phenotypes are masked; a cell without genes is empty."""
    rng, first = np.random.default_rng(seed), v.first_gene_position
    rows = np.zeros((len(levels), v.n_positions), dtype=v.dtype)
    rows[:, 0], rows[:, first - 1] = v.specials["[CLS]"], v.specials["[START]"]
    rows[:, [p.position for p in v.phenotypes]] = v.mask_id
    for i, level in enumerate(levels):
        if v.position_is_gene:
            own = np.arange(len(v.genes)) * v.n_levels if v.encoding == "gene_bins" else 0
            rows[i, first : first + len(level)] = np.where(
                (level > 0) | v.keeps_zeros, v.first_gene_id + own + level, 0
            )
            rows[i, -1] = v.specials["[END]"]
        else:
            genes = rng.permutation(np.flatnonzero(level))[: v.max_length - first - 1]
            rows[i, first : first + len(genes)] = v.first_gene_id + genes
            rows[i, first + len(genes)] = v.specials["[END]"]
    rows[levels.sum(axis=1) == 0] = 0
    return sparse.csr_matrix(rows)


def made(name: str, levels: np.ndarray, vector: str = "weighted", layer: int = -1) -> tuple[sparse.csr_matrix, Model]:
    """Tokens of an encoding, and a network of random weights that reads them."""
    encoding, bins = ENCODINGS[name]
    genes = [f"GENE{i}" for i in range(levels.shape[1])]
    phenotypes = {"cell_type": TYPES, "sex": ["female", "male"]}
    v = Vocabulary.build(encoding, genes, bins=bins, phenotypes=phenotypes, max_length=12 if bins is None else None)
    torch.manual_seed(0)
    kind = LatentVector(v, 16, 8, width=16, reads=True) if vector == "latent" else PooledVector(v, 16, vector, layer)
    counts = CountHead(len(genes), kind.size)
    torch.nn.init.normal_(counts.loadings)
    return rows_of(v, levels), Model(CellNetwork(build_network(v, SHAPE, "bert", seed=1).backbone, kind, counts), v)


@pytest.fixture(scope="module")
def setting(toy_factory) -> tuple[ad.AnnData, Model]:
    """The toy cells, one of them empty, their tokens and a network; not to be changed."""
    adata = toy_factory()
    levels = np.digitize(np.log1p(adata.X.toarray()), [0.5, 1.0, 1.5, 2.0, 2.5])
    levels[7] = 0
    adata.obsm["X_tokens"], model = made("bins", levels)
    adata.uns["scbin"] = {"vocabulary": model.vocabulary.to_json()}
    adata.obs["donor"] = np.array([f"d{i % 4}" for i in range(adata.n_obs)], dtype=object)
    return adata, model


@pytest.fixture(scope="module")
def toy_factory():
    rng = np.random.default_rng(0)
    kind = np.arange(60) % 3
    rate = np.full((60, 40), 0.6)
    for k in range(3):
        rate[kind == k, 10 * k : 10 * k + 10] = 6.0
    counts = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    obs = pd.DataFrame({"cell_type": pd.Categorical(np.array(TYPES)[kind])}, index=[f"cell{i}" for i in range(60)])
    return lambda: ad.AnnData(counts.copy(), obs=obs.copy(), var=pd.DataFrame(index=[f"GENE{i}" for i in range(40)]))


@pytest.fixture
def cells(setting):
    return setting[0].copy(), setting[1]


def table(adata, key=KEY):
    return adata.uns[key]["table"], json.loads(adata.uns[key]["params"])


def vectors(model, tokens):
    return embed(model.network, MemoryTokens(tokens, model.vocabulary), device="cpu")


def alone(model, tokens):
    """Every row through the network by itself."""
    return np.concatenate([vectors(model, tokens[i]) for i in range(tokens.shape[0])])


# ---- against the loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("mode", ["delete", "overexpress", "inhibit", "activate", "knock_down"])
def test_exact_effects_equal_the_naive_loop(name, mode):
    """One or two genes at a time in cells of several lengths, in small packs: each as if it were embedded alone."""
    rng, bins = np.random.default_rng(0), ENCODINGS[name][1]
    levels = rng.integers(1, 4, (6, 14)) * (rng.random((6, 14)) < 0.6)
    levels = np.minimum(levels, 1) if name == "binary" else levels
    tokens, model = made(name, levels, "latent" if mode == "delete" else "weighted")
    rows, edit = GeneRows(tokens, model.vocabulary), Edit(mode, k=2, fraction=0.7)
    adata = ad.AnnData(np.zeros((6, 14), np.float32), var=pd.DataFrame(index=list(model.vocabulary.genes)))
    named, genes = gene_names(adata, model.vocabulary), [f"GENE{i}" for i in range(4)] if edit.inserts else None
    plan = make_plan(rows, named, edit, genes, np.zeros(6, dtype=int), combine=2 if mode == "overexpress" else 1)
    measure = Measure(model, rows, np.arange(6), device="cpu", token_budget=90)
    effects = Effects(plan, measure, keep=True).run("exact")
    edited = edit_rows(rows, edit, plan.cells, plan.genes)
    left = rows.tokens[plan.cells] if bins else shortened(rows, plan.cells, edited.n_cut)
    before, after = alone(model, left), alone(model, edited.tokens)
    np.testing.assert_allclose(effects.after[edited.changed], after[edited.changed], atol=1e-5, rtol=0)
    truth = [
        1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        for x, y in zip(*map(np.float64, (before, after)), strict=True)
    ]
    shifts = effects.values[:, 0]
    np.testing.assert_allclose(shifts[edited.changed], np.array(truth)[edited.changed], atol=2e-6, rtol=0)
    assert np.isnan(shifts[~edited.changed]).all() and effects.exact.all()


def test_shifts_on_paper():
    rng = np.random.default_rng(0)
    x, y, centre = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.normal(size=3)
    for a, b, shift in zip(x - centre, y - centre, cosine_shift(x, y, centre), strict=True):
        assert shift == pytest.approx(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    tiny = cosine_shift(np.array([[1.0, 0, 0]]), np.array([[1.0, 1e-7, 0]]))[0]
    assert tiny == pytest.approx(5e-15, rel=1e-3)  # 1 - cosine would be 0 here
    assert np.isnan(alignment(x[:1], x[:1], y[0])[0])


def test_every_expressed_gene_in_turn(cells):
    adata, model = cells[0][:20].copy(), cells[1]
    assert scbin.tl.perturb(adata, model, method="exact", **QUIET) is None
    rows = GeneRows(adata.obsm["X_tokens"], model.vocabulary)
    at, genes = rows.expressed()
    truth = cosine_shift(vectors(model, rows.tokens)[at], vectors(model, edit_rows(rows, Edit(), at, genes).tokens))
    layer = adata.layers["scbin_shift"]
    assert sparse.issparse(layer) and layer.dtype == np.float32 and layer.nnz == len(at)
    np.testing.assert_allclose(np.asarray(layer[at, genes]).ravel(), truth, atol=1e-5)
    frame, params = table(adata)
    assert frame["gene"].tolist() == [model.vocabulary.genes[g] for g in np.unique(genes)]
    np.testing.assert_allclose(frame["shift"], [truth[genes == g].mean() for g in np.unique(genes)], atol=1e-6)
    assert frame["exact"].all() and params["method"] == "exact" and params["n_edits"] == len(at)


def test_phenotypes_are_hidden(cells):
    adata, model = cells
    told = adata.copy()
    phenotype = model.vocabulary.phenotype("cell_type")
    told.obsm["X_tokens"].data[told.obsm["X_tokens"].indices == phenotype.position] = phenotype.first_id
    for data in (adata, told):
        scbin.tl.perturb(data, model, genes="GENE1", **QUIET)
    assert (adata.layers["scbin_shift"] != told.layers["scbin_shift"]).nnz == 0
    assert (told.obsm["X_tokens"].data == phenotype.first_id).any()


# ---- states ---------------------------------------------------------------------------------------------------------


def test_towards_a_goal(cells):
    adata, model = cells
    states = {"key": "cell_type", "start": "B cell", "goal": "T cell", "alternatives": "monocyte"}
    scbin.tl.perturb(adata, model, genes="GENE3", mode="overexpress", states=states, **QUIET)
    embedding = vectors(model, adata.obsm["X_tokens"]).astype(np.float64)
    kind = adata.obs["cell_type"].to_numpy().astype(str)
    centre = np.nanmean(embedding, axis=0)

    def cosine(x, state):
        e = np.nanmean(embedding[kind == state], axis=0) - centre
        return (x - centre) @ e / np.linalg.norm(x - centre, axis=1) / np.linalg.norm(e)

    rows = GeneRows(adata.obsm["X_tokens"], model.vocabulary)
    at = np.unique(adata.layers["scbin_shift"].nonzero()[0])
    assert set(kind[at]) == {"B cell"}
    after = vectors(model, edit_rows(rows, Edit("overexpress"), at, np.full(len(at), 3)).tokens).astype(np.float64)
    frame, params = table(adata)
    for column, state in (("shift", "T cell"), ("shift_to_start", "B cell"), ("shift_to_monocyte", "monocyte")):
        truth = cosine(after, state) - cosine(embedding[at], state)
        assert frame[column].iloc[0] == pytest.approx(truth.mean(), abs=1e-5)
    assert params["goal"] == "T cell" and params["alternatives"] == ["monocyte"]
    way, goal = after - embedding[at], np.nanmean(embedding[kind == "T cell"], axis=0)
    goal = goal - np.nanmean(embedding[kind == "B cell"], axis=0)
    truth = way @ goal / np.linalg.norm(way, axis=1) / np.linalg.norm(goal)
    assert frame["alignment"].iloc[0] == pytest.approx(truth.mean(), abs=1e-4)


@pytest.mark.parametrize("method", ["exact", "screen"])
def test_a_goal_is_judged_by_permuted_states(cells, method):
    """Both ways of computing agree; p values are of labels, by donor where there are donors, and need no more edits."""
    adata, model = cells
    states = {"key": "cell_type", "start": "B cell", "goal": "T cell", "alternatives": ["monocyte"]}
    how = {"method": method, "verify": 0.2}
    for donor in (None, "donor"):
        statistics = {"donor_key": donor, "n_permutations": 50}
        scbin.tl.perturb(adata, model, states=states, statistics=statistics, **how, **QUIET)
        frame, params = table(adata)
        assert {"p_value", "fdr", "p_value_monocyte", "fdr_monocyte"} <= set(frame.columns)
        assert params["donor_key"] == donor and (frame["p_value"].dropna() > 1 / (50 * len(frame) + 2)).all()
        assert (frame["shift_low"] <= frame["shift"]).all() and frame["shift_high"].max() < 2
    assert scbin.get.perturb_df(adata)["alignment"].is_monotonic_decreasing
    other = adata.copy()
    scbin.tl.perturb(other, model, states=states, statistics={"n_permutations": 0}, **how, **QUIET)
    assert "p_value_monocyte" not in table(other)[0]


# ---- sets of genes --------------------------------------------------------------------------------------------------


def test_named_genes_go_into_cells_that_lack_them(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE3", "GENE1"], mode="overexpress", **QUIET)
    assert np.diff(adata.layers["scbin_shift"].tocsc().indptr)[[1, 3]].min() >= 55
    assert table(adata)[0]["gene"].tolist() == ["GENE3", "GENE1"]


def test_a_list_at_once_leaves_vectors(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE3", "GENE1"], each=False, **QUIET)
    edited = adata.obsm["X_tokens"].tolil()
    edited[:, model.vocabulary.first_gene_position + np.array([3, 1])] = 0
    after, truth = adata.obsm["X_scbin_perturbed"], vectors(model, edited.tocsr())
    both = np.isfinite(after).all(axis=1)
    assert 0 < both.sum() < 60 and after.shape == (60, 16)
    np.testing.assert_allclose(after[both], truth[both], atol=1e-5)
    assert "scbin_shift" not in adata.layers and table(adata)[0]["gene"].tolist() == ["GENE3,GENE1"]


def test_pairs(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2", "GENE3"], combine=2, **QUIET)
    beyond = table(adata)[0].set_index("gene")
    pairs = beyond["shift"]
    assert pairs.index.tolist() == ["GENE1,GENE2", "GENE1,GENE3", "GENE2,GENE3"]
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2", "GENE3"], **QUIET)
    single = adata.layers["scbin_shift"][:, [1, 2]].toarray()
    both = (single > 0).all(axis=1)
    total = float(single[both].mean(axis=0).sum())
    row = beyond.loc["GENE1,GENE2"]
    assert row["n_cells"] == both.sum() and row[["anchor_shift", "gene_shift"]].sum() == pytest.approx(total, rel=1e-4)
    assert row["combined_minus_sum"] == pytest.approx(row["shift"] - total, abs=1e-6)
    assert row["combined_minus_sum_ci_low"] < row["combined_minus_sum"] < row["combined_minus_sum_ci_high"]
    scbin.tl.perturb(adata, model, genes=[("GENE1", "GENE2"), ("GENE2", "GENE3")], **QUIET)
    assert table(adata)[0]["shift"].tolist() == pytest.approx([pairs.iloc[0], pairs.iloc[2]])
    assert "scbin_shift" not in adata.layers  # of the call before
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2"], combine=2, **QUIET)  # one pair is a table of pairs, too
    assert table(adata)[0].set_index("gene").loc["GENE1,GENE2", "combined_minus_sum"] == row["combined_minus_sum"]


# ---- the screen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [None, {"key": "cell_type", "start": "B cell", "goal": "T cell"}])
def test_the_screen_verifies_its_top(cells, states):
    exact, model = cells
    screen = exact.copy()
    scbin.tl.perturb(exact, model, method="exact", states=states, **QUIET)
    scbin.tl.perturb(screen, model, method="screen", verify=0.2, states=states, **QUIET)
    (frame, params), truth = table(screen), table(exact)[0]
    assert params["method"] == "screen" and frame["exact"].sum() == 8
    a, b = exact.layers["scbin_shift"], screen.layers["scbin_shift"]
    sure = frame["exact"].to_numpy()
    np.testing.assert_allclose(a[:, np.flatnonzero(sure)].toarray(), b[:, np.flatnonzero(sure)].toarray(), atol=1e-6)
    assert a.nnz == b.nnz and np.corrcoef(a.data, b.data)[0, 1] > 0.95
    np.testing.assert_allclose(frame["shift"][sure], truth["shift"][sure], atol=1e-6)
    assert np.corrcoef(frame["shift"], truth["shift"])[0, 1] > 0.95


@pytest.mark.parametrize("method", ["exact", "screen"])
def test_neither_budget_nor_order_changes_a_shift(cells, method, monkeypatch):
    adata, model = cells[0][:16].copy(), cells[1]
    first = scbin.tl.perturb(adata, model, method=method, verify=0, copy=True, **QUIET)
    again = scbin.tl.perturb(adata, model, method=method, verify=0, copy=True, **QUIET)
    assert (again.layers["scbin_shift"] != first.layers["scbin_shift"]).nnz == 0
    order = np.random.default_rng(0).permutation(adata.n_obs)
    shuffled = adata[order].copy()
    monkeypatch.setattr("scbin.tl._perturb.CPU_PACK", 300)
    scbin.tl.perturb(shuffled, model, method=method, verify=0, **QUIET)
    a, b = first.layers["scbin_shift"][order].toarray(), shuffled.layers["scbin_shift"].toarray()
    np.testing.assert_allclose(a, b, atol=1e-6 if method == "exact" else 1e-3)


# ---- other levels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [True, False])
def test_affected_genes_against_a_loop(cells, each):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2"], each=each, level="gene", **QUIET)
    frame, _ = table(adata)
    sets = [["GENE1"], ["GENE2"]] if each else [["GENE1", "GENE2"]]
    names = [",".join(one) for one in sets]
    rows, runner = GeneRows(adata.obsm["X_tokens"], model.vocabulary), Runner(model.network.eval(), "cpu", "float32")
    from scbin.nn.packs import pack_rows

    def of_genes(tokens):
        is_gene = model.vocabulary.is_gene_token(tokens.data)
        with torch.inference_mode():
            hidden = runner(pack_rows(tokens, np.array([0]))).numpy()[is_gene]
        return dict(zip(tokens.indices[is_gene] - model.vocabulary.first_gene_position, hidden, strict=True))

    expected: dict = {}
    for one, name in zip(sets, names, strict=True):
        genes = np.array([int(gene[4:]) for gene in one])
        for cell in range(60):
            if (rows.find(np.full(len(genes), cell), genes)[1] == 0).any():
                continue
            before = of_genes(rows.tokens[cell])
            after = of_genes(edit_rows(rows, Edit(), np.array([cell]), genes[None]).tokens)
            for gene in after:
                shift = cosine_shift(before[gene], after[gene])
                expected.setdefault((name, f"GENE{gene}"), []).append(float(shift))
    assert len(frame) == len(expected)
    for row in frame.itertuples():
        own = np.array(expected[row.perturbed, row.affected])
        assert row.shift == pytest.approx(own.mean(), abs=1e-6) and row.n_cells == len(own)


def test_affected_genes_are_judged_as_perturbed_ones_are(cells):
    """p values are those of `gene_statistics` on the shifts of every cell, each read alone."""
    adata, model = cells
    adata, found = adata.copy(), []
    for cell in range(adata.n_obs):
        one = adata[[cell]].copy()
        if one.obsm["X_tokens"][0, model.vocabulary.first_gene_position + 1]:
            scbin.tl.perturb(one, model, genes=["GENE1"], level="gene", **QUIET)
            alone = table(one)[0]
            found += [(cell, int(gene[4:]), x) for gene, x in zip(alone["affected"], alone["shift"], strict=True)]
    row, column, values = zip(*found, strict=True)
    shifts = sparse.csr_matrix((values, (row, column)), shape=(adata.n_obs, 40))
    expression = token_expression(adata.obsm["X_tokens"].tocsr(), model.vocabulary)
    adata.obs["donor"] = [f"d{i % 5}" if i % 7 else "unknown" for i in range(adata.n_obs)]
    for statistics, donors in (({}, None), ({"donor_key": "donor"}, adata.obs["donor"].to_numpy())):
        scbin.tl.perturb(adata, model, genes=["GENE1"], level="gene", statistics=statistics, **QUIET)
        own, how = table(adata)[0].set_index("affected"), (list(model.vocabulary.genes), expression)
        judged = gene_statistics(summarise(shifts, donors), *how, Statistics(**statistics)).set_index("gene")
        for name in ("effect_size", "p_value", "fdr"):
            np.testing.assert_allclose(own[name], judged.loc[own.index, name], rtol=1e-3, atol=1e-4)
        assert own["p_value"].notna().any()


def test_affected_genes_of_a_vector_that_reads_embeddings(cells):
    """As in the default models: genes are then read behind the last layer, where they have seen the others."""
    adata, model = cells
    shallow = PooledVector(model.vocabulary, 16, "weighted", 0)
    shallow = Model(CellNetwork(model.network.backbone, shallow), model.vocabulary)
    scbin.tl.perturb(adata, shallow, genes=["GENE1", "GENE2"], each=False, level="gene", **QUIET)
    assert (table(adata)[0]["shift"] > 0).all()


def test_phenotypes(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE12"], level="phenotype", states={"key": "cell_type"}, **QUIET)
    frame, _ = table(adata)
    changes = frame[[f"change_of_{value}" for value in TYPES]]
    np.testing.assert_allclose(changes.sum(axis=1), 0, atol=1e-6)
    assert (frame["shift"] > 0).all() and (frame["shift_low"] > 0).all()
    goal = {"key": "cell_type", "goal": "B cell"}
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE12"], level="phenotype", states=goal, **QUIET)
    np.testing.assert_allclose(table(adata)[0]["shift"], frame["change_of_B cell"], atol=1e-7)


def test_expression_is_what_the_count_head_expects(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE12"], level="expression", **QUIET)
    change = table(adata)[0].set_index(["perturbed", "affected"])["shift"]
    rows = GeneRows(adata.obsm["X_tokens"], model.vocabulary)
    for gene in (1, 12):
        at = np.flatnonzero(rows.find(np.arange(60), np.full(60, gene))[1])
        tokens = (rows.tokens[at], edit_rows(rows, Edit(), at, np.full(len(at), gene)).tokens)
        ends = [torch.from_numpy(vectors(model, each)) for each in tokens]
        with torch.no_grad():
            mu = [1e4 * model.network.counts.log_mean(z, torch.zeros(len(z))).softmax(dim=1) for z in ends]
        truth = (torch.log1p(mu[1]) - torch.log1p(mu[0])).mean(dim=0).numpy()
        own = change[f"GENE{gene}"]
        assert len(own) == 39 and f"GENE{gene}" not in own
        np.testing.assert_allclose(own, np.delete(truth, gene), atol=1e-4)
    model = Model(CellNetwork(model.network.backbone, model.network.vector), model.vocabulary)
    with pytest.raises(ScbinInputError, match="M06"):
        scbin.tl.perturb(adata, model, genes="GENE1", level="expression", **QUIET)


def test_donors_are_the_replicates(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2"], statistics=scbin.Statistics(donor_key="donor"), **QUIET)
    assert (table(adata)[0]["n_donors"] == 4).all() and table(adata)[1]["donor_key"] == "donor"


# ---- slots and errors -----------------------------------------------------------------------------------------------


def test_what_it_writes_survives_files_and_leaves_the_rest(cells, tmp_path):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2"], copy=True, **QUIET)
    assert KEY not in adata.uns and "scbin_shift" not in adata.layers
    before = {name: parameter.clone() for name, parameter in model.network.named_parameters()}
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2"], key_added="mine", **QUIET)
    assert {"mine_shift"} == set(adata.layers) - {None} and "mine_perturb" in adata.uns
    assert all(torch.equal(before[name], parameter) for name, parameter in model.network.named_parameters())
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2"], each=False, **QUIET)
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    assert again.uns[KEY]["table"]["gene"].tolist() == ["GENE1,GENE2"]
    assert (again.layers["mine_shift"] != adata.layers["mine_shift"]).nnz == 0


ERRORS = {
    "unknown": ({"genes": ["GENE99"]}, "A06", "GENE9"),
    "case": ({"genes": "gene3"}, "A06", "'GENE3'"),
    "not_text": ({"genes": [3]}, "A01", "int"),
    "empty_list": ({"genes": []}, "A03", "at least one"),
    "goal_without_cells": ({"states": {"key": "cell_type", "goal": "NK"}}, "A06", "'B cell' (19"),
    "no_goal": ({"states": {"key": "cell_type"}}, "A03", "goal"),
    "same_states": ({"states": {"key": "cell_type", "start": "B cell", "goal": "B cell"}}, "A03", "different"),
    "no_field": ({"states": {"column": "cell_type"}}, "A01", "key"),
    "too_many": ({"combine": 8}, "A02", "76,904,685"),
    "mode": ({"mode": "remove"}, "A02", "delete"),
    "no_screen": ({"genes": ["GENE1", "GENE2"], "each": False, "method": "screen"}, "P01", "exact"),
    "no_phenotype": ({"level": "phenotype"}, "A03", "states"),
    "phenotype": ({"level": "phenotype", "states": {"key": "age"}}, "A06", "sex"),
    "value": ({"level": "phenotype", "states": {"key": "sex", "goal": "other"}}, "A06", "'female'"),
    "choice": ({"method": "fast"}, "A02", "screen"),
    "verify": ({"verify": 2}, "A03", "share"),
    "donors": ({"statistics": {"donor_key": "who"}}, "A06", "donor"),
}


@pytest.mark.parametrize("arguments, code, text", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_was_found_and_write_nothing(setting, arguments, code, text):
    adata, model = setting
    with pytest.raises(ScbinError) as caught:
        scbin.tl.perturb(adata, model, **arguments, **QUIET)
    assert caught.value.code == code and text in str(caught.value)
    assert KEY not in adata.uns and not adata.layers


def test_genes_that_no_cell_expresses(cells):
    adata, model = cells
    tokens = adata.obsm["X_tokens"]
    silent = adata[tokens[:, model.vocabulary.first_gene_position + 3].toarray().ravel() == 0].copy()
    with pytest.raises(ScbinInputError, match=r"P02.*expressed in none of the"):
        scbin.tl.perturb(silent, model, genes="GENE3", **QUIET)
    with pytest.warns(ScbinInputWarning, match="P02"):
        scbin.tl.perturb(silent, model, genes=["GENE3", "GENE1"], **QUIET)
    assert table(silent)[0]["n_cells"].tolist()[0] == 0
    assert scbin.get.perturb_df(silent)["gene"].tolist() == ["GENE1"]


def test_names_of_states():
    assert States("disease", goal="healthy").names == ("healthy", "")
    with pytest.raises(ScbinError, match="A01"):
        States("disease", goal=1)
