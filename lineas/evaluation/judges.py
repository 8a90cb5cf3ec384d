"""Judges: what gives each text a score, such as its sentiment, or the probability that it is toxic.

A judge is any callable ``judge(texts)`` that returns one finite real number for each of a list of texts. Where it has a
parameter `prompts`, it is called ``judge(texts, prompts=prompts)`` with the prompts that the texts continue. Those of
this module are made once and used on many lists; torch, transformers and vaderSentiment are imported when texts are
judged.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._checks import as_finite
from .classifier import Classifier
from .llm_judge import LLMJudge
from .plain_judges import Vader, WordList
from .scoring import Judge, JudgeError, OwnJudge, Scores, is_a, score

__all__ = ["Classifier", "JudgeError", "LLMJudge", "Threshold", "Vader", "WordList", "as_judges", "score"]


def as_judges(judges: Any) -> dict[str, Judge]:
    """Judges by name, of what users may give.

    Nothing but configurations is loaded here, and from the network only what a string names. Whatever can be known to
    fail later fails here: a package that is missing, a model without the label.

    Parameters
    ----------
    judges : judge, sequence of judges, or mapping from names to judges
        A judge is a callable; ``"vader"`` (`Vader`); any other string, which is the folder or the hub id of a text
        classifier (`Classifier`); or a text-classification pipeline of transformers. A list of strings is a list of
        judges: words are given as ``WordList(words)``.

    Returns
    -------
    dict
        Callables by name. Without a mapping the name is that of the judge: its `name`, a function's ``__name__``
        ("judge" for a lambda), or its class. The second judge of a name gets the suffix ``_2``, the third ``_3``.

    Raises
    ------
    TypeError
        If something is neither a judge nor holds judges, or a name is no string.
    ValueError
        If there are none, a name is empty, a string names no text classifier, or its label must be chosen.
    ImportError
        If a package that a judge needs is missing; says how to install it.
    """
    if isinstance(judges, Mapping):
        for name in judges:
            if not isinstance(name, str):
                raise TypeError(f"judges must have strings as names, got {type(name).__name__}")
            if not name.strip():
                raise ValueError("judges has an empty name")
        named = {name: _as_judge(judge, f"judges[{name!r}]") for name, judge in judges.items()}
    else:
        several = isinstance(judges, list | tuple)
        given = judges if several else [judges]
        named = {}
        for k, judge in enumerate(given):
            made = _as_judge(judge, f"judges[{k}]" if several else "judges")
            named[_free_name(_name_of(made), named)] = made
    if not named:
        raise ValueError("judges is empty")
    return named


def _as_judge(judge: Any, argument: str) -> Judge:
    """One judge as a callable; errors call it `argument`."""
    made: Any = judge
    if isinstance(judge, str | os.PathLike):
        if not str(judge).strip():
            raise ValueError(f"{argument} is an empty string")
        made = Vader() if judge == "vader" else Classifier(judge)
    elif is_a(judge, "transformers.pipelines.text_classification", "TextClassificationPipeline"):
        made = Classifier(judge)
    elif isinstance(judge, type):
        raise TypeError(f"{argument} must be a judge, got the class {judge.__name__}: make one, {judge.__name__}(...)")
    elif is_a(judge, "transformers.modeling_utils", "PreTrainedModel"):
        raise TypeError(f"{argument} is a model: give Classifier(model, tokenizer=...) or LLMJudge(model, ...)")
    elif is_a(judge, "transformers.pipelines.base", "Pipeline"):
        raise TypeError(f"{argument} must be a text-classification pipeline, got a {type(judge).__name__}")
    elif not callable(judge):
        hint = ": give lambda texts: classifier.predict_proba(texts)[:, 1]" if hasattr(judge, "predict_proba") else ""
        hint = ": words are given as WordList(words)" if isinstance(judge, set | frozenset | list | tuple) else hint
        raise TypeError(f"{argument} must be a callable or a string, got {type(judge).__name__}{hint}")
    if isinstance(made, OwnJudge):
        made.check()
    return made


def _name_of(judge: Judge) -> str:
    if isinstance(judge, functools.partial):
        return _name_of(judge.func)
    for found in (getattr(judge, "name", None), getattr(judge, "__name__", None)):
        if isinstance(found, str) and found.strip():
            return "judge" if found == "<lambda>" else found
    return type(judge).__name__


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


class Threshold(OwnJudge):
    """Whether the score of another judge is above a number: 1 or 0, of which the mean is a share of the texts.

    ``Threshold(Classifier(model, "toxic"))`` is the share of toxic texts.

    Parameters
    ----------
    judge : judge
        Whatever `as_judges` takes for one.
    above : float, default 0.5
        The score above which, not at which, a text counts.

    Raises
    ------
    TypeError, ValueError
        As `as_judges` for one judge; or if `above` is no finite number.
    """

    def __init__(self, judge: Any, above: float = 0.5) -> None:
        self.above = as_finite(above, "above")
        self.judge = _as_judge(judge, "judge")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{_name_of(self.judge)} > {self.above:g}"

    def __call__(self, texts: Sequence[str], prompts: Sequence[Any] | None = None) -> Scores:
        return (score(_name_of(self.judge), self.judge, texts, prompts) > self.above).astype(np.float64)

    def __repr__(self) -> str:
        return f"Threshold({self.judge!r}, above={self.above:g})"
