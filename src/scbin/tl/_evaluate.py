"""`tl.evaluate`: how good predictions are, beside what simple methods reach on the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, read_tokens, warn, write_uns
from scbin._arguments import checked, shown
from scbin._errors import ScbinInputError, ScbinTypeError
from scbin.get.predictions import (
    Record,
    evaluate_df,
    predicted_targets,
    read_predicted,
    recorded,
    true_values,
    truth_column,
)
from scbin.model import resolve_model
from scbin.tl._labels import MaskedPhenotypes, folds_of, known_split, read_donors, split_and_donors
from scbin.tl._leakage import LEAST, fraction_trained_on, hashes_of, remembered_cells, warn_of_leakage
from scbin.tl._masked_genes import GENES, score_masked_genes
from scbin.tl._metrics import class_scores, number_scores
from scbin.tl._predict import predictable, predictions, record_of, write_predictions
from scbin.tl._probe import CLASS_BASELINES, NUMBER_BASELINES, baseline_predictions, log_expression
from scbin.train.loop import split_cells
from scbin.train.settings import Training

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from anndata import AnnData

    from scbin.get.predictions import Column, Predicted
    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.tokens.tokens import Tokens

N_FOLDS = 5


@_docs.shared
@checked
def evaluate(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | None = None,
    truth_key: str | None = None,
    split_key: str | None = None,
    baselines: Sequence[str] | Literal["all", "none"] = "all",
    gene_mask: float = 0.15,
    tokens_key: str | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Score a model's predictions, with simple methods beside it on the same cells.

    A score by itself says little: logistic regression alone tells cell types of blood apart in nine cells of ten. So each table has
    the rows to beat. For classes: the majority class, balanced logistic regression on log expression (C by cross-validation), and
    nearest neighbours among principal components. For numbers: the mean, and ridge regressions on genes and on principal
    components. For masked genes: the most frequent bin of the gene, and negative binomials of gene x depth and of gene x depth x
    PCA scores. They read the same tokens as the model.

    Parameters
    ----------
    adata
        Tokenized cells with the truth in `obs`.
    model
        A :class:`scbin.Model`, or the path of one. Default: the predictions that :func:`scbin.tl.predict` left in `adata`,
        else the model trained on these cells.
    target
        What is predicted; `"genes"` for masked prediction of genes. Default: the model's only target.
    truth_key
        Column of `obs` with the truth. Default: `target`.
    split_key
        Column of `obs` that says which cells are `"train"`, `"validation"` and `"test"`; only the last are scored, the simple
        methods learn from the others. Default: `"scbin_split"`. A column of donors or batches cross-validates the simple methods
        by them; with no split at all, they are cross-validated over cells.
    baselines
        Which simple methods to run, by name.
    gene_mask
        Fraction of the genes to mask, for `target="genes"`.
    {tokens_key}
    {device}
    {precision}
    {token_budget}
    {seed}
    {progress}

    Returns
    -------
    A table with one row per method, scbin first, and one column per score; :func:`scbin.get.evaluate_df` reads it again. Sets
    the following fields, and those of :func:`scbin.tl.predict` if a model is given:

    `adata.uns["scbin"]["evaluate"]`
        The scores of this and earlier targets, as a `DataFrame`.

    For classes, means are over the classes that scored cells have: macro recall is then the balanced accuracy. A cell without a
    prediction counts as wrong; of numbers such cells are left out for all methods. In a cross-validation, pairs of cells for the
    ROC AUC are of the same fold. `calibration_error` compares the probability of the predicted class with how often it is right,
    in 15 bins :cite:p:`guo2017`.

    Raises
    ------
    ScbinInputError
        If there is no truth, nothing to compare, or several targets and none is named.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:300].copy()
    >>> scbin.pp.tokenize(adata)
    >>> scbin.tl.split(adata, target="louvain")
    >>> model = scbin.tl.finetune(adata, "new", target="louvain", max_steps=0, progress=False)
    >>> table = scbin.tl.evaluate(adata, model, progress=False)
    >>> list(table.index)
    ['scbin', 'majority class', 'logistic regression', 'PCA + kNN']
    """
    check_adata(adata)
    if not 0 <= seed < 2**32 or token_budget < 1 or not 0 < gene_mask < 1:
        found = f"seed={seed}, token_budget={token_budget}, gene_mask={gene_mask}"
        raise ScbinInputError("A02", f"{found}: they need to be in [0, 2**32), at least 1, and in (0, 1).")
    options: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "token_budget": token_budget,
        "progress": progress,
    }
    if target == GENES:
        chosen = resolve_model(model, adata)
        masked = MaskedPhenotypes(read_tokens(adata, chosen.vocabulary, tokens_key))
        train, test, how = _cells_for_genes(adata, chosen, masked, split_key, seed)
        scores = score_masked_genes(chosen, masked, train, test, fraction=gene_mask, seed=seed, **options)
        return _write(adata, GENES, scores, how)

    name, asked, record = _asked(adata, model, target)
    kind: Any = record.kind
    column = truth_column(adata, name, record, truth_key)
    truth = true_values(column, name, kind, record.classes, record.age_groups)
    if truth.known.sum() < 2:
        raise ScbinInputError("L01", f"fewer than two cells have a known {name!r}: there is nothing to compare.")
    folds = plan_folds(adata, truth, split_key, seed=seed)
    methods = _methods(baselines, kind)
    has_tokens = methods or asked is not None or _keys.TOKENS in adata.obsm or tokens_key is not None
    vocabulary = None if asked is None else asked.vocabulary
    tokens = read_tokens(adata, vocabulary, tokens_key) if has_tokens else None
    last, own = adata.uns.get(_keys.UNS, {}).get(_keys.MODEL_ID), record.model if asked is None else asked.fingerprint
    is_own = last is not None and last == own
    warn_of_leakage(tokens, truth, folds.rows, record.cells, split_known=not folds.cut, own=is_own)
    if asked is not None and tokens is not None:
        # where the cells were cut into folds all of them are scored: then none may calibrate
        options |= {"split_key": split_key, "truth_key": truth_key, "calibrate": not folds.cut}
        write_predictions(adata, asked, predictions(adata, asked, tokens, [name], **options), {name: record.column})

    made = read_predicted(adata, name, truth_key=truth_key, cells="all")
    answers = _baselines(tokens, truth, folds, methods, seed)
    return _write(adata, name, *_scored(made, truth, folds, answers))


def _scored(
    made: Predicted, truth: Column, folds: Folds, answers: dict[str, np.ndarray]
) -> tuple[dict[str, dict[str, float]], str]:
    """Return the scores of the model and of simple methods on the rows of the folds, and what was scored in words."""
    rows, at = folds.rows, np.searchsorted(made.cells, folds.rows)
    if truth.kind == "class":
        probability = None if made.probability is None else made.probability[at]
        scores = {"scbin": class_scores(made.truth[at], made.predicted[at], probability)}
        for method, values in answers.items():
            scores[method] = class_scores(truth.codes(rows), values.argmax(axis=1), values, folds.fold)
        return scores, folds.text
    kept = np.isfinite(made.predicted[at])
    kept = kept if kept.any() else ~kept
    left = f", {int((~kept).sum()):,} without a prediction left out" if not kept.all() else ""
    found = {"scbin": made.predicted[at]} | answers
    true, fold = truth.values[rows][kept], folds.fold[kept]
    return {method: number_scores(true, values[kept], fold) for method, values in found.items()}, folds.text + left


# ---- what is compared -----------------------------------------------------------------------------------------------


def _asked(
    adata: AnnData, model: Model | str | os.PathLike[str] | None, target: str | None
) -> tuple[str, Model | None, Record]:
    """Return which target of which model is scored, and what its predictions are; no model where they are there already."""
    made = predicted_targets(adata)
    if model is None and (target in made or (target is None and len(made) == 1)):
        name = made[0] if target is None else target
        return name, None, recorded(adata, name)
    chosen = resolve_model(model, adata)
    names = predictable(target, chosen)
    if len(names) != 1:
        known = ", ".join(map(repr, names))
        raise ScbinInputError("A02", f"name what to evaluate with target=; this model predicts: {known}; and 'genes'.")
    record = record_of(chosen, names[0])
    if record.kind == "gene":
        raise ScbinInputError(
            "A03",
            f"{names[0]!r} is a class of genes: scbin.tl.predict writes it into adata.var, where it can be compared.",
        )
    return names[0], chosen, record


@dataclass(frozen=True, eq=False)
class Folds:
    """Pairs of training and test rows; every test row is in one pair."""

    parts: list[tuple[np.ndarray, np.ndarray]]
    text: str
    donors: np.ndarray | None = None  # (cells,)
    cut: bool = False  # whether no split was known and the cells were cut into folds here

    @property
    def rows(self) -> np.ndarray:
        """All rows that are scored, fold by fold."""
        return np.concatenate([test for _, test in self.parts])

    @property
    def fold(self) -> np.ndarray:
        """The fold of each of these rows."""
        return np.repeat(np.arange(len(self.parts)), [len(test) for _, test in self.parts])


def plan_folds(data: AnnData | Tokens, truth: Column, split_key: str | None, *, seed: int = 0) -> Folds:
    """Take the split that is known, else cut the cells whose truth is known into folds, by donor where `split_key` names them.

    Simple methods have nothing to choose by validation cells, so these are training cells for them.
    """
    usable, donors, split = np.flatnonzero(truth.known), None, known_split(data, split_key)
    if split is not None:
        train, test = usable[split.open[usable]], usable[split.test[usable]]
        if not len(train) or not len(test):
            raise ScbinInputError(
                "L03",
                f"of {len(usable):,} cells with a known truth, {len(train):,} are to train on and {len(test):,} to test on.",
            )
        return Folds([(train, test)], f"{len(test):,} test cells", split_and_donors(data, split_key)[1])
    if split_key is not None:
        donors = read_donors(data, split_key)
        usable = usable[[not name.startswith("\0") for name in donors[usable]]]
    n = len(usable) if donors is None else len(set(donors[usable]))
    if n < 2:
        raise ScbinInputError(
            "L03", "there is one donor or cell only, so nothing is left to test on. Name another split_key."
        )
    fold = folds_of(truth.codes(usable), N_FOLDS, donors=None if donors is None else donors[usable], seed=seed)
    parts = [(usable[fold != number], usable[fold == number]) for number in np.unique(fold)]
    by = f" by {split_key}" if split_key else ""
    return Folds(parts, f"{len(usable):,} cells, {len(parts)} folds{by}", donors, cut=True)


def _methods(baselines: object, kind: str) -> tuple[str, ...]:
    known = CLASS_BASELINES if kind == "class" else NUMBER_BASELINES
    if baselines in ("all", "none"):
        return known if baselines == "all" else ()
    names = [baselines] if isinstance(baselines, str) else baselines
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ScbinTypeError(
            "A01", f"baselines is {shown(baselines)}; pass 'all', 'none', or names among: {', '.join(known)}."
        )
    for name in names:
        if name not in known:
            raise ScbinInputError("A02", f"{name!r} is not a baseline here. There are: {', '.join(known)}.")
    return tuple(names)


def _baselines(
    tokens: Tokens | None, truth: Column, folds: Folds, methods: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    """Return what each method predicts for the rows of the folds."""
    if tokens is None or not methods:
        return {}
    answers: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    for train, test in folds.parts:
        before, after = log_expression(tokens, train), log_expression(tokens, test)
        donors = None if folds.donors is None else folds.donors[train]
        for method, parts in answers.items():
            parts.append(baseline_predictions(method, before, truth, train, after, donors=donors, seed=seed))
    return {method: np.concatenate(parts) for method, parts in answers.items()}


def _cells_for_genes(
    adata: AnnData, model: Model, tokens: Tokens, split_key: str | None, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Return cells for the simple models to learn from and cells to mask genes of: test cells, or those held out of pretraining."""
    filled = np.flatnonzero(tokens.lengths)
    if len(filled) < 2:
        raise ScbinInputError("L01", "fewer than two cells have tokens. See obs['scbin_status'].")

    def learned(cells: np.ndarray) -> float | None:  # fraction that the network was pretrained on, None where not known
        steps = model.training.get("steps")
        return fraction_trained_on(model.training.get("cells"), hashes_of(tokens, cells)) if steps else 0.0

    train, test = _held_out_of_pretraining(tokens, model)
    split, how = known_split(adata, split_key), "cells held out of pretraining"
    if split is not None and split.test[filled].any():
        known, own = filled[split.open[filled]], filled[split.test[filled]]
        if split_key is not None or not len(test) or (learned(own) or 0.0) < LEAST:
            train, test, how = known, own, "test cells"
    if not len(test):
        fold = folds_of(np.zeros(len(filled)), 3, seed=seed)
        train, test, how = filled[fold != 0], filled[fold == 0], "cells drawn at random"
    if not len(train):
        raise ScbinInputError("L03", "the split leaves no cell to train the simple models on.")
    fraction = learned(test)
    if fraction is None and adata.uns.get(_keys.UNS, {}).get(_keys.MODEL_ID) == model.fingerprint:
        fraction = 1.0
    if fraction is not None and fraction >= LEAST:
        warn(
            "L04",
            f"the model was trained on about {fraction:.0%} of the cells whose genes are masked. Pretrain on the training cells "
            "of a split, or leave split_key out where pretraining held cells out.",
        )
    return train, test, f"{len(test):,} {how}"


def _held_out_of_pretraining(tokens: Tokens, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells that pretraining trained on and held out, if these are the cells it was given; else none."""
    stored, none = model.training.get("training"), np.zeros(0, dtype=np.int64)
    if not isinstance(stored, dict) or not model.training.get("cells"):
        return none, none
    chosen = Training(**{name: stored[name] for name in ("held_out", "most_held_out") if name in stored})
    train, test = split_cells(tokens, chosen, int(model.training.get("seed") or 0))
    return (train, test) if remembered_cells(tokens, train) == model.training["cells"] else (none, none)


def _write(adata: AnnData, target: str, scores: Mapping[str, Mapping[str, float]], how: str) -> pd.DataFrame:
    """Put the scores beside those of other targets, and return the table."""
    table = pd.DataFrame.from_dict(dict(scores), orient="index").rename_axis("method").reset_index()
    table = table.assign(target=target, scored_on=how)
    before = adata.uns.get(_keys.UNS, {}).get(_keys.EVALUATE)
    others = (
        []
        if before is None
        else [frame for name, frame in pd.DataFrame(before).groupby("target", sort=False) if name != target]
    )
    write_uns(adata, _keys.EVALUATE, pd.concat([*others, table], ignore_index=True))
    return evaluate_df(adata, target)
