"""`scbin check`: each thing that is wrong with a stranger's file is found, in a process that may crash."""

from __future__ import annotations

import json
import os
import sys
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr

from scbin import _check_file
from scbin._stored import shown, size_of
from scbin._walk_file import walk
from scbin.cli import main


@pytest.fixture
def full(toy):
    """The toy cells with something in every kind of slot."""
    rng = np.random.default_rng(0)
    toy.layers["counts"] = toy.X.copy()
    toy.layers["dense"] = toy.X.toarray()
    toy.obs["n"] = np.arange(60)
    toy.obs["flag"] = pd.array([True, None] * 30, dtype="boolean")
    toy.obs["text"] = [f"a{k}" for k in range(60)]
    toy.obs.loc["cell3", "cell_type"] = np.nan
    toy.obsm["X_pca"] = rng.normal(size=(60, 3)).astype(np.float32)
    toy.obsm["table"] = pd.DataFrame({"a": np.arange(60)}, index=toy.obs_names)
    toy.obsp["near"] = toy.X @ toy.X.T
    toy.varm["PCs"] = rng.normal(size=(40, 3))
    toy.uns["note"] = {"a": "text", "b": np.arange(3), "c": 1.5, "d": {"e": ["x", "y"]}}
    toy.raw = toy.copy()
    return toy


@pytest.fixture
def h5ad(full, tmp_path):
    full.write_h5ad(tmp_path / "cells.h5ad", compression="gzip")
    return tmp_path / "cells.h5ad"


def write_zarr(adata, path, version):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on formats to come
        with ad.settings.override(zarr_write_format=version):
            adata.write_zarr(path)
    return path


def found(path, *, wrong=True):
    findings, shape = walk(path)
    assert all(len(finding.text) < 400 for finding in findings)
    return {(finding.code, finding.where) for finding in findings if finding.wrong is wrong}, shape


# ---- sound ones ------------------------------------------------------------------------------------------------------


def test_sound_files_have_no_findings(h5ad, full, tmp_path):
    assert found(h5ad) == (set(), (60, 40))
    for version in (2, 3):
        assert found(write_zarr(full, tmp_path / f"{version}.zarr", version)) == (set(), (60, 40))
    full.X = full.X.tocsc()
    del full.layers["counts"], full.layers["dense"]
    full[:0].write_h5ad(tmp_path / "none.h5ad")
    assert found(tmp_path / "none.h5ad") == (set(), (0, 40))


def test_without_a_matrix_one_is_told(full, tmp_path):
    full.X = None
    full.obsm["X_pca"][3] = np.nan
    full.write_h5ad(tmp_path / "a.h5ad")
    assert found(tmp_path / "a.h5ad")[0] == set()
    assert found(tmp_path / "a.h5ad", wrong=False)[0] == {("M45", "X"), ("M51", "obsm/X_pca")}


# ---- HDF5 ------------------------------------------------------------------------------------------------------------


def external_storage(file):
    file["uns"].create_dataset("x", shape=(4,), dtype="u1", external=[("/etc/hostname", 0, 4)])


def virtual(file):
    layout = h5py.VirtualLayout(shape=(4,), dtype="f8")
    layout[:] = h5py.VirtualSource("other.h5", "x", shape=(4,))
    file["uns"].create_virtual_dataset("x", layout)


def short_index(file):
    """Take the last name away, wherever this anndata keeps them."""
    names = (
        [f"obs/_index/{part}" for part in ("values", "mask")] if hasattr(file["obs/_index"], "keys") else ["obs/_index"]
    )
    for name in names:
        resize(file, name, 59)


def resize(file, where, n):
    values = file[where][:]
    attributes = dict(file[where].attrs)
    del file[where]
    file[where] = np.resize(values, n)
    file[where].attrs.update(attributes)


def change(file, where, index, value):
    values = file[where][:]
    values[index] = value
    file[where][:] = values


HDF5 = {
    "external link": ("M41", "uns/x", lambda f: f["uns"].__setitem__("x", h5py.ExternalLink("/etc/passwd", "/x"))),
    "link for a slot": ("M41", "layers/x", lambda f: f["layers"].__setitem__("x", h5py.ExternalLink("a.h5", "/X"))),
    "values elsewhere": ("M41", "uns/x", external_storage),
    "virtual": ("M41", "uns/x", virtual),
    "soft link": ("M42", "uns/x", lambda f: f["uns"].__setitem__("x", h5py.SoftLink("/obs"))),
    "dangling": ("M42", "uns/x", lambda f: f["uns"].__setitem__("x", h5py.SoftLink("/gone"))),
    "loop": ("M42", "uns/x", lambda f: f["uns"].__setitem__("x", f["uns"])),
    "loop to the root": ("M42", "uns/x", lambda f: f["uns"].__setitem__("x", f["/"])),
    "references": ("M42", "uns/x", lambda f: f["uns"].create_dataset("x", data=[f["obs"].ref], dtype=h5py.ref_dtype)),
    "terabytes": ("M44", "uns/x", lambda f: f["uns"].create_dataset("x", shape=(10**12,), dtype="f4", chunks=(1000,))),
    "large pieces": (
        "M44",
        "uns/x",
        lambda f: f["uns"].create_dataset("x", shape=(9, 10**8), dtype="f4", chunks=(9, 10**8)),
    ),
    "deep": ("M44", "/".join(["uns", *["a"] * 32]), lambda f: f["uns"].create_group("/".join(["a"] * 40))),
    "opaque": ("M46", "uns/x", lambda f: f["uns"].create_dataset("x", data=np.array([b"abc"], dtype="V3"))),
    "encoding": ("M45", "uns/note", lambda f: f["uns/note"].attrs.__setitem__("encoding-type", "pickle")),
    "no obs": ("M47", "obs", lambda f: f.__delitem__("obs")),
    "index gone": ("M47", "obs", lambda f: f["obs"].attrs.__setitem__("_index", "gone")),
    "column gone": ("M47", "obs", lambda f: f["obs"].__delitem__("n")),
    "codes gone": ("M47", "obs/sex", lambda f: f["obs/sex"].__delitem__("codes")),
    "short column": ("M48", "obs/n", lambda f: resize(f, "obs/n", 59)),
    "short index": ("M48", "X", lambda f: short_index(f)),
    "short mask": ("M48", "obs/flag", lambda f: resize(f, "obs/flag/mask", 59)),
    "short embedding": ("M48", "obsm/X_pca", lambda f: resize(f, "obsm/X_pca", (59, 3))),
    "wide layer": ("M48", "layers/dense", lambda f: resize(f, "layers/dense", (60, 41))),
    "codes": ("M49", "obs/sex", lambda f: change(f, "obs/sex/codes", 3, 2)),
    "shape": ("M48", "X", lambda f: f["X"].attrs.__setitem__("shape", [60, 41])),
    "no shape": ("M48", "X", lambda f: f["X"].attrs.__delitem__("shape")),
    "indptr falls": ("M50", "X", lambda f: change(f, "X/indptr", 3, 10**6)),
    "indptr starts late": ("M50", "X", lambda f: change(f, "X/indptr", 0, 1)),
    "indptr ends early": ("M50", "X", lambda f: change(f, "X/indptr", -1, int(f["X/indptr"][-2]))),
    "indptr is short": ("M50", "X", lambda f: resize(f, "X/indptr", 60)),
    "indices": ("M50", "X", lambda f: change(f, "X/indices", 5, 40)),
    "indices below 0": ("M50", "layers/counts", lambda f: change(f, "layers/counts/indices", 5, -1)),
    "fewer indices": ("M50", "raw/X", lambda f: resize(f, "raw/X/indices", 7)),
    "nan": ("M51", "X/data", lambda f: change(f, "X/data", 5, np.nan)),
    "infinite": ("M51", "layers/dense", lambda f: change(f, "layers/dense", (3, 4), np.inf)),
    "text": ("M46", "layers/x", lambda f: f["layers"].create_dataset("x", data=np.full((60, 40), b"a"))),
}


@pytest.mark.parametrize("name", HDF5)
def test_what_is_wrong_with_an_h5ad_is_found(h5ad, name):
    code, where, spoil = HDF5[name]
    with h5py.File(h5ad, "r+") as file:
        spoil(file)
    assert (code, where) in found(h5ad)[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"x" * 100, b"version https://git-lfs.github.com/spec/v1\n", None],
    ids=["empty", "noise", "pointer", "cut"],
)
def test_files_that_are_no_hdf5(h5ad, content):
    raw = h5ad.read_bytes()
    h5ad.write_bytes(raw[: len(raw) // 2] if content is None else content)
    findings, shape = walk(h5ad)
    assert [finding.code for finding in findings] == ["M40"] and shape is None


# ---- zarr ------------------------------------------------------------------------------------------------------------


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


ZARR2 = {
    "pickle": (
        "M46",
        "X/data/.zarray",
        lambda p: edit(p / "X/data/.zarray", lambda c: c.update(filters=[{"id": "pickle"}])),
    ),
    "codec": (
        "M46",
        "X/data/.zarray",
        lambda p: edit(p / "X/data/.zarray", lambda c: c["compressor"].update(id="evil")),
    ),
    "terabytes": ("M44", "X/data/.zarray", lambda p: edit(p / "X/data/.zarray", lambda c: c.update(shape=[10**13]))),
    "negative": ("M44", "X/data/.zarray", lambda p: edit(p / "X/data/.zarray", lambda c: c.update(shape=[-1]))),
    "no shape": ("M43", "X/data/.zarray", lambda p: edit(p / "X/data/.zarray", lambda c: c.update(shape=["x"]))),
    "not JSON": ("M43", "X/.zattrs", lambda p: (p / "X/.zattrs").write_text("{" * 200_000)),
    "link": ("M41", "uns/x", lambda p: (p / "uns/x").symlink_to("/etc")),
    "pipe": ("M41", "uns/x", lambda p: os.mkfifo(p / "uns/x")),
    "file for a link": (
        "M41",
        "X/.zattrs",
        lambda p: (p / "X/.zattrs").unlink() or (p / "X/.zattrs").symlink_to("/dev/zero"),
    ),
}


@pytest.mark.parametrize("name", ZARR2)
def test_what_is_wrong_with_a_zarr_directory_is_found(full, tmp_path, name):
    code, where, spoil = ZARR2[name]
    path = write_zarr(full, tmp_path / "a.zarr", 2)
    spoil(path)
    assert (code, where) in found(path)[0]


def test_names_stored_with_a_mask(full, tmp_path):
    """As anndata writes text from 0.13 on, with pandas 3."""
    full.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        for place in ("obs/_index", "obs/cell_type/categories"):
            names = file[place][()] if isinstance(file[place], h5py.Dataset) else file[f"{place}/values"][()]
            del file[place]
            group = file.create_group(place)
            group.attrs.update({"encoding-type": "nullable-string-array", "encoding-version": "0.1.0"})
            group["values"], group["mask"] = names, np.zeros(len(names), dtype=bool)
    assert found(tmp_path / "a.h5ad") == (set(), (60, 40))
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file["obs/_index/mask"]
        file["obs/_index/mask"] = np.zeros(59, dtype=bool)
    assert found(tmp_path / "a.h5ad") == ({("M47", "obs")}, None)


def test_zarr_of_version_3(full, tmp_path):
    path = write_zarr(full, tmp_path / "a.zarr", 3)
    assert "pickle" in str(walk(_with_codec(path, "pickle"))[0])
    assert "evil" in str(walk(_with_codec(path, "evil"))[0])
    empty = tmp_path / "empty.zarr"
    empty.mkdir()
    assert [finding.code for finding in walk(empty)[0]] == ["M40"]
    zarr.open_group(path, mode="r+", use_consolidated=False)


def _with_codec(path, name):
    edit(path / "X/data/zarr.json", lambda c: c["codecs"].append({"name": name, "configuration": {}}))
    return path


def test_parts_of_a_zarr_directory_that_do_not_fit(full, tmp_path):
    path = write_zarr(full, tmp_path / "a.zarr", 3)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    pointers = group["X/indptr"][:]
    pointers[3] = 10**6
    group["X/indptr"][:] = pointers
    group["obs/sex/codes"][2] = 5
    assert found(path)[0] == {("M50", "X"), ("M49", "obs/sex")}


# ---- as a command ----------------------------------------------------------------------------------------------------


def test_a_sound_file_and_what_scbin_reads_in_it(h5ad, capsys):
    assert main(["check", str(h5ad)]) == 0
    printed = capsys.readouterr().out
    assert "60 cells x 40 genes" in printed and "sound" in printed.splitlines()[0]
    assert "counts" in printed


def test_a_bad_file_is_a_report_and_not_a_traceback(h5ad, tmp_path, capsys):
    with h5py.File(h5ad, "r+") as file:
        file["uns"]["x\x1b[31m"] = h5py.ExternalLink("/etc/passwd", "/x")
        file["uns"].create_dataset("large", shape=(10**12,), dtype="f4", chunks=(1000,))
    assert main(["check", str(h5ad)]) == 1
    printed = capsys.readouterr()
    assert "2 things are wrong" in printed.out and "M41" in printed.out and "3.6 TiB" in printed.out
    assert "\x1b" not in printed.out and not printed.err
    assert main(["check", str(tmp_path / "gone.h5ad")]) == 2
    assert "M56" in capsys.readouterr().err
    assert main(["check", str(h5ad), "--memory", "0"]) == 2


ENDS = {
    "M52": 'import os, signal; print(\'{"at": "X/data"}\', flush=True); os.kill(os.getpid(), signal.SIGSEGV)',
    "M53": "import resource, signal, os; os.kill(os.getpid(), signal.SIGXCPU)",
    "M54": "raise MemoryError",
}


@pytest.mark.parametrize("code", ENDS)
def test_a_crash_is_a_finding(h5ad, capsys, monkeypatch, code):
    monkeypatch.setattr(_check_file, "WALKER", [sys.executable, "-c", ENDS[code]])
    assert main(["check", str(h5ad)]) == 1
    printed = capsys.readouterr().out
    assert code in printed and ("X/data" in printed) == (code == "M52")


def test_a_hang_is_a_finding(h5ad, capsys, monkeypatch):
    import subprocess

    def run(*args, **kwargs):
        raise subprocess.TimeoutExpired("walk", 1, output=b'{"at": "obs"}\n{"at": "X')

    monkeypatch.setattr(_check_file.subprocess, "run", run)
    assert main(["check", str(h5ad), "--seconds", "1"]) == 1
    assert "M53" in capsys.readouterr().out


def test_the_limits_hold(tmp_path):
    """The child may have so much memory and no more, whatever the file asks for."""
    code = "from scbin._walk_file import set_limits; set_limits(2**26, 5); bytearray(2**30)"
    done = _check_file.subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stderr


def test_what_is_shown_of_a_stranger():
    assert shown("a\x1b[2Jb") == repr("a\x1b[2Jb") and len(shown("x" * 1000)) < 100
    assert size_of(0) == "0 bytes" and size_of(10**15) == "909 TiB"
