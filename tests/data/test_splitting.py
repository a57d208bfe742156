"""Splits: every cell on one side, donors never on two."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scbin.data.dropping import drop_genes
from scbin.data.splitting import folds_of, share_of
from scbin.encoding.vocabulary import Vocabulary

CLASSES = np.repeat([0, 1, 2], [70, 25, 5])
GROUPS = np.arange(100) % 10


def test_folds_have_the_classes_in_like_shares():
    folds = folds_of(CLASSES, 5, seed=1)
    table = np.array([[((folds == f) & (CLASSES == c)).sum() for c in range(3)] for f in range(5)])
    assert (table == [14, 5, 1]).all()
    assert (folds != folds_of(CLASSES, 5, seed=2)).any() and (folds == folds_of(CLASSES, 5, seed=1)).all()


def test_a_group_stands_in_one_fold():
    folds = folds_of(CLASSES, 5, groups=GROUPS, seed=0)
    assert all(len(np.unique(folds[GROUPS == group])) == 1 for group in range(10))
    assert (np.bincount(folds) == 20).all()
    assert folds_of(CLASSES, 50, groups=GROUPS).max() == 9


@pytest.mark.parametrize("seed", range(5))
def test_a_share_is_held_out_and_no_class_as_a_whole(seed):
    classes = np.append(CLASSES, 3)
    held_out = share_of(classes, 0.2, seed=seed)
    assert 18 <= held_out.sum() <= 23 and not held_out[-1]
    assert all((held_out[classes == c]).any() for c in range(2))
    assert all((~held_out[classes == c]).any() for c in range(4))
    assert not share_of(classes, 0.0, seed=seed).any()
    assert share_of(classes, 0.5, most=10, seed=seed).sum() <= 12


@pytest.mark.parametrize("seed", range(3))
def test_whole_groups_are_held_out(seed):
    held_out = share_of(CLASSES, 0.2, groups=GROUPS, seed=seed)
    assert held_out.sum() == 20
    assert all(len(np.unique(held_out[GROUPS == group])) == 1 for group in range(10))
    assert not share_of(CLASSES, 0.2, groups=np.zeros(100), seed=seed).any()


def test_genes_are_dropped_by_cell_and_key_alone():
    vocabulary = Vocabulary.build("rank", [f"G{i}" for i in range(50)], max_length=60)
    rows = np.zeros((20, 60), dtype=vocabulary.dtype)
    rows[:, 0], rows[:, 1] = 2, 4
    rows[:, 2:52] = vocabulary.first_gene_id + np.arange(50)
    rows[3, 3:] = 0
    tokens = csr_matrix(rows)
    cells = np.arange(20)
    thin = drop_genes(tokens, cells, vocabulary, 0.3, 7)
    assert abs(thin.nnz / tokens.nnz - 0.7) < 0.05
    assert (thin.toarray()[:, :2] == rows[:, :2]).all() and thin[3].nnz == 3
    mixed = drop_genes(tokens, cells[::-1], vocabulary, 0.3, 7)
    assert (mixed[::-1] != thin).nnz == 0
    assert (drop_genes(tokens, cells, vocabulary, 0.3, 8) != thin).nnz > 0
    assert (drop_genes(tokens, cells, vocabulary, 0.0, 7) != tokens).nnz == 0
