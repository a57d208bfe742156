"""Every backbone: a cell's hidden states are its own, whatever else is in the pack; BERT against plain transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scbin._errors import ScbinInputError
from scbin.nn.attention import PACKED
from scbin.nn.bert import BertBackbone
from scbin.nn.network import BACKBONES, CellNetwork, build_network
from scbin.nn.packs import make_pack
from scbin.nn.presets import CONFIG_KEYS, PRESETS, preset
from scbin.nn.vector import LatentVector, PooledVector
from scbin.tokens.bins import Bins
from scbin.tokens.vocabulary import Vocabulary

SHAPE = replace(preset("tiny"), hidden_size=32, num_hidden_layers=3, intermediate_size=48)
KINDS = ["bert", "mlp"]
LENGTHS = (5, 1, 32, 17, 9)


@pytest.fixture(scope="module")
def rows():
    torch.set_num_threads(1)
    vocabulary = Vocabulary.build("rank", [f"G{i}" for i in range(40)], max_length=32)
    rng = np.random.default_rng(0)
    return vocabulary, [rng.integers(2, vocabulary.n_tokens, n) for n in LENGTHS]


def build(vocabulary, kind, seed=0):
    return build_network(vocabulary, SHAPE, kind, seed=seed).backbone.eval()


def lay(rows):
    positions = np.concatenate([np.arange(len(row)) for row in rows])
    lengths = np.array([len(row) for row in rows])
    return make_pack(np.concatenate(rows), positions, lengths, np.arange(len(rows)))


@pytest.mark.parametrize("kind", KINDS)
def test_pack_mates_and_order_change_nothing(rows, kind):
    vocabulary, rows = rows
    backbone = build(vocabulary, kind)
    for layer in (0, 1, -1):
        hidden = backbone.encode(lay(rows), layer).split(LENGTHS)
        for order in ([4, 2, 0, 3, 1], [2], [1, 1, 0]):
            again = backbone.encode(lay([rows[i] for i in order]), layer).split([LENGTHS[i] for i in order])
            for i, part in zip(order, again, strict=True):
                assert (part - hidden[i]).abs().max() < 1e-5
    with pytest.raises(ScbinInputError, match="layer is 4"):
        backbone.encode(lay(rows), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_gate_is_a_token_that_is_not_there(rows, kind):
    vocabulary, rows = rows
    backbone = build(vocabulary, kind)
    gates = torch.zeros(sum(LENGTHS))
    gates[torch.tensor([4, 37, 54])] = -60.0  # the last tokens of the first, third and fourth row
    shorter = [row[:-1] if i in (0, 2, 3) else row for i, row in enumerate(rows)]
    hidden = backbone.encode(lay(rows), gates=gates).split(LENGTHS)
    expected = backbone.encode(lay(shorter)).split([len(row) for row in shorter])
    for row, other in zip(hidden, expected, strict=True):
        assert (row[: len(other)] - other).abs().max() < 1e-5
    assert (backbone.encode(lay(rows), gates=torch.zeros(sum(LENGTHS))) - backbone.encode(lay(rows))).abs().max() < 1e-5
    gates = torch.zeros(sum(LENGTHS), requires_grad=True)
    backbone.encode(lay(rows), gates=gates).sin().sum().backward()
    assert gates.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_embedded_tokens_and_chosen_logits(rows, kind):
    vocabulary, rows = rows
    backbone, pack = build(vocabulary, kind), lay(rows)
    hidden = backbone.encode(pack)
    assert torch.equal(backbone.encode(pack, 0), backbone.embed(pack))
    logits = backbone.logits(hidden[[3, 1]])
    assert logits.shape == (2, vocabulary.n_tokens)
    assert (backbone.logits(hidden[[3, 1]], 10, 20) - logits[:, 10:20]).abs().max() < 1e-5
    ids = torch.tensor([[7, 3], [2, 11]])
    assert (backbone.logits(hidden[[3, 1]], ids=ids) - logits.gather(1, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_a_network_and_its_configuration_the_same_shape(rows, kind):
    vocabulary, rows = rows
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, other, third = (build(vocabulary, kind, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    again = BACKBONES[kind].from_config(vocabulary, one.config())
    again.load_state_dict(third.state_dict())
    assert torch.equal(again.eval().encode(lay(rows)), third.encode(lay(rows)))
    assert not torch.equal(one.encode(lay(rows)), third.encode(lay(rows)))
    assert again.tables()[0].shape == (vocabulary.n_tokens, 32) and again.kind == kind
    with torch.device("meta"):  # as files are compared with what they should hold
        blank = BACKBONES[kind].from_config(vocabulary, one.config())
        for vector in (LatentVector(vocabulary, 32), *(PooledVector(vocabulary, 32, p) for p in ("weighted", "mean"))):
            assert all(p.is_meta for p in vector.parameters())
    assert {n: p.shape for n, p in blank.named_parameters()} == {n: p.shape for n, p in one.named_parameters()}


def test_the_parts_of_a_network_and_what_it_refuses():
    vocabulary = Vocabulary.build("bins", ["A", "B", "C"], bins=Bins((0.5, 1.5)))
    network = build_network(vocabulary, SHAPE, vector="pooled", vector_options={"pooling": "mean"})
    assert network.counts is None and network.vector.size == 32
    network = build_network(vocabulary, SHAPE, batches=["x", "y"], vector_options={"size": 4})
    assert network.counts.batches == ("x", "y") and network.counts.loadings.shape == (3, 4)
    assert isinstance(network, CellNetwork) and network.labels is None and network.batches is None
    for wrong in ({"backbone": "gpt"}, {"vector": "x"}, {"seed": -1}, {"seed": 2**63}):
        with pytest.raises(ScbinInputError, match=f"{next(iter(wrong))} is"):
            build_network(vocabulary, SHAPE, **wrong)


# ---- BERT against plain transformers ----------------------------------------------------------------------------------


def test_a_pack_equals_stock_bert_on_each_cell_and_on_a_padded_batch(rows):
    vocabulary, rows = rows
    backbone = build(vocabulary, "bert")
    bert, parts = backbone.bert, backbone.encode(lay(rows)).split(LENGTHS)
    bert.set_attn_implementation("eager")
    ids = torch.tensor([[*row, *[0] * (32 - len(row))] for row in rows])
    try:
        padded = bert.bert(ids, attention_mask=(ids > 0).long()).last_hidden_state
        for row, part, batch in zip(rows, parts, padded, strict=True):
            alone = bert.bert(torch.from_numpy(row)[None]).last_hidden_state[0]
            assert (part - alone).abs().max() < 1e-5
            assert (part - batch[: len(row)]).abs().max() < 1e-5
        with pytest.raises(ScbinInputError, match="packed attention"):
            BertBackbone(bert)
    finally:
        bert.set_attn_implementation(PACKED)
    # the registered attention also serves the ordinary forward, with its mask
    assert (bert.bert(ids, attention_mask=(ids > 0).long()).last_hidden_state - padded).abs().max() < 1e-5


def test_gradients_equal_those_of_stock_bert(rows):
    vocabulary, rows = rows
    backbone = build(vocabulary, "bert")
    backbone.encode(lay(rows)).square().sum().backward()
    packed = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    backbone.bert.set_attn_implementation("eager")
    for row in rows:
        backbone.bert.bert(torch.from_numpy(row)[None]).last_hidden_state.square().sum().backward()
    own = dict(backbone.named_parameters())
    for name, gradient in packed.items():
        assert (own[name].grad - gradient).abs().max() <= 1e-4 * max(1, gradient.abs().max())


def test_layers_and_logits_of_bert(rows):
    vocabulary, rows = rows
    backbone = build(vocabulary, "bert")
    ids = torch.from_numpy(rows[2])[None]
    states = backbone.bert.bert(ids, output_hidden_states=True).hidden_states
    for layer in range(-4, 4):
        assert (backbone.encode(lay([rows[2]]), layer) - states[layer][0]).abs().max() < 1e-5
    assert (backbone.logits(backbone.encode(lay([rows[2]]))) - backbone.bert(ids).logits[0]).abs().max() < 1e-5


def weights_of(c, vocab_size, positions):
    """Weights of a BERT for masked prediction, counted by hand."""
    h, ff = c.hidden_size, c.intermediate_size
    layer = 4 * (h * h + h) + (h * ff + ff) + (ff * h + h) + 4 * h
    return (vocab_size + positions + 2) * h + 2 * h + c.num_hidden_layers * layer + (h * h + h + 2 * h) + vocab_size


@pytest.mark.parametrize(
    ("name", "vocab_size", "positions", "total"),
    [
        ("geneformer-v1-6l", 25_426, 2048, 10_288_722),
        ("geneformer-v1-12l", 25_426, 2048, 39_591_250),
        ("geneformer-v2-104m", 20_275, 4096, 104_386_867),
        ("geneformer-v2-316m", 20_275, 4096, 316_354_867),
        ("polygene", 284, 2440, 87_741_980),
    ],
)
def test_presets_have_the_published_number_of_weights(name, vocab_size, positions, total):
    assert weights_of(preset(name), vocab_size, positions) == total


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built(name):
    vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    with torch.device("meta"):
        backbone = BertBackbone.build(vocabulary, preset(name))
    positions = backbone.config()["max_length"]
    assert sum(p.numel() for p in backbone.parameters()) == weights_of(preset(name), vocabulary.n_tokens, positions)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: 0} for name in ("num_attention_heads", "hidden_size")),
        {"initializer_range": -1},
        *({"hidden_size": size} for size in (4, 65, 64.0, "64")),
        {"intermediate_size": 64 * 9},
        {"hidden_act": "gelo"},
        {"hidden_dropout_prob": 2},
        {"max_length": 2**18 + 1},
        {"num_hidden_layers": True},
    ],
    ids=str,
)
def test_a_network_that_could_not_be_read_again_is_not_made(changes):
    with pytest.raises(ScbinInputError, match=next(iter(changes))):
        replace(PRESETS["tiny"], **changes)


def test_names_of_presets_and_numbers_of_numpy():
    for name in ("huge", ["tiny"], 3):
        with pytest.raises(ScbinInputError, match="no preset"):
            preset(name)
    shape = replace(PRESETS["tiny"], hidden_size=np.int64(32), hidden_dropout_prob=np.float32(0.5))
    assert type(shape.hidden_size) is int and type(shape.hidden_dropout_prob) is float


def test_a_vocabulary_beyond_the_largest_network(monkeypatch, rows):
    monkeypatch.setitem(CONFIG_KEYS, "vocab_size", (2, 5))
    with pytest.raises(ScbinInputError, match="vocab_size"):
        build_network(rows[0], SHAPE, "bert")
