"""Which cells are learned from and which are asked about: `obs["scbin_split"]`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin import _keys
from scbin._anndata import check_adata, check_writable, copied, read_obs, write_obs, write_uns
from scbin._arguments import numbers, plain, texts, whole_numbers
from scbin._errors import ScbinInputError, count
from scbin.data.splitting import folds_of, share_of
from scbin.encoding.phenotypes import labels_of
from scbin.tl._sides import Sides, named_sides, read_groups, warn_of_donors

if TYPE_CHECKING:
    from anndata import AnnData
_WITHOUT_VALIDATION = "Pass validation_share=0 to do without validation cells (training then cannot stop early)"


def split(
    adata: AnnData,
    *,
    target: str | None = None,
    split_key: str | None = None,
    test_share: float = 0.2,
    validation_share: float = 0.1,
    n_folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Divide the cells into those to train on, to validate on and to test on.

    Cells of one donor are more alike than cells of two, so a model that is tested on donors it has seen looks better than it
    is: pass `split_key` with the column that names the donors (or batches), and each stands on one side alone.
    :func:`scbin.tl.finetune` learns from the training cells, and :func:`scbin.tl.evaluate` scores the test cells.

    Parameters
    ----------
    adata
        The cells.
    target
        Column of `obs` whose classes shall stand on all sides in like shares.
    split_key
        Column of `obs` with donors or batches. It is remembered: :func:`scbin.tl.finetune` and :func:`scbin.tl.search` then keep
        them apart in all that they divide further.
    test_share, validation_share
        Shares of the cells, or of the donors' cells; with folds the test share is one over their number.
    n_folds
        Make so many folds and test on the one called `fold`: as many calls give a cross-validation.
    fold
        Which fold is tested on, from 0.
    seed
        Of the draw. Folds of the same seed belong together.
    copy
        Return a copy instead of writing into `adata`.

    Returns
    -------
    Returns `None` if `copy=False`, else returns an `AnnData` object. Sets the following field:

    `adata.obs['scbin_split']`
        `"train"`, `"validation"` or `"test"`.
    `adata.uns['scbin']['split']`
        How it was made, as JSON.

    Raises
    ------
    ScbinInputError
        If a class has a single cell, there are fewer donors than sides (two will do with `validation_share=0`), or a share is
        out of range.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.tl.split(adata, target="bulk_labels", test_share=0.25)
    >>> adata.obs["scbin_split"].value_counts()["test"] in range(160, 190)
    True
    """
    check_adata(adata)
    numbers(test_share=test_share, validation_share=validation_share)
    whole_numbers(seed=seed, fold=fold)
    whole_numbers(optional=True, n_folds=n_folds)
    texts(optional=True, target=target, split_key=split_key)
    check_shares(test_share, validation_share, n_folds, fold, adata.n_obs)
    check_writable(adata, "obs", _keys.SPLIT)
    classes = _codes(adata, target)
    groups = None if split_key is None else _donors(adata, split_key, n_folds, validation_share)
    if groups is None:
        _check_classes(classes, target, adata)
    if n_folds is None:
        test = share_of(classes, test_share, groups=groups, seed=seed)
    else:
        test = folds_of(classes, n_folds, groups=groups, seed=seed) == fold
    rest = np.flatnonzero(~test)
    own = None if groups is None else groups[rest]
    held_out = np.zeros(adata.n_obs, dtype=bool)
    held_out[rest] = share_of(classes[rest], validation_share / (1 - test.mean()), groups=own, seed=seed + 1)
    if groups is not None and validation_share and not held_out.any():
        raise ScbinInputError(
            "F21",
            f"testing takes all {split_key!r} but {str(own[0])!r}, so that none is left to validate on. "  # type: ignore[index]
            f"{_WITHOUT_VALIDATION}, or try another seed.",
        )
    sides = Sides(~test & ~held_out, held_out, test, groups)
    warn_of_donors(adata, sides, split_key)
    adata = copied(adata) if copy else adata
    write_obs(adata, _keys.SPLIT, sides.column())
    made = {"target": target, "split_key": split_key, "test_share": test_share, "validation_share": validation_share}
    made |= {"n_folds": n_folds, "fold": fold, "seed": seed}
    write_uns(adata, _keys.SPLIT_RECORD, json.dumps({name: plain(value) for name, value in made.items()}))
    return adata if copy else None


def check_shares(test_share: float, validation_share: float, n_folds: int | None, fold: int, n_cells: int) -> None:
    """Raise where nothing would be left on a side."""
    if n_folds is not None and not (2 <= n_folds <= n_cells and 0 <= fold < n_folds):
        raise ScbinInputError("F20", f"n_folds={n_folds} and fold={fold}: folds are two or more, counted from 0.")
    test = test_share if n_folds is None else 1 / n_folds
    if not (0 <= validation_share and 0 < test and validation_share + test < 1):
        said = f"test_share={test_share}" if n_folds is None else f"n_folds={n_folds}"
        raise ScbinInputError(
            "F20", f"{said} and validation_share={validation_share} leave nothing to train on, or to test on."
        )


def _donors(adata: AnnData, split_key: str, n_folds: int | None, validation_share: float) -> np.ndarray:
    """Return the donor of each cell, where there are enough of them for the sides."""
    if named_sides(read_obs(adata, split_key), split_key) is not None:
        raise ScbinInputError(
            "F28",
            f"adata.obs[{split_key!r}] is a split already, not donors or batches. Pass it to scbin.tl.finetune and "
            "scbin.tl.evaluate as split_key, or name the column of the donors here.",
        )
    donors = read_groups(adata, split_key)
    n, needed = len(np.unique(donors)), max(n_folds or 2, 3 if validation_share else 2)
    if n < needed:
        advice = "Use fewer folds" if n_folds is not None and n_folds > n else "Name another column"
        if n == 2 == (n_folds or 2):
            advice = _WITHOUT_VALIDATION
        raise ScbinInputError(
            "F21",
            f"{split_key!r} has {count(n, 'value')}; they cannot be divided into {needed} sides. {advice}, or leave split_key "
            "out.",
        )
    return donors


def _codes(adata: AnnData, target: str | None) -> np.ndarray:
    """Return the class of each cell (cells,), -1 where it has none."""
    if target is None:
        return np.zeros(adata.n_obs, dtype=np.int64)
    return pd.factorize(labels_of(read_obs(adata, target), target), use_na_sentinel=True)[0].astype(np.int64)


def _check_classes(classes: np.ndarray, target: str | None, adata: AnnData) -> None:
    counts = np.bincount(classes[classes >= 0])
    single = np.flatnonzero(counts == 1)
    if target is not None and len(single):
        name = str(adata.obs[target].iloc[int(np.flatnonzero(classes == single[0])[0])])
        raise ScbinInputError(
            "F23",
            f"{name!r} of {target!r} has one cell; a class needs 2 to stand on both sides. Leave such cells out, join classes, "
            "or split without target=.",
        )
