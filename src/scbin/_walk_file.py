"""Looking at a file from a stranger, in a process of its own: `python -m scbin._walk_file` prints what is wrong as JSON lines.

Nothing is read before its declared size, links and filters have been looked at. Started by `scbin check`, which sets the limits
and counts a crash of this process as a finding.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scbin._stored import Finding, Stored, Unreadable, open_hdf5, open_zarr, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

PART = 4_000_000  # values read at once
KNOWN = {
    *(
        "anndata",
        "raw",
        "dict",
        "dataframe",
        "csr_matrix",
        "csc_matrix",
        "array",
        "categorical",
        "string",
        "string-array",
    ),
    *("numeric-scalar", "nullable-integer", "nullable-boolean", "nullable-string-array", "rec-array", "awkward-array"),
    *("null", "bytes", ""),
}
NULLABLE = {"nullable-integer", "nullable-boolean", "nullable-string-array"}


def walk(path: Path, say: Callable[[str], None] = lambda where: None) -> tuple[list[Finding], tuple[int, int] | None]:
    """Return what is wrong with an h5ad file or a zarr directory, and the numbers of cells and genes if they can be told."""
    try:
        stored = open_zarr(path, say) if path.is_dir() else open_hdf5(path, say)
    except Unreadable as error:
        return [error.finding], None
    if any(finding.wrong for finding in stored.findings):
        return stored.findings, None
    checker = Checker(stored, say)
    shape = checker.everything()
    return [*stored.findings, *checker.findings], shape


class Checker:
    """Compares the parts of a stored AnnData with each other; each part is read in pieces, and only once it has a sane size."""

    def __init__(self, stored: Stored, say: Callable[[str], None]):
        self.stored, self.say, self.findings = stored, say, list[Finding]()

    def wrong(self, code: str, where: str, text: str) -> None:
        self.findings.append(Finding(code, where, text))

    def note(self, code: str, where: str, text: str) -> None:
        self.findings.append(Finding(code, where, text, wrong=False))

    def everything(self) -> tuple[int, int] | None:
        for where in self.stored.parts:
            kind = self.kind(where)
            if kind not in KNOWN:
                self.wrong("M45", where, f"is encoded as {shown(kind)}, which anndata does not know")
        n_obs, n_vars = self.frame("obs", None), self.frame("var", None)
        if n_obs is None or n_vars is None:
            return None
        matrices = {"X": (n_obs, n_vars)}
        matrices |= dict.fromkeys(self.below("layers"), (n_obs, n_vars))
        matrices |= dict.fromkeys(self.below("obsp"), (n_obs, n_obs)) | dict.fromkeys(
            self.below("varp"), (n_vars, n_vars)
        )
        for where, shape in matrices.items():
            self.matrix(where, shape)
        for slot, n in (("obsm", n_obs), ("varm", n_vars)):
            for where in self.below(slot):
                self.frame(where, n) if self.kind(where) == "dataframe" else self.matrix(where, (n,))
        if "raw" in self.stored.parts:
            n_raw = self.frame("raw/var", None)
            if n_raw is not None:
                self.matrix("raw/X", (n_obs, n_raw))
        if "X" not in self.stored.parts:
            self.note("M45", "X", "is not there; name a layer when tokenizing")
        return n_obs, n_vars

    def kind(self, where: str) -> str:
        return str(self.stored.attribute(where, "encoding-type") or "")

    def below(self, where: str) -> list[str]:
        depth = where.count("/") + 1
        return [part for part in self.stored.parts if part.startswith(f"{where}/") and part.count("/") == depth]

    def array(self, where: str) -> Any:
        """Return an array if it is there."""
        part = self.stored.parts.get(where)
        return part if hasattr(part, "dtype") else None

    # ---- tables -------------------------------------------------------------------------------------------------------

    def frame(self, where: str, n: int | None) -> int | None:
        """Check a table; return its number of rows."""
        self.say(where)
        if where not in self.stored.parts:
            self.wrong("M47", where, "is not there; it needs a table")
            return None
        if self.array(where) is not None:
            self.note(
                "M45", where, "is a table as anndata before 0.7 wrote it; read and write it with a recent version"
            )
            return int(self.array(where).shape[0])
        index = self.stored.attribute(where, "_index")
        rows = self.length(f"{where}/{index}") if isinstance(index, str) and index else None
        if rows is None or rows < 0:
            self.wrong("M47", where, f"names {shown(index)} as its index, which is not there")
            return None
        if n is not None and rows != n:
            self.wrong("M48", where, f"has {rows:,} rows, but {n:,} belong there")
        order = self.stored.attribute(where, "column-order")
        for name in [] if order is None else [str(name) for name in order]:
            if f"{where}/{name}" not in self.stored.parts:
                self.wrong("M47", where, f"lists a column {shown(name)} that is not there")
        for part in self.below(where):
            self.column(part, rows)
        return rows

    def column(self, where: str, n: int) -> None:
        self.say(where)
        length = self.length(where)
        if length is not None and length != n:
            self.wrong("M48", where, f"has {max(length, 0):,} values, but {n:,} belong there")

    def length(self, where: str) -> int | None:
        """Return how many values a column, or an index, has: None if it is no column, -1 if its parts do not fit."""
        if self.kind(where) == "categorical":
            return self.categorical(where)
        if self.kind(where) in NULLABLE:  # text too, from anndata 0.13 on
            parts = [self.array(f"{where}/{name}") for name in ("values", "mask")]
            lengths = {-1 if part is None or len(part.shape) != 1 else int(part.shape[0]) for part in parts}
            return lengths.pop() if len(lengths) == 1 else -1
        array = self.array(where)
        return None if array is None else int(array.shape[0]) if len(array.shape) else -1

    def categorical(self, where: str) -> int:
        codes, most = self.array(f"{where}/codes"), self.length(f"{where}/categories")
        if codes is None or most is None or codes.dtype.kind not in "iu" or len(codes.shape) != 1:
            self.wrong("M47", where, "is a categorical without codes or categories")
            return -1
        most = max(most, 0)
        low, high = self.extremes(f"{where}/codes")
        if low < -1 or high >= most:
            self.wrong("M49", where, f"has codes from {low} to {high}, but {most:,} categories")
        return int(codes.shape[0])

    # ---- matrices -----------------------------------------------------------------------------------------------------

    def matrix(self, where: str, shape: tuple[int, ...]) -> None:
        self.say(where)
        if self.kind(where) in ("csr_matrix", "csc_matrix"):
            self.sparse(where, shape)
            return
        array = self.array(where)
        if array is None:
            return
        found = tuple(int(length) for length in array.shape)
        if found[: len(shape)] != shape:
            self.wrong("M48", where, f"has shape {found}, but {shape} belongs there")
        if array.dtype.kind not in "biuf":
            if array.dtype.kind not in "OTSU" or where == "X" or where.startswith("layers/"):
                self.wrong("M46", where, f"holds {shown(str(array.dtype))}, no numbers")
            return
        self.finite(where)

    def sparse(self, where: str, shape: tuple[int, ...]) -> None:
        """Check that the three arrays of a sparse matrix fit each other, before any code relies on it."""
        claimed = self.stored.attribute(where, "shape")
        found = tuple(int(length) for length in claimed) if claimed is not None and len(claimed) == 2 else ()
        if found[: len(shape)] != shape:
            self.wrong("M48", where, f"has shape {found or 'unknown'}, but {shape} belongs there")
            return
        data, indices, indptr = (self.array(f"{where}/{name}") for name in ("data", "indices", "indptr"))
        if any(part is None or len(part.shape) != 1 for part in (data, indices, indptr)):
            self.wrong("M47", where, "is a sparse matrix without data, indices or indptr")
            return
        rows, columns = found if self.kind(where) == "csr_matrix" else found[::-1]
        if indices.dtype.kind not in "iu" or indptr.dtype.kind not in "iu" or data.dtype.kind not in "biuf":
            self.wrong("M46", where, "holds no numbers, or indices that are none")
            return
        if indptr.shape[0] != rows + 1 or data.shape[0] != indices.shape[0]:
            self.wrong(
                "M50",
                where,
                f"has {indptr.shape[0]:,} pointers for {rows:,} rows, {data.shape[0]:,} values and {indices.shape[0]:,} indices",
            )
            return
        self.pointers(where, int(data.shape[0]))
        low, high = self.extremes(f"{where}/indices")
        if data.shape[0] and (low < 0 or high >= columns):
            self.wrong("M50", where, f"has indices from {low} to {high}, but {columns:,} columns")
        self.finite(f"{where}/data")

    def pointers(self, where: str, n_values: int) -> None:
        last = 0
        for k, part in enumerate(self.pieces(f"{where}/indptr")):
            values = part.astype("int64")
            if (k == 0 and values[0] != 0) or values[0] < last or (values[1:] < values[:-1]).any():
                self.wrong("M50", where, "has pointers (indptr) that do not rise from 0")
                return
            last = int(values[-1])
        if last != n_values:
            self.wrong("M50", where, f"has pointers (indptr) up to {last:,}, but {n_values:,} values")

    def finite(self, where: str) -> None:
        import numpy as np

        if self.array(where).dtype.kind != "f":
            return
        bad = sum(int(np.count_nonzero(~np.isfinite(part))) for part in self.pieces(where))
        if bad and where.split("/")[0] in ("X", "layers", "raw"):
            self.wrong("M51", where, f"has {bad:,} values that are NaN or infinite")
        elif bad:
            self.note("M51", where, f"has {bad:,} values that are NaN or infinite")

    def extremes(self, where: str) -> tuple[int, int]:
        low, high = 0, -1
        for k, part in enumerate(self.pieces(where)):
            least, most = int(part.min()), int(part.max())
            low, high = (least, most) if k == 0 else (min(low, least), max(high, most))
        return low, high

    def pieces(self, where: str) -> Iterator[np.ndarray]:
        """Yield an array in consecutive pieces along its first axis."""
        array = self.array(where)
        self.say(where)
        per_row = max(1, math.prod(array.shape[1:]))
        chunk = array.chunks[0] if getattr(array, "chunks", None) else 1
        step = max(1, PART // per_row // chunk * chunk)
        try:
            for start in range(0, array.shape[0] if array.shape else 0, step):
                yield array[start : start + step]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            self.wrong("M43", where, f"cannot be read ({shown(str(error))})")


# ---- as a process ----------------------------------------------------------------------------------------------------


def set_limits(memory: int, seconds: int) -> None:
    """Let this process have so much more memory and so much time, and no more."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; the parent's clock remains
        return
    now = 0
    if Path("/proc/self/statm").exists():
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def tell(**content: Any) -> None:
    """Print one line for the parent."""
    print(json.dumps(content), flush=True)


def tell_walk(path: Path) -> None:
    """Print where the walk is, then what it found."""
    findings, shape = walk(path, lambda where: tell(at=where[:200]))
    tell(findings=[[f.code, f.where, f.text, f.wrong] for f in findings[:200]], n=len(findings), shape=shape)


def tell_check(path: Path, like: str | None) -> None:
    """Print what `scbin.pp.check` says of a sound file."""
    import anndata as ad

    from scbin._errors import ScbinError
    from scbin.pp import check

    try:
        adata = ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path, backed="r")
        table = check(adata, like=like, quiet=True)
    except ScbinError as error:
        tell(rows=[["error", error.code, str(error).split("] ", 1)[-1]]])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        tell(rows=[["error", "M55", f"anndata cannot read it ({type(error).__name__}: {shown(str(error))})"]])
    else:
        tell(rows=table.astype(str).to_numpy().tolist())


def main(arguments: list[str]) -> None:
    """Run as `python -m scbin._walk_file walk|check FILE MEMORY SECONDS [LIKE]`."""
    what, path, memory, seconds = arguments[0], Path(arguments[1]), int(arguments[2]), int(arguments[3])
    warnings.simplefilter("ignore")
    if what == "walk":
        import zarr  # noqa: F401 - imported before the limits are set, as its libraries are not counted

        set_limits(memory, seconds)
        tell_walk(path)
    else:
        import anndata  # noqa: F401

        import scbin.pp  # noqa: F401

        set_limits(memory, seconds)
        tell_check(path, arguments[4] if len(arguments) > 4 else None)


if __name__ == "__main__":
    main(sys.argv[1:])
