"""Published methods of steering to compare with, as maps: difference of means, probe directions, AurA.

All of them take the arrays that `lineas.fit` takes and give what it gives, so that their maps attach, compose, invert
and are saved alike. Importing this module needs NumPy only; `iti_c` imports scikit-learn when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import as_positive, widen
from ..maps.affine import AffineMap
from ..maps.metadata import describe
from ..maps.steering import SteeringMaps
from .activations import origin
from .closed_form import fit
from .samples import Samples, as_maps, paired_samples
from .separability import roc_area

__all__ = ["aura", "iti_c", "mean"]


@overload
def mean(source: ArrayLike, target: ArrayLike) -> AffineMap: ...


@overload
def mean(source: Mapping[str, ArrayLike], target: Mapping[str, ArrayLike]) -> SteeringMaps: ...


def mean(source: Samples, target: Samples) -> AffineMap | SteeringMaps:
    """The difference of means, added to every activation: ``lineas.fit(source, target, method="mean")``.

    This is the steering vector of contrastive activation addition (CAA, arXiv 2312.06681) for sets that are not
    paired, and Mean-AcT of arXiv 2410.23054. CAA adds it at one module, at the positions after the prompt; what is
    collected and where maps are attached is the caller's choice.

    Parameters
    ----------
    source, target : array_like, torch.Tensor or Mapping
        Activations [n, d] and [m, d], or mappings from module name to such arrays, as in `lineas.fit`.

    Returns
    -------
    AffineMap or SteeringMaps
        w = 1, b = mean(target) - mean(source). Types as of `lineas.fit`.

    Raises
    ------
    TypeError, ValueError
        As `lineas.fit`.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> lineas.baselines.mean(np.array([[0.0], [2.0]]), np.array([[3.0], [5.0]])).bias
    array([3.])
    """
    samples: tuple[Any, Any] = source, target
    return fit(*samples, method="mean")


@overload
def iti_c(source: ArrayLike, target: ArrayLike, *, alpha: float = 1.0, C: float = 1.0) -> AffineMap: ...


@overload
def iti_c(
    source: Mapping[str, ArrayLike], target: Mapping[str, ArrayLike], *, alpha: float = 1.0, C: float = 1.0
) -> SteeringMaps: ...


def iti_c(source: Samples, target: Samples, *, alpha: float = 1.0, C: float = 1.0) -> AffineMap | SteeringMaps:
    """Shift along the direction of a linear probe: inference-time intervention (ITI, arXiv 2306.03341).

    For each module a logistic regression (scikit-learn's, with an intercept, on the activations as they are) tells
    source rows from target rows. Its weights, made a unit vector theta that points to the target, are the direction,
    and sigma, the standard deviation of all rows along it, is the unit of length (eq. 2 of the paper). This is the
    variant that arXiv 2410.23054 calls ITI-c. The paper steers a few attention heads, chosen by the accuracy of their
    probes; here every module that is given gets its shift.

    Parameters
    ----------
    source, target : array_like, torch.Tensor or Mapping
        As in `lineas.fit`.
    alpha : float, default 1.0
        How many standard deviations strength 1 moves; above 0. The paper uses 15 on attention heads.
    C : float, default 1.0
        Inverse of the probe's L2 penalty, above 0: scikit-learn's.

    Returns
    -------
    AffineMap or SteeringMaps
        w = 1, b = alpha sigma theta. sigma has ddof = 0. A probe without a direction, where the sets do not differ,
        gives b = 0. Types as of `lineas.fit`.

    Raises
    ------
    ImportError
        If scikit-learn is not installed (``pip install "lineas[sklearn]"``).
    TypeError
        If an argument has a wrong type.
    ValueError
        If `alpha` or `C` is not above 0, names or shapes do not fit, there are fewer than 2 rows, a value is not
        finite (module, row and column are named), or a probe overflows.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> source, target = np.array([[0.0, 1.0], [0.0, 3.0]]), np.array([[2.0, 1.0], [2.0, 3.0]])
    >>> lineas.baselines.iti_c(source, target).bias.round(3)  # doctest: +SKIP
    array([1., 0.])
    """
    alpha, C = as_positive(alpha, "alpha"), as_positive(C, "C")
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError('iti_c needs scikit-learn: pip install "lineas[sklearn]"') from error

    def shift(u: NDArray, v: NDArray) -> tuple[NDArray, NDArray]:
        rows = np.concatenate([u, v]).astype(np.float64)
        probe = LogisticRegression(C=C, max_iter=1000).fit(rows, np.repeat([0, 1], [len(u), len(v)]))
        direction = probe.coef_[0]
        with np.errstate(over="ignore", invalid="ignore"):  # the map says what overflows
            length = np.linalg.norm(direction)
            unit = direction / length if length else np.zeros_like(direction)
            return np.ones_like(unit), alpha * np.std(rows @ unit) * unit

    return _each(source, target, shift, "iti_c", alpha=alpha, C=C)


@overload
def aura(source: ArrayLike, target: ArrayLike) -> AffineMap: ...


@overload
def aura(source: Mapping[str, ArrayLike], target: Mapping[str, ArrayLike]) -> SteeringMaps: ...


def aura(source: Samples, target: Samples) -> AffineMap | SteeringMaps:
    """Dampen the neurons that detect the source: AurA (arXiv 2407.12824).

    A neuron's activation as a score that a row is of the source has an area under the ROC curve: the share of pairs of
    a source and a target row in which the source row has the larger activation, ties counted half. Neurons with an
    area above 1/2 are the source's experts, and are multiplied by 1 minus their Gini coefficient 2 (area - 1/2); the
    others are left alone. There is nothing to choose, and no fit.

    In the paper the source is toxic text, the neurons are the outputs of a model's linear layers, and a row is the
    largest response over the tokens of a sentence (``lineas.collect(..., pooling="max")``). Here a row is whatever was
    collected. The paper has no strength; above 1 the slopes may fall below 0.

    Parameters
    ----------
    source, target : array_like, torch.Tensor or Mapping
        As in `lineas.fit`.

    Returns
    -------
    AffineMap or SteeringMaps
        w = 1 - 2 max(area - 1/2, 0), from 0 to 1; b = 0. Types as of `lineas.fit`.

    Raises
    ------
    TypeError, ValueError
        As `lineas.fit`.

    Examples
    --------
    >>> import numpy as np, lineas
    >>> source, target = np.array([[3.0, 0.0], [4.0, 0.0]]), np.array([[0.0, 5.0], [3.5, 5.0]])
    >>> lineas.baselines.aura(source, target).weight
    array([0.5, 1. ])
    """

    def dampen(u: NDArray, v: NDArray) -> tuple[NDArray, NDArray]:
        area = roc_area(u, v)
        return 1 - 2 * np.maximum(area - 0.5, 0), np.zeros_like(area)

    return _each(source, target, dampen, "aura")


def _each(
    source: Samples,
    target: Samples,
    slopes_and_shifts: Callable[[NDArray, NDArray], tuple[NDArray, NDArray]],
    method: str,
    **settings: Any,
) -> AffineMap | SteeringMaps:
    """A map for each module, with the checks, types and messages of `lineas.fit`."""
    pairs, found = paired_samples(source, target), {}
    for module, pair in pairs.items():
        found[module] = slopes_and_shifts(_finite(widen(pair.u), pair.u_name), _finite(widen(pair.v), pair.v_name))
    return as_maps(pairs, found, describe(method, **origin({"source": source, "target": target}), **settings))


def _finite(x: NDArray, name: str) -> NDArray:
    """`x`; an error like the engine's where a value is not finite."""
    finite = np.isfinite(x)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(f"{name}: {x[row, column]} at row {row}, column {column}")
    return x
