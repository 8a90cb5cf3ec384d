"""The server's application: OpenAI's routes, what is loaded, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware

from .._checks import as_int
from ..hooks.modules import model_name
from ..maps.metadata import as_strength
from ..maps.steering import SteeringMaps
from . import requests
from .answer import answer
from .engine import Engine
from .errors import answer_errors
from .guard import Guard
from .loaded import JOIN, Loaded

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_PAGE = (
    ("", "page.html", "text/html"),
    ("page.css", "page.css", "text/css"),
    ("page.js", "page.js", "text/javascript"),
)


def name_of(model: Any) -> str:
    """What to call a model: its hub id, or the name of its folder."""
    name = model_name(model) or "model"
    return Path(name).resolve().name if Path(name).is_dir() or Path(name).is_absolute() else name


def create_app(
    model: Any,
    tokenizer: Any,
    maps: Mapping[str, SteeringMaps],
    *,
    name: str | None = None,
    strength: float | str = 1.0,
    concurrency: int = 4,
    allow_hosts: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
) -> FastAPI:
    """An ASGI application that serves a model with maps as OpenAI's API does.

    The maps are put on the model at strength 0 at once, and taken off when the application ends. What a request asks
    for holds for that request alone. ``app.state.engine`` has the `Engine`.

    Parameters
    ----------
    model : transformers model
        A causal language model.
    tokenizer : transformers tokenizer
        Of the model; chats need its chat template.
    maps : mapping from str to SteeringMaps
        By name. They act one after the other, in this order.
    name : str, optional
        What clients call the model. Default: its hub id, or the name of its folder.
    strength : float or "calibrated", default 1.0
        Of maps where a request does not say it; "calibrated" is what `SteeringMaps.calibrate` noted.
    concurrency : int, default 4
        Requests that generate at the same time, token by token in turns.
    allow_hosts : sequence of str
        Names that the server is reached by, besides localhost, this machine's name, and addresses.
    allow_origins : sequence of str
        Origins of web pages that may use it, such as ``http://localhost:3000``, besides the server's own page.

    Returns
    -------
    fastapi.FastAPI

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    ValueError
        If a name cannot be part of a model's name, maps do not fit the model or were not calibrated, or an origin is
        none.
    """
    as_int(concurrency, "concurrency", low=1)
    strengths = {}
    for key, one in maps.items():
        check_name(key)
        try:
            strengths[key] = as_strength(strength, one.metadata)
        except ValueError as error:
            raise ValueError(f"{error} (the maps {key!r})") from None
    for origin in allow_origins:
        scheme, _, host = origin.partition("://")
        if scheme not in ("http", "https") or not host or "/" in host or "*" in host:
            raise ValueError(f"allow_origin must be such as http://localhost:3000, got {origin!r}")
    engine = Engine(model, tokenizer, maps, concurrency=concurrency)
    loaded = Loaded(engine, name or name_of(model), dict(maps), strengths)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(title="lineas", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.engine, app.state.loaded = engine, loaded
    if allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(allow_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(Guard, hosts=allow_hosts, origins=allow_origins)
    answer_errors(app)
    _add_routes(app, loaded)
    _add_page(app)
    return app


def check_name(name: str) -> None:
    """ValueError where maps cannot be called so."""
    if not name or JOIN in name or not name.isprintable() or any(map(str.isspace, name)):
        raise ValueError(f"maps must have names without spaces and {JOIN!r}, got {name!r}: give them as NAME=FILE")


def _add_routes(app: FastAPI, loaded: Loaded) -> None:
    def entry(model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": 0, "owned_by": "lineas"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry(one) for one in loaded.models]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        loaded.of_model(model)
        return entry(model)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests": loaded.engine.jobs}

    @app.get("/lineas")
    async def describe() -> dict[str, Any]:
        return loaded.describe()

    @app.post("/v1/completions")
    async def completions(body: requests.CompletionRequest, request: Request) -> Response:
        several = len(body.prompt) > 1

        def encode() -> list[list[int]]:
            names = (f"prompt[{k}]" if several else "prompt" for k in range(len(body.prompt)))
            return [loaded.engine.codec.encode(one, name) for one, name in zip(body.prompt, names, strict=True)]

        return await answer(loaded, body, request, encode)

    @app.post("/v1/chat/completions")
    async def chat(body: requests.ChatRequest, request: Request) -> Response:
        return await answer(loaded, body, request, lambda: [loaded.engine.codec.render(body.messages)])


def _add_page(app: FastAPI) -> None:
    here = Path(__file__).parent
    headers = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}

    def add(path: str, file: str, kind: str) -> None:
        content = here.joinpath(file).read_bytes()

        @app.get(f"/{path}")
        async def page() -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)

    for path, file, kind in _PAGE:
        add(path, file, kind)
