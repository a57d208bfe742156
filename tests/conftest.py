"""Toy data for all tests, and the way to the shared real data."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

import scbin

mpl.use("Agg")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[1] / "../shared"
    if not (folder / "data").is_dir():
        pytest.skip("the shared folder of real data is not beside this checkout")
    return folder.resolve()


def toy_cells() -> ad.AnnData:
    """60 cells of three types with 40 genes: raw counts, each type with ten genes of its own."""
    rng = np.random.default_rng(0)
    kind = np.arange(60) % 3
    rate = np.full((60, 40), 0.6)
    for k in range(3):
        rate[kind == k, 10 * k : 10 * k + 10] = 6.0
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.array(["T cell", "B cell", "monocyte"])[kind]),
            "sex": pd.Categorical(np.where(np.arange(60) % 2, "female", "male")),
        },
        index=[f"cell{i}" for i in range(60)],
    )
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(40)])
    return ad.AnnData(csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=var)


@pytest.fixture
def toy() -> ad.AnnData:
    """60 cells of three types with 40 genes: raw counts, each type with ten genes of its own."""
    return toy_cells()


@pytest.fixture(scope="module")
def trained() -> tuple[ad.AnnData, scbin.Model]:
    """The toy cells, one of them empty, and a model of three steps on them; not to be changed."""
    adata = toy_cells()
    adata.X.data[adata.X.indptr[7] : adata.X.indptr[8]] = 0
    with pytest.warns(scbin._errors.ScbinInputWarning, match="I19"):
        scbin.pp.tokenize(adata, phenotypes=["cell_type", "sex"])
    model = scbin.tl.pretrain(
        adata, preset="tiny", hidden_size=32, max_steps=3, cells_per_step=16, device="cpu", progress=False
    )
    return adata, model


@pytest.fixture
def embedded(toy: ad.AnnData) -> ad.AnnData:
    """The toy cells with an embedding in which the types lie apart."""
    rng = np.random.default_rng(1)
    centres = 4 * rng.normal(size=(3, 8))
    codes = toy.obs["cell_type"].cat.codes.to_numpy()
    toy.obsm["X_scbin"] = (centres[codes] + rng.normal(size=(60, 8))).astype(np.float32)
    return toy
