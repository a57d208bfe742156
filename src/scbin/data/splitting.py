"""Who learns and who is asked: splits of cells, donors or genes. Arrays in, arrays out."""

from __future__ import annotations

import numpy as np
from scipy.stats import chi2_contingency

_MOST_DRAWS = 100
_ALIKE = 0.1  # p above which two sides count as alike


def folds_of(classes: np.ndarray, n_folds: int, *, groups: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Return the fold of each cell (cells,), all with the classes in like shares as far as that can be.

    Parameters
    ----------
    classes
        Class of each cell (cells,), -1 where it has none.
    n_folds
        Number of folds; fewer are made where there are fewer groups.
    groups
        Group of each cell, such as its donor (cells,): a group stands in one fold alone.
    seed
        Of the draw.

    Examples
    --------
    >>> folds_of(np.array([0, 0, 0, 1, 1, 1]), 3).shape
    (6,)
    """
    generator = np.random.default_rng(seed)
    if groups is None:
        order = np.lexsort((generator.permutation(len(classes)), classes))
        folds = np.empty(len(classes), dtype=np.int64)
        folds[order] = np.arange(len(classes)) % n_folds
        return folds
    _, inverse = np.unique(groups, return_inverse=True)
    _, codes = np.unique(classes, return_inverse=True)
    table = np.zeros((inverse.max(initial=-1) + 1, codes.max(initial=-1) + 1))
    np.add.at(table, (inverse, codes), 1)
    n_folds = min(n_folds, len(table))
    totals = np.maximum(table.sum(0), 1)
    filled = np.zeros((n_folds, table.shape[1]))
    home = np.empty(len(table), dtype=np.int64)
    # the groups that are hardest to place first, each where the shares of the classes then differ least between the folds
    # (in an order that the seed shuffles: else all seeds would give one split)
    hardness = (table.std(axis=1) + table.sum(axis=1)) * generator.uniform(0.5, 1.0, len(table))
    for group in np.argsort(-hardness, kind="stable"):
        spreads = []
        for fold in range(n_folds):
            filled[fold] += table[group]
            spreads.append((float((filled / totals).std(axis=0).mean()), float(filled[fold].sum())))
            filled[fold] -= table[group]
        home[group] = min(range(n_folds), key=lambda fold: spreads[fold])
        filled[home[group]] += table[group]
    return home[inverse]


def share_of(
    classes: np.ndarray,
    share: float,
    *,
    groups: np.ndarray | None = None,
    most: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return which cells are held out (cells,): about a share of them.

    Without groups a class is held out in its share, and a class of one cell is not. With groups whole groups are held out: of
    up to a hundred draws the first is taken whose sides have the classes in like shares (chi-squared test, p of .1 or more),
    each class on both sides where that can be; else the one that comes closest.

    Parameters
    ----------
    classes
        Class of each cell (cells,), -1 where it has none.
    share
        Of the cells.
    groups
        Group of each cell (cells,).
    most
        About the most cells to hold out.
    seed
        Of the draw.
    """
    generator = np.random.default_rng(seed)
    n = len(classes)
    if n and most is not None:
        share = min(share, most / n)
    held_out = np.zeros(n, dtype=bool)
    if share <= 0 or n < 2:
        return held_out
    if groups is None:
        order = np.lexsort((generator.permutation(n), classes))
        sizes = np.bincount(np.unique(classes, return_inverse=True)[1])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        carried = generator.random()  # small classes take turns
        for size, start in zip(sizes, starts[:-1], strict=True):
            wanted = size * share + carried
            taken = min(int(wanted), size - 1)
            carried = min(wanted - taken, 1.0)
            held_out[order[start : start + taken]] = True
        return held_out
    return _draw_groups(classes, share, np.asarray(groups), generator)


def _draw_groups(classes: np.ndarray, share: float, groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    names, inverse = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return np.zeros(len(classes), dtype=bool)
    sizes = np.bincount(inverse)
    _, codes = np.unique(classes, return_inverse=True)
    best: tuple[float, np.ndarray] | None = None
    for _ in range(_MOST_DRAWS):
        order = generator.permutation(len(names))
        filled = np.cumsum(sizes[order])
        n_taken = int(np.clip(np.abs(filled - share * len(classes)).argmin() + 1, 1, len(names) - 1))
        held_out = np.isin(inverse, order[:n_taken])
        table = np.stack([np.bincount(codes[side], minlength=codes.max() + 1) for side in (held_out, ~held_out)])
        p = float(chi2_contingency(table[:, table.sum(0) > 0]).pvalue) if table.shape[1] > 1 else 1.0
        on_both = float((table > 0).all(axis=0).mean())
        close = 1 - abs(held_out.mean() - share)
        score = on_both + min(p, _ALIKE) + close
        if best is None or score > best[0]:
            best = score, held_out
        if p >= _ALIKE and on_both == 1 and close > 0.95:
            break
    assert best is not None
    return best[1]
