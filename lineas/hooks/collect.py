"""Pooled activations out of a model: what users call, and its loop over batches, which fits use as well."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arrays.activation_quantiles import ActivationQuantiles, size_within
from ..arrays.activations import Activations
from ..arrays.quantiles import Quantiles
from ..inputs.batches import Batch
from ..inputs.frozen import frozen
from ..inputs.prompts import Prompts, blocks, is_stream, read
from ..maps.metadata import spell
from . import outputs
from .capture import Capture, warn_of_repeated
from .modules import check_runs, model_name
from .settings import QuantilesSettings, RunSettings, takes
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
        as ``model(batch)``, a tuple as ``model(*batch)``. A generator, a `DataLoader` or another iterable that is no
        list is read as far as it is needed, so that its prompts are never in memory all at once.
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
    source = _Source(model, data, settings)
    with frozen(model, gradients=False):
        arrays = collect_batches(model, source.batches(), source.names, settings)
    return Activations(arrays, source.metadata)


@takes(QuantilesSettings)
def collect_quantiles(model: nn.Module, data: Any, settings: QuantilesSettings) -> ActivationQuantiles:
    """Take pooled activations out of a model into streaming quantiles: `collect` for more rows than memory holds.

    With ``pooling="all"`` every token is a row, and millions of them soon are more than memory holds. Here the rows of
    a module go into a `Quantiles` while the model runs, module by module and batch by batch, and no row is kept beside.
    `lineas.fit` and `lineas.sparse_path` take what comes back in place of the arrays. The first prompts, or the first
    batch, run once more at the start, to see how wide the modules are.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    data : list of texts, conversations or token ids, batch or list of batches
        As in `collect`; a generator or another iterable that is no list is read as far as it is needed.
    **settings

    Returns
    -------
    ActivationQuantiles
        A dict: `Quantiles` by module name, in execution order, with ``metadata`` as those of `collect`. ``exact`` and
        ``rank_error`` say whether, and how far, values were left out; ``save`` keeps them in a file for `lineas.load`;
        ``merge`` joins those of other prompts, such as of other processes, that took as much memory.

    Raises
    ------
    TypeError, ValueError
        As `collect`; ValueError also if `memory` is less than 512 values of each neuron take, or an activation is not
        finite (module, batch, row and column are named).

    Warns
    -----
    UserWarning
        As `collect`.
    """
    source = _Source(model, data, settings)
    with frozen(model, gradients=False):
        widths = widths_of(model, source.first, source.names, settings)
        size = size_within(settings.memory, widths.values())
        found = quantiles_of_batches(model, source.batches(), widths, settings, size)
    return ActivationQuantiles(found, source.metadata)


class _Source:
    """A model and the prompts to run, checked: the modules, a batch to look at, and all batches, as they come."""

    def __init__(self, model: nn.Module, data: Any, settings: RunSettings) -> None:
        check_runs(model)
        check_fit_tokens(settings.tokens, model)
        self.settings = settings
        if is_stream(data):
            expected = operator.length_hint(data, 0)
            some = blocks(
                data,
                "data",
                tokenizer=settings.tokenizer,
                max_length=settings.max_length,
                batch_size=settings.batch_size,
            )
            checked = (_answered(prompts, prompts.argument, settings) for prompts in some)
            start = next(checked)
            parts: Iterable[Batch] = _parts(itertools.chain([start], checked), settings.batch_size)
            self._count = start.parts_of(expected, settings.batch_size)
        else:
            start = read_prompts(data, "data", settings)
            parts = start.parts(settings.batch_size)
            self._count = len(parts)
        self.first, self._parts = start.first(), parts
        self.names, layers = choose_layers(model, settings.layers, say=settings.progress)
        self.metadata = spell({"model": model_name(model), "layers": layers, **settings.selection})

    def batches(self) -> Iterable[Batch]:
        """All batches, once, with a progress bar."""
        return tqdm(self._parts, "collect", total=self._count, disable=not self.settings.progress or self._count == 1)


def _parts(prompts: Iterable[Prompts], batch_size: int | None) -> Iterator[Batch]:
    for some in prompts:
        yield from some.parts(batch_size)


def read_prompts(data: Any, argument: str, settings: RunSettings) -> Prompts:
    """`read` what a user handed over; ValueError also for prompts alone where the generated tokens are asked for."""
    prompts = read(data, argument, tokenizer=settings.tokenizer, max_length=settings.max_length)
    return _answered(prompts, argument, settings)


def _answered(prompts: Prompts, argument: str, settings: RunSettings) -> Prompts:
    if settings.tokens == "generated" and not prompts.answered:
        raise ValueError(
            f"tokens='generated' selects nothing of {argument}, where every token is of a prompt: it needs "
            "conversations that end with an answer of the assistant"
        )
    return prompts


# --- the loop over batches, inside `frozen` ---------------------------------------------------------------------------


def collect_batches(
    model: nn.Module, batches: Iterable[Batch], names: Sequence[str], settings: RunSettings
) -> dict[str, NDArray[np.float32]]:
    """Pooled activations [n, d] of the modules `names`, in execution order, over `batches`; the model is frozen."""
    parts: dict[str, list[NDArray[np.float32]]] = {}

    def take(number: int, name: str, rows: NDArray[np.float32]) -> None:
        parts.setdefault(name, []).append(rows)

    _run(model, batches, names, settings, take)
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def quantiles_of_batches(
    model: nn.Module, batches: Iterable[Batch], names: Iterable[str], settings: RunSettings, size: int
) -> dict[str, Quantiles]:
    """Quantiles of pooled activations by module, in the order of `names`, over `batches`; the model is frozen."""
    found = {name: Quantiles(size) for name in names}

    def take(number: int, name: str, rows: NDArray[np.float32]) -> None:
        found[name]._update(rows, f"{name}, batch {number}")

    _run(model, batches, list(found), settings, take)
    return found


def _run(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Sequence[str],
    settings: RunSettings,
    take: Callable[[int, str, NDArray[np.float32]], None],
) -> None:
    """Hand the pooled activations of every module and batch to `take`, as the model gets to them."""
    capture = Capture()

    def run(number: int, batch: Batch) -> None:
        selected, seen = BatchTokens(model, batch, settings), set[str]()

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> None:
            if name not in seen:  # a module called twice counts with its first call
                seen.add(name)
                take(number, name, to_numpy(selected.pool(name, module, tensor)))

        capture.run(model, batch, names, on_output, forward=settings.forward)

    for number, batch in enumerate(batches):
        run(number, batch)
    warn_of_repeated(capture.repeated)


def widths_of(model: nn.Module, batch: Batch, names: Sequence[str], settings: RunSettings) -> dict[str, int]:
    """Neurons of each module, in execution order, by running a batch; the model is frozen."""
    found: dict[str, int] = {}

    def on_output(name: str, module: nn.Module, tensor: Tensor) -> None:
        found.setdefault(name, tensor.shape[outputs.channel_axis(module, tensor, name)])

    Capture().run(model, batch, names, on_output, forward=settings.forward)
    return found


def to_numpy(pooled: Tensor) -> NDArray[np.float32]:
    """Pooled activations, which share no memory with the model's, as a float32 array."""
    return pooled.detach().to("cpu", torch.float32).numpy()
