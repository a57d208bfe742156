"""Where training starts: at the principal components of the data, and at the mean of every gene."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import LinearOperator, svds

from scbin.nn.packs import log_normalised, token_expression
from scbin.nn.vector import LatentVector

if TYPE_CHECKING:
    from scbin.nn.backbone import Backbone
    from scbin.nn.counts import CountHead
    from scbin.nn.network import CellNetwork
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary
    from scbin.train.pretraining import Pretraining

MOST_CELLS = 20_000  # more change the leading components little
GENE_TABLE = 0.3  # standard deviation of the gene vectors that go into the backbone


class Components(NamedTuple):
    """Principal components of log-normalised expression: the scores of a cell are `(expression - mean) @ directions`."""

    directions: np.ndarray  # (genes, k), orthonormal columns, the sign of the largest entry positive
    spreads: np.ndarray  # (k,) standard deviations of the scores, decreasing
    means: np.ndarray  # (batches, genes) mean expression in each batch


@torch.no_grad()
def start(
    network: CellNetwork, task: Pretraining, tokens: Tokens, cells: np.ndarray, batches: Any = None, *, seed: int = 0
) -> None:
    """Start a new network from what the data say about genes, in place.

    The leading principal components become the gene table of the backbone, the first layer of the cell vector and the loadings
    of the count head; the mean of every gene, in each batch, becomes its bias. `cells` are the rows to look at, those that are
    trained on; of more than 20,000 a random part. `batches` are the number of the batch of each row of the tokens (rows,), as
    the count head knows them: each batch is centred by itself. Only genes that some cell expresses will be asked for as
    unexpressed.
    """
    generator, cells = np.random.default_rng(seed), cells[tokens.lengths[cells] > 0]
    if len(cells) > MOST_CELLS:
        cells = np.sort(generator.choice(cells, MOST_CELLS, replace=False))
    rows, vocabulary = tokens.take(cells), tokens.vocabulary
    codes = np.zeros(len(cells), dtype=np.int64) if batches is None else batches[cells]
    if vocabulary.bins is not None and not vocabulary.keeps_zeros and task.zero_positions is None:
        task.zero_positions = np.intersect1d(vocabulary.gene_positions, rows.indices)
    counts = token_expression(rows, vocabulary).astype(np.float64)
    vector = network.vector if isinstance(network.vector, LatentVector) else None
    found = components(log_normalised(counts, vocabulary), vector.size if vector else 30, codes, seed=seed)
    start_gene_table(network.backbone, vocabulary, found, generator)
    if vector is not None:
        vector.start_from(found.directions, found.spreads, found.means.mean(axis=0))
    if network.counts is not None:
        start_counts(network.counts, found, counts, codes)


def components(matrix: csr_matrix, n: int, batches: np.ndarray | None = None, *, seed: int = 0) -> Components:
    """Return the principal components of a sparse matrix (cells, genes), each batch centred by itself, never made dense.

    Examples
    --------
    >>> from scipy.sparse import random
    >>> components(random(50, 20, density=0.3, format="csr", random_state=0), 5).directions.shape
    (20, 5)
    """
    n_cells, n_genes = matrix.shape
    codes = np.zeros(n_cells, dtype=np.int64) if batches is None else batches
    batch = csr_matrix((np.ones(n_cells), (codes, np.arange(n_cells))), shape=(codes.max(initial=0) + 1, n_cells))
    sizes = np.maximum(np.diff(batch.indptr), 1)
    means = (batch @ matrix).toarray() / sizes[:, None]  # (batches, genes)
    centred = LinearOperator(
        matrix.shape,
        matvec=lambda vector: matrix @ vector.ravel() - (means @ vector.ravel())[codes],
        rmatvec=lambda vector: matrix.T @ vector.ravel() - means.T @ (batch @ vector.ravel()),
    )
    k = min(n, n_cells - 1, n_genes - 1)
    variance = matrix.data @ matrix.data - (sizes[:, None] * means**2).sum()
    if k < 1 or variance <= 1e-9 * max(matrix.sum(), 1):  # cells that are all alike
        return Components(np.zeros((n_genes, 1)), np.ones(1), means)
    _, values, vectors = svds(centred, k=k, v0=np.random.default_rng(seed).standard_normal(min(matrix.shape)))
    order = np.argsort(-values)
    values, vectors = values[order], vectors[order]
    signs = np.sign(vectors[np.arange(k), np.abs(vectors).argmax(axis=1)])  # as in scikit-learn
    return Components((vectors * signs[:, None]).T, np.maximum(values / np.sqrt(n_cells - 1), 1e-6), means)


def start_gene_table(backbone: Backbone, vocabulary: Vocabulary, found: Components, generator: Any) -> None:
    """Add to the vector of each gene its place along the components, so that genes that vary together look alike.

    The components are turned at random into the hidden size, which keeps angles. A gene's vector is that of its position, or
    where positions are ranks that of its token.
    """
    k = min(found.directions.shape[1], backbone.hidden_size)
    rotation, _ = np.linalg.qr(generator.standard_normal((backbone.hidden_size, backbone.hidden_size)))
    table = found.directions[:, :k] @ rotation[:k]
    table *= GENE_TABLE / max(float(table.std()), 1e-12)
    told = vocabulary.tables()
    for weight, genes in zip(backbone.tables(), (told.gene_of_id, told.gene_of_position), strict=True):
        at = np.flatnonzero(genes >= 0)
        weight[torch.from_numpy(at)] += torch.from_numpy(table[genes[at]]).to(weight)


def start_counts(head: CountHead, found: Components, counts: csr_matrix, codes: np.ndarray) -> None:
    """Start the count head: loadings at the components, biases at the log mean of each gene in each batch.

    A batch is drawn towards all cells by as much as five cells would say.
    """
    k = min(found.directions.shape[1], head.loadings.shape[1])
    head.loadings[:, :k] = torch.from_numpy(found.directions[:, :k]).to(head.loadings)
    depth, total = (np.asarray(counts.sum(axis=axis)).ravel() for axis in (1, 0))
    typical = float(np.median(depth)) if len(depth) else 1.0
    prior = 5 * max(typical, 1e-3) * (total + 1e-3) / (total + 1e-3).sum()
    for batch in range(len(head.batches)):
        mine = codes == batch
        sums = np.asarray(counts[mine].sum(axis=0)).ravel() + prior
        head.bias[batch] = torch.from_numpy(np.log(sums / (depth[mine].sum() + prior.sum()))).to(head.bias)
        head.batch_weights[batch] = mine.mean() if len(mine) else 1.0
