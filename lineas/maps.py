"""AffineMap and SteeringMaps: the algebra of maps. Knows neither files nor models."""

import copy
import difflib
import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import as_engine, as_int, as_strength, as_vector, check_dense, is_tensor, result_dtype, working_dtype
from ._serving import Serving
from ._threads import get_num_threads

if TYPE_CHECKING:
    from os import PathLike

    from .models.attach import Handle


def _blocks(shape: tuple[int, ...], axis: int, width: int) -> tuple[int, int, int]:
    """`shape` as [outer, d, inner] with the channels of `axis` in the middle."""
    axis = as_int(axis, "axis")
    if not -len(shape) <= axis < len(shape) or shape[axis] != width:
        raise ValueError(f"z must have {width} channels on axis {axis}, got shape {shape}")
    axis %= len(shape)
    outer, inner = shape[:axis], shape[axis + 1 :]
    return int(np.prod(outer)), width, int(np.prod(inner))


class AffineMap:
    """One slope and one shift a neuron: T(z) = weight * z + bias (LinEAS, arXiv 2503.10679).

    Immutable: the arrays are read-only copies. ``second @ first`` is the map that applies `first`, then `second`.
    Two maps are equal if their slopes and shifts are, whatever their dtypes.

    Parameters
    ----------
    weight, bias : array_like or torch.Tensor
        Slopes and shifts, shape [d], float32 or float64, finite. Where one is float64 both become float64.

    Attributes
    ----------
    weight, bias : ndarray
        float32 or float64, shape [d], read-only.

    Raises
    ------
    TypeError
        If a dtype is neither float32 nor float64.
    ValueError
        If the shapes are not the same [d] or a value is not finite.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> half = lineas.AffineMap(np.array([0.5, 1.0]), np.array([0.0, 0.0]))
    >>> half.transform(np.array([[2.0, 3.0]]))
    array([[1., 3.]])
    >>> half.support
    1
    """

    __slots__ = ("bias", "weight")

    weight: NDArray
    bias: NDArray

    def __init__(self, weight: ArrayLike, bias: ArrayLike) -> None:
        weight, bias = as_vector(weight, "weight", "neuron"), as_vector(bias, "bias", "neuron")
        if weight.shape != bias.shape:
            raise ValueError(f"weight and bias must have the same shape, got {weight.shape} and {bias.shape}")
        dtype = np.promote_types(weight.dtype, bias.dtype)
        for name, array in (("weight", weight), ("bias", bias)):
            array = array.astype(dtype)  # always a copy
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"an AffineMap is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"an AffineMap is immutable: cannot delete {name!r}")

    def __reduce__(self) -> tuple:
        return AffineMap, (self.weight, self.bias)

    def __copy__(self) -> "AffineMap":
        return self

    def __deepcopy__(self, memo: dict) -> "AffineMap":
        return self

    @classmethod
    def identity(cls, d: int, dtype: Any = np.float32) -> "AffineMap":
        """Return the map of `d` neurons that changes nothing: weight 1, bias 0."""
        return cls(np.ones(d, dtype), np.zeros(d, dtype))

    @property
    def d(self) -> int:
        """The number of neurons."""
        return self.weight.size

    @property
    def dtype(self) -> np.dtype:
        """float32 or float64."""
        return self.weight.dtype

    @property
    def support(self) -> int:
        """The number of neurons that the map changes: weight != 1 or bias != 0."""
        return int(np.count_nonzero((self.weight != 1) | (self.bias != 0)))

    def __len__(self) -> int:
        return self.d

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AffineMap):
            return NotImplemented
        return np.array_equal(self.weight, other.weight) and np.array_equal(self.bias, other.bias)

    # Equality ignores the dtype; nobody needs maps as keys. mypy only sees that object has a hash.
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # NumPy leaves `map @ array` to us, so that it is a TypeError

    def __repr__(self) -> str:
        return f"AffineMap(d={self.d}, support={self.support}, dtype={self.dtype})"

    def transform(self, z: Any, strength: float = 1.0, axis: int = -1) -> Any:
        """Apply the map at a strength: z + strength (weight z + bias - z).

        Parameters
        ----------
        z : array_like or torch.Tensor
            Activations, float16, bfloat16 (ml_dtypes or torch), float32 or float64, of any shape with d channels
            on `axis`.
        strength : float, default 1.0
            0 is off, 1 the map; any other finite number scales the change.
        axis : int, default -1
            The channel axis: 1 for the output of convolutions, the last one otherwise.

        Returns
        -------
        ndarray or torch.Tensor
            A new array or tensor with the shape and dtype of `z` (a tensor also stays on its device and is
            differentiable in `z`). Computed in float32, for float64 `z` in float64, and rounded once.

        Raises
        ------
        TypeError
            If the dtype of `z` is another one, `strength` is not a real number, or `axis` is not an integer.
        ValueError
            If `axis` of `z` does not have d channels, or `strength` is not finite.
        """
        strength = as_strength(strength)
        if is_tensor(z):
            check_dense(z, "z")
            import torch

            from .models.autograd import affine

            _blocks(tuple(z.shape), axis, self.d)
            # torch.tensor copies: torch cannot hold read-only memory without a warning.
            return affine(z, torch.tensor(self.weight), torch.tensor(self.bias), strength, axis)
        array = as_engine(z, "z")
        blocks = _blocks(array.shape, axis, self.d)
        work = working_dtype(array)
        weight, bias = self.weight.astype(work, copy=False), self.bias.astype(work, copy=False)
        out = _core.affine_apply(array.reshape(blocks), weight, bias, strength, get_num_threads())
        return out.reshape(array.shape).view(result_dtype(z, array))

    def with_strength(self, strength: float) -> "AffineMap":
        """Return the map that at strength 1 does what this one does at `strength`."""
        s = as_strength(strength)
        # (1 - s) + s w, not 1 + s (w - 1): strength 1 then gives w to the last bit, however small it is.
        weight = np.where(self.weight == 1, 1, (1 - s) + s * self.weight.astype(np.float64))
        return AffineMap(weight.astype(self.dtype), (s * self.bias.astype(np.float64)).astype(self.dtype))

    def inverse(self) -> "AffineMap":
        """Return the map that undoes this one at strength 1: (z - bias) / weight.

        The inverse of a map at strength s is ``map.with_strength(s).inverse()``, not the inverse at strength s.

        Raises
        ------
        ValueError
            If the weight of a neuron is 0, or so small that the inverse is not finite.
        """
        zero = np.flatnonzero(self.weight == 0)
        if zero.size:
            raise ValueError(f"the map has no inverse: weight is 0 at {_counted(zero)}")
        weight64, bias64 = self.weight.astype(np.float64), self.bias.astype(np.float64)
        with np.errstate(over="ignore"):
            weight, bias = (1 / weight64).astype(self.dtype), (-bias64 / weight64).astype(self.dtype)
        lost = np.flatnonzero(~(np.isfinite(weight) & np.isfinite(bias)))
        if lost.size:
            raise ValueError(f"the inverse is too large for {self.dtype} at {_counted(lost)}")
        return AffineMap(weight, bias)

    def __matmul__(self, first: "AffineMap") -> "AffineMap":
        if not isinstance(first, AffineMap):
            return NotImplemented
        if self.d != first.d:
            raise ValueError(f"cannot compose maps of {self.d} and {first.d} neurons")
        weight = self.weight.astype(np.float64) * first.weight
        bias = self.weight.astype(np.float64) * first.bias + self.bias
        dtype = np.promote_types(self.dtype, first.dtype)
        return AffineMap(weight.astype(dtype), bias.astype(dtype))


def _counted(neurons: NDArray) -> str:
    """'neuron 7', or 'neuron 7 and 2 others'."""
    more = neurons.size - 1
    return f"neuron {neurons[0]}" + (f" and {more} other{'s' if more > 1 else ''}" if more else "")


def _near(name: str, names: list[str]) -> str:
    """The end of an error message about a missing name: what there is that looks like it."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return "there are " + ", ".join(repr(other) for other in close) + (" ..." if len(names) > len(close) else "")


class SteeringMaps(Serving, Mapping[str, AffineMap]):
    """Maps of several modules: an immutable mapping from module name to `AffineMap`, in execution order.

    ``second @ first`` composes module by module; where one side lacks a module it counts as the identity there.
    Two SteeringMaps are equal if they hold equal maps under the same names in the same order; metadata does not
    count.

    Parameters
    ----------
    maps : Mapping[str, AffineMap]
        At least one module, in execution order.
    metadata : dict, optional
        Anything JSON can hold: where the maps come from. Kept in saved files. It is passed on by `rename` and
        `select`; `inverse`, `scaled` and ``@`` put it into ``{"method": "inverse" | "scaled" | "composition",
        "parts": [...]}``, with ``"strength"`` beside it for "scaled", parts in the order of application.

    Raises
    ------
    TypeError
        If a name is not a string, a value is not an `AffineMap` or the metadata is not JSON.
    ValueError
        If there is no module or a name is empty.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> maps = lineas.SteeringMaps({"a": lineas.AffineMap(np.array([2.0]), np.array([1.0]))})
    >>> (maps.inverse() @ maps)["a"].support
    0
    """

    __slots__ = ("_maps", "_metadata")

    def __init__(self, maps: Mapping[str, AffineMap], metadata: dict[str, Any] | None = None) -> None:
        if not isinstance(maps, Mapping):
            raise TypeError(f"maps must be a mapping from module name to AffineMap, got {type(maps).__name__}")
        for name, value in maps.items():
            if not isinstance(name, str):
                raise TypeError(f"maps: a module name must be a string, got {name!r}")
            if not name:
                raise ValueError("maps: a module name must not be empty")
            if not isinstance(value, AffineMap):
                raise TypeError(f"maps[{name!r}] must be an AffineMap, got {type(value).__name__}")
        if not maps:
            raise ValueError("maps must hold at least one module")
        if metadata is not None and not isinstance(metadata, dict):
            raise TypeError(f"metadata must be a dict, got {type(metadata).__name__}")
        try:
            # Through JSON at once: what a file will give back is what there is from the start.
            self._metadata = json.loads(json.dumps(metadata or {}, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"metadata must be something JSON can hold: {error}") from None
        self._maps = dict(maps)

    @property
    def metadata(self) -> dict[str, Any]:
        """Where the maps come from (a copy)."""
        return copy.deepcopy(self._metadata)

    @property
    def support(self) -> int:
        """The number of neurons that the maps change, over all modules."""
        return sum(one.support for one in self._maps.values())

    @property
    def d(self) -> int:
        """The number of neurons over all modules."""
        return sum(one.d for one in self._maps.values())

    def __getitem__(self, name: str) -> AffineMap:
        try:
            return self._maps[name]
        except KeyError:
            raise KeyError(f"no map for module {name!r}: {_near(str(name), list(self._maps))}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __contains__(self, name: object) -> bool:
        return name in self._maps

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SteeringMaps):
            return NotImplemented
        return list(self._maps.items()) == list(other._maps.items())

    __hash__ = None  # type: ignore[assignment]  # as in AffineMap

    def __reduce__(self) -> tuple:
        return SteeringMaps, (self._maps, self._metadata)

    def __repr__(self) -> str:
        method = self._metadata.get("method")
        origin = "" if method is None else f", method={method!r}"
        return f"SteeringMaps(modules={len(self)}, d={self.d}, support={self.support}{origin})"

    def transform(self, activations: Mapping[str, Any], strength: float = 1.0, axis: int = -1) -> dict[str, Any]:
        """Apply each map to the activations of its module; see `AffineMap.transform`.

        Parameters
        ----------
        activations : Mapping[str, array_like or torch.Tensor]
            Activations by module name. Modules that are not in it are left out of the result.
        strength : float, default 1.0
            0 is off, 1 the maps.
        axis : int, default -1
            The channel axis of every array.

        Returns
        -------
        dict[str, ndarray or torch.Tensor]
            In the order of `activations`.

        Raises
        ------
        TypeError
            If `activations` is not a mapping, or as `AffineMap.transform`.
        ValueError
            If there is no map for a name, or as `AffineMap.transform`, with the module named.
        """
        if not isinstance(activations, Mapping):
            raise TypeError(
                f"activations must be a mapping from module name to array, got {type(activations).__name__}"
            )
        unknown = [name for name in activations if name not in self._maps]
        if unknown:
            raise ValueError(f"no map for module {unknown[0]!r}: {_near(str(unknown[0]), list(self._maps))}")
        strength = as_strength(strength)
        out = {}
        for name, z in activations.items():
            try:
                out[name] = self._maps[name].transform(z, strength, axis)
            except (TypeError, ValueError) as error:
                raise type(error)(f"activations[{name!r}]: {error}") from None
        return out

    def inverse(self) -> "SteeringMaps":
        """Return the maps that undo these at strength 1.

        Raises
        ------
        ValueError
            If a map has no inverse; names the module and the neuron.
        """
        inverses = {}
        for name, one in self._maps.items():
            try:
                inverses[name] = one.inverse()
            except ValueError as error:
                raise ValueError(f"module {name!r}: {error}") from None
        return SteeringMaps(inverses, {"method": "inverse", "parts": [self._metadata]})

    def scaled(self, strength: float) -> "SteeringMaps":
        """Return the maps that at strength 1 do what these do at `strength`."""
        s = as_strength(strength)
        scaled = {name: one.with_strength(s) for name, one in self._maps.items()}
        return SteeringMaps(scaled, {"method": "scaled", "strength": s, "parts": [self._metadata]})

    def __matmul__(self, first: "SteeringMaps") -> "SteeringMaps":
        if not isinstance(first, SteeringMaps):
            return NotImplemented
        composed = {}
        # The order of `first`, then what only the second has: both lists are in execution order already.
        for name in [*first._maps, *(name for name in self._maps if name not in first._maps)]:
            if name in first._maps and name in self._maps:
                try:
                    composed[name] = self._maps[name] @ first._maps[name]
                except ValueError as error:
                    raise ValueError(f"module {name!r}: {error}") from None
            else:
                composed[name] = first._maps[name] if name in first._maps else self._maps[name]
        return SteeringMaps(composed, {"method": "composition", "parts": [first._metadata, self._metadata]})

    def rename(
        self, change: Callable[[str], str] | Mapping[str, str] | None = None, *, prefix: str | None = None
    ) -> "SteeringMaps":
        """Return the same maps under other module names, as a wrapper of the model gives them.

        Parameters
        ----------
        change : callable or Mapping[str, str], optional
            From the old name to the new one. Names that a mapping does not hold stay.
        prefix : str, optional
            Put before every name instead: ``"base_model.model."`` for a PEFT model, ``"_orig_mod."`` for a
            compiled one. (``maps.rename(lambda name: name.removeprefix(...))`` takes it off.)

        Raises
        ------
        TypeError
            If not exactly one of the two is given, or it is of another type.
        ValueError
            If a mapping holds names that are not there, or two modules would get the same name.
        """
        if (change is None) == (prefix is None):
            raise TypeError("rename takes either change or prefix")
        if prefix is not None:
            if not isinstance(prefix, str):
                raise TypeError(f"prefix must be a string, got {type(prefix).__name__}")
            new = [prefix + name for name in self._maps]
        elif isinstance(change, Mapping):
            unknown = [name for name in change if name not in self._maps]
            if unknown:
                raise ValueError(f"no map for module {unknown[0]!r}: {_near(str(unknown[0]), list(self._maps))}")
            new = [change.get(name, name) for name in self._maps]
        elif callable(change):
            new = [change(name) for name in self._maps]
        else:
            raise TypeError(f"change must be a callable or a mapping, got {type(change).__name__}")
        renamed: dict[str, AffineMap] = {}
        for name, one in zip(new, self._maps.values(), strict=True):
            if name in renamed:
                raise ValueError(f"two modules would get the name {name!r}")
            renamed[name] = one
        return SteeringMaps(renamed, self._metadata)

    def select(self, modules: str | list[str]) -> "SteeringMaps":
        """Return the maps of the modules whose names match a glob, or any of a list of globs.

        Raises
        ------
        TypeError
            If `modules` is neither a string nor a list of strings.
        ValueError
            If a glob matches no module.
        """
        globs = [modules] if isinstance(modules, str) else modules
        if not isinstance(globs, list) or not globs or not all(isinstance(glob, str) for glob in globs):
            raise TypeError(f"modules must be a glob or a list of globs, got {modules!r}")
        chosen = set()
        for glob in globs:
            found = [name for name in self._maps if fnmatch.fnmatchcase(name, glob)]
            if not found:
                raise ValueError(f"no module matches {glob!r}: {_near(glob, list(self._maps))}")
            chosen.update(found)
        return SteeringMaps({name: one for name, one in self._maps.items() if name in chosen}, self._metadata)

    def summary(self) -> str:
        """Return a text table: per module the neurons, the support and the size of the change of slope and shift."""
        head = ("module", "neurons", "support", "||w-1||", "||b||")
        rows = []
        for name, one in self._maps.items():
            slope, shift = (float(np.linalg.norm(x.astype(np.float64))) for x in (one.weight - 1, one.bias))
            rows.append(
                (name, f"{one.d}", f"{one.support} ({one.support / one.d:.1%})", f"{slope:.4g}", f"{shift:.4g}")
            )
        rows.append(("total", f"{self.d}", f"{self.support} ({self.support / self.d:.1%})", "", ""))
        width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = []
        for row in [head, *rows]:
            cells = [row[0].ljust(width[0]), *(cell.rjust(size) for cell, size in zip(row[1:], width[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def save(self, path: "str | PathLike[str]") -> None:
        """Write the maps to a safetensors file; `lineas.load` reads it. See `lineas.storage.save`."""
        from .storage import save

        save(self, path)

    def attach(self, model: Any, strength: Any = 1.0, *, tokens: Any = None) -> "Handle":
        """Put the maps into a torch model at once, until ``remove()`` or the end of a with-block.

        Parameters
        ----------
        model : torch.nn.Module
            A loaded model with modules of these names. Only forward hooks are added.
        strength : float, array or callable, default 1.0
            0 is off, 1 the maps; an array has a number for each row [B], or each row and position [B, T]; a callable
            is asked at every forward pass. ``handle.strength`` changes it later, ``handle.at(strength=...)`` for one
            thread. See `lineas.models.attach.Handle`.
        tokens : "all", "last", "prompt", "generated", slice or callable, optional
            The tokens that the maps act on, with and without a key-value cache, on whatever side the padding is.
            "last" are those whose output a token is predicted from: the last of the prompt and the generated ones. A
            slice is over positions in the row, where negative numbers count from the end of the prompt: "last" is
            ``slice(-1, None)``. A callable gets a `lineas.models.tokens.Tokens` and returns booleans [B, T]. Default:
            the tokens that the maps were fitted for; "all" where the metadata do not say.

        Returns
        -------
        lineas.models.attach.Handle
            With ``strength`` (live), ``at()``, ``remove()``, and usable as a with-block.

        Raises
        ------
        TypeError
            If `strength` or `tokens` is of a wrong type.
        ValueError
            If the model lacks a module, a module has another width, or the tokens are not given and the maps were
            fitted for those that a callable selects; nothing is attached then.
        """
        from .models.attach import attach

        return attach(self, model, strength, tokens=tokens)
