"""Terms of the loss that score the vectors of whole cells."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from scbin.nn.attention import to_device
from scbin.nn.losses import info_nce


class Contrastive(nn.Module):
    """Two random halves of a cell's genes must find each other among those of all cells of the step."""

    def __init__(self, weight: float = 1.0, temperature: float = 0.1, centred: bool = True):
        super().__init__()
        self.name, self.weight, self.temperature, self.centred = "contrastive", weight, temperature, centred

    def forward(self, z_a: Tensor, z_b: Tensor, cells: np.ndarray) -> Tensor:
        """Return the loss over all cells of the step."""
        return info_nce(z_a, z_b, self.temperature, self.centred)


class Denoising(nn.Module):
    """Each half of a cell's genes must say where the whole cell lay before training.

    The target is the cell's vector under the starting network, which with the SVD's gene table is its place among the
    leading components of the data. So the vectors learn to be robust to the genes that happened to be counted, and what the
    SVD knew is not unlearned. The loss is the squared distance over the variance of the targets: 1 for a constant answer.

    Parameters
    ----------
    targets
        One vector per row of the token matrix (cells, hidden); NaN for rows that are not trained on.
    weight
        Of the term.
    """

    def __init__(self, targets: np.ndarray, weight: float = 1.0):
        super().__init__()
        self.name, self.weight = "denoising", weight
        known = np.isfinite(targets).all(axis=1)
        spread = float(targets[known].var(axis=0, dtype=np.float64).sum()) if known.any() else 0.0
        length = float(np.square(targets[known], dtype=np.float64).sum(axis=1).mean()) if known.any() else 0.0
        # cells that are all alike have no spread but what rounding gives them
        self._scale = 1 / (spread if spread > 1e-9 * length else max(length, 1.0))
        self.targets = np.nan_to_num(targets).astype(np.float32)  # on the host: as large as the data

    def forward(self, z_a: Tensor, z_b: Tensor, cells: np.ndarray) -> Tensor:
        """Return the loss over all cells of the step."""
        target = to_device(self.targets[cells], z_a.device)
        return self._scale * 0.5 * ((z_a - target).square() + (z_b - target).square()).sum(1).mean()
