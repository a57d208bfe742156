from __future__ import annotations

import copy

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scbin
from scbin.nn.presets import Network
from scbin.train.settings import Training

SHAPE = Network(1, 32, 64, 2, hidden_dropout_prob=0.0)
QUICK = {
    "preset": SHAPE,
    "training": Training(cells_per_step=16),
    "max_steps": 2,
    "device": "cpu",
    "progress": False,
}


@pytest.fixture(scope="session")
def quick():
    """Arguments of a training that takes no time."""
    return QUICK


def toy_cells():
    """The cells of the fixture `toy`: 60 cells of three types with 40 genes, raw counts."""
    rng, kind = np.random.default_rng(0), np.arange(60) % 3
    rate = np.full((60, 40), 0.6)
    for k in range(3):
        rate[kind == k, 10 * k : 10 * k + 10] = 6.0
    obs = {
        "cell_type": np.array(["T cell", "B cell", "monocyte"])[kind],
        "sex": np.array(["male", "female"])[np.arange(60) % 2],
    }
    obs = pd.DataFrame(obs, index=[f"cell{i}" for i in range(60)], dtype="category")
    counts = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(40)]))


@pytest.fixture(scope="module")
def trained():
    """Such cells, one of them empty, and a model of three steps on them; not to be changed."""
    adata = toy_cells()
    adata.X.data[adata.X.indptr[7] : adata.X.indptr[8]] = 0
    with pytest.warns(scbin._errors.ScbinInputWarning, match="I19"):
        scbin.pp.tokenize(adata, phenotypes=["cell_type", "sex"])
    return adata, scbin.tl.pretrain(adata, **{**QUICK, "max_steps": 3})


@pytest.fixture(scope="module")
def bert():
    """Such cells, one without a group and one empty, and a BERT of two steps; not to be changed."""
    adata = toy_cells()
    adata.X.data[adata.X.indptr[7] : adata.X.indptr[8]] = 0
    with pytest.warns(scbin.ScbinInputWarning, match="I19"):
        scbin.pp.tokenize(adata, phenotypes=["cell_type", "sex"])
    adata.obs["part"] = np.where(np.arange(60) % 2, "a/b", "c")
    adata.obs.loc["cell3", "part"] = None
    return adata, scbin.tl.pretrain(adata, **QUICK, backbone="bert")


@pytest.fixture(scope="module")
def eager(bert):
    """Of each cell of `bert` its genes, which tokens they are, and what plain transformers return, or None."""
    adata, model = bert
    plain, first, result = copy.deepcopy(model.network.backbone.bert), model.vocabulary.first_gene_position, []
    plain.set_attn_implementation("eager")
    tokens = adata.obsm["X_tokens"].tocsr().copy()
    tokens.data[np.isin(tokens.indices, [p.position for p in model.vocabulary.phenotypes])] = model.vocabulary.mask_id
    for row in tokens:
        ids, positions = torch.tensor(row.data.astype(int))[None], torch.tensor(row.indices.astype(int))[None]
        is_gene = (row.indices >= first) & (row.indices < first + 40)
        with torch.inference_mode():
            asked = {"position_ids": positions, "output_attentions": True, "output_hidden_states": True}
            out = plain.bert(ids, **asked) if row.nnz else None
        result.append(out and (row.indices[is_gene] - first, is_gene, out))
    return result


@pytest.fixture(scope="module")
def counts():
    """Such cells of five donors, and a default model, trained a little; not to be changed."""
    adata = toy_cells()
    adata.obs["donor"] = np.arange(60) % 5
    scbin.pp.tokenize(adata, phenotypes=["cell_type"])
    return adata, scbin.tl.pretrain(adata, **QUICK | {"preset": "tiny", "training": None, "max_steps": 30})


@pytest.fixture
def cells(toy):
    """The toy cells with something in every slot, so that one can see whether it stays."""
    rng = np.random.default_rng(3)
    toy.layers["counts"] = toy.X.copy()
    toy.layers["dense"] = toy.X.toarray()
    toy.obs["n_counts"] = np.asarray(toy.X.sum(axis=1)).ravel()
    toy.var["gc"] = rng.random(toy.n_vars)
    toy.obsm["X_pca"] = rng.normal(size=(toy.n_obs, 3))
    toy.varm["PCs"] = rng.normal(size=(toy.n_vars, 3))
    toy.obsp["distances"] = sparse.random(toy.n_obs, toy.n_obs, 0.1, format="csr", random_state=0)
    toy.uns["palette"] = {"a": np.arange(3), "b": "text"}
    toy.raw = toy.copy()
    return toy


def same(left, right):
    """Whether two values of AnnData slots are equal in type and content, to the last bit."""
    if sparse.issparse(left):
        return (
            type(left) is type(right)
            and left.dtype == right.dtype
            and all(np.array_equal(getattr(left, a), getattr(right, a)) for a in ("data", "indices", "indptr"))
        )
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    if isinstance(left, pd.DataFrame):
        pd.testing.assert_frame_equal(left, right)
        return True
    if isinstance(left, dict):
        return set(left) == set(right) and all(same(left[key], right[key]) for key in left)
    return left == right


class Untouched:
    """Compare an AnnData with itself as it was: only the slots named may be new or other."""

    def __init__(self, adata: ad.AnnData):
        self.adata, self.before = adata, adata.to_memory() if adata.isbacked else adata.copy()

    def check(self, *, obs=(), obsm=(), uns=()):
        a, b = self.adata, self.before
        assert same(b.X, a.X) and (b.raw is None or same(b.raw.X, a.raw.X))
        assert set(a.obs) == set(b.obs) | set(obs)
        pd.testing.assert_frame_equal(a.obs.drop(columns=list(obs)), b.obs.drop(columns=list(obs), errors="ignore"))
        pd.testing.assert_frame_equal(a.var, b.var)
        for slot in ("layers", "obsm", "varm", "obsp", "varp"):
            now, then = dict(getattr(a, slot)), dict(getattr(b, slot))
            new = set(obsm) if slot == "obsm" else set()
            assert set(now) == set(then) | new, slot
            assert all(same(then[key], now[key]) for key in set(then) - new), slot
        now, then = dict(a.uns), dict(b.uns)
        scbin_now, scbin_then = now.pop("scbin", {}), then.pop("scbin", {})
        assert same(then, now)
        assert set(scbin_now) == set(scbin_then) | set(uns)
        assert all(same(scbin_then[key], scbin_now[key]) for key in set(scbin_then) - set(uns))


@pytest.fixture
def untouched():
    return Untouched
