"""The notebook instrument behind `lineas.explore`: sliders over a sparse path, and what they do to maps and text.

The browser draws; the kernel sends the path's curves once and, for every move along the path, a few kilobytes: how many
neurons of each cell of the heat map are changed, and the most changed ones.
"""

from __future__ import annotations

import io
import weakref
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from .._checks import as_int, as_positive
from ..fitting.result import FitResult
from ..hooks.settings import as_tokenizer
from ..maps.affine import AffineMap
from ..maps.gates import gates_of
from ..maps.metadata import as_strength, calibrated_strength
from ..maps.path import SparsePath
from ..maps.steering import SteeringMaps
from .plot import BLUE, GREY, ORANGE, _matplotlib, _name_ticks, _short_names
from .tokens import gate_of_tokens

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise ImportError('lineas.explore needs ipywidgets and anywidget: pip install "lineas[notebook]"') from error


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..hooks.attach import Handle

CELLS = 128  # columns of the heat map of neurons
TOP = 12  # rows of the list of most changed neurons
_SHARES: dict[str, Any] = {"aspect": "auto", "cmap": "Blues", "vmin": 0, "vmax": 1, "interpolation": "nearest"}

# The explorer whose maps are on a model. Weak on both sides, since an explorer holds its model.
_explorers: weakref.WeakKeyDictionary[Any, weakref.ref[Explorer]] = weakref.WeakKeyDictionary()


class Explorer(anywidget.AnyWidget):
    """Explore maps in a notebook: sliders for sparsity and strength, with pictures and text that follow.

    A Jupyter widget: it shows the loss along the path, which modules and neurons are changed at the chosen point, and
    the most changed neurons; with a model, its text without the maps and with them, and where the maps have gates, how
    far these are open on every token of the prompt. The maps are on the model from the
    start, at what the sliders say, until ``close()`` or the end of a with-block, also after an error: whatever else
    runs the model is steered, too. A model has one explorer at a time: a second one takes the maps of the first off.

    Where no browser is, there is a still picture: in the saved notebook, and by ``plot()``.

    Parameters
    ----------
    path : SparsePath, FitResult, SteeringMaps or AffineMap
        A path, or the maps of one point, for which there is no sparsity to choose.
    model : torch.nn.Module, optional
        A loaded model with the modules of the maps.
    tokenizer : transformers tokenizer, optional
        For text, by ``model.generate``.
    index : int, optional
        The point to start from, negative ones from the end. Default: that with the least held-out loss, without one
        the middle of the path.
    strength : float or "calibrated", default 1.0
        The strength to start from. One that `SteeringMaps.calibrate` noted is marked on the slider; "calibrated"
        starts there.
    max_strength : float, default 2.0
        The end of the slider, which reaches further where `strength` is beyond it.
    prompt : str, default ""
        A first prompt.
    max_new_tokens : int, default 30
        The length of the text, which is made greedily.
    live_text : bool, default False
        Whether the steered text is made anew whenever a slider is let go. It can be changed in the instrument.
    generate : callable, optional
        ``generate(prompt)`` returns the text to show, where the model is to be used in another way: sampling, a chat
        template, a model without ``generate``. It is called with the maps on, at strength 0 and at the chosen one.

    Attributes
    ----------
    index, strength, prompt, live_text : int, float, str, bool
        What is chosen now, as above. Each may be set at any time; the first two reach the model at once. A strength may
        be any finite number: the slider is made long enough to show it.

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

    # As text: anywidget would watch files, and hold every explorer, with its model, for ever.
    _esm = Path(__file__).with_name("explorer.js").read_text(encoding="utf-8")
    _css = Path(__file__).with_name("explorer.css").read_text(encoding="utf-8")

    # Checked by the functions below, whose errors are those of the rest of lineas.
    index = traitlets.Any(0).tag(sync=True)
    strength = traitlets.Any(1.0).tag(sync=True)
    prompt = traitlets.Unicode("").tag(sync=True)
    live_text = traitlets.Bool(False).tag(sync=True)
    _path_data = traitlets.Dict().tag(sync=True)
    _point_data = traitlets.Dict().tag(sync=True)
    _text_data = traitlets.Dict().tag(sync=True)
    _attached = traitlets.Bool(False).tag(sync=True)

    def __init__(
        self,
        path: SparsePath | FitResult | SteeringMaps | AffineMap,
        model: Any = None,
        tokenizer: Any = None,
        *,
        index: int | None = None,
        strength: float | str = 1.0,
        max_strength: float = 2.0,
        prompt: str = "",
        max_new_tokens: int = 30,
        live_text: bool = False,
        generate: Callable[[str], str] | None = None,
    ) -> None:
        if model is None and (tokenizer is not None or generate is not None):
            raise TypeError(f"{'tokenizer' if generate is None else 'generate'} needs a model, got model=None")
        if generate is not None and not callable(generate):
            raise TypeError(f"generate must be a function from prompt to text, got {type(generate).__name__}")
        if tokenizer is not None and not callable(getattr(as_tokenizer(tokenizer, "tokenizer"), "decode", None)):
            raise TypeError(f"tokenizer must have decode() to make text, got {type(tokenizer).__name__}")
        max_new_tokens = as_int(max_new_tokens, "max_new_tokens", low=1)
        for name, value, kind in (("prompt", prompt, str), ("live_text", live_text, bool)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        self._given = path.maps if isinstance(path, FitResult) else path
        self._path = _as_path(self._given)
        names = self._path.modules
        self._pattern, self._labels = ("", [""]) if names is None else _short_names(list(names))
        self._cells = _cells(self._path.widths)
        self._model, self._tokenizer, self._max_new_tokens = model, tokenizer, max_new_tokens
        self._text_of = generate or (self._continue if tokenizer is not None else None)
        self._handle: Handle | None = None
        if index is None:
            index = len(self._path) // 2 if self._path.held_out_loss is None else self._path.index(best=True)
        self._facts = self._given.metadata if isinstance(self._given, SteeringMaps) else {}
        self._calibrated = calibrated_strength(self._facts)
        index, strength = self._path.index(index=index), as_strength(strength, self._facts)
        max_strength = as_positive(max_strength, "max_strength")
        shown = self._curves() | {"maxStrength": max_strength, "text": self._text_of is not None}
        shown["calibrated"] = self._calibrated
        point, maps = self._point(index), self._at(index)
        if model is not None:
            if not isinstance(maps, SteeringMaps):
                raise ValueError("model: a path or map of one array names no module of a model; fit {module: array}")
            self._handle = maps.attach(model, strength)  # last of all: every argument is known to be sound
        try:
            super().__init__(
                index=index,
                strength=strength,
                prompt=prompt,
                live_text=live_text,
                _path_data=shown,
                _point_data=point,
                _text_data={"state": "idle"},
                _attached=self._handle is not None,
            )
            if model is not None:
                former = _explorers.get(model, lambda: None)()
                _explorers[model] = weakref.ref(self)
                if former is not None:
                    former.detach()  # else a cell that is run twice would steer twice
        except BaseException:
            self.close()
            raise
        self.observe(self._on_index, "index")
        self.observe(self._on_strength, "strength")
        self.on_msg(self._on_message)

    # ---- what was chosen ---------------------------------------------------------------------------------------------

    @property
    def maps(self) -> SteeringMaps | AffineMap:
        """The maps of the chosen point, for strength 1: what to save."""
        return self._at(self.index)

    @property
    def support(self) -> int:
        """The number of neurons that the maps change. Set it to choose a point as ``path.at(support=...)`` does."""
        return int(self._path.support[self.index])

    @support.setter
    def support(self, value: int | float) -> None:
        self.index = self._path.index(support=value)

    @property
    def penalty(self) -> float:
        """The penalty of the chosen point; NaN for maps that do not say."""
        return float(self._path.penalties[self.index])

    @property
    def handle(self) -> Handle | None:
        """The maps on the model; None without a model and after `detach`."""
        return self._handle

    @traitlets.validate("index")
    def _check_index(self, proposal: Mapping[str, Any]) -> int:
        return self._path.index(index=proposal["value"])

    @traitlets.validate("strength")
    def _check_strength(self, proposal: Mapping[str, Any]) -> float:
        return as_strength(proposal["value"], self._facts)

    def _at(self, index: int) -> SteeringMaps | AffineMap:
        return self._path.at(index=index) if isinstance(self._given, SparsePath) else self._given

    def _on_index(self, change: Mapping[str, Any]) -> None:
        self._point_data = self._point(change["new"])
        if self._handle is not None:
            self._handle.maps = cast(SteeringMaps, self._at(change["new"]))

    def _on_strength(self, change: Mapping[str, Any]) -> None:
        if self._handle is not None:
            self._handle.strength = change["new"]

    def _curves(self) -> dict[str, Any]:
        """What the browser has to know of the path, once."""

        def numbers(values: NDArray | None) -> list[float | None] | None:
            # JSON has no NaN.
            return None if values is None else [float(v) if np.isfinite(v) else None for v in values]

        path = self._path
        return {
            "pattern": self._pattern,
            "labels": self._labels,
            "names": list(path.modules or [""]),
            "widths": [int(d) for d in path.widths],
            "columns": len(self._cells[0]) // len(path.widths),
            "rows": TOP,
            "penalties": numbers(path.penalties),
            "loss": numbers(path.loss),
            "heldOut": numbers(path.held_out_loss),
            "support": path.support.tolist(),
            "moduleSupport": path.module_support.astype("<u4").tobytes(),
        }

    def _point(self, index: int) -> dict[str, Any]:
        """What the browser has to know of a point: changed neurons a cell, and the most changed neurons."""
        cells = self._changed_in_cells(index).astype("<u4").tobytes()
        return {"index": index, "cells": cells, "top": _most_changed(self._path, index)}

    def _changed_in_cells(self, index: int) -> NDArray[np.int64]:
        """Number of changed neurons of every cell of the heat map."""
        start, stop = self._cells
        total = np.zeros(self._path.d + 1, np.int64)
        np.cumsum((self._path.weight[index] != 1) | (self._path.bias[index] != 0), out=total[1:])
        return total[stop] - total[start]

    # ---- the model ---------------------------------------------------------------------------------------------------

    def generate(self, prompt: str | None = None) -> tuple[str, str]:
        """Continue the prompt without the maps and with them, and show both.

        Parameters
        ----------
        prompt : str, optional
            Default: the one that stands in the box.

        Returns
        -------
        unsteered, steered : str
            At strength 0, and at the strength and the point that are chosen.

        Raises
        ------
        RuntimeError
            If there is no model or tokenizer, or the maps were taken off.
        ValueError
            If the prompt has no tokens.
        """
        if self._handle is None or self._text_of is None:
            state = "the maps were taken off the model" if self._path_data["text"] else "none was given"
            raise RuntimeError(f"text needs a model with its tokenizer: {state}")
        if prompt is not None:
            self.prompt = prompt
        return self._show_text(renew=True)

    def _show_text(self, renew: bool) -> tuple[str, str]:
        """Make the steered text, and the unsteered one as well if `renew` or if the prompt is another one."""
        assert self._handle is not None and self._text_of is not None
        chosen = {"prompt": self.prompt, "index": self.index, "strength": self.strength}
        shown = self._text_data
        self._text_data = {**shown, "state": "busy"}
        unsteered = shown.get("unsteered") if shown.get("prompt") == self.prompt and not renew else None
        try:
            if unsteered is None:
                self._handle.strength = 0.0
                try:
                    unsteered = self._text_of(self.prompt)
                finally:
                    self._handle.strength = self.strength
            steered = self._text_of(self.prompt)
        except BaseException as error:
            self._text_data = {"state": "error", "message": f"{type(error).__name__}: {error}"}
            raise
        made = {"unsteered": unsteered, "steered": steered, "gate": self._gate_data()}
        self._text_data = {"state": "done", **made, **chosen}
        return unsteered, steered

    def _gate_data(self) -> list[tuple[str, float]]:
        """The tokens of the prompt with how far the gates are open there; none where the maps have no gates."""
        if not gates_of(self.maps) or self._tokenizer is None or not self.prompt:
            return []
        assert self._handle is not None
        tokens, values = gate_of_tokens(self._handle, self._model, self.prompt, self._tokenizer)
        return list(zip(tokens, values.tolist(), strict=True))

    def _continue(self, prompt: str) -> str:
        """The greedy continuation of a prompt."""
        import torch

        read = self._tokenizer(prompt)  # not into tensors, which would be on torch's default device
        length = len(read["input_ids"])
        if length == 0:
            raise ValueError(f"prompt {prompt!r} has no tokens")
        tokens = self._model.generate(
            **{x: torch.tensor([read[x]], device=self._model.device) for x in ("input_ids", "attention_mask")},
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        return self._tokenizer.decode(tokens[0, length:], skip_special_tokens=True)

    def _on_message(self, _: Any, content: Any, buffers: Any) -> None:
        """Make text for the browser, with what it shows now: its own messages about that may still be on their way."""
        if self._handle is None or self._text_of is None or content.get("type") != "generate":
            return
        self.prompt, self.index, self.strength = content["prompt"], content["index"], content["strength"]
        with suppress(Exception):  # shown in the widget, where the button was pressed
            self._show_text(renew=content["renew"])

    def detach(self) -> None:
        """Take the maps off the model; the pictures stay. Does nothing where they are off already."""
        if self._handle is not None:
            self._handle.remove()
            self._handle, self._attached = None, False
            self._model = self._tokenizer = self._text_of = None  # a notebook may hold the explorer for long

    def close(self) -> None:
        """Take the maps off the model and remove the instrument from the notebook."""
        if getattr(self, "_handle", None) is not None:  # not set where __init__ failed
            self.detach()
        super().close()

    def __enter__(self) -> Explorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- where no browser is -----------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        point = f"index={self.index} of {len(self._path)}, penalty={self.penalty:.4g}, " if len(self._path) > 1 else ""
        share = f"support={self.support} of {self._path.d}"
        return f"Explorer({point}{share}, strength={self.strength:g}{', attached' if self._attached else ''})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The live view, and a picture for wherever that cannot run: a saved notebook, nbconvert, qtconsole."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({"text/plain": repr(self)}, {})
        try:
            figure = self.plot()
        except ImportError:
            return data, metadata
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=80)
        return {**data, "image/png": b64encode(file.getvalue()).decode()}, metadata

    def plot(self) -> Figure:
        """Draw what the instrument shows as a still picture.

        Returns
        -------
        matplotlib.figure.Figure
            Not known to pyplot: nothing need be closed.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        figure = _matplotlib("figure").Figure(figsize=(12, 5.4), layout="constrained")
        if len(self._path) == 1:
            axes = figure.subplot_mosaic([["cells", "top"]], width_ratios=[2, 0.75])
            _name_ticks(axes["cells"].yaxis, self._labels)
        else:
            rows = [["loss", "text", "top"], ["path", "cells", "top"]]
            axes = figure.subplot_mosaic(rows, width_ratios=[1, 1, 0.75], height_ratios=[1, 1.8])
            axes["cells"].set_yticks([])
            self._draw_path(axes["loss"], axes["path"])
            axes["text"].axis("off")
            axes["text"].text(0, 0.5, self._words(), va="center", linespacing=1.7, fontsize=12)
        self._draw_cells(axes["cells"])
        self._draw_top(axes["top"])
        return figure

    def _words(self) -> str:
        path, k = self._path, self.index
        lines = [
            f"{path.support[k]:,} of {path.d:,} neurons ({path.support[k] / path.d:.2%})",
            f"point {k + 1} of {len(path)}, penalty {path.penalties[k]:.4g}",
            f"loss {path.loss[k]:.4g}",
        ]
        if path.held_out_loss is not None:
            lines[-1] += f", held out {path.held_out_loss[k]:.4g}"
        calibrated = "" if self._calibrated is None else f" (calibrated: {self._calibrated:.3g})"
        return "\n".join([*lines, f"strength {self.strength:g}{calibrated}"])

    def _draw_path(self, loss: Axes, modules: Axes) -> None:
        path = self._path
        loss.plot(path.loss, color=BLUE, label="fitted")
        if path.held_out_loss is not None:
            loss.plot(path.held_out_loss, color=ORANGE, linestyle="--", label="held out")
        loss.plot(self.index, path.loss[self.index], "o", color=BLUE)
        loss.set_ylabel("loss")
        loss.set_xlim(-0.5, len(path) - 0.5)
        loss.legend(frameon=False)
        modules.imshow(path.module_support.T / np.array(path.widths)[:, None], **_SHARES)
        _name_ticks(modules.yaxis, self._labels)
        ticks = np.unique(np.linspace(0, len(path) - 1, 4).astype(int))
        for ax in (loss, modules):
            ax.axvline(self.index, color=GREY, linewidth=1)
            ax.set_xticks(ticks, [f"{path.penalties[k]:.2g}" for k in ticks])
        loss.tick_params(labelbottom=False)
        modules.set_xlabel("penalty")
        modules.set_title("share of neurons changed along the path", fontsize=10)

    def _draw_cells(self, ax: Axes) -> None:
        start, stop = self._cells
        share = (self._changed_in_cells(self.index) / (stop - start)).reshape(len(self._path.widths), -1)
        ax.figure.colorbar(ax.imshow(share, **_SHARES), ax=ax, label="share changed", location="right")
        ax.set_xticks([])
        ax.set_xlabel(f"neurons, first to last, in {share.shape[1]} cells")
        ax.set_title(f"changed neurons: {self.support:,} of {self._path.d:,}", fontsize=10)

    def _draw_top(self, ax: Axes) -> None:
        rows = _most_changed(self._path, self.index)
        places = np.arange(len(rows))
        ax.barh(places, [np.hypot(weight - 1, bias) for *_, weight, bias in rows], color=BLUE)
        names = [f"{self._labels[module]} · {neuron}".removeprefix(" · ") for module, neuron, *_ in rows]
        ax.set_yticks(places, names)
        ax.set_ylim(TOP - 0.5, -0.5)
        ax.set_xlabel("size of change, $\\sqrt{(w-1)^2+b^2}$")
        ax.set_title("most changed neurons", fontsize=10)


def _as_path(given: Any) -> SparsePath:
    """What is explored as a path, of one point where it is one set of maps."""
    if isinstance(given, SparsePath):
        return given
    if isinstance(given, AffineMap):
        modules, maps, metadata = None, [given], {}
    elif isinstance(given, SteeringMaps):
        modules, maps, metadata = tuple(given), list(given.values()), given.metadata
    else:
        raise TypeError(f"path must be a SparsePath, FitResult, SteeringMaps or AffineMap, got {type(given).__name__}")
    penalty = metadata.get("penalty")
    return SparsePath(
        penalties=np.array([penalty if isinstance(penalty, int | float) else np.nan], np.float64),
        l1_ratio=float("nan"),
        loss=np.array([np.nan]),
        held_out_loss=None,
        modules=modules,
        widths=tuple(one.d for one in maps),
        weight=np.concatenate([one.weight for one in maps])[None],
        bias=np.concatenate([one.bias for one in maps])[None],
    )


def _cells(widths: tuple[int, ...]) -> tuple[NDArray, NDArray]:
    """First neuron and the one after the last of every cell of the heat map, row by row, counted over all modules.

    All rows have the same number of cells: in a module with fewer neurons than that some cells show the same one.
    """
    count = min(CELLS, max(widths))
    width, cell = np.array(widths)[:, None], np.arange(count)
    start = cell * width // count
    stop = np.maximum((cell + 1) * width // count, start + 1)
    first = np.concatenate(([0], np.cumsum(widths)[:-1]))[:, None]
    return (first + start).ravel(), (first + stop).ravel()


def _most_changed(path: SparsePath, index: int) -> list[list[Any]]:
    """Module, neuron, slope and shift of the neurons with the largest sqrt((w - 1)^2 + b^2), largest first."""
    weight, bias = path.weight[index], path.bias[index]
    size = (weight - 1) ** 2 + bias**2
    chosen = np.argpartition(size, -min(TOP, size.size))[-TOP:]
    chosen = chosen[np.lexsort((chosen, -size[chosen]))]
    chosen = chosen[size[chosen] > 0]
    first = np.concatenate(([0], np.cumsum(path.widths)))
    module = np.searchsorted(first, chosen, side="right") - 1
    columns = (module, chosen - first[module], weight[chosen], bias[chosen])
    return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]
