from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scbin._errors import ScbinInputError
from scbin.tokens.phenotypes import age_group, age_in_years, age_labels, labels_of, token_ids, values_of
from scbin.tokens.vocabulary import Phenotype


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("34-year-old human stage", 34),
        ("34-year-old stage", 34),
        ("80 year-old and over stage", 80),
        ("under-1-year-old stage", None),
        ("under 1 year old", 1),
        ("under-1-year-old human stage", None),
        ("41", 41),
        ("20-39 years", 29.5),
        ("6-month-old human stage", 0.5),
        ("third decade human stage", 25),
        ("second decade stage", 15),
        ("10th week post-fertilization human stage", 10 / 52),
        ("fifth LMP month human stage", 5 / 12),
        ("eighth LMP month stage", 8 / 12),
        ("2-week-old stage", 2 / 52),
        ("human adult stage", None),
        ("unknown", None),
    ],
)
def test_ages(text: str, years: float | None):
    if text.startswith("under-1"):
        years = 1
    found = age_in_years(text)
    assert found == (None if years is None else pytest.approx(years))


@pytest.mark.parametrize(
    ("years", "width", "group"),
    [(30, 10, "30-40"), (29.99, 10, "20-30"), (9, 10, None), (80, 10, ">=80"), (0.1, 20, "<20"), (59, 20, "40-60"), (None, 10, None)],
)  # fmt: skip
def test_groups_are_closed_below(years, width, group):
    assert age_group(years, width) == group


def test_age_labels_list_what_names_no_age():
    labels = np.array(["35-year-old stage", "adult stage", None, "adult stage"], dtype=object)
    groups, unread = age_labels(labels, 10)
    assert groups.tolist() == ["30-40", None, None, None]
    assert unread == {"adult stage": 2}


def test_values_are_ordered_by_number_then_alphabet():
    assert values_of(np.array(["10", "9", "b", None, "a", "-1.5"], dtype=object)) == ("-1.5", "9", "10", "a", "b")


def test_token_ids():
    phenotype = Phenotype("kind", ("a", "b"), position=1, first_id=6, missing_id=5)
    ids, unseen = token_ids(np.array(["b", None, "c", "a", "c"], dtype=object), phenotype)
    assert ids.tolist() == [7, 5, 5, 6, 5]
    assert unseen == {"c": 2}


def test_what_is_no_label():
    column = pd.Series(["none", "None", "NA", " n/a", "<NA>", "nan", "Unknown", "", None, np.nan, "nano"], dtype=object)
    assert labels_of(column, "x").tolist() == ["none", "None", *[None] * 8, "nano"]


@pytest.mark.parametrize(
    ("values", "continuous"),
    [
        pytest.param(lambda x: pd.Categorical(x.round(3)), True, id="categories"),
        pytest.param(lambda x: [f"{value:.4f}" for value in x], True, id="text"),
        pytest.param(lambda x: pd.array([f"{value:.4f}" for value in x], dtype="string"), True, id="string"),
        pytest.param(lambda x: [None, "unknown", *(f"{value:.1e}" for value in x[2:])], True, id="some_missing"),
        pytest.param(lambda x: np.repeat([f"{value:.4f}" for value in x], 10)[: 10 * len(x)], False, id="shared"),
        pytest.param(lambda x: pd.Categorical(np.array([0.1, 0.5, 1.0])[np.arange(200) % 3]), False, id="doses"),
        pytest.param(lambda x: [str(k) for k in range(len(x))], False, id="whole_names"),
        pytest.param(lambda x: [f"c{value:.4f}" for value in x], False, id="names"),
    ],
)
def test_measurements_are_told_from_classes_as_text_too(values, continuous):
    column = pd.Series(values(np.random.default_rng(0).random(200)))
    if not continuous:
        assert None not in labels_of(column, "x")
        return
    with pytest.raises(ScbinInputError, match="I42"):
        labels_of(column, "x")
