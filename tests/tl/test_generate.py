"""`tl.generate` as users call it."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import scbin
from scbin._errors import ScbinInputError, ScbinInputWarning

QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def made(trained):
    return scbin.tl.generate(trained[1], {"cell_type": "B cell"}, 30, seed=3, **QUIET)


def test_what_is_written(trained, made):
    _, model = trained
    assert made.shape == (30, len(model.vocabulary.genes)) and list(made.var_names) == list(model.vocabulary.genes)
    assert made.obs["scbin_generated"].all() and list(made.obs_names[:2]) == ["generated_0", "generated_1"]
    assert (made.obs["cell_type"] == "B cell").all() and set(made.obs["sex"]) == {"female", "male"}
    record = json.loads(made.uns["scbin_generated"])
    assert record["model"] == model.fingerprint and record["phenotypes"] == {"cell_type": "B cell"}
    assert sparse.issparse(made.X) and made.X.dtype == np.float32 and made.X.data.min() > 0
    assert np.isfinite(made.obsm["X_scbin"]).all()


def test_the_genes_of_a_type_are_its_own(trained, made):
    adata, _ = trained
    real = np.log1p(adata[adata.obs["cell_type"] == "B cell"].X.toarray()).mean(axis=0)
    assert np.corrcoef(real, made.X.toarray().mean(axis=0))[0, 1] > 0.8


def test_cells_are_a_function_of_seed_and_number(trained, made):
    _, model = trained
    few = scbin.tl.generate(model, {"cell_type": "B cell"}, 4, seed=3, token_budget=60, **QUIET)
    assert (few.X != made.X[:4]).nnz == 0 and few.obs["sex"].tolist() == made.obs["sex"].tolist()[:4]
    assert (scbin.tl.generate(model, {"cell_type": "B cell"}, 4, seed=4, **QUIET).X != few.X).nnz


def test_made_cells_go_to_disk_and_through_the_verbs(trained, made, tmp_path):
    _, model = trained
    made.write_h5ad(tmp_path / "made.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr and anndata remark on formats to come
        made.write_zarr(tmp_path / "made.zarr")
    again = ad.read_h5ad(tmp_path / "made.h5ad")
    before = again.obsm["X_scbin"].copy()
    scbin.tl.embed(again, model, **QUIET)
    assert again.obsm["X_scbin"] == pytest.approx(before, abs=1e-5)


def test_a_saved_model_makes_the_same_cells(trained, made, tmp_path):
    trained[1].save(tmp_path / "model")
    again = scbin.tl.generate(tmp_path / "model", {"cell_type": "B cell"}, 30, seed=3, **QUIET)
    assert (again.X != made.X).nnz == 0


def test_rare_classes_are_filled_up(trained):
    adata, model = trained
    few = adata[np.flatnonzero((adata.obs["cell_type"] != "B cell") | (np.arange(60) < 12))].copy()
    few.obs_names = [*few.obs_names[:-1], "generated_0"]
    counts = few.obs["cell_type"].value_counts()
    new = scbin.tl.generate(model, like=few, balance="cell_type", **QUIET)
    assert new.n_obs == 3 * counts.max() - counts.sum() and set(new.obs["cell_type"]) == {"B cell"} | {
        name for name in counts.index if counts[name] < counts.max()
    }
    both = ad.concat([few, new])
    assert both.obs_names.is_unique and both.n_vars == few.n_vars
    assert (both.obs["cell_type"].value_counts() == counts.max()).all()
    more = scbin.tl.generate(model, {"sex": "male"}, 25, like=few, balance="cell_type", **QUIET)
    assert more.n_obs == 75 - few.n_obs and (more.obs["sex"] == "male").all()


def test_sizes_and_temperature(trained):
    _, model = trained
    large = scbin.tl.generate(model, {"cell_type": "B cell"}, 40, n_genes=30, **QUIET)
    small = scbin.tl.generate(model, {"cell_type": "B cell"}, 40, n_genes=10, **QUIET)
    assert np.diff(large.X.indptr).mean() == pytest.approx(30, abs=3)
    assert np.diff(small.X.indptr).mean() == pytest.approx(10, abs=2)
    cold = scbin.tl.generate(model, {"cell_type": "B cell"}, 40, n_genes=10, temperature=0.2, **QUIET)
    assert (cold.X > 0).toarray().var(axis=0).mean() < (small.X > 0).toarray().var(axis=0).mean()


@pytest.mark.parametrize(
    ("phenotypes", "arguments", "code", "text"),
    [
        ({"celltype": "B cell"}, {"n_cells": 2}, "S07", "'cell_type'"),
        ({"cell_type": "b cells"}, {"n_cells": 2}, "S08", "'B cell'"),
        ("B cell", {"n_cells": 2}, "S07", "cell_type"),
        ({}, {"n_cells": 0}, "S05", "at least 1"),
        ({}, {}, "S05", "n_cells=100"),
        ({}, {"n_cells": 2, "steps": 0}, "S05", "steps"),
        ({}, {"n_cells": 2, "temperature": 0}, "S05", "temperature"),
        ({}, {"n_cells": 2, "seed": -1}, "S05", "seed"),
        ({}, {"n_cells": 2, "n_genes": 41}, "S05", "40 genes"),
        ({}, {"n_cells": 2, "balance": "cell_type"}, "S06", "together"),
        ({}, {"n_cells": 2.5}, "A01", "n_cells"),
    ],
)
def test_what_cannot_be_meant_is_refused(trained, phenotypes, arguments, code, text):
    with pytest.raises(ScbinInputError, match=text) as caught:
        scbin.tl.generate(trained[1], phenotypes, **arguments, **QUIET)
    assert caught.value.code == code


def test_balance_refuses_and_warns(trained):
    adata, model = trained
    for arguments, code in (
        ({"balance": "tissue"}, "S07"),
        ({"balance": "cell_type", "n_cells": 5}, "S06"),
        ({"balance": "cell_type", "phenotypes": {"cell_type": "B cell"}}, "S06"),
    ):
        with pytest.raises(ScbinInputError) as caught:
            scbin.tl.generate(model, like=adata, **arguments, **QUIET)
        assert caught.value.code == code
    other = adata.copy()
    other.obs["cell_type"] = other.obs["cell_type"].astype(str).replace({"monocyte": "platelet"})
    with pytest.warns(ScbinInputWarning, match="S09"):
        scbin.tl.generate(model, like=other, balance="cell_type", n_cells=25, **QUIET)


def test_models_that_cannot_make_cells_say_so(toy, quick):
    scbin.pp.tokenize(toy)
    model = scbin.tl.pretrain(toy, **quick)
    with pytest.raises(ScbinInputError, match="S03"):
        scbin.tl.generate(model, {}, 2)
    scbin.pp.tokenize(toy, encoding="rank", phenotypes=["cell_type"])
    model = scbin.tl.pretrain(toy, **quick)
    assert model.decoder is None
    with pytest.raises(ScbinInputError, match="S02"):
        scbin.tl.generate(model, {"cell_type": "B cell"}, 2)
    scbin.pp.tokenize(toy, phenotypes=["cell_type"])
    model = scbin.tl.pretrain(toy, **quick)
    model.decoder = None
    with pytest.raises(ScbinInputError, match="S04"):
        scbin.tl.generate(model, {"cell_type": "B cell"}, 2)


def test_numbers_of_numpy_are_numbers(trained, made):
    again = scbin.tl.generate(
        trained[1], {"cell_type": "B cell"}, np.int64(30), seed=np.int64(3), temperature=np.float32(1), **QUIET
    )
    assert (again.X != made.X).nnz == 0


def test_labels_are_read_as_tokenizing_reads_them(toy, quick):
    toy.obs["cluster"] = np.where(np.arange(60) < 45, 1.0, 2.0)
    toy.obs["age"] = np.where(np.arange(60) < 40, "34-year-old human stage", "71-year-old human stage")
    toy.obs.loc[toy.obs_names[0], "cluster"] = np.nan
    scbin.pp.tokenize(toy, phenotypes=["cluster", "age"], age_groups=20)
    model = scbin.tl.pretrain(toy, **quick)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        more = scbin.tl.generate(model, like=toy, balance="cluster", **QUIET)
        older = scbin.tl.generate(model, {"cluster": 1.0}, like=toy, balance="age", **QUIET)
    assert more.n_obs == 44 - 15 and set(more.obs["cluster"]) == {"2"}
    assert older.n_obs == 20 and set(older.obs["age"]) == {"60-80"} and set(older.obs["cluster"]) == {"1"}


def test_the_mark_stays_where_real_cells_have_it_too(trained, made):
    real = trained[0].copy()
    real.obs["scbin_generated"] = False
    assert ad.concat([real, made]).obs["scbin_generated"].sum() == 30
