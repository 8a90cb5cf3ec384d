"""Maps that are on a model while others are fitted, and the neurons of theirs that the others leave alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..hooks.modules import find
from ..maps.gates import arrays_of, facts_of
from ..maps.metadata import Selection, spell_tokens
from ..maps.steering import SteeringMaps
from .checkpoint import digest
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


def digest_of_maps(below: Sequence[SteeringMaps]) -> str | None:
    """A digest of the maps that a fit is on top of; None where there are none."""
    if not below:
        return None
    return digest([[{name: [one.weight, one.bias] for name, one in maps.items()}, _gates_of(maps)] for maps in below])


def _gates_of(maps: SteeringMaps) -> dict[str, Any]:
    return {name: [arrays_of(gate), facts_of(gate)] for name, gate in maps.gates.items()}


def leave_alone(parameters: MapParameters, below: Sequence[SteeringMaps]) -> None:
    """Let neither slopes nor shifts move of the neurons that the maps `below` change.

    ValueError if no other neuron may move.
    """
    taken = np.zeros(int(parameters.offsets[-1]), bool)
    for name, start, stop in zip(parameters.names, parameters.offsets[:-1], parameters.offsets[1:], strict=True):
        for maps in below:
            if name in maps:
                taken[start:stop] |= (maps[name].weight != 1) | (maps[name].bias != 0)
    if taken.all():
        raise ValueError(
            f"disjoint leaves no neuron to fit: on_top_of maps all {len(taken)} of them; fit that with a larger l1 or "
            "group"
        )
    free = torch.from_numpy(~taken).to(parameters.weight)
    weight, bias = parameters.free_weight, parameters.free_bias
    parameters.free_weight = free if weight is None else weight * free
    parameters.free_bias = free if bias is None else bias * free
