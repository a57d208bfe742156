"""Running a plan of edits in pieces that survive a crash, with the time it takes said beforehand."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from scbin._errors import ScbinInputError, count
from scbin.nn.files import verify_directory, write_directory
from scbin.nn.perturbation import edited_vectors
from scbin.nn.screen import N_NODES, can_screen, screen_vectors
from scbin.tl._perturb_measure import MOST_DIRECTIONS, attention_directions

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from scbin.encoding.edits import Edit, GeneRows
    from scbin.nn.perturbation import RowEncoder
    from scbin.tl._perturb_measure import Measure
    from scbin.tl._perturb_plan import Plan

PIECE = 20_000  # pairs between two pieces on disk: minutes of work
AUTO_EXACT = 20_000  # edits up to which "auto" makes every one exactly
FEWEST_RANDOM = 5  # genes drawn to see what a screen missed
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pieces:
    """Where finished pieces are kept: a folder per plan, named after everything its numbers depend on."""

    folder: Path | None

    @classmethod
    def of(cls, save_dir: str | os.PathLike[str] | None, *parts: Any) -> Pieces:
        """Return the pieces of a plan; `parts` are arrays and texts."""
        if save_dir is None:
            return cls(None)
        digest = hashlib.sha256()
        for part in parts:
            data = np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else str(part).encode()
            digest.update(hashlib.sha256(data).digest())
        folder = Path(save_dir) / f"perturb-{digest.hexdigest()[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ScbinInputError("P28", f"save_dir={str(save_dir)!r} cannot be used ({error.strerror}).") from error
        return cls(folder)

    def read(self, kind: str, start: int, shape: tuple[int, int]) -> np.ndarray | None:
        """Return the values of the piece that begins at a pair, if it is there and sound."""
        if self.folder is None:
            return None
        piece = self.folder / f"piece-{kind}{start:09d}"
        if not piece.is_dir():
            return None
        if verify_directory(piece) is not None:
            shutil.rmtree(piece)  # torn by a crash of the disk: computed again
            return None
        values = np.frombuffer((piece / "values.f32").read_bytes(), dtype="<f4")
        return values.reshape(shape).copy() if values.size == np.prod(shape) else None

    def write(self, kind: str, start: int, values: np.ndarray) -> None:
        """Keep a piece; it appears whole or not at all."""
        if self.folder is not None:
            write_directory(self.folder / f"piece-{kind}{start:09d}", {"values.f32": values.astype("<f4").tobytes()})


@dataclass(frozen=True, eq=False)
class Job:
    """A plan with what is needed to run it."""

    plan: Plan
    rows: GeneRows
    edit: Edit
    method: Literal["auto", "exact", "screen"]
    verify: float
    seed: int
    save_dir: str | os.PathLike[str] | None
    progress: bool
    label: str = ""  # what is said before the number of edits


@dataclass(frozen=True, eq=False)
class Result:
    """The numbers of every pair, and how they came about."""

    values: np.ndarray  # (pairs, width) float32, NaN where an edit changed nothing or left nothing to read
    exact: np.ndarray  # (sets,) bool
    method: str
    about: dict[str, Any]


def run_job(job: Job, encoder: RowEncoder, measure: Measure, fingerprint: str) -> Result:
    """Run all pairs, exactly or by the screen with its best exactly, and say beforehand how long it will take."""
    plan = job.plan
    possible = can_screen(job.rows, job.edit, plan.sets) and measure.readout == "embedding"
    if job.method == "screen" and not possible:
        raise ScbinInputError(
            "P29",
            f"there is no screen for mode={job.edit.mode!r} of {count(plan.sets.shape[1], 'gene')} at once in "
            f"{job.rows.vocabulary.encoding!r}, read by {measure.readout}: only for effects of single genes on the embedding, and in "
            "'rank' only for deletions. Use method=\"exact\"; genes=, groups= and fewer cells make it shorter.",
        )
    screen = job.method == "screen" or (job.method == "auto" and possible and plan.n_pairs > AUTO_EXACT)
    tokens, states = job.rows.tokens, "none" if measure.states is None else measure.states
    centre = "none" if measure.centre is None else measure.centre
    on = (tokens.data, tokens.indices, tokens.indptr, plan.cells, plan.genes, states, centre)
    pieces = Pieces.of(
        job.save_dir,
        *on,
        fingerprint,
        job.edit,
        encoder.dtype,
        measure.names,
        measure.readout,
        measure.width,
        screen,
        job.seed,
    )
    announce(job, measure, screen)
    everything = np.arange(plan.n_pairs)
    if not screen:
        values = _in_pieces(job, everything, measure.width, pieces, partial(_exact, job, encoder, measure))
        return Result(values, np.ones(len(plan.sets), dtype=bool), "exact", {})
    directions: Callable[[np.ndarray, np.ndarray], np.ndarray] = measure.state_directions
    if measure.states is None and measure.originals is not None:
        directions = attention_directions(
            encoder, job.rows, job.edit, plan.cells, plan.genes[:, 0], measure.originals, seed=job.seed
        )
    values = _in_pieces(job, everything, measure.width, pieces, partial(_screened, job, encoder, measure, directions))
    return _verified(job, encoder, measure, values, pieces)


def _verified(job: Job, encoder: RowEncoder, measure: Measure, values: np.ndarray, pieces: Pieces) -> Result:
    """Compute the genes with the largest effects exactly, and a few at random, which tell how many were missed."""
    which, n_sets = job.plan.which, len(job.plan.sets)
    screened = means_of(values[:, 0], which, n_sets)
    order = np.argsort(-np.abs(np.nan_to_num(screened)), kind="stable")
    n_top = min(n_sets, math.ceil(job.verify * n_sets))
    n_random = min(n_sets - n_top, max(FEWEST_RANDOM, math.ceil(job.verify * n_sets / 10))) if n_top else 0
    top, others = order[:n_top], order[n_top:]
    drawn = np.random.default_rng(job.seed).choice(others, n_random, replace=False)
    exact = np.zeros(n_sets, dtype=bool)
    exact[top] = exact[drawn] = True
    chosen = np.flatnonzero(exact[which])
    values[chosen] = _in_pieces(
        job, chosen, measure.width, pieces, partial(_exact, job, encoder, measure), "verifying", "v"
    )
    found = means_of(values[:, 0], which, n_sets)
    about: dict[str, Any] = {"verified": int(n_top), "drawn": int(n_random)}
    both = np.flatnonzero(exact & np.isfinite(found) & np.isfinite(screened))
    if len(both) > 2:
        about["spearman_verified"] = round(float(spearmanr(found[both], screened[both]).statistic), 4)
    if n_random > 2:
        about["spearman_random"] = round(
            float(spearmanr(found[drawn], screened[drawn], nan_policy="omit").statistic), 4
        )
        late = np.nanmean(np.abs(found[drawn]) > np.nanquantile(np.abs(found[top]), 0.5))
        about["estimated_missed"] = round(float(late * (len(others) - n_random)), 1)
    return Result(values, exact, "screen", about)


def means_of(values: np.ndarray, which: np.ndarray, n_sets: int) -> np.ndarray:
    """Mean of the pairs of each set (sets,), NaN where there are none."""
    known = np.isfinite(values)
    n = np.bincount(which[known], minlength=n_sets)
    total = np.bincount(which[known], weights=values[known].astype(np.float64), minlength=n_sets)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def _exact(job: Job, encoder: RowEncoder, measure: Measure, pairs: np.ndarray, bar: tqdm) -> np.ndarray:
    """One forward for each pair."""
    plan = job.plan
    cells, genes = plan.cells[pairs], plan.genes[pairs]
    values = np.full((len(pairs), measure.width), np.nan, dtype=np.float32)
    for moved in edited_vectors(encoder, job.rows, job.edit, cells, genes, measure.originals, measure.read):
        values[moved.at] = np.where(moved.changed[:, None], measure(moved), np.nan)
        bar.update(moved.at.stop - moved.at.start)
    return values


def _screened(
    job: Job,
    encoder: RowEncoder,
    measure: Measure,
    directions: Callable[[np.ndarray, np.ndarray], np.ndarray],
    pairs: np.ndarray,
    bar: tqdm,
) -> np.ndarray:
    """A few gradients for all pairs of a cell."""
    plan = job.plan
    values = np.full((len(pairs), measure.width), np.nan, dtype=np.float32)
    parts = screen_vectors(encoder, job.rows, job.edit, plan.cells[pairs], plan.genes[pairs, 0], directions)
    for at, before, after, changed in parts:
        values[at] = np.where(changed[:, None], measure.of(before, after), np.nan)
        bar.update(len(at))
    return values


def _in_pieces(
    job: Job,
    pairs: np.ndarray,
    width: int,
    pieces: Pieces,
    run: Callable[[np.ndarray, tqdm], np.ndarray],
    label: str = "perturbing",
    kind: str = "p",
) -> np.ndarray:
    """Run pairs piece by piece, whole cells at a time, and keep each piece as soon as it is there."""
    values = np.full((len(pairs), width), np.nan, dtype=np.float32)
    begins = np.append(np.flatnonzero(np.diff(job.plan.cells[pairs], prepend=-1)), len(pairs))
    bounds = np.unique(
        begins[np.minimum(np.searchsorted(begins, np.arange(0, len(pairs) + PIECE, PIECE)), len(begins) - 1)]
    )
    with tqdm(total=len(pairs), desc=label, unit="edit", disable=not job.progress) as bar:
        for start, stop in itertools.pairwise(bounds.tolist()):
            found = pieces.read(kind, start, (stop - start, width))
            if found is None:
                found = run(pairs[start:stop], bar)
                pieces.write(kind, start, found)
            else:
                bar.update(len(found))
            values[start:stop] = found
    return values


def announce(job: Job, measure: Measure, screen: bool) -> None:
    """Say in one line what is about to be done and for how long."""
    plan, lengths = job.plan, np.diff(job.rows.tokens.indptr)
    cells = np.unique(plan.cells)
    n_forwards, tokens = float(plan.n_pairs), float(lengths[plan.cells].sum())
    if screen:
        n_slopes = MOST_DIRECTIONS if measure.states is None else len(measure.states)
        each = 2 + 2 * n_slopes + (0 if job.rows.vocabulary.position_is_gene else N_NODES)
        inserted = 0 if job.edit.mode == "delete" else plan.n_pairs
        share = min(1.0, 1.1 * job.verify)
        n_forwards = len(cells) * each + share * plan.n_pairs
        tokens = (lengths[cells].sum() + inserted) * each + share * tokens
    line = (
        f"scbin: {job.label}{count(plan.n_pairs, 'edit')} in {count(len(cells), 'cell')}, {'screen' if screen else 'exact'}: "
        f"{'about ' if screen else ''}{count(round(n_forwards), 'forward')}, about {_duration(measure.clock.until(tokens))}."
    )
    if job.progress:
        tqdm.write(line)
    else:
        _log.info(line)


def _duration(seconds: float) -> str:
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= 1.5 * size:
            return count(round(seconds / size), unit)
    return count(max(1, round(seconds)), "second")
