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
from scbin.tl._labels import Split, hold_out, kinds_of, split_and_donors, target_weights
from scbin.train.labels import Finetuning
from scbin.train.settings import Training

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from scbin.get.predictions import Kind
    from scbin.model import Model

WEIGHT, _COLUMN = "target_weight", "scbin_search_split"
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
    trained on nor used to stop early. A trial whose validation loss is behind the median of the others is stopped. Test cells
    play no part: score the model that the best settings give on them, with :func:`scbin.tl.evaluate`, because the best of many
    scores is too good to be true.

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
        `(low, high, "log")`, or a list; `"target_weight"` stands for the weight of each target. Or a function that takes an
        `optuna.Trial` and returns settings by the same names. Default: Geneformer's space.
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
    default = SPACE | ({WEIGHT: (0.1, 2.0)} if len(weights) > 1 else {})
    space = {name: values for name, values in default.items() if name not in fixed} if space is None else space
    _check_names([*fixed, *(space if isinstance(space, Mapping) else ())])
    kinds = kinds_of(weights, fixed.get("kind", "class"), "cell")
    scores = {"macro_f1" if kind == "class" else "r2" for kind in kinds.values()}
    score = str(metric or ("loss" if len(weights) > 1 else min(scores)))
    if score != "loss" and {score} != scores:
        raise ScbinInputError("A03", f"metric={score!r} is no score of all of these targets; use 'loss'.")
    first, begin = next(iter(weights)), start_model(model, adata)
    cells = _search_cells(adata, first, kinds[first], split_key, fixed.get("tokens_key"), validation, seed)

    def objective(trial: optuna.Trial) -> float:
        settings = space(trial) if callable(space) else _drawn(trial, space, weights)
        trial.set_user_attr("settings", json.dumps(settings))

        def watch(row: Mapping[str, float]) -> None:
            if np.isfinite(row.get("validation", np.nan)):
                trial.report((1 if score == "loss" else -1) * float(row["validation"]), int(row["step"]))
                if trial.should_prune():
                    raise optuna.TrialPruned

        arguments = _arguments(settings, fixed, weights, watch)
        tuned = finetune(cells, begin or "new", split_key=_COLUMN, progress=False, **arguments)
        return _score(cells, tuned, kinds, score, {k: fixed[k] for k in ("device", "tokens_key") if k in fixed})

    tried = getattr(space, "__qualname__", str(space))
    about = repr([begin and begin.fingerprint, tried, str(fixed), score, seed, weights, cells.obs.to_csv()])
    study = _study(
        storage, hashlib.sha256(about.encode()).hexdigest()[:16], "minimize" if score == "loss" else "maximize"
    )
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
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
    best = _arguments(json.loads(study.best_trial.user_attrs["settings"]), fixed, weights)
    if split_key is not None:  # else the model would be tuned with another split than its settings
        best["split_key"] = split_key
    write_uns(adata, _keys.SEARCH, table.astype({name: str for name in table.columns if table[name].dtype == object}))
    return Search(table, best)


def _check_names(names: Sequence[str]) -> None:
    known = {*inspect.signature(finetune).parameters, *_FINETUNING, *_TRAINING, WEIGHT} - _OWN
    for name in names:
        if name not in known:
            there = ", ".join(sorted(known))
            raise ScbinInputError("A06", f"{name!r} is no setting of fine-tuning. There are: {there}.")


def _study(storage: str | os.PathLike[str] | None, name: str, direction: Any) -> Any:
    """Open the study of this name; trials that were interrupted count as failed."""
    import optuna

    path = None if storage is None else str(storage)
    url = path if path is None or "://" in path else f"sqlite:///{Path(path).resolve()}"
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    study = optuna.create_study(storage=url, study_name=name, load_if_exists=True, direction=direction, pruner=pruner)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _drawn(trial: Any, space: Mapping[str, Any], targets: Mapping[str, float]) -> dict[str, Any]:
    """Let a trial choose a value for each name, and a weight for each target."""

    def draw(name: str, values: Any) -> Any:
        try:
            if isinstance(values, list):
                return trial.suggest_categorical(name, values)
            low, high, *scale = values
            suggest = trial.suggest_int if isinstance(low, int) and isinstance(high, int) else trial.suggest_float
            return suggest(name, low, high, log=scale == ["log"])
        except (TypeError, ValueError) as error:
            what = f"{name!r} in space= is {values!r}; pass (low, high), (low, high, 'log'), or a list"
            raise ScbinInputError("A02", f"{what}. Optuna says: {error}") from error

    settings = {name: draw(name, values) for name, values in space.items() if name != WEIGHT}
    if WEIGHT in space:
        settings[WEIGHT] = {target: draw(f"weight of {target}", space[WEIGHT]) for target in targets}
    return settings


def _arguments(
    settings: Mapping[str, Any], fixed: Mapping[str, Any], weights: Mapping[str, float], watch: Any = None
) -> dict[str, Any]:
    """Return settings as arguments of `tl.finetune`."""
    given = {**fixed, **settings}
    own = given.pop(WEIGHT, None) or {}
    finetuning = {name: given.pop(name) for name in list(given) if name in _FINETUNING}
    training = {name: given.pop(name) for name in list(given) if name in _TRAINING - {"max_steps"}}
    if watch is not None:
        training["callbacks"] = (*training.get("callbacks", ()), watch)
    if finetuning:
        given["finetuning"] = Finetuning(**finetuning)
    if training:
        given["training"] = Training(**training)
    if not own and set(weights.values()) == {1.0}:
        return {**given, "target": list(weights) if len(weights) > 1 else next(iter(weights))}
    return {**given, "target": {name: weight * own.get(name, 1.0) for name, weight in weights.items()}}


def _search_cells(
    adata: AnnData, target: str, kind: Kind, split_key: str | None, tokens_key: str | None, fraction: float, seed: int
) -> AnnData:
    """Return the cells with their tokens and a split for the search alone: trials are scored on its `"test"` cells."""
    read_tokens(adata, None, tokens_key)
    truth = true_values(read_obs(adata, target), target, kind)
    known, donors = split_and_donors(adata, split_key)
    usable = truth.known if known is None else truth.known & known.open
    scored = np.zeros(adata.n_obs, dtype=bool) if known is None else known.validation & usable
    if not scored.any():
        rows = np.flatnonzero(usable)
        own = None if donors is None else donors[rows]
        scored[rows[hold_out(truth.codes(rows), fraction, donors=own, seed=seed)]] = True
    if not scored.any() or not (usable & ~scored).any():
        raise ScbinInputError("L03", f"{int(usable.sum())} labelled cells cannot be divided to train on and to score.")
    uns = dict(adata.uns.get(_keys.UNS, {}))
    if donors is not None and split_key is not None:  # so that trials keep these donors apart too
        uns[_keys.SPLIT_RECORD] = json.dumps({"split_key": split_key})
    obs = adata.obs.assign(**{_COLUMN: Split(usable & ~scored, np.zeros_like(scored), scored).column()})
    key, var = _keys.TOKENS if tokens_key is None else tokens_key, pd.DataFrame(index=adata.var_names)
    return AnnData(obs=obs, var=var, obsm={key: adata.obsm[key]}, uns={_keys.UNS: uns})


def _score(cells: AnnData, model: Model, kinds: Mapping[str, Any], score: str, options: dict[str, Any]) -> float:
    """Return the mean score over the targets, on the cells that are there to be scored on."""
    options, values = {"split_key": _COLUMN, "baselines": "none", "progress": False, **options}, []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\[L04\]")  # what pretraining has seen is the same for all trials
        for name, kind in kinds.items():
            found = evaluate(cells, model, target=name, **options).loc["scbin"]
            loss = found["log_loss"] if kind == "class" else 1 - found["r2"]
            values.append(loss if score == "loss" else found[score])
    return float(np.mean(values))


def _table(study: Any, score: str) -> pd.DataFrame:
    """Return the trials, best first; what a stopped trial had reached is no score."""
    table = study.trials_dataframe(attrs=("number", "state", "value", "duration", "params"))
    table.insert(3, "seconds", table.pop("duration").dt.total_seconds())
    table["value"] = table["value"].where(table["state"] == "COMPLETE")
    table = table.assign(state=table["state"].str.lower()).rename(columns={"number": "trial", "value": score})
    table = table.rename(columns=lambda name: name.removeprefix("params_"))
    return table.sort_values([score, "trial"], ascending=[score == "loss", True], ignore_index=True)
