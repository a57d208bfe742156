"""The three lines on an h5ad as it is: what they take, and what comes out beside PCA.

python benchmarks/three_lines.py cells.h5ad cell_type --picture map.png
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import numpy as np

mpl.use("Agg")


def main() -> None:
    arguments = _arguments()
    import torch

    import scbin
    from scbin.tl._baselines import knn_macro_f1, logistic_macro_f1, pca

    adata = ad.read_h5ad(arguments.file)
    seconds = {}

    def timed(name, call, *args, **kwargs):
        start = time.perf_counter()
        result = call(*args, **kwargs)
        seconds[name] = time.perf_counter() - start
        return result

    timed("tokenize", scbin.pp.tokenize, adata)
    model = timed("pretrain", scbin.tl.pretrain, adata, seed=arguments.seed, progress=False)
    axes = timed("plot", scbin.pl.embedding, adata, color=arguments.labels)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if arguments.picture:
        axes.figure.savefig(arguments.picture, dpi=130)

    labels = adata.obs[arguments.labels].astype(str).to_numpy()
    known = ~np.isin(labels, ["nan", "", "unknown"]) & np.isfinite(adata.obsm["X_scbin"]).all(axis=1)
    log1p = adata[known].copy()
    if _is_whole(log1p):
        import scanpy as sc

        sc.pp.normalize_total(log1p, target_sum=1e4)
        sc.pp.log1p(log1p)
    embeddings = {"PCA, 50 components": pca(log1p.X), "scbin": adata.obsm["X_scbin"][known]}

    print(model)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    print(", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()) + f", {memory:.1f} GB at most")
    print(f"{known.sum():,} labelled cells, 5-fold macro-F1    kNN (15)   logistic regression")
    for name, embedding in embeddings.items():
        scores = (knn_macro_f1(embedding, labels[known]), logistic_macro_f1(embedding, labels[known]))
        print(f"  {name:<32} {scores[0]:18.3f} {scores[1]:20.3f}")


def _is_whole(adata: ad.AnnData) -> bool:
    """Whether X holds whole numbers."""
    values = adata.X.data if hasattr(adata.X, "data") and not isinstance(adata.X, np.ndarray) else np.asarray(adata.X)
    return bool((values == np.rint(values)).all())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("labels", help="column of obs")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
