"""From obs columns to control tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scbin._anndata import read_obs, warn
from scbin._errors import count
from scbin.encoding.phenotypes import AGE_COLUMNS, age_labels, labels_of, token_ids

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

    from scbin.encoding.vocabulary import Vocabulary


def phenotype_columns(adata: AnnData, phenotypes: Any, vocabulary: Vocabulary | None) -> dict[str, str]:
    """Return {category: obs column}: as asked, or, for a vocabulary, the columns of its own names that exist."""
    if phenotypes is None and vocabulary is not None:
        found = {p.name: own_column(adata, p.name) for p in vocabulary.phenotypes}
        return {name: column for name, column in found.items() if column is not None}
    if isinstance(phenotypes, str):
        phenotypes = [phenotypes]
    if not hasattr(phenotypes, "items"):
        phenotypes = {("age" if name == "development_stage" else name): name for name in phenotypes or ()}
    for column in phenotypes.values():
        read_obs(adata, column)
    if vocabulary is not None:
        for name in phenotypes:
            vocabulary.phenotype(name)
    return dict(phenotypes)


def own_column(adata: AnnData, name: str) -> str | None:
    """Return the column of obs that goes by the name of a category, None where there is none."""
    columns = AGE_COLUMNS if name == "age" else (name,)
    there = [column for column in columns if column in adata.obs.columns]
    return there[-1] if there else None


def age_widths(columns: Mapping[str, str], asked: Literal[10, 20] | None, given: Vocabulary | None) -> dict[str, int]:
    """Return the width of the age classes by category: those of a given vocabulary, else what was asked for."""
    if given is not None:
        return {p.name: p.age_groups for p in given.phenotypes if p.age_groups is not None}
    if asked is None:
        return {}
    return {name: asked for name, column in columns.items() if column in AGE_COLUMNS or name == "age"}


def cell_labels(adata: AnnData, column: str, age_groups: int | None) -> np.ndarray:
    """Return the label of each cell, or the class of its age where the width of the classes is given."""
    if age_groups is None:
        return labels_of(read_obs(adata, column), column)
    labels, unread = age_labels(labels_of(read_obs(adata, column), column), age_groups)
    if unread:
        listed = ", ".join(f"{text!r} ({n})" for text, n in list(unread.items())[:3])
        found = count(len(unread), "label")
        warn("I39", f"{found} of {column!r} without an age became [NO_AGE]: {listed}.")
    return labels


def phenotype_ids(vocabulary: Vocabulary, labels: Mapping[str, np.ndarray], n_obs: int, *, known: bool) -> np.ndarray:
    """Return the control tokens (cells, phenotypes); say which labels are new to a `known` vocabulary, or rare."""
    ids = np.zeros((n_obs, len(vocabulary.phenotypes)), dtype=np.int64)
    for k, phenotype in enumerate(vocabulary.phenotypes):
        ids[:, k] = phenotype.missing_id
        if phenotype.name not in labels:
            continue
        ids[:, k], unseen = token_ids(labels[phenotype.name], phenotype)
        if unseen:
            listed = ", ".join(f"{value[:60]!r} ({count(n, 'cell')})" for value, n in list(unseen.items())[:3])
            warn(
                "I36",
                f"{count(len(unseen), 'label')} of {phenotype.name!r}, new to the vocabulary, became "
                f"[NO_{phenotype.name.upper()}]: {listed}.",
            )
        counts = np.bincount(ids[:, k], minlength=phenotype.stop_id)[phenotype.first_id : phenotype.stop_id]
        few = [f"{v[:60]!r} ({n})" for v, n in zip(phenotype.values, counts, strict=True) if 0 < n < 3]
        if few and not known:
            found = f"{count(len(few), 'label')} of {phenotype.name!r} with fewer than 3 cells"
            warn("I40", f"there {'is' if len(few) == 1 else 'are'} {found}: {', '.join(few[:3])}.")
    return ids
