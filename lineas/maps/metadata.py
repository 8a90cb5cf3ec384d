"""What metadata say of maps: how the settings that made them are written down, and how they are read back.

The metadata of a fit hold "method", "version", and as far as there was a model "model", "layers", "loss_layers",
"pooling" and "tokens", then "settings" and "history".
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from .._checks import as_finite, is_number
from .._version import __version__

Layers: TypeAlias = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]
"""What users may give as ``layers=``."""
Selection: TypeAlias = str | slice | Callable[[Any], Any]
"""What users may give as ``tokens=``; a callable gets a `lineas.Tokens`."""

CALIBRATED = "calibrated"
"""What users may give as a strength for the one that metadata recommend."""
WORDS = ("all", "last", "prompt", "generated")
POOLINGS = ("mean", "min", "max", "last", "all")


def describe(method: str, **facts: Any) -> dict[str, Any]:
    """The metadata of maps made by `method`, spelled out; the only place that makes them."""
    return {"method": method, "version": __version__, **spell(facts)}


def spell(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON can hold them: `layers`, `loss_layers` and `tokens` as users give them, or spelled out already."""
    spelled = {"layers": spell_layers, "loss_layers": spell_layers, "tokens": spell_tokens}
    return {name: spelled[name](fact) if name in spelled else fact for name, fact in facts.items()}


def spell_layers(layers: Any) -> Any:
    """`layers` with regular expressions as their patterns."""
    if isinstance(layers, list | tuple):
        return [spell_layers(layer) for layer in layers]
    return layers.pattern if isinstance(layers, re.Pattern) else layers


def check_tokens(tokens: Any) -> Selection:
    """`tokens` as a selection, slices with Python's own integers; TypeError or ValueError where it is none.

    Selections are `WORDS`, slices of integers with a step above 0, and callables.
    """
    wanted = f"tokens must be {', '.join(map(repr, WORDS))}, a slice or a callable"
    if isinstance(tokens, str):
        if tokens not in WORDS:
            raise ValueError(f"{wanted}, got {tokens!r}")
        return tokens
    if isinstance(tokens, slice):
        parts = []
        for part, value in (("start", tokens.start), ("stop", tokens.stop), ("step", tokens.step)):
            if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
                raise TypeError(f"tokens: the {part} of a slice must be an integer or None, got {value!r}")
            parts.append(None if value is None else operator.index(value))
        if parts[2] is not None and parts[2] < 1:
            raise ValueError(f"tokens: the step of a slice must be above 0, got {parts[2]}")
        return slice(*parts)
    if not callable(tokens):
        raise TypeError(f"{wanted}, got {type(tokens).__name__}")
    return tokens


def spell_tokens(tokens: Any) -> Any:
    """`tokens`, as users give them or spelled out already, as JSON can hold them; None is passed on.

    A slice is ``{"slice": [start, stop, step]}``, a callable ``{"callable": its name}``. ValueError where it is none.
    """
    if tokens is None or _named_callable(tokens) is not None:
        return tokens
    found = _read_tokens(tokens)
    if isinstance(found, slice):
        return {"slice": [found.start, found.stop, found.step]}
    return {"callable": name_of(found)} if callable(found) else found


def _named_callable(tokens: Any) -> str | None:
    """The name of the callable that metadata have in place of it, if they do."""
    name = tokens.get("callable") if isinstance(tokens, dict) and len(tokens) == 1 else None
    return name if isinstance(name, str) else None


def _read_tokens(tokens: Any) -> Selection:
    """The selection that `tokens` are or spell out; ValueError where they do neither."""
    parts = tokens.get("slice") if isinstance(tokens, dict) and len(tokens) == 1 else None
    try:
        return check_tokens(slice(*parts) if isinstance(parts, list | tuple) else tokens)
    except (TypeError, ValueError) as error:  # metadata hold values, not arguments: a wrong type is a wrong value
        raise ValueError(f"metadata name the tokens {tokens!r}: {error}") from None


def name_of(function: Any) -> str:
    """What to call a selection or schedule."""
    return getattr(function, "__name__", None) or type(function).__name__


def show_tokens(tokens: Selection) -> str:
    """`tokens` for error messages."""
    return f"tokens={name_of(tokens) if callable(tokens) else repr(tokens)}"


def fitted_tokens(metadata: Mapping[str, Any]) -> Selection:
    """The selection that maps with this metadata were fitted for; "all" where it says nothing of it.

    ValueError where it was a callable, which no file holds, differs among the maps that these are composed of, or is
    none.
    """
    parts = metadata.get("parts")
    if "tokens" not in metadata and isinstance(parts, list) and parts and all(isinstance(p, dict) for p in parts):
        found = [fitted_tokens(part) for part in parts]
        if any(other != found[0] for other in found):
            raise ValueError(
                "these maps are composed of some that were fitted for different tokens: "
                f"{', '.join(dict.fromkeys(map(show_tokens, found)))}; pass tokens= to say which they are to act on"
            )
        return found[0]
    value = metadata.get("tokens")
    name = _named_callable(value)
    if name is not None:
        raise ValueError(
            f"these maps were fitted for the tokens that {name} selects, which metadata cannot hold: "
            "pass it, or another selection, as tokens="
        )
    return "all" if value is None else _read_tokens(value)


def calibrated_strength(metadata: Mapping[str, Any]) -> float | None:
    """The strength that `lineas.SteeringMaps.calibrate` noted; None where it noted none."""
    found = metadata.get("calibration")
    strength = found.get("strength") if isinstance(found, dict) else None
    return as_finite(strength, "strength") if is_number(strength) else None


def as_strength(value: Any, metadata: Mapping[str, Any]) -> float:
    """A number, or "calibrated" for the one in the metadata; TypeError or ValueError where it is neither."""
    if not isinstance(value, str):
        return as_finite(value, "strength")
    if value != CALIBRATED:
        raise ValueError(f"strength must be a number or {CALIBRATED!r}, got {value!r}")
    strength = calibrated_strength(metadata)
    if strength is None:
        raise ValueError(
            "strength='calibrated' is for maps that were calibrated: take those that maps.calibrate(...) returns, "
            "calibration.maps"
        )
    return strength
