"""Maps that are on a model while others are fitted, and the neurons of theirs that the others leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..hooks.modules import find
from ..maps.affine import AffineMap
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


def digest_of_maps(maps: SteeringMaps) -> str:
    """A digest of the maps that a fit is on top of."""
    return digest({name: [one.weight, one.bias] for name, one in maps.items()})


def leave_alone(parameters: MapParameters, maps: Mapping[str, AffineMap]) -> None:
    """Let neither slopes nor shifts move of the neurons that `maps` change.

    ValueError if no other neuron may move.
    """
    free = [
        (maps[name].weight == 1) & (maps[name].bias == 0) if name in maps else np.ones(width, bool)
        for name, width in zip(parameters.names, parameters.sizes, strict=True)
    ]
    mask = torch.from_numpy(np.concatenate(free)).to(parameters.weight)
    if not mask.any():
        raise ValueError(
            f"disjoint leaves no neuron to fit: on_top_of maps all {len(mask)} of them; fit that with a larger l1 or "
            "group"
        )
    weight, bias = parameters.free_weight, parameters.free_bias
    parameters.free_weight = mask if weight is None else weight * mask
    parameters.free_bias = mask if bias is None else bias * mask
