"""What is served: a model and maps by their names, and which of them a request asks for, how strongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..maps.metadata import calibrated_strength
from ..maps.steering import SteeringMaps
from .engine import Engine
from .errors import ApiError, refuse, shown
from .requests import Request, Steering

JOIN = "+"
"""Between a model and maps, in names of models."""


class Loaded:
    """What is served: a model under its name, maps under theirs, and the strength of each where a request says none."""

    def __init__(self, engine: Engine, name: str, maps: Mapping[str, SteeringMaps], strengths: Mapping[str, float]):
        self.engine, self.name, self.maps, self.strengths = engine, name, maps, strengths

    @property
    def models(self) -> list[str]:
        """The names of models that are listed."""
        return [self.name, *(f"{self.name}{JOIN}{one}" for one in self.maps)]

    def of_model(self, model: str) -> list[str]:
        """The maps that the name of a model asks for; ApiError where there is none of this name."""
        if model == self.name:
            return []
        before, join, after = model.partition(f"{self.name}{JOIN}")
        names = after.split(JOIN)
        if before or not join or not set(names) <= set(self.maps):
            listed = ", ".join(self.models)
            raise ApiError(
                404, f"there is no model {shown(model)}, but: {listed}", param="model", code="model_not_found"
            )
        return names

    def applied(self, body: Request) -> dict[str, float]:
        """The strengths that a request asks for, by name of the maps, in their order; ApiError where it cannot be."""
        named = self.of_model(body.model)
        given = body.lineas or Steering()
        strength = given.strength
        names = given.maps
        if names is None:
            names = named or (list(strength) if isinstance(strength, dict) else [])
        elif named and set(names) != set(named):
            raise refuse("lineas.maps", f"lineas.maps are {shown(names)}, but the model {body.model} is with {named}")
        for name in names:
            self._check(name, "lineas.maps" if given.maps is not None else "lineas.strength")
        if isinstance(strength, dict):
            for name in strength:
                self._check(name, "lineas.strength")
                if name not in names:
                    raise refuse("lineas.strength", f"lineas.strength has {name!r}, which is none of the maps {names}")
            found = {name: strength.get(name, self.strengths[name]) for name in names}
        elif strength is not None and not names:
            known = ", ".join(self.maps)
            raise refuse("lineas.maps", f"lineas.maps must say which maps the strength is for: {known}")
        else:
            found = {name: self.strengths[name] if strength is None else strength for name in names}
        return {name: found[name] for name in self.maps if name in found}

    def _check(self, name: str, param: str) -> None:
        if name not in self.maps:
            raise refuse(param, f"{param}: there are no maps {shown(name)}, but: {', '.join(self.maps)}")

    def describe(self) -> dict[str, Any]:
        """What the page has to know."""
        facts = []
        for name, maps in self.maps.items():
            calibrated, strength = calibrated_strength(maps.metadata), self.strengths[name]
            end = max(2 * abs(calibrated or 1.0), abs(strength))
            low = -end if min(strength, calibrated or 0.0) < 0 else 0.0
            method = maps.metadata.get("method")
            facts.append(
                {
                    "name": name,
                    "strength": strength,
                    "calibrated": calibrated,
                    "range": [low, end],
                    "modules": len(maps),
                    "method": method if isinstance(method, str) else None,
                }
            )
        engine = self.engine
        shown_facts = {"model": self.name, "chat": engine.codec.chats, "context_length": engine.context_length}
        return {**shown_facts, "maps": facts}
