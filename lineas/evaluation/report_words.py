"""Numbers and lists as `report` writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np

Interval = tuple[float, float, float]
LONGEST, LONGEST_PROMPT = 240, 1500  # characters of a fact of the metadata, and of a prompt


class Cell(NamedTuple):
    """A number as text, its interval as text, and itself, to sort by."""

    text: str
    span: str
    value: str


class Column(NamedTuple):
    """A column of a table: its name, what it is in words, and a cell for each point."""

    head: str
    meaning: str
    cells: list[Cell]


class Style(NamedTuple):
    """How numbers are written: a Python format, what stands before and after them, by what they are multiplied."""

    pattern: str
    before: str = ""
    after: str = ""
    factor: float = 1.0

    def write(self, value: float) -> str:
        if math.isnan(value):
            return "–"
        value *= self.factor
        if math.isinf(value):
            return f"{self.before}{'−' if value < 0 else ''}∞{self.after}"
        large = abs(value) >= 1e5
        written = f"{value:{'+' if '+' in self.pattern else ''}.3g}" if large else f"{value:{self.pattern}}"
        return f"{self.before}{written.replace('-', '−')}{self.after}"

    def span(self, low: float, high: float) -> str:
        return "" if math.isnan(low) or math.isnan(high) else f"[{self.write(low)}, {self.write(high)}]"

    def cell(self, found: Interval) -> Cell:
        value, low, high = found
        return Cell(self.write(value), self.span(low, high), "" if math.isnan(value) else repr(value))

    def both(self, found: Interval) -> str:
        """The number and its interval."""
        return " ".join(filter(None, (self.write(found[0]), self.span(*found[1:]))))


KL = Style(".4f")
PERCENT = Style(".1f", after=" %", factor=100.0)
POINTS = Style("+.1f", factor=100.0)


def by_size(numbers: Collection[float], *, signed: bool = False) -> Style:
    """As many decimals as numbers of this size need: scores may be shares as well as logarithms."""
    largest = max((abs(x) for x in numbers if math.isfinite(x)), default=0.0)
    decimals = 3 if largest < 10 else 2 if largest < 100 else 1
    return Style(f"{'+' if signed else ''}.{decimals}f")


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(parts: Sequence[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def cut(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def named(value: Any) -> str:
    return cut(value) if isinstance(value, str) else ""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that float64 holds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float | np.integer | np.floating)


def compact(value: Any) -> str:
    """A value of metadata: text as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # of a caller's own metadata
        return type(value).__name__


def spelled(settings: Any) -> str:
    """Settings as a list of names and values, without those that are not set."""
    if not isinstance(settings, Mapping):
        return cut(compact(settings))
    return cut(", ".join(f"{name} = {compact(value)}" for name, value in settings.items() if value is not None), 600)
