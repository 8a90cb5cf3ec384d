"""Globs for the names of modules, against a slow matcher that tries everything."""

import fnmatch
import functools
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lineas import _names

# Few letters, so that much matches; some that regular expressions would take for something else.
LETTERS = "ab1_-^]\\"

names = st.lists(st.text("ab1_-^]", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join)


def class_end(glob, i):
    """Where the set of characters that begins at `i` ends; 0 where the bracket is one character like others."""
    j = i + 1 + glob.startswith("!", i + 1)
    return glob.find("]", j + 1) + 1


def slow(glob, name):
    """Whether a glob matches a name, by trying all ways to go on from each place in both."""

    @functools.cache
    def rest(i, j):
        if i == len(glob):
            return j == len(name)
        if glob.startswith("**.", i) and (i == 0 or glob[i - 1] == "."):  # parts with their dots, or none
            end = name.find(".", j)
            return rest(i + 3, j) or (end > j and rest(i, end + 1))
        if glob.startswith("**", i):
            return any(rest(i + 2, k) for k in range(j, len(name) + 1))
        if glob[i] == "*":
            end = name.find(".", j)
            return any(rest(i + 1, k) for k in range(j, (end if end >= 0 else len(name)) + 1))
        if j == len(name):
            return False
        if glob[i] == "?":
            return name[j] != "." and rest(i + 1, j + 1)
        end = class_end(glob, i) if glob[i] == "[" else 0
        if end:
            told = fnmatch.fnmatchcase(name[j], glob[i:end])
            return told and (name[j] != "." or glob[i + 1] != "!") and rest(end, j + 1)
        return glob[i] == name[j] and rest(i + 1, j + 1)

    return rest(0, 0)


globs = st.lists(
    st.sampled_from(["a", "b", "1", "_", ".", "*", "**", "?", "[ab]", "[!a]", "[a-b1]", "**.", ".**", "[!1-]", "[^a]"]),
    max_size=8,
).map("".join)


@given(globs, names)
@example("**.b", "b")
@example("a.**", "a")
@example("a.**", "a.b.1")
@example("a.**.b", "a.b")
@example("a[!b]b", "a.b")
@example("[^a]", "b")
@example("a**b", "a.1.b")
def test_a_glob_matches_what_the_slow_matcher_says(glob, name):
    assert bool(_names.compile_glob(glob).fullmatch(name)) == slow(glob, name)


@given(st.text(LETTERS + "*?[!.&~|", max_size=12), names)
@example("[!]a]", "b")
@example("[z-a]", "a")
@example("[a--b]", "a")
@example("[[a]", "[")
@example("[a&&b]", "&")
@example("[!", "[!")
def test_any_text_is_a_glob(glob, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # regular expressions warn of what they may come to mean
        assert bool(_names.compile_glob(glob).fullmatch(name)) == slow(glob, name)


@given(names)
def test_a_name_matches_itself_and_is_no_glob(name):
    assert _names.matching(name, [name, name + "x", "x" + name]) == [name]
    assert not _names.is_glob(name)


BLOCKS = [
    "model",
    "model.norm",
    "model.layers",
    *(f"model.layers.{k}{part}" for k in (0, 12) for part in ("", ".norm")),
]


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*", ["model"]),
        ("**", BLOCKS),
        ("model.*", ["model.norm", "model.layers"]),
        ("model.**", BLOCKS[1:]),
        ("model.layers.*", ["model.layers.0", "model.layers.12"]),
        ("model.layers.?", ["model.layers.0"]),
        ("model.layers.[!0]*", ["model.layers.12"]),
        ("**.norm", ["model.norm", "model.layers.0.norm", "model.layers.12.norm"]),
        ("**.*o*", ["model", "model.norm", "model.layers.0.norm", "model.layers.12.norm"]),
        ("model**norm", ["model.norm", "model.layers.0.norm", "model.layers.12.norm"]),
    ],
)
def test_a_star_stops_at_dots_and_two_do_not(glob, found):
    assert _names.matching(glob, BLOCKS) == found


def test_names_that_are_near():
    assert _names.near_names("model.layers.3.norm", BLOCKS)[:2] == ["model.layers.0.norm", "model.layers.12.norm"]
    assert _names.near_names("model.layer.0.norm", BLOCKS)[0] == "model.layers.*.norm"
    assert _names.near_names("norm", BLOCKS) == ["model.norm", "model.layers.*.norm"]
    assert _names.near_names("0.norm", BLOCKS)[0] == "model.layers.*.norm"
    assert _names.near_names("layers.0", ["model.layers.0", "model.sublayers.0"])[0] == "model.layers.0"
    assert _names.near_names("xyz", BLOCKS) == _names.near_names("nope", BLOCKS) == []
    assert _names.hint("xyz", [], "this") == "; this has no modules"
    assert _names.hint("%", BLOCKS) == "; the model has " + ", ".join(BLOCKS[:5])
