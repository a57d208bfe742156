"""The screen against exact edits: what it writes down is exact, its gradients are those of finite gates, its order is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from scbin.encoding.bins import Bins
from scbin.encoding.edits import Edit, GeneRows, edit_rows
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.attention import pack_layout, packed_attention
from scbin.nn.bert import build_bert, encode_pack
from scbin.nn.embedding import pooling_weights
from scbin.nn.perturbation import RowEncoder, cosine_shift, edited_vectors
from scbin.nn.screen import can_screen, screen_vectors

RULES = {
    "bins": ("bins", Bins.linear(6)),
    "bins_keep": ("bins", Bins.linear(6, zeros="keep")),
    "binary": ("binary", Bins.binary()),
    "gene_bins": ("gene_bins", Bins.counts(6, 1.0, zeros="drop")),
    "rank": ("rank", None),
}
N_GENES, HIDDEN = 60, 16


def cells_of(name: str, n_cells: int = 4):
    from scipy import sparse

    encoding, bins = RULES[name]
    v = Vocabulary.build(
        encoding, [f"G{i}" for i in range(N_GENES)], bins=bins, max_length=64 if bins is None else None
    )
    rng = np.random.default_rng(0)
    rows = np.zeros((n_cells, v.n_positions), dtype=v.dtype)
    rows[:, 0], rows[:, 1] = v.specials["[CLS]"], v.specials["[START]"]
    for i in range(n_cells):
        if bins is None:
            n = 50 - 3 * i
            rows[i, 2 : 2 + n] = v.first_gene_id + rng.permutation(N_GENES)[:n]
            rows[i, 2 + n] = v.specials["[END]"]
            continue
        level = rng.integers(1, v.n_levels, N_GENES) * (rng.random(N_GENES) < 0.7)
        own = np.arange(N_GENES) * v.n_levels if encoding == "gene_bins" else 0
        rows[i, 2:-1] = np.where((level > 0) | (bins.zeros == "keep"), v.first_gene_id + own + level, 0)
        rows[i, -1] = v.specials["[END]"]
    bert = build_bert(v, "tiny", hidden_size=HIDDEN, num_attention_heads=2, seed=1, initializer_range=0.1)
    if bins is None:  # neighbouring ranks alike, as training makes them: the shift of ranks can be interpolated
        angle = torch.arange(64)[:, None] / 64 * torch.linspace(0.5, 3, HIDDEN)
        bert.bert.embeddings.position_embeddings.weight.data[:] = 0.3 * torch.sin(angle + torch.arange(HIDDEN))
    return GeneRows(sparse.csr_matrix(rows), v), v, bert


def everywhere(cells, vectors):
    return np.broadcast_to(np.eye(HIDDEN), (len(cells), HIDDEN, HIDDEN))


def nowhere(cells, vectors):
    return np.zeros((len(cells), 0, HIDDEN))


def both(name, edit, directions, pooling="weighted", layer=-1, budget=10**6, pairs=None):
    """Vectors before, after exactly and after by the screen, of the pairs that the edit changes."""
    rows, v, bert = cells_of(name)
    cells, genes = rows.expressed() if pairs is None else pairs(rows)
    with RowEncoder(bert, v, pooling_weights(v, pooling), layer=layer, device="cpu", token_budget=budget) as encoder:
        originals = encoder.vectors(rows.tokens)
        exact = np.concatenate([m.edited for m in edited_vectors(encoder, rows, edit, cells, genes, originals)])
        screened = np.empty(exact.shape)
        for at, before, after, changed in screen_vectors(encoder, rows, edit, cells, genes, directions):
            np.testing.assert_allclose(before, originals[cells[at]], atol=1e-5)
            assert changed.tolist() == edit_rows(rows, edit, cells[at], genes[at]).changed.tolist()
            screened[at] = after
    changed = edit_rows(rows, edit, cells, genes).changed
    return originals[cells][changed], exact[changed], screened[changed], cells[changed]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("mode", ["delete", "overexpress", "inhibit", "activate", "knock_down"])
def test_the_order_of_genes_is_that_of_exact_edits(name, mode):
    if not can_screen(cells_of(name)[0], Edit(mode), np.zeros((1, 1), int)):
        assert name == "rank" and mode != "delete"
        return
    before, exact, screened, cells = both(name, Edit(mode, k=2), everywhere)
    if not len(cells):
        assert name == "binary"  # there is no second bin
        return
    rho = [
        spearmanr(
            cosine_shift(before[cells == c], exact[cells == c]), cosine_shift(before[cells == c], screened[cells == c])
        )[0]
        for c in np.unique(cells)
    ]
    assert np.mean(rho) > 0.97, rho


@pytest.mark.parametrize("mode", ["overexpress", "activate"])
def test_genes_that_come_in_are_ordered_too(mode):
    def absent(rows):
        cells, genes = np.divmod(np.arange(4 * N_GENES), N_GENES)
        lacking = rows.find(cells, genes)[1] == 0
        return cells[lacking], genes[lacking]

    before, exact, screened, _ = both("bins", Edit(mode), everywhere, pairs=absent)
    assert spearmanr(cosine_shift(before, exact), cosine_shift(before, screened))[0] > 0.97


@pytest.mark.parametrize("name", ["bins", "bins_keep", "gene_bins"])
@pytest.mark.parametrize("mode", ["delete", "overexpress", "inhibit"])
def test_without_attention_the_screen_is_exact(name, mode):
    before, exact, screened, _ = both(name, Edit(mode), nowhere, layer=0)  # the embeddings: no token sees another
    np.testing.assert_allclose(screened, exact, atol=1e-5)


def test_budget_does_not_change_the_screen():
    found = [both("bins", Edit("overexpress"), everywhere, budget=budget)[2] for budget in (1, 150, 10**6)]
    np.testing.assert_allclose(found[0], found[2], atol=1e-5)
    np.testing.assert_allclose(found[1], found[2], atol=1e-5)


def test_a_biased_key_is_scaled_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 4) for _ in range(3))
    gates = torch.rand(7)
    layout = pack_layout(np.array([0, 4, 7]))
    got, _ = packed_attention(torch.nn.Identity(), q, k, v, None, scaling=0.5, layout=layout, key_bias=gates.log())
    for rows in (slice(0, 4), slice(4, 7)):
        weights = (0.5 * q[:, :, rows] @ k[:, :, rows].transpose(2, 3)).exp() * gates[rows]
        truth = (weights / weights.sum(-1, keepdim=True)) @ v[:, :, rows]
        torch.testing.assert_close(got[:, rows], truth.transpose(1, 2))


def test_a_closed_gate_is_a_deleted_token():
    rows, v, bert = cells_of("bins")
    bert.eval()
    ids, positions = (
        torch.from_numpy(a[: rows.tokens.indptr[1]].astype(np.int64)) for a in (rows.tokens.data, rows.tokens.indices)
    )
    bias = torch.zeros(len(ids))
    bias[5] = -1e9
    kept = [i for i in range(len(ids)) if i != 5]
    with torch.no_grad():
        gated = encode_pack(bert, ids, positions, np.array([0, len(ids)]), key_bias=bias)[kept]
        deleted = encode_pack(bert, ids[kept], positions[kept], np.array([0, len(kept)]))
    torch.testing.assert_close(gated, deleted, atol=1e-5, rtol=0)


def test_the_network_keeps_its_gradients():
    rows, v, bert = cells_of("rank")
    with RowEncoder(bert, v, pooling_weights(v, "mean"), device="cpu") as encoder:
        list(screen_vectors(encoder, rows, Edit(), *rows.expressed(), nowhere))
    assert all(p.requires_grad and p.grad is None for p in bert.parameters())
