"""Cells in, an embedding out, for scbin and what it is measured beside. No method sees a label."""

from __future__ import annotations

import gc
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import anndata as ad

SCBIN, SCBIN_BATCH = "scbin", "scbin, batch_key"
PCA, PCA_ALL, HVG, HARMONY = "PCA-50", "PCA-50, all genes", "HVG", "Harmony"
SCVI, SCVI_BATCH = "scVI", "scVI, batch_key"
N_GENES, N_COMPONENTS = 2_000, 50
Made = tuple[np.ndarray, dict[str, float]]  # the embedding, and what else the method gave


def whole(adata: ad.AnnData) -> bool:
    """Whether X holds counts."""
    return bool((adata.X.data == np.rint(adata.X.data)).all())


def log1p(adata: ad.AnnData) -> ad.AnnData:
    """Return the cells with log1p values of 10,000 counts each; values that are no counts are taken for that already."""
    import scanpy as sc

    made = adata.copy()
    if whole(made):
        sc.pp.normalize_total(made, target_sum=1e4)
        sc.pp.log1p(made)
    return made


def variable(values: ad.AnnData) -> np.ndarray:
    """Return which genes are scanpy's highly variable ones."""
    import scanpy as sc

    if values.n_vars <= N_GENES:
        return np.ones(values.n_vars, dtype=bool)
    return sc.pp.highly_variable_genes(values, n_top_genes=N_GENES, inplace=False)["highly_variable"].to_numpy()


def _hvg(adata: ad.AnnData, batch: str | None, seed: int) -> Made:
    values = log1p(adata)
    return values.X[:, variable(values)].toarray().astype(np.float32), {}


def _pca(adata: ad.AnnData, batch: str | None, seed: int) -> Made:
    from scbin.tl._baselines import pca

    return pca(_hvg(adata, batch, seed)[0], N_COMPONENTS, seed=seed), {}


def _pca_all(adata: ad.AnnData, batch: str | None, seed: int) -> Made:
    from scbin.tl._baselines import pca

    return pca(log1p(adata).X, N_COMPONENTS, seed=seed), {}


def _harmony(adata: ad.AnnData, batch: str | None, seed: int) -> Made:
    import harmonypy

    found = harmonypy.run_harmony(_pca(adata, batch, seed)[0], adata.obs, [batch], random_state=seed, verbose=False)
    moved = np.asarray(found.Z_corr)
    return (moved if len(moved) == adata.n_obs else moved.T).astype(np.float32), {}  # turned round in some releases


def _scbin(adata: ad.AnnData, batch: str | None, seed: int) -> Made:
    import scbin

    scbin.pp.tokenize(adata)
    options = {} if batch is None else {"batch_key": batch}
    start = time.perf_counter()
    model = scbin.tl.pretrain(adata, seed=seed, progress=False, **options)
    more = {"pretrain_seconds": time.perf_counter() - start}
    if batch is None:
        genes = scbin.tl.evaluate(adata, model, target="genes", seed=seed, progress=False)
        simple = genes.drop(index="scbin").astype({"exact": float, "within_one": float, "log_loss": float})
        for score in ("exact", "within_one", "log_loss"):
            best = simple[score].min() if score == "log_loss" else simple[score].max()
            more |= {f"genes_{score}": float(genes.loc["scbin", score]), f"genes_{score}_simple": float(best)}
    return adata.obsm["X_scbin"], more


def _scvi(adata: ad.AnnData, batch: str | None, seed: int) -> Made:
    import logging

    import scvi

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.seed = seed
    chosen = adata[:, variable(log1p(adata))].copy()
    scvi.model.SCVI.setup_anndata(chosen, batch_key=batch)
    model = scvi.model.SCVI(chosen)
    model.train(accelerator="cpu", enable_progress_bar=False, logger=False, enable_model_summary=False)
    return model.get_latent_representation(), {}


_RUN: dict[str, Callable[[ad.AnnData, str | None, int], Made]] = {
    PCA: _pca, PCA_ALL: _pca_all, HVG: _hvg, SCBIN: _scbin, SCVI: _scvi,
    HARMONY: _harmony, SCBIN_BATCH: _scbin, SCVI_BATCH: _scvi,
}  # fmt: skip
_NEEDS = {HARMONY: "harmonypy", SCVI: "scvi", SCVI_BATCH: "scvi"}
METHODS = tuple(_RUN)
WITH_BATCH = (HARMONY, SCBIN_BATCH, SCVI_BATCH)


def available(adata: ad.AnnData, batch: str | None) -> list[str]:
    """Return the methods that are installed and can be used on these cells."""
    fit = [name for name in METHODS if name not in _NEEDS or find_spec(_NEEDS[name])]
    fit = [name for name in fit if batch is not None or name not in WITH_BATCH]
    return [name for name in fit if _NEEDS.get(name) != "scvi" or whole(adata)]  # scVI models counts


def run(method: str, adata: ad.AnnData, batch: str | None, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return an embedding, with seconds, CPU seconds and the most memory that the process held meanwhile, imports included."""
    adata = adata.copy()
    gc.collect()
    _reset_peak()
    start, cpu = time.perf_counter(), time.process_time()
    embedding, more = _RUN[method](adata, batch if method in WITH_BATCH else None, seed)
    facts = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "peak_gb": _peak()}
    return np.asarray(embedding), {**facts, **more}


def _reset_peak() -> None:
    """Forget the highest memory so far, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> float:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) / 2**20 if found else float("nan")
