"""One generation, by the model's own ``generate``: each text samples with a generator of its own, and may be stopped.

transformers samples with torch's global generator, which all threads share. Here the last of the logits processors
draws each token from a generator that belongs to the text alone, and leaves ``generate`` no other token to choose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from .text import CONTEXT, Codec, Text

GREEDY = 1e-4
"""Temperatures below are taken as 0: what is divided by them leaves float32."""
_LEAST = -9999.0  # for -inf, which JSON does not have


class NotFinite(Exception):
    """The model's logits are not finite, so there is nothing to choose a token by."""


@dataclass(frozen=True)
class Sampling:
    """How texts are made.

    Attributes
    ----------
    max_tokens : int
        Tokens of a text at most, at least 1.
    temperature : float
        0 takes the likeliest token each time.
    top_p : float
        From 0 to 1: the likeliest tokens that have this share of the probability are drawn from.
    seed : int
        Choice k draws with ``seed + k``.
    stop : tuple of str
        Texts that end a continuation, and are no part of it.
    logprobs : int, optional
        Likeliest tokens to report with each token; None reports nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability before temperature and top_p, and those of the likeliest ones."""

    text: str
    logprob: float
    offset: int  # characters of the choice before it
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """What was added to a choice."""

    index: int
    text: str
    tokens: int  # made so far
    finish: str | None  # "stop" or "length" in the last piece of a choice
    scored: list[Scored] = field(default_factory=list)


class _Choice:
    """One text that is being made."""

    def __init__(self, index: int, text: Text, sampling: Sampling, ends: set[int]) -> None:
        self.index, self.text, self.sampling, self.ends = index, text, sampling, ends
        self.tokens = 0
        self.finish: str | None = None

    def add(self, token: int, scored: Callable[[int], Scored]) -> Piece:
        """Go on with a token."""
        self.tokens += 1
        if token in self.ends:
            said, self.finish, facts = self.text.end(), "stop", []
        else:
            facts = [] if self.sampling.logprobs is None else [scored(self.text.length)]
            said = self.text.add(token)
            if self.text.stopped:
                self.finish = "stop"
            elif self.tokens == self.sampling.max_tokens:
                said += self.text.end()
                self.finish = "stop" if self.text.stopped else "length"
        return Piece(self.index, said, self.tokens, self.finish, facts)


class _Sampler(LogitsProcessor):
    """Draws the next tokens, and leaves each row that one alone."""

    def __init__(self, sampling: Sampling, rows: int, device: torch.device) -> None:
        self.sampling = sampling
        self.logprobs: Tensor | None = None
        # Seeds go round at the end of the integers that manual_seed takes.
        self._generators = [
            torch.Generator(device).manual_seed((sampling.seed + row) % 2**63)
            for row in range(rows if sampling.temperature >= GREEDY else 0)
        ]
        self._warpers: list[Any] = []
        if self._generators and sampling.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if self._generators and sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        best = scores.amax(dim=-1, keepdim=True)
        if not bool(best.isfinite().all()):
            raise NotFinite
        if self.sampling.logprobs is not None:
            self.logprobs = scores.log_softmax(dim=-1)
        if not self._generators:
            return scores
        # From 0 down, where no temperature makes infinities.
        scores = scores - best
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        probabilities = scores.softmax(dim=-1)
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probabilities, self._generators, strict=True)
        ]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.stack(drawn), 0.0)


class _Follower(StoppingCriteria):
    """Hands on what was made, and ends texts at stop sequences, or all of them when told to."""

    def __init__(
        self,
        choices: Sequence[_Choice],
        sampler: _Sampler,
        codec: Codec,
        emit: Callable[[Piece], None],
        go_on: Callable[[], bool],
    ) -> None:
        self.choices, self.sampler, self.codec, self.emit, self.go_on = choices, sampler, codec, emit, go_on

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        for row, (choice, token) in enumerate(zip(self.choices, input_ids[:, -1].tolist(), strict=True)):
            if choice.finish is None:
                piece = choice.add(token, partial(self._score, row, token))
                if piece.text or piece.scored or piece.finish:
                    self.emit(piece)
        over = [choice.finish is not None for choice in self.choices]
        if not all(over) and not self.go_on():
            over = [True] * len(over)
        return torch.tensor(over, device=input_ids.device)

    def _score(self, row: int, token: int, offset: int) -> Scored:
        assert self.sampler.logprobs is not None
        all_of_row = self.sampler.logprobs[row]
        values, ids = all_of_row.topk(min(self.sampler.sampling.logprobs or 0, len(all_of_row)))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        likeliest = tuple((self.codec.show(one), max(value, _LEAST)) for one, value in pairs)
        return Scored(self.codec.show(token), max(float(all_of_row[token]), _LEAST), offset, likeliest)


def generate(
    model: Any,
    codec: Codec,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    first: int = 0,
    choices: int = 1,
    continues: bool = False,
    emit: Callable[[Piece], None],
    go_on: Callable[[], bool],
) -> None:
    """Make continuations of a prompt, all at once.

    Parameters
    ----------
    model : transformers model
        With ``generate``; maps on it act as they are set in this thread.
    codec : Codec
        Of its tokenizer.
    prompt : sequence of int, [T]
        Tokens.
    sampling : Sampling
        How.
    first, choices : int, default 0 and 1
        The index of the first continuation, and how many of them.
    continues : bool, default False
        Whether the text goes on with that of the prompt, so that a space between them is a part of it.
    emit : callable
        Gets every `Piece`.
    go_on : callable
        Asked after every token but the last: False ends all of them. It may take its time.

    Raises
    ------
    NotFinite
        If the logits are not.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([list(prompt)] * choices, dtype=torch.long, device=device)
    config = _config(model, sampling, codec.tokenizer)
    ends = set(config.eos_token_id or ())
    before = prompt[-CONTEXT:] if continues else ()
    texts = [_Choice(first + k, Text(codec.decode, before, sampling.stop), sampling, ends) for k in range(choices)]
    sampler = _Sampler(sampling, choices, device)
    follower = _Follower(texts, sampler, codec, emit, go_on)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=LogitsProcessorList([sampler]),
        stopping_criteria=StoppingCriteriaList([follower]),
    )


def _config(model: Any, sampling: Sampling, tokenizer: Any) -> GenerationConfig:
    """What the model's authors set for generations, but for sampling, lengths and what is returned."""
    config = copy.deepcopy(model.generation_config)
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    # The sampler has the last word: the most likely token is the one that it drew.
    config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
    config.temperature = config.top_p = config.top_k = config.min_p = config.typical_p = None
    config.max_length, config.max_new_tokens = None, sampling.max_tokens
    config.eos_token_id = ends or None
    config.pad_token_id = next(iter(ends), 0) if pad is None else pad
    config.disable_compile = True  # in graphs a strength of one thread would be that of all
    config.return_dict_in_generate = config.output_scores = config.output_logits = False
    config.output_attentions = config.output_hidden_states = False
    return config
