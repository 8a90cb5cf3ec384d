"""Records: dataclasses of arrays, maps and numbers that are compared field by field, and taken apart for files."""

from __future__ import annotations

import dataclasses
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from .._lazy import lazy_method
from .affine import AffineMap
from .gates import AnyGate, arrays_of, facts_of, made_of
from .steering import SteeringMaps, each_module

if TYPE_CHECKING:
    from .files import save


class Record:
    """Base of dataclasses that hold what a fit found.

    A subclass is ``@dataclass(frozen=True, eq=False)`` and names its format, one of `lineas.maps.files.FORMATS`. Its
    fields may be arrays, `SteeringMaps`, other records, numbers and text, lists, tuples and dicts of these, and what is
    annotated as Any and JSON can hold; all but the arrays' dtypes is checked when a file is read. Two records are equal
    if their fields are, but for those that are made with ``compare=False``.
    """

    FORMAT: ClassVar[str]

    if TYPE_CHECKING:
        save = save
    else:
        save = lazy_method("maps.files", "save")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in _fields(type(self)) if f.compare)


def _fields(cls: Any) -> list[dataclasses.Field]:
    """The fields that are given when an object is made."""
    return [field for field in dataclasses.fields(cls) if field.init]


def _equal(a: Any, b: Any) -> bool:
    """Whether two values of a field are equal; NaN equals itself."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and np.array_equal(a, b, equal_nan=True)
    return bool(a == b or (a != a and b != b))


def to_tensors(value: SteeringMaps | Record) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """The arrays of maps or a record by name, and the rest of it as something JSON can hold."""
    tensors: dict[str, NDArray] = {}
    if isinstance(value, SteeringMaps):
        return tensors, _put(value, SteeringMaps, "", tensors)
    return tensors, {"fields": _put_fields(value, "", tensors)}


def from_tensors(cls: type, tensors: dict[str, NDArray], entries: dict[str, Any]) -> Any:
    """The maps or the record that `to_tensors` took apart, or what another class makes by its ``from_file``.

    TypeError, ValueError, OverflowError or RecursionError if something is missing, unknown, of another type, or does
    not hold together.
    """
    if cls is SteeringMaps:
        found = _take(entries, SteeringMaps, "", tensors)
    elif issubclass(cls, Record):
        found = _take_fields(cls, entries["fields"], "", tensors)
    else:  # quantiles, which stand further down
        found = cls.from_file(tensors, entries)  # type: ignore[attr-defined]
    if tensors:
        raise ValueError(f"it has the unexpected tensor {min(tensors)!r}")
    return found


def _put_fields(value: Record, name: str, tensors: dict[str, NDArray]) -> dict[str, Any]:
    """The fields of a record as `_put` has them, its arrays under names that begin with `name`."""
    hints, names = get_type_hints(type(value)), [field.name for field in _fields(type(value))]
    return {field: _put(getattr(value, field), hints[field], _at(name, field), tensors) for field in names}


def _take_fields(cls: Any, entries: dict[str, Any], name: str, tensors: dict[str, NDArray]) -> Any:
    """The record that `_put_fields` took apart."""
    hints, names = get_type_hints(cls), [field.name for field in _fields(cls)]
    for field in entries:
        if field not in names:
            raise ValueError(f"the header has the unknown field {_at(name, field)!r}")
    return cls(**{field: _take(one, hints[field], _at(name, field), tensors) for field, one in entries.items()})


def _kind(hint: Any) -> tuple[Any, Any]:
    """The type that a hint names, apart from None, and that of its entries."""
    options = get_args(hint)
    if NoneType in options:
        return _kind(next(option for option in options if option is not NoneType))
    kind = get_origin(hint) or hint
    return kind, options[1 if kind is dict else 0] if options else Any


def _put(value: Any, hint: Any, name: str, tensors: dict[str, NDArray]) -> Any:
    """`value` for JSON; its arrays go into `tensors`, under `name` and what tells them apart."""
    kind, inner = _kind(hint)
    if value is None or kind is Any:
        return value
    if kind is np.ndarray:
        return _add(tensors, name, value)
    if _is_record(kind):
        return _put_fields(value, name, tensors)
    if kind is SteeringMaps:
        for module, one in value.items():
            _add(tensors, _at(name, f"{module}.weight"), one.weight)
            _add(tensors, _at(name, f"{module}.bias"), one.bias)
        return {"modules": list(value), "metadata": value.metadata, **_put_gates(value, name, tensors)}
    if kind is dict:
        return {key: _put(one, inner, _at(name, key), tensors) for key, one in value.items()}
    if kind in (list, tuple):
        return [_put(one, inner, _at(name, k), tensors) for k, one in enumerate(value)]
    return kind(value)


def _take(value: Any, hint: Any, name: str, tensors: dict[str, NDArray]) -> Any:
    """What `_put` made `value` of, checked; its arrays leave `tensors`."""
    kind, inner = _kind(hint)
    if kind is Any or (value is None and NoneType in get_args(hint)):
        return value
    json = {np.ndarray: str, SteeringMaps: dict, tuple: list, float: float | int}.get(kind, kind)
    if _is_record(kind):
        json = dict
    if not isinstance(value, json) or isinstance(value, bool) is not (kind is bool):
        raise ValueError(f"{name!r} in the header must be of type {kind.__name__}, got {str(value)[:40]!r}")
    if kind is np.ndarray:
        return _pop(tensors, name)
    if _is_record(kind):
        return _take_fields(kind, value, name, tensors)
    if kind is SteeringMaps:
        return _maps(value.get("modules"), value.get("metadata"), value.get("gates"), name, tensors)
    if kind is dict:
        return {key: _take(one, inner, _at(name, key), tensors) for key, one in value.items()}
    if kind in (list, tuple):
        return kind(_take(one, inner, _at(name, k), tensors) for k, one in enumerate(value))
    return kind(value)


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Record)


def _add(tensors: dict[str, NDArray], name: str, value: NDArray) -> str:
    """Put an array under a name, and return the name; ValueError where another one has it, as "a" in "b.c" may."""
    if name in tensors:
        raise ValueError(f"cannot save two arrays under the name {name!r}: rename one of the entries")
    tensors[name] = value
    return name


def _at(name: str, part: Any) -> str:
    return f"{name}.{part}" if name else str(part)


def _pop(tensors: dict[str, NDArray], name: str) -> NDArray:
    if name not in tensors:
        raise ValueError(f"it lacks tensor {name!r}")
    return tensors.pop(name)


def _put_gates(maps: SteeringMaps, name: str, tensors: dict[str, NDArray]) -> dict[str, Any]:
    """The entry of maps with gates: each once, and which of them a module has; their arrays go to `tensors`."""
    if not maps.gates:
        return {}
    different: list[AnyGate] = []
    number = {}
    for module, gate in maps.gates.items():
        found = next((k for k, other in enumerate(different) if other is gate), None)
        if found is None:
            found = len(different)
            different.append(gate)
            for part, x in arrays_of(gate).items():
                key = _gate_tensor(name, found, part)
                if key in tensors:
                    raise ValueError(f"cannot save gates beside a module whose tensor is called {key!r}: rename it")
                tensors[key] = x.astype(np.uint8) if x.dtype == bool else x
        number[module] = found
    return {"gates": {"of": number, "gates": [facts_of(gate) for gate in different]}}


def _gate_tensor(name: str, number: int, part: str) -> str:
    return _at(name, f"gate {number}.{part}")  # no module of torch has a space in its name


def _take_gates(entry: Any, name: str, tensors: dict[str, NDArray]) -> dict[str, AnyGate]:
    """The gates of an entry of `_put_gates`, by module."""
    if entry is None:
        return {}
    number, facts = (entry.get(key) if isinstance(entry, dict) else None for key in ("of", "gates"))
    if not isinstance(number, dict) or not isinstance(facts, list):
        raise ValueError("'gates' in the header must be an object with 'of', an object, and 'gates', a list")
    gates = []
    for k, one in enumerate(facts):
        start = _gate_tensor(name, k, "")
        arrays = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        if "closed" in arrays:
            closed = arrays["closed"]
            if closed.dtype != np.uint8 or (closed > 1).any():
                raise ValueError(f"tensor {start + 'closed'!r} must be uint8 of 0 and 1")
            arrays["closed"] = closed.astype(bool)
        gates.append(made_of(one, arrays))
    for module, k in number.items():
        if type(k) is not int or not 0 <= k < len(gates):
            raise ValueError(f"'gates' in the header: module {module!r} has gate {k!r:.20} of {len(gates)}")
    return {module: gates[k] for module, k in number.items()}


def _maps(modules: Any, metadata: Any, gates: Any, name: str, tensors: dict[str, NDArray]) -> SteeringMaps:
    sound = isinstance(modules, list) and all(isinstance(module, str) and module for module in modules)
    if not sound or len(set(modules)) != len(modules):
        raise ValueError("'modules' in the header must be different names that are not empty")

    def take(module: str) -> AffineMap:
        bias, weight = (_pop(tensors, _at(name, f"{module}.{part}")) for part in ("bias", "weight"))
        return AffineMap(weight, bias)

    return SteeringMaps(each_module(modules, take), metadata, _take_gates(gates, name, tensors))
