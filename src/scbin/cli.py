"""The command `scbin`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scbin import __version__
from scbin._errors import ScbinError, ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

LABELS = "bulk_labels"
N_COMPONENTS, N_NEIGHBOURS = 50, 15


def main(argv: Sequence[str] | None = None) -> int:
    """Run `scbin` with the arguments of the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="scbin", description="BERT on single cells, inside AnnData.")
    parser.add_argument("--version", action="version", version=f"scbin {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True)
    quick = verbs.add_parser(
        "quickstart",
        help="tokenize, pretrain, embed and plot 700 blood cells that come with scanpy (a few minutes, no network)",
        description="Tokenize, pretrain, embed and plot 700 blood cells that come with scanpy, and compare with PCA.",
    )
    default = " (default: %(default)s)"
    quick.add_argument("--out", type=Path, default=Path("quickstart"), help=f"folder to write to{default}")
    quick.add_argument("--preset", default="tiny", help=f"size of the model{default}")
    quick.add_argument("--device", default="auto", help=f"auto, cpu, cuda or mps{default}")
    quick.add_argument("--seed", type=int, default=0, help=f"start of all randomness{default}")
    arguments = parser.parse_args(argv)
    try:
        quickstart(arguments.out, preset=arguments.preset, device=arguments.device, seed=arguments.seed)
    except (ScbinError, OSError) as error:
        print(f"scbin: {error}", file=sys.stderr)
        return 2
    return 0


def quickstart(out: Path, *, preset: str, device: str, seed: int) -> None:
    """Tokenize, pretrain, embed and plot the cells that come with scanpy; write everything into a folder."""
    # heavy packages, which `scbin --version` does not need
    import matplotlib as mpl

    mpl.use("Agg")  # pictures go to files, also where there is no screen
    import scanpy as sc

    import scbin.datasets
    import scbin.pp
    import scbin.tl
    from scbin.io.directory import replaces_model

    if out.exists() and not out.is_dir():
        raise ScbinInputError("A02", f"--out {out} is a file; name a folder.")
    out.mkdir(parents=True, exist_ok=True)
    replaces_model(out / "model", overwrite=True)  # raises now rather than after minutes of training
    adata = scbin.datasets.pbmc68k_reduced()
    print(f"{adata.n_obs:,} blood cells, {adata.n_vars:,} genes, {adata.obs[LABELS].nunique()} cell types")
    scbin.pp.tokenize(adata)
    model = scbin.tl.pretrain(adata, preset=preset, device=device, seed=seed)
    model.save(out / "model", overwrite=True)
    sc.pp.pca(adata, n_comps=N_COMPONENTS, mask_var=None, random_state=seed)
    print(f"\nMacro-F1 of cell types, {N_NEIGHBOURS} nearest neighbours, 5 folds")
    for name, slot in ((f"PCA, {N_COMPONENTS} components", "X_pca"), ("scbin", "X_scbin")):
        print(f"  {name:<20}  {_score(adata, slot, seed):.3f}")
    _plot(adata, model, out)
    adata.write_h5ad(out / "adata.h5ad")
    print(f"\nWritten to {out}/: embedding.png, training.png, adata.h5ad and model/. Go on with")
    print(
        f"    adata = anndata.read_h5ad({str(out / 'adata.h5ad')!r}); model = scbin.Model.load({str(out / 'model')!r})"
    )


def _score(adata: AnnData, slot: str, seed: int) -> float:
    """Return how well neighbours in an embedding tell the cell types of held-out cells apart."""
    import numpy as np
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    embedded = np.isfinite(adata.obsm["X_scbin"]).all(axis=1)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    labels = adata.obs[LABELS].astype(str).to_numpy()[embedded]
    model = KNeighborsClassifier(N_NEIGHBOURS)
    return float(cross_val_score(model, adata.obsm[slot][embedded], labels, cv=folds, scoring="f1_macro").mean())


def _plot(adata: AnnData, model: object, out: Path) -> None:
    """Write pictures of both embeddings and of the training."""
    import matplotlib.pyplot as plt

    import scbin.pl

    figure, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.2), layout="constrained")
    scbin.pl.embedding(adata, color=LABELS, basis="X_pca", title="PCA", legend_loc=None, ax=left)
    scbin.pl.embedding(adata, color=LABELS, title="scbin", ax=right)
    figure.savefig(out / "embedding.png", dpi=150)
    figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    scbin.pl.training(model, ax=ax)
    figure.savefig(out / "training.png", dpi=150)
    plt.close("all")
