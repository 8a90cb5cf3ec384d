"""Differentiable operations: the C engine on the CPU, the same mathematics in torch on every other device.

Each public function here takes torch tensors and is differentiable once. On the CPU the engine works on the
tensor's own memory; elsewhere the ``_torch_*`` twin runs where the data is, so no activation is copied to the host.
The twins accept CPU tensors too, which is how they are tested against the engine.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import _core
from .._threads import get_num_threads

POOLINGS = ("mean", "min", "max", "last", "all")

# Hooks run between torch's own parallel kernels, on data too small to pay for starting threads.
_HOOK_THREADS = 1


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype computed in for activations of ``dtype``: float64 for float64, else float32.

    Raises
    ------
    TypeError
        If ``dtype`` is not float16, bfloat16, float32 or float64.
    """
    if dtype == torch.float64:
        return torch.float64
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.float32
    raise TypeError(f"activations must be float16, bfloat16, float32 or float64, got {dtype}")


def on_engine(tensor: Tensor) -> bool:
    """Whether the engine can work on the tensor's memory."""
    return tensor.device.type == "cpu"


def _array(tensor: Tensor) -> NDArray:
    """View the memory of a CPU tensor as the C-contiguous array the engine wants (bfloat16 as its uint16 bits)."""
    tensor = tensor.detach().contiguous().resolve_neg()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _tensor(array: NDArray, dtype: torch.dtype) -> Tensor:
    """View an engine result as a tensor of ``dtype``; the inverse of `_array`."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor


# --- affine maps ------------------------------------------------------------------------------------------------------


class _Affine(Function):
    """The engine's affine map.

    It keeps the activation in its own dtype, where torch would keep a float32 copy, and sums both parameter
    gradients in one pass over it; torch writes the product of activation and gradient out first.
    """

    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor, bias: Tensor, strength: float, axis: int) -> Tensor:
        flat = z.detach().contiguous().reshape(_blocks(z.shape, axis))
        ctx.save_for_backward(flat, weight)
        ctx.strength, ctx.shape = strength, z.shape
        out = _core.affine_apply(_array(flat), _array(weight), _array(bias), strength, _HOOK_THREADS)
        # Not a view, of which autograd would forbid an operation in place, such as that of a ReLU(inplace=True) that
        # follows: a tensor of its own on the engine's memory.
        memory = torch.from_numpy(out).untyped_storage()
        # torch's stubs want strides, which it makes itself.
        return torch.empty(0, dtype=z.dtype).set_(memory, 0, z.shape)  # type: ignore[call-overload]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        flat, weight = ctx.saved_tensors
        grad_z, grad_weight, grad_bias = _core.affine_backward(
            _array(flat),
            _array(weight),
            ctx.strength,
            _array(grad.reshape(flat.shape)),
            ctx.needs_input_grad[0],
            _HOOK_THREADS,
        )
        return (
            None if grad_z is None else _tensor(grad_z, flat.dtype).view(ctx.shape),
            torch.from_numpy(grad_weight),
            torch.from_numpy(grad_bias),
            None,
            None,
        )


def _blocks(shape: torch.Size, axis: int) -> tuple[int, int, int]:
    """Shape [outer, d, inner] of a contiguous tensor of ``shape`` with its channels on ``axis``."""
    axis = axis % len(shape)
    return int(np.prod(shape[:axis])), shape[axis], int(np.prod(shape[axis + 1 :]))


def _torch_affine(z: Tensor, weight: Tensor, bias: Tensor, strength: float, channel_axis: int = -1) -> Tensor:
    """Twin of `affine` in torch operations: ``weight`` and ``bias`` in the working dtype of ``z``."""
    shape = [1] * z.ndim
    shape[channel_axis] = -1
    # (1 - s) + s w, not 1 + s (w - 1): strength 1 gives w to the last bit, however small it is.
    slope, shift = (1 - strength) + strength * weight, strength * bias
    return torch.addcmul(shift.view(shape), z.to(weight.dtype), slope.view(shape)).to(z.dtype)


def slopes_at(weight: Tensor, strengths: Tensor | float) -> Tensor:
    """Slopes at strengths as in AffineMap.with_strength: strength 1 gives them to the last bit, and 1 stays 1."""
    return torch.where(weight == 1, weight, (1 - strengths) + strengths * weight)


def affine(z: Tensor, weight: Tensor, bias: Tensor, strength: float = 1.0, channel_axis: int = -1) -> Tensor:
    """Apply the map at a strength: z + strength ((weight - 1) z + bias), channel by channel.

    Computed in float32 (float64 for a float64 ``z``) and rounded once to the dtype of ``z``.

    Parameters
    ----------
    z : Tensor
        Activations of any shape, float16, bfloat16, float32 or float64.
    weight, bias : Tensor [d]
        Slopes and shifts, float32 or float64; they are moved to the device and working dtype of ``z``.
    strength : float, default 1.0
        0 leaves ``z`` as it is, 1 is the map itself.
    channel_axis : int, default -1
        The axis of ``z`` of length d.

    Returns
    -------
    Tensor
        A new tensor with the shape, dtype and device of ``z``; differentiable in ``z``, ``weight`` and ``bias``.
    """
    work = working_dtype(z.dtype)
    weight, bias = weight.to(z.device, work), bias.to(z.device, work)
    if on_engine(z):
        return _Affine.apply(z, weight, bias, float(strength), channel_axis)
    return _torch_affine(z, weight, bias, float(strength), channel_axis)


# --- pooling over tokens ----------------------------------------------------------------------------------------------


class _Pool(Function):
    """The engine's pooling."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor | None, mode: str) -> Tensor:
        bits = None if mask is None else _array(mask).view(np.uint8)
        out, index = _core.pool(_array(x), bits, mode, _HOOK_THREADS)
        ctx.mask, ctx.index, ctx.mode, ctx.tokens, ctx.dtype = bits, index, mode, x.shape[1], x.dtype
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        out = _core.pool_backward(_array(grad), ctx.mask, ctx.mode, ctx.index, ctx.tokens, _HOOK_THREADS)
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
    if mode not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(map(repr, POOLINGS))}, got {mode!r}")
    working_dtype(x.dtype)
    if mask is not None:
        if mask.shape != x.shape[:2]:
            raise ValueError(f"mask must have the shape {list(x.shape[:2])} of the tokens, got {list(mask.shape)}")
        mask = mask.to(x.device) != 0 if on_engine(x) else _moved(mask, x.device, mode)
    return _Pool.apply(x, mask, mode) if on_engine(x) else _torch_pool(x, mask, mode)


# --- the squared Wasserstein distance ---------------------------------------------------------------------------------


class _Wasserstein(Function):
    """One engine call for all modules; it gives the gradient along with the value, so backward only scales it."""

    @staticmethod
    def forward(ctx, targets: Sequence[Tensor], names: Sequence[str], *us: Tensor) -> tuple[Tensor, ...]:
        values, grads, _, _ = _core.wasserstein(
            [_array(u) for u in us],
            [_array(v) for v in targets],
            None,
            None,
            None,
            None,
            True,
            2 if any(ctx.needs_input_grad[2:]) else 0,
            names,
            [f"target of {name}" for name in names],
            get_num_threads(),
        )
        if grads is not None:
            ctx.save_for_backward(*map(torch.from_numpy, grads))
        return tuple(map(torch.from_numpy, values))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return None, None, *(saved * grad for saved, grad in zip(ctx.saved_tensors, grads, strict=True))


def _segments(n: int, m: int) -> tuple[NDArray, NDArray, NDArray]:
    """Merge the breakpoints i/n and k/m of two quantile functions: ranks in each and the mass of every segment."""
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # in units of 1 / (n m), so the merge is exact
    return edges[:-1] // m, edges[:-1] // n, np.diff(edges) / (n * m)


class _TorchWasserstein(Function):
    """Twin of `_Wasserstein` for one module in torch operations."""

    @staticmethod
    def forward(ctx, u: Tensor, target: Tensor) -> Tensor:
        n = len(u)
        ranks_u, ranks_v, mass = (torch.from_numpy(a).to(u.device) for a in _segments(n, len(target)))
        mass = mass.to(u.dtype)[:, None]
        ordered, order = u.sort(dim=0)
        value = (mass * (ordered[ranks_u] - target[ranks_v]).square()).sum(dim=0)
        if ctx.needs_input_grad[0]:
            quantile = torch.zeros_like(u).index_add_(0, ranks_u, n * mass * target[ranks_v])
            # Tied entries share the mean of their quantiles, so that the gradient does not depend on their order.
            tie = torch.zeros_like(order)
            tie[1:] = (ordered[1:] != ordered[:-1]).cumsum(dim=0)
            total = torch.zeros_like(u).scatter_add_(0, tie, quantile)
            count = torch.zeros_like(u).scatter_add_(0, tie, torch.ones_like(u))
            quantile = (total / count.clamp(min=1)).gather(0, tie)
            ctx.save_for_backward(torch.empty_like(u).scatter_(0, order, (ordered - quantile) * (2 / n)))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (saved,) = ctx.saved_tensors
        return saved * grad, None


def _torch_wasserstein(us: Sequence[Tensor], targets: Sequence[Tensor], names: Sequence[str]) -> tuple[Tensor, ...]:
    """Twin of `wasserstein` in torch operations."""
    if not torch.stack([u.isfinite().all() for u in us]).all():  # one wait for all
        for u, name in zip(us, names, strict=True):
            check_finite(u, name)
    return tuple(_TorchWasserstein.apply(u, target) for u, target in zip(us, targets, strict=True))


def check_finite(sample: Tensor, name: str) -> None:
    """Raise the engine's ValueError, "<name>: nan at row 3, column 17", where a sample [n, d] is not finite."""
    finite = sample.isfinite()
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{name}: {sample[row, column].item()} at row {row}, column {column}")


def wasserstein(us: Sequence[Tensor], targets: Sequence[Tensor], names: Sequence[str]) -> tuple[Tensor, ...]:
    """Squared 2-Wasserstein distance per neuron, for the samples of several modules at once.

    Parameters
    ----------
    us : sequence of Tensor [n_k, d_k]
        Samples, all float32 or all float64, all on one device.
    targets : sequence of Tensor [m_k, d_k]
        Target samples whose columns ascend (`sort_columns`), in the dtype and on the device of ``us``.
    names : sequence of str
        Names of the modules, for error messages.

    Returns
    -------
    tuple of Tensor [d_k]
        Differentiable in ``us``. Tied entries of a column share the mean of their target quantiles.

    Raises
    ------
    ValueError
        If a sample holds a NaN or an infinity: "<name>: nan at row 3, column 17".
    """
    if all(map(on_engine, us)):
        return _Wasserstein.apply(targets, names, *us)
    return _torch_wasserstein(us, targets, names)


def sort_columns(samples: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """Sort every column of the samples [n_k, d_k], ascending, into new tensors; NaN and infinities as above."""
    if all(map(on_engine, samples)):
        return list(map(torch.from_numpy, _core.sort_columns(list(map(_array, samples)), names, get_num_threads())))
    for sample, name in zip(samples, names, strict=True):
        check_finite(sample, name)
    return [sample.sort(dim=0).values for sample in samples]
