"""Memory and time of tokenizing, pretraining and embedding as the cells become more: python benchmarks/scale.py folder [--cells 20000 200000].

Cells are made by streaming, in shards of 20,000: molecules drawn from ten types with log-normal gene shares, a plate to every 2,000 cells.
Each stage runs in a process of its own, whose peak memory and time are printed; disk caches are as the stage before left them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.stats import entropy

import scbin
from scbin.io.corpus import write_cells

SHARD, GENES, TYPES, PLATE, STEP, STEPS = 20_000, 5_000, 10, 2_000, 128, 60
STAGES = ("make", "tokenize", "shuffle", "pretrain", "embed")


def make(folder: Path, n: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    shares = rng.lognormal(0, 2, GENES) * rng.lognormal(0, 0.7, (TYPES, GENES))
    bounds = np.cumsum(shares / shares.sum(axis=1, keepdims=True), axis=1)
    for number, start in enumerate(range(0, n, SHARD)):
        cells = np.arange(start, min(start + SHARD, n))
        kind = rng.integers(0, TYPES, len(cells))
        depth = rng.lognormal(7.3, 0.4, len(cells)).astype(int)  # about 1,600 molecules
        row = np.repeat(np.arange(len(cells)), depth)
        gene = np.empty(len(row), dtype=np.int32)
        for k in range(TYPES):
            own = kind[row] == k
            gene[own] = np.searchsorted(bounds[k], rng.random(own.sum())).clip(max=GENES - 1)
        matrix = csr_matrix((np.ones(len(row), dtype=np.float32), (row, gene)), shape=(len(cells), GENES))
        obs = pd.DataFrame(
            {"type": [f"type {k}" for k in kind], "plate": [f"plate {c // PLATE}" for c in cells]},
            index=cells.astype(str),
        )
        var = pd.DataFrame(index=[f"GENE{k}" for k in range(GENES)])
        write_cells(folder / "cells" / f"shard_{number}.h5ad", ad.AnnData(matrix, obs, var))
    return {}


def tokenize(folder: Path, n: int) -> dict[str, float]:
    scbin.pp.tokenize(folder / "cells", out=str(folder / "corpus" / f"{{}}.{FORMAT}"))
    return {}


def shuffle(folder: Path, n: int) -> dict[str, float]:
    """Random rows in the order of an epoch, by cells per CPU second, and how well their steps mix the plates."""
    tokens = scbin.open_tokens(folder / "corpus")
    order = tokens.epoch_order(np.arange(tokens.n_cells), 0, 0)[: 100 * 1024]
    started = time.process_time()
    for k in range(0, 64 * STEP, STEP):  # fills the buffer, once in a run
        tokens.take(order[k : k + STEP])
    filled = time.process_time() - started
    started, wall = time.process_time(), time.perf_counter()
    for k in range(64 * STEP, len(order), STEP):
        tokens.take(order[k : k + STEP])
    seconds, wall = time.process_time() - started, time.perf_counter() - wall
    plates = tokens.obs("plate").astype("category").cat.codes.to_numpy()

    def mixed(rows: np.ndarray) -> float:
        return float(
            np.mean([entropy(np.bincount(plates[rows[k : k + STEP]])) for k in range(0, len(rows) - STEP, STEP)])
        )

    true = np.random.default_rng(0).permutation(tokens.n_cells)[: len(order)]
    found = {
        "fill_cpu_s": filled,
        "rows_per_cpu_second": (len(order) - 64 * STEP) / seconds,
        "rows_per_second": (len(order) - 64 * STEP) / wall,
    }
    return found | {
        "plate_entropy": mixed(order),
        "of_a_true_shuffle": mixed(true),
        "tokens_per_cell": float(tokens.lengths.mean()),
    }


def pretrain(folder: Path, n: int) -> dict[str, float]:
    """So many steps of an epoch; reading the corpus for the start and for what the model remembers is in it."""
    how = scbin.Training(epochs=1, max_steps=STEPS)
    model = scbin.tl.pretrain(folder / "corpus", preset="tiny", training=how, device="cpu", progress=False)
    model.save(folder / "model", overwrite=True)
    step = model.history.dropna(subset="cells_per_second")["cells_per_second"].median()
    return {"steps": model.training["steps"], "cells_per_second": float(step)}


def embed(folder: Path, n: int) -> dict[str, float]:
    scbin.tl.embed(folder / "corpus", folder / "model", device="cpu", progress=False)
    return {}


def stage(name: str, folder: Path, n: int) -> None:
    before, wall = time.process_time(), time.perf_counter()
    found = globals()[name](folder, n)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = {
        "stage": name,
        "cells": n,
        "peak_mb": peak,
        "cpu_s": time.process_time() - before,
        "wall_s": time.perf_counter() - wall,
    }
    print(json.dumps(line | found))


def main() -> None:
    global FORMAT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--format", choices=("h5ad", "zarr"), default="zarr")
    parser.add_argument("--stage", choices=STAGES)
    asked = parser.parse_args()
    FORMAT = asked.format
    if asked.stage:
        stage(asked.stage, asked.folder, asked.cells[0])
        return
    rows = []
    for n in asked.cells:
        here = asked.folder / str(n)
        shutil.rmtree(here / "corpus", ignore_errors=True)
        for name in STAGES:
            if name == "make" and (here / "cells").exists():
                continue
            command = [sys.executable, __file__, str(here), "--cells", str(n), "--stage", name, "--format", FORMAT]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(table.pivot(index="stage", columns="cells", values="peak_mb").round(0).to_string())
    print(table.pivot(index="stage", columns="cells", values="cpu_s").round(1).to_string())
    largest = table[table["cells"] == max(asked.cells)].set_index("stage")
    bytes_ = sum(
        path.stat().st_size for path in (asked.folder / str(max(asked.cells)) / "corpus").rglob("*") if path.is_file()
    )
    times = 100_000_000 / max(asked.cells)
    hours = {name: largest.loc[name, "cpu_s"] * times / 3600 for name in ("tokenize", "embed")}
    hours["shuffled rows"] = 1e8 / largest.loc["shuffle", "rows_per_cpu_second"] / 3600
    hours["one epoch"] = 1e8 / largest.loc["pretrain", "cells_per_second"] / 3600
    print("extrapolated to 100 million cells, not measured: one CPU core, the tiny network")
    for name, value in hours.items():
        print(f"  {name:14} {value:8.1f} h")
    print(f"  {'disk':14} {bytes_ * times / 1e9:8.0f} GB of tokens")


if __name__ == "__main__":
    main()
