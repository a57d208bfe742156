"""Vectors of cells against plain transformers and a weighted mean in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, vstack
from transformers import BertConfig, BertForMaskedLM

from scbin._errors import ScbinInputError
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.bert import build_bert
from scbin.nn.embedding import embed_tokens, hide_phenotypes, pooling_weights

LAYERS = [-1, -2, 0, 1, 2]


@pytest.fixture(scope="module")
def cells(trained):
    adata, model = trained
    return adata.obsm["X_tokens"], model


def weights_of(model, pooling="weighted"):
    return model.weights(pooling)


def padded_states(bert, tokens):
    """All hidden states (layers + 1, cells, longest, hidden) of stock BERT with eager attention over a padded batch."""
    plain = BertForMaskedLM(BertConfig(**{**bert.config.to_dict(), "attn_implementation": "eager"})).eval()
    plain.load_state_dict(bert.state_dict())
    lengths = np.diff(tokens.indptr)
    ids, positions = np.zeros((2, tokens.shape[0], lengths.max()), dtype=np.int64)
    for i in range(tokens.shape[0]):
        ids[i, : lengths[i]] = tokens[i].data
        positions[i, : lengths[i]] = tokens[i].indices
    mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).long()
    with torch.no_grad():
        states = plain.bert(
            torch.from_numpy(ids),
            attention_mask=mask,
            position_ids=torch.from_numpy(positions),
            output_hidden_states=True,
        ).hidden_states
    return torch.stack(states).double().numpy(), ids, positions


def expected(model, tokens, pooling, layer):
    """The definition: the mean of the tokens' vectors, weighted by what the token's bin stands for and by its gene."""
    vocabulary = model.vocabulary
    states, ids, positions = padded_states(model.bert, tokens)
    first, genes = vocabulary.first_gene_id, len(vocabulary.genes)
    if pooling == "cls":
        return states[layer][:, 0]
    is_gene = (ids >= first) & (ids < first + vocabulary.n_levels)
    weights = is_gene.astype(np.float64)
    if pooling == "weighted":
        centres = np.asarray(vocabulary.bins.centres, dtype=np.float64)
        gene = np.clip(positions - vocabulary.first_gene_position, 0, genes - 1)
        weights *= centres[np.where(is_gene, ids - first, 0)] * np.array(model.readout.gene_weights)[gene]
    with np.errstate(invalid="ignore"):
        return (states[layer] * weights[..., None]).sum(1) / weights.sum(1)[:, None]


@pytest.mark.parametrize("pooling", ["weighted", "mean", "cls"])
@pytest.mark.parametrize("layer", LAYERS)
def test_equal_to_transformers_and_a_mean_in_float64(cells, pooling, layer):
    tokens, model = cells
    got = embed_tokens(model.bert, tokens, weights_of(model, pooling), layer=layer, device="cpu")
    truth = expected(model, tokens, pooling, layer)
    empty = np.diff(tokens.indptr) == 0
    assert empty.sum() == 1 and np.isnan(got[empty]).all()
    assert np.isfinite(got[~empty]).all() and got.dtype == np.float32
    assert np.abs(got[~empty] - truth[~empty]).max() < 1e-5


@pytest.mark.parametrize("encoding", ["rank", "gene_bins"])
def test_other_encodings_weigh_genes_by_token(encoding):
    from scbin.encoding.bins import Bins

    rng = np.random.default_rng(0)
    bins = None if encoding == "rank" else Bins((0.1, 1.0, 2.0))
    v = Vocabulary.build(encoding, [f"G{i}" for i in range(9)], bins=bins, max_length=12)
    levels = max(v.n_levels, 1)
    rows = np.zeros((5, v.n_positions), dtype=v.dtype)
    rows[:, 0], rows[:, 1] = v.specials["[CLS]"], v.specials["[START]"]
    gene = np.array([rng.permutation(9) if encoding == "rank" else np.arange(9) for _ in range(5)])
    level = np.zeros((5, 9), dtype=int) if encoding == "rank" else rng.integers(1, levels, (5, 9))
    rows[:, 2:11] = v.first_gene_id + levels * gene + level
    bert = build_bert(v, "tiny", hidden_size=16, seed=3).eval()
    importance = rng.random(9).astype(np.float32)
    got = embed_tokens(bert, csr_matrix(rows), pooling_weights(v, "weighted", importance), device="cpu")
    states, _, _ = padded_states(bert, csr_matrix(rows))
    weights = importance.astype(np.float64)[gene]
    if bins is not None:
        weights = weights * bins.centres.astype(np.float64)[level]
    truth = (states[-1][:, 2:11] * weights[..., None]).sum(1) / weights.sum(1)[:, None]
    assert np.abs(got - truth).max() < 1e-5


def test_neither_budget_nor_order_nor_company_changes_a_cell(cells):
    tokens, model = cells
    weights = weights_of(model)
    whole = embed_tokens(model.bert, tokens, weights, device="cpu")
    for budget in (1, 37, 100, 10**6):
        again = embed_tokens(model.bert, tokens, weights, device="cpu", token_budget=budget)
        np.testing.assert_allclose(again, whole, atol=1e-5, rtol=0)
    order = np.random.default_rng(0).permutation(tokens.shape[0])
    again = embed_tokens(model.bert, tokens[order], weights, device="cpu", token_budget=90)
    np.testing.assert_allclose(again, whole[order], atol=1e-5, rtol=0)
    for i in (0, 7, 59):
        alone = embed_tokens(model.bert, tokens[i], weights, device="cpu")
        np.testing.assert_allclose(alone[0], whole[i], atol=1e-5, rtol=0)
    crowd = vstack([tokens[5], tokens[5], tokens[40:], tokens[5]]).tocsr()
    again = embed_tokens(model.bert, crowd, weights, device="cpu")
    np.testing.assert_allclose(again[[0, 1, -1]], whole[[5, 5, 5]], atol=1e-5, rtol=0)


def test_rows_without_a_weighted_token_are_nan_wherever_they_stand(cells):
    tokens, model = cells
    empty = csr_matrix((1, tokens.shape[1]), dtype=tokens.dtype)
    bare = tokens[0].copy()
    keep = ~model.vocabulary.is_gene_token(bare.data)
    bare = csr_matrix((bare.data[keep], bare.indices[keep], [0, keep.sum()]), shape=bare.shape)
    rows = vstack([empty, tokens[1], empty, bare, tokens[2], empty]).tocsr()
    got = embed_tokens(model.bert, rows, weights_of(model), device="cpu")
    assert np.isnan(got).all(axis=1).tolist() == [True, False, True, True, False, True]
    whole = embed_tokens(model.bert, tokens[1:3], weights_of(model), device="cpu")
    np.testing.assert_allclose(got[[1, 4]], whole, atol=1e-5, rtol=0)
    assert embed_tokens(model.bert, tokens[:0], weights_of(model), device="cpu").shape == (0, 32)
    assert np.isnan(embed_tokens(model.bert, empty, weights_of(model), device="cpu")).all()


def test_phenotypes_are_hidden(cells):
    tokens, model = cells
    vocabulary = model.vocabulary
    hidden = hide_phenotypes(tokens, vocabulary)
    columns = [phenotype.position for phenotype in vocabulary.phenotypes]
    filled = np.diff(tokens.indptr) > 0
    assert (hidden[filled][:, columns].toarray() == vocabulary.mask_id).all()
    others = np.setdiff1d(np.arange(tokens.shape[1]), columns)
    assert (hidden[:, others] != tokens[:, others]).nnz == 0 and hidden[~filled].nnz == 0
    changed = tokens.copy()
    for phenotype in vocabulary.phenotypes:
        at = changed.indices == phenotype.position
        changed.data[at] = np.roll(changed.data[at], 1)
    assert (changed != tokens).nnz > 30
    assert (hide_phenotypes(changed, vocabulary) != hidden).nnz == 0
    shown = [embed_tokens(model.bert, rows, weights_of(model), device="cpu")[filled] for rows in (tokens, changed)]
    assert np.abs(shown[0] - shown[1]).max() > 1e-4  # the label would have been seen
    assert (tokens != cells[0]).nnz == 0


def test_the_network_comes_back_as_it_went(cells):
    tokens, model = cells
    model.bert.train()
    try:
        before = {name: tensor.clone() for name, tensor in model.bert.state_dict().items()}
        embed_tokens(model.bert, tokens[:3], weights_of(model), device="cpu")
        assert model.bert.training
        assert all(torch.equal(before[name], tensor) for name, tensor in model.bert.state_dict().items())
        with pytest.raises(ScbinInputError, match="T14"):
            embed_tokens(model.bert, tokens[:3], weights_of(model), layer=7, device="cpu")
        assert model.bert.training
    finally:
        model.bert.eval()


def test_poolings_that_there_are_not(cells):
    vocabulary = Vocabulary.build("rank", ["A"], layout="geneformer_v1")
    with pytest.raises(ScbinInputError, match="T16"):
        pooling_weights(vocabulary, "cls")
    with pytest.raises(ScbinInputError, match="A02.*'weighted', 'mean', 'cls'"):
        pooling_weights(vocabulary, "max")
