"""Which tokens maps act on: what selections and schedules are told, and what is selected, also of the batch of a fit.

A selection speaks of the positions of tokens in their rows, not of columns of a batch: padding has none, on whatever
side it is, and positions go on through a key-value cache. docs/decisions/0015 says why it is so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..inputs.batches import Batch
from ..inputs.call import by_name, unwrap
from ..maps.metadata import Selection, name_of, show_tokens
from . import outputs
from .layout import Layout, batch_first
from .pooling import pool_output
from .settings import RunSettings


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one forward pass of a model: B rows of T tokens.

    A callable that is given to `lineas.SteeringMaps.attach` gets one at every pass: as ``tokens=`` it returns which
    tokens the maps act on, bool [B, T]; as ``strength=`` how strongly they do. Positions count the real tokens of a row
    from 0 and go on through the key-value cache, on whatever side the padding is::

        maps.attach(model, tokens=lambda tokens: tokens.ids == 42)
        maps.attach(model, strength=lambda tokens: 0.9**tokens.positions)

    Attributes
    ----------
    ids : Tensor [B, T] or None
        The token ids of this pass; None where the model got embeddings, or something that is no text.
    positions : Tensor [B, T] or None
        The position of every token in its row, from 0, with what is in the cache counted; -1 for padding. None for
        models that take no text.
    prompt_length : Tensor [B] or None
        Tokens of every row's prompt, padding not counted. None where it cannot be told, since the prompt came in
        several passes, and for models that take no text.
    mask : Tensor [B, T] or None
        True where a token of this pass is real.
    step : int
        Passes since the sequence began: 0 for the prompt. For models that take no text, passes made in this thread
        since the strength was set, or its `Handle.at` block began.
    args, kwargs : tuple, dict
        What the model was called with. In `kwargs` the positional arguments are under their names as well, so that
        ``tokens.kwargs["timestep"]`` is there however a pipeline calls its denoiser.
    """

    ids: Tensor | None
    positions: Tensor | None
    prompt_length: Tensor | None
    mask: Tensor | None
    step: int = 0
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def check_fit_tokens(tokens: Selection, model: nn.Module) -> None:
    """ValueError where fits and `collect` cannot select `tokens`: any but "all" in a model with two texts."""
    inner = unwrap(model)
    if tokens != "all" and getattr(getattr(inner, "config", None), "is_encoder_decoder", False) is True:
        raise ValueError(
            f"{show_tokens(tokens)} needs a model with one text, {type(inner).__name__} has an encoder and a decoder: "
            "only tokens='all' works there"
        )


def needs_prompt_length(tokens: Selection) -> bool:
    """Whether what is selected depends on where the prompt ends."""
    if isinstance(tokens, slice):
        return any(bound is not None and bound < 0 for bound in (tokens.start, tokens.stop))
    return tokens in ("last", "prompt", "generated")


def select(tokens: Selection, here: Tokens) -> Tensor:
    """The selected ones of the tokens `here`, bool [B, T]; never padding. "all" needs no selection.

    TypeError or ValueError when a callable gives something else than booleans [B, T].
    """
    positions, length = here.positions, here.prompt_length
    assert positions is not None and here.mask is not None
    if callable(tokens):
        return _called(tokens, here, positions) & here.mask
    if tokens in ("prompt", "generated"):
        assert length is not None
        after = positions >= length[:, None]
        return (after if tokens == "generated" else ~after) & here.mask
    if isinstance(tokens, str):  # "last"
        tokens = slice(-1, None)
    start, stop = (_bound(bound, length) for bound in (tokens.start or 0, tokens.stop))
    chosen = here.mask & (positions >= start)
    if stop is not None:
        chosen = chosen & (positions < stop)
    if tokens.step not in (None, 1):
        chosen = chosen & ((positions - start) % tokens.step == 0)
    return chosen


def _bound(value: int | None, length: Tensor | None) -> Any:
    """A bound of a slice as a position; negative ones count from the end of the prompt, as far back as its start."""
    if value is None or value >= 0:
        return value
    assert length is not None
    return (length[:, None] + value).clamp(min=0)


def _called(function: Callable[[Tokens], Any], here: Tokens, positions: Tensor) -> Tensor:
    name, value = name_of(function), function(here)
    if not isinstance(value, Tensor | np.ndarray):
        raise TypeError(f"tokens: {name} must return a boolean tensor or array, got {type(value).__name__}")
    # On the CPU until it is known to be boolean: accelerators need not know every dtype.
    chosen = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    if chosen.dtype != torch.bool:
        raise TypeError(
            f"tokens: {name} must return booleans, got {chosen.dtype}: to weigh tokens, make strength a callable"
        )
    if chosen.shape != positions.shape:
        raise ValueError(
            f"tokens: {name} must return the shape {list(positions.shape)} of the tokens of this pass, "
            f"got {list(chosen.shape)}"
        )
    return chosen


# --- in fits ----------------------------------------------------------------------------------------------------------


class BatchTokens:
    """The tokens of one batch that count in a fit: which maps act on, and which are pooled.

    "all" leaves everything to the attention mask: maps act on padding too, which nobody sees.
    """

    def __init__(self, model: nn.Module, batch: Batch, settings: RunSettings) -> None:
        self.model, self.batch = unwrap(model), batch
        self.named = batch if settings.forward is not None else by_name(model, batch)
        self.layout = Layout(self.model, self.named)
        self.tokens, self.pooling = settings.tokens, settings.pooling
        self._masks: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def mask(self, name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
        """What of the output `tensor` [B, T, d] of a module is pooled: [B, T], nonzero where it is, or None for all.

        ValueError when the output has no tokens, the attention mask another shape, a row no selected token, or there is
        a mask under a name that does not tell what it marks.
        """
        if self.tokens != "all":
            _check_axes(name, module, tensor, show_tokens(self.tokens))
            key = tensor.shape[:2], tensor.device
            if key not in self._masks:
                self._check_masks(name, self.named.mask, len(tensor))
                self._masks[key] = self._select(name, tensor)
            return self._masks[key]
        mask = self.named.mask_of(name, self.model)
        if tensor.ndim == 3 and outputs.channel_axis(module, tensor, name) == -1:
            self._check_masks(name, mask, len(tensor))
        return mask

    def pool(self, name: str, module: nn.Module, tensor: Tensor, mapped: Tensor | None = None) -> Tensor:
        """The output `tensor` of a module, or what maps made of it, pooled over the selected tokens: `pool_output`."""
        shown = self._batch_first(name, module, tensor if mapped is None else mapped)
        mask, size = self.mask(name, module, shown), self.named.size_of(name, self.model)
        return pool_output(name, module, shown, mask, self.pooling, size)

    def real(self, name: str, tensor: Tensor) -> Tensor | None:
        """What of the output [B, T, d] of a module is no padding: [B, T], nonzero where it is a token; None for all."""
        mask = self.named.mask_of(name, self.model)
        return mask if mask is not None and tensor.ndim == 3 and mask.shape == tensor.shape[:2] else None

    def rows(self, name: str, module: nn.Module, tensor: Tensor, axis: int) -> Tensor:
        """The selected tokens [N, d] of the output of a module, or all places of one without tokens."""
        if tensor.ndim == 3 and axis == -1:
            shown = self._batch_first(name, module, tensor)
            mask = self.mask(name, module, shown)
            if mask is not None:
                return shown[mask.to(tensor.device) != 0]
            tensor = shown
        return tensor.movedim(axis, -1).flatten(0, -2)

    def only(self, name: str, module: nn.Module, tensor: Tensor, mapped: Tensor) -> Tensor:
        """`mapped` at the selected tokens, `tensor` elsewhere."""
        if self.tokens == "all":
            return mapped
        shown = self._batch_first(name, module, tensor)
        chosen = self.mask(name, module, shown)
        assert chosen is not None
        return torch.where((chosen if shown is tensor else chosen.T)[:, :, None], mapped, tensor)

    def _batch_first(self, name: str, module: nn.Module, tensor: Tensor) -> Tensor:
        """The output of a module with the batch on its first axis; ValueError where it has no row for each prompt."""
        if tensor.ndim > 1 and self.layout.is_sequence_first(name, module, tensor):
            return tensor.transpose(0, 1)
        return tensor

    def _check_masks(self, name: str, mask: Tensor | None, prompts: int) -> None:
        unclear = None if mask is not None else self.named.unclear_mask(prompts)
        if unclear is not None:
            raise ValueError(
                f"{name}: which tokens are real cannot be told: {unclear} of the batch may mark padding or what is "
                "real; give 'attention_mask' [batch, tokens], nonzero where a token is real, through forward= where "
                "the model has another name for it"
            )

    def _select(self, name: str, tensor: Tensor) -> Tensor:
        shape = tensor.shape[:2]
        mask = self.named.mask
        if mask is None:
            real = torch.ones(shape, dtype=torch.bool, device=tensor.device)
        elif mask.shape != shape:
            raise ValueError(
                f"{name}: the attention mask must have the shape {list(shape)} of the output's tokens, got "
                f"{list(mask.shape)}"
            )
        else:
            real = mask.to(tensor.device) != 0
        length = self.batch.prompt_length
        given = (self.batch.kwargs.get("input_ids"), *self.batch.args[:1])
        texts = (value for value in given if isinstance(value, Tensor) and value.shape == shape)
        here = Tokens(
            ids=next((text for text in texts if not text.is_floating_point()), None),
            positions=(real.long().cumsum(dim=1) - 1).masked_fill(~real, -1),
            prompt_length=real.sum(dim=1) if length is None else length.to(tensor.device),
            mask=real,
            args=self.batch.args,
            kwargs=self.batch.kwargs,
        )
        chosen = select(self.tokens, here)
        some = chosen.any(dim=1)
        if not (some.any() if self.pooling == "all" else some.all()):
            row = int((~some).nonzero()[0])
            raise ValueError(
                f"{name}: {show_tokens(self.tokens)} selects none of the {int(real[row].sum())} tokens of row {row}"
            )
        return chosen


def check_site(name: str, module: nn.Module, tensor: Tensor, what: str) -> None:
    """ValueError where the output of a module is not [batch, tokens, channels], so that nothing can be selected."""
    _check_axes(name, module, tensor, what)
    if batch_first(module) is False:
        raise ValueError(
            f"{name}: {what} needs an output [batch, tokens, channels], the module gives [tokens, batch, channels] "
            "(batch_first=False); tokens='all' and a strength without an axis of tokens fit any output"
        )


def _check_axes(name: str, module: nn.Module, tensor: Tensor, what: str) -> None:
    if tensor.ndim != 3 or outputs.channel_axis(module, tensor) != -1:
        raise ValueError(
            f"{name}: {what} needs an output [batch, tokens, channels], got the shape {list(tensor.shape)}; "
            "tokens='all' and a strength without an axis of tokens fit any output"
        )
