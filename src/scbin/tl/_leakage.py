"""Leakage check: which cells a model was trained on, and a warning where it is scored on the same ones."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np

from scbin._adata import warn
from scbin.train.randomness import mixed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scipy.sparse import csr_matrix

    from scbin.model import Model
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

N_KEPT = 512  # hashes: of a tenth of a million training cells, about 50 are recognised by them
_LEAST = 0.05  # fraction of cells that were trained on; below it cells may be equal by chance
_BLOCK = 1_024  # cells


def cell_hashes(rows: csr_matrix, vocabulary: Vocabulary) -> np.ndarray:
    """Return a hash of the genes in each token row (cells,) uint64, 0 for rows without any; phenotypes play no part."""
    words = mixed((rows.indices.astype(np.uint64) << np.uint64(32)) | rows.data.astype(np.uint64))
    words[~vocabulary.is_gene_token(rows.data)] = 0
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(words, dtype=np.uint64)])
    result = np.diff(sums[rows.indptr])  # sums and differences wrap around alike
    return np.where(result == 0, result, mixed(result))


def hash_blocks(tokens: Tokens, cells: np.ndarray) -> Iterator[np.ndarray]:
    """Go through the hashes of some cells, read block by block."""
    for start in range(0, len(cells), _BLOCK):
        yield cell_hashes(tokens.take(cells[start : start + _BLOCK]), tokens.vocabulary)


def remembered_cells(tokens: Tokens, cells: np.ndarray) -> str:
    """Return the smallest hashes of the training cells as text: a sample that depends on the cells alone."""
    kept = np.zeros(0, dtype=np.uint64)
    for hashes in hash_blocks(tokens, np.asarray(cells)):
        kept = np.unique(np.concatenate([kept, hashes[hashes > 0]]))[:N_KEPT]
    return base64.b64encode(kept.astype("<u8").tobytes()).decode()


def fraction_trained_on(remembered: object, hashes: np.ndarray) -> float:
    """Return the fraction of cells that are among the remembered ones, 0 where nothing can be said.

    All training cells with a hash up to the largest one kept are among those kept.
    """
    try:
        kept = np.frombuffer(base64.b64decode(str(remembered or ""), validate=True), dtype="<u8")
    except ValueError:  # a model that came from elsewhere may say anything
        return 0.0
    if len(kept) == N_KEPT:
        hashes = hashes[hashes <= kept.max()]
    return float(np.isin(hashes[hashes > 0], kept).sum() / max((hashes > 0).sum(), 1))


def warn_of_leakage(tokens: Tokens, name: str, test: np.ndarray, model: Model, *, split_known: bool) -> None:
    """Warn (L04) where a model has learned from the cells that it is scored on, whose labels it was told."""
    hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *hash_blocks(tokens, test)])
    finetuned = model.training.get("finetune") or {}
    tuned = fraction_trained_on(finetuned.get("cells"), hashes) if name in finetuned.get("targets", {}) else 0.0
    pretrained = fraction_trained_on(model.training.get("cells"), hashes)
    told = name in ["genes", *(phenotype.name for phenotype in tokens.vocabulary.phenotypes)]
    if tuned >= _LEAST or (pretrained >= _LEAST and told):
        what = f"the model was trained on {name!r} of about {max(tuned, pretrained):.0%} of the cells it is scored on"
        fix = "Score by the split it was trained with." if split_known else "Call scbin.tl.split before training."
        warn("L04", f"{what}, and may just remember it. {fix}")
