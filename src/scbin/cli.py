"""The command `scbin`: the same verbs for a terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from scbin import __version__
from scbin._errors import ScbinError, ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from anndata import AnnData

LABELS = "bulk_labels"
N_COMPONENTS = 50


def main(argv: Sequence[str] | None = None) -> int:
    """Run `scbin` with the arguments of the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ScbinError, OSError) as error:
        print(f"scbin: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scbin", description="BERT on single cells, inside AnnData.")
    parser.add_argument("--version", action="version", version=f"scbin {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True)
    quickstart = verbs.add_parser(
        "quickstart",
        help="tokenize, pretrain, embed and plot 700 blood cells that come with scanpy (a few minutes, no network)",
        description="Tokenize, pretrain, embed and plot 700 blood cells that come with scanpy, and compare with PCA.",
    )
    quickstart.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder to write to (default: %(default)s)"
    )
    quickstart.add_argument("--preset", default="tiny", help="size of the model (default: %(default)s)")
    quickstart.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, default=0, help="start of all randomness (default: %(default)s)")
    quickstart.set_defaults(run=_quickstart)
    check = verbs.add_parser(
        "check",
        help="say what is wrong with an h5ad file or zarr directory from elsewhere, without trusting it",
        description="Look at an h5ad file or a zarr directory in a process with limits, so that links to other files, sizes that "
        "are not true and parts that do not fit each other are found before anything relies on it; then say what scbin would read. "
        "The exit status is 0 for a sound file, 1 for one with errors.",
    )
    check.add_argument("file", type=Path, help="the file or directory")
    check.add_argument("--like", help="directory of a model to match the genes with")
    check.add_argument("--memory", type=float, default=8.0, help="most memory in GiB (default: %(default)s)")
    check.add_argument("--seconds", type=int, default=600, help="most time of the processor (default: %(default)s)")
    check.set_defaults(run=_check)
    return parser


def _check(arguments: argparse.Namespace) -> int:
    from scbin._check_file import check_file

    return check_file(arguments.file, memory=arguments.memory, seconds=arguments.seconds, like=arguments.like)


def _quickstart(arguments: argparse.Namespace) -> None:
    import matplotlib as mpl

    mpl.use("Agg")  # pictures go to files, also where there is no screen
    import scbin.datasets
    import scbin.pp
    import scbin.tl
    from scbin.nn.checkpoint import replaces_model

    out: Path = arguments.out
    _make_folder(out)
    replaces_model(out / "model", overwrite=True)  # raises now rather than after minutes of training
    adata = scbin.datasets.pbmc68k_reduced()
    print(f"{adata.n_obs:,} blood cells, {adata.n_vars:,} genes, {adata.obs[LABELS].nunique()} cell types")
    scbin.pp.tokenize(adata)
    model = scbin.tl.pretrain(adata, preset=arguments.preset, device=arguments.device, seed=arguments.seed)
    model.save(out / "model", overwrite=True)
    adata.obsm["X_pca"] = _pca(adata)
    print(_score_table(_scores(adata, ("X_pca", "X_scbin"), arguments.seed)))
    _pictures(adata, model, out)
    adata.write_h5ad(out / "adata.h5ad")
    print(f"Written to {out}/: embedding.png, training.png, adata.h5ad and model/. Go on with")
    print(
        f"    adata = anndata.read_h5ad({str(out / 'adata.h5ad')!r}); model = scbin.Model.load({str(out / 'model')!r})"
    )


def _make_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ScbinInputError("C01", f"--out {out} is a file; name a folder.")
    out.mkdir(parents=True, exist_ok=True)


def _pca(adata: AnnData) -> np.ndarray:
    from scbin.tl._baselines import pca

    return pca(adata.X, N_COMPONENTS)


def _scores(adata: AnnData, slots: Sequence[str], seed: int) -> dict[str, tuple[float, float]]:
    """Score each embedding against the cell types: kNN and logistic regression on held-out cells."""
    import numpy as np

    from scbin.tl._baselines import knn_macro_f1, logistic_macro_f1

    encoded = np.isfinite(adata.obsm["X_scbin"]).all(axis=1)
    labels = adata.obs[LABELS].to_numpy()[encoded]
    embeddings = {slot: np.asarray(adata.obsm[slot])[encoded] for slot in slots}
    return {
        slot: (knn_macro_f1(embedding, labels, seed=seed), logistic_macro_f1(embedding, labels, seed=seed))
        for slot, embedding in embeddings.items()
    }


def _score_table(scores: Mapping[str, tuple[float, float]]) -> str:
    names = {"X_pca": f"PCA, {N_COMPONENTS} components", "X_scbin": "scbin"}
    lines = ["", "Macro-F1 of cell types, 5 folds   kNN (15)   logistic regression"]
    lines += [
        f"  {names.get(slot, slot):<30}  {knn:9.3f}  {logistic:20.3f}" for slot, (knn, logistic) in scores.items()
    ]
    return "\n".join([*lines, ""])


def _pictures(adata: AnnData, model: object, out: Path) -> None:
    import matplotlib.pyplot as plt

    import scbin.pl

    figure, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.2), layout="constrained")
    scbin.pl.embedding(adata, color=LABELS, basis="X_pca", title="PCA", ax=left).get_legend().remove()
    scbin.pl.embedding(adata, color=LABELS, title="scbin", ax=right)
    figure.savefig(out / "embedding.png", dpi=150)
    plt.close(figure)
    figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    scbin.pl.training(model, ax=ax)
    figure.savefig(out / "training.png", dpi=150)
    plt.close(figure)
