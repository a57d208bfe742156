"""Geneformer's dictionaries as a vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._errors import ScbinInputError
from scbin.encoding.pickles import checked_key, checked_value, read_pickled_dictionary
from scbin.encoding.vocabulary import CLS, END, MASK, PAD, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping

SPECIALS = {"<pad>": PAD, "<mask>": MASK, "<cls>": CLS, "<eos>": END}
LARGEST_FILE = 64 * 1024**2


def vocabulary_from_geneformer(
    token_dictionary: Mapping[str, int] | str | Path,
    gene_medians: Mapping[str, float] | str | Path,
    *name_maps: Mapping[str, str] | str | Path | None,
) -> Vocabulary:
    """Build the `"rank"` vocabulary of a Geneformer version from its dictionaries; ids stay as they are."""
    tokens, medians = read_dictionary(token_dictionary), read_dictionary(gene_medians)
    _check_kind(tokens, "token dictionary", int | np.integer, "a whole number")
    _check_kind(medians, "dictionary of medians", int | float | np.integer | np.floating, "a number")
    tokens = {str(name): int(number) for name, number in tokens.items()}
    specials = {SPECIALS[name]: number for name, number in tokens.items() if name in SPECIALS}
    genes = sorted((name for name in tokens if name not in SPECIALS), key=tokens.__getitem__)
    first = len(specials)
    if sorted(specials.values()) != list(range(first)) or [tokens[g] for g in genes] != list(
        range(first, first + len(genes))
    ):
        raise ScbinInputError(
            "G02", "the ids of this token dictionary are not <pad>, <mask>, ... and then one per gene."
        )
    missing = [gene for gene in genes if gene not in medians]
    if missing:
        raise ScbinInputError(
            "G03", f"{len(missing):,} genes of the token dictionary have no median, such as {missing[0]}."
        )
    chosen = np.array([medians[gene] for gene in genes], dtype=np.float64)
    if not (np.isfinite(chosen) & (chosen > 0)).all():
        raise ScbinInputError("G04", "some gene medians are zero or not finite.")
    known = set(genes)
    names: dict[str, str] = {}
    for name_map in name_maps:
        if name_map is not None:
            found = read_dictionary(name_map)
            _check_kind(found, "dictionary of names", str, "the id of a gene")
            more = {str(k).upper(): v for k, v in found.items() if v in known and str(k).upper() not in known}
            names = more | names  # what an earlier dictionary says holds
    return Vocabulary(
        encoding="rank",
        genes=tuple(genes),
        specials=specials,
        phenotypes=(),
        first_gene_id=first,
        first_gene_position=int(CLS in specials),
        max_length=4096 if CLS in specials else 2048,
        medians=tuple(chosen.tolist()),
        name_map=tuple(sorted(names.items())) or None,
    )


def _check_kind(dictionary: Mapping[str, Any], what: str, kind: Any, needs: str) -> None:
    wrong = next((name for name, value in dictionary.items() if not isinstance(value, kind)), None)
    if wrong is not None:
        raise ScbinInputError(
            "G15", f"the {what} says {str(dictionary[wrong])[:40]!r} for {str(wrong)[:80]!r}, where {needs} belongs."
        )


def read_dictionary(source: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """Return a dictionary as it is, or read it from a JSON file or a pickle, of which nothing is executed."""
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if path.suffix not in SUFFIXES:
        raise ScbinInputError("G06", f"{path.name} is neither a .json file nor a pickle; pass one of them, or a dict.")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ScbinInputError(
                "G05", f"{path.name} is larger than {LARGEST_FILE >> 20} MB, which no gene dictionary is."
            )
        content = path.read_bytes()
    except OSError as error:
        raise ScbinInputError("G10", f"{path} cannot be read ({error.strerror}).") from error
    if content.startswith(b"version https://git-lfs"):
        raise ScbinInputError(
            "G11", f"{path.name} is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`."
        )
    return _from_json(content, path.name) if path.suffix == ".json" else read_pickled_dictionary(content, path.name)


def _from_json(content: bytes, file: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            name = checked_key(key, found)
            found[name] = checked_value(name, value)
        return found

    try:
        found = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ScbinInputError("G08", f"{file} is not a dictionary as JSON ({str(error)[:120]}).") from error
    if not isinstance(found, dict):
        raise ScbinInputError("G07", f"{file} holds a {type(found).__name__}, not a dictionary.")
    return found


# ---- finding them ---------------------------------------------------------------------------------------------------

PARTS = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict", "gene_name_id_dict")
SUFFIXES = (".json", ".pkl", ".pickle")
# the versions by the number of their tokens, with how the names of their dictionaries end
VERSIONS = {25_426: ("V1", ("_gc30M", "")), 20_275: ("V2", ("_gc104M", "_gc95M", ""))}
# where Geneformer's package keeps them, seen from the model folder of a copy of its repository and from the package itself
_PACKAGES = ("geneformer", "../geneformer", "../../geneformer")
_WITHIN = (".", "gene_dictionaries_30m")


def find_dictionaries(model: Path, dictionaries: Path | None, n_tokens: int) -> dict[str, Path]:
    """Return the files of the dictionaries that a Geneformer model of so many tokens was trained with, by their part.

    Looked for in `dictionaries`, if given, else beside the model and where a copy of Geneformer's repository has them.
    """
    if dictionaries is not None and not dictionaries.is_dir():
        raise ScbinInputError("G12", f"dictionaries={str(dictionaries)!r} is not a folder.")
    places = [model, *(model / package for package in _PACKAGES)] if dictionaries is None else [dictionaries]
    folders = [place / within for place in places for within in _WITHIN]
    seen = []
    for folder in folders:
        for ending in _endings(folder, n_tokens):
            tokens = _file(folder, PARTS[0], ending)
            if tokens is None:
                continue
            n_found = len(read_dictionary(tokens))
            if n_found == n_tokens:
                return _companions(folder, ending)
            seen.append(f"{tokens.name} has {n_found:,} entries")
    raise ScbinInputError("G13", _not_found(n_tokens, seen, dictionaries))


def _endings(folder: Path, n_tokens: int) -> tuple[str, ...]:
    """Endings of the names to look for, those of the version first; for other sizes all that are there."""
    if n_tokens in VERSIONS:
        return VERSIONS[n_tokens][1]
    names = sorted(path.stem for path in folder.glob(f"{PARTS[0]}*") if path.suffix in SUFFIXES)
    return tuple(dict.fromkeys(name.removeprefix(PARTS[0]) for name in names))


def _file(folder: Path, part: str, ending: str) -> Path | None:
    found = (folder / f"{part}{ending}{suffix}" for suffix in SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def _companions(folder: Path, ending: str) -> dict[str, Path]:
    found = {part: _file(folder, part, ending) for part in PARTS}
    if found[PARTS[1]] is None:
        raise ScbinInputError(
            "G14",
            f"{PARTS[0]}{ending} is in {folder}, but {PARTS[1]}{ending} is not; genes cannot be ranked without their medians.",
        )
    return {part: path for part, path in found.items() if path is not None}


def _not_found(n_tokens: int, seen: list[str], dictionaries: Path | None) -> str:
    version, endings = VERSIONS.get(n_tokens, ("a version of its own", ("",)))
    names = " and ".join(f"{part}{endings[0]}.pkl" for part in PARTS[:2])
    within = "geneformer/gene_dictionaries_30m" if version == "V1" else "geneformer"
    where = "beside the model" if dictionaries is None else f"in {dictionaries}"
    found = f" ({'; '.join(seen)})" if seen else ""
    return (
        f"the model has {n_tokens:,} tokens (Geneformer {version}), but its dictionaries are not {where}{found}. They are not part "
        f"of a model folder: they lie in Geneformer's package, in its folder {within!r}, as {names}. Pass that folder: "
        "dictionaries='path/to/geneformer'."
    )
