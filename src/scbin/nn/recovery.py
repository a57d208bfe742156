"""Hidden genes and what a network says in their place, at masks that stay the same."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from scbin.data.masking import EVALUATION, mask_rows
from scbin.data.packing import plan_packs
from scbin.nn.attention import pack_layout, to_device
from scbin.nn.bert import encode_pack, logits_at
from scbin.nn.device import resolve_device, resolve_precision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scipy.sparse import csr_matrix
    from torch import Tensor
    from transformers import BertForMaskedLM

    from scbin.data.masking import MaskingScheme, Targets
    from scbin.data.packing import Pack
    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.device import Precision


@dataclass(frozen=True, eq=False)
class HiddenGenes:
    """Hidden genes in the order of their cells, one entry each.

    `truth` is a bin, or for `"rank"` the number of the gene; `place` is the number of the gene, or for `"rank"` the rank.
    """

    cell: np.ndarray  # (M,) row of the token matrix
    place: np.ndarray  # (M,)
    truth: np.ndarray  # (M,)


@dataclass(frozen=True, eq=False)
class Recovered:
    """What a network said about hidden genes: the likeliest answer, and the log of the probability of the true one."""

    hidden: HiddenGenes
    predicted: np.ndarray  # (M,)
    log_probability: np.ndarray  # (M,) float32


def row_keys(tokens: csr_matrix) -> np.ndarray:
    """Return a number for each row that depends on its tokens alone, so that its masks do not depend on where it stands."""
    bounds = tokens.indptr
    ids, positions = tokens.data.astype(np.int64), tokens.indices.astype(np.int64)
    rows = zip(bounds[:-1], bounds[1:], strict=True)
    return np.array(
        [zlib.crc32(positions[a:b].tobytes(), zlib.crc32(ids[a:b].tobytes())) for a, b in rows], dtype=np.int64
    )


def hide_genes(
    tokens: csr_matrix,
    vocabulary: Vocabulary,
    scheme: MaskingScheme,
    *,
    seed: int = 0,
    epoch: int = EVALUATION,
    token_budget: int = 32_768,
    zero_positions: np.ndarray | None = None,
) -> Iterator[tuple[Pack, Targets, HiddenGenes]]:
    """Yield packs with hidden genes. Which ones are hidden depends on (seed, epoch, tokens of the cell) alone.

    Parameters
    ----------
    tokens
        Token matrix; phenotypes are to be hidden before, or they are seen.
    vocabulary
        Of the tokens.
    scheme
        What to hide; only genes are reported.
    seed, epoch
        Of the masks; the default epoch is that of evaluation.
    token_budget
        Most tokens of a pack, about.
    zero_positions
        Positions of genes that may be asked for as unexpressed. Default: all.
    """
    keys = row_keys(tokens)
    for rows in plan_packs(np.diff(tokens.indptr), token_budget):
        pack, targets = mask_rows(
            tokens, rows, vocabulary, scheme, seed=seed, epoch=epoch, keys=keys[rows], zero_positions=zero_positions
        )
        genes = targets.task == 0
        where, start = targets.where[genes], targets.start[genes]
        owner = np.searchsorted(pack.cu_seqlens, where, side="right") - 1
        place = pack.position_ids[where] - vocabulary.first_gene_position
        hidden = HiddenGenes(pack.cells[owner], place, targets.labels[genes] - start)
        yield pack, targets, hidden


def recover_genes(
    bert: BertForMaskedLM,
    tokens: csr_matrix,
    vocabulary: Vocabulary,
    scheme: MaskingScheme,
    *,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = "float32",
    token_budget: int = 32_768,
    zero_positions: np.ndarray | None = None,
    progress: bool = False,
) -> Recovered:
    """Hide genes, and return what the network says in their place, within the group of each position.

    Parameters are those of :func:`hide_genes`, and where and in which precision the network runs.
    """
    target = resolve_device(device)
    dtype = resolve_precision(precision, target, bert.config)
    parts: list[tuple[np.ndarray, ...]] = []
    home, was_training = bert.device, bert.training
    bert.to(target).eval()  # type: ignore[arg-type]
    packs = hide_genes(tokens, vocabulary, scheme, seed=seed, token_budget=token_budget, zero_positions=zero_positions)
    try:
        with torch.inference_mode(), torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
            for pack, targets, hidden in tqdm(packs, desc="hidden genes", unit="pack", disable=not progress):
                states = encode_pack(
                    bert,
                    to_device(pack.input_ids, target),
                    to_device(pack.position_ids, target),
                    pack_layout(pack.cu_seqlens, target, pack.key_lengths),
                )
                genes = targets.task == 0
                picked = states.index_select(0, to_device(targets.where[genes], target))
                best, log_probability = _answers(bert, picked, targets.start[genes], targets.stop[genes], hidden.truth)
                parts.append((hidden.cell, hidden.place, hidden.truth, best, log_probability))
    finally:
        bert.to(home).train(was_training)  # type: ignore[arg-type]
    empty = [np.empty(0, dtype=np.int64)] * 4 + [np.empty(0, dtype=np.float32)]
    cell, place, truth, best, log_probability = (
        np.concatenate(column) for column in (zip(*parts, strict=True) if parts else [[e] for e in empty])
    )
    order = np.lexsort((place, cell))
    own = HiddenGenes(cell[order], place[order], truth[order])
    return Recovered(own, best[order], log_probability[order])


def _answers(
    bert: BertForMaskedLM, states: Tensor, start: np.ndarray, stop: np.ndarray, truth: np.ndarray, most: int = 4_000_000
) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeliest answer and the log-probability of the true one, a part of the answers at a time."""
    best, own = np.empty(len(start), dtype=np.int64), np.empty(len(start), dtype=np.float32)
    shared = len(start) == 0 or bool((start == start[0]).all())  # else every gene has bins of its own
    n_values = int(stop[0] - start[0]) if len(start) else 1
    rows_at_once = max(1, most // max(n_values, 1))
    for first in range(0, len(start), rows_at_once):
        part = slice(first, first + rows_at_once)
        if shared:
            logits = logits_at(bert, states[part], int(start[0]), int(stop[0]))
        else:
            head = bert.cls.predictions
            ids = to_device(start[part], states.device)[:, None] + torch.arange(n_values, device=states.device)
            picked = torch.nn.functional.embedding(ids, head.decoder.weight)  # (M, values, H)
            moved = head.transform(states[part])
            logits = torch.einsum("mh,mkh->mk", moved, picked.to(moved.dtype)) + head.decoder.bias[ids]
        scores = logits.float().log_softmax(dim=1)
        best[part] = scores.argmax(dim=1).cpu().numpy()
        own[part] = scores.gather(1, to_device(truth[part], states.device)[:, None])[:, 0].cpu().numpy()
    return best, own
