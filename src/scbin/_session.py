"""`session_info`: the versions that a result was made with."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from session_info import show

PACKAGES = ("scbin", "torch", "transformers", "anndata", "scanpy", "numpy")


def session_info(**kwargs: Any) -> None:
    """Print the versions of scbin, its main dependencies and your imports, for the last cell of a notebook or a bug report.

    Parameters
    ----------
    **kwargs
        For `session_info.show`: `os=False` omits the operating system, `dependencies=True` lists every module.

    Examples
    --------
    >>> import scbin
    >>> scbin.session_info(os=False)  # doctest: +ELLIPSIS
    -----
    ...
    """
    names = sys._getframe(1).f_globals | _loaded() | {"show": show, "kwargs": {"html": False} | kwargs}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of packages asked for their `__version__`
        eval("show(**kwargs)", names)  # it lists what the globals of its caller hold


def versions() -> str:
    """Return the versions of Python and of the packages in use, in one line."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        named = [f"{name} {module.__version__}" for name, module in _loaded().items()]
    return ", ".join([*named, f"Python {sys.version.split()[0]}"])


def _loaded() -> dict[str, Any]:
    """Return the packages that are in use."""
    return {name: sys.modules[name] for name in PACKAGES if name in sys.modules}
