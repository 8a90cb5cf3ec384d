"""Pictures of gates over the tokens of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._checks import as_finite, as_int
from ..hooks.settings import as_tokenizer
from ..inputs.call import call
from ..inputs.frozen import frozen
from ..inputs.prompts import read
from ..maps.gates import gates_of
from ..maps.steering import SteeringMaps
from .plot import _axes, _matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..hooks.attach import Handle

_CELL = 0.602 * 9 / 72  # inches: a character of matplotlib's monospaced font of 9 points
CLOSED, OPEN, INK, QUIET = "#E6E6E6", "#E69F00", "#111111", "#7A7A7A"


def gate_of_tokens(handle: Handle, model: Any, text: str, tokenizer: Any) -> tuple[list[str], NDArray[np.float64]]:
    """The tokens of a text and the gate at each [T], the mean over modules with gates, and over neurons that are open.

    The maps are on the model, with gates. ValueError if a gate has no value for each token.
    """
    (batch,) = read([text], "text", tokenizer=tokenizer).parts()
    with frozen(model, gradients=False), handle.recorded_gates() as found:
        call(model, batch)
    ids = batch.kwargs["input_ids"][0].tolist()
    gates, rows = gates_of(handle.maps), []
    for name, value in found.items():
        array = value.float().cpu().numpy()
        closed = getattr(gates[name], "closed", None)
        if closed is not None and array.shape == (1, len(ids), len(closed)):
            array = array[..., ~closed].mean(axis=-1) if not closed.all() else np.zeros(array.shape[:2])
        if array.shape != (1, len(ids)):
            raise ValueError(f"{name}: the gate has the shape {list(array.shape)}, the text {len(ids)} tokens")
        rows.append(array[0])
    return [tokenizer.decode([token]) for token in ids], np.mean(rows, axis=0, dtype=np.float64)


def plot_gate(
    model: Any,
    maps: SteeringMaps,
    text: str,
    *,
    tokenizer: Any,
    strength: float = 1.0,
    columns: int = 80,
    ax: Axes | None = None,
) -> Axes:
    """Draw a text token by token, each on a box that is the more coloured the further the gate is open there.

    The value is the mean over the modules with gates, and over the neurons that are not closed. The maps act meanwhile,
    as they do in generation, since a gate reads what the maps before it have made of the text.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model; the maps are taken off again.
    maps : SteeringMaps
        Maps with gates (``maps.gated(...)``).
    text : str
        Not empty.
    tokenizer : transformers tokenizer
    strength : float, default 1.0
        At which the maps act on the text; 0 shows what the gates would say of the text alone.
    columns : int, default 80
        Characters in a line, at least 10.
    ax : matplotlib.axes.Axes, optional
        Where to draw; its axes are switched off. Default: those of a new figure, with a transparent background and of
        the height that the lines need.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed (``pip install "lineas[plot]"``).
    TypeError
        If an argument is of a wrong type.
    ValueError
        If the maps have no gates, a number is out of range, the text is empty, or a gate has no value for each token.
    """
    if not isinstance(maps, SteeringMaps):
        raise TypeError(f"maps must be SteeringMaps, got {type(maps).__name__}")
    if not maps.gates:
        raise ValueError("maps have no gates: maps.gated(...) puts them beside maps")
    if not isinstance(text, str):
        raise TypeError(f"text must be a string, got {type(text).__name__}")
    if not text:
        raise ValueError("text must not be empty")
    as_tokenizer(tokenizer, "tokenizer")
    columns, strength = as_int(columns, "columns", low=10), as_finite(strength, "strength")
    _matplotlib("colors")
    with maps.attach(model, strength) as handle:
        tokens, values = gate_of_tokens(handle, model, text, tokenizer)
    return draw_tokens(tokens, values, columns, ax)


def draw_tokens(tokens: list[str], values: NDArray, columns: int, ax: Axes | None = None) -> Axes:
    """Draw tokens as boxes of text, coloured by values from 0 to 1."""
    places, lines = _laid_out(tokens, columns)
    if ax is None:
        figure = _matplotlib("pyplot").figure(figsize=(_CELL * (columns + 2), 0.28 * (lines + 1.4)))
        figure.patch.set_alpha(0)
        ax = _axes(figure.add_axes((0, 0, 1, 1)))
    colours = _matplotlib("colors").LinearSegmentedColormap.from_list("gate", [CLOSED, OPEN])
    patches = _matplotlib("patches")
    ax.set_axis_off()
    ax.set_xlim(-1, columns + 1)
    ax.set_ylim(lines + 1.2, -0.2)
    for token, value, (x, y) in zip(map(_shown, tokens), values, places, strict=True):
        ax.add_patch(patches.Rectangle((x, y + 0.06), len(token), 0.88, facecolor=colours(float(value)), linewidth=0))
        ax.text(
            x + len(token) / 2,
            y + 0.52,
            token,
            color=INK,
            family="monospace",
            fontsize=9,
            ha="center",
            va="center",
            parse_math=False,
        )
    for step in range(11):
        ax.add_patch(patches.Rectangle((8 + step, lines + 0.45), 1, 0.5, facecolor=colours(step / 10), linewidth=0))
    for place, word, side in ((7.5, "closed", "right"), (19.5, "open", "left")):
        ax.text(place, lines + 0.7, word, color=QUIET, fontsize=9, ha=side, va="center")
    return ax


def _shown(token: str) -> str:
    """A token as it is drawn, of at least one character."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "⏎") or "∅"


def _laid_out(tokens: list[str], columns: int) -> tuple[list[tuple[int, int]], int]:
    """Column and line of each token, and the number of lines; a token longer than a line has one to itself."""
    places, x, y = [], 0, 0
    for token in tokens:
        width = len(_shown(token))
        if x and x + width > columns:
            x, y = 0, y + 1
        places.append((x, y))
        x += width
        if "\n" in token:  # the next one begins a line
            x = columns
    return places, y + 1
