"""Gates for the modules of a model: token activations of source and target, and what is fitted to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arrays.gate import GateSettings, Rows, causal_means, check_finite, fit_rows
from ..inputs.frozen import frozen
from ..inputs.prompts import Prompts
from ..maps.gates import AnyGate, Gate
from . import outputs
from .attach import check_to_fit
from .capture import Capture, warn_of_repeated
from .collect import read_prompts, to_numpy
from .modules import get_module
from .settings import RunSettings, takes
from .sites import choose_layers, sites
from .tokens import BatchTokens, check_fit_tokens

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class FitGatesSettings(GateSettings, RunSettings):
    """Which gates of a model are fitted, and how.

    Parameters
    ----------
    site : str, optional
        Fit one gate for all modules, which reads this one's output; it has to run before the modules with maps, or be
        the first of them. "auto" takes, of the first module of `layers` and of those that `lineas.sites` suggests and
        that run before it, the one whose gate has the largest cross-validated area under the ROC curve. Default: a gate
        for each module, which reads that module.
    tokens : "all", "last", "prompt", "generated", slice or callable, default "all"
        The tokens that gates are fitted to. Means are over all real tokens of a text, as in generation.
    """

    site: str | None = None
    pooling: str = field(default="all", init=False)

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        self._check_gate()
        if self.site is None:
            return
        if not isinstance(self.site, str):
            raise TypeError(f"site must be the name of a module or {AUTO!r}, got {type(self.site).__name__}")
        if self.kind == "neuron":
            raise ValueError("site is for gates of kind 'scalar': neurons have their own")


@takes(FitGatesSettings)
def fit_gates(model: nn.Module, source: Any, target: Any, settings: FitGatesSettings) -> Any:
    """Fit gates to a model's token activations: open where a text looks like source, closed where like target.

    The model runs as for `lineas.collect`; every token is a sample, and whole texts are held out in the
    cross-validation. ``maps.gated(gates)`` puts them beside maps; those that were fitted to the same prompts are a
    natural choice, and so is ordinary text as the target, where the maps are to leave that alone.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model, without maps on it.
    source, target : list of texts, conversations or token ids, batch or list of batches
        As in `lineas.collect`: at least 2 texts each.
    **settings

    Returns
    -------
    dict of str to Gate or NeuronGate, or Gate
        By module name, in execution order; one gate, which names the module that it reads, where `site` is given.

    Raises
    ------
    TypeError
        As `lineas.collect` and `lineas.fit_gate`.
    ValueError
        As `lineas.collect` and `lineas.fit_gate`; if an activation is not finite (prompts and module are named), an
        output has no tokens [batch, tokens, channels] and the context is "mean", or there is no module `site`.

    Warns
    -----
    UserWarning
        If maps are on the model, a module was called a second time before the model was left, or no neuron of a module
        is left open.
    """
    check_to_fit(model)
    check_fit_tokens(settings.tokens, model)
    prompts = [read_prompts(data, name, settings) for data, name in ((source, "source"), (target, "target"))]
    names, _ = choose_layers(model, settings.layers, say=settings.progress)
    if settings.site not in (None, AUTO):
        get_module(model, str(settings.site))
        names = [str(settings.site)]
    with frozen(model, gradients=False):
        if settings.site == AUTO:
            names = _early(model, prompts[0], list(names), settings)
        ours, theirs = (_collect(model, one, names, settings) for one in prompts)
    shown = tqdm(ours, "gates", disable=not settings.progress or len(ours) == 1)
    gates: dict[str, AnyGate] = {name: fit_rows(ours[name], theirs[name], settings, name) for name in shown}
    if settings.site is None:
        return gates
    best = max(gates, key=lambda name: _area(gates[name]))  # the first of those that are as good
    gate = gates[best]
    assert isinstance(gate, Gate)
    return gate.at(best)


def _area(gate: AnyGate) -> float:
    assert isinstance(gate, Gate) and gate.auroc is not None
    return gate.auroc


def _early(model: nn.Module, prompts: Prompts, layers: list[str], settings: RunSettings) -> list[str]:
    """The modules that one gate for all of `layers` may read: suggested ones, no later than the first of them."""
    suggested = [name for row in sites(model) if row.suggested for name in row.names]
    order = Capture().run(
        model, prompts.first(), list(dict.fromkeys([*suggested, *layers])), lambda *_: None, forward=settings.forward
    )
    first = next(name for name in order if name in layers)
    return order[: order.index(first) + 1]


def _collect(model: nn.Module, prompts: Prompts, names: Sequence[str], settings: FitGatesSettings) -> dict[str, Rows]:
    """The selected tokens of every text and what gates read there, by module in execution order."""
    capture = Capture()
    found: dict[str, list[tuple[NDArray, NDArray]]] = {}
    means = settings.context == "mean"
    batches = prompts.parts(settings.batch_size)
    for batch in tqdm(batches, "collect", disable=not settings.progress or len(batches) == 1):
        selected = BatchTokens(model, batch, settings)
        seen: set[str] = set()

        def on_output(name: str, module: nn.Module, tensor: Tensor, selected: Any = selected, seen: Any = seen) -> None:
            if name in seen:  # a module called twice counts with its first call
                return
            seen.add(name)
            found.setdefault(name, []).extend(_texts(name, module, tensor, selected, means))

        capture.run(model, batch, names, on_output, forward=settings.forward)
    warn_of_repeated(capture.repeated)
    rows = {}
    for name, texts in found.items():
        kept = [text for text in texts if len(text[0])]
        rows[name] = Rows.of([x for x, _ in kept], [read for _, read in kept] if means else None)
        for x in (rows[name].x, rows[name].read):
            check_finite(x, f"{prompts.argument}: {name}")
    return rows


def _texts(
    name: str, module: nn.Module, tensor: Tensor, selected: BatchTokens, means: bool
) -> list[tuple[NDArray, NDArray]]:
    """The selected tokens [T, d] of every row of an output, and what a gate reads there: these or means of tokens."""
    shown = selected._batch_first(name, module, tensor)
    mask = selected.mask(name, module, shown)
    size = selected.named.size_of(name, selected.model)
    if shown.ndim == 2 and size is not None and len(shown) == size[0] * size[1] != size[0]:
        shown = shown.unflatten(0, size)
    if means and (shown.ndim != 3 or outputs.channel_axis(module, shown, name) != -1):
        raise ValueError(
            f"{name}: a gate of context 'mean' needs an output [batch, tokens, channels], got the shape "
            f"{list(tensor.shape)}"
        )
    array = to_numpy(outputs.to_tokens(module, shown, name))
    if mask is None or shown.ndim != 3:
        return [(row, causal_means(row) if means else row) for row in array]
    chosen = mask.cpu().numpy() != 0
    real = selected.named.mask_of(name, selected.model)
    present = np.ones_like(chosen) if real is None else real.cpu().numpy() != 0
    found = []
    for row, here, keep in zip(array, present, chosen, strict=True):
        tokens = row[keep]
        found.append((tokens, causal_means(row[here])[keep[here]] if means else tokens))
    return found
