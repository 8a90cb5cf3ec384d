"""Names of modules: globs that match them, and those that look like one that is missing."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

# What a glob is made of: parts with their dots, any text, a set of characters, or one character.
_GLOB_TOKEN = re.compile(r"(?<![^.])\*\*\.|\*\*|\[!?+.[^]]*]|.", re.DOTALL)


def compile_glob(glob: str) -> re.Pattern[str]:
    """A regular expression for the full dotted names that a glob matches.

    ``*`` stands for a part of a name between dots or a piece of one, ``?`` for a character of it, ``[...]`` for one of
    several and ``[!...]`` for any other; ``**`` for any number of parts: ``model.**`` is all that is below ``model``,
    and ``**.norm`` every ``norm``, also at the top.
    """
    return re.compile("".join(map(_translated, _GLOB_TOKEN.findall(glob))))


def _translated(token: str) -> str:
    """A regular expression for a part of a glob that stands for itself or for others."""
    if token.startswith("[") and token != "[":
        some = fnmatch.translate(token)[:-2]  # without its anchor
        return rf"(?!\.){some}" if token.startswith("[!") else some
    return {"**.": r"(?:[^.]+\.)*", "**": ".*", "*": "[^.]*", "?": "[^.]"}.get(token, re.escape(token))


def is_glob(text: str) -> bool:
    """Whether a text stands for more than the name that it is."""
    return any(mark in text for mark in "*?[")


def matching(glob: str, names: Iterable[str]) -> list[str]:
    """The names that a glob matches."""
    pattern = compile_glob(glob)
    return [name for name in names if pattern.fullmatch(name)]


def near_names(wanted: str, names: Iterable[str]) -> list[str]:
    """Names that end with `wanted` or look like it, best first, at most five; those that differ in a number as one.

    A number that differs is written ``*``, so that what stands for several names is a glob for them.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_without_numbers(name), []).append(name)
    template = _without_numbers(wanted)
    ends = sorted((one for one in alike if f".{one}".endswith(f".{template}")), key=len)
    near = list(dict.fromkeys([*ends, *difflib.get_close_matches(template, alike, n=5, cutoff=0.5)]))[:5]
    if near and near[0] == template and not is_glob(wanted):
        return [*alike[near[0]], *near[1:]][:5]  # only the number is wrong
    return [one if len(alike[one]) > 1 else alike[one][0] for one in near]


def numbers_in_order(names: Iterable[str]) -> list[str]:
    """Names in alphabetical order, but for the numbers in them: ``layers.2`` comes before ``layers.10``."""
    # Compared as text: too many digits are no int.
    return sorted(names, key=lambda name: [x.zfill(20 * (k % 2)) for k, x in enumerate(re.split(r"([0-9]+)", name))])


def in_execution_order(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """One list of two that are in execution order, without double names.

    Names that both have hold the lists together. Between two of them, the numbers in the names tell where those that
    only `second` has belong: ``layers.2.norm`` comes before ``layers.10.norm``, and after all of ``layers.2`` that
    `first` has. Where the numbers do not tell, and where the lists contradict each other, the order is that of `first`.
    """
    merged, shared, start = list(first), {*first} & {*second}, 0
    for name in second:
        if name in shared:
            start = merged.index(name) + 1
            continue
        end = next((k for k in range(start, len(merged)) if merged[k] in shared), len(merged))
        order = {k: _compare(merged[k], name) for k in range(start, end)}
        before = [k + 1 for k, found in order.items() if found in (-1, 0)]
        after = [k for k, found in order.items() if found == 1]
        start = max(before) if before else min(after, default=end)
        merged.insert(start, name)
        start += 1
    return merged


def _compare(name: str, other: str) -> int | None:
    """-1 or 1 where the first number that differs puts `name` first or last, 0 in one numbered block, else None."""
    numbered = False
    for k, (a, b) in enumerate(zip(re.split(r"([0-9]+)", name), re.split(r"([0-9]+)", other), strict=False)):
        if a != b and k % 2:
            a, b = a.zfill(len(b)), b.zfill(len(a))  # compared as text: too many digits are no int
            return (a > b) - (a < b)
        if a != b:
            break
        numbered = numbered or k % 2 == 1
    return 0 if numbered else None


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def hint(wanted: str, names: Sequence[str], owner: str = "the model") -> str:
    """The end of an error message about a missing module: what there is that looks like it."""
    near = near_names(wanted, names)
    if near:
        return "; similar names: " + ", ".join(near)
    return f"; {owner} has {', '.join(names[:5])}" if names else f"; {owner} has no modules"
