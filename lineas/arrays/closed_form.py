"""Closed-form maps from arrays: no model, no iterations."""

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._checks import as_choice, as_not_negative, working_dtype
from .._threads import get_num_threads
from ..maps.affine import AffineMap
from ..maps.metadata import describe
from ..maps.steering import SteeringMaps
from .activations import origin
from .samples import MEMORY, Pair, Sample, Samples, Weights, as_maps, by_working_type, moments_of, paired_samples
from .shrinkage import as_shrinkage, shrunk
from .summaries import map_of

METHODS = ("mean", "gaussian", "linear")


class _Settings(TypedDict, total=False):
    """What `fit` takes besides samples, for its overloads."""

    method: str
    l1: float
    group: float
    shrinkage: float | str | None
    source_weights: Weights
    target_weights: Weights
    memory: int


@overload
def fit(source: Sample, target: Sample, **settings: Unpack[_Settings]) -> AffineMap: ...


@overload
def fit(source: Mapping[str, Sample], target: Mapping[str, Sample], **settings: Unpack[_Settings]) -> SteeringMaps: ...


def fit(
    source: Samples,
    target: Samples,
    *,
    method: str = "linear",
    l1: float = 0.0,
    group: float = 0.0,
    shrinkage: float | str | None = None,
    source_weights: Weights = None,
    target_weights: Weights = None,
    memory: int = MEMORY,
) -> AffineMap | SteeringMaps:
    """Fit maps that move source activations to target activations, one slope and one shift a neuron, in closed form.

    Parameters
    ----------
    source : array_like, torch.Tensor, Quantiles, dask.array.Array or Mapping
        Activations [n, d], one row a prompt, n >= 2; or a mapping from module name to such an array (as
        `lineas.collect` or `lineas.collect_quantiles` returns it), in execution order. float16, bfloat16, float32,
        float64 or integers. Of more than memory holds: a `Quantiles` that has seen them, an iterator of blocks of rows,
        a memory map, a dask array, or what `lineas.open_activations` finds in files; docs/quantiles.md says how close
        the maps are, docs/large-data.md how the data are read.
    target : array_like, torch.Tensor, Quantiles, dask.array.Array or Mapping
        Activations [m, d] to move to, m >= 2; a mapping has the same names. Rows are not paired; n and m may differ.
    method : {"linear", "gaussian", "mean"}, default "linear"
        "linear": the least-squares line through the quantiles, ``w = cov(u_(), v_()) / var(u)`` (Lin-AcT,
        arXiv 2410.23054); exact for unequal sizes, through the overlaps of the two quantile functions.
        "gaussian": ``w = sd(v) / sd(u)``. "mean": ``w = 1``. The means match in all three. A source neuron that is
        constant up to rounding gets ``w = 1``.
    l1, group : float, default 0.0
        Penalties of the linear map: ``l1 (|w - 1|_1 + |b|_1) + group sqrt(d) (||w - 1||_2 + ||b||_2)`` for each module
        of d neurons, added to the sum over its neurons of the squared 2-Wasserstein distance. Zeros are exact and
        w >= 0: one point of `lineas.sparse_path`.
    shrinkage : None, "auto" or float, default None
        How much of the map is held back, since with few rows means and spreads differ by chance as well. A number from
        0 (nothing) to 1 (the identity): the map at strength 1 - `shrinkage`. "auto": two factors, of the change
        of the means and of the slopes less 1, in closed form from the variances of the samples (James and Stein 1961;
        see Notes). Not together with penalties.
    source_weights, target_weights : array_like or Mapping, optional
        Weights of the rows, one array for all modules or a mapping with the names of `source`: not negative, with a
        positive sum. Standard deviations use ddof = 1, on a weighted side the weighted population variance. A row of
        weight 0 is not there, whatever it holds.
    memory : int, default 2**30
        Bytes for the values kept of the two sides of a module that are read as a stream, in one pass: iterators, memory
        maps (`numpy.memmap`) of more bytes than that, and, if all of them together take more, dask arrays and what else
        is read by slices (files, datasets of h5py and zarr). While all rows fit, the maps are those of the arrays.

    Returns
    -------
    AffineMap or SteeringMaps
        An `AffineMap` for one array, `SteeringMaps` in the order of `source` for a mapping. float64 where the
        activations of a module (either side) are float64 or integers, else float32. Their metadata take over from
        `Activations` what these were collected from: attached, they act on the tokens that they were fitted to. If
        values were left out of a stream, they hold the largest `Quantiles.rank_error` as "rank_error".

    Notes
    -----
    Constant up to rounding means a variance of at most ``n e var + (n e mean)^2 + (s mean)^2`` with e = 2^-52: what
    scikit-learn expects of sums of n rows in float64, and values one step of their type apart, s = 2^-23 for float32,
    2^-52 for float64, 2^-10 for float16 and 2^-7 for bfloat16. A source that is converted, since its target is float64
    and it is not, counts as float64.

    With ``shrinkage="auto"`` a map takes z to ``mean(u) + c (mean(v) - mean(u)) + (1 + k (w - 1)) (z - mean(u))``. For
    one module ``c = max(0, 1 - sum(var(u) / n + var(v) / m) / sum((mean(v) - mean(u))^2))``, sums over its neurons: the
    factor with the lowest expected squared distance from the target's means, numerator and denominator estimated
    without bias however neurons are correlated. ``k = max(0, 1 - sum(var(u) s) / sum(var(u) (w - 1)^2))`` is the same
    for the slopes, of which ``s = w^2 / 4 ((K(u) - 1) / (n - 1) + (K(v) - 1) / (m - 1))`` is the sampling variance
    (delta method, for distributions of one shape) and K the mean kurtosis of the neurons. Of several modules the
    medians of c and k are taken. With weights n and m are Kish's effective numbers of rows. As n and m grow, c and k
    go to 1. docs/sample-sizes.md has what it gains.

    Samples may have any scale; l1 and group are for samples whose squares are in the
    range of float64.

    Raises
    ------
    TypeError
        If a dtype is another one, or one of `source` and `target` is a mapping and the other is not.
    ValueError
        If names, shapes or weights do not fit, there are fewer than 2 rows, a value is not finite (module, row and
        column are named), `method` is unknown, a penalty is negative, not finite, or not for `method`, `shrinkage` is
        out of range, comes with penalties, or is "auto" where a side has a single row with a weight, both are
        `Activations` of different models, tokens or poolings, or weights or `shrinkage` come with a `Quantiles`.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> source = np.array([[0.0], [1.0], [2.0]])
    >>> lineas.fit(source, 3 * source + 1).transform(np.array([[10.0]]))
    array([[31.]])
    """
    as_choice(method, "method", METHODS)
    l1, group = as_not_negative(l1, "l1"), as_not_negative(group, "group")
    if (l1 or group) and method != "linear":
        raise ValueError(f"l1 and group are penalties of method 'linear', got method {method!r}")
    shrinkage = as_shrinkage(shrinkage)
    if (l1 or group) and shrinkage is not None:
        raise ValueError(f"shrinkage is for maps without penalties, got l1={l1:g} and group={group:g}")
    pairs = paired_samples(source, target, source_weights, target_weights, memory=memory)
    metadata = describe(method, **origin({"source": source, "target": target}))
    if l1 or group:
        return as_maps(pairs, _fit_sparse(pairs, l1, group), metadata | {"l1": l1, "group": group})

    def kernel(us: list, vs: list, u_masses: list, v_masses: list, *names_and_threads: Any) -> Iterable[Any]:
        return zip(*_core.fit_local(us, vs, u_masses, v_masses, method, *names_and_threads), strict=True)

    if shrinkage is not None and any(pair.moments is not None for pair in pairs.values()):
        raise ValueError(
            "shrinkage is for arrays, got Quantiles or a stream: after so many rows little is left to chance"
        )
    found = by_working_type(pairs, kernel)
    for module, pair in pairs.items():
        if pair.moments is not None:
            found[module] = map_of(pair.moments, pair.counts, method, working_dtype(pair.u))
    found = {module: found[module] for module in pairs}
    if shrinkage is not None:
        found = shrunk(pairs, found, shrinkage)
        metadata |= {"shrinkage": shrinkage}
    return as_maps(pairs, found, metadata)


def _fit_sparse(pairs: Mapping[Any, Pair], l1: float, group: float) -> dict[Any, tuple[NDArray, NDArray]]:
    """One point of the sparse path by module."""
    ratio, penalty = l1 / (l1 + group), np.array([l1 + group])
    found = {}
    for (module, pair), moments in zip(pairs.items(), moments_of(pairs), strict=True):
        largest, is_double = float(_core.largest_penalty([moments], ratio)[0]), pair.u.dtype == np.float64
        weight, bias = _core.sparse_path([moments], None, penalty, ratio, is_double, largest, get_num_threads())[:2]
        found[module] = weight[0], bias[0]
    return found
