"""Macro-F1 of cell types by scbin and by simple methods, on the same splits; with --age, R2 of donors' ages.

    python benchmarks/annotate.py ../shared/data [--sets pbmc3k_labelled ...] [--seeds 5] [--age] [--max-steps 0] [--out annotate]

Every split is made by `scbin.tl.split`: a fifth of the cells, drawn anew by each seed; where the set has donors, the donors of one of
five folds, another by each seed, so that five seeds test every donor once. Everything is learned from training cells alone: genes, bins, pretraining, the head, the simple methods' genes and components; test cells are tokenized with the model's
vocabulary and predicted. Written to `<out>.csv` (a row per set, seed and method) after every split, so that an interrupted run
goes on where it stopped, and to `<out>.md` (means with their spread over the seeds).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

N_FOLDS = 5
METHODS = {"class": "macro_f1", "number": "r2"}


@dataclass(frozen=True)
class Task:
    """What is predicted on a set, and what its cells are divided by."""

    target: str
    kind: str = "class"
    split_key: str | None = None
    only: tuple[str, str] | None = None  # column of obs, and the value its cells must have


TASKS = {
    "pbmc3k_labelled": Task("cell_type"),
    "kang_ifnb_2k": Task("cell_type", only=("cell_type_source", "published")),
    "kang_control_6donor_1287g": Task("cell_type", split_key="donor_id"),
    "tcell_wu2020_200": Task("cell_type", split_key="donor_id"),
}
AGE = {"onek1k_sex_age_dev": Task("age", "number", "donor_id")}


def main() -> None:
    arguments = _arguments()
    tasks = AGE if arguments.age else TASKS
    names = list(tasks) if arguments.sets is None else arguments.sets
    table = arguments.out.with_suffix(".csv")
    rows = pd.read_csv(table).to_dict("records") if table.is_file() and not arguments.fresh else []
    for name in names:
        for seed in range(arguments.seeds):
            if any(row["set"] == name and row["seed"] == seed for row in rows):
                continue
            adata = _read(arguments.folder / f"{name}.h5ad", tasks[name])
            rows += [{"set": name, "seed": seed, **row} for row in _run(adata, tasks[name], seed, arguments)]
            pd.DataFrame(rows).to_csv(table, index=False)
            arguments.out.with_suffix(".md").write_text(_markdown(pd.DataFrame(rows), arguments))
    print(_markdown(pd.DataFrame(rows), arguments))


def _read(path: Path, task: Task) -> ad.AnnData:
    adata = ad.read_h5ad(path)
    if task.only is not None:
        adata = adata[(adata.obs[task.only[0]] == task.only[1]).to_numpy()].copy()
    if task.kind == "class":
        known = ~adata.obs[task.target].astype(str).isin(["unknown", "nan", ""]).to_numpy()
        adata = adata[known].copy()
    return adata


def _run(adata: ad.AnnData, task: Task, seed: int, arguments: argparse.Namespace) -> list[dict]:
    """One split: pretrain and fine-tune on its training cells, predict its test cells, score all methods."""
    import scbin

    start, cpu = time.perf_counter(), time.process_time()
    if arguments.quick:
        adata = adata[np.random.default_rng(0).permutation(adata.n_obs)[:600]].copy()
    split(adata, task, seed)
    side = adata.obs["scbin_split"].astype(str).to_numpy()
    train = adata[side != "test"].copy()
    scbin.pp.tokenize(train, mask_var=None, n_genes=arguments.genes)
    model = "new"
    if arguments.pretrain:
        model = scbin.tl.pretrain(
            train, seed=seed, max_steps=20 if arguments.quick else None, progress=False, device=arguments.device
        )
    steps = {"max_steps": 10 if arguments.quick else arguments.max_steps}
    tuned = scbin.tl.finetune(
        train, model, target=task.target, kind=task.kind, split_key="scbin_split", seed=seed, progress=False,
        device=arguments.device, **steps,
    )  # fmt: skip
    scbin.pp.tokenize(adata, like=tuned)
    learned = time.perf_counter() - start
    scores = scbin.tl.evaluate(adata, tuned, target=task.target, seed=seed, progress=False, device=arguments.device)
    minutes, cpu_minutes = (time.perf_counter() - start) / 60, (time.process_time() - cpu) / 60
    how = tuned.training.get("finetune", {})
    print(f"{task.target}, seed {seed}: {minutes:.1f} min ({learned / 60:.1f} to learn)")
    print(scores.drop(columns="scored_on").round(3).to_string(), flush=True)
    extra = {"minutes": minutes, "cpu_minutes": cpu_minutes, "start_kept": how.get("start_kept")}
    return [
        {"method": method, **scores.loc[method].to_dict(), **(extra if method == "scbin" else {})}
        for method in scores.index
    ]


def split(adata: ad.AnnData, task: Task, seed: int) -> None:
    """Write which cells are test cells into `obs["scbin_split"]`."""
    import scbin

    counts = adata.obs[task.target].astype(str).value_counts()
    stratify = task.target if task.kind == "class" and (task.split_key or counts.min() > 1) else None
    if task.split_key is None:
        scbin.tl.split(adata, target=stratify, test_share=1 / N_FOLDS, seed=seed)
    else:
        n_folds = min(N_FOLDS, adata.obs[task.split_key].nunique())
        fold, again = seed % n_folds, seed // n_folds
        scbin.tl.split(adata, target=stratify, split_key=task.split_key, n_folds=n_folds, fold=fold, seed=again)


def _markdown(rows: pd.DataFrame, arguments: argparse.Namespace) -> str:
    """Return one table: sets by methods, mean and standard deviation over the seeds."""
    import torch

    import scbin

    score = METHODS["number" if arguments.age else "class"]
    methods = list(dict.fromkeys(rows["method"]))
    lines = [f"| {'R2' if score == 'r2' else 'macro-F1'} | {' | '.join(methods)} | minutes a split |"]
    lines.append("|---" * (len(methods) + 2) + "|")
    for name, part in rows.groupby("set", sort=False):
        cells = []
        for method in methods:
            values = part.loc[part["method"] == method, score]
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=0):.3f}")
        minutes = part.loc[part["method"] == "scbin", "minutes"].mean()
        lines.append(f"| {name}, {part['seed'].nunique()} seeds | {' | '.join(cells)} | {minutes:.1f} |")
    facts = f"scbin {scbin.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return "\n".join([*lines, "", f"{facts}, {torch.get_num_threads()} threads of {os.cpu_count()} cores."])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the h5ad files")
    parser.add_argument("--sets", nargs="+", help="which sets (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="number of splits (default: %(default)s)")
    parser.add_argument("--age", action="store_true", help="predict ages instead of cell types")
    parser.add_argument(
        "--genes", type=int, default=2000, help="variable genes of scbin's vocabulary (default: %(default)s)"
    )
    parser.add_argument("--max-steps", type=int, help="steps of fine-tuning; 0: the regression it starts from, alone")
    parser.add_argument("--no-pretrain", dest="pretrain", action="store_false", help="fine-tune from a new network")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="600 cells and a few steps: does it run?")
    parser.add_argument("--fresh", action="store_true", help="begin anew where results are there already")
    parser.add_argument("--out", type=Path, default=Path("annotate"), help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    known = AGE if arguments.age else TASKS
    for name in arguments.sets or []:
        if name not in known:
            parser.error(f"there is no set {name!r}; choose from {', '.join(known)}")
    return arguments


if __name__ == "__main__":
    # one set is divided by cells on purpose, although its donors are known
    warnings.filterwarnings("ignore", message=r"\[F22\]")
    main()
