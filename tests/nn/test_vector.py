"""Cell vectors: means written out by hand, and one cell's vector whatever else is in the pack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from scbin._errors import ScbinInputError
from scbin.nn.network import build_network
from scbin.nn.packs import Expression, pack_rows, plan_packs
from scbin.nn.run import embed, run
from scbin.nn.vector import LatentVector, PooledVector, hashed, pool
from scbin.tokens.bins import Bins
from scbin.tokens.tokens import MemoryTokens
from scbin.tokens.vocabulary import Vocabulary


def cells(encoding="bins", n_cells=12, n_genes=30, seed=0):
    """Rows of counts 0 to 4 (tokens hold counts), or ranked genes; the third row is empty."""
    rng = np.random.default_rng(seed)
    bins = None if encoding == "rank" else Bins((1.0, 2.0, 3.0, 4.0), reads="counts")
    v = Vocabulary.build(encoding, [f"G{i}" for i in range(n_genes)], bins=bins, max_length=n_genes + 3)
    rows = np.zeros((n_cells, v.n_positions), dtype=v.dtype)
    first = v.first_gene_position
    rows[:, 0], rows[:, 1] = v.specials["[CLS]"], v.specials["[START]"]
    counts = rng.poisson(1.0, (n_cells, n_genes)).clip(0, 4)
    for row, cell in zip(rows, counts, strict=True):
        if encoding == "rank":
            genes = rng.permutation(n_genes)[: 5 + cell.sum() % 9]
            row[first : first + len(genes)] = v.first_gene_id + genes
        else:
            row[v.gene_positions] = np.where(cell, v.group_start[v.gene_positions] + cell, 0)
    rows[2], counts[2] = 0, 0
    return MemoryTokens(csr_matrix(rows), v), counts


def pack_of(tokens, rows):
    rows = np.asarray(rows)
    return pack_rows(tokens.take(rows), rows)


@pytest.mark.parametrize("encoding", ["bins", "gene_bins", "rank"])
def test_expression_on_the_device(encoding):
    tokens, counts = cells(encoding)
    rows = np.delete(np.arange(12), 2)
    pack = pack_of(tokens, rows)
    genes, values = Expression(tokens.vocabulary)(pack)
    found = torch.zeros(len(rows), 30).index_put((pack.rows, genes), values, accumulate=True)
    if encoding == "rank":
        ids = tokens.matrix[rows].toarray().astype(int)
        first = tokens.vocabulary.first_gene_position
        for values, row in zip(found.numpy(), ids, strict=True):
            genes = row[first:][row[first:] > 0] - tokens.vocabulary.first_gene_id
            assert np.array_equal(np.argsort(-values, kind="stable")[: len(genes)], genes)
        return
    value = tokens.vocabulary.token_values[tokens.vocabulary.group_start[tokens.vocabulary.gene_positions][0] :][:5]
    expected = value[counts[rows]].astype(float)
    expected = np.log1p(1e4 * expected / expected.sum(1, keepdims=True))
    assert found.numpy() == pytest.approx(expected, rel=1e-4)


def test_pooling_is_a_weighted_mean_and_differentiable_in_the_weights():
    tokens, _ = cells()
    pack = pack_of(tokens, [0, 1, 3])
    hidden, weights = torch.randn(pack.n_tokens, 4), torch.rand(pack.n_tokens).requires_grad_()
    z, bounds = pool(hidden, pack, weights), np.cumsum([0, *pack.layout.lengths])
    for i in range(3):
        part = slice(bounds[i], bounds[i + 1])
        expected = np.average(hidden[part].numpy(), axis=0, weights=weights[part].detach())
        assert z[i].detach().numpy() == pytest.approx(expected, abs=1e-6)
    z.sum().backward()
    assert weights.grad.abs().sum() > 0
    weights = torch.ones(pack.n_tokens)
    weights[: bounds[1]] = 0
    assert torch.isnan(pool(hidden, pack, weights)[0]).all()


@pytest.mark.parametrize("pooling", ["weighted", "mean", "cls"])
def test_pooled_vectors(pooling):
    tokens, _ = cells()
    v, pack = tokens.vocabulary, pack_of(tokens, [0])
    hidden, ids = torch.randn(pack.n_tokens, 4), pack.input_ids.numpy()
    weights = {
        "weighted": np.log1p(v.token_values[ids]),
        "mean": v.is_gene_token(ids).astype(float),
        "cls": (ids == v.specials["[CLS]"]).astype(float),
    }[pooling]
    vector = PooledVector(v, 4, pooling)
    assert vector(hidden, pack)[0].numpy() == pytest.approx(np.average(hidden, axis=0, weights=weights), abs=1e-5)
    again = PooledVector.from_config(v, vector.config())
    assert torch.equal(again(hidden, pack), vector(hidden, pack))
    gates = torch.zeros(pack.n_tokens)
    assert torch.equal(vector(hidden, pack, gates), vector(hidden, pack))


def test_poolings_that_cannot_be():
    v = Vocabulary.build("rank", ["A", "B"], layout="geneformer_v1")
    for pooling in ("cls", "max"):
        with pytest.raises(ScbinInputError, match="pooling"):
            PooledVector(v, 4, pooling)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("encoding", ["bins", "rank"])
def test_a_learned_vector_is_a_cells_own(encoding, reads):
    tokens, _ = cells(encoding)
    torch.manual_seed(0)
    vector = LatentVector(tokens.vocabulary, 8, 5, width=16, reads=reads).eval()
    table = torch.randn(tokens.vocabulary.n_tokens, 8)
    rows = [0, 1, 3, 4, 5, 11]
    together = vector(table[pack_of(tokens, rows).input_ids], pack_of(tokens, rows))
    assert together.shape == (6, 5) and together.isfinite().all()
    for order in ([5, 0], [2]):
        pack = pack_of(tokens, [rows[i] for i in order])
        assert (vector(table[pack.input_ids], pack) - together[order]).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert vector(table[pack.input_ids], pack).dtype == torch.float32
    again = LatentVector.from_config(tokens.vocabulary, vector.config()).eval()
    again.load_state_dict(vector.state_dict())
    assert torch.equal(again(table[pack.input_ids], pack), vector(table[pack.input_ids], pack))


def test_dropout_is_a_function_of_the_cell_alone():
    draws = hashed(torch.arange(-50_000, 50_000) * 3)
    assert 0 <= draws.min() and draws.max() < 1 and draws.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.histc(draws, 10, 0, 1).numpy() == pytest.approx(10_000, rel=0.05)
    tokens, _ = cells()
    vector = LatentVector(tokens.vocabulary, 8, 5, width=16, dropout=0.4).train()
    table, rows, noise = torch.randn(tokens.vocabulary.n_tokens, 8), [0, 1, 3, 4], torch.tensor([5, 2**40, -7, 99])
    pack = pack_of(tokens, rows)
    state, hidden = torch.get_rng_state(), table[pack.input_ids]
    noisy, plain = vector(hidden, pack, noise=noise), vector(hidden, pack)
    assert torch.equal(state, torch.get_rng_state())
    assert ((noisy - plain).abs().amax(1) > 1e-3).all()
    alone = pack_of(tokens, [3])
    assert (vector(table[alone.input_ids], alone, noise=noise[2:3]) - noisy[2]).abs().max() < 1e-5
    assert torch.equal(vector.eval()(hidden, pack, noise=noise), plain)
    many = torch.stack([vector.train()(hidden, pack, noise=noise + 1000 * k) for k in range(300)])
    assert many.std(0).min() > 1e-3


def test_a_closed_gate_takes_a_gene_out_of_the_learned_vector():
    tokens, _ = cells()
    vector = LatentVector(tokens.vocabulary, 8, 5, width=16).eval()
    table, pack = torch.randn(tokens.vocabulary.n_tokens, 8), pack_of(tokens, [0])
    gates = torch.zeros(pack.n_tokens)
    gates[5] = -60.0
    without = tokens.matrix[0].copy()
    without.data[5] = 0
    without.eliminate_zeros()
    other = pack_rows(without, np.array([0]))
    expected = vector(table[other.input_ids], other)
    assert (vector(table[pack.input_ids], pack, gates) - expected).abs().max() < 1e-4
    gates = torch.zeros(pack.n_tokens, requires_grad=True)
    vector(table[pack.input_ids], pack, gates).sum().backward()
    assert (gates.grad[2:] != 0).all()


# ---- packs and the runner -------------------------------------------------------------------------------------------


def test_packs_hold_every_filled_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(0, 90, 500)
    packs = plan_packs(lengths, 400)
    assert sorted(np.concatenate(packs)) == np.flatnonzero(lengths).tolist()
    sums = np.array([lengths[pack].sum() for pack in packs])
    assert sums.max() <= 400 and sums[:-1].mean() > 360
    assert [pack.tolist() for pack in plan_packs(np.array([9, 2, 9]), 5)] == [[0], [2], [1]]  # longer than the budget
    assert plan_packs(np.zeros(3), 5) == []


@pytest.mark.parametrize("kind", ["bert", "mlp"])
def test_vectors_do_not_depend_on_packs_and_empty_cells_have_none(kind):
    tokens, _ = cells()
    network = build_network(tokens.vocabulary, "tiny", kind, vector_options={"size": 6}).train()
    vectors = embed(network, tokens, device="cpu", token_budget=60)
    assert vectors.shape == (12, 6) and np.isnan(vectors[2]).all() and np.isfinite(np.delete(vectors, 2, 0)).all()
    assert network.training
    at_once = embed(network, tokens, device="cpu")
    assert np.nanmax(np.abs(vectors - at_once)) < 1e-5
    some = embed(network, tokens, device="cpu", rows=np.array([7, 1]))
    assert np.flatnonzero(np.isfinite(some[:, 0])).tolist() == [1, 7]
    found = [(pack.cells.tolist(), len(hidden)) for pack, hidden in run(network, tokens, layer=0, device="cpu")]
    assert found == [([0, 1, *range(3, 12)], int(tokens.lengths.sum()))]
    empty = MemoryTokens(tokens.matrix[[2]], tokens.vocabulary)
    assert np.isnan(embed(network, empty, device="cpu")).all()
