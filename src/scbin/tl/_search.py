"""`tl.search`: which settings of fine-tuning do best on cells that were held out."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from scbin import _keys
from scbin._anndata import check_adata, write_uns
from scbin._arguments import choices, numbers, paths, plain, texts, whole_numbers
from scbin._errors import ScbinInputError, ScbinTrainingError
from scbin.nn.presets import PRESETS
from scbin.tl._finetune import finetune
from scbin.tl._finetune_plan import NEW, kinds_of
from scbin.tl._model import resolve_model
from scbin.tl._search_space import check_space, default_space, plain_space
from scbin.tl._search_trials import (
    arguments_of,
    identity_of,
    import_optuna,
    light_copy,
    open_study,
    quiet,
    run_trial,
    sides_of_search,
    table_of,
)
from scbin.tl._targets import target_weights

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData

    from scbin.model import Model
    from scbin.tl._search_trials import Metric

_OWN = {
    "adata",
    "model",
    "target",
    "split_key",
    "save_dir",
    "checkpoint_every",
    "resume",
    "tensorboard",
    "wandb",
    "level",
}
_OWN |= {"gene_key", "validation_share"}
_KINDS = {"class": "classes", "number": "numbers"}


class Search(NamedTuple):
    """What a search found.

    Parameters
    ----------
    trials
        One row per trial: its score, state, seconds and settings.
    best
        The settings of the best one, as arguments of :func:`scbin.tl.finetune`.
    """

    trials: pd.DataFrame
    best: dict[str, Any]


def search(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | Sequence[str] | Mapping[str, float],
    n_trials: int = 20,
    space: Mapping[str, Any] | None = None,
    metric: Metric | None = None,
    split_key: str | None = None,
    validation_share: float = 0.15,
    prune: bool = True,
    storage: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    **fixed: Any,
) -> Search:
    """Try settings of :func:`scbin.tl.finetune` and return the best, as ranked on cells that no trial learned from.

    Each trial fine-tunes with settings drawn by Optuna's TPE sampler and is scored on the same held-out cells, which are neither
    trained on nor used to stop early. A trial whose validation loss lags behind the median of the others is given up. Test cells
    play no part: score the model that the best settings give on them, with :func:`scbin.tl.evaluate`, because the best of many
    scores is too good to be true.

    Parameters
    ----------
    adata
        Tokenized cells with the target in `obs`.
    model
        As for :func:`scbin.tl.finetune`.
    target
        Column of `obs`, or several.
    n_trials
        Number of trials in all, those in the storage included.
    space
        What to try: `{argument of finetune: choices}`, where choices are `(low, high)` (whole numbers if both are),
        `(low, high, "log")`, or a list of values; `"task_weight"` stands for the weight of each target. Default: Geneformer's
        space for one target (learning rate, weight decay, schedule, warm-up, seed; one epoch), or for several (learning rate,
        warm-up, weight decay, dropout, weights, frozen layers).
    metric
        `"macro_f1"` or `"r2"`, to be large, or `"loss"`, to be small, over the targets. Default: macro-F1 for one class target,
        R2 for one number, else the loss.
    split_key
        As for :func:`scbin.tl.finetune`: donors or batches that are not to stand on two sides, or a column of sides. Where sides
        are known, trials are scored on the validation cells. It comes back in `best`.
    validation_share
        Share of the cells to score on, and of the others to stop early by.
    prune
        Give up trials that lag behind after an epoch.
    storage
        File in which the trials are kept (SQLite). Called again with the same file, the search goes on where it stopped.
    seed
        Of the split and of what is tried: trial by trial, so that a search that was interrupted tries the same as one that was
        not.
    progress
        Show a progress bar over the trials.
    **fixed
        Other arguments of :func:`scbin.tl.finetune`, the same for all trials.

    Returns
    -------
    A tuple of `trials`, a table with one row per trial, best first, and `best`, settings for `scbin.tl.finetune(adata, model,
    **best)`. Sets the following field:

    `adata.uns['scbin']['search']`
        The table.

    Raises
    ------
    ScbinInputError
        If Optuna is missing, the space names no argument of `finetune`, or the storage holds another search.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:200].copy()
    >>> scbin.pp.tokenize(adata)
    >>> space = {"rebalance": (0.0, 1.0)}
    >>> found = scbin.tl.search(
    ...     adata, "new", target="bulk_labels", n_trials=2, space=space, max_steps=0, fewest=10, progress=False
    ... )
    >>> sorted(found.best)
    ['fewest', 'max_steps', 'rebalance', 'target']
    """
    optuna = import_optuna()
    check_adata(adata)
    whole_numbers(n_trials=n_trials, seed=seed)
    numbers(validation_share=validation_share)
    texts(optional=True, split_key=split_key)
    paths(optional=True, storage=storage)
    choices({"metric": (None, "macro_f1", "loss", "r2")}, metric=metric)
    if n_trials < 1:
        raise ScbinInputError("E32", f"n_trials is {n_trials}; it needs to be at least 1.")
    n_trials, seed = plain(n_trials), plain(seed)
    fixed = {name: plain(value) for name, value in fixed.items()}
    weights = target_weights(target)
    start = model if isinstance(model, str) and (model == NEW or model in PRESETS) else resolve_model(model, adata)
    known = [name for name in inspect.signature(finetune).parameters if name not in _OWN]
    if space is None:
        space, settled = default_space(len(weights), 2 if isinstance(start, str) else start.config.num_hidden_layers)
        space = {name: values for name, values in space.items() if name not in fixed}
        fixed = {**settled, **fixed}
    space = plain_space(space)
    check_space(space, known, fixed)
    for name in fixed:
        if name not in known:
            raise ScbinInputError("E31", f"{name!r} is no argument of scbin.tl.finetune that all trials could share.")
    kinds = list(kinds_of(weights, fixed.get("kind", "class")).values())
    metric = metric or (("macro_f1" if kinds[0] == "class" else "r2") if len(kinds) == 1 else "loss")
    if metric != "loss":
        check_metric(metric, kinds)
    sides = sides_of_search(adata, next(iter(weights)), kinds[0], split_key, validation_share, seed)
    cells = light_copy(adata, fixed.get("tokens_key"), weights, sides)
    identity = identity_of(cells, start, weights, space, fixed, metric, seed)
    with quiet(optuna):
        study = open_study(optuna, storage, metric, prune, identity)
        numbers_left = range(len(study.get_trials(deepcopy=False)), n_trials)
        for number in tqdm(numbers_left, desc="trials", unit="trial", disable=not progress):
            run_trial(optuna, study, number, cells, start, weights, space, fixed, metric, seed)
        trials = table_of(study, metric)
    if trials[metric].isna().all():
        raise ScbinTrainingError("E35", f"none of {len(trials)} trials came to an end: {study.trials[-1].user_attrs}.")
    settings = json.loads(study.best_trial.user_attrs["settings"])
    best = arguments_of(settings, weights, fixed)
    if "progress" not in fixed:
        del best["progress"]
    if split_key is not None:  # else the model would be tuned on other sides than its settings
        best["split_key"] = split_key
    write_uns(adata, _keys.SEARCH, _storable(trials))
    return Search(trials, best)


def check_metric(metric: Metric, kinds: Sequence[str]) -> None:
    """Raise where a score is not one of all targets."""
    if len(set(kinds)) > 1:
        raise ScbinInputError("E39", f"metric={metric!r} cannot score classes and numbers at once; use 'loss'.")
    own = "macro_f1" if kinds[0] == "class" else "r2"
    if metric != own:
        raise ScbinInputError(
            "E39",
            f"metric={metric!r} is no score of {_KINDS[kinds[0]]}, which are learned here; use {own!r} or 'loss'.",
        )


def _storable(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the table with columns of one type each, as files take them."""
    mixed = {name: str for name in trials.columns if trials[name].dtype == object}
    return trials.astype(mixed)
