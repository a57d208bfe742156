"""What a model knows of genes and ages, with simple methods beside it.

    python benchmarks/knowledge.py networks cells.h5ad --trrust trrust.tsv --dorothea dorothea.csv [--bert] [--trees]
    python benchmarks/knowledge.py classes cells.h5ad --labels bivalent.csv long_range.csv --ids ensembl_id
    python benchmarks/knowledge.py changes cells.h5ad --label cell_type
    python benchmarks/knowledge.py age cells.h5ad --label age --donor donor_id

- `networks`: edges from transcription factors to genes that are a known target of some factor, among the 2,000 genes of a model. The area
  under the precision-recall curve over that of chance, and the precision among as many edges as there are true ones ("early") over chance.
  Beside the model: correlation and covariance of log expression; with `--trees` boosted trees that predict each target from the factors,
  as GRNBoost does; with `--bert` a small BERT of 100 steps on masked genes, for its attention and hidden states.
- `classes`: ROC AUC of logistic regressions on genes, `scbin.tl.evaluate(level="gene")`. Files of labels have the ids of genes in the first
  column and the class in the last, as Geneformer's have; `--ids` is the column of `var` with such ids.
- `changes`: log fold changes between each type and the rest from few cells of the half that the model learned from, by the model and
  plainly; their correlation over genes with the plain ones of the other half.
- `age`: five folds over donors; the error of the mean over a donor's cells, beside ridge and the mean of the donors.

X has to hold counts, and `var` the names that the references use. `--seeds` repeats; `--max-steps` shortens.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

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
PSEUDOCOUNT, BERT_STEPS = 0.1, 100


def logs(adata: ad.AnnData) -> np.ndarray:
    counts = sparse.csr_matrix(adata.X)
    depth = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    return np.log1p((sparse.diags(1e4 / depth) @ counts).toarray())


# ---- networks --------------------------------------------------------------------------------------------------------


def known_edges(edges: set[tuple[str, str]], genes: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which edges are known (factors, targets), and the genes that have a target here, and a factor."""
    place = {gene: k for k, gene in enumerate(genes)}
    known = np.zeros((len(genes), len(genes)), dtype=bool)
    for source, target in edges:
        if source in place and target in place and source != target:
            known[place[source], place[target]] = True
    factors, targets = np.flatnonzero(known.any(axis=1)), np.flatnonzero(known.any(axis=0))
    return known[np.ix_(factors, targets)], factors, targets


def edge_scores(weights: np.ndarray, genes: list[str], edges: set[tuple[str, str]]) -> dict[str, float]:
    """Score weights (genes, genes) of the edges from factors that have targets here to genes that have factors here."""
    known, factors, targets = known_edges(edges, genes)
    asked = factors[:, None] != targets
    true, score = known[asked], np.nan_to_num(np.abs(weights[np.ix_(factors, targets)]))[asked]
    n = int(true.sum())
    early = true[np.argsort(-score, kind="stable")[:n]].mean()
    found = {"AUPR": average_precision_score(true, score) / true.mean(), "early": early / true.mean()}
    return found | {"edges": n, "candidates": len(true)}


def trees(expression: np.ndarray, factors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the importance of each factor for each target (genes, genes)."""
    weights = np.zeros((expression.shape[1],) * 2)
    for gene in targets:
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
    adata.obs["all"] = "all"  # by groups, similarity is that of hidden states
    model = scbin.tl.pretrain(adata, max_steps=args.max_steps, seed=seed, **QUIET)
    states = {"method": "similarity", "groupby": "all"}
    asked = [("similarity, loadings", model, {}), ("similarity, hidden states", model, states)]
    asked += [(method, model, {"method": method}) for method in ("covariance", "effect")]
    if args.bert:
        small = {"backbone": "bert", "preset": "tiny", "masking": scbin.Masking(), "max_steps": BERT_STEPS}
        bert = scbin.tl.pretrain(adata, **small, seed=seed, **QUIET)
        asked += [("attention, BERT", bert, {"method": "attention"}), ("similarity, hidden states, BERT", bert, states)]
    genes = [gene for gene in adata.var_names if gene in set(model.vocabulary.genes)]
    columns = adata.var_names.get_indexer(genes)
    expression = logs(adata)[:, columns].astype(np.float32)
    found = {"correlation of counts": np.corrcoef(expression.T), "covariance of counts": np.cov(expression.T)}
    if args.trees:
        _, factors, targets = known_edges(set.union(*references.values()), genes)
        found["boosted trees"] = trees(expression, factors, targets)
    for name, of, how in asked:
        start = time.process_time()
        scbin.tl.gene_network(adata, of, n_edges=None, **how, **QUIET)
        slot = "scbin_network_0" if "groupby" in how else "scbin_network"
        found[name] = adata.varp[slot][columns][:, columns].toarray()
        print(f"{name}: {time.process_time() - start:.0f} CPU-seconds", flush=True)
    scores = {(of, name): edge_scores(w, genes, edges) for of, edges in references.items() for name, w in found.items()}
    return pd.DataFrame(scores).T


# ---- genes -----------------------------------------------------------------------------------------------------------


def classes(adata: ad.AnnData, args: argparse.Namespace, seed: int) -> pd.DataFrame:
    adata = adata[:, np.asarray((adata.X > 0).sum(axis=0)).ravel() >= 5].copy()
    ids = (adata.var[args.ids] if args.ids else adata.var_names.to_series()).astype(str)
    scbin.pp.tokenize(adata, n_genes=adata.n_vars)
    model = scbin.tl.pretrain(adata, max_steps=args.max_steps, seed=seed, **QUIET)
    found = {}
    for path in args.labels:
        labels = pd.read_csv(path, index_col=0).iloc[:, -1].astype(str)
        adata.var["gene_class"] = ids.map(labels[~labels.index.duplicated()]).to_numpy()
        scores = scbin.tl.evaluate(adata, model, target="gene_class", level="gene", seed=seed, **QUIET)
        found[Path(path).stem] = scores[["n_genes", "roc_auc", "roc_auc_sd"]]
    return pd.concat(found)


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
            table = scbin.tl.gene_association(few, model, groupby="kind", groups="this", **QUIET)
            table = table.set_index("gene").loc[names]
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
    for name in ("trrust", "dorothea", "ids", "label", "donor", "symbols"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--labels", nargs="+")
    for name in ("trees", "bert"):
        parser.add_argument(f"--{name}", action="store_true")
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
