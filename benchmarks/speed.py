"""How much faster scbin is than the usual loops: tokenizing, pretraining, embedding, deleting genes.

    python benchmarks/speed.py [tokenize pretrain embed perturb] [--quick] [--file cells.h5ad]

Both sides run in one process on one thread, round after round in turn; the first round is dropped. Printed are medians of CPU seconds,
and the median and range of their ratios within a round, beside a check that both sides computed the same.

- `tokenize`: rank tokens against the loop of Geneformer's tokenizer, quantile bins against that of scGPT's, AnnData to tokens.
- `pretrain`: a step on the shape and lengths of Geneformer V1 against stock BertForMaskedLM on batches of cells of similar length,
  padded to the longest, with the output layer at all positions.
- `embed`: cell vectors against padded batches of cells sorted by length, through the whole of BertForMaskedLM, as Geneformer does.
- `perturb`: deleting every gene of a cell, exactly and by the screen, against a padded forward for each gene.
"""

from __future__ import annotations

import argparse
import copy
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
from scbin.nn.network import build_network
from scbin.nn.packs import pack_rows
from scbin.nn.run import embed
from scbin.tokens.tokens import MemoryTokens
from scbin.train.loop import train
from scbin.train.pretraining import Pretraining

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

N_GENES, V1_GENES, N_BINS = 20_000, 25_421, 51


def compare(title: str, sides: dict[str, Callable[[], Any]], rounds: int, same: str) -> None:
    """Run all sides in turn; print CPU seconds, and ratios to the first side."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, call in sides.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    kept = np.array(list(seconds.values()))[:, 1:]  # (sides, rounds)
    print(f"\n{title}; {same}")
    for name, mine, ratios in zip(sides, kept, kept[0] / kept, strict=True):
        how = f"{np.median(ratios):8.1f}x ({ratios.min():.1f}-{ratios.max():.1f})"
        print(f"  {name:38}{np.median(mine):9.3f} s {how}", flush=True)


def synthetic_cells(n_cells: int) -> ad.AnnData:
    """Compound-Poisson counts of 20,000 genes, about 2,000 of them expressed in a cell."""
    rng = np.random.default_rng(0)
    rate = rng.lognormal(0, 1.6, N_GENES)
    rows = []
    for n in np.clip(rng.lognormal(np.log(1955), 0.378, n_cells), 200, 8000).astype(int):
        genes = np.unique(rng.choice(N_GENES, size=int(n * 1.16), p=rate / rate.sum()))
        rows.append((genes, 1 + rng.poisson(rate[genes] * 0.4)))
    indptr = np.cumsum([0, *(len(genes) for genes, _ in rows)])
    indices, data = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    adata = ad.AnnData(sparse.csr_matrix((data.astype(np.float32), indices, indptr), shape=(n_cells, N_GENES)))
    adata.var_names = [f"G{k}" for k in range(N_GENES)]
    return adata


def geneformer_loop(adata: ad.AnnData, medians: np.ndarray) -> list[np.ndarray]:
    """Rank the genes of each cell as Geneformer's `tokenize_anndata` does, in blocks of 512 cells."""
    found = []
    for start in range(0, adata.n_obs, 512):
        block = adata[start : start + 512].X.toarray()
        normed = sparse.csr_matrix(block / block.sum(axis=1, keepdims=True) * 10_000 / medians)
        for k in range(normed.shape[0]):
            row = normed[k]
            found.append(row.indices[np.argsort(-row.data)][:2048])
    return found


def scgpt_loop(adata: ad.AnnData, genes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Bin the genes of each cell by its own quantiles as scGPT's `Preprocessor` does; genes, lowest and highest bins."""
    found = []
    for row in adata.X[:, genes].toarray():
        where = row.nonzero()[0]
        edges = np.quantile(row[where], np.linspace(0, 1, N_BINS - 1))
        high, low = np.digitize(row[where], edges), np.digitize(row[where], edges, right=True)
        drawn = np.ceil(np.random.rand(len(where)) * (high - low) + low)
        found.append((where, np.minimum(low, drawn), high))
    return found


def tokenize(quick: bool, rounds: int, _: Path | None) -> None:
    """Compare the way from an AnnData to tokens."""
    adata = synthetic_cells(300 if quick else 4_000)
    few, medians = adata[:300].copy(), np.random.default_rng(1).lognormal(0.5, 0.7, N_GENES)
    rank = scbin.Vocabulary.build("rank", list(adata.var_names), medians=medians.tolist(), layout="geneformer_v1")
    finer = scbin.Tokenization(n_bins=N_BINS - 1, depth=False)
    scbin.pp.tokenize(few, rule="quantile_per_cell", tokenization=finer)
    bins = scbin.Vocabulary.from_json(few.uns["scbin"]["vocabulary"])
    genes = adata.var_names.get_indexer(list(bins.genes))

    def streamed(adata: ad.AnnData, vocabulary: scbin.Vocabulary) -> sparse.csr_matrix:
        scbin.pp.tokenize(adata, like=vocabulary)
        return adata.obsm["X_tokens"]

    pairs = zip(streamed(few, rank), geneformer_loop(few, medians), strict=True)
    equal = np.mean([(mine.data - rank.first_gene_id == row).mean() for mine, row in pairs])
    sides = {"Geneformer's loop": lambda: geneformer_loop(adata, medians), "scbin": lambda: streamed(adata, rank)}
    compare(f"tokenize, rank, {adata.n_obs:,} cells", sides, rounds, f"{equal:.2%} of the tokens equal")
    equal = []
    for mine, (where, low, high) in zip(streamed(few, bins), scgpt_loop(few, genes), strict=True):
        found = mine.toarray().ravel()[bins.first_gene_position + where].astype(int) - bins.first_gene_id
        equal.append(((found >= low) & (found <= high)).mean())
    sides = {"scGPT's loop": lambda: scgpt_loop(adata, genes), "scbin": lambda: streamed(adata, bins)}
    title = f"tokenize, quantile bins, {len(genes):,} genes, {adata.n_obs:,} cells"
    compare(title, sides, rounds, f"{np.mean(equal):.2%} of the bins are among those that scGPT draws from")


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


def pretrain(quick: bool, rounds: int, _: Path | None) -> None:
    """Compare steps of masked modelling on the shape of Geneformer V1."""
    per_step = 4 if quick else 12
    tokens = cells_like_geneformer(per_step if quick else 4 * per_step)
    network = build_network(tokens.vocabulary, "geneformer-v1-6l", vector="pooled")
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


def embedding(quick: bool, rounds: int, _: Path | None) -> None:
    """Compare the computation of cell vectors on the shape of Geneformer V1."""
    tokens = cells_like_geneformer(8 if quick else 64)
    network = build_network(tokens.vocabulary, "geneformer-v1-6l", vector="pooled").eval()
    padded = Padded(network, 8 if quick else 16)
    sides = {
        "padded, sorted by length, float32": lambda: padded.vectors(tokens.matrix),
        "scbin, float32": lambda: embed(network, tokens, device="cpu", precision="float32"),
        "scbin, bfloat16": lambda: embed(network, tokens, device="cpu", precision="bfloat16"),
    }
    first, second, _ = (call() for call in sides.values())
    off = np.abs(first - second).max()
    compare(f"embed, {tokens.n_cells} cells", sides, rounds, f"largest difference in float32 {off:.0e}")


def perturb(quick: bool, rounds: int, file: Path | None) -> None:
    """Compare the deletion of every gene of cells that the model was not trained on."""
    adata = scbin.datasets.pbmc68k_reduced() if file is None else ad.read_h5ad(file)
    scbin.pp.tokenize(adata)
    lengths = np.diff(adata.obsm["X_tokens"].indptr)
    chosen = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")[: 1 if quick else 4]
    others, cells = adata[np.setdiff1d(np.arange(adata.n_obs), chosen)].copy(), adata[chosen].copy()
    model = scbin.tl.pretrain(others, backbone="bert", max_steps=20 if quick else None, progress=False)
    vocabulary = model.vocabulary
    padded, tokens = Padded(model.network.eval(), 10), cells.obsm["X_tokens"]

    def loop() -> list[tuple[int, int, float]]:
        found = []
        for cell, before in enumerate(padded.vectors(tokens).astype(np.float64)):
            row = tokens[cell]
            at = np.flatnonzero(vocabulary.is_gene_token(row.data))
            kept = [np.delete(np.arange(row.nnz), k) for k in at]
            ids, positions = (np.concatenate([values[k] for k in kept]) for values in (row.data, row.indices))
            edited = (ids, positions, np.arange(len(at) + 1) * (row.nnz - 1))
            after = padded.vectors(sparse.csr_matrix(edited, (len(at), row.shape[1]))).astype(np.float64)
            cosine = after @ before / np.linalg.norm(after, axis=1) / np.linalg.norm(before)
            genes = vocabulary.genes_at(row.data[at], row.indices[at])
            found += zip([cell] * len(at), genes.tolist(), (1 - cosine).tolist(), strict=True)
        return found

    def ours(**how: Any) -> sparse.csr_matrix:
        scbin.tl.perturb(cells, model, device="cpu", progress=False, **how)
        return cells.layers["scbin_shift"].copy()

    exact, screen = {"method": "exact"}, {"method": "screen", "verify": 0.0}
    found = [np.array(values) for values in zip(*loop(), strict=True)]
    columns = cells.var_names.get_indexer(list(vocabulary.genes))[found[1]]
    truth, guess = (np.asarray(ours(**how)[found[0], columns]).ravel() for how in (exact, screen))
    rank = np.mean([spearmanr(truth[found[0] == k], guess[found[0] == k]).statistic for k in range(cells.n_obs)])
    same = f"largest difference of 1 - cosine {np.abs(truth - found[2]).max():.0e}, Spearman of the screen {rank:.3f}"
    sides = {
        "padded loop, 10 edits a batch": loop,
        "scbin, exact": lambda: ours(**exact),
        "scbin, screen alone": lambda: ours(**screen),
        "scbin, screen, top 10 % exact": lambda: ours(method="screen"),
    }
    compare(f"perturb, {len(truth):,} deletions in {cells.n_obs} cells", sides, rounds, same)


PARTS = {"tokenize": tokenize, "pretrain": pretrain, "embed": embedding, "perturb": perturb}


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=PARTS, help="which (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer cells, steps and rounds")
    parser.add_argument("--file", type=Path, help="h5ad with counts for `perturb` (default: pbmc68k_reduced)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    numba.config.NUMBA_NUM_THREADS = 1
    threadpool_limits(1)
    print(f"torch {torch.__version__}, numpy {np.__version__}, scbin {scbin.__version__}, one thread")
    for name in arguments.parts or PARTS:
        PARTS[name](arguments.quick, 2 if arguments.quick else 5, arguments.file)


if __name__ == "__main__":
    main()
