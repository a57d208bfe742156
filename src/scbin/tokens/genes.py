"""Genes by name: versions, duplicates, species, symbols against Ensembl ids, overlap."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin._errors import ScbinInputError, count

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scbin.tokens.vocabulary import Vocabulary

ENSEMBL = re.compile(r"(ENS[A-Z]*G[R\d]\d{5,})(\.\d+)?(_PAR_Y)?")
MADE_UNIQUE = re.compile(r"(.+)-\d+")
# Ensembl ids, and symbols as they are written there
SPECIES = {
    "mouse": r"ENSMUSG\d+|[A-Z][a-z]+\d*[a-z\d]*$",
    "human": r"ENSG[R\d]\d+|[A-Z]{2,}[A-Z\d]*$",
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


def clean_names(names: Sequence[object], column: str | None = None) -> list[str | None]:
    """Return names as text without Ensembl versions; None for an empty name in an id column, an error in var_names."""
    texts = [str(name) if isinstance(name, str) and name and not name.isspace() else None for name in names]
    for k in [k for k, text in enumerate(texts) if text is None]:
        name: Any = names[k]
        if column is None or not (isinstance(name, str) or name is None or name != name):
            where = "adata.var_names" if column is None else f"adata.var[{column!r}]"
            found = f"a gene name in {where} is not text or empty (at place {k}: {name!r}); var_names must be strings"
            raise ScbinInputError("I25", f"{found}. Use adata.var_names = adata.var['...'].astype(str).")
    return [strip_version(text) if text and text.startswith("ENS") else text for text in texts]


def strip_version(name: str) -> str:
    """Cut the version of an Ensembl gene id; `_PAR_Y` stays, it is another gene."""
    match = ENSEMBL.fullmatch(name) if name.startswith("ENS") else None
    return name if match is None else match[1] + (match[3] or "")


def match_genes(
    names: Sequence[str | None],
    vocabulary: Vocabulary | None = None,
    *,
    used: np.ndarray | None = None,
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
    genes, aliases = ((), {}) if vocabulary is None else (vocabulary.genes, vocabulary.aliases)
    known, warnings, notes = set(genes), [], []
    if case == "upper":
        by_upper = {gene.upper(): gene for gene in genes}
        names = [n if n is None or n in known else by_upper.get(n.upper(), n.upper()) for n in names]
    # the keys of aliases are in upper case
    mapped = list(names)
    if aliases:
        mapped = [n if n is None or n in known else aliases.get(n, aliases.get(n.upper(), n)) for n in names]
    if n_mapped := sum(a != b for a, b in zip(names, mapped, strict=True)) if aliases else 0:
        notes.append(f"{count(n_mapped, 'gene name')} went through the vocabulary's map of symbols and aliases")
    unique = _made_unique(mapped, known)
    if unique:
        found = f"{count(len(unique), 'gene name')} as var_names_make_unique leaves them ({some(list(unique))})"
        fix = "Give the original names in a var column, gene_key=, if that is wrong."
        warnings.append(("I23", f"{found}: taken for the gene without the suffix. {fix}"))
        mapped = [unique.get(name or "", name) for name in mapped]
    if vocabulary is None:
        genes = tuple(dict.fromkeys(n for n, use in zip(mapped, used.tolist(), strict=True) if n is not None and use))
    index: dict[str | None, int] = {gene: k for k, gene in enumerate(genes)}
    columns = np.array([index.get(name, -1) for name in mapped], dtype=np.int32)
    columns[~used] = -2
    here = [n for n, use in zip(names, used.tolist(), strict=True) if n is not None and use]
    if vocabulary is not None:
        _explain_mismatch(here, genes, int((columns >= 0).sum()), case, beside or {}, cells)
    elif len(cells) and kind_of(cells) == "Ensembl ids" != kind_of(here):
        raise ScbinInputError("I34", f"the cells have gene names ({some(cells)}): transpose it, adata = adata.T.")
    twice = np.flatnonzero(np.bincount(columns[columns >= 0]) > 1)
    if len(twice):
        listed = some([genes[k] for k in twice])
        found = f"{count(len(twice), 'gene stands', 'genes stand')} in several columns ({listed})"
        if duplicates == "error":
            raise ScbinInputError("I22", f'{found}. Make them unique by hand, or pass duplicates="sum" to add them up.')
        warnings.append(("I22", f"{found}; their columns were added up."))
    return GeneMatch(columns, genes, warnings, notes)


def _made_unique(names: Sequence[str | None], known: set[str]) -> dict[str, str]:
    """Return each `GENE-1` that stands for `GENE`: that is there too, and the vocabulary has no `GENE-1`."""
    present = set(names)
    ends = [n for n in present - known if n and "-" in n]
    found = {n: m[1] for n in ends if (m := MADE_UNIQUE.fullmatch(n)) and m[1] in present}
    return {name: found[name] for name in names if name in found} if found else {}  # in their order


def _explain_mismatch(
    names: list[str], genes: Sequence[str], n_found: int, case: str, beside: Mapping, cells: Sequence[str]
) -> None:
    """Raise if the names are those of another species, another case or another kind of name than the vocabulary's."""
    known, n_possible = set(genes), max(1, min(len(names), len(genes)))
    if n_found / n_possible >= 0.5:
        return
    if len(set(cells) & known) > max(1, n_found):
        raise ScbinInputError("I34", f"the genes are among obs_names ({some(cells)}): transpose it, adata = adata.T.")
    here, there = species_of(names), species_of(genes)
    if here and there and here != there:
        found = f"the genes are {here} ({some(names)}), the vocabulary's are {there} ({some(genes)})"
        raise ScbinInputError("I27", f"{found}. Map them to orthologues first.")
    upper = sum(name.upper() in known for name in names) / n_possible
    if case == "exact" and upper > 0.9:
        found = f"{n_found / n_possible:.0%} of the gene names are in the vocabulary, {upper:.0%} in upper case"
        raise ScbinInputError("I28", f'{found} ({some(names)}). If they are the same genes, pass case="upper".')
    hits = {c: len({strip_version(n) for n in others if isinstance(n, str)} & known) for c, others in beside.items()}
    best = max(hits, key=hits.__getitem__, default="")
    better = best and hits[best] > n_found
    advice = f"; var[{best!r}] has {hits[best]:,} of them: pass gene_key={best!r}" if better else ""
    if kind_of(names) != kind_of(genes):
        found = f"the gene names are {kind_of(names)} ({some(names)})"
        raise ScbinInputError("I30", f"{found}, the vocabulary needs {kind_of(genes)} ({some(genes)}){advice}.")
    if n_found == 0:
        raise ScbinInputError("I31", f"no gene is in the vocabulary: here {some(names)}, there {some(genes)}{advice}.")


def _share(names: Sequence[str], pattern: str | re.Pattern[str]) -> float:
    """Return how many of a thousand names, evenly taken, match a pattern."""
    sample = list(names)[:: max(1, len(names) // 1000)]
    return sum(re.match(pattern, name) is not None for name in sample) / max(1, len(sample))


def species_of(names: Sequence[str]) -> str | None:
    """Return the species that most names point to, None if they point to none."""
    return next((species for species, pattern in SPECIES.items() if _share(names, pattern) > 0.5), None)


def kind_of(names: Sequence[str]) -> str:
    """Say whether names are Ensembl ids or symbols, by the majority."""
    return "Ensembl ids" if _share(names, ENSEMBL) > 0.5 else "symbols"


def some(names: Sequence[str]) -> str:
    """Return the first three names, for messages."""
    return ", ".join(repr(str(name)[:60]) for name in list(names)[:3]) + (" ..." if len(names) > 3 else "")
