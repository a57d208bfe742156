"""From cell vectors to the counts of every gene: a negative binomial."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from scbin.tokens.vocabulary import Vocabulary


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
