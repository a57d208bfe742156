"""Parameters that several verbs share, described once."""

from __future__ import annotations

import re
import textwrap
from typing import Any, TypeVar

Documented = TypeVar("Documented")

PARAMETERS = {
    # ---- data
    "adata": """
        adata
            Cells by genes. It is changed in place.""",
    "tokenized": """
        adata
            Tokenized cells, see :func:`scbin.pp.tokenize`.""",
    "layer": """
        layer
            The layer to read instead of `X`.""",
    "tokens_key": """
        tokens_key
            The slot of `obsm` with the tokens. Default: `"X_tokens"`.""",
    "batch_key": """
        batch_key
            Column of `obs` that says which batch a cell is from (a study, a chemistry, a donor). What differs between batches
            is then kept out of the cell's vector.""",
    "genes": """
        genes
            Names of genes, as in `var_names`. Default: all that the model knows.""",
    "phenotypes_shown": """
        phenotypes
            `"hide"` (the default) replaces every phenotype token by `[MASK]`, so that labels cannot leak into the result.
            `"show"` lets the model read them.""",
    # ---- model and training
    "model": """
        model
            A :class:`scbin.Model`, the path of its directory, or the id of a published one. Default: the model that was
            trained on these cells.""",
    "masking": """
        masking
            Which tokens are hidden, see :class:`scbin.Masking`.""",
    "loss": """
        loss
            What is learned, and with which weights, see :class:`scbin.Loss`.""",
    "training": """
        training
            Batches, learning rate and schedule, see :class:`scbin.Training`. Default: those of the model's preset.""",
    "max_steps": """
        max_steps
            Stop after so many steps.""",
    "save_dir": """
        save_dir
            Directory for checkpoints. A run that was stopped is continued from there, to the same weights.""",
    # ---- computing
    "device": """
        device
            `"auto"` takes cuda, then mps, then cpu, and logs its choice.""",
    "precision": """
        precision
            Type of the matrix products: `"float32"`, `"bfloat16"`, or `"auto"` for what is fastest on the device.""",
    "token_budget": """
        token_budget
            Most tokens that go through the network at once. Lower it if memory is short.""",
    "progress": """
        progress
            Show a progress bar.""",
    "seed": """
        seed
            The same seed gives the same result.""",
    # ---- what is written
    "key_added": """
        key_added
            Name to store the result under instead of the default one.""",
    "copy": """
        copy
            Return a changed copy instead of changing `adata`.""",
    "returns_copy": """
        Returns `None` if `copy=False`, else returns an `AnnData` object. Sets the following fields:""",
    # ---- predictions
    "predictions": """
        adata
            Cells with predictions (:func:`scbin.tl.predict`).
        target
            What was predicted.
        truth_key
            Column of `obs` with the truth. Default: the one that is called as the target.
        cells
            `"test"`: those that `obs["scbin_split"]` calls test; `"all"`; `"auto"`: the test cells where there are any.""",
    # ---- plots
    "color": """
        color
            A column of `obs` or a gene.""",
    "basis": """
        basis
            The embedding in `obsm`.""",
    "cmap": """
        cmap
            Colour map of matplotlib.""",
    "size": """
        size
            Area of a dot in square points. Default: smaller the more cells there are.""",
    "title": """
        title
            Text above the axes.""",
    "ax": """
        ax
            The axes to draw in. Default: those of a new figure.""",
}
"""Entries of numpydoc by name. The text is written into a docstring where a line holds nothing but `{name}`."""

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
        indent, name = line.groups()  # a name that nobody knows stays, and a test finds it
        return textwrap.indent(textwrap.dedent(PARAMETERS[name]).strip("\n"), indent) if name in PARAMETERS else line[0]

    item: Any = documented
    if item.__doc__:  # python -OO has none
        item.__doc__ = _PLACEHOLDER.sub(entry, item.__doc__)
    return documented
