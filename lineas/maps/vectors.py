"""Maps of steering vectors, which add the same to every activation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .._checks import as_engine, as_finite, as_flag, as_int, as_vector, widen
from .._names import hint, is_glob
from .affine import AffineMap, rounded
from .metadata import Layers, describe
from .steering import SteeringMaps

if TYPE_CHECKING:
    from torch import nn


def from_vector(
    vector: ArrayLike | Mapping[Any, ArrayLike],
    layers: Layers | int | Sequence[str | int | re.Pattern[str]] | None = None,
    *,
    model: nn.Module | None = None,
    scale: float = 1.0,
    normalize: bool = False,
) -> SteeringMaps:
    """Return maps that add a steering vector to the outputs of modules: slopes 1, shifts ``scale * vector``.

    Parameters
    ----------
    vector : array_like, torch.Tensor or Mapping
        [d], the same for all modules, or a mapping from module (as in `layers`) to the [d] of its own. float16,
        bfloat16, float32, float64 or integers.
    layers : str, int, re.Pattern or a sequence of them, optional
        The modules: names in execution order. With a model also globs, compiled regular expressions (which may match
        the same modules), and the numbers of its decoder blocks, from 0 or from the end (-1). Default: all that the
        mapping holds.
    model : torch.nn.Module, optional
        Where numbers and globs are looked up, and the widths of modules as far as they are known without a forward
        pass. It is not changed.
    scale : float, default 1.0
        What every vector is multiplied by.
    normalize : bool, default False
        Divide every vector by its Euclidean norm first, which makes `scale` the length of the step.

    Raises
    ------
    TypeError
        If an argument is of a wrong type, or `layers` is missing where `vector` is one array.
    ValueError
        If a vector is not [d] and finite, has no direction to normalize or is missing, or a module is not in the
        model, has another width, is given twice by name or number, or can only be looked up with a model.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> maps = lineas.SteeringMaps.from_vector([3.0, 4.0], ["layers.5", "layers.6"], scale=2.0, normalize=True)
    >>> maps["layers.6"].bias
    array([1.2, 1.6])
    """
    scale, normalize = as_finite(scale, "scale"), as_flag(normalize, "normalize")
    argument = "layers"
    if layers is None:
        if not isinstance(vector, Mapping):
            raise TypeError("layers must be given where vector is one array")
        layers, argument = list(vector), "vector"
    names, wanted = _names_of(layers, model, argument)
    maps: dict[str, AffineMap] = {}
    for key, x in vector.items() if isinstance(vector, Mapping) else [(wanted, vector)]:
        argument = f"vector[{key!r}]" if isinstance(vector, Mapping) else "vector"
        one = _adding(x, argument, scale, normalize)
        for name in _names_of(key, model, "vector")[0]:
            if name in maps:
                raise ValueError(f"vector: there are two for module {name!r}")
            maps[name] = one
    missing = [name for name in names if name not in maps]
    if missing:
        raise ValueError(f"vector: there is none for module {missing[0]!r}{hint(missing[0], list(maps), 'this')}")
    facts: dict[str, Any] = {"layers": wanted, "scale": scale, "normalize": normalize}
    if model is not None:
        from ..hooks.modules import block_width, get_module, model_name, output_width

        facts["model"] = model_name(model)
        for name in names:
            width = output_width(get_module(model, name)) or block_width(model, name)
            if width not in (None, maps[name].d):
                raise ValueError(f"vector: module {name!r} has {width} neurons, got {maps[name].d}")
    return SteeringMaps({name: maps[name] for name in names}, describe("vector", **facts))


def _names_of(layers: Any, model: nn.Module | None, argument: str) -> tuple[list[str], list[Any]]:
    """The modules that `layers` stands for, in execution order, and `layers` itself as a list."""
    several = isinstance(layers, Iterable) and not isinstance(layers, str)
    wanted: list[Any] = [
        one if isinstance(one, str | re.Pattern) else as_int(one, f"{argument}: a layer that is no name")
        for one in (layers if several else [layers])
    ]
    unknown = [one for one in wanted if not isinstance(one, str) or is_glob(one)]
    if model is None:
        if unknown or not wanted:
            why = f"{unknown[0]!r} can only be looked up with model=" if unknown else "there are none"
            raise ValueError(f"{argument}: {why}")
        _check_different(wanted, argument)
        return wanted, wanted
    from ..hooks.modules import block_names, resolve

    blocks = block_names(model) if any(isinstance(one, int) for one in wanted) else []
    for one in wanted:
        if isinstance(one, int) and not -len(blocks) <= one < len(blocks):
            raise ValueError(f"{argument}: there is no layer {one}, only 0 to {len(blocks) - 1}")
    named = [blocks[one] if isinstance(one, int) else one for one in wanted]
    exact = [one for one in named if isinstance(one, str) and not is_glob(one)]
    _check_different([name for one in exact for name in resolve(model, [one], argument=argument)], argument)
    return resolve(model, named, argument=argument), wanted


def _check_different(names: Sequence[str], argument: str) -> None:
    twice = [name for k, name in enumerate(names) if name in names[:k]]
    if twice:
        raise ValueError(f"{argument}: module {twice[0]!r} is given twice")


def _adding(vector: ArrayLike, argument: str, scale: float, normalize: bool) -> AffineMap:
    """The map that adds a vector."""
    vector = as_vector(widen(as_engine(vector, argument)), argument, "neuron")
    shift = vector.astype(np.float64)
    if normalize:
        length = np.linalg.norm(shift)
        if not length:
            raise ValueError(f"{argument}: zeros have no direction to normalize")
        shift /= length
    return rounded(np.ones(vector.size), scale * shift, vector.dtype)
