"""Heads for labels: what they compute, that cells do not touch each other, and that they are rebuilt from their config."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from scbin._errors import ScbinInputError
from scbin.nn.labels import GeneHead, LabelHead, Target, gene_outputs, label_outputs
from scbin.nn.network import build_network
from scbin.nn.packs import log_normalised, pack_rows, token_expression
from scbin.nn.presets import Network
from scbin.tl._gene_vectors import mean_gene_vectors
from scbin.tokens.tokens import MemoryTokens
from scbin.tokens.vocabulary import Vocabulary

TARGETS = (Target("type", classes=("a", "b", "c")), Target("age", "number", mean=40.0, scale=10.0))
KINDS = {
    "linear": {},
    "vector": {"expression": False},
    "tanh": {"expression": False, "hidden": "tanh"},
}


@pytest.fixture(scope="module")
def tokens():
    """Twelve ranked cells, the last without a gene."""
    vocabulary = Vocabulary.build("rank", [f"G{i}" for i in range(20)], max_length=16)
    rng = np.random.default_rng(0)
    rows = np.zeros((12, vocabulary.n_positions), dtype=vocabulary.dtype)
    rows[:, 0] = vocabulary.specials["[CLS]"]
    for cell in range(11):
        genes = rng.permutation(20)[: rng.integers(3, 13)]
        rows[cell, vocabulary.first_gene_position : vocabulary.first_gene_position + len(genes)] = (
            vocabulary.first_gene_id + genes
        )
    return MemoryTokens(csr_matrix(rows), vocabulary)


def network_with(tokens, head):
    network = build_network(tokens.vocabulary, Network(1, 16, 32, 2, hidden_dropout_prob=0.0), vector="pooled",
                            vector_options={"pooling": "mean"})  # fmt: skip
    network.labels = head
    return network.eval()


def made(tokens, kind, seed=0):
    torch.manual_seed(seed)
    head = LabelHead(tokens.vocabulary, 16, TARGETS, **KINDS[kind])
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_rebuilt_from_its_config_and_tensors(tokens, kind):
    head = made(tokens, kind)
    head.temperature[0] = 2.5
    config = json.loads(json.dumps(head.config()))
    again = LabelHead.from_config(tokens.vocabulary, config)
    again.load_state_dict(head.state_dict(), strict=True)
    first, second = (label_outputs(network_with(tokens, each), tokens, device="cpu") for each in (head, again))
    np.testing.assert_array_equal(first, second)
    assert again.targets == head.targets and np.isnan(first[11]).all() and np.isfinite(first[:11]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_outputs_of_a_cell_depend_on_no_other_cell(tokens, kind):
    network = network_with(tokens, made(tokens, kind))
    together = label_outputs(network, tokens, device="cpu")
    alone = label_outputs(network, tokens, device="cpu", token_budget=1)
    some = label_outputs(network, tokens, device="cpu", rows=np.array([5, 2]))
    np.testing.assert_allclose(alone, together, atol=1e-5)
    np.testing.assert_allclose(some[[2, 5]], together[[2, 5]], atol=1e-5)
    assert np.isnan(some[3]).all()


def test_a_linear_head_is_vector_and_expression_added_up(tokens):
    head = made(tokens, "linear")
    head.vector_mean.normal_(), head.vector_scale.uniform_(0.5, 2), head.gene_scale.uniform_(0.5, 9)
    rows = tokens.take(np.arange(11))
    pack = pack_rows(rows, np.arange(11))
    z = torch.randn(11, 16)
    x = log_normalised(token_expression(rows, tokens.vocabulary), tokens.vocabulary).toarray()
    scaled = np.minimum(x * head.gene_scale.numpy(), 10)
    with torch.no_grad():
        expected = head.output((z - head.vector_mean) * head.vector_scale).numpy() + scaled @ head.genes.numpy()
        np.testing.assert_allclose(head(z, pack), expected, rtol=1e-4, atol=1e-4)
        half = head(z, pack, kept=0.5).numpy()
    np.testing.assert_allclose(half - expected, scaled @ head.genes.detach().numpy(), rtol=1e-3, atol=1e-3)


def test_published_classifiers_fit_in(tokens):
    """Geneformer's and PerturbGene's heads: a hidden layer on the vector, then the classes."""
    for kind, function in (("tanh", torch.tanh), ("relu", torch.relu)):
        head = LabelHead(tokens.vocabulary, 16, TARGETS[:1], expression=False, hidden=kind)
        z = torch.randn(4, 16)
        pack = pack_rows(tokens.take(np.arange(4)), np.arange(4))
        expected = head.output(function(head.dense(z)))
        torch.testing.assert_close(head(z, pack), expected)


def test_predictions_are_probabilities_and_numbers_in_their_unit(tokens):
    head = made(tokens, "vector")
    head.temperature[0] = 4.0
    outputs = np.array([[1.0, 2.0, 3.0, 0.5], [np.nan] * 4])
    found = head.predictions(outputs)
    p = np.exp(outputs[0, :3] / 4)
    np.testing.assert_allclose(found["type"][0], p / p.sum())
    assert found["age"][0] == 45.0 and np.isnan(found["age"][1]) and np.isnan(found["type"][1]).all()
    assert head.part(1) == slice(3, 4) and head.n_outputs == 4


def test_gene_outputs_are_means_over_tokens(tokens):
    torch.manual_seed(0)
    head = GeneHead(tokens.vocabulary, 16, TARGETS[:1], n_features=2)
    head.features.normal_(), head.vector_mean.normal_(), torch.nn.init.normal_(head.genes)
    network = network_with(tokens, head)
    found = gene_outputs(network, tokens, device="cpu", token_budget=20)
    hidden, _ = mean_gene_vectors(network, tokens, device="cpu")
    with torch.no_grad():  # the head is linear, so the mean of the outputs is the output of the mean
        expected = head(torch.from_numpy(hidden).float(), torch.arange(20)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    rows = tokens.take(np.arange(12))
    ids = rows.data[rows.indices >= tokens.vocabulary.first_gene_position] - tokens.vocabulary.first_gene_id
    assert (np.isnan(found[:, 0]) == ~np.isin(np.arange(20), ids)).all()
    config = json.loads(json.dumps(head.config()))
    GeneHead.from_config(tokens.vocabulary, config).load_state_dict(head.state_dict(), strict=True)


def test_heads_that_cannot_be_are_refused(tokens):
    v = tokens.vocabulary
    for make in (
        lambda: LabelHead(v, 16, []),
        lambda: LabelHead(v, 16, [TARGETS[0], TARGETS[0]]),
        lambda: GeneHead(v, 16, TARGETS),
        lambda: Target("x", "number", ("a",)),
        lambda: Target("x", "class"),
        lambda: Target("x", "class", ("a", "a")),
        lambda: Target(3, "number"),
    ):
        with pytest.raises(ScbinInputError, match=r"M04|A02"):
            make()
