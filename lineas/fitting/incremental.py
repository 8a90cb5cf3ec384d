"""Closed-form maps module by module, each fitted with the earlier ones on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arrays.closed_form import fit
from ..hooks import outputs
from ..hooks.affine import apply, parameters, working_dtype
from ..hooks.capture import Capture
from ..hooks.collect import collect_batches, to_numpy
from ..hooks.modules import check_runs, model_name
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

Rows: TypeAlias = NDArray[np.float32]


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
    check_runs(model)
    sides = read_sets(None, (source, target), None, settings)
    sources, targets = (prompts.parts(settings.batch_size) for prompts in sides)
    names, layers = choose_layers(model, settings.layers, say=settings.progress)
    check_fit_tokens(settings.tokens, model)
    with frozen(model, gradients=False):
        wanted = collect_batches(model, targets, names, settings)
        order = list(wanted)
        with tqdm(total=len(order), desc="fit", disable=not settings.progress) as bar:
            walk = _Walk(model, wanted, settings, bar)
            if len(sources) == 1:  # at each module pool, fit, and go on with the mapped output
                walk.run(sources[0], order, walk.fit)
            else:
                for k, name in enumerate(order):
                    walk.fit(name, np.concatenate([walk.rows(batch, order[: k + 1]) for batch in sources]))
    facts = {"model": model_name(model), "layers": layers, **settings.selection}
    return SteeringMaps(walk.maps, describe("incremental", **facts, settings=settings.record()))


class _Walk:
    """The target activations of all modules, and the maps fitted so far."""

    def __init__(self, model: nn.Module, wanted: dict[str, Rows], settings: IncrementalSettings, bar: tqdm) -> None:
        self.model, self.wanted, self.settings, self.bar = model, wanted, settings, bar
        self.maps: dict[str, AffineMap] = {}

    def fit(self, name: str, rows: Rows) -> None:
        """Fit the map of a module to pooled activations [n, d] of the source."""
        # As a mapping of one, so that errors name the module.
        self.maps[name] = fit({name: rows}, {name: self.wanted[name]}, method=self.settings.method)[name]
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
