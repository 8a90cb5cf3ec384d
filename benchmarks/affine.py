"""Applying a map to activations and its backward pass: `_core.affine_apply` and `affine_backward`, one thread.

In cache ([32, 2048]) and out of it (4096 tokens). The floor of the forward pass is a copy of the same bytes. torch is
given what is best for it: addcmul, and for bfloat16 its own arithmetic in float32. The backward pass gives the
gradients in z, w and b; torch's goes without autograd, by the same formulas.

    python benchmarks/affine.py [--budget 1.5]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from _machine import Case, copy_floor, main, scaled_error
from torch import Tensor

from lineas import _core
from lineas._checks import widen

NEURONS = 2048


def torch_forward(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(bias, z.float(), weight).to(z.dtype)


def torch_backward(z: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    wide = grad.float()
    return (wide * weight).to(z.dtype), torch.einsum("nd,nd->d", wide, z.float()), wide.sum(0)


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    weight, bias = (rng.normal(mean, 0.5, NEURONS).astype(np.float32) for mean in (1, 0))
    tensor_weight, tensor_bias = torch.from_numpy(weight), torch.from_numpy(bias)
    for rows in (32, 4096):
        full, full_grad = rng.standard_normal((2, rows, NEURONS), np.float32)
        for name in ("float32", "bfloat16"):
            z, grad = full, full_grad
            tensor, tensor_grad = torch.from_numpy(z), torch.from_numpy(grad)
            if name == "bfloat16":
                z, grad = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (full, full_grad))
                tensor, tensor_grad = (torch.from_numpy(x).view(torch.bfloat16) for x in (z, grad))
            blocks, grad_blocks = z[..., None], grad[..., None]
            exact = widen(z).astype(np.float64) * weight + bias
            got = _core.affine_apply(blocks, weight, bias, 1.0, 1)[..., 0]
            yield Case(
                f"affine map, {name}",
                f"{rows} x {NEURONS}",
                lambda a=(blocks, weight, bias, 1.0, 1): _core.affine_apply(*a),
                floors={"copy": copy_floor(z.nbytes // 4)},
                rivals={"torch addcmul": lambda a=(tensor, tensor_weight, tensor_bias): torch_forward(*a)},
                errors={"output": scaled_error(widen(got), exact)},
            )
            wide, wide_grad = widen(z).astype(np.float64), widen(grad).astype(np.float64)
            out = _core.affine_backward(blocks, weight, 1.0, grad_blocks, True, 1)
            yield Case(
                f"affine map backward, {name}",
                f"{rows} x {NEURONS}",
                lambda a=(blocks, weight, 1.0, grad_blocks, True, 1): _core.affine_backward(*a),
                rivals={"torch": lambda a=(tensor, tensor_weight, tensor_grad): torch_backward(*a)},
                errors={
                    "z": scaled_error(widen(out[0][..., 0]), wide_grad * weight),
                    "w": scaled_error(out[1], np.sum(wide_grad * wide, axis=0)),
                    "b": scaled_error(out[2], np.sum(wide_grad, axis=0)),
                },
            )


if __name__ == "__main__":
    main(__doc__, cases)
