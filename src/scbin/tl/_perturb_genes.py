"""Which genes a user means: names of `adata` and of the model, and what to say about names that are neither."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scbin._errors import ScbinInputError, ScbinTypeError
from scbin.encoding.genes import strip_version

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData

    from scbin.encoding.vocabulary import Vocabulary


@dataclass(frozen=True)
class GeneNames:
    """The genes of a model under the names that `adata` has for them."""

    vocabulary: Vocabulary
    names: tuple[str, ...]  # of each gene of the model, as in var_names where it stands there
    columns: np.ndarray  # (genes,) its column in adata, -1 where it has none
    places: dict[str, int]  # every name that is understood, to the gene
    others: frozenset[str]  # names in adata that the model does not read

    def resolve(self, wanted: Iterable[Any], what: str = "genes") -> list[int]:
        """Return the genes that names mean, in order and once each; name the closest ones for a name that is unknown."""
        wanted = [wanted] if isinstance(wanted, str) else wanted
        found, unknown = [], []
        for name in wanted:
            if not isinstance(name, str):
                raise ScbinTypeError("P30", f"{what} holds a {type(name).__name__}; pass names of genes.")
            place = self.places.get(name, self.places.get(strip_version(name)))
            if place is None:
                unknown.append(name)
            else:
                found.append(place)
        if unknown:
            raise ScbinInputError("P22", self._explain(unknown))
        return list(dict.fromkeys(found))

    def _explain(self, unknown: Sequence[str]) -> str:
        listed = ", ".join(repr(name) for name in unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        unread = [name for name in unknown if name in self.others]
        text = f"the model does not know {len(unknown):,} of the genes named: {listed}."
        if unread:
            return (
                f"{text} {unread[0]!r} is in adata, but the model reads {len(self.vocabulary.genes):,} other genes only. Tokenize "
                "and train with it: set it in var['highly_variable'], or raise n_genes."
            )
        near = self._closest(unknown[0])
        return f"{text} Close to {unknown[0]!r}: {', '.join(repr(name) for name in near) or 'nothing'}."

    def _closest(self, name: str) -> list[str]:
        """Names that differ in case, or else in a few letters."""
        by_upper = {known.upper(): known for known in self.places}
        if name.upper() in by_upper:
            return [by_upper[name.upper()]]
        return [by_upper[match] for match in difflib.get_close_matches(name.upper(), list(by_upper), n=3, cutoff=0.6)]


def gene_names(adata: AnnData, vocabulary: Vocabulary, gene_key: str | None = None) -> GeneNames:
    """Match the columns of `adata` with the genes of a model: by `gene_key`, by var_names, or by the column that fits best."""
    if gene_key is not None and gene_key not in adata.var.columns:
        there = ", ".join(repr(str(name)) for name in adata.var.columns) or "none"
        raise ScbinInputError("I35", f"{gene_key!r} is not a column of adata.var. Available: {there}.")
    index = {gene: k for k, gene in enumerate(vocabulary.genes)}
    aliases = vocabulary.aliases

    def genes_of(labels: Iterable[object]) -> np.ndarray:
        texts = [strip_version(label) if isinstance(label, str) else "" for label in labels]
        mapped = (
            name if name in index else aliases.get(name, aliases.get(name.upper(), name.upper())) for name in texts
        )
        return np.array([index.get(name, -1) for name in mapped], dtype=np.int64)

    shown = [str(name) for name in adata.var_names]
    texts = [column for column in adata.var.columns if adata.var[column].dtype.kind not in "biufc"]
    tried = [genes_of(adata.var[gene_key].astype(object))] if gene_key is not None else [genes_of(shown)]
    if gene_key is None and (tried[0] >= 0).sum() < len(vocabulary.genes):
        tried += [genes_of(adata.var[column].astype(object)) for column in texts]
    best = max(tried, key=lambda genes: len(np.unique(genes[genes >= 0])))
    columns = np.full(len(vocabulary.genes), -1, dtype=np.int64)
    for column in np.flatnonzero(best >= 0)[::-1]:  # the first of several columns of one gene
        columns[best[column]] = column
    names = tuple(shown[c] if c >= 0 else gene for c, gene in zip(columns, vocabulary.genes, strict=True))
    places = {**{alias: index[gene] for alias, gene in aliases.items() if gene in index}}
    for column in texts if gene_key is None else [gene_key]:
        places |= {str(n): int(g) for n, g in zip(adata.var[column].astype(object), best, strict=True) if g >= 0}
    places |= {name: int(gene) for name, gene in zip(shown, best, strict=True) if gene >= 0}
    places |= index
    return GeneNames(vocabulary, names, columns, places, frozenset(set(shown) - set(places)))
