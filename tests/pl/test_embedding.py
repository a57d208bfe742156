"""`pl.embedding` draws with scanpy; its UMAP is kept as long as it belongs to the embedding, and touches nothing else."""

from __future__ import annotations

import sys

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

import scbin
from scbin import ScbinInputError
from scbin.pl._embedding import compute_umap, map_slot

module = sys.modules["scbin.pl._embedding"]


@pytest.fixture
def calls(monkeypatch):
    """Replace the slow layout by a deterministic stand-in and record how often it runs."""
    made = []

    def layout(matrix, **_):
        made.append(len(matrix))
        return np.where(np.isfinite(matrix).all(axis=1)[:, None], matrix[:, :2] * 2, np.nan).astype(np.float32)

    monkeypatch.setattr(module, "compute_umap", layout)
    return made


def umap(adata, basis="X_scbin"):
    return np.asarray(adata.obsm[map_slot(adata, basis, module.read_embedding(adata, basis))])


# ---- drawing -----------------------------------------------------------------------------------------------------------


def test_every_cell_is_a_dot_and_colours_are_kept_as_scanpy_does(embedded, calls):
    ax = scbin.pl.embedding(embedded, color="cell_type")
    assert len(ax.collections[0].get_offsets()) == 60
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["B cell", "T cell", "monocyte"]
    assert len(embedded.uns["cell_type_colors"]) == 3
    assert (ax.get_xlabel(), ax.get_title()) == ("scbin UMAP1", "cell_type")


def test_arguments_and_colours_of_scanpy_are_used(embedded, calls):
    embedded.uns["cell_type_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    ax = scbin.pl.embedding(embedded, color="cell_type", groups=["T cell"], title="mine", frameon=False, size=7)
    assert (ax.get_title(), ax.axison, ax.collections[0].get_sizes()[0]) == ("mine", False, 7)
    assert "#00ff00" in {to_hex(colour) for colour in ax.collections[0].get_facecolors()}
    axes = scbin.pl.embedding(embedded, color=["cell_type", "sex", "GENE0"], ncols=2, vmax=3)
    assert [panel.get_title() for panel in axes] == ["cell_type", "sex", "GENE0"]
    assert axes[2].collections[0].get_clim()[1] == 3


def test_cells_without_embedding_are_left_out(embedded, calls):
    embedded.obsm["X_scbin"][:4] = np.nan
    scbin.pl.embedding(embedded, color="cell_type")
    assert np.isnan(embedded.obsm["X_umap_scbin"]).any(axis=1).tolist() == [True] * 4 + [False] * 56


def test_nothing_but_the_slots_changes(embedded, calls):
    before = embedded.copy()
    scbin.pl.embedding(embedded, color=["cell_type", "GENE3"])
    assert set(embedded.obsm) - set(before.obsm) == {"X_umap_scbin"}
    assert set(embedded.uns) == {"scbin", "cell_type_colors"} and not embedded.obsp
    pd.testing.assert_frame_equal(embedded.obs, before.obs)
    assert (embedded.X != before.X).nnz == 0


def test_view_becomes_real_without_a_warning(embedded, calls):
    part = embedded[embedded.obs["sex"] == "female"]
    assert len(scbin.pl.embedding(part, color="GENE3").collections[0].get_offsets()) == 30
    assert part.obsm["X_umap_scbin"].shape == (30, 2) and "X_umap_scbin" not in embedded.obsm


def test_gene_and_layer_of_a_backed_file(embedded, calls, tmp_path):
    embedded.layers["doubled"] = embedded.X * 2
    embedded.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for layer, factor in ((None, 1), ("doubled", 2)):
        drawn = scbin.pl.embedding(backed, color="GENE3", layer=layer).collections[0].get_array()
        np.testing.assert_allclose(drawn, factor * np.sort(embedded.X[:, 3].toarray().ravel()))
    backed.file.close()


def test_basis_with_two_columns_is_drawn_as_it_is(embedded, calls):
    embedded.obsm["X_mine"] = np.arange(120.0).reshape(60, 2)
    ax = scbin.pl.embedding(embedded, basis="X_mine", ax=plt.subplots()[1])
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), embedded.obsm["X_mine"])
    assert not calls and set(embedded.obsm) == {"X_scbin", "X_mine"} and ax.get_xlabel() == "mine1"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"color": "cell_typ"}, r"A06.*'cell_type'"),
        ({"basis": "X_none"}, "A06.*X_scbin"),
        ({"color": ["cell_type", "cell_typ"]}, "A06.*'cell_type'"),
    ],
)
def test_errors_come_before_anything_is_computed(embedded, calls, change, text):
    with pytest.raises(ScbinInputError, match=text):
        scbin.pl.embedding(embedded, **change)
    assert list(embedded.obsm) == ["X_scbin"] and not calls and plt.get_fignums() == []


def test_what_cannot_be_plotted(toy, embedded):
    embedded.obsm["X_scbin"][:] = np.nan
    for cells, text in ((embedded, "I53"), (toy[:0].copy(), "I53"), (toy.copy(), "I53")):
        cells.obsm.setdefault("X_scbin", np.ones((cells.n_obs, 1)))
        with pytest.raises(ScbinInputError, match=text):
            scbin.pl.embedding(cells)
    del toy.obsm["X_scbin"]
    with pytest.raises(ScbinInputError, match=r"A06.*scbin\.tl\.pretrain"):
        scbin.pl.embedding(toy)


# ---- the UMAP behind it ------------------------------------------------------------------------------------------------


def test_computed_once_and_again_for_another_embedding(embedded, calls):
    first = umap(embedded)
    np.testing.assert_array_equal(umap(embedded), first)
    assert len(calls) == 1
    embedded.obsm["X_scbin"][7, 3] += 1e-3
    umap(embedded)
    embedded.obsm["X_scbin"] = embedded.obsm["X_scbin"][::-1].copy()
    umap(embedded)
    assert len(calls) == 3


def test_subset_and_new_order_keep_their_coordinates(embedded, calls, tmp_path):
    embedded.obsm["X_scbin"][4] = np.nan
    all_cells = umap(embedded)
    order = np.random.default_rng(0).permutation(60)[:25]
    some = embedded[order].copy()
    np.testing.assert_array_equal(umap(some), all_cells[order])
    some.write_h5ad(tmp_path / "a.h5ad")
    umap(ad.read_h5ad(tmp_path / "a.h5ad"))
    assert len(calls) == 1
    umap(ad.concat([some, embedded[~embedded.obs_names.isin(some.obs_names)]]))  # concat drops the fingerprints
    assert len(calls) == 2


def test_two_bases_side_by_side_and_nothing_of_others_is_replaced(embedded, calls):
    embedded.obsm["X_pca"] = embedded.obsm["X_scbin"] - 1
    embedded.obsm["X_umap_pca"] = np.ones((60, 2))
    for basis in ("X_scbin", "X_pca", "X_scbin", "X_pca"):
        umap(embedded, basis)
    assert len(calls) == 2 and (embedded.obsm["X_umap_pca"] == 1).all()
    assert {"X_umap_scbin", "X_umap_scbin_pca"} <= set(embedded.obsm)


def test_real_umap_is_deterministic_and_separates_types(embedded):
    matrix = embedded.obsm["X_scbin"].copy()
    matrix[3] = np.nan
    first, second = compute_umap(matrix), compute_umap(matrix)
    np.testing.assert_array_equal(first, second)
    assert np.isnan(first[3]).all() and np.isfinite(np.delete(first, 3, axis=0)).all()
    rest = np.delete(np.arange(60), 3)
    codes = embedded.obs["cell_type"].cat.codes.to_numpy()[rest]
    distance = np.linalg.norm(first[rest][:, None] - first[rest][None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (codes[distance.argmin(axis=1)] == codes).mean() > 0.9


@pytest.mark.parametrize("n_cells", [1, 2, 9, 10, 16])
def test_few_or_equal_cells(n_cells):
    matrix = np.random.default_rng(n_cells).normal(size=(n_cells, 4)).astype(np.float32)
    for cells in (matrix, np.ones_like(matrix)):
        coordinates = compute_umap(cells)
        assert coordinates.shape == (n_cells, 2) and np.isfinite(coordinates).all()


@pytest.mark.slow
def test_umap_of_many_cells_takes_the_approximate_neighbours():
    """From 4,096 cells on scanpy takes another way, which not every version of its neighbour search can go."""
    matrix = np.random.default_rng(0).normal(size=(4_200, 8)).astype(np.float32)
    assert np.isfinite(compute_umap(matrix)).all()


# ---- generated cells ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(embedded):
    return embedded[20:].copy(), embedded[:20].copy()


def test_generated_cells_are_ringed_and_nothing_is_stored(pair, calls):
    real, made = pair
    made.obsm["X_scbin"][:5] = np.nan
    real.uns["cell_type_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    before, own = (set(real.obsm), set(made.obsm), set(real.uns)), plt.subplots()[1]
    ax = scbin.pl.generated(real, made, color="cell_type", ax=own)
    dots, rings = ax.collections[0], ax.collections[-1]
    assert ax is own and len(dots.get_offsets()) == 60 and np.isfinite(rings.get_offsets()).all(axis=1).sum() == 15
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["B cell", "T cell", "monocyte"]
    assert {to_hex(colour) for colour in dots.get_facecolors()} == {"#ff0000", "#00ff00", "#0000ff"}
    assert before == (set(real.obsm), set(made.obsm), set(real.uns))
    with pytest.raises(ScbinInputError, match="celltype"):
        scbin.pl.generated(real, made, color="celltype")


# ---- side by side ------------------------------------------------------------------------------------------------------


def test_compare_draws_each_embedding_with_the_same_colours(embedded, calls):
    embedded.obsm["X_pca"] = embedded.obsm["X_scbin"][:, ::-1].copy()
    axes = scbin.pl.compare(embedded, color="cell_type")
    assert [ax.get_title() for ax in axes] == ["X_scbin", "X_pca"] and len(calls) == 2
    first, second = (ax.collections[0].get_facecolors() for ax in axes)
    assert np.array_equal(first, second)
    assert [ax.get_legend() is None for ax in axes] == [True, False]
    assert len(scbin.pl.compare(embedded, ["X_pca"], color="GENE3", vmax=2)) == 1
    with pytest.raises(ScbinInputError, match=r"A06.*'X_umap'"):
        scbin.pl.compare(embedded, ["X_scbin", "X_umap"])


def test_linked_maps_need_jupyter_scatter(embedded, monkeypatch):
    embedded.obsm["X_pca"] = embedded.obsm["X_scbin"]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ScbinInputError, match=r"A05.*scbin\[interactive\]"):
        scbin.pl.compare(embedded, interactive=True)


def test_selections_are_shared_between_linked_maps(embedded, calls):
    pytest.importorskip("jscatter", reason="jupyter-scatter, scbin[interactive], is not installed")
    embedded.obsm["X_scbin"][:2] = np.nan
    embedded.obsm["X_pca"] = embedded.obsm["X_scbin"].copy()
    grid = scbin.pl.compare(embedded, color="cell_type", interactive=True)
    one, two = (box.children[1] for box in grid.children)
    assert len(one.points) == 58
    one.selection = np.array([3, 5])
    assert list(two.selection) == [3, 5]
