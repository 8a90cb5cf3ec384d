"""The steps of an end-to-end fit, the best maps on the way, and how a fit is kept on disk and goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from .._warn import warn
from ..inputs.frozen import RandomState
from . import checkpoint
from .objective import NonFinite, Objective, Sets
from .parameters import FlatMaps, ProximalOptimizer, cosine_rate
from .problem import check_maps
from .step_sizes import Descent, Penalties, Place, penalty_of
from .tasks import Tasks, gradient, loss

# After so many steps in a row that lower nothing, each a quarter of the one before, none will.
MOST_RETREATS = 6


@dataclass(frozen=True)
class Move:
    """What a step did: its rate, penalty and support after it, and whether it was kept."""

    lr: float
    penalty: float
    support: int
    kept: bool = True


class ScheduledSteps:
    """Steps at rates that are given: half a cosine, from the first one down.

    Parameters
    ----------
    objective : Objective
    fitted : Sets or Tasks
    stepper : ProximalOptimizer
    lr : float
        The first rate.
    steps : int
        How many there will be.
    """

    def __init__(
        self, objective: Objective, fitted: Sets | Tasks, stepper: ProximalOptimizer, lr: float, steps: int
    ) -> None:
        self.objective, self.fitted, self.stepper = objective, fitted, stepper
        self.lr, self.count = lr, steps
        self.passes = 0

    def measure(self, step: int) -> tuple[float, Tensor]:
        """Loss and terms at the maps as they stand, of the prompts of a step."""
        sets = self.fitted.at(step)
        total, terms, grad_weight, grad_bias = gradient(self.objective, sets, self.stepper.maps.leaves())
        self.gradients = grad_weight, grad_bias
        self.passes += sets.passes
        return total, terms

    def move(self, step: int) -> Move:
        """Take the step."""
        rate = cosine_rate(self.lr, step, self.count)
        return Move(rate, *self.stepper.step(*self.gradients, rate))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What it takes to go on, beside the maps."""
        moments = self.stepper.moments or []
        return {f"moment {k}": moment for k, moment in enumerate(moments)}, {"taken": self.stepper.taken}

    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.stepper.taken = state["taken"]
        for k, moment in enumerate(self.stepper.moments or []):
            moment.copy_(tensors[f"moment {k}"])


class AutomaticSteps:
    """Steps at rates that the loss itself tells; see `Descent`.

    With mini-batches a step is judged by the prompts that it was taken for, at both its ends, and the rates are
    multiplied by a falling half cosine.
    """

    def __init__(
        self, objective: Objective, fitted: Sets | Tasks, maps: FlatMaps, penalties: Penalties, steps: int
    ) -> None:
        self.objective, self.descent = objective, Descent(objective, maps, steady=True)
        self.fitted, self.penalties, self.count = fitted, penalties, steps
        self.retreats = 0

    @property
    def passes(self) -> int:
        """What the steps have cost."""
        return self.descent.passes

    @passes.setter
    def passes(self, passes: int) -> None:
        self.descent.passes = passes

    def measure(self, step: int) -> tuple[float, Tensor]:
        """Loss and terms at the maps as they stand, of the prompts of a step."""
        if not self.descent.started or self.fitted.sampler is not None:
            self.descent.look(self.fitted.at(step))
        return self.descent.place.loss, self.descent.place.terms

    def move(self, step: int) -> Move | None:
        """Take the step; None where no step leads on."""
        if self.retreats == MOST_RETREATS:
            return None
        sampled = self.fitted.sampler is not None
        rate = self.descent.rate
        try:
            taken = self.descent.step(self.penalties, shorten=cosine_rate(1.0, step, self.count) if sampled else 1.0)
        except NonFinite:
            if self.retreats + 1 == MOST_RETREATS:
                raise
            taken = rate, np.nan, False
        if taken is None:
            if not sampled:
                return None
            taken = rate, np.nan, True
        rate, _, kept = taken
        self.retreats = 0 if kept else self.retreats + 1
        place = self.descent.place
        return Move(rate, penalty_of(place, self.penalties, self.descent.widths), int(place.support().sum()), kept)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What it takes to go on, beside the maps."""
        descent = self.descent
        state = {"lr": descent.lr, "rate": descent.rate, "recent": descent.recent, "moved": descent.moved}
        state |= {"retreats": self.retreats}
        if not descent.started or self.fitted.sampler is not None:
            return {}, state
        place = descent.place
        tensors = {"terms": place.terms, "grad_weight": place.grad_weight, "grad_bias": place.grad_bias}
        return tensors, {**state, "loss": place.loss}

    def resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Go on from `state`, at maps that are in place again."""
        descent = self.descent
        descent.lr, descent.rate, descent.moved = state["lr"], state["rate"], state["moved"]
        descent.recent = state["recent"]
        self.retreats = state["retreats"]
        if "loss" in state:
            descent.sets = self.fitted
            there = (tensors[name].to(descent.maps.weight.device) for name in ("terms", "grad_weight", "grad_bias"))
            descent.place = Place(descent.maps, state["loss"], *there)


class Trial(NamedTuple):
    """The held-out loss, what it is the mean of, and the strength of the maps that has it."""

    loss: float
    terms: Any
    strength: float


class Course:
    """What a running fit has gone through, and the best maps that it has seen.

    Parameters
    ----------
    maps : FlatMaps
    strengths : sequence of float
        The strengths at which the maps are tried on the held-out sets.
    """

    def __init__(self, maps: FlatMaps, strengths: Sequence[float] = (1.0,)) -> None:
        self.maps, self.strengths = maps, strengths
        self.records: list[dict[str, Any]] = []
        self.best: tuple[Tensor, Tensor] | None = None
        self.best_step = 0
        self.best_strength = 1.0
        self.best_loss: float | None = None
        self.best_terms: Any = None
        self.stopped = "finished"
        self.held_out_passes = 0

    def keep(self, tried: Trial | None) -> None:
        """Keep the maps as they stand, at the strength that they were best at, unless a lower loss was seen."""
        if tried is not None and self.best_loss is not None and tried.loss >= self.best_loss:
            return
        loss, terms, strength = tried or (None, None, 1.0)
        self.best = self.maps.at(strength)
        self.best_step, self.best_strength = len(self.records), strength
        self.best_loss, self.best_terms = loss, terms

    def restore(self) -> None:
        """Put the best maps back in place."""
        if self.best is not None:
            self.maps.weight.copy_(self.best[0])
            self.maps.bias.copy_(self.best[1])

    def history(self, shape: tuple[int, ...], held_out: bool) -> dict[str, NDArray]:
        """The arrays of `FitResult.history`, and "held_out_layer_loss"; `shape` is that of a step's terms."""
        types: dict[str, Any] = {
            "loss": np.float64,
            "lr": np.float64,
            "penalty": np.float64,
            "support": np.int64,
            "kept": np.bool_,
        }
        arrays = {name: np.array([record[name] for record in self.records], kind) for name, kind in types.items()}
        trials = self.records if held_out else []
        layers, held_out_layers = (
            np.array([record[name] for record in records], np.float64).reshape(len(records), *shape)
            for name, records in (("layer_loss", self.records), ("held_out_layer_loss", trials))
        )
        return {
            **arrays,
            "layer_loss": layers,
            "held_out_loss": np.array([record["held_out_loss"] for record in trials], np.float64),
            "held_out_layer_loss": held_out_layers,
            "held_out_strength": np.array([record["held_out_strength"] for record in trials], np.float64),
        }


class Keeper:
    """Keeps a fit on disk after every step, and takes it up again.

    Parameters
    ----------
    course : Course
    steps : ScheduledSteps or AutomaticSteps
    path : str or None
        Where to; None keeps nothing.
    identity : dict
        What must be the same for a fit to go on, as JSON has it: settings, modules, digests of the data.
    """

    def __init__(
        self, course: Course, steps: ScheduledSteps | AutomaticSteps, path: str | None, identity: dict[str, Any]
    ) -> None:
        self.course, self.steps, self.path, self.identity = course, steps, path, identity

    def save(self) -> None:
        """Write the checkpoint; OSError if that fails."""
        if self.path is None:
            return
        course, random = self.course, RandomState(self.steps.objective.model)
        tensors, state = self.steps.state()
        tensors |= {"weight": course.maps.weight, "bias": course.maps.bias}
        tensors |= {f"random {device}": numbers for device, numbers in random.tensors.items()}
        if course.best is not None:
            tensors |= {"best weight": course.best[0], "best bias": course.best[1]}
        progress = {"records": course.records, "best_step": course.best_step, "best_loss": course.best_loss}
        progress["best_strength"] = course.best_strength
        passes = {"passes": self.steps.passes, "held_out_passes": course.held_out_passes}
        checkpoint.save(self.path, tensors, {"identity": self.identity, "steps": state, **progress, **passes})

    def resume(self, path: str) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        OSError
            If it cannot be read.
        ValueError
            If it is none, damaged, or that of another fit; says what differs.
        """
        tensors, state = checkpoint.load(path)
        differs = [key for key, value in self.identity.items() if state["identity"].get(key) != value]
        if differs:
            key = differs[0]
            seen = state["identity"].get(key)
            detail = "" if "digest" in key else f": it was {seen!r}, and is {self.identity[key]!r}"
            raise ValueError(f"resume: {path} is the checkpoint of another fit, of which the {key} differs{detail}")
        course, random = self.course, RandomState(self.steps.objective.model)
        course.maps.weight.copy_(tensors["weight"])
        course.maps.bias.copy_(tensors["bias"])
        if "best weight" in tensors:
            device = course.maps.weight.device
            course.best = tensors["best weight"].to(device), tensors["best bias"].to(device)
        course.records, course.best_step, course.best_loss = state["records"], state["best_step"], state["best_loss"]
        course.best_strength = state["best_strength"]
        if course.best is not None:
            course.best_terms = course.records[course.best_step]["held_out_layer_loss"]
        course.held_out_passes = state["held_out_passes"]
        self.steps.resume(tensors, state["steps"])
        self.steps.passes = state["passes"]
        random.tensors = {name: tensors.get(f"random {name}", numbers) for name, numbers in random.tensors.items()}
        random.restore()


def run(
    steps: ScheduledSteps | AutomaticSteps,
    course: Course,
    keeper: Keeper,
    trial: Sets | Tasks | None,
    patience: int | None,
    progress: bool,
    caller: str,
) -> None:
    """Take the steps until they are done, nothing gets better, the user interrupts or a value is not finite.

    Leaves the best maps in place, and why it ended in ``course.stopped``. `caller` is who warnings say has stopped.
    """
    objective, maps = steps.objective, course.maps
    bar = tqdm(total=steps.count, initial=len(course.records), disable=not progress, desc="fit", unit="step")

    def held_out() -> Trial | None:
        last = course.records[-1] if course.records else None
        if trial is None:
            return None
        if last is not None and not last["kept"]:  # the maps are those of the last time
            return Trial(last["held_out_loss"], last["held_out_layer_loss"], last["held_out_strength"])
        found = []
        # Maps that change nothing are alike at all strengths.
        identity = bool(((maps.weight == 1) & (maps.bias == 0)).all())
        for strength in (1.0,) if identity else course.strengths:
            course.held_out_passes += 1 if isinstance(trial, Sets) else len(trial.parts)
            total, terms = loss(objective, trial, maps.leaves(strength))
            found.append(Trial(total.item(), terms.tolist(), strength))
        return min(found, key=lambda tried: tried.loss)

    try:
        keeper.save()  # a path that cannot be written to is to be known before anything is computed
        for step in range(len(course.records), steps.count):
            total, terms = steps.measure(step)
            tried = held_out()
            course.keep(tried)
            if trial is not None and patience is not None and step - course.best_step >= patience:
                course.stopped = f"no lower held-out loss in {patience} steps"
                break
            move = steps.move(step)
            if move is None:
                course.stopped = "no step lowers the loss"
                break
            course.records.append(
                {
                    "loss": total,
                    "layer_loss": terms.tolist(),
                    "held_out_loss": tried and tried.loss,
                    "held_out_layer_loss": tried and tried.terms,
                    "held_out_strength": tried and tried.strength,
                    **vars(move),
                }
            )
            check_maps(maps)
            keeper.save()
            bar.set_postfix(loss=f"{total:.4g}", refresh=False)
            bar.update()
        else:
            course.keep(held_out())
    except NonFinite as error:
        if course.best is None:
            raise ValueError(f"the loss is not finite before any step: {error}") from None
        course.stopped = f"not finite at step {len(course.records)}: {error}"
        warn(
            f"{caller} stopped, {course.stopped}; the maps after {course.best_step} steps are kept",
        )
    except KeyboardInterrupt:
        course.stopped = "interrupted"
        if trial is None or course.best is None:
            course.keep(None)
    finally:
        bar.close()
    course.restore()
