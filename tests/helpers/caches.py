"""The cache of a language model, under the name by which the transformers that is installed takes it and returns it."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import LlamaForCausalLM

_NAME = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def cached(cache: Any) -> dict[str, Any]:
    """The keyword argument of a forward pass, or of generate, that hands the cache in."""
    return {_NAME: cache}


def cache_of(output: Any) -> Any:
    """The cache of a model's output."""
    return output[_NAME]
