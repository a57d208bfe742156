"""What an encoder is: three calls, whatever is behind them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from scbin.nn.packs import Pack


@runtime_checkable
class Backbone(Protocol):
    """What the package asks of an encoder; it is an `nn.Module` too.

    Its class has `build(vocabulary, preset)`, and `from_config(vocabulary, config)`, which builds the shape that `config()`
    describes. It may have `vector_options`, the arguments of the cell vector that suit it.
    """

    kind: str  # its name in `BACKBONES`
    hidden_size: int
    n_layers: int

    def embed(self, pack: Pack) -> Tensor:
        """Return what goes into the first layer (T, hidden)."""
        ...

    def encode(self, pack: Pack, layer: int = -1, *, gates: Tensor | None = None) -> Tensor:
        """Return the hidden states of a pack after one layer (T, hidden), computing none behind it.

        `layer` is -1 for the last, 0 for the embeddings. `gates` (T,) are logarithms added to the attention that each token receives.
        """
        ...

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None, *, ids: Tensor | None = None) -> Tensor:
        """Return the logits of the token ids from `start` to `stop` at some hidden states (M, stop - start).

        With `ids` (M, K), those of other ids for each hidden state (M, K).
        """
        ...

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return the embedding tables of the token ids (tokens, hidden) and of the positions (positions, hidden)."""
        ...

    def config(self) -> dict[str, Any]:
        """Return plain values that describe the shape."""
        ...


BACKBONES: dict[str, Any] = {}
"""Classes of backbones by kind; filled in `scbin.nn.network`. Add yours here."""


def token_logits(
    transformed: Tensor, weight: Tensor, bias: Tensor, start: int, stop: int | None, ids: Tensor | None
) -> Tensor:
    """Return logits (M, K) of the ids from `start` to `stop`, or of other `ids` (M, K) for each state."""
    if ids is None:
        return F.linear(transformed, weight[start:stop], bias[start:stop])
    rows = F.embedding(ids, weight)  # (M, K, hidden)
    return torch.einsum("mh,mkh->mk", transformed, rows.to(transformed.dtype)) + bias[ids]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """For a while draw weights from a seed; the global generator is afterwards where it was."""
    if not 0 <= seed < 2**63:
        raise ScbinInputError("A02", f"seed is {seed}; it needs to be a whole number from 0 to below 2**63.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        yield


def layer_number(layer: int, n_layers: int) -> int:
    """Return how many layers to compute for the hidden states of `layer`, which may count from the end."""
    number = layer if layer >= 0 else n_layers + 1 + layer
    if not 0 <= number <= n_layers:
        raise ScbinInputError("A02", f"layer is {layer}; this network has layers 0 (embeddings) to {n_layers}.")
    return number
