"""Low-rank adapters (LoRA): few numbers trained in place of many, then merged, so that the network stays stock."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from scbin._errors import ScbinInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import BertForMaskedLM

# Geneformer's
DEFAULTS: dict[str, Any] = {"r": 64, "lora_alpha": 128, "lora_dropout": 0.1, "target_modules": ["query", "value"]}


@contextmanager
def adapted(bert: BertForMaskedLM, settings: Mapping[str, Any] | None, *, seed: int = 0) -> Iterator[None]:
    """Train adapters in place of the network; in the end they are merged into its weights and gone.

    Parameters
    ----------
    bert
        The network, changed in place.
    settings
        Over Geneformer's, any that `peft.LoraConfig` takes; `None` for no adapters.
    seed
        Of their random start.
    """
    if settings is None:
        yield
        return
    peft = _peft()
    try:
        config = peft.LoraConfig(**{**DEFAULTS, "bias": "none", **settings})
    except (TypeError, ValueError) as error:
        raise ScbinInputError("F06", f"lora={dict(settings)!r} is not what peft.LoraConfig takes ({error}).") from error
    trained = [parameter for parameter in bert.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        try:
            peft.inject_adapter_in_model(config, bert)
        except ValueError as error:
            raise ScbinInputError("F06", f"lora={dict(settings)!r} does not fit this network ({error}).") from error
    try:
        yield
    finally:
        _merge(bert)
        for parameter in trained:
            parameter.requires_grad_(True)


def _merge(bert: BertForMaskedLM) -> None:
    for name, module in list(bert.named_modules()):
        if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(bert.get_submodule(parent), own, module.get_base_layer())


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ScbinInputError(
            "F05", "lora needs the package peft: pip install 'scbin[lora]', or leave lora out."
        ) from error
