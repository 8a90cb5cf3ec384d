"""Methods to compare maps with: random maps of the same size, and the baselines, fitted to the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..arrays import baselines
from ..arrays.closed_form import fit
from ..fitting.incremental import fit_incremental
from ..hooks.collect import collect
from ..maps.affine import AffineMap
from ..maps.metadata import POOLINGS, describe, fitted_tokens
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
        With the metadata of `maps` as their only part.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for name, one in maps.items():
        order, sign = rng.permutation(one.d), rng.choice([-1, 1], one.d)

        def moved(values: NDArray, order: NDArray = order, sign: NDArray = sign) -> NDArray:
            return values[order] * sign.astype(values.dtype)

        found[name] = AffineMap(1 + moved(one.weight - 1), moved(one.bias))
    facts = {"tokens": maps.metadata["tokens"]} if "tokens" in maps.metadata else {}
    return SteeringMaps(found, describe("random", seed=seed, parts=[maps.metadata], **facts))


def make_controls(
    names: Sequence[str],
    methods: Mapping[str, SteeringMaps],
    model: nn.Module,
    source: Any,
    target: Any,
    *,
    tokenizer: Any,
    max_length: int | None,
    seed: int,
    progress: bool,
) -> dict[str, SteeringMaps]:
    """The controls `names` by the name of the method; errors as of the fits, and where prompts or names are missing."""
    names = [names] if isinstance(names, str) else list(names)
    found: dict[str, SteeringMaps] = {}
    first = next(iter(methods.values()))
    fitted = [name for name in names if name != "random"]
    if fitted and (source is None or target is None):
        raise ValueError(f"controls: {fitted[0]!r} is fitted to source= and target=, give both")
    pooling = first.metadata.get("pooling")
    reading: dict[str, Any] = {
        "layers": list(first),
        "tokenizer": tokenizer,
        "max_length": max_length,
        "tokens": fitted_tokens(first.metadata),
        "progress": progress,
    }
    samples: dict[str, Any] = {}

    def collected(pooling: str) -> Any:
        if pooling not in samples:
            samples[pooling] = [collect(model, data, pooling=pooling, **reading) for data in (source, target)]
        return samples[pooling]

    usual = pooling if pooling in POOLINGS else "mean"
    for name in names:
        if name == "random":
            several = len(methods) > 1
            found |= {f"random ({m})" if several else name: random_maps(one, seed) for m, one in methods.items()}
        elif name == "incremental":
            found[name] = fit_incremental(model, source, target, pooling=usual, **reading)
        else:  # AurA's detectors look for the largest activation of a prompt
            found[name] = _FITTED[name](*collected("max" if name == "aura" else usual))
    taken = next((name for name in found if name in methods), None)
    if taken is not None:
        raise ValueError(f"controls: {taken!r} is the name of one of the maps, too")
    return found
