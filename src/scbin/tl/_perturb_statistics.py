"""`tl.perturb_statistics`: other questions to shifts that were computed already."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from scipy import sparse

from scbin import _keys
from scbin._anndata import check_adata, check_writable, copied, read_obs, write_entry
from scbin._arguments import choices, flags, numbers, texts, whole_numbers
from scbin._errors import ScbinInputError
from scbin.get._perturb import read_perturbation
from scbin.tl._expression import log_normalised
from scbin.tl._perturb_compare import mixture, pair_statistics, vs_null
from scbin.tl._perturb_stats import gene_statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData

Statistic = Literal["matched", "mixture", "vs_null", "pairs"]


def perturb_statistics(
    adata: AnnData,
    *,
    statistic: Statistic = "matched",
    groupby: str | None = None,
    group: str | None = None,
    null_group: str | None = None,
    donor_key: str | None = None,
    null: str | Sequence[str] = "matched",
    anchored: str | None = None,
    level: float = 0.95,
    key: str | None = None,
    key_added: str | None = None,
    seed: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Make statistics again from the shifts of a perturbation, without the model: other donors, cells, null genes, or a mixture.

    Parameters
    ----------
    adata
        Cells after :func:`scbin.tl.perturb` of single genes, with `layers["scbin_shift"]`.
    statistic
        `"matched"`: each gene against genes of the same expression and detection, or against `null`, as :func:`scbin.tl.perturb`
        does. `"mixture"`: two Gaussians on the genes' mean cosines split those that move cells from those that do not; for
        shifts without a goal. `"vs_null"`: each gene's shifts in the cells of `group` against those in `null_group`.
        `"pairs"`: whether an anchor and another gene together move cells more than the sum of either alone; for this, perturb the
        genes and the anchor one by one, then the genes with `anchor=` and a `key_added=` of its own, and name that in `anchored`.
    groupby, group
        Column of `obs`, and the one group whose cells count. Default: all cells that were perturbed.
    null_group
        The group of null cells for `"vs_null"`. Default: all perturbed cells that are not in `group`.
    donor_key
        Column of `obs` with the donors, who are then the replicates; not for `"mixture"`.
    null
        Names of perturbed genes to compare with, instead of `"matched"` ones.
    anchored
        Entry of `uns` of the perturbation with an anchor, for `"pairs"`.
    level
        Of the confidence intervals.
    key
        Entry of `uns` with the perturbation. Default: `"scbin_perturb"`.
    key_added
        Entry of `uns` to write. Default: that of the perturbation and the statistic, `"scbin_perturb_mixture"`.
    seed
        Of random choices.
    copy
        Return a copy instead of writing into `adata`.

    Returns
    -------
    Returns `None` if `copy=False`, else returns an `AnnData` object. Sets the following fields:

    `adata.uns['scbin_perturb_<statistic>' | key_added]`
        `table` and `params`, for `scbin.get.perturb_df(adata, key=...)`, also under Geneformer's names.

    Raises
    ------
    ScbinInputError
        If there are no shifts, or a group has no perturbed cells.

    Examples
    --------
    >>> import scbin
    >>> adata = scbin.datasets.pbmc68k_reduced()[:60].copy()
    >>> scbin.pp.tokenize(adata)
    >>> model = scbin.tl.pretrain(adata, preset="tiny", max_steps=2, progress=False)
    >>> scbin.tl.perturb(adata, model, genes=["CST3", "NKG7", "LYZ", "CD79A"], mode="overexpress", progress=False)
    >>> scbin.tl.perturb_statistics(adata, statistic="mixture")
    >>> len(scbin.get.perturb_df(adata, key="scbin_perturb_mixture"))
    4
    """
    check_adata(adata)
    choices({"statistic": get_args(Statistic)}, statistic=statistic)
    texts(optional=True, groupby=groupby, group=group, null_group=null_group, donor_key=donor_key, key_added=key_added)
    numbers(level=level)
    whole_numbers(seed=seed)
    flags(copy=copy)
    params = read_perturbation(adata, key)[1]
    shifts, columns = _shifts(adata, key)
    if (statistic == "pairs") != (anchored is not None):
        raise ScbinInputError(
            "P68", "statistic='pairs' needs anchored=, the perturbation with an anchor, and others do not."
        )
    perturbed = np.diff(shifts.indptr) > 0
    cells, null_cells = _cells(adata, perturbed, statistic, groupby, group, null_group)
    donors = None if donor_key is None else read_obs(adata, donor_key).astype(object).to_numpy()
    slot = f"{_keys.PERTURB if key is None else key}_{statistic}" if key_added is None else key_added
    check_writable(adata, "uns", slot)
    names = adata.var_names.to_numpy(dtype=object)[columns]
    if statistic == "matched":
        table: pd.DataFrame = gene_statistics(
            shifts[cells],
            names=names,
            expression=log_normalised(adata, cells=cells)[:, columns],
            donors=None if donors is None else donors[cells],
            null=null,
            exact=_exact(adata, key, names),
            level=level,
            seed=seed,
        )
    elif statistic == "mixture":
        table = mixture(shifts[cells], names=names, seed=seed)
    elif statistic == "pairs":
        table = _pairs(adata, shifts, columns, cells, anchored, donors, level)
    else:
        table = vs_null(
            shifts[cells],
            shifts[null_cells],
            names=names,
            test_donors=None if donors is None else donors[cells],
            null_donors=None if donors is None else donors[null_cells],
        )
    adata = copied(adata) if copy else adata
    asked = {
        "statistic": statistic,
        "groupby": groupby,
        "group": group,
        "null_group": null_group,
        "donor_key": donor_key,
    }
    write_entry(adata, slot, {"table": table, "params": json.dumps({**params, **asked})})
    return adata if copy else None


def _shifts(adata: AnnData, key: str | None) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Shifts of the perturbed genes (cells, perturbed genes), stored zeros kept, and their columns."""
    layer = _keys.of_perturbation(_keys.PERTURB if key is None else key)[0]
    if layer not in adata.layers:
        raise ScbinInputError(
            "P66",
            f"adata.layers has no {layer!r}: there are shifts of each cell only where genes were perturbed one by one. "
            "Run scbin.tl.perturb(adata, model).",
        )
    shifts = sparse.csr_matrix(adata.layers[layer])
    columns = np.unique(shifts.indices)
    return shifts[:, columns], columns


def _pairs(
    adata: AnnData,
    shifts: sparse.csr_matrix,
    columns: np.ndarray,
    cells: np.ndarray,
    anchored: str | None,
    donors: np.ndarray | None,
    level: float,
) -> pd.DataFrame:
    """Each gene with the anchor, against both alone."""
    anchors = read_perturbation(adata, anchored)[1].get("anchor") or []
    combined, partners = _shifts(adata, anchored)
    single = {str(name): i for i, name in enumerate(adata.var_names[columns])}
    missing = [name for name in anchors if name not in single]
    if len(anchors) != 1 or missing:
        raise ScbinInputError(
            "P79",
            f"adata.uns[{anchored!r}] was made with the anchors {anchors}; one is needed, and its shifts alone too: perturb it one by "
            "one with the other genes.",
        )
    names = adata.var_names[partners].astype(str)
    kept = [i for i, name in enumerate(names) if name in single]
    if not kept:
        raise ScbinInputError("P80", "none of the genes with the anchor has been perturbed alone.")
    pairs = [(single[anchors[0]], single[names[i]]) for i in kept]
    return pair_statistics(
        shifts[cells],
        combined[cells][:, kept],
        pairs,
        names=adata.var_names.to_numpy(dtype=object)[columns],
        donors=None if donors is None else donors[cells],
        level=level,
    )


def _cells(
    adata: AnnData,
    perturbed: np.ndarray,
    statistic: str,
    groupby: str | None,
    group: str | None,
    null_group: str | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Perturbed cells that count, and those that are the null."""
    if (groupby is None) != (group is None) or (statistic == "vs_null" and group is None):
        raise ScbinInputError(
            "P77", "groupby= (a column of adata.obs) and group= (one of its values) go together; 'vs_null' needs both."
        )
    if groupby is None or group is None:
        return np.flatnonzero(perturbed), np.empty(0, dtype=np.int64)
    labels = read_obs(adata, groupby).astype(object).map(str).to_numpy()

    def members(name: str) -> Any:
        found = np.flatnonzero(perturbed & (labels == name))
        if not len(found):
            known = ", ".join(repr(value) for value in np.unique(labels[perturbed])[:6])
            raise ScbinInputError(
                "P67", f"no perturbed cell has {name!r} in adata.obs[{groupby!r}]; they have: {known}."
            )
        return found

    cells = members(group)
    rest = np.flatnonzero(perturbed & (labels != group)) if null_group is None else members(null_group)
    if statistic == "vs_null" and not len(rest):
        raise ScbinInputError("P78", f"all perturbed cells are {group!r}: none is left to compare with.")
    return cells, rest


def _exact(adata: AnnData, key: str | None, names: np.ndarray) -> np.ndarray:
    """Which genes the perturbation's own table calls exact."""
    table = read_perturbation(adata, key)[0]
    if not {"gene", "exact"} <= set(table.columns):
        return np.ones(len(names), dtype=bool)
    exact = dict(zip(table["gene"].astype(str), table["exact"].astype(bool), strict=True))
    return np.array([exact.get(str(name), True) for name in names])
