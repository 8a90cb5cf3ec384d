"""Steps of a fit at rates that are given, or that the loss itself tells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._checks import double
from .objective import NonFinite, Objective, Task
from .parameters import MapParameters, Penalties, ProximalOptimizer
from .preservation import KeepWeight, Preservation

# A rate may leave the first one by so much, down and up.
LEAST_RATE, MOST_RATE = 0.1, 100.0
# Steady rates look back so many steps, and so recover from one that rounding or a change of ranks made short.
WINDOW = 10
# What a rate is divided by after a step that made things worse.
RETREAT = 4.0
# After so many steps in a row that lower nothing, each a quarter of the one before, none will.
MOST_RETREATS = 6
# What a checkpoint keeps of automatic steps, and of where they stand.
_NUMBERS = ("lr", "rate", "recent", "moved", "retreats")
_TENSORS = ("terms", "grad_weight", "grad_bias")
_KEPT_TENSORS = ("kept grad_weight", "kept grad_bias")


def cosine_rate(lr: float, step: int, steps: int) -> float:
    """Rate of step 0..steps-1: half a cosine from ``lr`` down towards ``lr / 1000``."""
    floor = 1e-3 * lr
    return floor + 0.5 * (lr - floor) * (1 + math.cos(math.pi * step / steps))


class Kept(NamedTuple):
    """A divergence on what is to stay as it is, and its gradients [D]."""

    value: float
    grad_weight: Tensor
    grad_bias: Tensor


class Iterate:
    """Maps as they stood once, with the loss and the gradients there, and what preservation says of them."""

    def __init__(
        self,
        maps: MapParameters,
        loss: float,
        terms: Tensor,
        grad_weight: Tensor,
        grad_bias: Tensor,
        kept: Kept | None = None,
    ) -> None:
        self.weight, self.bias = maps.weight.clone(), maps.bias.clone()
        self.loss, self.terms, self.grad_weight, self.grad_bias = loss, terms, grad_weight, grad_bias
        self.kept = kept

    def total(self, keep_weight: float) -> float:
        """The loss and, so many times, the divergence."""
        return self.loss if self.kept is None else self.loss + keep_weight * self.kept.value

    def gradients(self, keep_weight: float) -> tuple[Tensor, Tensor]:
        """Gradients [D] of `total`."""
        if self.kept is None or keep_weight == 0:
            return self.grad_weight, self.grad_bias
        return (
            torch.add(self.grad_weight, self.kept.grad_weight, alpha=keep_weight),
            torch.add(self.grad_bias, self.kept.grad_bias, alpha=keep_weight),
        )

    def support(self) -> Tensor:
        """Which neurons are mapped: bool [D]."""
        return (self.weight != 1) | (self.bias != 0)

    def difference(self, other: Iterate, keep_weight: float) -> tuple[Tensor, Tensor]:
        """Steps and changes of the gradient from `other`: float64 [2 D] each, or float32 where there is no float64."""
        steps = torch.cat([self.weight - other.weight, self.bias - other.bias])
        pairs = zip(self.gradients(keep_weight), other.gradients(keep_weight), strict=True)
        return double(steps), double(torch.cat([here - there for here, there in pairs]))

    def first_rate(self, keep_weight: float) -> float:
        """The rate at which a linear loss would reach 0, its lower bound: a step of Polyak (1969).

        For a quadratic it is half the inverse of its curvature along the gradient, or longer where the minimum is above
        0; a loss multiplied by a number gives the rate divided by it.
        """
        squared = sum(float(double(grad).square().sum()) for grad in self.gradients(keep_weight))
        total = self.total(keep_weight)
        return total / squared if squared > 0 and total > 0 else 1.0


def penalty_of(at: Iterate | MapParameters, penalties: Penalties, widths: Sequence[int]) -> float:
    """The penalty of maps, as they stand or once stood; see `ProximalOptimizer`."""
    l1, group, l1_bias, group_bias = penalties
    total = 0.0
    for x, lasso, ridge in ((double(at.weight) - 1, l1, group), (double(at.bias), l1_bias, group_bias)):
        total += lasso * float(x.abs().sum())
        total += ridge * sum(math.sqrt(len(part)) * float(part.norm()) for part in x.split(list(widths)) if ridge)
    return total


def kept_at(maps: MapParameters, preservation: Preservation | None) -> Kept | None:
    """What preservation says of the maps as they stand."""
    if preservation is None:
        return None
    value, *gradients = preservation.gradient(maps.leaves())
    return Kept(value, *maps.gradients(*gradients))


class SpectralSteps:
    """Proximal gradient steps that go down, at rates that follow the curvature met on the way.

    The rate of a step is <s, y> / <y, y>, with s the last change of the maps and y that of their gradient (Barzilai and
    Borwein 1988): with few neurons in the support the curvature along s is small and steps can be long. A step after
    which loss and penalty together are higher than before is taken back, and the next one is shorter. All this is as in
    SpaRSA (Wright, Nowak and Figueiredo 2009). The first rate is that of `Iterate.first_rate`, unless it is given.

    Parameters
    ----------
    objective : Objective
    maps : MapParameters
        Where to start; every step updates them in place.
    lr : float, optional
        The first rate.
    preservation : Preservation, optional
        What is added to the loss, `keep_weight` times.
    keep_weight : KeepWeight, optional
        The weight.
    steady : bool, default False
        Whether rates are half of the smallest of the last ten such ratios, and the first, unless it is given, a quarter
        of its own: so short that no direction is overshot.

    Attributes
    ----------
    iterate : Iterate
        Where the maps stand; None before the first `look`.
    """

    def __init__(
        self,
        objective: Objective,
        maps: MapParameters,
        lr: float | None = None,
        *,
        preservation: Preservation | None = None,
        keep_weight: KeepWeight | None = None,
        steady: bool = False,
    ) -> None:
        self.objective, self.maps, self.steady = objective, maps, steady
        self.preservation, self.keep_weight = preservation, keep_weight or KeepWeight(0.0)
        self.stepper = ProximalOptimizer(maps)
        self.lr, self.rate = lr, lr or 0.0
        self.recent: list[float] = []
        self.moved = False
        self.passes = 0
        self.iterate: Iterate = None  # type: ignore[assignment]

    def look(self, tasks: Sequence[Task]) -> None:
        """Take loss and gradients of the tasks at the maps as they stand: before the first step, or to change prompts.

        NonFinite if one of them is not finite.
        """
        self.tasks = tasks
        self.iterate = self._evaluate()
        self.keep_weight.start(self.iterate.loss)
        if self.lr is None:
            rate = self.iterate.first_rate(self.keep_weight.value) / (4 if self.steady else 1)
            self.lr = self.rate = self.objective.processes.same(rate)

    def _evaluate(self) -> Iterate:
        loss, terms, grad_weight, grad_bias = self.objective.gradient(self.tasks, self.maps.leaves())
        self.passes += sum(task.passes for task in self.tasks)
        kept = kept_at(self.maps, self.preservation)
        if self.preservation is not None:
            self.passes += self.preservation.passes
        return Iterate(self.maps, loss, terms, *self.maps.gradients(grad_weight, grad_bias), kept)

    def go_to(self, iterate: Iterate) -> None:
        """Put the maps where they were once."""
        self.maps.weight.copy_(iterate.weight)
        self.maps.bias.copy_(iterate.bias)
        self.iterate = iterate

    def step(
        self, penalties: Penalties, support: Tensor | None = None, shorten: float = 1.0
    ) -> tuple[float, float, bool] | None:
        """Take a step at the rate times `shorten`; with `support` [D], 1 or 0, only on its neurons.

        Returns the rate, the loss after the step and whether it was kept; None where the maps do not move. NonFinite if
        loss or gradients are not finite after the step: the maps are back where they were, and another step would be
        shorter.
        """
        old, rate = self.iterate, self.rate * shorten
        self.stepper.penalties = penalties
        mask = 1 if support is None else support
        try:
            grad_weight, grad_bias = old.gradients(self.keep_weight.value)
            self.stepper.step(grad_weight * mask, grad_bias * mask, rate)
            self.objective.processes.same_tensors(self.maps.weight, self.maps.bias)
            self.maps.check_finite()
            if torch.equal(self.maps.weight, old.weight) and torch.equal(self.maps.bias, old.bias):
                return None
            new = self._evaluate()
        except NonFinite:
            self._retreat(old, rate)
            raise
        except BaseException:
            self.go_to(old)
            raise
        self._learn(old, new, support)
        before, after = self.objective.processes.same(
            [at.total(self.keep_weight.value) + penalty_of(at, penalties, self.maps.sizes) for at in (old, new)]
        )
        kept = after <= before
        if kept:
            self.iterate = new
            self.moved = True
            if new.kept is not None:
                self.keep_weight.follow(new.kept.value)
        else:
            self._retreat(old, rate)
        return rate, new.loss, kept

    def _learn(self, old: Iterate, new: Iterate, support: Tensor | None) -> None:
        """Set the rate by the curvature between two iterates."""
        steps, changes = new.difference(old, self.keep_weight.value)
        if support is not None:
            changes *= torch.cat([support, support])
        along, squared = self.objective.processes.same([float(steps @ changes), float(changes @ changes)])
        if along > 0:
            self.recent = [*self.recent, along / squared][-WINDOW:]
            self.rate = min(self.recent) / 2 if self.steady else self.recent[-1]
            if self.moved and self.lr:  # a first rate that led nowhere is no measure
                self.rate = min(max(self.rate, LEAST_RATE * self.lr), MOST_RATE * self.lr)

    def _retreat(self, old: Iterate, rate: float) -> None:
        """Go back, and take a shorter step next; before any step was kept, shorter ones ever after."""
        self.go_to(old)
        self.rate = min(self.rate, rate / RETREAT)
        if not self.moved:
            self.lr = self.rate


@dataclass(frozen=True)
class Step:
    """What a step did: its rate, penalty and support after it, and whether it was kept."""

    lr: float
    penalty: float
    support: int
    kept: bool = True


class ScheduledSteps:
    """`steps` steps of `stepper` at rates that are given: half a cosine, from the first one, `lr`, down."""

    def __init__(
        self,
        objective: Objective,
        tasks: Sequence[Task],
        stepper: ProximalOptimizer,
        lr: float,
        steps: int,
        preservation: Preservation | None = None,
        keep_weight: KeepWeight | None = None,
    ) -> None:
        self.objective, self.tasks, self.stepper = objective, tasks, stepper
        self.lr, self.count = lr, steps
        self.preservation, self.keep_weight = preservation, keep_weight or KeepWeight(0.0)
        self.kept: Kept | None = None
        self.passes = 0

    @property
    def loss(self) -> None:
        """The loss at the maps as they stand: only another pass would tell."""
        return None

    def measure(self, step: int) -> tuple[float, Tensor]:
        """Loss and terms at the maps as they stand, of the prompts of a step."""
        tasks = [task.at(step) for task in self.tasks]
        maps = self.stepper.maps
        total, terms, *gradients = self.objective.gradient(tasks, maps.leaves())
        self.passes += sum(task.passes for task in tasks)
        if self.preservation is not None:
            self.preservation.at(step)
        self.kept = kept_at(maps, self.preservation)
        at = Iterate(maps, total, terms, *maps.gradients(*gradients), self.kept)
        if self.preservation is not None and self.kept is not None:
            self.passes += self.preservation.passes
            self.keep_weight.start(total)
            if step:
                self.keep_weight.follow(self.kept.value)
        self.gradients = at.gradients(self.keep_weight.value)
        return total, terms

    def move(self, step: int) -> Step:
        """Take the step."""
        rate = cosine_rate(self.lr, step, self.count)
        taken = self.stepper.step(*self.gradients, rate)
        self.objective.processes.same_tensors(self.stepper.maps.weight, self.stepper.maps.bias)
        penalty, support = self.objective.processes.same(taken)
        return Step(rate, penalty, support)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What it takes to go on, beside the maps."""
        moments = self.stepper.moments or []
        state = {"taken": self.stepper.taken, "keep_weight": [self.keep_weight.value, self.keep_weight.first]}
        return {f"moment {k}": moment for k, moment in enumerate(moments)}, state

    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.stepper.taken = state["taken"]
        self.keep_weight.value, self.keep_weight.first = state["keep_weight"]
        for k, moment in enumerate(self.stepper.moments or []):
            moment.copy_(tensors[f"moment {k}"])


class AutomaticSteps(SpectralSteps):
    """Steps at rates that the loss itself tells: steady ones.

    With mini-batches a step is judged by the prompts that it was taken for, at both its ends, and the rates are
    multiplied by a falling half cosine.
    """

    def __init__(
        self,
        objective: Objective,
        tasks: Sequence[Task],
        maps: MapParameters,
        penalties: Penalties,
        steps: int,
        preservation: Preservation | None = None,
        keep_weight: KeepWeight | None = None,
    ) -> None:
        super().__init__(objective, maps, preservation=preservation, keep_weight=keep_weight, steady=True)
        self.tasks, self.penalties, self.count = tasks, penalties, steps
        self.sampled = tasks[0].sampler is not None  # then all are
        self.retreats = 0

    @property
    def loss(self) -> float | None:
        """The loss at the maps as they stand, if that of all prompts is known."""
        return None if self.iterate is None or self.sampled else self.iterate.loss

    def measure(self, step: int) -> tuple[float, Tensor]:
        """Loss and terms at the maps as they stand, of the prompts of a step."""
        if self.iterate is None or self.sampled:
            if self.preservation is not None:
                self.preservation.at(step)
            self.look([task.at(step) for task in self.tasks])  # they keep their samplers
        return self.iterate.loss, self.iterate.terms

    @property
    def kept(self) -> Kept | None:
        """What preservation says of the maps as they stand."""
        return None if self.iterate is None else self.iterate.kept

    def move(self, step: int) -> Step | None:
        """Take the step; None where no step leads on."""
        if self.retreats == MOST_RETREATS:
            return None
        rate = self.rate
        try:
            taken = self.step(self.penalties, shorten=cosine_rate(1.0, step, self.count) if self.sampled else 1.0)
        except NonFinite:
            if self.retreats + 1 == MOST_RETREATS:
                raise
            taken = rate, math.nan, False
        if taken is None:
            if not self.sampled:
                return None
            taken = rate, math.nan, True
        rate, _, kept = taken
        self.retreats = 0 if kept else self.retreats + 1
        penalty = self.objective.processes.same(penalty_of(self.iterate, self.penalties, self.maps.sizes))
        return Step(rate, penalty, int(self.iterate.support().sum()), kept)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What it takes to go on, beside the maps; mini-batches take loss and gradients anew."""
        state = {name: getattr(self, name) for name in _NUMBERS} | {
            "keep_weight": [self.keep_weight.value, self.keep_weight.first]
        }
        if self.iterate is None or self.sampled:
            return {}, state
        tensors = {name: getattr(self.iterate, name) for name in _TENSORS}
        if self.iterate.kept is not None:
            state["kept"], *gradients = self.iterate.kept
            tensors |= dict(zip(_KEPT_TENSORS, gradients, strict=True))
        return tensors, {**state, "loss": self.iterate.loss}

    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from `state`, at maps that are in place again."""
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self.keep_weight.value, self.keep_weight.first = state["keep_weight"]
        if "loss" in state:

            def there(names: Sequence[str]) -> list[Tensor]:
                return [tensors[name].to(self.maps.weight.device) for name in names]

            kept = Kept(state["kept"], *there(_KEPT_TENSORS)) if "kept" in state else None
            terms, grad_weight, grad_bias = there(_TENSORS)
            self.iterate = Iterate(self.maps, state["loss"], terms, grad_weight, grad_bias, kept)


Steps: TypeAlias = ScheduledSteps | AutomaticSteps
"""What the loop of a fit takes its steps by."""
