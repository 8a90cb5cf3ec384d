"""The picture of `report`: `lineas.plot.evaluation` as an SVG that is part of the page and follows its colours."""

from __future__ import annotations

import io
import math
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from .result import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TICKS = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
_SIZE = (5.6, 3.6)  # inches
_SVG = "{http://www.w3.org/2000/svg}"


def figure(evaluation: Evaluation, judge: str, prefix: str, alternative: str) -> dict[str, Any]:
    """Effect against price by one judge.

    Parameters
    ----------
    evaluation : Evaluation
        With prices, and with more than one point.
    judge : str
    prefix : str
        Of the ids in the picture, which must differ from those of others on the page.
    alternative : str
        What the picture shows, in words.

    Returns
    -------
    dict
        "svg", markup; "keys", the legend: method, colour and marker of each curve.

    Raises
    ------
    ImportError
        If matplotlib or Jinja2 is not installed.
    """
    from ..notebook import plot

    figures = plot._matplotlib("figure")  # or the ImportError of every picture
    matplotlib = import_module("matplotlib")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the page is to look the same whatever style the caller has set
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lineas"})
        canvas = figures.Figure(figsize=_SIZE, layout="constrained")
        ax = plot.evaluation(evaluation, judge, ax=canvas.add_subplot())
        # Names are for the page to write: here, "$" would be mathematics, and a long one leaves no room for curves.
        legend = ax.get_legend()
        assert legend is not None
        legend.remove()
        ax.set_ylabel("mean score")
        _scale(ax)
        ax.spines[["top", "right"]].set_visible(False)
        written = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(written, format="svg", transparent=True, metadata=nothing)
    methods = list(dict.fromkeys(evaluation.methods[1:]))
    colours, markers = plot._METHODS, plot._MARKERS
    keys = [
        {
            "method": method,
            "colour": "currentColor" if colours[k % len(colours)] == "#000000" else colours[k % len(colours)],
            "marker": markers[k // len(colours) % len(markers)],
        }
        for k, method in enumerate(methods)
    ]
    return {"svg": _inline(written.getvalue(), prefix, alternative), "keys": keys}


def _scale(ax: Axes) -> None:
    """A scale of square roots: the divergence grows with the square of the strength, and small ones are what counts."""
    ax.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x * x))
    end = float(ax.get_xlim()[1])
    ax.set_xlim(-((0.02 * math.sqrt(end)) ** 2), end)
    ticks: list[float] = []
    for tick in _TICKS:
        if tick <= end and (not ticks or math.sqrt(tick) - math.sqrt(ticks[-1]) >= 0.08 * math.sqrt(end)):
            ticks.append(tick)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def _inline(document: str, prefix: str, alternative: str) -> Any:
    """A picture as part of a page: ids of its own, colours that follow the page's, no fonts, no foreign addresses."""
    from markupsafe import Markup

    tree = ElementTree.fromstring(document)
    for parent in tree.iter():
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style") or (child.tag == f"{_SVG}defs" and not len(child)):
                parent.remove(child)
    for element in tree.iter():
        element.tag = element.tag.removeprefix(_SVG)
        found = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        if "id" in found:
            found["id"] = f"{prefix}-{found['id']}"
        if "href" in found:
            found["href"] = found["href"].replace("#", f"#{prefix}-")
        if "clip-path" in found:
            found["clip-path"] = found["clip-path"].replace("#", f"#{prefix}-")
        if "style" in found:
            found["style"] = _restyled(found["style"])
        element.attrib.clear()
        element.attrib.update(found)
    for name in ("width", "height", "version"):
        tree.attrib.pop(name, None)
    tree.attrib |= {"role": "img", "aria-label": alternative, "class": "chart"}
    return Markup(re.sub(r"\n\s*", "\n", ElementTree.tostring(tree, encoding="unicode")))


def _restyled(style: str) -> str:
    style = re.sub(r"font-family: [^;]*(; )?", "", style)
    return style.replace("#000000", "currentColor").replace("#555555", "var(--quiet)")
