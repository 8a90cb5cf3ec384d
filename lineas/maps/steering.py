"""SteeringMaps: maps of several modules. What needs files or models is imported when it is called."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import as_finite, is_number
from .._lazy import lazy_method
from .._names import hint, in_execution_order, matching
from .affine import AffineMap
from .metadata import describe

if TYPE_CHECKING:
    from ..evaluation.calibrate import calibrate
    from ..evaluation.diagnose import diagnose
    from ..export.fold import fold
    from ..export.lora import to_peft_lora
    from ..hooks.attach import attach
    from .files import load, save
    from .hub import push_to_hub, save_pretrained
    from .vectors import from_vector


class SteeringMaps(Mapping[str, AffineMap]):
    """Maps of several modules: an immutable mapping from module name to `AffineMap`, in execution order.

    Two SteeringMaps are equal if they hold equal maps under the same names in the same order; metadata does not
    count.

    They are combined module by module, as single maps are (see `AffineMap`). A module that one side lacks counts as the
    identity there; the modules of both are put in one execution order, by those that both have and by the numbers in
    the names of the others.

    Parameters
    ----------
    maps : Mapping[str, AffineMap]
        At least one module, in execution order.
    metadata : dict, optional
        Anything JSON can hold: where the maps come from. Kept in saved files. It is passed on by `rename` and
        `select`; `inverse`, `scaled`, ``@`` and ``+`` put it into ``{"method": "inverse" | "scaled" | "composition" |
        "sum", "version": ..., "parts": [...]}``, parts in the order of application; "scaled" ones have "strength" too.

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
        self._check_known([name], KeyError)
        return self._maps[name]

    def _check_known(self, names: Iterable[Any], error: type[Exception] = ValueError) -> None:
        """An error that lists similar names if there is no map for one of these."""
        for name in names:
            if name not in self._maps:
                raise error(f"no map for module {name!r}{hint(str(name), list(self), 'this')}")

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

    __array_ufunc__ = None  # as in AffineMap

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
            kind = type(activations).__name__
            raise TypeError(f"activations must be a mapping from module name to array, got {kind}")
        self._check_known(activations)
        s = as_finite(strength, "strength")
        return each_module(
            activations, lambda name: self[name].transform(activations[name], s, axis), "activations[{!r}]"
        )

    def inverse(self) -> SteeringMaps:
        """Return the maps that undo these at strength 1.

        Raises
        ------
        ValueError
            If a map has no inverse; names the module and the neuron.
        """
        inverses = each_module(self, lambda name: self[name].inverse())
        return SteeringMaps(inverses, describe("inverse", parts=[self._metadata]))

    def scaled(self, strength: float) -> SteeringMaps:
        """Return the maps that at strength 1 do what these do at `strength`."""
        s = as_finite(strength, "strength")
        scaled = {name: one.scaled(s) for name, one in self._maps.items()}
        return SteeringMaps(scaled, describe("scaled", strength=s, parts=[self._metadata]))

    def __mul__(self, strength: float) -> SteeringMaps:
        return self.scaled(strength) if is_number(strength) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, number: float) -> SteeringMaps:
        return self.scaled(1 / as_finite(number, "the divisor")) if is_number(number) else NotImplemented

    def __neg__(self) -> SteeringMaps:
        return self.scaled(-1)

    def __matmul__(self, first: SteeringMaps) -> SteeringMaps:
        return _combined(first, self, lambda name: self[name] @ first[name], "composition")

    def __add__(self, other: SteeringMaps) -> SteeringMaps:
        return _combined(self, other, lambda name: self[name] + other[name], "sum")

    def __radd__(self, start: int) -> SteeringMaps:
        return self if is_number(start) and start == 0 else NotImplemented  # sum() starts with 0

    def __sub__(self, other: SteeringMaps) -> SteeringMaps:
        if not isinstance(other, SteeringMaps):
            return NotImplemented
        return _combined(self, -other, lambda name: self[name] - other[name], "sum")

    def rename(
        self, change: Callable[[str], str] | Mapping[str, str] | None = None, *, prefix: str | None = None
    ) -> SteeringMaps:
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
            self._check_known(change)
            new = [change.get(name, name) for name in self._maps]
        elif callable(change):
            new = [change(name) for name in self._maps]
        else:
            raise TypeError(f"change must be a callable or a mapping, got {type(change).__name__}")
        twice = [name for name in new if new.count(name) > 1]
        if twice:
            raise ValueError(f"two modules would get the name {twice[0]!r}")
        return SteeringMaps(dict(zip(new, self._maps.values(), strict=True)), self._metadata)

    def select(self, modules: str | list[str]) -> SteeringMaps:
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
            found = matching(glob, self._maps)
            if not found:
                raise ValueError(f"no module matches {glob!r}{hint(glob, list(self), 'this')}")
            chosen.update(found)
        # A strength that was calibrated is that of all modules together.
        metadata = {name: fact for name, fact in self._metadata.items() if name != "calibration"}
        return SteeringMaps({name: one for name, one in self._maps.items() if name in chosen}, metadata)

    def summary(self) -> str:
        """Return a text table: per module the neurons, the support and the size of the change of slope and shift."""
        rows = [("module", "neurons", "support", "||w-1||", "||b||")]
        for name, one in self._maps.items():
            slope, shift = (f"{np.linalg.norm(x.astype(np.float64)):.4g}" for x in (one.weight - 1, one.bias))
            rows.append((name, f"{one.d}", f"{one.support} ({one.support / one.d:.1%})", slope, shift))
        rows.append(("total", f"{self.d}", f"{self.support} ({self.support / self.d:.1%})", "", ""))
        first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = ["  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in rows]
        return "\n".join(line.rstrip() for line in lines)

    if TYPE_CHECKING:
        attach = attach
        calibrate = calibrate
        diagnose = diagnose
        save = save
        save_pretrained = save_pretrained
        push_to_hub = push_to_hub
        from_pretrained = staticmethod(load)
        from_vector = staticmethod(from_vector)
        fold = fold
        to_peft_lora = to_peft_lora
    else:
        attach = lazy_method("hooks.attach", "attach")
        calibrate = lazy_method("evaluation.calibrate", "calibrate")
        diagnose = lazy_method("evaluation.diagnose", "diagnose")
        save = lazy_method("maps.files", "save")
        save_pretrained = lazy_method("maps.hub", "save_pretrained")
        push_to_hub = lazy_method("maps.hub", "push_to_hub")
        from_pretrained = lazy_method("maps.files", "load", static=True)
        from_vector = lazy_method("maps.vectors", "from_vector", static=True)
        fold = lazy_method("export.fold", "fold")
        to_peft_lora = lazy_method("export.lora", "to_peft_lora")


def _combined(first: SteeringMaps, second: SteeringMaps, both: Callable[[str], AffineMap], method: str) -> SteeringMaps:
    """`both` of the modules that both have, and the maps of the others as they are."""
    if not (isinstance(first, SteeringMaps) and isinstance(second, SteeringMaps)):
        return NotImplemented
    shared, either = first.keys() & second.keys(), {**first, **second}
    order = in_execution_order(list(first), list(second))
    combined = each_module(order, lambda name: both(name) if name in shared else either[name])
    return SteeringMaps(combined, describe(method, parts=[first._metadata, second._metadata]))


def each_module(names: Iterable[str], make: Callable[[str], Any], label: str = "module {!r}") -> dict[str, Any]:
    """What `make` makes of each name; its errors say of which."""
    made = {}
    for name in names:
        try:
            made[name] = make(name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{label.format(name)}: {error}") from None
    return made
