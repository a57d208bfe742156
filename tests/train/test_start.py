"""The start against scikit-learn's PCA, and against the means of the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA

from scbin.nn.network import build_network
from scbin.nn.packs import log_normalised, pack_rows, token_expression
from scbin.tokens.bins import Bins
from scbin.tokens.tokens import MemoryTokens
from scbin.tokens.vocabulary import Vocabulary
from scbin.train.pretraining import Pretraining
from scbin.train.settings import Masking
from scbin.train.start import components, start


@pytest.fixture(scope="module")
def data():
    """200 cells of four kinds with 50 genes, the last of which nobody expresses; tokens hold counts."""
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.4, 2, (4, 50))[rng.integers(0, 4, 200)] * rng.uniform(0.5, 2, (200, 1))
    counts = rng.poisson(rate).clip(0, 30)
    counts[:, -1], counts[7] = 0, 0
    v = Vocabulary.build(
        "bins", [f"G{i}" for i in range(50)], bins=Bins(tuple(map(float, range(1, 31))), reads="counts")
    )
    rows = np.zeros((200, v.n_positions), dtype=v.dtype)
    rows[:, v.gene_positions] = np.where(counts, v.first_gene_id + counts, 0)
    return MemoryTokens(csr_matrix(rows), v), counts


@pytest.mark.parametrize("batches", [None, np.arange(199) % 3])
def test_components_are_those_of_scikit_learn(data, batches):
    tokens, _ = data
    rows = tokens.matrix[np.delete(np.arange(200), 7)]
    matrix = log_normalised(token_expression(rows, tokens.vocabulary), tokens.vocabulary)
    found, dense = components(matrix, 6, batches), matrix.toarray()
    for batch in [] if batches is None else range(3):
        assert found.means[batch] == pytest.approx(dense[batches == batch].mean(axis=0))
        dense[batches == batch] -= dense[batches == batch].mean(axis=0)
    exact = PCA(6, svd_solver="full").fit(dense)
    assert found.spreads == pytest.approx(np.sqrt(exact.explained_variance_))
    scores = (dense - dense.mean(axis=0)) @ found.directions
    assert scores == pytest.approx(exact.transform(dense), abs=1e-6)
    again = components(matrix, 6, batches)
    assert np.array_equal(again.directions, found.directions)


@pytest.mark.parametrize("kind", ["bert", "mlp"])
def test_a_network_starts_at_the_components_and_the_means(data, kind):
    tokens, counts = data
    v, cells, batches = tokens.vocabulary, np.arange(150), np.arange(200) % 2
    network = build_network(v, "tiny", kind, batches=["a", "b"], vector_options={"size": 5, "reads": False})
    before = [table.detach().clone() for table in network.backbone.tables()]
    task = Pretraining(v, Masking(0, 0))
    torch.manual_seed(3)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    start(network, task, tokens, cells, batches)
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])

    filled = np.setdiff1d(cells, [7])
    matrix = log_normalised(token_expression(tokens.matrix[filled], v), v)
    found = components(matrix, 5, batches[filled])
    # the first columns of the first layer are the standardised scores, and their negatives
    pack = pack_rows(tokens.matrix[filled], filled)
    genes, values = network.vector.expression(pack)
    first = torch.zeros(len(filled), 128).index_add(0, pack.rows, values[:, None] * network.vector.genes[genes])
    first = (first + network.vector.bias - network.vector.centre @ network.vector.genes).detach().numpy()
    scores = (matrix.toarray() - found.means.mean(axis=0)) @ found.directions / found.spreads
    assert first[:, :5] == pytest.approx(scores, abs=1e-3) and first[:, 5:10] == pytest.approx(-scores, abs=1e-3)
    assert network.counts.loadings.detach().numpy() == pytest.approx(found.directions, abs=1e-6)
    exact = token_expression(tokens.matrix, v).toarray()
    for batch in range(2):
        mine = exact[filled][batches[filled] == batch]
        fraction = network.counts.bias[batch].detach().exp().numpy()
        assert fraction.sum() == pytest.approx(1, abs=1e-4)
        assert fraction == pytest.approx(mine.sum(0) / mine.sum(), abs=5e-3)
    assert network.counts.batch_weights.sum() == pytest.approx(1)
    moved = [
        float((now - old).detach().abs().max()) for now, old in zip(network.backbone.tables(), before, strict=True)
    ]
    assert moved[0] == 0 and moved[1] > 0.1  # a position is a gene
    assert np.array_equal(task.zero_positions, v.gene_positions[counts[cells].any(axis=0)])


def test_a_start_from_almost_nothing(data):
    tokens, _ = data
    alike = MemoryTokens(tokens.matrix[[0] * 8], tokens.vocabulary)
    for some, cells in ((tokens, [7]), (tokens, [0]), (tokens, [0, 1, 2]), (alike, [0, 1, 2, 5])):
        network = build_network(tokens.vocabulary, "tiny")
        start(network, Pretraining(tokens.vocabulary), some, np.array(cells))
        assert all(p.isfinite().all() and p.abs().max() < 1e3 for p in network.parameters())


def test_pooled_networks_start_too(data):
    tokens, _ = data
    network = build_network(tokens.vocabulary, "tiny", vector="pooled")
    start(network, Pretraining(tokens.vocabulary), tokens, np.arange(200))
    assert all(p.isfinite().all() for p in network.parameters())
