"""Diagnosis: what was found out about fitted maps, as numbers with what they mean. Needs no torch."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WIDTH = 112


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
        What was looked at.
    value : float or None
        The number; None where the check was left out, or has none.
    verdict : str
        What the number means, in a few words, such as "good" or "left out".
    why : str
        What the verdict rests on, and what will probably not work.
    interval : (float, float) or None
        A 95 % interval of the value, over samples of prompts, where there is one.
    """

    name: str
    value: float | None
    verdict: str
    why: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What `lineas.SteeringMaps.diagnose` found; ``print`` shows it.

    Attributes
    ----------
    checks : tuple of Check
        In the order of the table. ``diagnosis["damage"]`` is the one of that name.
    modules : dict of str to array
        Details of the L modules that carry maps or were compared, in execution order; NaN where a module has no such
        number. "module" [L], names; "unsteered", "steered" and "floor", squared W2 distances of half of the prompts in
        units of the module's total variance; "auc", "auc_low" and "auc_high", of separability with its 95 % interval;
        "support", neurons that the map changes, and "jaccard", how much alike supports of refits are; "damage" and
        "change" of neutral activations with all maps on; "own_damage" and "own_change", those by the module's own map
        alone.
    facts : dict
        What it was measured with: "strength", "pooling", "tokens", "seed", "source", "target" (numbers of prompts) and
        "neutral" (number of tokens, 0 without).
    seconds : dict of str to float
        What it cost: "collect" and each check.
    """

    checks: tuple[Check, ...]
    modules: dict[str, NDArray]
    facts: dict[str, Any]
    seconds: dict[str, float]

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r}; there are {', '.join(repr(check.name) for check in self.checks)}")

    def table(self) -> str:
        """Return a text table: the value, its interval and the verdict of every check, and why below them."""
        rows = [("check", "value", "95 % interval", "verdict")]
        for check in self.checks:
            value = "" if check.value is None else f"{check.value:.3g}"
            span = "" if check.interval is None else "{:.3g} to {:.3g}".format(*check.interval)
            rows.append((check.name, value, span, check.verdict))
        first, second, third, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = [
            f"{name.ljust(first)}  {value.rjust(second)}  {span.rjust(third)}  {verdict}"
            for name, value, span, verdict in rows
        ]
        for check in self.checks:
            lines += ["", textwrap.fill(f"{check.name}: {check.why}", _WIDTH, subsequent_indent="  ")]
        return "\n".join(lines)

    def __str__(self) -> str:
        facts = self.facts
        neutral = f", {facts['neutral']} neutral tokens" if facts["neutral"] else ""
        head = (
            f"Maps at strength {facts['strength']:g} on {facts['source']} source and {facts['target']} target prompts"
            f"{neutral}"
        )
        return f"{head}\n\n{self.table()}"

    def __repr__(self) -> str:
        return f"Diagnosis({', '.join(f'{check.name}: {check.verdict}' for check in self.checks)})"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it; numbers that are not finite are None."""
        return {
            "checks": [
                {
                    "name": check.name,
                    "value": _plain(check.value),
                    "interval": None if check.interval is None else [_plain(end) for end in check.interval],
                    "verdict": check.verdict,
                    "why": check.why,
                }
                for check in self.checks
            ],
            "modules": {name: [_plain(value) for value in values.tolist()] for name, values in self.modules.items()},
            "facts": dict(self.facts),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def _plain(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
