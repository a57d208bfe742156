"""Which cells a model learned from: what it keeps of them, and what is said where it is scored on the same."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np

from scbin import _keys
from scbin._anndata import read_tokens, warn
from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.model import Model
    from scbin.tl._compare import Truth
    from scbin.tl._folds import Folds

N_KEPT = 512  # hashes: of a tenth of a million cells that were learned from, about 50 are recognised by them
LEAST = 0.05  # share of cells that were learned from; below it they may be alike by chance
_SAME = 0.9  # share of labels that agree
_BLOCK = 500_000  # tokens


# ---- hashes ----------------------------------------------------------------------------------------------------------


def cell_hashes(tokens: csr_matrix, vocabulary: Vocabulary) -> np.ndarray:
    """Return a hash of the genes in each row (cells,) uint64, 0 for rows without; phenotypes play no part."""
    result = np.zeros(tokens.shape[0], dtype=np.uint64)
    indptr = np.asarray(tokens.indptr, dtype=np.int64)
    start = 0
    while start < len(result):
        stop = max(int(np.searchsorted(indptr, indptr[start] + _BLOCK, side="right")) - 1, start + 1)
        part = slice(indptr[start], indptr[stop])
        positions = tokens.indices[part].astype(np.uint64)
        words = _mixed((positions << np.uint64(32)) | tokens.data[part].astype(np.uint64))
        words[~vocabulary.is_gene_token(tokens.data[part])] = 0
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(words, dtype=np.uint64)])
        bounds = indptr[start : stop + 1] - indptr[start]
        result[start:stop] = np.diff(sums[bounds])  # sums and differences wrap around alike
        start = stop
    return np.where(result == 0, result, _mixed(result))


def _mixed(words: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64: every bit of a word moves every bit of the result."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def remembered_cells(tokens: csr_matrix, vocabulary: Vocabulary, rows: np.ndarray) -> str:
    """Return the smallest hashes of some rows as text: a sample that depends on the cells alone, known again by anyone."""
    hashes = np.unique(cell_hashes(tokens, vocabulary)[rows])
    return base64.b64encode(hashes[hashes > 0][:N_KEPT].astype("<u8").tobytes()).decode()


def share_seen(remembered: object, hashes: np.ndarray) -> float | None:
    """Return the share of cells that are among those remembered, None where nothing can be said of it.

    Of all cells with hashes up to the largest one kept, those that were learned from are among the kept.
    """
    try:
        kept = np.frombuffer(base64.b64decode(str(remembered or ""), validate=True), dtype="<u8")
    except ValueError:  # a model that came from elsewhere may say anything
        return None
    if not len(kept):
        return None
    asked = hashes[(hashes > 0) & ((hashes <= kept.max()) | (len(kept) < N_KEPT))]
    return float(np.isin(asked, kept).mean()) if len(asked) else None


# ---- what models say -------------------------------------------------------------------------------------------------


def learned_from(model: Model, target: str) -> dict[str, str]:
    """Return the cells that taught a model, as it remembers them: `"finetuning"` where its head answers, `"pretraining"`.

    An empty text stands for cells that a model of an earlier version does not remember.
    """
    cells = {}
    if "settings" in model.training:
        cells["pretraining"] = str(model.training.get("cells", ""))
    heads = () if model.head is None else model.head.targets
    if target in {each.name for each in heads}:
        finetuned = model.training.get("finetune", {})
        cells["finetuning"] = str(finetuned.get("cells", "")) if isinstance(finetuned, dict) else ""
    return cells


def warn_if_learned(
    adata: AnnData,
    target: str,
    truth: Truth,
    folds: Folds,
    learned: Mapping[str, str],
    *,
    own: bool,
    tokens_key: str | None,
) -> None:
    """Say so where a model may have learned the labels it is scored on.

    Parameters
    ----------
    adata, target, truth, folds
        What is scored, on which rows.
    learned
        The cells that taught the model, as it remembers them.
    own
        Whether the model is the one that was trained last on these cells.
    tokens_key
        The slot of `obsm` with the tokens.
    """
    found = _tokens_of(adata, folds.test, tokens_key)
    hashes = np.zeros(0, dtype=np.uint64) if found is None else cell_hashes(*found)
    tuned, shown = (share_seen(learned.get(what), hashes) for what in ("finetuning", "pretraining"))
    taught = (tuned if "finetuning" in learned else shown) or 0.0
    if folds.cut and (own or taught >= LEAST):
        warn(
            "E16",
            f"the model learned from these cells, and no split says which it did not see: its score says how well it remembers "
            f"{target!r}. Call scbin.tl.split before fine-tuning, or pass split_key=.",
        )
    elif tuned is not None and tuned >= LEAST:
        warn(
            "E16",
            f"the model learned {target!r} from about {tuned:.0%} of the cells it is scored on: its score says in part how well "
            "it remembers them. Score it by the split that it was fine-tuned with, or fine-tune it by this one.",
        )
    elif found is not None and _carried(*found, target, truth, folds.test):
        unknown = shown is None and "pretraining" in learned and _keys.PRETRAIN in adata.uns.get(_keys.UNS, {})
        if unknown or (shown is not None and shown >= LEAST):
            warn(
                "E17",
                f"the tokens of test cells carry their {target!r}, and a model was pretrained on these cells: it may have "
                "seen what it is tested on. Tokenize without that phenotype, or pretrain on training cells only.",
            )


def _tokens_of(adata: AnnData, rows: np.ndarray, key: str | None) -> tuple[csr_matrix, Vocabulary] | None:
    """Return the tokens of some cells and their vocabulary, None where there are none to be read."""
    try:
        tokens, vocabulary = read_tokens(adata, key=key)
    except ScbinInputError:
        return None
    return tokens[rows], vocabulary


def _carried(tokens: csr_matrix, vocabulary: Vocabulary, target: str, truth: Truth, test: np.ndarray) -> bool:
    """Whether the tokens of test cells say their truth: in the slot of that name, or of another with the same labels."""
    for phenotype in vocabulary.phenotypes:
        ids = tokens[:, [phenotype.position]].toarray().ravel().astype(np.int64)
        told = (ids >= phenotype.first_id) & (ids < phenotype.stop_id)
        if not told.any():
            continue
        if phenotype.name == target:
            return True
        if truth.kind == "class":
            labels = np.array(phenotype.values)[ids[told] - phenotype.first_id]
            if np.mean(labels == truth.of(test[told])) >= _SAME:
                return True
    return False
