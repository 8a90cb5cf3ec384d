"""Methods to compare maps with: random maps of the same size, and the baselines, fitted to the same prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from .._checks import as_choice
from ..arrays import baselines
from ..arrays.closed_form import fit
from ..fitting.incremental import fit_incremental
from ..hooks.collect import collect
from ..maps.affine import AffineMap
from ..maps.metadata import POOLINGS, Selection, describe, fitted_tokens
from ..maps.steering import SteeringMaps

_FITTED: dict[str, Callable[..., Any]] = {
    "mean": baselines.mean,
    "iti_c": baselines.iti_c,
    "aura": baselines.aura,
    "gaussian": lambda source, target: fit(source, target, method="gaussian"),
    "linear": lambda source, target: fit(source, target, method="linear"),
}
CONTROLS = ("random", *_FITTED, "incremental")


def random_maps(maps: SteeringMaps, seed: int = 0) -> SteeringMaps:
    """Maps that change as many neurons of every module by as much, but random ones: a control without a concept.

    In every module the pairs of w - 1 and b go to other neurons, in random order, each with a random sign: the
    support, and the norms of w - 1 and of b, stay what they are.

    Parameters
    ----------
    maps : SteeringMaps
    seed : int, default 0

    Returns
    -------
    SteeringMaps
        With the metadata of `maps` as their only part, and with their gates.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for name, one in maps.items():
        order, sign = rng.permutation(one.d), rng.choice([-1, 1], one.d).astype(one.weight.dtype)
        found[name] = AffineMap(1 + sign * (one.weight - 1)[order], sign * one.bias[order])
    return SteeringMaps(found, describe("random", seed=seed, parts=[maps.metadata]), maps.gates)


def name_controls(controls: Any, methods: Iterable[str], *, fitted: bool) -> dict[str, str]:
    """The methods that controls are made for, by the name of the control.

    "random" is made for each of the methods, all others for the first, whose modules they take. TypeError or ValueError
    for what is no control, names of methods, and where there is nothing that they could be `fitted` to.
    """
    if isinstance(controls, str):
        controls = [controls]
    if not isinstance(controls, Iterable):
        raise TypeError(f"controls must be a sequence of names, got {type(controls).__name__}")
    methods = list(methods)
    found: dict[str, str] = {}
    for control in controls:
        as_choice(control, "controls", CONTROLS)
        if control != "random" and not fitted:
            raise ValueError(f"controls: {control!r} is fitted to source= and target=, give both")
        if control == "random" and len(methods) > 1:
            found |= {f"random ({method})": method for method in methods}
        else:
            found[control] = methods[0]
    taken = next((name for name in found if name in methods), None)
    if taken is not None:
        raise ValueError(f"controls: {taken!r} is the name of one of the maps, too")
    return found


def make_controls(
    controls: Mapping[str, str],
    methods: Mapping[str, SteeringMaps],
    model: nn.Module,
    source: Any,
    target: Any,
    *,
    tokenizer: Any,
    tokens: Selection | None,
    max_length: int | None,
    seed: int,
    progress: bool,
) -> dict[str, SteeringMaps]:
    """The maps of controls that `name_controls` named; errors as of the fits."""
    first = next(iter(methods.values()))
    try:
        tokens = fitted_tokens(first.metadata)
    except ValueError:  # metadata hold no callable: then it was given
        if tokens is None:
            raise
    reading: dict[str, Any] = {
        "layers": list(first),
        "tokenizer": tokenizer,
        "max_length": max_length,
        "tokens": tokens,
        "progress": progress,
    }
    pooling = first.metadata.get("pooling")
    usual = pooling if pooling in POOLINGS else "mean"

    @functools.cache
    def collected(pooling: str) -> Any:
        return [collect(model, data, pooling=pooling, **reading) for data in (source, target)]

    found: dict[str, SteeringMaps] = {}
    for name, method in controls.items():
        if name.startswith("random"):
            found[name] = random_maps(methods[method], seed)
        elif name == "incremental":
            found[name] = fit_incremental(model, source, target, pooling=usual, **reading)
        else:  # AurA's detectors look for the largest activation of a prompt
            found[name] = _FITTED[name](*collected("max" if name == "aura" else usual))
    return found
