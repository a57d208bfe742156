"""Low-rank adapters (LoRA): few numbers trained in place of many, then merged, so that the network stays stock."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from scbin._errors import ScbinInputError
from scbin.nn.backbone import seeded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

# Geneformer's
DEFAULTS: dict[str, Any] = {"r": 64, "lora_alpha": 128, "lora_dropout": 0.1, "target_modules": ["query", "value"]}


@contextmanager
def adapted(backbone: nn.Module, settings: Mapping[str, Any] | None, *, seed: int = 0) -> Iterator[None]:
    """Train adapters in place of a backbone's weights, from a random start; in the end they are merged into these and gone.

    `settings` are any that `peft.LoraConfig` takes, over Geneformer's; `None` for no adapters.
    """
    if settings is None:
        yield
        return
    if not any(name.endswith("query") for name, _ in backbone.named_modules()):
        raise ScbinInputError("M04", "lora= needs a BERT. Pretrain with backbone='bert', or leave lora out.")
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        told = "lora needs the package peft: pip install 'scbin[lora]', or leave lora out."
        raise ScbinInputError("A05", told) from error
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    try:
        with seeded(seed):
            peft.inject_adapter_in_model(peft.LoraConfig(**{**DEFAULTS, **settings}), backbone)
        yield
    finally:
        for name, module in list(backbone.named_modules()):
            if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
                module.merge()
                parent, _, own = name.rpartition(".")
                setattr(backbone.get_submodule(parent), own, module.get_base_layer())
        backbone.__dict__.pop("peft_config", None)
        for parameter in trained:
            parameter.requires_grad_(True)
