"""Pooled activations out of a model: what users call, and its loop over batches, which fits use as well."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._checks import as_choice
from ..arrays.activations import Activations
from ..inputs.batches import Batch
from ..inputs.call import Forward
from ..inputs.frozen import frozen
from ..inputs.prompts import read
from ..maps.metadata import POOLINGS, Layers, Selection, spell
from .capture import Capture
from .modules import model_name
from .sites import choose_layers
from .tokens import BatchTokens, check_fit_tokens


def collect(
    model: nn.Module,
    data: Any,
    *,
    layers: Layers | None = None,
    tokenizer: Callable[..., Any] | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    forward: Forward | None = None,
    pooling: str = "mean",
    tokens: Selection = "all",
    progress: bool = True,
) -> Activations:
    """Take pooled activations out of a model: one row a prompt, one array a module.

    The model is called as it is, in eval mode, without gradients, and left early once the last of the modules has
    been seen; mode, flags and random state are restored afterwards, also after an error.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    data : texts, conversations, token ids, batch or list of batches
        A list of texts, of conversations (lists of messages with "role" and "content", rendered by the chat template),
        or of lists of token ids; one batch, or a list of batches. A batch that is a dict is passed as
        ``model(**batch)``, a tensor as ``model(batch)``, a tuple as ``model(*batch)``.
    layers : str, list[str] or re.Pattern, optional
        Modules by glob on their full dotted name, a list of globs, or a compiled regular expression that must match the
        whole name; see `lineas.sites`. ``*`` stops at dots, ``**`` does not. One that matches more than 100 modules, or
        modules inside one another, must be in a list. Default: what `lineas.sites` suggests.
    tokenizer : transformers tokenizer, optional
        For texts and conversations. One without a pad token is left as it is; the padding is done here.
    max_length : int, optional
        Longest text in tokens; longer ones are cut. Default: no limit.
    batch_size : int, optional
        Prompts in a forward pass. Default: 32 texts, and batches as they are.
    forward : callable, optional
        ``forward(model, batch)`` calls the model where the two ways above do not fit.
    pooling : {"mean", "min", "max", "last", "all"}, default "mean"
        Over the tokens under the attention mask. "all" keeps each real token as a row of its own.
    tokens : "all", "last", "prompt", "generated", slice or callable, default "all"
        The tokens that are pooled: all of them, the last of each prompt and those after it, the answers that
        conversations end with ("generated") or what stands before them ("prompt"), those at the positions of a slice,
        where padding is not counted, or those for which a callable returns True; see `SteeringMaps.attach`.
    progress : bool, default True
        Show a progress bar where there is more than one batch, and which layers were taken where none are given.

    Returns
    -------
    Activations
        A dict: float32 arrays [n, d] by module name, in execution order, with ``metadata`` that say what they were
        collected from, which `lineas.fit` hands on to the maps.

    Raises
    ------
    TypeError
        If an argument is of a wrong type, texts come without a tokenizer, or a module's output holds no tensor.
    ValueError
        If no module matches `layers` (near names are listed) or none is suggested, a matched module is not run, there
        is no prompt, or a mask does not fit the activation it belongs to.
    """
    as_choice(pooling, "pooling", POOLINGS)
    tokens = check_fit_tokens(tokens, model)
    batches = read(data, "data", tokenizer=tokenizer, max_length=max_length).parts(batch_size)
    names, noted = choose_layers(model, layers, say=progress)
    with frozen(model, gradients=False):
        shown = tqdm(batches, "collect", disable=not progress or len(batches) == 1)
        arrays = collect_batches(model, shown, names, forward=forward, pooling=pooling, tokens=tokens)
    facts = {"model": model_name(model), "layers": noted, "pooling": pooling, "tokens": tokens}
    return Activations(arrays, spell(facts))


def collect_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Sequence[str],
    *,
    forward: Forward | None,
    pooling: str,
    tokens: Selection,
) -> dict[str, NDArray[np.float32]]:
    """Pooled activations [n, d] of the modules `names`, in execution order, over `batches`; the model is frozen."""

    def pooled(batch: Batch) -> dict[str, NDArray[np.float32]]:
        selected, found = BatchTokens(tokens, model, batch, pooling), {}

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> None:
            if name not in found:  # a module called twice counts with its first call
                found[name] = to_numpy(selected.pool(name, module, tensor))

        Capture().run(model, batch, names, on_output, forward=forward)
        return found

    parts: dict[str, list[NDArray[np.float32]]] = {}
    for batch in batches:
        for name, rows in pooled(batch).items():
            parts.setdefault(name, []).append(rows)
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def to_numpy(pooled: Tensor) -> NDArray[np.float32]:
    """Pooled activations, which share no memory with the model's, as a float32 array."""
    return pooled.detach().to("cpu", torch.float32).numpy()
