"""Stock BERT, built for a vocabulary and run over packs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as run_checkpointed
from transformers import BertConfig, BertForMaskedLM

from scbin._errors import ScbinInputError
from scbin.nn.attention import PACKED, Layout, pack_layout
from scbin.nn.limits import CONFIG_KEYS
from scbin.nn.presets import Preset, preset

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.encoding.vocabulary import Vocabulary

_SHAPE = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
)


def bert_config(vocabulary: Vocabulary, name: str | Preset = "small", **overrides: Any) -> BertConfig:
    """Return the configuration of a BERT that reads a vocabulary; `overrides` are fields of `Preset`."""
    chosen = preset(name)
    try:
        chosen = replace(chosen, **overrides)
    except TypeError as error:
        raise ScbinInputError("T11", f"{error}. A network is described by {', '.join(_SHAPE)}, max_length.") from error
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary.n_tokens,
        "max_position_embeddings": max(vocabulary.n_positions, chosen.max_length or 0),
    }
    for field, size in sizes.items():
        if not CONFIG_KEYS[field](size):
            raise ScbinInputError(
                "T64",
                f"the tokens need {field}={size:,} of the network; it takes {CONFIG_KEYS[field].words}. Tokenize with fewer "
                "genes or bins.",
            )
    return BertConfig(
        pad_token_id=0,
        attn_implementation=PACKED,  # type: ignore[call-arg]
        **sizes,
        **{field: getattr(chosen, field) for field in _SHAPE},
    )


def build_bert(
    vocabulary: Vocabulary, name: str | Preset = "small", *, seed: int = 0, **overrides: Any
) -> BertForMaskedLM:
    """Build a BERT with random weights; the same seed gives the same weights, and no global generator moves.

    Parameters
    ----------
    vocabulary
        What it shall read.
    name
        A preset by name, or a `Preset`.
    seed
        Of the random weights.
    overrides
        Fields of the preset to change: `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `intermediate_size` ...

    Examples
    --------
    >>> from scbin.encoding.vocabulary import Vocabulary
    >>> vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    >>> build_bert(vocabulary, "tiny", hidden_size=32).config.hidden_size
    32
    """
    if not 0 <= seed < 2**63:
        raise ScbinInputError("T63", f"seed is {seed}; it needs to be a whole number from 0 to below 2**63.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        return BertForMaskedLM(bert_config(vocabulary, name, **overrides))


def encode_pack(
    bert: BertForMaskedLM,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: np.ndarray | Tensor | Layout,
    layer: int = -1,
    inputs_embeds: Tensor | None = None,
    *,
    checkpoint: bool = False,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Return the hidden states (T, H) of a pack after one layer, computing none behind it.

    Calls the modules of stock BERT one after another, so that weights, hooks and adapters on them count as usual, without the
    masks and the output bookkeeping of its `forward`.

    Parameters
    ----------
    bert
        The network; its attention must be the packed one (`build_bert` and scbin's loaders see to it).
    input_ids, position_ids
        Tokens of the pack (1, T) or (T,).
    cu_seqlens
        Bounds of the rows (B + 1,), best on the host; or the `Layout` of the pack.
    layer
        -1 is the last, -2 the one before; 0 the embeddings, 1 the first layer.
    inputs_embeds
        Instead of the word embeddings of `input_ids`, (1, T, H).
    checkpoint
        Keep only what goes into each layer and compute the rest again for the gradient: less memory, a third slower.
    key_bias
        Added to the attention scores of each token (T,) in every layer: the logarithm of a gate on it.
    """
    layout = cu_seqlens if isinstance(cu_seqlens, Layout) else pack_layout(cu_seqlens, position_ids.device)
    if bert.config._attn_implementation != PACKED:
        # any other attention would look across the cells of the pack, and say nothing
        raise ScbinInputError("T13", "this network does not have the packed attention; build or load it with scbin.")
    embeddings, layers = bert.bert.embeddings, bert.bert.encoder.layer
    n_layers = layer if layer >= 0 else len(layers) + 1 + layer
    if not 0 <= n_layers <= len(layers):
        raise ScbinInputError("T14", f"layer is {layer}; this network has layers 0 (embeddings) to {len(layers)}.")
    words = embeddings.word_embeddings(input_ids.view(1, -1)) if inputs_embeds is None else inputs_embeds
    places = embeddings.position_embeddings(position_ids.view(1, -1))
    hidden = embeddings.LayerNorm(words + places + embeddings.token_type_embeddings.weight[0])
    hidden = embeddings.dropout(hidden)
    extra = {"layout": layout} if key_bias is None else {"layout": layout, "key_bias": key_bias}
    for block in layers[:n_layers]:
        if checkpoint and torch.is_grad_enabled():
            hidden = run_checkpointed(block, hidden, None, use_reentrant=False, **extra)
        else:
            hidden = block(hidden, None, **extra)
    return hidden[0]


def logits_at(bert: BertForMaskedLM, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Return the logits (M, stop - start) of some token ids at some hidden states (M, H): the head, only where needed."""
    head = bert.cls.predictions
    return F.linear(head.transform(hidden), head.decoder.weight[start:stop], head.decoder.bias[start:stop])


def init_gene_table(
    bert: BertForMaskedLM, vocabulary: Vocabulary, loadings: np.ndarray, *, scale: float = 1.0, seed: int = 0
) -> None:
    """Start the gene embeddings from what the data say about genes, such as the right singular vectors of the expression.

    Genes with similar loadings get similar vectors: the loadings are turned at random into the hidden size (angles stay) and
    scaled to a standard deviation. They are written into the position table, where a position is a gene, else into the word
    table; for `"gene_bins"` all bins of a gene share them.

    Parameters
    ----------
    bert
        The network, changed in place.
    vocabulary
        Its vocabulary.
    loadings
        One row per gene of the vocabulary, in its order (genes, k).
    scale
        Standard deviation of the new entries; 0.02 is that of a random table.
    seed
        Of the rotation.
    """
    loadings = np.asarray(loadings, dtype=np.float64)
    if loadings.ndim != 2 or len(loadings) != len(vocabulary.genes) or not np.isfinite(loadings).all():
        raise ScbinInputError(
            "T15",
            f"loadings need one finite row for each of the {len(vocabulary.genes)} genes; got shape {loadings.shape}.",
        )
    hidden_size, k = bert.config.hidden_size, loadings.shape[1]
    if k > hidden_size:
        loadings = loadings[:, :hidden_size]
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((hidden_size, hidden_size)))
    table = loadings @ rotation[: loadings.shape[1]]
    table *= scale / max(float(table.std()), 1e-12)
    rows = torch.from_numpy(table.astype(np.float32))
    embeddings = bert.bert.embeddings
    with torch.no_grad():
        if vocabulary.position_is_gene and vocabulary.encoding != "gene_bins":
            embeddings.position_embeddings.weight[torch.from_numpy(vocabulary.gene_positions)] = rows.to(bert.device)
            return
        levels = max(vocabulary.n_levels, 1)
        ids = slice(vocabulary.first_gene_id, vocabulary.first_gene_id + vocabulary.n_gene_ids)
        embeddings.word_embeddings.weight[ids] = rows.repeat_interleave(levels, 0).to(bert.device)
