"""The parameters of all maps at once and their proximal gradient step: the C engine on the CPU, torch elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .. import _core
from .._threads import get_num_threads
from ..hooks.affine import on_engine
from ..hooks.modules import resolve
from ..maps.affine import AffineMap, at_strength
from .distributed import ALONE, Processes
from .objective import NonFinite, Objective, Standards
from .settings import ObjectiveSettings

ADAM_EPS = 1e-8

Penalties = tuple[float, float, float, float]
"""l1 and group of the slopes, l1 and group of the shifts."""


class MapParameters:
    """The slopes and shifts of the maps of several modules, one module after the other in two flat tensors.

    Parameters
    ----------
    widths : mapping of str to int
        The number of neurons of every module, in execution order. The maps start as identities.
    dtype : torch.dtype
        float32 or float64.
    device : torch.device
        Where the parameters live.
    standards : Standards, optional
        Where given, the parameters are those of standardized activations: the change of an activation z is
        ``spread * ((weight - 1) * (z - center) / scale + bias)``, so that a slope and a shift of the same size change
        tokens as much, in units of the spread. A neuron that is left alone in one form is in the other.

    Attributes
    ----------
    weight, bias : Tensor [D]
        The parameters, which steps update in place.
    free_weight, free_bias : Tensor [D] or None
        1 where slopes, or shifts, may leave the identity, 0 where not; None for all of them.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
        standards: Standards | None = None,
    ) -> None:
        self.names, self.widths = list(widths), dict(widths)
        self.offsets = np.cumsum([0, *widths.values()], dtype=np.int64)
        total = int(self.offsets[-1])
        self.weight = torch.ones(total, dtype=dtype, device=device)
        self.bias = torch.zeros(total, dtype=dtype, device=device)
        self.standards = standards
        self.free_weight: Tensor | None = None
        self.free_bias: Tensor | None = None

    @property
    def sizes(self) -> list[int]:
        """The number of neurons of every module."""
        return np.diff(self.offsets).tolist()

    def module_of(self, marked: Tensor) -> str:
        """The module of the first neuron that is marked in [D]."""
        return self.names[int(np.searchsorted(self.offsets, int(marked.nonzero()[0]), side="right")) - 1]

    def check_finite(self) -> None:
        """Raise NonFinite where a step took a map out of the range of its dtype."""
        finite = self.weight.isfinite() & self.bias.isfinite()
        if not finite.all():
            raise NonFinite(f"{self.module_of(~finite)}: the map is not finite")

    def support(self) -> Tensor:
        """Which neurons are mapped: bool [D]."""
        return (self.weight != 1) | (self.bias != 0)

    def load(self, maps: Mapping[str, AffineMap]) -> None:
        """Copy maps in; ValueError if their names or widths are not those of the modules."""
        missing, extra = sorted(set(self.names) - set(maps)), sorted(set(maps) - set(self.names))
        if missing or extra:
            raise ValueError(
                f"init must have one map for each of the {len(self.names)} mapped modules: "
                f"missing {missing[:3]}, not mapped {extra[:3]}"
            )
        for name, width, start in zip(self.names, self.sizes, self.offsets, strict=False):
            if len(maps[name].weight) != width:
                raise ValueError(f"init: module {name!r} has {width} neurons, its map has {len(maps[name].weight)}")
            for values, given in ((self.weight, maps[name].weight), (self.bias, maps[name].bias)):
                values[start : start + width] = torch.tensor(given, dtype=values.dtype, device="cpu")
        if self.standards is not None:
            center, spread, scale = self.standards
            self.bias.sub_(center * (1 - self.weight)).div_(spread)
            self.weight.sub_(1).mul_(scale / spread).add_(1)
        for values, fixed, free, which in (
            (self.weight, 1.0, self.free_weight, "slopes"),
            (self.bias, 0.0, self.free_bias, "shifts"),
        ):
            moved = None if free is None else (values != fixed) & (free == 0)
            if moved is not None and moved.any():
                raise ValueError(
                    f"init: the map of module {self.module_of(moved)!r} has {which}, and none are to be fitted"
                )

    def maps(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes and shifts [..., D] of the maps that have these parameters."""
        if self.standards is None:
            return weight, bias
        center, spread, scale = self.standards
        change = spread / scale * (weight - 1)
        return 1 + change, spread * bias - center * change

    def gradients(self, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients [D] in the parameters from those in slopes and shifts of the maps; 0 for what may not move."""
        if self.standards is not None:
            center, spread, scale = self.standards
            grad_weight, grad_bias = spread / scale * (grad_weight - center * grad_bias), spread * grad_bias
        if self.free_weight is not None:
            grad_weight = grad_weight * self.free_weight
        if self.free_bias is not None:
            grad_bias = grad_bias * self.free_bias
        return grad_weight, grad_bias

    def leaves(self, strength: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
        """Slopes and shifts of the map of every module, as gradient leaves."""
        weights, biases = self.maps(*((self.weight, self.bias) if strength == 1 else self.at(strength)))
        return {
            name: (weight.detach().requires_grad_(), bias.detach().requires_grad_())
            for name, weight, bias in zip(self.names, weights.split(self.sizes), biases.split(self.sizes), strict=True)
        }

    def at(self, strength: float) -> tuple[Tensor, Tensor]:
        """Parameters [D] that do at strength 1 what these do at `strength`: copies."""
        return at_strength(self.weight, self.bias, strength, torch.where)

    def snapshot(self, processes: Processes = ALONE) -> dict[str, AffineMap]:
        """The maps as they stand, copied; those of the first of several processes."""
        values = self.maps(self.weight, self.bias)
        processes.same_tensors(*values)
        weights, biases = (part.cpu().split(self.sizes) for part in values)
        return {
            name: AffineMap(weight.numpy().copy(), bias.numpy().copy())
            for name, weight, bias in zip(self.names, weights, biases, strict=True)
        }


def parameters_of(objective: Objective, settings: ObjectiveSettings) -> MapParameters:
    """Identities for the mapped modules, standardized as the objective is; slopes and shifts move where they are to.

    ValueError if `settings.slopes` and `settings.shifts` leave nothing to be fitted, or name other modules.
    """
    maps = MapParameters(objective.widths, objective.dtype, objective.device, objective.standards())
    free = {}
    for argument, chosen in (("slopes", settings.slopes), ("shifts", settings.shifts)):
        names = maps.names if chosen is True else []
        if not isinstance(chosen, bool):
            names = [name for name in resolve(objective.model, chosen, argument=argument) if name in maps.widths]
            if not names:
                raise ValueError(f"{argument}: {chosen!r} matches none of the modules that are mapped")
        free[argument] = torch.cat([maps.weight.new_full((d,), name in names) for name, d in maps.widths.items()])
    none = (free["slopes"] == 0) & (free["shifts"] == 0)
    if none.any():
        module = maps.module_of(none)
        raise ValueError(f"slopes and shifts: neither is to be fitted in module {module!r}")
    if not free["slopes"].all():
        maps.free_weight = free["slopes"]
    if not free["shifts"].all():
        maps.free_bias = free["shifts"]
        if maps.standards is not None:  # a slope about a center has a shift
            maps.standards = maps.standards._replace(center=maps.standards.center * free["shifts"])
    return maps


class ProximalOptimizer:
    """Gradient steps on `MapParameters`, each followed by the proximal operator of the sparse group lasso.

    The penalty is l1 ||x||_1 + group sqrt(d) ||x||_2, summed over the groups x = weight - 1 and x = bias of every
    module (LinEAS, arXiv 2503.10679, section 3).

    Parameters
    ----------
    maps : MapParameters
        The parameters; every step updates them in place.
    penalties : (float, float, float, float)
        l1 and group of the slopes, l1 and group of the shifts.
    optimizer : {"sgd", "adam"}, default "sgd"
        Plain gradient descent without momentum, or Adam with bias correction, eps 1e-8 and no weight decay.
    betas : (float, float), default (0.9, 0.999)
        Adam's decay rates of the first and second moment.
    """

    def __init__(
        self,
        maps: MapParameters,
        penalties: Penalties = (0.0, 0.0, 0.0, 0.0),
        optimizer: str = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.maps, self.penalties, self.betas = maps, penalties, betas
        self.taken = 0
        start = (maps.weight, maps.weight, maps.bias, maps.bias)
        self.moments = [torch.zeros_like(x) for x in start] if optimizer == "adam" else None

    def step(self, grad_weight: Tensor, grad_bias: Tensor, lr: float) -> tuple[float, int]:
        """Take one step at rate ``lr``, which is also the tau of the proximal operator.

        Returns the penalty after the step, not multiplied by the rate, and how many neurons are mapped. ValueError if a
        gradient is not finite; the parameters are then unchanged.
        """
        step = self._engine_step if on_engine(self.maps.weight) else self._torch_step
        result = step(grad_weight, grad_bias, lr)
        self.taken += 1
        return result

    def _engine_step(self, grad_weight: Tensor, grad_bias: Tensor, lr: float) -> tuple[float, int]:
        adam = None
        if self.moments is not None:
            m_weight, v_weight, m_bias, v_bias = (moment.numpy() for moment in self.moments)
            adam = (m_weight, v_weight, m_bias, v_bias, self.taken + 1, *self.betas, ADAM_EPS)
        return _core.step(
            self.maps.weight.numpy(),
            self.maps.bias.numpy(),
            grad_weight.numpy(),
            grad_bias.numpy(),
            self.maps.offsets,
            lr,
            *self.penalties,
            adam,
            get_num_threads(),
        )

    def _torch_step(self, grad_weight: Tensor, grad_bias: Tensor, lr: float) -> tuple[float, int]:
        """Twin of the engine's step in torch operations."""
        weight, bias = self.maps.weight, self.maps.bias
        for name, grad in (("grad_weight", grad_weight), ("grad_bias", grad_bias)):
            if not grad.isfinite().all():
                raise ValueError(f"{name} is not finite at {int((~grad.isfinite()).nonzero()[0])}")
        if self.moments is None:
            weight.sub_(grad_weight, alpha=lr)
            bias.sub_(grad_bias, alpha=lr)
        else:
            m_weight, v_weight, m_bias, v_bias = self.moments
            self._adam(weight, grad_weight, m_weight, v_weight, lr)
            self._adam(bias, grad_bias, m_bias, v_bias, lr)
        l1, group, l1_bias, group_bias = self.penalties
        penalty = weight.new_zeros(())
        for start, stop in zip(self.maps.offsets[:-1], self.maps.offsets[1:], strict=True):
            moved, cost = _torch_prox(weight[start:stop] - 1, lr, l1, group)
            weight[start:stop] = 1 + moved
            penalty += cost
            moved, cost = _torch_prox(bias[start:stop], lr, l1_bias, group_bias)
            bias[start:stop] = moved
            penalty += cost
        return penalty.item(), int(self.maps.support().sum())

    def _adam(self, values: Tensor, grad: Tensor, first: Tensor, second: Tensor, lr: float) -> None:
        beta1, beta2 = self.betas
        taken = self.taken + 1
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (second / (1 - beta2**taken)).sqrt_().add_(ADAM_EPS)
        values.addcdiv_(first, root, value=-lr / (1 - beta1**taken))


def _torch_prox(x: Tensor, tau: float, l1: float, group: float) -> tuple[Tensor, Tensor]:
    """Proximal operator of one group x [d] at ``tau``, and the penalty at the result; no copy to the host."""
    x = torch.nn.functional.softshrink(x, tau * l1)
    width = math.sqrt(len(x))
    norm = x.norm().clamp(min=torch.finfo(x.dtype).tiny)  # a zero group stays zero, without 0 / 0
    x = x * (1 - tau * group * width / norm).clamp(min=0)
    return x, l1 * x.abs().sum() + group * width * x.norm()
