"""The demo (``lineas demo``) and its sentences; `run` and `model` need torch and transformers."""

from __future__ import annotations

from importlib import resources

__all__ = ["sentences"]


def sentences(name: str) -> list[str]:
    """Read one of the text files in ``lineas/demo/data``, one string a line."""
    return (resources.files("lineas.demo") / "data" / name).read_text(encoding="utf-8").splitlines()
