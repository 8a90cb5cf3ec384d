"""The engine's distance and proximal step for people: checked input, one module at a time."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import as_mass, as_not_negative, as_vector, working_dtype
from .._threads import get_num_threads
from .samples import MEMORY, Sample, read_if_small, summarised, two_samples
from .summaries import distance_of


def _distance(
    u: Any, v: Any, u_weights: Any, v_weights: Any, v_sorted: bool, gradient: int
) -> tuple[NDArray, NDArray | None]:
    """The value and, where `gradient` is 2, the gradient in `u`."""
    u, v = two_samples(u, v, "u", "v")
    u_mass = None if u_weights is None else [as_mass(u_weights, len(u), "u_weights")]
    v_mass = None if v_weights is None else [as_mass(v_weights, len(v), "v_weights")]
    if v_sorted and v_mass is not None:
        raise ValueError("v_sorted does not go with v_weights: the weights belong to the rows before the sort")
    values, grad_u, _, _ = _core.wasserstein(
        [u], [v], None, None, u_mass, v_mass, bool(v_sorted), gradient, ["u"], ["v"], get_num_threads()
    )
    return values[0], None if grad_u is None else grad_u[0]


def wasserstein(
    u: Sample,
    v: Sample,
    *,
    u_weights: ArrayLike | None = None,
    v_weights: ArrayLike | None = None,
    v_sorted: bool = False,
    memory: int = MEMORY,
) -> NDArray:
    """Squared 2-Wasserstein distance of two samples, neuron by neuron (LinEAS, arXiv 2503.10679).

    The integral over (0, 1) of the squared difference of the two quantile functions; for n = m the mean squared
    difference of the sorted columns. Exact for any n and m, and with row weights.

    Parameters
    ----------
    u : array_like, torch.Tensor or Quantiles
        Sample [n, d], n >= 1: one row a prompt, one column a neuron; float16, bfloat16, float32, float64 or integers.
        Of more rows than memory holds, a `Quantiles` that has seen them, or a stream as in `lineas.fit`: the parts of
        the distance that come from means and standard deviations are exact then, the part from the shapes is that of
        the values kept.
    v : array_like, torch.Tensor or Quantiles
        Sample [m, d], m >= 1.
    u_weights, v_weights : array_like, optional
        Weights of the rows [n], [m]: not negative, with a positive sum; only their proportions count, and a row of
        weight 0 is not there, whatever it holds. Default: equal.
    v_sorted : bool, default False
        The columns of `v` ascend already: the sort is left out (and the order not checked).
    memory : int, default 2**30
        Bytes for what is kept of iterators of blocks, and of memory maps, dask arrays and arrays of
        `lineas.open_activations` that take more, which are read in one pass, as in `lineas.fit`.

    Returns
    -------
    ndarray
        [d], float64 if `u` or `v` is float64 or holds integers, else float32; inf where the square exceeds that type.

    Raises
    ------
    TypeError
        If a dtype is another one.
    ValueError
        If shapes do not fit, a value is not finite (its row and column are named), the weights are not weights, or
        `v_sorted` comes with `v_weights`, or weights or `v_sorted` with a `Quantiles`.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> lineas.wasserstein(np.array([[0.0], [2.0]]), np.array([[3.0], [1.0]]))
    array([1.])
    """
    u, v = (side[None] for side in read_if_small([{None: u}, {None: v}], ["u", "v"], memory))
    if (pair := summarised(u, v, "u", "v", (u_weights, v_weights), memory=memory)) is not None:
        assert pair.moments is not None
        if v_sorted:
            raise ValueError("v_sorted is for arrays, got Quantiles or a stream")
        with np.errstate(over="ignore"):
            return distance_of(pair.moments).astype(working_dtype(pair.u))
    return _distance(u, v, u_weights, v_weights, v_sorted, 0)[0]


def wasserstein_grad(
    u: ArrayLike,
    v: ArrayLike,
    *,
    u_weights: ArrayLike | None = None,
    v_weights: ArrayLike | None = None,
    v_sorted: bool = False,
) -> tuple[NDArray, NDArray]:
    """`wasserstein` and its gradient in `u`.

    Entries that are equal within a column share the mean of their target quantiles, so the gradient does not depend
    on the order of the rows.

    Parameters
    ----------
    u, v, u_weights, v_weights, v_sorted
        As `wasserstein`.

    Returns
    -------
    value : ndarray
        [d], what `wasserstein` returns.
    gradient : ndarray
        [n, d], the derivative of ``value[j]`` in ``u[i, j]``, in the dtype of `value`; 0 in rows of weight 0. In
        float32 the error is at most 4e-6 of the mean of ``2 |u - v| / n`` over what the row meets, whatever n and m.

    Raises
    ------
    TypeError, ValueError
        As `wasserstein`.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> value, gradient = lineas.wasserstein_grad(np.array([[0.0], [2.0]]), np.array([[3.0], [1.0]]))
    >>> gradient
    array([[-1.],
           [-1.]])
    """
    value, gradient = _distance(u, v, u_weights, v_weights, v_sorted, 2)
    assert gradient is not None  # it was asked for
    return value, gradient


def prox_sparse_group(x: ArrayLike, *, tau: float, l1: float, group: float) -> NDArray:
    """Proximal step of the sparse group lasso on one group of d entries.

    The minimiser over y of ``||y - x||^2 / 2 + tau (l1 ||y||_1 + group sqrt(d) ||y||_2)``: a soft threshold, then a
    shrinking of the whole group (Simon, Friedman, Hastie and Tibshirani 2013). Zeros are exact.

    Parameters
    ----------
    x : array_like or torch.Tensor
        [d], float32 or float64.
    tau : float
        Step size, >= 0.
    l1, group : float
        Penalties, >= 0.

    Returns
    -------
    ndarray
        [d], a new array with the dtype of `x`.

    Raises
    ------
    TypeError
        If `x` is not float32 or float64, or a setting is not a real number.
    ValueError
        If `x` is not 1-D or holds a value that is not finite, or a setting is negative or not finite.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> lineas.prox_sparse_group(np.array([3.0, -0.5]), tau=1.0, l1=1.0, group=0.0)
    array([2., 0.])
    """
    array = as_vector(x, "x", "entry")
    settings = (as_not_negative(tau, "tau"), as_not_negative(l1, "l1"), as_not_negative(group, "group"))
    return _core.prox_sparse_group(array, *settings)
