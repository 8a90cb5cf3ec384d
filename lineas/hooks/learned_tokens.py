"""Tokens that PEFT has learned and puts before a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def prompt_learner(model: nn.Module) -> nn.Module | None:
    """The wrapper of PEFT in or around a model, if it puts learned tokens before the text."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, Mapping) and hasattr(module, "active_peft_config"):
            return module if any(getattr(one, "is_prompt_learning", False) for one in configs.values()) else None
    return None


def virtual_tokens(wrapper: nn.Module) -> int:
    """How many learned tokens PEFT puts before the text of this pass."""
    config: Any = wrapper.active_peft_config
    switched_off = (
        getattr(wrapper.forward, "__self__", wrapper) is not wrapper
    )  # disable_adapter sets that of the model
    if switched_off or not getattr(config, "is_prompt_learning", False):
        return 0
    return int(config.num_virtual_tokens)
