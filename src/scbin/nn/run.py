"""The one way of token rows through a backbone: embedding, prediction, perturbation, training and validation all take it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from scbin.nn.device import fast_products, resolve_device, resolve_precision
from scbin.nn.packs import pack_rows, plan_packs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from scbin.nn.device import Precision
    from scbin.nn.network import CellNetwork
    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

_STRETCH = 16_384  # rows


class Runner:
    """A network on a device, in a precision, that takes packs; `trains` says what `"auto"` precision is for."""

    def __init__(
        self, network: CellNetwork, device: Any = "auto", precision: Precision = "auto", *, trains: bool = False
    ):
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device, network.backbone.hidden_size if trains else 0)
        self.network = network.to(self.device)

    def autocast(self) -> torch.autocast:
        """Return the context in which matrix products are computed in the runner's precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def __call__(self, pack: Pack, layer: int = -1, **options: Any) -> Tensor:
        """Return the hidden states (T, hidden) of a pack; `options` are those of `Backbone.encode`."""
        with self.autocast():
            return self.network.backbone.encode(pack, layer, **{"gates": pack.gates, **options})


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
    layer: int | None = -1,
    device: str = "auto",
    precision: Precision = "auto",
    token_budget: int = 32_768,
    progress: bool = False,
    label: str = "reading cells",
) -> Iterator[tuple[Pack, Any]]:
    """Yield packs of token rows with their hidden states (T, hidden), without gradients; rows without tokens are left out.

    `pack.cells` are row numbers of the tokens. Without a `layer` the network is not asked: the states are None. The parameters
    `device`, `precision`, `token_budget` and `progress` are those of every verb.
    """
    rows = np.arange(tokens.n_cells) if rows is None else np.asarray(rows)
    stretches = np.array_split(rows, np.arange(_STRETCH, len(rows), _STRETCH))  # rows on disk are read in turn
    packs = [cells[places] for cells in stretches for places in plan_packs(tokens.lengths[cells], token_budget)]
    with at_rest(network):
        runner = Runner(network, device, precision)
        # autocast keeps the weights that it has cast until its outermost context is left: they are cast once
        with fast_products(runner.device, runner.dtype), torch.autocast(runner.device.type, enabled=False):
            for cells in tqdm(packs, desc=label, unit="pack", disable=not progress or len(packs) < 2):
                pack = pack_rows(tokens.take(cells), cells, runner.device)
                with torch.no_grad():  # in inference mode nothing would be kept
                    yield pack, None if layer is None else runner(pack, layer)


def gene_tokens(pack: Pack, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which tokens of a pack speak of genes, of which genes, and in which cells (n,)."""
    ids, positions = pack.input_ids.cpu().numpy(), pack.position_ids.cpu().numpy()
    at = np.flatnonzero(vocabulary.is_gene_token(ids))
    return at, vocabulary.genes_at(ids[at], positions[at]), pack.cells[pack.rows.cpu().numpy()[at]]


def embed(network: CellNetwork, tokens: Tokens, **options: Any) -> np.ndarray:
    """Return one vector per cell (cells, size), NaN for cells without tokens; `options` are those of `run`."""
    result = np.full((tokens.n_cells, network.vector.size), np.nan, dtype=np.float32)
    for pack, hidden in run(network, tokens, layer=network.vector_layer, label="embedding", **options):
        with torch.inference_mode():
            result[pack.cells] = network.vector(hidden, pack).float().cpu().numpy()
    return result
