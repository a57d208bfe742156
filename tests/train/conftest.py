from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from scbin.nn.backbone import seeded
from scbin.nn.network import CellNetwork, build_network
from scbin.nn.presets import Network
from scbin.nn.vector import PooledVector
from scbin.tokens.tokens import MemoryTokens
from scbin.tokens.vocabulary import Vocabulary
from scbin.train.loop import train
from scbin.train.settings import Training

spec = importlib.util.spec_from_file_location("toys", Path(__file__).with_name("toys.py"))
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)


class Toy:
    """100 cells of three kinds, one of them without tokens, and runs on them."""

    def __init__(self, n_cells=100, seed=0):
        rng = np.random.default_rng(seed)
        self.vocabulary = v = Vocabulary.build("rank", [f"G{i}" for i in range(30)], max_length=24)
        kind = rng.integers(0, 3, n_cells)
        rows = np.zeros((n_cells, v.n_positions), dtype=v.dtype)
        for cell in range(n_cells):
            genes = rng.permutation(np.flatnonzero(rng.random(30) < 0.1 + 0.5 * (np.arange(30) % 3 == kind[cell])))[:20]
            rows[cell, 0] = v.specials["[CLS]"]
            rows[cell, v.first_gene_position : v.first_gene_position + len(genes)] = v.first_gene_id + genes
        rows[3] = 0  # a cell that could not be encoded
        self.tokens = MemoryTokens(csr_matrix(rows), v)

    def network(self, dropout=0.0, hidden_size=16):
        with seeded(0):
            backbone = toys.MeanBackbone(self.vocabulary, hidden_size, dropout)
        return CellNetwork(backbone, PooledVector(self.vocabulary, hidden_size, "mean"))

    def bert(self, dropout=0.0):
        shape = Network(1, 16, 32, 2, hidden_dropout_prob=dropout)
        return build_network(self.vocabulary, shape, "bert", vector="pooled", vector_options={"pooling": "mean"})

    def task(self, hidden_size=16):
        with seeded(0):
            return toys.HideOne(self.vocabulary, hidden_size)

    def training(self, **changes):
        plain = {"epochs": 3, "cells_per_step": 32, "learning_rate": 3e-3, "patience": None}
        return Training(**{**plain, **changes})

    def run(self, network=None, *, tokens=None, task=None, save_dir=None, callbacks=(), **changes):
        network = self.network(dropout=0.1) if network is None else network
        how = {"save_dir": save_dir, "device": "cpu", "progress": False}
        how |= {key: changes.pop(key) for key in ("device", "seed", "cells", "held_out_cells") if key in changes}
        how["held_out"] = how.pop("held_out_cells", None)
        history = train(
            network,
            task or self.task(),
            tokens or self.tokens,
            self.training(callbacks=tuple(callbacks), **changes),
            **how,
        )
        return network, history


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small():
    return Toy()
