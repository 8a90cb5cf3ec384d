"""SteeringMaps: maps of several modules. What needs files or models is imported when it is called."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import as_engine, as_finite, is_number, is_tensor, result_dtype, widen
from .._lazy import lazy_import, lazy_method
from .._names import hint, in_execution_order, matching
from .affine import AffineMap, at_strength
from .gates import AnyGate, Gate, NeuronGate, described, refuse_gates, with_channels
from .metadata import describe

if TYPE_CHECKING:
    from ..evaluation.calibrate import calibrate
    from ..evaluation.diagnose import diagnose
    from ..export.diffusers_lora import to_diffusers_lora
    from ..export.fold import fold
    from ..export.gguf.folding import fold as fold_gguf
    from ..export.lora import to_peft_lora
    from ..hooks.attach import attach
    from .files import load, save
    from .hub import push_to_hub, save_pretrained
    from .vectors import from_vector


class SteeringMaps(Mapping[str, AffineMap]):
    """Maps of several modules: an immutable mapping from module name to `AffineMap`, in execution order.

    Two SteeringMaps are equal if they hold equal maps and gates under the same names in the same order; metadata does
    not count.

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
    gates : Mapping[str, Gate or NeuronGate] or Gate, optional
        Gates of modules, as `gated` takes them.

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

    __slots__ = ("_gates", "_maps", "_metadata")

    def __init__(
        self,
        maps: Mapping[str, AffineMap],
        metadata: dict[str, Any] | None = None,
        gates: Mapping[str, AnyGate] | Gate | None = None,
    ) -> None:
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
        self._gates: Mapping[str, AnyGate] = MappingProxyType(self._checked(gates))

    def _checked(self, gates: Any) -> dict[str, AnyGate]:
        """Gates by module, in the order of the maps; TypeError or ValueError where they are none or do not fit."""
        if gates is None:
            return {}
        if isinstance(gates, Gate | NeuronGate):
            if gates.site is None:
                raise ValueError(
                    "one gate for all modules must name the module that it reads, gate.at(site), as that of "
                    "lineas.fit_gates(..., site=...) does; else give a mapping from module name to gate"
                )
            gates = dict.fromkeys(self._maps, gates)
        if not isinstance(gates, Mapping):
            raise TypeError(f"gates must be a mapping from module name to gate, or a Gate, got {type(gates).__name__}")
        self._check_known(gates)
        for name, gate in gates.items():
            if not isinstance(gate, Gate | NeuronGate):
                raise TypeError(f"gates[{name!r}] must be a Gate or a NeuronGate, got {type(gate).__name__}")
            d = self._maps[name if gate.site is None else gate.site].d if (gate.site or name) in self._maps else gate.d
            if gate.d != d:
                raise ValueError(f"gates[{name!r}] is for {gate.d} neurons, module {gate.site or name!r} has {d}")
        return {name: gates[name] for name in self._maps if name in gates}

    @property
    def gates(self) -> Mapping[str, AnyGate]:
        """The gates by module, read-only; modules without one are not in it."""
        return self._gates

    def gated(self, gates: Mapping[str, AnyGate] | Gate | None) -> SteeringMaps:
        """Return the same maps with these gates in place of their own: z + s g(z) (T(z) - z) at strength s.

        What has gates is not affine any more: it can be attached, saved, scaled and evaluated, but not inverted,
        composed, added or folded into weights. A strength that was calibrated is forgotten: it was that of other gates.

        Parameters
        ----------
        gates : Mapping[str, Gate or NeuronGate], Gate or None
            A gate for each module, as `lineas.fit_gates` finds them; modules that it lacks act without. Or one gate for
            all of them, which names the module that it reads (``site``). None takes the gates off.

        Raises
        ------
        TypeError
            If it is something else.
        ValueError
            If there is no map for a module, a gate is for another number of neurons than its module has, or one gate
            for all does not name a module.

        Examples
        --------
        >>> import numpy as np, lineas
        >>> maps = lineas.SteeringMaps({"a": lineas.AffineMap(np.array([1.0]), np.array([2.0]))})
        >>> gated = maps.gated({"a": lineas.Gate(np.array([1.0]), 0.0)})
        >>> gated.transform({"a": np.array([[0.0], [-800.0]])})["a"]
        array([[   1.],
               [-800.]])
        """
        metadata = {name: fact for name, fact in self._metadata.items() if name != "calibration"}  # of other gates
        return SteeringMaps(self._maps, metadata, gates)

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
        return list(self._maps.items()) == list(other._maps.items()) and self._gates == other._gates

    __array_ufunc__ = None  # as in AffineMap

    def __reduce__(self) -> tuple:
        return SteeringMaps, (self._maps, self._metadata, dict(self._gates))

    def __repr__(self) -> str:
        method = self._metadata.get("method")
        origin = "" if method is None else f", method={method!r}"
        gates = f", gates={len(self._gates)}" if self._gates else ""
        return f"SteeringMaps(modules={len(self)}, d={self.d}, support={self.support}{gates}{origin})"

    def transform(self, activations: Mapping[str, Any], strength: float = 1.0, axis: int = -1) -> dict[str, Any]:
        """Apply each map to the activations of its module; see `AffineMap.transform`. Gates act as they do in a model.

        Parameters
        ----------
        activations : Mapping[str, array_like or torch.Tensor]
            Activations by module name. Modules that are not in it are left out of the result. A gate of context "mean"
            needs those of its module as [texts, tokens, d], each token a real one; one that reads another module needs
            that module's, before its map, in the same shape but for the channels.
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
            If there is no map for a name, activations lack the module that a gate reads, or have no axis of tokens
            where it needs one, or as `AffineMap.transform`, with the module named.
        """
        if not isinstance(activations, Mapping):
            kind = type(activations).__name__
            raise TypeError(f"activations must be a mapping from module name to array, got {kind}")
        read = {gate.site for gate in self._gates.values()}  # these may be no modules with maps
        self._check_known(name for name in activations if name not in read)
        s = as_finite(strength, "strength")

        def one(name: str) -> Any:
            z, gate = activations[name], self._gates.get(name)
            if gate is None:
                return self[name].transform(z, s, axis)
            if gate.site is not None and gate.site not in activations:
                raise ValueError(f"its gate reads the module {gate.site!r}, of which there are no activations")
            return _transformed(self[name], gate, z, activations[gate.site or name], s, axis)

        return each_module([name for name in activations if name in self], one, "activations[{!r}]")

    def inverse(self) -> SteeringMaps:
        """Return the maps that undo these at strength 1.

        Raises
        ------
        ValueError
            If a map has no inverse; names the module and the neuron. If there are gates.
        """
        refuse_gates(self, "inverse")
        inverses = each_module(self, lambda name: self[name].inverse())
        return SteeringMaps(inverses, describe("inverse", parts=[self._metadata]))

    def scaled(self, strength: float) -> SteeringMaps:
        """Return the maps that at strength 1 do what these do at `strength`; gates stay as they are."""
        s = as_finite(strength, "strength")
        scaled = {name: one.scaled(s) for name, one in self._maps.items()}
        return SteeringMaps(scaled, describe("scaled", strength=s, parts=[self._metadata]), self._gates)

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
        for one in (self, other):
            refuse_gates(one, "subtraction")
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
            compiled one. Modules that gates read are renamed as well.
            (``maps.rename(lambda name: name.removeprefix(...))`` takes it off.)

        Raises
        ------
        TypeError
            If not exactly one of the two is given, or it is of another type.
        ValueError
            If a mapping holds names that are not there, or two modules would get the same name.
        """
        if (change is None) == (prefix is None):
            raise TypeError("rename takes either change or prefix")
        sites = [gate.site for gate in self._gates.values() if gate.site is not None]
        old = list(dict.fromkeys([*self._maps, *sites]))
        if prefix is not None:
            if not isinstance(prefix, str):
                raise TypeError(f"prefix must be a string, got {type(prefix).__name__}")
            new = [prefix + name for name in old]
        elif isinstance(change, Mapping):
            self._check_known(name for name in change if name not in sites)
            new = [change.get(name, name) for name in old]
        elif callable(change):
            new = [change(name) for name in old]
        else:
            raise TypeError(f"change must be a callable or a mapping, got {type(change).__name__}")
        twice = [name for name in new if new.count(name) > 1]
        if twice:
            raise ValueError(f"two modules would get the name {twice[0]!r}")
        to = dict(zip(old, new, strict=True))
        moved = {id(gate): gate if gate.site is None else gate.at(to[gate.site]) for gate in self._gates.values()}
        return SteeringMaps(
            {to[name]: one for name, one in self._maps.items()},
            self._metadata,
            {to[name]: moved[id(gate)] for name, gate in self._gates.items()},
        )

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
        gates = {name: gate for name, gate in self._gates.items() if name in chosen}
        return SteeringMaps({name: one for name, one in self._maps.items() if name in chosen}, metadata, gates)

    def summary(self) -> str:
        """Return a text table: per module the neurons, the support and the size of the change of slope and shift.

        Where there are gates, a last column describes them.
        """
        rows: list[tuple[str, ...]] = [("module", "neurons", "support", "||w-1||", "||b||")]
        for name, one in self._maps.items():
            slope, shift = (f"{np.linalg.norm(x.astype(np.float64)):.4g}" for x in (one.weight - 1, one.bias))
            rows.append((name, f"{one.d}", f"{one.support} ({one.support / one.d:.1%})", slope, shift))
        rows.append(("total", f"{self.d}", f"{self.support} ({self.support / self.d:.1%})", "", ""))
        if self._gates:
            cells = ["gate", *(described(self._gates.get(name)) for name in self), ""]
            rows = [(*row, cell) for row, cell in zip(rows, cells, strict=True)]
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
        fold_gguf = fold_gguf
        to_peft_lora = to_peft_lora
        to_diffusers_lora = to_diffusers_lora
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
        fold_gguf = lazy_method("export.gguf.folding", "fold")
        to_peft_lora = lazy_method("export.lora", "to_peft_lora")
        to_diffusers_lora = lazy_method("export.diffusers_lora", "to_diffusers_lora")


def _combined(first: SteeringMaps, second: SteeringMaps, both: Callable[[str], AffineMap], method: str) -> SteeringMaps:
    """`both` of the modules that both have, and the maps of the others as they are."""
    if not (isinstance(first, SteeringMaps) and isinstance(second, SteeringMaps)):
        return NotImplemented
    for one in (first, second):
        refuse_gates(one, method)
    shared, either = first.keys() & second.keys(), {**first, **second}
    order = in_execution_order(list(first), list(second))
    combined = each_module(order, lambda name: both(name) if name in shared else either[name])
    return SteeringMaps(combined, describe(method, parts=[first._metadata, second._metadata]))


def _transformed(affine: AffineMap, gate: AnyGate, z: Any, seen: Any, strength: float, axis: int) -> Any:
    """A map at a strength times the values that a gate has for `seen`, on arrays or a tensor."""
    if is_tensor(z):
        return lazy_import("hooks.gating", "transform")(affine, gate, z, seen, strength, axis)
    array = as_engine(z, "z")
    wide, axis = with_channels(widen(array), axis, affine.d)
    g = gate.values(wide if seen is z else widen(as_engine(seen, "z")), axis).astype(wide.dtype, copy=False)
    try:
        np.broadcast_shapes(g.shape, wide.shape)
        fits = g.ndim == wide.ndim
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"its gate has the shape {g.shape}, the activations {wide.shape}")
    shape = [1] * wide.ndim
    shape[axis] = -1
    weight, bias = (part.astype(wide.dtype).reshape(shape) for part in (affine.weight, affine.bias))
    weight, bias = at_strength(weight, bias, strength * g)
    return (weight * wide + bias).astype(result_dtype(z, array))


def each_module(names: Iterable[str], make: Callable[[str], Any], label: str = "module {!r}") -> dict[str, Any]:
    """What `make` makes of each name; its errors say of which."""
    made = {}
    for name in names:
        try:
            made[name] = make(name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{label.format(name)}: {error}") from None
    return made
