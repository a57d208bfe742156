"""Every error and warning scbin raises, each finding with a stable code: docs/troubleshooting.md lists them."""

from __future__ import annotations


class _Coded(Exception):
    """Errors and warnings, each with a code at the beginning of its text."""

    def __init__(self, code: str, message: str):
        super().__init__(f"[{code}] {message}")
        self.code, self.message = code, message


class ScbinError(_Coded):
    """Base class of all errors scbin raises. `code` is stable between versions, the text is not."""


class ScbinInputError(ScbinError, ValueError):
    """The data or an argument cannot be used as given. Nothing was computed or written."""


class ScbinTypeError(ScbinInputError, TypeError):
    """An argument is of a type scbin does not take."""


class ScbinModelError(ScbinError, ValueError):
    """A model directory or checkpoint is damaged, unsafe or does not fit."""


class ScbinTrainingError(ScbinError, RuntimeError):
    """Training had to stop. What was learned until the last checkpoint is kept."""


class ScbinInputWarning(_Coded, UserWarning):
    """The data are used, but something about them deserves a look. `code` as in the errors."""


class ScbinTrainingWarning(_Coded, UserWarning):
    """Training continues, but not exactly as requested. `code` as in the errors."""


def count(n: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, for messages.

    Examples
    --------
    >>> count(1, "cell"), count(1204, "cell"), count(2, "label is", "labels are")
    ('1 cell', '1,204 cells', '2 labels are')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"
