"""Sparse paths of arrays: every penalty solved exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import _core
from .._checks import as_falling, as_int, as_pair, as_positive, as_share
from .._threads import get_num_threads
from .._warn import warn
from ..maps.metadata import describe
from ..maps.path import SparsePath
from .activations import origin
from .samples import MEMORY, Samples, Weights, check_modules, moments_of, paired_samples, rank_error_of


def sparse_path(
    source: Samples,
    target: Samples,
    *,
    n_penalties: int = 50,
    min_ratio: float = 1e-3,
    l1_ratio: float = 1.0,
    penalties: ArrayLike | None = None,
    held_out: tuple[Any, Any] | None = None,
    source_weights: Weights = None,
    target_weights: Weights = None,
    memory: int = MEMORY,
) -> SparsePath:
    """Fit the maps of all penalties at once: the exact minima of the distance plus a sparse group lasso.

    For each penalty p the maps minimise, over slopes w >= 0 and shifts b,

        sum_l [ sum_j W2_lj + p (l1_ratio (|w_l - 1|_1 + |b_l|_1)
                                 + (1 - l1_ratio) sqrt(d_l) (||w_l - 1||_2 + ||b_l||_2)) ]

    with W2_lj the squared 2-Wasserstein distance of neuron j of module l between the mapped source and the target
    (LinEAS, arXiv 2503.10679, eq. 4 and 6, for one module at a time instead of through the model). Slopes do not become
    negative, so the order of the source stays, and each neuron depends on the data by five moments alone.

    Parameters
    ----------
    source, target : array_like, torch.Tensor, Quantiles, dask.array.Array or Mapping
        Activations [n, d] and [m, d], or mappings from module name to such arrays, or streams of more than memory
        holds, as in `lineas.fit`.
    n_penalties : int, default 50
        The number of points, from the smallest penalty that leaves every neuron alone down to `min_ratio` of it,
        evenly on a logarithmic scale. At least 2.
    min_ratio : float, default 1e-3
        The last penalty over the first; above 0 and below 1.
    l1_ratio : float, default 1.0
        The share of the l1 penalty, from 0 (whole modules only) to 1 (single neurons only, wherever they are). At 1
        neurons come in one by one, so that the path has maps of any support; a share of the group penalty keeps the
        neurons of a module out until many come at once.
    penalties : array_like, optional
        The penalties themselves, falling and above 0, instead of `n_penalties` and `min_ratio`.
    held_out : (source, target), optional
        Two more sets, as `source` and `target`, on which each point's distance is taken; ``path.at(best=True)`` is the
        point with the least.
    source_weights, target_weights : array_like or Mapping, optional
        Weights of the rows, as in `lineas.fit`.
    memory : int, default 2**30
        Bytes for what is kept of streams, as in `lineas.fit`.

    Returns
    -------
    SparsePath

    Raises
    ------
    TypeError
        If a dtype is another one, one of `source` and `target` is a mapping and the other is not, or a setting
        is of another type.
    ValueError
        If names, shapes or weights do not fit, there are fewer than 2 rows, a value is not finite (module, row and
        column are named), a setting is out of range, the source already has the quantiles of the target, so that no
        penalty is needed, or the data (float64, beyond about 1e45 or 1e-45) are so large or small that products of
        penalties leave float64.

    Warns
    -----
    RuntimeWarning
        If rounding keeps a solution further than 1e-8 (relative to the largest penalty) from optimal.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> rng = np.random.default_rng(0)
    >>> source = rng.normal(size=(32, 100))
    >>> target = rng.normal(size=(32, 100)) + np.where(np.arange(100) < 5, 3.0, 0.0)
    >>> path = lineas.sparse_path(source, target)
    >>> np.flatnonzero(path.at(support=5).bias)
    array([0, 1, 2, 3, 4])
    """
    l1_ratio = as_share(l1_ratio, "l1_ratio")
    pairs = paired_samples(source, target, source_weights, target_weights, memory=memory)
    moments, trial_moments = moments_of(pairs), None
    samples = {"source": source, "target": target}
    if held_out is not None:
        held_source, held_target = as_pair(held_out, "held_out")
        samples |= {"held_out source": held_source, "held_out target": held_target}
        if isinstance(held_source, Mapping) != isinstance(source, Mapping):
            raise TypeError("held_out must hold mappings where source is one, and arrays where it is an array")
        trials = paired_samples(held_source, held_target, prefix="held_out ", memory=memory)
        check_modules(list(pairs), trials, "held_out")
        for module, pair in pairs.items():
            d, trial = pair.u.shape[1], trials[module]
            if trial.u.shape[1] != d:
                raise ValueError(f"{trial.u_name} must have {d} columns like {pair.u_name}, got {trial.u.shape[1]}")
        trial_moments = moments_of({module: trials[module] for module in pairs})
    metadata = describe("sparse linear", **origin(samples), l1_ratio=l1_ratio) | rank_error_of(pairs)
    largest = float(np.max(_core.largest_penalty(moments, l1_ratio)))
    if not largest > 0:
        raise ValueError("source already has the quantiles of target: no penalty changes anything")
    if not 2.0**-300 <= largest <= 2.0**300:
        raise ValueError(
            f"source and target are too {'large' if largest > 1 else 'small'}: the largest penalty is {largest:.6g}, "
            "and products of it are out of the range of float64; scale both"
        )
    if penalties is None:
        n_penalties = as_int(n_penalties, "n_penalties", low=2)
        min_ratio = as_positive(min_ratio, "min_ratio")
        if min_ratio >= 1:
            raise ValueError(f"min_ratio must be below 1, got {min_ratio}")
        grid = np.geomspace(largest, largest * min_ratio, n_penalties)
    else:
        grid = as_falling(penalties, "penalties")
    is_double = any(pair.u.dtype == np.float64 for pair in pairs.values())
    weight, bias, loss, held_out_loss, distance, support = _core.sparse_path(
        moments, trial_moments, grid, l1_ratio, is_double, largest, get_num_threads()
    )
    residual = np.sqrt(np.sum(distance**2, axis=0)) / largest
    worst = int(np.argmax(residual))
    if residual[worst] > 1e-8:
        warn(
            f"sparse_path: at penalty {grid[worst]:.6g} rounding leaves the solution {residual[worst]:.1g} of the "
            "largest penalty away from optimal: are there neurons whose mean is millions of standard deviations?"
        )
    return SparsePath(
        penalties=grid,
        l1_ratio=l1_ratio,
        loss=loss.sum(axis=0),
        held_out_loss=None if held_out_loss is None else held_out_loss.sum(axis=0),
        modules=None if None in pairs else tuple(pairs),
        widths=tuple(one.shape[1] for one in moments),
        weight=weight,
        bias=bias,
        kkt_residual=residual,
        metadata=metadata,
        moments=moments,
        module_support=support.T,
    )
