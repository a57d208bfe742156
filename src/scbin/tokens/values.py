"""What the values of a matrix are: counts, log1p values, or something no encoding can read; and rows in one unit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import sparse

from scbin._errors import ScbinInputError, count
from scbin.tokens.kernels import merge_rows, over_rows, recover_rows, row_totals, scan_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Values = Literal["auto", "counts", "log1p"]
TARGET = 10_000.0
LOG_LIMIT, LARGEST = 14.0, 1e9  # log1p of a million is 13.8; counts that no cell has
SAMPLE = 500  # cells that are looked at closely
MOSTLY_EXACT = 0.95  # share of the sampled cells whose logs are those of whole numbers
EXACT, ROUNDED = 1e-5, 2.5e-3  # relative error of ratios: of float32, and of logs that were rounded to three decimals
COUNTED = ("not finite", "negative", "fractions", "stored", "unsorted", "whole rows", "broken rows")


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a matrix as the kernels take them: CSR, int32 columns, int64 `indptr` from 0, float values."""

    start: int
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    n_vars: int

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    def csr(self) -> sparse.csr_matrix:
        """Return a canonical CSR matrix: sorted, no duplicates, no stored zeros. The source is not touched."""
        matrix = sparse.csr_matrix((self.data, self.indices, self.indptr), shape=(self.n_rows, self.n_vars), copy=True)
        matrix.has_canonical_format = False
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return matrix

    def sorted(self) -> Block:
        """Return the block with sorted, unique columns."""
        matrix = self.csr()
        return Block(self.start, matrix.data, matrix.indices, matrix.indptr.astype(np.int64), self.n_vars)


@dataclass
class Scan:
    """Everything one pass over the stored values finds, added up over blocks of rows."""

    name: str  # of the matrix, for messages
    cells: Sequence[str]
    genes: Sequence[str]
    used: np.ndarray  # (columns,) which are gene counts
    n: Counter[str] = field(default_factory=Counter)  # how many values, or rows, of each kind in COUNTED
    largest: float = 0.0
    places: dict[str, str] = field(default_factory=dict)  # the first value that is not finite, and that is negative
    sums: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)  # positive values of the sampled cells

    def __post_init__(self) -> None:
        n_cells = len(self.cells)
        self._sampled = np.unique(np.linspace(0, n_cells - 1, min(SAMPLE, n_cells)).astype(np.int64))

    def add(self, block: Block) -> bool:
        """Take in a block of rows; False, and nothing taken in, if columns are unsorted or repeated within a row."""
        data, indices, indptr, sums = block.data, block.indices, block.indptr, np.zeros(block.n_rows)
        found = over_rows(scan_rows, indptr, (data, indices, self.used), sums)
        if any(part[4] for part in found):
            return False
        for part in found:
            self.n.update(dict(zip(COUNTED, map(int, part), strict=False)))
            self.largest = max(self.largest, float(part[-1]))
        for kind, bad in (("not finite", lambda: ~np.isfinite(data)), ("negative", lambda: data < 0)):
            if self.n[kind] and kind not in self.places:
                k = np.flatnonzero(bad() & self.used[indices])[0]
                cell = self.cells[block.start + int(np.searchsorted(indptr, k, side="right")) - 1]
                self.places[kind] = (
                    f"the first: cell {str(cell)!r}, gene {str(self.genes[indices[k]])!r}: {data[k]:.4g}"
                )
        self.sums.append(sums)
        for row in self._sampled[(self._sampled >= block.start) & (self._sampled < block.start + len(sums))]:
            part = slice(indptr[row - block.start], indptr[row - block.start + 1])
            values = data[part][self.used[indices[part]]]
            values = values[(values > 0) & np.isfinite(values)]
            if len(values) >= 5:
                self.rows.append(values.astype(np.float64))
        return True


@dataclass(frozen=True)
class Reading:
    """What the values were taken for, how surely, and what to tell the user."""

    kind: Literal["counts", "log1p"]
    base: float = float(np.e)
    target_sum: float | None = None  # what expm1 of every cell sums to, if it is one number
    by: str = ""  # what says so, if the values alone do not
    fractional: bool = False  # counts that are not whole
    exact: bool = False  # logs from which the counts can be had back
    slack: float = EXACT  # by which a ratio of two values may miss a whole number, relative to it
    warnings: tuple[tuple[str, str], ...] = ()

    @property
    def counted(self) -> bool:
        """Whether counts are known, be they whole or not."""
        return self.exact or self.kind == "counts"

    @property
    def has_counts(self) -> bool:
        """Whether whole numbers of molecules are known."""
        return self.exact if self.kind == "log1p" else not self.fractional

    @property
    def text(self) -> str:
        """In words."""
        if self.kind == "counts":
            return "counts" + (" that are not whole" if self.fractional else "")
        base = "natural log" if abs(self.base - np.e) < 1e-9 else f"log base {self.base:g}"
        total = "" if self.target_sum is None else f", cells sum to {self.target_sum:,.6g}"
        return f"log1p values ({base}{total}{self.by and f', by {self.by}'})"


def read_values(scan: Scan, values: Values = "auto", note: Mapping[str, Any] | None = None) -> Reading:
    """Decide what the scanned values are, in a fixed order of rules; `note` is `uns["log1p"]`.

    Raises the typed error for values that no encoding can read: not finite, negative, normalised but not logged, too large.
    """
    name, largest, n, rows = scan.name, scan.largest, scan.n, scan.rows
    _refuse(scan)
    share, warnings = n["fractions"] / max(1, n["stored"]), []
    if largest > 1e6:
        found = f"{name} has values up to {largest:.4g}"
        warnings.append(("I08", f"{found}; above 2^24 float32 cannot hold every whole number."))

    def counts() -> Reading:
        found = f"{name} has non-integer counts ({share:.2g} of the stored values), as after ambient correction"
        fractional = ("I07", f'{found}; taken as counts, not rounded. Pass values="log1p" if they are logs.')
        return Reading("counts", fractional=share > 0, warnings=(*warnings, *([fractional] if share else [])))

    if values == "counts" or (values == "auto" and not share):
        return counts()
    slack = ROUNDED if all((abs(row - row.round(3)) <= 1e-6).all() for row in rows) else EXACT

    def logs(base: float, by: str = "") -> Reading:
        if largest * np.log(base) > np.log(LARGEST):
            found = f"{name} has values up to {largest:.4g}, which no log1p value can reach"
            raise ScbinInputError("I08", f'{found}. Pass values="counts" if they are counts.')
        linear = [np.expm1(row * np.log(base)) for row in rows]
        exact = _whole_share(linear, up_to=4, slack=slack) >= MOSTLY_EXACT
        total = _constant(np.array([row.sum() for row in linear]))
        return Reading("log1p", base, total, by, exact=exact, slack=slack, warnings=tuple(warnings))

    _refuse_two_units(scan, values)
    noted = float((note or {}).get("base") or np.e)
    base = _log_base(rows, slack) if largest * np.log(2) <= np.log(LARGEST) else None
    if values == "log1p":
        return logs(base or noted)
    constant = _constant(np.concatenate(scan.sums))
    if constant is not None or _whole_share(rows) > 0.5:
        sums = "" if constant is None else f" (cells sum to {constant:,.6g})"
        fix = "Log it, sc.pp.log1p(adata), or pass the layer that holds counts: layer=."
        raise ScbinInputError("I02", f"{name} looks like counts times a factor per cell{sums}, not logged. {fix}")
    if base is not None and largest <= LOG_LIMIT:
        return logs(base)
    if _whole_share([row**2 for row in rows]) > 0.5:
        fix = "Pass the layer that holds counts, layer=, or undo the root: adata.X = adata.X.power(2), then round."
        raise ScbinInputError("I02", f"{name} looks like square roots of counts. {fix}")
    if note is not None:
        return logs(noted, "uns['log1p']")
    if largest > LOG_LIMIT:
        return counts()
    found = f"{name} was taken for log1p values by its range only (largest {largest:.4g})"
    fix = 'Pass values="log1p" or values="counts" to say which.'
    warnings.append(("I01", f"{found}; low corrected counts look the same. {fix}"))
    return logs(float(np.e), "range only")


def _refuse(scan: Scan) -> None:
    """Raise for values that are neither counts nor logs of any kind."""
    n, name = scan.n, scan.name
    if n["not finite"]:
        found = f"{count(n['not finite'], 'value that is', 'values that are')} not finite"
        raise ScbinInputError("I05", f"{name} has {found} ({scan.places['not finite']}). Replace or remove them.")
    if n["negative"]:
        found = f"{name} has {count(n['negative'], 'negative value')} ({scan.places['negative']})"
        cause = "as after sc.pp.scale" if n["fractions"] else "all whole, as after a background removal gone wrong"
        code = "I03" if n["fractions"] else "I04"
        raise ScbinInputError(code, f"{found}, {cause}; scbin needs counts or log1p values: pass their layer, layer=.")
    if scan.largest > LARGEST:
        found = f"{name} has values up to {scan.largest:.4g}, which is impossible for a cell"
        raise ScbinInputError("I08", f"{found}. Use the original counts.")


def _refuse_two_units(scan: Scan, values: Values) -> None:
    """Raise where some cells are whole numbers and the others logs."""
    if not (scan.n["whole rows"] and scan.n["broken rows"]):
        return
    base = _log_base([row for row in scan.rows if row.max() <= LOG_LIMIT and (row != np.rint(row)).any()], EXACT)
    if base == 2.0 or (base is None and values != "log1p"):  # logs base 2 of unscaled counts may be whole
        return
    whole, logs = (count(scan.n[kind], "cell has", "cells have") for kind in ("whole rows", "broken rows"))
    found = f"{whole} whole numbers, as counts are, and {logs} log1p values"
    raise ScbinInputError("I01", f"{scan.name} holds two units: {found}. Bring all cells to one unit.")


def _whole_share(rows: list[np.ndarray], up_to: int = 1, slack: float = EXACT) -> float:
    """Share of cells that are whole multiples of their smallest value, or of a half, a third ... of it `up_to`."""
    fits = []
    for row in rows:
        ratios = np.outer(np.arange(1, up_to + 1), row / row.min())
        if (ratios[0] > 1.5).any():
            fit = np.abs(ratios - np.rint(ratios)) <= np.minimum(slack * ratios + 1e-4, 0.25)
            fits.append(fit.all(axis=1).any())
    return sum(fits) / max(1, len(fits))


def _log_base(rows: list[np.ndarray], slack: float) -> float | None:
    """Return the base of logs of whole numbers, None if most cells hold no such."""
    for base in (float(np.e), 2.0, 10.0):
        if _whole_share([np.expm1(row * np.log(base)) for row in rows], slack=slack) > 0.5:
            return base
    return None


def _constant(sums: np.ndarray) -> float | None:
    """Return the sum that all cells share to 1e-3, if there are three cells and one such number.

    A sum that float32 blurred is brought back to the round number it was: 9999.98 -> 10000.
    """
    sums = sums[sums > 0]
    if len(sums) < 3 or sums.max() - sums.min() > 1e-3 * sums.mean():
        return None
    value = float(np.median(sums))
    rounded = float(f"{value:.3g}")
    return rounded if abs(value - rounded) < 1e-3 * rounded else float(f"{value:.5g}")


# ---- rows in one unit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """Some cells as an encoding reads them: CSR arrays in which no gene has two columns."""

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    columns: np.ndarray  # gene of each column (columns,); -1: none of the vocabulary, -2: no gene count
    totals: np.ndarray  # sum over all gene columns (rows,)
    matched: np.ndarray  # sum over those of the vocabulary (rows,)
    logs: bool  # natural logs; else counts
    exact: np.ndarray | None = None  # (rows,) whether counts could be had back from logs; None where they were not

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1


class RowReader:
    """Makes `Rows` of CSR arrays: columns of one gene are added up, and units converted where that is exact."""

    def __init__(self, columns: np.ndarray, reading: Reading):
        self.columns, self.reading = columns.astype(np.int32), reading
        known = np.flatnonzero(columns >= 0)
        genes, first = np.unique(columns[known], return_index=True)
        self._owner = None
        if len(genes) < len(known):  # each column of a repeated gene is moved onto the first
            self._owner = np.arange(len(columns), dtype=np.int32)
            self._owner[known] = known[first][np.searchsorted(genes, columns[known])]

    def read(self, block: Any, unit: Literal["counts", "log1p", "any"] = "any", target: float = TARGET) -> Rows:
        """Return the rows of a block (with `data`, `indices`, `indptr`) in a unit.

        "counts": whole molecules, which logs must allow; "log1p": logs, if such came, of counts per `target`, else counts; "any":
        as they came.
        """
        data, indices, indptr = block.data, block.indices, block.indptr
        logs, exact, total = self.reading.kind == "log1p", None, self.reading.target_sum
        if logs and abs(self.reading.base - np.e) >= 1e-9:
            data = data * np.log(self.reading.base)
        if self._owner is not None:
            values, merged, bounds = np.empty(len(data)), np.empty(len(data), np.int32), np.zeros(len(indptr), np.int64)
            over_rows(merge_rows, indptr, (data, indices, self._owner, logs), (values, merged, bounds), parts=1)
            data, indices, indptr = values[: bounds[-1]], merged[: bounds[-1]], bounds
        if logs and unit == "counts":
            counts, exact = np.empty(len(data)), np.zeros(len(indptr) - 1, dtype=bool)
            over_rows(recover_rows, indptr, (data, indices, self.columns, self.reading.slack), (counts, exact))
            data, logs = counts, False
        elif logs and unit == "log1p" and total is not None and abs(total - target) >= 1e-2:
            data = np.log1p(np.expm1(data.astype(np.float64)) * (target / total))
        totals, matched = np.zeros((2, len(indptr) - 1))
        over_rows(row_totals, indptr, (data, indices, self.columns), (totals, matched))
        return Rows(data, indices, indptr, self.columns, totals, matched, logs, exact)
