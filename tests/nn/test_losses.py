"""Each loss against its formula in float64."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from scbin._errors import ScbinInputError
from scbin.nn.losses import Loss, binary_cross_entropy, cross_entropy, gaussian_ordinal
from scbin.tokens.bins import Bins
from scbin.tokens.vocabulary import Vocabulary


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    return rng.normal(0, 3, (40, 7)), rng.integers(0, 7, 40), rng.uniform(0.2, 3, 7)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def torched(*arrays):
    return [torch.from_numpy(a if a.dtype == np.int64 else a.astype(np.float32)) for a in arrays]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy(scored, smoothing):
    logits, labels, weights = scored
    target = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
    expected = -(target * log_softmax(logits)).sum(1)
    assert cross_entropy(*torched(logits, labels), smoothing).numpy() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    weighted = -(target * weights * log_softmax(logits)).sum(1)
    got = cross_entropy(*torched(logits, labels), smoothing, torch.from_numpy(weights))
    assert got.numpy() == pytest.approx(weighted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_gaussian_ordinal(scored, sigma):
    logits, labels, _ = scored
    bell = np.exp(-((np.arange(7) - labels[:, None]) ** 2) / (2 * sigma**2))
    bell /= bell.sum(1, keepdims=True)
    expected = -(bell * log_softmax(logits)).sum(1)
    assert gaussian_ordinal(*torched(logits, labels), sigma).numpy() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_binary_cross_entropy(scored):
    logits, labels = scored[0][:, :2], scored[1] % 2
    z = logits[:, 1] - logits[:, 0]
    expected = np.where(labels == 1, np.log1p(np.exp(-z)), np.log1p(np.exp(z)))
    assert binary_cross_entropy(*torched(logits, labels)).numpy() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_half_precision_logits_are_scored_in_float32(scored):
    logits, labels = torched(*scored[:2])
    half = logits.to(torch.bfloat16)
    assert torch.equal(cross_entropy(half, labels), cross_entropy(half.float(), labels))


def test_genes_have_their_own_score_and_phenotypes_the_cross_entropy(scored):
    logits, labels = torched(*scored[:2])
    loss = Loss("ordinal", label_smoothing=0.1, sigma=0.7)
    assert torch.equal(loss.score(logits, labels, genes=True), gaussian_ordinal(logits, labels, 0.7))
    assert torch.equal(loss.score(logits, labels, genes=False), cross_entropy(logits, labels, 0.1))


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        *(("A02", {name: value}) for name, value in (("kind", "ordnal"), ("over", "vocab"), ("positions", None))),
        *(("A02", {"label_smoothing": value}) for value in (2.0, 1.0, float("nan"))),
        *(("A01", {"weights": value}) for value in (None, {"genes": "1"})),
        ("A02", {"weights": {"genes": np.nan}}),
        ("A02", {"sigma": 0}),
        ("A01", {"sigma": None}),
        ("A01", {"label_smoothing": "0.1"}),
    ],
    ids=str,
)
def test_a_loss_that_cannot_be_meant_is_refused(code, changes):
    with pytest.raises(ScbinInputError, match=next(iter(changes))) as caught:
        Loss(**changes)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("encoding", "loss", "match"),
    [
        ("bins", Loss(weights={"age": 1.0}), "'age'"),
        ("rank", Loss("ordinal"), "ordinal"),
        ("bins", Loss("binary"), "binary"),
        ("binary", Loss("binary", over="vocabulary"), "over"),
    ],
)
def test_a_loss_that_does_not_fit_the_vocabulary_is_refused(encoding, loss, match):
    bins = None if encoding == "rank" else Bins((0.1,) if encoding == "binary" else (0.1, 1.0, 2.0))
    v = Vocabulary.build(encoding, ["A", "B"], phenotypes={"sex": ["f", "m"]}, bins=bins)
    with pytest.raises(ScbinInputError, match=match):
        loss.check(v, ("genes", "sex"))


def test_a_loss_of_numbers_of_numpy_is_kept_as_plain_ones():
    loss = Loss(np.str_("ordinal"), sigma=np.float32(0.5), weights={"genes": np.int64(2)})
    assert loss == Loss("ordinal", sigma=0.5, weights={"genes": 2.0})
    assert json.loads(json.dumps(asdict(loss)))["weights"] == {"genes": 2.0}
