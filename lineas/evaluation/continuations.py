"""Continuations of prompts, by the model's own ``generate``: the same random numbers at every point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .._checks import as_int
from ..inputs.call import call, unwrap
from ..inputs.tokenize import is_conversation
from ..maps.metadata import name_of
from .judges import score
from .metrics import ngram_statistics
from .points import Point
from .result import STATISTICS
from .texts import Texts, as_list, check_kinds, with_instruction

SAMPLING: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "top_k": 0, "temperature": 1.0}
"""How continuations are sampled unless something else is said."""
_NO_SAMPLING = ("input_ids", "inputs", "attention_mask", "max_new_tokens", "max_length", "num_return_sequences",
                "return_dict_in_generate")  # fmt: skip


class Continuation(NamedTuple):
    """A text that a model wrote, and `STATISTICS` of it."""

    text: str
    statistics: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How prompts are continued: what `lineas.evaluate` and `SteeringMaps.calibrate` describe under the same names.

    TypeError or ValueError for a setting of a wrong type or out of range.
    """

    samples: int
    max_length: int | None
    max_new_tokens: int
    batch_size: int
    sampling: Mapping[str, Any] | None
    seed: int

    def __post_init__(self) -> None:
        if self.sampling is not None and not isinstance(self.sampling, Mapping):
            raise TypeError(f"sampling must be a mapping of arguments for generate, got {type(self.sampling).__name__}")
        for name, low in (("seed", 0), ("samples", 1), ("batch_size", 1), ("max_new_tokens", 1), ("max_length", 1)):
            value = getattr(self, name)
            value = None if name == "max_length" and value is None else as_int(value, name, low=low)
            object.__setattr__(self, name, value)


class Generator:
    """Continues prompts in batches of prompts of much the same length.

    The random numbers of a batch depend on the seed and on its number alone: torch draws one number for every entry of
    the vocabulary, so that points whose distributions differ little give mostly the same tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        tokenizer: Any,
        settings: GenerationSettings,
        generate: Callable[[nn.Module, list[Any]], Sequence[str]] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.generate = model, tokenizer, generate
        self.samples, self.max_new_tokens, self.seed = settings.samples, settings.max_new_tokens, settings.seed
        sampling = settings.sampling or {}
        self.encodes = getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False) is True
        self.options = {**(SAMPLING if sampling.get("do_sample", True) else {}), **sampling}
        for name in _NO_SAMPLING:
            if name in sampling:
                raise ValueError(f"sampling must not hold {name!r}: see prompts=, samples= and max_new_tokens=")
        self.texts: Texts | None = None
        if generate is not None:
            self.prompts = check_kinds(as_list(data), "prompts")
            sizes = [len(str(prompt)) for prompt in self.prompts]
        else:
            if not callable(getattr(model, "generate", None)):
                raise TypeError(f"prompts: {type(unwrap(model)).__name__} has no generate(): pass generate=")
            if not callable(getattr(tokenizer, "decode", None)):
                raise ValueError("prompts: pass tokenizer=, which makes texts of the tokens that the model writes")
            self.texts = Texts(data, "prompts", tokenizer=tokenizer, max_length=settings.max_length)
            if self.texts.rows.prompt_lengths is not None:
                raise ValueError(
                    "prompts: a conversation ends with an answer of the assistant: leave it out, the model is to "
                    "write it"
                )
            self.prompts, sizes = self.texts.given, [len(ids) for ids in self.texts.ids]
        order = [k for k in sorted(range(len(sizes)), key=sizes.__getitem__) for _ in range(settings.samples)]
        size = settings.batch_size
        self.batches = [order[start : start + size] for start in range(0, len(order), size)]
        """Numbers of prompts, each as often as it is continued."""

    def contents(self) -> Any:
        """Everything that what is written depends on, beside model and point; a callable counts by its name."""
        prompts = self.prompts if self.texts is None else self.texts.contents()
        how = repr(sorted(self.options.items())) if self.generate is None else name_of(self.generate)
        return [prompts, self.batches, self.max_new_tokens, how, self.seed]

    def prefixed(self, instruction: str) -> None:
        """Put an instruction before the prompts, so that its errors come at once."""
        if self.texts is None:
            with_instruction(instruction, self.prompts)
        else:
            self.texts.after(instruction)

    def run(self, point: Point, batch: int) -> list[Continuation]:
        """A continuation for each entry of a batch; the state of torch's random numbers is the caller's to keep."""
        rows = self.batches[batch]
        torch.manual_seed(int(np.random.SeedSequence([self.seed, batch]).generate_state(1)[0]))
        with point.on(self.model):
            if self.texts is None:
                return self._by_caller(point, rows)
            made = self.texts.after(point.instruction)
            # A decoder goes on where a prompt ends; an encoder is given prompts as its tokenizer pads them.
            given = (made if self.encodes else replace(made, left=True)).batch(rows)
            tokens = call(self.model, given, self._generate)
        start = 1 if self.encodes else given.kwargs["input_ids"].shape[1]
        return [self._continuation(ids) for ids in tokens[:, start:].tolist()]

    def _generate(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        ends, pad = self._ends(), getattr(self.tokenizer, "pad_token_id", None)
        usual = {"pad_token_id": ends[0] if pad is None and ends else pad}
        settled = {"num_return_sequences": 1, "return_dict_in_generate": False, "max_new_tokens": self.max_new_tokens}
        return model.generate(**inputs, **{**usual, **self.options, **settled})

    def _continuation(self, ids: list[int]) -> Continuation:
        ends = self._ends()
        end = next((k for k, token in enumerate(ids) if token in ends), None)
        kept = ids if end is None else ids[:end]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Continuation(text, _statistics(kept, float(end is not None)))

    def _by_caller(self, point: Point, rows: Sequence[int]) -> list[Continuation]:
        assert self.generate is not None
        prompts = [self.prompts[k] for k in rows]
        if point.instruction is not None:
            prompts = with_instruction(point.instruction, prompts)
        texts = self.generate(self.model, prompts)
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise TypeError(f"generate must return a list of texts, got {type(texts).__name__}")
        texts = list(texts)
        if len(texts) != len(prompts) or not all(isinstance(text, str) for text in texts):
            kinds = ", ".join(sorted({type(text).__name__ for text in texts}))
            raise ValueError(
                f"generate must return one text a prompt: expected {len(prompts)}, got {len(texts)} of type {kinds}"
            )
        return [Continuation(text, _statistics(self._words(text), float("nan"))) for text in texts]

    def _words(self, text: str) -> list[int]:
        """The tokens of a text, or without a tokenizer its words, as numbers."""
        if self.tokenizer is not None:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        words = text.split()
        numbers = {word: k for k, word in enumerate(dict.fromkeys(words))}
        return [numbers[word] for word in words]

    def _ends(self) -> list[int]:
        """Ids of the tokens that end a text."""
        settings = getattr(self.model, "generation_config", None)
        ends = self.options.get("eos_token_id", getattr(settings, "eos_token_id", None))
        if ends is None:
            ends = getattr(self.tokenizer, "eos_token_id", None)
        return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]


def try_judges(judges: Mapping[str, Any], prompts: Sequence[Any]) -> None:
    """Let judges score the first two prompts, so that those that fail do so before anything is generated."""
    texts = []
    for prompt in prompts[:2]:
        content = prompt[-1].get("content") if is_conversation(prompt) else prompt
        texts.append(content if isinstance(content, str) else "")
    for name, judge in judges.items():
        score(name, judge, texts, prompts[:2])


def _statistics(ids: Sequence[int], stopped: float) -> tuple[float, ...]:
    ngrams = ngram_statistics(ids)
    return float(len(ids)), stopped, *(ngrams[name] for name in STATISTICS[2:])
