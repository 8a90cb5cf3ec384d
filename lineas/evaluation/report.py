"""`Evaluation.report`: an evaluation as one web page that needs nothing beside itself.

Texts that a model wrote are hostile until shown otherwise, and so are names and metadata of a file. All of them reach
the page as escaped text of elements: the template escapes whatever it is given, scripts read no data but numbers that
are made here, and the page's own policy lets nothing run or load but the script that it came with.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import as_int
from .._version import __version__
from ..maps.files import write_atomically
from .report_facts import calibrations, diagnoses
from .report_page import Page
from .result import Evaluation

# What HTML or UTF-8 has no place for: control characters, halves of surrogate pairs, noncharacters.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_HERE = Path(__file__).parent


def report(
    evaluation: Evaluation,
    path: str | os.PathLike[str],
    *,
    judge: str | None = None,
    minimize: bool | str | Collection[str] = False,
    title: str | None = None,
    diagnosis: Any = None,
    calibration: Any = None,
    samples: int = 12,
) -> Path:
    """Write one HTML page about the evaluation: curves, tables, texts side by side, and what to make of them.

    The page is one file without references to anything else: it can be mailed, archived and printed. It has effect
    against price for every judge, and the best points within some budgets; all points in tables that can be sorted;
    what became of the continuations, with a warning where they degenerate; continuations beside the unsteered model's;
    where the maps come from; calibrations; and a diagnosis. What was not measured is left out. The same evaluation
    gives the same bytes.

    Parameters
    ----------
    path : str or PathLike
        Where; the folder must exist. A file that is there already is replaced once the page is complete.
    judge : str, optional
        The judge whose best points are marked in the table. Default: the first.
    minimize : bool, str or collection of str, default False
        Whether the smallest score is the best, as with a judge of toxicity: for all judges, or for those of these
        names.
    title : str, optional
        Default: "Evaluation of" the model's name.
    diagnosis : Diagnosis, or mapping from name to Diagnosis, optional
        What ``maps.diagnose`` found; any object with `checks`, each with "name", "value", "verdict" and "why".
    calibration : Calibration, or mapping from name to Calibration, optional
        What ``maps.calibrate`` found. Calibrations that the maps' metadata hold are shown anyway.
    samples : int, default 12
        Prompts whose continuations are shown, evenly spaced among all; of several continuations of a prompt the first.
        Continuations can offend: 0 leaves them all out.

    Returns
    -------
    pathlib.Path
        Where the page is.

    Raises
    ------
    TypeError
        If an argument is of a wrong type.
    ValueError
        If there is no such judge, or `samples` is negative.
    ImportError
        If Jinja2, or for curves matplotlib, is not installed (``pip install "lineas[report]"``).
    FileNotFoundError, IsADirectoryError, OSError
        If the folder is missing, `path` is one, or the file cannot be written; what was there still is.

    Examples
    --------
    >>> found.report("evaluation.html", calibration=calibration)  # doctest: +SKIP
    """
    if not isinstance(evaluation, Evaluation):
        raise TypeError(f"evaluation must be an Evaluation, got {type(evaluation).__name__}")
    place = _as_place(path)
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be a str, got {type(title).__name__}")
    samples = as_int(samples, "samples", low=0)
    if judge is not None:
        judge = evaluation.judge_name(judge)
    page = Page(evaluation, judge, _as_minimized(evaluation, minimize))
    context = {
        "title": title or f"Evaluation of {page.model or 'steering maps'}",
        "page": page,
        "judges": page.judges(),
        "texts": page.texts(samples),
        "calibrations": calibrations(page.metadata, calibration),
        "diagnoses": diagnoses(diagnosis),
        "version": __version__,
    }
    html = _UNFIT.sub("\ufffd", _render(context))
    write_atomically(os.fspath(place), html.encode())
    return place


def _as_place(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    place = Path(path)
    if place.is_dir():
        raise IsADirectoryError(f"path must be that of a file, got the folder {str(place)!r}")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"path: there is no folder {str(place.parent)!r}")
    return place


def _as_minimized(evaluation: Evaluation, minimize: Any) -> set[str]:
    """The names of the judges whose smallest score is the best."""
    if isinstance(minimize, bool | np.bool_):
        return set(evaluation.scores) if minimize else set()
    names = [minimize] if isinstance(minimize, str) else minimize
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"minimize must be True, False or names of judges, got {minimize!r}")
    return {evaluation.judge_name(name) for name in names}


def _render(context: Mapping[str, Any]) -> str:
    try:
        jinja2 = import_module("jinja2")
    except ImportError as error:
        raise ImportError('report needs Jinja2: pip install "lineas[report]"') from error
    markup = import_module("markupsafe").Markup
    # Both are of lineas, and hold nothing of the evaluation.
    style, script = ((_HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"style": markup(style), "script": markup(script), "script_digest": digest}
    return _template(jinja2).render(**context, **own)


@functools.cache
def _template(jinja2: Any) -> Any:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")
