"""End-to-end fits: all maps at once, by proximal gradient steps through the model (LinEAS, arXiv 2503.10679)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn

from .._checks import as_pair
from .._version import __version__
from .._warn import warn
from ..hooks.attach import check_to_fit
from ..hooks.collect import read_prompts
from ..hooks.modules import find, model_name, resolve
from ..hooks.settings import RunSettings, optional, takes
from ..hooks.sites import choose_layers
from ..hooks.tokens import check_fit_tokens
from ..inputs.frozen import frozen
from ..inputs.prompts import Prompts, Sampler, join
from ..maps.gates import arrays_of, facts_of
from ..maps.metadata import describe, spell_tokens
from ..maps.steering import SteeringMaps
from .checkpoint import Checkpoint, digest, digest_of_weights
from .distributed import ALONE, Processes, processes_of
from .initial import start
from .loop import History, of_tasks, run
from .objective import Objective, Task
from .on_top import as_on_top_of, digest_of_maps, leave_alone
from .parameters import ProximalOptimizer, parameters_of
from .preservation import KeepWeight, Preservation
from .result import FitResult
from .settings import FitSettings, JointSettings, ObjectiveSettings
from .step_sizes import AutomaticSteps, ScheduledSteps, Steps, penalty_of

# A loss so many times the first, penalties included, is that of steps that were too long.
DIVERGED = 10

Pair: TypeAlias = tuple[Any, Any]
"""Source and target, as users give them."""
NamedPairs: TypeAlias = tuple[str | None, Pair, Pair | None]
"""A task: its name, or None for an only one; source and target; held-out source and target, or None."""
Sets: TypeAlias = list[Prompts]
"""Source and target of a task and, where there are any, its held-out source and target."""


@takes(FitSettings)
def fit_end_to_end(model: nn.Module, source: Any, target: Any, settings: FitSettings) -> FitResult:
    """Fit the maps of all modules together by gradient descent through the model (LinEAS, arXiv 2503.10679).

    Minimises the squared 2-Wasserstein distances between the pooled activations of the steered source prompts and
    those of the unsteered target prompts, summed over the neurons of each loss module, plus a sparse group lasso on
    slopes - 1 and shifts. A step is a gradient step on all maps followed by the exact proximal step, so zeros are
    exact. The weights of the model are not changed.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    source, target : list of texts, conversations or token ids, batch or list of batches
        The prompts to move and the prompts to move them to; unpaired, of any two numbers, at least 2 each. Texts are
        strings; conversations lists of messages with "role" and "content", which the tokenizer's chat template renders;
        token ids lists of integers. A batch that is a dict is passed as ``model(**batch)``, a tensor as
        ``model(batch)``, a tuple as ``model(*batch)``; a list of them forms one step.
    **settings

    Returns
    -------
    FitResult
        The maps, the history of the S steps taken and what they cost; see `FitResult`. Ctrl-C and a loss that is not
        finite end the fit early and keep the best maps so far. A loss that went far up, at a rate that was given and
        without held-out sets, is warned of.

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    OSError
        If a checkpoint cannot be read or written; what is on disk stays.
    RuntimeError
        With `process_group`, if another process has failed or ended; the message says which, and why where it could.
    ValueError
        If the model's weights are on the meta device, `checkpoint` is there and is none, damaged or of another fit, a
        setting is out of range, no module matches, a
        set has fewer than 2 prompts, or a map could not influence any loss; the message names the argument or module.

    Warns
    -----
    UserWarning
        If maps are attached to the model: what is fitted is right only together with them.
    """
    check_to_fit(model)
    held_out = optional(as_pair, settings.held_out, "held_out")
    return _fit_on_top_of(model, [(None, (source, target), held_out)], settings, "fit_end_to_end")


@takes(JointSettings)
def fit_jointly(model: nn.Module, tasks: Mapping[str, tuple[Any, Any]], settings: JointSettings) -> FitResult:
    """Fit one set of maps for several concepts at once: as `fit_end_to_end`, of the mean of the tasks' losses.

    Maps that were fitted one by one can be composed (``second @ first``), but each was fitted to a model without the
    others. Here one set of maps is to serve all tasks: the source of each comes to be distributed like its target. See
    docs/two-concepts.md for what each is better at. A step costs the gradient of every task, one after the other.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    tasks : dict of str to (source, target)
        At least two, each with the prompts to move and those to move them to, as in `fit_end_to_end`. All count alike,
        whatever the number of their prompts.
    **settings

    Returns
    -------
    FitResult
        As of `fit_end_to_end`. In ``history`` "loss" and "held_out_loss" are the means over the T tasks, "layer_loss"
        is [S, T, L], and "task_loss" and "held_out_task_loss" are [S, T]; ``held_out_task_loss`` are the losses of
        ``maps`` by task. The metadata of the maps name the tasks.

    Raises
    ------
    TypeError, OSError
        As `fit_end_to_end`; TypeError as well if `tasks` or `held_out` does not map names to pairs.
    ValueError
        As `fit_end_to_end`; and if there are fewer than two tasks, one is no pair, or `held_out` has others. The
        message names the task.

    Warns
    -----
    UserWarning
        If maps are attached to the model: what is fitted is right only together with them.
    """
    check_to_fit(model)
    pairs = pairs_by_name("tasks", tasks)
    if len(pairs) < 2:
        raise ValueError(f"tasks must have at least 2 entries, got {len(pairs)}: fit_end_to_end fits one")
    held_out = pairs_of_tasks("held_out", settings.held_out, pairs)
    given = [(name, pair, held_out[name]) for name, pair in pairs.items()]
    return _fit_on_top_of(model, given, settings, "fit_jointly")


def pairs_by_name(argument: str, tasks: Any) -> dict[str, Pair]:
    """Pairs (source, target) by name; TypeError or ValueError, which names the entry, where they are none."""
    if not isinstance(tasks, Mapping):
        raise TypeError(f"{argument} must map names to pairs (source, target), got {type(tasks).__name__}")
    for name in tasks:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must have names as keys, got {name!r}")
    return {name: as_pair(pair, f"{argument}[{name!r}]") for name, pair in tasks.items()}


def pairs_of_tasks(argument: str, given: Any, tasks: Mapping[str, Pair]) -> Mapping[str, Pair | None]:
    """Pairs for each of the tasks, or None for each; ValueError where there are others or not all."""
    if given is None:
        return dict.fromkeys(tasks)
    pairs = pairs_by_name(argument, given)
    for name in [*tasks, *pairs]:
        if name not in pairs or name not in tasks:
            side = "lacks" if name in tasks else "has"
            raise ValueError(f"{argument} must have the tasks of tasks, {list(tasks)}: it {side} {name!r}")
    return pairs


# --- what fits start from ---------------------------------------------------------------------------------------------


def read_sets(name: str | None, pair: Pair, held_out: Pair | None, settings: RunSettings) -> Sets:
    """Read the prompts of a task from pairs (source, target), the second or None; `name` is None for an only one."""
    at = "" if name is None else f"[{name!r}]"
    first = "" if name is None else f"tasks{at} "
    given = [(f"{first}source", pair[0]), (f"{first}target", pair[1])]
    if held_out is not None:
        given += [(f"held_out{at} source", held_out[0]), (f"held_out{at} target", held_out[1])]
    return [read_prompts(data, argument, settings) for argument, data in given]


def prepare(
    model: nn.Module,
    tasks: list[Sets],
    settings: ObjectiveSettings,
    mini_batch: int | None = None,
    processes: Processes = ALONE,
) -> tuple[Objective, list[Task], list[Task], dict[str, Any]]:
    """The objective, the tasks to fit, the held-out ones, and what metadata say of them all; inside `frozen`.

    Every set is divided into forward passes, of several `processes` each its own part. With ``mini_batch`` the steps
    draw so many prompts of the source.
    """
    map_names, layers = choose_layers(model, settings.layers, say=settings.progress)
    loss_layers = layers if settings.loss_layers is None else settings.loss_layers
    loss_names = map_names if settings.loss_layers is None else resolve(model, loss_layers, argument="loss_layers")
    check_fit_tokens(settings.tokens, model)
    size = settings.batch_size
    tasks = [[processes.share(prompts) for prompts in sets] for sets in tasks]
    samplers = [
        None if mini_batch is None else Sampler(sets[0], mini_batch, batch_size=size, seed=settings.seed)
        for sets in tasks
    ]
    torch.manual_seed(processes.seed(settings.seed))
    objective = Objective(model, map_names, loss_names, settings, processes)

    def task(source: Prompts, target: Prompts, sampler: Sampler | None = None, *, fitted: bool = False) -> Task:
        targets = objective.target(target.parts(size or mini_batch), target.argument, fitted=fitted)
        batches = source.parts(size or mini_batch) if sampler is None else sampler.draw(0)
        return Task(source.argument, batches, targets, sampler)

    fitted = [task(sets[0], sets[1], sampler, fitted=True) for sets, sampler in zip(tasks, samplers, strict=True)]
    held_out = [task(sets[2], sets[3]) for sets in tasks if len(sets) > 2]
    facts = {"model": model_name(model), "layers": layers, "loss_layers": loss_layers, **settings.selection}
    return objective, fitted, held_out, facts


def _fit_on_top_of(model: nn.Module, given: Sequence[NamedPairs], settings: FitSettings, caller: str) -> FitResult:
    """`fit_maps` on top of the maps that settings name, if any, with maps that do both."""
    if settings.on_top_of is None:
        return fit_maps(model, given, settings, caller)
    if settings.gates is not None or settings.on_top_of.gates:
        raise ValueError("on_top_of: maps with gates are not composed with others; fit_sequence keeps them apart")
    below = as_on_top_of(settings.on_top_of, model, settings.tokens)
    result = fit_maps(model, given, settings, caller, [below])
    return replace(result, maps=result.maps @ below)


def fit_maps(
    model: nn.Module,
    given: Sequence[NamedPairs],
    settings: FitSettings,
    caller: str,
    below: Sequence[SteeringMaps] = (),
    preserved: Sequence[NamedPairs] = (),
    followers: Sequence[str] = (),
) -> FitResult:
    """Fit the maps of all modules for all tasks, while those `below` are on, in this order.

    The maps that are returned are those that were fitted, without those below. The targets of `preserved` tasks are
    added to what is to stay as it is. `followers` are the checkpoints of fits that are on top of this one.
    """
    processes, model = processes_of(model, settings.process_group)
    with processes.session():
        if processes.rank != 0:
            settings = replace(settings, progress=False)
        return _fit_maps(model, given, settings, caller, below, preserved, followers, processes)


def _fit_maps(
    model: nn.Module,
    given: Sequence[NamedPairs],
    settings: FitSettings,
    caller: str,
    below: Sequence[SteeringMaps],
    preserved: Sequence[NamedPairs],
    followers: Sequence[str],
    processes: Processes,
) -> FitResult:
    tasks, others = ([read_sets(*task, settings) for task in some] for some in (given, preserved))
    preserves = settings.keep_weight != 0
    keep = None
    if settings.keep is not None:
        keep = join([read_prompts(settings.keep, "keep", settings), *(sets[1] for sets in others)])
    names = [name for name, *_ in given]
    same = {"pooling": settings.pooling, "tokens": spell_tokens(settings.tokens), "tasks": names}
    if settings.process_group is not None or settings.checkpoint is not None:
        kept_contents = None if keep is None else keep.contents()
        same |= {
            "digest of the prompts": digest([prompts.contents() for sets in tasks for prompts in sets]),
            "digest of keep": digest(kept_contents, [one.contents() for sets in others for one in sets]),
            "digest of on_top_of": digest_of_maps(below),
            "digest of the model's weights": digest_of_weights(model),
        }
    processes.compare({**same, **settings.record(), **_of_processes(settings)})
    with ExitStack() as stack:
        for one in below:
            stack.enter_context(one.attach(model, tokens=settings.tokens))
        stack.enter_context(frozen(model))
        objective, fitted, held_out, facts = prepare(model, tasks, settings, settings.mini_batch, processes)
        maps = parameters_of(objective, settings)
        if settings.disjoint:
            leave_alone(maps, below)
        objective.put_gates(settings.gates)
        if isinstance(settings.init, str):
            facts |= start(model, tasks, objective, held_out, maps, settings)
        elif settings.init is not None:
            maps.load({find(model, name)[0]: affine for name, affine in settings.init.items()})
        kept, held_out_kept = (
            _preservations(objective, [*tasks, *others], keep, settings) if preserves else (None, None)
        )
        weight = settings.keep_weight
        keep_weight = KeepWeight(0.0 if weight is None or isinstance(weight, str) else weight, settings.max_kl)
        steps: Steps
        if isinstance(settings.lr, str):
            steps = AutomaticSteps(objective, fitted, maps, settings.penalties, settings.steps, kept, keep_weight)
        else:
            stepper = ProximalOptimizer(maps, settings.penalties, settings.optimizer, settings.betas)
            steps = ScheduledSteps(objective, fitted, stepper, settings.lr, settings.steps, kept, keep_weight)
        history, checkpoint = History(maps, preserves=preserves), None
        history.held_out_passes = len(held_out) * sum(map(len, facts.get("init_losses", {}).values()))
        penalty = penalty_of(maps, settings.penalties, maps.sizes)
        identity = {
            **{key: value for key, value in settings.record().items() if key not in settings.free},
            "modules": objective.widths,
            "loss modules": objective.loss_names,
            "dtype": str(objective.dtype),
            "dtypes of the activations": sorted(map(str, objective.seen)),
            **same,
            "digest of init": digest(maps.weight, maps.bias),
            "digest of gates": digest(
                {name: [arrays_of(gate), facts_of(gate)] for name, gate in objective.gates.items()}
            ),
        }
        processes.compare(identity)
        if settings.checkpoint is not None:
            # The targets are the second of the sets, and the held-out ones the fourth.
            fits = {sets[1].argument: task for sets, task in zip(tasks, fitted, strict=True)}
            fits |= {sets[3].argument: task for sets, task in zip(tasks, held_out, strict=False)}
            targets = {argument: task.targets for argument, task in fits.items()}
            checkpoint = Checkpoint(settings.checkpoint, identity, targets, objective, followers)
            if processes.same(os.path.exists(settings.checkpoint)):
                checkpoint.resume(history, steps)
        run(steps, history, checkpoint, held_out, held_out_kept, settings, caller)
    loss = None
    if settings.mini_batch is None and history.best_strength == 1:
        last = history.best_step == len(history.records)
        loss = steps.loss if last else history.records[history.best_step]["loss"]
    if not (held_out or settings.lr == "auto" or history.stopped.startswith("not finite")):
        _warn_of_divergence(history.records, penalty, caller)

    arrays = history.arrays(len(given), len(objective.loss_names), settings.scaling)
    held_out_task_loss = None
    if len(given) > 1:
        facts["tasks"] = names
        if history.best_terms is not None:
            losses = of_tasks(history.best_terms, settings.scaling).tolist()
            held_out_task_loss = {str(name): loss for name, loss in zip(names, losses, strict=True)}
    history.held_out_passes, passes = processes.same([history.held_out_passes, steps.passes])
    course = {name: arrays[name].tolist() for name in ("loss", "held_out_loss")}
    course |= {name: getattr(history, name) for name in ("best_step", "best_strength", "stopped")}
    method = "end-to-end" if len(given) == 1 else "joint end-to-end"
    return FitResult(
        maps=SteeringMaps(
            maps.snapshot(processes),
            describe(method, **facts, settings=settings.record(), history=course),
            objective.gates,
        ),
        history=arrays,
        best_step=history.best_step,
        stopped=history.stopped,
        held_out_loss=history.best_loss,
        passes=passes,
        held_out_passes=history.held_out_passes,
        held_out_task_loss=held_out_task_loss,
        best_strength=history.best_strength,
        loss=loss,
        held_out_keep=history.best_keep,
    )


def _of_processes(settings: FitSettings) -> dict[str, Any]:
    """What must be the same on every process beside what metadata record and digests tell."""
    given: dict[str, Any] = {name: getattr(settings, name) is not None for name in ("checkpoint", "gates", "forward")}
    given["init"] = settings.init if isinstance(settings.init, str) else settings.init is not None
    return given | {
        "layers": repr(settings.layers),
        "loss_layers": repr(settings.loss_layers),
        "patience": settings.patience,
        "version of lineas": __version__,
    }


def _preservations(
    objective: Objective, tasks: list[Sets], keep: Prompts | None, settings: FitSettings
) -> tuple[Preservation, Preservation | None]:
    """What is to stay as it is in the fit, and on held-out prompts where there are any."""
    held_out, share = len(tasks[0]) > 2, objective.processes.share
    if keep is None:
        targets = [share(join([sets[k] for sets in tasks])) for k in ((1, 3) if held_out else (1,))]
        kept = [Preservation(objective, targets[0], mini_batch=settings.mini_batch)]
        return kept[0], Preservation(objective, targets[1]) if held_out else None
    keep = share(keep)
    if not held_out:
        return Preservation(objective, keep, mini_batch=settings.mini_batch), None
    count = sum(keep.counts())
    if count < 4:
        raise ValueError(f"keep must have at least 4 prompts, of which every fourth is held out, got {count}")
    rows = [[k for k in range(count) if (k % 4 == 3) is last] for last in (False, True)]
    return Preservation(objective, keep, rows[0], settings.mini_batch), Preservation(objective, keep, rows[1])


def _warn_of_divergence(records: list[dict[str, Any]], penalty: float, caller: str) -> None:
    """Warn where loss and penalties together went far up; `penalty` is that of the maps that the fit started from."""
    if len(records) > 1:
        before, after = records[0]["loss"] + penalty, records[-1]["loss"] + records[-2]["penalty"]
        if after > DIVERGED * before:
            warn(
                f"{caller} went up: loss and penalties were {before:.4g} before the first step and {after:.4g} before "
                "the last; take a smaller lr, or lr='auto'"
            )
