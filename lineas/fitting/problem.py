"""What an end-to-end fit starts from: checked settings, batches, and the objective with its targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from .._checks import as_int, as_pair, as_positive
from ..hooks.capture import execution_order
from ..hooks.modules import resolve
from ..inputs.batches import Batch, Sampler, split
from ..inputs.call import Forward
from ..inputs.tokenize import as_batches
from ..maps.metadata import Layers, Selection
from .autograd import sort_columns
from .objective import Leaves, NonFinite, Objective, Sets, check_count
from .parameters import FlatMaps


def read(
    source: Any, target: Any, held_out: Any, tokenizer: Any, max_length: int | None, task: str | None = None
) -> dict[str, list[Batch]]:
    """Batches of "source" and "target" and, where there are held-out sets, "held_out source" and "held_out target"."""
    sets = {"source": source, "target": target}
    if held_out is not None:
        argument = "held_out" if task is None else f"held_out[{task!r}]"
        sets |= dict(zip(("held_out source", "held_out target"), as_pair(held_out, argument), strict=True))
    return {
        name: as_batches(data, tokenizer=tokenizer, max_length=max_length, argument=called(name, task))
        for name, data in sets.items()
    }


def called(name: str, task: str | None) -> str:
    """What error messages call a set, "source" or "held_out target", of one of several tasks or of the only one."""
    if task is None:
        return name
    side = name.removeprefix("held_out ")
    return f"{'tasks' if side == name else 'held_out'}[{task!r}] {side}"


def find(model: nn.Module, layers: Layers, loss_layers: Layers | None) -> tuple[list[str], list[str]]:
    """Names of the modules that get a map, and of those at which the loss is taken."""
    map_names = resolve(model, layers)
    return map_names, map_names if loss_layers is None else resolve(model, loss_layers, argument="loss_layers")


def pose(
    model: nn.Module,
    data: dict[str, list[Batch]],
    map_names: list[str],
    loss_names: list[str],
    forward: Forward | None,
    pooling: str,
    scaling: str,
    *,
    tokens: Selection = "all",
    batch_size: int | None = None,
    mini_batch: int | None = None,
    seed: int = 0,
) -> tuple[Objective, Sets, Sets | None]:
    """The objective, the sets to fit and, where there are any, the held-out sets, each with its targets.

    Every set is split into forward passes of at most ``batch_size`` prompts, without it of ``mini_batch`` prompts. With
    ``mini_batch`` the steps draw so many prompts of the source; see `Sets.at`.
    """
    objective, [(fitted, trial)] = pose_tasks(
        model,
        {None: data},
        map_names,
        loss_names,
        forward,
        pooling,
        scaling,
        tokens=tokens,
        batch_size=batch_size,
        mini_batch=mini_batch,
        seed=seed,
    )
    return objective, fitted, trial


def pose_tasks(
    model: nn.Module,
    tasks: Mapping[str | None, dict[str, list[Batch]]],
    map_names: list[str],
    loss_names: list[str],
    forward: Forward | None,
    pooling: str,
    scaling: str,
    *,
    tokens: Selection = "all",
    batch_size: int | None,
    mini_batch: int | None,
    seed: int,
) -> tuple[Objective, list[tuple[Sets, Sets | None]]]:
    """One objective for several tasks, and the sets of each, as in `pose`; None is the name of an only one."""
    samplers: dict[str | None, Sampler | None] = dict.fromkeys(tasks)
    parts = {}
    for task, data in tasks.items():
        if mini_batch is not None:
            argument = called("source", task)
            samplers[task] = Sampler(data["source"], mini_batch, batch_size=batch_size, seed=seed, argument=argument)
        sampler = samplers[task]
        parts[task] = {
            name: split(batches, batch_size or mini_batch, called(name, task))
            if sampler is None or name != "source"
            else sampler.draw(0)
            for name, batches in data.items()
        }
    first = next(iter(parts.values()))["source"][0]
    objective = _objective(model, first, map_names, loss_names, forward, pooling, scaling, tokens)

    def sets(task: str | None, kind: str, sampler: Sampler | None) -> Sets:
        source, target = f"{kind}source", f"{kind}target"
        targets = _targets(objective, parts[task][target], called(target, task))
        return Sets(called(source, task), parts[task][source], targets, sampler)

    posed = []
    for task, data in tasks.items():
        fitted = sets(task, "", samplers[task])
        posed.append((fitted, sets(task, "held_out ", None) if "held_out source" in data else None))
    return objective, posed


def _objective(
    model: nn.Module,
    batch: Batch,
    map_names: list[str],
    loss_names: list[str],
    forward: Forward | None,
    pooling: str,
    scaling: str,
    tokens: Selection,
) -> Objective:
    """The objective with both lists of names in execution order, which a first run finds."""
    order = execution_order(model, batch, list(dict.fromkeys([*map_names, *loss_names])), forward)
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
        tokens=tokens,
    )


def _targets(objective: Objective, batches: Sequence[Batch], argument: str) -> list[Tensor]:
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


def check_rate(lr: Any) -> float | None:
    """A number above 0, or None for "auto"."""
    if isinstance(lr, str):
        if lr != "auto":
            raise ValueError(f"lr must be 'auto' or a number, got {lr!r}")
        return None
    return as_positive(lr, "lr")


def check_size(argument: str, value: Any, low: int) -> int | None:
    """An integer not below ``low``, or None."""
    return None if value is None else as_int(value, argument, low=low)
