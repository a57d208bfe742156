"""`level="gene"`: how edits of some genes move the vectors of the other genes of their cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from scbin._errors import ScbinInputError
from scbin.encoding.edits import edit_rows
from scbin.nn.effects import gene_vectors
from scbin.nn.perturbation import cosine_shift
from scbin.tl._perturb_run import Result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scbin.nn.perturbation import RowEncoder
    from scbin.tl._perturb_plan import Plan
    from scbin.tl._perturb_run import Job

MOST_TABLE = 20_000_000  # (perturbed, affected) pairs that are held as sums


@dataclass(eq=False)
class Sums:
    """Number, sum and sum of squares of shifts by perturbed set and affected gene (sets, genes)."""

    n: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    def add(self, which: np.ndarray, genes: np.ndarray, shifts: np.ndarray) -> None:
        """Take in shifts of genes under edits of sets."""
        at = which * self.n.shape[1] + genes
        for sums, values in ((self.n, np.ones_like(shifts)), (self.total, shifts), (self.squares, shifts**2)):
            sums += np.bincount(at, weights=values, minlength=sums.size).reshape(sums.shape)

    def table(self, perturbed: Sequence[str], affected: Sequence[str]) -> pd.DataFrame:
        """Return mean and population standard deviation of all pairs that occurred."""
        row, column = np.nonzero(self.n)
        n = self.n[row, column]
        mean = self.total[row, column] / n
        spread = np.sqrt(np.maximum(self.squares[row, column] / n - mean**2, 0))
        names = (np.asarray(perturbed, dtype=object)[row], np.asarray(affected, dtype=object)[column])
        return pd.DataFrame(
            {"perturbed": names[0], "affected": names[1], "shift": mean, "sd": spread, "n_cells": n.astype(np.int64)}
        )


def run_affected(job: Job, encoder: RowEncoder, genes: Sequence[str]) -> tuple[Result, pd.DataFrame]:
    """Return the mean shift over the other genes for each pair, and the table of affected genes, whole cells first."""
    plan, rows = job.plan, job.rows
    shape = (len(plan.sets), len(genes))
    if shape[0] * shape[1] > MOST_TABLE:
        raise ScbinInputError(
            "P44",
            f"{shape[0]:,} perturbed times {shape[1]:,} affected genes are more than the {MOST_TABLE:,} pairs that fit into a "
            "table. Name fewer genes to perturb.",
        )
    sums = Sums(*np.zeros((3, *shape)))
    values = np.full((plan.n_pairs, 1), np.nan, dtype=np.float32)
    lengths = np.diff(rows.tokens.indptr)[plan.cells].astype(np.int64)
    n_each = max(1, 16 * encoder.token_budget // max(1, int(lengths.max(initial=1))))
    with tqdm(total=plan.n_pairs, desc="perturbing", unit="edit", disable=not job.progress) as bar:
        for start in range(0, plan.n_pairs, n_each):
            at = np.arange(start, min(start + n_each, plan.n_pairs))
            pair, gene, shifts = _shifts(job, encoder, plan, at)
            sums.add(plan.which[at][pair], gene, shifts)
            n = np.bincount(pair, minlength=len(at))
            mean = np.bincount(pair, weights=shifts, minlength=len(at)) / np.maximum(n, 1)
            values[at, 0] = np.where(n > 0, mean, np.nan)
            bar.update(len(at))
    table = sums.table(plan.names, genes)
    result = Result(values, np.ones(shape[0], dtype=bool), "exact", {})
    whole = Sums(*np.zeros((3, shape[0], 1)))
    known = np.isfinite(values[:, 0])
    whole.add(plan.which[known], np.zeros(int(known.sum()), dtype=np.int64), values[known, 0].astype(np.float64))
    return result, pd.concat([whole.table(plan.names, ["cell"]), table], ignore_index=True)


def _shifts(job: Job, encoder: RowEncoder, plan: Plan, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pair, gene and shift of every gene that stands in a cell before and after, but for those edited."""
    rows, n_genes = job.rows, len(job.rows.vocabulary.genes)
    cells, edited_genes = plan.cells[at], plan.genes[at]
    edited = edit_rows(rows, job.edit, cells, edited_genes)
    changed = np.flatnonzero(edited.changed)
    after, pair, gene = gene_vectors(encoder, edited.tokens[changed])
    pair = changed[pair]
    distinct, of = np.unique(cells, return_inverse=True)
    before, row, known = gene_vectors(encoder, rows.tokens[distinct])
    keys = row * n_genes + known
    wanted = of.reshape(-1)[pair] * n_genes + gene
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    kept = (keys[place] == wanted) & ~(edited_genes[pair] == gene[:, None]).any(axis=1)
    return pair[kept], gene[kept], cosine_shift(before[place[kept]], after[kept])
