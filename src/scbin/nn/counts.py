"""From cell vectors to the counts of every gene, and where the vectors of the training cells lie."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from scbin._errors import ScbinInputError
from scbin.nn.packs import token_expression

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

MOST_CELLS, FEWEST_PER_VALUE, NEIGHBOURS, ROUNDS = 4_000, 50, 10, 3  # of a density
# counts and cells that dispersions are fitted to; steps; cells
_DENSE, _FEWEST_CELLS, _NEWTON, _AT_ONCE = 2**21, 50, 12, 256


class CountHead(nn.Module):
    """What a cell vector says about the counts of every gene.

    The counts of a gene are negative binomial with mean `log mu = log depth + b[batch, gene] + w_gene . (s * z)` and a dispersion
    theta per gene, so that their variance is `mu + mu^2 / theta`. All in float32, also under autocast.

    Parameters
    ----------
    n_genes
        Of the vocabulary.
    size
        Of the cell vector z.
    batches
        Names of the batches that have gene means of their own. Default: one for all cells.
    dispersion
        Theta at the start.

    Examples
    --------
    >>> head = CountHead(n_genes=5, size=3)
    >>> head.log_mean(torch.zeros(2, 3), torch.zeros(2)).shape
    torch.Size([2, 5])
    """

    kind = "counts"
    batch_weights: Tensor

    def __init__(self, n_genes: int, size: int, batches: Sequence[str] = ("all",), dispersion: float = 2.0):
        super().__init__()
        self.batches = tuple(str(name) for name in batches)
        self.dispersion = float(dispersion)
        self.loadings = nn.Parameter(torch.zeros(n_genes, size))  # w
        self.scale = nn.Parameter(torch.ones(size))  # s
        self.bias = nn.Parameter(torch.full((len(self.batches), n_genes), -math.log(max(n_genes, 1))))  # b
        self.log_dispersion = nn.Parameter(torch.full((n_genes,), math.log(dispersion)))
        # fraction of the training cells in each batch: a cell of none of them has their mean
        self.register_buffer("batch_weights", torch.full((len(self.batches),), 1 / len(self.batches)))

    def config(self) -> dict[str, Any]:
        """Return plain values from which `from_config` builds the same head."""
        return {"size": self.loadings.shape[1], "batches": list(self.batches), "dispersion": self.dispersion}

    @classmethod
    def from_config(cls, vocabulary: Vocabulary, config: dict[str, Any]) -> CountHead:
        """Build the head that `config` describes, without its weights."""
        return cls(len(vocabulary.genes), **config)

    def log_mean(self, z: Tensor, log_depth: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return the log of the expected counts (B, genes) of cells with vectors z (B, size) and so many counts (B,) over all genes.

        `batch` (B,) is the number of each cell's batch, -1 where it is none of those known. Default: none of them.
        """
        with torch.autocast(z.device.type, enabled=False):
            mean = torch.logsumexp(self.bias + self.batch_weights.log()[:, None], dim=0)  # (genes,)
            bias = mean if batch is None else F.embedding(batch + 1, torch.cat([mean[None], self.bias]))
            return F.linear(z.float() * self.scale, self.loadings) + bias + log_depth.float()[:, None]

    def log_likelihood(
        self, log_mean: Tensor, rows: Tensor, genes: Tensor, counts: Tensor, asked: Tensor | None = None
    ) -> Tensor:
        """Return the log likelihood of each cell (B,), given the counts above 0 as triples.

        Zeros cost one softplus and no log-gamma, which is most of the time. `asked` (B, genes) says which genes count; default all.
        """
        theta = self.log_dispersion.exp()
        more = F.softplus(log_mean - self.log_dispersion)  # log(1 + mu / theta)
        zeros = -(more @ theta) if asked is None else -((more * asked) @ theta)
        own, ratio = theta[genes], log_mean[rows, genes] - self.log_dispersion[genes]
        shape = torch.lgamma(counts + own) - torch.lgamma(own) - torch.lgamma(counts + 1)
        return zeros.index_add(0, rows, shape + counts * (ratio - more[rows, genes]))

    def fit_dispersion(self, log_mean: Tensor, counts: csr_matrix, asked: np.ndarray | None = None) -> None:
        """Fit how far the counts (cells, genes) of every gene spread around expected ones, from where it stands now.

        By Newton's method, each gene by itself; slopes and curvatures are sums over cells. `asked` (cells, genes) says which count.
        """
        own, start, parts = self.log_dispersion, self.log_dispersion.detach().clone(), []
        asked = np.ones(counts.shape, dtype=bool) if asked is None else asked
        for first in range(0, len(log_mean), _AT_ONCE):
            here = slice(first, first + _AT_ONCE)
            (row, gene, count), known = triples(counts[here]), torch.from_numpy(asked[here])
            at = known[row, gene]
            parts.append((log_mean[here], row[at], gene[at], count[at], known))
        for _ in range(_NEWTON):
            slope, bend = own.detach() - start, torch.ones_like(start)
            for each in parts:
                (by_gene,) = torch.autograd.grad(-self.log_likelihood(*each).sum(), own, create_graph=True)
                bend += torch.autograd.grad(by_gene.sum(), own)[0]
                slope += by_gene.detach()
            own.data -= (slope / bend.abs().clamp_min(1)).clamp(-1, 1)
        own.data.clamp_(-5, 7)


def triples(counts: csr_matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, gene and number of the counts above 0 of some cells (n,), as likelihoods take them."""
    stored = counts.tocoo()
    row, gene = (torch.from_numpy(each.astype(np.int64)) for each in (stored.row, stored.col))
    return row, gene, torch.from_numpy(stored.data)


def enough_cells(n_genes: int) -> int:
    """Return how many cells tell the dispersions of so many genes."""
    return max(_DENSE // n_genes, _FEWEST_CELLS)


# ---- where the training cells lie -----------------------------------------------------------------------------------


class Density(nn.Module):
    """A kernel density of cell vectors, depth and phenotypes: some training cells, each blurred by the spread around it.

    Vectors within a class are far from Gaussian (subtypes, states), and differ in depth; a kernel density keeps both. A
    drawn cell is not a copy: its vector is that of a training cell plus a normal variable with the covariance of its neighbours.
    What the count head expects of it is corrected by a factor for each value of a phenotype and gene, so that cells with this
    value have the mean of every gene that the training cells have.
    """

    kind = "cells"
    vectors: Tensor  # (cells, size)
    log_depth: Tensor  # (cells,)
    weights: Tensor  # (cells,) training cells that each of them stands for
    values: Tensor  # (cells, phenotypes) int64, number of the value, -1: missing
    typical: Tensor  # (genes,) mean value of a gene in the cells that express it
    dispersion: Tensor  # (genes,) theta of the counts around what is expected
    factors: Tensor  # (values, genes), of each phenotype the values and behind them that of missing ones

    def __init__(self, n_cells: int, size: int, n_values: Sequence[int], n_genes: int):
        super().__init__()
        self.n_values = np.array(n_values, dtype=np.int64)  # of each phenotype
        shapes: dict[str, Any] = {"vectors": (n_cells, size), "log_depth": n_cells, "weights": n_cells}
        shapes |= {"typical": n_genes, "dispersion": n_genes, "factors": (sum(n_values) + len(n_values), n_genes)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("values", torch.full((n_cells, len(n_values)), -1))

    def config(self) -> dict[str, Any]:
        """Return plain values from which `Density(**config)` builds the same shape."""
        n_cells, size = self.vectors.shape
        return {"n_cells": n_cells, "size": size, "n_values": self.n_values.tolist(), "n_genes": len(self.typical)}

    @classmethod
    def from_config(cls, vocabulary: Vocabulary, config: Mapping[str, Any]) -> Self:
        """Return an empty density of a shape, which has to fit the vocabulary."""
        n_values = [len(phenotype.values) for phenotype in vocabulary.phenotypes]
        if (config["n_values"], config["n_genes"]) != (n_values, len(vocabulary.genes)):
            raise ScbinInputError("M04", "the density has other phenotypes or genes than the vocabulary.")
        return cls(**config)

    @classmethod
    def fit(
        cls, head: CountHead, tokens: Tokens, vectors: np.ndarray, *, cells: np.ndarray | None = None, seed: int = 0
    ) -> Self:
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
        sums, n_expressed = np.asarray(expression.sum(axis=0)).ravel(), np.maximum(expression.getnnz(axis=0), 1)
        n_values = [len(phenotype.values) for phenotype in vocabulary.phenotypes]
        density = cls(int(kept.sum()), vectors.shape[1], n_values, len(sums))
        fitted = {
            "vectors": vectors[cells[kept]],
            "log_depth": np.log(np.maximum(np.asarray(expression.sum(axis=1)).ravel(), 1e-6)),
            "weights": (np.bincount(combination) / np.maximum(n_kept, 1))[combination[kept]],
            "values": values[kept],
            "typical": np.where(sums > 0, sums / n_expressed, 1.0),
        }
        for name, array in fitted.items():
            getattr(density, name).copy_(torch.from_numpy(array))
        if n_values:  # without phenotypes no cells are generated
            density._calibrate(head, expression)
        return density

    def _calibrate(self, head: CountHead, expression: csr_matrix) -> None:
        """Fit the factors to the expression of the remembered cells (cells, genes), and how far it spreads around the corrected means."""
        self.factors.fill_(1.0)
        own, n_cells = (self.vectors.numpy(), self.log_depth.numpy(), self.values.numpy()), len(self.values)

        def expected(part: slice) -> np.ndarray:
            return self.expected(head, *(each[part] for each in own))

        parts, seen = [slice(first, first + _AT_ONCE) for first in range(0, n_cells, _AT_ONCE)], []
        for rows in self._rows(self.values.numpy()).T:
            of_value = csr_matrix((np.ones(n_cells), (rows, np.arange(n_cells))), (len(self.factors), n_cells))
            seen.append((rows, of_value @ expression))
        for _ in range(ROUNDS):  # raking: one phenotype after the other, until the means of all are right
            for rows, sums in seen:
                found = np.zeros(self.factors.shape)
                for part in parts:
                    np.add.at(found, rows[part], expected(part))
                self.factors *= torch.from_numpy((sums.toarray() + 1) / (found + 1))
        some, spread = slice(enough_cells(expression.shape[1])), CountHead(expression.shape[1], 1)
        spread.fit_dispersion(torch.from_numpy(np.log(expected(some))).float(), expression[some])
        self.dispersion.copy_(spread.log_dispersion.detach().exp())

    def _rows(self, values: np.ndarray) -> np.ndarray:
        """Return the rows of the factors for values of phenotypes (cells, phenotypes)."""
        return np.cumsum(self.n_values + 1) - (self.n_values + 1) + values % (self.n_values + 1)

    def expected(self, head: CountHead, vectors: np.ndarray, log_depth: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the expected expression of cells (cells, genes) with these vectors, depths and values of phenotypes."""
        shares = expected_shares(head, torch.from_numpy(vectors))
        for rows in self._rows(values).T:
            shares *= self.factors.cpu().numpy()[rows]
        return shares * (np.exp(log_depth) / shares.sum(axis=1))[:, None]

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
