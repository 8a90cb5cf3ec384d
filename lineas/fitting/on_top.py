"""Maps that are on a model while others are fitted, and the neurons of theirs that the others leave alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..hooks.modules import find
from ..maps.metadata import Selection, spell_tokens
from ..maps.steering import SteeringMaps
from .checkpoint import digest
from .objective import Leaves, Objective, Task
from .parameters import MapParameters


def as_on_top_of(maps: SteeringMaps, model: nn.Module, tokens: Selection) -> SteeringMaps:
    """The maps under the names that fits give to the modules of `model`.

    ValueError if it lacks a module, or they were fitted for other tokens than `tokens`: what is composed of both would
    have to act on both.
    """
    wanted = spell_tokens(tokens)
    for other in _spelled_tokens(maps.metadata):
        if other != wanted:
            raise ValueError(
                f"on_top_of must be maps for the tokens of this fit, {wanted!r}: they were fitted for {other!r}"
            )
    return maps.rename(lambda name: find(model, name)[0])


def _spelled_tokens(metadata: Mapping[str, Any]) -> list[Any]:
    """The tokens, as metadata have them, that maps or those that they are composed of were fitted for."""
    parts = metadata.get("parts")
    if "tokens" not in metadata and isinstance(parts, list):
        return [found for part in parts if isinstance(part, dict) for found in _spelled_tokens(part)]
    return [metadata.get("tokens") or "all"]


def digest_of_maps(maps: SteeringMaps, disjoint: bool) -> str:
    """A digest of the maps that a fit is on top of, and of whether it leaves their neurons alone."""
    return digest({name: [one.weight, one.bias] for name, one in maps.items()}, disjoint)


def free_neurons(parameters: MapParameters, maps: Mapping[str, Any]) -> Tensor:
    """The neurons that `maps` leave as they are: bool [D], of the modules of `parameters`.

    ValueError if there are none.
    """
    free = [
        (maps[name].weight == 1) & (maps[name].bias == 0) if name in maps else np.ones(width, bool)
        for name, width in zip(parameters.names, parameters.sizes, strict=True)
    ]
    found = torch.from_numpy(np.concatenate(free)).to(parameters.weight.device)
    if not found.any():
        raise ValueError(
            f"disjoint leaves no neuron to fit: on_top_of maps all {len(found)} of them; fit that with a larger l1 or "
            "group"
        )
    return found


def check_start(parameters: MapParameters, free: Tensor) -> None:
    """ValueError if the maps that a fit starts from change a neuron that is to be left alone."""
    taken = parameters.support() & ~free
    if taken.any():
        index = int(taken.nonzero()[0])
        module = int(np.searchsorted(parameters.offsets, index, side="right")) - 1
        raise ValueError(
            f"init must leave the neurons of on_top_of alone where disjoint is True: it maps {int(taken.sum())} of "
            f"them, such as neuron {index - parameters.offsets[module]} of {parameters.names[module]!r}"
        )


class MaskedObjective:
    """An objective with gradients of 0 at the neurons that are not free.

    The maps of those start as identities and stay so, to the bit: steps without gradient move nothing, and the proximal
    operator of 0 is 0. Rates are found from the masked gradients.
    """

    def __init__(self, objective: Objective, free: Tensor) -> None:
        self._objective, self._free = objective, free

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def gradient(self, tasks: Sequence[Task], maps: Leaves) -> tuple[float, Tensor, Tensor, Tensor]:
        """As `Objective.gradient`."""
        total, terms, grad_weight, grad_bias = self._objective.gradient(tasks, maps)
        return total, terms, grad_weight * self._free, grad_bias * self._free


def masked(objective: Objective, free: Tensor) -> Objective:
    """`objective` with a `MaskedObjective`'s gradients."""
    return cast(Objective, MaskedObjective(objective, free))
