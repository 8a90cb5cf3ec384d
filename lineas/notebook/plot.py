"""Pictures of fits and maps, drawn with matplotlib (``pip install "lineas[plot]"``).

Every function draws into `ax` (default: the axes of a new figure) and returns it, so that titles, limits and layout
stay in the caller's hands; those with several panels take and return an array `axes`. Colours are from the palette of
Okabe and Ito and the colour map cividis, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import as_int
from ..arrays.quantiles import Quantiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from ..evaluation.result import Evaluation
    from ..maps.affine import AffineMap
    from ..maps.path import SparsePath
    from ..maps.steering import SteeringMaps

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
_DRAWN = 1000  # points of a quantile function that are drawn of many more
MOST_LABELS = 16  # more of them along one axis run into each other
_FITTED: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 3.5}
_HELD_OUT: dict[str, Any] = {"color": ORANGE, "marker": "s", "markersize": 3.5}


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
    ax.plot(values["loss"], label="fitted sets", **_FITTED)
    if np.size(values.get("held_out_loss", ())):
        ax.plot(values["held_out_loss"], label="held-out sets", **_HELD_OUT)
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
    ax.bar(np.arange(len(maps)), [100.0 * m.support / m.d for m in maps.values()], color=BLUE)
    _name_ticks(ax.xaxis, labels)
    if max(map(len, labels)) > 4:
        ax.tick_params(axis="x", labelrotation=90)
    ax.set_ylim(0, 105)
    ax.set_xlabel(f"module ({pattern})" if pattern else "module")
    ax.set_ylabel("neurons changed (%)")
    return ax


def quantiles(
    source: ArrayLike | Quantiles,
    target: ArrayLike | Quantiles,
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
    source, target : array_like, shape (n, d) and (m, d), or Quantiles
        Activations, one row a prompt; n and m may differ. Of a `Quantiles`, 1000 points are drawn.
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
    TypeError
        If `strength` is not a real number.
    ValueError
        If a sample is not 2-D, is empty or is not as wide as the map, `neuron` is out of range, or `strength` is not
        finite.
    """
    before, wanted = _sample(source, "source", map.d), _sample(target, "target", map.d)
    if not 0 <= neuron < map.d:
        raise ValueError(f"neuron: expected 0 <= neuron < {map.d}, got {neuron}")
    after = map.transform(before, strength)
    ax = _axes(ax)
    label = "source, mapped" if strength == 1.0 else f"source, mapped at strength {strength:g}"
    _quantile_line(ax, before[:, neuron], "source", color=GREY, linestyle="--")
    _quantile_line(ax, wanted[:, neuron], "target", color=ORANGE, linewidth=2.5)
    _quantile_line(ax, after[:, neuron], label, color=BLUE)
    ax.set_xlabel("quantile level")
    ax.set_ylabel(f"activation of neuron {neuron}")
    ax.legend(frameon=False)
    return ax


def most_changed(
    source: ArrayLike | Quantiles,
    target: ArrayLike | Quantiles,
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
        As `quantiles`, or if `n` is not an integer.
    ValueError
        As `quantiles`, or if `n` is out of range or `axes` are not n.
    """
    n = as_int(n, "n")
    if not 1 <= n <= map.d:
        raise ValueError(f"n: expected 1 <= n <= {map.d}, the map's width, got {n}")
    source, target = _sample(source, "source", map.d), _sample(target, "target", map.d)
    moved = np.mean((map.transform(source) - source) ** 2, axis=0)
    columns = min(n, 3)
    rows = -(-n // columns)
    size = (2.6 * columns + 0.6, 2.4 * rows + 0.4)
    drawn = _panels(axes, n, "one a neuron", nrows=rows, ncols=columns, figsize=size)
    order = np.argsort(-moved, kind="stable")
    for k, (ax, neuron) in enumerate(zip(drawn, order[:n].tolist(), strict=True)):
        quantiles(source, target, map, neuron, strength=strength, ax=ax)
        ax.set_title(f"neuron {neuron}", fontsize="medium")
        ax.set_ylabel("activation" if k % columns == 0 else "")
        ax.get_legend().remove()
    _legend(drawn[0], above=axes is None, columns=3 if columns > 1 else 1)
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
    loss.plot(penalties, path.loss, label="fitted data", **_FITTED)
    support.plot(penalties, 100.0 * path.support / path.d, label="all modules", **_FITTED)
    edges = _edges(penalties)
    _module_shares(modules, path, edges)
    if path.held_out_loss is not None:
        loss.plot(penalties, path.held_out_loss, label="held-out data", **_HELD_OUT)
        best = path.index(best=True)
        modules.axvline(penalties[best], color="white", linewidth=2.5)  # a rim, so that the line shows on dark cells
        for ax in drawn:
            label = f"least held-out loss: penalty {penalties[best]:.3g}"
            ax.axvline(penalties[best], color=GREY, linewidth=1.2, linestyle=":", label=label)
    for ax in drawn:
        ax.set_xscale("log")
        ax.set_xlim(edges[0], edges[-1])
    loss.set_ylabel("loss (squared W2)")
    _legend(loss, above=axes is None)
    support.set_ylabel("neurons changed (%)")
    support.set_ylim(0, 105)
    modules.set_xlabel("penalty (falling: maps grow denser)")
    return drawn


def evaluation(evaluation: Evaluation, judge: str | None = None, *, price: str = "kl", ax: Axes | None = None) -> Axes:
    """Draw effect against price, one curve a method, from the unsteered model on.

    Parameters
    ----------
    evaluation : Evaluation
        What `lineas.evaluate` returned, with scores and prices.
    judge : str, optional
        The judge whose mean score is the effect. Default: the only one.
    price : {"kl", "last_kl", "loss_rise", "perplexity_ratio", "changed_top1"}, default "kl"
        The price, as `Evaluation.rows` calls it.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes
        Bars are 95 % intervals of both.

    Raises
    ------
    ValueError
        If there is no such judge or price, none is named and there are several, or there are no neutral texts.
    """
    judge, price = evaluation.judge_name(judge), evaluation.price_name(price)
    rows = evaluation.rows()
    ax = _axes(ax)
    start, methods = rows[0], list(dict.fromkeys(row["method"] for row in rows[1:]))
    ax.axhline(start[judge], color=GREY, linewidth=1, linestyle=":")
    ax.axhspan(
        start[f"{judge}_low"], start[f"{judge}_high"], color=GREY, alpha=0.12, linewidth=0, label=start["method"]
    )
    for k, method in enumerate(methods):
        points = [row for row in rows if row["method"] == method]
        # A text before the prompts is a point of its own, with no strength between it and nothing.
        curve = points if points[0]["strength"] == 0 else sorted([start, *points], key=lambda row: row["strength"])
        curve = [row for row in curve if np.isfinite([row[price], row[judge]]).all()]  # the others have no place
        ends = {
            name: [[abs(row[name] - row[f"{name}_{end}"]) for row in curve] for end in ("low", "high")]
            for name in (judge, price)
        }
        ax.errorbar(
            [row[price] for row in curve],
            [row[judge] for row in curve],
            xerr=ends[price],
            yerr=ends[judge],
            color=_METHODS[k % len(_METHODS)],
            marker=_MARKERS[k // len(_METHODS) % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.4,
            elinewidth=0.7,
            label=_plain(method),
        )
    ax.set_xlabel(_PRICES[price])
    ax.set_ylabel(f"mean score by {_plain(judge)}")
    ax.legend(frameon=False, fontsize="small")
    return ax


_PRICES = {
    "kl": "KL divergence of the next token on neutral texts (nats)",
    "last_kl": "KL divergence of the next token after neutral texts (nats)",
    "loss_rise": "rise of the loss on neutral texts (nats a token)",
    "perplexity_ratio": "perplexity on neutral texts, as a multiple of the unsteered model's",
    "changed_top1": "share of neutral tokens whose likeliest next token is another",
}
# Okabe and Ito's palette without its yellow, which is faint on white.
_METHODS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D")


def _matplotlib(module: str) -> Any:
    """A module of matplotlib; ImportError that says what to install."""
    try:
        return import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "lineas[plot]"') from error


def _plain(name: str) -> str:
    """A name as matplotlib writes it as it is, dollars, which stand around its mathematics, included."""
    return name.replace("$", r"\$")


def _axes(ax: Axes | None) -> Axes:
    return _matplotlib("pyplot").subplots(layout="constrained")[1] if ax is None else ax


def _panels(axes: Sequence[Axes] | None, count: int, purpose: str, **layout: Any) -> NDArray:
    """The given axes, if they are `count`, or those of a new figure, laid out as `pyplot.subplots` is told; flat."""
    if axes is None:
        drawn = _matplotlib("pyplot").subplots(layout="constrained", squeeze=False, **layout)[1].ravel()
        for spare in drawn[count:]:
            spare.remove()
        return drawn[:count]
    given = np.asarray(axes, dtype=object).ravel()
    if given.size != count:
        raise ValueError(f"axes must be {count}, {purpose}, got {given.size}")
    return given


def _legend(ax: Axes, *, above: bool, columns: int = 3) -> None:
    """The legend of some axes: above all panels of their figure, where no curve runs through it, or inside them."""
    if above:
        handles, labels = ax.get_legend_handles_labels()
        ax.figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    else:
        ax.legend(frameon=False)


def _edges(penalties: NDArray) -> NDArray:
    """Borders of the cells around falling penalties: geometric means, and as far outside at both ends."""
    logs = np.log(penalties)
    around = np.pad(logs, 1, "reflect", reflect_type="odd") if logs.size > 1 else logs + np.array([1, 0, -1])
    return np.exp((around[1:] + around[:-1]) / 2)


def _module_shares(ax: Axes, path: SparsePath, edges: NDArray) -> None:
    """The heat map of `path`: modules from top to bottom, in percent of the neurons of each."""
    shares = 100.0 * path.module_support.T / np.asarray(path.widths)[:, None]
    borders = np.arange(len(shares) + 1) - 0.5
    mesh = ax.pcolormesh(edges, borders, shares, cmap="cividis", vmin=0, vmax=100, rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label="neurons changed (%)")
    pattern, labels = _short_names(list(path.modules or ["array"]))
    _name_ticks(ax.yaxis, labels, fontsize="small")
    ax.set_ylim(len(shares) - 0.5, -0.5)
    ax.set_ylabel("module")
    ax.set_title(pattern, loc="left", fontsize="small")


def _sample(sample: ArrayLike | Quantiles, name: str, width: int) -> NDArray[np.float64]:
    array = sample.sample(min(sample.count, _DRAWN)) if isinstance(sample, Quantiles) else np.asarray(sample)
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] != width:
        raise ValueError(f"{name}: expected shape (n, {width}) with n >= 1, the map's width, got {array.shape}")
    return array.astype(np.float64)


def _quantile_line(ax: Axes, column: NDArray[np.float64], label: str, **style: Any) -> None:
    # The empirical quantile function is a step function; a line through the middles of its steps reads better.
    levels = (np.arange(column.size) + 0.5) / column.size
    ax.plot(levels, np.sort(column), label=label, **style)


def _name_ticks(axis: Axis, labels: list[str], **style: Any) -> None:
    """Label the ticks 0, 1, ... of an axis, as many as have room."""
    every = -(-len(labels) // MOST_LABELS)
    axis.set_ticks(np.arange(len(labels))[::every], labels[::every], **style)


def _short_names(names: list[str]) -> tuple[str, list[str]]:
    """Split dotted names into what they share, as one pattern, and what tells them apart."""

    def leading(parts: Sequence[Sequence[str]]) -> int:
        """How many parts at the beginning are the same in all names."""
        return len(list(takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))))

    parts = [name.split(".") for name in names]
    most = min(map(len, parts)) - 1  # one part at least is left of every name
    start = min(leading(parts), most)
    end = min(leading([p[::-1] for p in parts]), most - start)
    if len(names) == 1 or start + end == 0:
        return "", names
    pattern = ".".join([*parts[0][:start], "*", *parts[0][len(parts[0]) - end :]])
    return pattern, [".".join(p[start : len(p) - end]) for p in parts]
