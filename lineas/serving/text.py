"""Text out of tokens, one by one: whole characters only, and none of what may turn out to be a stop sequence."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ..inputs.prompts import read
from ..inputs.tokenize import TokenRows
from .errors import ApiError, refuse

Decode = Callable[[Sequence[int]], str]
CONTEXT = 6
"""Tokens of a prompt that its continuation is decoded with: some decoders drop the space before the first one."""
_INCOMPLETE = "\ufffd"  # what a character decodes to of which tokens are missing


class Codec:
    """A tokenizer for several threads at a time.

    Those of transformers are not safe there: to encode sets padding and truncation in the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None) -> None:
        self.tokenizer, self.vocabulary, self._lock = tokenizer, vocabulary, threading.Lock()
        self.chats = bool(getattr(tokenizer, "chat_template", None))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        with self._lock:
            return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def show(self, token: int) -> str:
        """The text of one token, special or not."""
        with self._lock:
            return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def encode(self, prompt: str | list[int], param: str) -> list[int]:
        """The tokens of a prompt, which may have come as such; ApiError where there are none, or none of the model."""
        if not len(prompt):
            raise refuse(param, f"{param} must not be empty")
        if isinstance(prompt, str):
            _check_text(prompt, param)
            with self._lock:
                rows = read([prompt], param, tokenizer=self.tokenizer).made
            assert isinstance(rows, TokenRows)
            return rows.columns["input_ids"][0]
        wrong = next((one for one in prompt if one < 0 or (self.vocabulary or one + 1) <= one), None)
        if wrong is not None:
            raise refuse(param, f"{param} must hold tokens from 0 to {(self.vocabulary or 0) - 1}, got {wrong}")
        return prompt

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a conversation, and the start of the answer; ApiError where the chat template refuses it."""
        if not self.chats:
            name = type(self.tokenizer).__name__
            raise refuse("messages", f"messages: {name} has no chat template; ask for /v1/completions instead")
        for k, message in enumerate(messages):
            _check_text(message["content"], f"messages[{k}].content")
        from jinja2 import TemplateError

        try:
            with self._lock:
                found = self.tokenizer.apply_chat_template(
                    list(messages), tokenize=True, add_generation_prompt=True, return_dict=True
                )
        except TemplateError as error:
            raise refuse("messages", f"messages: the model's chat template refuses them: {error}") from None
        ids = list(found["input_ids"])
        if not ids:
            raise ApiError(400, "messages: the chat template makes no tokens of them", param="messages")
        return ids


def _check_text(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refuse(param, f"{param} is no text: {error.reason} at character {error.start}") from None


class Text:
    """The text of a continuation, token by token."""

    def __init__(self, decode: Decode, before: Sequence[int] = (), stop: Collection[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._ids = list(before)
        # What is decoded begins at `_start`; the tokens before `_read` have become text.
        self._start, self._read = 0, len(self._ids)
        self._text, self._given = "", 0
        self.stopped = False

    @property
    def length(self) -> int:
        """Characters so far, with those that are held back."""
        return len(self._text)

    def add(self, token: int) -> str:
        """What one more token lets be said for sure."""
        self._ids.append(token)
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._grow(now[len(before) :])

    def end(self) -> str:
        """What was held back, now that no token follows."""
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        self._read = len(self._ids)
        said = self._grow(now[len(before) :])
        rest = self._text[self._given :]
        self._given = len(self._text)
        return said + rest

    def _grow(self, piece: str) -> str:
        if self.stopped:
            return ""
        first = max(0, len(self._text) - self._longest + 1)
        self._text += piece
        found = [at for stop in self._stop if (at := self._text.find(stop, first)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
        ready = len(self._text) if self.stopped else len(self._text) - self._open()
        said, self._given = self._text[self._given : ready], max(ready, self._given)
        return said

    def _open(self) -> int:
        """Characters at the end with which a stop sequence may begin."""
        longest = min(self._longest - 1, len(self._text))
        return next((k for k in range(longest, 0, -1) if any(s.startswith(self._text[-k:]) for s in self._stop)), 0)
