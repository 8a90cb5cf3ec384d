"""End-to-end fits of one set of maps for several tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .._checks import as_pair
from ..inputs.call import Forward
from ..maps.metadata import Layers, Selection
from ..maps.steering import SteeringMaps
from .end_to_end import FitResult, fit_tasks


def fit_jointly(
    model: nn.Module,
    tasks: Mapping[str, tuple[Any, Any]],
    *,
    layers: Layers,
    loss_layers: Layers | None = None,
    init: SteeringMaps | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    forward: Forward | None = None,
    held_out: Mapping[str, tuple[Any, Any]] | None = None,
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
    """Fit one set of maps for several concepts at once: as `fit_end_to_end`, of the mean of the tasks' losses.

    Maps that were fitted one by one can be composed (``second @ first``), but each was fitted to a model without the
    others. Here one set of maps is to serve all tasks: the source of each comes to be distributed like its target. See
    docs/two-concepts.md for what each is better at.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    tasks : dict of str to (source, target)
        At least two, each with the prompts to move and those to move them to, as in `fit_end_to_end`. All count alike,
        whatever the number of their prompts.
    held_out : dict of str to (source, target), optional
        Two more sets for each task. The mean of their losses is recorded and chooses the best maps.
    strengths : list of float, default (1.0,)
        As in `fit_end_to_end`, by the mean of the held-out losses.
    batch_size : int, optional
        As in `fit_end_to_end`; tasks take forward passes of their own in any case.
    mini_batch : int, optional
        Prompts of the source of each task in a step.
    steps : int, default 20
        The largest number of steps, each of which costs the gradient of every task.
    layers, loss_layers, init, tokenizer, max_length, forward, pooling, tokens, l1, group, l1_bias, group_bias, scaling
        As in `fit_end_to_end`.
    optimizer, lr, betas, patience, checkpoint, resume, seed, progress
        As in `fit_end_to_end`. A fit goes on with the same tasks in the same order.

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
    """
    pairs = _check_tasks("tasks", tasks)
    if len(pairs) < 2:
        raise ValueError(f"tasks must have at least 2 entries, got {len(pairs)}: fit_end_to_end fits one")
    trials: Mapping[str, tuple[Any, Any] | None] = dict.fromkeys(pairs)
    if held_out is not None:
        trials = _check_tasks("held_out", held_out)
        for name in [*pairs, *trials]:
            if name not in trials or name not in pairs:
                side = "lacks" if name in pairs else "has"
                raise ValueError(f"held_out must have the tasks of tasks, {list(pairs)}: it {side} {name!r}")
    return fit_tasks(
        model,
        {name: (*pair, trials[name]) for name, pair in pairs.items()},
        caller="fit_jointly",
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


def _check_tasks(argument: str, tasks: Any) -> dict[str, tuple[Any, Any]]:
    """Pairs (source, target) by name."""
    if not isinstance(tasks, Mapping):
        raise TypeError(f"{argument} must map names to pairs (source, target), got {type(tasks).__name__}")
    for name in tasks:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must have names as keys, got {name!r}")
    return {name: as_pair(pair, f"{argument}[{name!r}]") for name, pair in tasks.items()}
