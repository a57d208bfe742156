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

ENSEMBL = re.compile(r"(ENS[A-Z]*G[R\d]\d{5,})(\.\d+)?(_PAR_Y)?")
MADE_UNIQUE = re.compile(r"(.+)-\d+")
SPECIES = {
    "mouse": r"ENSMUSG\d+",
    "human": r"ENSG[R\d]\d+",
    "rat": r"ENSRNOG\d+",
    "zebrafish": r"ENSDARG\d+",
    "fly": r"FBgn\d+",
}


@dataclass
class GeneMatch:
    """Which gene each column is: an index, -1 for a gene outside the vocabulary, -2 for a column that is no gene count."""

    columns: np.ndarray  # (n_vars,) int32
    genes: tuple[str, ...]  # names of the indices
    warnings: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def onto(self, genes: tuple[str, ...]) -> GeneMatch:
        """Return the match renumbered by the genes that were chosen."""
        index = {gene: k for k, gene in enumerate(genes)}
        place = np.array([index.get(gene, -1) for gene in self.genes] + [-1], dtype=np.int32)
        columns = np.where(self.columns >= 0, place[self.columns], self.columns).astype(np.int32)
        return GeneMatch(columns, genes, self.warnings, self.notes)


def clean_names(names: Sequence[object], *, where: str, is_column: bool) -> list[str | None]:
    """Return names as text without Ensembl versions; None for an empty name in an id column, an error in var_names."""
    out: list[str | None] = []
    for k, name in enumerate(names):
        filled = isinstance(name, str) and bool(name.strip())
        if not filled and not (is_column and (isinstance(name, str) or name is None or name != name)):
            found = f"a gene name in {where} is not text or empty (at place {k}: {name!r}); var_names must be strings"
            raise ScbinInputError("I25", f"{found}. Use adata.var_names = adata.var['...'].astype(str).")
        out.append(strip_version(str(name)) if filled else None)
    return out


def strip_version(name: str) -> str:
    """Cut the version of an Ensembl gene id; `_PAR_Y` stays, it is another gene."""
    match = ENSEMBL.fullmatch(name) if name.startswith("ENS") else None
    return name if match is None else match[1] + (match[3] or "")


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
    names = [name.upper() if name is not None and case == "upper" else name for name in names]
    match = GeneMatch(np.full(len(names), -1, dtype=np.int32), tuple(vocabulary or ()))
    known, mapped = set(match.genes), list(names)
    if name_map and vocabulary is not None:  # its keys are in upper case
        mapped = [n if n is None or n in known else name_map.get(n, name_map.get(n.upper(), n)) for n in names]
        n_mapped = sum(a != b for a, b in zip(names, mapped, strict=True))
        if n_mapped:
            found = count(n_mapped, "gene name")
            match.notes.append(f"{found} went through the vocabulary's map of symbols and aliases")
    mapped = _undo_made_unique(mapped, known, match)
    if vocabulary is None:
        match.genes = tuple(dict.fromkeys(n for n, use in zip(mapped, used, strict=True) if n is not None and use))
    index = {gene: k for k, gene in enumerate(match.genes)}
    match.columns = np.array([-1 if name is None else index.get(name, -1) for name in mapped], dtype=np.int32)
    match.columns[~used] = -2
    here = [n for n, use in zip(names, used, strict=True) if n is not None and use]
    if vocabulary is not None:
        _explain_mismatch(here, match, case, beside or {}, cells)
    elif len(cells) and kind_of(cells) == "Ensembl ids" != kind_of(here):
        raise ScbinInputError("I34", f"the cells have gene names ({some(cells)}): transpose it, adata = adata.T.")
    twice = [k for k, n in Counter(match.columns[match.columns >= 0].tolist()).items() if n > 1]
    if twice:
        listed = some([match.genes[k] for k in sorted(twice)])
        found = f"{count(len(twice), 'gene stands', 'genes stand')} in several columns ({listed})"
        if duplicates == "error":
            raise ScbinInputError("I22", f'{found}. Make them unique by hand, or pass duplicates="sum" to add them up.')
        match.warnings.append(("I22", f"{found}; their columns were added up."))
    return match


def _undo_made_unique(names: list[str | None], known: set[str], match: GeneMatch) -> list[str | None]:
    """Take `GENE-1` for `GENE` where `GENE` is there too and the vocabulary has no `GENE-1`."""
    present, changed = set(names), dict[str | None, str]()
    for name in names:
        found = MADE_UNIQUE.fullmatch(name) if name is not None and "-" in name and name not in known else None
        if found and found[1] in present:
            changed[name] = found[1]
    if changed:
        found_names = (
            f"{count(len(changed), 'gene name')} as var_names_make_unique leaves them ({some(list(map(str, changed)))})"
        )
        fix = "Give the original names in a var column, gene_key=, if that is wrong."
        match.warnings.append(("I23", f"{found_names}: taken for the gene without the suffix. {fix}"))
    return [changed.get(name, name) for name in names]


def _explain_mismatch(
    names: list[str], match: GeneMatch, case: str, beside: Mapping[str, Sequence[object]], cells: Sequence[str]
) -> None:
    """Raise if the names are those of another species, another case or another kind of name than the vocabulary's."""
    vocabulary, known = match.genes, set(match.genes)
    n_found, n_possible = int((match.columns >= 0).sum()), max(1, min(len(names), len(match.genes)))
    if n_found / n_possible >= 0.5:
        return
    if len(set(cells) & known) > max(1, n_found):
        found = f"the vocabulary's genes are among obs_names ({some(cells)})"
        raise ScbinInputError("I34", f"{found}: transpose it, adata = adata.T.")
    here, there = species_of(names), species_of(vocabulary)
    if here and there and here != there:
        found = f"the genes are {here} ({some(names)}), the vocabulary's are {there} ({some(vocabulary)})"
        fix = "Map them to orthologues first; names of one species are not respelled into those of another."
        raise ScbinInputError("I27", f"{found}. {fix}")
    upper = sum(name.upper() in known for name in names) / n_possible
    if case == "exact" and upper > 0.9:
        found = f"{n_found / n_possible:.0%} of the gene names are in the vocabulary, {upper:.0%} in upper case"
        raise ScbinInputError("I28", f'{found} ({some(names)}). If they are the same genes, pass case="upper".')
    hits = {
        column: len({strip_version(name) for name in column_names if isinstance(name, str)} & known)
        for column, column_names in beside.items()
    }
    best = max(hits, key=hits.__getitem__, default="")
    better = best and hits[best] > n_found
    advice = f"; var[{best!r}] has {hits[best]:,} of them: pass gene_key={best!r}" if better else ""
    if kind_of(names) != kind_of(vocabulary):
        found = f"the gene names are {kind_of(names)} ({some(names)})"
        need = f"the vocabulary needs {kind_of(vocabulary)} ({some(vocabulary)})"
        raise ScbinInputError("I30", f"{found}, {need}{advice}.")
    if n_found == 0:
        found = f"no gene is in the vocabulary: here {some(names)}, there {some(vocabulary)}"
        raise ScbinInputError("I31", f"{found}{advice}.")


def species_of(names: Sequence[str]) -> str | None:
    """Return the species that most names point to, None if they point to none."""
    sample = list(names)[:: max(1, len(names) // 1000)]
    for species, pattern in SPECIES.items():
        if sum(re.match(pattern, name) is not None for name in sample) > len(sample) / 2:
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
    return "Ensembl ids" if sum(ENSEMBL.match(name) is not None for name in sample) > len(sample) / 2 else "symbols"


def some(names: Sequence[str]) -> str:
    """Return the first three names, for messages."""
    return ", ".join(repr(str(name)[:60]) for name in list(names)[:3]) + (" ..." if len(names) > 3 else "")
