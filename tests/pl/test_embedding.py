from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from scipy.sparse import csc_matrix, csr_array

import scbin.pl
from scbin._errors import ScbinInputError
from scbin.pl import _style, _umap


@pytest.fixture(autouse=True)
def _quick_layout(monkeypatch):
    monkeypatch.setattr(_umap, "compute_umap", lambda embedding, **_: embedding[:, :2].copy())


def dots(ax):
    return np.concatenate([collection.get_offsets() for collection in ax.collections])


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_every_cell_is_a_dot(embedded):
    assert len(dots(scbin.pl.embedding(embedded, color="cell_type"))) == 60


def test_legend_names_the_types_present(embedded):
    embedded.obs["cell_type"] = embedded.obs["cell_type"].cat.add_categories("none of these")
    assert sorted(labels(scbin.pl.embedding(embedded, color="cell_type"))) == ["B cell", "T cell", "monocyte"]


def test_cells_without_embedding_are_left_out_and_counted(embedded):
    embedded.obsm["X_scbin"][:4] = np.nan
    ax = scbin.pl.embedding(embedded, color="cell_type")
    assert len(dots(ax)) == 56
    assert "4 of 60 cells have no embedding" in ax.get_xlabel()
    assert np.isnan(embedded.obsm["X_umap_scbin"][:4]).all()


def test_missing_labels_are_grey_and_last(embedded):
    embedded.obs["label"] = pd.Series(np.where(np.arange(60) < 10, None, "known"), index=embedded.obs_names)
    ax = scbin.pl.embedding(embedded, color="label")
    assert labels(ax) == ["known", "missing"]
    assert to_hex(ax.get_legend().legend_handles[-1].get_color()) == _style.MISSING_COLOUR


def test_unknown_is_grey_and_takes_no_colour(embedded):
    embedded.obs["label"] = pd.Categorical(["unknown", "zeta"] * 30)
    handles = scbin.pl.embedding(embedded, color="label").get_legend().legend_handles
    assert [to_hex(handle.get_color()) for handle in handles] == [_style.MISSING_COLOUR, _style.PALETTE[0]]


def test_one_extreme_cell_does_not_darken_the_others(embedded):
    embedded.X = embedded.X.toarray()
    embedded.X[0, 3] = 1000.0
    dots = scbin.pl.embedding(embedded, color="GENE3").collections[-1]
    assert dots.get_clim()[1] < 20
    assert dots.get_array().max() == 1000


def test_colours_of_scanpy_are_used(embedded):
    embedded.uns["cell_type_colors"] = np.array(["#ff0000", "#00ff00", "#0000ff"])
    ax = scbin.pl.embedding(embedded, color="cell_type")
    colours = [to_hex(handle.get_color()) for handle in ax.get_legend().legend_handles]
    assert colours == ["#ff0000", "#00ff00", "#0000ff"]


def test_nothing_but_the_slot_changes(embedded):
    before = embedded.copy()
    scbin.pl.embedding(embedded, color=["cell_type", "GENE3"])
    assert set(embedded.obsm) - set(before.obsm) == {"X_umap_scbin"}
    assert list(embedded.uns) == ["scbin"]
    assert not embedded.obsp
    pd.testing.assert_frame_equal(embedded.obs, before.obs)
    assert (embedded.X != before.X).nnz == 0


@pytest.mark.parametrize("container", [np.asarray, csc_matrix, csr_array], ids=["dense", "csc", "csr_array"])
def test_gene_from_any_container(embedded, container):
    expected = np.sort(embedded.X[:, 3].toarray().ravel())
    embedded.X = container(embedded.X.toarray())
    ax = scbin.pl.embedding(embedded, color="GENE3")
    np.testing.assert_allclose(ax.collections[-1].get_array(), expected)


def test_gene_from_a_layer(embedded):
    embedded.layers["doubled"] = embedded.X * 2
    ax = scbin.pl.embedding(embedded, color="GENE3", layer="doubled")
    assert ax.collections[-1].get_array().max() == 2 * embedded.X[:, 3].max()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_number_that_says_nothing(embedded, value):
    embedded.obs["score"] = value
    scbin.pl.embedding(embedded, color="score").figure.canvas.draw()


def test_gene_that_is_not_expressed(embedded):
    embedded.X = embedded.X.toarray() * 0
    scbin.pl.embedding(embedded, color="GENE3").figure.canvas.draw()


def test_several_colours_are_several_axes(embedded):
    axes = scbin.pl.embedding(embedded, color=["cell_type", "sex", "GENE0", "GENE1"])
    assert [ax.get_title() for ax in axes] == ["cell_type", "sex", "GENE0", "GENE1"]


def test_view_becomes_real_without_a_warning(embedded):
    part = embedded[embedded.obs["sex"] == "female"]
    assert len(dots(scbin.pl.embedding(part, color="GENE3"))) == 30
    assert part.obsm["X_umap_scbin"].shape == (30, 2)
    assert "X_umap_scbin" not in embedded.obsm


def test_gene_of_a_backed_file(embedded, tmp_path):
    embedded.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    ax = scbin.pl.embedding(backed, color="GENE3")
    np.testing.assert_allclose(ax.collections[-1].get_array(), np.sort(embedded.X[:, 3].toarray().ravel()))
    backed.file.close()


def test_basis_with_two_columns_is_drawn_as_it_is(embedded):
    embedded.obsm["X_mine"] = np.arange(120.0).reshape(60, 2)
    ax = scbin.pl.embedding(embedded, basis="X_mine")
    np.testing.assert_array_equal(dots(ax), embedded.obsm["X_mine"])
    assert "X_umap_mine" not in embedded.obsm


@pytest.mark.parametrize("layout", [None, "constrained"])
def test_legend_stays_beside_its_axes(embedded, layout):
    embedded.obs["many"] = pd.Categorical(
        [f"_$type_{i % 30}$ of a very long name that goes on and on" for i in range(60)]
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout=layout)
    scbin.pl.embedding(embedded, color="many", ax=left)
    scbin.pl.embedding(embedded, color="GENE0", ax=right)
    figure.canvas.draw()
    legend = left.get_legend().get_window_extent()
    assert legend.x0 >= left.get_window_extent().x1
    assert legend.x1 <= right.get_tightbbox().x0 + 1
    assert len(left.get_legend().get_texts()) == 30


def test_long_and_strange_labels_are_drawn(embedded):
    names = ["x" * 10_000, "$\\frac{", "_hidden", "a\nb"]
    embedded.obs["odd"] = pd.Categorical([names[i % 4] for i in range(60)])
    ax = scbin.pl.embedding(embedded, color="odd")
    ax.figure.canvas.draw()
    assert max(map(len, labels(ax))) <= _style.LONGEST_LABEL
    assert {"$\\frac{", "_hidden", "a b"} < set(labels(ax))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param({"color": "cell_typ"}, r"I35.*'cell_type'", id="typo"),
        pytest.param({"basis": "X_none"}, r"P01.*Available: 'X_scbin'", id="no_basis"),
        pytest.param({"color": "GENE0", "layer": "none"}, "I35.*layers", id="no_layer"),
    ],
)
def test_errors_say_what_is_there(embedded, change, code):
    with pytest.raises(ScbinInputError, match=code):
        scbin.pl.embedding(embedded, **change)
    assert list(embedded.obsm) == ["X_scbin"]
    assert plt.get_fignums() == []


def test_ax_takes_one_colour(embedded):
    with pytest.raises(ScbinInputError, match="P03"):
        scbin.pl.embedding(embedded, color=["cell_type", "sex"], ax=plt.subplots()[1])


def test_not_embedded_yet(toy):
    with pytest.raises(ScbinInputError, match=r"scbin\.tl\.pretrain"):
        scbin.pl.embedding(toy)


def test_no_finite_row(embedded):
    embedded.obsm["X_scbin"][:] = np.nan
    with pytest.raises(ScbinInputError, match="P02"):
        scbin.pl.embedding(embedded)


@pytest.mark.parametrize(
    ("color", "code"), [([], "P13"), (3, "A01"), ([["cell_type"]], "A01"), (["cell_type", None], "A01")]
)
def test_what_is_no_colour_to_ask_for(embedded, color, code):
    with pytest.raises(ScbinInputError, match=f"{code}.*color"):
        scbin.pl.embedding(embedded, color=color)
    assert "X_umap_scbin" not in embedded.obsm


@pytest.mark.parametrize("kept", [["red", "green", "nocolor"], np.ones((3, 2)), "red!", 3])
def test_colours_that_are_none_give_way_to_scbins_own(embedded, kept, recwarn):
    embedded.uns["cell_type_colors"] = kept
    ax = scbin.pl.embedding(embedded, color="cell_type")
    drawn = [to_hex(handle.get_color()) for handle in ax.get_legend().legend_handles]
    assert drawn == list(_style.PALETTE[:3])
    assert [str(warning.message)[:5] for warning in recwarn] == (["[P14]"] if np.ndim(kept) else [])
