"""Closed-form maps module by module, each fitted with the earlier ones on."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..arrays.activation_quantiles import size_within
from ..arrays.quantiles import Quantiles
from ..hooks.attach import check_to_fit
from ..hooks.collect import collect_batches, quantiles_of_batches, widths_of
from ..hooks.modules import model_name
from ..hooks.settings import takes
from ..hooks.sites import choose_layers
from ..hooks.tokens import check_fit_tokens
from ..inputs.frozen import frozen
from ..maps.metadata import describe
from ..maps.steering import SteeringMaps
from .end_to_end import read_sets
from .settings import IncrementalSettings
from .walk import Rows, walk


@takes(IncrementalSettings)
def fit_incremental(model: nn.Module, source: Any, target: Any, settings: IncrementalSettings) -> SteeringMaps:
    """Fit closed-form maps module by module in execution order, each with the earlier maps on (AcT, arXiv 2410.23054).

    One forward pass of the source prompts where they are one batch, otherwise one a module: with more than 32 texts and
    memory for all of them, a larger `batch_size` saves time. The target activations are taken without maps.
    With ``pooling="all"`` every token is a row of its own; `memory` bounds what is kept of them.

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
        As `fit` and `collect`; ValueError also if `memory` is less than 512 values of each neuron take.

    Warns
    -----
    UserWarning
        If maps are attached to the model: what is fitted is right only together with them.
    """
    check_to_fit(model)
    sides = read_sets(None, (source, target), None, settings)
    sources, targets = (prompts.parts(settings.batch_size) for prompts in sides)
    names, layers = choose_layers(model, settings.layers, say=settings.progress)
    check_fit_tokens(settings.tokens, model)
    with frozen(model, gradients=False):
        size, wanted = None, dict[str, Rows | Quantiles]()
        if settings.memory is None:
            wanted |= collect_batches(model, targets, names, settings)
        else:
            widths = widths_of(model, sides[0].first(), names, settings)
            # The target of all modules is kept at once, the source of one at a time.
            size = size_within(settings.memory, [*widths.values(), max(widths.values())])
            wanted |= quantiles_of_batches(model, targets, widths, settings, size)
        maps, error = walk(
            model,
            sources,
            wanted,
            settings,
            method=settings.method,
            shrinkage=settings.shrinkage,
            show=settings.progress,
            size=size,
        )
    facts = {"model": model_name(model), "layers": layers, **settings.selection}
    facts |= {"rank_error": error} if error > 0 else {}
    return SteeringMaps(maps, describe("incremental", **facts, settings=settings.record()))
