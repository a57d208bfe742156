"""Reading sparse matrices from files: the same numbers by the short way and through the library."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from scbin._anndata import raw_blocks
from scbin._errors import ScbinInputError
from scbin._sparse import DiskRows, _plain_runs

h5py = pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def matrix() -> sparse.csr_matrix:
    return sparse.random(300, 200, 0.5, format="csr", dtype=np.float32, random_state=0)


@pytest.mark.parametrize(
    ("how", "plain"),
    [
        ({"chunks": (1000,)}, True),
        ({"chunks": None}, True),
        ({"chunks": (1000,), "compression": "gzip"}, False),
        ({"chunks": (1000,), "shuffle": True}, False),
        ({"chunks": (1000,), "fletcher32": True}, False),
        ({"dtype": ">f4"}, False),
        ({"dtype": "float64"}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("reuse", [0, 3])
def test_ranges_are_those_of_the_library(matrix, tmp_path, how, plain, reuse):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", data=matrix.data, **how)
        file.create_dataset("indices", data=matrix.indices, chunks=(777,))
        file["indptr"] = matrix.indptr
    with h5py.File(tmp_path / "a.h5", "r") as file, DiskRows(file, reuse=reuse) as rows:
        assert (_plain_runs(file["data"]) is not None) == plain
        assert rows.n_stored == matrix.nnz
        for low, high in [
            (0, matrix.nnz),
            (0, 0),
            (999, 1001),
            (1000, 2000),
            (matrix.nnz - 1, matrix.nnz),
            (5, 23_456),
        ]:
            data, indices = rows.read(low, high)
            np.testing.assert_array_equal(data, matrix.data[low:high])
            np.testing.assert_array_equal(indices, matrix.indices[low:high])


def test_pieces_that_lie_apart_are_read_one_by_one(matrix, tmp_path):
    kinds = {"data": np.float32, "indices": np.int32}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["indptr"] = matrix.indptr
        for name, dtype in kinds.items():
            file.create_dataset(name, (matrix.nnz,), dtype, chunks=(1000,))
        for low in range(0, matrix.nnz, 2000):  # two pieces of one array, then two of the other
            for name in kinds:
                file[name][low : low + 2000] = getattr(matrix, name)[low : low + 2000]
    with h5py.File(tmp_path / "a.h5", "r") as file, DiskRows(file) as rows:
        starts, offsets = _plain_runs(file["data"])
        assert 1 < len(offsets) < -(-matrix.nnz // 1000)
        for low, high in [(0, matrix.nnz), (1999, 2001), (2500, 7001), (4000, 6000)]:
            data, indices = rows.read(low, high)
            np.testing.assert_array_equal(data, matrix.data[low:high])
            np.testing.assert_array_equal(indices, matrix.indices[low:high])


def test_files_that_are_written_to_go_through_the_library(matrix, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"], file["indices"], file["indptr"] = matrix.data, matrix.indices, matrix.indptr
        assert _plain_runs(file["data"]) is None
        with DiskRows(file) as rows:
            np.testing.assert_array_equal(rows.read(3, 70)[0], matrix.data[3:70])


def test_blocks_hold_still_as_long_as_asked(matrix, tmp_path):
    ad.AnnData(matrix).write_h5ad(tmp_path / "a.h5ad")
    adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    blocks = raw_blocks(adata, block_values=2000, passing=3)
    before = next(blocks)
    for block in blocks:
        first = before.start
        np.testing.assert_array_equal(before.csr().toarray(), matrix[first : first + before.n_rows].toarray())
        before = block
    adata.file.close()


def test_a_file_cut_short_is_the_librarys_error(matrix, tmp_path):
    path = tmp_path / "a.h5ad"
    ad.AnnData(matrix).write_h5ad(path)
    adata = ad.read_h5ad(path, backed="r")
    with DiskRows(adata.X.group) as rows:
        rows._data._runs[1][0] = path.stat().st_size - 10  # a short read
        np.testing.assert_array_equal(rows.read(0, 500)[0], matrix.data[:500])
    adata.file.close()


def test_damage_on_disk_is_named(matrix, tmp_path):
    path = tmp_path / "a.h5ad"
    ad.AnnData(matrix).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X/indices"][100] = 5000
    adata = ad.read_h5ad(path, backed="r")
    with pytest.raises(ScbinInputError, match="I43.*5000"):
        list(raw_blocks(adata))
    adata.file.close()
