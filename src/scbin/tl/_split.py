"""`tl.split`: which cells are trained on and which are tested on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin import _docs, _keys
from scbin._adata import check_adata, check_writable, copied, read_obs, write, write_uns
from scbin._arguments import checked
from scbin._errors import ScbinInputError, count
from scbin.tl._labels import Split, folds_of, hold_out, named_parts, read_donors, warn_of_donors
from scbin.tokens.phenotypes import labels_of

if TYPE_CHECKING:
    from anndata import AnnData

_WITHOUT = "Pass validation=0 to do without validation cells (training then cannot stop early)"


@_docs.shared
@checked
def split(
    adata: AnnData,
    *,
    target: str | None = None,
    split_key: str | None = None,
    test: float = 0.2,
    validation: float = 0.1,
    n_folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Divide the cells into those to train on, to validate on and to test on.

    Cells of one donor are more similar than cells of two, so a model that is tested on donors it has seen looks better than it
    is: pass `split_key` with the column that names the donors (or batches), and each is in one part alone.
    :func:`scbin.tl.finetune` learns from the training cells, and :func:`scbin.tl.evaluate` scores the test cells.

    Parameters
    ----------
    {adata}
    target
        Column of `obs` whose classes shall be in all parts in similar fractions.
    split_key
        Column of `obs` with donors or batches. It is remembered: :func:`scbin.tl.finetune` and :func:`scbin.tl.search` then keep
        them apart in all that they divide further.
    test
        Fraction of the cells, or of the donors, to test on; with folds it is one over their number.
    validation
        Fraction to validate on.
    n_folds
        Make so many folds and test on the one called `fold`: as many calls give a cross-validation.
    fold
        Which fold is tested on, from 0.
    {seed}
    {copy}

    Returns
    -------
    {returns_copy}

    `adata.obs["scbin_split"]`
        `"train"`, `"validation"` or `"test"`.
    `adata.uns["scbin"]["split"]`
        How it was made, as JSON.

    Raises
    ------
    ScbinInputError
        If a class has a single cell, there are fewer donors than parts (two will do with `validation=0`), or a fraction is out
        of range.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()
    >>> scbin.tl.split(adata, target="louvain", test=0.25)
    >>> int(adata.obs["scbin_split"].value_counts()["test"])
    175
    """
    check_adata(adata)
    if n_folds is not None and not (2 <= n_folds <= adata.n_obs and 0 <= fold < n_folds):
        raise ScbinInputError("A02", f"n_folds={n_folds} and fold={fold}: folds are two or more, counted from 0.")
    fraction = test if n_folds is None else 1 / n_folds
    if not (0 <= validation and 0 < fraction and validation + fraction < 1):
        raise ScbinInputError(
            "A02", f"test={fraction:.3g} and validation={validation} leave nothing to train on, or to test on."
        )
    check_writable(adata, "obs", _keys.SPLIT)
    classes = np.zeros(adata.n_obs, dtype=np.int64)
    if target is not None:
        classes = pd.factorize(labels_of(read_obs(adata, target), target), use_na_sentinel=True)[0].astype(np.int64)
    donors = None if split_key is None else _donors(adata, split_key, n_folds, validation)
    single = np.flatnonzero(np.bincount(classes[classes >= 0]) == 1)
    if target is not None and donors is None and len(single):
        name = str(adata.obs[target].iloc[int(np.flatnonzero(classes == single[0])[0])])
        raise ScbinInputError(
            "L02",
            f"{name!r} of {target!r} has one cell; a class needs 2 or more. Leave it out, join classes, or leave out target=.",
        )
    if n_folds is None:
        tested = hold_out(classes, test, donors=donors, seed=seed)
    else:
        tested = folds_of(classes, n_folds, donors=donors, seed=seed) == fold
    rest, held_out = np.flatnonzero(~tested), np.zeros(adata.n_obs, dtype=bool)
    own = None if donors is None else donors[rest]
    held_out[rest[hold_out(classes[rest], validation / (1 - tested.mean()), donors=own, seed=seed + 1)]] = True
    if own is not None and validation and not held_out.any():
        raise ScbinInputError(
            "L03",
            f"testing takes all {split_key!r} but {str(own[0])!r}; none is left to validate on. {_WITHOUT}, or try another seed.",
        )
    parts = Split(~tested & ~held_out, held_out, tested, donors)
    warn_of_donors(adata, parts, split_key)
    adata = copied(adata) if copy else adata
    write(adata, "obs", _keys.SPLIT, parts.column())
    made = {"target": target, "split_key": split_key, "test": test, "validation": validation, "n_folds": n_folds}
    write_uns(adata, _keys.SPLIT_RECORD, json.dumps({**made, "fold": fold, "seed": seed}))
    return adata if copy else None


def _donors(adata: AnnData, split_key: str, n_folds: int | None, validation: float) -> np.ndarray:
    """Return the donor of each cell, where there are enough of them."""
    if named_parts(read_obs(adata, split_key), split_key) is not None:
        raise ScbinInputError(
            "L03",
            f"adata.obs[{split_key!r}] is a split already, not donors or batches. Pass it to scbin.tl.finetune and "
            "scbin.tl.evaluate as split_key, or name the column of the donors here.",
        )
    donors = read_donors(adata, split_key)
    n, needed = len(set(donors)), max(n_folds or 2, 3 if validation else 2)
    if n < needed:
        advice = "Use fewer folds" if n_folds is not None and n_folds > n else "Name another column"
        advice = _WITHOUT if n == 2 == (n_folds or 2) else advice
        raise ScbinInputError(
            "L03", f"{split_key!r} has {count(n, 'value')}; they cannot be divided into {needed} parts. {advice}."
        )
    return donors
