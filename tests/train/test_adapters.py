"""Low-rank adapters: trained in place of the weights, then merged."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from scbin._errors import ScbinInputError
from scbin.train.adapters import adapted


def test_adapters_are_merged_and_gone(small):
    pytest.importorskip("peft")
    network = small.bert()
    names = set(network.state_dict())
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with adapted(network.backbone, {"r": 2, "lora_dropout": 0.0}, seed=1):
        n_trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        small.run(network, held_out=0.0)
        with torch.no_grad():
            pack = (
                small.task()
                .prepare(small.tokens, torch.arange(3).numpy(), seed=0, epoch=0, token_budget=99)
                .packs[0][0]
            )
            expected = network.backbone.encode(pack)
    assert n_trained == 4 * 2 * 16
    assert set(network.state_dict()) == names
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.endswith(("query.weight", "value.weight")) for name in moved)
    assert all(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        assert torch.allclose(network.backbone.encode(pack), expected, atol=1e-5)


def test_adapters_need_a_bert(small):
    with pytest.raises(ScbinInputError, match="M04.*bert"), adapted(small.network().backbone, {}):
        pass


def test_a_package_that_is_missing_is_named(small):
    if importlib.util.find_spec("peft"):
        pytest.skip("peft is installed")
    with pytest.raises(ScbinInputError, match=r"A05.*scbin\[lora\]"), adapted(small.bert().backbone, {}):
        pass
    with adapted(small.bert().backbone, None):
        pass
