"""Proximal gradient steps that find their own rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .objective import NonFinite, Objective, Sets
from .parameters import FlatMaps, ProximalOptimizer
from .problem import check_maps
from .tasks import Tasks, gradient

# A rate may leave the first one by so much, down and up.
LEAST_RATE, MOST_RATE = 0.1, 100.0
# Steady rates look back so many steps, and so recover from one that rounding or a change of ranks made short.
WINDOW = 10
# What a rate is divided by after a step that made things worse.
RETREAT = 4.0

Penalties = tuple[float, float, float, float]
"""l1 and group of the slopes, l1 and group of the shifts."""


class Place:
    """Maps as they stood once, with the loss and the gradients there."""

    def __init__(self, maps: FlatMaps, loss: float, terms: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
        self.weight, self.bias = maps.weight.clone(), maps.bias.clone()
        self.loss, self.terms, self.grad_weight, self.grad_bias = loss, terms, grad_weight, grad_bias

    def support(self) -> Tensor:
        """Which neurons are mapped: bool [D]."""
        return (self.weight != 1) | (self.bias != 0)

    def gradients(self) -> tuple[NDArray, NDArray]:
        """Gradients in the slopes and in the shifts: [D] each."""
        return self.grad_weight.numpy(force=True), self.grad_bias.numpy(force=True)

    def difference(self, other: Place) -> tuple[Tensor, Tensor]:
        """Steps and changes of the gradient from `other`: float64 [2 D] each."""
        steps = torch.cat([self.weight - other.weight, self.bias - other.bias])
        changes = torch.cat([self.grad_weight - other.grad_weight, self.grad_bias - other.grad_bias])
        return steps.double(), changes.double()

    def first_rate(self) -> float:
        """The rate at which a linear loss would reach 0, its lower bound: a step of Polyak (1969).

        For a quadratic it is half the inverse of its curvature along the gradient, or longer where the minimum is above
        0; a loss multiplied by a number gives the rate divided by it.
        """
        squared = float(self.grad_weight.double().square().sum() + self.grad_bias.double().square().sum())
        return self.loss / squared if squared > 0 and self.loss > 0 else 1.0


class Descent:
    """Proximal gradient steps that go down, at rates that follow the curvature met on the way.

    The rate of a step is <s, y> / <y, y>, with s the last change of the maps and y that of their gradient (Barzilai and
    Borwein 1988): with few neurons in the support the curvature along s is small and steps can be long. A step after
    which loss and penalty together are higher than before is taken back, and the next one is shorter. All this is as in
    SpaRSA (Wright, Nowak and Figueiredo 2009). The first rate is that of `Place.first_rate`, unless it is given.

    Parameters
    ----------
    objective : Objective
    maps : FlatMaps
        Where to start; every step updates them in place.
    lr : float, optional
        The first rate.
    steady : bool, default False
        Whether rates are half of the smallest of the last ten such ratios, and the first, unless it is given, a quarter
        of its own: so short that no direction is overshot.
    """

    def __init__(self, objective: Objective, maps: FlatMaps, lr: float | None = None, *, steady: bool = False) -> None:
        self.objective, self.maps, self.steady = objective, maps, steady
        self.widths: list[int] = np.diff(maps.offsets).tolist()
        self.stepper = ProximalOptimizer(
            maps, optimizer="sgd", betas=(0.9, 0.999), l1=0.0, group=0.0, l1_bias=0.0, group_bias=0.0
        )
        self.lr, self.rate = lr, lr or 0.0
        self.recent: list[float] = []
        self.moved = False
        self.passes = 0
        self._place: Place | None = None

    @property
    def place(self) -> Place:
        """Where the maps stand."""
        if self._place is None:
            raise RuntimeError("look at the sets first")
        return self._place

    @place.setter
    def place(self, place: Place) -> None:
        self._place = place

    @property
    def started(self) -> bool:
        """Whether loss and gradients were taken anywhere yet."""
        return self._place is not None

    def look(self, sets: Sets | Tasks) -> None:
        """Take loss and gradients of the sets at the maps as they stand: before the first step, or to change the sets.

        Raises
        ------
        NonFinite
            If one of them is not finite.
        """
        self.sets = sets
        self.place = self._evaluate()
        if self.lr is None:
            self.lr = self.rate = self.place.first_rate() / (4 if self.steady else 1)

    def _evaluate(self) -> Place:
        loss, terms, grad_weight, grad_bias = gradient(self.objective, self.sets, self.maps.leaves())
        self.passes += self.sets.passes
        return Place(self.maps, loss, terms, grad_weight, grad_bias)

    def go_to(self, place: Place) -> None:
        """Put the maps where they were once."""
        self.maps.weight.copy_(place.weight)
        self.maps.bias.copy_(place.bias)
        self.place = place

    def step(
        self, penalties: Penalties, support: Tensor | None = None, shorten: float = 1.0
    ) -> tuple[float, float, bool] | None:
        """Take a step; with `support` [D], 1 or 0, only on its neurons.

        Parameters
        ----------
        penalties : (float, float, float, float)
        support : Tensor [D], optional
            1 for the neurons that may move, 0 for the others.
        shorten : float, default 1.0
            A factor of the rate of this step.

        Returns
        -------
        (rate, loss, kept) or None
            The loss after the step, and whether it was kept; None where the maps do not move.

        Raises
        ------
        NonFinite
            If loss or gradients are not finite after the step; the maps are back where they were, and another step
            would be shorter.
        """
        old, rate = self.place, self.rate * shorten
        self.stepper.penalties = penalties
        mask = 1 if support is None else support
        try:
            self.stepper.step(old.grad_weight * mask, old.grad_bias * mask, rate)
            check_maps(self.maps)
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
        before, after = (place.loss + penalty_of(place, penalties, self.widths) for place in (old, new))
        kept = after <= before
        if kept:
            self.place = new
            self.moved = True
        else:
            self._retreat(old, rate)
        return rate, new.loss, kept

    def _learn(self, old: Place, new: Place, support: Tensor | None) -> None:
        """Set the rate by the curvature between two places."""
        steps, changes = new.difference(old)
        if support is not None:
            changes *= torch.cat([support, support])
        along = float(steps @ changes)
        if along > 0:
            self.recent = [*self.recent, along / float(changes @ changes)][-WINDOW:]
            self.rate = min(self.recent) / 2 if self.steady else self.recent[-1]
            if self.moved and self.lr:  # a first rate that led nowhere is no measure
                self.rate = min(max(self.rate, LEAST_RATE * self.lr), MOST_RATE * self.lr)

    def _retreat(self, old: Place, rate: float) -> None:
        """Go back, and take a shorter step next; before any step was kept, shorter ones ever after."""
        self.go_to(old)
        self.rate = min(self.rate, rate / RETREAT)
        if not self.moved:
            self.lr = self.rate


def penalty_of(place: Place, penalties: Penalties, widths: Sequence[int]) -> float:
    """The penalty at a place, in float64; see `ProximalOptimizer`."""
    l1, group, l1_bias, group_bias = penalties
    total = 0.0
    for x, lasso, ridge in ((place.weight.double() - 1, l1, group), (place.bias.double(), l1_bias, group_bias)):
        total += lasso * float(x.abs().sum())
        total += ridge * sum(math.sqrt(len(part)) * float(part.norm()) for part in x.split(list(widths)) if ridge)
    return total
