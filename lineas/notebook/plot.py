"""Pictures of fits and maps, drawn with matplotlib (``pip install "lineas[plot]"``).

Every function draws into `ax` (default: the axes of a new figure) and returns it, so that titles, limits and layout
stay in the caller's hands; those with several panels take and return an array `axes`. Colours are from the palette of
Okabe and Ito and the colour map cividis, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import as_int
from ..maps.affine import at_strength

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..maps.affine import AffineMap
    from ..maps.path import SparsePath
    from ..maps.steering import SteeringMaps

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
MOST_LABELS = 16  # more of them along one axis run into each other


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
    every = -(-len(labels) // MOST_LABELS)
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
    slope, shift = at_strength(float(map.weight[neuron]), float(map.bias[neuron]), strength)
    after = slope * before + shift
    ax = _axes(ax)
    label = "source, mapped" if strength == 1.0 else f"source, mapped at strength {strength:g}"
    _quantile_line(ax, before, "source", color=GREY, linestyle="--")
    _quantile_line(ax, wanted, "target", color=ORANGE, linewidth=2.5)
    _quantile_line(ax, after, label, color=BLUE)
    ax.set_xlabel("quantile level")
    ax.set_ylabel(f"activation of neuron {neuron}")
    ax.legend(frameon=False)
    return ax


def most_changed(
    source: ArrayLike,
    target: ArrayLike,
    map: AffineMap,
    n: int = 6,
    *,
    strength: float = 1.0,
    axes: Sequence[Axes] | None = None,
) -> NDArray:
    """Draw `quantiles` of the neurons that the map moves most, one panel each, from the most moved on.

    A neuron is moved by the mean over the source rows of ``(T(z) - z)^2`` at strength 1, in squared units of its
    activations.

    Parameters
    ----------
    source, target, map, strength
        As `quantiles`.
    n : int, default 6
        Number of neurons, 1 <= n <= d. Three panels fit a row.
    axes : sequence of n matplotlib.axes.Axes, optional
        Default: those of a new figure.

    Returns
    -------
    ndarray
        The n axes.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        As `quantiles`, or if `n` is out of range or `axes` are not n.
    """
    n = as_int(n, "n")
    width = map.weight.size
    if not 1 <= n <= width:
        raise ValueError(f"n: expected 1 <= n <= {width}, the map's width, got {n}")
    rows = _sample(source, "source", width).astype(np.float64)
    slopes, shifts = at_strength(map.weight.astype(np.float64), map.bias, 1)
    moved = np.mean((slopes * rows + shifts - rows) ** 2, axis=0)
    columns = min(n, 3)
    size = (2.6 * columns + 0.6, 2.4 * -(-n // columns) + 0.4)
    drawn = _panels(axes, n, "one a neuron", nrows=-(-n // columns), ncols=columns, figsize=size)
    order = np.argsort(-moved, kind="stable")
    for k, (ax, neuron) in enumerate(zip(drawn, order[:n].tolist(), strict=True)):
        quantiles(source, target, map, neuron, strength=strength, ax=ax)
        ax.set_title(f"neuron {neuron}", fontsize="medium")
        ax.set_ylabel("activation" if k % columns == 0 else "")
        ax.get_legend().remove()
    handles, labels = drawn[0].get_legend_handles_labels()
    if axes is None:
        across = 3 if columns > 1 else 1
        drawn[0].get_figure().legend(handles, labels, loc="outside upper center", ncols=across, frameon=False)
    else:
        drawn[0].legend(handles, labels, frameon=False)
    return drawn


def path(path: SparsePath, axes: Sequence[Axes] | None = None) -> NDArray:
    """Draw a sparse path in three panels, one above the other, over the same penalties: loss, support, modules.

    The penalties fall from left to right, on a logarithmic scale, so that the maps grow from the identity to the
    densest. Where the path has held-out data, their loss is drawn too, and a vertical line marks its least value.

    Parameters
    ----------
    path : SparsePath
        What `lineas.sparse_path` or `lineas.sparse_path_end_to_end` returned.
    axes : sequence of three matplotlib.axes.Axes, optional
        For the loss, the support (neurons changed, in percent of all) and the heat map of the support of every module
        (in percent of its neurons; modules in execution order from top to bottom). Default: a new figure. They need
        not share the x axis: each gets its own scale, and only the last a label.

    Returns
    -------
    ndarray
        The three axes. The bar of colours is in the figure of the last, as ``axes[2].collections[0].colorbar``.

    Raises
    ------
    ValueError
        If `axes` are not three.
    """
    drawn = _panels(axes, 3, "for loss, support and modules", nrows=3, figsize=(7.2, 7.5), sharex=True)
    loss, support, modules = drawn
    penalties = np.asarray(path.penalties, np.float64)
    _curve(loss, penalties, path.loss, "fitted data", BLUE, "o")
    _curve(support, penalties, 100.0 * path.support / path.d, "all modules", BLUE, "o")
    _module_shares(modules, path, penalties)
    if path.held_out_loss is not None:
        _curve(loss, penalties, path.held_out_loss, "held-out data", ORANGE, "s")
        best = path.index(best=True)
        modules.axvline(penalties[best], color="white", linewidth=2.5)  # a rim, so that the line shows on dark cells
        for ax in drawn:
            label = f"least held-out loss: penalty {penalties[best]:.3g}"
            ax.axvline(penalties[best], color=GREY, linewidth=1.2, linestyle=":", label=label)
    edges = _edges(penalties)
    for ax in drawn:
        ax.set_xscale("log")
        ax.set_xlim(edges[0], edges[-1])
    loss.set_ylabel("loss (squared W2)")
    if axes is None:  # above the panels, where no curve runs through it
        loss.get_figure().legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    else:
        loss.legend(frameon=False)
    support.set_ylabel("neurons changed (%)")
    support.set_ylim(0, 105)
    modules.set_xlabel("penalty (falling: maps grow denser)")
    return drawn


def _axes(ax: Axes | None) -> Axes:
    return _pyplot().subplots(layout="constrained")[1] if ax is None else ax


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "lineas[plot]"') from error
    return plt


def _panels(axes: Sequence[Axes] | None, count: int, purpose: str, **layout: Any) -> NDArray:
    """The given axes, if they are `count`, or those of a new figure, laid out as `pyplot.subplots` is told; flat."""
    if axes is None:
        panels: Any = _pyplot().subplots(layout="constrained", squeeze=False, **layout)[1]
        drawn = panels.ravel()
        for spare in drawn[count:]:
            spare.remove()
        return drawn[:count]
    given = np.asarray(axes, dtype=object).ravel()
    if given.size != count:
        raise ValueError(f"axes must be {count}, {purpose}, got {given.size}")
    return given


def _curve(ax: Axes, penalties: NDArray, values: NDArray, label: str, color: str, marker: str) -> None:
    ax.plot(penalties, values, color=color, marker=marker, markersize=3.5, label=label)


def _edges(penalties: NDArray) -> NDArray:
    """Borders of the cells around falling penalties: geometric means, and as far outside at both ends."""
    logs = np.log(penalties)
    middles = (logs[1:] + logs[:-1]) / 2
    first = middles[0] if middles.size else logs[0] - 0.5
    last = middles[-1] if middles.size else logs[-1] + 0.5
    return np.exp(np.concatenate(([2 * logs[0] - first], middles, [2 * logs[-1] - last])))


def _module_shares(ax: Axes, path: SparsePath, penalties: NDArray) -> None:
    """The heat map of `path`: modules from top to bottom, in percent of the neurons of each."""
    shares = 100.0 * path.module_support.T / np.asarray(path.widths)[:, None]
    borders = np.arange(len(shares) + 1) - 0.5
    mesh = ax.pcolormesh(_edges(penalties), borders, shares, cmap="cividis", vmin=0, vmax=100, rasterized=True)
    figure = ax.get_figure()
    assert figure is not None  # axes that can be drawn into have one
    figure.colorbar(mesh, ax=ax, label="neurons changed (%)")
    pattern, labels = _short_names(list(path.modules)) if path.modules is not None else ("", ["array"])
    every = -(-len(labels) // MOST_LABELS)
    ax.set_yticks(np.arange(len(labels))[::every], labels[::every], fontsize="small")
    ax.set_ylim(len(shares) - 0.5, -0.5)
    ax.set_ylabel("module")
    ax.set_title(pattern, loc="left", fontsize="small")


def _line(ax: Axes, values: ArrayLike, label: str, color: str, marker: str) -> None:
    values = np.asarray(values)
    ax.plot(np.arange(values.size), values, color=color, marker=marker, markersize=3.5, label=label)


def _sample(sample: ArrayLike, name: str, width: int) -> NDArray:
    array = np.asarray(sample)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] != width:
        raise ValueError(f"{name}: expected shape (n, {width}) with n >= 1, the map's width, got {array.shape}")
    return array


def _column(sample: ArrayLike, name: str, width: int, neuron: int) -> NDArray[np.float64]:
    array = _sample(sample, name, width)
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
