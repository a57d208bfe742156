"""Reference to query: what a model of other studies says of cells that it has never seen, beside principal components.

    python benchmarks/reference.py [../shared/data] [--seeds 3] [--out reference]

Each labelled blood set is the query once. The corpus are the other sets, without those that share donors with the query; no query cell is
fitted on, and no label. Beside each other: PCA of the query itself, PCA of the corpus (each set centred by itself, the query too), and scbin,
pretrained on the corpus with each set as a batch, for 20 epochs. Scores are those of `quality.py`: kNN (5-fold within the query), NMI of
k-means, and kNN from the labelled cells of the corpus, with labels in common words; for the last also logistic regression on genes and
`tl.finetune`. Every result is a row of `<out>.csv`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from batches import TYPES
from quality import balanced_regression, label_scores, logs, macro_f1
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA

import scbin

QUERIES = {  # query, and the sets that share its donors
    "pbmc3k_labelled": (),
    "pbmc_facs_garnett800": ("pbmc_frozenA_unlabelled",),
    "kang_ifnb_2k": (),
}
OTHERS = ("pbmc_frozenA_unlabelled", "pbmc_citeseq_400_unlabelled", "celltypist_demo_559_unlabelled")
EPOCHS = 20


def read(path: Path) -> ad.AnnData:
    """Return cells with counts in X and labels in common words."""
    adata = ad.read_h5ad(path)
    adata.var_names_make_unique()
    names = adata.obs["cell_type"].astype(str) if "cell_type" in adata.obs else pd.Series("", index=adata.obs_names)
    adata.obs = pd.DataFrame({"label": names.map(lambda name: TYPES.get(name, "unknown")).to_numpy()}, adata.obs_names)
    adata.X = csr_matrix(adata.X).astype(np.float32)
    return adata


def sets(folder: Path, query: str) -> tuple[ad.AnnData, ad.AnnData]:
    """Return corpus and query on their common genes, of which 2,000 are chosen in the corpus by Pearson residuals."""
    names = [name for name in (*QUERIES, *OTHERS) if name != query and name not in QUERIES[query]]
    corpus = ad.concat({name: read(folder / f"{name}.h5ad") for name in names}, label="study", index_unique="-")
    asked = read(folder / f"{query}.h5ad")
    genes = corpus.var_names[corpus.var_names.isin(asked.var_names)]
    corpus, asked = corpus[:, genes].copy(), asked[:, genes].copy()
    corpus.obs["study"] = corpus.obs["study"].astype(str)
    enough = np.asarray((corpus.X > 0).sum(axis=0)).ravel() >= 3
    corpus, asked = corpus[:, enough].copy(), asked[:, enough].copy()
    sc.experimental.pp.highly_variable_genes(corpus, flavor="pearson_residuals", n_top_genes=2000, batch_key="study")
    return corpus, asked


def components(corpus: ad.AnnData, query: ad.AnnData) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return principal components by method (corpus, query); those of the query are not fitted to the corpus."""
    genes = corpus.var["highly_variable"].to_numpy()
    here, there = logs(corpus, genes), logs(query, genes)
    study = pd.factorize(corpus.obs["study"])[0]
    means = np.stack([here[study == k].mean(axis=0) for k in range(study.max() + 1)])
    centred, own = here - means[study], there - there.mean(axis=0)
    found = {}
    for n in (30, 50):
        mine, all_of = PCA(n, random_state=0).fit(there), PCA(n, random_state=0).fit(centred)
        found[f"PCA-{n} of the query"] = (mine.transform(centred), mine.transform(own))
        found[f"PCA-{n} of the corpus, centred"] = (all_of.transform(centred), all_of.transform(own))
    return found


def network(corpus: ad.AnnData, query: ad.AnnData, seed: int, batch_key: str | None, **how) -> tuple:
    """Return scbin's vectors of corpus and query, and the model."""
    corpus, query = corpus.copy(), query.copy()
    scbin.pp.tokenize(corpus, mask_var="highly_variable")
    training = scbin.Training(epochs=EPOCHS)
    options = {"preset": "small", "training": training, "batch_key": batch_key, "seed": seed, "progress": False, **how}
    model = scbin.tl.pretrain(corpus, **options)
    scbin.pp.tokenize(query, like=model)
    scbin.tl.embed(query, model, progress=False)
    return corpus.obsm["X_scbin"], query.obsm["X_scbin"], model, corpus, query


def transferred(corpus: ad.AnnData, query: ad.AnnData, model: scbin.Model, seed: int) -> dict[str, float]:
    """Return macro-F1 on the query of logistic regression on genes, and of fine-tuning; taught by the labels of the corpus."""
    taught, truth = (part.obs["label"].to_numpy() for part in (corpus, query))
    known = (truth != "unknown") & np.isin(truth, taught)
    genes, cells = corpus.var["highly_variable"].to_numpy(), taught != "unknown"
    probe = balanced_regression().fit(logs(corpus, genes)[cells], taught[cells])
    tuned = scbin.tl.finetune(corpus, model, target="label", split_key="study", seed=seed, progress=False)
    scbin.tl.predict(query, tuned, progress=False)
    own = query.obs["scbin_label"].astype(str).to_numpy()
    found = {"logistic regression on genes": probe.predict(logs(query, genes)), "scbin, fine-tuned": own}
    return {name: macro_f1(truth[known], labels[known]) for name, labels in found.items()}


def main() -> None:
    """Run what is missing and print the means."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=beside)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("reference"))
    arguments = parser.parse_args()
    path, rows = arguments.out.with_suffix(".csv"), []

    def add(query: str, seed: int, method: str, **scores: float) -> None:
        rows.append({"query": query, "seed": seed, "method": method, **scores})
        print({name: round(x, 3) if isinstance(x, float) else x for name, x in rows[-1].items()}, flush=True)
        pd.DataFrame(rows).to_csv(path, index=False)

    for seed in range(arguments.seeds):
        for name in QUERIES:
            corpus, query = sets(arguments.folder, name)
            for method, (here, there) in components(corpus, query).items():
                add(name, seed, method, **label_scores(here, there, corpus, query, seed))
            for method, key, how in (
                ("scbin at its start", "study", {"max_steps": 0}),
                ("scbin without batch_key", None, {}),
                ("scbin", "study", {}),
            ):
                begun = time.process_time()
                here, there, model, *tokenized = network(corpus, query, seed, key, **how)
                seconds = time.process_time() - begun
                add(name, seed, method, **label_scores(here, there, corpus, query, seed), seconds=seconds)
            for method, f1 in transferred(*tokenized, model, seed).items():
                add(name, seed, method, transfer=f1)
    table = pd.DataFrame(rows).groupby(["query", "method"], sort=False)[["knn", "nmi", "transfer", "seconds"]].mean()
    by_seed = pd.DataFrame(rows).groupby(["method", "seed"], sort=False)[["knn", "nmi", "transfer"]].mean()
    spread = by_seed.groupby("method", sort=False).agg(["mean", "std"]).round(3)
    print(table.round(3).to_string(), spread.to_string(), sep="\n\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
