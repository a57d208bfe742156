"""Measured perturbations that were left out: every method, on simulated screens and on files of yours, in one table.

    python benchmarks/perturbseq.py [--folder ../shared/data] [--seeds 5] [--calibrate 100] [--large]

Numbers are means over reproducible perturbations of the correlation of changes, without own genes. `--calibrate` counts how often the verdict
is "better" where nothing can be foretold; `--large` takes the time of 100 perturbations x 20,000 cells x 2,000 genes.
"""

from __future__ import annotations

import argparse
import json
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


def judge(adata: ad.AnnData, **options: Any) -> tuple[dict[str, Any], pd.DataFrame]:
    """Fit and evaluate; return the facts and the scores."""
    clock = time.process_time()
    scbin.tl.fit_perturbations(adata, **options)
    scbin.tl.evaluate_perturbations(adata)
    facts = json.loads(adata.uns["scbin_perturbations_evaluated"]["params"])
    return facts | {"cpu": time.process_time() - clock}, scbin.get.perturbations_df(adata, "evaluated")


def above_noise(adata: ad.AnnData, table: pd.DataFrame, method: str) -> float:
    """Return the squared error of a method on all pairs, less what the noise of the measurement makes."""
    entry = adata.uns["scbin_perturbations"]
    pairs = table[(table["n_targets"] == 2) & (table["method"] == method)].set_index("perturbation")
    size = pd.Series(np.nansum(adata.uns["scbin_perturbations_evaluated"]["observed"] ** 2, axis=1))
    size.index = adata.uns["scbin_perturbations_evaluated"]["names"]
    noise = entry["table"].set_index("perturbation")["noise"].reindex(pairs.index) * entry["variance"].sum()
    return float((pairs["relative_mse"] * size.reindex(pairs.index) - noise).mean())


def main() -> None:
    """Print the table, and what else was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument(
        "--folder", type=Path, default=beside, help="with the files of real screens (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="of each simulated screen (default: %(default)s)")
    parser.add_argument("--calibrate", type=int, default=0, help="how many seeds of screens that cannot be foretold")
    parser.add_argument("--large", action="store_true", help="take the time of a large screen")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, verdicts = {}, {}
    for name, options in SIMULATED.items():
        for seed in range(arguments.seeds):
            adata = scbin.datasets.perturbseq(**options, seed=seed)
            facts, table = judge(adata, batch_key="batch", seed=seed)
            kind = 2 if "n_pairs" in options else 1
            means = table[table["reproducible"] & (table["n_targets"] == kind)].groupby("method")["pearson"].mean()
            rows[name, seed] = means.to_dict() | {"ceiling": facts.get("ceiling"), "CPU s": facts["cpu"]}
            rows[name, seed] |= {
                "reproducible": facts["n_reproducible"],
                "better": facts["verdict"].startswith("Better"),
            }
            if kind == 2:
                rows[name, seed]["error / additive"] = above_noise(adata, table, "scbin") / above_noise(
                    adata, table, "additive"
                )
    for name, options in FILES.items():
        path = arguments.folder / f"{name}.h5ad"
        try:
            facts, table = judge(ad.read_h5ad(path), **options)
        except (scbin.ScbinInputError, FileNotFoundError) as error:
            verdicts[name] = f"refused: {error}"
            continue
        means = table[table["reproducible"]].groupby("method")["pearson"].mean().to_dict()
        rows[name, 0] = means | {"ceiling": facts.get("ceiling"), "CPU s": facts["cpu"]}
        rows[name, 0] |= {"reproducible": facts["n_reproducible"], "better": facts["verdict"].startswith("Better")}
        verdicts[name] = facts["verdict"]
    frame = pd.DataFrame(rows).T.apply(pd.to_numeric, errors="coerce")
    frame["of the gap"] = (frame["scbin"] - frame["mean of others"]) / (frame["ceiling"] - frame["mean of others"])
    print(frame.groupby(level=0, sort=False).mean().round(3).T.to_string(na_rep=""))
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    for name in ("pure noise", "unknown modules") if arguments.calibrate else ():
        runs = (scbin.datasets.perturbseq(**SIMULATED[name], seed=1000 + seed) for seed in range(arguments.calibrate))
        better = sum(judge(adata, batch_key="batch")[0]["verdict"].startswith("Better") for adata in runs)
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
