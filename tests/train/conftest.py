from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse import csr_matrix

from scbin.encoding.bins import Bins
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.bert import build_bert
from scbin.train.linear import Features, spread_of
from scbin.train.objective import Objective
from scbin.train.settings import TrainSettings
from scbin.train.terms import Contrastive


class Toy:
    """A small data set with three kinds of cells, and runs on it."""

    def __init__(self, n_cells=100, seed=0):
        rng = np.random.default_rng(seed)
        genes = [f"G{i}" for i in range(30)]
        phenotypes = {"cell_type": ["a", "b", "c"]}
        self.vocabulary = v = Vocabulary.build("bins", genes, phenotypes=phenotypes, bins=Bins((0.1, 1.0, 2.0)))
        kind = rng.integers(0, 3, n_cells)
        level = rng.integers(1, 4, (n_cells, 30)) * (
            rng.random((n_cells, 30)) < 0.2 + 0.6 * (np.arange(30) % 3 == kind[:, None])
        )
        rows = np.zeros((n_cells, v.n_positions), dtype=v.dtype)
        rows[:, 0], rows[:, 2], rows[:, -1] = v.specials["[CLS]"], v.specials["[START]"], v.specials["[END]"]
        rows[:, 1] = v.phenotypes[0].first_id + kind
        rows[:, v.gene_positions] = np.where(level > 0, v.first_gene_id + level, 0)
        rows[3] = 0  # a cell that could not be encoded
        self.tokens = csr_matrix(rows)

    def bert(self, **overrides):
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
        return build_bert(self.vocabulary, "tiny", **{**shape, **overrides})

    def objective(self, contrastive=0.5, **kwargs):
        return Objective(self.vocabulary, cell_terms=[Contrastive(contrastive)], **kwargs)

    def settings(self, **changes):
        plain = {"epochs": 3, "cells_per_step": 32, "progress": False, "device": "cpu", "learning_rate": 3e-3}
        return TrainSettings(**{**plain, **changes})


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small():
    return Toy()


@pytest.fixture(scope="session")
def data():
    """Vectors and expression of 100 cells (`Features`), and which of three classes each is."""
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], [60, 30, 10])
    z = rng.normal(size=(100, 4)) + np.eye(4)[:3][classes]
    x = sp.random(100, 30, 0.3, random_state=0, format="csr")
    return Features(z, x, spread_of(x)), classes
