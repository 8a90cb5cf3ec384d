"""End-to-end fits: all maps at once, by proximal gradient steps through the model (LinEAS, arXiv 2503.10679)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import __version__
from ..maps import SteeringMaps
from . import calling, sites
from .collect import check_pooling
from .objective import SCALINGS, NonFinite, Objective, Sets
from .optim import FlatMaps, ProximalOptimizer, cosine_rate
from .problem import check_choice, check_integer, check_maps, check_real, check_size, find, pose, read, trial_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class FitResult:
    """What an end-to-end fit found.

    Attributes
    ----------
    maps : SteeringMaps
        With held-out data the maps with the lowest held-out loss, otherwise the maps after the last step. After a
        loss that was not finite, the last maps whose loss was.
    history : dict of str to array
        One entry for each step taken: "loss" [S], the value before the step, without penalties, and of the step's own
        prompts where each has a mini-batch; "layer_loss" [S, L], the term of every loss module; "held_out_loss" [S],
        before the step as well ([0] without held-out data);
        "lr" [S]; "penalty" [S], after the step and not multiplied by the rate; "support" [S], neurons with a slope
        other than 1 or a shift other than 0 after the step.
    best_step : int
        How many steps ``maps`` had taken: 0 are the maps that the fit started from.
    stopped : str
        "finished", "interrupted", or "not finite at step k: ..." with the module and the value.
    held_out_loss : float or None
        The held-out loss of ``maps``.
    """

    maps: SteeringMaps
    history: dict[str, NDArray]
    best_step: int
    stopped: str
    held_out_loss: float | None = None

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the loss over the steps; see `lineas.plot.history`."""
        from ..plot import history

        return history(self, ax=ax)

    def __repr__(self) -> str:
        losses = self.history["loss"]
        course = f"loss {losses[0]:.4g} -> {losses[-1]:.4g}" if len(losses) else "no step"
        held_out = "" if self.held_out_loss is None else f", held-out {self.held_out_loss:.4g}"
        return (
            f"FitResult({len(self.maps)} maps, {course} in {len(losses)} steps{held_out}, "
            f"best_step={self.best_step}, stopped={self.stopped!r})"
        )


class _Course:
    """What a running fit has gone through, and the best maps that it has seen."""

    def __init__(self, maps: FlatMaps) -> None:
        self.maps = maps
        self.records: list[tuple[float, NDArray, float | None, float, float, int]] = []
        self.best: tuple[Tensor, Tensor] | None = None
        self.best_step = 0
        self.best_loss: float | None = None
        self.stopped = "finished"

    def keep(self, held_out_loss: float | None) -> None:
        """Keep the maps as they stand, unless a lower held-out loss was seen."""
        if held_out_loss is None or self.best_loss is None or held_out_loss < self.best_loss:
            self.best = (self.maps.weight.clone(), self.maps.bias.clone())
            self.best_step, self.best_loss = len(self.records), held_out_loss

    def restore(self) -> None:
        """Put the best maps back in place."""
        if self.best is not None:
            self.maps.weight.copy_(self.best[0])
            self.maps.bias.copy_(self.best[1])

    def history(self, modules: int, held_out: bool) -> dict[str, NDArray]:
        """The arrays of `FitResult.history`."""
        columns = zip(*self.records, strict=True) if self.records else [()] * 6
        losses, terms, trials, rates, penalties, supports = columns
        return {
            "loss": np.array(losses, dtype=np.float64),
            "layer_loss": np.array(terms, dtype=np.float64).reshape(len(losses), modules),
            "held_out_loss": np.array(trials if held_out else (), dtype=np.float64),
            "lr": np.array(rates, dtype=np.float64),
            "penalty": np.array(penalties, dtype=np.float64),
            "support": np.array(supports, dtype=np.int64),
        }


def fit_end_to_end(
    model: nn.Module,
    source: Any,
    target: Any,
    *,
    layers: sites.Layers,
    loss_layers: sites.Layers | None = None,
    init: SteeringMaps | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    forward: calling.Forward | None = None,
    held_out: tuple[Any, Any] | None = None,
    batch_size: int | None = None,
    mini_batch: int | None = None,
    pooling: str = "mean",
    l1: float = 0.0,
    group: float = 0.0,
    l1_bias: float | None = None,
    group_bias: float | None = None,
    scaling: str = "layer-mean",
    optimizer: str = "sgd",
    lr: float = 0.3,
    betas: tuple[float, float] = (0.9, 0.999),
    steps: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Fit the maps of all modules at once; `lineas.fit_end_to_end` describes the arguments.

    The target activations are computed once, without maps. Every step runs the source through the model with the
    maps on, leaves it after the last loss module, and takes a gradient step on slopes and shifts followed by the
    proximal operator of the penalties. See `Objective.gradient` for what a step of several batches costs.

    Held-out data cost one more forward pass of their source a step, and one at the end, without gradients.

    Returns
    -------
    FitResult
        Ctrl-C during the steps ends the fit and keeps the best maps. So does a loss that becomes non-finite, with a
        RuntimeWarning.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, no module matches, a module that carries a map gets no gradient, or the
        model's activations are not finite before any step.
    """
    penalties = {
        "l1": check_real("l1", l1, 0.0),
        "group": check_real("group", group, 0.0),
        "l1_bias": check_real("l1_bias", l1 if l1_bias is None else l1_bias, 0.0),
        "group_bias": check_real("group_bias", group if group_bias is None else group_bias, 0.0),
    }
    check_pooling(pooling)
    check_choice("scaling", scaling, SCALINGS)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    lr = check_real("lr", lr, 0.0, strict=True)
    betas = _check_betas(betas)
    steps, seed = check_integer("steps", steps, 1), check_integer("seed", seed, 0)
    batch_size, mini_batch = check_size("batch_size", batch_size, 1), check_size("mini_batch", mini_batch, 2)
    if init is not None and not isinstance(init, Mapping):
        raise TypeError(f"init must be a SteeringMaps, got {type(init).__name__}")
    data = read(source, target, held_out, tokenizer, max_length)
    map_names, loss_names = find(model, layers, loss_layers)

    with calling.frozen(model):
        torch.manual_seed(seed)
        objective, fitted, trial = pose(
            model,
            data,
            map_names,
            loss_names,
            forward,
            pooling,
            scaling,
            batch_size=batch_size,
            mini_batch=mini_batch,
            seed=seed,
        )
        maps = FlatMaps(objective.widths, objective.dtype, objective.device)
        if init is not None:
            maps.load(init)
        stepper = ProximalOptimizer(maps, optimizer=optimizer, betas=betas, **penalties)
        course = _run(objective, fitted, trial, stepper, lr, steps, progress)

    history = course.history(len(loss_names), held_out is not None)
    metadata = {
        "method": "end-to-end",
        "version": __version__,
        "model": sites.model_name(model),
        "layers": sites.spell(layers),
        "loss_layers": sites.spell(layers if loss_layers is None else loss_layers),
        "pooling": pooling,
        "settings": {
            "scaling": scaling,
            "optimizer": optimizer,
            "lr": lr,
            "betas": list(betas),
            "steps": steps,
            "seed": seed,
            "max_length": max_length,
            "batch_size": batch_size,
            "mini_batch": mini_batch,
            **penalties,
        },
        "history": {
            "loss": history["loss"].tolist(),
            "held_out_loss": history["held_out_loss"].tolist(),
            "best_step": course.best_step,
            "stopped": course.stopped,
        },
    }
    found = SteeringMaps(maps.snapshot(), metadata)
    return FitResult(found, history, course.best_step, course.stopped, course.best_loss)


def _run(
    objective: Objective,
    fitted: Sets,
    trial: Sets | None,
    stepper: ProximalOptimizer,
    lr: float,
    steps: int,
    progress: bool,
) -> _Course:
    """Take the steps until they are done, the user interrupts or a value is not finite; leave the best maps."""
    maps = stepper.maps
    course = _Course(maps)
    bar = tqdm(total=steps, disable=not progress, desc="fit", unit="step")
    try:
        for step in range(steps):
            leaves = maps.leaves()
            loss, terms, grad_weight, grad_bias = objective.gradient(fitted.at(step), leaves)
            held_out_loss = trial_loss(objective, trial, leaves)
            course.keep(held_out_loss)
            rate = cosine_rate(lr, step, steps)
            penalty, support = stepper.step(grad_weight, grad_bias, rate)
            course.records.append((loss, terms.numpy(force=True), held_out_loss, rate, penalty, support))
            check_maps(maps)
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()
        course.keep(trial_loss(objective, trial, maps.leaves()))
    except NonFinite as error:
        if course.best is None:
            raise ValueError(f"the loss is not finite before any step: {error}") from None
        course.stopped = f"not finite at step {len(course.records)}: {error}"
        warnings.warn(
            f"fit_end_to_end stopped, {course.stopped}; the maps after {course.best_step} steps are kept",
            RuntimeWarning,
            stacklevel=4,
        )
    except KeyboardInterrupt:
        course.stopped = "interrupted"
        if trial is None or course.best is None:
            course.keep(None)
    finally:
        bar.close()
    course.restore()
    return course


def _check_betas(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    first, second = (check_real("betas", beta, 0.0) for beta in betas)
    if max(first, second) >= 1:
        raise ValueError(f"betas must be < 1, got {betas!r}")
    return first, second
