"""The last step of an embedding: from the pooled vector of a cell to its place among other cells."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

WIDTH, MOST_WIDTH = 128, 4096  # of the hidden layer, by default and at most
DROPOUT = 0.05
_BATCH, _RATE, _DECAY = 256, 2e-3, 1e-3


@dataclass(frozen=True, eq=False)
class Projection:
    """A line and a bend: a linear map plus a small hidden layer, on standardised vectors. A cell's place is its own affair.

    Parameters
    ----------
    centre, scale
        Mean of the vectors it was fitted on, and one over their deviations (hidden,).
    linear
        The linear map (hidden, places).
    inner, inner_bias
        Into the hidden layer (hidden, width), (width,).
    outer, bias
        Out of it (width, places), (places,).
    own, length
        Directions of what a cell has for itself (own, places), orthonormal, and how much of it every cell is given (1,). `None`:
        cells have as much as they have.
    """

    centre: np.ndarray
    scale: np.ndarray
    linear: np.ndarray
    inner: np.ndarray
    inner_bias: np.ndarray
    outer: np.ndarray
    bias: np.ndarray
    own: np.ndarray | None = None
    length: np.ndarray | None = None

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Return the places (cells, places) of pooled vectors (cells, hidden); NaN stays NaN."""
        with torch.inference_mode():
            standard = torch.from_numpy(((vectors - self.centre) * self.scale).astype(np.float32))
            hidden = F.gelu(standard @ torch.from_numpy(self.inner) + torch.from_numpy(self.inner_bias))
            placed = standard @ torch.from_numpy(self.linear) + hidden @ torch.from_numpy(self.outer)
            return self._evened(placed + torch.from_numpy(self.bias)).numpy()

    def _evened(self, placed: Tensor) -> Tensor:
        """Give all cells (cells, places) the same length of what they have for themselves."""
        if self.own is None or self.length is None:
            return placed
        directions = torch.from_numpy(self.own)
        own = placed @ directions.T
        stretch = torch.from_numpy(self.length) / own.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return placed + ((stretch - 1) * own) @ directions

    # ---- storage ----------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, int]:
        """Return what tells the shapes of the `tensors`."""
        return {"width": self.width} | ({"own": self.n_own} if self.n_own else {})

    def tensors(self) -> dict[str, np.ndarray]:
        """Return everything there is as float32 arrays by name."""
        arrays = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: array for name, array in arrays.items() if array is not None}

    @property
    def width(self) -> int:
        """Of the hidden layer."""
        return len(self.inner_bias)

    @property
    def n_own(self) -> int:
        """Number of directions of what a cell has for itself."""
        return 0 if self.own is None else len(self.own)

    @staticmethod
    def shapes(hidden_size: int, width: int, n_own: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of the `tensors`."""
        wide, square = (hidden_size,), (hidden_size, hidden_size)
        shapes: dict[str, tuple[int, ...]] = {
            "centre": wide, "scale": wide, "linear": square, "inner": (hidden_size, width), "inner_bias": (width,),
            "outer": (width, hidden_size), "bias": wide,
        }  # fmt: skip
        return shapes | {"own": (n_own, hidden_size), "length": (1,)} if n_own else shapes

    def flat(self) -> np.ndarray:
        """Return `width`, `n_own` and all numbers of the `tensors`, laid end to end."""
        return np.concatenate([[self.width, self.n_own], *(array.ravel() for array in self.tensors().values())])

    @classmethod
    def from_flat(cls, numbers: np.ndarray, hidden_size: int) -> Projection:
        """Read back what `flat` gave."""
        width, n_own = numbers[:2].astype(int)
        shapes = cls.shapes(hidden_size, width, n_own)
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])[:-1]
        parts = zip(shapes.items(), np.split(numbers[2:], ends), strict=True)
        return cls.from_tensors({name: part.reshape(shape) for (name, shape), part in parts})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Projection:
        """Read back `tensors`."""
        return cls(**{name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()})


def fit_projection(
    vectors: np.ndarray,
    places: np.ndarray,
    own: np.ndarray | None = None,
    *,
    width: int = WIDTH,
    n_steps: int = 3_000,
    dropout: float = DROPOUT,
    seed: int = 0,
) -> Projection:
    """Fit the projection that takes vectors (cells, hidden) nearest to their places (cells, k), laid out in `hidden` numbers.

    The places are turned at random into the hidden size, distances stay; where they have more numbers than that, the last
    ones are left out. The same seed gives the same projection on one machine, and no global generator moves.

    Parameters
    ----------
    vectors
        Pooled vectors of cells.
    places
        Where each should lie, the leading directions first.
    own
        What each has for itself (cells, own), in all cells of one length: the projection will give that to all.
    width
        Of the hidden layer.
    n_steps
        Of the optimiser, at most; few cells need fewer.
    dropout
        In the hidden layer, and half of it on the vectors: a smoother map that holds better for new cells.
    seed
        Of weights, order and rotation.

    Examples
    --------
    >>> vectors = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    >>> fit_projection(vectors, vectors[:, :3])(vectors).shape
    (100, 8)
    """
    hidden_size = vectors.shape[1]
    n_shared = min(places.shape[1], hidden_size)
    places = (places if own is None else np.hstack([places, own]))[:, :hidden_size]
    centre, deviation = vectors.mean(axis=0, dtype=np.float64), vectors.std(axis=0, dtype=np.float64)
    scale = np.where(deviation > 1e-8, 1 / np.maximum(deviation, 1e-8), 0.0)
    middle, spread = places.mean(axis=0), max(float(places.std()), 1e-12)
    x = torch.from_numpy(((vectors - centre) * scale).astype(np.float32))
    y = torch.from_numpy(((places - middle) / spread).astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        line, inner, outer = _fit(x, y, width, min(n_steps, 4 * len(x)), dropout)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((hidden_size, hidden_size)))
    turn = rotation[: places.shape[1]]
    tensors = {
        "centre": centre,
        "scale": scale,
        "linear": spread * _array(line.weight).T @ turn,
        "inner": _array(inner.weight).T,
        "inner_bias": _array(inner.bias),
        "outer": spread * _array(outer.weight).T @ turn,
        "bias": (spread * _array(line.bias + outer.bias) + middle) @ turn,
    }
    if n_shared < places.shape[1]:
        length = np.sqrt(np.square(places[:, n_shared:]).sum(axis=1).mean(keepdims=True))
        tensors |= {"own": turn[n_shared:], "length": length}
    return Projection.from_tensors(tensors)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def _fit(x: Tensor, y: Tensor, width: int, n_steps: int, dropout: float) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Return a linear map and two layers beside it whose sum takes x to y, by AdamW with a falling rate."""
    line, inner, outer = nn.Linear(x.shape[1], y.shape[1]), nn.Linear(x.shape[1], width), nn.Linear(width, y.shape[1])
    parameters = [*line.parameters(), *inner.parameters(), *outer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    with torch.enable_grad():
        for _ in range(n_steps):
            rows = torch.randint(len(x), (min(_BATCH, len(x)),))
            hidden = F.dropout(F.gelu(inner(F.dropout(x[rows], dropout / 2))), dropout)
            loss = (line(x[rows]) + outer(hidden) - y[rows]).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return line, inner, outer
