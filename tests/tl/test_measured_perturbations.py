"""Perturbation screens: fitted, predicted and judged."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scbin
from scbin import ScbinInputError, ScbinInputWarning
from scbin.get import read_screen
from scbin.tl._predict_perturbations import far_from_measured
from scbin.tl._responses import MEAN, smoother, targets_of

pytestmark = pytest.mark.filterwarnings("ignore:.*resemble those of no measured target")
ENTRIES = ("scbin_perturbations", "scbin_perturbations_predicted", "scbin_perturbations_evaluated")


def screen(**options):
    return scbin.datasets.perturbseq(
        **{"n_perturbations": 20, "n_cells": 1500, "n_genes": 120, "n_modules": 3} | options
    )


@pytest.fixture(scope="module")
def fitted():
    adata = screen(n_cells=2500, n_pairs=10, seed=1)
    scbin.tl.fit_perturbations(adata, batch_key="batch")
    scbin.tl.evaluate_perturbations(adata)
    return adata


# ---- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "targets"),
    [
        ("control", ()),
        ("NTg7", ("NT",)),
        ("A", ("A",)),
        ("B+A", ("A", "B")),
        ("A_B", ("A", "B")),
        ("A + control", ("A",)),
        ("A+ctrl", ("A",)),
        ("A_NegCtrl0", ("A",)),
        ("A-2", ("A",)),
        ("A_sg1", ("A",)),
        ("IFNGR2g3", ("IFNGR2",)),
        ("A-1 || B-2", ("A", "B")),
        ("A;B", ("A", "B")),
        ("A+A", ("A",)),
        ("NKX2-1", ("NKX2-1",)),  # a gene, not guide 1 of NKX2
        ("HLA_X", ("HLA_X",)),  # neither is known
        ("Atg5", ("Atg5",)),
        ("non-targeting+A", ("A",)),
    ],
)
def test_labels(label, targets):
    assert targets_of([label], "control", ["A", "B"])[label] == targets


def test_guides_of_the_control_are_controls():
    assert targets_of(["NTg7", "NT_1", "NT"], "NT", ["A"]) == {"NTg7": (), "NT_1": (), "NT": ()}


# ---- fitting -----------------------------------------------------------------------------------------------------------


def test_table_says_what_reproduces(fitted):
    table = scbin.get.perturbations_df(fitted).set_index("perturbation")
    assert len(table) == 30 and (table["status"] == "measured").all()
    truth = fitted.uns["perturbseq"]
    others = np.where(truth["log_change"] < -1, 0, truth["log_change"])  # not the target itself
    size = pd.Series(np.linalg.norm(others, axis=1), index=truth["names"]).reindex(table.index)
    assert table["reproducible"].sum() > 10 and size[table["reproducible"]].min() > 0
    assert (table.loc[table["n_targets"] == 1, "own_change"] < 0).mean() > 0.9


def test_own_gene_does_not_make_a_change_reproducible():
    adata = screen(effect=0.0)
    scbin.tl.fit_perturbations(adata, batch_key="batch")
    scbin.tl.evaluate_perturbations(adata)
    assert scbin.get.perturbations_df(adata)["reproducible"].sum() == 0
    assert (
        scbin.get.perturbations_df(adata, "evaluated")
        .attrs["verdict"]
        .startswith("Nothing is reproducible: none of 20")
    )
    with pytest.raises(ScbinInputError, match="P02"):
        scbin.pl.perturbation_scores(adata)


def test_an_abundant_target_does_not_move_all_other_genes():
    """Nothing but the target changes, a third of all counts: the others only seem to go up at equal depth."""
    adata, rng = screen(effect=0.0), np.random.default_rng(0)
    counts, hit = adata.X.toarray(), (adata.obs["perturbation"] == "GENE3").to_numpy()
    counts[:, 3] = rng.poisson(np.where(hit, 0.1, 0.5) * counts.sum(axis=1))
    adata.X = counts
    scbin.tl.fit_perturbations(adata, batch_key="batch")
    table = scbin.get.perturbations_df(adata).set_index("perturbation")
    assert table.loc["GENE3", "own_change"] < -1 and table.loc["GENE3", "fdr"] > 0.05


def test_donors_are_the_replicates():
    adata = screen(n_cells=3000)
    scbin.tl.fit_perturbations(adata, donor_key="donor", batch_key="batch")
    scbin.tl.evaluate_perturbations(adata)
    table = scbin.get.perturbations_df(adata)
    assert table["reproducible"].any()
    with pytest.raises(ScbinInputError, match=r"P02.*one donor"):
        scbin.tl.fit_perturbations(adata[adata.obs["donor"] == "donor0"].copy(), donor_key="donor")


def test_totals_and_logs(fitted):
    """Counts of some genes with the totals of all give what log1p values of all genes give."""
    part = fitted[:, :60].copy()
    part.obs["total"] = np.asarray(fitted.X.sum(axis=1)).ravel()
    scbin.tl.fit_perturbations(part, batch_key="batch", total_key="total")
    np.testing.assert_allclose(part.uns[ENTRIES[0]]["change"], fitted.uns[ENTRIES[0]]["change"][:, :60], atol=1e-5)
    logs = fitted.copy()
    total = np.asarray(logs.X.sum(axis=1))
    logs.layers["logs"] = logs.X.multiply(np.median(total) / total).log1p().tocsr()
    scbin.tl.fit_perturbations(logs, batch_key="batch", layer="logs")
    # equal to the median depth of all genes, not of those that are no target of the cell
    np.testing.assert_allclose(logs.uns[ENTRIES[0]]["change"], fitted.uns[ENTRIES[0]]["change"], atol=2e-3)
    with pytest.raises(ScbinInputError, match=r"A03.*log1p"):
        scbin.tl.predict_perturbations(logs, None, ["GENE1"], n_cells=2)


def test_what_cannot_be_learned_from_is_set_aside():
    adata = screen(n_pairs=2)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    labels[np.flatnonzero(labels == "GENE3")[1:]] = "control"
    pair = next(label for label in labels if "+" in label)
    labels[labels == pair.split("+")[0]] = "control"
    adata.obs["perturbation"] = labels
    with pytest.warns(ScbinInputWarning, match=r"P02.*too few cells.*|P02.*singles not measured"):
        scbin.tl.fit_perturbations(adata)
    status = scbin.get.perturbations_df(adata).set_index("perturbation")["status"]
    assert status["GENE3"] == "too few cells" and status[pair] == "singles not measured"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"control": "scramble"}, "A06.*'scramble'.*'control'"),
        ({"key": "guides"}, "A06.*'guides'"),
        ({"min_cells": 10_000}, "P02.*fewer than 3"),
        ({"features": "gpt"}, "A01.*varm"),
        ({"features": pd.DataFrame({"a": ["x"]}, index=["GENE1"])}, "A02.*numbers"),
        ({"total_key": "batch"}, "I05"),
        ({"min_cells": 1}, "A02"),
    ],
)
def test_refused(options, text):
    adata = screen(n_cells=500)
    with pytest.raises(ScbinInputError, match=text):
        scbin.tl.fit_perturbations(adata, **options)
    assert not set(adata.uns) & set(ENTRIES)


def test_a_batch_without_controls_is_left_out():
    adata = screen()
    rest = adata[~((adata.obs["batch"] == "batch0") & (adata.obs["perturbation"] == "control"))].copy()
    with pytest.warns(ScbinInputWarning, match=r"P02.*left out"):
        scbin.tl.fit_perturbations(rest, batch_key="batch")
    assert scbin.get.perturbations_df(rest)["n_cells"].sum() < (adata.obs["perturbation"] != "control").sum()


def test_vectors_of_a_model_and_targets_that_are_no_genes(trained):
    _, model = trained
    adata = screen(n_cells=800)
    adata.var_names = [f"GENE{k}" if k < 30 else f"OTHER{k}" for k in range(120)]
    scbin.tl.fit_perturbations(adata, model, batch_key="batch")
    entry = adata.uns[ENTRIES[0]]
    known = np.isfinite(entry["features"]["model"]).all(axis=1)
    assert set(entry["feature_names"][known]) == set(model.vocabulary.genes)
    scbin.tl.predict_perturbations(adata, model, ["GENE35"])  # no gene of adata, but one of the model
    assert len(scbin.get.perturbations_df(adata, "predicted")) == 120
    scbin.tl.fit_perturbations(adata, batch_key="batch")
    with pytest.raises(ScbinInputError, match="A03.*not fitted with this model"):
        scbin.tl.predict_perturbations(adata, model, ["GENE2"])


# ---- predicting --------------------------------------------------------------------------------------------------------


def test_measured_are_shrunk_and_others_predicted(fitted):
    asked = ["GENE1", "GENE50", "GENE2+GENE60", "GENE60_sg2"]
    scbin.tl.predict_perturbations(fitted, None, asked)
    table = scbin.get.perturbations_df(fitted, "predicted")
    assert list(dict.fromkeys(table["perturbation"])) == ["GENE1", "GENE50", "GENE2+GENE60", "GENE60"]
    assert dict(zip(table["perturbation"], table["kind"], strict=True))["GENE1"] == "measured"
    assert (table["low"] <= table["change"]).all() and (table["change"] <= table["high"]).all()
    own = table[table["gene"] == table["perturbation"]].set_index("gene")["change"]
    assert (own < 0).all()
    row = table[table["perturbation"] == "GENE1"]["change"].to_numpy()
    names = list(fitted.uns[ENTRIES[0]]["table"]["perturbation"])
    assert np.corrcoef(row, fitted.uns[ENTRIES[0]]["change"][names.index("GENE1")])[0, 1] > 0.8


def test_a_prediction_does_not_depend_on_what_else_is_asked(fitted):
    def change(asked):
        scbin.tl.predict_perturbations(fitted, None, asked)
        table = scbin.get.perturbations_df(fitted, "predicted")
        return table[table["perturbation"] == asked[0]]["change"].to_numpy()

    np.testing.assert_allclose(change(["GENE50"]), change(["GENE50", "GENE1", "GENE4+GENE77"]), atol=1e-9)


def test_predicted_cells_have_the_predicted_change(fitted):
    made = scbin.tl.predict_perturbations(fitted, None, ["GENE1", "GENE50"], n_cells=400, seed=3)
    assert made.n_obs == 800 and made.obs["scbin_generated"].all() and made.obs_names[0] == "predicted_0"
    assert (made.X.data == np.rint(made.X.data)).all()
    table = scbin.get.perturbations_df(fitted, "predicted")
    control = fitted[fitted.obs["perturbation"] == "control"]
    middle = np.median(np.asarray(fitted.X.sum(axis=1)))
    means = [
        np.log1p(part.X.toarray() * middle / np.asarray(part.X.sum(axis=1))).mean(axis=0)
        for part in (control, made[made.obs["perturbation"] == "GENE1"])
    ]
    expected = table[table["perturbation"] == "GENE1"]["change"].to_numpy()
    assert np.corrcoef(means[1] - means[0], expected)[0, 1] > 0.7
    again = scbin.tl.predict_perturbations(fitted, None, ["GENE1", "GENE50"], n_cells=400, seed=3)
    assert (again.X != made.X).nnz == 0


def test_intervals_hold_what_they_promise():
    adata = screen(n_perturbations=30, n_cells=3000, n_genes=150, seed=2)
    scbin.tl.fit_perturbations(adata, batch_key="batch")
    measured = adata.uns[ENTRIES[0]]["change"]
    names, held = list(adata.uns[ENTRIES[0]]["table"]["perturbation"]), []
    for name in names[:8]:
        rest = adata[adata.obs["perturbation"] != name].copy()
        scbin.tl.fit_perturbations(rest, batch_key="batch")
        scbin.tl.predict_perturbations(rest, None, [name], interval=0.8)
        table, truth = scbin.get.perturbations_df(rest, "predicted"), measured[names.index(name)]
        held.append(((table["low"] <= truth) & (truth <= table["high"])).mean())
    assert 0.65 < np.mean(held) < 0.95


def test_user_features_predict_targets_that_are_no_genes():
    adata = screen(n_perturbations=30, n_cells=4000)
    module = adata.var["module"].to_numpy()
    table = pd.DataFrame(np.eye(3)[module[:30]], index=adata.var_names[:30])
    rest = adata[:, 30:].copy()  # no target is a gene
    scbin.tl.fit_perturbations(rest, batch_key="batch")
    with pytest.raises(ScbinInputError, match=r"A06.*'GENEX'.*features="):
        scbin.tl.predict_perturbations(rest, None, ["GENEX"])
    scbin.tl.evaluate_perturbations(rest)
    assert scbin.get.perturbations_df(rest, "evaluated").attrs["verdict"].startswith("No better")
    table.loc["GENEX"] = table.loc["GENE0"]
    scbin.tl.fit_perturbations(rest, batch_key="batch", features=table)
    scbin.tl.evaluate_perturbations(rest)
    assert scbin.get.perturbations_df(rest, "evaluated").attrs["verdict"].startswith("Better")
    scbin.tl.predict_perturbations(rest, None, ["GENEX"])


def test_a_target_unlike_all_measured_ones_is_warned_of():
    """No target of a module is measured: its genes are warned of, those of the other modules usually are not."""
    adata = screen(n_perturbations=30, n_cells=3000, n_genes=150)
    module = adata.var["module"].to_numpy()
    lost = [f"GENE{k}" for k in range(30) if module[k] == 0]
    rest = adata[~adata.obs["perturbation"].isin(lost)].copy()
    scbin.tl.fit_perturbations(rest, batch_key="batch")
    with pytest.warns(ScbinInputWarning, match=r"P02.*resemble those of no measured target"):
        scbin.tl.predict_perturbations(rest, None, lost)
    known = read_screen(rest)
    near = [f"GENE{k}" for k in range(30, 150) if module[k] > 0]
    assert len(far_from_measured(known, lost)) > 0.6 * len(lost)
    assert len(far_from_measured(known, near)) < 0.3 * len(near)
    assert far_from_measured(known, list(known.table["perturbation"])) == []


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ([], "A02"),
        (["control"], "A02.*0 targets"),
        (["GENE1+GENE2+GENE3"], "A02.*3 targets"),
        (["NONE+GENE1"], "A06.*'NONE'"),
    ],
)
def test_predictions_refused(fitted, asked, text):
    with pytest.raises(ScbinInputError, match=text):
        scbin.tl.predict_perturbations(fitted, None, asked)


# ---- judging -----------------------------------------------------------------------------------------------------------


def test_modules_are_found_and_the_verdict_says_so(fitted):
    table = scbin.get.perturbations_df(fitted, "evaluated", reproducible=True)
    means = table[table["n_targets"] == 1].groupby("method")["pearson"].mean()
    assert means["scbin"] > means["mean of others"] + 0.2 and means["no change"] == 0
    verdict = scbin.get.perturbations_df(fitted, "evaluated").attrs["verdict"]
    assert verdict.startswith("Better than the mean of the others") and "Pairs:" in verdict
    pairs = set(table[table["n_targets"] == 2]["method"])
    assert {"additive", "matching mean", "scbin"} <= pairs and "nearest neighbours" not in pairs
    assert (table[table["method"] == "no change"]["relative_mse"] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("rule", [MEAN, ("nearby", 0.2), ("ridge", 0.3)])
def test_what_is_left_out_has_no_weight_in_its_own_prediction(rule):
    rows, every = np.random.default_rng(0).normal(size=(8, 5)), np.arange(8)
    kernel = rows @ rows.T
    weights = smoother(kernel, rule, every, every)
    for i in every:
        others = np.delete(every, i)
        np.testing.assert_allclose(weights[i, others], smoother(kernel, rule, others, every[i : i + 1])[0], atol=1e-10)
    assert (np.diag(weights) == 0).all()


def test_synergy_is_learned_from_other_pairs():
    adata = screen(n_cells=6000, n_pairs=50, seed=3)
    scbin.tl.fit_perturbations(adata, batch_key="batch")
    scbin.tl.evaluate_perturbations(adata)
    table = scbin.get.perturbations_df(adata, "evaluated", reproducible=True)
    error = table[table["n_targets"] == 2].groupby("method")["relative_mse"].mean()
    assert error["scbin"] < 0.7 * error["additive"]


def test_effects_that_no_feature_predicts_are_no_better_than_the_mean():
    better = 0
    for seed in range(4):
        adata = screen(n_perturbations=25, n_cells=2000, known_modules=False, n_modules=6, seed=seed)
        scbin.tl.fit_perturbations(adata, batch_key="batch")
        scbin.tl.evaluate_perturbations(adata)
        better += scbin.get.perturbations_df(adata, "evaluated").attrs["verdict"].startswith("Better")
    assert better <= 1


def test_a_given_split(fitted):
    adata = fitted.copy()
    names = [f"GENE{k}" for k in range(20)]
    scbin.tl.evaluate_perturbations(adata, split={"train": names[:15], "test": names[15:]})
    table = scbin.get.perturbations_df(adata, "evaluated")
    assert set(table[table["method"] == "scbin"]["perturbation"]) == set(names[15:])
    for split, text in (
        ({"train": names[:15], "test": names[14:]}, "L03.*'GENE14'"),
        ({"train": names[:15], "test": ["GENE99"]}, "A06.*'GENE99'"),
        ({"train": names[:2], "test": names[3:]}, "P02"),
        ({"train": names}, "A02"),
    ):
        with pytest.raises(ScbinInputError, match=text):
            scbin.tl.evaluate_perturbations(adata, split=split)


def test_a_left_out_perturbation_does_not_leak(fitted):
    """What is predicted for a perturbation does not change with its own cells."""
    adata = fitted[~fitted.obs["perturbation"].astype(str).str.contains("+", regex=False)].copy()
    scbin.tl.fit_perturbations(adata, batch_key="batch")
    scbin.tl.evaluate_perturbations(adata)
    other = adata.copy()
    rows = np.flatnonzero(other.obs["perturbation"] == "GENE1")
    counts = other.X.tolil()
    counts[rows] = counts[rows][:, ::-1]
    other.X = counts.tocsr()
    for key in ENTRIES:
        other.uns.pop(key, None)
    scbin.tl.fit_perturbations(other, batch_key="batch")
    scbin.tl.evaluate_perturbations(other)
    at = list(adata.uns[ENTRIES[2]]["names"]).index("GENE1")
    a, b = (x.uns[ENTRIES[2]]["predicted"][at] for x in (adata, other))
    assert np.corrcoef(a, b)[0, 1] > 0.98  # totals, and so the common scale, move a little


def test_cells_that_are_not_those_of_the_fit(fitted):
    for other in (fitted[:, :50].copy(), fitted[:, ::-1].copy()):
        with pytest.raises(ScbinInputError, match="A03.*genes are not those of the fit"):
            scbin.tl.evaluate_perturbations(other)
        with pytest.raises(ScbinInputError, match="A03.*genes are not those of the fit"):
            scbin.tl.predict_perturbations(other, None, ["GENE1"], n_cells=5)
    with pytest.raises(ScbinInputError, match=r"A06.*fit_perturbations"):
        scbin.tl.evaluate_perturbations(screen())


# ---- storing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_results_survive_files(fitted, tmp_path, kind):
    adata = fitted.copy()
    scbin.tl.predict_perturbations(adata, None, ["GENE1", "GENE2+GENE50"])
    path = tmp_path / f"screen.{kind}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr and anndata remark on formats to come
        getattr(adata, f"write_{kind}")(path)
        back = getattr(ad, f"read_{kind}")(path)
    for what in ("measured", "predicted", "evaluated"):
        pd.testing.assert_frame_equal(
            *(scbin.get.perturbations_df(x, what) for x in (adata, back)), check_dtype=False, check_categorical=False
        )
    scbin.tl.predict_perturbations(back, None, ["GENE1", "GENE2+GENE50"])
    scbin.pl.perturbation_response(back, "GENE1")
    assert json.loads(back.uns[ENTRIES[2]]["params"])["verdict"]


def test_copy_leaves_the_cells_as_they_are():
    adata = screen(n_cells=800)
    keys = set(adata.uns)
    one = scbin.tl.fit_perturbations(adata, copy=True)
    two = scbin.tl.evaluate_perturbations(one, copy=True)
    three = scbin.tl.predict_perturbations(one, None, ["GENE50"], copy=True)
    assert set(adata.uns) == keys and ENTRIES[2] not in one.uns and ENTRIES[1] not in one.uns
    assert ENTRIES[2] in two.uns and ENTRIES[1] in three.uns
    with pytest.raises(ScbinInputError, match="A03"):
        scbin.tl.predict_perturbations(one, None, ["GENE50"], copy=True, n_cells=3)


def test_negative_control_has_nothing_reproducible(shared):
    adata = ad.read_h5ad(shared / "data" / "mcfaline_gbm_crispri_500g.h5ad")
    scbin.tl.fit_perturbations(adata, batch_key="cell_type", total_key="total_counts_full")
    scbin.tl.evaluate_perturbations(adata)
    assert scbin.get.perturbations_df(adata, "evaluated").attrs["verdict"].startswith("Nothing is reproducible")


def test_a_cell_per_guide_is_refused(shared):
    adata = ad.read_h5ad(shared / "data" / "marson_cd4_crispri_500.h5ad")
    with pytest.raises(ScbinInputError, match="P02.*fewer than 3 perturbations"):
        scbin.tl.fit_perturbations(adata)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"effect": 0.0}, {"known_modules": False}])
def test_verdict_is_calibrated(kind):
    better = 0
    for seed in range(100):
        adata = scbin.datasets.perturbseq(30, 2500, 300, seed=seed, **kind)
        scbin.tl.fit_perturbations(adata, batch_key="batch")
        scbin.tl.evaluate_perturbations(adata)
        better += scbin.get.perturbations_df(adata, "evaluated").attrs["verdict"].startswith("Better")
    assert better <= 5
