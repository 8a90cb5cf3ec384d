"""Texts for the table of the paper: out of local files, or by `datasets` from the hub or a folder of its kind.

A source is a file of texts, one a line (``.txt``), of JSON lines (``.jsonl``), or a table (``.csv``), which may lie on
the hub as ``hf://datasets/OWNER/NAME/FILE``; or what ``datasets.load_dataset`` takes, a hub id or a folder, ``:SPLIT``
behind an id where the split is not "train" and ``@CONFIG`` before that where there are several configurations, as in
``wikimedia/wikipedia@20231101.en:train``.
The texts of some of these offend: they are never printed.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _paper import local

FILES = (".txt", ".jsonl", ".csv")
TEXTS = ("text", "prompt", "query", "sentence", "comment_text")
"""What data sets call the text of a row."""
JIGSAW = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
"""The labels of Kaggle's "Toxic Comment Classification Challenge"."""


def rows(source: str, stream: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a source; with `stream` those of the hub come one by one, and the rest stays there."""
    if source.endswith(FILES):
        path = local(source)
        if not path.is_file():
            raise SystemExit(f"there is no file {source}")
        yield from _rows_of_file(path)
        return
    import datasets

    path = Path(source)
    source, _, split = source.partition(":") if not path.is_dir() else (source, "", "")
    name, _, config = source.partition("@")
    loaded = datasets.load_dataset(name, config or None, split=split or "train", streaming=stream)
    yield from loaded


def _rows_of_file(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.field_size_limit(1 << 30)
            yield from csv.DictReader(file)
            return
        for line in map(str.strip, file):
            if line:
                found = json.loads(line) if path.suffix == ".jsonl" else line
                yield {"text": found} if isinstance(found, str) else found


def text_of(row: dict[str, Any], source: str) -> str:
    """The text of a row, which may be under ``"text"`` of what the row has."""
    for name in TEXTS:
        value = row.get(name)
        value = value.get("text") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    raise SystemExit(f"{source}: expected one of the columns {', '.join(TEXTS)}, got {', '.join(row)}")


def texts(source: str, count: int | None = None, keep: Callable[[str], bool] = lambda text: True) -> list[str]:
    """The first `count` texts of a source, or all of them, in its order; empty ones and those not to keep are left out.

    Of the hub no more is loaded than that takes.
    """
    found = (text_of(row, source) for row in rows(source, stream=count is not None))
    return list(itertools.islice((text for text in found if text.strip() and keep(text)), count))


def draw(pool: Sequence[str], count: int, seed: int, what: str) -> list[str]:
    """`count` of the texts, without replacement, by `seed`."""
    if len(pool) < count:
        raise SystemExit(f"{what}: {count} texts are asked for, there are {len(pool)}")
    return [pool[k] for k in np.random.default_rng(seed).permutation(len(pool))[:count]]


def toxic_and_clean(source: str) -> tuple[list[str], list[str]]:
    """Comments that are labelled toxic, and those without any label; those with other labels alone are left out."""
    toxic, clean = [], []
    for row in rows(source):
        missing = [name for name in JIGSAW if name not in row]
        if missing:
            raise SystemExit(f"{source}: expected the columns {', '.join(JIGSAW)}, {missing[0]} is missing")
        labels = [int(row[name]) for name in JIGSAW]
        text = text_of(row, source)
        if min(labels) < 0 or not text.strip():  # -1: rows of the test set that were not scored
            continue
        if labels[0]:
            toxic.append(text)
        elif not any(labels):
            clean.append(text)
    return toxic, clean


def toxicity_prompts(source: str) -> list[str]:
    """The prompts of RealToxicityPrompts whose toxicity is known, and those that come without one."""
    found = []
    for row in rows(source):
        prompt = row.get("prompt")
        if isinstance(prompt, dict) and prompt.get("toxicity", 0.0) is None:
            continue
        found.append(text_of(row, source))
    return found
