"""Sparse paths: the maps for every penalty, from the one that leaves nothing to the densest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import as_positive
from .maps import AffineMap, SteeringMaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class SparsePath:
    """Maps for falling penalties, of one module or of all modules of a model at one penalty for all.

    `lineas.sparse_path` makes one from arrays, `lineas.sparse_path_end_to_end` from a model. ``path.at(...)`` takes the
    maps of a point, by its penalty, its support, its index, or the one with the least held-out loss; ``len(path)`` is
    the number of points and ``path[k]`` the same as ``path.at(index=k)``.

    Attributes
    ----------
    penalties : ndarray
        float64 [K], falling. A penalty p stands for ``l1 = p * l1_ratio`` and ``group = p * (1 - l1_ratio)``.
    l1_ratio : float
        The share of the l1 penalty, from 0 to 1.
    loss : ndarray
        float64 [K], on the data that were fitted, without penalties.
    held_out_loss : ndarray or None
        float64 [K], on held-out data.
    support : ndarray
        int64 [K], neurons with a slope other than 1 or a shift other than 0, over all modules.
    module_support : ndarray
        int64 [K, L], the same for every module.
    kkt_residual : ndarray or None
        float64 [K], for exact paths: the distance of 0 to the subdifferential, divided by the largest penalty.
    modules : tuple of str or None
        Names in execution order; None where one array was fitted, whose maps are `AffineMap`.
    widths : tuple of int
        Neurons d of each module.
    weight, bias : ndarray
        float32 or float64 [K, D], slopes and shifts of all modules one after the other, D = sum(widths).
    metadata : dict
        Goes into the maps that `at` returns, with the penalty.
    """

    penalties: NDArray
    l1_ratio: float
    loss: NDArray
    held_out_loss: NDArray | None
    modules: tuple[str, ...] | None
    widths: tuple[int, ...]
    weight: NDArray
    bias: NDArray
    kkt_residual: NDArray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    support: NDArray = field(init=False)
    module_support: NDArray = field(init=False)

    def __post_init__(self) -> None:
        changed = (self.weight != 1) | (self.bias != 0)
        starts = np.concatenate(([0], np.cumsum(self.widths)[:-1]))
        counts = np.add.reduceat(changed, starts, axis=1, dtype=np.int64)
        object.__setattr__(self, "module_support", counts)
        object.__setattr__(self, "support", counts.sum(axis=1))

    def __len__(self) -> int:
        return len(self.penalties)

    def __getitem__(self, index: int) -> SteeringMaps | AffineMap:
        return self.at(index=index)

    @property
    def d(self) -> int:
        """The number of neurons over all modules."""
        return sum(self.widths)

    def index(
        self,
        *,
        penalty: float | None = None,
        support: int | float | None = None,
        index: int | None = None,
        best: bool = False,
    ) -> int:
        """Return the index of a point of the path.

        Parameters
        ----------
        penalty : float, optional
            The point with the nearest penalty, on a logarithmic scale. A penalty above all others is the first point.
        support : int or float, optional
            An int counts neurons over all modules, a float from 0 to 1 is a share of them: the point with the largest
            support that is not above it and, of several such points, the one with the smallest penalty.
        index : int, optional
            Negative ones count from the end.
        best : bool, default False
            The point with the least held-out loss.

        Raises
        ------
        TypeError
            If not exactly one of the four is given, or it is of another type.
        ValueError
            If the path has no such point: `penalty` below all others, `support` that is below or above all others
            (the message names the nearest), or `best` without held-out data.
        IndexError
            If `index` is out of range.
        """
        given = [value is not None for value in (penalty, support, index)]
        if not isinstance(best, bool | np.bool_):
            raise TypeError(f"best must be True or False, got {type(best).__name__}")
        if sum(given) + bool(best) != 1:
            raise TypeError("exactly one of penalty, support, index and best=True must be given")
        if best:
            if self.held_out_loss is None:
                raise ValueError("best: the path has no held-out loss; pass held_out when it is made")
            return int(np.argmin(self.held_out_loss))
        if index is not None:
            if isinstance(index, bool) or not isinstance(index, Integral):
                raise TypeError(f"index must be an integer, got {type(index).__name__}")
            if not -len(self) <= index < len(self):
                raise IndexError(f"index must be from {-len(self)} to {len(self) - 1}, got {index}")
            return int(index) % len(self)
        if penalty is not None:
            return self._nearest(as_positive(penalty, "penalty"))
        return self._sparser(self._count(support))

    def _nearest(self, penalty: float) -> int:
        """The index of the nearest penalty; see `index`."""
        if penalty < self.penalties[-1] * (1 - 1e-9):
            raise ValueError(
                f"penalty must be at least {self.penalties[-1]:.6g}, the smallest of the path, got {penalty:.6g}"
            )
        return int(np.argmin(np.abs(np.log(self.penalties) - np.log(penalty))))

    def _count(self, support: Any) -> int:
        """`support` as a number of neurons."""
        if isinstance(support, bool) or not isinstance(support, Real):
            raise TypeError(f"support must be an int (neurons) or a float (share), got {type(support).__name__}")
        if isinstance(support, Integral):
            if not 0 <= support <= self.d:
                raise ValueError(f"support must be from 0 to {self.d} neurons, got {support}")
            return int(support)
        if not 0 <= support <= 1:
            raise ValueError(f"support must be a share from 0.0 to 1.0 or a whole number of neurons, got {support}")
        return int(np.floor(float(support) * self.d + 1e-9))

    def _sparser(self, count: int) -> int:
        """The index of the densest point of at most `count` neurons; see `index`."""
        low, high = int(np.argmin(self.support)), int(np.argmax(self.support))
        for k, impossible in ((low, count < self.support[low]), (high, count > self.support[high])):
            if impossible:
                raise ValueError(
                    f"support: no point of the path has a support of {count} of {self.d} neurons; the nearest is "
                    f"{self.support[k]} ({self.support[k] / self.d:.2%}), index {k}, penalty {self.penalties[k]:.6g}"
                )
        allowed = np.where(self.support <= count, self.support, -1)
        return int(len(self) - 1 - np.argmax(allowed[::-1]))

    def at(
        self,
        *,
        penalty: float | None = None,
        support: int | float | None = None,
        index: int | None = None,
        best: bool = False,
    ) -> SteeringMaps | AffineMap:
        """Return the maps of a point of the path, found as by `index`.

        Returns
        -------
        SteeringMaps or AffineMap
            An `AffineMap` where the path was made from one array.

        Raises
        ------
        TypeError, ValueError, IndexError
            As `index`.
        """
        k = self.index(penalty=penalty, support=support, index=index, best=best)
        return self._maps(self.weight[k], self.bias[k], float(self.penalties[k]))

    def _maps(self, weight: NDArray, bias: NDArray, penalty: float) -> SteeringMaps | AffineMap:
        """Slopes and shifts of all modules as maps."""
        if self.modules is None:
            return AffineMap(weight, bias)
        ends = np.cumsum(self.widths)[:-1]
        maps = map(AffineMap, np.split(weight, ends), np.split(bias, ends))
        return SteeringMaps(dict(zip(self.modules, maps, strict=True)), {**self.metadata, "penalty": penalty})

    def __repr__(self) -> str:
        modules = "" if self.modules is None else f"{len(self.modules)} modules, "
        return (
            f"SparsePath({len(self)} penalties from {self.penalties[0]:.4g} to {self.penalties[-1]:.4g}, {modules}"
            f"support {self.support[0]} to {self.support[-1]} of {self.d} neurons)"
        )

    def plot(self, axes: Sequence[Axes] | None = None) -> NDArray:
        """Draw loss and support against the penalty, and the support of every module; see `lineas.plot.path`."""
        from .plot import path

        return path(self, axes=axes)
