"""Geneformer's dictionaries, pickled or as JSON, and the vocabulary of a version from them; nothing in a file is executed."""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from scbin._errors import ScbinInputError
from scbin.io.untrusted import check_plain, parse_json
from scbin.tokens.vocabulary import CLS, END, MASK, PAD, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable

Source = Mapping[str, Any] | str | PathLike[str]
LARGEST_FILE = 32 * 2**20
MOST_STEPS = 1_500_000  # opcodes of a pickle, about a second; the largest published dictionary has 0.7 million
SUFFIXES = (".json", ".pkl", ".pickle")
_FAULTS: tuple[type[Exception], ...] = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError)
_FAULTS += (RecursionError, OSError, struct.error, pickle.UnpicklingError)


# ---- reading without trust --------------------------------------------------------------------------------------------


class _NumberType:
    """What stands for a number type of numpy in a pickle."""

    def __init__(self, code: str, *_: Any):
        if type(code) is not str:  # a tuple of tuples of tuples could take for ever to look up
            raise ValueError("it has a number type without a name")
        codes = dict(zip("i1 i2 i4 i8 u1 u2 u4 u8 f4 f8".split(), "bhiqBHIQfd", strict=True))
        self.form = struct.Struct("<" + codes[code])


def _number(kind: _NumberType, raw: bytes) -> int | float:
    return kind.form.unpack(raw)[0]


def _bytes(text: str, code: str) -> bytes:
    """Return the bytes of a number, as protocol 2 writes them."""
    if code != "latin1":
        raise ValueError("it has bytes of another code")
    return text.encode(code)


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _NumberType,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
    ("_codecs", "encode"): _bytes,
}


class _Opcodes(dict):
    """The opcodes of a pickle that are allowed; each look-up is a step."""

    n_left = MOST_STEPS

    def __getitem__(self, code: int) -> Any:
        self.n_left -= 1
        if self.n_left < 0:
            raise ValueError("it is longer than any gene dictionary")
        return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with half of its opcodes, for texts and numbers of numpy; nothing is imported, and only we are called.

    Its version in C can be made to hang, to take all memory or to fail with a SystemError by a hundred bytes; this one cannot.
    """

    opcodes: ClassVar[str] = (
        "PROTO FRAME STOP MARK EMPTY_DICT BINUNICODE SHORT_BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT BINBYTES "
        "SHORT_BINBYTES NONE NEWTRUE NEWFALSE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 MEMOIZE BINPUT LONG_BINPUT BINGET "
        "LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD SETITEM SETITEMS"
    )
    stack: list[Any]

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        codes = (getattr(pickle, name)[0] for name in self.opcodes.split())
        self.dispatch = _Opcodes({code: getattr(_Unpickler, self.dispatch[code].__name__) for code in codes})  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> Any:
        return _NAMES[module, name]

    def load_build(self) -> None:
        """Accept the state of a number type where it says little-endian, and do nothing with it."""
        state, kind = self.stack.pop(), self.stack[-1]
        if type(kind) is not _NumberType or state[1] not in ("<", "|"):
            raise ValueError("it gives a state to something other than a little-endian number type")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())  # type: ignore[attr-defined]

    def set_items(self, pairs: list[Any]) -> None:
        """Set items of a dictionary, whose keys are texts."""
        target = self.stack[-1]
        if type(target) is not dict or not all(type(key) is str for key in pairs[::2]):
            raise ValueError("it has a key that is no text")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))


def read_dictionary(path: Path) -> dict[str, str | int | float]:
    """Return the dictionary of texts and finite numbers in a JSON file or a pickle, of which nothing is executed."""
    try:
        check_plain(path, LARGEST_FILE)
        content = path.read_bytes()
        found = parse_json(content) if path.suffix == ".json" else _Unpickler(content).load()
        for text in (*found, *(value for value in found.values() if type(value) is str)):
            text.encode()  # half a surrogate pair cannot be
        numbers = (value for value in found.values() if type(value) is not str)
        if type(found) is not dict or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            raise ValueError("it holds something other than texts and finite numbers")
    except _FAULTS as error:
        what = f"{path.name} cannot be read as a dictionary of texts and numbers ({str(error)[:120]})"
        raise ScbinInputError("V05", f"{what}. If you trust the file, write it as JSON and pass that.") from error
    return found


# ---- the vocabulary of a version --------------------------------------------------------------------------------------

SPECIALS = {"<pad>": PAD, "<mask>": MASK, "<cls>": CLS, "<eos>": END}
PARTS = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict", "gene_name_id_dict")
ENDINGS = ("_gc104M", "_gc95M", "_gc30M", "")  # of their names, by version
VERSIONS = {25_426: "V1", 20_275: "V2"}  # by the number of tokens


def geneformer_vocabulary(token_dictionary: Source, gene_medians: Source, *name_maps: Source) -> Vocabulary:
    """Return the `"rank"` vocabulary of a Geneformer version, V1 or V2, with its own token ids.

    From `{gene or special: id}`, `{gene: median}` and any `{symbol, alias or retired id: gene}`, or files with them. With the last
    ones data may name genes by symbol; what an earlier one says holds.
    """
    sources = (token_dictionary, gene_medians, *name_maps)
    tokens, medians, *maps = (read_dictionary(Path(s)) if isinstance(s, str | PathLike) else s for s in sources)
    specials = {SPECIALS[name]: number for name, number in tokens.items() if name in SPECIALS}
    if set(tokens.values()) != set(range(len(tokens))) or set(specials.values()) != set(range(len(specials))):
        raise ScbinInputError("V05", "the ids of the token dictionary are not <pad>, <mask>, ..., one per gene.")
    genes = sorted((name for name in tokens if name not in SPECIALS), key=tokens.__getitem__)
    unknown = [gene for gene in genes if not (isinstance(m := medians.get(gene), int | float) and m > 0)]
    if unknown:
        what = f"{len(unknown):,} genes of the token dictionary have no median above 0, such as {unknown[0]}."
        raise ScbinInputError("V05", what)
    known, names = set(genes), dict[str, str]()
    for name_map in maps:
        found = ((str(name).upper(), gene) for name, gene in name_map.items() if gene in known)
        names = {name: gene for name, gene in found if name not in known} | names
    return Vocabulary(
        encoding="rank",
        genes=tuple(genes),
        specials={name: int(number) for name, number in specials.items()},
        phenotypes=(),
        first_gene_id=len(specials),
        first_gene_position=int(CLS in specials),
        max_length=4096 if CLS in specials else 2048,
        medians=tuple(float(medians[gene]) for gene in genes),
        name_map=tuple(sorted(names.items())) or None,
    )


def find_dictionaries(model: Path, dictionaries: Path | None, n_tokens: int) -> list[Mapping[str, Any]]:
    """Return the dictionaries that a Geneformer model of so many tokens was trained with, in the order of `PARTS`.

    They are looked for in `dictionaries`, if given, else beside the model and where a copy of Geneformer's repository has them.
    """
    packages = (".", "geneformer", "../geneformer", "../../geneformer")
    roots = [dictionaries] if dictionaries is not None else [model / package for package in packages]
    seen = []
    for folder in (root / within for root in roots for within in (".", "gene_dictionaries_30m")):
        for ending in ENDINGS:
            paths = [[folder / f"{part}{ending}{suffix}" for suffix in SUFFIXES] for part in PARTS]
            files = [next((path for path in each if path.exists()), None) for each in paths]
            if files[0] is None or files[1] is None:
                continue
            tokens = read_dictionary(files[0])
            if len(tokens) == n_tokens:
                return [tokens, *(read_dictionary(file) for file in files[1:] if file is not None)]
            seen.append(f"{files[0].name} has {len(tokens):,} entries")
    version = VERSIONS.get(n_tokens, "of a version of its own")
    where = "beside the model" if dictionaries is None else f"in {dictionaries}"
    raise ScbinInputError(
        "V05",
        f"the model has {n_tokens:,} tokens (Geneformer {version}), but its dictionaries are not {where} (found: "
        f"{'; '.join(seen) or 'none'}). They lie in Geneformer's package, not with its models: {PARTS[0]}_gc104M.pkl and others "
        "in its folder 'geneformer', those of V1 in 'geneformer/gene_dictionaries_30m'. Pass that folder: "
        "dictionaries='path/to/geneformer'.",
    )
