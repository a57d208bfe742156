"""Annotation with labels: macro-F1 on test cells of the splits of annotate.py, fine-tuned scbin beside methods trained on the same cells."""

from __future__ import annotations

import time
from argparse import Namespace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import annotate
import numpy as np
import pandas as pd
from quality import PAIR, read
from quality_methods import log1p, variable, whole

if TYPE_CHECKING:
    import anndata as ad


def main(arguments: Namespace) -> None:
    """Run every set and seed, and write `<out>_annotate.csv` after each."""
    table = arguments.out.with_name(f"{arguments.out.name}_annotate.csv")
    rows = pd.read_csv(table).to_dict("records") if table.is_file() else []
    for seed in range(0 if arguments.report else arguments.seeds):
        for name, labelled in arguments.chosen.items():
            if name == PAIR:
                continue
            adata = read(name, labelled, arguments.folder)
            labels = adata.obs[labelled.label].astype(str)
            frequent = labels.map(labels.value_counts()).to_numpy() >= 5
            adata = adata[frequent & ~labels.isin(["unknown", "nan", ""]).to_numpy()].copy()
            by_donor = labelled.batch if labelled.batch == "donor_id" else None
            task = annotate.Task(labelled.label, split_key=by_donor)
            for row in _run(
                adata,
                task,
                seed,
                arguments,
                {row["method"] for row in rows if (row["set"], row["seed"]) == (name, seed)},
            ):
                rows.append({"set": name, "seed": seed, **row})
                pd.DataFrame(rows).to_csv(table, index=False)
    if rows:
        text = _markdown(pd.DataFrame(rows))
        table.with_suffix(".md").write_text(text)
        print(text)


def _run(adata: ad.AnnData, task: annotate.Task, seed: int, arguments: Namespace, done: set[str]) -> list[dict]:
    wanted = lambda method: method not in done and (not arguments.methods or method in arguments.methods)
    rows = []
    if wanted("scbin"):
        rows += annotate._run(
            adata.copy(),
            task,
            seed,
            Namespace(quick=arguments.quick, genes=2000, pretrain=True, max_steps=arguments.max_steps, device="auto"),
        )
    for method, package, learn in (("CellTypist", "celltypist", _celltypist), ("scANVI", "scvi", _scanvi)):
        if find_spec(package) and wanted(method) and (method != "scANVI" or whole(adata)):
            train, test = _split(adata, task, seed)
            start = time.perf_counter()
            given = learn(train, test, task.target, seed)
            score = _macro_f1(test.obs[task.target].astype(str).to_numpy(), given)
            rows.append({"method": method, "macro_f1": score, "minutes": (time.perf_counter() - start) / 60})
            print(method, seed, f"{score:.3f}", flush=True)
    return rows


def _split(adata: ad.AnnData, task: annotate.Task, seed: int) -> tuple[ad.AnnData, ad.AnnData]:
    """Return the training and test cells that annotate.py takes with this seed."""
    annotate.split(adata, task, seed)
    test = (adata.obs["scbin_split"].astype(str) == "test").to_numpy()
    return adata[~test].copy(), adata[test].copy()


def _macro_f1(truth: np.ndarray, given: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(truth, given, labels=np.unique(truth), average="macro", zero_division=0))


def _celltypist(train: ad.AnnData, test: ad.AnnData, target: str, seed: int) -> np.ndarray:
    import celltypist

    values = log1p(train)
    model = celltypist.train(values, labels=values.obs[target].astype(str).to_numpy(), n_jobs=1, check_expression=False)
    return celltypist.annotate(log1p(test), model=model).predicted_labels["predicted_labels"].astype(str).to_numpy()


def _scanvi(train: ad.AnnData, test: ad.AnnData, target: str, seed: int) -> np.ndarray:
    import scvi

    scvi.settings.seed = seed
    genes = variable(log1p(train))
    train, test = train[:, genes].copy(), test[:, genes].copy()
    train.obs["label"], test.obs["label"] = train.obs[target].astype(str), "none"
    scvi.model.SCVI.setup_anndata(train)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}
    start = scvi.model.SCVI(train)
    start.train(**quiet)
    model = scvi.model.SCANVI.from_scvi_model(start, unlabeled_category="none", labels_key="label")
    model.train(**quiet)
    return np.asarray(model.predict(test))


def _markdown(rows: pd.DataFrame) -> str:
    methods = list(dict.fromkeys(rows["method"]))
    lines = [f"| macro-F1 | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    means = rows.pivot_table(index="set", columns="method", values="macro_f1", sort=False)[methods]
    spread = rows.pivot_table(
        index="set", columns="method", values="macro_f1", sort=False, aggfunc=lambda x: x.std(ddof=0)
    )
    for name in means.index:
        cells = [
            "-" if np.isnan(means.loc[name, m]) else f"{means.loc[name, m]:.3f} ± {spread.loc[name, m]:.3f}"
            for m in methods
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    common = means.dropna()
    lines.append(f"| mean of {len(common)} sets | {' | '.join(f'{value:.3f}' for value in common.mean())} |")
    return "\n".join(lines) + "\n"
