"""The command `scbin`: the functions of scbin for files. Their signatures and docstrings are the options and the help."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, set_parsing_settings

from scbin import __version__
from scbin._errors import ScbinError, ScbinInputError


class Verb(NamedTuple):
    """A function as a command: `reads` says what becomes of the files that are its first parameter."""

    function: str
    help: str
    reads: str = "names"  # "names", "matrix" (left on disk), "cells" (in memory) or ""
    out: str = ""  # help of --out, for functions that have no such parameter
    skip: tuple[str, ...] = ()


VERBS = {
    "check": Verb("pp.check", "report what a file contains and how it would be tokenized", "matrix", skip=("quiet",)),
    "tokenize": Verb("pp.tokenize", "turn files of cells into files of tokens", skip=("client", "copy")),
    "pretrain": Verb("tl.pretrain", "train a model on tokens", out="folder for the model", skip=("task", "key_added")),
    "finetune": Verb("tl.finetune", "train a model on the labels of cells", out="folder for the model"),
    "embed": Verb("tl.embed", "compute the vector of every cell", skip=("copy",)),
    "predict": Verb("tl.predict", "predict labels of cells", skip=("copy",)),
    "evaluate": Verb("tl.evaluate", "score predictions and simple baselines", out="file for the table, csv"),
    "perturb": Verb("tl.perturb", "edit genes and measure how cells move", out="file for the results", skip=("copy",)),
    "generate": Verb("tl.generate", "generate cells of a type", "", "file for the cells", ("like",)),
    "plot": Verb("pl.", "plot a result: scbin plot embedding cells.h5ad", "cells", "file, png or pdf", ("ax",)),
    "quickstart": Verb("cli.quickstart", "all of it on 700 blood cells that come with scanpy (a few minutes)", ""),
}


class Parser(ArgumentParser):
    """A parser whose help is read in a terminal: docstrings without their roles."""

    def format_help(self, *args: Any) -> str:
        """Return the help."""
        return re.sub(r":\w+:`~?([^`]+)`", r"\1", super().format_help(*args))


def main(argv: list[str] | None = None) -> int:
    """Run `scbin` with the arguments of the command line; return the exit status."""
    if argv is None:  # from a shell, which does not ask where in the code a warning is from
        argv, warnings.formatwarning = sys.argv[1:], lambda message, *_: f"scbin: {message}\n"
    set_parsing_settings(add_print_completion_argument=True)  # where shtab is installed
    parser = Parser(prog="scbin", description="Token models of single cells, for AnnData files.", version=__version__)
    parser.add_argument("--config", action="config", help="a YAML file with a section for each command")
    verbs = parser.add_subcommands(dest="verb", title="commands")
    for name, verb in VERBS.items():  # one that is not asked for is not imported: torch takes seconds
        verbs.add_subcommand(name, sub := Parser(), help=verb.help)
        if argv[:1] in ([name], ["--config"], ["--print_completion"]):
            _fill(sub, verb)
    arguments = parser.instantiate(parser.parse_args(argv)).as_dict()
    verb, given = VERBS[arguments["verb"]], arguments[arguments["verb"]]
    if verb.function == "pl.":
        verb, given = verb._replace(function=f"pl.{given['picture']}"), given[given["picture"]]
    given.pop("config", None)
    try:
        run(verb, given)
    except (ScbinError, OSError) as error:
        print(f"scbin: {error}", file=sys.stderr)
        return 2
    return 0


def _fill(parser: Parser, verb: Verb) -> None:
    """Add to the parser of a command its files, where to write, and the parameters of its function."""
    if verb.function == "pl.":
        pictures = parser.add_subcommands(dest="picture", title="pictures")
        for name in importlib.import_module("scbin.pl").__all__:
            if name == "generated":  # which draws two files
                continue
            pictures.add_subcommand(name, sub := Parser())
            _fill(sub, verb._replace(function=f"pl.{name}"))
        return
    parser.add_argument("--config", action="config", help="a YAML file with these options; --print_config writes one")
    function = _function(verb)
    if verb.reads:
        told = "files (h5ad, zarr), folders of such, patterns, or shard_{0..46}.h5ad"
        parser.add_argument("data", nargs="+", help=told)
    if verb.out:
        parser.add_argument("--out", type=str | None, help=verb.out)
    if verb.function == "pp.tokenize":
        told = "address of a dask.distributed scheduler, whose workers do it"
        parser.add_argument("--scheduler", type=str | None, help=told)
    first = {next(iter(function.__annotations__))} if verb.reads else set()
    parser.add_function_arguments(function, skip={*first, *verb.skip}, fail_untyped=False)


def _function(verb: Verb) -> Any:
    room, name = verb.function.split(".")
    return getattr(importlib.import_module(f"scbin.{room}"), name)


def run(verb: Verb, given: dict[str, Any]) -> None:
    """Call the function of a command, and print or write what comes of it."""
    from scbin.io import corpus

    data, address = given.pop("data", None), given.pop("scheduler", None)
    out: Any = given.pop("out", None) if verb.out else None
    if verb.out and verb.function != "tl.evaluate" and verb.reads != "cells" and out is None:
        raise ScbinInputError("A02", f"--out is missing: the {verb.out}.")
    if verb.out == "folder for the model":  # raises now rather than after hours of training
        from scbin.io.directory import check_replaceable

        check_replaceable(Path(out), overwrite=True)
    if address is not None:
        from dask.distributed import Client

        given["client"] = Client(address)
    if verb.reads in ("matrix", "cells"):
        paths = corpus.expand(data)
        if len(paths) > 1:
            raise ScbinInputError("A02", f"this command takes one file; here are {len(paths)}.")
        in_memory = verb.reads == "cells"
        data = corpus.read_cells(paths[0]) if in_memory else corpus.open_cells(paths[0], given.get("layer"))
    result = _function(verb)(*([data] if verb.reads else []), **given)
    if verb.function.startswith("pl."):
        axes = result[0] if isinstance(result, list) else result
        axes.figure.savefig(out or f"{verb.function[3:]}.png", dpi=150, bbox_inches="tight")
    elif hasattr(result, "save"):
        if os.environ.get("RANK", "0") == "0":
            result.save(out, overwrite=True)
    elif hasattr(result, "to_csv") and verb.function != "pp.check":
        print(result.to_string(index=False)) if out is None else result.to_csv(out, index=False)
    elif out is not None:
        corpus.write_cells(Path(out), data if result is None else result)
    elif isinstance(result, list):
        print(*result, sep="\n")


def quickstart(out: Path = Path("quickstart"), *, preset: str = "tiny", device: str = "auto", seed: int = 0) -> None:
    """Tokenize, pretrain, embed and plot the cells that come with scanpy, and compare with PCA.

    Parameters
    ----------
    out
        Folder to write to.
    preset
        Size of the model.
    device
        `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
    seed
        Start of all randomness.
    """
    # heavy packages, which `scbin --version` does not need
    import scanpy as sc
    from sklearn.model_selection import cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    import scbin
    from scbin.io.directory import check_replaceable

    out.mkdir(parents=True, exist_ok=True)
    check_replaceable(out / "model", overwrite=True)  # raises now rather than after minutes of training
    adata = scbin.datasets.pbmc68k_reduced()
    scbin.pp.tokenize(adata)
    model = scbin.tl.pretrain(adata, preset=preset, device=device, seed=seed)
    model.save(out / "model", overwrite=True)
    sc.pp.pca(adata, mask_var=None, random_state=seed)
    print("\nMacro-F1 of cell types, 15 nearest neighbours, 5 folds")
    for name, slot in (("PCA, 50 components", "X_pca"), ("scbin", "X_scbin")):
        knn, labels = KNeighborsClassifier(15), adata.obs["bulk_labels"].astype(str)
        print(f"  {name:<20}  {cross_val_score(knn, adata.obsm[slot], labels, scoring='f1_macro').mean():.3f}")
    axes: Any = scbin.pl.embedding(adata, color="bulk_labels")
    axes.figure.savefig(out / "embedding.png", dpi=150, bbox_inches="tight")
    adata.write_h5ad(out / "adata.h5ad")
    print(f"\nembedding.png, adata.h5ad and model are in {out}. Go on with scbin.Model.load({str(out / 'model')!r}).")
