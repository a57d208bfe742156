"""Runs that cannot live inside pytest: processes killed at any instant, and two processes under torchrun."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from tqdm import tqdm

from scbin._adata import write_tokens
from scbin.io import corpus

HERE = Path(__file__).parent


def toy():
    spec = importlib.util.spec_from_file_location("toy", HERE / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module.Toy()


def fork(small, directory):
    """Start a run in a forked child: torch is loaded already."""
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        small.run(save_dir=directory, checkpoint_every=1, epochs=2, patience=3)
    finally:
        os._exit(0)


def final_bytes(directory):
    newest = max(Path(directory).glob("step-*"))
    return newest.name, [(newest / name).read_bytes() for name in ("state.safetensors", "state.json")]


def in_files(tokens, folder):
    """Write tokens into three files, and open these in blocks of four rows."""
    corpus.ROWS, corpus.WINDOW = 4, 5
    for k, rows in enumerate(np.array_split(np.arange(tokens.n_cells), 3)):
        adata = AnnData(obs=pd.DataFrame(index=rows.astype(str)))
        write_tokens(adata, tokens.take(rows), tokens.vocabulary, pd.Categorical(["ok"] * len(rows)), "X_tokens")
        corpus.write_cells(folder / f"shard_{k}.h5ad", adata)
    return corpus.open_tokens(folder)


def kill(n_kills, directory, source="memory"):
    """SIGKILL a run at random instants, again and again until it is through; count how often it ends in the same bits.

    Instants are drawn from a span that follows the runs' own progress: a busy machine, on which nothing was saved yet when the
    signal came, gets more time, and a quiet one less.
    """
    # tqdm's own lock is shared by all forks: a child killed while it holds it would stop all later ones for ever
    tqdm.set_lock(threading.RLock())
    small, rng = toy(), random.Random(0)
    small.run(max_steps=1)  # compile before the clock runs
    small.tokens = small.tokens if source == "memory" else in_files(small.tokens, Path(directory) / "corpus")
    start = time.perf_counter()
    os.waitpid(fork(small, f"{directory}/undisturbed"), 0)
    shortest = span = (time.perf_counter() - start) / 2  # half a run, so that most are killed more than once
    expected = final_bytes(f"{directory}/undisturbed")
    kills = inside = idle = runs = same = 0
    while kills < n_kills:
        work, steps = Path(f"{directory}/{runs}"), set()
        while True:
            child = fork(small, work)
            time.sleep(rng.uniform(0.02, span))
            done, _ = os.waitpid(child, os.WNOHANG)
            if done:
                span = max(shortest, 0.8 * span)
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            inside += any(work.glob(".tmp-*"))
            before, steps = steps, {path.name for path in work.glob("step-*")}
            idle += steps == before
            span = max(shortest, 0.95 * span) if steps != before else span * 1.1
            if span > 100 * shortest:
                raise RuntimeError(f"run {runs} saves nothing however long it may run: {sorted(steps)}")
        runs += 1
        same += final_bytes(work) == expected
        shutil.rmtree(work)
    counts = {"kills": kills, "inside_a_save": inside, "without_progress": idle, "runs": runs, "same_bits": same}
    print(json.dumps(counts))


def distributed(out, n_steps, cells_per_step, save_dir, stop_after="0", timeout="10"):
    """One process of a run; the first writes what was learned, or asks all to stop after some steps."""

    def stop(row):
        if row["step"] == int(stop_after) > 0:
            os.kill(os.getpid(), signal.SIGTERM)

    small = toy()
    network = small.bert() if save_dir == "-" else small.network()
    network, history = small.run(
        network, epochs=100, max_steps=int(n_steps), cells_per_step=int(cells_per_step), learning_rate=1e-3,
        save_dir=None if save_dir == "-" else save_dir, checkpoint_every=1, callbacks=[stop], timeout=float(timeout),
    )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        weights = torch.cat([p.detach().reshape(-1) for p in network.parameters()]).numpy()
        np.savez(out, weights=weights, losses=history.filter(regex="^(loss|validation)").to_numpy())


if __name__ == "__main__":
    {"kill": lambda n, *rest: kill(int(n), *rest), "distributed": distributed}[sys.argv[1]](*sys.argv[2:])
