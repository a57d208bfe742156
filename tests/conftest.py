"""Toy data for all tests, and the way to the shared real data."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

import scbin

mpl.use("Agg")

# ---- what scbin must never do ----------------------------------------------------------------------------------------

SOURCE = str(Path(scbin.__file__).parent)
WATCHED = frozenset(
    "pickle.find_class marshal.loads subprocess.Popen urllib.Request os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn "
    "os.startfile pty.spawn socket.__new__ socket.connect socket.bind socket.sendto socket.getaddrinfo "
    "socket.gethostbyname".split()
)
# who may do so when scbin calls it: Python importing a library, caches of compiled code, the search for fonts and for cores, and
# dask, which copies the tasks it was given, and zarr, whose event loop wakes itself by a pair of sockets
TRUSTED = (
    *("<frozen importlib", "/numba/core/caching.py", "/numba/core/serialize.py", "/matplotlib/font_manager.py"),
    *("/loky/backend/context.py", "/dask/", "/zarr/"),
)
_violations: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    """Note an event for which scbin is to blame: going outwards, its code comes before any that is trusted."""
    if event not in WATCHED:
        return
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in TRUSTED):
            return
        if name.startswith(SOURCE):
            _violations.append(f"{event} {str(arguments)[:80]} in {name}, line {frame.f_lineno}")
            return
        frame = frame.f_back


sys.addaudithook(_watch)


def taken_violations() -> list[str]:
    """Return what was noted since the last call."""
    found = _violations.copy()
    _violations.clear()
    return found


def _judge() -> None:
    found = taken_violations()
    if found:
        pytest.fail("scbin unpickled, opened a socket or ran a command: " + "; ".join(found), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    result = yield
    _judge()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    _judge()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    result = yield
    _judge()
    return result


@pytest.fixture
def noted():
    """What the watch noted since it was last asked; for the tests of the watch itself."""
    return taken_violations


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[1] / "../shared"
    if not (folder / "data").is_dir():
        pytest.skip("the shared folder of real data is not beside this checkout")
    return folder.resolve()


def toy_cells() -> ad.AnnData:
    """60 cells of three types with 40 genes: raw counts, each type with ten genes of its own."""
    rng = np.random.default_rng(0)
    kind = np.arange(60) % 3
    rate = np.full((60, 40), 0.6)
    for k in range(3):
        rate[kind == k, 10 * k : 10 * k + 10] = 6.0
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.array(["T cell", "B cell", "monocyte"])[kind]),
            "sex": pd.Categorical(np.where(np.arange(60) % 2, "female", "male")),
        },
        index=[f"cell{i}" for i in range(60)],
    )
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(40)])
    return ad.AnnData(csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=var)


@pytest.fixture
def toy() -> ad.AnnData:
    """60 cells of three types with 40 genes: raw counts, each type with ten genes of its own."""
    return toy_cells()


@pytest.fixture(scope="module")
def trained() -> tuple[ad.AnnData, scbin.Model]:
    """The toy cells, one of them empty, and a model of three steps on them; not to be changed."""
    adata = toy_cells()
    adata.X.data[adata.X.indptr[7] : adata.X.indptr[8]] = 0
    with pytest.warns(scbin._errors.ScbinInputWarning, match="I19"):
        scbin.pp.tokenize(adata, phenotypes=["cell_type", "sex"])
    training = scbin.Training(cells_per_step=16)
    model = scbin.tl.pretrain(
        adata, preset="tiny", backbone="bert", training=training, max_steps=3, device="cpu", progress=False
    )
    return adata, model


@pytest.fixture
def embedded(toy: ad.AnnData) -> ad.AnnData:
    """The toy cells with an embedding in which the types lie apart."""
    rng = np.random.default_rng(1)
    centres = 4 * rng.normal(size=(3, 8))
    codes = toy.obs["cell_type"].cat.codes.to_numpy()
    toy.obsm["X_scbin"] = (centres[codes] + rng.normal(size=(60, 8))).astype(np.float32)
    return toy
