"""Closed-form maps module by module, each fitted with the earlier ones on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import __version__
from ..local import METHODS, fit
from ..maps import AffineMap, SteeringMaps
from . import calling, sites
from .attach import apply, parameters
from .autograd import working_dtype
from .collect import check_pooling, collect_batches, pool_output, to_numpy
from .tokens import Choice, Selection, check_fit_tokens, spell


def fit_incremental(
    model: nn.Module,
    source: Any,
    target: Any,
    *,
    layers: sites.Layers,
    method: str = "linear",
    tokenizer: Callable[..., Any] | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    forward: calling.Forward | None = None,
    pooling: str = "mean",
    tokens: Selection = "all",
    progress: bool = True,
) -> SteeringMaps:
    """See `lineas.fit_incremental`."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    check_pooling(pooling)
    tokens = check_fit_tokens(tokens, model)
    how: dict[str, Any] = {"tokenizer": tokenizer, "max_length": max_length, "batch_size": batch_size}
    sources = calling.as_batches(source, **how, argument="source")
    targets = calling.as_batches(target, **how, argument="target")
    names = sites.resolve(model, layers)
    with calling.frozen(model, gradients=False):
        wanted = collect_batches(model, targets, names, forward=forward, pooling=pooling, tokens=tokens)
        walk = _Walk(model, wanted, method, forward, pooling, tokens)
        with tqdm(total=len(wanted), desc="fit", disable=not progress) as bar:
            if len(sources) == 1:
                walk.at_once(sources[0], bar)
            else:
                walk.step_by_step(sources, bar)
    metadata = {
        "method": "incremental",
        "version": __version__,
        "model": sites.model_name(model),
        "layers": sites.spell(layers),
        "pooling": pooling,
        "tokens": spell(tokens),
        "settings": {"local_method": method, "max_length": max_length, "batch_size": batch_size},
    }
    return SteeringMaps(walk.maps, metadata)


class _Walk:
    """Modules in execution order, the target activations of each, and the maps fitted so far."""

    def __init__(
        self,
        model: nn.Module,
        wanted: dict[str, NDArray[np.float32]],
        method: str,
        forward: calling.Forward | None,
        pooling: str,
        tokens: Selection,
    ) -> None:
        self.model, self.wanted, self.method = model, wanted, method
        self.forward, self.pooling, self.tokens = forward, pooling, tokens
        self.maps: dict[str, AffineMap] = {}

    def at_once(self, batch: calling.Batch, bar: tqdm) -> None:
        """One forward pass: at each module pool, fit, and go on with the mapped output."""

        choice = Choice(self.tokens, self.model, batch, self.pooling)

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> Tensor:
            if name not in self.maps:
                self._fit(name, self._rows(name, module, tensor, choice))
                bar.update()
            return self._mapped(name, module, tensor, choice)

        calling.Capture().run(self.model, batch, list(self.wanted), on_output, forward=self.forward)

    def step_by_step(self, batches: Sequence[calling.Batch], bar: tqdm) -> None:
        """One pass of all batches a module, no further than that module."""
        order = list(self.wanted)
        for k, current in enumerate(order):
            rows = [self._rows_under_maps(batch, order[: k + 1]) for batch in batches]
            self._fit(current, np.concatenate(rows))
            bar.update()

    def _rows_under_maps(self, batch: calling.Batch, names: Sequence[str]) -> NDArray[np.float32]:
        choice = Choice(self.tokens, self.model, batch, self.pooling)
        found: list[NDArray[np.float32]] = []

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
            if name in self.maps:
                return self._mapped(name, module, tensor, choice)
            found.append(self._rows(name, module, tensor, choice))
            return None

        calling.Capture().run(self.model, batch, names, on_output, last=names[-1], forward=self.forward)
        return found[0]

    def _rows(self, name: str, module: nn.Module, tensor: Tensor, choice: Choice) -> NDArray[np.float32]:
        mask = choice.mask(name, module, tensor)
        return to_numpy(pool_output(name, module, tensor, mask, self.pooling, choice.size(name)))

    def _fit(self, name: str, rows: NDArray[np.float32]) -> None:
        # As a mapping of one, so that errors name the module.
        self.maps[name] = fit({name: rows}, {name: self.wanted[name]}, method=self.method)[name]

    def _mapped(self, name: str, module: nn.Module, tensor: Tensor, choice: Choice) -> Tensor:
        weight, bias = parameters(self.maps[name], 1.0, tensor.device, working_dtype(tensor.dtype))
        mapped = apply(tensor, weight, bias, sites.channel_axis(module, tensor, name))
        return choice.only(name, module, tensor, mapped)
