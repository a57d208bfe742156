"""The parts of a search: cells to score on, the study that is kept in a file, one trial."""

from __future__ import annotations

import hashlib
import json
import warnings
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from scbin import _keys
from scbin._anndata import read_obs, read_tokens
from scbin._errors import ScbinInputError, ScbinTrainingError
from scbin.data.splitting import share_of
from scbin.encoding.phenotypes import labels_of
from scbin.get._predicted import read_predicted
from scbin.tl._finetune import finetune
from scbin.tl._metrics import classification_scores, regression_scores
from scbin.tl._predict import predict
from scbin.tl._search_space import WEIGHT, draw
from scbin.tl._sides import Sides, known_split, warn_of_donors
from scbin.train.watching import watched

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    from anndata import AnnData

    from scbin.model import Model

Metric = Literal["macro_f1", "loss", "r2"]
COLUMN, DONORS = "scbin_search_split", "scbin_search_donors"


def import_optuna() -> Any:
    """Return Optuna, or say how to get it."""
    try:
        import optuna
    except ImportError as error:
        raise ScbinInputError("E30", 'scbin.tl.search needs Optuna. Install it: pip install "scbin[search]"') from error
    return optuna


# ---- cells ----------------------------------------------------------------------------------------------------------


def sides_of_search(adata: AnnData, target: str, kind: str, split_key: str | None, share: float, seed: int) -> Sides:
    """Return on which side of a search each cell stands: `test` are those that trials are scored on.

    Test cells of the data's own split stand on no side. Where donors are known, none of them stands on two.
    """
    if not 0 < share < 0.5:
        raise ScbinInputError("E40", f"validation_share is {share}; it needs to be above 0 and below 0.5.")
    given, groups = known_split(adata, split_key)
    usable = np.ones(adata.n_obs, dtype=bool) if given is None else given.training | given.held_out
    labels = labels_of(read_obs(adata, target), target) if kind == "class" else None
    classes = np.zeros(adata.n_obs, dtype=np.int64)
    if labels is not None:
        classes = pd.factorize(labels, use_na_sentinel=True)[0].astype(np.int64)
        usable &= classes >= 0
    scored = np.zeros(adata.n_obs, dtype=bool)
    if given is not None and (given.held_out & usable).any():
        scored = given.held_out & usable
    else:
        scored[_drawn(usable, classes, groups, share, seed)] = True
    held_out = np.zeros(adata.n_obs, dtype=bool)
    held_out[_drawn(usable & ~scored, classes, groups, share, seed + 1)] = True
    sides = Sides(usable & ~scored & ~held_out, held_out, scored, groups)
    if not (sides.training.any() and scored.any()):
        raise ScbinInputError(
            "E33", f"{int(usable.sum())} labelled cells cannot be divided into sides to train and to score."
        )
    warn_of_donors(adata, sides, split_key)
    return sides


def _drawn(usable: np.ndarray, classes: np.ndarray, groups: np.ndarray | None, share: float, seed: int) -> np.ndarray:
    rows = np.flatnonzero(usable)
    own = None if groups is None else groups[rows]
    return rows[share_of(classes[rows], share, groups=own, seed=seed)]


def light_copy(adata: AnnData, tokens_key: str | None, names: Iterable[str], sides: Sides) -> ad.AnnData:
    """Return the cells with their tokens, the columns with some names and their sides alone, for trials to write into."""
    key = _keys.TOKENS if tokens_key is None else tokens_key
    read_tokens(adata, key=tokens_key)
    obs = pd.DataFrame({name: adata.obs[name] for name in names}, index=adata.obs_names)
    obs[COLUMN] = sides.column()
    uns = {name: value for name, value in adata.uns.get(_keys.UNS, {}).items() if name != _keys.SPLIT_RECORD}
    if sides.groups is not None:
        obs[DONORS] = pd.Categorical(sides.groups)
        uns[_keys.SPLIT_RECORD] = json.dumps({"split_key": DONORS})
    return ad.AnnData(
        csr_matrix(adata.shape, dtype=np.float32),
        obs=obs,
        var=pd.DataFrame(index=adata.var_names),
        obsm={key: adata.obsm[key]},
        uns={_keys.UNS: uns},
    )


# ---- the study ------------------------------------------------------------------------------------------------------


def identity_of(
    cells: AnnData, model: Model | str, weights: Mapping[str, float], space: Mapping[str, Any], fixed: Mapping[str, Any],
    metric: str, seed: int,
) -> str:  # fmt: skip
    """Return a fingerprint of everything that makes trials comparable."""
    key = next(iter(cells.obsm))
    tokens = csr_matrix(cells.obsm[key])
    digest = hashlib.sha256(model.encode() if isinstance(model, str) else model.fingerprint.encode())
    for array in (tokens.data, tokens.indices, tokens.indptr, cells.obs[COLUMN].cat.codes.to_numpy()):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name in weights:
        digest.update("\0".join(cells.obs[name].astype(str)).encode())
    if DONORS in cells.obs.columns:
        digest.update("\1".join(cells.obs[DONORS].astype(str)).encode())
    asked = {"weights": dict(weights), "space": dict(space), "fixed": dict(fixed), "metric": metric, "seed": seed}
    digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def open_study(optuna: Any, storage: str | os.PathLike[str] | None, metric: str, prune: bool, identity: str) -> Any:
    """Return the study in a file, or a new one; what an interrupted search left unfinished counts as failed."""
    url = None if storage is None else f"sqlite:///{Path(storage).resolve()}"
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if prune else optuna.pruners.NopPruner()
    study = optuna.create_study(
        storage=url,
        study_name="scbin",
        direction="minimize" if metric == "loss" else "maximize",
        pruner=pruner,
        load_if_exists=True,
    )
    before = study.user_attrs.get("identity")
    if before is not None and before != identity:
        raise ScbinInputError(
            "E34",
            f"{storage} holds the trials of another search: other cells, model, space, metric or seed. Name another file.",
        )
    study.set_user_attr("identity", identity)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Let Optuna log warnings only, and give its level back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


# ---- one trial ------------------------------------------------------------------------------------------------------


def run_trial(
    optuna: Any,
    study: Any,
    number: int,
    cells: AnnData,
    model: Any,
    weights: Mapping[str, float],
    space: Mapping[str, Any],
    fixed: Mapping[str, Any],
    metric: str,
    seed: int,
) -> None:
    """Draw settings, fine-tune, score, and tell the study; the draw depends on the seed and the trials before it alone."""
    study.sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32)
    trial = study.ask()
    settings = draw(trial, space, list(weights))
    trial.set_user_attr("settings", json.dumps(settings))
    own, looks = cells.copy(), count()
    state = optuna.trial.TrialState

    def watch(row: Mapping[str, float]) -> None:
        losses = [value for name, value in row.items() if name.startswith("validation_") and np.isfinite(value)]
        if losses:
            trial.report(sign * float(np.mean(losses)), next(looks))
            if trial.should_prune():
                raise optuna.TrialPruned

    # what is pruned by is a loss, whatever the score is
    sign = 1.0 if metric == "loss" else -1.0
    try:
        with watched(watch):
            tuned = finetune(own, model, split_key=COLUMN, **arguments_of(settings, weights, fixed))
    except optuna.TrialPruned:
        study.tell(trial, state=state.PRUNED)
        return
    except ScbinTrainingError as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=state.FAIL)
        return
    except BaseException:
        study.tell(trial, state=state.FAIL)
        raise
    study.tell(trial, score(own, tuned, weights, metric, fixed))


def arguments_of(settings: Mapping[str, Any], weights: Mapping[str, float], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as arguments of `tl.finetune`, the target among them."""
    arguments = {"progress": False, **fixed, **settings}
    own = arguments.pop(WEIGHT, None)
    target: Any = {name: weight * (own or {}).get(name, 1.0) for name, weight in weights.items()}
    if own is None and set(weights.values()) == {1.0}:
        target = list(weights) if len(weights) > 1 else next(iter(weights))
    return {**arguments, "target": target}


def score(cells: AnnData, model: Model, weights: Mapping[str, float], metric: str, fixed: Mapping[str, Any]) -> float:
    """Return the mean score over the targets, on the cells that are there to be scored on."""
    network = {name: fixed[name] for name in ("device", "token_budget", "tokens_key") if name in fixed}
    predict(cells, model, target=list(weights), progress=False, **network)
    chosen = np.flatnonzero((cells.obs[COLUMN] == "test").to_numpy())
    values = []
    for name in weights:
        found = read_predicted(cells, name, cells="all")
        here = np.isin(found.cells, chosen)
        truth, given = found.truth[here], found.predicted[here]
        if found.kind == "number":
            scale = next(target.scale for target in model.head.targets if target.name == name)  # type: ignore[union-attr]
            squares = float(np.nanmean(((given - truth) / scale) ** 2))
            values.append(squares if metric == "loss" else regression_scores(truth, given)["r2"])
        else:
            scores = classification_scores(truth, given, None if found.probability is None else found.probability[here])
            values.append(scores["log_loss" if metric == "loss" else "macro_f1"])
    return float(np.mean(values))


def table_of(study: Any, metric: str) -> pd.DataFrame:
    """Return one row per trial, best first, those without a score last."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        seconds = trial.duration.total_seconds() if trial.duration is not None else float("nan")
        done = trial.state.name == "COMPLETE"
        row = {"trial": trial.number, "state": trial.state.name.lower(), metric: trial.value if done else float("nan")}
        rows.append({**row, "seconds": seconds, **trial.params, "error": trial.user_attrs.get("error", "")})
    table = pd.DataFrame(rows)
    if not table["error"].any():
        table = table.drop(columns="error")
    return table.sort_values([metric, "trial"], ascending=[metric == "loss", True], ignore_index=True)
