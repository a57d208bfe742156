"""The golden token files of every encoding, and the plain formulas that make them: `python tests/pp/make_golden.py`.

The matrix is `x[i, j] = max(0, (7 i + 11 j + i j^2) mod 13 - 6) * (1 + (i j) mod 4)^2`, 8 cells by 12 genes. Each file holds, per cell,
`[position, token id]` pairs, computed here by loops over single values from the definition, not by scbin.
"""

from __future__ import annotations

import json
import math
import struct
from fractions import Fraction
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"
N_CELLS, N_GENES = 8, 12
COUNTS = [
    [max(0, (7 * i + 11 * j + i * j * j) % 13 - 6) * (1 + (i * j) % 4) ** 2 for j in range(N_GENES)]
    for i in range(N_CELLS)
]
GENES = [f"GENE{chr(65 + j)}" for j in range(N_GENES)]
EDGES = [0.5, 5.0, 6.5, 7.5]
PAD, MASK, CLS, END, START = range(5)

# name of the file: arguments of scbin.pp.tokenize, those of scbin.Tokenization among them
CASES = {
    "counts": {},
    "bins_linear": {"rule": "linear"},
    "bins_explicit": {"rule": EDGES},
    "bins_explicit_keep": {"rule": EDGES, "zeros": "keep"},
    "bins_polygene": {"rule": "polygene"},
    "bins_perturbgene": {"rule": "perturbgene"},
    "bins_quantile_per_cell": {"rule": "quantile_per_cell", "n_bins": 4},
    "bins_quantile": {"rule": "quantile", "n_bins": 4},
    "bins_quantile_keep": {"rule": "quantile", "n_bins": 4, "zeros": "keep"},
    "bins_quantile_per_gene": {"rule": "quantile_per_gene", "n_bins": 3},
    "bins_log2": {"rule": "log2"},
    "bins_log2_keep": {"rule": "log2", "zeros": "keep"},
    "gene_bins_linear": {"encoding": "gene_bins", "rule": "linear", "n_bins": 12},
    "binary": {"encoding": "binary", "rule": [6.0]},
    "gene_bins": {"encoding": "gene_bins"},
    "gene_bins_keep": {"encoding": "gene_bins", "zeros": "keep"},
    "rank": {"encoding": "rank"},
    "rank_depth": {"encoding": "rank", "depth": True},
    "rank_geneformer_v1": {"encoding": "rank", "layout": "geneformer_v1"},
    "rank_geneformer_v2": {"encoding": "rank", "layout": "geneformer_v2"},
    "rank_bionemo": {"encoding": "rank", "layout": "bionemo"},
    "rank_short": {"encoding": "rank", "max_length": 6},
}


def arguments_of(case: str) -> tuple[dict, dict]:
    """Return the arguments of `tokenize` and those of `Tokenization`; but for two cases, cells have no `[DEPTH]`."""
    given = {"depth": case == "counts", **CASES[case]}
    return {k: v for k, v in given.items() if k in ("encoding", "rule")}, {
        k: v for k, v in given.items() if k not in ("encoding", "rule")
    }


def with_depth(row: list[int], rest: list[list[int]]) -> list[list[int]]:
    """Put the level of the cell's counts behind [CLS]: [NO_DEPTH] and 32 levels from 32 counts up, two per doubling."""
    level = sum(round(2 ** (5 + k / 2)) <= sum(row) for k in range(31))
    moved = [[p + 1, t if t < 5 else t + 33] for p, t in rest[1:]]
    return [rest[0], [1, 5 + 1 + level], *moved]


def count_level(x: int) -> int:
    """Molecules: exact to 16, then each bin begins 15 % above the one before."""
    level, edge = min(x, 16), 17
    while x >= edge:
        level, edge = level + 1, max(edge + 1, round(edge * 1.15))
    return level


def level_of(value: float, edges: list[float]) -> int:
    return sum(edge <= value for edge in edges)


def log1p_values(row: list[int]) -> list[float]:
    return [math.log1p(x / sum(row) * 10_000) for x in row]


def log2_level(x: int) -> int:
    """Bioformers: x up to 8, then 8 + ceil(3 (log2 x - 3)); powers of two are exact in integers."""
    if x <= 8:
        return x
    k = 0
    while x**3 > 8**3 * 2**k:  # x > 8 * 2^(k / 3)
        k += 1
    return 8 + k


def quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def in_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def six_digits(value: float) -> float:
    exponent = math.floor(math.log10(max(value, 1e-12)))
    return round(value / 10**exponent, 5) * 10**exponent


def quantile_edges(by_gene: list[list[float]], n_bins: int) -> list[list[float]]:
    """Per group: quantiles at 0, 1/n, 2/n ... of its values; the first edge of all is half the smallest value there is."""
    raw = [[quantile(sorted(v), k / n_bins) for k in range(n_bins)] if v else None for v in by_gene]
    lowest = min(edge for edges in raw if edges for edge in edges) / 2
    spare = [0.1 + 7.9 * k / (n_bins - 1) for k in range(n_bins)]  # for a gene that no cell expresses
    return [[six_digits(edge) for edge in [lowest, *(edges or spare)[1:]]] for edges in raw]


def fitted_edges(name: str) -> list[list[float]]:
    """Edges of every gene, for the rules that are fitted to the whole matrix."""
    logs = [log1p_values(row) for row in COUNTS]
    values = [[in_float32(row[j]) for row in logs if row[j] > 0] for j in range(N_GENES)]
    if name == "bins_quantile_per_gene":
        return quantile_edges(values, 3)
    return quantile_edges([[v for gene in values for v in gene]], 4) * N_GENES


def edges_of(name: str, row: list[float]) -> list[float]:
    if name.startswith("bins_explicit"):
        return EDGES
    if name == "bins_polygene":
        return [0.1 + k * 8.9 / 8 for k in range(9)]
    if name == "bins_perturbgene":
        return [0.1 + k * 8.9 / 9 for k in range(10)]
    if name == "binary":
        return [6.0]
    if name == "bins_quantile_per_cell":
        expressed = sorted(v for v in row if v > 0)
        return [quantile(expressed, k / 3) for k in range(4)]
    return [round(0.1 + 0.4 * k, 10) for k in range(20)]


def levelled(name: str, row: list[int]) -> list[list[int]]:
    keep = name.endswith("keep") or name == "bins_polygene"
    joint = name.startswith("gene_bins")
    values = log1p_values(row)
    fitted = fitted_edges(name) if name.startswith("bins_quantile") and name != "bins_quantile_per_cell" else None
    linear = name == "gene_bins_linear"
    n_levels = 13 if linear else max(log2_level(x) for cell in COUNTS for x in cell) + 1
    out = [[0, CLS], [1, START]]
    for j, x in enumerate(row):
        if name == "counts":
            level = count_level(x)
        elif name.startswith("bins_log2") or (joint and not linear):
            level = log2_level(x)
        else:
            edges = fitted[j] if fitted else edges_of(name, values)[: 12 if linear else None]
            level = level_of(values[j], edges) if x > 0 else 0
        if keep or level:
            out.append([2 + j, 5 + level + (j * n_levels if joint else 0)])
    return [*out, [2 + N_GENES, END]]


def medians() -> list[float]:
    found = []
    for j in range(N_GENES):
        values = sorted(row[j] / sum(row) * 10_000 for row in COUNTS if row[j])
        mantissa, exponent = math.frexp(quantile(values, 0.5) if values else 0.0)
        found.append(math.ldexp(round(mantissa * 2**20), exponent - 20))  # 20 bits
    return found


def ranked(name: str, row: list[int]) -> list[list[int]]:
    middle = medians()
    used = [j for j in range(N_GENES) if middle[j] > 0]
    first_id, before, after = {
        "rank_geneformer_v1": (2, [], []),
        "rank_geneformer_v2": (4, [CLS], [END]),
        "rank_bionemo": (3, [CLS], []),
    }.get(name, (5, [CLS, START], [END]))
    room = {"rank_short": 6, "rank_geneformer_v2": 4096}.get(name, 2048) - len(before) - len(after)
    order = sorted((j for j in used if row[j]), key=lambda j: (-Fraction(row[j]) / Fraction(middle[j]), j))
    ids = [*before, *(first_id + used.index(j) for j in order[:room]), *after]
    return [[position, token] for position, token in enumerate(ids)]


def make(name: str) -> list[list[list[int]]]:
    rows = [(ranked if name.startswith("rank") else levelled)(name, row) for row in COUNTS]
    if name in ("counts", "rank_depth"):
        return [with_depth(row, rest) for row, rest in zip(COUNTS, rows, strict=True)]
    return rows


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        (FOLDER / f"{case}.json").write_text(json.dumps(make(case), separators=(",", ":")) + "\n")
