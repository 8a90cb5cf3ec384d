"""Covariances and the map between Gaussians that mixes neurons (Bures)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import (
    as_dense,
    as_engine,
    as_finite,
    as_mass,
    as_not_negative,
    as_sample,
    is_tensor,
    result_dtype,
    widen,
)
from ..maps.records import Record
from .samples import two_samples


def covariance(x: ArrayLike, *, weights: ArrayLike | None = None) -> NDArray:
    """Covariance matrix of the columns of a sample, computed in float64 by OpenBLAS.

    Parameters
    ----------
    x : array_like or torch.Tensor
        [n, d], n >= 2; float16, bfloat16, float32, float64 or integers.
    weights : array_like, optional
        Weights of the rows [n]: not negative, with a positive sum.

    Returns
    -------
    ndarray
        float64 [d, d], symmetric; ddof = 1, with `weights` the weighted population covariance. What is too small for
        float64, as of values closer than about 1e-162, is 0.

    Raises
    ------
    TypeError
        If the dtype is another one.
    ValueError
        If shapes do not fit, a value is not finite (its row and column are named), the weights are not weights, or a
        covariance is too large for float64.
    """
    x = as_sample(x, "x", min_rows=2)
    return _core.covariance(x, None if weights is None else as_mass(weights, len(x), "weights"), "x")[1]


@dataclass(frozen=True, eq=False)
class GaussianMap(Record):
    """A map that mixes neurons: T(z) = matrix z + bias. Two are equal if their arrays are; ``save`` writes a file.

    Parameters
    ----------
    matrix : ndarray
        float64 [d, d].
    bias : ndarray
        float64 [d].
    """

    FORMAT = "lineas gaussian map"

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
            [..., d]; float16, bfloat16, float32, float64 or integers.
        strength : float, default 1.0
            0 is off, 1 the map.

        Returns
        -------
        ndarray or torch.Tensor
            A new array or tensor with the shape and dtype of `z`, float64 for integers. Computed in float32, for
            float64 in float64, and rounded once.

        Raises
        ------
        TypeError
            If the dtype of `z` is another one, or `strength` is not a real number.
        ValueError
            If the last axis of `z` is not d long, or `strength` is not finite.
        """
        s = as_finite(strength, "strength")
        matrix, bias = (1 - s) * np.eye(self.bias.size) + s * self.matrix, s * self.bias
        array: Any = as_dense(z, "z") if is_tensor(z) else as_engine(z, "z")
        if tuple(array.shape[-1:]) != bias.shape:
            raise ValueError(f"z must have {bias.size} channels on the last axis, got shape {tuple(array.shape)}")
        if is_tensor(array):
            import torch

            from ..hooks.affine import moved, working_dtype

            dtype = working_dtype(array.dtype)
            slopes, shifts = (moved(torch.from_numpy(x), array.device, dtype) for x in (matrix, bias))
            return (array.to(dtype) @ slopes.mT + shifts).to(array.dtype)
        work = widen(array)
        out = work @ matrix.T.astype(work.dtype) + bias.astype(work.dtype)
        return out.astype(result_dtype(z, array), copy=False)

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
        Samples [n, d] and [m, d], n, m >= 2; float16, bfloat16, float32, float64 or integers.
    ridge : float, default 0.0
        Added to the variances of both. Directions in which the source has none (below d eps times the largest) are
        otherwise mapped to the mean of the target: no map says more about them, and of all that match the rest this is
        the one of least norm. With fewer rows than neurons there always are some.

    Returns
    -------
    GaussianMap
        ``matrix`` [d, d] and ``bias`` [d], float64.

    Raises
    ------
    TypeError
        If a dtype is another one, or `ridge` is not a real number.
    ValueError
        If shapes do not fit, a value is not finite, `ridge` is negative or not finite, or source and target differ so
        much in scale that the map is out of the range of float64.
    """
    u, v = two_samples(source, target, "source", "target", min_rows=2)
    ridge = as_not_negative(ridge, "ridge")
    (u, scale_u), (v, scale_v) = _near_one(u, ridge), _near_one(v, ridge)
    mean_u, cov_u = _core.covariance(u, None, "source")
    mean_v, cov_v = _core.covariance(v, None, "target")
    if scale_u == scale_v == 0:
        matrix = _core.bures_map(cov_u, cov_v, ridge)
        return GaussianMap(matrix, mean_v - matrix @ mean_u)
    for cov, scale in ((cov_u, scale_u), (cov_v, scale_v)):
        cov[np.diag_indices_from(cov)] += np.ldexp(ridge, -2 * scale)
    matrix = _core.bures_map(cov_u, cov_v, 0.0)
    with np.errstate(over="ignore"):
        bias, matrix = np.ldexp(mean_v - matrix @ mean_u, scale_v), np.ldexp(matrix, scale_v - scale_u)
    if not (np.isfinite(matrix).all() and np.isfinite(bias).all()):
        raise ValueError("source and target differ so much in scale that the map is out of the range of float64")
    return GaussianMap(matrix, bias)


def _near_one(x: NDArray, ridge: float) -> tuple[NDArray, int]:
    """`x` / 2^k and k, so that squares fit into float64; k is 0, and `x` as it is, for usual numbers."""
    if x.dtype != np.float64:  # others come no nearer to the ends of float64
        return x, 0
    most = max(float(np.max(np.abs(x))), ridge**0.5)
    k = int(np.frexp(most)[1]) if np.isfinite(most) else 0
    return (x, 0) if abs(k) <= 300 else (np.ldexp(x, -k), k)
