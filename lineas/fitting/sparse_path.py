"""Sparse paths through a model: maps for falling penalties, each fitted from the last, and refits on their supports."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import _core
from .._checks import as_choice, as_int, as_positive, as_share
from .._version import __version__
from .._warn import warn
from ..hooks.modules import model_name
from ..hooks.pooling import check_pooling
from ..hooks.tokens import check_fit_tokens
from ..inputs.call import Forward
from ..inputs.frozen import frozen
from ..maps.metadata import Layers, Selection, spell_layers, spell_tokens
from ..maps.path import SparsePath
from .objective import SCALINGS, NonFinite, Sets
from .parameters import FlatMaps
from .problem import check_rate, check_size, find, pose, read, trial_loss
from .step_sizes import Descent, Place

# Rounding must not keep a neuron at the penalty that is to leave none.
ABOVE = 1 + 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class EndToEndPath(SparsePath):
    """A `SparsePath` through a model: what `lineas.sparse_path_end_to_end` returns.

    Attributes
    ----------
    penalized_loss, penalized_held_out_loss : ndarray or None
        float64 [K], the losses before the refit on the support; ``loss`` and ``held_out_loss`` are those of the maps
        that were kept.
    refitted : ndarray
        bool [K], whether the maps of a point are the refitted ones.
    history : dict of str to array
        One entry for each step: "point" and "penalty", the point it belongs to; "refit"; "lr", its rate; "loss", after
        the step and without penalties; "kept", False where the step made things worse and was taken back.
    passes : int
        What the path cost: one for each forward pass of a set of prompts, three for one with its backward pass, four
        where the set is split and runs a second time in part.
    stopped : str
        "finished", "interrupted", or "not finite at penalty p: ..." with the module and the value.
    """

    penalized_loss: NDArray | None = None
    penalized_held_out_loss: NDArray | None = None
    refitted: NDArray = field(default_factory=lambda: np.zeros(0, bool))
    history: dict[str, NDArray] = field(default_factory=dict)
    passes: int = 0
    stopped: str = "finished"


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
        self.places: list[Place] = []
        self.held_out: list[float | None] = []
        self.penalized: list[tuple[float, float | None]] = []
        self.refitted: list[bool] = []
        self.records: list[tuple[int, float, bool, float, float, bool]] = []
        self.stopped = "finished"

    def add(self, place: Place, held_out: float | None) -> None:
        """Add a point as its penalty leaves it."""
        self.places.append(place)
        self.held_out.append(held_out)
        self.penalized.append((place.loss, held_out))
        self.refitted.append(False)

    def replace(self, place: Place, held_out: float | None) -> None:
        """Take the refitted maps of the last point where they are better, by held-out loss if there is one."""
        before = self.held_out[-1]
        if place.loss < self.places[-1].loss if held_out is None or before is None else held_out < before:
            self.places[-1], self.held_out[-1], self.refitted[-1] = place, held_out, True

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


def sparse_path_end_to_end(
    model: nn.Module,
    source: Any,
    target: Any,
    *,
    layers: Layers,
    loss_layers: Layers | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    forward: Forward | None = None,
    held_out: tuple[Any, Any] | None = None,
    batch_size: int | None = None,
    pooling: str = "mean",
    tokens: Selection = "all",
    penalties: Sequence[float] | NDArray | None = None,
    n_penalties: int | None = None,
    min_ratio: float = 1e-3,
    l1_ratio: float = 1.0,
    steps: int = 2,
    refit_steps: int = 0,
    refit_support: float = 0.5,
    scaling: str = "layer-mean",
    lr: float | str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> EndToEndPath:
    """Fit the maps of all modules for falling penalties, from the identity to dense maps, in one walk.

    Every penalty is a fit as by `fit_end_to_end`, of few steps, since it starts where the one before ended. Rates
    follow the curvature, and a step that makes loss and penalty together larger is taken back (SpaRSA, Wright, Nowak
    and Figueiredo 2009). With `refit_steps` each point is then fitted without a penalty on the neurons of its support:
    a penalty that picks few neurons holds them near the identity as well. The next point starts from the penalised
    maps.

    Parameters
    ----------
    model, source, target, layers, loss_layers, tokenizer, max_length, forward, batch_size, pooling, tokens, scaling,
    seed
        As in `fit_end_to_end`.
    held_out : (source, target), optional
        Two more sets, whose loss is recorded for every point, before and after its refit. ``path.at(best=True)`` goes
        by it, and a refit that makes it larger is not kept (without them, one that makes the fitted loss larger).
    penalties : sequence of float, optional
        Falling and above 0. A penalty p stands for ``l1 = p * l1_ratio`` and ``group = p * (1 - l1_ratio)``, of slopes
        and shifts alike.
    n_penalties : int, optional
        In place of `penalties`: how many, at least 2, in equal ratios from the smallest one that leaves every map the
        identity, which the gradient there tells, down to ``min_ratio`` times it.
    min_ratio : float, default 1e-3
        The last of the chosen penalties divided by the first.
    l1_ratio : float, default 1.0
        1 changes single neurons wherever they are, 0 whole modules only.
    steps : int, default 2
        Steps at each penalty. A step costs a forward and a backward pass.
    refit_steps : int, default 0
        Steps of each refit; 0 for none.
    refit_support : float, default 0.5
        Points at which more than this share of the neurons is changed are not refitted: theirs is a small penalty.
    lr : "auto" or float, default "auto"
        The rate of the first step; "auto" goes to where a linear loss would reach 0. Later ones stay between a tenth
        and a hundred times it.
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    EndToEndPath
        A `SparsePath` with ``penalized_loss``, ``penalized_held_out_loss`` (before the refits), ``refitted``,
        ``history`` (one entry a step), ``passes`` (what it cost) and ``stopped``. Ctrl-C and a value that is not finite
        end the path early and keep the points found.

    Raises
    ------
    TypeError
        If an argument is of a wrong type, or not exactly one of `penalties` and `n_penalties` is given.
    ValueError
        As `fit_end_to_end`; and if the penalties are not falling, or a value is not finite before a point is found.
    """
    check_pooling(pooling)
    tokens = check_fit_tokens(tokens, model)
    as_choice(scaling, "scaling", SCALINGS)
    chosen = _check_penalties(penalties, n_penalties)
    l1_ratio, min_ratio = as_share(l1_ratio, "l1_ratio"), as_positive(min_ratio, "min_ratio")
    if min_ratio >= 1:
        raise ValueError(f"min_ratio must be below 1, got {min_ratio:g}")
    steps = as_int(steps, "steps", low=1)
    refit_steps, refit_support = (
        as_int(refit_steps, "refit_steps", low=0),
        as_share(refit_support, "refit_support"),
    )
    rate, seed = check_rate(lr), as_int(seed, "seed", low=0)
    batch_size = check_size("batch_size", batch_size, 1)
    data = read(source, target, held_out, tokenizer, max_length)
    map_names, loss_names = find(model, layers, loss_layers)

    with frozen(model):
        torch.manual_seed(seed)
        objective, fitted, trial = pose(
            model, data, map_names, loss_names, forward, pooling, scaling, tokens=tokens, batch_size=batch_size
        )
        maps = FlatMaps(objective.widths, objective.dtype, objective.device)
        descent = Descent(objective, maps, rate)
        try:
            descent.look(fitted)
        except NonFinite as error:
            raise ValueError(f"the loss is not finite before any step: {error}") from None
        descent.passes += 2 if trial is None else 3  # the run that finds the order, and those that took the targets
        if isinstance(chosen, int):
            most = ABOVE * largest_penalty(*descent.place.gradients(), np.diff(maps.offsets), l1_ratio)
            if most == 0:
                raise ValueError(
                    "penalties: the gradient at the identity is zero, so no penalty is the smallest that leaves every "
                    "map there: source and target give the same activations"
                )
            chosen = np.geomspace(most, most * min_ratio, chosen).tolist()
        points = _walk(descent, trial, chosen, l1_ratio, steps, (refit_steps, refit_support), progress)

    settings = {
        "scaling": scaling,
        "l1_ratio": l1_ratio,
        "steps": steps,
        "refit_steps": refit_steps,
        "refit_support": refit_support,
        "lr": "auto" if rate is None else rate,
        "seed": seed,
        "max_length": max_length,
        "batch_size": batch_size,
    }
    metadata = {
        "method": "sparse path end to end",
        "version": __version__,
        "model": model_name(model),
        "layers": spell_layers(layers),
        "loss_layers": spell_layers(layers if loss_layers is None else loss_layers),
        "pooling": pooling,
        "tokens": spell_tokens(tokens),
        "settings": settings,
    }
    return _path(points, maps, chosen, l1_ratio, trial is not None, descent.passes, metadata)


def _path(
    points: _Points,
    maps: FlatMaps,
    penalties: list[float],
    l1_ratio: float,
    held_out: bool,
    passes: int,
    metadata: dict[str, Any],
) -> EndToEndPath:
    """The points found as a path."""

    def stack(tensors: list[Tensor]) -> NDArray:
        return torch.stack(tensors).numpy(force=True)

    count = len(points.places)
    metadata["history"] = {"passes": passes, "stopped": points.stopped}
    losses, trials = zip(*points.penalized, strict=True)
    return EndToEndPath(
        penalties=np.array(penalties[:count]),
        l1_ratio=l1_ratio,
        loss=np.array([place.loss for place in points.places]),
        held_out_loss=np.array(points.held_out, np.float64) if held_out else None,
        modules=tuple(maps.names),
        widths=tuple(np.diff(maps.offsets).tolist()),
        weight=stack([place.weight for place in points.places]),
        bias=stack([place.bias for place in points.places]),
        metadata=metadata,
        penalized_loss=np.array(losses),
        penalized_held_out_loss=np.array(trials, np.float64) if held_out else None,
        refitted=np.array(points.refitted),
        history=points.history(),
        passes=passes,
        stopped=points.stopped,
    )


def _walk(
    descent: Descent,
    trial: Sets | None,
    penalties: list[float],
    l1_ratio: float,
    steps: int,
    refits: tuple[int, float],
    progress: bool,
) -> _Points:
    """Find the points until all are found, the user interrupts or a value is not finite."""
    points = _Points()
    bar = tqdm(total=len(penalties), disable=not progress, desc="path", unit="penalty")
    penalty = penalties[0]
    try:
        for penalty in penalties:
            _descend(descent, points, penalty, l1_ratio, steps)
            points.add(descent.place, _trial_loss(descent, trial))
            share = descent.place.support().double().mean().item()
            if refits[0] and 0 < share <= refits[1]:
                _refit(descent, points, trial, penalty, refits[0])
            bar.set_postfix(loss=f"{points.places[-1].loss:.4g}", support=f"{share:.2%}", refresh=False)
            bar.update()
    except NonFinite as error:
        points.stopped = f"not finite at penalty {penalty:.6g}: {error}"
        if not points.places:
            raise ValueError(f"no point of the path was found, {points.stopped}") from None
        warn(
            f"sparse_path_end_to_end stopped, {points.stopped}; the {len(points.places)} points before it are kept",
        )
    except KeyboardInterrupt:
        if not points.places:
            raise
        points.stopped = "interrupted"
    finally:
        bar.close()
    return points


def _descend(
    descent: Descent,
    points: _Points,
    penalty: float,
    l1_ratio: float,
    steps: int,
    support: Tensor | None = None,
) -> None:
    """Take steps at one penalty or, with `support`, without any on the support of its point."""
    refit = support is not None
    point = len(points.places) - refit
    l1, group = (0.0, 0.0) if refit else (penalty * l1_ratio, penalty * (1 - l1_ratio))
    for _ in range(steps):
        taken = descent.step((l1, group, l1, group), support)
        if taken is None:
            break
        points.records.append((point, penalty, refit, *taken))


def _refit(descent: Descent, points: _Points, trial: Sets | None, penalty: float, steps: int) -> None:
    """Refit the last point on its support without a penalty, and come back to where it was."""
    place, rate = descent.place, descent.rate
    _descend(descent, points, penalty, 0.0, steps, place.support().to(place.weight.dtype))
    if descent.place is not place:
        points.replace(descent.place, _trial_loss(descent, trial))
    descent.go_to(place)
    descent.rate = rate


def _trial_loss(descent: Descent, trial: Sets | None) -> float | None:
    """The held-out loss of the maps as they stand, counted among the passes."""
    descent.passes += trial is not None
    return trial_loss(descent.objective, trial, descent.maps.leaves())


def _check_penalties(penalties: Any, n_penalties: Any) -> list[float] | int:
    """Falling penalties, or how many are to be chosen."""
    if (penalties is None) == (n_penalties is None):
        raise TypeError("exactly one of penalties and n_penalties must be given")
    if penalties is None:
        return as_int(n_penalties, "n_penalties", low=2)
    if isinstance(penalties, str) or not isinstance(penalties, Sequence | np.ndarray):
        raise TypeError(f"penalties must be a sequence of numbers, got {type(penalties).__name__}")
    values = [as_positive(value, f"penalties[{k}]") for k, value in enumerate(penalties)]
    if not values:
        raise ValueError("penalties is empty")
    for k, (before, after) in enumerate(itertools.pairwise(values)):
        if after >= before:
            raise ValueError(f"penalties must fall, got {before:g} and then {after:g} at index {k + 1}")
    return values
