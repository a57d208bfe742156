"""`tl.search`: which settings of fine-tuning are best on cells that were held out."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from scbin import _docs, _keys
from scbin._adata import read_obs, read_tokens, write_uns
from scbin._arguments import checked, plain
from scbin._errors import ScbinInputError, ScbinTrainingError
from scbin.get.predictions import true_values
from scbin.tl._evaluate import evaluate
from scbin.tl._finetune import finetune, start_model
from scbin.tl._labels import kinds_of, target_weights
from scbin.tl._split import Split, hold_out, read_split
from scbin.train.labels import Finetuning
from scbin.train.settings import Training

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from scbin.model import Model

_COLUMN = "scbin_search_split"
# as in Geneformer's searches
SPACE = {
    "learning_rate": (1e-6, 1e-3, "log"),
    "weight_decay": (0.0, 0.3),
    "schedule": ["linear", "cosine"],
    "warmup": (0.0, 0.1),
    "dropout": (0.0, 0.7),
    "seed": (0, 100),
}
_OWN = {"adata", "model", "target", "split_key", "level", "save_dir", "progress", "finetuning", "training"}
_FINETUNING, _TRAINING = ({item.name for item in fields(each)} for each in (Finetuning, Training))


class Search(NamedTuple):
    """What a search found: one row per trial, best first, and the best settings as arguments of `scbin.tl.finetune`."""

    trials: pd.DataFrame
    best: dict[str, Any]


@_docs.shared
@checked
def search(
    adata: AnnData,
    model: Model | str | os.PathLike[str] | None = None,
    *,
    target: str | Sequence[str] | Mapping[str, float],
    n_trials: int = 20,
    space: Mapping[str, Any] | Callable[[Any], dict[str, Any]] | None = None,
    metric: Literal["macro_f1", "loss", "r2"] | None = None,
    split_key: str | None = None,
    validation: float = 0.15,
    storage: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    **fixed: Any,
) -> Search:
    """Try settings of :func:`scbin.tl.finetune` and return the best, as ranked on cells that no trial learned from.

    Each trial fine-tunes with settings drawn by Optuna's TPE sampler and is scored on the same held-out cells, which are neither
    trained on nor used to stop early. Test cells play no part: score the model that the best settings give on them, with
    :func:`scbin.tl.evaluate`, because the best of many scores is too good to be true.

    Parameters
    ----------
    {tokenized}
    model
        As for :func:`scbin.tl.finetune`.
    target
        Column of `obs`, or several.
    n_trials
        Number of trials in all, those in the storage included.
    space
        What to try: `{name: choices}`, where names are arguments of :func:`scbin.tl.finetune` or fields of
        :class:`scbin.Training` and :class:`scbin.Finetuning`, and choices are `(low, high)` (whole numbers if both are),
        `(low, high, "log")`, or a list. Or a function that takes an `optuna.Trial` and returns settings by the same names. Default:
        Geneformer's space.
    metric
        `"macro_f1"` or `"r2"`, to be large, or `"loss"`, to be small, over the targets. Default: macro-F1 or R2 for one target,
        the loss for several.
    split_key
        As for :func:`scbin.tl.finetune`. Where a split is known, trials are scored on its validation cells.
    validation
        Fraction of the cells to score on.
    storage
        File in which the trials are kept (SQLite), or the URL of a database that Optuna knows. Called again with the same
        arguments, the search goes on where it stopped; it may hold other searches, too.
    {seed}
    {progress}
    **fixed
        Other settings, by the same names, for all trials.

    Returns
    -------
    A tuple of `trials`, a table with one row per trial, best first, and `best`, settings for `scbin.tl.finetune(adata, model,
    **best)`. Sets the following field:

    `adata.uns["scbin"]["search"]`
        The table.

    Raises
    ------
    ScbinInputError
        If Optuna is missing, or the space names no setting.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:200].copy()
    >>> scbin.pp.tokenize(adata, n_genes=100)
    >>> space = {"class_weights": ["balanced", None]}
    >>> found = scbin.tl.search(adata, "new", target="phase", n_trials=2, space=space, max_steps=0, progress=False)
    >>> sorted(found.best)
    ['class_weights', 'max_steps', 'target']
    """
    try:
        import optuna
    except ImportError as error:
        raise ScbinInputError("A05", 'scbin.tl.search needs Optuna. Install it: pip install "scbin[search]"') from error
    if n_trials < 1 or not 0 < validation < 0.5:
        found = f"n_trials={n_trials} and validation={validation}"
        raise ScbinInputError("A02", f"{found}: at least 1, and between 0 and 0.5.")
    weights, fixed = target_weights(target), {name: plain(value) for name, value in fixed.items()}
    space = {name: values for name, values in SPACE.items() if name not in fixed} if space is None else space
    known = {*inspect.signature(finetune).parameters, *_FINETUNING, *_TRAINING} - _OWN
    if unknown := {*fixed, *(space if isinstance(space, Mapping) else ())} - known:
        there = ", ".join(sorted(known))
        raise ScbinInputError("A06", f"{min(unknown)!r} is no setting of fine-tuning. There are: {there}.")
    kinds = kinds_of(weights, fixed.get("kind", "class"))
    scores = {"macro_f1" if kind == "class" else "r2" for kind in kinds.values()}
    score = str(metric or ("loss" if len(weights) > 1 else min(scores)))
    if score != "loss" and {score} != scores:
        raise ScbinInputError("A03", f"metric={score!r} is no score of all of these targets; use 'loss'.")
    begin = start_model(model, adata)
    cells = _search_cells(adata, next(iter(kinds.items())), split_key, fixed.get("tokens_key"), validation, seed)

    def objective(trial: optuna.Trial) -> float:
        settings = space(trial) if callable(space) else {name: _drawn(trial, name, space[name]) for name in space}
        trial.set_user_attr("settings", json.dumps(settings))
        arguments = _arguments(fixed | settings)
        tuned = finetune(cells, begin or "new", target=target, split_key=_COLUMN, progress=False, **arguments)
        return _score(cells, tuned, kinds, score, {k: fixed[k] for k in ("device", "tokens_key") if k in fixed})

    tried = getattr(space, "__qualname__", str(space))
    about = repr([begin and begin.fingerprint, tried, str(fixed), score, seed, weights, cells.obs.to_csv()])
    path = None if storage is None else str(storage)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            storage=path if path is None or "://" in path else f"sqlite:///{Path(path).resolve()}",
            study_name=hashlib.sha256(about.encode()).hexdigest()[:16],
            direction="minimize" if score == "loss" else "maximize",
            load_if_exists=True,
        )
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):  # that were interrupted
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        for number in range(len(study.trials), n_trials):
            study.sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32)
            study.optimize(objective, n_trials=1, catch=(ScbinTrainingError,))
            if progress:
                print(f"scbin: trial {number + 1} of {n_trials}: {score} {study.trials[-1].value}")
    finally:
        optuna.logging.set_verbosity(verbosity)
    table = _table(study, score)
    if table[score].isna().all():
        raise ScbinTrainingError("T05", f"none of {len(table)} trials came to an end.")
    best = {"target": target, **_arguments(fixed | json.loads(study.best_trial.user_attrs["settings"]))}
    if split_key is not None:  # else the model would be tuned with another split than its settings
        best["split_key"] = split_key
    write_uns(adata, _keys.SEARCH, table.astype({name: str for name in table.columns if table[name].dtype == object}))
    return Search(table, best)


def _drawn(trial: Any, name: str, values: Any) -> Any:
    """Let a trial choose a value."""
    try:
        if isinstance(values, list):
            return trial.suggest_categorical(name, values)
        low, high, *scale = values
        suggest = trial.suggest_int if isinstance(low, int) and isinstance(high, int) else trial.suggest_float
        return suggest(name, low, high, log=scale == ["log"])
    except (TypeError, ValueError) as error:
        what = f"{name!r} in space= is {values!r}; pass (low, high), (low, high, 'log'), or a list"
        raise ScbinInputError("A02", f"{what}. Optuna says: {error}") from error


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as arguments of `tl.finetune`."""
    given = dict(settings)
    for name, config, names in (
        ("finetuning", Finetuning, _FINETUNING),
        ("training", Training, _TRAINING - {"max_steps"}),
    ):
        own = {key: given.pop(key) for key in list(given) if key in names}
        given |= {name: config(**own)} if own else {}
    return given


def _search_cells(
    adata: AnnData, target: tuple[str, str], split_key: str | None, tokens_key: str | None, fraction: float, seed: int
) -> AnnData:
    """Return the cells with their tokens and a split for the search alone: trials are scored on its `"test"` cells."""
    read_tokens(adata, None, tokens_key)
    truth, split = true_values(read_obs(adata, target[0]), *target), read_split(adata, split_key)
    usable, scored = truth.known & split.open, truth.known & split.validation
    if not scored.any():
        rows = np.flatnonzero(usable)
        own = None if split.donors is None else split.donors[rows]
        scored[rows[hold_out(truth.codes(rows), fraction, donors=own, seed=seed)]] = True
    if not scored.any() or not (usable & ~scored).any():
        raise ScbinInputError("L03", f"{int(usable.sum())} labelled cells cannot be divided to train on and to score.")
    uns = dict(adata.uns.get(_keys.UNS, {}))
    if split.donors is not None and split_key is not None:  # so that trials keep these donors apart too
        uns[_keys.SPLIT_RECORD] = json.dumps({"split_key": split_key})
    obs = adata.obs.assign(**{_COLUMN: Split(usable & ~scored, np.zeros_like(scored), scored).column()})
    key, var = _keys.TOKENS if tokens_key is None else tokens_key, pd.DataFrame(index=adata.var_names)
    return AnnData(obs=obs, var=var, obsm={key: adata.obsm[key]}, uns={_keys.UNS: uns})


def _score(cells: AnnData, model: Model, kinds: Mapping[str, Any], score: str, options: dict[str, Any]) -> float:
    """Return the mean score over the targets, on the cells that are there to be scored on."""
    values: list[float] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\[L04\]")  # what pretraining has seen is the same for all trials
        for name, kind in kinds.items():
            table = evaluate(cells, model, target=name, split_key=_COLUMN, baselines="none", progress=False, **options)
            found = table.loc["scbin"]
            loss = found["log_loss"] if kind == "class" else 1 - found["r2"]
            values.append(loss if score == "loss" else found[score])
    return float(np.mean(values))


def _table(study: Any, score: str) -> pd.DataFrame:
    """Return the trials, best first."""
    table = study.trials_dataframe(attrs=("number", "state", "value", "duration", "params"))
    table.insert(3, "seconds", table.pop("duration").dt.total_seconds())
    table = table.assign(state=table["state"].str.lower()).rename(columns={"number": "trial", "value": score})
    table = table.rename(columns=lambda name: name.removeprefix("params_"))
    return table.sort_values([score, "trial"], ascending=[score == "loss", True], ignore_index=True)
