"""What a judge is, and its call: `score`, which checks what it returns. Needs no torch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .metrics import as_numbers

Judge: TypeAlias = Callable[..., Any]
"""``judge(texts)`` or ``judge(texts, prompts=prompts)``: one finite real number a text."""

Scores: TypeAlias = NDArray[np.float64]


class JudgeError(ValueError):
    """A judge failed, or returned what are no scores. Where that is no array of numbers, it is a TypeError as well.

    Attributes
    ----------
    evaluation : object or None
        What was evaluated before, where there is something.
    """

    evaluation: Any = None


class _JudgeTypeError(JudgeError, TypeError):
    pass


def score(name: str, judge: Judge, texts: Sequence[str], prompts: Sequence[Any] | None = None) -> Scores:
    """What a judge says of texts, checked.

    Parameters
    ----------
    name : str
        What errors call it.
    judge : callable
        Of `as_judges`. It gets lists of its own.
    texts : sequence of str [n]
        May be empty texts.
    prompts : sequence of str or conversations [n], optional
        What the texts continue, for a judge with a parameter `prompts`.

    Returns
    -------
    float64 array [n]
        Booleans count as 0 and 1.

    Raises
    ------
    JudgeError
        If the judge raises an exception, which is the cause of this one; if it does not return one score a text; or a
        score is not finite.
    JudgeError, which is also a TypeError
        If it returns no array of real numbers.
    """
    given = {}
    if _takes_prompts(judge):
        given["prompts"] = None if prompts is None else list(prompts)
    try:
        returned = judge(list(texts), **given)
    except JudgeError:
        raise  # of a judge in this one
    except Exception as error:
        raise JudgeError(f"judge {name!r} failed: {type(error).__name__}: {error}") from error
    try:
        scores = as_numbers(returned, "what it returns")
    except (TypeError, ValueError) as error:
        raise _JudgeTypeError(
            f"judge {name!r} must return an array of real numbers, got {type(returned).__name__}: {error}"
        ) from error
    if scores.shape != (len(texts),):
        seen = str(scores.size) if scores.ndim == 1 else f"shape {scores.shape}"
        raise JudgeError(f"judge {name!r} must return one score a text: expected {len(texts)}, got {seen}")
    finite = np.isfinite(scores)
    if not finite.all():
        at = int(np.argmin(finite))
        raise JudgeError(f"judge {name!r} must return finite scores, got {scores[at]} for text {at}")
    return scores


def _takes_prompts(judge: Judge) -> bool:
    try:
        parameter = inspect.signature(judge).parameters.get("prompts")
    except (TypeError, ValueError):  # some of C tell no signature
        return False
    return parameter is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


class OwnJudge:
    """What the judges of lineas have in common."""

    name: str

    def check(self) -> None:
        """Raise now what a call would raise for want of a package or a label; weights are not loaded."""


def as_texts(texts: Any) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts is one string: give a list of texts")
    texts = list(texts)
    for k, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{k}] must be a str, got {type(text).__name__}")
    return texts


def is_a(x: Any, module: str, name: str) -> bool:
    """Whether `x` is of a class of a module that is not imported for that: without it there is no such object."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(x, kind)
