"""Genes by name: versions, duplicates, species, symbols against Ensembl ids, overlap."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from scbin._errors import ScbinInputError, count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ENSEMBL = re.compile(r"(ENS[A-Z]*G[R\d]\d{5,})\.\d+(_PAR_Y)?")
ENSEMBL_ID = re.compile(r"ENS[A-Z]*G[R\d]\d{5,}(_PAR_Y)?")
MADE_UNIQUE = re.compile(r"(.+)-\d+")
SPECIES = (
    ("mouse", re.compile(r"ENSMUSG\d+")),
    ("human", re.compile(r"ENSG[R\d]\d+")),
    ("rat", re.compile(r"ENSRNOG\d+")),
    ("zebrafish", re.compile(r"ENSDARG\d+")),
    ("fly", re.compile(r"FBgn\d+")),
)


@dataclass
class GeneMatch:
    """Which gene each column is: an index, -1 for a gene outside the vocabulary, -2 for a column that is no gene count."""

    columns: np.ndarray  # (n_vars,) int32
    genes: tuple[str, ...]  # names of the indices
    warnings: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unnamed: int = 0

    @property
    def repeated(self) -> bool:
        """Whether several columns are one gene."""
        known = self.columns[self.columns >= 0]
        return len(np.unique(known)) < len(known)

    @property
    def share_of_genes(self) -> float:
        """Share of the vocabulary's genes that were found."""
        return len(np.unique(self.columns[self.columns >= 0])) / max(1, len(self.genes))


def clean_names(names: Sequence[object], *, where: str, is_column: bool) -> list[str | None]:
    """Return names as text without Ensembl versions; None for an empty name in an id column, an error in var_names."""
    texts = [str(name) if isinstance(name, str) and name.strip() else None for name in names]
    wrong = [k for k, text in enumerate(texts) if text is None and not (is_column and _is_missing(names[k]))]
    if wrong:
        raise ScbinInputError(
            "I25",
            f"{count(len(wrong), 'gene name')} in {where} not text or empty (the first at place {wrong[0]}: "
            f"{names[wrong[0]]!r}); var_names must be strings. Use adata.var_names = adata.var['...'].astype(str).",
        )
    return [strip_version(text) if text is not None and text.startswith("ENS") else text for text in texts]


def _is_missing(name: object) -> bool:
    return name is None or (isinstance(name, float) and np.isnan(name)) or (isinstance(name, str) and not name.strip())


def strip_version(name: str) -> str:
    """Cut the version of an Ensembl gene id; `_PAR_Y` stays, it is another gene."""
    if not name.startswith("ENS"):
        return name
    match = ENSEMBL.fullmatch(name)
    return name if match is None else match[1] + (match[2] or "")


def match_genes(
    names: Sequence[str | None],
    vocabulary: Sequence[str] | None = None,
    *,
    used: np.ndarray | None = None,
    name_map: Mapping[str, str] | None = None,
    case: Literal["exact", "upper"] = "exact",
    duplicates: Literal["sum", "error"] = "sum",
    beside: Mapping[str, Sequence[object]] | None = None,
    cells: Sequence[str] = (),
) -> GeneMatch:
    """Match column names to the genes of a vocabulary, or, without one, make the list of genes.

    Columns of one gene are summed later; `used` is False for columns that hold something else than gene counts. `beside` are
    other names of the same columns and `cells` the names of the cells: only to give advice when the names do not fit.
    """
    used = np.ones(len(names), dtype=bool) if used is None else used
    if case == "upper":
        names = [name if name is None else name.upper() for name in names]
    match = GeneMatch(np.full(len(names), -1, dtype=np.int32), tuple(vocabulary or ()))
    match.unnamed = sum(name is None for name in names)
    mapped = _mapped(names, vocabulary, name_map, match)
    mapped = _undo_made_unique(mapped, vocabulary, match)
    if vocabulary is None:
        match.genes = tuple(
            dict.fromkeys(name for name, use in zip(mapped, used, strict=True) if name is not None and use)
        )
    index = {gene: k for k, gene in enumerate(match.genes)}
    match.columns = np.array([index.get(name, -1) if name is not None else -1 for name in mapped], dtype=np.int32)
    match.columns[~used] = -2
    if vocabulary is not None:
        kept = [n for n, use in zip(names, used, strict=True) if n is not None and use]
        _explain_mismatch(kept, match, case, beside or {}, cells)
    elif len(cells) and kind_of(cells) == "Ensembl ids" != kind_of([n for n in names if n is not None]):
        raise ScbinInputError("I34", f"the cells have gene names ({_some(cells)}): transpose it, adata = adata.T.")
    _note_duplicates(mapped, used, match, duplicates)
    return match


def _mapped(
    names: Sequence[str | None],
    vocabulary: Sequence[str] | None,
    name_map: Mapping[str, str] | None,
    match: GeneMatch,
) -> list[str | None]:
    """Send names through the vocabulary's own map (symbols, aliases, retired ids), upper-cased as its keys are."""
    if not name_map or vocabulary is None:
        return list(names)
    known = set(vocabulary)
    mapped = [
        name if name is None or name in known else name_map.get(name, name_map.get(name.upper(), name))
        for name in names
    ]
    n = sum(a != b for a, b in zip(names, mapped, strict=True))
    if n:
        match.notes.append(f"{count(n, 'gene name')} went through the vocabulary's map of symbols and aliases")
    return mapped


def _undo_made_unique(names: list[str | None], vocabulary: Sequence[str] | None, match: GeneMatch) -> list[str | None]:
    with_dash = [k for k, name in enumerate(names) if name is not None and "-" in name]
    present, known = (set(names), set(vocabulary or ())) if with_dash else (set(), set())
    out, changed = list(names), []
    for k in with_dash:
        name = names[k]
        if name is None or name in known:
            continue
        found = MADE_UNIQUE.fullmatch(name)
        if found and found[1] in present:
            out[k] = found[1]
            changed.append(name)
    if changed:
        match.warnings.append(
            (
                "I23",
                f"{count(len(changed), 'gene name')} as var_names_make_unique leaves them ({_some(changed)}): taken for the "
                "gene without the suffix. Give the original names in a var column, gene_key=, if that is wrong.",
            )
        )
    return out


def _note_duplicates(names: list[str | None], used: np.ndarray, match: GeneMatch, duplicates: str) -> None:
    if not match.repeated:
        return
    counts = Counter(
        name for name, use, c in zip(names, used, match.columns, strict=True) if use and name is not None and c >= 0
    )
    twice = [name for name, n in counts.items() if n > 1]
    if not twice:
        return
    found = f"{count(len(twice), 'gene stands', 'genes stand')} in several columns ({_some(twice)})"
    if duplicates == "error":
        raise ScbinInputError(
            "I22", f'{found}. Make them unique by hand, or pass duplicates="sum" to add their columns up.'
        )
    match.warnings.append(("I22", f"{found}; their columns were added up."))


def _explain_mismatch(
    names: list[str], match: GeneMatch, case: str, beside: Mapping[str, Sequence[object]], cells: Sequence[str]
) -> None:
    """Raise if the names are those of another species, another case or another kind of name than the vocabulary's."""
    vocabulary = match.genes
    n_found = int((match.columns >= 0).sum())
    share = n_found / max(1, min(len(names), len(vocabulary)))
    if share >= 0.5:
        return
    if len(set(cells) & set(vocabulary)) > max(1, n_found):
        raise ScbinInputError(
            "I34", f"the vocabulary's genes are among obs_names ({_some(cells)}): transpose it, adata = adata.T."
        )
    advice = _best_column(beside, vocabulary, n_found)
    here, there = species_of(names), species_of(vocabulary)
    if here and there and here != there:
        raise ScbinInputError(
            "I27",
            f"the genes are {here} ({_some(names)}), the vocabulary's are {there} ({_some(vocabulary)}). Map them to "
            "orthologues first; names of one species are not respelled into those of another.",
        )
    known = set(vocabulary)
    upper = sum(name.upper() in known for name in names) / max(1, min(len(names), len(vocabulary)))
    if case == "exact" and upper > 0.9:
        raise ScbinInputError(
            "I28",
            f"{share:.0%} of the gene names are in the vocabulary as they are, {upper:.0%} in upper case ({_some(names)}). "
            'If they are the same genes, pass case="upper".',
        )
    kind_here, kind_there = kind_of(names), kind_of(vocabulary)
    if kind_here != kind_there:
        raise ScbinInputError(
            "I30",
            f"the gene names are {kind_here} ({_some(names)}), the vocabulary needs {kind_there} ({_some(vocabulary)})"
            f"{advice}.",
        )
    if n_found == 0:
        raise ScbinInputError(
            "I31", f"no gene is in the vocabulary: here {_some(names)}, there {_some(vocabulary)}{advice}."
        )


def _best_column(beside: Mapping[str, Sequence[object]], vocabulary: Sequence[str], n_found: int) -> str:
    known = set(vocabulary)
    hits = {
        column: len({strip_version(name) for name in names if isinstance(name, str)} & known)
        for column, names in beside.items()
    }
    best = max(hits, key=hits.__getitem__, default=None)
    if best is None or hits[best] <= n_found:
        return ""
    return f"; var[{best!r}] has {hits[best]:,} of them: pass gene_key={best!r}"


def species_of(names: Sequence[str]) -> str | None:
    """Return the species that most names point to, None if they point to none."""
    sample = list(names)[:: max(1, len(names) // 1000)]
    for species, pattern in SPECIES:
        if sum(pattern.match(name) is not None for name in sample) > len(sample) / 2:
            return species
    letters = [name for name in sample if re.fullmatch(r"[A-Za-z][A-Za-z]+\d*[a-z\d]*", name) and len(name) > 2]
    if len(letters) < max(3, 0.3 * len(sample)) or kind_of(sample) != "symbols":
        return None
    title = sum(name[0].isupper() and name[1:] == name[1:].lower() and name != name.upper() for name in letters)
    upper = sum(name == name.upper() for name in letters)
    if title > 0.8 * len(letters):
        return "mouse"
    return "human" if upper > 0.8 * len(letters) else None


def kind_of(names: Sequence[str]) -> str:
    """Say whether names are Ensembl ids or symbols, by the majority."""
    sample = list(names)[:: max(1, len(names) // 1000)]
    return "Ensembl ids" if sum(ENSEMBL_ID.match(name) is not None for name in sample) > len(sample) / 2 else "symbols"


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(str(name)[:60]) for name in list(names)[:3]) + (" ..." if len(names) > 3 else "")
