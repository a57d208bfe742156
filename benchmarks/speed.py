"""How much faster scbin is than the usual loops: tokenizing, pretraining, embedding, deleting genes.

    python benchmarks/speed.py [tokenize pretrain embed perturb step] [--quick] [--rounds 5] [--file cells.h5ad] [--dictionaries geneformer]

Both sides run in one process on one thread, round after round in turn; the first round is dropped. Printed are medians of CPU seconds,
and the median and range of their ratios within a round, beside a check that both sides computed the same.

- `tokenize`: rank tokens of an h5ad, with the dictionaries of Geneformer V1, against the loop of Geneformer's tokenizer.
- `pretrain`: a step on the shape and lengths of Geneformer V1 against stock BertForMaskedLM on batches of cells of similar length,
  padded to the longest, with the output layer at all positions.
- `embed`: cell vectors against padded batches of cells sorted by length, through the whole of BertForMaskedLM, as Geneformer does.
- `perturb`: deleting genes exactly, on the shape of Geneformer V1, against a padded forward through all of BertForMaskedLM for each gene;
  and every gene of cells of the file in a small BERT, exactly and by the screen.
- `step`: GFLOP/s of a training step of our own sizes on the cells of the file, beside the bare products of its shapes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numba
import numpy as np
import torch
from scipy import sparse
from scipy.stats import spearmanr
from threadpoolctl import threadpool_limits
from transformers import BertConfig, BertForMaskedLM

import scbin
from scbin.io.dictionaries import geneformer_vocabulary
from scbin.nn.attention import _attend
from scbin.nn.network import build_network
from scbin.nn.packs import pack_rows
from scbin.nn.presets import preset
from scbin.nn.run import embed
from scbin.tl._perturb import CPU_PACK
from scbin.tokens.edits import Edit, GeneRows, edit_rows
from scbin.tokens.tokens import MemoryTokens
from scbin.train.distributed import World
from scbin.train.loop import Trainer, train
from scbin.train.pretraining import Pretraining

try:
    from datasets import Dataset, disable_progress_bars
except ImportError:  # Geneformer's tokenizer is then compared without the dataset that it ends in
    Dataset = None
else:
    disable_progress_bars()

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

V1_GENES, DATA = 25_421, Path(__file__).resolve().parents[2] / "shared"


def compare(title: str, sides: dict[str, Callable[[], Any]], rounds: int, same: str) -> None:
    """Run all sides in turn; print CPU seconds, and ratios to the first side."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, call in sides.items():
            taken[name].append(seconds(call))
    kept = np.array(list(taken.values()))[:, 1:]  # (sides, rounds)
    print(f"\n{title}; {same}")
    for name, mine, ratios in zip(sides, kept, kept[0] / kept, strict=True):
        how = f"{np.median(ratios):8.1f}x ({ratios.min():.1f}-{ratios.max():.1f})"
        print(f"  {name:38}{np.median(mine):9.3f} s {how}", flush=True)


def geneformer_loop(path: Path, like: scbin.Vocabulary) -> list[np.ndarray]:
    """Read a file and rank the genes of each cell as Geneformer's `tokenize_anndata` does, in blocks of 512 cells."""
    adata, found = ad.read_h5ad(path), []
    known = {gene: k for k, gene in enumerate(like.genes)}
    columns = np.flatnonzero([gene in known for gene in adata.var["ensembl_id"]])
    number = np.array([known[gene] for gene in adata.var["ensembl_id"].iloc[columns]])
    medians, tokens = np.array(like.medians)[number], like.first_gene_id + number
    totals = np.asarray(adata.X.sum(axis=1))
    for start in range(0, adata.n_obs, 512):
        block = slice(start, start + 512)
        normed = sparse.csr_matrix(adata[block].X[:, columns] / totals[block] * 10_000 / medians)
        found += [tokens[normed[k].indices][np.argsort(-normed[k].data)] for k in range(normed.shape[0])]
    return found


def geneformer_dataset(path: Path, like: scbin.Vocabulary) -> Any:
    """Put the ranked genes of each cell, cut to the longest row, into a dataset as Geneformer's `create_dataset` does."""

    def cut(cell: dict[str, Any]) -> dict[str, Any]:
        cell["input_ids"] = cell["input_ids"][: like.max_length]
        return cell | {"length": len(cell["input_ids"])}

    return Dataset.from_dict({"input_ids": geneformer_loop(path, like)}).map(cut)


def tokenize(rounds: int, arguments: argparse.Namespace) -> None:
    """Compare the way from an h5ad to rank tokens."""
    names = ("token_dictionary_gc30M", "gene_median_dictionary_gc30M")
    like = geneformer_vocabulary(*(arguments.dictionaries / f"{name}.json" for name in names))
    adata = ad.read_h5ad(arguments.file)
    with tempfile.TemporaryDirectory() as folder:
        for n_cells in (400, adata.n_obs):
            path = Path(folder) / f"{n_cells}.h5ad"
            adata[:n_cells].write_h5ad(path)

            def ours(path: Path = path) -> sparse.csr_matrix:
                cells = ad.read_h5ad(path)
                scbin.pp.tokenize(cells, like=like, gene_key="ensembl_id")
                return cells.obsm["X_tokens"]

            pairs = [
                (mine, row[: like.max_length]) for mine, row in zip(ours(), geneformer_loop(path, like), strict=True)
            ]
            sets = np.mean([set(mine.data) == set(row) for mine, row in pairs])
            equal = np.mean([(mine.data == row).mean() for mine, row in pairs if mine.nnz == len(row)])
            sides: dict[str, Any] = {"Geneformer's loop": lambda path=path: geneformer_loop(path, like), "scbin": ours}
            if Dataset is not None:
                sides = {"Geneformer's loop, to its dataset": lambda path=path: geneformer_dataset(path, like)} | sides
            same = f"{sets:.1%} of the cells have equal tokens, {equal:.1%} of them at equal ranks"
            compare(f"tokenize, rank, {n_cells:,} cells", sides, rounds, same)


class Padded:
    """Stock BertForMaskedLM with the weights of a network, on batches padded to the longest cell."""

    def __init__(self, network: Any, batch: int, dropout: float = 0.0):
        config = network.backbone.bert.config.to_dict() | {"attn_implementation": "sdpa"}
        shape = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        self.network, self.batch = network, batch
        self.bert = BertForMaskedLM(BertConfig(**(config | shape))).eval()
        self.bert.load_state_dict(network.backbone.bert.state_dict())

    def batches(self, tokens: sparse.csr_matrix) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """Yield rows of similar length: their numbers, ids and positions (rows, longest)."""
        order = np.argsort(-np.diff(tokens.indptr), kind="stable")
        for rows in np.split(order, range(self.batch, len(order), self.batch)):
            ids, positions = np.zeros((2, len(rows), int(np.diff(tokens.indptr)[rows].max())), dtype=np.int64)
            for k, row in enumerate(rows):
                part = slice(tokens.indptr[row], tokens.indptr[row + 1])
                ids[k, : part.stop - part.start] = tokens.data[part]
                positions[k, : part.stop - part.start] = tokens.indices[part]
            yield rows, torch.from_numpy(ids), torch.from_numpy(positions)

    @torch.inference_mode()
    def vectors(self, tokens: sparse.csr_matrix) -> np.ndarray:
        """Return the cell vectors, computed by the network's own module from the hidden states of stock BERT."""
        found = np.empty((tokens.shape[0], self.network.vector.size), dtype=np.float32)
        for rows, ids, positions in self.batches(tokens):
            there = ids > 0
            out = self.bert(
                input_ids=ids, position_ids=positions, attention_mask=there.long(), output_hidden_states=True
            )
            pack = pack_rows(tokens[rows], rows)
            found[rows] = self.network.vector(out.hidden_states[-1][there], pack).numpy()
        return found

    def train(self, tokens: sparse.csr_matrix, dtype: torch.dtype) -> None:
        """Make a step of masked modelling with each batch, in random order."""
        bert, rng = self.bert.train(), np.random.default_rng(0)
        optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-4)
        batches = list(self.batches(tokens))
        for k in rng.permutation(len(batches)):
            _, ids, positions = batches[k]
            draw, what = torch.rand(ids.shape), torch.rand(ids.shape)
            hidden = (draw < 0.15) & (ids > 0)
            shown = torch.where(hidden & (what < 0.8), torch.ones_like(ids), ids)  # [MASK]
            shown = torch.where(hidden & (what > 0.9), torch.randint_like(ids, 2, bert.config.vocab_size), shown)
            inputs = {"input_ids": shown, "position_ids": positions, "attention_mask": (ids > 0).long()}
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                out = bert(**inputs, labels=ids.masked_fill(~hidden, -100))
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
            optimizer.step()


def cells_like_geneformer(n_cells: int) -> MemoryTokens:
    """Rank tokens with the vocabulary and the lengths of Geneformer V1's corpus."""
    rng = np.random.default_rng(0)
    vocabulary = scbin.Vocabulary.build("rank", [f"G{i}" for i in range(V1_GENES)], max_length=2048)
    lengths = np.clip(rng.lognormal(np.log(975), 0.474, n_cells), 100, 2048).astype(int)
    ids = np.concatenate([vocabulary.first_gene_id + rng.permutation(V1_GENES)[:n] for n in lengths])
    positions = np.concatenate([np.arange(n) for n in lengths])
    shape = (n_cells, vocabulary.n_positions)
    return MemoryTokens(
        sparse.csr_matrix((ids.astype(np.uint16), positions, np.cumsum([0, *lengths])), shape), vocabulary
    )


def pretrain(rounds: int, arguments: argparse.Namespace) -> None:
    """Compare steps of masked modelling on the shape of Geneformer V1."""
    tokens, per_step = cells_like_geneformer(600), 4
    order = np.argsort(tokens.lengths).reshape(-1, per_step)  # neighbours in length, as in a large data set
    some = order[37 :: 75 if arguments.quick else 25].ravel()
    tokens = MemoryTokens(tokens.matrix[some], tokens.vocabulary)
    network = build_network(tokens.vocabulary, "geneformer-v1-6l", "bert", vector="pooled")
    padded = Padded(network, per_step, dropout=0.02)
    task = Pretraining(tokens.vocabulary, loss=scbin.Loss(over="vocabulary", weights={"cell_vector": 0.0}))

    def ours(precision: str) -> None:
        training = scbin.Training(epochs=1, cells_per_step=per_step, held_out=0.0, precision=precision)
        train(copy.deepcopy(network), task, tokens, training, device="cpu", progress=False)

    sides = {
        "padded, length-grouped, float32": lambda: padded.train(tokens.matrix, torch.float32),
        "padded, length-grouped, bfloat16": lambda: padded.train(tokens.matrix, torch.bfloat16),
        "scbin, float32": lambda: ours("float32"),
        "scbin, auto precision": lambda: ours("auto"),
    }
    fraction = np.mean([int((ids > 0).sum()) / ids.numel() for _, ids, _ in padded.batches(tokens.matrix)])
    title = f"pretrain, {tokens.n_cells} cells, {int(tokens.lengths.sum()):,} tokens, {per_step} cells a step"
    compare(title, sides, rounds, f"{fraction:.0%} of the padded batches are tokens")


def embedding(rounds: int, arguments: argparse.Namespace) -> None:
    """Compare the computation of cell vectors on the shape of Geneformer V1."""
    tokens = cells_like_geneformer(8 if arguments.quick else 16)
    network = build_network(tokens.vocabulary, "geneformer-v1-6l", "bert", vector="pooled").eval()
    padded = Padded(network, 8)
    sides = {
        "padded, sorted by length, float32": lambda: padded.vectors(tokens.matrix),
        "scbin, float32": lambda: embed(network, tokens, device="cpu", precision="float32"),
        "scbin, bfloat16": lambda: embed(network, tokens, device="cpu", precision="bfloat16"),
    }
    first, second, third = (call() for call in sides.values())
    cosine = (first * third).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(third, axis=1)
    same = (
        f"largest difference in float32 {np.abs(first - second).max():.0e}, least cosine in bfloat16 {cosine.min():.6f}"
    )
    compare(f"embed, {tokens.n_cells} cells", sides, rounds, same)


def perturb(rounds: int, arguments: argparse.Namespace) -> None:
    """Compare the deletion of genes: of a cell in a network of the shape of Geneformer V1, and of cells in a small one."""
    tokens, n_edits = cells_like_geneformer(600), 20 if arguments.quick else 40
    cell = tokens.matrix[[int(np.argmin(np.abs(tokens.lengths - 500)))]]
    network = build_network(tokens.vocabulary, "geneformer-v1-6l", "bert", vector="pooled").eval()
    delete_all(f"{cell.nnz} genes, shape of Geneformer V1", network, tokens.vocabulary, cell, n_edits, rounds)

    adata = ad.read_h5ad(arguments.file)
    scbin.pp.tokenize(adata)
    lengths = np.diff(adata.obsm["X_tokens"].indptr)
    chosen = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")[: 1 if arguments.quick else 3]
    others, cells = adata[np.setdiff1d(np.arange(adata.n_obs), chosen)].copy(), adata[chosen].copy()
    model = scbin.tl.pretrain(others, backbone="bert", max_steps=20 if arguments.quick else 40, progress=False)
    delete_all("tiny", model.network.eval(), model.vocabulary, cells.obsm["X_tokens"], 10_000, rounds)

    def ours(**how: Any) -> sparse.csr_matrix:
        scbin.tl.perturb(cells, model, device="cpu", progress=False, **how)
        return cells.layers["scbin_shift"].copy()

    sides = {
        "scbin, exact": lambda: ours(method="exact"),
        "scbin, screen alone": lambda: ours(method="screen", verify=0.0),
        "scbin, screen, top 10 % exact": lambda: ours(method="screen"),
    }
    pairs = zip(*(call() for call in list(sides.values())[:2]), strict=True)
    rank = np.mean([spearmanr(exact.data, screened.data).statistic for exact, screened in pairs])
    compare(f"screen, {cells.n_obs} cells", sides, rounds, f"Spearman {rank:.3f}")


def delete_all(title: str, network: Any, vocabulary: Any, cells: sparse.csr_matrix, most: int, rounds: int) -> None:
    """Compare the exact deletion of the genes of some cells, but of `most` edits at most."""
    rows, padded = GeneRows(cells, vocabulary), Padded(network, 10)
    at, genes = (part[:most] for part in rows.expressed())

    def edited() -> sparse.csr_matrix:
        return edit_rows(rows, Edit(), at, genes).tokens

    def ours(precision: Any) -> np.ndarray:
        how: Any = {"device": "cpu", "token_budget": CPU_PACK, "precision": precision}
        return embed(network, MemoryTokens(edited(), vocabulary), **how)

    sides = {
        "padded loop, 10 edits a batch": lambda: padded.vectors(edited()),
        "scbin, exact, float32": lambda: ours("float32"),
        "scbin, exact, bfloat16": lambda: ours("bfloat16"),
    }
    first, second, _ = (call() for call in sides.values())
    shape, lengths = network.backbone.config(), np.asarray([cells.nnz / cells.shape[0]])
    shape = argparse.Namespace(**shape)
    fewer = 1 + 2 * shape.hidden_size * vocabulary.n_tokens / (forward_flops(shape, lengths) / lengths[0])
    same = f"largest difference {np.abs(first - second).max():.0e}; by counting operations {fewer:.1f}x"
    compare(f"perturb, {len(at):,} deletions, {title}", sides, rounds, same)


def forward_flops(shape: Any, lengths: np.ndarray) -> float:
    """Return the operations of a forward of rows of these lengths, without the output layer."""
    h, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    return float(layers * ((8 * h**2 + 4 * h * inner) * lengths.sum() + 4 * h * (lengths.astype(float) ** 2).sum()))


def step(rounds: int, arguments: argparse.Namespace) -> None:
    """Say at how many GFLOP/s a training step computes, its linear layers and its attention by themselves."""
    adata = ad.read_h5ad(arguments.file)
    scbin.pp.tokenize(adata)
    vocabulary = scbin.Vocabulary.from_json(adata.uns["scbin"]["vocabulary"])
    tokens, cells = MemoryTokens(adata.obsm["X_tokens"], vocabulary), np.arange(32 if arguments.quick else 64)
    for name, precision in itertools.product(("tiny", "small"), ("float32", "bfloat16")):
        network, how = build_network(vocabulary, name, "bert"), scbin.Training(precision=precision)
        how = how.for_preset(name, tokens.n_cells)
        trainer = Trainer(
            network, Pretraining(vocabulary), tokens, (cells, cells[:0]), how, World(), torch.device("cpu"), 0
        )
        batch, shape = trainer.prepare(cells, 0), preset(name)
        trainer.thread.shutdown()

        def one(trainer: Any = trainer, batch: Any = batch) -> None:
            trainer.summed(batch, cells, 0, 1 / np.maximum(batch.counts, 1))
            torch.nn.utils.clip_grad_norm_(trainer.parameters, 1.0, foreach=True)
            trainer.optimizer.step()

        lengths = np.concatenate([pack.layout.lengths for pack, _ in batch.packs])
        h, heads, inner, type_ = (
            shape.hidden_size,
            shape.num_attention_heads,
            shape.intermediate_size,
            trainer.runner.dtype,
        )
        weights = [torch.randn(n, k, dtype=type_) for n, k in ((h, h), (h, h), (h, h), (h, h), (inner, h), (h, inner))]
        states = {k: torch.randn(4096, k, dtype=type_) for k in (h, inner)}
        qkv = [
            torch.randn(1, heads, int(np.median(lengths)), h // heads, dtype=type_, requires_grad=True) for _ in "qkv"
        ]

        def products(weights: Any = weights, states: Any = states) -> None:
            for w in weights:  # forward, and both gradients
                _ = states[w.shape[1]] @ w.T, states[w.shape[0]] @ w, states[w.shape[0]].T @ states[w.shape[1]]

        def attention(qkv: Any = qkv) -> None:
            for _ in range(8):
                torch.autograd.grad(_attend(*qkv, qkv[0].shape[-1] ** -0.5).sum(), qkv)

        flops = (
            3 * forward_flops(shape, lengths),
            6 * 4096 * sum(w.numel() for w in weights),
            96 * h * qkv[0].shape[2] ** 2,
        )
        found = np.array([[seconds(call) for call in (one, products, attention)] for _ in range(rounds + 1)])[1:]
        rates = " / ".join(f"{f / 1e9 / np.median(s):.0f}" for f, s in zip(flops, found.T, strict=True))
        print(
            f"  step, {name}, {precision}, {lengths.sum():,} tokens: step / bare products / attention {rates} GFLOP/s",
            flush=True,
        )


def seconds(call: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


PARTS = {"tokenize": tokenize, "pretrain": pretrain, "embed": embedding, "perturb": perturb, "step": step}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=PARTS, help="which (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer cells, steps and rounds")
    parser.add_argument("--rounds", type=int, help="beside the one that is dropped (default: 5; quick: 2)")
    parser.add_argument("--file", type=Path, default=DATA / "data" / "pbmc3k_labelled.h5ad", help="h5ad with counts")
    parser.add_argument("--dictionaries", type=Path, default=DATA / "geneformer", help="of Geneformer V1, as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    numba.config.NUMBA_NUM_THREADS = 1
    threadpool_limits(1)
    print(f"torch {torch.__version__}, numpy {np.__version__}, scbin {scbin.__version__}, one thread")
    for name in arguments.parts or PARTS:
        PARTS[name](arguments.rounds or (2 if arguments.quick else 5), arguments)


if __name__ == "__main__":
    main()
