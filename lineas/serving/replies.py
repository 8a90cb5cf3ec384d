"""What clients get: completions, chats and their streams, as OpenAI's API has them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .generation import Piece, Scored

DONE = "data: [DONE]\n\n"


def sse(data: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class Reply:
    """The answer to one request, whole or in pieces; with log-probabilities if `scored`."""

    def __init__(self, model: str, *, chat: bool, scored: bool) -> None:
        self.chat, self.scored = chat, scored
        self._facts = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._begun: set[int] = set()

    def whole(self, pieces: Iterable[Piece], usage: Mapping[str, Any], applied: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request that is not streamed; `applied` says what the maps and the seed were."""
        of_choice: dict[int, list[Piece]] = {}
        for piece in pieces:
            of_choice.setdefault(piece.index, []).append(piece)
        choices = [self._choice(of_choice[index]) for index in sorted(of_choice)]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._facts, "object": kind, "choices": choices, "usage": usage, "lineas": applied}

    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        facts = self._logprobs([one for piece in pieces for one in piece.scored]) if self.scored else None
        made = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {"index": pieces[0].index, **made, "logprobs": facts, "finish_reason": pieces[-1].finish}

    def chunks(self, piece: Piece, *, usage: bool) -> list[dict[str, Any]]:
        """What a piece becomes in a stream that ends with the usage if `usage`."""
        facts = self._logprobs(piece.scored) if piece.scored else None
        common = {"index": piece.index, "logprobs": facts}
        if not self.chat:
            return [self._chunk([{**common, "text": piece.text, "finish_reason": piece.finish}], usage)]
        found = []
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            start = {"index": piece.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            found.append(self._chunk([start], usage))
        if piece.text or facts:
            found.append(self._chunk([{**common, "delta": {"content": piece.text}, "finish_reason": None}], usage))
        if piece.finish:
            end = {"index": piece.index, "delta": {}, "finish_reason": piece.finish}
            found.append(self._chunk([end], usage))
        return found

    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The end of a stream with the usage."""
        return {**self._chunk([], True), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]], usage: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._facts, "object": kind, "choices": choices, **({"usage": None} if usage else {})}

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        if self.chat:
            return {"content": [_scored(one) for one in scored], "refusal": None}
        return {
            "tokens": [one.text for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": [{**dict(one.likeliest), one.text: one.logprob} for one in scored],
            "text_offset": [one.offset for one in scored],
        }


def _scored(one: Scored) -> dict[str, Any]:
    likeliest = [_token(text, logprob) for text, logprob in one.likeliest]
    return {**_token(one.text, one.logprob), "top_logprobs": likeliest}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # A part of a character has no text of its own, and its bytes are not known here.
    parts = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": parts}


def usage_of(prompt_tokens: int, made: Mapping[int, int]) -> dict[str, int]:
    """Numbers of tokens; `made` by choice."""
    completion = sum(made.values())
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
    }
