"""Stock BERT over packs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import BertConfig, BertForMaskedLM

from scbin._errors import ScbinInputError
from scbin.nn.attention import PACKED
from scbin.nn.backbone import layer_number, token_logits
from scbin.nn.presets import CONFIG_KEYS, SHAPE, Network, misfit

if TYPE_CHECKING:
    from torch import Tensor

    from scbin.nn.packs import Pack
    from scbin.tokens.vocabulary import Vocabulary


class BertBackbone(nn.Module):
    """A stock `transformers.BertForMaskedLM`, read pack by pack without masks or padding."""

    kind = "bert"

    def __init__(self, bert: BertForMaskedLM):
        super().__init__()
        if bert.config._attn_implementation != PACKED:
            # any other attention would look across the cells of a pack, and say nothing
            raise ScbinInputError("M04", "this BERT does not have the packed attention; build or load it with scbin.")
        self.bert = bert
        self.hidden_size, self.n_layers = bert.config.hidden_size, bert.config.num_hidden_layers

    def embed(self, pack: Pack) -> Tensor:
        """Return what goes into the first layer (T, hidden)."""
        embeddings = self.bert.bert.embeddings
        words, places = embeddings.word_embeddings(pack.input_ids), embeddings.position_embeddings(pack.position_ids)
        return embeddings.dropout(embeddings.LayerNorm(words + places + embeddings.token_type_embeddings.weight[0]))

    def encode(self, pack: Pack, layer: int = -1, *, gates: Tensor | None = None) -> Tensor:
        """Return the hidden states of a pack after one layer (T, hidden).

        The modules of stock BERT are called one after another, so that weights, hooks and adapters on them count as usual.
        """
        states = self.embed(pack)[None]
        for block in self.bert.bert.encoder.layer[: layer_number(layer, self.n_layers)]:
            states = block(states, None, layout=pack.layout, key_bias=gates)
        return states[0]

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None, *, ids: Tensor | None = None) -> Tensor:
        """Return the logits of some token ids at some hidden states (M, K)."""
        head = self.bert.cls.predictions
        return token_logits(head.transform(hidden), head.decoder.weight, head.decoder.bias, start, stop, ids)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return the tables of the token ids and of the positions."""
        embeddings = self.bert.bert.embeddings
        return embeddings.word_embeddings.weight, embeddings.position_embeddings.weight

    def config(self) -> dict[str, Any]:
        """Return the shape of the network as plain values."""
        own = self.bert.config
        return {name: getattr(own, name) for name in SHAPE} | {"max_length": own.max_position_embeddings}

    @classmethod
    def build(cls, vocabulary: Vocabulary, preset: Network) -> BertBackbone:
        """Build a BERT with random weights for a vocabulary."""
        n_positions = max(vocabulary.n_positions, preset.max_length or 0)
        sizes: dict[str, Any] = {"vocab_size": vocabulary.n_tokens, "max_position_embeddings": n_positions}
        for name, size in sizes.items():
            if words := misfit(size, CONFIG_KEYS[name]):
                told = f"the tokens need {name}={size:,} of the network; it takes {words}"
                raise ScbinInputError("M04", f"{told}. Tokenize with fewer genes or bins.")
        shape: dict[str, Any] = {name: getattr(preset, name) for name in SHAPE} | {"attention_probs_dropout_prob": 0.0}
        shape |= {"pad_token_id": 0, "attn_implementation": PACKED}
        return cls(BertForMaskedLM(BertConfig(**sizes, **shape)))

    @classmethod
    def from_config(cls, vocabulary: Vocabulary, config: dict[str, Any]) -> BertBackbone:
        """Build the BERT that `config` describes, without its weights."""
        return cls.build(vocabulary, Network(**config))
