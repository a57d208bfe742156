"""How good embeddings without labels are: scbin beside PCA, variable genes, Harmony and scVI, on all labelled sets of a folder.

    python benchmarks/quality.py [../shared/data] [--files mine.h5ad:cell_type:donor ...] [--seeds 3] [--quick] [--out quality]

Harmony and scVI run where they are installed (harmonypy, scvi-tools); `--methods` and `--sets` choose. Written to `<out>.csv` (a row
per set, seed and method) after every run, so that an interrupted run goes on where it stopped and a second environment can
add its methods to the same table; `<out>.md` and `<out>.png` show means and spread over the seeds. `--annotate` measures
annotation with labels instead: fine-tuning beside logistic regression, PCA + kNN, scANVI and CellTypist on the same splits.

Cells whose label is missing or `unknown` take part in training and are not scored.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import quality_methods as methods
import quality_metrics as metrics

COLUMNS = (
    "set", "seed", "method", "n_cells", "n_scored", "n_labels", "n_batches", *metrics.LABEL_SCORES, *metrics.BATCH_SCORES,
    "seconds", "cpu_seconds", "peak_gb", "pretrain_seconds", "genes_exact", "genes_exact_simple", "genes_within_one",
    "genes_within_one_simple", "genes_log_loss", "genes_log_loss_simple",
)  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """Where the labels of a set stand, and which of its cells are used."""

    label: str = "cell_type"
    batch: str | None = None
    only: tuple[str, str] | None = None  # column of obs, and the value its cells must have
    file: str | None = None  # if not the set's name


PAIR, QUICKSTART = "pbmc3k + facs800", "pbmc68k_reduced"
SETS = {
    "lung3cl_celseq2_dropseq": Labelled(batch="batch", only=("demuxlet_cls", "SNG")),
    QUICKSTART: Labelled("bulk_labels"),
    "pbmc_facs_garnett800": Labelled(),
    "kang_ifnb_2k published": Labelled(only=("cell_type_source", "published"), file="kang_ifnb_2k"),
    "hipsc_cardiac_1090": Labelled("cluster"),
    "kang_ifnb_2k": Labelled(),
    "pbmc3k_labelled": Labelled(),
    PAIR: Labelled(batch="study"),
    "onek1k_sex_age_dev": Labelled(batch="donor_id"),
    "kang_control_8684": Labelled(batch="donor_id"),
    "kang_control_6donor_1287g": Labelled(batch="donor_id"),
}
METHODS = (*methods.METHODS, "CellTypist", "scANVI")  # the last two with --annotate
QUICK = ("lung3cl_celseq2_dropseq", QUICKSTART, "pbmc_facs_garnett800")
_SAME = {"B": "B cells", "Naive CD4 T": "CD4 T cells", "Memory CD4 T": "CD4 T cells", "CD8 T": "CD8 T cells"}


def main() -> None:
    arguments = _arguments()
    if arguments.annotate:
        import quality_annotate

        return quality_annotate.main(arguments)
    table = arguments.out.with_suffix(".csv")
    for seed in range(0 if arguments.report else arguments.seeds):
        for name, labelled in arguments.chosen.items():
            _run(name, labelled, seed, table, arguments)
    if table.is_file():
        import quality_report

        quality_report.write(table, arguments.out)
    return None


def _run(name: str, labelled: Labelled, seed: int, table: Path, arguments: argparse.Namespace) -> None:
    done = _done(table)
    adata = read(name, labelled, arguments.folder)
    labels = adata.obs[labelled.label].astype(str).to_numpy()
    known = ~np.isin(labels, ["unknown", "nan", ""])
    batches = None if labelled.batch is None else adata.obs[labelled.batch].astype(str).to_numpy()
    for method in methods.available(adata, labelled.batch):
        if (name, seed, method) in done or (arguments.methods and method not in arguments.methods):
            continue
        embedding, facts = methods.run(method, adata, labelled.batch, seed)
        scored = known & np.isfinite(embedding).all(axis=1)
        row = {"set": name, "seed": seed, "method": method, "n_cells": adata.n_obs, "n_scored": int(scored.sum())}
        row |= {"n_labels": len(np.unique(labels[scored])), **facts}
        row |= metrics.label_scores(embedding[scored], labels[scored], seed=seed)
        if batches is not None:
            row["n_batches"] = len(np.unique(batches))
            row |= metrics.batch_scores(embedding[scored], labels[scored], batches[scored])
        _append(table, row)
        shown = {key: row[key] for key in ("knn_f1", "kmeans_nmi", "leiden_nmi", "ilisi", "seconds") if key in row}
        print(name, seed, method, " ".join(f"{key} {value:.3f}" for key, value in shown.items()), flush=True)


def read(name: str, labelled: Labelled, folder: Path) -> ad.AnnData:
    """Return the cells of a set, counts in X where there are some, names unique."""
    from scipy.sparse import csr_matrix

    import scbin

    if name == QUICKSTART:
        return scbin.datasets.pbmc68k_reduced()
    adata = _pair(folder) if name == PAIR else ad.read_h5ad(folder / f"{labelled.file or name}.h5ad")
    if labelled.only is not None:
        adata = adata[(adata.obs[labelled.only[0]] == labelled.only[1]).to_numpy()].copy()
    adata.var_names_make_unique()
    adata.obs_names_make_unique()
    adata.X = csr_matrix(adata.X)
    return adata


def _pair(folder: Path) -> ad.AnnData:
    """Return two studies of blood with their common genes, and the labels they share under one name."""
    parts = {name: ad.read_h5ad(folder / f"{name}.h5ad") for name in ("pbmc3k_labelled", "pbmc_facs_garnett800")}
    parts["pbmc3k_labelled"].obs["cell_type"] = parts["pbmc3k_labelled"].obs["cell_type"].astype(str).replace(_SAME)
    return ad.concat(parts, label="study", join="inner", index_unique="-")


def _done(table: Path) -> set[tuple[str, int, str]]:
    if not table.is_file():
        return set()
    with table.open(newline="") as lines:
        return {(row["set"], int(row["seed"]), row["method"]) for row in csv.DictReader(lines)}


def _append(table: Path, row: dict) -> None:
    new = not table.is_file()
    with table.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, restval="")
        if new:
            writer.writeheader()
        writer.writerow({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})


def _arguments() -> argparse.Namespace:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=beside, help="of the built-in sets (default: %(default)s)"
    )
    parser.add_argument("--files", nargs="+", default=[], help="files of yours, as FILE:label or FILE:label:batch")
    parser.add_argument("--sets", nargs="+", help="which built-in sets (default: all that are there)")
    parser.add_argument(
        "--methods", nargs="+", help=f"which methods, of {', '.join(map(repr, METHODS))} (default: all installed)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, three small sets")
    parser.add_argument("--annotate", action="store_true", help="annotation with labels instead of embeddings without")
    parser.add_argument(
        "--max-steps", type=int, help="with --annotate: steps of fine-tuning, 0 for what it starts from"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write table and picture again")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.sets = 1, arguments.sets or list(QUICK)
    for name in arguments.sets or []:
        if name not in SETS:
            parser.error(f"there is no set {name!r}; choose from {', '.join(SETS)}")
    for name in arguments.methods or []:
        if name not in METHODS:
            parser.error(f"there is no method {name!r}; choose from {', '.join(map(repr, METHODS))}")
    chosen = {name: SETS[name] for name in (arguments.sets or ([] if arguments.files else SETS))}
    arguments.chosen = {name: item for name, item in chosen.items() if _there(name, item, arguments.folder)}
    for text in arguments.files:
        file, label, *batch = text.split(":")
        path = Path(file).resolve().with_suffix("")
        arguments.chosen[path.name] = Labelled(label, batch[0] if batch else None, file=str(path))
    return arguments


def _there(name: str, item: Labelled, folder: Path) -> bool:
    files = ("pbmc3k_labelled", "pbmc_facs_garnett800") if name == PAIR else (item.file or name,)
    return name == QUICKSTART or all((folder / f"{file}.h5ad").is_file() for file in files)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
