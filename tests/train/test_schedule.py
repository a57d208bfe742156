from __future__ import annotations

import pytest
import torch
from torch import nn

from scbin.train.schedule import build_optimizer, learning_rate_factor, set_learning_rate
from scbin.train.settings import TrainSettings


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.1, 10])
def test_schedules_equal_those_of_transformers(name, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    n_warm = 10 if warmup else 0
    kind = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(kind, optimizer, n_warm, 100)
    for step in range(100):
        theirs = scheduler.get_last_lr()[0]
        ours = learning_rate_factor(step, 100, warmup, name)
        # ours rises to the peak at the end of the warm-up, theirs one step later: no step is spent on a rate of zero
        assert ours == pytest.approx(theirs + (1 / 10 if step < n_warm else 0), abs=1e-6)
        optimizer.step()
        scheduler.step()


def test_groups_of_decay_and_rate():
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    settings = TrainSettings(weight_decay=0.1, rate_scale={"0.": 0.5})
    optimizer = build_optimizer(net.named_parameters(), settings)
    set_learning_rate(optimizer, 1.0)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found[id(net[0].weight)] == (0.5, 0.1)
    assert found[id(net[0].bias)] == (0.5, 0.0)
    assert found[id(net[1].weight)] == (1.0, 0.0)
