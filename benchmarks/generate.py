"""How real generated cells are, on cells that neither the model nor the classifiers have seen.

    python benchmarks/generate.py cells.h5ad cell_type [--seeds 3] [--genes 100] [--times 3] [--max-steps 300]

The model learns from 70 % of the cells; its generated cells are compared with the other 30 %, class by class, with as many cells as
the class has there. Beside it: `real`, another draw of real cells (training cells of the class), which is as close as cells can be, and
`independent`, the training cells with each gene permuted among the cells of the class, in which no genes vary together.

- `genes together`: correlation of the gene-gene correlations with those of held-out cells (the `--genes` highest genes of the class)
- `means`, `variances`, `zeros`: correlation over genes of mean and variance of log-normalised expression, and of the fraction of zeros
- `recognised`: fraction that logistic regression, fitted on the held-out cells, takes for their class
- `linear`, `neighbours`, `forest`: macro-F1 on held-out cells of logistic regression, 15 nearest neighbours on 30 components and a random
  forest, fitted on such cells

With `--times 3` the three classifiers are fitted on three times as many cells, which can be made at will: genes are permuted among cells drawn
with replacement, and of real cells all are taken up to this number.
Numbers are means over the classes with at least 20 cells in both parts. X has to hold counts; `unknown` is no class.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline

import scbin

FEWEST = 20
CLASSIFIERS = {
    "linear": LogisticRegression(max_iter=500, C=0.1),
    "neighbours": make_pipeline(PCA(30, random_state=0), KNeighborsClassifier(15)),
    "forest": RandomForestClassifier(200, random_state=0),
}


def logs(counts: np.ndarray) -> np.ndarray:
    """Return log-normalised expression."""
    return np.log1p(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * 1e4)


def agreement(held_out: np.ndarray, cells: np.ndarray, n_genes: int) -> dict[str, float]:
    """Compare cells of one class (cells, genes) with held-out cells of it."""
    top = np.argsort(-held_out.mean(axis=0))[:n_genes]
    a, b = logs(held_out)[:, top], logs(cells)[:, top]
    varies = (a.std(axis=0) > 0) & (b.std(axis=0) > 0)
    pairs = np.triu_indices(varies.sum(), 1)
    together = [np.corrcoef(x[:, varies].T)[pairs] for x in (a, b)]
    of_genes = {
        "means": lambda x: logs(x).mean(axis=0),
        "variances": lambda x: logs(x).var(axis=0),
        "zeros": lambda x: (x == 0).mean(axis=0),
    }
    alike = {name: np.corrcoef(of(held_out), of(cells))[0, 1] for name, of in of_genes.items()}
    return {"genes together": np.corrcoef(together)[0, 1], **alike}


def scores(adata: ad.AnnData, label: str, seed: int, n_genes: int, times: int, max_steps: int | None) -> pd.DataFrame:
    """Fit on 70 % of the cells, generate, and compare with the others: one row per kind of cells."""
    rng = np.random.default_rng(seed)
    held = rng.random(adata.n_obs) < 0.3
    fitted, asked = adata[~held].copy(), adata[held].copy()
    scbin.pp.tokenize(fitted, phenotypes={"label": label})
    model = scbin.tl.pretrain(fitted, seed=seed, max_steps=max_steps, progress=False)
    genes = list(model.vocabulary.genes)
    x, y = fitted[:, genes].X.toarray(), fitted.obs[label].astype(str).to_numpy()
    x_held, y_held = asked[:, genes].X.toarray(), asked.obs[label].astype(str).to_numpy()
    classes = [name for name in np.unique(y) if min((y == name).sum(), (y_held == name).sum()) >= FEWEST]
    classes = [name for name in classes if name not in ("unknown", "nan")]
    n_of = {name: int((y_held == name).sum()) for name in classes}
    kinds: dict[str, dict[str, np.ndarray]] = {"real": {}, "independent": {}, "scbin": {}}
    for name, n in n_of.items():
        own, many = x[y == name], times * n
        kinds["real"][name] = own[rng.permutation(len(own))[:many]]
        drawn = own if many <= len(own) else own[rng.integers(len(own), size=many)]
        kinds["independent"][name] = rng.permuted(drawn, axis=0)[:many]
        made = scbin.tl.generate(model, {"label": name}, many, seed=seed, progress=False)
        kinds["scbin"][name] = made.X.toarray()
    known = np.isin(y_held, classes)
    judge = clone(CLASSIFIERS["linear"]).fit(logs(x_held[known]), y_held[known])
    rows = {}
    for kind, made in kinds.items():
        parts = pd.DataFrame([agreement(x_held[y_held == name], made[name][: n_of[name]], n_genes) for name in classes])
        pool, truth = np.concatenate(list(made.values())), np.repeat(classes, [len(part) for part in made.values()])
        rows[kind] = parts.mean().to_dict() | {"recognised": (judge.predict(logs(pool)) == truth).mean()}
        for name, classifier in CLASSIFIERS.items():
            found = clone(classifier).fit(logs(pool), truth).predict(logs(x_held[known]))
            rows[kind][name] = f1_score(y_held[known], found, average="macro")
    return pd.DataFrame(rows).T.rename_axis("cells").reset_index()


def main() -> None:
    """Run all seeds, then print means and spreads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="h5ad with counts in X")
    parser.add_argument("label", help="column of obs with the classes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--genes", type=int, default=100, help="highest genes of a class (default: %(default)s)")
    parser.add_argument(
        "--times", type=int, default=1, help="cells to learn from, per held-out cell (default: %(default)s)"
    )
    parser.add_argument("--max-steps", type=int, help="of pretraining (default: as the preset)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = ad.read_h5ad(arguments.file)
    adata.X = sparse.csr_matrix(adata.X)
    tables = [
        scores(adata, arguments.label, seed, arguments.genes, arguments.times, arguments.max_steps)
        for seed in range(arguments.seeds)
    ]
    by_kind = pd.concat(tables).groupby("cells", sort=False)
    text = by_kind.mean().round(3).astype(str) + " ± " + by_kind.std().fillna(0).round(3).astype(str)
    print(f"{arguments.file.stem}, {adata.n_obs:,} cells, {arguments.seeds} seeds\n{text.to_string()}")


if __name__ == "__main__":
    main()
