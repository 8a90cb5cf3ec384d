"""How a model is run and what of it is looked at: the settings that `collect` and all fits share.

Users write settings as keyword arguments; `takes` turns these into one object, which travels whole. Needs no torch, so
that the command line can ask for names and defaults.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

from .._checks import as_choice, as_flag, as_int
from .._names import near_names
from ..arrays.samples import MEMORY
from ..maps.metadata import POOLINGS, Layers, Selection, check_tokens

# What metadata of maps have elsewhere, or cannot hold.
_NOT_RECORDED = {
    *("layers", "loss_layers", "pooling", "tokens", "penalties", "n_penalties", "min_ratio"),
    *("tokenizer", "forward", "progress", "memory", "held_out", "keep", "gates", "init", "on_top_of", "checkpoint"),
    "process_group",
}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Which modules are fitted, and how the model is run.

    Parameters
    ----------
    layers : str, list[str] or re.Pattern, optional
        Modules that maps sit on: a glob for the full dotted name (``*`` stops at dots, ``**`` crosses them), a list of
        globs, or a compiled regular expression. A glob that matches more than 100 modules, or modules inside one
        another, must be in a list. Default: those that `lineas.sites` suggests, which are named at the start.
    tokenizer : transformers tokenizer, optional
        For texts and conversations. One without a pad token is left as it is; the padding is done here.
    max_length : int, optional
        Longest prompt in tokens; longer ones are cut. Default: no limit.
    batch_size : int, optional
        Prompts in a forward pass, in every set. Default: 32 texts, and batches that you made as they are.
    forward : callable, optional
        ``forward(model, batch)`` calls the model where ``model(**batch)``, ``model(batch)`` and ``model(*batch)`` do
        not fit.
    pooling : {"mean", "min", "max", "last", "all"}, default "mean"
        Over the tokens under the attention mask. "all" keeps each of them as a sample of its own;
        `lineas.collect_quantiles` takes more of these than memory holds.
    tokens : "all", "last", "prompt", "generated", slice or callable, default "all"
        The tokens that maps act on, and over which activations are pooled: what is fitted is what the maps meet when
        they are attached (of a module that runs several times in a forward pass, at its first call). See
        `SteeringMaps.attach`, which acts on the same tokens by default, since the metadata name
        them. In a prompt "last" is its last token. "generated" are the answers of conversations that end with one
        of the assistant, and "prompt" is what stands before them; in all other prompts "generated" is none and refused.
        ``pooling="last"`` takes the last one of the selected tokens. Outputs without tokens, such as images, allow
        "all" only.
    progress : bool, default True
        Show a progress bar.
    """

    layers: Layers | None = None
    tokenizer: Any = None
    max_length: int | None = None
    batch_size: int | None = None
    forward: Callable[[Any, Any], Any] | None = None
    pooling: str = "mean"
    tokens: Selection = "all"
    progress: bool = True

    def __post_init__(self) -> None:
        self._set(
            max_length=optional(as_int, self.max_length, "max_length", low=1),
            batch_size=optional(as_int, self.batch_size, "batch_size", low=1),
            pooling=as_choice(self.pooling, "pooling", POOLINGS),
            tokens=check_tokens(self.tokens),
            progress=as_flag(self.progress, "progress"),
            tokenizer=optional(as_tokenizer, self.tokenizer, "tokenizer"),
        )
        if self.forward is not None and not callable(self.forward):
            raise TypeError(f"forward must be a function of model and batch, got {type(self.forward).__name__}")

    @property
    def selection(self) -> dict[str, Any]:
        """What of the activations is looked at, which metadata of maps and activations keep beside the layers."""
        return {"pooling": self.pooling, "tokens": self.tokens}

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def record(self) -> dict[str, Any]:
        """The settings that the metadata of maps keep, as JSON has them."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _NOT_RECORDED}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class QuantilesSettings(RunSettings):
    """Settings of `lineas.collect_quantiles`.

    Parameters
    ----------
    memory : int, default 2**30
        Bytes for the values kept of all modules together, at least 2048 for each neuron. While all rows fit, everything
        is exact.
    """

    memory: int = MEMORY

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(memory=as_int(self.memory, "memory", low=1))


def as_tokenizer(value: Any, name: str) -> Any:
    """`value`; TypeError if it cannot be called as a tokenizer is, such as the name of one, or its class."""
    if isinstance(value, type) or not callable(value):
        got = value if isinstance(value, type) else type(value).__name__
        raise TypeError(
            f"{name} must be a loaded tokenizer, such as transformers.AutoTokenizer.from_pretrained(name), got {got}"
        )
    return value


def optional(check: Callable[..., Any], value: Any, name: str, **bounds: Any) -> Any:
    """`value` as `check` gives it, or None."""
    return None if value is None else check(value, name, **bounds)


# --- from keyword arguments to settings -------------------------------------------------------------------------------

P = ParamSpec("P")
S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)
R = TypeVar("R")


class _Taker(Protocol[P, S_co]):
    """What makes a function of settings one of keyword arguments; for type checkers and editors."""

    @overload
    def __call__(self, function: Callable[[Any, Any, S_co], R], /) -> Callable[Concatenate[Any, Any, P], R]: ...
    @overload
    def __call__(
        self, function: Callable[[Any, Any, Any, S_co], R], /
    ) -> Callable[Concatenate[Any, Any, Any, P], R]: ...


def takes(settings: Callable[P, S]) -> _Taker[P, S]:
    """Let callers write the settings, the last parameter of a function, as keyword arguments.

    Signature and description show all of them: the descriptions of the settings, and of the classes they come from,
    stand where the function's own description says ``**settings``; a class that describes a setting anew has its way.
    """
    cls = cast(type, settings)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        leading = list(inspect.signature(function).parameters.values())[:-1]
        signature = inspect.Signature([*leading, *inspect.signature(cls).parameters.values()])
        names = [parameter.name for parameter in leading]

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if len(args) > len(names):
                raise TypeError(
                    f"{function.__name__}() takes only {', '.join(names)} by position, got {len(args)} positional "
                    "arguments: settings are given by name, such as layers=..."
                )
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                unknown = next((name for name in kwargs if name not in signature.parameters), None)
                near = [] if unknown is None else near_names(unknown, signature.parameters)
                hint = f" (similar: {', '.join(near)})" if near else ""
                raise TypeError(f"{function.__name__}() {error}{hint}") from None
            return function(*(given.pop(name) for name in names), cls(**given))

        wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
            return_annotation=inspect.signature(function).return_annotation
        )
        if function.__doc__ is not None:  # there is none under -OO
            texts = [inspect.cleandoc(base.__doc__ or "") for base in reversed(cls.__mro__[:-1])]
            described: dict[str, str] = {}  # by the line of names before the colon
            for text in texts:
                for entry in re.split(r"\n(?=\S)", text.partition("----------\n")[2].strip()):
                    described[entry.partition(" : ")[0]] = entry
            fixed = {field.name for field in fields(cls) if not field.init}
            entries = "\n".join(entry for name, entry in described.items() if name not in fixed)
            wrapper.__doc__ = inspect.cleandoc(function.__doc__).replace("**settings", entries, 1)
        return wrapper

    return cast("_Taker[P, S]", decorate)
