"""What cross-validation chooses: regressions to add up, and how far rare classes are favoured."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import f1_score

from scbin.train.choosing import by_folds, choose_classes, choose_numbers, log_prior, rebalanced
from scbin.train.linear import Features, Strength

FOLDS = np.arange(100) % 4


def loss(outputs, classes):
    return -outputs[np.arange(len(classes)), classes].mean()


def test_no_single_regression_is_better_than_what_is_chosen(data):
    features, classes = data
    choice = choose_classes(features, classes, 3, FOLDS)
    assert 1 <= len(choice.members) <= 3
    found = by_folds(features, np.eye(3)[classes], choice.members, FOLDS)
    found -= np.log(np.exp(found).sum(1, keepdims=True))
    for strength in (Strength(0.1, 0.1), Strength(0.0, 1.0), Strength(1.0, 0.01)):
        alone = by_folds(features, np.eye(3)[classes], [(strength, 1.0)], FOLDS)
        assert loss(found, classes) <= loss(alone, classes) + 0.01


def test_a_part_that_says_nothing_is_left_alone(data):
    features, classes = data
    noise = Features(np.random.default_rng(1).normal(size=(100, 4)), sp.csr_matrix(np.eye(3)[classes] * 3), np.ones(3))
    members = choose_classes(noise, classes, 3, FOLDS).members
    assert max(members, key=lambda pair: pair[1])[0].genes >= 0.1


def test_the_vector_alone_has_strengths_of_its_own(data):
    features, classes = data
    choice = choose_classes(Features(features.z, None), classes, 3, FOLDS)
    assert all(strength.genes == 0 for strength, _ in choice.members)


def test_rare_classes_are_favoured_as_far_as_that_helps():
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1], [2000, 100])
    prior = log_prior(classes, 2)
    evidence = rng.normal(size=2100) + 1.5 * classes  # log odds are 1.5 * evidence - 1.125 + those of the classes
    odds = 1.5 * evidence - 1.125 + prior[1] - prior[0]
    outputs = np.c_[np.zeros(2100), odds]
    share = rebalanced(outputs, classes, prior)
    scores = [f1_score(classes, (outputs - q * prior).argmax(1), average="macro") for q in (0, share)]
    assert share > 0.25 and scores[1] > scores[0] + 0.02
    sure = np.eye(2)[classes] * 20 - 10
    assert rebalanced(sure, classes, prior) == 0.25


def test_a_class_that_a_fold_has_not_seen_breaks_nothing(data):
    features, classes = data
    classes = classes.copy()
    classes[0] = 3
    choice = choose_classes(features, classes, 4, FOLDS)
    outputs = by_folds(features, np.eye(4)[classes], choice.members, FOLDS)
    assert np.isfinite(outputs).all() and np.isfinite(choice.loss)


def test_numbers_are_judged_on_cells_that_were_not_fitted(data):
    features, _ = data
    noise = np.random.default_rng(2).normal(size=100)
    assert choose_numbers(features, noise, FOLDS).loss > 0.8 * noise.var()


def test_numbers_of_which_the_cells_say_nothing_are_answered_by_their_mean():
    rng = np.random.default_rng(0)
    donors = np.repeat(np.arange(12), 8)  # differ, but not by their age
    x = rng.normal(size=(12, 20))[donors] + rng.normal(size=(96, 20))
    ages, folds = rng.normal(size=12)[donors], donors % 4
    means = np.array([ages[folds != fold].mean() for fold in range(4)])[folds]
    for features in (Features(x[:, :5], sp.csr_matrix(x), np.ones(20)), Features(x, None)):
        assert choose_numbers(features, ages, folds).loss < 1.001 * np.square(ages - means).mean()


def test_a_class_without_weight_is_not_favoured():
    logs = log_prior(np.repeat([0, 1, 2], [60, 30, 10]), 3, np.array([1.0, 2.0, 0.0]))
    assert logs == pytest.approx([np.log(0.5), np.log(0.5), 0.0])
