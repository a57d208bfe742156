"""The same cells in other units: do they get the same tokens, and if not, is it said?

    python benchmarks/units.py [cells.h5ad] [--cells 300]

A vocabulary is made from the cells in one unit, and they are tokenized again in another one, for every encoding: with all genes, with a part
of them, or with all where the vocabulary was made on a part. Each pair ends as `equal` (every token), `converted` (the genes' tokens are equal or one level apart in at most 1 % of
places), `warned` (other tokens, with a warning), `refused` (an error), or `SILENT` (other tokens, and nothing said).
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections import Counter
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
from scipy.sparse import csr_matrix

import scbin


def normalised(adata: ad.AnnData, total: float | None, base: float | None) -> ad.AnnData:
    """Return cells normalised to a total (None: the median), and logged in a base (None: natural)."""
    out = sc.pp.normalize_total(adata, target_sum=total, copy=True)
    sc.pp.log1p(out, base=base)
    return out


def half_logged(adata: ad.AnnData) -> ad.AnnData:
    """Return cells of which every third is counts and the others are logs."""
    out, logs = adata.copy(), normalised(adata, 1e4, None)
    third = np.arange(adata.n_obs) % 3 == 0
    out.X = csr_matrix(np.where(third[:, None], adata.X.toarray(), logs.X.toarray()))
    return out


UNITS = {
    "counts": lambda a: a.copy(),
    "log1p 10,000": lambda a: normalised(a, 1e4, None),
    "log1p median": lambda a: normalised(a, None, None),
    "log2 10,000": lambda a: normalised(a, 1e4, 2),
    "log1p CPM": lambda a: normalised(a, 1e6, None),
    "CP10k": lambda a: sc.pp.normalize_total(a, target_sum=1e4, copy=True),
    "square roots": lambda a: ad.AnnData(a.X.sqrt(), a.obs, a.var),
    "mixed": half_logged,
}
ENCODINGS = {
    "bins": {},
    "bins, log rule": {"rule": "linear"},
    "binary": {"encoding": "binary"},
    "rank": {"encoding": "rank"},
    "gene_bins": {"encoding": "gene_bins"},
}


def verdict(reference: csr_matrix, adata: ad.AnnData, like: scbin.Vocabulary) -> str:
    """Return how tokenizing these cells with a vocabulary ends, beside the tokens that they should get."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            scbin.pp.tokenize(adata, like=like)
        except scbin.ScbinError as error:
            return f"refused {error.code}"
    codes = sorted({w.message.code for w in said if hasattr(w.message, "code")})
    tokens = adata.obsm["X_tokens"]
    if (tokens != reference).nnz == 0:
        return "equal"
    if codes:
        return f"warned {' '.join(codes)}"
    same = tokens.shape == reference.shape and np.array_equal(tokens.indptr, reference.indptr)
    apart = np.abs(tokens.data.astype(int) - reference.data.astype(int)) if same else np.array([2])
    return "converted" if apart.max() <= 1 and (apart > 0).mean() <= 0.01 else "SILENT"


def main() -> None:
    """Print a table for each encoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "pbmc3k_labelled.h5ad"
    parser.add_argument("cells", type=Path, nargs="?", default=beside, help="counts in X (default: %(default)s)")
    parser.add_argument("--cells", type=int, default=300, dest="n_cells", help="how many (default: %(default)s)")
    arguments = parser.parse_args()
    counts = ad.read_h5ad(arguments.cells)[: arguments.n_cells].copy()
    counts.X = csr_matrix(counts.X)
    ends: Counter[str] = Counter()
    for encoding, options in ENCODINGS.items():
        print(f"\n{encoding}: rows are how the vocabulary was made, columns how the cells come")
        for (made, make), part in itertools.product(
            UNITS.items(), ("all genes", "every second gene", "made on every second")
        ):
            first = make(counts[:, ::2].copy() if part == "made on every second" else counts)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    scbin.pp.tokenize(first, **options)
                except scbin.ScbinError as error:
                    if part == "all genes":
                        print(f"{made:>14}  refused {error.code}")
                    continue
            like = scbin.Vocabulary.from_json(first.uns["scbin"]["vocabulary"])
            row = []
            for asked in UNITS.values():
                step = slice(None, None, 2 if part == "every second gene" else None)
                reference = first[:, step].copy()  # what the cells get in the unit of the vocabulary
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    scbin.pp.tokenize(reference, like=like, tokenization=scbin.Tokenization(force=True))
                row.append(verdict(reference.obsm["X_tokens"], asked(counts)[:, step].copy(), like))
            ends.update(end.split()[0] for end in row)
            print(f"{made:>14}, {part:>20}  " + "  ".join(f"{u}: {end}" for u, end in zip(UNITS, row, strict=True)))
    print("\nin all:", ", ".join(f"{n} {end}" for end, n in ends.most_common()))
    if ends["SILENT"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
