"""One matrix of one AnnData, read several times by row blocks: which columns count, what its values are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._anndata import Block, layer_names, matrix_of, raw_blocks
from scbin._errors import ScbinInputError
from scbin._sparse import check_columns
from scbin.encoding.values import Reading, Scan, Values, read_values
from scbin.pp._ahead import ahead, held, in_order, workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from anndata import AnnData

COUNT_LAYERS = ("counts", "raw_counts", "raw")


class Source:
    """The matrix that a verb reads: `X`, or a layer."""

    def __init__(self, adata: AnnData, layer: str | None):
        self.adata = adata
        self.layer = layer
        self.name = "X" if layer is None else f"layers[{layer!r}]"
        self.used, self.left_out = _used_columns(adata)
        self.workers, self.threads = workers()
        self._unsorted: set[int] = set()
        self._seen = np.zeros(adata.n_vars, dtype=bool)
        self._scan: Scan | None = None

    def blocks(self) -> Iterator[Block]:
        """Go through the rows; after the scan every block is sorted and has no duplicates."""
        for block in self.unsorted_blocks():
            yield self._sorted(block) if block.start in self._unsorted else block

    @property
    def by_column(self) -> bool:
        """Whether a matrix on disk is stored by columns."""
        return self.adata.isbacked and getattr(matrix_of(self.adata, self.layer), "format", None) == "csc"

    @property
    def n_zero_genes(self) -> int:
        """Columns without a stored value in any cell."""
        return int((~self._seen & self.used).sum())

    def _sorted(self, block: Block) -> Block:
        matrix = block.csr()
        return Block(block.start, matrix.data, matrix.indices, matrix.indptr.astype(np.int64), block.n_vars)

    def scan(self) -> Scan:
        """Look at every stored value, once."""
        if self._scan is None:
            scan = self.new_scan()
            for part, _ in in_order(self.look, self.unsorted_blocks(), self.workers):
                scan.merge(part)
            self._scan = scan
        return self._scan

    def new_scan(self) -> Scan:
        """Begin to look."""
        return Scan(self.adata.n_obs, self.threads)

    def unsorted_blocks(self) -> Iterator[Block]:
        """Go through the rows as they are stored; `look` makes sure that nothing points outside."""
        blocks = raw_blocks(self.adata, self.layer, passing=held(self.workers))
        return ahead(blocks) if self.adata.isbacked else blocks

    def look(self, block: Block) -> tuple[Scan, Block]:
        """Return what is found in a block, and the block sorted."""
        scan = self.new_scan()
        rows = (block.data, block.indices, block.indptr)
        if scan.add_fast(block.start, *rows, self.used, self._seen):
            return scan, block
        check_columns(block.indices, block.n_vars)
        if _out_of_order(block):
            self._unsorted.add(block.start)
            block = self._sorted(block)
        self._seen[block.indices] = True
        scan.add(block.start, block.data, block.indices, block.indptr, block.n_vars, self.used)
        return scan, block

    def read(self, scan: Scan, values: Values) -> Reading:
        """Decide what the values are; the errors name places and the layer that would do."""
        note: Any = self.adata.uns.get("log1p")
        base = note.get("base") if isinstance(note, dict) else None
        try:
            return read_values(
                scan,
                values=values,
                noted=note is not None,
                noted_base=None if base is None else float(base),
                name=self.name,
                places=self._places(scan),
            )
        except ScbinInputError as error:
            hint = self.suggest_counts() or (self._suggest_unscaled() if error.code == "I03" else None)
            if hint is None:
                raise
            raise ScbinInputError(error.code, f"{str(error).split('] ', 1)[1]} {hint}") from None

    def _places(self, scan: Scan) -> str:
        adata = self.adata
        return ", ".join(
            f"cell {str(adata.obs_names[row])!r}, gene {str(adata.var_names[column])!r}: {value:.4g}"
            for row, column, value in scan.not_finite_at or scan.negative_at
        )

    def suggest_counts(self) -> str | None:
        """Name a layer, or `.raw`, that holds whole, non-negative numbers, if there is one beside this matrix."""
        layers = [layer for layer in COUNT_LAYERS if layer in self.adata.layers]
        return self._suggest(layers, _whole, "holds counts", "use them")

    def _suggest_unscaled(self) -> str | None:
        """Name a layer, or `.raw`, without negative values, as scaling left them there."""
        return self._suggest(layer_names(self.adata), _not_negative, "has no negative values", "read it")

    def _suggest(self, layers: list[str], rule: Callable[[Any], bool], what: str, to: str) -> str | None:
        """Name the first of some layers, else `.raw`, whose values pass a rule."""
        for layer in layers:
            if layer != self.layer and _passes(self.adata, layer, rule):
                return f'layers[{layer!r}] {what}: pass layer="{layer}" to {to}.'
        raw = None if self.adata.isbacked else self.adata.raw
        if raw is not None and rule(raw.X):
            return f".raw {what}: adata.raw.to_adata() gives them as an AnnData of its own."
        return None


def _out_of_order(block: Block) -> bool:
    """Whether some row has columns that do not increase; the flags of a container can be set wrongly."""
    if len(block.indices) < 2:
        return False
    down = block.indices[1:] <= block.indices[:-1]
    starts = block.indptr[1:-1]
    down[starts[(starts > 0) & (starts < len(block.indices))] - 1] = False
    return bool(down.any())


def _passes(adata: AnnData, layer: str, rule: Callable[[Any], bool]) -> bool:
    try:
        return all(rule(block.data) for block in raw_blocks(adata, layer))
    except ScbinInputError:
        return False


def _stored(matrix: Any) -> np.ndarray:
    return np.asarray(matrix.data if hasattr(matrix, "nnz") else matrix)


def _not_negative(matrix: Any) -> bool:
    values = _stored(matrix)
    return values.dtype.kind in "biuf" and bool(((values >= 0) & np.isfinite(values)).all())


def _whole(matrix: Any) -> bool:
    values = _stored(matrix)
    return _not_negative(values) and bool((values == np.rint(values)).all())


def _used_columns(adata: AnnData) -> tuple[np.ndarray, int]:
    """Which columns are gene counts: all, or those that `var["feature_types"]` calls Gene Expression."""
    used = np.ones(adata.n_vars, dtype=bool)
    if "feature_types" in adata.var.columns:
        kinds = adata.var["feature_types"].astype(str).to_numpy()
        genes = kinds == "Gene Expression"
        if genes.any() and not genes.all():
            return genes, int((~genes).sum())
    return used, 0
