"""Geneformer's dictionaries as a vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._errors import ScbinInputError
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
    tokens = {str(name): int(number) for name, number in read_dictionary(token_dictionary).items()}
    medians = read_dictionary(gene_medians)
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
            pairs = read_dictionary(name_map).items()
            names |= {str(k).upper(): str(v) for k, v in pairs if v in known and str(k).upper() not in known}
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


def read_dictionary(source: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """Return a dictionary as it is, or read it from a JSON file."""
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if path.stat().st_size > LARGEST_FILE:
        raise ScbinInputError(
            "G05", f"{path.name} is larger than {LARGEST_FILE >> 20} MB, which no gene dictionary is."
        )
    if path.suffix != ".json":
        raise ScbinInputError(
            "G06", f"{path.name} is not a .json file; write the dictionary as JSON, or pass it as a dict."
        )
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ScbinInputError("G07", f"{path.name} holds a {type(found).__name__}, not a dictionary.")
    return found
