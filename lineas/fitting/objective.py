"""The loss of an end-to-end fit: prompts through the model with maps on, pooled, and compared with their targets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..hooks import outputs
from ..hooks.affine import affine, working_dtype
from ..hooks.capture import Capture, OnOutput
from ..hooks.pooling import pool_output
from ..hooks.tokens import Choice
from ..inputs.batches import Batch, Sampler
from ..inputs.call import Forward
from ..inputs.frozen import RandomState
from ..maps.metadata import Selection
from .autograd import wasserstein

SCALINGS = ("layer-mean", "paper", "reference")

Leaves = Mapping[str, tuple[Tensor, Tensor]]

# Gradients that go through a float16 model are scaled by a power of two so that the largest of those that enter it is
# about 2 ** 6: a factor of 2 ** 9 below the overflow, and entries down to 2 ** -20 times that one keep all their bits.
# Where that overflows, smaller ones are tried.
HALF_EXPONENTS = (6, 2, -2, -6)


class NonFinite(ValueError):
    """A loss or a gradient is not finite; the message names the module."""


class Sets(NamedTuple):
    """Prompts and what their activations are compared with."""

    argument: str
    """What error messages call the prompts."""
    batches: Sequence[Batch]
    targets: Sequence[Tensor]
    """Target activations [m, d_k] of every loss module, each column ascending."""
    sampler: Sampler | None = None
    """Where the prompts of a step come from, if they are not the same in each."""

    def at(self, step: int) -> Sets:
        """The sets of a step, counted from 0."""
        return self if self.sampler is None else self._replace(batches=self.sampler.draw(step))

    @property
    def passes(self) -> int:
        """What a gradient costs: one for each forward pass of the prompts, in part or whole, and two backward."""
        return 3 if len(self.batches) == 1 else 4


def check_count(samples: Sequence[Tensor], argument: str) -> None:
    """Raise ValueError where there are fewer than two samples: one has no distribution to move."""
    if len(samples[0]) < 2:
        raise ValueError(f"{argument} must give at least 2 samples after pooling, got {len(samples[0])}")


class Objective:
    """The sum over modules of the squared Wasserstein distances between mapped source and target activations.

    Parameters
    ----------
    model : nn.Module
        The model, inside `frozen`.
    map_names, loss_names : list of str
        Modules that carry maps and modules where the loss is taken, each in execution order.
    forward : callable, optional
        How to call the model.
    pooling : str
        How tokens are pooled.
    scaling : {"layer-mean", "paper", "reference"}
        The mean of the modules' terms; their sum (LinEAS, arXiv 2503.10679, eq. 4); or what the published code
        minimises, in which the term of a module is multiplied by min(n, m) / d and the mean taken.
    tokens : selection, default "all"
        Which tokens the maps act on, and are pooled; see `lineas.hooks.tokens`.
    """

    def __init__(
        self,
        model: nn.Module,
        map_names: Sequence[str],
        loss_names: Sequence[str],
        *,
        forward: Forward | None,
        pooling: str,
        scaling: str,
        tokens: Selection = "all",
    ) -> None:
        self.model, self.map_names, self.loss_names = model, list(map_names), list(loss_names)
        self.forward, self.pooling, self.tokens, self.scaling = forward, pooling, tokens, scaling
        self.widths: dict[str, int] = {}
        self.dtype = torch.float64
        self.device = torch.device("cpu")
        self.seen: set[torch.dtype] = set()

    def survey(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Run batches without maps: learn the mapped modules' widths, the working dtype and the device.

        Returns
        -------
        list of Tensor [n, d_k]
            The pooled activations of the loss modules.
        """

        def look(name: str, module: nn.Module, tensor: Tensor) -> None:
            width = tensor.shape[outputs.channel_axis(module, tensor, name)]
            if self.widths.setdefault(name, width) != width:
                raise ValueError(f"module {name!r} has {width} neurons in one call and {self.widths[name]} in another")
            if working_dtype(tensor.dtype) == torch.float32:
                self.dtype = torch.float32
            if name == self.map_names[0]:
                self.device = tensor.device

        self.dtype = torch.float64
        with torch.no_grad():
            return self._join([self._pooled(Capture(), batch, look) for batch in batches])

    def _join(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Pooled activations [n, d_k] of the loss modules, all batches one after the other."""
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]

    def _pooled(self, capture: Capture, batch: Batch, act: OnOutput) -> list[Tensor]:
        """Pooled activations [n, d_k] of the loss modules for one batch.

        ``act`` is what happens to the outputs of the modules with maps, before they are pooled.
        """
        names = list(dict.fromkeys([*self.map_names, *self.loss_names]))
        mapped, wanted = frozenset(self.map_names), frozenset(self.loss_names)
        choice = Choice(self.tokens, self.model, batch, self.pooling)
        pooled: dict[str, Tensor] = {}
        differentiated = torch.is_grad_enabled()

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
            if differentiated and not torch.is_grad_enabled():
                raise ValueError(
                    f"forward: module {name!r} ran without gradients, under a torch.no_grad() of its caller such as "
                    "that of a diffusers pipeline; give a forward that runs it with them, like "
                    "type(pipe).__call__.__wrapped__"
                )
            self.seen.add(tensor.dtype)
            replaced = act(name, module, tensor) if name in mapped else None
            if replaced is not None:
                replaced = choice.only(name, module, tensor, replaced)
            if name in wanted and name not in pooled:  # a module called twice counts with its first call
                seen = tensor if replaced is None else replaced
                mask = choice.mask(name, module, tensor)
                pooled[name] = pool_output(name, module, seen, mask, self.pooling, choice.size(name))
            return replaced

        capture.run(self.model, batch, names, on_output, last=self.loss_names[-1], forward=self.forward)
        return [pooled[name].to(self.device, self.dtype) for name in self.loss_names]

    @staticmethod
    def _steer(maps: Leaves) -> OnOutput:
        """The maps, as what happens to the outputs of their modules."""

        def act(name: str, module: nn.Module, tensor: Tensor) -> Tensor:
            weight, bias = maps[name]
            return affine(tensor, weight, bias, 1.0, outputs.channel_axis(module, tensor, name))

        return act

    def loss(self, sets: Sets, maps: Leaves) -> tuple[Tensor, Tensor]:
        """The loss with the maps on.

        Returns
        -------
        total : Tensor []
            The loss in the chosen scaling, without a graph: see `gradient`.
        terms : Tensor [L]
            The term of every loss module: the loss is their mean, or their sum in the scaling "paper".

        Raises
        ------
        NonFinite
            If an activation or a term is not finite.
        """
        act = self._steer(maps)
        with torch.no_grad():
            us = self._join([self._pooled(Capture(), batch, act) for batch in sets.batches])
            return self._compare(sets, us)

    def _compare(self, sets: Sets, us: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of pooled activations, differentiable in them, and its terms."""
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

    def gradient(self, sets: Sets, maps: Leaves) -> tuple[float, Tensor, Tensor, Tensor]:
        """The loss and its gradient.

        Several batches go through the model twice, all but the last, so that only the graph of one is alive at a time,
        however many there are: first without graphs, for the pooled activations of all, the loss and its gradient in
        them; then each by itself, to take its part of that gradient back to the maps (the cached gradients of Gao,
        Zhang, Han and Callan 2021, arXiv 2101.06983). Up to the order of sums it is the gradient of one large batch.

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
            If a map has no influence on the loss, or the model does not give the same activations twice.
        """
        act = self._steer(maps)
        states, parts = [], []
        with Capture() as capture:  # checkpointed layers run again on the way back and need their maps
            for k, batch in enumerate(sets.batches, start=1):
                states.append(RandomState(self.model))
                with torch.set_grad_enabled(k == len(sets.batches)):
                    parts.append(self._pooled(capture, batch, act))
            after = RandomState(self.model)
            us = [u.detach().requires_grad_() for u in self._join(parts)]
            total, terms = self._compare(sets, us)
            cached = torch.autograd.grad(total, us)
            rows = zip(*([len(u) for u in part] for part in parts), strict=True)
            shares = (grad.split(sizes) for grad, sizes in zip(cached, rows, strict=True))
            pulls = list(zip(*shares, strict=True))
            for exponent in self._exponents(cached):
                found = self._pull_back(capture, sets, act, maps, states, parts, pulls, 2.0**exponent)
                if torch.cat(list(found.values())).isfinite().all():
                    break
                parts = [[u.detach() for u in part] for part in parts]  # the last one's graph is used up
            else:
                # The last module in execution order: backwards, the first in which something went wrong.
                bad = [name for (name, _), grad in found.items() if not grad.isfinite().all()]
                name = max(bad, key=self.map_names.index)
                raise NonFinite(f"{sets.argument}: {name}: the gradient is not finite")
            after.restore()
        weights, biases = [found[name, 0] for name in maps], [found[name, 1] for name in maps]
        return total.item(), terms, torch.cat(weights), torch.cat(biases)

    def _exponents(self, cached: Sequence[Tensor]) -> Sequence[int]:
        """Powers of two to scale the gradients with on their way through the model, to be tried in this order."""
        if torch.float16 not in self.seen:
            return (0,)
        largest = max(grad.abs().max().item() for grad in cached)
        # Powers that float32 has, and not only its subnormal ones.
        return [min(max(exponent - math.frexp(largest)[1], -120), 120) for exponent in HALF_EXPONENTS]

    def _pull_back(
        self,
        capture: Capture,
        sets: Sets,
        act: OnOutput,
        maps: Leaves,
        states: Sequence[RandomState],
        parts: Sequence[Sequence[Tensor]],
        pulls: Sequence[Sequence[Tensor]],
        scale: float,
    ) -> dict[tuple[str, int], Tensor]:
        """Gradients of slopes (name, 0) and shifts (name, 1) from those of the pooled activations, batch by batch.

        The last of ``parts`` comes first, since it may have a graph. The others are made once more, from the same
        random numbers.
        """
        keys = [(name, k) for name in maps for k in (0, 1)]
        leaves = [maps[name][k] for name, k in keys]
        sums: dict[tuple[str, int], Tensor] = {}
        for batch, state, before, pull in reversed(list(zip(sets.batches, states, parts, pulls, strict=True))):
            pooled = before
            if not any(u.requires_grad for u in before):
                state.restore()
                pooled = self._pooled(capture, batch, act)
                self._check_repeated(sets.argument, before, pooled)
            reached = [k for k, u in enumerate(pooled) if u.requires_grad]
            if not reached:
                continue
            found = _differentiate([pooled[k] for k in reached], leaves, [pull[k] * scale for k in reached])
            for key, grad in zip(keys, found, strict=True):
                if grad is not None:
                    sums[key] = sums[key] + grad if key in sums else grad
        for name, k in keys:
            if (name, k) not in sums:
                raise ValueError(f"layers: no gradient reaches module {name!r}: no loss module depends on its output")
        return {key: sums[key] / scale for key in keys}

    def _check_repeated(self, argument: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Raise ValueError where a second run gives other activations, by more than half of the digits of their dtype.

        Then the gradients would be those of another loss.
        """
        tolerance = math.sqrt(max(torch.finfo(dtype).eps for dtype in self.seen))
        with torch.no_grad():
            same = torch.stack(
                [(a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(before, after, strict=True)]
            )
        if not same.all():
            name = self.loss_names[int((~same).nonzero()[0])]
            raise ValueError(
                f"{argument}: module {name!r} gave other activations when its batch was run a second time, so several "
                "batches cannot form one step; random numbers must come from torch's global generators"
            )


def _differentiate(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], pulls: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of `outputs`, multiplied by `pulls`, in the leaves; None where an output does not depend on one.

    Raises
    ------
    ValueError
        Where an operation has no gradient, as in some quantised layers. Torch would pass over it with a warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*an autograd kernel was not registered")
        try:
            return torch.autograd.grad(outputs, leaves, pulls, allow_unused=True)
        except UserWarning as warning:
            operation = str(warning).partition(": an autograd")[0]
            raise ValueError(
                f"model: {operation} has no gradient, so maps cannot be fitted through it: fit them on the model as it "
                "was before quantisation"
            ) from None
