"""How well genes hidden from a model are recovered, beside what their frequencies say."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from scbin import _keys
from scbin._anndata import read_tokens, warn
from scbin._errors import ScbinInputError
from scbin.data.masking import MaskingScheme
from scbin.nn.embedding import hide_phenotypes
from scbin.nn.recovery import hide_genes, recover_genes
from scbin.tl._baselines import BinCounts, GeneBaseline, RankBaseline, RankCounts
from scbin.tl._folds import Folds, plan_folds
from scbin.tl._metrics import masked_gene_scores, ranked_gene_scores
from scbin.tl._seen import LEAST, cell_hashes, remembered_cells, share_seen
from scbin.train.settings import TrainSettings
from scbin.train.setup import split

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from scbin.encoding.vocabulary import Vocabulary
    from scbin.model import Model
    from scbin.nn.recovery import Recovered

GENES = "genes"
N_DRAWS = 5


def score_genes(
    adata: AnnData,
    model: Model,
    split_key: str | None,
    *,
    gene_mask_prob: float,
    high_bin: int,
    seed: int,
    tokens_key: str | None,
    **network: Any,
) -> tuple[dict[str, dict[str, float]], str]:
    """Hide genes of test cells and score what the model and the baselines put there; return the scores and on what.

    All hidden genes are `[MASK]`, phenotypes are hidden too, and the masks depend on the seed and the tokens of a cell alone.
    """
    tokens, vocabulary = read_tokens(adata, model.vocabulary, key=tokens_key)
    tokens = hide_phenotypes(tokens, vocabulary)
    scheme = evaluation_scheme(model, gene_mask_prob)
    folds, learned = _folds(adata, tokens, vocabulary, model, split_key, seed)
    if learned >= LEAST:
        warn(
            "E42",
            f"the model learned from about {learned:.0%} of the cells whose genes are hidden: its score says in part how well it "
            "remembers them. Pretrain on the training cells of a split, adata[adata.obs['scbin_split'] != 'test'].copy(), or "
            "leave split_key out where pretraining held cells out.",
        )
    test = folds.test
    seen = _seen_positions(tokens, vocabulary, folds)
    found = recover_genes(model.bert, tokens[test], vocabulary, scheme, seed=seed, zero_positions=seen, **network)
    if not len(found.predicted):
        raise ScbinInputError("E24", "no gene of a test cell was hidden; take more cells or a larger gene_mask_prob.")
    score = _score_ranks if vocabulary.encoding == "rank" else _score_bins
    return score(tokens, vocabulary, folds, scheme, found, seen, seed, high_bin), folds.text


def evaluation_scheme(model: Model, gene_mask_prob: float) -> MaskingScheme:
    """Return how the model was masked in training, with every hidden gene as `[MASK]` and phenotypes left alone."""
    kept = {"zero_targets", "zero_swap_pool", "nonzero_ratio", "attend_zeros"}
    stored = model.training.get("recipe", {})
    stored = stored.get("masking", {}) if isinstance(stored, dict) else {}
    names = {field.name for field in fields(MaskingScheme)} & kept
    own = MaskingScheme(**{name: value for name, value in dict(stored or {}).items() if name in names})
    return replace(own, gene_mask_prob=gene_mask_prob, phenotype_mask_prob=0.0, replacement=(1.0, 0.0, 0.0))


def _folds(
    adata: AnnData, tokens: csr_matrix, vocabulary: Vocabulary, model: Model, split_key: str | None, seed: int
) -> tuple[Folds, float]:
    """Take the split that was asked for; else one in `obs` whose test cells pretraining did not see, or the cells it held out.

    Beside it stands which share of the test cells the model learned from after all.
    """
    filled = np.flatnonzero(np.diff(tokens.indptr))
    if len(filled) < 2:
        raise ScbinInputError("E36", "fewer than two cells have tokens. See obs['scbin_status'].")
    folds = plan_folds(adata, filled, None, split_key, seed=seed)
    last = adata.uns.get(_keys.UNS, {}).get(_keys.MODEL_ID) == model.fingerprint
    seen = _share_learned(tokens[folds.test], vocabulary, model, last=last)
    if split_key is None and (folds.cut or seen >= LEAST):
        own = _held_out(tokens, vocabulary, model, last=last)
        if own is not None:
            return own, 0.0
    return folds, seen


def _share_learned(tokens: csr_matrix, vocabulary: Vocabulary, model: Model, *, last: bool) -> float:
    """Return which share of some cells the network learned from: where it cannot tell, all if it was trained last on them."""
    if "settings" not in model.training:  # it was not pretrained here, or not at all
        return 0.0
    known = share_seen(model.training.get("cells"), cell_hashes(tokens, vocabulary))
    return float(last) if known is None else known


def _held_out(tokens: csr_matrix, vocabulary: Vocabulary, model: Model, *, last: bool) -> Folds | None:
    """Return the cells that pretraining held out, if these are the cells it was given."""
    stored, cells = model.training.get("settings"), model.training.get("cells")
    if not isinstance(stored, dict):
        return None
    chosen = {name: stored[name] for name in ("seed", "validation_share", "validation_most") if name in stored}
    train, held_out = split(tokens, None, TrainSettings(**chosen))
    same = last if cells is None else cells == remembered_cells(tokens, vocabulary, train)
    if not same or not len(held_out):
        return None
    return Folds(((train, held_out),), f"{len(held_out):,} cells held out of pretraining")


def _seen_positions(tokens: csr_matrix, vocabulary: Vocabulary, folds: Folds) -> np.ndarray:
    """Positions of genes that some training cell expresses: as in training, no other is asked for as unexpressed."""
    genes = vocabulary.gene_positions
    if vocabulary.bins is None or vocabulary.bins.zeros == "keep":
        return genes
    seen = np.zeros(vocabulary.n_positions, dtype=bool)
    for train, _ in folds.parts:
        seen[tokens[train].indices] = True
    return genes[seen[genes]] if seen[genes].any() else genes


def _score_bins(
    tokens: csr_matrix,
    vocabulary: Vocabulary,
    folds: Folds,
    scheme: MaskingScheme,
    found: Recovered,
    seen: np.ndarray,
    seed: int,
    high_bin: int,
) -> dict[str, dict[str, float]]:
    scores = {
        "scbin": masked_gene_scores(found.hidden.truth, found.predicted, found.log_probability, high_bin=high_bin)
    }
    counts = [BinCounts(len(vocabulary.genes), vocabulary.n_levels) for _ in folds.parts]
    for (train, _), count in zip(folds.parts, counts, strict=True):
        for draw in range(N_DRAWS):
            drawn = hide_genes(tokens[train], vocabulary, scheme, seed=seed, epoch=draw, zero_positions=seen)
            for _, _, hidden in drawn:
                count.add(hidden.place, hidden.truth)
    fold = _fold_of(folds)[found.hidden.cell]
    for method in get_args(GeneBaseline):
        predicted = np.empty(len(fold), dtype=np.int64)
        log_probability = np.full(len(fold), np.nan)
        for number, count in enumerate(counts):
            mine = fold == number
            given, logs = count.answers(method, found.hidden.place[mine], found.hidden.truth[mine])
            predicted[mine] = given
            log_probability[mine] = np.nan if logs is None else logs
        scores[method] = masked_gene_scores(found.hidden.truth, predicted, log_probability, high_bin=high_bin)
    return scores


def _score_ranks(
    tokens: csr_matrix,
    vocabulary: Vocabulary,
    folds: Folds,
    scheme: MaskingScheme,
    found: Recovered,
    seen: np.ndarray,
    seed: int,
    high_bin: int,
) -> dict[str, dict[str, float]]:
    del scheme, seen, seed, high_bin
    hidden = found.hidden
    scores = {"scbin": ranked_gene_scores(hidden.truth, found.predicted, found.log_probability)}
    fold = _fold_of(folds)[hidden.cell]
    for method in get_args(RankBaseline):
        predicted = np.empty(len(fold), dtype=np.int64)
        for number, (train, _) in enumerate(folds.parts):
            part = tokens[train]
            genes = vocabulary.is_gene_token(part.data)
            gene = part.data[genes].astype(np.int64) - vocabulary.first_gene_id
            rank = part.indices[genes].astype(np.int64) - vocabulary.first_gene_position
            count = RankCounts(len(vocabulary.genes), vocabulary.n_positions).fit(gene, rank)
            mine = fold == number
            predicted[mine] = count.answers(method, hidden.place[mine])
        scores[method] = ranked_gene_scores(hidden.truth, predicted)
    return scores


def _fold_of(folds: Folds) -> np.ndarray:
    """Number of the fold that asks about each test cell, in the order of `folds.test`."""
    rows = np.concatenate([test for _, test in folds.parts])
    number = np.repeat(np.arange(len(folds.parts)), [len(test) for _, test in folds.parts])
    return number[np.argsort(rows, kind="stable")]
