"""Pooled activations out of a model."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import calling, sites
from .autograd import POOLINGS, pool
from .tokens import Choice, Selection, check_fit_tokens


def pool_output(
    name: str,
    module: nn.Module,
    tensor: Tensor,
    mask: Tensor | None,
    pooling: str,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Pool the output `tensor` of a module over its tokens, or pixels, to one row a prompt.

    Parameters
    ----------
    name, module : str, torch.nn.Module
        The module, and what to call it in error messages.
    tensor : Tensor
        Its output: [B, T, d], [B T, d] in the order of [B, T, d], [B, d], or with further axes of positions; see
        `sites.to_tokens`.
    mask : Tensor [B, T] or None
        The attention mask of the module's tokens. Outputs without an axis of tokens, [B, d] and images, are pooled
        without it.
    pooling : str
        See `lineas.models.autograd.pool`.
    size : (int, int), optional
        B and T, where they are known. An output of two axes must have B or B T rows; the experts of mixtures, and OPT,
        see all tokens in one axis.

    Returns
    -------
    Tensor [B, d], or [number of tokens, d] for "all"

    Raises
    ------
    ValueError
        When the mask is of another length than the output, or the output has rows for neither prompts nor tokens;
        names the module.
    """
    if tensor.ndim == 2 and size is not None and len(tensor) != size[0]:
        prompts, length = size
        if len(tensor) != prompts * length:
            raise ValueError(
                f"{name}: the output must have a row for each of the {prompts} prompts or {prompts * length} tokens "
                f"to be pooled, got {len(tensor)} rows"
            )
        tensor = tensor.unflatten(0, size)
    tokens = sites.to_tokens(module, tensor, name)
    if tensor.ndim == 3 and mask is not None and mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"{name}: the attention mask must have the shape {list(tokens.shape[:2])} of the output's tokens, "
            f"got {list(mask.shape)}"
        )
    return pool(tokens, mask if tensor.ndim == 3 else None, pooling)


def check_pooling(pooling: str) -> None:
    """ValueError where `pooling` is none of the engine's."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(map(repr, POOLINGS))}, got {pooling!r}")


def collect(
    model: nn.Module,
    data: Any,
    *,
    layers: sites.Layers,
    tokenizer: Callable[..., Any] | None = None,
    max_length: int | None = None,
    batch_size: int | None = 32,
    forward: calling.Forward | None = None,
    pooling: str = "mean",
    tokens: Selection = "all",
    progress: bool = False,
) -> dict[str, NDArray[np.float32]]:
    """See `lineas.collect`."""
    check_pooling(pooling)
    tokens = check_fit_tokens(tokens, model)
    batches = calling.as_batches(
        data, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size, argument="data"
    )
    names = sites.resolve(model, layers)
    with calling.frozen(model, gradients=False):
        shown = tqdm(batches, "collect", disable=not progress)
        return collect_batches(model, shown, names, forward=forward, pooling=pooling, tokens=tokens)


def collect_batches(
    model: nn.Module,
    batches: Iterable[calling.Batch],
    names: Sequence[str],
    *,
    forward: calling.Forward | None,
    pooling: str,
    tokens: Selection,
) -> dict[str, NDArray[np.float32]]:
    """Pooled activations [n, d] of the modules `names`, in execution order, over `batches`; the model is frozen."""
    parts: dict[str, list[NDArray[np.float32]]] = {}
    for batch in batches:
        for name, rows in _pooled(model, batch, names, forward, pooling, tokens).items():
            parts.setdefault(name, []).append(rows)
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _pooled(
    model: nn.Module,
    batch: calling.Batch,
    names: Sequence[str],
    forward: calling.Forward | None,
    pooling: str,
    tokens: Selection,
) -> dict[str, NDArray[np.float32]]:
    choice = Choice(tokens, model, batch, pooling)
    found: dict[str, NDArray[np.float32]] = {}

    def on_output(name: str, module: nn.Module, tensor: Tensor) -> None:
        if name not in found:  # a module called twice counts with its first call
            mask = choice.mask(name, module, tensor)
            found[name] = to_numpy(pool_output(name, module, tensor, mask, pooling, choice.size(name)))

    calling.Capture().run(model, batch, names, on_output, forward=forward)
    return found


def to_numpy(pooled: Tensor) -> NDArray[np.float32]:
    """Pooled activations, which share no memory with the model's, as a float32 array."""
    return pooled.detach().to("cpu", torch.float32).numpy()
