"""Measured perturbations that were left out: every method, on simulated screens and on files of yours, in one table.

    python benchmarks/perturbseq.py [--folder ../shared/data] [--seeds 5] [--first 0] [--calibrate 100] [--large] [--cell-eval]

Numbers are means over reproducible perturbations of the correlation of changes, without own genes. `--calibrate` counts how often the verdict
is "better" where nothing can be foretold; `--large` takes the time of 100 perturbations x 20,000 cells x 2,000 genes; `--cell-eval` scores
the same predictions with Arc's package too (`pip install cell-eval`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

import scbin

SIMULATED: dict[str, dict[str, Any]] = {
    "known modules, 40 targets": {},
    "known modules, 100 targets": {"n_perturbations": 100, "n_cells": 10_000},
    "unknown modules": {"known_modules": False},
    "pure noise": {"effect": 0.0},
    "60 pairs of 30, synergy": {"n_perturbations": 30, "n_pairs": 60, "n_cells": 10_000},
    "60 pairs of 30, no synergy": {"n_perturbations": 30, "n_pairs": 60, "n_cells": 10_000, "synergy": 0.0},
}
FILES: dict[str, dict[str, Any]] = {
    "papalexi_thp1_crisprko_299g": {"batch_key": "batch", "mode": "ko"},
    "mcfaline_gbm_crispri_500g": {"batch_key": "cell_type", "total_key": "total_counts_full"},
    "marson_cd4_crispri_500": {"total_key": "total_counts_full"},
}
ARC = ("pearson_delta", "mse", "discrimination_score_l1")


def judge(adata: ad.AnnData, n_targets: int = 1, arc: bool = False, **options: Any) -> tuple[dict[str, Any], str]:
    """Fit and evaluate; return a row of the table and the verdict."""
    clock = time.process_time()
    scbin.tl.fit_perturbations(adata, **options)
    scbin.tl.evaluate_perturbations(adata)
    facts = json.loads(adata.uns["scbin_perturbations_evaluated"]["params"])
    table = scbin.get.perturbations_df(adata, "evaluated")
    row = {"reproducible": facts["n_reproducible"], "better": facts["verdict"].startswith("Better")}
    row |= {"ceiling": facts.get("ceiling"), "CPU s": time.process_time() - clock}
    row |= (
        table[table["reproducible"] & (table["n_targets"] == n_targets)].groupby("method")["pearson"].mean().to_dict()
    )
    if n_targets == 2:
        row["error / additive"] = above_noise(adata, table, "scbin") / above_noise(adata, table, "additive")
    return row | (cell_eval(adata) if arc and facts["n_reproducible"] > 1 else {}), facts["verdict"]


def above_noise(adata: ad.AnnData, table: pd.DataFrame, method: str) -> float:
    """Return the squared error of a method on all pairs, less what the noise of the measurement makes."""
    entry = adata.uns["scbin_perturbations"]
    pairs = table[(table["n_targets"] == 2) & (table["method"] == method)].set_index("perturbation")
    size = pd.Series(np.nansum(adata.uns["scbin_perturbations_evaluated"]["observed"] ** 2, axis=1))
    size.index = adata.uns["scbin_perturbations_evaluated"]["names"]
    noise = entry["table"].set_index("perturbation")["noise"].reindex(pairs.index) * entry["variance"].sum()
    return float((pairs["relative_mse"] * size.reindex(pairs.index) - noise).mean())


def cell_eval(adata: ad.AnnData) -> dict[str, float]:
    """Return Arc's scores of the predictions, and of the mean of the others, for reproducible single perturbations.

    Own genes are left as in controls. Scores of pseudobulks; those of differential expression need cells, which a change is not.
    """
    from cell_eval import MetricsEvaluator

    entry, table = (
        adata.uns["scbin_perturbations_evaluated"],
        scbin.get.perturbations_df(adata, "evaluated", reproducible=True),
    )
    names = table.loc[table["n_targets"] == 1, "perturbation"].unique()
    rows = pd.Index(entry["names"]).get_indexer(names)
    seen, foretold = (
        np.where(names[:, None] == entry["genes"], 0, entry[key][rows]) for key in ("observed", "predicted")
    )
    others = (seen.sum(axis=0) - seen) / (len(seen) - 1)

    def bulk(change: np.ndarray) -> ad.AnnData:
        level = np.vstack([np.zeros(change.shape[1]), change]) + adata.uns["scbin_perturbations"]["control"]
        obs = pd.DataFrame({"perturbation": ["control", *names]}, index=["control", *names])
        return ad.AnnData(np.maximum(level, 0), obs=obs, var=pd.DataFrame(index=entry["genes"]))

    scores = {}
    for method, change in {"scbin": foretold, "mean of others": others}.items():
        with tempfile.TemporaryDirectory() as folder:
            made = MetricsEvaluator(
                bulk(change), bulk(seen), control_pert="control", pert_col="perturbation", outdir=folder, skip_de=True
            )
            skipped = ["pearson_edistance", "clustering_agreement"]
            found = made.compute("anndata", skip_metrics=skipped, write_csv=False)[0].to_pandas()
        scores |= {f"cell-eval {metric}, {method}": float(found[metric].mean()) for metric in ARC}
    return scores


def main() -> None:
    """Print the table, and what else was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    add = parser.add_argument
    add("--folder", type=Path, default=beside, help="with the files of real screens (default: %(default)s)")
    add("--seeds", type=int, default=5, help="of each simulated screen (default: %(default)s)")
    add("--first", type=int, default=0, help="the first of them (default: %(default)s)")
    add("--calibrate", type=int, default=0, help="how many seeds of screens that cannot be foretold")
    add("--large", action="store_true", help="take the time of a large screen")
    add("--cell-eval", action="store_true", help="score with Arc's cell-eval too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, verdicts, arc = {}, {}, arguments.cell_eval
    for name, options in SIMULATED.items():
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            adata = scbin.datasets.perturbseq(**options, seed=seed)
            rows[name, seed], _ = judge(adata, 2 if "n_pairs" in options else 1, arc, batch_key="batch", seed=seed)
    for name, options in FILES.items():
        try:
            rows[name, 0], verdicts[name] = judge(ad.read_h5ad(arguments.folder / f"{name}.h5ad"), arc=arc, **options)
        except (scbin.ScbinInputError, FileNotFoundError) as error:
            verdicts[name] = f"refused: {error}"
    frame = pd.DataFrame(rows).T.apply(pd.to_numeric, errors="coerce")
    if "scbin" in frame:
        frame["of the gap"] = (frame["scbin"] - frame["mean of others"]) / (frame["ceiling"] - frame["mean of others"])
    print(frame.groupby(level=0, sort=False).mean().round(3).T.to_string(na_rep=""))
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    for name in ("pure noise", "unknown modules") if arguments.calibrate else ():
        runs = (scbin.datasets.perturbseq(**SIMULATED[name], seed=1000 + seed) for seed in range(arguments.calibrate))
        better = sum(judge(adata, batch_key="batch")[0]["better"] for adata in runs)
        print(f"{name}: the verdict is 'better' in {better} of {arguments.calibrate} seeds")
    if arguments.large:
        adata = scbin.datasets.perturbseq(100, 20_000, 2_000)
        clock = time.process_time()
        scbin.tl.fit_perturbations(adata, batch_key="batch")
        fitted = time.process_time() - clock
        scbin.tl.evaluate_perturbations(adata)
        print(f"large: fit {fitted:.0f} CPU s, evaluation {time.process_time() - clock - fitted:.0f} CPU s")


if __name__ == "__main__":
    main()
