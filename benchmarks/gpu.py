"""Fill the docs' table of GPU figures: training, embedding and edits per second, utilisation and memory.

    python benchmarks/gpu.py [tiny geneformer-v1-6l geneformer-v2-104m] [--device cuda] [--steps 50] [--markdown gpu.md]

Cells have the lengths of Geneformer's corpus, 2,048 tokens at most, and the vocabulary of V1. Each figure is the median of ten
stretches of steps after ten steps to warm up, with a synchronised clock and nothing read back inside. The equality of bfloat16 with
float32 is printed beside. Utilisation (MFU) is 3 x FLOP of a forward over the dense bfloat16 peak of the device.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from speed import cells_like_geneformer, forward_flops

import scbin
from scbin.nn.network import build_network
from scbin.nn.packs import pack_rows
from scbin.nn.presets import preset
from scbin.nn.run import Runner, at_rest, embed
from scbin.tokens.edits import Edit, GeneRows, edit_rows
from scbin.tokens.tokens import MemoryTokens
from scbin.train.distributed import World
from scbin.train.loop import Trainer, split_cells
from scbin.train.pretraining import Pretraining

if TYPE_CHECKING:
    from collections.abc import Callable

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "A10": 125e12}  # dense bfloat16
COLUMNS = (
    "network",
    "training, tokens/s",
    "MFU",
    "embedding, cells/s",
    "exact edits/s",
    "memory, GB",
    "cosine to float32",
)


def seconds(call: Callable[[], Any], device: torch.device, times: int) -> float:
    """Return the median seconds of a call, over stretches between two looks at the synchronised clock."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found, rounds = [], min(10, times)
    for number in range(rounds + 1):
        wait()
        start = time.perf_counter()
        for _ in range(rounds if number == 0 else times // rounds):
            call()
        wait()
        found.append((time.perf_counter() - start) / (times // rounds))
    return float(np.median(found[1:]))


def row_of(name: str, device: torch.device, steps: int, n_cells: int) -> tuple[str, ...]:
    """Measure one shape."""
    shape, tokens = preset(name), cells_like_geneformer(n_cells)
    lengths = np.asarray(tokens.lengths)
    network = build_network(tokens.vocabulary, name, "bert", vector="pooled")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    task = Pretraining(tokens.vocabulary, loss=scbin.Loss(over="vocabulary", weights={"cell_vector": 0.0}))
    how = scbin.Training(epochs=1, cells_per_step=n_cells, held_out=0.0, precision="auto")
    trainer = Trainer(network, task, tokens, split_cells(tokens, how, 0), how, World(), device, 0)
    batch = trainer.prepare(np.arange(n_cells), 0)

    def step() -> None:
        trainer.summed(batch, np.arange(n_cells), 0, 1 / np.maximum(batch.counts, 1))
        torch.nn.utils.clip_grad_norm_(trainer.parameters, 1.0, foreach=True)
        trainer.optimizer.step()

    took = seconds(step, device, steps)
    trainer.thread.shutdown()
    peak = next((flops for word, flops in PEAK.items() if word in device_name(device)), float("nan"))
    used = 3 * (forward_flops(shape, lengths) + 0.15 * lengths.sum() * 2 * shape.hidden_size * 25_426) / took / peak
    with at_rest(network):
        runner = Runner(network, device)
        pack = pack_rows(tokens.take(np.arange(n_cells)), np.arange(n_cells), device)
        with torch.inference_mode():
            embedding = n_cells / seconds(lambda: network.vector(runner(pack), pack), device, steps)
        one = int(np.argsort(lengths)[n_cells // 2])
        rows = GeneRows(tokens.matrix[[one]], tokens.vocabulary)
        genes = tokens.vocabulary.genes_at(rows.tokens.data, rows.tokens.indices)[rows.at][:256]
        edited = edit_rows(rows, Edit("delete"), np.zeros(len(genes), dtype=np.int64), genes[:, None]).tokens
        edits = MemoryTokens(edited, tokens.vocabulary)
        options: dict[str, Any] = {"device": str(device), "token_budget": 262_144}
        per_second = len(genes) / seconds(lambda: embed(network, edits, **options), device, max(1, steps // 5))
        fast, exact = (embed(network, tokens, device=str(device), precision=p) for p in ("auto", "float32"))
    cosine = (fast * exact).sum(1) / np.linalg.norm(fast, axis=1) / np.linalg.norm(exact, axis=1)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")
    found = (f"{lengths.sum() / took:,.0f}", f"{used:.1%}", f"{embedding:,.0f}", f"{per_second:,.0f}", f"{memory:.1f}")
    return (name, *found, f"{cosine.min():.5f}")


def device_name(device: torch.device) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main() -> None:
    """Print the table, and write it where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["tiny", "geneformer-v1-6l", "geneformer-v2-104m"])
    parser.add_argument("--device", default="cuda", help="'cpu' tries the script out")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cells", type=int, default=144, help="of a step")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device(arguments.device)
    about = f"{device_name(device)}, torch {torch.__version__}, scbin {scbin.__version__}, {time.strftime('%d %B %Y')}"
    lines = [f"{about}; {arguments.cells} cells a step", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    print("\n".join(lines), flush=True)
    for name in arguments.shapes:
        lines.append(f"| {' | '.join(row_of(name, device, arguments.steps, arguments.cells))} |")
        print(lines[-1], flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
