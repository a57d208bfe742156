"""The smallest kinds of each noun: a backbone, a task, tokens that are not in memory."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, vstack
from torch import nn

from scbin.nn.packs import pack_rows, plan_packs
from scbin.tokens.tokens import philox
from scbin.train.task import Batch


class MeanBackbone(nn.Module):
    """Every token sees itself and the mean of its cell, through one hidden layer."""

    kind, n_layers = "toy", 1

    def __init__(self, vocabulary, hidden_size, dropout=0.0):
        super().__init__()
        self.hidden_size = hidden_size
        self.ids = nn.Embedding(vocabulary.n_tokens, hidden_size)
        self.positions = nn.Embedding(vocabulary.n_positions, hidden_size)
        self.mix = nn.Linear(2 * hidden_size, hidden_size)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(hidden_size)

    @classmethod
    def build(cls, vocabulary, preset):
        return cls(vocabulary, preset.hidden_size, preset.hidden_dropout_prob)

    @classmethod
    def from_config(cls, vocabulary, config):
        return cls(vocabulary, **config)

    def embed(self, pack):
        return self.ids(pack.input_ids) + self.positions(pack.position_ids)

    def encode(self, pack, layer=-1, *, gates=None):
        x = self.embed(pack)
        if layer == 0:
            return x
        lengths = torch.diff(pack.layout.cu_seqlens).long()
        means = torch.segment_reduce(x.float(), "mean", lengths=lengths, axis=0)[pack.rows]
        return self.norm(x + self.dropout(F.gelu(self.mix(torch.cat([x, means.to(x.dtype)], dim=1)))))

    def logits(self, hidden, start=0, stop=None, ids=None):
        table = self.ids.weight[start:stop] if ids is None else self.ids.weight[ids]
        return hidden @ table.T if ids is None else (hidden[:, None] * table).sum(-1)

    def tables(self):
        return self.ids.weight, self.positions.weight

    def config(self):
        return {"hidden_size": self.hidden_size, "dropout": self.dropout.p}


class HideOne(nn.Module):
    """Hide one token of each cell, and ask which it was and how long the row is."""

    losses, weights = ("token", "length"), (1.0, 0.5)

    def __init__(self, vocabulary, hidden_size=16):
        super().__init__()
        self.mask_id, self.length = vocabulary.mask_id, nn.Linear(hidden_size, 1)

    def prepare(self, tokens, cells, *, seed, epoch, token_budget):
        rows, packs = tokens.take(cells), []
        for part in plan_packs(np.diff(rows.indptr), token_budget):
            pack = pack_rows(rows[part], cells[part])
            draws = [np.random.default_rng([seed, epoch + 1, cell]).random() for cell in cells[part]]
            starts = np.concatenate([[0], np.cumsum(pack.layout.lengths)[:-1]])
            where = torch.from_numpy((starts + np.array(draws) * pack.layout.lengths).astype(np.int64))
            labels = pack.input_ids[where].clone()
            pack.input_ids[where] = self.mask_id
            packs.append((pack, {"where": where, "labels": labels, "lengths": torch.tensor(pack.layout.lengths)}))
        n = sum(pack.n_rows for pack, _ in packs)
        return Batch(packs, np.array([n, n], dtype=np.float64))

    def loss(self, network, hidden, pack, targets):
        picked = hidden[targets["where"]]
        guess = self.length(picked)[:, 0]
        return torch.stack([
            F.cross_entropy(network.backbone.logits(picked).float(), targets["labels"], reduction="sum"),
            (guess - targets["lengths"].float().log()).square().sum(),
        ])  # fmt: skip


class ListTokens:
    """Rows that are made when they are asked for, one by one, out of bytes."""

    def __init__(self, matrix, vocabulary):
        self.vocabulary, self.lengths = vocabulary, np.diff(matrix.indptr).astype(np.int64)
        self.rows = [(row.data.tobytes(), row.indices.tobytes()) for row in matrix]
        self.n_cells, self.width, self.types = matrix.shape[0], matrix.shape[1], (matrix.dtype, matrix.indices.dtype)

    @property
    def names(self):
        return pd.Index([f"row {number}" for number in range(self.n_cells)])

    def take(self, rows):
        made = [csr_matrix((0, self.width), dtype=self.types[0])]
        for data, indices in (self.rows[row] for row in rows):
            columns = np.frombuffer(indices, self.types[1])
            made.append(
                csr_matrix((np.frombuffer(data, self.types[0]), columns, [0, len(columns)]), shape=(1, self.width))
            )
        return vstack(made, format="csr")

    def obs(self, column):
        return pd.Series({"batch": ["a", "b"] * (self.n_cells // 2)}[column])

    def epoch_order(self, cells, seed, epoch):
        return philox(seed, epoch).permutation(np.sort(cells))
