"""Closed-form maps from arrays: no model, no iterations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import (
    as_engine,
    as_mass,
    as_not_negative,
    as_sample,
    as_strength,
    check_dense,
    is_tensor,
    result_dtype,
    same_working_type,
    widen,
    working_dtype,
)
from ._threads import get_num_threads
from .maps import AffineMap, SteeringMaps

METHODS = ("mean", "gaussian", "linear")

Weights = ArrayLike | Mapping[str, ArrayLike] | None


def _mass(weights: Weights, module: str | None, rows: int, argument: str) -> NDArray | None:
    """Row weights of one module, where `weights` is one array for all modules or one for each."""
    if weights is None:
        return None
    if module is not None and isinstance(weights, Mapping):
        return as_mass(weights[module], rows, f"{argument}[{module!r}]")
    return as_mass(weights, rows, argument)


def _check_names(wanted: Sequence[str], seen: Mapping[str, Any], argument: str) -> None:
    missing = [name for name in wanted if name not in seen]
    extra = [name for name in seen if name not in wanted]
    if missing or extra:
        parts = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"it also has {', '.join(map(repr, extra))}"] if extra else []
        raise ValueError(f"{argument} must have the modules of source: {', '.join(parts)}")


@overload
def fit(
    source: ArrayLike,
    target: ArrayLike,
    *,
    method: str = "linear",
    l1: float = 0.0,
    group: float = 0.0,
    source_weights: ArrayLike | None = None,
    target_weights: ArrayLike | None = None,
) -> AffineMap: ...


@overload
def fit(
    source: Mapping[str, ArrayLike],
    target: Mapping[str, ArrayLike],
    *,
    method: str = "linear",
    l1: float = 0.0,
    group: float = 0.0,
    source_weights: Weights = None,
    target_weights: Weights = None,
) -> SteeringMaps: ...


def fit(
    source: ArrayLike | Mapping[str, ArrayLike],
    target: ArrayLike | Mapping[str, ArrayLike],
    *,
    method: str = "linear",
    l1: float = 0.0,
    group: float = 0.0,
    source_weights: Weights = None,
    target_weights: Weights = None,
) -> AffineMap | SteeringMaps:
    """Fit maps that move source activations to target activations, one slope and one shift a neuron, in closed form.

    Parameters
    ----------
    source : array_like, torch.Tensor or Mapping
        Activations [n, d], one row a prompt, n >= 2; or a mapping from module name to such an array (as
        `lineas.collect` returns it), in execution order. float16, bfloat16, float32 or float64.
    target : array_like, torch.Tensor or Mapping
        Activations [m, d] to move to, m >= 2; a mapping has the same names. Rows are not paired; n and m may differ.
    method : {"linear", "gaussian", "mean"}, default "linear"
        "linear": the least-squares line through the quantiles, ``w = cov(u_(), v_()) / var(u)`` (Lin-AcT,
        arXiv 2410.23054); exact for unequal sizes, through the overlaps of the two quantile functions.
        "gaussian": ``w = sd(v) / sd(u)``. "mean": ``w = 1``. The means match in all three. A source neuron that is
        constant gets ``w = 1``.
    l1, group : float, default 0.0
        Penalties of the linear map: ``l1 (|w - 1|_1 + |b|_1) + group sqrt(d) (||w - 1||_2 + ||b||_2)`` for each module
        of d neurons, added to the sum over its neurons of the squared 2-Wasserstein distance. Zeros are exact and
        w >= 0: one point of `lineas.sparse_path`.
    source_weights, target_weights : array_like or Mapping, optional
        Weights of the rows, one array for all modules or a mapping with the names of `source`: not negative, with a
        positive sum. Standard deviations use ddof = 1, on a weighted side the weighted population variance.

    Returns
    -------
    AffineMap or SteeringMaps
        An `AffineMap` for one array, `SteeringMaps` in the order of `source` for a mapping. float64 where the
        activations of a module (either side) are float64, else float32.

    Raises
    ------
    TypeError
        If a dtype is not one of the four, or one of `source` and `target` is a mapping and the other is not.
    ValueError
        If names, shapes or weights do not fit, there are fewer than 2 rows, a value is not finite (module, row and
        column are named), `method` is unknown, or a penalty is negative, not finite, or not for `method`.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> source = np.array([[0.0], [1.0], [2.0]])
    >>> lineas.fit(source, 3 * source + 1).transform(np.array([[10.0]]))
    array([[31.]])
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    l1, group = as_not_negative(l1, "l1"), as_not_negative(group, "group")
    if (l1 or group) and method != "linear":
        raise ValueError(f"l1 and group are penalties of method 'linear', got method {method!r}")
    pairs = paired_samples(source, target, source_weights, target_weights)
    metadata: dict[str, Any] = {"method": method}
    if l1 or group:
        metadata |= {"l1": l1, "group": group}
        fitted = _fit_sparse(pairs, l1, group)
    else:
        fitted = _fit_batches(pairs, method)
    if None in fitted:
        return fitted[None]
    from . import __version__

    return SteeringMaps({module: fitted[module] for module in pairs}, {**metadata, "version": __version__})


# Module, source, target, weights of both, names of both for messages.
Pair = tuple[Any, NDArray, NDArray, NDArray | None, NDArray | None, str, str]


def paired_samples(
    source: ArrayLike | Mapping[str, ArrayLike],
    target: ArrayLike | Mapping[str, ArrayLike],
    source_weights: Weights,
    target_weights: Weights,
    prefix: str = "",
) -> dict[Any, tuple]:
    """Check the samples of `fit`: by module (None for one array) (source, target, weights of both, names of both).

    `prefix` goes before the names of the arguments in messages.
    """
    one = not isinstance(source, Mapping)
    if one != (not isinstance(target, Mapping)):
        kinds = f"{type(source).__name__} and {type(target).__name__}"
        raise TypeError(f"{prefix}source and target must both be arrays or both be mappings, got {kinds}")
    for argument, given in (("source_weights", source_weights), ("target_weights", target_weights)):
        if isinstance(given, Mapping):
            if not isinstance(source, Mapping):
                raise TypeError(f"{argument} must be an array where source is one, got a mapping")
            _check_names(list(source), given, argument)
    sources: Mapping[Any, Any] = {None: source}
    targets: Mapping[Any, Any] = {None: target}
    if isinstance(source, Mapping) and isinstance(target, Mapping):
        if not source:
            raise ValueError(f"{prefix}source must hold at least one module")
        _check_names(list(source), target, f"{prefix}target")
        sources, targets = source, target
    pairs = {}
    for module, x in sources.items():
        at = "" if module is None else f"[{module!r}]"
        u_name, v_name = f"{prefix}source{at}", f"{prefix}target{at}"
        u, v = as_sample(x, u_name, min_rows=2), as_sample(targets[module], v_name, min_rows=2)
        if u.shape[1] != v.shape[1]:
            raise ValueError(
                f"{u_name} and {v_name} must have the same number of columns, got shapes {u.shape} and {v.shape}"
            )
        u, v = same_working_type(u, v)
        u_mass = _mass(source_weights, module, len(u), "source_weights")
        v_mass = _mass(target_weights, module, len(v), "target_weights")
        pairs[module] = (u, v, u_mass, v_mass, u_name, v_name)
    return pairs


def by_working_type(pairs: Mapping[Any, tuple]) -> dict[np.dtype, list[Pair]]:
    """The modules of each working type: the engine takes many in one call, but of one type."""
    batches: dict[np.dtype, list[Pair]] = {}
    for module, pair in pairs.items():
        batches.setdefault(working_dtype(pair[0]), []).append((module, *pair))
    return batches


def _fit_batches(pairs: Mapping[Any, tuple], method: str) -> dict[Any, AffineMap]:
    """The closed-form maps by module."""
    fitted = {}
    for batch in by_working_type(pairs).values():
        modules, us, vs, u_masses, v_masses, u_names, v_names = (list(column) for column in zip(*batch, strict=True))
        weights, biases = _core.fit_local(us, vs, u_masses, v_masses, method, u_names, v_names, get_num_threads())
        for module, weight, bias, name in zip(modules, weights, biases, u_names, strict=True):
            try:
                fitted[module] = AffineMap(weight, bias)
            except ValueError as error:
                raise ValueError(f"the map of {name} overflows {weight.dtype}: {error}") from None
    return fitted


def moments_of(pairs: Mapping[Any, tuple]) -> list[NDArray]:
    """The moments [5, d] of the modules' paired quantiles, as `paired_samples` gives the samples."""
    moments: dict[Any, NDArray] = {}
    for batch in by_working_type(pairs).values():
        modules, us, vs, u_masses, v_masses, u_names, v_names = (list(column) for column in zip(*batch, strict=True))
        out = _core.quantile_moments(us, vs, u_masses, v_masses, u_names, v_names, get_num_threads())
        for module, one, name in zip(modules, out, u_names, strict=True):
            if not np.isfinite(one).all():
                raise ValueError(f"the squares of {name} or its target overflow float64")
            moments[module] = one
    return [moments[module] for module in pairs]


def _fit_sparse(pairs: Mapping[Any, tuple], l1: float, group: float) -> dict[Any, AffineMap]:
    """One point of the sparse path by module."""
    ratio, penalty = l1 / (l1 + group), np.array([l1 + group])
    fitted = {}
    for module, one in zip(pairs, moments_of(pairs), strict=True):
        largest = float(_core.largest_penalty([one], ratio)[0])
        is_double = pairs[module][0].dtype == np.float64
        weight, bias = _core.sparse_path([one], None, penalty, ratio, is_double, largest, get_num_threads())[:2]
        fitted[module] = AffineMap(weight[0], bias[0])
    return fitted


def covariance(x: ArrayLike, *, weights: ArrayLike | None = None) -> NDArray:
    """Covariance matrix of the columns of a sample, computed in float64 by OpenBLAS.

    Parameters
    ----------
    x : array_like or torch.Tensor
        [n, d], n >= 2; float16, bfloat16, float32 or float64.
    weights : array_like, optional
        Weights of the rows [n]: not negative, with a positive sum.

    Returns
    -------
    ndarray
        float64 [d, d], symmetric; ddof = 1, with `weights` the weighted population covariance.

    Raises
    ------
    TypeError
        If the dtype is another one.
    ValueError
        If shapes do not fit, a value is not finite (its row and column are named), or the weights are not weights.
    """
    x = as_sample(x, "x", min_rows=2)
    return _core.covariance(x, None if weights is None else as_mass(weights, len(x), "weights"), "x")[1]


@dataclass(frozen=True, eq=False)
class GaussianMap:
    """A map that mixes neurons: T(z) = matrix z + bias.

    Parameters
    ----------
    matrix : ndarray
        float64 [d, d].
    bias : ndarray
        float64 [d].
    """

    matrix: NDArray
    bias: NDArray

    def __post_init__(self) -> None:
        matrix, bias = as_engine(self.matrix, "matrix"), as_engine(self.bias, "bias")
        if matrix.dtype != np.float64 or bias.dtype != np.float64:
            raise TypeError(f"matrix and bias must be float64, got dtypes {matrix.dtype} and {bias.dtype}")
        if bias.ndim != 1 or matrix.shape != bias.shape * 2:
            raise ValueError(f"matrix and bias must have shapes [d, d] and [d], got {matrix.shape} and {bias.shape}")
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "bias", bias)

    def __repr__(self) -> str:
        return f"GaussianMap(d={self.bias.size})"

    def transform(self, z: Any, strength: float = 1.0) -> Any:
        """Apply the map at a strength along the last axis: z + strength (matrix z + bias - z).

        Parameters
        ----------
        z : array_like or torch.Tensor
            [..., d]; float16, bfloat16, float32 or float64.
        strength : float, default 1.0
            0 is off, 1 the map.

        Returns
        -------
        ndarray or torch.Tensor
            A new array or tensor with the shape and dtype of `z`. Computed in float32, for float64 `z` in float64,
            and rounded once.

        Raises
        ------
        TypeError
            If the dtype of `z` is another one, or `strength` is not a real number.
        ValueError
            If the last axis of `z` is not d long, or `strength` is not finite.
        """
        s = as_strength(strength)
        matrix, bias = (1 - s) * np.eye(self.bias.size) + s * self.matrix, s * self.bias
        if is_tensor(z):
            import torch

            from .models.autograd import working_dtype as torch_working_dtype

            check_dense(z, "z")
            self._check_width(tuple(z.shape))
            dtype = torch_working_dtype(z.dtype)
            slopes, shifts = (torch.from_numpy(x).to(z.device, dtype) for x in (matrix, bias))
            return (z.to(dtype) @ slopes.mT + shifts).to(z.dtype)
        array = as_engine(z, "z")
        self._check_width(array.shape)
        work = widen(array)
        out = work @ matrix.T.astype(work.dtype) + bias.astype(work.dtype)
        return out.astype(result_dtype(z, array), copy=False)

    def _check_width(self, shape: tuple[int, ...]) -> None:
        if not shape or shape[-1] != self.bias.size:
            raise ValueError(f"z must have {self.bias.size} channels on the last axis, got shape {shape}")

    def inverse(self) -> "GaussianMap":
        """Return the map that undoes this one at strength 1.

        Raises
        ------
        ValueError
            If the matrix is singular, which it is where the source had fewer rows than neurons and no ridge.
        """
        d = self.bias.size
        if np.linalg.matrix_rank(self.matrix) < d:
            raise ValueError(f"the map has no inverse: its matrix of {d} neurons is singular; fit it with a ridge > 0")
        matrix = np.linalg.inv(self.matrix)
        return GaussianMap(matrix, -matrix @ self.bias)


def bures_map(source: ArrayLike, target: ArrayLike, *, ridge: float = 0.0) -> GaussianMap:
    """The optimal transport map between the Gaussians with the means and covariances of two samples.

    z -> A (z - mean(source)) + mean(target) with A symmetric and A cov(source) A = cov(target)
    (Dowson and Landau 1982). Unlike the maps of `fit` it also matches the correlations of neurons.

    Parameters
    ----------
    source, target : array_like or torch.Tensor
        Samples [n, d] and [m, d], n, m >= 2; float16, bfloat16, float32 or float64.
    ridge : float, default 0.0
        Added to the variances of both. Directions in which the source has none are otherwise mapped to the mean of
        the target; with fewer rows than neurons there always are some.

    Returns
    -------
    GaussianMap
        ``matrix`` [d, d] and ``bias`` [d], float64.

    Raises
    ------
    TypeError
        If a dtype is another one, or `ridge` is not a real number.
    ValueError
        If shapes do not fit, a value is not finite, or `ridge` is negative or not finite.
    """
    u, v = as_sample(source, "source", min_rows=2), as_sample(target, "target", min_rows=2)
    if u.shape[1] != v.shape[1]:
        raise ValueError(f"source and target must have the same number of columns, got shapes {u.shape} and {v.shape}")
    ridge = as_not_negative(ridge, "ridge")
    mean_u, cov_u = _core.covariance(u, None, "source")
    mean_v, cov_v = _core.covariance(v, None, "target")
    matrix = _core.bures_map(cov_u, cov_v, ridge)
    return GaussianMap(matrix, mean_v - matrix @ mean_u)
