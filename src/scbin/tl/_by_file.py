"""Verbs for cells in files: file by file, with the results in files beside them, or all of them read into memory."""

from __future__ import annotations

import functools
import inspect
import os
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
from anndata import AnnData, concat

from scbin.io.corpus import FileTokens, open_tokens, opened, read_cells, write_beside
from scbin.model import resolve_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from scbin.tokens.tokens import Tokens

    Verb = TypeVar("Verb", bound=Callable[..., Any])


def by_file(verb: Verb) -> Verb:
    """Let a verb take the paths of files too: what it returns for the tokens of each goes into a file beside it.

    Under `torchrun` each process takes some of the files.
    """
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        tokens = given["adata"] = opened(given["adata"], given.get("tokens_key"))
        if not isinstance(tokens, FileTokens):
            return verb(**given)
        given["model"] = resolve_model(given.get("model"), None)
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        paths = tokens.paths[rank::size]
        return [
            write_beside(path, verb(**{**given, "adata": open_tokens(path, tokens_key=tokens.key)})) for path in paths
        ]

    return wrapper  # type: ignore[return-value]


def in_memory(verb: Verb) -> Verb:
    """Let a verb take the paths of files too: it gets their cells as one AnnData, which is returned where the verb returns nothing."""
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        tokens = opened(given["adata"], given.get("tokens_key"))
        if not isinstance(tokens, FileTokens):
            return verb(**given)
        parts = {"join": "outer", "merge": "same", "uns_merge": "same"}
        given["adata"] = concat([read_cells(path) for path in tokens.paths], **parts)
        result = verb(**given)
        return given["adata"] if result is None else result

    return wrapper  # type: ignore[return-value]


def adata_of(tokens: Tokens) -> AnnData:
    """Return a new AnnData for what is said of tokens that are in none."""
    names, genes = pd.Index(tokens.names).astype(str), list(tokens.vocabulary.genes)
    return AnnData(obs=pd.DataFrame(index=names), var=pd.DataFrame(index=genes))
