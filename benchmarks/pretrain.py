"""Training tokens per CPU-second on the shape and lengths of Geneformer V1, beside the naive recipe.

    OMP_NUM_THREADS=1 python benchmarks/pretrain.py [--cells 6] [--rounds 6] [--json out.json]

All variants take the same cells in one process, round after round in turn; the first round is dropped, the median and the
range of the others are printed, with the equality of the losses beside them. The naive recipe: stock BertForMaskedLM, random
batches padded to the longest cell with a mask, the head on all positions, float32, dropout .02, AdamW.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from scipy.sparse import csr_matrix
from transformers import BertConfig, BertForMaskedLM

from scbin.data.masking import MaskingScheme
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.bert import build_bert
from scbin.nn.device import resolve_precision
from scbin.train.distributed import World
from scbin.train.objective import MaskedLoss, Objective
from scbin.train.schedule import build_optimizer
from scbin.train.settings import TrainSettings
from scbin.train.step import Stepper, prepare_share, seed_generators

N_GENES = 25_421  # with 5 special tokens the 25,426 ids of Geneformer V1


def cells_like_geneformer(n_cells: int) -> tuple[csr_matrix, Vocabulary]:
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary.build("rank", [f"G{i}" for i in range(N_GENES)], max_length=2048)
    lengths = np.clip(rng.lognormal(np.log(975), 0.474, n_cells), 100, 2048).astype(int)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    data = np.concatenate([vocabulary.first_gene_id + rng.permutation(N_GENES)[:n] for n in lengths]).astype(np.uint16)
    positions = np.concatenate([np.arange(n) for n in lengths])
    return csr_matrix((data, positions, indptr), shape=(n_cells, 2048)), vocabulary


class Naive:
    """The usual recipe in a few lines."""

    def __init__(self, vocabulary: Vocabulary, ours: BertForMaskedLM, dropout: float):
        shape = {**ours.config.to_dict(), "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        self.bert = BertForMaskedLM(BertConfig(**shape)).train()
        self.bert.load_state_dict(ours.state_dict())
        self.optimizer = torch.optim.AdamW(self.bert.parameters(), lr=1e-4)

    def step(self, share, move: bool = True) -> float:
        ((pack, targets, _),) = share.packs
        rows, longest = pack.n_rows, int(pack.lengths.max())
        row = np.repeat(np.arange(rows), pack.lengths)
        place = np.arange(pack.n_tokens) - np.repeat(pack.cu_seqlens[:-1], pack.lengths)
        ids = np.zeros((rows, longest), dtype=np.int64)
        ids[row, place] = pack.input_ids
        positions = np.zeros_like(ids)
        positions[row, place] = pack.position_ids
        labels = np.full_like(ids, -100)
        labels[row[targets.where], place[targets.where]] = targets.labels
        ids, positions, labels = (torch.from_numpy(a) for a in (ids, positions, labels))
        self.optimizer.zero_grad()
        out = self.bert(input_ids=ids, position_ids=positions, attention_mask=(ids > 0).long(), labels=labels)
        out.loss.backward()
        if move:
            torch.nn.utils.clip_grad_norm_(self.bert.parameters(), 1.0)
            self.optimizer.step()
        return float(out.loss.detach())


class Ours:
    """scbin's step: masks, packs, gradients, clipping, AdamW."""

    def __init__(
        self, vocabulary: Vocabulary, dtype: torch.dtype, hidden_dropout: float, attention_dropout: float = 0.0
    ):
        shape = {"hidden_dropout_prob": hidden_dropout, "attention_probs_dropout_prob": attention_dropout}
        self.bert = build_bert(vocabulary, "geneformer-v1-6l", **shape).train()
        # over="vocabulary": the naive recipe's softmax, so that the losses can be compared
        self.objective = Objective(vocabulary, MaskingScheme(), MaskedLoss(over="vocabulary"))
        self.stepper = Stepper(self.bert, self.objective, World(), torch.device("cpu"), dtype, 0)
        self.optimizer = build_optimizer(self.bert.named_parameters(), TrainSettings(learning_rate=1e-4))

    def step(self, tokens: csr_matrix, cells: np.ndarray, epoch: int, move: bool = True) -> float:
        share = share_of(self.objective, tokens, cells, epoch, 4096)
        losses = self.stepper.gradients(share, share.counts, epoch)
        if move:
            gradients = [p.grad for p in self.bert.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if norm > 1:
                torch._foreach_mul_(gradients, 1 / norm)
            self.optimizer.step()
        return float(losses.total)


def share_of(objective: Objective, tokens: csr_matrix, cells: np.ndarray, epoch: int, pack_tokens: int | None = None):
    return prepare_share(
        objective, tokens, cells, World(), seed=0, epoch=epoch, token_budget=10**6, pack_tokens=pack_tokens
    )


def product_seconds(share, dtype: torch.dtype) -> float:
    """CPU-seconds of the bare matrix products of a step at its shapes: forward, and both products of each in the backward.

    Linear layers over all tokens of a pack, scores and values of attention per cell and head, the head at its targets.
    """
    shapes: dict[tuple[int, ...], int] = {}  # (heads, m, k, n): times
    for pack, targets, _ in share.packs:
        shapes[1, pack.n_tokens, 256, 256] = 4 * 6
        shapes[1, pack.n_tokens, 256, 512] = shapes[1, pack.n_tokens, 512, 256] = 6
        shapes[1, len(targets), 256, 25_426] = 1
        for length in pack.lengths.tolist():
            shapes[4, length, 64, length] = shapes[4, length, length, 64] = 6
    total = 0.0
    for (heads, m, k, n), times in shapes.items():
        a, b, g = (torch.randn(heads, *size, dtype=dtype) for size in ((m, k), (k, n), (m, n)))
        seconds = []
        for _ in range(4):
            start = time.process_time()
            torch.bmm(a, b), torch.bmm(g, b.transpose(1, 2)), torch.bmm(a.transpose(1, 2), g)
            seconds.append(time.process_time() - start)
        total += times * float(np.median(seconds[1:]))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokens, vocabulary = cells_like_geneformer(arguments.cells * arguments.rounds)
    plain = Ours(vocabulary, torch.float32, 0.0)
    auto = resolve_precision("auto", torch.device("cpu"), plain.bert.config)
    variants = {
        "naive": Naive(vocabulary, plain.bert, 0.02),
        "same precision and dropout": Ours(vocabulary, torch.float32, 0.02, 0.02),
        "float32, dropout 0": plain,
        "scbin (auto precision, dropout .02, none in attention)": Ours(vocabulary, auto, 0.02),
    }
    equality(tokens, vocabulary, arguments.cells)
    rates: dict[str, list[float]] = {name: [] for name in variants}
    utilisation = []
    for number in range(arguments.rounds):
        cells = np.arange(number * arguments.cells, (number + 1) * arguments.cells)
        share = share_of(plain.objective, tokens, cells, number)
        for name, variant in variants.items():
            start = time.process_time()
            variant.step(share) if isinstance(variant, Naive) else variant.step(tokens, cells, number)
            seconds = time.process_time() - start
            rates[name].append(share.n_tokens / seconds)
            if variant is plain:
                packed = share_of(plain.objective, tokens, cells, number, 4096)
                utilisation.append(product_seconds(packed, torch.float32) / seconds)
    report(rates, utilisation, arguments)


def equality(tokens: csr_matrix, vocabulary: Vocabulary, n_cells: int) -> None:
    ours = Ours(vocabulary, torch.float32, 0.0)
    cells = np.arange(min(n_cells, 3))
    dense = Naive(vocabulary, ours.bert, 0.0).step(share_of(ours.objective, tokens, cells, 0), move=False)
    packed = ours.step(tokens, cells, 0, move=False)
    print(
        f"equality: dense loss {dense:.7f}, packed loss {packed:.7f}, difference {abs(dense - packed):.1e} (limit 1e-5)"
    )


def report(rates: dict[str, list[float]], utilisation: list[float], arguments: argparse.Namespace) -> None:
    kept = {name: np.array(values[1:]) for name, values in rates.items()}
    print(f"{'tokens per CPU-second':58} {'median':>8} {'range':>15} {'ratio':>7}")
    for name, values in kept.items():
        ratio = np.median(values / kept["naive"])
        print(f"{name:58} {np.median(values):8.0f} {values.min():7.0f}-{values.max():<7.0f} {ratio:6.2f}x")
    share = float(np.median(utilisation[1:]))
    print(f"bare matrix products at the shapes of the float32 step, measured beside it, take {share:.0%} of its time")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{arguments.cells} cells a step, {arguments.rounds} rounds, first dropped; 1 thread, peak memory {memory:.1f} GiB, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    if arguments.json is not None:
        result = {name: values.tolist() for name, values in kept.items()} | {"product_share": share}
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    seed_generators(torch.device("cpu"), 0)
    main()
