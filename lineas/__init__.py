"""Steering maps for generative models: sparse affine maps of activations, learnt end to end from unpaired prompts.

Arrays need only NumPy. What runs a model imports torch when it is first asked for; `AffineTransport` imports
scikit-learn, `explore` the widgets of notebooks.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._lazy import lazy_import
from ._threads import get_num_threads, set_num_threads
from ._version import __version__ as __version__
from .arrays import baselines
from .arrays.activation_files import FileArray, open_activations
from .arrays.activation_quantiles import ActivationQuantiles
from .arrays.activations import Activations
from .arrays.closed_form import fit
from .arrays.gate import fit_gate
from .arrays.gaussian import GaussianMap, bures_map, covariance
from .arrays.moments import Moments, moments
from .arrays.quantiles import Quantiles, quantiles
from .arrays.sparse_path import sparse_path
from .arrays.wasserstein import prox_sparse_group, wasserstein, wasserstein_grad
from .maps.affine import AffineMap
from .maps.files import load
from .maps.gates import Gate, NeuronGate
from .maps.path import SparsePath
from .maps.steering import SteeringMaps

if TYPE_CHECKING:
    from .arrays.estimator import AffineTransport
    from .evaluation import judges
    from .evaluation.calibrate import Calibration
    from .evaluation.diagnosis import Diagnosis
    from .evaluation.result import Evaluation
    from .evaluation.sweep import evaluate
    from .fitting.end_to_end import fit_end_to_end, fit_jointly
    from .fitting.incremental import fit_incremental
    from .fitting.result import EndToEndPath, FitResult
    from .fitting.sequence import fit_sequence
    from .fitting.sequence_result import SequenceHandle, SequenceResult
    from .fitting.sparse_path import sparse_path_end_to_end
    from .hooks.attach import Handle, attached, detach
    from .hooks.collect import collect
    from .hooks.fit_gates import fit_gates
    from .hooks.sites import Sites, sites
    from .hooks.tokens import Tokens
    from .notebook import plot
    from .notebook.explorer import Explorer as explore
    from .notebook.tokens import plot_gate

# Name: the module of lineas it is in, its name there, and the package without which it is not.
_LAZY = {
    "AffineTransport": ("arrays.estimator", "AffineTransport", "sklearn"),
    "Calibration": ("evaluation.calibrate", "Calibration", "torch"),
    "Diagnosis": ("evaluation.diagnosis", "Diagnosis", "torch"),
    "EndToEndPath": ("fitting.result", "EndToEndPath", "torch"),
    "Evaluation": ("evaluation.result", "Evaluation", "torch"),
    "FitResult": ("fitting.result", "FitResult", "torch"),
    "Handle": ("hooks.attach", "Handle", "torch"),
    "SequenceHandle": ("fitting.sequence_result", "SequenceHandle", "torch"),
    "SequenceResult": ("fitting.sequence_result", "SequenceResult", "torch"),
    "Sites": ("hooks.sites", "Sites", "torch"),
    "Tokens": ("hooks.tokens", "Tokens", "torch"),
    "attached": ("hooks.attach", "attached", "torch"),
    "collect": ("hooks.collect", "collect", "torch"),
    "collect_quantiles": ("hooks.collect", "collect_quantiles", "torch"),
    "detach": ("hooks.attach", "detach", "torch"),
    "evaluate": ("evaluation.sweep", "evaluate", "torch"),
    "explore": ("notebook.explorer", "Explorer", "anywidget"),
    "fit_end_to_end": ("fitting.end_to_end", "fit_end_to_end", "torch"),
    "fit_gates": ("hooks.fit_gates", "fit_gates", "torch"),
    "fit_incremental": ("fitting.incremental", "fit_incremental", "torch"),
    "fit_jointly": ("fitting.end_to_end", "fit_jointly", "torch"),
    "fit_sequence": ("fitting.sequence", "fit_sequence", "torch"),
    "judges": ("evaluation.judges", None, "numpy"),
    "plot": ("notebook.plot", None, "matplotlib"),
    "plot_gate": ("notebook.tokens", "plot_gate", "matplotlib"),
    "sites": ("hooks.sites", "sites", "torch"),
    "sparse_path_end_to_end": ("fitting.sparse_path", "sparse_path_end_to_end", "torch"),
}

__all__ = [
    "ActivationQuantiles",
    "Activations",
    "AffineMap",
    "AffineTransport",
    "Calibration",
    "Diagnosis",
    "EndToEndPath",
    "Evaluation",
    "FileArray",
    "FitResult",
    "Gate",
    "GaussianMap",
    "Handle",
    "Moments",
    "NeuronGate",
    "Quantiles",
    "SequenceHandle",
    "SequenceResult",
    "Sites",
    "SparsePath",
    "SteeringMaps",
    "Tokens",
    "attached",
    "baselines",
    "bures_map",
    "collect",
    "collect_quantiles",
    "covariance",
    "detach",
    "evaluate",
    "explore",
    "fit",
    "fit_end_to_end",
    "fit_gate",
    "fit_gates",
    "fit_incremental",
    "fit_jointly",
    "fit_sequence",
    "get_num_threads",
    "judges",
    "load",
    "moments",
    "open_activations",
    "plot",
    "plot_gate",
    "prox_sparse_group",
    "quantiles",
    "set_num_threads",
    "sites",
    "sparse_path",
    "sparse_path_end_to_end",
    "wasserstein",
    "wasserstein_grad",
]
for _name, (*_, _package) in _LAZY.items():
    if find_spec(_package) is None:  # then star imports and help(), which ask for every name, do without it
        __all__.remove(_name)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute, _ = _LAZY[name]
    globals()[name] = value = lazy_import(module, attribute)  # asked for once only
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
