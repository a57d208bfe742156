"""`tl.search`: which settings of fine-tuning are best on held-out cells."""

from __future__ import annotations

import json
import zlib
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from anndata import AnnData

from scbin import _docs, _keys
from scbin._adata import check_adata, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError, ScbinTrainingError
from scbin.tl._finetune import NEW, finetune, start_model
from scbin.train.settings import Finetuning, Training

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd

    from scbin.model import Model


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
    target: str | Sequence[str] | Mapping[str, Sequence[str]],
    n_trials: int = 20,
    space: Callable[[Any], dict[str, Any]] | None = None,
    storage: str | None = None,
    seed: int = 0,
    progress: bool = True,
    **fixed: Any,
) -> Search:
    """Try settings of :func:`scbin.tl.finetune` with Optuna and return those with the lowest loss on held-out cells.

    All trials use the same validation cells. The best of many scores is optimistic, so train a model with the best settings and
    score it on the test cells, which the search does not use, with :func:`scbin.tl.evaluate`.

    Parameters
    ----------
    {tokenized}
    model
        As for :func:`scbin.tl.finetune`.
    target
        As for :func:`scbin.tl.finetune`.
    n_trials
        Number of trials.
    space
        A function that takes an `optuna.Trial` and returns settings by name: arguments of :func:`scbin.tl.finetune`, or fields of
        :class:`scbin.Training` and :class:`scbin.Finetuning`. Default: rate, schedule, warmup, weight decay and dropout of genes.
    storage
        Where Optuna keeps the trials, such as `"sqlite:///search.db"`; another call with the same target and settings adds
        to them.
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
        If Optuna is missing.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:200].copy()
    >>> scbin.pp.tokenize(adata, n_genes=100)
    >>> space = lambda trial: {"gene_dropout": trial.suggest_float("gene_dropout", 0.0, 0.5)}
    >>> found = scbin.tl.search(adata, "new", target="phase", n_trials=2, space=space, max_steps=0, progress=False)
    >>> sorted(found.best)
    ['finetuning', 'max_steps', 'seed', 'target']
    """
    try:
        import optuna
    except ImportError as error:
        raise ScbinInputError("A05", 'scbin.tl.search needs Optuna. Install it: pip install "scbin[search]"') from error
    start, space = start_model(model, check_adata(adata)), space or usual_space
    cells = AnnData(obs=adata.obs, var=adata.var, obsm=dict(adata.obsm), uns=adata.uns)

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("settings", settings := space(trial))
        tuned = finetune(cells.copy(), start or NEW, progress=False, **_arguments({**common, **settings}))
        report = tuned.training["finetune"]
        if report["kept"] not in report["held_out_loss"]:
            raise ScbinInputError("L03", "there are too few cells to hold some out for comparing trials.")
        return float(report["held_out_loss"][report["kept"]])

    common = {"target": target, "seed": seed, **fixed}
    about = zlib.crc32(json.dumps(common, default=str, sort_keys=True).encode())  # other targets are other searches
    study = optuna.create_study(storage=storage, study_name=f"scbin-{about:08x}", load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    study.optimize(objective, n_trials=n_trials, catch=(ScbinTrainingError,), show_progress_bar=progress)
    table = study.trials_dataframe(attrs=("number", "state", "value", "params"))
    table = table.rename(columns=lambda name: name.removeprefix("params_")).rename(columns={"value": "loss"})
    table = table.sort_values("loss", ignore_index=True)
    write_uns(adata, _keys.SEARCH, table.astype({name: str for name in table.columns if table[name].dtype == object}))
    return Search(table, _arguments({**common, **study.best_trial.user_attrs["settings"]}))


def usual_space(trial: Any) -> dict[str, Any]:
    """Return settings drawn much as in Geneformer's searches."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 0.0, 0.3),
        "schedule": trial.suggest_categorical("schedule", ["linear", "cosine"]),
        "warmup": trial.suggest_float("warmup", 0.0, 0.1),
        "gene_dropout": trial.suggest_float("gene_dropout", 0.0, 0.7),
    }


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as arguments of `tl.finetune`, fields of its configurations by these."""
    given = dict(settings)
    for argument, config in (("finetuning", Finetuning), ("training", Training)):
        names = {field.name for field in fields(config)} & set(given) - {"max_steps"}
        if names:
            given[argument] = config(**{name: given.pop(name) for name in names})
    return given
