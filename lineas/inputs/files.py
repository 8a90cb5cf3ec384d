"""Files of prompts: text with one a line, or JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .tokenize import KINDS


def read_prompts(path: Path) -> list[Any]:
    """The lines of a UTF-8 text file without the blank ones, or the values of a file of JSON lines."""
    kind = path.suffix.lower()
    if kind == ".json":
        raise ValueError(f"{path}: expected text or JSON lines: write one value a line, and name the file .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        seen = f"byte {error.object[error.start]:#x} at {error.start}"
        raise ValueError(f"{path}: expected UTF-8 text, got {seen}") from None
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), start=1) if line.strip()}
    if kind not in (".jsonl", ".ndjson"):
        return list(lines.values())
    prompts = []
    for number, line in lines.items():
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected JSON, got {line[:40]!r} ({error})") from None
        value = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(value, str) and not any(holds(value) for holds in KINDS.values()):
            raise ValueError(f"{path}, line {number}: expected a text, messages or token ids, got {line[:40]!r}")
        prompts.append(value)
    return prompts
