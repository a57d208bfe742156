"""Batches: do cells of one type come together across batches, and stay apart by type? Scored by scib-metrics on held-out cells.

    python benchmarks/batches.py [../shared/data] [--seeds 3] [--methods ...] [--out batches]

Fitted on 70 % of the cells of each collection with `batch_key`, asked on the other 30 %: PCA, Harmony (of fitted and held-out cells together,
which it cannot do otherwise), scVI and scbin. Needs scib-metrics, harmonypy and scvi-tools. Every result is a row of `<out>.csv`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from quality import divided, logs, pca, scvi_vectors
from scipy.sparse import csr_matrix

import scbin

TYPES = {  # labels of the blood sets in common words
    "Naive CD4 T": "CD4 T", "Memory CD4 T": "CD4 T", "CD4 T cells": "CD4 T", "CD4 T cell": "CD4 T",
    "CD8 T": "CD8 T", "CD8 T cells": "CD8 T", "CD8 T cell": "CD8 T",
    "B": "B", "B cells": "B", "B cell": "B", "NK": "NK", "NK cell": "NK",
    "CD14+ Mono": "CD14 monocyte", "CD14+ monocyte": "CD14 monocyte",
    "FCGR3A+ Mono": "FCGR3A monocyte", "FCGR3A+ monocyte": "FCGR3A monocyte",
    "DC": "dendritic", "Dendritic cell": "dendritic", "Platelet": "platelet", "Megakaryocyte": "platelet",
}  # fmt: skip


def lung(folder: Path) -> ad.AnnData:
    """Three cell lines by two protocols."""
    adata = ad.read_h5ad(folder / "lung3cl_celseq2_dropseq.h5ad")
    adata = adata[adata.obs["demuxlet_cls"] == "SNG"].copy()
    adata.obs = pd.DataFrame({"label": adata.obs["cell_type"].astype(str), "batch": adata.obs["batch"].astype(str)})
    return adata


def blood(folder: Path) -> ad.AnnData:
    """Blood cells of three studies; of the stimulated study the cells that were not."""
    parts = {}
    for name in ("pbmc3k_labelled", "pbmc_facs_garnett800", "kang_ifnb_2k"):
        part = ad.read_h5ad(folder / f"{name}.h5ad")
        part.var_names_make_unique()
        keep = part.obs["cell_type"].isin(TYPES).to_numpy()
        if "condition" in part.obs:
            keep &= part.obs["condition"].astype(str).str.lower().str.startswith(("c", "u")).to_numpy()
        part = part[keep].copy()
        part.obs = pd.DataFrame({"label": part.obs["cell_type"].astype(str).map(TYPES)})
        parts[name] = part
    adata = ad.concat(parts, join="inner", label="batch", index_unique="-")
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    return adata


def scaled(folder: Path) -> ad.AnnData:
    """Blood cells of one study; in two of five every gene is measured at a rate of its own, as in another species.

    A stand-in where no cells of two species are at hand: the rates are log-normal with a deviation of 1. One type lacks in the second
    batch, and the commonest is half as frequent.
    """
    rng = np.random.default_rng(0)
    adata = ad.read_h5ad(folder / "kang_control_8684.h5ad")
    adata = adata[rng.choice(adata.n_obs, 3000, replace=False)].copy()
    label, second = adata.obs["cell_type"].astype(str).to_numpy(), rng.random(3000) < 0.4
    common = pd.Series(label).value_counts().index
    counts, rates = adata.X.toarray(), np.exp(rng.normal(size=adata.n_vars))
    counts[second] = rng.poisson(counts[second] * rates * counts.sum() / (counts @ rates).sum())
    adata.X = csr_matrix(counts)
    adata.obs = pd.DataFrame({"label": label, "batch": np.where(second, "two", "one")}, adata.obs_names)
    rare = (label == common[2]) | ((label == common[0]) & (rng.random(3000) < 0.5))
    return adata[~(second & rare)].copy()


COLLECTIONS = {"lung lines, two protocols": lung, "blood, three studies": blood, "blood, scaled genes": scaled}
METHODS = ("PCA-50", "Harmony", "scVI", "scbin without batch_key", "scbin")


def vectors(method: str, fitted: ad.AnnData, judged: ad.AnnData, seed: int) -> np.ndarray:
    """Return vectors of the held-out cells."""
    genes = fitted.var["highly_variable"].to_numpy()
    if method == "PCA-50":
        return pca(fitted, judged, 50, genes)[1]
    if method == "Harmony":
        import harmonypy

        here, there = pca(fitted, judged, 50, genes)
        batch = pd.concat([fitted.obs[["batch"]], judged.obs[["batch"]]])
        moved = harmonypy.run_harmony(np.vstack([here, there]), batch, "batch", random_state=seed, verbose=False)
        found = np.asarray(moved.Z_corr)
        return (found if found.shape[0] == len(batch) else found.T)[len(here) :]
    if method == "scVI":
        return scvi_vectors(fitted, judged, genes, seed, "batch")[1]
    fitted, judged = fitted.copy(), judged.copy()
    scbin.pp.tokenize(fitted, mask_var="highly_variable")
    key = "batch" if method == "scbin" else None
    model = scbin.tl.pretrain(fitted, batch_key=key, seed=seed, progress=False)
    scbin.pp.tokenize(judged, like=model)
    scbin.tl.embed(judged, model, progress=False)
    return judged.obsm["X_scbin"]


def scores(judged: ad.AnnData, vector: np.ndarray) -> dict[str, float]:
    """Return scib-metrics' batch correction, bio conservation and total."""
    from scib_metrics.benchmark import Benchmarker

    adata = ad.AnnData(
        judged.X.copy(),
        obs=judged.obs.copy(),
        obsm={"X": vector, "Unintegrated": logs(judged, np.arange(judged.n_vars))[:, :1]},
    )
    adata.obs["batch"], adata.obs["label"] = (adata.obs[n].astype("category") for n in ("batch", "label"))
    from sklearn.decomposition import PCA

    adata.obsm["X_pca"] = PCA(50, random_state=0).fit_transform(logs(judged, np.arange(judged.n_vars)))
    found = Benchmarker(
        adata, "batch", "label", ["X"], pre_integrated_embedding_obsm_key="X_pca", n_jobs=1, progress_bar=False
    )
    found.benchmark()
    row = found.get_results(min_max_scale=False).loc["X"]
    return {
        "batch": float(row["Batch correction"]),
        "bio": float(row["Bio conservation"]),
        "total": float(row["Total"]),
    }


def main() -> None:
    """Run what is missing and print the means."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=beside)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--collections", nargs="+", choices=list(COLLECTIONS), default=list(COLLECTIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("batches"))
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        for name in arguments.collections:
            adata = COLLECTIONS[name](arguments.folder)
            adata.X = csr_matrix(adata.X).astype(np.float32)
            fitted, judged = divided(adata, seed)
            common = judged.obs["label"].value_counts()
            judged = judged[judged.obs["label"].isin(common.index[common >= 5])].copy()
            for method in arguments.methods:
                begun = time.process_time()
                try:
                    vector = vectors(method, fitted, judged, seed)
                except ImportError as error:
                    print(method, error)
                    continue
                seconds = time.process_time() - begun
                rows.append({"set": name, "seed": seed, "method": method, **scores(judged, vector), "seconds": seconds})
                print(rows[-1], flush=True)
                pd.DataFrame(rows).to_csv(arguments.out.with_suffix(".csv"), index=False)
    print(
        pd.DataFrame(rows)
        .groupby(["set", "method"], sort=False)[["batch", "bio", "total", "seconds"]]
        .agg(["mean", "std"])
        .round(3)
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
