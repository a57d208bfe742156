"""Running out of memory: found out before it matters where that is possible, survived where not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from scbin.train.distributed import World
from scbin.train.step import Share, Stepper, prepare_share

_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error) for phrase in _PHRASES)


def fit_budget(run: Any, budget: int) -> int:
    """Return the token budget whose largest pack passes forward and backward on a GPU, in every process.

    The longest cells are tried; the budget halves until they fit. On a CPU nothing is tried.
    """
    if run.device.type != "cuda":
        return budget
    alone = World()  # a process that runs out of memory must not leave the others waiting for it
    stepper = Stepper(
        run.bert, run.objective, alone, run.device, run.dtype, run.settings.seed, checkpoint=run.stepper.checkpoint
    )
    while True:
        share = _largest(run)
        try:
            stepper.gradients(share, np.maximum(share.counts, 1), 0)
            fits = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
            run.halve_budget(share, error)
        finally:
            for parameter in run.stepper.parameters:
                parameter.grad = None
        run.budget = run.world.min_host(run.budget)
        if not run.world.any_host(not fits):
            return int(run.budget)


def _largest(run: Any) -> Share:
    """Return a share of the longest cells that fills a pack."""
    lengths = np.diff(run.tokens.indptr)[run.training]
    order = np.argsort(-lengths, kind="stable")
    n = int(np.searchsorted(np.cumsum(lengths[order]), run.budget)) + 1
    return prepare_share(
        run.objective, run.tokens, run.training[order[: min(n, run.settings.cells_per_step)]], World(),
        seed=run.settings.seed, epoch=0, token_budget=run.budget, zero_positions=run.zero_positions,
    )  # fmt: skip
