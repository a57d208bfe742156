"""Genes found where there is nothing to find: perturbation towards a goal under permuted labels, end to end.

    python benchmarks/fdr.py [folder of data sets] [--seeds 5] [--cells 160] [--genes 250]

A small model is pretrained on some cells. Their labels are random: two states of equal size, drawn over cells, or, with donors as
replicates, for each donor by swapping its two halves. Every expressed gene is deleted in the cells of one state, exactly and by
the screen, and judged as the verb does (states permuted) and against genes of the same expression. A run is one labelling; a false
discovery is a run in which any gene has an FDR below .05. Then the true labels of stimulated cells: where do the genes
that interferon induces come, when each is deleted on the way to the control cells?
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import stats

import scbin

INTERFERON = (
    "ISG15 ISG20 IFI6 IFI16 IFI27 IFI35 IFI44 IFI44L IFIT1 IFIT2 IFIT3 IFIT5 IFITM1 IFITM2 IFITM3 MX1 MX2 OAS1 OAS2 OAS3 OASL LY6E "
    "IRF7 IRF9 STAT1 STAT2 XAF1 RSAD2 HERC5 HERC6 CXCL10 CXCL11 CCL8 TNFSF10 EIF2AK2 BST2 EPSTI1 PLSCR1 UBE2L6 SAMD9 SAMD9L "
    "CMPK2 DDX58 IFIH1 PARP9 PARP14 TRIM22 USP18 SP100 GBP1 GBP4 NT5C3A SAT1 APOBEC3A IDO1"
).split()


def sample(path: Path, n_cells: int, n_genes: int, keep: dict[str, str] | None = None) -> ad.AnnData:
    """Return some cells of a file, tokenized."""
    adata = ad.read_h5ad(path)
    for column, value in (keep or {}).items():
        adata = adata[adata.obs[column] != value]
    rows = np.random.default_rng(0).permutation(adata.n_obs)[:n_cells]
    adata = adata[np.sort(rows)].copy()
    scbin.pp.tokenize(adata, n_genes=n_genes)
    return adata


def pretrained(adata: ad.AnnData, steps: int) -> scbin.Model:
    """Return a small model of these cells."""
    return scbin.tl.pretrain(adata, preset="tiny", max_steps=steps, device="cpu", progress=False)


def random_states(donors: np.ndarray, by_donor: bool, seed: int) -> np.ndarray:
    """Return a random label, "a" or "b", of each cell; by donor its two halves go together."""
    rng = np.random.default_rng(seed)
    if not by_donor:
        return np.array(["a", "b"])[rng.permutation(len(donors)) % 2]
    halves = np.zeros(len(donors), dtype=np.int64)
    for donor in np.unique(donors):
        rows = np.flatnonzero(donors == donor)
        halves[rows] = (np.random.default_rng(7).permutation(len(rows)) + rng.integers(2)) % 2
    return np.array(["a", "b"])[halves]


def run(adata: ad.AnnData, model: scbin.Model, by_donor: bool, method: str, seed: int) -> list[dict[str, object]]:
    """Return what both ways to judge find under one random labelling."""
    adata.obs["random"] = random_states(adata.obs["donor"].to_numpy(), by_donor, seed)
    statistics = {"donor_key": "donor" if by_donor else None, "seed": seed}
    states = {"key": "random", "start": "a", "goal": "b"}
    scbin.tl.perturb(adata, model, states=states, method=method, statistics=statistics, device="cpu", progress=False)
    scbin.tl.perturb_statistics(adata, statistics=statistics)
    rows = []
    for judged, key in (("permuted states", "scbin_perturb"), ("genes alike", "scbin_perturb_matched")):
        table = adata.uns[key]["table"]
        p = table["p_value"].dropna()
        row = {"judged by": judged, "genes": len(p), "found": int((table["fdr"] < 0.05).sum())}
        rows.append(row | {"p < .05": (p < 0.05).mean(), "smallest fdr": table["fdr"].min()})
    return rows


def main() -> None:
    """Print the share of runs with a false discovery, and the place of the interferon genes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("folder", type=Path, nargs="?", default=beside, help="of data sets (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="labellings of each kind (default: %(default)s)")
    parser.add_argument("--cells", type=int, default=160, help="cells of a data set (default: %(default)s)")
    parser.add_argument("--genes", type=int, default=250, help="genes that tokens read (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of pretraining (default: %(default)s)")
    arguments = parser.parse_args()
    rows = []
    for name in ("pbmc3k_labelled", "kang_control_8684"):
        adata = sample(arguments.folder / f"{name}.h5ad", arguments.cells, arguments.genes)
        # eight donors where the file has one
        split = np.random.default_rng(1).integers(0, 8, adata.n_obs).astype(str)
        adata.obs["donor"] = split if adata.obs["donor_id"].nunique() == 1 else adata.obs["donor_id"].astype(str)
        model = pretrained(adata, arguments.steps)
        for by_donor, method, seed in itertools.product((False, True), ("exact", "screen"), range(arguments.seeds)):
            start = time.process_time()
            for row in run(adata, model, by_donor, method, seed + 1000 * (method == "screen")):
                rows.append({"data": name, "replicates": "donors" if by_donor else "cells", "method": method, **row})
            print(f"{rows[-1]['data']}, {rows[-1]['replicates']}, {method}, {seed}: {[r['found'] for r in rows[-2:]]}"
                  f" found, {time.process_time() - start:.0f} CPU-s", flush=True)  # fmt: skip
    pd.set_option("display.width", 200)
    table = pd.DataFrame(rows).assign(any=lambda t: t["found"] > 0)
    by, values = ["judged by", "data", "replicates", "method"], ["any", "genes", "p < .05", "smallest fdr"]
    print(table.groupby(by)[values].mean().round(3).to_string())
    print(
        "\nshare of runs with a finding:\n",
        table.groupby("judged by")["any"].agg(["size", "mean"]).round(3).to_string(),
    )

    adata = sample(arguments.folder / "kang_ifnb_2k.h5ad", 5 * arguments.cells, 2 * arguments.genes)
    model = pretrained(adata, arguments.steps)
    states = {"key": "condition", "start": "stimulated", "goal": "control"}
    states["start"] = next(value for value in adata.obs["condition"].unique() if value != "control")
    for method in ("exact", "screen"):
        scbin.tl.perturb(adata, model, states=states, method=method, device="cpu", progress=False)
        scbin.tl.perturb_statistics(adata)
        table = scbin.get.perturb_df(adata, min_cells=10)
        alike = scbin.get.perturb_df(adata, key="scbin_perturb_matched").set_index("gene")["fdr"]
        known = table["gene"].isin(INTERFERON)
        auroc = stats.mannwhitneyu(table["alignment"][known], table["alignment"][~known]).statistic
        auroc /= known.sum() * (~known).sum()
        print(f"\n{states['start']} to control, {method}, {len(table)} genes by alignment: the {known.sum()} that interferon induces "
              f"are at {(np.flatnonzero(known) + 1).tolist()}, AUROC {auroc:.3f}; first 20: {', '.join(table['gene'][:20])}")  # fmt: skip
        for name, fdr in (("permuted states", table["fdr"]), ("genes alike", table["gene"].map(alike))):
            print(f"FDR below .05 by {name}: {(fdr < 0.05).sum()}, {(fdr < 0.05)[known].sum()} of {known.sum()}")


if __name__ == "__main__":
    main()
