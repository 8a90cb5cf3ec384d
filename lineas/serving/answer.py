"""One request: its job for the engine, and the answer, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from . import requests
from .engine import Event, Job
from .errors import ApiError, refuse
from .generation import Piece, Sampling
from .loaded import Loaded
from .replies import DONE, Reply, sse, usage_of

WITHOUT_CONTEXT = 2048
"""Tokens of an answer at most where neither the request nor the model says."""
_T = TypeVar("_T")


def _sampling(body: requests.Request, prompts: Sequence[Sequence[int]], context: int | None) -> Sampling:
    """How the texts of a request are made; ApiError where prompt and text do not fit into the model's context."""
    longest = max(map(len, prompts))
    asked, field = body.length
    where = "messages" if isinstance(body, requests.ChatRequest) else "prompt"
    if context is not None and longest >= context:
        message = f"{where} has {longest} tokens, and the model's context length is {context}: no room for an answer"
        raise refuse(where, message, "context_length_exceeded")
    room = None if context is None else context - longest
    if room is not None and asked is not None and asked > room:
        message = f"{field} must be at most {room}, got {asked}: the prompt has {longest} tokens of {context}"
        raise refuse(field, message, "context_length_exceeded")
    most = WITHOUT_CONTEXT if room is None else room
    return Sampling(
        max_tokens=asked or min(body.usual_length or most, most),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=random.SystemRandom().randrange(2**31) if body.seed is None else body.seed,
        stop=body.stop,
        logprobs=body.likeliest,
    )


async def answer(
    loaded: Loaded, body: requests.Request, request: Request, encode: Callable[[], list[list[int]]]
) -> Response:
    """The answer to a request, whole or as a stream; a client that goes away ends its generation."""
    strengths, chat = loaded.applied(body), isinstance(body, requests.ChatRequest)
    prompts = await asyncio.to_thread(encode)
    sampling = _sampling(body, prompts, loaded.engine.context_length)
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def emit(event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(queue.put_nowait, event)

    job = Job(prompts, sampling, strengths, choices=body.n or 1, continues=not chat, emit=emit)
    loaded.engine.submit(job)
    reply = Reply(body.model, chat=chat, scored=sampling.logprobs is not None)
    made: dict[int, int] = {}
    pieces = _pieces(queue, made)
    prompt_tokens = sum(map(len, prompts))
    try:
        if not body.stream:
            found = await _unless_gone(request, _collect(pieces))
            applied = {"strengths": strengths, "seed": sampling.seed}
            return JSONResponse(reply.whole(found, usage_of(prompt_tokens, made), applied))
        # Errors before the first token have a status of their own.
        first = await _unless_gone(request, anext(pieces))
    except BaseException:
        job.cancel()
        raise
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)

    async def events() -> AsyncIterator[str]:
        for chunk in reply.chunks(first, usage=usage):
            yield sse(chunk)
        try:
            async for piece in pieces:
                for chunk in reply.chunks(piece, usage=usage):
                    yield sse(chunk)
        except ApiError as error:
            yield sse(error.body())
            return
        if usage:
            yield sse(reply.usage_chunk(usage_of(prompt_tokens, made)))
        yield DONE

    return _Stream(events(), job)


async def _pieces(queue: asyncio.Queue[Event], made: dict[int, int]) -> AsyncIterator[Piece]:
    """The pieces of a job, while the tokens that were `made` of each choice are counted."""
    while (event := await queue.get()) is not None:
        if isinstance(event, ApiError):
            raise event
        made[event.index] = event.tokens
        yield event


async def _collect(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _unless_gone(request: Request, awaited: Awaitable[_T]) -> _T:
    """What is awaited, unless the client goes away first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(awaited), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "the client went away")
        return work.result()
    finally:
        for task in (work, left):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class _Stream(StreamingResponse):
    """A stream of events that ends its job whenever it ends."""

    def __init__(self, events: AsyncIterator[str], job: Job) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()
