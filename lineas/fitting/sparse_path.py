"""Sparse paths through a model: maps for falling penalties, each fitted from the last, and refits on their supports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import _core
from .._warn import warn
from ..hooks.settings import takes
from ..inputs.frozen import frozen
from ..maps.metadata import describe
from .end_to_end import prepare, read_sets
from .objective import NonFinite, Task
from .parameters import MapParameters
from .result import EndToEndPath
from .settings import PathSettings
from .step_sizes import Iterate, SpectralSteps

# Rounding must not keep a neuron at the penalty that is to leave none.
ABOVE = 1 + 1e-5


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
    """
    sets = read_sets(None, (source, target), settings.held_out, settings)
    with frozen(model):
        objective, fitted, held_out, facts = prepare(model, [sets], settings)
        maps = MapParameters(objective.widths, objective.dtype, objective.device)
        steps = SpectralSteps(objective, maps, None if isinstance(settings.lr, str) else settings.lr)
        try:
            steps.look(fitted)
        except NonFinite as error:
            raise ValueError(f"the loss is not finite before any step: {error}") from None
        steps.passes += 1 + len(held_out)  # those that took the targets
        penalties = _grid(steps.iterate, maps, settings) if settings.penalties is None else list(settings.penalties)
        points = _walk(steps, held_out, penalties, settings)
    metadata = describe("sparse path end to end", **facts, settings=settings.record())
    return _path(points, maps, penalties, settings, steps.passes, metadata)


def _grid(start: Iterate, maps: MapParameters, settings: PathSettings) -> list[float]:
    """Penalties from the smallest one that leaves every map the identity."""
    most = ABOVE * largest_penalty(*start.gradients(), maps.sizes, settings.l1_ratio)
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


class _Points:
    """The points found so far, and every step on the way."""

    def __init__(self) -> None:
        self.iterates: list[Iterate] = []
        self.held_out: list[float | None] = []
        self.penalized: list[tuple[float, float | None]] = []
        self.refitted: list[bool] = []
        self.records: list[tuple[int, float, bool, float, float, bool]] = []
        self.stopped = "finished"

    def add(self, iterate: Iterate, held_out: float | None) -> None:
        """Add a point as its penalty leaves it."""
        self.iterates.append(iterate)
        self.held_out.append(held_out)
        self.penalized.append((iterate.loss, held_out))
        self.refitted.append(False)

    def replace(self, iterate: Iterate, held_out: float | None) -> None:
        """Take the refitted maps of the last point where they are better, by held-out loss if there is one."""
        before = self.held_out[-1]
        if iterate.loss < self.iterates[-1].loss if held_out is None or before is None else held_out < before:
            self.iterates[-1], self.held_out[-1], self.refitted[-1] = iterate, held_out, True

    def history(self) -> dict[str, NDArray]:
        """The arrays of `EndToEndPath.history`."""
        types = {
            "point": np.int64,
            "penalty": np.float64,
            "refit": np.bool_,
            "lr": np.float64,
            "loss": np.float64,
            "kept": np.bool_,
        }
        columns = zip(*self.records, strict=True) if self.records else [()] * len(types)
        return {name: np.array(column, kind) for (name, kind), column in zip(types.items(), columns, strict=True)}


def _path(
    points: _Points,
    maps: MapParameters,
    penalties: list[float],
    settings: PathSettings,
    passes: int,
    metadata: dict[str, Any],
) -> EndToEndPath:
    """The points found as a path."""

    def stack(tensors: list[Tensor]) -> NDArray:
        return torch.stack(tensors).numpy(force=True)

    metadata["history"] = {"passes": passes, "stopped": points.stopped}
    losses, trials = zip(*points.penalized, strict=True)
    is_tried = settings.held_out is not None
    return EndToEndPath(
        penalties=np.array(penalties[: len(points.iterates)]),
        l1_ratio=settings.l1_ratio,
        loss=np.array([iterate.loss for iterate in points.iterates]),
        held_out_loss=np.array(points.held_out, np.float64) if is_tried else None,
        modules=tuple(maps.names),
        widths=tuple(maps.sizes),
        weight=stack([iterate.weight for iterate in points.iterates]),
        bias=stack([iterate.bias for iterate in points.iterates]),
        metadata=metadata,
        penalized_loss=np.array(losses),
        penalized_held_out_loss=np.array(trials, np.float64) if is_tried else None,
        refitted=np.array(points.refitted),
        history=points.history(),
        passes=passes,
        stopped=points.stopped,
    )


def _walk(steps: SpectralSteps, held_out: Sequence[Task], penalties: list[float], settings: PathSettings) -> _Points:
    """Find the points until all are found, the user interrupts or a value is not finite."""
    points = _Points()
    bar = tqdm(total=len(penalties), disable=not settings.progress, desc="path", unit="penalty")
    penalty = penalties[0]
    try:
        for penalty in penalties:
            l1, group = penalty * settings.l1_ratio, penalty * (1 - settings.l1_ratio)
            _descend(steps, points, penalty, (l1, group, l1, group), settings.steps)
            points.add(steps.iterate, _held_out_loss(steps, held_out))
            share = steps.iterate.support().float().mean().item()
            if settings.refit_steps and 0 < share <= settings.refit_support:
                _refit(steps, points, held_out, penalty, settings.refit_steps)
            bar.set_postfix(loss=f"{points.iterates[-1].loss:.4g}", support=f"{share:.2%}", refresh=False)
            bar.update()
    except NonFinite as error:
        points.stopped = f"not finite at penalty {penalty:.6g}: {error}"
        if not points.iterates:
            raise ValueError(f"no point of the path was found, {points.stopped}") from None
        warn(f"sparse_path_end_to_end stopped, {points.stopped}; the {len(points.iterates)} points before it are kept")
    except KeyboardInterrupt:
        if not points.iterates:
            raise
        points.stopped = "interrupted"
    finally:
        bar.close()
    return points


def _descend(
    steps: SpectralSteps,
    points: _Points,
    penalty: float,
    penalties: tuple[float, float, float, float],
    count: int,
    support: Tensor | None = None,
) -> None:
    """Take steps at one penalty or, with `support`, without any on the support of its point."""
    refit = support is not None
    point = len(points.iterates) - refit
    for _ in range(count):
        taken = steps.step(penalties, support)
        if taken is None:
            break
        points.records.append((point, penalty, refit, *taken))


def _refit(steps: SpectralSteps, points: _Points, held_out: Sequence[Task], penalty: float, count: int) -> None:
    """Refit the last point on its support without a penalty, and come back to where it was."""
    iterate, rate = steps.iterate, steps.rate
    support = iterate.support().to(iterate.weight.dtype)
    _descend(steps, points, penalty, (0.0, 0.0, 0.0, 0.0), count, support)
    if steps.iterate is not iterate:
        points.replace(steps.iterate, _held_out_loss(steps, held_out))
    steps.go_to(iterate)
    steps.rate = rate


def _held_out_loss(steps: SpectralSteps, held_out: Sequence[Task]) -> float | None:
    """The held-out loss of the maps as they stand, counted among the passes."""
    if not held_out:
        return None
    steps.passes += 1
    return steps.objective.loss(held_out, steps.maps.leaves())[0]
