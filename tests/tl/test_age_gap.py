from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LinearRegression

import scbin
from scbin._errors import ScbinInputError


@pytest.fixture
def aged():
    """Cells of twelve donors and two types, with predictions that lean towards 50."""
    rng = np.random.default_rng(0)
    donor = np.repeat(np.arange(12), 10)
    age = 20.0 + 5 * donor
    obs = pd.DataFrame(
        {
            "donor": [f"d{d:02}" for d in donor],
            "age": age,
            "sex": np.where(donor % 2, "f", "m"),
            "kind": np.where(np.arange(120) % 2, "T/NK", "B"),
            "scbin_age": 50 + 0.4 * (age - 50) + 3 * (donor % 2) + rng.normal(0, 2, 120),
        },
        index=[f"c{i}" for i in range(120)],
    )
    return ad.AnnData(np.ones((120, 2)), obs=obs)


def test_gaps_are_residuals_of_donor_means(aged):
    table = scbin.tl.age_gap(aged, donor_key="donor", compare="sex")
    means = aged.obs.groupby("donor").agg(age=("age", "first"), predicted=("scbin_age", "mean"))
    line = LinearRegression().fit(means[["age"]], means["predicted"])
    np.testing.assert_allclose(table["corrected_gap"], means["predicted"] - line.predict(means[["age"]]))
    np.testing.assert_allclose(table["gap"], means["predicted"] - means["age"])
    assert table["n_cells"].tolist() == [10] * 12
    assert (
        abs(np.corrcoef(table["truth"], table["corrected_gap"])[0, 1]) < 1e-9 < abs(table["gap"].corr(table["truth"]))
    )
    assert [tick.get_text() for tick in scbin.pl.age_gap(aged).get_xticklabels()] == ["m", "f"]
    by = table.groupby("compare")["corrected_gap"].mean()
    assert 2 < by["f"] - by["m"] < 4


def test_the_line_goes_through_the_reference_in_each_group(aged, tmp_path):
    aged.obs.loc["c5", "scbin_age"] = np.nan
    table = scbin.tl.age_gap(aged, donor_key="donor", groupby="kind", compare="sex", reference="m")
    for kind in ("B", "T/NK"):
        rows = table[table["group"] == kind]
        cells = aged.obs[aged.obs["kind"] == kind].dropna()
        means = cells.groupby("donor").agg(age=("age", "first"), predicted=("scbin_age", "mean"), sex=("sex", "first"))
        line = LinearRegression().fit(
            means.loc[means["sex"] == "m", ["age"]], means.loc[means["sex"] == "m", "predicted"]
        )
        np.testing.assert_allclose(rows["expected"], line.predict(means[["age"]]))
    few = aged[(aged.obs["kind"] == "B") | (aged.obs["age"] < 30)].copy()
    lines = scbin.tl.age_gap(few, donor_key="donor", groupby="kind").groupby("group")["corrected_gap"].count()
    assert lines.to_dict() == {"B": 12, "T/NK": 0} and len(scbin.pl.age_gap(few).get_xticklabels()) == 1
    assert scbin.pl.clock(aged).get_xlabel() == "true age of the donor"
    ax = scbin.pl.age_gap(aged)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["B", "T/NK"]
    assert [text.get_text() for text in ax.get_legend().texts] == ["m", "f"]
    aged.write_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(
        ad.read_h5ad(tmp_path / "a.h5ad").uns["scbin"]["age_gap"].reset_index(drop=True), table, check_dtype=False
    )


def test_what_is_refused(aged):
    with pytest.raises(ScbinInputError, match="A06"):
        scbin.tl.age_gap(aged, donor_key="donor", reference="m")
    with pytest.raises(ScbinInputError, match="A06"):
        scbin.pl.clock(aged)
    with pytest.raises(ScbinInputError, match="P02"):
        scbin.tl.age_gap(aged[:25].copy(), donor_key="donor")
    assert "scbin" not in aged.uns
    aged.obs.loc["c1", "age"] = 77.0
    assert scbin.tl.age_gap(aged, donor_key="donor")["donor"].tolist()[:3] == ["d00", "d00", "d01"]
    aged.obs["scbin_age"] = pd.Categorical(np.where(aged.obs["age"] < 40, "<40", ">40"))
    with pytest.raises(ScbinInputError, match="A03.*number"):
        scbin.tl.age_gap(aged, donor_key="donor")
