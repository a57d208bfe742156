"""Genes by name: versions, duplicates, species, symbols against Ensembl ids, overlap."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scbin.tokens.vocabulary import Vocabulary

ENSEMBL = re.compile(r"(ENS[A-Z]*G[R\d]\d{5,})(\.\d+)?(_PAR_Y)?")
FEW_GENES = 0.05  # share of the names, of which so many or fewer are found by accident


@dataclass(frozen=True)
class GeneMatch:
    """Which gene each column is: an index, -1 for a gene outside the vocabulary, -2 for a column that is not a gene count."""

    columns: np.ndarray  # (n_vars,) int32
    genes: tuple[str, ...]  # names of the indices
    repeated: tuple[str, ...] = ()  # genes that stand in several columns

    def onto(self, kept: np.ndarray) -> GeneMatch:
        """Return the match renumbered by the genes that were chosen."""
        place = np.full(len(self.genes) + 1, -1, dtype=np.int32)
        place[kept] = np.arange(len(kept))
        columns = np.where(self.columns >= 0, place[np.maximum(self.columns, -1)], self.columns)
        return GeneMatch(columns, tuple(self.genes[k] for k in kept), self.repeated)


def clean_names(names: Iterable[object], column: str | None = None) -> np.ndarray:
    """Return names as text without Ensembl versions; None for an empty name in a column, an error in var_names."""
    texts = [n if isinstance(n, str) and n and not n.isspace() else None for n in names]
    if None in texts and (column is None or not any(texts)):
        where = "adata.var_names" if column is None else f"adata.var[{column!r}]"
        found = (
            f"a gene name in {where} is not text or empty (the {texts.index(None) + 1}. one); var_names must be strings"
        )
        raise ScbinInputError("I25", f"{found}. Use adata.var_names = adata.var['...'].astype(str).")
    return np.array([strip_version(t) if t and "." in t else t for t in texts], dtype=object)


def strip_version(name: str) -> str:
    """Cut the version of an Ensembl gene id; `_PAR_Y` stays, it is another gene."""
    match = ENSEMBL.fullmatch(name) if name.startswith("ENS") else None
    return name if match is None else match[1] + (match[3] or "")


def match_genes(names: np.ndarray, vocabulary: Vocabulary | None = None, used: np.ndarray | None = None) -> GeneMatch:
    """Match column names to the genes of a vocabulary, or, without one, make the list of genes.

    Columns of one gene are summed later; `used` is False for columns that hold something else than gene counts.
    """
    used = np.ones(len(names), dtype=bool) if used is None else used
    found, genes = pd.factorize(np.where(used, names, None))  # type: ignore[call-overload]
    if vocabulary is not None:
        n_possible, found, here = min(len(genes), len(vocabulary.genes)), find_genes(names, vocabulary), genes
        genes = vocabulary.genes
        if (n := int((found[used] >= 0).sum())) <= FEW_GENES * n_possible:
            said = f"{n:,} of {n_possible:,} gene names are in the vocabulary (here {some(here)}, there {some(genes)})"
            cause = "another species, letter case or kind of name, or genes in the rows, is the likely cause"
            raise ScbinInputError("I31", f"{said}; {cause}. gene_key= takes the names from a column of var.")
    columns = np.where(used, found, -2).astype(np.int32)
    twice = np.flatnonzero(np.bincount(columns[columns >= 0]) > 1)
    return GeneMatch(columns, tuple(genes), tuple(genes[k] for k in twice))


def find_genes(names: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Return the gene that each name means to a vocabulary, by its own names or their aliases; -1 for none.

    Letter case matters: `Gapdh` is a gene of the mouse. Aliases are in upper case, in symbols of people only "orf" is not.
    """
    index, aliases = pd.Index(vocabulary.genes, dtype=object), vocabulary.aliases
    found = index.get_indexer(names)
    if aliases:
        other = [aliases.get(n, aliases.get(n.replace("orf", "ORF"))) if n else None for n in names[found < 0]]
        found[found < 0] = index.get_indexer(other)
    return found


def some(names: Sequence[str] | np.ndarray) -> str:
    """Return the first three names, for messages."""
    return ", ".join(repr(str(name)[:60]) for name in names[:3]) + (" ..." if len(names) > 3 else "")
