"""Closed-form maps module by module, each fitted with the earlier ones on: what incremental fits and starts share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arrays.closed_form import fit
from ..arrays.quantiles import Quantiles
from ..hooks import outputs
from ..hooks.affine import apply, parameters, working_dtype
from ..hooks.capture import Capture
from ..hooks.collect import to_numpy
from ..hooks.settings import RunSettings
from ..hooks.tokens import BatchTokens
from ..inputs.batches import Batch
from ..maps.affine import AffineMap
from .distributed import ALONE, IdleTurn, Processes

Rows: TypeAlias = NDArray[np.float32]


class Walked(NamedTuple):
    """The maps by module, and the largest rank error of the quantiles that they were fitted to."""

    maps: dict[str, AffineMap]
    rank_error: float


def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    wanted: Mapping[str, Rows | Quantiles],
    settings: RunSettings,
    *,
    method: str,
    shrinkage: float | str | None,
    show: bool,
    size: int | None = None,
    processes: Processes = ALONE,
) -> Walked:
    """Maps of the modules of `wanted`, in that order, each fitted with the earlier ones on; inside `frozen`.

    Parameters
    ----------
    model : nn.Module
        The model, while it is `frozen` without gradients.
    batches : list of Batch
        The source prompts. One batch takes one forward pass, several take one for each module.
    wanted : mapping of str to array or Quantiles
        Target activations [m, d] by module, in execution order.
    settings : RunSettings
        How the model is called, and which tokens are mapped and pooled and how.
    method, shrinkage
        As in `lineas.fit`.
    show : bool
        Show a progress bar.
    size : int, optional
        That of the `Quantiles` which the source rows of several batches go into. Default: all rows are kept.
    processes : Processes, optional
        Those that run the source together, each with its own part. Default: this one alone.
    """
    order = list(wanted)
    with tqdm(total=len(order), desc="fit", disable=not show) as bar:
        walker = _Walk(model, wanted, settings, method, shrinkage, bar)
        if len(batches) == 1 and processes.size == 1:  # at each module pool, fit, and go on with the mapped output
            walker.run(batches[0], order, walker.fit)
        else:
            for k, name in enumerate(order):
                parts = (of_prompts(batch, walker.rows(batch, order[: k + 1])) for batch in batches)
                if size is None:
                    walker.fit(name, of_all(np.concatenate(list(parts)), processes, "source"))
                else:
                    walker.fit(name, _summary(parts, name, size))
    return Walked(walker.maps, walker.rank_error)


def _summary(parts: Iterable[Rows], name: str, size: int) -> Quantiles:
    """What quantiles of a size keep of the rows of a module."""
    found = Quantiles(size)
    for number, rows in enumerate(parts):
        found._update(rows, f"source[{name!r}], batch {number}")
    return found


def of_prompts(batch: Batch, rows: Rows) -> Rows:
    """The rows of the prompts of a batch: none of an idle turn."""
    return rows[:0] if isinstance(batch, IdleTurn) else rows


def of_all(rows: Rows, processes: Processes, argument: str) -> Rows:
    """The rows of all processes."""
    return rows if processes.size == 1 else processes.rows([torch.from_numpy(rows)], argument)[0].numpy()


class _Walk:
    """The target activations of all modules, and the maps fitted so far."""

    def __init__(
        self,
        model: nn.Module,
        wanted: Mapping[str, Rows | Quantiles],
        settings: RunSettings,
        method: str,
        shrinkage: float | str | None,
        bar: tqdm,
    ) -> None:
        self.model, self.wanted, self.settings, self.bar = model, wanted, settings, bar
        self.method, self.shrinkage = method, shrinkage
        self.maps: dict[str, AffineMap] = {}
        self.rank_error = 0.0

    def fit(self, name: str, rows: Rows | Quantiles) -> None:
        """Fit the map of a module to pooled activations [n, d] of the source."""
        # As a mapping of one, so that errors name the module.
        source, target = {name: rows}, {name: self.wanted[name]}
        found = fit(source, target, method=self.method, shrinkage=self.shrinkage)
        self.maps[name] = found[name]
        self.rank_error = max(self.rank_error, found.metadata.get("rank_error", 0.0))
        self.bar.update()

    def rows(self, batch: Batch, names: Sequence[str]) -> Rows:
        """Pooled activations [n, d] of the last of `names`, which the others have maps for; no module after it runs."""
        found: list[Rows] = []
        self.run(batch, names, lambda _, rows: found.append(rows), last=names[-1])
        return found[0]

    def run(
        self, batch: Batch, names: Sequence[str], take: Callable[[str, Rows], None], last: str | None = None
    ) -> None:
        """Run a batch with the maps on; `take` gets the pooled activations where there is none, and may fit it."""
        choice = BatchTokens(self.model, batch, self.settings)

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
            if name not in self.maps:
                take(name, to_numpy(choice.pool(name, module, tensor)))
            if name not in self.maps:
                return None
            weight, bias = parameters(self.maps[name], 1.0, tensor.device, working_dtype(tensor.dtype))
            mapped = apply(tensor, weight, bias, outputs.channel_axis(module, tensor, name))
            return choice.only(name, module, tensor, mapped)

        Capture().run(self.model, batch, names, on_output, last=last, forward=self.settings.forward)
