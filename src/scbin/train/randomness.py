"""Random numbers that are functions of what they decide: seed, epoch, cell and position. No generator has a state."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, uint64

from scbin.train.task import EVALUATION

# what a number decides; one stream of numbers each
SELECT, KIND, VALUE, DROP, SWAP_CELL, SWAP, PLACE, EXTRA = 0, 1, 2, 3, 5, 6, 7, 8
SPLIT, SPLIT_SHARE, GENE_DROPOUT, HELD_OUT = 10, 11, 14, 15
_GOLDEN = 0x9E3779B97F4A7C15


@njit(inline="always")
def mix(x: Any) -> Any:
    """Finaliser of splitmix64: every bit of the input moves every bit of the output."""
    x = uint64(x)
    x = (x ^ (x >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> uint64(27))) * uint64(0x94D049BB133111EB)
    return x ^ (x >> uint64(31))


@njit(inline="always")
def uniform(key: Any, purpose: Any, counter: Any) -> Any:
    """Return a number in [0, 1), the same for the same three arguments."""
    word = mix(uint64(key) + uint64(_GOLDEN) * (uint64(counter) * uint64(16) + uint64(purpose) + uint64(1)))
    return float(word >> uint64(11)) * (1.0 / 9007199254740992.0)


@njit(inline="always")
def cell_key(seed_key: Any, cell: Any) -> Any:
    """Return the word that stands for (seed, epoch, cell)."""
    return mix(uint64(seed_key) ^ mix(uint64(cell) + uint64(_GOLDEN)))


@njit(cache=True)
def cell_keys(seed_key: Any, cells: Any) -> Any:
    """Return the word that stands for (seed, epoch, cell), for each cell (cells,) int64."""
    out = np.empty(len(cells), dtype=np.int64)
    for i in range(len(cells)):
        out[i] = np.int64(cell_key(seed_key, cells[i]))
    return out


@njit(cache=True)
def mixed(words: Any) -> Any:
    """Return each word mixed by itself (n,) uint64."""
    out = np.empty(len(words), dtype=np.uint64)
    for i in range(len(words)):
        out[i] = mix(words[i] + uint64(_GOLDEN))
    return out


@njit(cache=True, nogil=True)
def uniforms(keys: Any, purpose: Any, counters: Any) -> Any:
    """Return a number in [0, 1) for each key and counter (n,)."""
    out = np.empty(len(keys), dtype=np.float64)
    for i in range(len(keys)):
        out[i] = uniform(keys[i], purpose, counters[i])
    return out


def hash_uniform(seed_key: np.uint64, items: np.ndarray, purpose: int) -> np.ndarray:
    """Return one number in [0, 1) for each item, a function of (key, item, purpose) alone."""
    return uniforms(cell_keys(seed_key, items), purpose, np.zeros(len(items), dtype=np.int64))


def random_key(seed: int, epoch: int) -> np.uint64:
    """Return one word that stands for (seed, epoch); splitmix64 keeps neighbours far apart."""
    x = (int(seed) % 2**64) * 0x9E3779B97F4A7C15 + (int(epoch) % 2**64) * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D
    x %= 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    return np.uint64((x ^ (x >> 27)) % 2**64)


def held_out_cells(n_cells: int, fraction: float, seed: int) -> np.ndarray:
    """Return whether each cell is held out for validation (cells,), a function of (seed, cell) alone."""
    return hash_uniform(random_key(seed, EVALUATION), np.arange(n_cells), HELD_OUT) < fraction
