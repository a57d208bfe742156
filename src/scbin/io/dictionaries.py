"""Geneformer's dictionaries, pickled or as JSON, and the vocabulary of a version from them; nothing in a file is executed."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import stat
import struct
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from scbin._errors import ScbinInputError
from scbin.tokens.vocabulary import CLS, END, MASK, PAD, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST_FILE = 32 * 2**20
MOST_STEPS = 1_500_000  # opcodes of a pickle, about a second; the largest published dictionary has 0.7 million
SUFFIXES = (".json", ".pkl", ".pickle")
Source = Mapping[str, Any] | str | os.PathLike[str]


class Refused(ValueError):
    """The file is not a dictionary of names and numbers, or does more than describe one."""


_FORMATS = dict(zip("i1 i2 i4 i8 u1 u2 u4 u8 f4 f8".split(), "bhiqBHIQfd", strict=True))
_Name = Enum("_Name", "DTYPE NUMBER BYTES")
_NAMES = {
    **{"numpy.dtype": _Name.DTYPE, "_codecs.encode": _Name.BYTES},
    **{f"numpy.{core}.multiarray.scalar": _Name.NUMBER for core in ("core", "_core")},
}


class _Steps(dict):
    """What to do for each opcode that is allowed, counted as it is looked up."""

    n_left = MOST_STEPS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.n_left -= 1
        if self.n_left < 0:
            raise Refused("is longer than any gene dictionary")
        if code not in self:
            raise Refused(f"uses the opcode {chr(code)!r}")
        return super().__getitem__(code)


class _Reader(pickle._Unpickler):
    """Python's unpickler with half of its opcodes, none of which imports or calls anything: numbers of numpy are made here.

    Its version in C can be made to hang, to take all memory or to fail with a SystemError by a hundred bytes; this one cannot.
    """

    stack: list[Any]
    opcodes: ClassVar[str] = (
        "PROTO FRAME STOP MARK EMPTY_DICT BINUNICODE SHORT_BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT BINBYTES "
        "SHORT_BINBYTES NONE NEWTRUE NEWFALSE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 MEMOIZE BINPUT LONG_BINPUT BINGET "
        "LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD SETITEM SETITEMS"
    )

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        codes = (getattr(pickle, name)[0] for name in self.opcodes.split())
        self.dispatch = _Steps({code: getattr(_Reader, self.dispatch[code].__name__) for code in codes})  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _NAMES:
            raise Refused(f"asks for {module[:40]}.{name[:40]}")
        return _NAMES[f"{module}.{name}"]

    def load_reduce(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        match name, arguments:
            case (_Name.DTYPE, (str(code), *_)):
                made: Any = struct.Struct("<" + _FORMATS[code])
            case (_Name.NUMBER, (struct.Struct() as form, bytes(raw))):
                (made,) = form.unpack(raw)
            case (_Name.BYTES, (str(text), "latin1")) if len(text) <= 8:  # how protocol 2 writes the bytes of a number
                made = text.encode("latin1")
            case _:
                raise Refused("describes something other than a number")
        self.stack.append(made)

    def load_build(self) -> None:
        """Accept the state of a number type where it says little-endian, and do nothing with it."""
        match self.stack.pop(), self.stack[-1]:
            case ((_, "<" | "|", *more), struct.Struct()) if len(more) in (6, 7):
                pass
            case _:
                raise Refused("gives a state to something other than a little-endian number type")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())  # type: ignore[attr-defined]

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise Refused("sets items of something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[_checked_key(key, target)] = _checked_value(key, value)


def _checked_key(key: Any, others: Mapping[str, Any]) -> str:
    """Return a key of a gene dictionary if it is text that does not stand in it yet."""
    if not _is_text(key):
        raise Refused("has a key that is no text")
    if key in others:
        raise Refused(f"has the key {key[:80]!r} twice")
    return str(key)


def _checked_value(key: str, value: Any) -> str | int | float:
    """Return a value of a gene dictionary if it is text or a finite number of ordinary size."""
    kind = type(value)
    sound = _is_text(value) if kind is str else kind is int and -(2**63) <= value < 2**64
    if not (sound or (kind is float and math.isfinite(value))):
        raise Refused(f"gives {key[:80]!r} a {kind.__name__} that is no text and no finite number")
    return value


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be printed and written: half a surrogate pair can be pickled only."""
    return type(value) is str and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def read_pickled_dictionary(content: bytes, name: str) -> dict[str, str | int | float]:
    """Return the dictionary of names and numbers (also numpy's) that a pickle describes; anything else is refused."""
    file = io.BytesIO(content)
    faults = (ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, struct.error)
    try:
        found = _Reader(file).load()
        if type(found) is not dict or file.read(1):
            raise Refused("does not end in one dictionary")
    except (*faults, pickle.UnpicklingError) as error:
        what = str(error) if isinstance(error, Refused) else f"is damaged ({str(error)[:80]})"
        advice = "If you trust the file, write its dictionary as JSON and pass that."
        raise ScbinInputError("V05", f"{name} {what}; scbin reads names and numbers only. {advice}") from error
    return found


def read_dictionary(source: Source) -> Mapping[str, Any]:
    """Return a dictionary as it is, or read it from a JSON file or a pickle, of which nothing is executed."""
    if not isinstance(source, str | os.PathLike):
        return source
    path, fault = Path(source), None
    if path.suffix not in SUFFIXES:
        raise ScbinInputError("V05", f"{path.name} is neither a .json file nor a pickle; pass one of them, or a dict.")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for its writer
        with open(descriptor, "rb") as file:
            status, content = os.fstat(descriptor), b""
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                fault = f"is no regular file of at most {LARGEST_FILE >> 20} MB, as gene dictionaries are."
            else:
                content = file.read(LARGEST_FILE)
    except OSError as error:
        raise ScbinInputError("V05", f"{path} cannot be read ({error.strerror}).") from error
    if content.startswith(b"version https://git-lfs"):
        fault = "is a Git LFS pointer, not the file. Fetch it with `git lfs pull`."
    if fault is not None:
        raise ScbinInputError("V05", f"{path.name} {fault}")
    if path.suffix != ".json":
        return read_pickled_dictionary(content, path.name)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            found[_checked_key(key, found)] = _checked_value(key, value)
        return found

    try:
        found = json.loads(content, object_pairs_hook=unique)
        if not isinstance(found, dict):
            raise Refused(f"it holds a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise ScbinInputError("V05", f"{path.name} is not a dictionary as JSON ({str(error)[:120]}).") from error
    return found


SPECIALS = {"<pad>": PAD, "<mask>": MASK, "<cls>": CLS, "<eos>": END}
PARTS = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict", "gene_name_id_dict")
# the versions by the number of their tokens, with how the names of their dictionaries end
VERSIONS = {25_426: ("V1", ("_gc30M", "")), 20_275: ("V2", ("_gc104M", "_gc95M", ""))}


def geneformer_vocabulary(token_dictionary: Source, gene_medians: Source, *name_maps: Source | None) -> Vocabulary:
    """Return the `"rank"` vocabulary of a Geneformer version, V1 or V2, with its own token ids.

    From `{gene or special: id}`, `{gene: median}` and any `{symbol, alias or retired id: gene}`, or files with them. With the last
    ones data may name genes by symbol; what an earlier one says holds.
    """
    raw = _of_kind(read_dictionary(token_dictionary), "token dictionary", int | np.integer, "a whole number")
    medians = _of_kind(read_dictionary(gene_medians), "dictionary of medians", int | float | np.number, "a number")
    tokens = {str(name): int(number) for name, number in raw.items()}
    specials = {SPECIALS[name]: number for name, number in tokens.items() if name in SPECIALS}
    genes = sorted((name for name in tokens if name not in SPECIALS), key=tokens.__getitem__)
    first = len(specials)
    if sorted(tokens.values()) != list(range(len(tokens))) or max(specials.values(), default=-1) != first - 1:
        raise ScbinInputError("V05", "the ids of the token dictionary are not <pad>, <mask>, ..., one per gene.")
    unknown = [gene for gene in genes if not 0 < medians.get(gene, 0) < math.inf]
    if unknown:
        what = f"{len(unknown):,} genes of the token dictionary have no median above 0, such as {unknown[0]}."
        raise ScbinInputError("V05", what)
    known, names = set(genes), dict[str, str]()
    for name_map in name_maps:
        if name_map is not None:
            found = _of_kind(read_dictionary(name_map), "dictionary of names", str, "the id of a gene")
            more = {str(k).upper(): v for k, v in found.items() if v in known and str(k).upper() not in known}
            names = more | names
    return Vocabulary(
        encoding="rank",
        genes=tuple(genes),
        specials=specials,
        phenotypes=(),
        first_gene_id=first,
        first_gene_position=int(CLS in specials),
        max_length=4096 if CLS in specials else 2048,
        medians=tuple(float(medians[gene]) for gene in genes),
        name_map=tuple(sorted(names.items())) or None,
    )


def _of_kind(dictionary: Mapping[str, Any], what: str, kind: Any, needs: str) -> Mapping[str, Any]:
    """Return a dictionary whose values are all of a kind."""
    for name, value in dictionary.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            own = f"the {what} says {str(value)[:40]!r} for {str(name)[:80]!r}"
            raise ScbinInputError("V05", f"{own}, where {needs} belongs.")
    return dictionary


def find_dictionaries(model: Path, dictionaries: Path | None, n_tokens: int) -> list[Mapping[str, Any] | None]:
    """Return the four dictionaries that a Geneformer model of so many tokens was trained with, in the order of `PARTS`.

    They are looked for in `dictionaries`, if given, else beside the model and where a copy of Geneformer's repository has them.
    """
    if dictionaries is not None and not dictionaries.is_dir():
        raise ScbinInputError("A02", f"dictionaries={str(dictionaries)!r} is not a folder.")
    packages = (".", "geneformer", "../geneformer", "../../geneformer")
    roots = [dictionaries] if dictionaries is not None else [model / package for package in packages]
    version, endings = VERSIONS.get(n_tokens, ("of a version of its own", ()))
    seen = []
    for folder in (root / within for root in roots for within in (".", "gene_dictionaries_30m")):
        files = {path.stem: path for path in sorted(folder.glob("*"), reverse=True) if path.suffix in SUFFIXES}
        # of sizes that were not published, all that are there are looked at
        for ending in endings or [name.removeprefix(PARTS[0]) for name in files if name.startswith(PARTS[0])]:
            tokens, medians, *others = (files.get(f"{part}{ending}") for part in PARTS)
            if tokens is None:
                continue
            found = read_dictionary(tokens)
            if len(found) == n_tokens and medians is not None:
                return [found, *(None if path is None else read_dictionary(path) for path in (medians, *others))]
            seen.append(f"{tokens.name} has {len(found):,} entries and {'no' if medians is None else 'its'} medians")
    names = " and ".join(f"{part}{(*endings, '')[0]}.pkl" for part in PARTS[:2])
    within = "geneformer/gene_dictionaries_30m" if version == "V1" else "geneformer"
    where = "beside the model" if dictionaries is None else f"in {dictionaries}"
    raise ScbinInputError(
        "V05",
        f"the model has {n_tokens:,} tokens (Geneformer {version}), but its dictionaries are not {where} (found: "
        f"{'; '.join(seen) or 'none'}). They lie in Geneformer's package, not with its models: in its folder {within!r}, as "
        f"{names}. Pass that folder: dictionaries='path/to/geneformer'.",
    )
