"""Parameters that several verbs share, described once."""

from __future__ import annotations

import re
import textwrap
from typing import Any, TypeVar

Documented = TypeVar("Documented")

PARAMETERS = {
    # ---- data
    "adata": "Cells by genes. It is changed in place.",
    "tokenized": "adata\n    Tokenized cells, see :func:`scbin.pp.tokenize`.",
    "layer": "The layer to read instead of `X`.",
    "tokens_key": 'The slot of `obsm` with the tokens. Default: `"X_tokens"`.',
    "phenotypes_shown": 'phenotypes\n    `"hide"` (the default) replaces every phenotype token by `[MASK]`, so that labels cannot\n'
    '    leak into the result. `"show"` lets the model read them.',
    # ---- model and training
    "model": "A :class:`scbin.Model`, the path of its directory, or the id of a published one. Default: the model that was trained "
    "on these cells.",
    "training": "Batches, learning rate and schedule, see :class:`scbin.Training`. Default: those of the preset.",
    "save_dir": "Directory for checkpoints, from which an interrupted run continues to the same weights.",
    # ---- computing
    "device": '`"auto"` takes cuda, then mps, then cpu, and logs its choice.',
    "precision": 'Type of matrix products: `"float32"`, `"bfloat16"`, or `"auto"`: bfloat16 on GPUs that have it, else float32.',
    "token_budget": "Most tokens that go through the network at once. Lower it if memory is short.",
    "progress": "Show a progress bar.",
    "seed": "The same seed gives the same result.",
    "reading": 'tokens_key\n    The slot of `obsm` with the tokens. Default: `"X_tokens"`.\n'
    'device\n    `"auto"` takes cuda, then mps, then cpu, and logs its choice.\n'
    "token_budget\n    Most tokens that go through the network at once. Lower it if memory is short.\n"
    "progress\n    Show a progress bar.",
    # ---- what is written
    "key_added": "Name to store the result under instead of the default one.",
    "copy": "Return a changed copy instead of changing `adata`.",
    "returns_copy": "\nReturns `None` if `copy=False`, else returns an `AnnData` object. Sets the following fields:",
    # ---- predictions
    "predictions": "adata\n    Cells with predictions (:func:`scbin.tl.predict`).\ntarget\n    What was predicted.\n"
    "truth_key\n    Column of `obs` with the true values. Default: the one with the name of the target.\n"
    'cells\n    `"auto"`: the test cells of `obs["scbin_split"]`, if there are any; `"all"`: all cells.',
    # ---- plots
    "color": "A column of `obs` or a gene.",
    "basis": "The embedding in `obsm`.",
    "perturbed": "adata\n    Cells after `scbin.tl.perturb`.\n"
    'key\n    Entry of `uns` with the perturbation. Default: `"scbin_perturb"`.',
    "evaluated": "adata\n    The screen after :func:`scbin.tl.evaluate_perturbations`.",
    "genes_named": "n_genes\n    How many genes to name at either end.\ngenes\n    Genes to name instead.",
    "ax": "The axes to draw in. Default: those of a new figure.",
    "axes": "ax\n    The axes to draw in. Default: those of a new figure.\n\nReturns\n-------\nThe axes.",
}
"""The text for a line `{name}` of a docstring: an entry of that name, or, if it has several lines, these lines."""

_PLACEHOLDER = re.compile(r"^([ \t]*)\{([a-z_]+)\}[ \t]*$", re.MULTILINE)


def shared(documented: Documented) -> Documented:
    """Fill the lines `{name}` of a docstring with the entries in `PARAMETERS`; all other braces are left alone.

    Examples
    --------
    >>> @shared
    ... def verb(seed):
    ...     '''Do it.
    ...
    ...     Parameters
    ...     ----------
    ...     {seed}
    ...     '''
    >>> import inspect
    >>> inspect.getdoc(verb).splitlines()[-2:]
    ['seed', '    The same seed gives the same result.']
    """

    def entry(line: re.Match[str]) -> str:
        indent, name = line.groups()
        if name not in PARAMETERS:  # it stays, and a test finds it
            return line[0]
        text = PARAMETERS[name]
        body = text if "\n" in text else f"{name}\n{textwrap.indent(textwrap.fill(text, 110), '    ')}"
        return textwrap.indent(body.strip("\n"), indent)

    item: Any = documented
    if item.__doc__:  # python -OO has none
        item.__doc__ = _PLACEHOLDER.sub(entry, item.__doc__)
    return documented
