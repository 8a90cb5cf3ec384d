"""Steering maps for generative models: sparse affine maps of activations, learnt end to end from unpaired prompts.

Arrays need only NumPy; `collect`, the fits through a model and ``SteeringMaps.attach`` import torch when they are
called, and `AffineTransport` imports scikit-learn when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import baselines
from ._fits import collect, fit_end_to_end, fit_incremental, fit_jointly, sites, sparse_path_end_to_end
from ._threads import get_num_threads, set_num_threads
from .local import GaussianMap, bures_map, covariance, fit
from .losses import prox_sparse_group, wasserstein, wasserstein_grad
from .maps import AffineMap, SteeringMaps
from .moments import Moments, moments
from .path import SparsePath, sparse_path
from .storage import load

if TYPE_CHECKING:
    from .estimator import AffineTransport
    from .explorer import Explorer

try:
    __version__ = version("lineas")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AffineMap",
    "AffineTransport",
    "GaussianMap",
    "Moments",
    "SparsePath",
    "SteeringMaps",
    "baselines",
    "bures_map",
    "collect",
    "covariance",
    "explore",
    "fit",
    "fit_end_to_end",
    "fit_incremental",
    "fit_jointly",
    "get_num_threads",
    "load",
    "moments",
    "prox_sparse_group",
    "set_num_threads",
    "sites",
    "sparse_path",
    "sparse_path_end_to_end",
    "wasserstein",
    "wasserstein_grad",
]
if find_spec("sklearn") is None:  # then star imports and help(), which ask for every name, do without it
    __all__.remove("AffineTransport")


def __getattr__(name: str) -> Any:
    if name != "AffineTransport":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .estimator import AffineTransport

    globals()[name] = AffineTransport  # asked for once only
    return AffineTransport


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def explore(
    path: SparsePath | SteeringMaps | AffineMap,
    model: Any = None,
    tokenizer: Any = None,
    *,
    index: int | None = None,
    strength: float = 1.0,
    max_strength: float = 2.0,
    prompt: str = "",
    max_new_tokens: int = 30,
    live_text: bool = False,
    generate: Callable[[str], str] | None = None,
) -> Explorer:
    """Explore maps in a notebook: sliders for sparsity and strength, with pictures and text that follow.

    Shows the loss along the path, which modules and neurons are changed at the chosen point, and the most changed
    neurons; with a model, its text without the maps and with them. The maps are on the model from the start, at what
    the sliders say, until ``close()``: whatever else runs the model is steered, too. A model has one explorer at a
    time: a second one takes the maps of the first off.

    Where no browser is, there is a still picture: in the saved notebook, and by ``plot()``.

    Parameters
    ----------
    path : SparsePath, SteeringMaps or AffineMap
        A path, or the maps of one point, for which there is no sparsity to choose.
    model : torch.nn.Module, optional
        A loaded model with the modules of the maps.
    tokenizer : transformers tokenizer, optional
        For text, by ``model.generate``.
    index : int, optional
        The point to start from. Default: that with the least held-out loss, without one the middle of the path.
    strength : float, default 1.0
        The strength to start from.
    max_strength : float, default 2.0
        The end of the slider.
    prompt : str, default ""
        A first prompt.
    max_new_tokens : int, default 30
        The length of the text, which is made greedily.
    live_text : bool, default False
        Whether the steered text is made anew whenever a slider is let go. It can be changed in the instrument.
    generate : callable, optional
        ``generate(prompt)`` returns the text to show, where the model is to be used in another way: sampling, a chat
        template, a model without ``generate``. It is called with the maps on, at strength 0 and at the chosen one.

    Returns
    -------
    lineas.explorer.Explorer
        A Jupyter widget. ``index`` (or ``support``), ``strength`` and ``prompt`` can be read and set, ``maps`` are the
        maps of the chosen point, ``generate(prompt)`` returns both texts, ``close()`` ends it (so does a with-block).

    Raises
    ------
    ImportError
        If anywidget is not installed (``pip install "lineas[notebook]"``).
    TypeError
        If an argument is of a wrong type, or there is a tokenizer without a model.
    ValueError
        If a setting is out of range, the model lacks a module or one has another width, or the path is of one array
        and there is a model.
    IndexError
        If `index` is out of range.

    Examples
    --------
    >>> view = lineas.explore(path, model, tokenizer, prompt="My day was")  # doctest: +SKIP
    >>> view.support = 0.01  # at most 1 % of the neurons  # doctest: +SKIP
    >>> view.maps.save("chosen.safetensors")  # doctest: +SKIP
    """
    from .explorer import Explorer

    return Explorer(
        path,
        model,
        tokenizer,
        index=index,
        strength=strength,
        max_strength=max_strength,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        live_text=live_text,
        generate=generate,
    )
