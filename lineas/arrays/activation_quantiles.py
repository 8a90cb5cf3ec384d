"""Streaming quantiles of several modules with what they were collected from: token by token, more than memory holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..maps.files import check_output, write
from .activations import Collected, origin
from .quantiles import LEAST_SIZE, MOST_SIZE, Quantiles, lanes_of


class ActivationQuantiles(Collected[Quantiles]):
    """`Quantiles` by module name, in execution order, as `lineas.collect_quantiles` returns them: a dict with metadata.

    `lineas.fit`, `lineas.sparse_path` and `lineas.wasserstein` (of single modules) take them wherever they take
    `Activations`, and hand the metadata on to the maps in the same way.

    Parameters
    ----------
    quantiles : Mapping[str, Quantiles]
        What was seen of each module.
    metadata : dict
        What they were collected from: "model", "layers", "pooling" and "tokens", as far as known.

    ``a.copy()`` copies the quantiles as well; ``a | b`` joins modules that were collected alike.

    Raises
    ------
    TypeError
        If a value is not a `Quantiles`.
    ValueError
        If "tokens" is none of the selections that `lineas.collect` takes; or, of ``|``, if the two are of different
        models or tokens, or pooled differently.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> seen = lineas.quantiles(np.arange(10.0)[:, None])
    >>> source = lineas.ActivationQuantiles({"layer": seen}, {"tokens": "last"})
    >>> lineas.fit(source, {"layer": np.arange(10.0)[:, None] + 1}).metadata["tokens"]
    'last'
    """

    FORMAT: ClassVar[str] = "lineas activation quantiles"

    def __init__(self, quantiles: Mapping[str, Quantiles], metadata: Mapping[str, Any]) -> None:
        super().__init__(quantiles, metadata)
        for name, one in self.items():
            if not isinstance(one, Quantiles):
                raise TypeError(f"quantiles[{name!r}] must be a Quantiles, got {type(one).__name__}")

    @property
    def exact(self) -> bool:
        """Whether every value seen is still there, of all modules: then maps are those of the arrays."""
        return all(one.exact for one in self.values())

    @property
    def rank_error(self) -> float:
        """The largest `Quantiles.rank_error` of the modules."""
        return max((one.rank_error for one in self.values()), default=0.0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use."""
        return sum(one.nbytes for one in self.values())

    def copy(self) -> ActivationQuantiles:
        """Return another one that has seen the same, with metadata of its own."""
        return ActivationQuantiles({name: one.copy() for name, one in self.items()}, self.metadata)

    def merge(self, other: ActivationQuantiles) -> ActivationQuantiles:
        """Take in what another one has seen, collected alike from other prompts, and return self; `other` stays.

        Raises
        ------
        TypeError
            If `other` is no `ActivationQuantiles`.
        ValueError
            If the two are of different models or tokens, pooled differently, have other modules, or quantiles of
            another size. Nothing is taken in then.
        """
        if not isinstance(other, ActivationQuantiles):
            raise TypeError(f"other must be ActivationQuantiles, got {type(other).__name__}")
        origin({"these quantiles": self, "other": other})
        if list(other) != list(self):
            raise ValueError(f"other must have the modules {', '.join(map(repr, self))}, got {', '.join(other)}")
        for name, one in self.items():
            theirs = other[name]
            if theirs.size != one.size or (one.count and theirs.count and theirs.d != one.d):
                raise ValueError(f"other[{name!r}] must have the size and the neurons of {one}, got {theirs}")
        for name, one in self.items():
            one.merge(other[name])
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a safetensors file, which `lineas.load` reads, as a whole or not at all.

        The file takes at most as many bytes as `nbytes`, and writing it about three times as many of memory beside.

        Raises
        ------
        TypeError
            If the metadata hold what JSON cannot.
        ValueError
            If no rows were seen, a module name cannot be written as UTF-8, or the folder does not exist.
        OSError
            If the file cannot be written.
        """
        tensors: dict[str, NDArray] = {}
        states = [one._put(f"{name}.", tensors) for name, one in self.items()]
        check_output(os.fspath(path), "path")
        write(path, self.FORMAT, tensors, {"modules": list(self), "states": states, "metadata": self.metadata})

    @classmethod
    def from_file(cls, tensors: dict[str, NDArray], entries: dict[str, Any]) -> ActivationQuantiles:
        """What `save` took apart, out of `tensors`; ValueError or TypeError where it does not hold together."""
        modules, states = entries["modules"], entries["states"]
        if not all(isinstance(name, str) for name in modules) or len(set(modules)) != len(modules):
            raise ValueError("the modules in the header must be different names")
        if len(states) != len(modules):
            raise ValueError(f"the header must have a state for each of {len(modules)} modules, got {len(states)}")
        found = {name: Quantiles._take(s, f"{name}.", tensors) for name, s in zip(modules, states, strict=True)}
        return cls(found, entries["metadata"])

    def __repr__(self) -> str:
        return f"ActivationQuantiles({dict.__repr__(self)}, {self.metadata})"


def size_within(memory: int, widths: Iterable[int]) -> int:
    """The most values of each neuron that `memory` bytes hold, of float32 summaries of so many neurons each.

    ValueError if a `Quantiles` needs more.
    """
    widths, lanes = list(widths), lanes_of(np.dtype(np.float32))
    row = 4 * sum(-(-width // lanes) * lanes for width in widths)
    if memory < row * LEAST_SIZE:
        raise ValueError(
            f"memory must be at least {row * LEAST_SIZE} bytes, for {LEAST_SIZE} values of each of {sum(widths)} "
            f"neurons, got {memory}"
        )
    return min(memory // row, MOST_SIZE)
