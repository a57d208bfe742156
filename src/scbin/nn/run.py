"""The one way of token rows through a backbone: embedding, prediction, perturbation, training and validation all take it."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from tqdm.auto import tqdm

from scbin._arguments import choices, instances
from scbin._errors import ScbinInputError
from scbin.nn.attention import has_bfloat16
from scbin.nn.packs import pack_rows, plan_packs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from scbin.nn.network import CellNetwork
    from scbin.nn.packs import Pack
    from scbin.tokens.tokens import Tokens
    from scbin.tokens.vocabulary import Vocabulary

Precision = Literal["auto", "float32", "bfloat16"]
_STRETCH = 16_384  # rows
_PROCESS = os.getpid()
_log = logging.getLogger(__name__)


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


# ---- where to compute, and how exactly ------------------------------------------------------------------------------


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device asked for; `"auto"` takes cuda, then mps, then cpu, and logs its choice.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    instances((str, torch.device), "a text, such as 'cuda'", device=device)
    if os.getpid() != _PROCESS:  # OpenMP's threads do not survive a fork: torch would wait for them for ever
        torch.set_num_threads(1)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if str(device) == "auto":
        name = next(name for name, here in present.items() if here)
        _log.info("computing on %s", name)
        return torch.device(name)
    try:
        chosen = torch.device(device)
        there = present[chosen.type] and (chosen.type != "cuda" or (chosen.index or 0) < torch.cuda.device_count())
    except (RuntimeError, KeyError) as error:
        raise ScbinInputError("A02", f"{device!r} is not a device; use 'auto', 'cuda', 'mps' or 'cpu'.") from error
    if not there:
        here = ", ".join(repr(name) for name, is_here in present.items() if is_here)
        raise ScbinInputError("A02", f"device {str(device)!r} is not on this machine. Here: {here}; 'auto' chooses.")
    return chosen


def resolve_precision(precision: Precision, device: torch.device, trains: int = 0) -> torch.dtype:
    """Return the type of the matrix products; `"auto"` takes bfloat16 on CUDA since Ampere.

    On CPUs it stays with float32, but for the training of networks: of a hidden size `trains` from 128 on, where there are
    instructions for products in bfloat16. Below, little is gained.
    """
    if precision != "auto":
        choices({"precision": get_args(Precision)}, precision=precision)
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    tells = (getattr(torch.cpu, f"_is_{unit}_supported", lambda: False) for unit in ("amx_tile", "avx512_bf16"))
    on_cpu = device.type == "cpu" and trains >= 128 and any(has_units() for has_units in tells)
    return torch.bfloat16 if on_cpu or (device.type == "cuda" and has_bfloat16(device)) else torch.float32


@contextmanager
def fast_products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """For a while let CUDA compute in TF32 what stays in float32 beside bfloat16; who asks for float32 gets all of its digits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if device.type == "cuda" and dtype != torch.float32:
        matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
