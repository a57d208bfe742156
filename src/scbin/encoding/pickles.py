"""Reading a pickled dictionary of names and numbers without unpickling: nothing is imported, nothing is called."""

from __future__ import annotations

import io
import math
import pickletools
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MOST_STEPS = 8_000_000  # opcodes; the largest published dictionary, 173,697 entries, has 0.7 million
MOST_ENTRIES = 2_000_000
MOST_REMEMBERED = 4_000_000
TALLEST = 100_000  # values waiting on the stack; pickle sets a dictionary's items 1,000 at a time
LARGEST = 2**63

# what a number of numpy is stored as: little-endian, or a single byte
_FORMATS = {
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
    "f4": "f",
    "f8": "d",
}


class Refused(ValueError):
    """The file is not a dictionary of names and numbers, or does more than describe one."""


@dataclass(frozen=True)
class _Function:
    """A name that stands for one of three well-known steps, which are done here and never called."""

    step: str


@dataclass(frozen=True)
class _Number:
    """A numpy number type: its format for `struct`."""

    format: str


_NAMES = {
    "numpy dtype": _Function("type"),
    "numpy.core.multiarray scalar": _Function("number"),
    "numpy._core.multiarray scalar": _Function("number"),
    "_codecs encode": _Function("bytes"),  # how protocol 2 writes bytes
}


@dataclass
class _Machine:
    """The part of pickle's stack machine that a dictionary of names and numbers needs."""

    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("takes a value where there is none")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise Refused("refers to a mark that it did not set")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def remember(self, index: int) -> None:
        if len(self.memo) >= MOST_REMEMBERED:
            raise Refused(f"remembers more than {MOST_REMEMBERED:,} values")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Refused("recalls a value that it did not remember")
        self.stack.append(self.memo[index])

    def new_dictionary(self) -> None:
        if self.result is not None:
            raise Refused("holds more than one dictionary")
        self.result = {}
        self.stack.append(self.result)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if target is not self.result or target is None or len(pairs) % 2:
            raise Refused("sets items of something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            name = checked_key(key, target)
            target[name] = checked_value(name, value)
        if len(target) > MOST_ENTRIES:
            raise Refused(f"has more than {MOST_ENTRIES:,} entries")

    def name(self, text: str) -> None:
        if text not in _NAMES:
            raise Refused(f"asks for {text[:80]!r}")
        self.stack.append(_NAMES[text])

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str or len(name) + len(module) > 80:
            raise Refused("asks for something by a name that is none")
        self.name(f"{module} {name}")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not _Function or type(arguments) is not tuple:
            raise Refused("calls something that is no function")
        self.stack.append(_STEPS[function.step](arguments))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        known = type(target) is _Number and type(state) is tuple and len(state) in (8, 9) and type(state[1]) is str
        if not known or state[1] not in ("<", "|"):
            raise Refused("gives a state to something other than a little-endian number type")


def _number_type(arguments: tuple[Any, ...]) -> _Number:
    code = arguments[0] if arguments and type(arguments[0]) is str else ""
    if code not in _FORMATS or len(arguments) > 3:
        raise Refused(f"has numbers of a type {code[:80]!r} that is not read")
    return _Number("<" + _FORMATS[code])


def _number(arguments: tuple[Any, ...]) -> float | int:
    if len(arguments) != 2 or type(arguments[0]) is not _Number or type(arguments[1]) is not bytes:
        raise Refused("describes a number in a way that is not read")
    number_type, raw = arguments
    if len(raw) != struct.calcsize(number_type.format):
        raise Refused(f"has a number of {len(raw)} bytes")
    value: float | int = struct.unpack(number_type.format, raw)[0]
    return value


def _bytes(arguments: tuple[Any, ...]) -> bytes:
    if len(arguments) != 2 or type(arguments[0]) is not str or type(arguments[1]) is not str:
        raise Refused("describes bytes in a way that is not read")
    if arguments[1] != "latin1" or len(arguments[0]) > 8:
        raise Refused("describes bytes that are no number")
    return arguments[0].encode("latin1")


_STEPS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {"type": _number_type, "number": _number, "bytes": _bytes}


def _opcodes() -> dict[str, Callable[[_Machine, Any], None]]:
    """What each allowed opcode does to the machine, by its name."""

    def push(machine: _Machine, argument: Any) -> None:
        machine.stack.append(argument)

    def constant(value: Any) -> Callable[[_Machine, Any], None]:
        return lambda machine, _: machine.stack.append(value)

    def row(n: int) -> Callable[[_Machine, Any], None]:
        return lambda machine, _: machine.stack.append(tuple([machine.pop() for _ in range(n)][::-1]))

    def set_item(machine: _Machine, _: Any) -> None:
        value, key = machine.pop(), machine.pop()
        machine.set_items([key, value])

    literals = ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINBYTES")
    return {
        **dict.fromkeys((*literals, "SHORT_BINBYTES"), push),
        **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
        **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, index: machine.remember(index)),
        **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.recall(index)),
        "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
        "NONE": constant(None),
        "NEWTRUE": constant(True),
        "NEWFALSE": constant(False),
        "EMPTY_TUPLE": constant(()),
        **{f"TUPLE{n}": row(n) for n in (1, 2, 3)},
        "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
        "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
        "EMPTY_DICT": lambda machine, _: machine.new_dictionary(),
        "SETITEM": set_item,
        "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
        "GLOBAL": lambda machine, text: machine.name(text),
        "STACK_GLOBAL": lambda machine, _: machine.stack_name(),
        "REDUCE": lambda machine, _: machine.reduce(),
        "BUILD": lambda machine, _: machine.build(),
    }


_OPCODES = _opcodes()
_READERS = {op.code.encode("latin-1"): op for op in pickletools.opcodes if op.name in _OPCODES}
_NAMES_OF_ALL = {op.code.encode("latin-1"): op.name for op in pickletools.opcodes}


def _steps(content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield name and argument of each opcode, as `pickletools.genops` does, but look at no argument of a forbidden one."""
    file = io.BytesIO(content)
    while code := file.read(1):
        opcode = _READERS.get(code)
        if opcode is None:
            raise Refused(f"uses the opcode {_NAMES_OF_ALL.get(code, code)}")
        if opcode.name == "GLOBAL":  # as pickle reads it; pickletools would decode escapes
            lines = [file.readline(100).decode("ascii").removesuffix("\n") for _ in range(2)]
            yield opcode.name, " ".join(lines)
            continue
        yield opcode.name, None if opcode.arg is None else opcode.arg.reader(file)
        if opcode.name == "STOP":
            if file.read(1):
                raise Refused("goes on after its end")
            return
    raise Refused("ends before its end")


def checked_key(key: Any, others: Mapping[str, Any]) -> str:
    """Return a key of a gene dictionary if it is text that does not stand in it yet."""
    if not _is_text(key):
        raise Refused("has a key that is no text")
    if key in others:
        raise Refused(f"has the key {key[:80]!r} twice")
    return str(key)


def checked_value(key: str, value: Any) -> str | int | float:
    """Return a value of a gene dictionary if it is text or a finite number of ordinary size."""
    kind = type(value)
    sound = _is_text(value) if kind is str else kind is int and -LARGEST <= value < 2 * LARGEST
    if not (sound or (kind is float and math.isfinite(value))):
        raise Refused(f"gives {key[:80]!r} a {kind.__name__} that is no text and no finite number")
    return value


def _is_text(value: Any) -> bool:
    if type(value) is not str:
        return False
    # half a surrogate pair can be pickled, but not printed or written
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def read_pickled_dictionary(content: bytes, name: str) -> dict[str, str | int | float]:
    """Return the dictionary that a pickle describes, without unpickling it.

    Walks over the opcodes as `pickletools` lists them and follows the few that a dictionary of names and numbers (also numpy's)
    is made of. A pickle that asks for anything else is refused; none of it is ever executed.

    Parameters
    ----------
    content
        The bytes of the file.
    name
        What to call it in the error.

    Examples
    --------
    >>> import pickle
    >>> read_pickled_dictionary(pickle.dumps({"<pad>": 0, "ENSG00000000003": 2}), "tokens.pkl")
    {'<pad>': 0, 'ENSG00000000003': 2}
    """
    machine = _Machine()
    try:
        for n, (opcode, argument) in enumerate(_steps(content)):
            if n > MOST_STEPS or len(machine.stack) > TALLEST or len(machine.marks) > TALLEST:
                raise Refused("is longer than any gene dictionary")
            _OPCODES[opcode](machine, argument)
        if (
            len(machine.stack) != 1
            or machine.marks
            or type(machine.result) is not dict
            or machine.stack[0] is not machine.result
        ):
            raise Refused("does not end in one dictionary")
    except Refused as error:
        _refuse(name, str(error), error)
    except (ValueError, struct.error, OverflowError) as error:
        _refuse(name, f"is damaged ({str(error)[:80]})", error)
    return dict(machine.result or {})


def _refuse(name: str, what: str, error: Exception) -> NoReturn:
    raise ScbinInputError(
        "G09",
        f"{name} {what}; scbin reads pickles of names and numbers only, without executing anything. If you trust the file, "
        "write its dictionary as JSON and pass that.",
    ) from error
