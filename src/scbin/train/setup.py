"""What a run needs before its first step: device, cells, genes, and a network made ready."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from scbin._errors import ScbinInputError
from scbin.data.masking import split_cells
from scbin.nn.device import resolve_device
from scbin.nn.embedding import embed_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scipy.sparse import csr_matrix
    from transformers import BertForMaskedLM

    from scbin.nn.embedding import Weights
    from scbin.train.distributed import World
    from scbin.train.objective import Objective
    from scbin.train.settings import TrainSettings


@contextmanager
def ready(bert: BertForMaskedLM, settings: TrainSettings) -> Iterator[None]:
    """Make the network ready for training, and take that back in the end.

    The biases of the keys rest: they move every score of a query alike, so their gradient is zero but for rounding, which
    AdamW would blow up to full steps that differ from machine to machine.
    """
    resting = [p for name, p in bert.named_parameters() if name.endswith("attention.self.key.bias")]
    trained = [bias for bias in resting if bias.requires_grad]
    for bias in trained:
        bias.requires_grad_(False)
    bert.train()
    if settings.compile:
        _compile(bert, True)
    try:
        yield
    finally:
        for bias in trained:
            bias.requires_grad_(True)
        if settings.compile:
            _compile(bert, False)
        bert.eval()


def _compile(bert: BertForMaskedLM, on: bool) -> None:
    """Let torch.compile fuse the feed-forward blocks, for any number of tokens; or take that back."""
    for name, block in bert.bert.encoder.named_modules():
        if not name.endswith((".intermediate", ".output")):
            continue
        if on:
            block.compile(dynamic=True)
        else:
            block._compiled_call_impl = None


def own_device(device: str, world: World) -> torch.device:
    """Return the device of this process: under `torchrun` each takes a GPU of its own."""
    chosen = resolve_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", world.local_rank if world.size > 1 else torch.cuda.current_device())
    return chosen


def embed_together(
    bert: BertForMaskedLM, tokens: csr_matrix, weights: Weights, world: World, *, device: str, token_budget: int
) -> np.ndarray:
    """Return one vector per row (cells, hidden): each process computes a share on its own device, all get the whole."""
    own = world.share(np.arange(tokens.shape[0]))
    part = tokens if len(own) == tokens.shape[0] else tokens[own]
    place = str(own_device(device, world))
    vectors = torch.from_numpy(embed_tokens(bert, part, weights, device=place, token_budget=token_budget))
    counts = [len(rows) for rows in np.array_split(np.arange(tokens.shape[0]), world.size)]
    return world.gather_rows(vectors, counts).numpy()


def split(
    tokens: csr_matrix, cells: np.ndarray | None, settings: TrainSettings, held_out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cells to train on and those held out: the ones given, or a share."""
    filled = np.flatnonzero(np.diff(tokens.indptr))
    cells = filled if cells is None else np.intersect1d(np.asarray(cells), filled)
    if held_out is not None and len(cells):
        return np.setdiff1d(cells, held_out), np.intersect1d(held_out, filled)
    share = min(settings.validation_share, settings.validation_most / max(len(cells), 1))
    held_out = split_cells(tokens.shape[0], share, settings.seed)[cells]
    if held_out.all() and len(cells):
        held_out[0] = False
    if not len(cells):
        raise ScbinInputError("T33", "there is no cell to train on: every token row is empty. See obs['scbin_status'].")
    return cells[~held_out], cells[held_out]


def seen_genes(tokens: csr_matrix, objective: Objective) -> np.ndarray:
    """Return the positions of genes that some cell expresses: no other gene is asked for as unexpressed."""
    vocabulary = objective.vocabulary
    genes = vocabulary.gene_positions
    if vocabulary.bins is None or vocabulary.bins.zeros == "keep":
        return genes
    seen = np.zeros(vocabulary.n_positions, dtype=bool)
    seen[tokens.indices] = True
    return genes[seen[genes]]
