"""Why maps cannot go into weights, files or adapters: collected for all of them before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping


class Refusal(ValueError):
    """Why one map cannot be folded or written."""


IN_MODEL = "changed; maps.attach(model) applies all of them, and maps.select([...]) picks others"
IN_FILE = "written; maps.select([...]) picks others"


def refuse(refused: Mapping[str, str], total: int, what: str, instead: str) -> None:
    """One ValueError that names every module of `refused` and why; nothing where there is none.

    `what` is what cannot be done to the maps; `instead`, `IN_MODEL` or `IN_FILE`, what was not done and what can be.
    """
    if refused:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"{len(refused)} of {total} maps cannot be {what}, and nothing was {instead}:\n{reasons}")
