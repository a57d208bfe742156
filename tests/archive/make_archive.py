"""Write what today's format looks like: `python tests/archive/make_archive.py`. Run once per format, then kept for ever.

Beside it lies `format_1`, which the first edition wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import scbin
from scbin.io.directory import FORMAT
from scbin.nn.backbone import seeded
from scbin.nn.labels import LabelHead
from scbin.nn.network import build_network
from scbin.nn.presets import Network
from scbin.nn.run import embed
from scbin.tokens.tokens import MemoryTokens

SHAPE = Network(2, 16, 32, 2)


def main(folder: Path) -> None:
    """Write 16 cells of two types with 24 genes, their tokens and vectors, and a model of each backbone."""
    rng = np.random.default_rng(0)
    kind = np.arange(16) % 2
    counts = rng.poisson(1 + 4.0 * (np.arange(24)[None] % 2 == kind[:, None])).astype(np.float32)
    obs = pd.DataFrame({"cell_type": np.array(["B cell", "CD4+/CD25 T"])[kind], "sex": ["female", "male"] * 8})
    obs = obs.set_axis([f"cell{k}" for k in range(16)]).astype("category")
    adata = ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"GENE{k}" for k in range(24)]))
    scbin.pp.tokenize(adata, phenotypes=["cell_type", "sex"])
    vocabulary = scbin.Vocabulary.from_json(adata.uns["scbin"]["vocabulary"])
    tokens = MemoryTokens(adata.obsm["X_tokens"], vocabulary)
    for backbone in ("bert", "mlp"):
        network = build_network(vocabulary, SHAPE, backbone, seed=3, vector_options={"size": 4, "width": 8})
        with seeded(4):
            network.labels = LabelHead(vocabulary, 4, [{"name": "cell_type", "classes": ["B cell", "CD4+/CD25 T"]}])
        history = pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.5]})
        scbin.Model(network, vocabulary, {"steps": 2}, history).save(folder / f"model_{backbone}")
        adata.obsm[f"X_{backbone}"] = embed(network, tokens, device="cpu", precision="float32")
    sparse.save_npz(folder / "tokens.npz", adata.obsm["X_tokens"])
    adata.write_h5ad(folder / "cells.h5ad")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / f"format_{FORMAT}")
