"""A sound call of every function of the extension, for tests that vary it."""

import os
import sys

import numpy as np

from lineas import _core
from lineas.arrays.quantiles import FILLED, MOST_SLOTS

# A child process imports what this one imports: the installed package, not a checkout that lies around it.
SAME_PATH = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def ones(*shape, dtype=np.float64):
    return np.ones(shape, dtype)


def schedule(filled=4):
    """The schedule of a summary that holds a few rows in its first slot."""
    array = np.zeros(MOST_SLOTS + 3, np.int64)
    array[FILLED] = filled
    return array


def sound(name, d=3):
    """Arguments of a sound call of one function, in order, on arrays of d columns."""
    rows, other, vector, z = ones(4, d), ones(5, d), ones(d), ones(2, d, 4)
    tokens, threads = ones(2, 4, dtype=np.uint8), {"threads": 1}
    state = {"mean": np.zeros(d), "m2": np.zeros(d), "low": np.full(d, np.inf), "high": np.full(d, -np.inf)}
    summary = {"count": 4} | state | {"keys": np.zeros((-(-d // 8), 4, 32, 8), np.int64), "schedule": schedule()}
    other_summary = {f"{key}_b": np.copy(value) if np.ndim(value) else value for key, value in summary.items()}
    pair = {"u": [rows], "v": [other], "weight": [vector], "bias": [ones(d)], "u_mass": None, "v_mass": None}
    flat = {part: ones(2 + d) for part in ("weight", "bias", "grad_weight", "grad_bias")}
    penalties = {"lr": 0.1, "l1": 0.1, "group": 0.1, "l1_bias": 0.1, "group_bias": 0.1}
    fit = {"source": [rows], "target": [other], "source_mass": None, "target_mass": None, "method": "linear"}
    return {
        "sort_columns": {"samples": [rows], "names": ["x"]} | threads,
        "wasserstein": pair | {"v_sorted": False, "gradient": 2, "u_names": ["u"], "v_names": ["v"]} | threads,
        "affine_apply": {"z": z, "weight": vector, "bias": ones(d), "strength": 0.5} | threads,
        "affine_backward": {"z": z, "weight": vector, "strength": 0.5, "grad_out": z, "need_z": True} | threads,
        "pool": {"x": ones(2, 4, d), "mask": tokens, "mode": "mean"} | threads,
        "pool_backward": {"grad_out": ones(2, d), "mask": tokens, "mode": "mean", "index": None, "tokens": 4} | threads,
        "moments_update": {"x": rows, "count": 0} | state | {"name": "x"} | threads,
        "moments_merge": {"count": 1} | state | {"count_b": 2} | {f"{key}_b": ones(d) for key in state},
        "quantiles_update": {"x": rows} | summary | {"name": "x"} | threads,
        "quantiles_merge": summary | other_summary | threads,
        "quantiles_rows": summary | threads,
        "quantiles_read": summary | {"ranks": np.array([1, 3]), "parts": 1} | threads,
        "prox_sparse_group": {"x": vector, "tau": 1.0, "l1": 1.0, "group": 1.0},
        "step": flat | {"offsets": np.array([0, 2, 2 + d])} | penalties | {"adam": None} | threads,
        "fit_local": fit | {"source_names": ["u"], "target_names": ["v"]} | threads,
        "quantile_moments": {key: value for key, value in fit.items() if key != "method"}
        | {"source_names": ["u"], "target_names": ["v"]}
        | threads,
        "largest_penalty": {"moments": [ones(5, d)], "l1_ratio": 0.5},
        "sparse_path": {"moments": [ones(5, d)], "held_out": [ones(5, d)], "penalties": np.array([2.0, 1.0])}
        | {"l1_ratio": 0.5, "double": True, "largest": 1.0}
        | threads,
        "covariance": {"x": rows, "mass": None, "name": "x"},
        "bures_map": {"cov_source": np.eye(d), "cov_target": np.eye(d), "ridge": 0.0},
    }[name]


def call(name, /, **changes):
    """The sound call with some arguments changed."""
    arguments = sound(name)
    assert changes.keys() <= arguments.keys()
    return getattr(_core, name)(*(arguments | changes).values())


NAMES = [name for name in dir(_core) if not name.startswith("_") and name not in ("cpu", "blas")]


def flat(value):
    """The leaves of nested lists and tuples; of an exception its text."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in flat(part)]
    return [repr(value)] if isinstance(value, Exception) else [value]


def arrays_in(value):
    return [leaf for leaf in flat(value) if isinstance(leaf, np.ndarray)]


def bits(value):
    """What two results or arguments have in common exactly if they are equal to the last bit."""
    return [(x.dtype.str, x.shape, x.tobytes()) if isinstance(x, np.ndarray) else repr(x) for x in flat(value)]
