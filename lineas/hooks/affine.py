"""Maps on tensors: the C engine on the CPU, the same mathematics in torch on every other device.

Tensors alone, no modules; and how tensors and the engine's arrays share memory, which pooling and fits use as well.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import _core
from ..maps.affine import AffineMap, at_strength

# Hooks run between torch's own parallel kernels, on data too small to pay for starting threads.
HOOK_THREADS = 1


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype computed in for activations of `dtype`: float64 for float64, else float32; TypeError for others."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"activations must be float16, bfloat16, float32 or float64, got {dtype}")
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_engine(tensor: Tensor) -> bool:
    """Whether the engine can work on the tensor's memory."""
    return tensor.device.type == "cpu"


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor on a device in a dtype; never in float64 on a device that need not know it, such as Apple's MPS."""
    return tensor.to(device).to(dtype) if dtype == torch.float64 else tensor.to(dtype).to(device)


def as_array(tensor: Tensor) -> NDArray:
    """View the memory of a CPU tensor as the C-contiguous array the engine wants (bfloat16 as its uint16 bits)."""
    tensor = tensor.detach().contiguous().resolve_neg()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class _Affine(Function):
    """The engine's affine map.

    It keeps the activation in its own dtype, where torch would keep a float32 copy, and sums both parameter
    gradients in one pass over it; torch writes the product of activation and gradient out first.
    """

    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor, bias: Tensor, strength: float, axis: int) -> Tensor:
        axis = axis % z.ndim
        blocks = z.shape[:axis].numel(), z.shape[axis], z.shape[axis + 1 :].numel()  # outer, d, inner
        flat = z.detach().contiguous().reshape(blocks)
        ctx.save_for_backward(flat, weight)
        ctx.strength, ctx.shape = strength, z.shape
        out = _core.affine_apply(as_array(flat), as_array(weight), as_array(bias), strength, HOOK_THREADS)
        # Not a view, of which autograd would forbid an operation in place, such as that of a ReLU(inplace=True) that
        # follows: a tensor of its own on the engine's memory.
        memory = torch.from_numpy(out).untyped_storage()
        # torch's stubs want strides, which it makes itself.
        return torch.empty(0, dtype=z.dtype, device=z.device).set_(memory, 0, z.shape)  # type: ignore[call-overload]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        flat, weight = ctx.saved_tensors
        of_z, of_weight, of_bias = _core.affine_backward(
            as_array(flat),
            as_array(weight),
            ctx.strength,
            as_array(grad.reshape(flat.shape)),
            ctx.needs_input_grad[0],
            HOOK_THREADS,
        )
        # bfloat16 comes as its bits.
        grad_z = None if of_z is None else torch.from_numpy(of_z).view(flat.dtype).view(ctx.shape)
        return grad_z, torch.from_numpy(of_weight), torch.from_numpy(of_bias), None, None


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
    weight, bias = moved(weight, z.device, work), moved(bias, z.device, work)
    if on_engine(z):
        return _Affine.apply(z, weight, bias, float(strength), channel_axis)
    return _torch_affine(z, weight, bias, float(strength), channel_axis)


def _torch_affine(z: Tensor, weight: Tensor, bias: Tensor, strength: float, axis: int) -> Tensor:
    """Twin of `affine` in torch operations: ``weight`` and ``bias`` in the working dtype of ``z``."""
    return apply(z, *at_strength(weight, bias, strength, _where), axis)


def _where(condition: Tensor, value: float, slopes: Tensor) -> Tensor:
    """``torch.where`` with the gradient of `slopes` on both sides: fits start from slopes of 1, and must get away."""
    return torch.where(condition, value + (slopes - slopes.detach()) if slopes.requires_grad else value, slopes)


def parameters(affine: AffineMap, strength: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slopes and shifts [d] of `affine` at `strength`, worked out in float64."""
    arrays = at_strength(affine.weight.astype(np.float64), affine.bias.astype(np.float64), strength)
    # Outside of inference mode: a tensor made inside it could not take part in a later forward that records gradients.
    with torch.inference_mode(False):
        weight, bias = (torch.tensor(array, dtype=dtype, device="cpu").to(device) for array in arrays)
    return weight, bias


def apply(tensor: Tensor, weight: Tensor, bias: Tensor, axis: int) -> Tensor:
    """``weight * tensor + bias`` along `axis`, computed in the dtype of `weight` and rounded once to `tensor`'s.

    Plain torch operations: they run wherever the model does and every kind of autograd goes through them.
    """
    # Along the last axis as they are, and as a plan has them: checkpointing compares the shapes of what is saved.
    if axis != -1:
        weight, bias = _along(axis, tensor, weight, bias)
    return torch.addcmul(bias, tensor.to(weight.dtype), weight).to(tensor.dtype)


def blend(tensor: Tensor, weight: Tensor, bias: Tensor, strengths: Tensor, axis: int) -> Tensor:
    """`apply` at strengths that can be multiplied with `tensor`: a number for each row or token."""
    weight, bias = at_strength(*_along(axis, tensor, weight, bias), strengths, torch.where)
    return torch.addcmul(bias, tensor.to(weight.dtype), weight).to(tensor.dtype)


def _along(axis: int, tensor: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and shifts [d] in the shape in which they spread over `tensor` along `axis`."""
    shape = [1] * tensor.ndim
    shape[axis] = -1
    return weight.view(shape), bias.view(shape)
