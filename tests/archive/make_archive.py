"""Write what this version of the format looks like: `python tests/archive/make_archive.py`. Run once per format, then kept for ever."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import scbin
from scbin.model import Model
from scbin.nn.bert import build_bert
from scbin.nn.heads import HeadPlan, Target, build_head

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
QUIET = {"device": "cpu", "progress": False}


def cells() -> ad.AnnData:
    """16 cells of two types with 24 genes."""
    rng = np.random.default_rng(0)
    kind = np.arange(16) % 2
    counts = rng.poisson(1 + 4.0 * (np.arange(24)[None] % 2 == kind[:, None])).astype(np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.array(["B cell", "CD4+/CD25 T"])[kind]),
            "sex": ["female", "male", "unknown", "male"] * 4,
        },
        index=[f"cell{k}" for k in range(16)],
    )
    obs["sex"] = obs["sex"].astype("category")
    return ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"GENE{k}" for k in range(24)]))


def main(folder: Path) -> None:
    """Write cells with tokens, embeddings and predictions, their tokens alone, and three models."""
    adata = cells()
    scbin.pp.tokenize(adata, phenotypes=["cell_type", "sex"], n_bins=5)
    bins = scbin.tl.pretrain(adata, preset="tiny", **SHAPE, max_steps=2, cells_per_step=8, **QUIET)
    bins.save(folder / "model_bins")
    scbin.tl.embed(adata, bins, **QUIET)
    adata.obsm["X_scbin_layer"] = scbin.tl.embed(adata, bins, pooling="cls", layer=-2, **QUIET, copy=True).obsm[
        "X_scbin"
    ]
    plan = HeadPlan(
        "linear",
        (Target("cell_type", classes=("B cell", "CD4+/CD25 T")), Target("age", "number", mean=40.0, scale=9.0)),
    )
    head = build_head(plan, SHAPE["hidden_size"], 24, seed=3)
    Model(bins.bert, bins.vocabulary, bins.readout, {"steps": 2}, head=head).save(folder / "model_head")
    sparse.save_npz(folder / "tokens.npz", adata.obsm["X_tokens"])
    ranks = scbin.Vocabulary.build(
        "rank", list(adata.var_names), medians=list(1 + 0.1 * np.arange(24)), layout="geneformer_v2", max_length=32
    )
    other = Model(build_bert(ranks, "tiny", **SHAPE, seed=4), ranks, scbin.model.Readout("cls", -2))
    other.save(folder / "model_rank")
    ranked = adata.copy()
    scbin.pp.tokenize(ranked, like=other)
    scbin.tl.embed(ranked, other, **QUIET, key_added="X_rank")
    adata.obsm["X_rank"] = ranked.obsm["X_rank"]
    sparse.save_npz(folder / "tokens_rank.npz", ranked.obsm["X_tokens"])
    predicted = scbin.tl.predict(adata, Model.load(folder / "model_head"), target="cell_type", **QUIET, copy=True)
    adata.obsm["cell_type_probability"] = np.asarray(predicted.obsm["scbin_cell_type_probability"])
    adata.write_h5ad(folder / "cells.h5ad")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "format_1")
