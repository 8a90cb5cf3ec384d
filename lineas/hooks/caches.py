"""What the caches of models tell of themselves: keys and values, which grow, and states, which do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# The cache among the arguments of a model, and among its outputs; transformers renamed it in 5.24. RWKV's is a list.
CACHES = ("cache", "past_key_values", "cache_params", "state")


def cache_of(named: Mapping[str, Any]) -> Any:
    """The cache among arguments or outputs, if there is one."""
    for key in CACHES:
        cache = named.get(key)
        if cache is not None and (key != "state" or _is_state_list(cache)):
            return cache
    return None


def _is_state_list(cache: Any) -> bool:
    """Whether a cache is RWKV's: a list of states, whose tensors are written into."""
    return isinstance(cache, list) and bool(cache) and all(isinstance(entry, Tensor) for entry in cache)


def identity(cache: Any) -> Any:
    """The object by which a cache is known: of a list of states, which can have no weak reference, the first."""
    return cache[0] if _is_state_list(cache) else cache


def columns(cache: Any) -> int | Tensor | None:
    """How many columns are in a cache; a tensor where only the device knows, None where it holds states alone."""
    told = getattr(cache, "seqlen_offset", None)  # xLSTM's
    tell = getattr(cache, "get_seq_length", None)
    if callable(tell) and not _states_alone(cache):
        try:
            told = tell()
        except (ValueError, TypeError):  # transformers' answer where there are states alone
            return None
    elif isinstance(cache, tuple | list) and cache and isinstance(cache[0], tuple | list) and cache[0]:
        first = cache[0][0]
        return first.shape[-2] if isinstance(first, Tensor) and first.ndim > 1 else None
    if told is None:
        return None
    return told.clone() if isinstance(told, Tensor) else int(told)  # the pass will count on in it


def _states_alone(cache: Any) -> bool:
    """Whether every layer of a cache of transformers holds a state, which does not grow, and no keys and values."""
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and not any(hasattr(layer, "get_seq_length") for layer in layers)


def has_states(cache: Any, known: bool) -> bool:
    """Whether a cache of states has seen tokens; one that does not say has if it is `known`, or a list of them."""
    tell = getattr(cache, "has_previous_state", None)
    if callable(tell):
        try:
            return bool(tell())
        except ValueError:  # it has no layers yet
            return False
    return tell if isinstance(tell, bool) else known or _is_state_list(cache)
