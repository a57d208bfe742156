"""The three lines of the README on a file of yours: what they take, and what comes out beside PCA of the same genes.

    python benchmarks/three_lines.py cells.h5ad cell_type [--picture map.png] [--max-steps 100]

All cells are trained on, so this shows an embedding as people make it; `quality.py` judges on cells held out of everything.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import numpy as np
import scanpy as sc
from sklearn.cluster import KMeans
from sklearn.metrics import f1_score, normalized_mutual_info_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

import scbin

mpl.use("Agg")


def main() -> None:
    """Run the three lines, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="h5ad with counts in X")
    parser.add_argument("labels", help="column of obs")
    parser.add_argument("--picture", type=Path, help="where to save the map")
    parser.add_argument("--max-steps", type=int, help="of pretraining (default: as the preset)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    adata, clock = ad.read_h5ad(arguments.file), [time.perf_counter()]
    scbin.pp.tokenize(adata)
    clock.append(time.perf_counter())
    model = scbin.tl.pretrain(adata, max_steps=arguments.max_steps, seed=arguments.seed, progress=False)
    clock.append(time.perf_counter())
    axes = scbin.pl.embedding(adata, color=arguments.labels)
    clock.append(time.perf_counter())
    if arguments.picture:
        axes.figure.savefig(arguments.picture, dpi=130, bbox_inches="tight")

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = zip(("tokenize", "pretrain", "plot"), np.diff(clock), strict=True)
    print(model)
    print(", ".join(f"{name} {value:.1f} s" for name, value in seconds) + f", {memory:.1f} GB at most")
    labels = adata.obs[arguments.labels].astype(str).to_numpy()
    known = ~np.isin(labels, ["nan", "", "unknown"]) & np.isfinite(adata.obsm["X_scbin"]).all(axis=1)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    same = adata[:, list(model.vocabulary.genes)]
    pca = sc.pp.pca(same.X, n_comps=min(30, min(same.shape) - 1), random_state=0)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    print(f"{known.sum():,} labelled cells             kNN (15), macro-F1   NMI of k-means")
    for name, vectors in {"PCA-30, same genes": pca[known], "scbin": adata.obsm["X_scbin"][known]}.items():
        found = cross_val_predict(KNeighborsClassifier(15), vectors, labels[known], cv=folds)
        clusters = KMeans(len(np.unique(labels[known])), n_init=10, random_state=0).fit_predict(vectors)
        f1 = f1_score(labels[known], found, average="macro")
        print(f"  {name:<30}{f1:18.3f}{normalized_mutual_info_score(labels[known], clusters):17.3f}")


if __name__ == "__main__":
    main()
