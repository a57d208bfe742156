"""The UMAP is a function of the embedding, kept as long as it belongs to it, and touches nothing else."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

from scbin._errors import ScbinInputWarning
from scbin.pl import _umap
from scbin.pl._umap import compute_umap, umap_of


@pytest.fixture
def calls(monkeypatch):
    """Replace the slow part by a deterministic stand-in and record how often it runs."""
    made = []

    def layout(embedding, **_):
        made.append(len(embedding))
        return np.where(np.isfinite(embedding).all(axis=1)[:, None], embedding[:, :2] * 2, np.nan).astype(np.float32)

    monkeypatch.setattr(_umap, "compute_umap", layout)
    return made


def test_computed_once(embedded, calls):
    first = umap_of(embedded, "X_scbin")
    assert np.array_equal(umap_of(embedded, "X_scbin"), first)
    assert len(calls) == 1


def test_new_embedding_is_laid_out_again(embedded, calls):
    umap_of(embedded, "X_scbin")
    embedded.obsm["X_scbin"] = embedded.obsm["X_scbin"] + 1
    umap_of(embedded, "X_scbin")
    assert len(calls) == 2


def test_one_changed_cell_is_noticed(embedded, calls):
    umap_of(embedded, "X_scbin")
    embedded.obsm["X_scbin"][7, 3] += 1e-3
    umap_of(embedded, "X_scbin")
    assert len(calls) == 2


def test_rows_out_of_step_are_noticed(embedded, calls):
    umap_of(embedded, "X_scbin")
    embedded.obsm["X_scbin"] = embedded.obsm["X_scbin"][::-1].copy()
    umap_of(embedded, "X_scbin")
    assert len(calls) == 2


def test_subset_and_new_order_keep_their_coordinates(embedded, calls):
    embedded.obsm["X_scbin"][4] = np.nan
    all_cells = umap_of(embedded, "X_scbin")
    order = np.random.default_rng(0).permutation(60)[:25]
    some = embedded[order].copy()
    np.testing.assert_array_equal(umap_of(some, "X_scbin"), all_cells[order])
    assert len(calls) == 1


def test_survives_a_file(embedded, calls, tmp_path):
    umap_of(embedded, "X_scbin")
    embedded.write_h5ad(tmp_path / "a.h5ad")
    umap_of(ad.read_h5ad(tmp_path / "a.h5ad"), "X_scbin")
    assert len(calls) == 1


def test_fingerprints_do_not_depend_on_the_block_size(embedded, monkeypatch):
    embedding = embedded.obsm["X_scbin"]
    whole = _umap._fingerprints(embedding[:, :2], embedding)
    monkeypatch.setattr(_umap, "ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(_umap._fingerprints(embedding[:, :2], embedding), whole)
    assert len(np.unique(whole)) == 60


def test_concatenated_cells_are_laid_out_again(embedded, calls):
    umap_of(embedded, "X_scbin")
    both = ad.concat([embedded[:30], embedded[30:]])
    umap_of(both, "X_scbin")
    assert len(calls) == 2


def test_coordinates_of_others_are_not_replaced(embedded, calls):
    embedded.obsm["X_pca"] = embedded.obsm["X_scbin"]
    embedded.obsm["X_umap_pca"] = np.ones((60, 2))
    with pytest.warns(ScbinInputWarning, match=r"I54.*X_umap_pca"):
        drawn = umap_of(embedded, "X_pca")
    assert (embedded.obsm["X_umap_pca"] == 1).all()
    assert np.array_equal(drawn, 2 * embedded.obsm["X_pca"][:, :2])


def test_another_basis_of_concatenated_cells_is_laid_out_again(embedded, calls):
    embedded.obsm["X_pca"] = embedded.obsm["X_scbin"] - 1
    umap_of(embedded, "X_pca")
    both = ad.concat([embedded[:30], embedded[30:]])
    with pytest.warns(ScbinInputWarning, match=r"I54.*concat"):
        assert np.isfinite(umap_of(both, "X_pca")).all()
    del both.obsm["X_umap_pca"]
    umap_of(both, "X_pca")
    umap_of(both, "X_pca")
    assert len(calls) == 3


def test_two_bases_side_by_side(embedded, calls):
    embedded.obsm["X_pca"] = embedded.obsm["X_scbin"] - 1
    for basis in ("X_scbin", "X_pca", "X_scbin", "X_pca"):
        umap_of(embedded, basis)
    assert len(calls) == 2
    assert {"X_umap_scbin", "X_umap_pca"} <= set(embedded.obsm)


def test_real_umap_is_deterministic_and_separates_types(embedded):
    embedding = embedded.obsm["X_scbin"].copy()
    embedding[3] = np.nan
    embedded.uns["neighbors"] = {"mine": 1}
    embedded.obsp["connectivities"] = np.eye(60)
    first, second = compute_umap(embedding), compute_umap(embedding)
    np.testing.assert_array_equal(first, second)
    assert np.isnan(first[3]).all()
    assert np.isfinite(np.delete(first, 3, axis=0)).all()
    codes = embedded.obs["cell_type"].cat.codes.to_numpy()
    distance = np.linalg.norm(first[:, None] - first[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    nearest = np.nanargmin(np.where(np.isnan(distance), np.inf, distance), axis=1)
    assert (codes[nearest] == codes)[np.arange(60) != 3].mean() > 0.9
    assert embedded.uns["neighbors"] == {"mine": 1}


@pytest.mark.parametrize("n_cells", [1, 2, 9, 10, 16])
def test_few_cells(n_cells):
    embedding = np.random.default_rng(n_cells).normal(size=(n_cells, 4)).astype(np.float32)
    coordinates = compute_umap(embedding)
    assert coordinates.shape == (n_cells, 2)
    assert np.isfinite(coordinates).all()


def test_equal_cells():
    assert np.isfinite(compute_umap(np.ones((30, 4), dtype=np.float32))).all()


@pytest.mark.slow
def test_umap_of_many_cells_takes_the_approximate_neighbours():
    """From 4,096 cells on scanpy takes another way, which not every version of its neighbour search can go."""
    embedding = np.random.default_rng(0).normal(size=(4_200, 8)).astype(np.float32)
    assert np.isfinite(compute_umap(embedding)).all()
