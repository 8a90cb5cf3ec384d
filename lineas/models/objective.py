"""The loss of an end-to-end fit: prompts through the model with maps on, pooled, and compared with their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import calling, sites
from .autograd import affine, wasserstein, working_dtype
from .collect import pool_output

SCALINGS = ("layer-mean", "paper", "reference")

Leaves = Mapping[str, tuple[Tensor, Tensor]]


class NonFinite(ValueError):
    """A loss or a gradient is not finite; the message names the module."""


class Sets(NamedTuple):
    """Prompts and what their activations are compared with."""

    argument: str
    """What error messages call the prompts."""
    batches: Sequence[calling.Batch]
    targets: Sequence[Tensor]
    """Target activations [m, d_k] of every loss module, each column ascending."""


def check_count(samples: Sequence[Tensor], argument: str) -> None:
    """Raise ValueError where there are fewer than two samples: one has no distribution to move."""
    if len(samples[0]) < 2:
        raise ValueError(f"{argument} must give at least 2 samples after pooling, got {len(samples[0])}")


class Objective:
    """The sum over modules of the squared Wasserstein distances between mapped source and target activations.

    Parameters
    ----------
    model : nn.Module
        The model, inside `calling.frozen`.
    map_names, loss_names : list of str
        Modules that carry maps and modules where the loss is taken, each in execution order.
    forward : callable, optional
        How to call the model.
    pooling : str
        How tokens are pooled.
    scaling : {"layer-mean", "paper", "reference"}
        The mean of the modules' terms; their sum (LinEAS, arXiv 2503.10679, eq. 4); or what the published code
        minimises, in which the term of a module is multiplied by min(n, m) / d and the mean taken.
    """

    def __init__(
        self,
        model: nn.Module,
        map_names: Sequence[str],
        loss_names: Sequence[str],
        *,
        forward: calling.Forward | None,
        pooling: str,
        scaling: str,
    ) -> None:
        self.model, self.map_names, self.loss_names = model, list(map_names), list(loss_names)
        self.forward, self.pooling, self.scaling = forward, pooling, scaling
        self.widths: dict[str, int] = {}
        self.dtype = torch.float64
        self.device = torch.device("cpu")

    def survey(self, batches: Sequence[calling.Batch]) -> list[Tensor]:
        """Run batches without maps: learn the mapped modules' widths, the working dtype and the device.

        Returns
        -------
        list of Tensor [n, d_k]
            The pooled activations of the loss modules.
        """

        def look(name: str, module: nn.Module, tensor: Tensor) -> None:
            width = tensor.shape[sites.channel_axis(module, tensor)]
            if self.widths.setdefault(name, width) != width:
                raise ValueError(f"module {name!r} has {width} neurons in one call and {self.widths[name]} in another")
            if working_dtype(tensor.dtype) == torch.float32:
                self.dtype = torch.float32
            if name == self.map_names[0]:
                self.device = tensor.device

        self.dtype = torch.float64
        with torch.no_grad():
            return self._responses(calling.Capture(), batches, look)

    def _responses(
        self, capture: calling.Capture, batches: Sequence[calling.Batch], act: calling.OnOutput
    ) -> list[Tensor]:
        """Pooled activations [n, d_k] of the loss modules, all batches one after the other.

        ``act`` is what happens to the outputs of the modules with maps, before they are pooled.
        """
        names = list(dict.fromkeys([*self.map_names, *self.loss_names]))
        mapped = frozenset(self.map_names)
        parts: dict[str, list[Tensor]] = {name: [] for name in self.loss_names}
        for batch in batches:
            pooled: dict[str, Tensor] = {}

            def on_output(name: str, module: nn.Module, tensor: Tensor, batch=batch, pooled=pooled) -> Tensor | None:
                replaced = act(name, module, tensor) if name in mapped else None
                if name in parts and name not in pooled:  # a module called twice counts with its first call
                    seen = tensor if replaced is None else replaced
                    pooled[name] = pool_output(name, module, seen, batch.mask, self.pooling)
                return replaced

            capture.run(self.model, batch, names, on_output, last=self.loss_names[-1], forward=self.forward)
            for name, value in pooled.items():
                parts[name].append(value.to(self.device, self.dtype))
        return [torch.cat(parts[name]) for name in self.loss_names]

    def gradient(self, sets: Sets, maps: Leaves) -> tuple[float, Tensor, Tensor, Tensor]:
        """The loss and its gradient.

        Returns
        -------
        loss : float
        terms : Tensor [L]
        grad_weight, grad_bias : Tensor [D]
            Gradients in the slopes and shifts of all maps, one after the other.

        Raises
        ------
        NonFinite
            If the loss or a gradient is not finite; names the module.
        ValueError
            If a map has no influence on the loss.
        """
        weights, biases = zip(*maps.values(), strict=True)
        leaves = [*weights, *biases]
        with calling.Capture() as capture:  # checkpointed layers run again on the way back and need their maps
            total, terms = self.loss(sets, maps, capture)
            found = (
                torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
            )
        names = [*maps, *maps]
        grads = [grad for grad in found if grad is not None]
        if len(grads) < len(names):
            name = next(name for name, grad in zip(names, found, strict=True) if grad is None)
            raise ValueError(f"layers: no gradient reaches module {name!r}: no loss module depends on its output")
        grad_weight, grad_bias = torch.cat(grads[: len(maps)]), torch.cat(grads[len(maps) :])
        if not (grad_weight.isfinite().all() and grad_bias.isfinite().all()):
            # The last module in execution order: backwards, the first in which something went wrong.
            bad = [name for name, grad in zip(names, grads, strict=True) if not grad.isfinite().all()]
            raise NonFinite(f"{sets.argument}: {max(bad, key=self.map_names.index)}: the gradient is not finite")
        return total.item(), terms, grad_weight, grad_bias

    def loss(self, sets: Sets, maps: Leaves, capture: calling.Capture | None = None) -> tuple[Tensor, Tensor]:
        """The loss with the maps on; ``capture`` runs the model, and holds the hooks for a backward pass.

        Returns
        -------
        total : Tensor []
            The loss in the chosen scaling, differentiable in ``maps``.
        terms : Tensor [L]
            The term of every loss module: the loss is their mean, or their sum in the scaling "paper".

        Raises
        ------
        NonFinite
            If an activation or a term is not finite.
        """

        def act(name: str, module: nn.Module, tensor: Tensor) -> Tensor:
            weight, bias = maps[name]
            return affine(tensor, weight, bias, 1.0, sites.channel_axis(module, tensor))

        us = self._responses(capture or calling.Capture(), sets.batches, act)
        check_count(us, sets.argument)
        try:
            values = wasserstein(us, sets.targets, self.loss_names)
        except ValueError as error:
            if all(u.isfinite().all() for u in us):
                raise
            raise NonFinite(f"{sets.argument}: {error}") from None
        terms = torch.stack([w2.sum() * self._scale(u, v) for w2, u, v in zip(values, us, sets.targets, strict=True)])
        if not terms.isfinite().all():
            name = self.loss_names[int((~terms.isfinite()).nonzero()[0])]
            raise NonFinite(f"{sets.argument}: {name}: the loss overflows {self.dtype}")
        return (terms.sum() if self.scaling == "paper" else terms.mean()), terms.detach()

    def _scale(self, u: Tensor, target: Tensor) -> float:
        return min(len(u), len(target)) / u.shape[1] if self.scaling == "reference" else 1.0
