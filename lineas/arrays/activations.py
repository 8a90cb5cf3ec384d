"""Activations by module with what they were collected from, and what maps that are fitted to them take over of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..maps.metadata import spell, spell_layers

T = TypeVar("T")


class Collected(dict[str, T]):
    """What was collected of every module, by its name in execution order, with what is known of where it comes from."""

    def __init__(self, of_modules: Mapping[str, T], metadata: Mapping[str, Any]) -> None:
        super().__init__(of_modules)
        self.metadata = dict(metadata)
        spell(self.metadata)  # refuses tokens that are none

    def __or__(self, other: Any) -> Any:
        return _joined(self, other) if isinstance(other, dict) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        return _joined(other, self) if isinstance(other, dict) else NotImplemented

    def __ior__(self, other: Any) -> Any:  # type: ignore[override,misc]
        joined = _joined(self, other if isinstance(other, Collected) else dict(other))
        self.metadata = joined.metadata
        self.update(other)
        return self


class Activations(Collected[NDArray]):
    """Pooled activations by module name, in execution order, as `lineas.collect` returns them: a dict with metadata.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        [n, d] by module name: one row a prompt, one column a neuron. Those of `lineas.open_activations` are of
        `lineas.FileArray`, and are read when they are needed.
    metadata : dict
        What they were collected from: "model", "layers", "pooling" and "tokens", as far as known. `lineas.fit`,
        `lineas.sparse_path` and the baselines hand it on to the maps, which so act on the tokens that they were fitted
        to, and refuse two samples that were not collected alike.

    ``a.rows(slice(0, 30))`` takes rows of every array, such as those to fit and those to hold out. That, ``a.copy()``
    and ``a | b`` are `Activations` again with the metadata; ``a | b`` joins modules that were collected alike.

    Raises
    ------
    ValueError
        If "tokens" is none of the selections that `lineas.collect` takes, as given there or spelled out as in the
        metadata of maps; or, of ``|``, if the two are of different models or tokens, or pooled differently.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> source = lineas.Activations({"layer": np.array([[0.0], [2.0]])}, {"tokens": "last"})
    >>> lineas.fit(source, {"layer": source["layer"] + 1}).metadata["tokens"]
    'last'
    """

    def __init__(self, arrays: Mapping[str, NDArray], metadata: Mapping[str, Any]) -> None:
        super().__init__(arrays, metadata)

    def copy(self) -> Activations:
        """Return another dict of the same arrays, with metadata of its own."""
        return Activations(self, self.metadata)

    def rows(self, index: slice | ArrayLike) -> Activations:
        """Return the same rows of every array, with the metadata.

        Parameters
        ----------
        index : slice or array_like
            A slice of rows, or as NumPy takes them: row numbers, negative ones from the end, or a boolean for each row.

        Returns
        -------
        Activations
            Views of the arrays where `index` is a slice, else copies.

        Raises
        ------
        TypeError
            If `index` is something else.
        IndexError
            If an array has no such row.

        Examples
        --------
        >>> import numpy as np, lineas
        >>> both = lineas.Activations({"layer": np.arange(10.0)[:, None]}, {"tokens": "last"})
        >>> both.rows(slice(0, 8))
        Activations({'layer': [8, 1]}, {'tokens': 'last'})
        """
        if not isinstance(index, slice):
            index = np.atleast_1d(np.asarray(index))
            if index.ndim != 1 or index.dtype.kind not in "iub":
                raise TypeError(f"index must be a slice, row numbers or booleans, got {index.dtype} {index.shape}")
        return Activations({name: x[index] for name, x in self.items()}, self.metadata)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name!r}: {list(np.shape(x))}" for name, x in self.items())
        return f"Activations({{{shapes}}}, {self.metadata})"


def origin(samples: Mapping[str, Any]) -> dict[str, Any]:
    """What maps take over from the metadata of what was collected of the samples, which are named as in messages.

    ValueError if they are of different models or tokens, or pooled differently.
    """
    found: dict[str, tuple[str, Any]] = {}  # each fact, and which sample tells it
    for name, sample in samples.items():
        metadata = spell(sample.metadata) if isinstance(sample, Collected) else {}
        for fact in ("model", "layers", "pooling", "tokens"):
            value = metadata.get(fact)
            if value is None:
                continue
            other, first = found.setdefault(fact, (name, value))
            if value != first and fact != "layers":  # these are told apart by the names of the modules
                raise ValueError(f"{other} and {name} must be collected alike, got {fact} {first!r} and {value!r}")
    return {fact: value for fact, (_, value) in found.items()}


def _joined(first: dict[str, Any], second: dict[str, Any]) -> Any:
    """``first | second``, at least one of which has metadata; what both know must be the same, but for the layers."""
    origin({"the left side": first, "the right side": second})
    collected = [one for one in (first, second) if isinstance(one, Collected)]
    known = [one.metadata for one in collected]
    metadata = known[0] | {fact: value for fact, value in known[-1].items() if value is not None}
    layers = [spell_layers(one["layers"]) for one in known if one.get("layers") is not None]
    if len(layers) == 2 and layers[0] != layers[1]:
        metadata["layers"] = [glob for one in layers for glob in (one if isinstance(one, list) else [one])]
    return type(collected[0])({**first, **second}, metadata)
