"""`session_info`: the versions that a result was made with."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version
from typing import Any

from session_info import show

PACKAGES = ("scbin", "torch", "transformers", "anndata", "scanpy", "numpy")


def session_info(**kwargs: Any) -> None:
    """Print the versions of scbin, of what it builds on, and of all you imported: for a notebook's last cell or a bug report.

    Parameters
    ----------
    **kwargs
        For `session_info.show`: `os=False` leaves the operating system out, `dependencies=False` lists what scbin imports alone.

    Examples
    --------
    >>> import scbin
    >>> scbin.session_info(os=False)  # doctest: +ELLIPSIS
    -----
    ...
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of packages that are asked for their `__version__`
        show(**{"html": False, "dependencies": True} | kwargs)


def versions() -> str:
    """Return the versions of Python and of the packages in use, in one line."""
    named = [f"{name} {version(name)}" for name in PACKAGES if name in sys.modules]
    return ", ".join([*named, f"Python {sys.version.split()[0]}"])
