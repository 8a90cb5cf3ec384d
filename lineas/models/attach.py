"""Maps into a model: forward hooks with a live strength."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._arrays import as_strength
from ..maps import AffineMap
from . import sites
from .autograd import working_dtype


class _Strength:
    """The one number that all hooks of a handle read."""

    def __init__(self, value: float) -> None:
        self.value = value


class _Hook:
    """A map as a forward hook.

    An object, not a closure, so that a model with maps can be pickled and copied. A copy of the model carries copies
    of its hooks, as with any hook; a handle speaks of the model it was made for.
    """

    def __init__(self, name: str, affine: AffineMap, strength: _Strength) -> None:
        self.name, self.map, self.strength = name, affine, strength
        self._cached: tuple[Any, Tensor, Tensor] | None = None

    def set_map(self, affine: AffineMap) -> None:
        self.map, self._cached = affine, None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.strength.value == 0:
            return None
        tensor = sites.take(output, self.name)
        axis = sites.channel_axis(module, tensor, self.name)
        if tensor.shape[axis] != self.map.d:
            raise ValueError(
                f"{self.name}: the map is for {self.map.d} neurons, the output has {tensor.shape[axis]} "
                f"(shape {tuple(tensor.shape)})"
            )
        return sites.put(output, apply(tensor, *self._at_strength(tensor), axis))

    def _at_strength(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes and shifts of the map at the strength of now, where and in what `tensor` is computed."""
        key = (self.strength.value, tensor.device, working_dtype(tensor.dtype))
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, *parameters(self.map, *key))
        return self._cached[1:]


def parameters(affine: AffineMap, strength: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slopes and shifts [d] of `affine` at `strength`."""
    wide = AffineMap(affine.weight.astype(np.float64), affine.bias.astype(np.float64)).with_strength(strength)
    # Outside of inference mode: a tensor made inside it could not take part in a later forward that records gradients.
    with torch.inference_mode(False):
        weight, bias = (torch.tensor(array, dtype=dtype, device=device) for array in (wide.weight, wide.bias))
    return weight, bias


def apply(tensor: Tensor, weight: Tensor, bias: Tensor, axis: int) -> Tensor:
    """``weight * tensor + bias`` along `axis`, computed in the dtype of `weight` and rounded once to `tensor`'s.

    Plain torch operations: they run wherever the model does and every kind of autograd goes through them.
    """
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return torch.addcmul(bias.view(shape), tensor.to(weight.dtype), weight.view(shape)).to(tensor.dtype)


class Handle:
    """Maps that are on in a model; see `lineas.SteeringMaps.attach`.

    The maps act from the start. As a with-block they are taken off at its end, also after an error::

        with maps.attach(model, strength=0.8) as handle:
            model.generate(...)
            handle.strength = 0.3

    Attributes
    ----------
    maps : Mapping[str, AffineMap]
        The maps. Others of the same modules and widths may be set at any time, such as those of another point of a
        sparse path; like `strength` they hold from the next forward pass on. Anything else is a TypeError or a
        ValueError that names the module, and the maps stay as they were.
    strength : float
        0 leaves every output as it is, 1 applies the maps. Any finite number may be set at any time; it holds from
        the next forward pass on.
    attached : bool
        Whether the maps are still on.
    """

    def __init__(self, maps: Mapping[str, AffineMap], modules: Mapping[str, nn.Module], strength: float) -> None:
        self._maps = maps
        self._strength = _Strength(strength)
        self._hooks = [_Hook(name, maps[name], self._strength) for name in modules]
        self._removable: list[RemovableHandle] = []
        try:
            for module, hook in zip(modules.values(), self._hooks, strict=True):
                self._removable.append(module.register_forward_hook(hook))
        except BaseException:
            self.remove()
            raise

    @property
    def maps(self) -> Mapping[str, AffineMap]:
        return self._maps

    @maps.setter
    def maps(self, maps: Mapping[str, AffineMap]) -> None:
        if not isinstance(maps, Mapping):
            raise TypeError(f"maps must be a mapping from module name to AffineMap, got {type(maps).__name__}")
        missing = [name for name in self._maps if name not in maps]
        surplus = [name for name in maps if name not in self._maps]
        if missing or surplus:
            raise ValueError(
                f"maps must be of the modules that are attached: {len(missing)} missing {missing[:3]}, "
                f"{len(surplus)} not attached {surplus[:3]}"
            )
        for hook in self._hooks:
            new = maps[hook.name]
            if not isinstance(new, AffineMap):
                raise TypeError(f"maps[{hook.name!r}] must be an AffineMap, got {type(new).__name__}")
            if new.d != hook.map.d:
                raise ValueError(f"{hook.name}: the map must be for {hook.map.d} neurons as before, got {new.d}")
        for hook in self._hooks:
            hook.set_map(maps[hook.name])
        self._maps = maps

    @property
    def strength(self) -> float:
        return self._strength.value

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength.value = as_strength(value)

    @property
    def attached(self) -> bool:
        return bool(self._removable)

    def remove(self) -> None:
        """Take the maps off the model. Does nothing where they are off already."""
        while self._removable:
            self._removable.pop().remove()

    def __enter__(self) -> "Handle":
        if not self.attached:
            raise RuntimeError("these maps were removed from the model: attach them again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"strength={self.strength}" if self.attached else "removed"
        return f"Handle({len(self.maps)} modules, {state})"


def attach(maps: Mapping[str, AffineMap], model: nn.Module, strength: float = 1.0) -> Handle:
    """Put `maps` on `model` as forward hooks; see `lineas.SteeringMaps.attach`.

    No module is wrapped, replaced or written to, and every token is mapped. Maps attached later act on what the
    earlier ones give; they can be removed in any order.

    Parameters
    ----------
    maps : SteeringMaps
    model : torch.nn.Module
    strength : float, default 1.0
        See `Handle.strength`.

    Returns
    -------
    Handle

    Raises
    ------
    TypeError
        When `model` is no torch module or `strength` no number.
    ValueError
        When a module is missing (names that look alike are listed) or has another width, before anything is changed,
        or `strength` is not finite. A module that does not tell its width is checked when it runs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    strength = as_strength(strength)
    modules = {}
    for name, affine in maps.items():
        modules[name] = sites.get_module(model, name)
        width = sites.width(modules[name])
        if width is not None and width != affine.d:
            raise ValueError(f"{name}: the map is for {affine.d} neurons, the module has {width}")
    return Handle(maps, modules, strength)
