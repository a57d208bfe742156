"""Shared attention of rows that are nearly alike against softmax over each row in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scbin.encoding.bins import Bins
from scbin.encoding.edits import Edit, GeneRows, edit_rows
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn import perturbation
from scbin.nn.alike import attend_alike
from scbin.nn.bert import build_bert
from scbin.nn.embedding import embed_tokens, pooling_weights
from scbin.nn.perturbation import RowEncoder, plan_equal


def tokens_and_rows(n_rows: int, n_tokens: int, n_others: int, spread: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, n_tokens + n_others, 2, 4, generator=generator)
    rows = torch.arange(n_tokens).repeat(n_rows, 1)
    rows[torch.arange(n_rows), 3 + torch.arange(n_rows) % n_others] = n_tokens + torch.arange(n_rows) % n_others
    return spread * q, k, v, rows


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_equal_to_softmax_in_each_row(spread):
    q, k, v, rows = tokens_and_rows(6, 60, 3, spread)
    got = attend_alike(q, k, v, rows, 0.5).numpy()
    for row, found in zip(rows.numpy(), got, strict=True):
        query, key, value = (t.double().numpy()[row].transpose(1, 0, 2) for t in (q, k, v))
        scores = 0.5 * query @ key.transpose(0, 2, 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        truth = (weights / weights.sum(-1, keepdims=True)) @ value
        np.testing.assert_allclose(found, truth.transpose(1, 0, 2).reshape(len(row), -1), atol=1e-5)


def test_it_declines_what_it_cannot_do_well():
    q, k, v, rows = tokens_and_rows(6, 60, 3)
    assert attend_alike(q, k, v, rows[:1], 0.5) is None
    assert attend_alike(*tokens_and_rows(12, 20, 12), 0.5) is None
    k[rows[0, 3]] = 1000 * q[0]  # one row's own token outshines the others by more than float32 can hold
    assert attend_alike(q, k, v, rows, 0.5) is None


@pytest.mark.parametrize("encoding", ["bins", "rank"])
@pytest.mark.parametrize("mode", ["delete", "overexpress"])
@pytest.mark.parametrize("pooling", ["weighted", "cls"])
def test_vectors_do_not_depend_on_it(encoding, mode, pooling, monkeypatch):
    bins = Bins.linear(5) if encoding == "bins" else None
    v = Vocabulary.build(encoding, [f"G{i}" for i in range(80)], bins=bins)
    rng = np.random.default_rng(0)
    row = np.zeros((1, v.n_positions), dtype=v.dtype)
    row[0, 0], row[0, 1] = v.specials["[CLS]"], v.specials["[START]"]
    genes = rng.permutation(80)[:60]
    at = v.first_gene_position + (np.arange(60) if encoding == "rank" else genes)
    row[0, at] = v.first_gene_id + (genes if encoding == "rank" else rng.integers(1, v.n_levels, 60))
    from scipy import sparse

    rows = GeneRows(sparse.csr_matrix(row), v)
    order = np.argsort(rows.find(np.zeros(60, dtype=int), genes)[0])
    edited = edit_rows(rows, Edit(mode), np.zeros(60, dtype=int), genes[order]).tokens
    bert, weights = build_bert(v, "tiny", hidden_size=16, num_attention_heads=2, seed=1), pooling_weights(v, pooling)
    shared = []

    def watched(*arguments):
        shared.append(attend_alike(*arguments))
        return shared[-1]

    monkeypatch.setattr(perturbation, "attend_alike", watched)
    with RowEncoder(bert, v, weights, device="cpu", token_budget=600) as encoder:
        encoder.token_budget = 200  # pieces smaller than what shares
        got = encoder.vectors(edited)
    assert any(context is not None for context in shared)
    alone = [embed_tokens(bert, edited[i], weights, device="cpu")[0] for i in range(60)]
    np.testing.assert_allclose(got, alone, atol=1e-5, rtol=0)


def test_alike_rows_stay_together_as_far_as_the_budget_goes():
    lengths = np.full(100, 400)
    assert [len(pack) for pack in plan_equal(lengths, 2_000)] == [5] * 20
    assert [len(pack) for pack in plan_equal(lengths, 2_000, 32_000)] == [20] * 5
    assert [len(pack) for pack in plan_equal(lengths, 2_000, 4_000)] == [10] * 10
