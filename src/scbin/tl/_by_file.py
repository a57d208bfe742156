"""Verbs that say something of each cell, for cells in files: file by file, with the results in files beside them."""

from __future__ import annotations

import functools
import inspect
import os
from typing import TYPE_CHECKING, Any, TypeVar

from scbin.io.corpus import FileTokens, opened, write_beside
from scbin.model import resolve_model

if TYPE_CHECKING:
    from collections.abc import Callable

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
        given["model"], written = resolve_model(given.get("model"), None), []
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        for number, (path, of_file) in enumerate(zip(tokens.paths, tokens.files(), strict=True)):
            if number % size == rank:
                written.append(write_beside(path, verb(**{**given, "adata": of_file})))
        return written

    return wrapper  # type: ignore[return-value]
