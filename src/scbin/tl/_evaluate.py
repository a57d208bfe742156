"""`tl.evaluate`: how good predictions are, beside what simple methods reach on the same cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._anndata import check_adata, write_uns
from scbin._arguments import numbers, plain, shown, texts, whole_numbers
from scbin._errors import ScbinInputError, ScbinTypeError
from scbin.get._evaluate import evaluate_df
from scbin.get._predicted import read_predicted
from scbin.get._recorded import Recorded, kind_of, predicted_targets, recorded, truth_column, truth_name
from scbin.tl._baselines import CLASS_BASELINES, NUMBER_BASELINES
from scbin.tl._calibrate import judges_of
from scbin.tl._compare import baseline_answers, baseline_scores, lessons, read_truth
from scbin.tl._evaluate_genes import GENES, score_genes
from scbin.tl._folds import plan_folds
from scbin.tl._metrics import classification_scores, regression_scores
from scbin.tl._model import resolve_model
from scbin.tl._predict import Asked, write_answers
from scbin.tl._seen import learned_from, warn_if_learned

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

    from scbin.encoding.values import Values
    from scbin.get._predicted import Predicted
    from scbin.model import Model
    from scbin.nn.device import Precision
    from scbin.tl._compare import Lesson
    from scbin.tl._metrics import F1


def evaluate(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | None = None,
    truth_key: str | None = None,
    split_key: str | None = None,
    reference: AnnData | None = None,
    baselines: Sequence[str] | Literal["all", "none"] = "all",
    n_genes: int = 2000,
    layer: str | None = None,
    values: Values = "auto",
    f1: F1 = "macro",
    gene_mask_prob: float = 0.15,
    high_bin: int = 8,
    seed: int = 0,
    tokens_key: str | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    progress: bool = True,
) -> pd.DataFrame:
    """Score a model's predictions, with the simplest methods beside it on the same cells.

    A score by itself says little: cell types of blood are told apart at .9 by logistic regression alone. So each table has the
    rows to beat: for classes the majority class, logistic regression on log-normalised variable genes, and nearest neighbours
    among principal components; for numbers the mean, and ridge regressions on genes and on principal components; for hidden
    genes each gene's most frequent and mean bin.

    Parameters
    ----------
    adata
        Tokenized cells with the truth in `obs`.
    model
        A :class:`scbin.Model`, or the directory of one. Default: the predictions that :func:`scbin.tl.predict` left in `adata`,
        else the model trained on these cells.
    target
        What is predicted; `"genes"` for genes hidden from the model. Default: the model's only target.
    truth_key
        Column of `obs` with the truth. Default: `target`.
    split_key
        Column of `obs` that says which cells are `"train"`, `"validation"` and `"test"`; only the last are scored, the simple
        methods learn from the others. Default: `"scbin_split"`, which :func:`scbin.tl.finetune` writes. A column of donors or
        batches cross-validates the simple methods by them; with no split at all, they are cross-validated over cells.
    reference
        The cells that the model learned from, if it comes from another data set: the simple methods then learn from these,
        on the genes that both name. Their labels are in the column `target`, or `truth_key` where they have no such column.
    baselines
        Which simple methods to run, by name.
    n_genes
        Variable genes that the simple methods use, chosen on training cells; fewer where there are fewer.
    layer, values
        Where and as what they read expression, as in :func:`scbin.pp.tokenize`.
    f1
        `"macro"`: mean over classes; `"seed"`: harmonic mean of macro precision and macro recall, as PerturbGene reports it.
    gene_mask_prob
        Share of the genes to hide, for `target="genes"`.
    high_bin
        Bins above it count as high expression, for `target="genes"`.
    seed
        Of folds and masks.
    tokens_key, device, precision, token_budget, progress
        As in :func:`scbin.tl.predict`.

    Returns
    -------
    A table with one row per method, scbin first, and one column per score; :func:`scbin.get.evaluate_df` reads it again. Sets
    the following fields, and those of :func:`scbin.tl.predict` if a model is given:

    `adata.uns['scbin']['evaluate']`
        The scores of this and earlier targets, as a `DataFrame`.

    For classes, averages go over the classes that scored cells have: then balanced accuracy and macro recall are the same
    number. A cell without a prediction counts as wrong; of numbers such cells are left out for all methods. In a
    cross-validation, the area under the ROC curve goes over pairs of cells of the same fold. `calibration_error` compares the probability of the class given with how
    often it is right, in 15 bins :cite:p:`guo2017`.

    Raises
    ------
    ScbinInputError
        If there is no truth, nothing to compare, or several targets and none is named.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:200].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> table = scbin.tl.evaluate(adata, model, target="genes", progress=False)
    >>> list(table.index)
    ['scbin', 'most frequent bin', 'most frequent bin per gene', 'mean bin per gene']
    """
    check_adata(adata)
    if f1 not in ("macro", "seed"):
        raise ScbinInputError("E21", f"f1 is {f1!r}; choose 'macro' or 'seed'.")
    whole_numbers(n_genes=n_genes, high_bin=high_bin, seed=seed, token_budget=token_budget)
    numbers(gene_mask_prob=gene_mask_prob)
    texts(optional=True, target=target, truth_key=truth_key, split_key=split_key, layer=layer)
    n_genes, seed = plain(n_genes), plain(seed)
    if n_genes < 1 or not 0 <= seed < 2**32:
        name, value, least = ("n_genes", n_genes, "1") if n_genes < 1 else ("seed", seed, "0, and below 2**32")
        raise ScbinInputError("E43", f"{name} is {value}; it needs to be at least {least}.")
    network: dict[str, Any] = {
        "tokens_key": tokens_key,
        "device": device,
        "precision": precision,
        "token_budget": token_budget,
        "progress": progress,
    }
    if target == GENES:
        chosen = resolve_model(model, adata)
        scores, how = score_genes(
            adata, chosen, split_key, gene_mask_prob=gene_mask_prob, high_bin=high_bin, seed=seed, **network
        )
        return _write(adata, GENES, scores, how)
    asked = _what(adata, model, target)
    record = asked.record
    truth = read_truth(truth_column(adata, asked.target, record, truth_key), asked.target, asked.kind, record)
    labels = truth.values if truth.kind == "class" else None
    folds = plan_folds(adata, truth.rows, labels, split_key, seed=seed)
    pair = None
    warn_if_learned(
        adata, asked.target, truth, folds, asked.learned, own=_trained_last(adata, asked), tokens_key=tokens_key
    )
    if reference is not None:
        other_key = None if truth_name(check_adata(reference), asked.target, record) else truth_key
        known = truth_column(reference, asked.target, record, other_key)
        pair = (reference, read_truth(known, asked.target, asked.kind, record))
        folds = replace(folds, text=f"{len(folds.test):,} cells; reference: {len(pair[1].rows):,}")
    taught: list[Lesson] = []
    if methods := _chosen_baselines(baselines, truth.kind):
        taught = lessons(adata, truth, folds, reference=pair, n_genes=n_genes, layer=layer, values=values)
    answers = baseline_answers(taught, methods, truth.kind, seed=seed)
    if asked.model is not None:
        # where the cells were cut into folds, all of them are scored: then none may say how sure the model is to be
        judges = None if folds.cut else judges_of(adata, split_key, truth_key)
        question = Asked(asked.model, [asked.target], tokens_key=network.pop("tokens_key"))
        write_answers(adata, question, judges, **network)
    found = read_predicted(adata, asked.target, truth_key=truth_key, cells="all")
    scored = _scored_rows(found, folds.test)
    rows = folds.test if pair is not None else np.concatenate([test for _, test in folds.parts])
    scores = {"scbin": _score(found, scored, f1)}
    scores |= baseline_scores(taught, answers, truth.kind, np.isin(rows, scored), f1=f1)
    n_left = len(folds.test) - len(scored)
    left_out = f", {n_left:,} without a prediction left out" if n_left else ""
    return _write(adata, asked.target, scores, folds.text + left_out)


@dataclass(frozen=True, eq=False)
class _Asked:
    """Which target, of which model; `model` is None where predictions are there already."""

    target: str
    kind: Literal["class", "number"]
    model: Model | None
    record: Recorded  # what is known of the predictions, or will be once they are made
    learned: Mapping[str, str]  # the cells that taught the model


def _what(adata: AnnData, model: Model | str | os.PathLike[str] | None, target: str | None) -> _Asked:
    made = predicted_targets(adata)
    if model is None and (target in made or (target is None and len(made) == 1)):
        name = made[0] if target is None else target
        record = recorded(adata, name)
        return _Asked(name, kind_of(adata.obs[record.column], record), None, record, record.learned)
    chosen = resolve_model(model, adata)
    kinds = model_targets(chosen)
    if target is not None and target not in kinds:  # a phenotype, of a model that has a head for something else
        kinds |= {phenotype.name: "class" for phenotype in chosen.vocabulary.phenotypes if phenotype.values}
    if target is None and len(kinds) != 1:
        known = ", ".join(map(repr, kinds)) or "none"
        raise ScbinInputError("E22", f"name what to evaluate with target=; this model predicts: {known}; and 'genes'.")
    name = next(iter(kinds)) if target is None else target
    if name not in kinds:
        known = ", ".join(map(repr, kinds)) or "none"
        raise ScbinInputError(
            "E22",
            f"this model does not predict {name!r}. It predicts: {known}; and 'genes'. Fine-tune it: "
            f"scbin.tl.finetune(adata, model, target={name!r}).",
        )
    if kinds[name] == "gene":
        raise ScbinInputError(
            "E22", f"{name!r} is a class of genes: scbin.tl.predict writes it into adata.var, where it can be compared."
        )
    kind: Literal["class", "number"] = "number" if kinds[name] == "number" else "class"
    return _Asked(name, kind, chosen, _to_record(chosen, name), learned_from(chosen, name))


def _to_record(model: Model, name: str) -> Recorded:
    """Return what `tl.predict` will note of a target."""
    heads = () if model.head is None else model.head.targets
    if name in {target.name for target in heads}:
        return Recorded(f"scbin_{name}", name)
    phenotype = model.vocabulary.phenotype(name)
    return Recorded(f"scbin_{name}", name, "class", phenotype.values, age_groups=phenotype.age_groups)


def model_targets(model: Model) -> dict[str, str]:
    """Return what a model predicts for cells, by its head or else its vocabulary, and whether it is a class or a number."""
    phenotypes = {phenotype.name: "class" for phenotype in model.vocabulary.phenotypes if phenotype.values}
    if model.head is None:
        return phenotypes
    return {target.name: target.kind for target in model.head.targets}


def _chosen_baselines(baselines: Sequence[str] | str, kind: str) -> tuple[str, ...]:
    known = CLASS_BASELINES if kind == "class" else NUMBER_BASELINES
    if isinstance(baselines, str):
        if baselines in ("all", "none"):
            return known if baselines == "all" else ()
        baselines = [baselines]
    if not isinstance(baselines, Iterable) or not all(isinstance(name, str) for name in baselines):
        raise ScbinTypeError(
            "E44", f"baselines is {shown(baselines)}; pass 'all', 'none', or names among: {', '.join(known)}."
        )
    for name in baselines:
        if name not in known:
            raise ScbinInputError("E19", f"{name!r} is not a baseline here. There are: {', '.join(known)}.")
    return tuple(baselines)


def _trained_last(adata: AnnData, asked: _Asked) -> bool:
    """Whether the model, or the one that predictions came from, is the last that was trained on these cells."""
    trained = adata.uns.get(_keys.UNS, {}).get(_keys.MODEL_ID)
    asked_of = asked.record.model if asked.model is None else asked.model.fingerprint
    return bool(trained is not None and trained == asked_of)


def _scored_rows(found: Predicted, test: np.ndarray) -> np.ndarray:
    """Return the test cells that all methods are scored on: for numbers those that scbin can say something about."""
    if found.kind == "class":
        return test
    answered = np.intersect1d(test, found.cells[np.isfinite(found.predicted)])
    return answered if len(answered) else test


def _score(found: Predicted, test: np.ndarray, f1: F1) -> dict[str, float]:
    """Score predictions on the test cells; those without a prediction count too."""
    here = np.isin(found.cells, test)
    if found.kind == "number":
        return regression_scores(found.truth[here], found.predicted[here])
    probability = None if found.probability is None else found.probability[here]
    return classification_scores(found.truth[here], found.predicted[here], probability, f1=f1)


def _write(adata: AnnData, target: str, scores: Mapping[str, Mapping[str, float]], how: str) -> pd.DataFrame:
    """Put the scores beside those of other targets, and return the table."""
    table = pd.DataFrame.from_dict(dict(scores), orient="index").rename_axis("method").reset_index()
    table.insert(0, "target", target)
    table["scored_on"] = how
    before = adata.uns.get(_keys.UNS, {}).get(_keys.EVALUATE)
    if before is not None:
        kept = pd.DataFrame(before)
        kept = kept[kept["target"] != target]
        table = pd.concat([kept, table], ignore_index=True) if len(kept) else table
    write_uns(adata, _keys.EVALUATE, table.reset_index(drop=True))
    return evaluate_df(adata, target)
