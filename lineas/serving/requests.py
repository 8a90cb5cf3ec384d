"""What clients send: OpenAI's fields, those that are refused or without effect here, and the field ``lineas``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from .._checks import as_finite, is_number
from .errors import refuse, shown

_NOTHING: tuple[Any, ...] = (None,)
# Fields that change nothing about a text.
_IDLE = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Fields that are not supported, with the values that ask for nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "audio": _NOTHING,
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": _NOTHING,
    "presence_penalty": (None, 0),
    "reasoning_effort": _NOTHING,
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": _NOTHING,
    "web_search_options": _NOTHING,
}
_ONLY_COMPLETIONS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
}


def _maps(value: Any) -> list[str] | None:
    if value is None or isinstance(value, str):
        return value if value is None else [value]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise refuse("lineas.maps", f"lineas.maps must be a name or a list of names, got {shown(value)}")
    return list(dict.fromkeys(value))


def _strength(value: Any) -> float | dict[str, float] | None:
    if isinstance(value, dict):
        return {name: _finite(one, f"lineas.strength.{name}") for name, one in value.items()}
    return None if value is None else _finite(value, "lineas.strength")


def _finite(value: Any, param: str) -> float:
    if not is_number(value):
        raise refuse(param, f"{param} must be a number, got {shown(value)}")
    try:
        return as_finite(value, param)
    except ValueError as error:
        raise refuse(param, str(error)) from None


def _stop(value: Any) -> tuple[str, ...]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise refuse("stop", f"stop must be a text that is not empty, or a list of such texts, got {shown(value)}")
    return tuple(found)


def _prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or a list of tokens."""

    def is_tokens(one: Any) -> bool:
        return isinstance(one, list) and all(type(token) is int for token in one)

    if isinstance(value, str) or (is_tokens(value) and value):
        return [value]
    if not isinstance(value, list) or not value:
        raise refuse("prompt", f"prompt must be a text, a list of tokens, or a list of them, got {shown(value)}")
    wrong = next((k for k, one in enumerate(value) if not isinstance(one, str) and not is_tokens(one)), None)
    if wrong is not None:
        param = f"prompt[{wrong}]"
        raise refuse(param, f"{param} must be a text or a list of tokens, got {shown(value[wrong])}")
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    """Messages with their contents as texts."""
    if not isinstance(value, list) or not value:
        raise refuse("messages", f"messages must be a list of at least one message, got {shown(value)}")
    return [_message(one, f"messages[{k}]") for k, one in enumerate(value)]


def _message(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refuse(param, f"{param} must be an object with role and content, got {shown(value)}")
    role = value.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise refuse(f"{param}.role", f"{param}.role must be system, user or assistant, got {shown(role)}")
    if role == "tool" or value.get("tool_calls") or value.get("function_call"):
        raise refuse(param, f"{param}: tools are not supported")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_part(one, f"{param}.content[{k}]") for k, one in enumerate(content))
    if not isinstance(content, str):
        name = f"{param}.content"
        raise refuse(name, f"{name} must be a text or a list of parts of type text, got {shown(content)}")
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(value: Any, param: str) -> str:
    if not isinstance(value, dict) or value.get("type") != "text" or not isinstance(value.get("text"), str):
        raise refuse(param, f"{param} must be a text, as {{'type': 'text', 'text': ...}}, got {shown(value)}")
    return value["text"]


class Steering(BaseModel):
    """The field ``lineas``: which maps, and how strongly."""

    model_config = ConfigDict(extra="forbid", strict=True)
    maps: Annotated[list[str] | None, PlainValidator(_maps)] = None
    strength: Annotated[float | dict[str, float] | None, PlainValidator(_strength)] = None


class StreamOptions(BaseModel):
    """The field ``stream_options``."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Request(BaseModel):
    """What both kinds of requests share. Fields that are not known are errors: misspelt ones would steer nothing."""

    model_config = ConfigDict(extra="allow", strict=True)
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = _REFUSED

    model: str
    lineas: Steering | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...], PlainValidator(_stop)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def model_post_init(self, context: Any) -> None:
        """ApiError for a field that is unknown, or asks for what there is not."""
        for name, value in (self.model_extra or {}).items():
            if name in self.refused:
                if value not in self.refused[name]:
                    raise refuse(name, f"{name} is not supported, got {shown(value)}", "unsupported_parameter")
            elif name not in _IDLE:
                raise refuse(name, f"there is no field {name}", "unknown_parameter")
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "stream_options needs stream=true")

    @property
    @abstractmethod
    def likeliest(self) -> int | None:
        """Likeliest tokens to report with each token, None for no report."""

    @property
    def length(self) -> tuple[int | None, str]:
        """Tokens to make at most, None where it is not said, and the field that says it."""
        return self.max_tokens, "max_tokens"

    @property
    def usual_length(self) -> int | None:
        """What OpenAI makes of requests that do not say it; None for all that fit."""
        return None


class CompletionRequest(Request):
    """The body of ``/v1/completions``."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {**_REFUSED, **_ONLY_COMPLETIONS}
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    @property
    def usual_length(self) -> int | None:
        return 16


class ChatRequest(Request):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[dict[str, Any]], PlainValidator(_messages)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", "top_logprobs needs logprobs=true")

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def length(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return super().length
