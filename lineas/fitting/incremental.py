"""Closed-form maps module by module, each fitted with the earlier ones on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._version import __version__
from ..arrays.closed_form import METHODS, fit
from ..hooks import outputs
from ..hooks.affine import apply, parameters, working_dtype
from ..hooks.capture import Capture
from ..hooks.collect import collect_batches, to_numpy
from ..hooks.modules import model_name, resolve
from ..hooks.pooling import check_pooling, pool_output
from ..hooks.tokens import Choice, check_fit_tokens
from ..inputs.batches import Batch
from ..inputs.call import Forward
from ..inputs.frozen import frozen
from ..inputs.tokenize import as_batches
from ..maps.affine import AffineMap
from ..maps.metadata import Layers, Selection, spell_layers, spell_tokens
from ..maps.steering import SteeringMaps


def fit_incremental(
    model: nn.Module,
    source: Any,
    target: Any,
    *,
    layers: Layers,
    method: str = "linear",
    tokenizer: Callable[..., Any] | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    forward: Forward | None = None,
    pooling: str = "mean",
    tokens: Selection = "all",
    progress: bool = True,
) -> SteeringMaps:
    """Fit closed-form maps module by module in execution order, each with the earlier maps on (AcT, arXiv 2410.23054).

    One forward pass of the source prompts where they are one batch, otherwise one a module. The target activations
    are taken without maps.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    source, target : list[str], batch or list of batches
        As in `fit_end_to_end`.
    layers : str, list[str] or re.Pattern
        Modules that get a map.
    method : {"mean", "gaussian", "linear"}, default "linear"
        As in `fit`.
    tokenizer, max_length, forward
        As in `collect`.
    batch_size : int, optional
        Texts in a forward pass; default: all of a set, so that one pass of the source fits every module.
    pooling : {"mean", "min", "max", "last", "all"}, default "mean"
        Over the tokens under the attention mask.
    tokens : "all", "last", "prompt", slice or callable, default "all"
        The tokens that the maps act on, and over which activations are pooled: what is fitted is what the maps meet
        when they are attached. See `SteeringMaps.attach`, which acts on the same tokens by default, since the metadata
        name them. In a prompt "last" is its last token, and "generated" is none and refused. ``pooling="last"`` takes
        the last one of the selected tokens. Outputs without tokens, such as images, allow "all" only.
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    SteeringMaps
        In execution order.

    Raises
    ------
    TypeError, ValueError
        As `fit` and `collect`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    check_pooling(pooling)
    tokens = check_fit_tokens(tokens, model)
    how: dict[str, Any] = {"tokenizer": tokenizer, "max_length": max_length, "batch_size": batch_size}
    sources = as_batches(source, **how, argument="source")
    targets = as_batches(target, **how, argument="target")
    names = resolve(model, layers)
    with frozen(model, gradients=False):
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
        "model": model_name(model),
        "layers": spell_layers(layers),
        "pooling": pooling,
        "tokens": spell_tokens(tokens),
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
        forward: Forward | None,
        pooling: str,
        tokens: Selection,
    ) -> None:
        self.model, self.wanted, self.method = model, wanted, method
        self.forward, self.pooling, self.tokens = forward, pooling, tokens
        self.maps: dict[str, AffineMap] = {}

    def at_once(self, batch: Batch, bar: tqdm) -> None:
        """One forward pass: at each module pool, fit, and go on with the mapped output."""

        choice = Choice(self.tokens, self.model, batch, self.pooling)

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> Tensor:
            if name not in self.maps:
                self._fit(name, self._rows(name, module, tensor, choice))
                bar.update()
            return self._mapped(name, module, tensor, choice)

        Capture().run(self.model, batch, list(self.wanted), on_output, forward=self.forward)

    def step_by_step(self, batches: Sequence[Batch], bar: tqdm) -> None:
        """One pass of all batches a module, no further than that module."""
        order = list(self.wanted)
        for k, current in enumerate(order):
            rows = [self._rows_under_maps(batch, order[: k + 1]) for batch in batches]
            self._fit(current, np.concatenate(rows))
            bar.update()

    def _rows_under_maps(self, batch: Batch, names: Sequence[str]) -> NDArray[np.float32]:
        choice = Choice(self.tokens, self.model, batch, self.pooling)
        found: list[NDArray[np.float32]] = []

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
            if name in self.maps:
                return self._mapped(name, module, tensor, choice)
            found.append(self._rows(name, module, tensor, choice))
            return None

        Capture().run(self.model, batch, names, on_output, last=names[-1], forward=self.forward)
        return found[0]

    def _rows(self, name: str, module: nn.Module, tensor: Tensor, choice: Choice) -> NDArray[np.float32]:
        mask = choice.mask(name, module, tensor)
        return to_numpy(pool_output(name, module, tensor, mask, self.pooling, choice.size(name)))

    def _fit(self, name: str, rows: NDArray[np.float32]) -> None:
        # As a mapping of one, so that errors name the module.
        self.maps[name] = fit({name: rows}, {name: self.wanted[name]}, method=self.method)[name]

    def _mapped(self, name: str, module: nn.Module, tensor: Tensor, choice: Choice) -> Tensor:
        weight, bias = parameters(self.maps[name], 1.0, tensor.device, working_dtype(tensor.dtype))
        mapped = apply(tensor, weight, bias, outputs.channel_axis(module, tensor, name))
        return choice.only(name, module, tensor, mapped)
