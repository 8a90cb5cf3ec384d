"""Pooling over tokens: the C engine on the CPU, the same mathematics in torch on every other device."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import _core
from .._checks import as_choice
from ..maps.metadata import POOLINGS
from . import outputs
from .affine import HOOK_THREADS, as_array, on_engine, working_dtype


class _Pool(Function):
    """The engine's pooling."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor | None, mode: str) -> Tensor:
        bits = None if mask is None else as_array(mask).view(np.uint8)
        out, index = _core.pool(as_array(x), bits, mode, HOOK_THREADS)
        ctx.mask, ctx.index, ctx.mode, ctx.tokens, ctx.dtype = bits, index, mode, x.shape[1], x.dtype
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        out = _core.pool_backward(as_array(grad), ctx.mask, ctx.mode, ctx.index, ctx.tokens, HOOK_THREADS)
        return torch.from_numpy(out).to(ctx.dtype), None, None


def _torch_pool(x: Tensor, mask: Tensor | None, mode: str) -> Tensor:
    """Twin of `pool` in torch operations; ``mask`` is boolean."""
    x = x.to(working_dtype(x.dtype))
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if mode == "all":
        return x[mask]
    real = mask[:, :, None]
    if mode == "mean":
        # where, not a product: a padded position may hold NaN
        return torch.where(real, x, 0).sum(dim=1) / real.sum(dim=1)
    if mode == "last":
        last = x.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(dim=1)
        return x[torch.arange(len(x), device=x.device), last]
    # max and min along a dimension return the first winner and hand it the whole gradient, as the engine does
    if mode == "max":
        return x.masked_fill(~real, -torch.inf).max(dim=1).values
    return x.masked_fill(~real, torch.inf).min(dim=1).values


# The latest mask that was moved, what it was then, and what became of it.
_latest: tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor] | None = None


def _moved(mask: Tensor, device: torch.device, mode: str) -> Tensor:
    """The mask as booleans on an accelerator, each row with a token: once for all modules, since both wait for it."""
    global _latest
    state = None if mask.is_inference() else (mask._version, device, mode == "all")
    latest = _latest
    if latest is not None and latest[0]() is mask and latest[1] == state:
        return latest[2]
    moved = mask.to(device) != 0
    if mode != "all":
        some = moved.any(dim=1)
        if not some.all():
            raise ValueError(f"mask: row {int(some.long().argmin())} keeps no token")
    if state is not None:
        _latest = weakref.ref(mask), state, moved
    return moved


def pool(x: Tensor, mask: Tensor | None = None, mode: str = "mean") -> Tensor:
    """Pool activations over their real tokens.

    Parameters
    ----------
    x : Tensor [B, T, d]
        Activations, float16, bfloat16, float32 or float64.
    mask : Tensor [B, T], optional
        Nonzero where a token is real; None means that all are. Masks of any dtype and device are taken.
    mode : {"mean", "min", "max", "last", "all"}, default "mean"
        "last" takes the last real token, "all" every real token as a row of its own.

    Returns
    -------
    Tensor [B, d], or [number of real tokens, d] for "all"
        float32 (float64 for a float64 ``x``) on the device of ``x``, differentiable in ``x``.

    Raises
    ------
    TypeError
        If ``x`` is not of a floating dtype named above.
    ValueError
        If ``mode`` is unknown, ``mask`` is not [B, T], or a row has no real token.
    """
    as_choice(mode, "pooling", POOLINGS)
    working_dtype(x.dtype)
    if mask is not None:
        if mask.shape != x.shape[:2]:
            raise ValueError(f"mask must have the shape {list(x.shape[:2])} of the tokens, got {list(mask.shape)}")
        mask = mask.to(x.device) != 0 if on_engine(x) else _moved(mask, x.device, mode)
    return _Pool.apply(x, mask, mode) if on_engine(x) else _torch_pool(x, mask, mode)


def pool_output(
    name: str,
    module: nn.Module,
    tensor: Tensor,
    mask: Tensor | None,
    pooling: str,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """`pool` the output `tensor` of a module over its tokens, or pixels, to one row a prompt.

    It is [B, T, d], [B T, d] in the order of [B, T, d], [B, d], or has further axes of positions (`outputs.to_tokens`);
    without an axis of tokens, as in [B, d] and images, it is pooled without the mask [B, T]. Where the `size` (B, T) is
    known, an output of two axes must have B or B T rows; the experts of mixtures, and OPT, see all tokens in one axis.

    ValueError, which names the module, when the mask is of another length than the output, or the output has rows for
    neither prompts nor tokens.
    """
    if tensor.ndim == 2 and size is not None and len(tensor) != size[0]:
        prompts, length = size
        if len(tensor) != prompts * length:
            raise ValueError(
                f"{name}: the output must have a row for each of the {prompts} prompts or {prompts * length} tokens "
                f"to be pooled, got {len(tensor)} rows"
            )
        tensor = tensor.unflatten(0, size)
    tokens = outputs.to_tokens(module, tensor, name)
    if tensor.ndim == 3 and mask is not None and mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"{name}: the attention mask must have the shape {list(tokens.shape[:2])} of the output's tokens, "
            f"got {list(mask.shape)}"
        )
    return pool(tokens, mask if tensor.ndim == 3 else None, pooling)
