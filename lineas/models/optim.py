"""The proximal gradient step on the parameters of all maps at once: the C engine on the CPU, torch elsewhere."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _core
from .._threads import get_num_threads

ADAM_EPS = 1e-8


def cosine_rate(lr: float, step: int, steps: int) -> float:
    """Rate of step 0..steps-1: half a cosine from ``lr`` down towards ``lr / 1000``."""
    floor = 1e-3 * lr
    return floor + 0.5 * (lr - floor) * (1 + math.cos(math.pi * step / steps))


class ProximalOptimizer:
    """Gradient steps, each followed by the proximal operator of the sparse group lasso, on flat parameters.

    Slopes and shifts of all modules lie one after the other in two tensors that every step updates in place. The
    penalty is l1 ||x||_1 + group sqrt(d) ||x||_2, summed over the groups x = weight - 1 and x = bias of every module
    (LinEAS, arXiv 2503.10679, section 3).

    Parameters
    ----------
    weight, bias : Tensor [D]
        Parameters, float32 or float64.
    offsets : array of int64 [L + 1]
        Module k owns [offsets[k], offsets[k + 1]).
    optimizer : {"sgd", "adam"}
        Plain gradient descent without momentum, or Adam with bias correction, eps 1e-8 and no weight decay.
    betas : (float, float)
        Adam's decay rates of the first and second moment.
    l1, group : float
        Penalties of the slopes.
    l1_bias, group_bias : float
        Penalties of the shifts.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        offsets: NDArray[np.int64],
        *,
        optimizer: str,
        betas: tuple[float, float],
        l1: float,
        group: float,
        l1_bias: float,
        group_bias: float,
    ) -> None:
        self.weight, self.bias, self.offsets = weight, bias, offsets
        self.penalties = (l1, group, l1_bias, group_bias)
        self.betas = betas
        self.taken = 0
        self.moments = [torch.zeros_like(x) for x in (weight, weight, bias, bias)] if optimizer == "adam" else None

    def step(self, grad_weight: Tensor, grad_bias: Tensor, lr: float) -> tuple[float, int]:
        """Take one step at rate ``lr``, which is also the tau of the proximal operator.

        Returns
        -------
        penalty : float
            The penalty after the step, not multiplied by the rate.
        support : int
            How many neurons have a slope other than 1 or a shift other than 0.

        Raises
        ------
        ValueError
            If a gradient is not finite; the parameters are then unchanged.
        """
        self.taken += 1
        if self.weight.device.type == "cpu":
            adam = None
            if self.moments is not None:
                adam = (*(m.numpy() for m in self.moments), self.taken, *self.betas, ADAM_EPS)
            return _core.step(
                self.weight.numpy(),
                self.bias.numpy(),
                grad_weight.numpy(),
                grad_bias.numpy(),
                self.offsets,
                lr,
                *self.penalties,
                adam,
                get_num_threads(),
            )
        return self._torch_step(grad_weight, grad_bias, lr)

    def _torch_step(self, grad_weight: Tensor, grad_bias: Tensor, lr: float) -> tuple[float, int]:
        """Twin of the engine's step in torch operations."""
        for grad in (grad_weight, grad_bias):
            if not grad.isfinite().all():
                raise ValueError(f"gradient is not finite at {int((~grad.isfinite()).nonzero()[0])}")
        if self.moments is None:
            self.weight.sub_(grad_weight, alpha=lr)
            self.bias.sub_(grad_bias, alpha=lr)
        else:
            m_weight, v_weight, m_bias, v_bias = self.moments
            self._adam(self.weight, grad_weight, m_weight, v_weight, lr)
            self._adam(self.bias, grad_bias, m_bias, v_bias, lr)
        l1, group, l1_bias, group_bias = self.penalties
        penalty = 0.0
        for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            slope, shift = self.weight[start:stop], self.bias[start:stop]
            moved, cost = _torch_prox(slope - 1, lr, l1, group)
            slope.copy_(1 + moved)
            penalty += cost
            moved, cost = _torch_prox(shift, lr, l1_bias, group_bias)
            shift.copy_(moved)
            penalty += cost
        return penalty, int(((self.weight != 1) | (self.bias != 0)).sum())

    def _adam(self, values: Tensor, grad: Tensor, first: Tensor, second: Tensor, lr: float) -> None:
        beta1, beta2 = self.betas
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (second / (1 - beta2**self.taken)).sqrt_().add_(ADAM_EPS)
        values.addcdiv_(first, root, value=-lr / (1 - beta1**self.taken))


def _torch_prox(x: Tensor, tau: float, l1: float, group: float) -> tuple[Tensor, float]:
    """Proximal operator of one group x [d] at ``tau``, and the penalty at the result."""
    x = torch.nn.functional.softshrink(x, tau * l1)
    norm = x.norm().item()
    width = math.sqrt(len(x))
    factor = max(1 - tau * group * width / norm, 0.0) if norm > 0 else 0.0
    x = x * factor
    return x, l1 * x.abs().sum().item() + group * width * norm * factor
