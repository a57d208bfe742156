from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import issparse

import scbin


def test_screen_as_promised():
    adata = scbin.datasets.perturbseq(6, 600, 50, n_pairs=3, seed=1)
    assert adata.shape == (600, 50) and issparse(adata.X) and (adata.X.data == np.rint(adata.X.data)).all()
    assert adata.obs["perturbation"].nunique() == 10 and (adata.obs["perturbation"] == "control").sum() == 100
    assert (adata.var["module"][:6] >= 0).all()
    again = scbin.datasets.perturbseq(6, 600, 50, n_pairs=3, seed=1)
    assert (again.X != adata.X).nnz == 0 and again.obs.equals(adata.obs)


def test_planted_changes():
    truth = scbin.datasets.perturbseq(6, 600, 50, effect=0.0, seed=1).uns["perturbseq"]
    own = np.eye(6, 50, dtype=bool)
    assert (truth["log_change"][own] < -1).all() and (truth["log_change"][~own] == 0).all()
    changes = []
    for synergy in (0.0, 1.0):
        truth = scbin.datasets.perturbseq(6, 600, 50, n_pairs=3, synergy=synergy, efficiency=1.0, seed=1).uns[
            "perturbseq"
        ]
        names, change = list(truth["names"]), truth["log_change"]
        a, b = names[6].split("+")
        others = ~np.isin(np.arange(50), [names.index(a), names.index(b)])
        changes.append((change[6] - change[names.index(a)] - change[names.index(b)])[others])
    assert np.abs(changes[0]).max() < 0.5 < np.abs(changes[1]).max()


@pytest.mark.parametrize("wrong", [{"n_genes": 3}, {"n_cells": 20}, {"n_pairs": 99}, {"seed": -1}])
def test_refused(wrong):
    with pytest.raises(scbin.ScbinInputError, match="A02"):
        scbin.datasets.perturbseq(**{"n_perturbations": 6, "n_cells": 600, "n_genes": 50} | wrong)
