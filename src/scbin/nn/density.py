"""What a model remembers of where its training cells lie, so that it can generate cells like them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from scbin._errors import ScbinInputError
from scbin.nn.embedding import token_expression

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scbin.nn.counts import CountHead
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

MOST_CELLS, FEWEST_PER_VALUE, NEIGHBOURS = 4_000, 50, 10


class Density(nn.Module):
    """A kernel density of cell vectors, depth and phenotypes: some training cells, each blurred by the spread around it.

    Vectors within a class are far from Gaussian (subtypes, states), and differ in depth; a kernel density keeps both. A
    drawn cell is not a copy: its vector is that of a training cell plus a normal variable with the covariance of its neighbours.
    """

    kind = "cells"
    vectors: Tensor  # (cells, size)
    log_depth: Tensor  # (cells,)
    weights: Tensor  # (cells,) training cells that each of them stands for
    values: Tensor  # (cells, phenotypes) int64, number of the value, -1: missing
    typical: Tensor  # (genes,) mean value of a gene in the cells that express it
    variance: Tensor  # (genes,)

    def __init__(self, n_cells: int, size: int, n_phenotypes: int, n_genes: int):
        super().__init__()
        shapes: dict[str, Any] = {"vectors": (n_cells, size), "log_depth": n_cells, "weights": n_cells}
        for name, shape in {**shapes, "typical": n_genes, "variance": n_genes}.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("values", torch.full((n_cells, n_phenotypes), -1))

    def config(self) -> dict[str, Any]:
        """Return plain values from which `Density(**config)` builds the same shape."""
        (n_cells, size), n_phenotypes = self.vectors.shape, self.values.shape[1]
        return {"n_cells": n_cells, "size": size, "n_phenotypes": n_phenotypes, "n_genes": len(self.typical)}

    @classmethod
    def from_config(cls, vocabulary: Vocabulary, config: Mapping[str, Any]) -> Self:
        """Return an empty density of a shape, which has to fit the vocabulary."""
        if (config["n_phenotypes"], config["n_genes"]) != (len(vocabulary.phenotypes), len(vocabulary.genes)):
            raise ScbinInputError("M04", "the density has other phenotypes or genes than the vocabulary.")
        return cls(**config)

    @classmethod
    def fit(cls, tokens: Tokens, vectors: np.ndarray, *, cells: np.ndarray | None = None, seed: int = 0) -> Self:
        """Remember a random part of some cells (default: all), and at least a few of each value of each phenotype.

        `vectors` are those of all cells of the tokens (cells, size), not corrected for batches, NaN where there are no tokens.
        """
        cells = np.arange(tokens.n_cells) if cells is None else cells
        cells = np.random.default_rng(seed).permutation(cells[np.isfinite(vectors[cells]).all(axis=1)])
        rows, vocabulary = tokens.take(cells), tokens.vocabulary
        values = np.full((len(cells), len(vocabulary.phenotypes)), -1)
        for k, phenotype in enumerate(vocabulary.phenotypes):
            number = rows[:, [phenotype.position]].toarray().ravel().astype(np.int64) - phenotype.first_id
            values[:, k] = np.where((number >= 0) & (number < len(phenotype.values)), number, -1)
        kept = np.arange(len(cells)) < MOST_CELLS
        for column in values.T:
            for value in np.unique(column):
                kept[np.flatnonzero(column == value)[:FEWEST_PER_VALUE]] = True
        combination = np.unique(values, axis=0, return_inverse=True)[1].ravel()  # numpy 2.0 returned a column
        n_kept = np.bincount(combination[kept], minlength=combination.max(initial=-1) + 1)
        expression = token_expression(rows[kept], vocabulary)
        n, n_expressed = max(int(kept.sum()), 1), np.maximum(expression.getnnz(axis=0), 1)
        sums, squares = (np.asarray(part.sum(axis=0)).ravel() for part in (expression, expression.power(2)))
        density = cls(int(kept.sum()), vectors.shape[1], values.shape[1], len(sums))
        fitted = {
            "vectors": vectors[cells[kept]],
            "log_depth": np.log(np.maximum(np.asarray(expression.sum(axis=1)).ravel(), 1e-6)),
            "weights": (np.bincount(combination) / np.maximum(n_kept, 1))[combination[kept]],
            "values": values[kept],
            "typical": np.where(sums > 0, sums / n_expressed, 1.0),
            "variance": squares / n - (sums / n) ** 2,
        }
        for name, array in fitted.items():
            getattr(density, name).copy_(torch.from_numpy(array))
        return density

    def dispersion(self, head: CountHead) -> np.ndarray:
        """Return the theta (genes,) with which every gene varies as much as in the training cells.

        By moments: the variance of a gene is that of its mean, plus the mean, plus the mean square over theta.
        """
        mean = expected_shares(head, self.vectors) * np.exp(self.log_depth.cpu().numpy())[:, None]
        excess = self.variance.cpu().numpy() - mean.var(axis=0) - mean.mean(axis=0)
        return ((mean**2).mean(axis=0) / np.maximum(excess, 1e-9)).clip(0.1, 1e3)

    def draw(
        self, wanted: np.ndarray, generators: Sequence[np.random.Generator]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw vectors (N, size), log depths (N,) and values of phenotypes (N, phenotypes).

        A cell is drawn from those that agree with most of the wanted values; where one does not agree, its vector moves by
        the difference that this value makes on average.

        Parameters
        ----------
        wanted
            Number of the wanted value of each phenotype (N, phenotypes); -1 where it is open.
        generators
            One per cell, which alone decides what is drawn.
        """
        parts = (self.vectors, self.values, self.log_depth, self.weights)
        vectors, values, log_depth, weights = (part.cpu().numpy() for part in parts)
        chosen, drawn = np.empty(len(wanted), dtype=np.int64), np.empty((len(wanted), vectors.shape[1]))
        for pattern in np.unique(wanted, axis=0):
            agree = ((values == pattern) & (pattern >= 0)).sum(axis=1)
            complete = ((values >= 0) | (pattern >= 0)).all(axis=1)  # what is open shall have a value, if it can
            score = 2 * agree + complete
            pool = np.flatnonzero(score == score.max())
            bounds = np.cumsum(weights[pool], dtype=np.float64)
            for cell in np.flatnonzero((wanted == pattern).all(axis=1)):
                rng = generators[int(cell)]
                row = pool[np.searchsorted(bounds[:-1], rng.random() * bounds[-1], side="right")]
                distance = ((vectors[pool] - vectors[row]) ** 2).sum(axis=1)
                near = vectors[pool[np.argsort(distance, kind="stable")[:NEIGHBOURS]]]
                noise = rng.normal(size=NEIGHBOURS)[: len(near)] @ (near - near.mean(axis=0))
                chosen[cell], drawn[cell] = row, vectors[row] + noise / np.sqrt(max(len(near) - 1, 1))
        result = np.where(wanted >= 0, wanted, values[chosen])
        if (result != values[chosen]).any():  # vectors as a sum over phenotypes, by least squares
            columns = [np.arange(n) for n in values.max(axis=0, initial=0) + 1]
            tables = ([of[:, [k]] == n for k, n in enumerate(columns)] for of in (values, values[chosen], result))
            own, before, after = (np.hstack([np.ones((len(table[0]), 1)), *table]) for table in tables)
            ridge = np.diag(np.append(1e-9, np.ones(own.shape[1] - 1)))
            drawn += (after - before) @ np.linalg.solve(own.T @ own + ridge, own.T @ vectors)
        return drawn.astype(np.float32), log_depth[chosen], result


def expected_shares(head: CountHead, vectors: Tensor) -> np.ndarray:
    """Return the fraction of each gene in what cells with these vectors are expected to express (cells, genes)."""
    with torch.inference_mode():
        z = vectors.to(head.loadings.device)
        return head.log_mean(z, torch.zeros(len(z), device=z.device)).softmax(dim=1).cpu().numpy().astype(np.float64)
