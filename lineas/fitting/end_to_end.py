"""End-to-end fits: all maps at once, by proximal gradient steps through the model (LinEAS, arXiv 2503.10679)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .._checks import as_choice, as_int, as_not_negative, as_strength
from .._version import __version__
from ..hooks.modules import model_name
from ..hooks.pooling import check_pooling
from ..hooks.tokens import check_fit_tokens
from ..inputs.call import Forward
from ..inputs.frozen import frozen
from ..maps.metadata import Layers, Selection, spell_layers, spell_tokens
from ..maps.steering import SteeringMaps
from .checkpoint import digest
from .loop import AutomaticSteps, Course, Keeper, ScheduledSteps, run
from .objective import SCALINGS, Sets
from .parameters import FlatMaps, ProximalOptimizer
from .problem import check_rate, check_size, find, pose_tasks, read
from .tasks import Tasks

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
        prompts where each has a mini-batch; "layer_loss" [S, L], the term of every loss module; "held_out_loss" [S]
        and "held_out_strength" [S], before the step as well ([0] without held-out data): the lowest of the strengths
        tried, and which it is; "lr" [S]; "penalty" [S], after the step and not multiplied by the rate; "support" [S],
        neurons with a slope other than 1 or a shift other than 0 after the step; "kept" [S], False where ``lr="auto"``
        took the step back because it made things worse. Of `lineas.fit_jointly` "layer_loss" is [S, T, L], and
        "task_loss" [S, T] and "held_out_task_loss" [S, T] are the losses of the T tasks.
    best_step : int
        How many steps ``maps`` had taken: 0 are the maps that the fit started from.
    best_strength : float
        The strength, of those to choose among, that the maps of that step were best at. It is in ``maps`` already.
    stopped : str
        "finished", "interrupted", "no lower held-out loss in k steps", "no step lowers the loss", or "not finite at
        step k: ..." with the module and the value.
    passes, held_out_passes : int
        What the steps cost: 1 for each forward pass of the source prompts, 3 for one with its backward pass (4 where
        they are split into several); and the forward passes of the held-out source prompts.
    held_out_loss : float or None
        The held-out loss of ``maps``.
    held_out_task_loss : dict of str to float, or None
        The same of each task, where there are several.
    """

    maps: SteeringMaps
    history: dict[str, NDArray]
    best_step: int
    stopped: str
    held_out_loss: float | None = None
    passes: int = 0
    held_out_passes: int = 0
    held_out_task_loss: dict[str, float] | None = None
    best_strength: float = 1.0

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the loss over the steps; see `lineas.plot.history`."""
        from ..notebook.plot import history

        return history(self, ax=ax)

    def __repr__(self) -> str:
        losses = self.history["loss"]
        course = f"loss {losses[0]:.4g} -> {losses[-1]:.4g}" if len(losses) else "no step"
        held_out = "" if self.held_out_loss is None else f", held-out {self.held_out_loss:.4g}"
        strength = "" if self.best_strength == 1 else f", best_strength={self.best_strength:g}"
        return (
            f"FitResult({len(self.maps)} maps, {course} in {len(losses)} steps{held_out}, "
            f"best_step={self.best_step}{strength}, stopped={self.stopped!r})"
        )


def fit_end_to_end(
    model: nn.Module,
    source: Any,
    target: Any,
    *,
    layers: Layers,
    loss_layers: Layers | None = None,
    init: SteeringMaps | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    forward: Forward | None = None,
    held_out: tuple[Any, Any] | None = None,
    strengths: Sequence[float] = (1.0,),
    batch_size: int | None = None,
    mini_batch: int | None = None,
    pooling: str = "mean",
    tokens: Selection = "all",
    l1: float = 0.0,
    group: float = 0.0,
    l1_bias: float | None = None,
    group_bias: float | None = None,
    scaling: str = "layer-mean",
    optimizer: str = "sgd",
    lr: float | str = "auto",
    betas: tuple[float, float] = (0.9, 0.999),
    steps: int = 20,
    patience: int | None = 5,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FitResult:
    """Fit the maps of all modules together by gradient descent through the model (LinEAS, arXiv 2503.10679).

    Minimises the squared 2-Wasserstein distances between the pooled activations of the steered source prompts and
    those of the unsteered target prompts, summed over the neurons of each loss module, plus a sparse group lasso on
    slopes - 1 and shifts. A step is a gradient step on all maps followed by the exact proximal step, so zeros are
    exact. The weights of the model are not changed.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    source, target : list[str], batch or list of batches
        The prompts to move and the prompts to move them to; unpaired, of any two numbers, at least 2 each. A list
        of batches forms one step. See `collect` for what a batch is.
    layers : str, list[str] or re.Pattern
        Modules that get a map: a glob, a list of globs or a compiled regular expression.
    loss_layers : str, list[str] or re.Pattern, optional
        Modules at which the distance is taken. Default: the modules of `layers`.
    init : SteeringMaps, optional
        Where to start. Default: the identity.
    tokenizer, max_length, forward
        As in `collect`.
    held_out : (source, target), optional
        Two more sets, on which the loss is recorded at every step and by which the best maps are chosen.
    strengths : list of float, default (1.0,)
        Strengths at which the maps are tried on the held-out sets at every step; the best of them is kept, and the maps
        are returned so that strength 1 is that one. The steps go on from strength 1. Fits to few prompts go too far, as
        means of few samples differ by chance as well: ``(0.7, 0.85, 1.0)`` finds how much to hold back
        (docs/end-to-end-fits.md), at a forward pass of the held-out source each.
    batch_size : int, optional
        Prompts in a forward pass, in every set; default: those of `mini_batch`, without it all texts, or each batch as
        it comes. The loss is always that of all prompts of a step together. Where these take several forward passes,
        all but the last are made twice and one is kept at a time: memory for one of them is enough, and a step takes
        up to half as long again (docs/decisions/0013).
    mini_batch : int, optional
        Prompts of the source in a step, at least 2; default: all of them. They are drawn without replacement until
        fewer are left, then anew, by `seed` and the number of the step alone. The target is always the whole set.
    pooling : {"mean", "min", "max", "last", "all"}, default "mean"
        Over the tokens under the attention mask.
    tokens : "all", "last", "prompt", slice or callable, default "all"
        The tokens that the maps act on, and over which activations are pooled: what is fitted is what the maps meet
        when they are attached. See `SteeringMaps.attach`, which acts on the same tokens by default, since the metadata
        name them. In a prompt "last" is its last token, and "generated" is none and refused. ``pooling="last"`` takes
        the last one of the selected tokens. Outputs without tokens, such as images, allow "all" only.
    l1, group : float, default 0.0
        Penalties: ``l1 * (||w - 1||_1 + ||b||_1) + group * sqrt(d) * (||w - 1||_2 + ||b||_2)`` for each module of d
        neurons.
    l1_bias, group_bias : float, optional
        The penalties of the shifts b, where they are to differ from those of the slopes w.
    scaling : {"layer-mean", "paper", "reference"}, default "layer-mean"
        With D_l the sum over the neurons of module l of squared W2: the mean of D_l over modules, their sum
        (eq. 4 of the paper), or the mean of D_l min(n, m) / d, which is what the published code minimises and what
        its rates and penalties fit.
    optimizer : {"sgd", "adam"}, default "sgd"
        Gradient descent without momentum, or Adam with bias correction.
    lr : "auto" or float, default "auto"
        The rate, which is the step of the prox too. "auto" finds rates from the loss and its gradients, whatever the
        model and the scale of its activations: the first step goes a quarter of the way to where a linear loss would
        reach 0, later rates are half of the smallest inverse curvature (Barzilai and Borwein 1988) of the last ten
        steps, and a step after which loss and penalties together are higher is taken back. It costs one more gradient
        than there are steps, and is for "sgd". A number is the first rate; it falls along a cosine to a thousandth of
        itself.
    betas : (float, float), default (0.9, 0.999)
        Decay rates of Adam.
    steps : int, default 20
        The largest number of steps.
    patience : int or None, default 5
        With `held_out`: stop after so many steps without a lower held-out loss; None takes all steps.
    checkpoint : path, optional
        File to keep the fit in: written before the first step and after every one, as a whole or not at all. It must
        not exist yet.
    resume : path, optional
        Go on with the fit of this checkpoint, whatever ended it, to the same bits as if nothing had (on the same
        machine, with as many threads). All other arguments must be those of then; only `patience` and, at automatic
        rates without mini-batches, `steps` may differ. It is also written to, unless `checkpoint` names another file.
    seed : int, default 0
        Of torch's random numbers during the fit, for models that draw any, and of the mini-batches. The state is
        restored afterwards.
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    FitResult
        ``maps`` (`SteeringMaps`: the best ones by held-out loss, without `held_out` those after the last step) and
        ``history`` (arrays "loss" [S] before each step, "layer_loss" [S, L], "held_out_loss", "lr", "penalty",
        "support", "kept"), ``passes`` and ``held_out_passes``, what it cost. Ctrl-C and a loss that is not finite end
        the fit early and keep the best maps so far.

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    OSError
        If a checkpoint cannot be read or written, FileExistsError if it is there already; what is on disk stays.
    ValueError
        If `resume` is no checkpoint, damaged or of another fit, a setting is out of range, no module matches, a set has
        fewer than 2 prompts, or a map could not influence any loss; the message names the argument or the module.
    """
    return fit_tasks(
        model,
        {None: (source, target, held_out)},
        caller="fit_end_to_end",
        layers=layers,
        loss_layers=loss_layers,
        init=init,
        tokenizer=tokenizer,
        max_length=max_length,
        forward=forward,
        strengths=strengths,
        batch_size=batch_size,
        mini_batch=mini_batch,
        pooling=pooling,
        tokens=tokens,
        l1=l1,
        group=group,
        l1_bias=l1_bias,
        group_bias=group_bias,
        scaling=scaling,
        optimizer=optimizer,
        lr=lr,
        betas=betas,
        steps=steps,
        patience=patience,
        checkpoint=checkpoint,
        resume=resume,
        seed=seed,
        progress=progress,
    )


def fit_tasks(
    model: nn.Module,
    tasks: Mapping[str | None, tuple[Any, Any, Any]],
    *,
    caller: str,
    layers: Layers,
    loss_layers: Layers | None,
    init: SteeringMaps | None,
    tokenizer: Any,
    max_length: int | None,
    forward: Forward | None,
    strengths: Sequence[float],
    batch_size: int | None,
    mini_batch: int | None,
    pooling: str,
    tokens: Selection,
    l1: float,
    group: float,
    l1_bias: float | None,
    group_bias: float | None,
    scaling: str,
    optimizer: str,
    lr: float | str,
    betas: tuple[float, float],
    steps: int,
    patience: int | None,
    checkpoint: str | os.PathLike[str] | None,
    resume: str | os.PathLike[str] | None,
    seed: int,
    progress: bool,
) -> FitResult:
    """Fit the maps of all modules for all tasks: their source, target and held-out sets (or None), by name.

    An only task has the name None. `caller` is who warnings say has stopped; they point at the code that called it.
    """
    penalties = {
        "l1": as_not_negative(l1, "l1"),
        "group": as_not_negative(group, "group"),
        "l1_bias": as_not_negative(l1 if l1_bias is None else l1_bias, "l1_bias"),
        "group_bias": as_not_negative(group if group_bias is None else group_bias, "group_bias"),
    }
    check_pooling(pooling)
    tokens = check_fit_tokens(tokens, model)
    strengths = _check_strengths(strengths, any(held_out is not None for *_, held_out in tasks.values()))
    as_choice(scaling, "scaling", SCALINGS)
    as_choice(optimizer, "optimizer", OPTIMIZERS)
    rate = check_rate(lr)
    if rate is None and optimizer != "sgd":
        raise ValueError(f"lr must be a number for optimizer {optimizer!r}: 'auto' is for 'sgd'")
    betas = _check_betas(betas)
    steps, seed = as_int(steps, "steps", low=1), as_int(seed, "seed", low=0)
    batch_size, mini_batch = check_size("batch_size", batch_size, 1), check_size("mini_batch", mini_batch, 2)
    patience = check_size("patience", patience, 1)
    checkpoint, resume = _check_files(checkpoint, resume)
    if init is not None and not isinstance(init, Mapping):
        raise TypeError(f"init must be a SteeringMaps, got {type(init).__name__}")
    settings = {
        "scaling": scaling,
        "optimizer": optimizer,
        "lr": "auto" if rate is None else rate,
        "betas": list(betas),
        "steps": steps,
        "patience": patience,
        "strengths": list(strengths),
        "seed": seed,
        "max_length": max_length,
        "batch_size": batch_size,
        "mini_batch": mini_batch,
        **penalties,
    }
    data = {task: read(*sets, tokenizer, max_length, task) for task, sets in tasks.items()}
    map_names, loss_names = find(model, layers, loss_layers)
    single = None in tasks
    shape = (len(loss_names),) if single else (len(tasks), len(loss_names))

    with frozen(model):
        torch.manual_seed(seed)
        objective, posed = pose_tasks(
            model,
            data,
            map_names,
            loss_names,
            forward,
            pooling,
            scaling,
            tokens=tokens,
            batch_size=batch_size,
            mini_batch=mini_batch,
            seed=seed,
        )
        fitted, trial = _join(posed, single)
        maps = FlatMaps(objective.widths, objective.dtype, objective.device)
        if init is not None:
            maps.load(init)
        takers: ScheduledSteps | AutomaticSteps
        if rate is None:
            weights = penalties["l1"], penalties["group"], penalties["l1_bias"], penalties["group_bias"]
            takers = AutomaticSteps(objective, fitted, maps, weights, steps)
        else:
            stepper = ProximalOptimizer(maps, optimizer=optimizer, betas=betas, **penalties)
            takers = ScheduledSteps(objective, fitted, stepper, rate, steps)
        course = Course(maps, strengths)
        # Where rates do not depend on the number of steps, a fit may go on for more of them, or be more patient.
        free = ("steps", "patience") if rate is None and mini_batch is None else ("patience",)
        identity = {
            **{key: value for key, value in settings.items() if key not in free},
            "pooling": pooling,
            "tokens": spell_tokens(tokens),
            "modules": objective.widths,
            "loss modules": objective.loss_names,
            "dtype": str(objective.dtype),
            "tasks": None if single else list(tasks),
            "digest of the prompts": digest(
                [[batch.args, batch.kwargs] for sets in data.values() for part in sets.values() for batch in part]
            ),
            "digest of init": digest(maps.weight, maps.bias),
        }
        keeper = Keeper(course, takers, checkpoint, identity)
        if resume is not None:
            keeper.resume(resume)
        run(takers, course, keeper, trial, patience, progress, caller)

    history = course.history(shape, trial is not None)
    held_out_layer_loss = history.pop("held_out_layer_loss")
    held_out_task_loss: dict[str, float] | None = None
    if not single:
        total = np.sum if scaling == "paper" else np.mean
        history["task_loss"] = total(history["layer_loss"], axis=-1)
        history["held_out_task_loss"] = total(held_out_layer_loss, axis=-1)
        if course.best_terms is not None:
            best = total(course.best_terms, axis=-1).tolist()
            held_out_task_loss = {str(task): value for task, value in zip(data, best, strict=True)}
    metadata = {
        "method": "end-to-end" if single else "joint end-to-end",
        "version": __version__,
        "model": model_name(model),
        "layers": spell_layers(layers),
        "loss_layers": spell_layers(layers if loss_layers is None else loss_layers),
        "pooling": pooling,
        "tokens": spell_tokens(tokens),
        **({} if single else {"tasks": list(tasks)}),
        "settings": settings,
        "history": {
            "loss": history["loss"].tolist(),
            "held_out_loss": history["held_out_loss"].tolist(),
            "best_step": course.best_step,
            "best_strength": course.best_strength,
            "stopped": course.stopped,
        },
    }
    found = SteeringMaps(maps.snapshot(), metadata)
    return FitResult(
        found,
        history,
        course.best_step,
        course.stopped,
        course.best_loss,
        takers.passes,
        course.held_out_passes,
        held_out_task_loss,
        course.best_strength,
    )


def _join(posed: list[tuple[Sets, Sets | None]], single: bool) -> tuple[Sets | Tasks, Sets | Tasks | None]:
    """The sets to fit and the held-out sets, if there are any, of all tasks."""
    if single:
        return posed[0]
    trials = [trial for _, trial in posed if trial is not None]
    return Tasks([fitted for fitted, _ in posed]), Tasks(trials) if trials else None


def _check_files(checkpoint: Any, resume: Any) -> tuple[str | None, str | None]:
    """Where a fit is kept, and where it goes on from."""
    for name, value in (("checkpoint", checkpoint), ("resume", resume)):
        if value is not None and not isinstance(value, str | os.PathLike):
            raise TypeError(f"{name} must be a path, got {type(value).__name__}")
    kept = None if checkpoint is None else os.fspath(checkpoint)
    begun = None if resume is None else os.fspath(resume)
    if kept is None:
        return begun, begun
    if os.path.exists(kept) and not (begun is not None and os.path.exists(begun) and os.path.samefile(kept, begun)):
        raise FileExistsError(
            f"checkpoint: {kept} exists: pass it as resume= to go on with that fit, or remove it to begin again"
        )
    return kept, begun


def _check_strengths(strengths: Any, held_out: bool) -> tuple[float, ...]:
    if isinstance(strengths, str) or not isinstance(strengths, Sequence | np.ndarray):
        raise TypeError(f"strengths must be a list of numbers, got {type(strengths).__name__}")
    found = tuple(as_strength(strength, "strengths") for strength in strengths)
    if not found:
        raise ValueError("strengths is empty")
    if found != (1.0,) and not held_out:
        raise ValueError("strengths: there are no held_out sets to choose among them by")
    return found


def _check_betas(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    first, second = (as_not_negative(beta, "betas") for beta in betas)
    if max(first, second) >= 1:
        raise ValueError(f"betas must be < 1, got {betas!r}")
    return first, second
