"""Pictures of fits and maps, drawn with matplotlib (``pip install "lineas[plot]"``).

Every function draws into `ax` (default: the axes of a new figure) and returns it, so that titles, limits and layout
stay in the caller's hands. Colours are from the palette of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .maps import AffineMap, SteeringMaps

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


def history(result: Any, ax: Axes | None = None) -> Axes:
    """Draw the loss of an end-to-end fit against its steps.

    Parameters
    ----------
    result : FitResult or mapping
        What `lineas.fit_end_to_end` returned, or its ``.history``: arrays ``"loss"`` [S] and, where the fit had a
        held-out set, ``"held_out_loss"``. A point at step k is the loss of the maps after k updates; a FitResult also
        tells which maps were kept.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    TypeError
        If `result` is neither a mapping nor has a ``history``.
    ValueError
        If the history has no ``"loss"``.
    """
    values = result if isinstance(result, Mapping) else getattr(result, "history", None)
    if not isinstance(values, Mapping):
        raise TypeError(f"result must be a FitResult or a history dict, got {type(result).__name__}")
    if "loss" not in values:
        raise ValueError(f"result: the history has no 'loss', only {sorted(values)}")
    ax = _axes(ax)
    _line(ax, values["loss"], "fitted sets", BLUE, "o")
    held_out = np.asarray(values.get("held_out_loss", ()))
    if held_out.size:
        _line(ax, held_out, "held-out sets", ORANGE, "s")
    best = getattr(result, "best_step", None)
    if best is not None:
        ax.axvline(best, color=GREY, linewidth=1, linestyle=":", label=f"maps kept: step {best}")
    ax.set_xlabel("step")
    ax.set_ylabel("loss (squared Wasserstein distance)")
    ax.legend(frameon=False)
    return ax


def support(maps: SteeringMaps, ax: Axes | None = None) -> Axes:
    """Draw the share of neurons that each module's map changes (``w != 1`` or ``b != 0``), one bar a module.

    Parameters
    ----------
    maps : SteeringMaps
        Drawn in its own order, which is the order in which the model runs the modules.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
    """
    ax = _axes(ax)
    pattern, labels = _short_names(list(maps))
    shares = [100.0 * m.support / m.weight.size for m in maps.values()]
    ax.bar(np.arange(len(labels)), shares, color=BLUE)
    every = -(-len(labels) // 16)  # more labels than that run into each other
    ax.set_xticks(np.arange(len(labels))[::every], labels[::every])
    if max(len(label) for label in labels) > 4:
        ax.tick_params(axis="x", labelrotation=90)
    ax.set_ylim(0, 105)
    ax.set_xlabel(f"module ({pattern})" if pattern else "module")
    ax.set_ylabel("neurons changed (%)")
    return ax


def quantiles(
    source: ArrayLike,
    target: ArrayLike,
    map: AffineMap,
    neuron: int,
    *,
    strength: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the quantile functions of one neuron: source, target, and the source through the map.

    The squared Wasserstein distance that the maps make small is the mean squared gap between the curve of the mapped
    source and that of the target.

    Parameters
    ----------
    source, target : array_like, shape (n, d) and (m, d)
        Activations, one row a prompt; n and m may differ.
    map : AffineMap
        A map of width d.
    neuron : int
        Column to draw, 0 <= neuron < d.
    strength : float, default 1.0
        Strength at which the map is applied.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        If a sample is not 2-D, is empty or is not as wide as the map, or `neuron` is out of range.
    """
    width = map.weight.size
    before = _column(source, "source", width, neuron)
    wanted = _column(target, "target", width, neuron)
    scale, shift = float(map.weight[neuron]), float(map.bias[neuron])
    after = before + strength * ((scale - 1.0) * before + shift)
    ax = _axes(ax)
    label = "source, mapped" if strength == 1.0 else f"source, mapped at strength {strength:g}"
    _quantile_line(ax, before, "source", color=GREY, linestyle="--")
    _quantile_line(ax, wanted, "target", color=ORANGE, linewidth=2.5)
    _quantile_line(ax, after, label, color=BLUE)
    ax.set_xlabel("quantile level")
    ax.set_ylabel(f"activation of neuron {neuron}")
    ax.legend(frameon=False)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "lineas[plot]"') from error
    return plt.subplots(layout="constrained")[1]


def _line(ax: Axes, values: ArrayLike, label: str, color: str, marker: str) -> None:
    values = np.asarray(values)
    ax.plot(np.arange(values.size), values, color=color, marker=marker, markersize=3.5, label=label)


def _column(sample: ArrayLike, name: str, width: int, neuron: int) -> NDArray[np.float64]:
    array = np.asarray(sample)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] != width:
        raise ValueError(f"{name}: expected shape (n, {width}) with n >= 1, the map's width, got {array.shape}")
    if not 0 <= neuron < width:
        raise ValueError(f"neuron: expected 0 <= neuron < {width}, got {neuron}")
    return array[:, neuron].astype(np.float64)


def _quantile_line(ax: Axes, column: NDArray[np.float64], label: str, **style: Any) -> None:
    # The empirical quantile function is a step function; a line through the middles of its steps reads better.
    levels = (np.arange(column.size) + 0.5) / column.size
    ax.plot(levels, np.sort(column), label=label, **style)


def _short_names(names: list[str]) -> tuple[str, list[str]]:
    """Split dotted names into what they share, as one pattern, and what tells them apart."""
    parts = [name.split(".") for name in names]
    shortest = min(len(p) for p in parts)
    start = 0
    while start < shortest - 1 and len({p[start] for p in parts}) == 1:
        start += 1
    end = 0
    while end < shortest - 1 - start and len({p[-1 - end] for p in parts}) == 1:
        end += 1
    if len(names) == 1 or start + end == 0:
        return "", names
    pattern = ".".join([*parts[0][:start], "*", *parts[0][len(parts[0]) - end :]])
    return pattern, [".".join(p[start : len(p) - end]) for p in parts]
