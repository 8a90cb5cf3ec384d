"""Judges without a model: VADER and lists of words."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .._checks import as_flag
from .scoring import OwnJudge, Scores, as_texts


class Vader(OwnJudge):
    """Sentiment by VADER, a word list with rules (Hutto and Gilbert 2014; package vaderSentiment).

    ``Vader()(texts)`` are the compound scores, float64 [n] from -1 (negative) to 1 (positive); 0 of an empty text.

    Raises
    ------
    ImportError
        When it is first called, if the package is not installed.
    """

    name = "vader"

    def check(self) -> None:
        """ImportError if the package is not installed."""
        if importlib.util.find_spec("vaderSentiment") is None:
            raise ImportError("Vader needs the package vaderSentiment: pip install vaderSentiment")

    @functools.cached_property
    def _analyzer(self) -> Any:
        self.check()
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        return SentimentIntensityAnalyzer()

    def __call__(self, texts: Sequence[str]) -> Scores:
        return np.array([self._analyzer.polarity_scores(text)["compound"] for text in as_texts(texts)], np.float64)

    def __repr__(self) -> str:
        return "Vader()"


# Letters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, and Chinese characters.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"


class WordList(OwnJudge):
    """Whether texts hold one of some words.

    Whole words are found, whatever their case: "art" is not in "party". In scripts that put no spaces between words,
    such as Chinese and Thai, a word is found wherever it stands.

    Parameters
    ----------
    words : list, tuple or set of str
        Words, and phrases of several. Their spaces stand for any white space; letters that Unicode writes in several
        ways, and the two apostrophes, are the same.
    count : bool, default False
        What a call gives for each text: whether it holds one of the words, 1 or 0, of which the mean is the share of
        the texts; or how many times it holds one. Where one of them contains another, the longer one counts.

    Raises
    ------
    TypeError
        If `words` is one string, or an entry is none.
    ValueError
        If there are no words, or an entry is empty.
    """

    name = "word_list"

    def __init__(self, words: Sequence[str] | set[str] | frozenset[str], *, count: bool = False) -> None:
        if isinstance(words, str) or not isinstance(words, Sequence | set | frozenset):
            seen = "one string" if isinstance(words, str) else type(words).__name__
            raise TypeError(f"words must be a list of words, got {seen}")
        for word in words:
            if not isinstance(word, str):
                raise TypeError(f"words must hold strings, got {type(word).__name__}")
            if not word.strip():
                raise ValueError(f"words has an empty entry, {word!r}")
        if not words:
            raise ValueError("words is empty")
        self.words = tuple(sorted(words) if isinstance(words, set | frozenset) else words)
        self.count = as_flag(count, "count")
        self._pattern = _whole_words({" ".join(_folded(word).split()) for word in self.words})

    def __call__(self, texts: Sequence[str]) -> Scores:
        found = [sum(1 for _ in self._pattern.finditer(_folded(text))) for text in as_texts(texts)]
        return np.array(found if self.count else [min(number, 1) for number in found], np.float64)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.words[:3])) + (", ..." if len(self.words) > 3 else "")
        return f"WordList([{shown}]{', count=True' if self.count else ''})"


def _folded(text: str) -> str:
    """Text in which letters that differ in case or coding alone are the same (Unicode's compatibility folding)."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", text).replace("\u2019", "'")


@functools.cache
def _letter() -> str:
    """A regular expression for what must not stand beside a whole word: letters, digits and combining marks."""
    marks = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "M")
    return rf"(?![_{_UNSPACED}])[\w{marks}]"  # marks, as those of Devanagari, are not in \w


def _whole_words(words: Iterable[str]) -> re.Pattern[str]:
    """Finds folded words; where several start at one place, the longest that ends there."""
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    either = "|".join(r"\s+".join(map(re.escape, word.split())) for word in longest_first)
    begins, ends = f"(?:(?<!{_letter()})|(?=[{_UNSPACED}]))", f"(?:(?!{_letter()})|(?<=[{_UNSPACED}]))"
    return re.compile(f"{begins}(?:{either}){ends}")
