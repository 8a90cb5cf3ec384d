"""The squared Wasserstein distance of tensors: the C engine on the CPU, the same mathematics in torch elsewhere.

On the CPU the engine works on the tensors' own memory; elsewhere the ``_torch_*`` twin runs where the data is, so that
no activation is copied to the host. The twin takes CPU tensors too, which is how it is tested against the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import _core
from .._threads import get_num_threads
from ..hooks.affine import as_array, on_engine


class _Wasserstein(Function):
    """One engine call for all modules; it gives the gradient along with the value, so backward only scales it."""

    @staticmethod
    def forward(ctx, targets: Sequence[Tensor], names: Sequence[str], *us: Tensor) -> tuple[Tensor, ...]:
        values, grads, _, _ = _core.wasserstein(
            [as_array(u) for u in us],
            [as_array(v) for v in targets],
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
        *ranks, mass = map(torch.from_numpy, _segments(n, len(target)))
        ranks_u, ranks_v = (rank.to(u.device) for rank in ranks)
        mass = mass.to(u.dtype).to(u.device)[:, None]  # in this order: not every device has float64
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
    _check_finite(us, names)
    return tuple(_TorchWasserstein.apply(u, target) for u, target in zip(us, targets, strict=True))


def _check_finite(samples: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise the engine's ValueError, "<name>: nan at row 3, column 17", where a sample [n, d] is not finite."""
    finite = torch.stack([sample.isfinite().all() for sample in samples])
    if not finite.all():  # one wait for all
        k = int((~finite).nonzero()[0])
        row, column = (~samples[k].isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{names[k]}: {samples[k][row, column].item()} at row {row}, column {column}")


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
        return list(map(torch.from_numpy, _core.sort_columns(list(map(as_array, samples)), names, get_num_threads())))
    _check_finite(samples, names)
    return [sample.sort(dim=0).values for sample in samples]
