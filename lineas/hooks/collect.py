"""Pooled activations out of a model: what users call, and its loop over batches, which fits use as well."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arrays.activations import Activations
from ..inputs.batches import Batch
from ..inputs.frozen import frozen
from ..inputs.prompts import Prompts, read
from ..maps.metadata import spell
from .capture import Capture, warn_of_repeated
from .modules import check_runs, model_name
from .settings import RunSettings, takes
from .sites import choose_layers
from .tokens import BatchTokens, check_fit_tokens


@takes(RunSettings)
def collect(model: nn.Module, data: Any, settings: RunSettings) -> Activations:
    """Take pooled activations out of a model: one row a prompt, one array a module.

    The model is called as it is, in eval mode, without gradients, and left early once the last of the modules has
    been seen; mode, flags and random state are restored afterwards, also after an error. A module that runs several
    times in a forward pass, such as the shared layers of ALBERT, counts with its first call, while attached maps act at
    every call: `lineas.sites` with data shows such modules.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    data : list of texts, conversations or token ids, batch or list of batches
        Texts are strings; conversations lists of messages with "role" and "content", which the tokenizer's chat
        template renders; token ids lists of integers. A batch that is a dict is passed as ``model(**batch)``, a tensor
        as ``model(batch)``, a tuple as ``model(*batch)``.
    **settings

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
        If the model's weights are on the meta device, no module matches `layers` (near names are listed) or none is
        suggested, a matched module is not run, there is no prompt, a prompt without an answer where the generated
        tokens are asked for, a mask does not fit the activation it belongs to or is of unknown meaning, or an output
        has no row for each prompt.

    Warns
    -----
    UserWarning
        If a module was called a second time before the model was left; what would have run later is not known.
    """
    check_runs(model)
    check_fit_tokens(settings.tokens, model)
    batches = read_prompts(data, "data", settings).parts(settings.batch_size)
    names, layers = choose_layers(model, settings.layers, say=settings.progress)
    with frozen(model, gradients=False):
        shown = tqdm(batches, "collect", disable=not settings.progress or len(batches) == 1)
        arrays = collect_batches(model, shown, names, settings)
    return Activations(arrays, spell({"model": model_name(model), "layers": layers, **settings.selection}))


def read_prompts(data: Any, argument: str, settings: RunSettings) -> Prompts:
    """`read` what a user handed over; ValueError also for prompts alone where the generated tokens are asked for."""
    prompts = read(data, argument, tokenizer=settings.tokenizer, max_length=settings.max_length)
    if settings.tokens == "generated" and not prompts.answered:
        raise ValueError(
            f"tokens='generated' selects nothing of {argument}, where every token is of a prompt: it needs "
            "conversations that end with an answer of the assistant"
        )
    return prompts


def collect_batches(
    model: nn.Module, batches: Iterable[Batch], names: Sequence[str], settings: RunSettings
) -> dict[str, NDArray[np.float32]]:
    """Pooled activations [n, d] of the modules `names`, in execution order, over `batches`; the model is frozen."""
    capture = Capture()

    def pooled(batch: Batch) -> dict[str, NDArray[np.float32]]:
        selected, found = BatchTokens(model, batch, settings), {}

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> None:
            if name not in found:  # a module called twice counts with its first call
                found[name] = to_numpy(selected.pool(name, module, tensor))

        capture.run(model, batch, names, on_output, forward=settings.forward)
        return found

    parts = [pooled(batch) for batch in batches]
    warn_of_repeated(capture.repeated)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def to_numpy(pooled: Tensor) -> NDArray[np.float32]:
    """Pooled activations, which share no memory with the model's, as a float32 array."""
    return pooled.detach().to("cpu", torch.float32).numpy()
