"""Expression values into bins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Bins:
    """How an expression value becomes a bin: bin k is where `edges[k - 1] <= value < edges[k]`, bin 0 is below all edges.

    The edges are increasing; with `zeros="drop"` bin 0 has no tokens (a gene that is not expressed is not in the row) and
    exists only as a label. `reads` says what the values must be; log1p values are natural logs of counts per `target_sum`.
    """

    edges: tuple[float, ...]
    zeros: Literal["drop", "keep"] = "drop"
    reads: Literal["log1p", "counts"] = "log1p"
    target_sum: float = 10_000.0

    @property
    def n_bins(self) -> int:
        """Number of bins above bin 0."""
        return len(self.edges)

    @cached_property
    def centres(self) -> np.ndarray:
        """Value each bin stands for (n_bins + 1,): 0, then the middle of each bin; the open last bin repeats its width."""
        edges = np.asarray(self.edges, dtype=np.float64)
        if len(edges) == 1:
            return np.array([0.0, 1.0], dtype=np.float32)
        widths = np.append(np.diff(edges), edges[-1] - edges[-2])
        return np.concatenate([[0.0], edges + widths / 2]).astype(np.float32)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Bins:
        """Read back `dataclasses.asdict`."""
        return cls(**{**fields, "edges": tuple(fields["edges"])})
