"""Sparse paths: the maps for every penalty, from the one that leaves nothing to the densest."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._checks import as_falling, as_flag, as_int, as_positive, is_number
from .._lazy import lazy_method
from .._threads import get_num_threads
from .affine import AffineMap
from .records import Record
from .steering import SteeringMaps

if TYPE_CHECKING:
    from ..notebook.plot import path as plot


@dataclass(frozen=True, eq=False, repr=False)
class SparsePath(Record):
    """Maps for falling penalties, of one module or of all modules of a model at one penalty for all.

    `lineas.sparse_path` makes one from arrays, `lineas.sparse_path_end_to_end` from a model. ``path.at(...)`` takes the
    maps of a point; ``len(path)`` is the number of points and ``path[k]`` the same as ``path.at(index=k)``.
    ``path.save(file)`` writes it for `lineas.load`. Paths are equal if all but their metadata is. The arrays are
    read-only, as those of maps are.

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
    moments : list of ndarray or None
        For exact paths, of every module float64 [5, d]: the mean of the source, the mean of the target, the variance of
        the source, the covariance of the paired quantiles and the variance of the target. All that the path depends
        on; `at` solves for penalties between its points from them.
    """

    FORMAT = "lineas sparse path"
    # K penalties, L modules, D neurons; of arrays that are not None.
    _SHAPES: ClassVar[dict[str, str]] = {
        "loss": "K",
        "held_out_loss": "K",
        "kkt_residual": "K",
        "weight": "KD",
        "bias": "KD",
        "module_support": "KL",
    }

    penalties: NDArray
    l1_ratio: float
    loss: NDArray
    held_out_loss: NDArray | None
    modules: tuple[str, ...] | None
    widths: tuple[int, ...]
    weight: NDArray
    bias: NDArray
    kkt_residual: NDArray | None = None
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    moments: list[NDArray] | None = None
    module_support: NDArray = None  # type: ignore[assignment]  # counted where the caller has not done so
    support: NDArray = field(init=False)

    def __post_init__(self) -> None:
        if np.shape(self.penalties) != (1,) or not np.isnan(self.penalties[0]):  # maps without a penalty are one point
            as_falling(self.penalties, "penalties")
        if not self.widths or min(self.widths) < 1 or len(self.modules or "1") != len(self.widths):
            raise ValueError(f"widths must be a number above 0 for each module, got {self.widths}")
        sizes = {"K": len(self.penalties), "L": len(self.widths), "D": self.d}
        for name, letters in self._SHAPES.items():
            shape, found = tuple(sizes[letter] for letter in letters), getattr(self, name)
            if found is not None and np.shape(found) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {np.shape(found)}")
        if self.moments is not None and [np.shape(one) for one in self.moments] != [(5, d) for d in self.widths]:
            raise ValueError("moments must have shape [5, d] for each module")
        if self.module_support is None:
            changed = (self.weight != 1) | (self.bias != 0)
            starts = np.concatenate(([0], np.cumsum(self.widths)[:-1]))
            object.__setattr__(self, "module_support", np.add.reduceat(changed, starts, axis=1, dtype=np.int64))
        object.__setattr__(self, "support", self.module_support.sum(axis=1))
        self.__setstate__(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the fields as they are, but for arrays, which become read-only; of copies and pickles as well."""
        vars(self).update({name: _read_only(value) for name, value in state.items()})

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
            If the path has no such point: `penalty` below all others, `support` that is below or above all others or
            between 0 and the first that is not (the message names the nearest), or `best` without held-out data.
        IndexError
            If `index` is out of range.
        """
        if sum(value is not None for value in (penalty, support, index)) + as_flag(best, "best") != 1:
            raise TypeError("exactly one of penalty, support, index and best=True must be given")
        if best:
            if self.held_out_loss is None:
                raise ValueError("best: the path has no held-out loss; pass held_out when it is made")
            return int(np.argmin(self.held_out_loss))
        if index is not None:
            index = as_int(index, "index")
            if not -len(self) <= index < len(self):
                raise IndexError(f"index must be from {-len(self)} to {len(self) - 1}, got {index}")
            return index % len(self)
        if penalty is not None:
            penalty, least = as_positive(penalty, "penalty"), self.penalties[-1]
            if penalty < least * (1 - 1e-9):
                raise ValueError(f"penalty must be at least {least:.6g}, the smallest of the path, got {penalty:.6g}")
            return int(np.argmin(np.abs(np.log(self.penalties) - np.log(penalty))))
        count = self._count(support)
        k = self._sparser(count)
        if count and not self.support[k]:
            raise self._skipped(count)
        return k

    def _count(self, support: Any) -> int:
        """`support` as a number of neurons."""
        if not is_number(support):
            raise TypeError(f"support must be an int (neurons) or a float (share), got {type(support).__name__}")
        if isinstance(support, Integral):
            count = int(support)
            if not 0 <= count <= self.d:
                raise ValueError(f"support must be from 0 to {self.d} neurons, got {support}")
            return count
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

    def _skipped(self, count: int, more: int | None = None) -> ValueError:
        """The error where the path goes from no neuron to `more`, by default to the least support above `count`."""
        k = int(np.argmin(np.where(self.support > count, self.support, self.d + 1)))
        more = int(self.support[k]) if more is None else more
        return ValueError(
            f"support: no point of the path has a support from 1 to {count} of {self.d} neurons; the nearest are 0 and "
            f"{more} ({more / self.d:.2%}), index {k}; a larger l1_ratio lets neurons in one by one"
        )

    def at(
        self,
        *,
        penalty: float | None = None,
        support: int | float | None = None,
        index: int | None = None,
        best: bool = False,
    ) -> SteeringMaps | AffineMap:
        """Return the maps of a point of the path, found as by `index`; on an exact path also between its points.

        An exact path, one that `lineas.sparse_path` made, is solved anew at a `penalty` that is not one of its own,
        and for a `support` it looks for the smallest penalty that does not exceed it, so that the maps have just as
        many neurons wherever a path has such a point. Neurons join one at a time, but for those that a module's group
        penalty keeps out until many come at once: then they are fewer, and where there would be none it is an error.

        Parameters
        ----------
        penalty, support, index, best
            As `index`.

        Returns
        -------
        SteeringMaps or AffineMap
            An `AffineMap` where the path was made from one array.

        Raises
        ------
        TypeError, ValueError, IndexError
            As `index`.
        """
        if self.moments is not None and support is not None and penalty is None and index is None and not best:
            return self._densest(self._count(support))
        k = self.index(penalty=penalty, support=support, index=index, best=best)
        if self.moments is not None and penalty is not None and float(penalty) < self.penalties[0]:
            return self._solve(float(penalty))[2]
        return self._point(k)[2]

    def _point(self, k: int) -> tuple[float, int, SteeringMaps | AffineMap]:
        """The penalty of a point, its support and its maps."""
        penalty = float(self.penalties[k])
        return penalty, int(self.support[k]), self._maps(self.weight[k], self.bias[k], penalty)

    def _solve(self, penalty: float) -> tuple[float, int, SteeringMaps | AffineMap]:
        """The same of any penalty, solved exactly."""
        assert self.moments is not None
        is_double, largest = self.weight.dtype == np.float64, float(self.penalties[0])
        weight, bias, *_, support = _core.sparse_path(
            self.moments, None, np.array([penalty]), self.l1_ratio, is_double, largest, get_num_threads()
        )
        return penalty, int(support.sum()), self._maps(weight[0], bias[0], penalty)

    def _maps(self, weight: NDArray, bias: NDArray, penalty: float) -> SteeringMaps | AffineMap:
        """Slopes and shifts of all modules as maps."""
        if self.modules is None:
            return AffineMap(weight, bias)
        ends = np.cumsum(self.widths)[:-1]
        maps = map(AffineMap, np.split(weight, ends), np.split(bias, ends))
        return SteeringMaps(dict(zip(self.modules, maps, strict=True)), {**self.metadata, "penalty": penalty})

    def _densest(self, count: int) -> SteeringMaps | AffineMap:
        """The maps of at most `count` neurons at the smallest penalty, which need not be one of the path."""
        k = self._sparser(count)
        high, reached, found = self._point(k)
        low, more = float(self.penalties[min(k + 1, len(self) - 1)]), None
        while reached < count and high > low * (1 + 1e-9):
            tried = self._solve(float(np.sqrt(high * low)))
            if tried[1] > count:
                low, more, _ = tried
            else:
                high, reached, found = tried
        if count and not reached:
            raise self._skipped(count, more)
        return found

    def __repr__(self) -> str:
        modules = "" if self.modules is None else f"{len(self.modules)} modules, "
        return (
            f"SparsePath({len(self)} penalties from {self.penalties[0]:.4g} to {self.penalties[-1]:.4g}, {modules}"
            f"support {self.support[0]} to {self.support[-1]} of {self.d} neurons)"
        )

    if TYPE_CHECKING:
        plot = plot
    else:
        plot = lazy_method("notebook.plot", "path")


def _read_only(value: Any) -> Any:
    """`value` with read-only views in place of the arrays in it."""
    if isinstance(value, np.ndarray):
        value = value.view()
        value.flags.writeable = False
    if isinstance(value, list):
        return [_read_only(one) for one in value]
    return {key: _read_only(one) for key, one in value.items()} if isinstance(value, dict) else value
