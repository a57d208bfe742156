"""The judge: do cell vectors say more about cells that were held out of everything than PCA does?

    python benchmarks/quality.py [../shared/data] [--files mine.h5ad:cell_type:donor ...] [--seeds 3] [--quick] [--out quality]

Of every labelled set, 70 % of the cells are fitted on (genes, PCA, networks; no labels) and the other 30 % are judged. Methods stand
beside each other on the same cells: PCA of the same genes and of scanpy's default genes, PCA averaged over neighbours, the network
at its start (step 0) and trained, by backbone, and scVI where it is installed. Scores of the held-out cells:

- `knn`: macro-F1 of 15 nearest neighbours, 5-fold among the held-out cells
- `transfer`: macro-F1 of 15 nearest neighbours, labels from the fitted cells
- `nmi`: normalised mutual information of k-means with as many clusters as labels
- `likelihood`: mean log likelihood of the other half of a held-out cell's molecules (networks only)

With `--labels`, annotation of the held-out cells instead: macro-F1 of logistic regression (balanced, C by cross-validation) on genes
and on genes with the cell vector, and of fine-tuning, beside its linear probe alone and training end to end in any case; with all
labels of the fitted cells, and with 50 and 10 of each class.

Every result is a row of `<out>.csv`, written at once: an interrupted run goes on where it stopped. `<out>.md` and `<out>.png` show means
over the sets and the spread over the seeds. Cells labelled `unknown` are fitted on and not scored.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import f1_score, normalized_mutual_info_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import scbin

SETS = {  # column with the labels, column with the batches, {column: value its cells must have}
    "pbmc3k_labelled": ("cell_type", None, {}),
    "pbmc_facs_garnett800": ("cell_type", None, {}),
    "kang_ifnb_2k": ("cell_type", None, {}),
    "kang_control_8684": ("cell_type", None, {}),
    "kang_control_6donor_1287g": ("cell_type", None, {}),
    "onek1k_sex_age_dev": ("cell_type", None, {}),
    "lung3cl_celseq2_dropseq": ("cell_type", "batch", {"demuxlet_cls": "SNG"}),
    "hipsc_cardiac_1090": ("cluster", None, {}),
    "tcell_wu2020_200": ("cell_type", None, {}),
}
QUICK = ("pbmc_facs_garnett800", "lung3cl_celseq2_dropseq", "kang_ifnb_2k")
N_GENES, HELD_OUT, MOST_CELLS = 2000, 0.3, 6000
NETWORKS = ("mlp", "bert")
WAYS = {  # to fine-tune: the start alone; end to end, unasked whether held-out cells gain; what held-out cells choose of both
    "linear probe": {"max_steps": 0},
    "end to end": {"finetuning": scbin.Finetuning(validation=0.0)},
    "fine-tuned": {},
}
SCORES = ("knn", "transfer", "nmi", "likelihood", "likelihood_start", "seconds")
COLUMNS = ("set", "seed", "method", "labels", "f1", *SCORES)


# ---- data -----------------------------------------------------------------------------------------------------------


def read(path: Path, label: str, only: dict[str, str]) -> ad.AnnData:
    """Return the cells of a set with counts in X and their labels in obs["label"]; at most 6,000 cells."""
    adata = ad.read_h5ad(path)
    for column, value in only.items():
        adata = adata[(adata.obs[column] == value).to_numpy()].copy()
    if adata.n_obs > MOST_CELLS:
        adata = adata[np.sort(np.random.default_rng(0).choice(adata.n_obs, MOST_CELLS, replace=False))].copy()
    adata.var_names_make_unique()
    adata.obs_names_make_unique()
    adata.X = csr_matrix(adata.X).astype(np.float32)
    adata.obs["label"] = adata.obs[label].astype(str)
    return adata


def divided(adata: ad.AnnData, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Return the cells that are fitted on and those held out, genes chosen by Pearson residuals of the fitted ones."""
    held_out = np.random.default_rng(seed).random(adata.n_obs) < HELD_OUT
    fitted, judged = adata[~held_out].copy(), adata[held_out].copy()
    expressed = np.asarray((fitted.X > 0).sum(axis=0)).ravel() >= 3
    fitted, judged = fitted[:, expressed].copy(), judged[:, expressed].copy()
    sc.experimental.pp.highly_variable_genes(
        fitted, flavor="pearson_residuals", n_top_genes=min(N_GENES, fitted.n_vars)
    )
    return fitted, judged


def logs(adata: ad.AnnData, genes: np.ndarray) -> np.ndarray:
    """Return log-normalised expression of some genes (cells, genes), per 10,000 counts of all genes."""
    normed = sc.pp.normalize_total(adata, target_sum=1e4, copy=True)
    return np.log1p(normed.X[:, genes].toarray())


# ---- methods: (fitted, judged) -> vectors of both, facts ------------------------------------------------------------


def pca(fitted: ad.AnnData, judged: ad.AnnData, n: int, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first components of log-normalised expression."""
    here, there = logs(fitted, genes), logs(judged, genes)
    model = PCA(min(n, *here.shape), random_state=0).fit(here)
    return model.transform(here), model.transform(there)


def averaged(here: np.ndarray, there: np.ndarray, k: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Return each vector averaged with those of its nearest fitted cells."""
    index = NearestNeighbors(n_neighbors=k).fit(here)
    return tuple((x + here[index.kneighbors(x)[1]].mean(axis=1)) / 2 for x in (here, there))


def default_genes(fitted: ad.AnnData) -> np.ndarray:
    """Return scanpy's default choice of genes: dispersion on log-normalised expression."""
    copy = sc.pp.normalize_total(fitted, target_sum=1e4, copy=True)
    sc.pp.log1p(copy)
    sc.pp.highly_variable_genes(copy, n_top_genes=min(N_GENES, copy.n_vars))
    return copy.var["highly_variable"].to_numpy()


def network(
    fitted: ad.AnnData, judged: ad.AnnData, backbone: str, seed: int, batch: str | None, max_steps: int | None = None
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Return scbin's vectors, with what training says of itself."""
    fitted, judged = fitted.copy(), judged.copy()
    scbin.pp.tokenize(fitted, mask_var="highly_variable")
    model = scbin.tl.pretrain(
        fitted, backbone=backbone, seed=seed, batch_key=batch, max_steps=max_steps, progress=False
    )
    scbin.pp.tokenize(judged, like=model)
    scbin.tl.embed(judged, model, progress=False)
    losses = {"likelihood_start": model.training["start"], "likelihood": model.training["end"]}  # minus, per molecule
    facts = {name: -loss for name, loss in losses.items() if loss is not None}
    return fitted.obsm["X_scbin"], judged.obsm["X_scbin"], facts


def scvi_vectors(
    fitted: ad.AnnData, judged: ad.AnnData, genes: np.ndarray, seed: int, batch: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return scVI's latent means, with its defaults."""
    import scvi

    scvi.settings.seed = seed
    here, there = fitted[:, genes].copy(), judged[:, genes].copy()
    scvi.model.SCVI.setup_anndata(here, batch_key=batch)
    model = scvi.model.SCVI(here)
    model.train(accelerator="cpu", enable_progress_bar=False)
    return model.get_latent_representation(here), model.get_latent_representation(there)


def vectors(method: str, fitted: ad.AnnData, judged: ad.AnnData, seed: int, batch: str | None) -> tuple:
    """Return the vectors of both parts by one method, and facts."""
    same = fitted.var["highly_variable"].to_numpy()
    match method.split(", "):
        case ["PCA-30" | "PCA-50" as name]:
            return (*pca(fitted, judged, int(name[4:]), same), {})
        case ["PCA-50", "default genes"]:
            return (*pca(fitted, judged, 50, default_genes(fitted)), {})
        case ["PCA-30", "averaged"]:
            return (*averaged(*pca(fitted, judged, 30, same)), {})
        case ["scVI"]:
            return (*scvi_vectors(fitted, judged, same, seed, batch), {})
        case [name, "start"]:
            return network(fitted, judged, name, seed, batch, max_steps=0)
        case [name]:
            return network(fitted, judged, name, seed, batch)
    raise ValueError(method)


# ---- scores ---------------------------------------------------------------------------------------------------------


def macro_f1(truth: np.ndarray, found: np.ndarray) -> float:
    """Return the F1 score averaged over the classes that occur."""
    return float(f1_score(truth, found, average="macro", labels=np.unique(truth), zero_division=0))


def label_scores(here: np.ndarray, there: np.ndarray, fitted: ad.AnnData, judged: ad.AnnData, seed: int) -> dict:
    """Return kNN within the held-out cells, kNN from fitted to held-out cells, and k-means NMI of the held-out cells."""
    truth, taught = judged.obs["label"].to_numpy(), fitted.obs["label"].to_numpy()
    known, known_here = truth != "unknown", (taught != "unknown") & np.isfinite(here).all(axis=1)
    known &= np.isfinite(there).all(axis=1)
    names, counts = np.unique(truth[known], return_counts=True)
    frequent = known & np.isin(truth, names[counts >= 5])
    knn = KNeighborsClassifier(15)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    within = cross_val_predict(knn, there[frequent], truth[frequent], cv=folds)
    across = knn.fit(here[known_here], taught[known_here]).predict(there[known])
    clusters = KMeans(len(names), n_init=10, random_state=seed).fit_predict(there[known])
    return {
        "knn": macro_f1(truth[frequent], within),
        "transfer": macro_f1(truth[known], across),
        "nmi": float(normalized_mutual_info_score(truth[known], clusters)),
    }


def balanced_regression(folds: StratifiedKFold | None = None) -> Pipeline:
    """Return a balanced logistic regression on scaled features, its C by cross-validation."""
    how = {"cv": folds, "class_weight": "balanced", "max_iter": 300, "scoring": "f1_macro"}
    return make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 0, 5), **how))


def annotation(
    fitted: ad.AnnData, judged: ad.AnnData, backbone: str, seed: int, per_class: int | None
) -> dict[str, float]:
    """Return macro-F1 on the held-out cells by method, taught with some labels of the fitted cells."""
    fitted, judged = fitted.copy(), judged.copy()
    genes = fitted.var["highly_variable"].to_numpy()
    here, there, _ = network(fitted, judged, backbone, seed, None)
    rng = np.random.default_rng(seed)
    label = fitted.obs["label"].to_numpy()
    taught = np.zeros(len(label), dtype=bool)
    for name in np.setdiff1d(np.unique(label), ["unknown"]):
        cells = rng.permutation(np.flatnonzero(label == name))
        if len(cells) >= 5:
            taught[cells[:per_class]] = True
    truth = judged.obs["label"].to_numpy()
    known = np.isin(truth, label[taught])
    x_here, x_there = logs(fitted, genes), logs(judged, genes)
    scores = {}
    both = {"genes": (x_here, x_there), "vector and genes": (np.hstack([here, x_here]), np.hstack([there, x_there]))}
    for name, (a, b) in both.items():
        folds = StratifiedKFold(
            min(5, np.unique(label[taught], return_counts=True)[1].min()), shuffle=True, random_state=seed
        )
        probe = balanced_regression(folds)
        scores[f"logistic regression on {name}"] = macro_f1(
            truth[known], probe.fit(a[taught], label[taught]).predict(b[known])
        )
    fitted.obs["label"] = pd.Categorical(np.where(taught, label, None))
    scbin.pp.tokenize(fitted, mask_var="highly_variable")
    pretrained = scbin.tl.pretrain(fitted, backbone=backbone, seed=seed, progress=False)
    scbin.pp.tokenize(judged, like=pretrained)
    judged.obs = judged.obs.drop(columns="label")
    for name, how in WAYS.items():
        model = scbin.tl.finetune(fitted, pretrained, target="label", seed=seed, progress=False, **how)
        del fitted.obs["scbin_split"]
        scbin.tl.predict(judged, model, progress=False)
        scores[f"scbin, {name}"] = macro_f1(truth[known], judged.obs["scbin_label"].astype(str).to_numpy()[known])
    return scores


# ---- running and reporting ------------------------------------------------------------------------------------------


def main() -> None:
    """Run what is missing of the table, then draw it."""
    arguments = parse()
    table = arguments.out.with_suffix(".csv")
    done = (
        set(pd.read_csv(table)[["set", "seed", "method", "labels"]].astype(str).agg("|".join, axis=1))
        if table.is_file()
        else set()
    )
    for seed in range(0 if arguments.report else arguments.seeds):
        for name, (path, label, batch, only) in arguments.sets.items():
            adata = read(path, label, only)
            fitted, judged = divided(adata, seed)
            if arguments.labels:
                for per_class in (None, 50, 10):
                    key = "all" if per_class is None else str(per_class)
                    if f"{name}|{seed}|scbin, fine-tuned|{key}" not in done:
                        for method, f1 in annotation(fitted, judged, arguments.backbone, seed, per_class).items():
                            append(table, {"set": name, "seed": seed, "method": method, "labels": key, "f1": f1})
                continue
            for method in arguments.methods:
                if f"{name}|{seed}|{method}|none" in done:
                    continue
                begun = time.process_time()
                here, there, facts = vectors(method, fitted, judged, seed, batch)
                seconds = time.process_time() - begun
                scores = label_scores(here, there, fitted, judged, seed)
                append(
                    table,
                    {
                        "set": name,
                        "seed": seed,
                        "method": method,
                        "labels": "none",
                        **scores,
                        **facts,
                        "seconds": seconds,
                    },
                )
    if table.is_file():
        report(pd.read_csv(table), arguments.out)


def append(table: Path, row: dict) -> None:
    """Write one result."""
    new = not table.is_file()
    row = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    with table.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(*(f"{key} {value}" if key not in COLUMNS[:3] else value for key, value in row.items()), flush=True)


def report(rows: pd.DataFrame, out: Path) -> None:
    """Write means over the sets with their spread over seeds, and a picture of every set."""
    import matplotlib.pyplot as plt

    scores = [name for name in ("f1", *SCORES) if rows[name].notna().any()]
    by_seed = rows.groupby(["labels", "method", "seed"], sort=False)[scores].mean()
    mean, spread = (by_seed.groupby(["labels", "method"], sort=False).agg(how) for how in ("mean", "std"))
    text = mean.round(3).astype(str) + " ± " + spread.round(3).fillna(0).astype(str)
    lines = ["| " + " | ".join(["labels", "method", *scores]) + " |", "|" + "---|" * (len(scores) + 2)]
    lines += ["| " + " | ".join([*index, *row]) + " |" for index, row in zip(text.index, text.to_numpy(), strict=True)]
    lines += ["", "By set, means over the seeds:", ""]
    for score in [name for name in ("f1", "knn", "transfer", "nmi") if name in scores]:
        wide = rows.pivot_table(index=["labels", "method"], columns="set", values=score, sort=False).round(3)
        lines += [
            f"**{score}**",
            "",
            "| labels | method | " + " | ".join(wide.columns) + " |",
            "|" + "---|" * (len(wide.columns) + 2),
        ]
        lines += [
            "| " + " | ".join([*index, *map(str, row)]) + " |"
            for index, row in zip(wide.index, wide.to_numpy(), strict=True)
        ] + [""]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    shown = [name for name in ("f1", "knn", "nmi") if name in scores]
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4), layout="constrained", squeeze=False)
    for ax, score in zip(axes[0], shown, strict=True):
        wide = rows.pivot_table(index="set", columns=["labels", "method"], values=score, sort=False)
        for k, column in enumerate(wide.columns):
            ax.plot(
                wide[column], range(len(wide)), "o", color=f"C{k % 10}", label=" ".join(column).replace("none ", "")
            )
        ax.set(
            yticks=range(len(wide)),
            yticklabels=wide.index if ax is axes[0, 0] else [],
            xlabel=f"{score} (held-out cells)",
        )
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out.with_suffix(".png"), dpi=150)
    print("\n".join(lines))


def parse() -> argparse.Namespace:
    """Read the command line."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    usual = [
        "PCA-30",
        "PCA-50",
        "PCA-50, default genes",
        "PCA-30, averaged",
        *(f"{b}{s}" for b in NETWORKS for s in (", start", "")),
    ]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=beside, help="of the built-in sets (default: %(default)s)"
    )
    parser.add_argument(
        "--files", nargs="+", default=[], help="files of yours with counts in X, as FILE:label or FILE:label:batch"
    )
    parser.add_argument("--sets", nargs="+", help="which built-in sets (default: all that are there)")
    parser.add_argument(
        "--methods", nargs="+", default=usual, help="which (default: %(default)s, scVI where installed)"
    )
    parser.add_argument("--backbone", default="mlp", help="with --labels: which network (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, three small sets")
    parser.add_argument("--labels", action="store_true", help="annotation with labels instead of vectors without")
    parser.add_argument("--report", action="store_true", help="run nothing, write table and picture again")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.sets = 1, arguments.sets or list(QUICK)
    if arguments.methods == usual and not arguments.quick:
        try:
            import scvi  # noqa: F401

            arguments.methods.append("scVI")
        except ImportError:
            pass
    names = arguments.sets or ([] if arguments.files else list(SETS))
    chosen = {name: (arguments.folder / f"{name}.h5ad", *SETS[name]) for name in names}
    for text in arguments.files:
        file, label, *batch = text.split(":")
        chosen[Path(file).stem] = (Path(file), label, batch[0] if batch else None, {})
    arguments.sets = {name: item for name, item in chosen.items() if item[0].is_file()}
    if not arguments.sets:
        parser.error(f"no data: {arguments.folder} holds none of {', '.join(names) or 'the sets'}")
    return arguments


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UndefinedMetricWarning)
    warnings.filterwarnings("ignore", message="The least populated class")
    main()
