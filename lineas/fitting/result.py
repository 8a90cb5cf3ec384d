"""What fits through a model return. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from numpy.typing import NDArray

from .._lazy import lazy_method
from ..maps.path import SparsePath
from ..maps.records import Record
from ..maps.steering import SteeringMaps

if TYPE_CHECKING:
    from ..evaluation.diagnose import diagnose
    from ..hooks.attach import Handle
    from ..notebook.plot import history as plot


@dataclass(frozen=True, eq=False, repr=False)
class FitResult(Record):
    """What an end-to-end fit found.

    Attributes
    ----------
    maps : SteeringMaps
        With held-out data the maps with the lowest held-out loss, otherwise the maps after the last step. After a
        loss that was not finite, the last maps whose loss was.
    history : dict of str to array
        One entry for each step taken: "loss" [S], the value before the step, without penalties, and of the step's own
        prompts where each has a mini-batch; "layer_loss" [S, L], the term of every loss module; "held_out_loss" [S]
        and "held_out_strength" [S], before the step as well ([0] without held-out data): the lowest of the strengths
        tried, and which it is; "lr" [S]; "penalty" [S], after the step and not multiplied by the rate; "support" [S],
        neurons with a slope other than 1 or a shift other than 0 after the step; "kept" [S], False where ``lr="auto"``
        took the step back because it made things worse. Of `lineas.fit_jointly` "layer_loss" is [S, T, L], and
        "task_loss" [S, T] and "held_out_task_loss" [S, T] are the losses of the T tasks. With `keep` "keep" [S] is the
        divergence on what is to stay as it is, before the step, "keep_weight" [S] its weight in the step, and
        "held_out_keep" [S] that on the held-out prompts.
    best_step : int
        How many steps ``maps`` had taken: 0 are the maps that the fit started from.
    stopped : str
        "finished", "interrupted", "no lower held-out loss in k steps", "no step lowers the loss", or "not finite at
        step k: ..." with the module and the value.
    held_out_loss : float or None
        The held-out loss of ``maps``.
    passes, held_out_passes : int
        What the steps cost: 1 for each forward pass of the source prompts, 3 for one with its backward pass (4 where
        they are split into several); and the forward passes of the held-out source prompts.
    held_out_task_loss : dict of str to float, or None
        The held-out loss of each task, where there are several.
    best_strength : float
        The strength, of those to choose among, that the maps of that step were best at. It is in ``maps`` already.
    loss : float or None
        The loss of ``maps``, without penalties, where a step of the fit told it. None with mini-batches, for maps at
        another strength than 1, and for those after the last step at a rate that was given: ``history["loss"]`` ends
        before that step.
    held_out_keep : float or None
        The divergence of ``maps`` from the unsteered model on the held-out prompts that are to stay as they are, where
        there are any: the mean over tokens, in nats with ``keep_loss="kl"``.
    """

    FORMAT = "lineas fit"

    maps: SteeringMaps
    history: dict[str, NDArray]
    best_step: int
    stopped: str
    held_out_loss: float | None = None
    passes: int = 0
    held_out_passes: int = 0
    held_out_task_loss: dict[str, float] | None = None
    best_strength: float = 1.0
    loss: float | None = None
    held_out_keep: float | None = None

    @property
    def attach(self) -> Callable[..., Handle]:
        """Attach the maps to a model: ``result.maps.attach``."""
        return self.maps.attach

    if TYPE_CHECKING:
        diagnose = diagnose
        plot = plot
    else:
        diagnose = lazy_method("evaluation.diagnose", "diagnose")
        plot = lazy_method("notebook.plot", "history")

    def __repr__(self) -> str:
        losses = self.history["loss"]
        steps = f"{len(losses)} step{'' if len(losses) == 1 else 's'}"
        if not len(losses):
            course = "no step"
        elif self.loss is not None:
            course = f"loss {losses[0]:.4g} -> {self.loss:.4g} in {steps}"
        elif len(losses) == 1:
            course = f"loss {losses[0]:.4g} before the only step"
        else:
            course = f"loss {losses[0]:.4g} -> {losses[-1]:.4g} before the last of {steps}"
        held_out = "" if self.held_out_loss is None else f", held-out {self.held_out_loss:.4g}"
        held_out += "" if self.held_out_keep is None else f", held_out_keep={self.held_out_keep:.3g}"
        strength = "" if self.best_strength == 1 else f", best_strength={self.best_strength:g}"
        return (
            f"FitResult({len(self.maps)} maps, {course}{held_out}, "
            f"best_step={self.best_step}{strength}, stopped={self.stopped!r})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class EndToEndPath(SparsePath):
    """A `SparsePath` through a model: what `lineas.sparse_path_end_to_end` returns.

    Attributes
    ----------
    penalized_loss, penalized_held_out_loss : ndarray or None
        float64 [K], the losses before the refit on the support; ``loss`` and ``held_out_loss`` are those of the maps
        that were kept.
    refitted : ndarray or None
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

    FORMAT = "lineas end-to-end path"
    _SHAPES = SparsePath._SHAPES | {"penalized_loss": "K", "penalized_held_out_loss": "K", "refitted": "K"}

    penalized_loss: NDArray | None = None
    penalized_held_out_loss: NDArray | None = None
    refitted: NDArray | None = None
    history: dict[str, NDArray] = field(default_factory=dict)
    passes: int = 0
    stopped: str = "finished"
