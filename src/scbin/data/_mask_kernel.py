"""The inner loop of masking, compiled: one pass over the token rows, randomness from a hash of what is decided."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, uint64

# what a random number decides; one stream of numbers each
_SELECT, _KIND, _VALUE, _DROP, _VIEW, _SWAP_CELL, _SWAP, _PLACE, _EXTRA = range(9)
_GOLDEN = 0x9E3779B97F4A7C15
_TRIES = 32  # draws of an unexpressed gene before walking to the next free one

BOTH = 2  # a token that belongs to both views


@njit(inline="always")
def _mix(x: Any) -> Any:
    """Finaliser of splitmix64: every bit of the input moves every bit of the output."""
    x = uint64(x)
    x = (x ^ (x >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> uint64(27))) * uint64(0x94D049BB133111EB)
    return x ^ (x >> uint64(31))


@njit(inline="always")
def _uniform(key: Any, purpose: Any, counter: Any) -> Any:
    """Return a number in [0, 1), the same for the same three arguments."""
    word = _mix(uint64(key) + uint64(_GOLDEN) * (uint64(counter) * uint64(16) + uint64(purpose) + uint64(1)))
    return float(word >> uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True)
def hash_uniform(seed_key: Any, items: Any, purpose: Any) -> Any:
    """Return one number in [0, 1) for each item, a function of (key, item, purpose) alone."""
    out = np.empty(len(items), dtype=np.float64)
    for i in range(len(items)):
        out[i] = _uniform(_mix(uint64(seed_key) ^ _mix(uint64(items[i]) + uint64(_GOLDEN))), purpose, 0)
    return out


@njit(inline="always")
def _draw_absent(key: Any, counter: Any, candidates: Any, limit: Any, occupied: Any) -> Any:
    """Return a position of `candidates` below `limit` that is not occupied, or -1 where there is none."""
    n = len(candidates)
    if n == 0:
        return -1
    slot = 0
    for attempt in range(_TRIES):
        slot = int(_uniform(key, _PLACE, counter * _TRIES + attempt) * n)
        position = candidates[slot]
        if position < limit and not occupied[position]:
            return position
    for step in range(n):
        position = candidates[(slot + step) % n]
        if position < limit and not occupied[position]:
            return position
    return -1


@njit(cache=True, nogil=True)
def mask_kernel(
    indptr: Any,
    indices: Any,
    data: Any,
    cells: Any,
    keys: Any,
    seed_key: Any,
    layout: Any,
    ids: Any,
    probs: Any,
    flags: Any,
    candidates: Any,
    chosen: Any,
    out: Any,
) -> Any:
    """Fill `out` with masked rows; returns (tokens, targets) written.

    layout: per position group start, group stop, task; ids: see `masking._ids`; probs and flags: see `masking.mask_rows`.
    """
    group_start, group_stop, task_of = layout
    mask_id, n_tokens, low_random, n_specials_task, zeros_kept, max_length = ids
    p_gene, p_phenotype, p_mask, p_random, p_drop, p_swap, q_swap, n_extra, nonzero_ratio = probs
    views, from_vocabulary, mask_specials, drop_as_pad, loss_everywhere, attend, known_end, gene_task = flags
    o_ids, o_positions, o_cu, o_keys, t_where, t_label, t_start, t_stop, t_task = out
    longest = 0
    for cell in cells:
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    room = int(longest * (2 + n_extra)) + len(chosen) + 8
    c_id, c_position, c_label = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    c_view, c_seen = np.empty(room, np.int64), np.empty(room, np.bool_)
    occupied = np.zeros(len(group_start), np.bool_)
    is_chosen = np.zeros(len(group_start), np.bool_)
    for position in chosen:
        is_chosen[position] = True
    n_out, n_targets = 0, 0
    o_cu[0] = 0
    for i in range(len(cells)):
        first, last = indptr[cells[i]], indptr[cells[i] + 1]
        key = _mix(uint64(seed_key) ^ _mix(uint64(keys[i]) + uint64(_GOLDEN)))
        swap_here = p_swap > 0 and _uniform(key, _SWAP_CELL, 0) < p_swap
        limit = len(group_start)
        n_nonzero, n_zero = 0, 0
        for j in range(first, last):
            position = indices[j]
            occupied[position] = True
            if task_of[position] == gene_task and group_start[position] <= data[j] < group_stop[position]:
                if zeros_kept and data[j] == group_start[position]:
                    n_zero += 1
                else:
                    n_nonzero += 1
                if known_end and last - first >= max_length:
                    limit = position  # a truncated row says nothing about genes behind its last one
        if limit < len(group_start):
            limit += 1
        n_genes = n_nonzero + n_zero
        want_nonzero = int(min(nonzero_ratio * int(p_gene * n_genes), n_nonzero)) if nonzero_ratio >= 0 else 0
        want_zero = int(min((1 - nonzero_ratio) * int(p_gene * n_genes), n_zero)) if nonzero_ratio >= 0 else 0
        n = 0
        for j in range(first, last):
            position, token = indices[j], int(data[j])
            start, stop = group_start[position], group_stop[position]
            in_group = start <= token < stop
            is_gene = in_group and task_of[position] == gene_task
            is_zero = is_gene and zeros_kept and token == start
            view = BOTH
            if views == 2 and is_gene:
                view = 0 if _uniform(key, _VIEW, position) < 0.5 else 1
            if len(chosen) > 0:
                hit = in_group and is_chosen[position]
            elif is_gene and nonzero_ratio >= 0:
                # exactly `want` of those that are left, each set equally likely
                u = _uniform(key, _SELECT, position)
                if is_zero:
                    hit = u * n_zero < want_zero
                    n_zero -= 1
                    want_zero -= hit
                else:
                    hit = u * n_nonzero < want_nonzero
                    n_nonzero -= 1
                    want_nonzero -= hit
            elif is_gene:
                hit = _uniform(key, _SELECT, position) < p_gene
            elif in_group:
                hit = False  # phenotypes are decided per view, below
            else:
                hit = mask_specials and task_of[position] != gene_task and start == stop
                hit = hit or (mask_specials and task_of[position] == gene_task)
                hit = hit and token > mask_id and _uniform(key, _SELECT, position) < p_gene
            n_versions = 1 if is_gene or views == 1 or view != BOTH else 2
            for version in range(n_versions):
                new_id, new_position, label = token, position, -1
                version_view = view if n_versions == 1 else version
                version_hit = hit
                if in_group and not is_gene and len(chosen) == 0:
                    version_hit = _uniform(key, _SELECT, position * 2 + version + (1 << 32)) < p_phenotype
                    if version_hit and _uniform(key, _DROP, position * 2 + version) < p_drop:
                        if drop_as_pad:
                            c_id[n], c_position[n], c_label[n], c_view[n], c_seen[n] = 0, 0, -1, version_view, True
                            n += 1
                        continue
                seen = not (attend > 0 and is_zero)
                if version_hit:
                    label = token
                    if is_gene and swap_here and len(chosen) == 0 and _uniform(key, _SWAP, position) < q_swap:
                        place = _draw_absent(key, position, candidates, limit, occupied)
                        if place >= 0:
                            occupied[place] = True
                            new_position, label = place, group_start[place]
                            seen = attend != 2
                    u = 0.0 if len(chosen) > 0 or new_position != position else _uniform(key, _KIND, position)
                    if (in_group and not is_gene) or u < p_mask:
                        new_id = mask_id
                    elif u < p_mask + p_random:
                        low, high = (0, n_tokens) if from_vocabulary or not in_group else (start + low_random, stop)
                        new_id = low + int(_uniform(key, _VALUE, position) * (high - low))
                    if attend == 1:
                        seen = True
                elif loss_everywhere and in_group:
                    label = token
                c_id[n], c_position[n], c_label[n], c_view[n], c_seen[n] = (
                    new_id,
                    new_position,
                    label,
                    version_view,
                    seen,
                )
                n += 1
                if version_hit and is_gene and n_extra > 0 and len(chosen) == 0:
                    n_more = int(n_extra + _uniform(key, _EXTRA, position))
                    for more in range(n_more):
                        place = _draw_absent(key, position + (more + 1) * len(group_start), candidates, limit, occupied)
                        if place < 0:
                            break
                        occupied[place] = True
                        c_id[n], c_position[n], c_label[n] = mask_id, place, group_start[place]
                        c_view[n], c_seen[n] = version_view, attend != 2
                        if views == 2:
                            c_view[n] = 0 if _uniform(key, _VIEW, place) < 0.5 else 1
                        n += 1
        for position in chosen:
            if task_of[position] == gene_task and not occupied[position] and not zeros_kept and last > first:
                c_id[n], c_position[n], c_label[n] = mask_id, position, group_start[position]
                c_view[n], c_seen[n] = BOTH, attend != 2
                n += 1
        for j in range(first, last):
            occupied[indices[j]] = False
        for j in range(n):
            occupied[c_position[j]] = False
        for view in range(views):
            row = i * views + view
            n_keys = 0
            for wanted in range(1, -1, -1):  # attended tokens first
                for j in range(n):
                    if c_seen[j] == (wanted == 1) and (views == 1 or c_view[j] == BOTH or c_view[j] == view):
                        o_ids[n_out], o_positions[n_out] = c_id[j], c_position[j]
                        n_keys += wanted
                        if c_label[j] >= 0:
                            position = c_position[j]
                            in_group = group_start[position] <= c_label[j] < group_stop[position]
                            t_where[n_targets], t_label[n_targets] = n_out, c_label[j]
                            t_start[n_targets] = group_start[position] if in_group else 0
                            t_stop[n_targets] = group_stop[position] if in_group else n_tokens
                            t_task[n_targets] = task_of[position] if in_group else n_specials_task
                            n_targets += 1
                        n_out += 1
            o_cu[row + 1] = n_out
            o_keys[row] = n_keys
    return n_out, n_targets
