"""Geneformer's dictionaries, pickled or as JSON, and the vocabulary of a version from them; nothing in a file is executed."""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scbin._errors import ScbinInputError
from scbin.io.files import check_plain, parse_json
from scbin.tokens.vocabulary import CLS, END, MASK, PAD, Vocabulary

Source = Mapping[str, Any] | str | PathLike[str]
LARGEST_FILE = 32 * 2**20
MOST_STEPS = 1_500_000  # opcodes of a pickle, about a second; the largest published dictionary has 0.7 million
FAULTS: tuple[type[Exception], ...] = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError)
FAULTS += (RecursionError, OSError, struct.error, pickle.UnpicklingError)


# ---- reading without trust --------------------------------------------------------------------------------------------


def _dtype(code: Any, *_: Any) -> np.dtype[Any]:
    if type(code) is not str or not re.fullmatch("[iu][1248]|f[48]", code):
        raise ValueError("it has a type that is not a number")
    return np.dtype(f"<{code}")


def _scalar(dtype: Any, raw: Any) -> int | float:
    if not isinstance(dtype, np.dtype):
        raise ValueError("it has a number without a type")
    return np.frombuffer(raw, dtype).item()


_NAMES = {"numpy dtype": _dtype, "numpy.core.multiarray scalar": _scalar, "numpy._core.multiarray scalar": _scalar}


class _Opcodes(dict[int, Any]):
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
        return _NAMES[f"{module} {name}"]

    def load_build(self) -> None:
        """Do nothing with the state of a number type, where it says little-endian."""
        if self.stack.pop()[1] not in ("<", "|"):
            raise ValueError("it has numbers that are not little-endian")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())  # type: ignore[attr-defined]

    def set_items(self, pairs: list[Any]) -> None:
        """Set items of a dictionary, whose keys are texts: others could take for ever to hash."""
        if type(self.stack[-1]) is not dict or not all(type(key) is str for key in pairs[::2]):
            raise ValueError("it has a key that is not text")
        self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))


def read_dictionary(path: Path) -> dict[str, str | int | float]:
    """Return the dictionary of texts and finite numbers in a JSON file or a pickle, of which nothing is executed."""
    try:
        check_plain(path, LARGEST_FILE)
        content = path.read_bytes()
        found = parse_json(content) if path.suffix == ".json" else _Unpickler(content).load()
        numbers = [value for value in found.values() if type(value) is not str]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError("it holds something other than texts and finite numbers")
        "".join([*found, *map(str, found.values())]).encode()  # half a surrogate pair cannot be
    except FAULTS as error:
        what = f"{path.name} cannot be read as a dictionary of texts and numbers ({str(error)[:120]})"
        raise ScbinInputError("V05", f"{what}. If you trust the file, write it as JSON and pass that.") from error
    return found


# ---- the vocabulary of a version --------------------------------------------------------------------------------------

SPECIALS = {"<pad>": PAD, "<mask>": MASK, "<cls>": CLS, "<eos>": END}
PARTS = ("gene_median_dictionary", "ensembl_mapping_dict", "gene_name_id_dict")  # beside the token dictionary
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
        raise ScbinInputError("V05", f"{len(unknown):,} genes have no median above 0, such as {unknown[0]}.")
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
    """Return the dictionaries that a Geneformer model of so many tokens was trained with, that of the tokens first.

    They are looked for in `dictionaries`, if given, else beside the model and where a copy of Geneformer's repository has them.
    """
    near = [model / package for package in (".", "geneformer", "../geneformer", "../../geneformer")]
    seen = []
    for root in near if dictionaries is None else [dictionaries]:
        for file in sorted([*root.glob("token_dictionary*"), *root.glob("gene_dictionaries_30m/token_dictionary*")]):
            tokens = read_dictionary(file)
            others = [file.with_name(file.name.replace("token_dictionary", part)) for part in PARTS]
            if len(tokens) == n_tokens and others[0].exists():
                return [tokens, *(read_dictionary(other) for other in others if other.exists())]
            seen.append(f"{file.name} has {len(tokens):,} entries")
    where = "beside the model" if dictionaries is None else f"in {dictionaries}"
    what = f"the model has {n_tokens:,} tokens (Geneformer {VERSIONS.get(n_tokens, 'of a version of its own')})"
    found = f"its dictionaries, token_dictionary_gc104M.pkl and others, are not {where} ({'; '.join(seen) or 'none'})"
    fix = "Pass their folder in Geneformer's package: dictionaries='path/to/geneformer'"
    raise ScbinInputError("V05", f"{what}, but {found}. {fix}, for V1 its 'gene_dictionaries_30m'.")
