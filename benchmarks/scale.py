"""Memory, time and disk of tokenizing, pretraining and embedding as the cells become more: python benchmarks/scale.py folder [--cells 20000 200000].

Cells are made by streaming, in shards of 20,000, a plate to every 2,000 cells: molecules drawn from the expression and the depths of the cells of each type in
`--like cells.h5ad cell_type`, or from ten types with log-normal gene shares. Each stage runs in a process of its own, whose peak
memory and CPU time are printed, and what the time went to; disk caches are as the stage before left them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.stats import entropy

import scbin
from scbin.io.corpus import write_cells

SHARD, GENES, TYPES, PLATE, STEP = 20_000, 5_000, 10, 2_000, 128
STAGES = ("make", "tokenize", "shuffle", "pretrain", "embed")
WORK = {  # what a function is part of, by file and name; the innermost counts
    **dict.fromkeys(("_adata.iter_blocks", "corpus.open_cells", "corpus.open_tokens", "corpus.take"), "reading"),
    **dict.fromkeys(("corpus.write_shard", "corpus.write_beside", "commit.committed", "model.save"), "writing"),
    **dict.fromkeys(("_files.vocabulary_of", "start.start"), "vocabulary, start"),
    **dict.fromkeys(("_plan.encode", "encoding.encode", "pretraining.prepare"), "encoding, masking"),
    **dict.fromkeys(("loop.train", "run.embed"), "network"),
}


def make(folder: Path, n: int, asked: argparse.Namespace) -> dict[str, float]:
    rng = np.random.default_rng(0)
    if asked.like:
        like = ad.read_h5ad(asked.like[0])
        like = like[like.obs[asked.like[1]].notna()]
        depths, groups = np.asarray(like.X.sum(axis=1)).ravel(), pd.factorize(like.obs[asked.like[1]])[0]
        shares = np.stack([np.asarray(like.X[groups == k].sum(axis=0)).ravel() for k in range(groups.max() + 1)])
    else:
        depths, groups = rng.lognormal(7.3, 0.4, 10_000), rng.integers(0, TYPES, 10_000)  # about 1,600 molecules
        shares = rng.lognormal(0, 2, GENES) * rng.lognormal(0, 0.7, (TYPES, GENES))
    shares = shares.astype(np.float64) / shares.sum(axis=1, keepdims=True, dtype=np.float64)
    names = np.arange(shares.shape[1], dtype=np.int32)
    for number, start in enumerate(range(0, n, SHARD)):
        path, rng = folder / "cells" / f"shard_{number}.h5ad", np.random.default_rng(number)
        if path.exists():  # of a call that was interrupted
            continue
        cells = np.arange(start, min(start + SHARD, n))
        model = rng.integers(0, len(depths), len(cells))  # the cell whose type and depth it has
        kind, depth, row, gene = groups[model], depths[model].astype(int), [], []
        for k in range(len(shares)):
            own = np.flatnonzero(kind == k).astype(np.int32)
            drawn = np.repeat(own, depth[own])  # a cell as often as it has molecules, on average
            row.append(drawn[rng.integers(0, len(drawn), len(drawn), dtype=np.int32)])
            gene.append(np.repeat(names, rng.multinomial(len(row[-1]), shares[k])))
        place = np.concatenate(row), np.concatenate(gene)
        matrix = csr_matrix((np.ones(len(place[0]), np.float32), place), shape=(len(cells), len(names)))
        obs = {"type": [f"type {k}" for k in kind], "plate": [f"plate {c // PLATE}" for c in cells]}
        adata = ad.AnnData(
            matrix, pd.DataFrame(obs, index=cells.astype(str)), pd.DataFrame(index=[f"GENE{k}" for k in names])
        )
        write_cells(path, adata)
    return {}


def tokenize(folder: Path, n: int, asked: argparse.Namespace) -> dict[str, float]:
    scbin.pp.tokenize(folder / "cells", out=str(folder / "corpus" / f"{{}}.{asked.format}"))
    return {"disk_gb": sum(f.stat().st_size for f in (folder / "corpus").rglob("*") if f.is_file()) / 1e9}


def shuffle(folder: Path, n: int, asked: argparse.Namespace) -> dict[str, float]:
    """Random rows in the order of an epoch, by cells per CPU second, and how well their steps mix the plates."""
    tokens = scbin.open_tokens(folder / "corpus")
    order = tokens.epoch_order(np.arange(tokens.n_cells), 0, 0)[: 100 * 1024]
    for k in range(0, 64 * STEP, STEP):  # fills the buffer, once in a run
        tokens.take(order[k : k + STEP])
    started = time.process_time()
    for k in range(64 * STEP, len(order), STEP):
        tokens.take(order[k : k + STEP])
    seconds = time.process_time() - started
    plates = tokens.obs("plate").astype("category").cat.codes.to_numpy()

    def mixed(rows: np.ndarray) -> float:
        steps = [plates[rows[k : k + STEP]] for k in range(0, len(rows) - STEP, STEP)]
        return float(np.mean([entropy(np.bincount(step)) for step in steps]))

    true = np.random.default_rng(0).permutation(tokens.n_cells)[: len(order)]
    found = {"rows_per_cpu_second": (len(order) - 64 * STEP) / seconds, "tokens_per_cell": float(tokens.lengths.mean())}
    return found | {"plate_entropy": mixed(order), "of_a_true_shuffle": mixed(true)}


def pretrain(folder: Path, n: int, asked: argparse.Namespace) -> dict[str, float]:
    """So many steps of an epoch, or the default training; reading for the start and for what the model remembers is in it."""
    times: list[float] = []  # CPU seconds when a step was done
    how = scbin.Training(callbacks=(lambda row: times.append(time.process_time()),))
    how = replace(how, epochs=1, max_steps=asked.steps) if asked.steps else how
    preset = "tiny" if asked.steps else "auto"
    model = scbin.tl.pretrain(folder / "corpus", preset=preset, training=how, device="cpu", progress=False)
    model.save(folder / "model", overwrite=True)
    return {"steps": model.training["steps"], "cells_per_second": STEP / float(np.median(np.diff(times)))}


def embed(folder: Path, n: int, asked: argparse.Namespace) -> dict[str, float]:
    scbin.tl.embed(folder / "corpus", folder / "model", device="cpu", progress=False)
    return {}


def watch(spent: Counter[str], stop: threading.Event) -> None:
    """Add up the CPU time of every thread by what it is at, looked up fifty times a second (Linux)."""
    before: dict[int, int] = {}
    while not stop.wait(0.02):
        frames, kind = sys._current_frames(), None
        for thread in [
            each for each in threading.enumerate() if each is not threading.current_thread()
        ]:  # the main first
            try:
                now = int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
            except OSError:
                continue
            frame, at = frames.get(thread.ident), None
            while frame is not None and at is None:
                code, frame = frame.f_code, frame.f_back
                at = WORK.get(f"{Path(code.co_filename).stem}.{code.co_name}")
            kind = kind or at or "other"
            used, before[thread.ident] = now - before.get(thread.ident, 0 if before else now), now
            spent[at or (kind if thread is threading.main_thread() or kind == "writing" else "reading")] += used / 1e9


def stage(name: str, folder: Path, n: int, asked: argparse.Namespace) -> None:
    spent, stop = Counter[str](), threading.Event()
    watching = threading.Thread(target=watch, args=(spent, stop))
    watching.start()
    before, wall = time.process_time(), time.perf_counter()
    found = globals()[name](folder, n, asked)
    line = {"stage": name, "cells": n, "cpu_s": time.process_time() - before, "wall_s": time.perf_counter() - wall}
    stop.set()
    watching.join()
    line["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(line | found | {f"{kind} %": 100 * s / sum(spent.values()) for kind, s in spent.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--format", choices=("h5ad", "zarr"), default="zarr")
    parser.add_argument(
        "--like", nargs=2, help="an h5ad file with counts, and the column of obs with the types of its cells"
    )
    parser.add_argument(
        "--steps", type=int, default=60, help="of training with the tiny network; 0: the default training"
    )
    parser.add_argument("--stage", choices=STAGES)
    asked = parser.parse_args()
    if asked.stage:
        stage(asked.stage, asked.folder, asked.cells[0], asked)
        return
    rows, same = [], [arg for arg in sys.argv[1:] if arg != str(asked.folder)]
    for n in asked.cells:
        here = asked.folder / str(n)
        shutil.rmtree(here / "corpus", ignore_errors=True)
        for name in STAGES:
            command = [sys.executable, __file__, str(here), *same, "--cells", str(n), "--stage", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    for value in ("peak_mb", "cpu_s"):
        print(f"{value}\n{table.pivot(index='stage', columns='cells', values=value).round(1).to_string()}")
    largest = table[table["cells"] == max(asked.cells)].set_index("stage")
    print(largest.filter(like="%").round().fillna(0).to_string())
    times = 100_000_000 / max(asked.cells)
    hours = {name: largest.loc[name, "cpu_s"] * times / 3600 for name in ("tokenize", "embed")}
    hours["shuffled rows"] = 1e8 / largest.loc["shuffle", "rows_per_cpu_second"] / 3600
    hours["one epoch"] = 1e8 / largest.loc["pretrain", "cells_per_second"] / 3600
    print("extrapolated to 100 million cells, not measured: one CPU core")
    for name, value in hours.items():
        print(f"  {name:14} {value:8.1f} h")
    print(f"  {'disk':14} {largest.loc['tokenize', 'disk_gb'] * times:8.0f} GB of tokens")


if __name__ == "__main__":
    main()
