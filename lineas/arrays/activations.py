"""Activations by module with what they were collected from, and what maps that are fitted to them take over of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..maps.metadata import spell


class Activations(dict[str, NDArray]):
    """Pooled activations by module name, in execution order, as `lineas.collect` returns them: a dict with metadata.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        [n, d] by module name: one row a prompt, one column a neuron.
    metadata : dict
        What they were collected from: "model", "layers", "pooling" and "tokens", as far as known. `lineas.fit`,
        `lineas.sparse_path` and the baselines hand it on to the maps, which so act on the tokens that they were fitted
        to, and refuse two samples that were not collected alike.

    Raises
    ------
    ValueError
        If "tokens" is none of the selections that `lineas.collect` takes, as given there or spelled out as in the
        metadata of maps.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> source = lineas.Activations({"layer": np.array([[0.0], [2.0]])}, {"tokens": "last"})
    >>> lineas.fit(source, {"layer": source["layer"] + 1}).metadata["tokens"]
    'last'
    """

    def __init__(self, arrays: Mapping[str, NDArray], metadata: Mapping[str, Any]) -> None:
        super().__init__(arrays)
        self.metadata = dict(metadata)
        spell(self.metadata)  # refuses tokens that are none

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name!r}: {list(np.shape(x))}" for name, x in self.items())
        return f"Activations({{{shapes}}}, {self.metadata})"


def origin(samples: Mapping[str, Any]) -> dict[str, Any]:
    """What maps take over from the metadata of the `Activations` among the samples, which are named as in messages.

    ValueError if they are of different models or tokens, or pooled differently.
    """
    found: dict[str, tuple[str, Any]] = {}  # each fact, and which sample tells it
    for name, sample in samples.items():
        metadata = spell(sample.metadata) if isinstance(sample, Activations) else {}
        for fact in ("model", "layers", "pooling", "tokens"):
            value = metadata.get(fact)
            if value is None:
                continue
            other, first = found.setdefault(fact, (name, value))
            if value != first and fact != "layers":  # these are told apart by the names of the modules
                raise ValueError(f"{other} and {name} must be collected alike, got {fact} {first!r} and {value!r}")
    return {fact: value for fact, (_, value) in found.items()}
