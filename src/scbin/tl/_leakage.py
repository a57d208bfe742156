"""Leakage check: which cells a model was trained on, and a warning where it is scored on the same ones."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np

from scbin._adata import warn
from scbin.train.randomness import mixed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scipy.sparse import csr_matrix

    from scbin.get.predictions import Column
    from scbin.model import Model
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

N_KEPT = 512  # hashes: of a tenth of a million training cells, about 50 are recognised by them
LEAST = 0.05  # fraction of cells that were trained on; below it cells may be equal by chance
_SAME_LABELS = 0.9
_BLOCK = 8_192  # cells


def cell_hashes(rows: csr_matrix, vocabulary: Vocabulary) -> np.ndarray:
    """Return a hash of the genes in each token row (cells,) uint64, 0 for rows without any; phenotypes play no part."""
    words = mixed((rows.indices.astype(np.uint64) << np.uint64(32)) | rows.data.astype(np.uint64))
    words[~vocabulary.is_gene_token(rows.data)] = 0
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(words, dtype=np.uint64)])
    result = np.diff(sums[rows.indptr])  # sums and differences wrap around alike
    return np.where(result == 0, result, mixed(result))


def hashes_of(tokens: Tokens, cells: np.ndarray) -> np.ndarray:
    """Return the hashes of some cells (cells,), read block by block."""
    blocks = [cells[start : start + _BLOCK] for start in range(0, len(cells), _BLOCK)]
    parts = [cell_hashes(tokens.take(block), tokens.vocabulary) for block in blocks]
    return np.concatenate([np.zeros(0, dtype=np.uint64), *parts])


def remembered_cells(tokens: Tokens, cells: np.ndarray) -> str:
    """Return the smallest hashes of the training cells as text: a sample that depends on the cells alone."""
    hashes = np.unique(hashes_of(tokens, np.asarray(cells)))
    return base64.b64encode(hashes[hashes > 0][:N_KEPT].astype("<u8").tobytes()).decode()


def fraction_trained_on(remembered: object, hashes: np.ndarray) -> float | None:
    """Return the fraction of cells that are among the remembered ones, None where nothing can be said.

    All training cells with a hash up to the largest one kept are among those kept.
    """
    try:
        kept = np.frombuffer(base64.b64decode(str(remembered or ""), validate=True), dtype="<u8")
    except ValueError:  # a model that came from elsewhere may say anything
        return None
    if not len(kept):
        return None
    asked = hashes[(hashes > 0) & ((hashes <= kept.max()) | (len(kept) < N_KEPT))]
    return float(np.isin(asked, kept).mean()) if len(asked) else None


def training_cells(model: Model, target: str) -> dict[str, str]:
    """Return the cells that taught a model, as it remembers them: in `"pretraining"`, and in `"finetuning"` for its targets."""
    finetuned = model.training.get("finetune") or {}
    cells = {"pretraining": str(model.training.get("cells") or "")}
    return cells | ({"finetuning": str(finetuned.get("cells") or "")} if target in finetuned.get("targets", {}) else {})


def warn_of_leakage(
    tokens: Tokens, column: Column, test: np.ndarray, cells: Mapping[str, str], *, split_known: bool, own: bool
) -> None:
    """Warn (L04) where a model has learned from the cells that it is scored on.

    `own` says that the model is the last that was trained on these cells; `split_known`, that test cells were named.
    """
    hashes, name = hashes_of(tokens, test), column.name
    tuned, pretrained = (fraction_trained_on(cells.get(what), hashes) or 0.0 for what in ("finetuning", "pretraining"))
    if not split_known and (own or (tuned if "finetuning" in cells else pretrained) >= LEAST):
        found = "the model was trained on these cells, and no split says which ones it has not seen"
        warn(
            "L04",
            f"{found}: it may just remember {name!r}. Call scbin.tl.split before fine-tuning, or pass split_key=.",
        )
    elif tuned >= LEAST:
        found = f"the model learned {name!r} from about {tuned:.0%} of the cells it is scored on"
        warn("L04", f"{found}. Score it by the split that it was fine-tuned with, or fine-tune it with this one.")
    elif pretrained >= LEAST and _label_in_tokens(tokens, column, test[:_BLOCK]):
        found = f"the tokens of the test cells hold their {name!r}, and the model was pretrained on these cells"
        warn("L04", f"{found}. Tokenize without that phenotype, or pretrain on training cells only.")


def _label_in_tokens(tokens: Tokens, column: Column, cells: np.ndarray) -> bool:
    """Whether the tokens of cells hold their label: as the phenotype of that name, or as another with the same values."""
    rows, labels = tokens.take(cells), np.array([*column.classes, ""])
    for phenotype in tokens.vocabulary.phenotypes:
        ids = rows[:, [phenotype.position]].toarray().ravel().astype(np.int64)
        told = (ids >= phenotype.first_id) & (ids < phenotype.stop_id)
        true = labels[column.codes(cells[told])] if column.classes else ""
        same = np.array(phenotype.values, dtype=object)[ids[told] - phenotype.first_id] == true
        if told.any() and (phenotype.name == column.name or np.mean(same) >= _SAME_LABELS):
            return True
    return False
