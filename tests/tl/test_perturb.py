"""`tl.perturb` as users call it: what it writes, that it equals edited cells embedded anew, and what it refuses."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import scbin
from scbin._errors import ScbinError, ScbinInputError, ScbinInputWarning
from scbin.encoding.edits import Edit, GeneRows, edit_rows
from scbin.nn.embedding import embed_tokens, hide_phenotypes
from scbin.nn.perturbation import cosine_shift

QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def setting(trained):
    adata, model = trained
    adata = adata.copy()
    adata.obs["donor"] = np.array([f"d{i % 4}" for i in range(adata.n_obs)], dtype=object)
    return adata, model


@pytest.fixture
def cells(setting):
    return setting[0].copy(), setting[1]


def table(adata, key="scbin_perturb"):
    return adata.uns[key]["table"], json.loads(adata.uns[key]["params"])


def vectors(model, tokens):
    return embed_tokens(model.bert, tokens, model.weights(), device="cpu")


def test_every_expressed_gene_in_turn(cells):
    adata, model = cells[0][:20].copy(), cells[1]
    assert scbin.tl.perturb(adata, model, method="exact", **QUIET) is None
    rows = GeneRows(hide_phenotypes(adata.obsm["X_tokens"], model.vocabulary), model.vocabulary)
    at, genes = rows.expressed()
    edited = vectors(model, edit_rows(rows, Edit(), at, genes).tokens)
    truth = cosine_shift(vectors(model, rows.tokens)[at], edited)
    layer = adata.layers["scbin_shift"]
    columns = [adata.var_names.get_loc(model.vocabulary.genes[g]) for g in genes]
    assert sparse.issparse(layer) and layer.dtype == np.float32 and layer.nnz == len(at)
    np.testing.assert_allclose(np.asarray(layer[at, columns]).ravel(), truth, atol=1e-5)
    frame, params = table(adata)
    means = [truth[genes == g].mean() for g in np.unique(genes)]
    assert frame["gene"].tolist() == [model.vocabulary.genes[g] for g in np.unique(genes)]
    np.testing.assert_allclose(frame["shift"], means, atol=1e-6)
    assert frame["exact"].all() and params["method"] == "exact" and params["n_edits"] == len(at)


def test_named_genes_go_into_cells_that_lack_them(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE3", "GENE1"], mode="overexpress", **QUIET)
    assert np.diff(adata.layers["scbin_shift"].tocsc().indptr)[[1, 3]].min() >= 55
    assert table(adata)[0]["gene"].tolist() == ["GENE3", "GENE1"]


def test_towards_a_goal(cells):
    adata, model = cells
    scbin.tl.perturb(
        adata,
        model,
        genes="GENE3",
        mode="overexpress",
        state_key="cell_type",
        start="B cell",
        goal="T cell",
        alternatives="monocyte",
        **QUIET,
    )
    embedding = vectors(model, hide_phenotypes(adata.obsm["X_tokens"], model.vocabulary)).astype(np.float64)
    kind = adata.obs["cell_type"].to_numpy().astype(str)
    centre = np.nanmean(embedding, axis=0)

    def cosine(x, state):
        e = np.nanmean(embedding[kind == state], axis=0) - centre
        return (x - centre) @ e / np.linalg.norm(x - centre, axis=1) / np.linalg.norm(e)

    rows = GeneRows(hide_phenotypes(adata.obsm["X_tokens"], model.vocabulary), model.vocabulary)
    at = np.unique(adata.layers["scbin_shift"].nonzero()[0])
    assert set(kind[at]) == {"B cell"}
    gene = model.vocabulary.genes.index("GENE3")
    after = vectors(model, edit_rows(rows, Edit("overexpress"), at, np.full(len(at), gene)).tokens).astype(np.float64)
    frame, params = table(adata)
    for column, state in (("shift", "T cell"), ("shift_to_start", "B cell"), ("shift_to_monocyte", "monocyte")):
        truth = cosine(after, state) - cosine(embedding[at], state)
        assert frame[column].iloc[0] == pytest.approx(truth.mean(), abs=1e-5)
    assert params["goal"] == "T cell" and params["alternatives"] == ["monocyte"]
    way, goal = after - embedding[at], np.nanmean(embedding[kind == "T cell"], axis=0)
    goal -= np.nanmean(embedding[kind == "B cell"], axis=0)
    truth = way @ goal / np.linalg.norm(way, axis=1) / np.linalg.norm(goal)
    assert frame["alignment"].iloc[0] == pytest.approx(truth.mean(), abs=1e-4)


def test_a_list_at_once_leaves_vectors(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE3", "GENE1"], mode="overexpress", each=False, **QUIET)
    after = adata.obsm["X_scbin_perturbed"]
    assert (
        after.shape == (60, 32)
        and np.isnan(after[7]).all()
        and np.isfinite(np.delete(after, 7, axis=0)).any(axis=1).sum() > 50
    )
    assert "scbin_shift" not in adata.layers and table(adata)[0]["gene"].tolist() == ["GENE3,GENE1"]


def test_what_a_list_leaves_lies_where_the_edited_cells_would_be_embedded(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE3", "GENE1"], mode="delete", each=False, **QUIET)
    columns = model.vocabulary.first_gene_position + np.array(
        [model.vocabulary.genes.index(g) for g in ("GENE3", "GENE1")]
    )
    edited = adata.copy()
    tokens = edited.obsm["X_tokens"].tolil()
    tokens[:, columns] = 0
    edited.obsm["X_tokens"] = tokens.tocsr()
    scbin.tl.embed(edited, model, device="cpu", progress=False)
    after = adata.obsm["X_scbin_perturbed"]
    both = np.isfinite(after).all(axis=1)
    assert both.any()
    np.testing.assert_allclose(after[both], edited.obsm["X_scbin"][both], atol=1e-4)


def test_pairs_and_anchors(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2", "GENE3"], combine=2, **QUIET)
    pairs = table(adata)[0].set_index("gene")["shift"]
    assert pairs.index.tolist() == ["GENE1,GENE2", "GENE1,GENE3", "GENE2,GENE3"]
    beyond = table(adata)[0].set_index("gene")
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2", "GENE3"], **QUIET)
    alone = {name: adata.layers["scbin_shift"][:, adata.var_names.get_loc(name)] for name in ("GENE1", "GENE2")}
    both = np.flatnonzero((alone["GENE1"].toarray() > 0) & (alone["GENE2"].toarray() > 0))
    total = sum(float(column.toarray()[both].mean()) for column in alone.values())
    row = beyond.loc["GENE1,GENE2"]
    assert row["n_cells"] == len(both) and row["sum_of_shifts"] == pytest.approx(total, rel=1e-4)
    assert row["combined_minus_sum"] == pytest.approx(row["shift"] - total, abs=1e-6)
    assert row["combined_minus_sum_ci_low"] < row["combined_minus_sum"] < row["combined_minus_sum_ci_high"]
    assert beyond["combined_minus_sum_fdr"].between(0, 1).all()
    scbin.tl.perturb(adata, model, genes=[("GENE1", "GENE2"), ("GENE2", "GENE3")], **QUIET)
    assert table(adata)[0]["shift"].tolist() == pytest.approx([pairs.iloc[0], pairs.iloc[2]])
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2", "GENE3"], anchor="GENE2", **QUIET)
    frame = table(adata)[0].set_index("gene")["shift"]
    assert frame.to_dict() == pytest.approx({"GENE2,GENE1": pairs.iloc[0], "GENE2,GENE3": pairs.iloc[2]})
    assert set(adata.layers["scbin_shift"].nonzero()[1]) == {1, 3}


def test_the_screen_verifies_its_top(cells):
    adata, model = cells[0][:20].copy(), cells[1]
    exact, screen = adata.copy(), adata.copy()
    scbin.tl.perturb(exact, model, method="exact", **QUIET)
    scbin.tl.perturb(screen, model, method="screen", verify=0.2, **QUIET)
    frame, params = table(screen)
    assert params["method"] == "screen" and params["verified"] == 8 and params["drawn"] == 5
    assert frame["exact"].sum() == 13 and "estimated_missed" in params
    a, b = exact.layers["scbin_shift"].toarray(), screen.layers["scbin_shift"].toarray()
    genes = [adata.var_names.get_loc(name) for name in frame["gene"][frame["exact"]]]
    np.testing.assert_allclose(a[:, genes], b[:, genes], atol=1e-6)
    assert np.corrcoef(a[a > 0], b[a > 0])[0, 1] > 0.95


@pytest.mark.parametrize("method", ["exact", "screen"])
def test_neither_budget_nor_order_nor_pieces_change_a_shift(cells, tmp_path, monkeypatch, method):
    from scbin.tl import _perturb_run

    adata, model = cells[0][:16].copy(), cells[1]
    monkeypatch.setattr(_perturb_run, "PIECE", 60)
    first = scbin.tl.perturb(adata, model, method=method, save_dir=tmp_path, copy=True, **QUIET)
    folders = list(tmp_path.iterdir())
    pieces = sorted(folders[0].iterdir())
    assert len(folders) == 1 and len(pieces) > 3
    order = np.random.default_rng(0).permutation(adata.n_obs)
    shuffled = adata[order].copy()
    scbin.tl.perturb(shuffled, model, method=method, token_budget=300, **QUIET)
    if method == "exact":
        a, b = first.layers["scbin_shift"][order].toarray(), shuffled.layers["scbin_shift"].toarray()
        np.testing.assert_allclose(a, b, atol=1e-6)
    (pieces[0] / "values.f32").write_bytes(b"torn")  # one damaged, one lost: both made again, the others read
    for file in pieces[1].iterdir():
        file.unlink()
    pieces[1].rmdir()
    calls = []
    monkeypatch.setattr(_perturb_run, "write_directory", lambda *a: calls.append(a))
    again = scbin.tl.perturb(adata, model, method=method, save_dir=tmp_path, copy=True, **QUIET)
    assert len(calls) == 2
    assert (again.layers["scbin_shift"] != first.layers["scbin_shift"]).nnz == 0


def test_groups_and_donors(cells):
    adata, model = cells
    scbin.tl.perturb(
        adata, model, groupby="cell_type", groups=["B cell", "T cell"], donor_key="donor", method="exact", **QUIET
    )
    frame, _ = table(adata)
    assert set(frame["group"]) == {"B cell", "T cell"} and (frame["replicates"] == "donors").all()
    assert set(adata.obs["cell_type"].iloc[adata.layers["scbin_shift"].nonzero()[0]]) == {"B cell", "T cell"}


def test_other_genes(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2"], level="gene", **QUIET)
    frame, _ = table(adata)
    assert frame["affected"].iloc[:2].tolist() == ["cell", "cell"]
    rest = frame.iloc[2:]
    assert not (rest["perturbed"] == rest["affected"]).any() and (rest["shift"] > 0).all()


def test_phenotypes(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE12"], readout="phenotype", target="cell_type", **QUIET)
    frame, _ = table(adata)
    changes = frame[[f"change_of_{value}" for value in model.vocabulary.phenotype("cell_type").values]]
    np.testing.assert_allclose(changes.sum(axis=1), 0, atol=1e-6)
    scbin.tl.perturb(
        adata, model, genes=["GENE1", "GENE12"], readout="phenotype", target="cell_type", goal="B cell", **QUIET
    )
    np.testing.assert_allclose(table(adata)[0]["shift"], frame["change_of_B cell"], atol=1e-7)


def test_expression(cells):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE12"], readout="expression", **QUIET)
    entry = adata.uns["scbin_perturb"]
    change = entry["expression"]
    assert change.shape == (2, 40) and entry["sets"].tolist() == ["GENE1", "GENE12"]
    own = [entry["genes"].tolist().index(name) for name in entry["sets"]]
    assert np.isnan(change[[0, 1], own]).all() and np.isfinite(change).sum() == 78
    assert np.nanmax(np.abs(change)) > 0


def test_what_it_writes_survives_files_and_leaves_the_rest(cells, untouched, tmp_path):
    adata, model = cells
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2"], copy=True, **QUIET)
    assert "scbin_perturb" not in adata.uns and "scbin_shift" not in adata.layers
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2"], key_added="mine", **QUIET)
    assert {"mine_shift"} == set(adata.layers) and "mine_perturb" in adata.uns
    scbin.tl.perturb(adata, model, genes=["GENE1", "GENE2"], each=False, **QUIET)
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    assert again.uns["scbin_perturb"]["table"]["gene"].tolist() == ["GENE1,GENE2"]
    assert (again.layers["mine_shift"] != adata.layers["mine_shift"]).nnz == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr formats to come
        adata.write_zarr(tmp_path / "a.zarr")


ERRORS = {
    "unknown": ({"genes": ["GENE99"]}, "P22", "GENE9"),
    "case": ({"genes": "gene3"}, "P22", "'GENE3'"),
    "not_text": ({"genes": [3]}, "P30", "int"),
    "empty_list": ({"genes": []}, "P31", "at least one"),
    "goal_without_cells": ({"state_key": "cell_type", "goal": "NK"}, "P26", "'B cell' (19"),
    "no_goal": ({"state_key": "cell_type"}, "P40", "goal="),
    "state_without_key": ({"goal": "B cell"}, "P39", "state_key="),
    "same_states": ({"state_key": "cell_type", "start": "B cell", "goal": "B cell"}, "P41", "different"),
    "empty_group": ({"groupby": "cell_type", "groups": "NK"}, "P25", "'NK' is empty"),
    "groups_without_key": ({"groups": "NK"}, "P36", "groupby="),
    "group_outside_start": (
        {"groupby": "cell_type", "groups": "B cell", "state_key": "cell_type", "start": "T cell", "goal": "monocyte"},
        "P37",
        "start state",
    ),
    "too_many": ({"max_edits": 10}, "P27", "max_edits is 10"),
    "too_many_pairs": ({"combine": 3, "max_edits": 1000}, "P27", "9,880"),
    "no_column": ({"groupby": "celltype"}, "I35", "cell_type"),
    "mode": ({"mode": "remove"}, "P20", "delete"),
    "no_screen": ({"genes": ["GENE1", "GENE2"], "each": False, "method": "screen"}, "P29", "exact"),
    "target": ({"readout": "phenotype"}, "P34", "target"),
    "phenotype": ({"readout": "phenotype", "target": "age"}, "V08", "sex"),
    "choice": ({"method": "fast"}, "A02", "screen"),
    "share": ({"verify": 2}, "P23", "share"),
}


@pytest.mark.parametrize("arguments, code, text", ERRORS.values(), ids=ERRORS)
def test_errors_say_what_was_found_and_write_nothing(setting, arguments, code, text):
    adata, model = setting
    with pytest.raises(ScbinError) as caught:
        scbin.tl.perturb(adata, model, **arguments, **QUIET)
    assert caught.value.code == code and text in str(caught.value)
    assert "scbin_perturb" not in adata.uns and not adata.layers


def test_genes_that_no_cell_expresses(cells):
    adata, model = cells
    silent = adata[np.asarray(adata.X[:, 3].todense()).ravel() == 0].copy()
    with pytest.raises(ScbinInputError, match="P24.*expressed in none of the"):
        scbin.tl.perturb(silent, model, genes="GENE3", **QUIET)
    with pytest.warns(ScbinInputWarning, match="P24"):
        scbin.tl.perturb(silent, model, genes=["GENE3", "GENE1"], **QUIET)
    assert table(silent)[0]["n_cells"].tolist()[0] == 0
