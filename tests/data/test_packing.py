from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import random as random_sparse

from scbin.data.packing import make_pack, plan_packs, take_rows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 100))
def test_every_row_once_and_within_the_budget(lengths, budget):
    lengths = np.array(lengths, dtype=np.int64)
    packs = plan_packs(lengths, budget)
    assert sorted(np.concatenate([*packs, []])) == list(np.flatnonzero(lengths))
    for pack in packs:
        assert lengths[pack].sum() <= budget or len(pack) == 1
    # first fit leaves at most one pack half empty
    assert sum(lengths[pack].sum() * 2 <= budget for pack in packs) <= 1


def test_packs_are_full():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(975), 0.4, 2000), 100, 2048).astype(int)
    packs = plan_packs(lengths, 16_384)
    assert lengths.sum() / (len(packs) * 16_384) > 0.97


def test_a_pack_is_the_rows_of_the_matrix():
    tokens = random_sparse(30, 20, 0.4, format="csr", random_state=0, dtype=np.float64)
    tokens.data = np.arange(1, tokens.nnz + 1).astype(np.uint16)
    tokens.sort_indices()
    cells = np.array([7, 3, 29, 0])
    pack = make_pack(tokens, cells)
    dense = np.zeros((4, 20), dtype=np.int64)
    dense[np.repeat(np.arange(4), pack.lengths), pack.position_ids] = pack.input_ids
    assert np.array_equal(dense, tokens[cells].toarray())
    part, where = take_rows(pack, np.array([2, 0]))
    assert np.array_equal(part.cells, [29, 7])
    assert np.array_equal(part.input_ids, pack.input_ids[where])
