from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from transformers import BertConfig, BertForMaskedLM

from scbin.data.masking import MaskingScheme
from scbin.encoding.bins import Bins
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.bert import build_bert
from scbin.nn.recovery import hide_genes, recover_genes, row_keys

SCHEME = MaskingScheme(gene_mask_prob=0.3, phenotype_mask_prob=0.0, replacement=(1, 0, 0))


@pytest.fixture(scope="module", params=["bins", "rank", "gene_bins"])
def network(request):
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(12)]
    bins = None if request.param == "rank" else Bins((0.1, 1.0, 2.0))
    vocabulary = Vocabulary.build(request.param, genes, bins=bins, max_length=16)
    rows = np.zeros((5, vocabulary.n_positions), dtype=np.uint16)
    rows[:, 0], rows[:, 1] = 2, 4
    for row in rows:
        if request.param == "rank":
            row[2:10] = vocabulary.first_gene_id + rng.permutation(12)[:8]
        else:
            here = rng.permutation(12)[:8]
            step = vocabulary.n_levels if request.param == "gene_bins" else 0
            row[2 + here] = vocabulary.first_gene_id + step * here + rng.integers(1, 4, 8)
    bert = build_bert(vocabulary, "tiny", hidden_size=32).eval()
    return bert, csr_matrix(rows), vocabulary


def test_against_plain_transformers(network):
    bert, tokens, vocabulary = network
    found = recover_genes(bert, tokens, vocabulary, SCHEME, device="cpu")
    plain = BertForMaskedLM(BertConfig(**{**bert.config.to_dict(), "attn_implementation": "eager"})).double().eval()
    plain.load_state_dict(bert.state_dict())
    seen = 0
    for pack, targets, hidden in hide_genes(tokens, vocabulary, SCHEME):
        for row in range(pack.n_rows):
            a, b = pack.cu_seqlens[row : row + 2]
            with torch.no_grad():
                ids, positions = (torch.from_numpy(x[a:b])[None] for x in (pack.input_ids, pack.position_ids))
                logits = plain(input_ids=ids, position_ids=positions).logits[0].numpy()
            for k in np.flatnonzero((targets.where >= a) & (targets.where < b) & (targets.task == 0)):
                group = logits[targets.where[k] - a, targets.start[k] : targets.stop[k]]
                logs = group - np.log(np.exp(group).sum())
                mine = np.flatnonzero((found.hidden.cell == hidden.cell[k]) & (found.hidden.place == hidden.place[k]))[
                    0
                ]
                assert found.hidden.truth[mine] == targets.labels[k] - targets.start[k]
                assert found.predicted[mine] == group.argmax()
                assert found.log_probability[mine] == pytest.approx(logs[hidden.truth[k]], abs=1e-4)
                seen += 1
    assert seen == len(found.predicted) > 5


def test_neither_order_nor_budget_matters(network):
    bert, tokens, vocabulary = network
    order = np.array([3, 1, 4, 0, 2])
    whole = recover_genes(bert, tokens, vocabulary, SCHEME, device="cpu")
    other = recover_genes(bert, tokens[order], vocabulary, SCHEME, device="cpu", token_budget=20)
    cell = order[other.hidden.cell]
    again = np.lexsort((other.hidden.place, cell))
    np.testing.assert_array_equal(whole.hidden.cell, cell[again])
    np.testing.assert_array_equal(whole.hidden.truth, other.hidden.truth[again])
    np.testing.assert_allclose(whole.log_probability, other.log_probability[again], atol=1e-5)


def test_keys_follow_the_tokens(network):
    _, tokens, _ = network
    keys = row_keys(tokens)
    assert len(set(keys.tolist())) == 5
    np.testing.assert_array_equal(row_keys(tokens[[2, 0]]), keys[[2, 0]])


def test_nothing_to_hide(network):
    bert, tokens, vocabulary = network
    found = recover_genes(bert, tokens[:0], vocabulary, SCHEME, device="cpu")
    assert len(found.predicted) == len(found.hidden.cell) == 0
