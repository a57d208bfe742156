"""In silico perturbation: exact edits beside the naive loop, and the screen beside exact edits, on models trained on real data.

    OMP_NUM_THREADS=1 python benchmarks/perturb.py --data pbmc3k_labelled.h5ad [--seeds 3] [--cells 4] [--rounds 6] [--quick] [--json out.json]

Naive: for each gene of a cell delete its token, pad ten such rows to the longest with a mask, full forward of stock
BertForMaskedLM with its dense head. All sides run in one process in turn, round after round, on the same rows; the first round is
dropped, the median of the others per CPU-second is printed, with the largest difference of the vectors beside it. The screen is
compared with exact deletions of all (or `--pairs`) expressed genes of cells that were not used for training: Spearman per cell,
without a goal (1 - cosine) and towards another cell type, with its own CPU-time and with the share verified exactly.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import scipy
import torch
import transformers
from scipy.stats import spearmanr
from transformers import BertConfig, BertForMaskedLM

import scbin
from scbin.encoding.edits import Edit, GeneRows, edit_rows
from scbin.nn.bert import build_bert
from scbin.nn.device import resolve_precision
from scbin.nn.embedding import hide_phenotypes
from scbin.nn.perturbation import RowEncoder, edited_vectors
from scbin.nn.screen import screen_vectors
from scbin.tl._perturb_measure import Clock, Measure, attention_directions

BATCH = 10
HELD_OUT = 200
logging.getLogger("scbin").setLevel(logging.ERROR)


@dataclass
class Setting:
    """A model and cells that it has not seen."""

    model: scbin.Model
    rows: GeneRows
    labels: np.ndarray

    def encoder(self, precision: str = "float32") -> RowEncoder:
        model = self.model
        return RowEncoder(
            model.bert,
            model.vocabulary,
            model.weights(),
            layer=-1,
            device="cpu",
            precision=precision,  # type: ignore[arg-type]
        )


def trained(data: Path, encoding: str, seed: int, steps: int, n_cells: int) -> Setting:
    adata = ad.read_h5ad(data)
    order = np.random.default_rng(1000 + seed).permutation(adata.n_obs)
    train, test = adata[order[HELD_OUT:]].copy(), adata[order[: min(HELD_OUT, 10 * n_cells)]].copy()
    genes = {} if encoding == "rank" else {"n_genes": adata.n_vars, "mask_var": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scbin.pp.tokenize(train, encoding=encoding, **genes)
        model = scbin.tl.pretrain(
            train, preset="tiny", max_steps=steps, cells_per_step=16, seed=seed, device="cpu", progress=False
        )
        scbin.pp.tokenize(test, like=model)
    rows = GeneRows(hide_phenotypes(test.obsm["X_tokens"], model.vocabulary), model.vocabulary)
    key = next((name for name in ("cell_type", "condition") if name in test.obs), test.obs.columns[0])
    return Setting(model, rows, test.obs[key].astype(str).to_numpy())


# ---- exact ----------------------------------------------------------------------------------------------------------


class Naive:
    """The usual loop in a few lines."""

    def __init__(self, setting: Setting):
        ours = setting.model.bert
        self.bert = BertForMaskedLM(BertConfig(**{**ours.config.to_dict(), "attn_implementation": "sdpa"})).eval()
        self.bert.load_state_dict(ours.state_dict())
        self.weights = setting.model.weights()

    @torch.inference_mode()
    def vectors(self, tokens) -> np.ndarray:
        found = []
        for start in range(0, tokens.shape[0], BATCH):
            rows = [tokens[i] for i in range(start, min(start + BATCH, tokens.shape[0]))]
            longest = max(row.nnz for row in rows)
            ids, positions = np.zeros((2, len(rows), longest), dtype=np.int64)
            for i, row in enumerate(rows):
                ids[i, : row.nnz], positions[i, : row.nnz] = row.data, row.indices
            out = self.bert(
                input_ids=torch.from_numpy(ids),
                position_ids=torch.from_numpy(positions),
                attention_mask=torch.from_numpy(ids > 0).long(),
                output_hidden_states=True,
            )
            weights = torch.from_numpy(np.where(ids > 0, self.weights.of(ids, positions), 0)).float()
            pooled = (out.hidden_states[-1] * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)
            found.append(pooled.numpy())
        return np.concatenate(found)


def _in_order(rows: GeneRows, cells: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Genes of a cell as their tokens stand in it: the order in which `tl.perturb` edits them."""
    return genes[np.argsort(rows.find(cells, genes)[0])]


def exact_beside_naive(setting: Setting, name: str, n_edits: int, rounds: int) -> dict:
    """CPU-seconds per edit of one cell, naive and ours in both precisions."""
    cells, genes = setting.rows.expressed()
    n = setting.rows.n_genes
    cell = int(np.argsort(n)[len(n) // 2])
    mine = _in_order(setting.rows, np.full((cells == cell).sum(), cell), genes[cells == cell])
    middle = max(0, (len(mine) - n_edits) // 2)
    mine = mine[middle : middle + n_edits]  # neighbours, as `tl.perturb` takes them
    tokens = edit_rows(setting.rows, Edit(), np.full(len(mine), cell), mine).tokens
    naive = Naive(setting)

    def ours(precision: str) -> np.ndarray:
        with setting.encoder(precision) as encoder:
            return encoder.vectors(tokens)

    sides = {
        "naive": lambda: naive.vectors(tokens),
        "float32": lambda: ours("float32"),
        "bfloat16": lambda: ours("bfloat16"),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    vectors = {}
    for _ in range(rounds):
        for side, run in sides.items():
            start = time.process_time()
            vectors[side] = run()
            seconds[side].append((time.process_time() - start) / len(mine))
    medians = {side: float(np.median(values[1:])) for side, values in seconds.items()}
    result = {"network": name, "genes": int(n[cell]), "edits": len(mine), "naive_ms": 1e3 * medians["naive"]}
    for side in ("float32", "bfloat16"):
        ratios = np.array(seconds["naive"][1:]) / np.array(seconds[side][1:])
        result[side] = {
            "ratio": medians["naive"] / medians[side],
            "range": [float(ratios.min()), float(ratios.max())],
            "max_difference": float(np.abs(vectors[side] - vectors["naive"]).max()),
        }
        print(
            f"  {name}, {result['genes']:,} genes, {side}: {medians['naive'] / medians[side]:.2f}x naive "
            f"({ratios.min():.2f}-{ratios.max():.2f}), max difference {result[side]['max_difference']:.1e}",
            flush=True,
        )
    return result


def v1_setting(setting: Setting) -> Setting:
    """The same cells in a network of the shape of Geneformer V1, whose weights do not matter for its speed."""
    model = setting.model
    vocabulary = model.vocabulary
    bert = build_bert(vocabulary, "geneformer-v1-6l")
    return Setting(scbin.Model(bert, vocabulary, model.readout), setting.rows, setting.labels)


# ---- screen ---------------------------------------------------------------------------------------------------------


def screen_beside_exact(setting: Setting, n_cells: int, most_pairs: int, seed: int) -> dict:
    """Spearman of the screen to exact deletion in held-out cells, and the ratio of CPU-seconds per cell."""
    rng = np.random.default_rng(seed)
    at, genes = setting.rows.expressed()
    n = setting.rows.n_genes
    chosen = np.argsort(np.abs(n - 1000), kind="stable")[:n_cells]
    others = ~np.isin(at, chosen)
    with setting.encoder() as encoder:
        originals = encoder.vectors(setting.rows.tokens)
        kinds, numbers = np.unique(setting.labels, return_counts=True)
        state = originals[setting.labels == kinds[numbers.argmax()]].mean(0, keepdims=True)
        goal = Measure(("shift",), originals, state, originals.mean(0), False, Clock())
        bare = Measure(("shift",), originals, None, None, False, Clock())
        # from other cells than those scored; once for all cells of a data set
        axes = attention_directions(encoder, setting.rows, Edit(), at[others], genes[others], originals, seed=seed)
        ways = {"no goal": (bare, axes), "goal": (goal, goal.state_directions)}
        rho: dict[str, list[float]] = {way: [] for way in ways}
        ratios: dict[str, list[float]] = {way: [] for way in ways}
        for cell in chosen:
            cells = np.full((at == cell).sum(), cell)
            mine = _in_order(setting.rows, cells, genes[at == cell])
            drawn = np.sort(rng.choice(len(mine), min(most_pairs, len(mine)), replace=False))
            start = time.process_time()
            parts = list(edited_vectors(encoder, setting.rows, Edit(), cells[drawn], mine[drawn], originals))
            slow = (time.process_time() - start) * len(mine) / len(drawn)
            edited = np.concatenate([part.edited for part in parts])
            for way, (measure, directions) in ways.items():
                fast = []
                for _ in range(3):
                    start = time.process_time()
                    screened = np.empty((len(mine), edited.shape[1]))
                    for pairs, _, after, _ in screen_vectors(encoder, setting.rows, Edit(), cells, mine, directions):
                        screened[pairs] = after
                    fast.append(time.process_time() - start)
                before = originals[cells[drawn]]
                truth, guess = (measure.of(before, z)[:, 0] for z in (edited, screened[drawn]))
                rho[way].append(float(spearmanr(truth, guess).statistic))
                ratios[way].append(slow / min(fast))
    result = {"encoding": setting.model.vocabulary.encoding, "genes": n[chosen].tolist()}
    for way in ways:
        speed = float(np.median(ratios[way]))
        result[way] = {"spearman": rho[way], "speed": ratios[way]}
        print(
            f"  {result['encoding']}, {way}, {n[chosen].mean():.0f} genes: Spearman {np.mean(rho[way]):.4f} (worst cell "
            f"{min(rho[way]):.4f}), {speed:.0f}x exact; {1 / (1 / speed + 0.11):.1f}x with the top 10 % and 1 % drawn verified",
            flush=True,
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="h5ad of counts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=10**6, help="most exact edits a cell; all by default")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--encodings", nargs="+", default=["bins", "rank"])
    parser.add_argument("--quick", action="store_true", help="one seed, few cells and edits")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.cells, arguments.pairs, arguments.rounds = 1, 2, 100, 3
        arguments.steps = min(arguments.steps, 60)
    torch.set_num_threads(1)
    about = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scipy": scipy.__version__,
        "threads": 1,
    }
    about["bfloat16 units"] = resolve_precision("auto", torch.device("cpu"), build_config()) == torch.bfloat16
    print(about)
    found: dict[str, list] = {"exact": [], "screen": []}
    for seed in range(arguments.seeds):
        for encoding in arguments.encodings:
            setting = trained(arguments.data, encoding, seed, arguments.steps, arguments.cells)
            print(
                f"seed {seed}, {encoding}: {setting.model.training['steps']} steps on {arguments.data.stem}", flush=True
            )
            found["screen"].append(screen_beside_exact(setting, arguments.cells, arguments.pairs, seed))
            if seed == 0:
                found["exact"].append(exact_beside_naive(setting, f"{encoding}, tiny", 40, arguments.rounds))
                found["exact"].append(
                    exact_beside_naive(v1_setting(setting), f"{encoding}, V1 shape", 20, arguments.rounds)
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": about, **found}, indent=1))


def build_config():
    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.bert import bert_config

    return bert_config(Vocabulary.build("rank", ["A"]), "geneformer-v1-6l")


if __name__ == "__main__":
    main()
