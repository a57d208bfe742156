"""What the values of a matrix are: counts, log1p values, or something no encoding can read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from scbin._errors import ScbinInputError, count
from scbin.encoding.kernels import frozen, over_rows
from scbin.encoding.scanning import scan_rows, scan_rows_fast

Values = Literal["auto", "counts", "log1p"]
LOG_LIMIT = 14.0  # log1p of a million is 13.8
SAMPLE = 500
NOT_FINITE = 0x7F800000  # bits of a float32 from which on it is infinite, no number, or negative


@lru_cache(8)
def _sampled(n_obs: int) -> np.ndarray:
    """Return the cells that are looked at closely, evenly spaced."""
    return np.unique(np.linspace(0, n_obs - 1, min(SAMPLE, n_obs)).astype(np.int64))


Place = tuple[int, int, float]  # row, column, value
# in the order in which `scan_rows` returns them
COUNTED = ("not_finite", "negative", "negative_fraction", "fractions", "zeros", "unsorted")


@dataclass
class Scan:
    """Everything one pass over the stored values finds, added up over blocks of rows."""

    n_obs: int
    threads: int | None = None  # that share the rows of a block
    not_finite: int = 0
    negative: int = 0
    negative_fraction: int = 0
    fractions: int = 0
    zeros: int = 0
    unsorted: int = 0
    stored: int = 0
    largest: float = 0.0
    largest_at: int = -1  # row of the first block that holds the largest value
    not_finite_at: list[Place] = field(default_factory=list)  # the first ones
    negative_at: list[Place] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)  # positive values of the sampled cells

    def add(
        self, start: int, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, n_vars: int, used: np.ndarray
    ) -> bool:
        """Take in a block of rows; say whether its columns were unsorted or repeated within a row."""
        sums = np.zeros(len(indptr) - 1)
        rows = (frozen(indptr), frozen(data), frozen(indices))
        found = over_rows(scan_rows, *rows, n_vars, frozen(used), sums, threads=self.threads)
        for part in found:
            for name, value in zip(COUNTED, part, strict=False):
                setattr(self, name, getattr(self, name) + int(value))
            self.stored += int(part[7])
        largest = max((float(part[9]) for part in found), default=0.0)
        if largest > self.largest:
            self.largest, self.largest_at = largest, start
        if any(part[0] or part[1] for part in found):
            self._note_bad(start, data, indices, indptr, used)
        self.sums.append(sums)
        self._sample(start, data, indices, indptr, used)
        return any(part[5] for part in found)

    def add_fast(
        self, start: int, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, used: np.ndarray, seen: np.ndarray
    ) -> bool:
        """Take in a block if nothing about it needs a closer look: float32, finite, not negative, columns in order."""
        if data.dtype != np.float32 or not used.all():
            return False
        sums = np.zeros(len(indptr) - 1)
        bits = frozen(data.view(np.uint32))
        rows = (frozen(indptr), frozen(data), bits, frozen(indices))
        found = over_rows(scan_rows_fast, *rows, sums, seen, threads=self.threads)
        highest = max((int(part[0]) for part in found), default=0)
        if highest >= NOT_FINITE or any(part[3] for part in found):
            return False
        largest = float(np.uint32(highest).view(np.float32))
        if largest > self.largest:
            self.largest, self.largest_at = largest, start
        self.stored += len(data)
        self.zeros += sum(int(part[2]) for part in found)
        self.fractions += len(data) - sum(int(part[1]) for part in found)
        self.sums.append(sums)
        self._sample(start, data, indices, indptr, used)
        return True

    @property
    def positive(self) -> bool:
        """Whether every value of the used columns is finite and above 0."""
        return not (self.not_finite or self.negative or self.zeros)

    def merge(self, other: Scan) -> None:
        """Take in what was found in later rows."""
        for name in (*COUNTED, "stored"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.largest > self.largest:
            self.largest, self.largest_at = other.largest, other.largest_at
        self.not_finite_at = (self.not_finite_at + other.not_finite_at)[:3]
        self.negative_at = (self.negative_at + other.negative_at)[:3]
        self.sums += other.sums
        self.rows += other.rows

    def _note_bad(
        self, start: int, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, used: np.ndarray
    ) -> None:
        finite = np.isfinite(data)
        for bad, noted in ((~finite, self.not_finite_at), (finite & (data < 0), self.negative_at)):
            first = np.flatnonzero(bad & used[indices])[: 3 - len(noted)]
            rows = np.searchsorted(indptr, first, side="right") - 1
            noted += [(start + int(r), int(indices[k]), float(data[k])) for r, k in zip(rows, first, strict=True)]

    def _sample(self, start: int, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, used: np.ndarray) -> None:
        every = _sampled(self.n_obs)
        low, high = np.searchsorted(every, [start, start + len(indptr) - 1])
        for row in every[low:high] - start:
            part = slice(indptr[row], indptr[row + 1])
            values = data[part][used[indices[part]]]
            values = values[(values > 0) & np.isfinite(values)]
            if len(values) >= 5:
                self.rows.append(values.astype(np.float64))

    @property
    def row_sums(self) -> np.ndarray:
        """Sum of each cell (cells,)."""
        return np.concatenate([np.zeros(0), *self.sums])


@dataclass(frozen=True)
class Reading:
    """What the values were taken for, how surely, and what to tell the user."""

    kind: Literal["counts", "log1p"]
    base: float = float(np.e)
    target_sum: float | None = None  # what expm1 of every cell sums to, if it is one number
    by: Literal["values", "uns", "range", "asked"] = "values"
    fractional: bool = False  # counts that are not whole
    warnings: tuple[tuple[str, str], ...] = ()

    @property
    def log_factor(self) -> float:
        """Factor that turns the stored logs into natural logs; 0 for counts."""
        return 0.0 if self.kind == "counts" else float(np.log(self.base))

    @property
    def text(self) -> str:
        """In words."""
        if self.kind == "counts":
            return "counts" + (" that are not whole" if self.fractional else "")
        base = "natural log" if abs(self.base - np.e) < 1e-9 else f"log base {self.base:g}"
        total = "" if self.target_sum is None else f", cells sum to {self.target_sum:,.6g}"
        sure = {"uns": ", by uns['log1p']", "range": ", by range only"}.get(self.by, "")
        return f"log1p values ({base}{total}{sure})"


def read_values(
    scan: Scan,
    *,
    values: Values = "auto",
    noted: bool = False,
    noted_base: float | None = None,
    name: str = "X",
    places: str = "",
) -> Reading:
    """Decide what the scanned values are, in a fixed order of rules; `noted` says that `uns["log1p"]` exists.

    Raises the typed error for values that no encoding can read: not finite, negative, normalised but not logged, too large.
    """
    _refuse(scan, name, places)
    warnings: list[tuple[str, str]] = []
    if scan.largest > 1e6:
        warnings.append(
            ("I08", f"{name} has values up to {scan.largest:.4g}; above 2^24 float32 cannot hold every whole number.")
        )
    if values == "counts" or (values == "auto" and scan.fractions == 0):
        if scan.fractions:
            warnings.append(_fractional(scan, name))
        by: Literal["asked", "values"] = "asked" if values == "counts" else "values"
        return Reading("counts", by=by, fractional=scan.fractions > 0, warnings=tuple(warnings))
    if values == "log1p":
        _refuse_logs(scan, 2.0, name)  # before anything is raised to a power
        base = _log_base(scan.rows) or noted_base or float(np.e)
        _refuse_logs(scan, base, name)
        return Reading("log1p", base, _log_total(scan.rows, base), "asked", warnings=tuple(warnings))
    return _guess(scan, noted, noted_base, name, warnings)


def _guess(scan: Scan, noted: bool, noted_base: float | None, name: str, warnings: list[tuple[str, str]]) -> Reading:
    constant = _constant(scan.row_sums)
    if constant is not None or _mostly_whole(scan.rows):
        sums = "" if constant is None else f" (cells sum to {constant:,.6g})"
        raise ScbinInputError(
            "I02",
            f"{name} looks like counts times a factor per cell{sums}, not logged. Log it, sc.pp.log1p(adata), or pass the "
            "layer that holds counts: layer=.",
        )
    if scan.largest <= LOG_LIMIT:
        base = _log_base(scan.rows)
        if base is not None:
            return Reading("log1p", base, _log_total(scan.rows, base), warnings=tuple(warnings))
    if _mostly_whole([row**2 for row in scan.rows]):
        raise ScbinInputError(
            "I02",
            f"{name} looks like square roots of counts. Pass the layer that holds counts, layer=, or undo the root: "
            "adata.X = adata.X.power(2), then round.",
        )
    if noted:
        base = noted_base or float(np.e)
        _refuse_logs(scan, base, name)
        return Reading("log1p", base, _log_total(scan.rows, base), "uns", warnings=tuple(warnings))
    if scan.largest <= LOG_LIMIT:
        warnings.append(
            (
                "I01",
                f"{name} was taken for log1p values by its range only (largest {scan.largest:.4g}); low corrected counts "
                'look the same. Pass values="log1p" or values="counts" to settle it.',
            )
        )
        return Reading("log1p", target_sum=_log_total(scan.rows, np.e), by="range", warnings=tuple(warnings))
    warnings.append(_fractional(scan, name))
    return Reading("counts", fractional=True, warnings=tuple(warnings))


def _fractional(scan: Scan, name: str) -> tuple[str, str]:
    share = scan.fractions / max(1, scan.stored)
    return (
        "I07",
        f"{name} has non-integer counts ({share:.2g} of the stored values), as after ambient correction; taken as "
        'counts, not rounded. Pass values="log1p" if they are logs.',
    )


def _refuse(scan: Scan, name: str, places: str) -> None:
    if scan.not_finite:
        raise ScbinInputError(
            "I05",
            f"{name} has {count(scan.not_finite, 'value that is', 'values that are')} not finite ({places}). Replace or "
            "remove them.",
        )
    if scan.negative and scan.fractions:
        raise ScbinInputError(
            "I03",
            f"{name} has {count(scan.negative, 'negative value')} ({places}), as after sc.pp.scale; scbin needs counts or log1p "
            "values.",
        )
    if scan.negative:
        raise ScbinInputError(
            "I04",
            f"{name} has {count(scan.negative, 'value')} below 0 ({places}), all whole: usually a background removal gone "
            "wrong. Use the original counts.",
        )
    if scan.largest > 1e9:
        raise ScbinInputError(
            "I08", f"{name} has values up to {scan.largest:.4g}, which no cell can have. Use the original counts."
        )


def _refuse_logs(scan: Scan, base: float, name: str) -> None:
    """Refuse logs of more than a billion counts: they are no logs."""
    if scan.largest * np.log(base) > np.log(1e9):
        raise ScbinInputError(
            "I08",
            f'{name} has values up to {scan.largest:.4g}, which no log1p value can reach. Pass values="counts" if they are '
            "counts.",
        )


def _mostly_whole(rows: list[np.ndarray]) -> bool:
    """Whether most cells are whole multiples of their smallest value."""
    informative = fits = 0
    for row in rows:
        ratio = row / row.min()
        if not (ratio > 1.5).any():
            continue
        informative += 1
        fits += bool((np.abs(ratio - np.rint(ratio)) <= 1e-5 * ratio + 1e-4).all())
    return fits > informative / 2


def _log_base(rows: list[np.ndarray]) -> float | None:
    for base in (float(np.e), 2.0, 10.0):
        if _mostly_whole([np.expm1(row * np.log(base)) for row in rows]):
            return base
    return None


def _constant(sums: np.ndarray) -> float | None:
    """Return the sum that all cells share to 1e-3, if there are three cells and one such number."""
    sums = sums[sums > 0]
    if len(sums) < 3 or sums.max() - sums.min() > 1e-3 * sums.mean():
        return None
    return _tidy(float(np.median(sums)))


def _log_total(rows: list[np.ndarray], base: float) -> float | None:
    return _constant(np.array([np.expm1(row * np.log(base)).sum() for row in rows]))


def _tidy(value: float) -> float:
    """Bring a sum that float32 blurred back to the round number it was: 9999.98 -> 10000."""
    rounded = float(f"{value:.3g}")
    return rounded if abs(value - rounded) < 1e-3 * rounded else float(f"{value:.5g}")
