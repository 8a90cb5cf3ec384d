"""What hooks must know of the forward pass they run in: which tokens it brings, and where they stand in their rows.

Two hooks on the model itself tell when a pass begins and ends. It stays under the setting that it began with. Where a
selection of tokens or a strength asks for it, what every call brings is noted as well. A pass belongs to one thread.
What goes on over several passes, above all where the prompt ended, belongs to the key-value cache they share, so that
generations may be interleaved and move between threads.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .._warn import warn
from ..maps.metadata import Selection, show_tokens
from .caches import CACHES, cache_of, columns, has_states, identity
from .gating import GatePass
from .graphs import called_once, check_positions, exporting
from .learned_tokens import prompt_learner, virtual_tokens
from .strength import Schedule, Setting, Settings, StrengthValue
from .tokens import Tokens, check_site, needs_prompt_length, select

# Arguments that say that several texts share a row.
PACKED = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Sequence:
    """What is known of a text that comes in one or more passes."""

    prompt: int | Tensor = 0  # tokens of the prompt, [B]
    split: bool = False  # the prompt came in more than one pass, or may have
    open: bool = True  # nothing was generated yet
    step: int = -1  # passes so far, counted from 0
    real: Tensor | None = None  # real tokens so far [B], where masks tell only those of a pass
    start: Tensor | None = None  # the prompt itself, where there is no cache to know the text by
    length: int = 0  # columns after the last pass, likewise, and where the cache holds states, which do not grow
    copied: dict[int, bool] = field(default_factory=dict)  # whether the rows are of so many prompts, each several times


class Pass:
    """One forward pass of a model, as its hooks see it. What is asked for is worked out once."""

    def __init__(self, text: Tensor | None, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self.text, self.args, self.named = text, args, named
        self.shape = None if text is None else (text.shape[0], text.shape[1])
        self.past: int | Tensor | None = 0  # columns in the cache; None: they cannot be told
        self.sequence: _Sequence | None = None
        self.begins = False
        self.step = 0
        self.grad, self.used = torch.is_grad_enabled(), False
        self.generated = False
        self.prompt: int | Tensor | None = None  # None: it cannot be told
        self.before: int | Tensor = 0  # real tokens in the cache
        self.mask: Tensor | None = None  # None: all are real
        self.packed = False  # its rows hold several texts
        self.exported = exporting()  # it is a graph that is being made
        self.positions: Tensor | None = None  # where the model was told them
        self._tokens: Tokens | None = None
        self._chosen: dict[Any, Tensor] = {}
        self._strengths: dict[Schedule, StrengthValue] = {}
        self.copied: dict[int, bool] = {}
        self.gating: GatePass | None = None  # what gates know of it

    @property
    def checkpointed(self) -> bool:
        """Whether layers that run now are likely to be run again on the way back, or are run again."""
        return torch._C._current_graph_task_id() != -1 or (self.grad and _checkpointed())

    def end(self) -> None:
        """Let go of what the model was called with, a cache among it."""
        self.text, self.args, self.named, self.sequence = None, (), {}, None
        self._tokens = None

    def tokens(self) -> Tokens:
        """The tokens of this pass."""
        if self._tokens is not None:
            return self._tokens
        ids = positions = length = mask = None
        if self.text is not None and self.shape is not None:
            device, mask = self.text.device, self.mask
            if mask is None:
                mask = torch.ones(self.shape, dtype=torch.bool, device=device)
            before = self.before if isinstance(self.before, int) else self.before[:, None]
            counted = before + mask.long().cumsum(dim=1) - 1
            positions = (counted if self.positions is None else self.positions).masked_fill(~mask, -1)
            length = (
                torch.full(self.shape[:1], self.prompt, device=device) if isinstance(self.prompt, int) else self.prompt
            )
            ids = self.text if self.text.ndim == 2 else None
        self._tokens = Tokens(ids, positions, length, mask, self.step, self.args, self.named)
        return self._tokens

    def chosen(self, selection: Selection, name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
        """What `selection` selects of the output of a module: bool [B, T] on its device; None where it is nothing.

        ValueError when the output does not have the tokens of the pass, or the prompt's end is asked for and unknown.
        """
        self.check(name, module, tensor, show_tokens(selection))
        predicting = self.named.get("logits_indices") if self.packed and selection == "last" else None
        if isinstance(predicting, Tensor):  # transformers' continuous batching says of which tokens it wants logits
            return torch.zeros(tensor.shape[:2], dtype=torch.bool, device=tensor.device).index_fill(
                1, predicting.to(tensor.device, torch.int64), True
            )
        if self.exported and callable(selection):
            raise called_once(show_tokens(selection), "'all' and slices that do not count from the end work there")
        if self.prompt is None and needs_prompt_length(selection):
            why = (
                "its rows hold several texts: only 'all', in continuous batching 'last', slices that do not count from "
                "the end, and callables work there"
                if self.packed
                else "a graph is for any text, also one that was generated in part: only 'all' and slices that do not "
                "count from the end work there"
                if self.exported
                else "it came in several passes (prefill_chunk_size, or a cache that was filled with the maps on): "
                "generate from the whole prompt, or fill a copy of the cache without the maps"
            )
            raise ValueError(f"{name}: {show_tokens(selection)} must know where the prompt ends, but {why}")
        if selection == "prompt" and self.generated:
            return None
        key = id(selection) if callable(selection) else repr(selection), tensor.device
        if key not in self._chosen:
            self._chosen[key] = select(selection, self.tokens()).to(tensor.device)
        return self._chosen[key]

    def check(self, name: str, module: nn.Module, tensor: Tensor, what: str) -> None:
        """ValueError where the output of a module does not have the tokens of the pass."""
        if self.shape is None:
            raise ValueError(
                f"{name}: {what} needs a model that takes text, and it was called without input_ids and inputs_embeds"
            )
        check_site(name, module, tensor, what)
        if tuple(tensor.shape[:2]) != self.shape:
            raise ValueError(
                f"{name}: {what} needs an output for the {self.shape[0]} x {self.shape[1]} tokens that the model was "
                f"called with, got the shape {list(tensor.shape)}"
            )

    def scheduled(self, schedule: Schedule) -> StrengthValue:
        """What a schedule gives for this pass."""
        if self.exported:
            raise called_once(f"strength: {schedule}", "give a number, or make it an input by handle.at")
        if schedule not in self._strengths:
            self._strengths[schedule] = schedule.at(self.tokens())
        return self._strengths[schedule]


_NUMBERS = itertools.count()
# What a tracker has seen, and a copy of it has not.
_SEEN = ("gate_values", "number", "_local", "_latest", "_waiting", "_of_cache")


class _Local(threading.local):
    """What a thread knows of its passes."""

    setting: Setting | None = None  # what the pass that it is in is under
    call: tuple[int, int] | None = None  # frame and model, by their numbers; None: the frame cannot be told
    current: Pass | None = None
    last: Pass | None = None  # the one before, for layers that are run again on the way back
    growing: _Sequence | None = None  # the text of a generation without cache
    loose: _Sequence | None = None  # the text of a cache that is no object of its own
    strength: StrengthValue | None = None
    steps: int = 0  # passes under `strength`


class Tracker:
    """Follows the forward passes of a model, each in its thread.

    Where it `follows` them it notes what they bring, and with `needs_positions` works out where the tokens stand; else
    it knows their settings alone. With `needs_passes` it must know of those of compiled models, too.
    """

    def __init__(self, root: nn.Module, settings: Settings, model: nn.Module) -> None:
        self.wrapper = prompt_learner(model)
        self.follows = self.needs_positions = self.needs_passes = False
        self.acted: set[str] = set()  # modules whose hooks have run
        self._whole = False  # a pass has come to its end
        # Not the module itself: a copy of a part of the model must not bring the whole.
        parameters = inspect.signature(root.forward).parameters.values()
        known = {p.name for p in parameters}
        self.names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.can_cache = bool(known & {"use_cache", *CACHES}) or any(p.kind == p.VAR_KEYWORD for p in parameters)
        self.tells_candidates = "logits_to_keep" in known
        self.label = type(root).__name__
        self.two_texts = bool(getattr(getattr(root, "config", None), "is_encoder_decoder", False))
        self.settings = settings
        self.forget()

    def forget(self) -> None:
        """Let go of all passes."""
        self.gate_values: dict[str, Tensor] | None = None  # of the latest pass, where they are recorded
        self.number = next(_NUMBERS)  # which tracker it is, for what is kept elsewhere
        self._local = _Local()
        self._latest: Pass | None = None
        self._waiting = 0  # checkpointed passes since layers were last run again
        self._of_cache: dict[int, tuple[weakref.ref[Any], _Sequence]] = {}

    # A copy of a model brings copies of its hooks; what they have seen stays behind.
    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in _SEEN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.forget()

    def setting(self) -> Setting:
        """What the pass that this thread is in is under, or where it is in none, what holds now."""
        local = self._local
        setting = local.setting
        # Mostly so; otherwise another one was set since the pass began, or an interrupt has kept it from its end.
        if setting is self.settings.latest:
            return setting
        if setting is not None:
            self.leave_behind()
        return local.setting or self.settings.now()

    @property
    def passing(self) -> Pass | None:
        """The pass that this thread is in, if it is in one that is followed; for who has asked for its `setting`."""
        return self._local.current

    def leave_behind(self) -> None:
        """Let go of the pass of this thread that was left by an exception for which torch calls no hooks: Ctrl-C."""
        local = self._local
        if torch.compiler.is_compiling():  # a graph has no frames
            return
        if local.setting is not None and local.call is not None and not _runs(*local.call):
            local.setting = local.call = local.current = None

    def current(self, name: str) -> Pass:
        """The pass that this thread is in; RuntimeError when there is none, or which one it is cannot be told."""
        self.leave_behind()
        local = self._local
        here = local.current
        if here is not None:
            if here.grad and not here.used and _checkpointed():
                here.used, self._waiting = True, self._waiting + 1
            return here
        if torch._C._current_graph_task_id() != -1:  # a backward pass: checkpointing runs layers again
            waiting, self._waiting = self._waiting, 0
            again = local.last or self._latest
            if again is not None and waiting <= 1:
                return again
            raise RuntimeError(
                f"{name}: gradient checkpointing runs the layers of one of {waiting} passes again, and which one "
                "cannot be told: call backward after every pass, or switch checkpointing off"
            )
        raise RuntimeError(
            f"{name} was run without {self.label}, whose arguments tell its tokens: call the model that the maps are "
            "attached to, or attach them to the part that is called"
        )

    def copies(self, prompts: int, rows: int) -> int:
        """How many of the `rows` of an output each of `prompts` prompts has; 1 where it is not known to have more.

        Beams and several sequences of a prompt are rows of it side by side, alike when a text begins, as ``generate``
        makes them. That is looked at once a text, and where it goes on with several tokens: both wait for the device.
        """
        here = self._local.current
        if rows == prompts or rows % prompts or here is None or here.shape is None or here.shape[0] != rows:
            return 1
        if prompts not in here.copied:
            here.copied[prompts] = self._are_copied(here, prompts)
        return rows // prompts if here.copied[prompts] else 1

    def _are_copied(self, here: Pass, prompts: int) -> bool:
        text, mask, sequence = here.text, here.named.get("attention_mask"), self._sequence_of(here)
        assert text is not None
        known = sequence.copied
        if here.begins or (text.shape[1] > 1 and sequence.start is None):
            parts = [text, mask] if isinstance(mask, Tensor) and len(mask) == len(text) else [text]
            known[prompts] = (here.begins or known.get(prompts, False)) and all(_alike(part, prompts) for part in parts)
        return known.get(prompts, False)

    # --- a pass begins ------------------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note what the model is called with."""
        local = self._local
        local.current = None
        local.setting, local.call = self.settings.now(), _call_of(model)
        if not self.follows:
            return
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        text = None if self.two_texts else self._text(args, named)
        here = Pass(text, args, named)
        if text is None:
            strength = local.setting.strength
            if local.strength is not strength:
                local.strength, local.steps = strength, 0
            here.step = local.steps
            local.steps += 1
        else:
            here.past = self._past(named, text.shape[1])
            cache = cache_of(named)
            if self.needs_positions:
                self._locate(here)
            elif cache is not None and columns(cache) is None:  # what is not counted now is never known
                self._sequence_of(here)
        local.current = here

    def _text(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor | None:
        """Token ids [B, T] or embeddings [B, T, d] of a pass."""
        for key, axes in (("input_ids", 2), ("inputs_embeds", 3)):
            value = named.get(key)
            if isinstance(value, Tensor) and value.ndim == axes:
                return value
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.ndim == 2 and first.dtype in (torch.int64, torch.int32):
            return first
        return None

    def _locate(self, here: Pass) -> None:
        """Find out which sequence a pass belongs to, and where its tokens stand."""
        text, named = here.text, here.named
        assert text is not None
        if here.exported:
            check_positions(self.label, cache_of(named) is not None)
        packed = [key for key in PACKED if named.get(key) is not None]
        if packed:
            self._locate_packed(here, packed[0])
            return
        rows, length = text.shape[:2]
        mask = named.get("attention_mask")
        sequence, past = self._sequence_of(here), here.past
        if past is None:
            raise ValueError(
                f"{self.label} goes on with states of which nothing tells how many tokens they have seen: keep the "
                "maps on from the first pass of a text, or give an attention_mask of all its tokens"
            )
        assert isinstance(past, int)
        virtual = 0 if self.wrapper is None else virtual_tokens(self.wrapper)
        if virtual and mask is None:
            mask = torch.ones((rows, past + length), dtype=torch.int64, device=text.device)
        begins = here.begins or sequence.step < 0  # what began before it was followed begins now
        total: int | Tensor
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape[0] != rows or mask.shape[1] < past + length:
                raise ValueError(
                    f"attention_mask must have the shape {[rows, past + length]} of the tokens in the cache and of "
                    f"those of this pass, got {list(mask.shape)}"
                )
            real = mask[:, : past + length] != 0
            if virtual:  # they come first, and are no text
                real = real & (torch.arange(past + length, device=real.device) >= virtual)
            here.mask = real[:, past:]
            here.before = real[:, :past].sum(dim=1) if past else 0
            total = here.before + here.mask.sum(dim=1)
        else:
            present = None if mask is None else _present(mask, rows, length, past)
            before: int | Tensor = past
            if past and not begins and sequence.real is not None:
                before = _per_row(sequence.real, rows)
            elif begins and past and present is not None:
                raise ValueError(
                    "attention_mask: one with 4 axes does not tell the padding of what is in the cache already; give "
                    "one of the shape [batch, tokens], or fill the cache with the maps on"
                )
            here.mask, here.before = present, before
            total = before + (length if present is None else present.sum(dim=1))
        sequence.real = None if isinstance(total, int) else total
        self._advance(here, sequence, begins, total, length)

    def _locate_packed(self, here: Pass, said: str) -> None:
        """The same where several texts share a row, one behind the other, with their positions."""
        positions, ends, shape = here.named.get("position_ids"), here.named[said], here.shape
        if (
            shape is None
            or not isinstance(positions, Tensor)
            or positions.shape != shape
            or not isinstance(ends, Tensor)
        ):
            raise ValueError(
                f"{said} says that rows hold several texts: only tokens='all' and a strength without an axis of tokens "
                "work there, others if position_ids [rows, tokens] come with it"
            )
        here.packed, here.positions, here.prompt = True, positions, None
        here.mask = (torch.arange(shape[1], device=positions.device) < ends[-1]).expand(shape)

    def _advance(self, here: Pass, sequence: _Sequence, begins: bool, total: int | Tensor, length: int) -> None:
        """Tell prompt and generated tokens apart.

        One token at a time is generated. More are a prompt: the first one, or what a conversation goes on with. But
        where a generation tries several tokens at once, it asks for the logits of all of them, and of the last one of
        a prompt at most.
        """
        keep = here.named.get("logits_to_keep")
        candidates = keep - 1 if isinstance(keep, int) and keep > 1 and cache_of(here.named) is not None else 0
        if sequence.start is not None and not begins:
            sequence.open = False  # the prompt is part of every pass
        elif begins or length > candidates + 1:
            told = begins or self.tells_candidates
            sequence.split = not begins and (sequence.open or not told)
            sequence.prompt, sequence.open = total - candidates, True
        else:
            sequence.open, here.generated = False, True
            if isinstance(sequence.prompt, Tensor):
                sequence.prompt = _per_row(sequence.prompt, here.shape[0] if here.shape else 1)
        sequence.step += 1
        here.step = sequence.step
        here.prompt = None if sequence.split or here.exported else sequence.prompt

    def _past(self, named: Mapping[str, Any], length: int) -> int | Tensor | None:
        """Columns in the cache before a pass of so many; a tensor where only the device knows, None where nothing does.

        Caches of states alone do not tell. What passes brought into them is then counted here.
        """
        cache, mask = cache_of(named), named.get("attention_mask")
        if cache is None:
            return 0
        told = columns(cache)
        if told is not None:
            return told
        known = self._of(cache)
        if not has_states(cache, known is not None):
            return 0
        if known is not None:
            return known.length
        position = named.get("cache_position")
        if isinstance(position, Tensor) and position.numel():
            return position[0]
        width = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else 0
        return width - length if width > length else None

    def _sequence_of(self, here: Pass) -> _Sequence:
        """The sequence that a pass goes on with, or begins; found once."""
        if here.sequence is not None:
            return here.sequence
        if isinstance(here.past, Tensor):
            here.past = int(here.past)
        cache, text, local = cache_of(here.named), here.text, self._local
        assert text is not None
        # Without a cache every pass brings its text whole.
        whole = cache is None and (here.named.get("use_cache") is False or not self.can_cache) and not here.exported
        known = None
        if cache is not None and here.past != 0:
            known = self._of(cache)
        elif whole and local.growing is not None and _goes_on(local.growing, text):
            known = local.growing
            known.length += 1
        if known is not None and cache is not None:
            known.length = (here.past or 0) + text.shape[1]
        here.begins, here.sequence = known is None, known or _Sequence(length=(here.past or 0) + text.shape[1])
        if here.begins and cache is not None:
            self._bind(cache, here.sequence)
        elif here.begins and whole:
            here.sequence.start = text.detach().clone() if text.ndim == 2 else text.detach()
            local.growing = here.sequence
        return here.sequence

    def _of(self, cache: Any) -> _Sequence | None:
        key = identity(cache)
        entry = self._of_cache.get(id(key))
        if entry is not None and entry[0]() is key:
            return entry[1]
        return self._local.loose if key is cache and isinstance(cache, tuple | list) else None

    def _bind(self, cache: Any, sequence: _Sequence) -> None:
        """Know the sequence by its cache from now on."""
        cache = identity(cache)
        key, known = id(cache), self._of_cache
        try:
            known[key] = weakref.ref(cache, lambda _: known.pop(key, None)), sequence
        except TypeError:  # tuples of tensors, of which every pass makes new ones
            self._local.loose = sequence

    # --- a pass ends --------------------------------------------------------------------------------------------------

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note that the pass is over, with what it gave: None after an error."""
        local = self._local
        here, local.current = local.current, None
        local.setting = local.call = None
        if output is not None and not self._whole:
            self._whole = True
            self._warn_of_idle()
        if here is None:
            return
        if torch._C._current_graph_task_id() == -1:
            local.last = self._latest = here
        if output is not None and here.sequence is not None and cache_of(here.named) is None:
            self._learn_cache(here, here.sequence, output)
        here.end()

    def _warn_of_idle(self) -> None:
        """Warn of modules that the first whole pass did without."""
        idle = [name for name in self.settings.latest.maps if name not in self.acted]
        if idle:
            others = f" (nor were {len(idle) - 1} others)" if len(idle) > 1 else ""
            warn(
                f"module {idle[0]!r} was not called when the model ran{others}, so its map does nothing: some modules "
                "are used by their weights, without a call; handle.acted has those that were called",
                UserWarning,
            )

    def _learn_cache(self, here: Pass, sequence: _Sequence, output: Any) -> None:
        """Where the model made the cache itself, later passes will bring it."""
        if isinstance(output, Mapping):
            found = cache_of(output)
        else:
            entries = output if isinstance(output, tuple | list) else ()
            found = next((entry for entry in entries if hasattr(entry, "get_seq_length")), None)
        if found is not None:
            self._bind(found, sequence)
            if here.gating is not None and here.gating.sums is not None:
                here.gating.sums.follow(found)


# What runs a module and its hooks.
_CALL = nn.Module._call_impl.__code__


def _call_of(model: nn.Module) -> tuple[int, int] | None:
    """The call of `model` whose hook this is, as `_runs` knows it; None in what was compiled, which has no frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return None if frame is None else (id(frame), id(model))


def _runs(number: int, model: int) -> bool:
    """Whether this thread is still in a call of `_call_of`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Numbers are used again, also for frames: the model has to be the same.
        if id(frame) == number and frame.f_code is _CALL:
            return id(frame.f_locals["self"]) == model
        frame = frame.f_back
    return False


def _alike(rows: Tensor, groups: int) -> bool:
    """Whether rows are so many groups of equal ones, side by side."""
    grouped = rows.unflatten(0, (groups, -1))
    return bool((grouped == grouped[:, :1]).all())


def _checkpointed() -> bool:
    """Whether layers that run now, in a pass with gradients, are likely to be run again on the way back."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _goes_on(before: _Sequence, text: Tensor) -> bool:
    """Whether a text without cache is the one of the pass before and one more token, rows of a prompt in any order."""
    start = before.start
    assert start is not None
    return (
        text.shape[1] == before.length + 1
        and text.shape[0] == start.shape[0]
        and text.shape[2:] == start.shape[2:]
        and text.dtype == start.dtype
        and text.device == start.device
        and torch.equal(text[:, : start.shape[1]], start)
    )


def _per_row(values: Tensor, rows: int) -> Tensor:
    """What is known of every row, where rows were multiplied in the meantime."""
    if rows == len(values):
        return values
    if rows % len(values):
        raise ValueError(
            f"the text began with {len(values)} rows and goes on with {rows}: which row is which cannot be told; only "
            "tokens='all' and a strength without an axis of tokens work there"
        )
    return values.repeat_interleave(rows // len(values))


def _present(mask: Any, rows: int, length: int, past: int) -> Tensor | None:
    """Which tokens of a pass are real, bool [B, T], by a mask of another kind than [batch, tokens]; None for all.

    Compilable caches get masks [B, heads, T, columns], true or 0 where a token sees a column. A real token sees itself.
    """
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None or (length == 1 and past):  # a token that goes on is real
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2] != length or mask.shape[-1] < past + length:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [batch, tokens] or [batch, heads, {length} tokens, at least {past + length} "
            f"columns] to tell which tokens are real, got {shape}"
        )
    seen = mask[:, 0, :, past : past + length].diagonal(dim1=-2, dim2=-1)
    real = seen if seen.dtype == torch.bool else seen == 0
    return real.expand(rows, length)
