"""What an end-to-end fit starts from: checked settings, batches, and the objective with its targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor, nn

from . import calling, sites
from .autograd import sort_columns
from .batches import Sampler, split
from .objective import Leaves, NonFinite, Objective, Sets, check_count
from .optim import FlatMaps


def read(
    source: Any, target: Any, held_out: Any, tokenizer: Any, max_length: int | None
) -> dict[str, list[calling.Batch]]:
    """Batches of "source" and "target" and, where there are held-out sets, "held_out source" and "held_out target"."""
    sets = {"source": source, "target": target}
    if held_out is not None:
        if not isinstance(held_out, tuple | list):
            raise TypeError(f"held_out must be a pair (source, target), got {type(held_out).__name__}")
        if len(held_out) != 2:
            raise ValueError(f"held_out must be a pair (source, target), got {len(held_out)} entries")
        sets |= {"held_out source": held_out[0], "held_out target": held_out[1]}
    return {
        name: calling.as_batches(data, tokenizer=tokenizer, max_length=max_length, argument=name)
        for name, data in sets.items()
    }


def find(model: nn.Module, layers: sites.Layers, loss_layers: sites.Layers | None) -> tuple[list[str], list[str]]:
    """Names of the modules that get a map, and of those at which the loss is taken."""
    map_names = sites.resolve(model, layers)
    return map_names, map_names if loss_layers is None else sites.resolve(model, loss_layers, argument="loss_layers")


def pose(
    model: nn.Module,
    data: dict[str, list[calling.Batch]],
    map_names: list[str],
    loss_names: list[str],
    forward: calling.Forward | None,
    pooling: str,
    scaling: str,
    *,
    batch_size: int | None = None,
    mini_batch: int | None = None,
    seed: int = 0,
) -> tuple[Objective, Sets, Sets | None]:
    """The objective, the sets to fit and, where there are any, the held-out sets, each with its targets.

    Every set is split into forward passes of at most ``batch_size`` prompts, without it of ``mini_batch`` prompts. With
    ``mini_batch`` the steps draw so many prompts of the source; see `Sets.at`.
    """
    size = batch_size or mini_batch
    sampler = None
    if mini_batch is not None:
        sampler = Sampler(data["source"], mini_batch, batch_size=batch_size, seed=seed, argument="source")
    parts = {
        name: split(batches, size, name) if sampler is None or name != "source" else sampler.draw(0)
        for name, batches in data.items()
    }
    objective = _objective(model, parts["source"][0], map_names, loss_names, forward, pooling, scaling)
    fitted = Sets("source", parts["source"], _targets(objective, parts["target"], "target"), sampler)
    if "held_out source" not in parts:
        return objective, fitted, None
    targets = _targets(objective, parts["held_out target"], "held_out target")
    return objective, fitted, Sets("held_out source", parts["held_out source"], targets)


def _objective(
    model: nn.Module,
    batch: calling.Batch,
    map_names: list[str],
    loss_names: list[str],
    forward: calling.Forward | None,
    pooling: str,
    scaling: str,
) -> Objective:
    """The objective with both lists of names in execution order, which a first run finds."""
    order = calling.execution_order(model, batch, list(dict.fromkeys([*map_names, *loss_names])), forward)
    last = max(map(order.index, loss_names))
    late = [name for name in map_names if order.index(name) > last]
    if late:
        raise ValueError(
            f"layers: module {late[0]!r} runs after {order[last]!r}, the last of loss_layers: no gradient reaches it"
        )
    return Objective(
        model,
        sorted(map_names, key=order.index),
        sorted(loss_names, key=order.index),
        forward=forward,
        pooling=pooling,
        scaling=scaling,
    )


def _targets(objective: Objective, batches: Sequence[calling.Batch], argument: str) -> list[Tensor]:
    """Sorted target activations of the loss modules."""
    samples = objective.survey(batches)
    check_count(samples, argument)
    return sort_columns(samples, [f"{argument}: {name}" for name in objective.loss_names])


def trial_loss(objective: Objective, trial: Sets | None, leaves: Leaves) -> float | None:
    """The loss on held-out sets, None without them."""
    if trial is None:
        return None
    return objective.loss(trial, leaves)[0].item()


def check_maps(maps: FlatMaps) -> None:
    """Raise NonFinite where a step took a map out of the range of its dtype."""
    finite = maps.weight.isfinite() & maps.bias.isfinite()
    if not finite.all():
        module = np.searchsorted(maps.offsets, int((~finite).nonzero()[0]), side="right") - 1
        raise NonFinite(f"{maps.names[module]}: the map is not finite")


def check_real(argument: str, value: Any, low: float, *, strict: bool = False) -> float:
    """A finite real number above ``low``, or not below it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument} must be a number, got {type(value).__name__}")
    value = float(value)
    if not math.isfinite(value) or value < low or (strict and value == low):
        raise ValueError(f"{argument} must be finite and {'>' if strict else '>='} {low:g}, got {value:g}")
    return value


def check_rate(lr: Any) -> float | None:
    """A number above 0, or None for "auto"."""
    if isinstance(lr, str):
        if lr != "auto":
            raise ValueError(f"lr must be 'auto' or a number, got {lr!r}")
        return None
    return check_real("lr", lr, 0.0, strict=True)


def check_integer(argument: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument} must be an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{argument} must be >= {low}, got {value}")
    return int(value)


def check_size(argument: str, value: Any, low: int) -> int | None:
    """An integer not below ``low``, or None."""
    return None if value is None else check_integer(argument, value, low)


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")
