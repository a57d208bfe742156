"""What a model knows of genes and ages, with simple methods beside it.

    python benchmarks/knowledge.py networks cells.h5ad --trrust trrust.tsv --dorothea dorothea.csv [--backbone bert] [--trees]
    python benchmarks/knowledge.py classes cells.h5ad --labels classes.csv --id-column ensembl_id --label-column label
    python benchmarks/knowledge.py changes cells.h5ad --label cell_type
    python benchmarks/knowledge.py age cells.h5ad --label age --donor donor_id

- `networks`: from transcription factors to their known targets, among the 2,000 genes of a model. The area under the precision-recall curve
  over that of chance, and the precision among as many edges as there are true ones ("early") over chance. Beside the model:
  correlation and covariance of log expression, and with `--trees` boosted trees that predict each gene from the factors, as GRNBoost does.
- `classes`: ROC AUC of logistic regressions on genes, `scbin.tl.evaluate(level="gene")`.
- `changes`: log fold changes between each type and the rest from few cells of the half that the model learned from, by the model and
  plainly; their correlation over genes with the plain ones of the other half.
- `age`: five folds over donors; the error of the mean over a donor's cells, beside ridge and the mean of the donors.

X has to hold counts, and `var` the names that the references use. `--seeds` repeats; `--max-steps` shortens.
"""

from __future__ import annotations

import argparse
import warnings

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.metrics import average_precision_score
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler

import scbin

QUIET = {"progress": False}
PSEUDOCOUNT = 0.1


def logs(adata: ad.AnnData) -> np.ndarray:
    counts = sparse.csr_matrix(adata.X)
    depth = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    return np.log1p((sparse.diags(1e4 / depth) @ counts).toarray())


# ---- networks --------------------------------------------------------------------------------------------------------


def edge_scores(weights: np.ndarray, genes: list[str], truth: set[tuple[str, str]]) -> dict[str, float]:
    """Score weights (genes, genes) of the edges from factors that have targets here."""
    place = {gene: k for k, gene in enumerate(genes)}
    label = np.zeros((len(genes), len(genes)), dtype=bool)
    for source, target in truth:
        if source in place and target in place and source != target:
            label[place[source], place[target]] = True
    factors = np.flatnonzero(label.any(axis=1))
    asked = np.arange(len(genes))[None] != factors[:, None]
    true, score = label[factors][asked], np.nan_to_num(np.abs(weights[factors]))[asked]
    n = int(true.sum())
    early = true[np.argsort(-score, kind="stable")[:n]].mean()
    return {"AUPR": average_precision_score(true, score) / true.mean(), "early": early / true.mean(), "edges": n}


def trees(expression: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the importance of each factor for each gene."""
    weights = np.zeros((expression.shape[1],) * 2)
    for gene in range(expression.shape[1]):
        own = factors[factors != gene]
        options = {"n_estimators": 60, "learning_rate": 0.05, "max_features": 0.1, "subsample": 0.9}
        model = GradientBoostingRegressor(**options, random_state=0).fit(expression[:, own], expression[:, gene])
        weights[own, gene] = model.feature_importances_ * expression[:, gene].var()
    return weights


def networks(adata: ad.AnnData, args: argparse.Namespace, seed: int) -> pd.DataFrame:
    pairs, table = pd.read_csv(args.trrust, sep="\t", header=None), pd.read_csv(args.dorothea)
    table = table[table["confidence"] != "D"]
    references = {"TRRUST": set(zip(pairs[0], pairs[1], strict=True))}
    references["DoRothEA A-C"] = set(zip(table["tf"], table["target"], strict=True))
    scbin.pp.tokenize(adata)
    masking = scbin.Masking() if args.masked else None
    options = {"backbone": args.backbone, "max_steps": args.max_steps, "masking": masking, "seed": seed}
    model = scbin.tl.pretrain(adata, **options, **QUIET)
    asked = {
        "covariance": {},
        "similarity, loadings": {"method": "similarity", "vectors": "loadings"},
        "similarity, static": {"method": "similarity", "vectors": "static"},
    }
    asked |= {"similarity, context": {"method": "similarity", "vectors": "context"}, "effect": {"method": "effect"}}
    asked |= {"attention": {"method": "attention"}} if args.backbone == "bert" else {}
    genes = [gene for gene in adata.var_names if gene in set(model.vocabulary.genes)]
    columns = adata.var_names.get_indexer(genes)
    expression = logs(adata)[:, columns].astype(np.float32)
    found = {
        "correlation of counts": np.nan_to_num(np.corrcoef(expression.T)),
        "covariance of counts": np.cov(expression.T),
    }
    if args.trees:
        factors = np.array(
            [k for k, g in enumerate(genes) if any(g == a for edges in references.values() for a, _ in edges)]
        )
        found["boosted trees"] = trees(expression, factors)
    for name, how in asked.items():
        scbin.tl.gene_network(adata, model, n_edges=None, **how, **QUIET)
        found[name] = adata.varp["scbin_network"][columns][:, columns].toarray()
    rows = {
        (reference, name): edge_scores(w, genes, truth)
        for reference, truth in references.items()
        for name, w in found.items()
    }
    return pd.DataFrame(rows).T


# ---- genes -----------------------------------------------------------------------------------------------------------


def classes(adata: ad.AnnData, args: argparse.Namespace, seed: int) -> pd.DataFrame:
    labels = pd.read_csv(args.labels).set_index(args.id_column)[args.label_column].astype(str)
    adata = adata[:, np.asarray((adata.X > 0).sum(axis=0)).ravel() >= 5].copy()
    ids = adata.var[args.id_column].astype(str) if args.id_column in adata.var else adata.var_names.to_series()
    adata.var["gene_class"] = ids.map(labels[~labels.index.duplicated()]).to_numpy()
    scbin.pp.tokenize(adata, n_genes=adata.n_vars)
    model = scbin.tl.pretrain(adata, max_steps=args.max_steps, seed=seed, **QUIET)
    return scbin.tl.evaluate(adata, model, target="gene_class", level="gene", seed=seed, **QUIET)[
        ["n_genes", "roc_auc", "roc_auc_sd"]
    ]


def changes(adata: ad.AnnData, args: argparse.Namespace, seed: int) -> pd.DataFrame:
    rng, kind = np.random.default_rng(seed), adata.obs[args.label].astype(str).to_numpy()
    first = rng.random(adata.n_obs) < 0.5
    scbin.pp.tokenize(part := adata[first].copy())
    model = scbin.tl.pretrain(part, max_steps=args.max_steps, seed=seed, **QUIET)
    names = list(model.vocabulary.genes)
    x = np.expm1(logs(adata[~first, names]))
    rows = []
    for n in (10, 30, 100):
        for name in (each for each in np.unique(kind) if (kind[first] == each).sum() >= n):
            here, there = np.flatnonzero(kind[first] == name), np.flatnonzero(kind[first] != name)
            few = part[np.concatenate([rng.permutation(here)[:n], rng.permutation(there)[: 3 * n]])].copy()
            few.obs["kind"] = np.where(few.obs[args.label].astype(str) == name, "this", "others")
            table = (
                scbin.tl.gene_association(few, model, groupby="kind", groups="this", **QUIET)
                .set_index("gene")
                .loc[names]
            )
            own = kind[~first] == name
            truth = np.log2(x[own].mean(axis=0) + PSEUDOCOUNT) - np.log2(x[~own].mean(axis=0) + PSEUDOCOUNT)
            row = {"cells": n, "scbin": np.corrcoef(truth, table["log_fold_change"])[0, 1]}
            rows.append(row | {"plain": np.corrcoef(truth, table["plain_log_fold_change"])[0, 1], "types": 1})
    return pd.DataFrame(rows).groupby("cells").agg({"scbin": "mean", "plain": "mean", "types": "sum"})


# ---- ages ------------------------------------------------------------------------------------------------------------


def age(adata: ad.AnnData, args: argparse.Namespace, seed: int) -> pd.DataFrame:
    years = adata.obs.groupby(args.donor, observed=True)[args.label].first().astype(float)
    made = pd.DataFrame(index=years.index, columns=["scbin", "ridge", "mean"], dtype=float)
    for train, test in KFold(5, shuffle=True, random_state=seed).split(years):
        held = adata.obs[args.donor].isin(years.index[test]).to_numpy()
        fitted, asked = adata[~held].copy(), adata[held].copy()
        scbin.pp.tokenize(fitted)
        options = {"target": args.label, "kind": "number", "split_key": args.donor, "max_steps": args.max_steps}
        model = scbin.tl.finetune(fitted, "new", **options, seed=seed, **QUIET)
        scbin.pp.tokenize(asked, like=model)
        scbin.tl.predict(asked, model, **QUIET)
        scaler = StandardScaler().fit(logs(fitted))
        ridge = RidgeCV(np.logspace(0, 6, 7)).fit(scaler.transform(logs(fitted)), fitted.obs[args.label].astype(float))
        asked.obs["ridge"] = ridge.predict(scaler.transform(logs(asked)))
        of = asked.obs.groupby(args.donor, observed=True)[[f"scbin_{args.label}", "ridge"]].mean()
        made.loc[of.index, ["scbin", "ridge"]] = of.to_numpy()
        made.loc[of.index, "mean"] = years.iloc[train].mean()
    error = {"mean absolute error": made.sub(years, axis=0).abs().mean(), "correlation": made.corrwith(years)}
    return pd.DataFrame(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["networks", "classes", "changes", "age"])
    parser.add_argument("data")
    for name in ("trrust", "dorothea", "labels", "id-column", "label-column", "label", "donor", "symbols"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--backbone", default="mlp")
    parser.add_argument("--masked", action="store_true", help="train on masked genes, too")
    parser.add_argument("--trees", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--max-steps", type=int)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = ad.read_h5ad(args.data)
    if args.symbols:
        adata.var_names = adata.var[args.symbols].astype(str)
        adata.var_names_make_unique()
    found = [globals()[args.what](adata.copy(), args, seed) for seed in range(args.seeds)]
    levels = list(range(1, found[0].index.nlevels + 1))
    by_row = pd.concat(found, keys=range(args.seeds)).groupby(level=levels, sort=False)
    print(by_row.mean().round(3).to_string())
    if args.seeds > 1:
        print("\nspread over seeds\n" + by_row.std().round(3).to_string())


if __name__ == "__main__":
    main()
