"""The loop of an end-to-end fit: step by step, with the best maps on the way and the history."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from .._warn import warn
from .checkpoint import Checkpoint
from .objective import NonFinite, Task
from .parameters import MapParameters
from .preservation import Preservation
from .settings import FitSettings
from .step_sizes import Steps

# The arrays of `FitResult.history` that are there for every step, and what the records of a step call them.
_TYPES = {"loss": np.float64, "lr": np.float64, "penalty": np.float64, "support": np.int64, "kept": np.bool_}


class HeldOut(NamedTuple):
    """What is known of a step by held-out data: their loss, its terms, and the strength of the maps that has it."""

    held_out_loss: float
    held_out_layer_loss: Any
    held_out_strength: float
    held_out_keep: float | None = None
    """The divergence on held-out prompts that are to stay as they are."""
    held_out_score: float = sys.float_info.max
    """By what maps are chosen: the loss and the weighted divergence, or the largest number beyond a budget of that."""


class History:
    """What a running fit has gone through, and the best maps that it has seen.

    Attributes
    ----------
    records : list of dict
        What is known of every step, as JSON has it.
    best : (Tensor, Tensor) or None
        Slopes and shifts [D] of the best maps; with the step, the strength, the loss and the terms that they have.
    stopped : str
        Why the fit ended.
    held_out_passes : int
        Forward passes of held-out prompts.
    """

    def __init__(self, maps: MapParameters, *, preserves: bool = False) -> None:
        self.maps, self.preserves = maps, preserves
        self.records: list[dict[str, Any]] = []
        self.best: tuple[Tensor, Tensor] | None = None
        self.best_step, self.best_strength = 0, 1.0
        self.best_loss: float | None = None
        self.best_keep: float | None = None
        self.best_score: float | None = None
        self.best_terms: Any = None
        self.stopped = "finished"
        self.held_out_passes = 0

    def keep(self, tried: HeldOut | None) -> None:
        """Keep the maps as they stand, at the strength that they were best at, unless a lower loss was seen."""
        if tried is not None and self.best_score is not None and tried.held_out_score >= self.best_score:
            return
        found = HeldOut(None, None, 1.0, None, None) if tried is None else tried  # type: ignore[arg-type]
        self.best_loss, self.best_terms, self.best_strength, self.best_keep, self.best_score = found
        self.best, self.best_step = self.maps.at(self.best_strength), len(self.records)

    def since_best(self) -> int:
        """The number of steps after those of the best maps, without those that were taken back."""
        return sum(record["kept"] for record in self.records[self.best_step :])

    def restore(self) -> None:
        """Put the best maps back in place."""
        if self.best is not None:
            self.maps.weight.copy_(self.best[0])
            self.maps.bias.copy_(self.best[1])

    def arrays(self, tasks: int, modules: int, scaling: str) -> dict[str, NDArray]:
        """The arrays of `FitResult.history`."""
        tried = [record for record in self.records if record["held_out_loss"] is not None]

        def column(name: str, kind: Any = np.float64) -> NDArray:
            records = tried if name in HeldOut._fields else self.records
            return np.array([record[name] for record in records], kind)

        terms, held_out_terms = (
            column(name).reshape(-1, tasks, modules) for name in ("layer_loss", "held_out_layer_loss")
        )
        found = {name: column(name, kind) for name, kind in _TYPES.items()}
        found["layer_loss"] = terms[:, 0] if tasks == 1 else terms
        found |= {name: column(name) for name in ("held_out_loss", "held_out_strength")}
        if self.preserves:
            found |= {name: column(name) for name in ("keep", "keep_weight", "held_out_keep")}
        if tasks > 1:
            found |= {"task_loss": of_tasks(terms, scaling), "held_out_task_loss": of_tasks(held_out_terms, scaling)}
        return found


def of_tasks(terms: Any, scaling: str) -> NDArray:
    """The losses [..., T] of tasks from the terms [..., T, L] of their modules."""
    return (np.sum if scaling == "paper" else np.mean)(terms, axis=-1)


def run(
    steps: Steps,
    history: History,
    checkpoint: Checkpoint | None,
    held_out: Sequence[Task],
    held_out_keep: Preservation | None,
    settings: FitSettings,
    caller: str,
) -> None:
    """Take the steps until they are done, nothing gets better, the user interrupts or a value is not finite.

    Leaves the best maps in place, and why it ended in ``history.stopped``. `caller` is who warnings say has stopped.
    """
    maps = history.maps
    bar = tqdm(total=steps.count, initial=len(history.records), disable=not settings.progress, desc="fit", unit="step")

    def measure_held_out() -> HeldOut | None:
        if not held_out:
            return None
        last = history.records[-1] if history.records else None
        if last is not None and not last["kept"]:  # the maps are those of the last time
            return HeldOut(*(last[name] for name in HeldOut._fields))
        # Maps that change nothing are alike at all strengths.
        found = []
        for strength in settings.strengths if maps.support().any() else (1.0,):
            history.held_out_passes += len(held_out)
            leaves = maps.leaves(strength)
            loss, terms = steps.objective.loss(held_out, leaves)
            kept, score = None, loss
            if held_out_keep is not None:
                history.held_out_passes += 1
                kept, weight = held_out_keep.measure(leaves), steps.keep_weight
                if weight.budget is None:
                    score += weight.value * kept
                elif kept > weight.budget:
                    score = sys.float_info.max
            found.append(HeldOut(loss, terms.tolist(), strength, kept, score))
        return min(found, key=lambda tried: tried.held_out_score)

    def save() -> None:
        if checkpoint is not None:
            checkpoint.save(history, steps)

    try:
        save()  # a path that cannot be written to is to be known before anything is computed
        for step in range(len(history.records), steps.count):
            total, terms = steps.measure(step)
            tried = measure_held_out()
            history.keep(tried)
            if held_out and settings.patience is not None and history.since_best() >= settings.patience:
                history.stopped = f"no lower held-out loss in {settings.patience} steps"
                break
            kept = {} if steps.kept is None else {"keep": steps.kept.value, "keep_weight": steps.keep_weight.value}
            taken = steps.move(step)
            if taken is None:
                history.stopped = "no step lowers the loss"
                break
            measured = {"loss": total, "layer_loss": terms.tolist(), **kept}
            trial = dict.fromkeys(HeldOut._fields) if tried is None else tried._asdict()
            history.records.append({**measured, **trial, **vars(taken)})
            maps.check_finite()
            save()
            bar.set_postfix(
                loss=f"{total:.4g}", **{name: f"{value:.4g}" for name, value in kept.items()}, refresh=False
            )
            bar.update()
        else:
            history.keep(measure_held_out())
    except NonFinite as error:
        if history.best is None:
            raise ValueError(f"the loss is not finite before any step: {error}") from None
        history.stopped = f"not finite at step {len(history.records)}: {error}"
        warn(f"{caller} stopped, {history.stopped}; the maps after {history.best_step} steps are kept")
    except KeyboardInterrupt:
        history.stopped = "interrupted"
        if not held_out or history.best is None:
            history.keep(None)
    finally:
        bar.close()
    history.restore()
