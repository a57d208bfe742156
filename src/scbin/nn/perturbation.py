"""Exact effects of edits: the vectors of many rows that are nearly alike, and how far they moved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from scbin.data.packing import make_pack, plan_packs
from scbin.encoding.edits import edit_rows, shortened
from scbin.encoding.vocabulary import CLS
from scbin.nn.alike import attend_alike
from scbin.nn.attention import PACKED, Layout, pack_layout, packed_attention, to_device
from scbin.nn.bert import encode_pack
from scbin.nn.device import resolve_device, resolve_precision
from scbin.nn.pooling import pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from scipy.sparse import csr_matrix
    from torch import Tensor
    from transformers import BertForMaskedLM

    from scbin.data.packing import Pack
    from scbin.encoding.edits import Edit, GeneRows
    from scbin.encoding.vocabulary import Vocabulary
    from scbin.nn.device import Precision
    from scbin.nn.embedding import Weights

CPU_PACK = 6_144  # tokens: a pack whose hidden states stay in the cache of a core is measured faster than a larger one
FEWEST_DENSE = 4  # equally long rows that are worth a batch of their own


def plan_equal(lengths: np.ndarray, token_budget: int, alike_budget: int = 0) -> list[np.ndarray]:
    """Share rows out over packs as `plan_packs` does, but keep rows of one length together where there are several.

    Rows of one length need no mask and no loop over cells: one dense call of attention takes them all. With an `alike_budget` as
    many stay together as share most in the first layer, about the root of their length, if so many tokens fit into it.

    Examples
    --------
    >>> plan_equal(np.array([3, 2, 3, 3, 3, 0]), token_budget=6)
    [array([0, 2]), array([3, 4]), array([1])]
    """
    packs, rest = [], []
    for length in np.unique(lengths[lengths > 0])[::-1]:
        rows = np.flatnonzero(lengths == length)
        alike = min(math.isqrt(length), alike_budget // int(length))
        each = max(1, alike, token_budget // int(length))
        if len(rows) < FEWEST_DENSE:
            rest.append(rows)
        else:
            packs += [rows[start : start + each] for start in range(0, len(rows), each)]
    if rest:
        rows = np.sort(np.concatenate(rest))
        packs += [rows[pack] for pack in plan_packs(lengths[rows], token_budget)]
    return packs


class RowEncoder:
    """A network as a reader of many token rows: to its readout layer and no further, without a head, without a mask.

    A context manager: the network is on the device and in evaluation mode inside, as it was outside.

    Parameters
    ----------
    bert
        The network.
    vocabulary
        What it reads.
    weights
        Weight of each token in its row's vector.
    layer
        Whose hidden states are pooled: -1 the last.
    device, precision
        Where, and in which precision of the matrix products.
    token_budget
        Most tokens to go through the network at once.
    """

    def __init__(
        self,
        bert: BertForMaskedLM,
        vocabulary: Vocabulary,
        weights: Weights,
        *,
        layer: int = -1,
        device: str = "auto",
        precision: Precision = "float32",
        token_budget: int = 32_768,
    ):
        self.bert, self.vocabulary, self.weights, self.layer = bert, vocabulary, weights, layer
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device, bert.config)
        on_cpu = self.device.type == "cpu"
        self.token_budget = min(token_budget, CPU_PACK) if on_cpu else token_budget
        self._alike_budget = token_budget if on_cpu else 0  # a GPU attends faster than it shares
        n_layers = len(bert.bert.encoder.layer)
        self.n_layers = layer if layer >= 0 else n_layers + 1 + layer
        cls = vocabulary.specials.get(CLS, -1)
        self._only_cls = np.flatnonzero(weights.tokens).tolist() == [cls]
        if bert.config._attn_implementation != PACKED or not 0 <= self.n_layers <= n_layers:
            encode_pack(
                bert, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), np.array([0, 1]), layer
            )

    def __enter__(self) -> RowEncoder:
        self._home = (self.bert.device, self.bert.training)
        self.bert.to(self.device).eval()  # type: ignore[arg-type]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bert.to(self._home[0]).train(self._home[1])  # type: ignore[arg-type]

    def vectors(self, tokens: csr_matrix) -> np.ndarray:
        """Return one float32 vector per row (rows, hidden), NaN for rows without a weighted token."""
        result = np.full((tokens.shape[0], self.bert.config.hidden_size), np.nan, dtype=np.float32)
        for rows, pack, hidden, layout in self.packs(tokens):
            if len(hidden) == pack.n_rows < pack.n_tokens:  # [CLS] alone
                result[rows] = hidden.float().cpu().numpy()
                continue
            own = to_device(self.weights.of(pack.input_ids, pack.position_ids), self.device)
            result[rows] = pool(hidden, layout, own).cpu().numpy()
        return result

    def packs(
        self, tokens: csr_matrix, *, every_token: bool = False, n_seen: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, Pack, Tensor, Layout]]:
        """Yield packs of rows with the hidden states of their tokens (T, H), or of `[CLS]` alone where nothing else counts.

        With `every_token` none is left out; `n_seen` (rows,) tokens at the start of each row are attended to, the others only ask.
        """
        totals = np.add.reduceat(np.append(self.weights.of(tokens.data, tokens.indices), 0), tokens.indptr[:-1])
        lengths = np.where((totals > 0) | every_token, np.diff(tokens.indptr), 0)
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for rows in plan_equal(lengths, self.token_budget, self._alike_budget):
                pack = make_pack(tokens, rows)
                layout = pack_layout(pack.cu_seqlens, self.device, None if n_seen is None else n_seen[rows])
                yield rows, pack, self._encode(pack, layout, only_cls=self._only_cls and not every_token), layout

    def _encode(self, pack: Pack, layout: Layout, *, only_cls: bool) -> Tensor:
        blocks = self.bert.bert.encoder.layer[: self.n_layers]
        length = int(pack.lengths[0])
        dense = pack.n_rows > 1 and layout.key_lengths is None and bool((pack.lengths == length).all())
        extra: dict[str, Any] = {} if dense else {"layout": layout}
        hidden, where = self._embedded(pack)
        if not len(blocks):
            return hidden[where]
        where = where.view((pack.n_rows, length) if dense else (1, pack.n_tokens))
        only_cls = only_cls and (dense or pack.n_rows == 1)
        if len(blocks) == 1 and only_cls:
            return _first_token(blocks[0], hidden[where])
        context = _shared_context(blocks[0], hidden, where) if dense and self._alike_budget else None
        step = max(1, self.token_budget // length) if dense else 1
        found = []
        for start in range(0, len(where), step):
            some = where[start : start + step]
            seen = None if context is None else context[start : start + step]
            states = _first_layer(blocks[0], hidden, some, seen, extra)
            for block in blocks[1:-1] if only_cls else blocks[1:]:
                states = block(states, None, **extra)
            found.append(_first_token(blocks[-1], states) if only_cls else states.flatten(0, 1))
        return torch.cat(found)

    def _embedded(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the different tokens of a pack (U, H) and which of them each token is (T,)."""
        n = self.vocabulary.n_positions
        keys, where = np.unique(pack.input_ids * n + pack.position_ids, return_inverse=True)
        ids, positions = np.divmod(keys, n)
        embeddings = self.bert.bert.embeddings
        words = embeddings.word_embeddings(to_device(ids, self.device))
        places = embeddings.position_embeddings(to_device(positions, self.device))
        hidden = embeddings.LayerNorm(words + places + embeddings.token_type_embeddings.weight[0])
        return embeddings.dropout(hidden), to_device(where.reshape(-1), self.device)


def _projected(attention: Any, hidden: Tensor) -> Iterator[Tensor]:
    """Query, key and value of the different tokens of a pack (U, heads, d), each computed once."""
    heads, width = attention.num_attention_heads, attention.attention_head_size
    for project in (attention.query, attention.key, attention.value):
        yield project(hidden).view(-1, heads, width)


def _shared_context(block: Any, hidden: Tensor, where: Tensor) -> Tensor | None:
    """What the tokens of alike rows attend to in the first layer (rows, N, H), `None` where the rows are too different."""
    attention = block.attention.self
    query, key, value = _projected(attention, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return attend_alike(query, key, value, where, attention.scaling)


def _first_layer(block: Any, hidden: Tensor, where: Tensor, context: Tensor | None, extra: dict[str, Any]) -> Tensor:
    """Run the first layer over the different tokens (U, H) laid out in rows (rows, N)."""
    if context is None:
        attention = block.attention.self
        query, key, value = (tensor[where].transpose(1, 2) for tensor in _projected(attention, hidden))
        context, _ = packed_attention(attention, query, key, value, None, scaling=attention.scaling, **extra)
    return block.feed_forward_chunk(block.attention.output(context.reshape(*where.shape, -1), hidden[where]))


def _first_token(block: Any, hidden: Tensor) -> Tensor:
    """Run a layer for the first token of each row alone: (B, N, H) to (B, H)."""
    attention = block.attention.self
    heads, width = attention.num_attention_heads, attention.attention_head_size
    first = hidden[:, :1]
    query = attention.query(first).view(len(hidden), 1, heads, width).transpose(1, 2)
    key, value = (
        project(hidden).view(*hidden.shape[:2], heads, width).transpose(1, 2)
        for project in (attention.key, attention.value)
    )
    context = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    context = context.transpose(1, 2).reshape(first.shape[0], 1, -1)
    return block.feed_forward_chunk(block.attention.output(context, first))[:, 0]


# ---- pairs of cells and edits ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moved:
    """What edits did to the vectors of cells."""

    at: slice  # which of the pairs
    cells: np.ndarray  # (pairs,) the row of each
    edited: np.ndarray  # (pairs, H) float32, NaN where nothing is left to read
    original: np.ndarray  # (pairs, H) float32, of the same cell; shortened where the edit pushed genes out
    changed: np.ndarray  # (pairs,) bool


def edited_vectors(
    encoder: RowEncoder,
    rows: GeneRows,
    edit: Edit,
    cells: np.ndarray,
    genes: np.ndarray,
    originals: np.ndarray | None,
    read: Callable[[csr_matrix, np.ndarray], np.ndarray] | None = None,
) -> Iterator[Moved]:
    """Yield the vectors of cells before and after edits, block by block; every changed pair is one forward.

    Parameters
    ----------
    encoder
        The network, entered.
    rows
        The cells.
    edit
        What is done.
    cells, genes
        The pairs: rows (pairs,), and genes (pairs,) or (pairs, genes edited together). Sorted by cell it is fastest.
    originals
        Vectors of all rows (rows, H); `None` reads them again for each pair, where they depend on the genes of the pair.
    read
        What is read off rows (n, positions) with these genes edited (n, m); by default their vectors.
    """
    read = read or (lambda tokens, _: encoder.vectors(tokens))
    genes = genes[:, None] if genes.ndim == 1 else genes
    lengths = np.diff(rows.tokens.indptr)[cells].astype(np.int64)
    block = 16 * encoder.token_budget
    bounds = np.searchsorted(np.cumsum(lengths), np.arange(block, lengths.sum() + block, block), side="left") + 1
    start = 0
    for stop in np.unique(np.minimum(bounds, len(cells))):
        at = slice(start, int(stop))
        start = int(stop)
        edited = edit_rows(rows, edit, cells[at], genes[at])
        vectors = read(rows.tokens[cells[at]], genes[at]) if originals is None else originals[cells[at]]
        cut = np.flatnonzero(edited.n_cut > 0)
        if len(cut):
            # many pairs share an original that lost as many genes
            kinds, which = np.unique(np.stack([cells[at][cut], edited.n_cut[cut]], axis=1), axis=0, return_inverse=True)
            without = shortened(rows, kinds[:, 0], kinds[:, 1])
            vectors[cut] = read(without, np.zeros((len(kinds), 0), dtype=np.int64))[which.reshape(-1)]
        after = vectors.copy()
        todo = np.flatnonzero(edited.changed)
        after[todo] = read(edited.tokens[todo] if len(todo) < len(after) else edited.tokens, genes[at][todo])
        yield Moved(at, cells[at], after, vectors, edited.changed)


def cosine_shift(original: np.ndarray, edited: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """Return 1 - cosine of each row with its partner, in float64 and without the cancellation near a cosine of 1.

    Examples
    --------
    >>> cosine_shift(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]]))
    array([1.])
    """
    return 0.5 * ((_unit(edited, centre) - _unit(original, centre)) ** 2).sum(axis=-1)


def state_shift(
    original: np.ndarray, edited: np.ndarray, states: np.ndarray, centre: np.ndarray | None = None
) -> np.ndarray:
    """Return how much closer each row came to each state (rows, states): the change of its cosine.

    Examples
    --------
    >>> state_shift(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]]), np.array([[0.0, 1.0], [1.0, 0.0]]))
    array([[ 1., -1.]])
    """
    return (_unit(edited, centre) - _unit(original, centre)) @ _unit(states, centre).T


def alignment(original: np.ndarray, edited: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return the cosine of the way that each row went with a direction: 1 is straight there, however far; NaN for no way.

    Examples
    --------
    >>> alignment(np.array([[1.0, 0.0]]), np.array([[1.0, 0.01]]), np.array([0.0, 2.0]))
    array([1.])
    """
    way = np.asarray(edited, dtype=np.float64) - original
    length = np.linalg.norm(way, axis=-1) * np.linalg.norm(direction)
    return np.where(length > 0, way @ direction / np.maximum(length, 1e-30), np.nan)


def _unit(vectors: np.ndarray, centre: np.ndarray | None) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float64)
    vectors = vectors if centre is None else vectors - np.asarray(centre, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)
