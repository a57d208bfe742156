from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scbin
from scbin._errors import ScbinInputError
from scbin.tl._perturb_compare import mixture, vs_null


@pytest.fixture
def shifted(toy):
    """The toy cells with shifts of 30 of the 40 genes in 50 of the 60 cells; the first five genes move cells far."""
    rng = np.random.default_rng(0)
    values = np.abs(rng.normal(0.02, 0.002, size=(60, 40)))
    values[:, :5] += 0.1
    stored = np.zeros((60, 40), dtype=bool)
    stored[:50, :30] = True
    rows, columns = np.nonzero(stored)
    toy.layers["scbin_shift"] = sparse.csr_matrix((values[stored].astype(np.float32), (rows, columns)), shape=(60, 40))
    table = pd.DataFrame({"gene": [f"GENE{i}" for i in range(30)], "shift": 0.0, "exact": np.arange(30) % 2 == 0})
    toy.uns["scbin_perturb"] = {"table": table, "params": json.dumps({"mode": "delete"})}
    toy.obs["donor"] = [f"d{i % 5}" for i in range(60)]
    return toy


def test_matched_with_donors_afterwards(shifted):
    before = shifted.copy()
    scbin.tl.perturb_statistics(shifted, donor_key="donor", groupby="cell_type", group="B cell")
    table = scbin.get.perturb_df(shifted, key="scbin_perturb_matched")
    assert (table["replicates"] == "donors").all() and (table["n_donors"] == 5).all() and (table["n_cells"] == 17).all()
    assert set(table["gene"][:5]) == {f"GENE{i}" for i in range(5)}
    exact = before.uns["scbin_perturb"]["table"].set_index("gene")["exact"]
    assert table["exact"].tolist() == exact.loc[table["gene"]].tolist()
    pd.testing.assert_frame_equal(shifted.uns["scbin_perturb"]["table"], before.uns["scbin_perturb"]["table"])
    copy = scbin.tl.perturb_statistics(before, null=[f"GENE{i}" for i in range(10, 20)], copy=True)
    assert "scbin_perturb_matched" not in before.uns
    assert set(copy.uns["scbin_perturb_matched"]["table"]["n_null"]) == {9, 10}


def test_mixture_and_vs_null_are_those_of_the_arrays(shifted, tmp_path):
    shifts = shifted.layers["scbin_shift"][:, :30]
    names = shifted.var_names[:30]
    scbin.tl.perturb_statistics(shifted, statistic="mixture")
    found = scbin.get.perturb_df(shifted, key="scbin_perturb_mixture", sort_by=None)
    pd.testing.assert_frame_equal(found, mixture(shifts[:50], names=names))
    assert found["impact"].tolist() == [True] * 5 + [False] * 25
    scbin.tl.perturb_statistics(shifted, statistic="vs_null", groupby="cell_type", group="B cell", null_group="T cell")
    found = scbin.get.perturb_df(shifted, key="scbin_perturb_vs_null", sort_by=None)
    labels = shifted.obs["cell_type"].astype(str).to_numpy()[:50]
    parts = [shifts[np.flatnonzero(labels == name)] for name in ("B cell", "T cell")]
    pd.testing.assert_frame_equal(found, vs_null(*parts, names=names))
    assert "Impact_component" in scbin.get.perturb_df(shifted, key="scbin_perturb_mixture", style="geneformer")
    assert "Test_vs_null_FDR" in scbin.get.perturb_df(shifted, key="scbin_perturb_vs_null", style="geneformer")
    shifted.write_h5ad(tmp_path / "a.h5ad")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param({"statistic": "vs_null"}, "P77", id="no_group"),
        pytest.param({"groupby": "cell_type"}, "P77", id="half"),
        pytest.param({"groupby": "cell_type", "group": "NK"}, "P67", id="empty"),
        pytest.param({"key": "mine"}, "P57", id="no_table"),
        pytest.param({"donor_key": "who"}, "I35", id="no_donors"),
    ],
)
def test_what_cannot_be_asked(shifted, arguments, code):
    before = set(shifted.uns)
    with pytest.raises(ScbinInputError, match=code):
        scbin.tl.perturb_statistics(shifted, **arguments)
    assert set(shifted.uns) == before
    del shifted.layers["scbin_shift"]
    with pytest.raises(ScbinInputError, match="P66"):
        scbin.tl.perturb_statistics(shifted)


def test_pairs_with_an_anchor(shifted):
    single = shifted.layers["scbin_shift"].toarray()[:50]
    both = single[:, 1:4] + single[:, :1] + np.float32([0.0, 0.05, -0.02])
    both += 0.001 * np.random.default_rng(1).normal(size=both.shape).astype(np.float32)
    matrix = np.zeros((60, 40), dtype=np.float32)
    matrix[:50, 1:4] = both
    shifted.layers["both_shift"] = sparse.csr_matrix(matrix)
    params = json.dumps({"mode": "delete", "anchor": ["GENE0"]})
    shifted.uns["both_perturb"] = {"table": pd.DataFrame({"gene": ["x"], "shift": [0.1]}), "params": params}
    scbin.tl.perturb_statistics(shifted, statistic="pairs", anchored="both_perturb", donor_key="donor")
    table = scbin.get.perturb_df(shifted, key="scbin_perturb_pairs", sort_by=None)
    assert table["anchor"].tolist() == ["GENE0"] * 3 and table["gene"].tolist() == ["GENE1", "GENE2", "GENE3"]
    np.testing.assert_allclose(table["combined_minus_sum"], [0.0, 0.05, -0.02], atol=1e-3)
    assert (table["fdr"] < 0.01).tolist() == [False, True, True]
    assert len(scbin.pl.perturbation_matrix(shifted, key="scbin_perturb_pairs").get_xticklabels()) == 3
    with pytest.raises(ScbinInputError, match="P68"):
        scbin.tl.perturb_statistics(shifted, statistic="pairs")
    shifted.uns["both_perturb"]["params"] = json.dumps({"anchor": ["GENE39"]})
    with pytest.raises(ScbinInputError, match=r"P79.*GENE39"):
        scbin.tl.perturb_statistics(shifted, statistic="pairs", anchored="both_perturb")
