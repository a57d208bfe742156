"""How fast cells become tokens, against the usual loop over cells in numpy; both sides in one process, interleaved.

    python benchmarks/tokenize.py            # a minute or two
    python benchmarks/tokenize.py --quick    # fewer cells and rounds

Every ratio is printed with the check that both sides gave the same tokens. `thread` figures set the number of threads of the
compiled loops; the numpy loop has one.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata as ad
import numba
import numpy as np
from scipy import sparse

from scbin._anndata import raw_blocks
from scbin.encoding import kernels, scanning
from scbin.encoding.bins import Bins
from scbin.encoding.encode import Encoder
from scbin.encoding.values import Reading
from scbin.encoding.vocabulary import Vocabulary
from scbin.pp import iter_tokens

N_GENES, TOP = 20_000, 2_048
COUNTS = Reading("counts")


def synthetic(n_cells: int, seed: int = 0) -> sparse.csr_matrix:
    """Compound-Poisson counts over 20,000 genes; 1,007 / 1,955 / 3,487 expressed genes per cell (5, 50, 95 %)."""
    rng = np.random.default_rng(seed)
    rate = rng.lognormal(0, 1.6, N_GENES)
    chance = rate / rate.sum()
    rows = []
    for n in np.clip(rng.lognormal(np.log(1955), 0.378, n_cells), 200, 8000).astype(int):
        genes = np.unique(rng.choice(N_GENES, size=int(n * 1.16), p=chance, replace=True))[: n + 400]
        counts = 1 + rng.poisson(rate[genes] * 0.4)
        rows.append((genes.astype(np.int32), counts.astype(np.float32)))
    indptr = np.concatenate([[0], np.cumsum([len(genes) for genes, _ in rows])])
    indices, data = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return sparse.csr_matrix((data, indices, indptr), shape=(n_cells, N_GENES))


# ---- the usual loops ------------------------------------------------------------------------------------------------


def rank_loop(matrix: sparse.csr_matrix, medians: np.ndarray) -> list[np.ndarray]:
    """Per cell: made dense, divided by its total and the medians, non-zeros sorted, truncated."""
    out = []
    for k in range(matrix.shape[0]):
        row = matrix[k].toarray().ravel().astype(np.float64)
        score = row / row.sum() * 10_000 / medians
        expressed = np.nonzero(score)[0]
        order = np.argsort(-score[expressed], kind="stable")[:TOP]
        out.append(expressed[order].astype(np.uint16))
    return out


def bin_loop(matrix: sparse.csr_matrix, edges: np.ndarray, genes: np.ndarray) -> list[np.ndarray]:
    """Per cell: made dense, normalised, logged, digitized; bins above 0 are kept."""
    out = []
    for k in range(matrix.shape[0]):
        row = matrix[k].toarray().ravel().astype(np.float64)
        bins = np.digitize(np.log1p(row / row.sum() * 10_000), edges)[genes]
        expressed = np.nonzero(bins)[0]
        out.append(np.stack([expressed, bins[expressed]]).astype(np.uint16))
    return out


# ---- ours -----------------------------------------------------------------------------------------------------------


def rank_vocabulary(medians: np.ndarray) -> Vocabulary:
    genes = [f"G{k}" for k in range(N_GENES)]
    return Vocabulary.build("rank", genes, medians=medians.tolist(), layout="geneformer_v1")


def bins_vocabulary(genes: np.ndarray) -> Vocabulary:
    return Vocabulary.build("bins", [f"G{k}" for k in genes], bins=Bins.linear())


def encode(matrix: sparse.csr_matrix, vocabulary: Vocabulary, columns: np.ndarray, threads: int) -> sparse.csr_matrix:
    kernels.n_threads = lambda: threads
    encoder = Encoder(vocabulary, columns, COUNTS)
    none = np.zeros((matrix.shape[0], 0), dtype=np.int64)
    return encoder.encode(matrix.data, matrix.indices, matrix.indptr.astype(np.int64), none).tokens


Seconds = tuple[float, float]  # on the clock, of the processor


def interleaved(sides: dict[str, object], rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of each side by round, A B A B; the first round is dropped."""
    times: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, call in sides.items():
            start, busy = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - start, time.process_time() - busy))
    return {name: seconds[1:] for name, seconds in times.items()}


def report(title: str, times: dict[str, list[Seconds]], n_cells: dict[str, int], same: bool) -> None:
    """Print cells per second and the ratio to the first side, on the clock and per second of the processor."""
    print(f"\n{title}   tokens identical: {same}")
    base, first = next(iter(times)), next(iter(times.values()))
    for name, seconds in times.items():
        rate = [n_cells[name] / wall for wall, _ in seconds]
        ratios = [
            [n_cells[name] / mine[k] / (n_cells[base] / other[k]) for mine, other in zip(seconds, first, strict=True)]
            for k in (0, 1)
        ]
        middle = f"{statistics.median(rate):12,.0f} cells/s ({min(rate):,.0f}-{max(rate):,.0f})"
        clock, cpu = (f"{statistics.median(r):6.1f}x ({min(r):.1f}-{max(r):.1f})" for r in ratios)
        print(f"  {name:28}{middle:>42}   {clock}, per CPU-second {cpu}")


def in_memory(n_cells: int, n_naive: int, rounds: int) -> None:
    matrix = synthetic(n_cells)
    few = matrix[:n_naive]
    medians = np.random.default_rng(1).lognormal(0.5, 0.7, N_GENES)
    chosen = np.sort(np.random.default_rng(2).choice(N_GENES, 2000, replace=False))
    columns = np.arange(N_GENES, dtype=np.int32)
    bin_columns = np.full(N_GENES, -1, dtype=np.int32)
    bin_columns[chosen] = np.arange(len(chosen))
    rank_v, bins_v, all_v = rank_vocabulary(medians), bins_vocabulary(chosen), bins_vocabulary(np.arange(N_GENES))
    edges = np.asarray(Bins.linear().edges)
    for vocabulary, place in ((rank_v, columns), (bins_v, bin_columns)):
        encode(few, vocabulary, place, 1)
    floor = lambda: kernels.over_rows(scanning.scan_rows_fast, *scan_arguments(matrix))
    floor()

    def ours(vocabulary, place, threads):
        return lambda: encode(matrix, vocabulary, place, threads)

    sizes = {"numpy loop over cells": n_naive, "scbin, 1 thread": n_cells, "scbin, 2 threads": n_cells}
    sizes["floor: read the CSR once"] = n_cells
    made, loop = encode(few, rank_v, columns, 2), rank_loop(few, medians)
    same = all(np.array_equal(made[k].data - 2, loop[k]) for k in range(n_naive))
    sides = {
        "numpy loop over cells": lambda: rank_loop(few, medians),
        "scbin, 1 thread": ours(rank_v, columns, 1),
        "scbin, 2 threads": ours(rank_v, columns, 2),
        "floor: read the CSR once": floor,
    }
    report(f"rank, {n_cells:,} cells, top {TOP:,}", interleaved(sides, rounds), sizes, same)
    for title, vocabulary, place, genes in (
        ("bins, 2,000 variable genes", bins_v, bin_columns, chosen),
        ("bins, all 20,000 genes", all_v, columns, np.arange(N_GENES)),
    ):
        made, loop = encode(few, vocabulary, place, 2), bin_loop(few, edges, genes)
        same = all(_same_bins(made[k], loop[k], vocabulary) for k in range(n_naive))
        sides |= {
            "numpy loop over cells": lambda genes=genes: bin_loop(few, edges, genes),
            "scbin, 1 thread": ours(vocabulary, place, 1),
            "scbin, 2 threads": ours(vocabulary, place, 2),
        }
        report(f"{title}, {n_cells:,} cells", interleaved(sides, rounds), sizes, same)


def scan_arguments(matrix: sparse.csr_matrix) -> tuple:
    n = matrix.shape[0]
    parts = (matrix.indptr.astype(np.int64), matrix.data, matrix.data.view(np.uint32), matrix.indices)
    out = (np.zeros(n), np.zeros(N_GENES, dtype=bool))
    return (*(kernels.frozen(part) for part in parts), *out)


def _same_bins(row: sparse.csr_matrix, expected: np.ndarray, vocabulary: Vocabulary) -> bool:
    genes = vocabulary.is_gene_token(row.data)
    return np.array_equal(row.indices[genes] - vocabulary.first_gene_position, expected[0]) and np.array_equal(
        row.data[genes] - vocabulary.first_gene_id, expected[1]
    )


# ---- from disk to disk ----------------------------------------------------------------------------------------------


def from_disk(n_cells: int, n_naive: int, rounds: int, folder: Path) -> None:
    medians = np.random.default_rng(1).lognormal(0.5, 0.7, N_GENES)
    vocabulary = rank_vocabulary(medians)
    for name, n in (("large", n_cells), ("small", n_naive)):
        adata = ad.AnnData(synthetic(n, seed=7))
        adata.var_names = [f"G{k}" for k in range(N_GENES)]
        adata.write_h5ad(folder / f"{name}.h5ad")

    def naive() -> None:
        adata = ad.read_h5ad(folder / "small.h5ad")
        np.concatenate(rank_loop(sparse.csr_matrix(adata.X), medians)).tofile(folder / "naive.bin")

    def ours(threads: int) -> None:
        kernels.n_threads = lambda: threads
        adata = ad.read_h5ad(folder / "large.h5ad", backed="r")
        with open(folder / "tokens.bin", "wb") as ids, open(folder / "lengths.bin", "wb") as lengths:
            for part in iter_tokens(adata, like=vocabulary):
                part.data.tofile(ids)
                np.diff(part.indptr).astype(np.int32).tofile(lengths)
        adata.file.close()

    sides = {
        "numpy loop, h5ad to file": naive,
        "scbin, h5ad to file, 1": lambda: ours(1),
        "scbin, h5ad to file, 2": lambda: ours(2),
    }
    times = interleaved(sides, rounds)
    loop = np.fromfile(folder / "naive.bin", dtype=np.uint16)
    adata = ad.read_h5ad(folder / "small.h5ad", backed="r")
    made = np.concatenate([part.data for part in iter_tokens(adata, like=vocabulary)])
    same = np.array_equal(made - 2, loop)
    sizes = dict.fromkeys(sides, n_cells) | {"numpy loop, h5ad to file": n_naive}
    report(f"rank, end to end, {n_cells:,} cells, with 1 and 2 threads that encode", times, sizes, same)
    for _ in range(2):  # the first time the file is new, and memory that nobody has used yet is slow
        seconds = stages(folder, vocabulary)
    text = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    print(f"  nanoseconds of CPU per stored value, one thread: {text}")


def stages(folder: Path, vocabulary: Vocabulary) -> dict[str, float]:
    """Where the CPU seconds of the way from disk to disk go: nanoseconds per stored value."""
    seconds = dict.fromkeys(("read", "look at every value", "encode", "write"), 0.0)
    encoder = Encoder(vocabulary, np.arange(N_GENES, dtype=np.int32), COUNTS, threads=1)
    kernels.n_threads = lambda: 1
    n_values, clock = 0, time.process_time()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.process_time()
        seconds[name] += now - clock
        clock = now

    path = folder / "stages.bin"
    with open(path, "r+b" if path.exists() else "wb") as out:
        for block in raw_blocks(ad.read_h5ad(folder / "large.h5ad", backed="r"), passing=2):
            matrix = sparse.csr_matrix((block.data, block.indices, block.indptr), shape=(block.n_rows, N_GENES))
            lap("read")
            kernels.over_rows(scanning.scan_rows_fast, *scan_arguments(matrix))
            lap("look at every value")
            none = np.zeros((block.n_rows, 0), dtype=np.int64)
            part = encoder.encode(block.data, block.indices, block.indptr, none, positive=True)
            lap("encode")
            part.tokens.data.tofile(out)
            lap("write")
            n_values += matrix.nnz
    return {name: value / n_values * 1e9 for name, value in seconds.items()}


def memory(folder: Path) -> None:
    """Peak memory of streaming: of this process after reading the large file block by block, above what imports hold."""
    import subprocess

    program = (
        "import sys, anndata as ad, numpy as np\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from tokenize_benchmark import rank_vocabulary, N_GENES, iter_tokens\n"
        "v = rank_vocabulary(np.ones(N_GENES))\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "base = peak()\n"
        "n = sum(part.nnz for part in iter_tokens(ad.read_h5ad(sys.argv[1], backed='r'), like=v))\n"
        "print(f'{(peak() - base) / 1024:.0f}', n)\n"
    )
    (folder / "tokenize_benchmark.py").write_text(Path(__file__).read_text())
    print("\npeak memory above the imports while streaming")
    for name in ("small", "large"):
        run = [sys.executable, "-c", program, str(folder / f"{name}.h5ad"), str(folder)]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
        print(f"  {name}: {done.stdout.split()[0]} MB, {int(done.stdout.split()[1]):,} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    rounds = 3 if quick else 5
    print(f"numpy {np.__version__}, numba {numba.__version__}, {numba.config.NUMBA_NUM_THREADS} threads at most")
    in_memory(4_000 if quick else 20_000, 400 if quick else 1_500, rounds)
    with tempfile.TemporaryDirectory() as name:
        from_disk(8_000 if quick else 40_000, 1_500 if quick else 4_000, rounds, Path(name))
        memory(Path(name))
    print(f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
