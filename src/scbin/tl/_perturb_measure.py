"""What is read off a cell's vector before and after an edit: how far it moved, or how much closer it came to a state."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from scbin._errors import ScbinInputError
from scbin.nn.effects import phenotype_probabilities, predicted_expression
from scbin.nn.perturbation import alignment, cosine_shift, edited_vectors, state_shift
from scbin.nn.screen import screen_vectors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scipy.sparse import csr_matrix

    from scbin.encoding.edits import Edit, GeneRows
    from scbin.encoding.vocabulary import Phenotype
    from scbin.nn.perturbation import Moved, RowEncoder
    from scbin.tl._perturb_plan import Plan, States

Readout = Literal["embedding", "phenotype", "expression"]
N_SAMPLE = 128  # edits made exactly to find the directions in which attention moves cells
MOST_DIRECTIONS = 16
LEFT_OUT = 0.06  # share of the edits' movement that may lie outside of the directions; half of it takes twice as many
LEFT_OUT_RANKED = 0.03  # where ranks are, their shift costs more than the directions


class Clock:
    """How many tokens a second go through the network, to say beforehand how long the rest takes."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0

    def timed(self, n_tokens: int, run: Callable[[], np.ndarray]) -> np.ndarray:
        """Run something that reads so many tokens."""
        start = time.monotonic()
        result = run()
        self.tokens, self.seconds = self.tokens + n_tokens, self.seconds + time.monotonic() - start
        return result

    def until(self, n_tokens: float) -> float:
        """Seconds that so many tokens will take."""
        return n_tokens * self.seconds / max(self.tokens, 1)


@dataclass(frozen=True, eq=False)
class Measure:
    """Vectors of the cells as they are, and of the states, with the numbers that compare an edited vector with them."""

    names: tuple[str, ...]  # of the numbers: "shift"; with states "shift_to_start", one per alternative, "alignment"
    originals: (
        np.ndarray | None
    )  # (rows, H) what was read off the cells, NaN where not needed; None: read for each edit
    states: np.ndarray | None  # (states, H) means of the cells of goal, start, alternatives
    centre: np.ndarray | None  # (H,) origin of the cosines
    keep_vectors: bool  # of the edited cells, behind the numbers
    clock: Clock
    readout: Readout = "embedding"
    read: Callable[[csr_matrix, np.ndarray], np.ndarray] | None = None  # instead of vectors
    wanted: int | None = None  # the value of a phenotype whose probability is the shift

    @property
    def width(self) -> int:
        """How many numbers there are for each edit."""
        n_kept = self.originals.shape[1] if self.keep_vectors and self.originals is not None else 0
        return len(self.names) + n_kept

    def of(self, original: np.ndarray, edited: np.ndarray) -> np.ndarray:
        """Return the numbers of each edit (pairs, width)."""
        if self.readout != "embedding":
            change = edited.astype(np.float64) - original
            total = (
                np.nanmean(np.abs(change), axis=1) if self.readout == "expression" else np.abs(change).sum(axis=1) / 2
            )
            return np.concatenate([(total if self.wanted is None else change[:, self.wanted])[:, None], change], axis=1)
        if self.states is None:
            values = cosine_shift(original, edited, self.centre)[:, None]
        else:
            values = state_shift(original, edited, self.states, self.centre)
            if "alignment" in self.names:
                along = alignment(original, edited, self.states[0] - self.states[1])
                values = np.column_stack([values, along])
        return np.concatenate([values, edited], axis=1) if self.keep_vectors else values

    def __call__(self, moved: Moved) -> np.ndarray:
        """Return the numbers of exact edits."""
        return self.of(moved.original, moved.edited)

    def state_directions(self, cells: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Return the gradients of the cosines to the states at some vectors, orthonormal (cells, states, H)."""
        if self.states is None:
            return np.zeros((len(cells), 0, vectors.shape[1]))
        centre = 0.0 if self.centre is None else self.centre.astype(np.float64)
        at, ends = vectors - centre, self.states - centre
        at = at / np.maximum(np.linalg.norm(at, axis=1, keepdims=True), 1e-30)
        ends = ends / np.maximum(np.linalg.norm(ends, axis=1, keepdims=True), 1e-30)
        slopes = ends[None] - (at @ ends.T)[:, :, None] * at[:, None]  # (cells, states, H)
        return np.linalg.qr(slopes.transpose(0, 2, 1))[0].transpose(0, 2, 1)


def measure_for(
    encoder: RowEncoder,
    rows: GeneRows,
    plan: Plan,
    cells: np.ndarray,
    states: States | None,
    centre: Literal["auto", "states", "cells"] | None,
) -> Measure:
    """Embed the cells that count, and say what is measured."""
    readable = np.flatnonzero(rows.n_genes)
    centre = ("states" if states is not None else None) if centre == "auto" else centre
    needed = [cells, *(states.members if states is not None else ()), *([readable] if centre == "cells" else ())]
    used = np.unique(np.concatenate(needed))
    clock = Clock()
    tokens = rows.tokens[used]
    vectors = clock.timed(tokens.nnz, lambda: encoder.vectors(tokens))
    originals = np.full((rows.tokens.shape[0], vectors.shape[1]), np.nan, dtype=np.float32)
    originals[used] = vectors
    means: np.ndarray | None = None
    names: tuple[str, ...] = ("shift",)
    if states is not None:
        means = np.stack([np.nanmean(originals[of].astype(np.float64), axis=0) for of in states.members])
        others = (f"shift_to_{name.replace('/', '-')}" for name in states.names[2:])
        names = ("shift", "shift_to_start", *others, "alignment")
    within = readable if centre == "cells" or states is None else np.unique(np.concatenate(states.members))
    origin = None if centre is None else np.nanmean(originals[within].astype(np.float64), axis=0)
    return Measure(names, originals, means, origin, plan.together, clock)


def phenotype_measure(
    encoder: RowEncoder, rows: GeneRows, cells: np.ndarray, phenotype: Phenotype, goal: str | None
) -> Measure:
    """Measure how the probabilities of a phenotype's values change; the shift is that of the goal, or the total variation."""
    if goal is not None and goal not in phenotype.values:
        known = ", ".join(map(repr, phenotype.values[:6])) + (" ..." if len(phenotype.values) > 6 else "")
        raise ScbinInputError("P43", f"{goal!r} is no value of {phenotype.name!r}, which has: {known}.")

    def read(tokens: csr_matrix, genes: np.ndarray) -> np.ndarray:
        return phenotype_probabilities(encoder, tokens, phenotype)

    clock = Clock()
    originals = np.full((rows.tokens.shape[0], len(phenotype.values)), np.nan)
    originals[cells] = clock.timed(rows.tokens[cells].nnz, lambda: read(rows.tokens[cells], cells[:, None]))
    wanted = None if goal is None else phenotype.values.index(goal)
    names = ("shift", *(f"change_of_{value.replace('/', '-')}" for value in phenotype.values))
    return Measure(names, originals, None, None, False, clock, "phenotype", read, wanted)


def expression_measure(encoder: RowEncoder, rows: GeneRows, cells: np.ndarray, genes: Sequence[str]) -> Measure:
    """Measure how the expression that the model expects of every other gene changes; the shift is the mean absolute change."""
    clock = Clock()
    tokens = rows.tokens[cells[:20]]
    clock.timed(
        tokens.nnz, lambda: predicted_expression(encoder, tokens, np.zeros((tokens.shape[0], 0), dtype=np.int64))
    )
    clock.seconds *= 2  # before and after
    read = partial(predicted_expression, encoder)
    return Measure(("shift", *genes), None, None, None, False, clock, "expression", read)


def attention_directions(
    encoder: RowEncoder,
    rows: GeneRows,
    edit: Edit,
    cells: np.ndarray,
    genes: np.ndarray,
    originals: np.ndarray,
    *,
    seed: int,
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Find the directions in which edits move cells through attention, from a few edits made exactly.

    They are few, and the same for all cells: the principal axes of the difference between exact vectors and those in which the
    mean over tokens alone has changed.
    """
    drawn = np.random.default_rng(seed).choice(len(cells), min(N_SAMPLE, len(cells)), replace=False)
    drawn = np.sort(drawn)
    exact = np.concatenate(
        [m.edited for m in edited_vectors(encoder, rows, edit, cells[drawn], genes[drawn], originals)]
    )
    pooled = np.empty(exact.shape, dtype=np.float64)

    def nowhere(at: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        return np.zeros((len(at), 0, vectors.shape[1]))

    for pairs, _, after, _ in screen_vectors(encoder, rows, edit, cells[drawn], genes[drawn], nowhere):
        pooled[pairs] = after
    known = np.isfinite(exact).all(axis=1) & np.isfinite(pooled).all(axis=1)
    moved = float(((exact - originals[cells[drawn]])[known] ** 2).sum())
    _, lengths, axes = np.linalg.svd((exact - pooled)[known], full_matrices=False)
    left = np.append(np.cumsum(lengths[::-1] ** 2)[::-1], 0.0)  # squared length beyond the first k axes
    most = LEFT_OUT if rows.vocabulary.position_is_gene else LEFT_OUT_RANKED
    n_axes = int(np.argmax(left <= most**2 * moved))
    axes = axes[: min(n_axes, MOST_DIRECTIONS)]

    def directions(at: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        return np.broadcast_to(axes, (len(at), *axes.shape))

    return directions
