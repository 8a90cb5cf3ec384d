"""End-to-end fits of one set of maps for several tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..maps import SteeringMaps
from . import calling, sites
from .problem import check_pair
from .tokens import Selection
from .train import FitResult, fit_tasks


def fit_jointly(
    model: nn.Module,
    tasks: Mapping[str, tuple[Any, Any]],
    *,
    layers: sites.Layers,
    loss_layers: sites.Layers | None = None,
    init: SteeringMaps | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    forward: calling.Forward | None = None,
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
    """Fit one set of maps for several tasks; `lineas.fit_jointly` describes the arguments.

    A step costs the gradients of all tasks, taken one after the other.
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
    return {name: check_pair(f"{argument}[{name!r}]", pair) for name, pair in tasks.items()}
