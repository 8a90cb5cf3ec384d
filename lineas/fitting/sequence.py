"""Fits of several concepts one after the other, each while the maps of the earlier ones are on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from torch import nn

from .._warn import warn
from ..hooks.attach import check_to_fit
from ..hooks.settings import takes
from ..inputs.prompts import Sampler
from ..maps.steering import SteeringMaps
from .end_to_end import Pair, fit_maps, pairs_by_name, pairs_of_tasks, read_sets
from .on_top import as_on_top_of
from .result import FitResult
from .sequence_result import SequenceResult
from .settings import SequenceSettings, check_start


@takes(SequenceSettings)
def fit_sequence(model: nn.Module, tasks: Mapping[str, tuple[Any, Any]], settings: SequenceSettings) -> SequenceResult:
    """Fit maps for several concepts, in order: as `fit_end_to_end`, each while the maps of the earlier ones are on.

    Maps that are fitted one by one, to a model without the others, get in each other's way when they are composed. Here
    source, target and held-out prompts of a concept all run through the earlier maps, at strength 1: its target is what
    the target prompts become there. So does what is to be kept: a divergence is that from the model with the earlier
    concepts on, and `max_kl` a budget for each concept. See docs/two-concepts.md for what that is better at.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    tasks : dict of str to (source, target)
        At least two concepts, in the order in which they are fitted and act; each with the prompts to move and those to
        move them to, as in `fit_end_to_end`.
    **settings

    Returns
    -------
    SequenceResult
        The fit of every concept, with maps of its own: ``maps`` composes them, ``attach`` puts them on a model with a
        live strength for each. Ctrl-C ends the fit of a concept early and keeps its best maps so far and the concepts
        before it; those after it are not fitted.

    Raises
    ------
    TypeError, OSError
        As `fit_end_to_end`; TypeError as well if `tasks`, `held_out`, `init` or `gates` is no mapping of what it should
        be.
    ValueError
        As `fit_end_to_end`; and if there are fewer than two tasks, one is no pair, `held_out` has others, `init` or
        `gates` has one that `tasks` lacks, earlier concepts leave no neuron to a later one that is to be disjoint, or
        more steps would change the fit of a concept whose followers have checkpoints; no file is changed then. The
        message names the task or the file.

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
    starts, gates = (_by_task(argument, getattr(settings, argument), pairs) for argument in ("init", "gates"))
    for name, maps in starts.items():
        if not isinstance(maps, SteeringMaps):
            raise TypeError(f"init[{name!r}] must be a SteeringMaps, got {type(maps).__name__}")
        check_start(maps, gates.get(name), f"init[{name!r}]", f"gates[{name!r}]")
    for name, pair in pairs.items():  # so that what cannot be read is known before anything is fitted
        source, *_ = read_sets(name, pair, held_out[name], settings)
        if settings.mini_batch is not None:
            Sampler(source, settings.mini_batch, batch_size=settings.batch_size, seed=settings.seed)
    folder = settings.checkpoint
    paths: dict[str, str] = {}
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
        paths = {name: os.path.join(folder, quote(name, safe=" ") + ".safetensors") for name in pairs}
    on_top_of = settings.on_top_of
    if on_top_of is not None:
        on_top_of = as_on_top_of(on_top_of, model, settings.tokens)

    results: dict[str, FitResult] = {}
    stopped = "finished"
    for name, pair in pairs.items():
        below = [*([] if on_top_of is None else [on_top_of]), *(result.maps for result in results.values())]
        chosen = replace(
            settings,
            held_out=held_out[name],
            init=starts.get(name),
            gates=gates.get(name),
            disjoint=settings.disjoint and bool(below),  # the first concept has all neurons
            checkpoint=paths.get(name),
        )
        try:
            earlier = [(other, pairs[other], held_out[other]) for other in results if settings.preserve]
            followers = list(paths.values())[len(results) + 1 :]
            found = fit_maps(model, [(name, pair, held_out[name])], chosen, "fit_sequence", below, earlier, followers)
        except KeyboardInterrupt:
            if not results:
                raise
            stopped = "interrupted"
            break
        except Exception as error:
            error.add_note(f"fit_sequence: in the fit of {name!r}, after those of {list(results)}")
            raise
        results[name] = _named(found, name)
        if found.stopped == "interrupted":
            stopped = "interrupted"
            break
    missing = [name for name in pairs if name not in results]
    if missing:
        warn(f"fit_sequence was interrupted: {', '.join(map(repr, missing))} not fitted; the maps before are kept")
    return SequenceResult(results, on_top_of, stopped)


def _by_task(argument: str, given: Any, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """What is given for any of the tasks, by task."""
    found = {} if given is None else given
    if not isinstance(found, Mapping):
        raise TypeError(f"{argument} must be a dict by task, got {type(given).__name__}")
    for name in found:
        if name not in pairs:
            raise ValueError(f"{argument} must have tasks of tasks only, {list(pairs)}: it has {name!r}")
    return dict(found)


def _named(found: FitResult, name: str) -> FitResult:
    """A result whose maps' metadata name the task."""
    maps = SteeringMaps(found.maps, {**found.maps.metadata, "task": name}, found.maps.gates)
    return replace(found, maps=maps)
