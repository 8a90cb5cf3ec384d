"""What an evaluation has found so far, in a file of JSON lines that is only ever added to."""

from __future__ import annotations

import json
import os
from os import PathLike
from typing import Any

from .._version import __version__

FORMAT = "lineas evaluation log"


class Log:
    """Findings by key, in memory and, with a path, in a file: a run that was cut off goes on where it was.

    The first line says what must be the same for findings to be of use, as JSON has it. A line that was not written to
    its end, since the process died, is dropped.

    OSError if the file cannot be read or written; ValueError if it is none of these, or of another evaluation.
    """

    def __init__(self, path: str | PathLike[str] | None, identity: dict[str, Any]) -> None:
        self.path = None if path is None else os.fspath(path)
        self.found: dict[str, Any] = {}
        if self.path is None:
            return
        if os.path.exists(self.path) and os.path.getsize(self.path):
            self._resume(identity)
        else:
            self._write({"format": FORMAT, "version": __version__, "identity": identity})

    def _resume(self, identity: dict[str, Any]) -> None:
        assert self.path is not None
        with open(self.path, "rb") as file:
            content = file.read()
        whole = content.rfind(b"\n") + 1
        try:
            first, *lines = [json.loads(line) for line in content[:whole].splitlines()]
            known, seen = first["format"] == FORMAT, dict(first["identity"])
            self.found = {line["key"]: line["value"] for line in lines}
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise ValueError(f"checkpoint: {self.path} is not the file of an evaluation; give another, or remove it")
        differs = next((key for key, value in identity.items() if seen.get(key) != value), None)
        if differs is not None:
            raise ValueError(
                f"checkpoint: {self.path} is that of another evaluation, of which {differs} differs; give another "
                "file, or remove it to begin again"
            )
        if whole < len(content):
            os.truncate(self.path, whole)

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> Any:
        return self.found[key]

    def put(self, key: str, value: Any) -> None:
        """Keep a finding."""
        self.found[key] = value
        if self.path is not None:
            self._write({"key": key, "value": value})

    def _write(self, line: dict[str, Any]) -> None:
        assert self.path is not None
        # In ASCII: no character of a text can be taken for the end of a line.
        with open(self.path, "a", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")
