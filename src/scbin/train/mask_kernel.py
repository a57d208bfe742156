"""The inner loop of masking, compiled; every random choice is a hash of what it decides: seed, epoch, cell, position."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, uint64

# what a random number decides; one stream of numbers each
_SELECT, _KIND, _VALUE, _DROP, _SWAP_CELL, _SWAP, _PLACE, _EXTRA = 0, 1, 2, 3, 5, 6, 7, 8
HELD_OUT, SPLIT, SPLIT_SHARE = 15, 10, 11
_GOLDEN = 0x9E3779B97F4A7C15
_TRIES = 32  # draws of an unexpressed gene before walking to the next free one
GENE, NEVER = 0, -1  # numbers of what stands at a position: genes, 1.. phenotypes, then specials; never masked


class Positions(NamedTuple):
    """What may stand where, and which tokens are special."""

    group_start: np.ndarray  # (positions,) first token id of the group
    group_stop: np.ndarray  # (positions,)
    kind: np.ndarray  # (positions,) GENE, number of a phenotype, number of the specials, or NEVER
    candidates: np.ndarray  # positions of genes that may be asked for as unexpressed
    chosen: np.ndarray  # (positions,) bool
    is_special: np.ndarray  # (tokens,) bool, the specials that can be masked
    mask_id: int
    zeros_kept: bool  # whether rows have tokens of bin 0
    lowest: int  # 1 where bin 0 is a label only, else 0
    longest: int  # tokens from which on a row counts as truncated


class Rules(NamedTuple):
    """The numbers of a `Masking`."""

    p_gene: float
    p_phenotype: float
    p_mask: float
    p_random: float
    p_drop: float
    p_swap: float
    q_swap: float
    n_extra: float  # unexpressed genes asked for with each hidden one
    nonzero_ratio: float  # -1: not asked for
    from_vocabulary: bool
    mask_specials: bool
    drop_as_pad: bool
    score_all: bool
    attend: int  # to zeros: 0 all, 1 hidden ones, 2 none
    only_unexpressed: bool  # not those that truncation cut off
    only_chosen: bool


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
def hash_uniform(seed_key: Any, items: Any, purpose: Any) -> Any:
    """Return one number in [0, 1) for each item, a function of (key, item, purpose) alone."""
    out = np.empty(len(items), dtype=np.float64)
    for i in range(len(items)):
        out[i] = uniform(cell_key(seed_key, items[i]), purpose, 0)
    return out


@njit(cache=True)
def _draw_unexpressed(key: Any, counter: Any, candidates: Any, limit: Any, occupied: Any) -> Any:
    """Return a position of `candidates` below `limit` that is not occupied, or -1 where there is none."""
    n = len(candidates)
    if n == 0:
        return -1
    slot = 0
    for attempt in range(_TRIES):
        slot = int(uniform(key, _PLACE, counter * _TRIES + attempt) * n)
        position = candidates[slot]
        if position < limit and not occupied[position]:
            return position
    for step in range(n):
        position = candidates[(slot + step) % n]
        if position < limit and not occupied[position]:
            return position
    return -1


@njit(cache=True)
def _kinds(positions: Any, ids: Any, where: Any, rules: Any, kinds: Any, occupied: Any) -> Any:
    """Note what each token of a row is; returns below which position a gene that is not there is unexpressed."""
    for j in range(len(ids)):
        position, token = positions[j], ids[j]
        occupied[position] = True
        kind = where.kind[position]
        in_group = where.group_start[position] <= token < where.group_stop[position]
        if kind == NEVER or (not in_group and not where.is_special[token]):
            kinds[j] = NEVER
        else:
            kinds[j] = kind if in_group else len(where.group_start)  # a special, wherever it stands
    truncated = len(ids) >= where.longest  # such a row says nothing about the genes that are not there
    return 0 if truncated and rules.only_unexpressed else len(where.group_start)


@njit(cache=True)
def _select(positions: Any, ids: Any, kinds: Any, key: Any, where: Any, rules: Any, hit: Any) -> None:
    """Choose which tokens of a row are to be predicted."""
    n_zero, n_nonzero = 0, 0
    if rules.nonzero_ratio >= 0:
        for j in range(len(ids)):
            if kinds[j] == GENE:
                is_zero = where.zeros_kept and ids[j] == where.group_start[positions[j]]
                n_zero += is_zero
                n_nonzero += not is_zero
    n_wanted = int(rules.p_gene * (n_zero + n_nonzero))
    want_nonzero = int(min(rules.nonzero_ratio * n_wanted, n_nonzero))
    want_zero = int(min((1 - rules.nonzero_ratio) * n_wanted, n_zero))
    for j in range(len(ids)):
        position = positions[j]
        if kinds[j] == NEVER:
            hit[j] = False
        elif rules.only_chosen:
            hit[j] = where.chosen[position] and kinds[j] < len(where.group_start)
        elif kinds[j] != GENE:
            is_special = kinds[j] == len(where.group_start)
            p = rules.p_gene * rules.mask_specials if is_special else rules.p_phenotype
            hit[j] = uniform(key, _SELECT, position) < p
        elif rules.nonzero_ratio < 0:
            hit[j] = uniform(key, _SELECT, position) < rules.p_gene
        elif where.zeros_kept and ids[j] == where.group_start[position]:
            # exactly `want` of those that are left, each set equally likely
            hit[j] = uniform(key, _SELECT, position) * n_zero < want_zero
            n_zero -= 1
            want_zero -= hit[j]
        else:
            hit[j] = uniform(key, _SELECT, position) * n_nonzero < want_nonzero
            n_nonzero -= 1
            want_nonzero -= hit[j]


@njit(cache=True)
def _replacement(position: Any, token: Any, kind: Any, key: Any, where: Any, rules: Any) -> Any:
    """Return what stands in the place of a hidden token."""
    is_phenotype = GENE < kind < len(where.group_start)
    u = 0.0 if rules.only_chosen or is_phenotype else uniform(key, _KIND, position)
    if u < rules.p_mask or is_phenotype or rules.only_chosen:
        return where.mask_id
    if u >= rules.p_mask + rules.p_random:
        return token
    low, high = 0, len(where.is_special)
    if not rules.from_vocabulary and kind == GENE:
        low, high = where.group_start[position] + where.lowest, where.group_stop[position]
    return low + int(uniform(key, _VALUE, position) * (high - low))


@njit(cache=True)
def _mask_row(positions: Any, ids: Any, key: Any, where: Any, rules: Any, scratch: Any, row: Any) -> Any:
    """Write one masked row into `row`: ids, positions, labels (-1: nothing asked) and whether attended; returns its length."""
    kinds, hit, occupied = scratch
    r_id, r_position, r_label, r_seen = row
    limit = _kinds(positions, ids, where, rules, kinds, occupied)
    _select(positions, ids, kinds, key, where, rules, hit)
    swaps = rules.p_swap > 0 and not rules.only_chosen and uniform(key, _SWAP_CELL, 0) < rules.p_swap
    n = 0
    for j in range(len(ids)):
        position, token, kind = positions[j], int(ids[j]), kinds[j]
        is_phenotype = GENE < kind < len(where.group_start)
        is_zero = kind == GENE and where.zeros_kept and token == where.group_start[position]
        r_id[n], r_position[n], r_label[n], r_seen[n] = token, position, -1, not (rules.attend > 0 and is_zero)
        if hit[j]:
            if is_phenotype and not rules.only_chosen and uniform(key, _DROP, position) < rules.p_drop:
                if rules.drop_as_pad:
                    r_id[n], r_position[n] = 0, 0
                    n += 1
                continue
            place = -1
            if swaps and kind == GENE and uniform(key, _SWAP, position) < rules.q_swap:
                place = _draw_unexpressed(key, position, where.candidates, limit, occupied)
            if place >= 0:
                occupied[place] = True
                r_id[n], r_position[n], r_label[n] = where.mask_id, place, where.group_start[place]
            else:
                r_id[n], r_label[n] = _replacement(position, token, kind, key, where, rules), token
            r_seen[n] = r_seen[n] or rules.attend == 1
        elif rules.score_all and GENE <= kind < len(where.group_start):
            r_label[n] = token
        n += 1
        if hit[j] and kind == GENE and rules.n_extra > 0 and not rules.only_chosen:
            for more in range(int(rules.n_extra + uniform(key, _EXTRA, position))):
                counter = position + (more + 1) * len(where.group_start)
                place = _draw_unexpressed(key, counter, where.candidates, limit, occupied)
                if place < 0:
                    break
                occupied[place] = True
                r_id[n], r_position[n], r_label[n] = where.mask_id, place, where.group_start[place]
                r_seen[n] = rules.attend != 2
                n += 1
    if rules.only_chosen and not where.zeros_kept and where.lowest and len(ids):
        for position in np.flatnonzero(where.chosen):
            if where.kind[position] == GENE and not occupied[position]:
                r_id[n], r_position[n], r_label[n] = where.mask_id, position, where.group_start[position]
                r_seen[n] = rules.attend != 2
                n += 1
    for j in range(len(ids)):
        occupied[positions[j]] = False
    for j in range(n):
        occupied[r_position[j]] = False
    return n


@njit(cache=True, nogil=True)
def mask_kernel(
    indptr: Any, indices: Any, data: Any, cells: Any, seed_key: Any, where: Any, rules: Any, out: Any
) -> Any:
    """Fill `out` with masked rows, the attended tokens of each first; returns how many tokens were written."""
    o_id, o_position, o_label, o_length, o_keys = out
    longest = 0
    for i in range(len(cells)):
        longest = max(longest, indptr[i + 1] - indptr[i])
    room = int(longest * (2 + rules.n_extra)) + where.chosen.sum() + 8
    row = (np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.bool_))
    occupied = np.zeros(len(where.group_start), np.bool_)
    scratch = (np.empty(room, np.int64), np.empty(room, np.bool_), occupied)
    n_out = 0
    for i in range(len(cells)):
        positions, ids = indices[indptr[i] : indptr[i + 1]], data[indptr[i] : indptr[i + 1]]
        n = _mask_row(positions, ids, cell_key(seed_key, cells[i]), where, rules, scratch, row)
        o_length[i], o_keys[i] = n, 0
        for attended in (True, False):
            for j in range(n):
                if row[3][j] == attended:
                    o_id[n_out], o_position[n_out], o_label[n_out] = row[0][j], row[1][j], row[2][j]
                    o_keys[i] += attended
                    n_out += 1
    return n_out
