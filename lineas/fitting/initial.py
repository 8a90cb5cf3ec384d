"""Where end-to-end fits start: closed-form maps to the same prompts, and the best of them by the held-out sets."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from ..arrays import baselines
from ..arrays.closed_form import fit
from ..hooks.collect import collect_batches
from ..inputs.batches import Batch
from ..inputs.frozen import RandomState
from ..inputs.prompts import Prompts
from ..maps.affine import AffineMap
from .distributed import Processes
from .objective import NonFinite, Objective, Task
from .parameters import MapParameters
from .settings import INITS, FitSettings
from .walk import Rows, of_all, of_prompts, walk

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""At which "best" tries maps, in this order."""

Maps: TypeAlias = dict[str, AffineMap]
Losses: TypeAlias = list[list[float]]
"""Pairs of strength and held-out loss."""


def start(
    model: nn.Module,
    tasks: Sequence[Sequence[Prompts]],
    objective: Objective,
    held_out: Sequence[Task],
    maps: MapParameters,
    settings: FitSettings,
) -> dict[str, Any]:
    """Load what ``settings.init``, a string, asks for into `maps`; inside `frozen`, once a target has run.

    Each task begins with its source and its target. Returns what metadata say: "init", the method with its strength,
    and for "best" also "init_losses", the held-out losses of all that was tried.
    """
    random = RandomState(model)  # the steps of a model that draws random numbers are those of a start without
    with torch.no_grad():
        processes = objective.processes
        sides = [_Side(model, objective.map_names, sets[0], sets[1], settings, processes) for sets in tasks]
        if settings.init != "best":
            method = str(settings.init)
            _load(maps, sides, method)
            found: dict[str, Any] = {"init": {"method": method, "strength": 1.0}}
        else:
            found = _best(sides, objective, held_out, maps)
    random.restore()
    return found


def _best(
    sides: Sequence[_Side], objective: Objective, held_out: Sequence[Task], maps: MapParameters
) -> dict[str, Any]:
    """Load the maps with the lowest held-out loss, and tell the losses of all."""
    lowest = objective.loss(held_out, maps.leaves())[0]
    losses: dict[str, Losses] = {"identity": [[0.0, lowest]]}
    best = {"method": "identity", "strength": 0.0}
    values = maps.weight.clone(), maps.bias.clone()
    for method in INITS[:-1]:
        if method == "iti-c" and importlib.util.find_spec("sklearn") is None:
            continue
        _load(maps, sides, method)
        losses[method] = tried = _along(lambda strength: objective.loss(held_out, maps.leaves(strength))[0])
        for strength, loss in tried:
            if loss < lowest:
                lowest, best, values = loss, {"method": method, "strength": strength}, maps.at(strength)
    maps.weight.copy_(values[0])
    maps.bias.copy_(values[1])
    return {"init": best, "init_losses": losses}


def _load(maps: MapParameters, sides: Sequence[_Side], method: str) -> None:
    """Load the maps of a method, the mean over the tasks, as the first of several processes has them."""
    maps.load(mean_of([side.maps(method) for side in sides]))
    sides[0].processes.same_tensors(maps.weight, maps.bias)


def _along(loss: Callable[[float], float]) -> Losses:
    """The loss at rising strengths, until one is higher than the one before or not finite."""
    tried: Losses = []
    for strength in STRENGTHS:
        try:
            tried.append([strength, loss(strength)])
        except NonFinite:
            break
        if len(tried) > 1 and tried[-1][1] > tried[-2][1]:
            break
    return tried


class _Side:
    """Source and target of a task, with their pooled activations, which are collected once."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        source: Prompts,
        target: Prompts,
        settings: FitSettings,
        processes: Processes,
    ) -> None:
        self.model, self.settings, self.processes = model, settings, processes
        size = settings.batch_size or settings.mini_batch
        self.sources: list[Batch] = processes.share(source).parts(size)
        self.source = self._rows(self.sources, names, source.argument)
        self.target = self._rows(processes.share(target).parts(size), names, target.argument)

    def _rows(self, batches: Sequence[Batch], names: Sequence[str], argument: str) -> dict[str, Rows]:
        """Pooled activations of the prompts of all processes."""
        if self.processes.size == 1:
            return collect_batches(self.model, batches, names, self.settings)
        parts = [(batch, collect_batches(self.model, [batch], names, self.settings)) for batch in batches]
        own = {name: np.concatenate([of_prompts(batch, part[name]) for batch, part in parts]) for name in parts[0][1]}
        return {name: of_all(rows, self.processes, argument) for name, rows in own.items()}

    def maps(self, method: str) -> Maps:
        """The maps of a method by module, at strength 1."""
        if method == "linear-incremental":
            return walk(
                self.model,
                self.sources,
                self.target,
                self.settings,
                method="linear",
                shrinkage="auto",
                show=False,
                processes=self.processes,
            ).maps
        if method == "iti-c":
            return dict(baselines.iti_c(self.source, self.target))
        return dict(fit(self.source, self.target, method=method, shrinkage="auto"))


def mean_of(maps: Sequence[Mapping[str, AffineMap]]) -> Maps:
    """The mean of the slopes and of the shifts of several maps, module by module."""
    if len(maps) == 1:
        return dict(maps[0])
    return {
        name: AffineMap(*(np.mean([getattr(one[name], part) for one in maps], axis=0) for part in ("weight", "bias")))
        for name in maps[0]
    }
