"""Exact effects of edits against embedding every edited row alone, and shifts against float64 on paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from scbin._errors import ScbinInputError
from scbin.encoding.bins import Bins
from scbin.encoding.edits import Edit, GeneRows, edit_rows, shortened
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.bert import build_bert
from scbin.nn.embedding import embed_tokens, pooling_weights
from scbin.nn.perturbation import RowEncoder, cosine_shift, edited_vectors, plan_equal, state_shift

ENCODINGS = {
    "bins": ("bins", Bins.linear(5)),
    "bins_keep": ("bins", Bins.linear(5, zeros="keep")),
    "binary": ("binary", Bins.binary()),
    "gene_bins": ("gene_bins", Bins.counts(4, 1.0, zeros="drop")),
    "gene_bins_keep": ("gene_bins", Bins.counts(4, 1.0)),
    "rank": ("rank", None),
}
EDITS = [Edit("delete"), Edit("overexpress"), Edit("inhibit"), Edit("activate", k=2), Edit("knock_down", fraction=0.7)]


def cells_of(name: str, n_cells: int = 7, n_genes: int = 14) -> tuple[sparse.csr_matrix, Vocabulary]:
    """Random cells of several lengths, two of the same, the last empty."""
    encoding, bins = ENCODINGS[name]
    v = Vocabulary.build(
        encoding,
        [f"G{i}" for i in range(n_genes)],
        bins=bins,
        phenotypes={"sex": ["f", "m"]},
        max_length=12 if encoding == "rank" else None,
    )
    rng = np.random.default_rng(0)
    rows = np.zeros((n_cells, v.n_positions), dtype=v.dtype)
    rows[:, 0], rows[:, 1], rows[:, 2] = v.specials["[CLS]"], v.mask_id, v.specials["[START]"]
    for i in range(n_cells):
        if encoding == "rank":
            n = 8 - i // 2
            rows[i, 3 : 3 + n] = v.first_gene_id + rng.permutation(n_genes)[:n]
            rows[i, 3 + n] = v.specials["[END]"]
            continue
        level = rng.integers(1, v.n_levels, n_genes) * (rng.random(n_genes) < 0.6)
        own = np.arange(n_genes) * v.n_levels if encoding == "gene_bins" else 0
        keep = (level > 0) | (bins.zeros == "keep")
        rows[i, 3 : 3 + n_genes] = np.where(keep, v.first_gene_id + own + level, 0)
        rows[i, -1] = v.specials["[END]"]
    rows[-1] = 0
    return sparse.csr_matrix(rows), v


@pytest.fixture(scope="module", params=ENCODINGS)
def setting(request):
    tokens, v = cells_of(request.param)
    return tokens, v, build_bert(v, "tiny", hidden_size=16, num_attention_heads=2, seed=1)


def alone(bert, tokens, weights, layer):
    """Every row through the network by itself."""
    rows = [embed_tokens(bert, tokens[i], weights, layer=layer, device="cpu")[0] for i in range(tokens.shape[0])]
    return np.array(rows)


def all_pairs(tokens, v, width):
    cells = np.repeat(np.flatnonzero(np.diff(tokens.indptr)), len(v.genes))
    genes = np.tile(np.arange(len(v.genes)), len(cells) // len(v.genes))
    return cells, (genes[:, None] + np.arange(width)) % len(v.genes)


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.mode)
def test_equal_to_embedding_each_edited_row_alone(setting, edit):
    tokens, v, bert = setting
    weights, rows = pooling_weights(v, "weighted"), GeneRows(tokens, v)
    cells, genes = all_pairs(tokens, v, 2 if edit.mode == "overexpress" else 1)
    originals = embed_tokens(bert, tokens, weights, device="cpu")
    with RowEncoder(bert, v, weights, device="cpu", token_budget=90) as encoder:
        parts = list(edited_vectors(encoder, rows, edit, cells, genes, originals))
    assert np.concatenate([np.arange(len(cells))[part.at] for part in parts]).tolist() == list(range(len(cells)))
    edited = edit_rows(rows, edit, cells, genes)
    before = alone(bert, shortened(rows, cells, edited.n_cut), weights, -1)
    after = alone(bert, edited.tokens, weights, -1)
    np.testing.assert_allclose(np.concatenate([part.original for part in parts]), before, atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.concatenate([part.edited for part in parts]), after, atol=1e-5, rtol=0)
    shift = np.concatenate([cosine_shift(part.original, part.edited) for part in parts])
    truth = [
        1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        for x, y in zip(*map(np.float64, (before, after)), strict=True)
    ]
    np.testing.assert_allclose(shift, truth, atol=1e-5, rtol=0)
    assert (shift[~edited.changed] == 0).all() and (shift[edited.changed] > 0).all()


@pytest.mark.parametrize("pooling", ["weighted", "mean", "cls"])
@pytest.mark.parametrize("layer", [-1, -2, 0])
def test_every_readout(setting, pooling, layer):
    tokens, v, bert = setting
    weights, rows = pooling_weights(v, pooling), GeneRows(tokens, v)
    cells, genes = rows.expressed()
    edited = edit_rows(rows, Edit("delete"), cells, genes).tokens
    with RowEncoder(bert, v, weights, layer=layer, device="cpu") as encoder:
        got = encoder.vectors(edited)
    np.testing.assert_allclose(got, alone(bert, edited, weights, layer), atol=1e-5, rtol=0)


def test_neither_budget_nor_block_changes_a_vector():
    tokens, v = cells_of("bins")
    bert, weights, rows = (
        build_bert(v, "tiny", hidden_size=16, seed=1),
        pooling_weights(v, "weighted"),
        GeneRows(tokens, v),
    )
    cells, genes = rows.expressed()
    originals = embed_tokens(bert, tokens, weights, device="cpu")
    order = np.random.default_rng(1).permutation(len(cells))
    found = []
    for budget, chosen in ((1, slice(None)), (20, slice(None)), (10**6, slice(None)), (15, order)):
        with RowEncoder(bert, v, weights, device="cpu", token_budget=budget) as encoder:
            parts = list(edited_vectors(encoder, rows, Edit(), cells[chosen], genes[chosen], originals))
        assert budget > 100 or len(parts) > 1
        vectors = np.concatenate([part.edited for part in parts])
        found.append(vectors if chosen is not order else vectors[np.argsort(order)])
    for vectors in found[1:]:
        np.testing.assert_allclose(vectors, found[0], atol=1e-5, rtol=0)


def test_a_cell_that_loses_its_only_gene_has_no_vector():
    tokens, v = cells_of("bins")
    one = tokens[0].copy()
    gene = np.flatnonzero(v.is_gene_token(one.data))[1:]
    keep = np.setdiff1d(np.arange(one.nnz), gene)
    one = sparse.csr_matrix((one.data[keep], one.indices[keep], [0, len(keep)]), shape=one.shape)
    bert, weights = build_bert(v, "tiny", hidden_size=16), pooling_weights(v, "weighted")
    rows = GeneRows(one, v)
    with RowEncoder(bert, v, weights, device="cpu") as encoder:
        (part,) = edited_vectors(encoder, rows, Edit(), *rows.expressed(), encoder.vectors(one))
    assert np.isnan(part.edited).all() and part.changed.all() and np.isfinite(part.original).all()


def test_the_network_comes_back_as_it_went():
    tokens, v = cells_of("rank")
    bert = build_bert(v, "tiny", hidden_size=16).train()
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    with RowEncoder(bert, v, pooling_weights(v, "mean"), device="cpu") as encoder:
        assert not bert.training
        encoder.vectors(tokens)
    assert bert.training and all(torch.equal(before[name], tensor) for name, tensor in bert.state_dict().items())
    with pytest.raises(ScbinInputError, match="T14"):
        RowEncoder(bert, v, pooling_weights(v, "mean"), layer=9, device="cpu")


def test_plans_hold_every_row_once_and_keep_equal_ones_together():
    rng = np.random.default_rng(0)
    lengths = rng.choice([0, 5, 7, 7, 7, 30, 31], 200)
    for budget in (1, 40, 100, 10**6):
        packs = plan_equal(lengths, budget)
        assert np.sort(np.concatenate(packs)).tolist() == np.flatnonzero(lengths).tolist()
        assert all(len(pack) == 1 or lengths[pack].sum() <= budget for pack in packs)
        assert sum(len(set(lengths[pack])) > 1 for pack in packs) <= 1


def test_shifts_on_paper():
    rng = np.random.default_rng(0)
    x, y, states, centre = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.normal(size=(2, 3)), rng.normal(size=3)

    def cos(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    for c in (None, centre):
        o = np.zeros(3) if c is None else c
        assert np.allclose(cosine_shift(x, y, c), [1 - cos(a - o, b - o) for a, b in zip(x, y, strict=True)])
        truth = [[cos(b - o, s - o) - cos(a - o, s - o) for s in states] for a, b in zip(x, y, strict=True)]
        assert np.allclose(state_shift(x, y, states, c), truth)
    tiny = np.array([[1.0, 1e-6]])  # 1 - cosine in one step would be 0
    assert cosine_shift(np.array([[1.0, 0.0]]), tiny)[0] == pytest.approx(5e-13, rel=1e-6)
