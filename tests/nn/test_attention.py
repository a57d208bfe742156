"""Packed attention against plain transformers: one cell alone, and padded batches with their mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scbin._errors import ScbinInputError
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.attention import PACKED, pack_layout, packed_attention
from scbin.nn.bert import build_bert, encode_pack, init_gene_table, logits_at
from scbin.nn.pooling import pool


@pytest.fixture(scope="module")
def network():
    torch.set_num_threads(1)
    vocabulary = Vocabulary.build("rank", [f"G{i}" for i in range(40)], max_length=32)
    bert = build_bert(vocabulary, "tiny", num_hidden_layers=3, hidden_size=32, num_attention_heads=4).eval()
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, vocabulary.n_tokens, n) for n in (5, 1, 32, 17, 9)]
    return vocabulary, bert, rows


def lay(rows):
    ids = torch.from_numpy(np.concatenate(rows))
    positions = torch.from_numpy(np.concatenate([np.arange(len(row)) for row in rows]))
    return ids, positions, np.concatenate([[0], np.cumsum([len(row) for row in rows])])


def test_a_pack_equals_stock_bert_on_each_cell_and_on_a_padded_batch(network):
    _, bert, rows = network
    hidden = encode_pack(bert, *lay(rows)).detach()
    parts = hidden.split([len(row) for row in rows])
    bert.set_attn_implementation("eager")
    try:
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        padded = bert.bert(ids, attention_mask=(ids > 0).long()).last_hidden_state
        for row, part, batch in zip(rows, parts, padded, strict=True):
            alone = bert.bert(torch.from_numpy(row)[None]).last_hidden_state[0]
            assert (part - alone).abs().max() < 1e-5
            assert (part - batch[: len(row)]).abs().max() < 1e-5
        with pytest.raises(ScbinInputError, match="T13"):
            encode_pack(bert, *lay(rows))
    finally:
        bert.set_attn_implementation(PACKED)
    # the registered attention also serves the ordinary forward, with its mask
    assert (bert.bert(ids, attention_mask=(ids > 0).long()).last_hidden_state - padded).abs().max() < 1e-5


def test_batch_mates_and_order_change_nothing(network):
    _, bert, rows = network
    hidden = encode_pack(bert, *lay(rows)).detach().split([len(row) for row in rows])
    for order in ([4, 2, 0, 3, 1], [2], [1, 1, 0]):
        again = encode_pack(bert, *lay([rows[i] for i in order])).detach().split([len(rows[i]) for i in order])
        for i, part in zip(order, again, strict=True):
            assert (part - hidden[i]).abs().max() < 1e-5


def test_gradients_equal_those_of_stock_bert(network):
    _, bert, rows = network
    encode_pack(bert, *lay(rows)).square().sum().backward()
    packed = {name: p.grad.clone() for name, p in bert.named_parameters() if p.grad is not None}
    bert.zero_grad()
    bert.set_attn_implementation("eager")
    for row in rows:
        bert.bert(torch.from_numpy(row)[None]).last_hidden_state.square().sum().backward()
    bert.set_attn_implementation(PACKED)
    for name, parameter in bert.named_parameters():
        if name in packed:
            assert (parameter.grad - packed[name]).abs().max() <= 1e-4 * max(1, packed[name].abs().max())
    bert.zero_grad()


def test_layers_are_those_of_transformers(network):
    _, bert, rows = network
    states = bert.bert(torch.from_numpy(rows[2])[None], output_hidden_states=True).hidden_states
    for layer in range(-4, 4):
        assert (encode_pack(bert, *lay([rows[2]]), layer=layer) - states[layer][0]).abs().max() < 1e-5
    with pytest.raises(ScbinInputError, match="T14"):
        encode_pack(bert, *lay(rows), layer=4)


def test_logits_at_chosen_places(network):
    _, bert, rows = network
    whole = bert(torch.from_numpy(rows[2])[None]).logits[0]
    hidden = encode_pack(bert, *lay([rows[2]]))
    assert (logits_at(bert, hidden) - whole).abs().max() < 1e-5
    assert (logits_at(bert, hidden[[3, 1]], 10, 20) - whole[[3, 1], 10:20]).abs().max() < 1e-5


def test_tokens_that_are_not_attended_to_change_no_other(network):
    _, bert, rows = network
    ids, positions, cu = lay(rows)
    keys = np.array([len(row) - (len(row) > 1) for row in rows])
    hidden = encode_pack(bert, ids, positions, pack_layout(cu, key_lengths=keys))
    without = encode_pack(bert, *lay([row[:n] for row, n in zip(rows, keys, strict=True)]))
    kept = np.concatenate([np.arange(a, a + n) for a, n in zip(cu[:-1], keys, strict=True)])
    assert (hidden[kept] - without).abs().max() < 1e-5


def test_scale_and_widths_of_their_own():
    q, k, v = torch.randn(3, 1, 2, 10, 8).unbind()
    layout = pack_layout(np.array([0, 4, 10]))
    out, _ = packed_attention(torch.nn.Identity(), q, k, v[..., :5], None, scaling=0.3, layout=layout)
    for a, b in ((0, 4), (4, 10)):
        weights = torch.softmax(q[:, :, a:b] @ k[:, :, a:b].transpose(2, 3) * 0.3, -1)
        assert (out[0, a:b] - (weights @ v[:, :, a:b, :5])[0].transpose(0, 1)).abs().max() < 1e-5


def test_dropout_in_attention_is_right_on_average():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
    layout = pack_layout(np.array([0, 2, 6]))
    exact, _ = packed_attention(torch.nn.Identity(), q, k, v, None, layout=layout)
    draws = torch.stack(
        [packed_attention(torch.nn.Identity(), q, k, v, None, layout=layout, dropout=0.3)[0] for _ in range(4000)]
    )
    assert draws.std(0).min() > 0.01
    assert (draws.mean(0) - exact).abs().max() < 0.1


def test_pool_is_a_weighted_mean_and_differentiable_in_the_weights():
    hidden, weights = torch.randn(9, 4), torch.rand(9).requires_grad_()
    cu = np.array([0, 2, 2, 9])
    z = pool(hidden, cu, weights)
    assert z[2].detach().numpy() == pytest.approx(
        np.average(hidden[2:].numpy(), axis=0, weights=weights[2:].detach()), abs=1e-6
    )
    assert (z[1] == 0).all()
    z.sum().backward()
    assert weights.grad.abs().sum() > 0
    alone = pool(hidden[2:], np.array([0, 7]), weights[2:])
    assert torch.equal(alone[0], z[2])


def test_building_moves_no_global_generator(network):
    vocabulary, bert, _ = network
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = build_bert(vocabulary, "tiny", num_hidden_layers=3, hidden_size=32, num_attention_heads=4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(bert.state_dict().values(), again.state_dict().values(), strict=True))


def test_gene_tables_keep_the_angles_of_the_loadings(network):
    vocabulary, bert, _ = network
    loadings = np.random.default_rng(0).normal(size=(40, 6))
    init_gene_table(bert, vocabulary, loadings, scale=0.5)
    table = bert.bert.embeddings.word_embeddings.weight[vocabulary.first_gene_id :].detach().numpy()
    assert table.std() == pytest.approx(0.5, rel=1e-3)
    gram, truth = table @ table.T, loadings @ loadings.T
    assert gram / np.linalg.norm(gram) == pytest.approx(truth / np.linalg.norm(truth), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [False, True])
def test_the_packed_kernel_of_cuda_equals_row_by_row(keys):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    cu = np.array([0, 7, 100, 300])
    layout = pack_layout(cu, "cuda", np.array([5, 93, 150]) if keys else None)
    out, _ = packed_attention(torch.nn.Identity(), q, k, v, None, layout=layout)
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected, _ = packed_attention(torch.nn.Identity(), *exact, None, layout=layout)
    assert (out.float() - expected).abs().max() < 2e-2
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for half, full in zip((q, k, v), exact, strict=True):
        assert (half.grad.float() - full.grad).abs().max() < 5e-2 * full.grad.abs().max()
