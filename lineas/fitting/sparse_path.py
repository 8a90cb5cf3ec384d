"""Sparse paths through a model: maps for falling penalties, each fitted from the last, and refits on their supports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import _core
from .._checks import as_pair
from .._warn import warn
from ..hooks.attach import check_to_fit
from ..hooks.settings import optional, takes
from ..inputs.frozen import frozen
from ..maps.metadata import describe
from .checkpoint import digest, digest_of_weights
from .distributed import Processes, processes_of
from .end_to_end import prepare, read_sets
from .objective import NonFinite, Task
from .parameters import MapParameters, Penalties, parameters_of
from .result import EndToEndPath
from .settings import PathSettings
from .step_sizes import Iterate, SpectralSteps

# Rounding must not keep a neuron at the penalty that is to leave none.
ABOVE = 1 + 1e-5
# A step, as the arrays of `EndToEndPath.history` have it.
_RECORD = np.dtype([("point", "i8"), ("penalty", "f8"), ("refit", "?"), ("lr", "f8"), ("loss", "f8"), ("kept", "?")])


@takes(PathSettings)
def sparse_path_end_to_end(model: nn.Module, source: Any, target: Any, settings: PathSettings) -> EndToEndPath:
    """Fit the maps of all modules for falling penalties, from the identity to dense maps, in one walk.

    Every penalty is a fit as by `fit_end_to_end`, of few steps, since it starts where the one before ended. Rates
    follow the curvature, and a step that makes loss and penalty together larger is taken back (SpaRSA, Wright, Nowak
    and Figueiredo 2009). With `refit_steps` each point is then fitted without a penalty on the neurons of its support:
    a penalty that picks few neurons holds them near the identity as well. The next point starts from the penalised
    maps.

    The gradient at the end of a point is that at the start of the next, of its refit, and tells its loss, so a path of
    K points costs ``3 (1 + K steps)`` passes, and K with held-out data; a refit ``3 refit_steps`` more, and 1. It is 4
    in place of 3 where the source is divided into several forward passes.

    Parameters
    ----------
    model, source, target
        As in `fit_end_to_end`.
    **settings

    Returns
    -------
    EndToEndPath
        A `SparsePath` with ``penalized_loss``, ``penalized_held_out_loss`` (before the refits), ``refitted``,
        ``history`` (one entry a step), ``passes`` (what it cost) and ``stopped``. Ctrl-C and a value that is not finite
        end the path early and keep the points found.

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    ValueError
        As `fit_end_to_end`; and if the penalties are not falling, or a value is not finite before a point is found.

    Warns
    -----
    UserWarning
        If maps are attached to the model: what is fitted is right only together with them.
    """
    check_to_fit(model)
    processes, model = processes_of(model, settings.process_group)
    with processes.session():
        if processes.rank != 0:
            settings = replace(settings, progress=False)
        return _path(model, source, target, settings, processes)


def _path(model: nn.Module, source: Any, target: Any, settings: PathSettings, processes: Processes) -> EndToEndPath:
    sets = read_sets(None, (source, target), optional(as_pair, settings.held_out, "held_out"), settings)
    if settings.process_group is not None:
        prompts = digest([prompts.contents() for prompts in sets])
        given = {
            name: repr(getattr(settings, name))
            for name in ("layers", "loss_layers", "pooling", "tokens", "penalties", "n_penalties", "min_ratio")
        }
        weights = digest_of_weights(model)
        processes.compare(
            {**settings.record(), **given, "digest of the prompts": prompts, "digest of the model's weights": weights}
        )
    with frozen(model):
        objective, fitted, held_out, facts = prepare(model, [sets], settings, processes=processes)
        maps = parameters_of(objective, settings)
        steps = SpectralSteps(objective, maps, None if isinstance(settings.lr, str) else settings.lr)
        try:
            steps.look(fitted)
        except NonFinite as error:
            raise ValueError(f"the loss is not finite before any step: {error}") from None
        steps.passes += 1 + len(held_out)  # those that took the targets
        penalties = _grid(steps.iterate, maps, settings) if settings.penalties is None else list(settings.penalties)
        penalties = processes.same(penalties)
        walk = _Walk(steps, held_out, settings)
        walk.run(penalties)
    steps.passes = processes.same(steps.passes)
    course = {"passes": steps.passes, "stopped": walk.stopped}
    metadata = describe("sparse path end to end", **facts, settings=settings.record(), history=course)
    return walk.path(penalties, metadata)


def _grid(start: Iterate, maps: MapParameters, settings: PathSettings) -> list[float]:
    """Penalties from the smallest one that leaves every map the identity."""
    slopes, shifts = start.grad_weight.numpy(force=True), start.grad_bias.numpy(force=True)
    most = ABOVE * largest_penalty(slopes, shifts, maps.sizes, settings.l1_ratio)
    if most == 0:
        raise ValueError(
            "penalties: the gradient at the identity is zero, so no penalty is the smallest that leaves every "
            "map there: source and target give the same activations"
        )
    return np.geomspace(most, most * settings.min_ratio, settings.n_penalties).tolist()


def largest_penalty(
    grad_weight: NDArray, grad_bias: NDArray, widths: Sequence[int] | NDArray, l1_ratio: float
) -> float:
    """The smallest penalty at which no map leaves the identity.

    A group x of d slopes - 1 or shifts with gradient h at 0 stays at 0 as long as ``||S(h, p l1_ratio)||_2 <=
    p (1 - l1_ratio) sqrt(d)``, S being the soft threshold: the optimality condition of the sparse group lasso (Simon,
    Friedman, Hastie and Tibshirani 2013, section 3).
    """
    ends = np.cumsum(widths)[:-1]
    # The engine's condition depends on the gradients alone. These moments (see `_core.quantile_moments`) are those of a
    # source at zero: -2 cov are the gradients of its slopes, -2 mean v those of its shifts.
    moments = []
    for slopes, shifts in zip(np.split(grad_weight, ends), np.split(grad_bias, ends), strict=True):
        module = np.zeros((5, len(slopes)))
        module[1], module[3] = -shifts / 2, -slopes / 2
        moments.append(module)
    return float(_core.largest_penalty(moments, l1_ratio).max())


class _Point(NamedTuple):
    """Maps of a penalty, and their held-out loss where there are held-out sets."""

    at: Iterate
    held_out: float | None


class _Walk:
    """The points found on the way along falling penalties, and every step."""

    def __init__(self, steps: SpectralSteps, held_out: Sequence[Task], settings: PathSettings) -> None:
        self.steps, self.held_out, self.settings = steps, held_out, settings
        self.penalized: list[_Point] = []  # as their penalties leave them
        self.kept: list[_Point] = []  # the same, or their refits
        self.records: list[tuple[int, float, bool, float, float, bool]] = []
        self.stopped = "finished"

    def run(self, penalties: list[float]) -> None:
        """Find the points until all are found, the user interrupts or a value is not finite."""
        settings = self.settings
        bar = tqdm(total=len(penalties), disable=not settings.progress, desc="path", unit="penalty")
        penalty = penalties[0]
        try:
            for penalty in penalties:
                l1, group = penalty * settings.l1_ratio, penalty * (1 - settings.l1_ratio)
                self._descend(penalty, (l1, group, l1, group), settings.steps)
                self.penalized.append(self._here())
                self.kept.append(self.penalized[-1])
                share = self.steps.iterate.support().float().mean().item()
                if settings.refit_steps and 0 < share <= settings.refit_support:
                    self._refit(penalty)
                bar.set_postfix(loss=f"{self.kept[-1].at.loss:.4g}", support=f"{share:.2%}", refresh=False)
                bar.update()
        except NonFinite as error:
            self.stopped = f"not finite at penalty {penalty:.6g}: {error}"
            if not self.kept:
                raise ValueError(f"no point of the path was found, {self.stopped}") from None
            warn(f"sparse_path_end_to_end stopped, {self.stopped}; the {len(self.kept)} points before it are kept")
        except KeyboardInterrupt:
            if not self.kept:
                raise
            self.stopped = "interrupted"
        finally:
            bar.close()

    def _here(self) -> _Point:
        """The maps as they stand; their held-out loss counts among the passes."""
        if not self.held_out:
            return _Point(self.steps.iterate, None)
        self.steps.passes += 1
        return _Point(self.steps.iterate, self.steps.objective.loss(self.held_out, self.steps.maps.leaves())[0])

    def _descend(self, penalty: float, penalties: Penalties, count: int, support: Tensor | None = None) -> None:
        """Take steps at one penalty or, with `support`, without any on the support of its point."""
        refit = support is not None
        for _ in range(count):
            taken = self.steps.step(penalties, support)
            if taken is None:
                break
            self.records.append((len(self.kept) - refit, penalty, refit, *taken))

    def _refit(self, penalty: float) -> None:
        """Refit the last point without a penalty on its support, keep what is better, and go on from where it was."""
        before, rate = self.kept[-1], self.steps.rate
        support = before.at.support().to(before.at.weight.dtype)
        self._descend(penalty, (0.0, 0.0, 0.0, 0.0), self.settings.refit_steps, support)
        if self.steps.iterate is not before.at:
            after = self._here()
            old, new = before.held_out, after.held_out
            if after.at.loss < before.at.loss if old is None or new is None else new < old:
                self.kept[-1] = after
        self.steps.go_to(before.at)
        self.steps.rate = rate

    def path(self, penalties: list[float], metadata: dict[str, Any]) -> EndToEndPath:
        """What was found."""
        maps, records = self.steps.maps, np.array(self.records, _RECORD)

        def losses(points: list[_Point]) -> tuple[NDArray, NDArray | None]:
            held_out = np.array([point.held_out for point in points], np.float64) if self.held_out else None
            return np.array([point.at.loss for point in points]), held_out

        loss, held_out_loss = losses(self.kept)
        weight, bias = maps.maps(
            *(torch.stack([getattr(point.at, x) for point in self.kept]) for x in ("weight", "bias"))
        )
        self.steps.objective.processes.same_tensors(weight, bias)
        penalized_loss, penalized_held_out_loss = losses(self.penalized)
        return EndToEndPath(
            penalties=np.array(penalties[: len(self.kept)]),
            l1_ratio=self.settings.l1_ratio,
            loss=loss,
            held_out_loss=held_out_loss,
            modules=tuple(maps.names),
            widths=tuple(maps.sizes),
            weight=weight.numpy(force=True),
            bias=bias.numpy(force=True),
            metadata=metadata,
            penalized_loss=penalized_loss,
            penalized_held_out_loss=penalized_held_out_loss,
            refitted=np.array([kept is not point for kept, point in zip(self.kept, self.penalized, strict=True)]),
            history={name: records[name].copy() for name in _RECORD.names or ()},
            passes=self.steps.passes,
            stopped=self.stopped,
        )
