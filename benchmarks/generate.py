"""How real generated cells are: recognised by a classifier of real cells, of use to train one, and their means and variances.

    python benchmarks/generate.py ../shared/data/pbmc3k_labelled.h5ad --phenotype cell_type

The calls are those of a user, with default arguments. Cells labelled `unknown` are left out of the scores. The structure is
the correlation between real and generated cells of the gene-gene correlations within a type (150 most variable genes).
"""

from __future__ import annotations

import argparse
import time
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

import scbin


def classifier() -> LogisticRegression:
    """Return the classifier that judges."""
    return LogisticRegression(max_iter=500, C=0.1)


def structure(real: np.ndarray, made: np.ndarray) -> float:
    """Return how well correlations between genes agree."""
    top = np.argsort(-real.var(axis=0))[:150]
    top = top[(real[:, top].std(axis=0) > 0) & (made[:, top].std(axis=0) > 0)]
    pairs = np.triu_indices(len(top), 1)
    return float(np.corrcoef(np.corrcoef(real[:, top].T)[pairs], np.corrcoef(made[:, top].T)[pairs])[0, 1])


def main() -> None:
    """Pretrain, generate and score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--phenotype", default="cell_type")
    parser.add_argument("--n-cells", type=int, default=200)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = ad.read_h5ad(arguments.file)
    started = time.perf_counter()
    scbin.pp.tokenize(adata, phenotypes=[arguments.phenotype])
    model = scbin.tl.pretrain(adata, seed=arguments.seed, progress=False)
    trained = time.perf_counter()
    values = model.vocabulary.phenotype(arguments.phenotype).values
    options = {"n_cells": arguments.n_cells, "steps": arguments.steps, "seed": arguments.seed, "progress": False}
    made = {value: scbin.tl.generate(model, {arguments.phenotype: value}, **options) for value in values}
    done = time.perf_counter()

    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    real = adata[:, list(model.vocabulary.genes)]
    labels = adata.obs[arguments.phenotype].astype(str).to_numpy()
    known = np.isin(labels, values)
    x, y = real.X[known].toarray(), labels[known]
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    real_score = f1_score(y, cross_val_predict(classifier(), x, y, cv=folds), average="macro")
    judge = classifier().fit(x, y)
    rows = []
    for value, cells in made.items():
        own, new = x[y == value], cells.X.toarray()
        rows.append(
            {
                arguments.phenotype: value,
                "real cells": len(own),
                "recognised": (judge.predict(new) == value).mean(),
                "r of means": np.corrcoef(own.mean(axis=0), new.mean(axis=0))[0, 1],
                "r of variances": np.corrcoef(own.var(axis=0), new.var(axis=0))[0, 1],
                "genes per cell": f"{(own > 0).sum(axis=1).mean():.0f} / {(new > 0).sum(axis=1).mean():.0f}",
                "structure": structure(own, new),
            }
        )
    print(pd.DataFrame(rows).round(3).to_string(index=False))
    new_x = np.concatenate([cells.X.toarray() for cells in made.values()])
    new_y = np.repeat(list(made), [cells.n_obs for cells in made.values()])
    made_score = f1_score(y, classifier().fit(new_x, new_y).predict(x), average="macro")
    print(
        f"logistic regression, macro-F1 on real cells: trained on real {real_score:.3f}, on generated {made_score:.3f}"
    )
    print(f"seconds: pretraining {trained - started:.0f}, {len(new_y):,} cells {done - trained:.0f}")


if __name__ == "__main__":
    main()
