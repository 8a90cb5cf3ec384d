"""The maps of an engine by name: where they are given, and which of them a server of batches can apply."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ...maps.digest import digest
from ...maps.files import load
from ...maps.metadata import fitted_tokens, show_tokens
from ...maps.steering import SteeringMaps
from .requests import KEY, Strengths

VARIABLE = "LINEAS_VLLM_MAPS"


def paths(additional_config: Any) -> dict[str, str]:
    """Files or folders of maps by name, of the environment variable and of vLLM's ``additional_config``.

    The variable ``LINEAS_VLLM_MAPS`` holds ``name=path`` pairs with commas between them, the configuration
    ``{"lineas": {"maps": {name: path}}}``. A process gets both from the one that starts it. TypeError or ValueError
    where they are something else, or a name is given twice.
    """
    found = dict(_of_variable(os.environ.get(VARIABLE, "")))
    configured = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if configured is None:
        return found
    what = f"additional_config[{KEY!r}]"
    maps = configured.get("maps") if isinstance(configured, Mapping) else None
    if not isinstance(maps, Mapping) or len(configured) != 1:
        raise TypeError(f'{what} must be {{"maps": {{name: path}}}}, got {configured!r}')
    for name, path in maps.items():
        if not isinstance(name, str) or not name or not isinstance(path, str) or not path:
            raise TypeError(f"{what}: names and paths must be strings that are not empty, got {name!r}: {path!r}")
        if name in found:
            raise ValueError(f"{what}: {VARIABLE} names maps {name!r} as well")
        found[name] = path
    return found


def _of_variable(text: str) -> Iterator[tuple[str, str]]:
    seen = set()
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = (part.strip() for part in entry.partition("="))
        if not (name and equals and path):
            raise ValueError(f"{VARIABLE} must be name=path pairs with commas between them, got {entry!r}")
        if name in seen:
            raise ValueError(f"{VARIABLE} names maps {name!r} twice")
        seen.add(name)
        yield name, path


class Catalogue(Mapping[str, SteeringMaps]):
    """Maps by name, read and checked.

    Raises
    ------
    OSError
        If a file cannot be read.
    TypeError, ValueError
        If it holds no maps, or maps that depend on more than the token that they act on; the message has the name.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self._maps: dict[str, SteeringMaps] = {}
        for name, path in files.items():
            try:
                self._maps[name] = _checked(load(path))
            except (OSError, TypeError, ValueError) as error:
                # Not the error's own type: some of the operating system's take a number and a text.
                raise (OSError if isinstance(error, OSError) else ValueError)(f"maps {name!r}: {error}") from error
        self._digests = {name: digest(maps) for name, maps in self._maps.items()}

    def __getitem__(self, name: str) -> SteeringMaps:
        return self._maps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def salt(self, strengths: Strengths, salt: str | None) -> str:
        """What must be equal for requests to share what was computed of a prompt, the salt of the request included."""
        parts = [[self._digests[name], strength.hex()] for name, strength in strengths.items()]
        return f"lineas-{hashlib.sha256(json.dumps([parts, salt]).encode()).hexdigest()}"


def _checked(value: Any) -> SteeringMaps:
    """The maps in what a file held; TypeError or ValueError where a batch of requests cannot take them."""
    maps = value if isinstance(value, SteeringMaps) else getattr(value, "maps", None)
    if not isinstance(maps, SteeringMaps):
        raise TypeError(f"the file holds no maps, but a {type(value).__name__}")
    if maps.gates:
        raise ValueError(
            "they have gates, which the plugin does not compute; maps.gated(None) takes them off, maps.attach(model) "
            "applies them with transformers"
        )
    tokens = fitted_tokens(maps.metadata)
    if tokens != "all":
        raise ValueError(
            f"they were fitted for {show_tokens(tokens)}, and the plugin maps all tokens; maps for all tokens are "
            "lineas.SteeringMaps(dict(maps)), which forgets what they were fitted for"
        )
    return maps
