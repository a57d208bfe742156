"""The one way of token rows through a backbone: embedding, prediction, perturbation, training and validation all take it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from scbin.nn.device import resolve_device, resolve_precision
from scbin.nn.packs import pack_rows, plan_packs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from scbin.nn.device import Precision
    from scbin.nn.network import CellNetwork
    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens


class Runner:
    """A network on a device, in a precision, that takes packs."""

    def __init__(self, network: CellNetwork, device: str | torch.device = "auto", precision: Precision = "auto"):
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device, network.backbone.hidden_size)
        self.network = network.to(self.device)

    def autocast(self) -> torch.autocast:
        """Return the context in which matrix products are computed in the runner's precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def __call__(self, pack: Pack, layer: int = -1, **options: Any) -> Tensor:
        """Return the hidden states (T, hidden) of a pack; `options` are those of `Backbone.encode`."""
        with self.autocast():
            return self.network.backbone.encode(pack, layer, **options)


@contextmanager
def at_rest(network: CellNetwork) -> Iterator[None]:
    """For a while without dropout and gradients; afterwards back on its device and in its mode."""
    home, was_training = next(network.parameters()).device, network.training
    network.eval()
    try:
        yield
    finally:
        network.to(home).train(was_training)


def run(
    network: CellNetwork,
    tokens: Tokens,
    *,
    rows: np.ndarray | None = None,
    layer: int = -1,
    device: str = "auto",
    precision: Precision = "auto",
    token_budget: int = 32_768,
    progress: bool = False,
    label: str = "reading cells",
) -> Iterator[tuple[Pack, Tensor]]:
    """Yield packs of token rows with their hidden states (T, hidden), without gradients; rows without tokens are left out.

    `pack.cells` are row numbers of the tokens. The parameters `device`, `precision`, `token_budget` and `progress` are those
    of every verb.
    """
    rows = np.arange(tokens.n_cells) if rows is None else np.asarray(rows)
    packs = plan_packs(tokens.lengths[rows], token_budget)
    with at_rest(network):
        runner = Runner(network, device, precision)
        for places in tqdm(packs, desc=label, unit="pack", disable=not progress or len(packs) < 2):
            cells = rows[places]
            pack = pack_rows(tokens.take(cells), cells, runner.device)
            with torch.inference_mode():
                yield pack, runner(pack, layer)


def embed(network: CellNetwork, tokens: Tokens, **options: Any) -> np.ndarray:
    """Return one vector per cell (cells, size), NaN for cells without tokens; `options` are those of `run`."""
    result: np.ndarray | None = None
    for pack, hidden in run(network, tokens, layer=network.vector.layer, label="embedding", **options):
        with torch.inference_mode():
            vectors = network.vector(hidden, pack).float().cpu().numpy()
        if result is None:
            result = np.full((tokens.n_cells, vectors.shape[1]), np.nan, dtype=np.float32)
        result[pack.cells] = vectors
    return np.full((tokens.n_cells, network.vector.size), np.nan, np.float32) if result is None else result
