"""Closed-form maps module by module, each fitted with the earlier ones on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arrays.closed_form import fit
from ..hooks import outputs
from ..hooks.affine import apply, parameters, working_dtype
from ..hooks.capture import Capture
from ..hooks.collect import collect_batches, to_numpy
from ..hooks.modules import model_name
from ..hooks.settings import takes
from ..hooks.sites import choose_layers
from ..hooks.tokens import BatchTokens, check_fit_tokens
from ..inputs.batches import Batch
from ..inputs.frozen import frozen
from ..maps.affine import AffineMap
from ..maps.metadata import describe
from ..maps.steering import SteeringMaps
from .end_to_end import read_sets
from .settings import IncrementalSettings


@takes(IncrementalSettings)
def fit_incremental(model: nn.Module, source: Any, target: Any, settings: IncrementalSettings) -> SteeringMaps:
    """Fit closed-form maps module by module in execution order, each with the earlier maps on (AcT, arXiv 2410.23054).

    One forward pass of the source prompts where they are one batch, otherwise one a module: with more than 32 texts and
    memory for all of them, a larger `batch_size` saves time. The target activations are taken without maps.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    source, target : list of texts, conversations or token ids, batch or list of batches
        As in `fit_end_to_end`.
    **settings

    Returns
    -------
    SteeringMaps
        In execution order.

    Raises
    ------
    TypeError, ValueError
        As `fit` and `collect`.
    """
    sources, targets = (
        prompts.parts(settings.batch_size) for prompts in read_sets(None, (source, target), None, settings)
    )
    names, layers = choose_layers(model, settings.layers, say=settings.progress)
    check_fit_tokens(settings.tokens, model)
    with frozen(model, gradients=False):
        walk = _Walk(model, collect_batches(model, targets, names, settings), settings)
        with tqdm(total=len(walk.wanted), desc="fit", disable=not settings.progress) as bar:
            if len(sources) == 1:
                walk.at_once(sources[0], bar)
            else:
                walk.step_by_step(sources, bar)
    facts = {"model": model_name(model), "layers": layers, **settings.selection}
    return SteeringMaps(walk.maps, describe("incremental", **facts, settings=settings.record()))


class _Walk:
    """Modules in execution order, the target activations of each, and the maps fitted so far."""

    def __init__(self, model: nn.Module, wanted: dict[str, NDArray[np.float32]], settings: IncrementalSettings) -> None:
        self.model, self.wanted, self.settings = model, wanted, settings
        self.maps: dict[str, AffineMap] = {}

    def at_once(self, batch: Batch, bar: tqdm) -> None:
        """One forward pass: at each module pool, fit, and go on with the mapped output."""
        choice = self._choice(batch)

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> Tensor:
            if name not in self.maps:
                self._fit(name, to_numpy(choice.pool(name, module, tensor)))
                bar.update()
            return self._mapped(name, module, tensor, choice)

        Capture().run(self.model, batch, list(self.wanted), on_output, forward=self.settings.forward)

    def step_by_step(self, batches: Sequence[Batch], bar: tqdm) -> None:
        """One pass of all batches a module, no further than that module."""
        order = list(self.wanted)
        for k, current in enumerate(order):
            rows = [self._rows_under_maps(batch, order[: k + 1]) for batch in batches]
            self._fit(current, np.concatenate(rows))
            bar.update()

    def _rows_under_maps(self, batch: Batch, names: Sequence[str]) -> NDArray[np.float32]:
        choice = self._choice(batch)
        found: list[NDArray[np.float32]] = []

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
            if name in self.maps:
                return self._mapped(name, module, tensor, choice)
            found.append(to_numpy(choice.pool(name, module, tensor)))
            return None

        Capture().run(self.model, batch, names, on_output, last=names[-1], forward=self.settings.forward)
        return found[0]

    def _choice(self, batch: Batch) -> BatchTokens:
        return BatchTokens(self.model, batch, self.settings)

    def _fit(self, name: str, rows: NDArray[np.float32]) -> None:
        # As a mapping of one, so that errors name the module.
        self.maps[name] = fit({name: rows}, {name: self.wanted[name]}, method=self.settings.method)[name]

    def _mapped(self, name: str, module: nn.Module, tensor: Tensor, choice: BatchTokens) -> Tensor:
        weight, bias = parameters(self.maps[name], 1.0, tensor.device, working_dtype(tensor.dtype))
        mapped = apply(tensor, weight, bias, outputs.channel_axis(module, tensor, name))
        return choice.only(name, module, tensor, mapped)
