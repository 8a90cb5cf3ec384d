"""Several tasks for the same maps: the mean of their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs.batches import Sampler
from .objective import Leaves, Objective, Sets


class Tasks(NamedTuple):
    """The sets of several tasks, which count alike; used in place of `Sets`."""

    parts: Sequence[Sets]

    @property
    def sampler(self) -> Sampler | None:
        """Where the prompts of the first task come from, if they are not the same in each step: then so for all."""
        return self.parts[0].sampler

    def at(self, step: int) -> Tasks:
        """The sets of a step, counted from 0."""
        return Tasks([part.at(step) for part in self.parts])

    @property
    def passes(self) -> int:
        """What loss and gradient of all tasks cost."""
        return sum(part.passes for part in self.parts)


def loss(objective: Objective, sets: Sets | Tasks, maps: Leaves) -> tuple[Tensor, Tensor]:
    """The loss with the maps on, of several tasks its mean, and its terms: [L], of tasks [T, L].

    Raises
    ------
    NonFinite
        As `Objective.loss`.
    """
    if isinstance(sets, Sets):
        return objective.loss(sets, maps)
    totals, terms = zip(*(objective.loss(part, maps) for part in sets.parts), strict=True)
    return torch.stack(totals).mean(), torch.stack(terms)


def gradient(objective: Objective, sets: Sets | Tasks, maps: Leaves) -> tuple[float, Tensor, Tensor, Tensor]:
    """The loss, its terms as in `loss`, and its gradients [D] in the slopes and in the shifts of all maps.

    One task after the other, so that the graph of only one is alive at a time.

    Raises
    ------
    NonFinite, ValueError
        As `Objective.gradient`.
    """
    if isinstance(sets, Sets):
        return objective.gradient(sets, maps)
    totals, terms, grad_weights, grad_biases = zip(
        *(objective.gradient(part, maps) for part in sets.parts), strict=True
    )
    means = (torch.stack(grads).mean(dim=0) for grads in (grad_weights, grad_biases))
    return sum(totals) / len(totals), torch.stack(terms), *means
