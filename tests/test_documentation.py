"""Code in README and docs: blocks below `<!-- run -->` run as they stand, on few cells and with few steps, those below
`<!-- run with package -->` where it is installed; all others name what exists."""

from __future__ import annotations

import ast
import copy
import inspect
import re
from functools import reduce
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import scbin

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^(<!-- run -->\n+)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {path.name: BLOCK.findall(path.read_text()) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
WITH = re.findall(
    r"^<!-- run with (\w+) -->\n```python\n(.*?)^```", (ROOT / "docs/interoperability.md").read_text(), re.M | re.S
)
SMALL = {  # what a verb is given beside the arguments on the page
    "pretrain": {"preset": scbin.Network(1, 16, 16, 1), "max_steps": 2, "progress": False},
    "finetune": {"max_steps": 1, "progress": False},
    "search": {"n_trials": 1, "max_steps": 1, "progress": False},
    **dict.fromkeys(("embed", "predict", "evaluate", "impute", "generate", "perturb"), {"progress": False}),
}
PBMC = scbin.datasets.pbmc68k_reduced


def few_cells():
    """60 cells of three types with 30 genes, with all columns that the pages speak of."""
    adata = PBMC()
    kinds = adata.obs["bulk_labels"].isin(["Dendritic", "CD14+ Monocyte", "CD19+ B"]).to_numpy()
    genes = np.argsort(-np.asarray((adata.X > 0).mean(axis=0)).ravel())[50:80]
    adata = adata[np.flatnonzero(kinds)[:60], genes].copy()
    adata.var_names = [*adata.var_names[:-3], "STAT1", "IRF9", "CD8A"]
    label = np.array(["monocyte", "B cell", "dendritic cell"])[adata.obs["bulk_labels"].astype("category").cat.codes]
    number = np.arange(adata.n_obs)
    columns = {"cell_type": label, "sex": np.where(number % 2, "female", "male"), "donor_id": number % 10}
    columns |= {"batch": number % 2, "donor": number % 10, "condition": np.where(number % 3, "control", "stimulated")}
    columns["age"] = 20 + number % 10
    adata.obs = adata.obs.assign(**{name: [str(value) for value in values] for name, values in columns.items()})
    return adata


@pytest.fixture(scope="module")
def trained():
    adata = few_cells()
    scbin.pp.tokenize(adata, phenotypes=["cell_type", "sex"])
    return adata, scbin.tl.pretrain(adata, **SMALL["pretrain"])


@pytest.fixture
def namespace(trained, tmp_path, monkeypatch):
    """What a page takes for granted: scbin, cells, new cells, some genes, a model, and an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scbin.datasets, "pbmc68k_reduced", few_cells)
    monkeypatch.setattr("scbin.pl._embedding.FEWEST_FOR_UMAP", 1000)  # UMAP takes seconds to compile
    for name, options in SMALL.items():
        verb = getattr(scbin.tl, name)
        monkeypatch.setattr(scbin.tl, name, lambda *a, _verb=verb, _o=options, **k: _verb(*a, **(k | _o)))
    (adata, model), new = copy.deepcopy(trained), few_cells()[:30].copy()
    return {"scbin": scbin, "adata": adata, "new": new, "model": model, "genes": list(adata.var_names[:10])}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if any(run for run, _ in blocks)])
def test_marked_blocks_run(page, namespace):
    for code in (code for run, code in PAGES[page] if run):
        exec(compile(code, page, "exec"), namespace)
    plt.close("all")


def receptors(names):
    """Cells with the two chains of a T cell receptor, of three clonotypes."""
    import scirpy as ir

    cells = [ir.io.AirrCell(name) for name in names]
    for cell, end in zip(cells, "ACG" * len(cells), strict=False):
        for locus in ("TRA", "TRB"):
            chain = {"locus": locus, "junction": "TGTGCTTCTTC" + end, "junction_aa": "CASS", "productive": True}
            cell.add_chain(ir.io.AirrCell.empty_chain_dict() | chain)
    return ir.io.from_airr_cells(cells)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", dict(WITH))
def test_blocks_with_another_package_run_where_it_is_installed(package, namespace):
    pytest.importorskip(package, reason=f"{package} is not installed")
    exec("import anndata as ad, numpy as np, pandas as pd, scanpy as sc", namespace)
    if package == "scirpy":
        namespace["airr"] = receptors(namespace["adata"].obs_names)
    exec(compile(dict(WITH)[package], package, "exec"), namespace)
    plt.close("all")


@pytest.mark.parametrize("page", [name for name, blocks in PAGES.items() if blocks])
def test_all_calls_fit_their_signatures(page):
    for tree in (ast.parse(code) for _, code in PAGES[page]):
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if re.fullmatch(r"scbin[\w.]+", name := ast.unparse(call.func)):
                function = reduce(getattr, name.split(".")[1:], scbin)
                names = dict.fromkeys(keyword.arg for keyword in call.keywords if keyword.arg)
                inspect.signature(function).bind_partial(*call.args, **names)
