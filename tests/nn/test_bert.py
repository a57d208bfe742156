from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from scbin._errors import ScbinInputError
from scbin.encoding.vocabulary import Vocabulary
from scbin.nn.bert import bert_config, build_bert
from scbin.nn.device import resolve_device, resolve_precision
from scbin.nn.limits import CONFIG_KEYS, Limit
from scbin.nn.presets import PRESETS, preset
from scbin.nn.untrusted import make_config


def parameters(c, vocab_size, positions):
    """Weights of a BERT for masked modelling, counted by hand."""
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
        ("polygene", 284, 520, 86_267_420),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, vocab_size, positions, total):
    assert parameters(preset(name), vocab_size, positions) == total


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built(name):
    vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    config = bert_config(vocabulary, name)
    with torch.device("meta"):
        from transformers import BertForMaskedLM

        bert = BertForMaskedLM(config)
    expected = parameters(preset(name), vocabulary.n_tokens, config.max_position_embeddings)
    assert sum(p.numel() for p in bert.parameters()) == expected


def test_overrides_and_mistakes():
    vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    assert build_bert(vocabulary, "tiny", hidden_size=32, num_hidden_layers=1).config.hidden_size == 32
    for kwargs, code in (({"hidden": 3}, "T11"), ({"hidden_size": 30}, "T12")):
        with pytest.raises(ScbinInputError, match=code):
            build_bert(vocabulary, "tiny", **kwargs)
    for name in ("huge", ["tiny"], 3):
        with pytest.raises(ScbinInputError, match="T10"):
            preset(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 64 * 9},
        {"hidden_size": 4},
        {"hidden_size": 8},
        {"hidden_size": 64.0},
        {"hidden_size": 65},
        {"num_hidden_layers": 97},
        {"num_attention_heads": 0},
        {"hidden_act": "gelo"},
        {"hidden_act": ["gelu"]},
        {"hidden_dropout_prob": 2},
        {"attention_probs_dropout_prob": float("nan")},
        {"initializer_range": 0.0},
        {"max_length": 2**18 + 1},
        {"clip": -1.0},
        {"clip": 0},
        {"learning_rate": float("inf")},
        {"warmup": -1},
        {"weight_decay": "0.1"},
        {"schedule": "cosin"},
        {"precision": "half"},
        {"cells_per_step": 0},
        {"epochs": True},
        {"fewest_steps": None},
    ],
)
def test_a_network_that_could_not_be_read_again_is_not_made(changes):
    """The limits of a file's network hold for one that is made, and the error names the argument."""
    vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    for make in (lambda: build_bert(vocabulary, "tiny", **changes), lambda: replace(PRESETS["tiny"], **changes)):
        with pytest.raises(ScbinInputError, match=next(iter(changes))) as caught:
            make()
        assert caught.value.code == "T12"


def test_every_network_that_is_made_is_within_the_limits_of_reading():
    vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    config = bert_config(vocabulary, "tiny", hidden_size=8, intermediate_size=64, initializer_range=1)
    content = {key: getattr(config, key) for key in CONFIG_KEYS}
    assert make_config(content, "config.json").hidden_size == 8


def test_numbers_of_numpy_are_numbers():
    vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    config = bert_config(vocabulary, "tiny", hidden_size=np.int64(32), hidden_dropout_prob=np.float32(0.5))
    assert type(config.hidden_size) is int and type(config.hidden_dropout_prob) is float


def test_a_vocabulary_beyond_the_largest_network(monkeypatch):
    vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    monkeypatch.setitem(CONFIG_KEYS, "vocab_size", Limit((int,), "a whole number from 2 to 5", 2, 5))
    with pytest.raises(ScbinInputError, match=r"T64.*vocab_size"):
        build_bert(vocabulary, "tiny")


def test_devices_and_precision():
    vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    cpu = resolve_device("cpu")
    assert resolve_precision("auto", cpu, bert_config(vocabulary, "tiny")) == torch.float32
    assert resolve_precision("bfloat16", cpu, bert_config(vocabulary, "tiny")) == torch.bfloat16
    for name in ("cuda:99", "abacus"):
        with pytest.raises(ScbinInputError, match="T20"):
            resolve_device(name)
    with pytest.raises(ScbinInputError, match="T21"):
        resolve_precision("half", cpu, bert_config(vocabulary, "tiny"))


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_a_seed_beyond_the_generators(seed):
    vocabulary = Vocabulary.build("rank", ["A", "B", "C"], max_length=8)
    with pytest.raises(ScbinInputError, match=r"T63.*seed"):
        build_bert(vocabulary, "tiny", seed=seed)
    build_bert(vocabulary, "tiny", seed=np.int64(2**63 - 1))
