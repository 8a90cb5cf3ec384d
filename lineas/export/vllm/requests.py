"""What a request asks for: names of maps and their strengths, checked, in one form."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from ..._checks import as_finite

KEY = "lineas"
FLAT_MAPS, FLAT_STRENGTH = "lineas_maps", "lineas_strength"
_KEYS = ("maps", "strength")

Strengths = dict[str, float]
"""Strengths by the name of the maps, in the order in which the maps act."""


def read(extra_args: Mapping[str, Any] | None, known: Collection[str]) -> Strengths:
    """The strengths that the extra arguments of a request ask for; without those that are 0.

    Parameters
    ----------
    extra_args : Mapping[str, Any], optional
        ``SamplingParams.extra_args``. Under "lineas", also as JSON text: ``{"maps": "detox", "strength": 0.7}``, a list
        of names in the order in which they act with one strength or a list of as many, or
        ``{"maps": {"detox": 0.7, "polite": 1.2}}``. Or, for requests that carry no nested values, "lineas_maps" and
        "lineas_strength". A strength that is not given is 1.
    known : Collection[str]
        The names of the maps that there are.

    Raises
    ------
    TypeError
        If names or strengths are of another type.
    ValueError
        If there are no maps of a name, a strength is not finite, or the arguments contradict each other.
    """
    asked = _asked(extra_args or {})
    if asked is None:
        return {}
    strengths = _by_name(asked["maps"], asked.get("strength"))
    for name in strengths:
        if name not in known:
            there = f"there are {', '.join(map(repr, known))}" if known else "this engine was started without maps"
            raise ValueError(f"lineas: no maps are called {name!r}; {there}")
    return {name: strength for name, strength in strengths.items() if strength != 0}


def plain(extra_args: Mapping[str, Any] | None, strengths: Strengths) -> dict[str, Any]:
    """Extra arguments with the strengths that `read` found in them, in the form that `checked` takes."""
    kept = {key: value for key, value in (extra_args or {}).items() if key not in (KEY, FLAT_MAPS, FLAT_STRENGTH)}
    return {**kept, KEY: {"maps": strengths}} if strengths else kept


def _asked(extra_args: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is asked for as {"maps": ..., "strength": ...}; None where nothing is."""
    nested, flat = extra_args.get(KEY), [key for key in (FLAT_MAPS, FLAT_STRENGTH) if key in extra_args]
    if nested is None and not flat:
        return None
    if nested is not None and flat:
        raise ValueError(f"lineas: give either {KEY!r} or {flat[0]!r}, not both")
    if flat:
        nested = {
            short: extra_args[key] for short, key in zip(_KEYS, (FLAT_MAPS, FLAT_STRENGTH), strict=True) if key in flat
        }
    elif isinstance(nested, str):
        try:
            nested = json.loads(nested)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"lineas: a text must be JSON: {error}") from None
    if not isinstance(nested, Mapping):
        raise TypeError(f"lineas must be a mapping or the JSON text of one, got {type(nested).__name__}")
    for key in nested:
        if key not in _KEYS:
            raise ValueError(f"lineas: unknown key {key!r}, expected 'maps' and 'strength'")
    if "maps" not in nested:
        raise ValueError("lineas: 'maps' is missing, the name of the maps")
    return dict(nested)


def _by_name(maps: Any, strength: Any) -> Strengths:
    if isinstance(maps, Mapping):
        if strength is not None:
            raise ValueError("lineas: give no 'strength' beside 'maps' that have theirs")
        for name in maps:
            _check_name(name)
        return {name: as_finite(value, f"lineas: the strength of {name!r}") for name, value in maps.items()}
    names = [maps] if isinstance(maps, str) else maps
    if not isinstance(names, list | tuple):
        raise TypeError(f"lineas: maps must be a name, a list of names or a mapping, got {type(maps).__name__}")
    for name in names:
        _check_name(name)
    if len(set(names)) < len(names):
        raise ValueError(f"lineas: maps are named twice in {list(names)}")
    strength = 1.0 if strength is None else strength
    values = list(strength) if isinstance(strength, list | tuple) else [strength] * len(names)
    if len(values) != len(names):
        raise ValueError(f"lineas: {len(names)} maps need as many strengths or one, got {len(values)}")
    return {
        name: as_finite(value, f"lineas: the strength of {name!r}") for name, value in zip(names, values, strict=True)
    }


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"lineas: the name of maps must be a string, got {name!r}")
