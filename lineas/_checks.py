"""Checks of arguments, one of each kind for the whole package, and the arrays that the C engine takes.

torch is never imported here: a tensor can only exist once somebody else has imported torch.
"""

import itertools
import math
import numbers
import operator
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

_ACCEPTED = "float16, bfloat16, float32, float64 or an integer type"
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def is_tensor(x: object) -> "TypeGuard[torch.Tensor]":
    """Whether `x` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def widen(x: NDArray) -> NDArray:
    """`x` in its working type: float64 stays; float32, float16 and uint16 (bfloat16 bits) become float32."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)


def working_dtype(x: NDArray) -> np.dtype:
    """The type the engine computes in for an array that `as_engine` returned."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def check_dense(x: "torch.Tensor", name: str) -> None:
    """TypeError for tensors without a shape or without a number for each entry: sparse, nested, quantised, lazy."""
    torch = sys.modules["torch"]
    if torch.nn.parameter.is_lazy(x):
        raise TypeError(f"{name} must be a dense tensor, got an uninitialized parameter")
    if x.layout is not torch.strided or x.is_quantized or x.is_nested:
        kind = "nested " if x.is_nested else ""
        raise TypeError(f"{name} must be a dense tensor, got {kind}layout {x.layout}, dtype {x.dtype}")


def double(x: "torch.Tensor") -> "torch.Tensor":
    """`x` in float64, which sums over many numbers need; in float32 on Apple's MPS, which has no float64."""
    return x.float() if x.device.type == "mps" else x.double()


def as_dense(x: "torch.Tensor", name: str) -> "torch.Tensor":
    """A dense tensor, its integers as `double`; TypeError as `check_dense`."""
    check_dense(x, name)
    return double(x) if str(x.dtype).removeprefix("torch.") in _INTEGERS else x


def result_dtype(x: Any, array: NDArray) -> np.dtype:
    """The dtype of a result for `x`, of which `as_engine` made `array`: that of `x`, in native byte order."""
    # bfloat16 travels through the engine as bits.
    return np.asarray(x).dtype.newbyteorder("=") if array.dtype == np.uint16 else array.dtype


def _from_tensor(x: Any, name: str) -> NDArray:
    """The numbers of a dense tensor; bfloat16 as its bits."""
    torch = sys.modules["torch"]
    if x.device.type == "meta":
        raise TypeError(f"{name} must be a tensor with data, got one on device meta")
    x = x.detach().cpu().resolve_conj().resolve_neg()
    if x.dtype == torch.bfloat16:
        x = x.contiguous().view(torch.uint16)
    try:
        return x.numpy()
    except (TypeError, RuntimeError) as error:  # fake and masked tensors, those that torch.func traces, odd dtypes
        raise TypeError(
            f"{name} must be a tensor that NumPy can read, got {type(x).__name__} of dtype {x.dtype}: {error}"
        ) from error


def _from_object(x: Any, name: str) -> NDArray:
    """What NumPy makes of `x`; its mask, if it has one, is not silently dropped."""
    if isinstance(x, np.ma.MaskedArray) or (isinstance(x, list | tuple) and any(map(np.ma.isMaskedArray, x))):
        raise TypeError(f"{name} must be a plain array, got a masked array: fill or drop its masked entries first")
    try:
        return np.asarray(x)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} must be array_like, got {type(x).__name__}: {error}") from error


def as_engine(x: Any, name: str) -> NDArray:
    """Turn array-like `x` of any rank into a C-contiguous array the engine reads; not copied where it is one.

    It is float16, float32 or float64, or uint16 that holds bfloat16 bits (of ml_dtypes or torch). Integers become
    float64, as NumPy and scikit-learn have it. TypeError, which calls it `name`, for any other dtype (booleans
    included: what they would mean as activations is not ours to guess), masked arrays (their mask would be lost),
    tensors that are not dense or have no data, and what NumPy makes no array of; ValueError for rows of other lengths.
    """
    if (
        type(x) is np.ndarray
        and x.dtype.char in "efd"
        and x.dtype.isnative
        and x.flags.c_contiguous
        and x.flags.aligned
    ):
        return x  # the usual case, without the microseconds of the general one
    if is_tensor(x):
        x, torch = as_dense(x, name), sys.modules["torch"]
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise TypeError(f"{name} must be {_ACCEPTED}, got dtype {x.dtype}")
        return np.require(_from_tensor(x, name), requirements=["C", "A"])
    array = _from_object(x, name)
    if array.dtype.name == "bfloat16":  # of ml_dtypes: NumPy itself does not know it
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return np.require(array, requirements=["C", "A"]).view(np.uint16)
    if array.dtype.kind in "iu":
        array = array.astype(np.float64)
    # isnative: the engine reads machine order only; kind and size leave out longdouble and complex.
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise TypeError(f"{name} must be {_ACCEPTED}, got dtype {array.dtype}")
    return np.require(array, dtype=array.dtype.newbyteorder("="), requirements=["C", "A"])


def as_sample(x: Any, name: str, *, min_rows: int = 1) -> NDArray:
    """`as_engine` for a sample [n, d]; ValueError if it is not 2-D, has fewer than `min_rows` rows or no column."""
    array = as_engine(x, name)
    check_sample_shape(array.shape, name, min_rows=min_rows)
    return array


def check_sample_shape(shape: tuple[int, ...], name: str, *, min_rows: int = 1) -> None:
    """ValueError for the shape of what is no sample [n, d], has fewer than `min_rows` rows or no column."""
    if len(shape) != 2:
        raise ValueError(f"{name} must have shape [n, d], got shape {shape}")
    if shape[0] < min_rows or shape[1] < 1:
        rows = "1 row" if min_rows == 1 else f"{min_rows} rows"
        raise ValueError(f"{name} must have at least {rows} and 1 column, got shape {shape}")


def as_vector(x: Any, name: str, entry: str) -> NDArray:
    """`as_engine` for a vector [d] of float32, float64 or integers; `entry` is what messages call one of them.

    TypeError if the dtype is another one, ValueError if it is not 1-D, empty or not finite.
    """
    array = as_engine(x, name)
    if array.dtype not in (np.float32, np.float64):
        seen = "bfloat16" if array.dtype == np.uint16 else array.dtype
        raise TypeError(f"{name} must be float32 or float64, got dtype {seen}")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must have shape [d] with d >= 1, got shape {array.shape}")
    finite = np.isfinite(array)
    if not finite.all():
        at = int(np.argmin(finite))
        raise ValueError(f"{name} must be finite, got {array[at]} at {entry} {at}")
    return array


def same_working_type(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
    """Both arrays as they are if the engine computes them in one type, else both in float64."""
    if working_dtype(a) == working_dtype(b):
        return a, b
    return widen(a).astype(np.float64, copy=False), widen(b).astype(np.float64, copy=False)


def as_mass(x: Any, rows: int, name: str) -> NDArray:
    """Row weights as the engine takes them: float64 [rows], finite, not negative, with a positive sum.

    TypeError if `x` does not hold real numbers (booleans count, unlike in activations), is masked or not dense;
    ValueError if its shape is another one, a weight is negative or not finite, or all are zero.
    """
    if is_tensor(x):
        check_dense(x, name)
        x = _from_tensor(double(x) if x.is_floating_point() else x, name)
    array = _from_object(x, name)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    if array.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one weight a row, got shape {array.shape}")
    mass = np.require(array, dtype=np.float64, requirements=["C", "A"])
    bad = np.flatnonzero(~(np.isfinite(mass) & (mass >= 0)))
    if bad.size:
        raise ValueError(f"{name} must be finite and not negative, got {mass[bad[0]]} at row {bad[0]}")
    if not mass.sum() > 0:
        raise ValueError(f"{name} must have a positive sum, but all weights are zero")
    return mass


# --- settings ---------------------------------------------------------------------------------------------------------


def as_int(value: Any, name: str, *, low: int | None = None) -> int:
    """`value` as an int; TypeError if it is no integer (booleans are none), ValueError if it is below `low`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if low is not None and number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}")
    return number


def is_number(value: object) -> bool:
    """Whether `value` is a real number; booleans are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def as_finite(value: Any, name: str) -> float:
    """`value` as a float; TypeError if it is not a real number, ValueError if it is not finite."""
    if not is_number(value):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction beyond float64
        number = math.inf if operator.gt(value, 0) else -math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def as_not_negative(value: Any, name: str) -> float:
    """`as_finite`; ValueError if it is negative."""
    value = as_finite(value, name)
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value:g}")
    return value


def as_positive(value: Any, name: str) -> float:
    """`as_finite`; ValueError if it is not above 0."""
    value = as_finite(value, name)
    if value <= 0:
        raise ValueError(f"{name} must be above 0, got {value:g}")
    return value


def as_share(value: Any, name: str) -> float:
    """`as_finite`; ValueError if it is not from 0 to 1."""
    value = as_finite(value, name)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value:g}")
    return value


def as_flag(value: Any, name: str) -> bool:
    """`value` as a bool; TypeError if it is none."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def as_choice(value: Any, name: str, choices: Sequence[str]) -> str:
    """`value`; ValueError if it is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def as_falling(values: Any, name: str) -> NDArray[np.float64]:
    """`values` as float64 [K]; TypeError if they are no real numbers, ValueError unless they fall and stay above 0."""
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray) or np.shape(values) == ():
        raise TypeError(f"{name} must be a sequence of numbers, got {type(values).__name__}")
    numbers = [as_positive(value, f"{name}[{k}]") for k, value in enumerate(values)]
    if not numbers:
        raise ValueError(f"{name} is empty")
    for k, (before, after) in enumerate(itertools.pairwise(numbers), start=1):
        if after >= before:
            raise ValueError(f"{name} must fall, got {before:g} and then {after:g} at index {k}")
    return np.array(numbers)


def as_pair(value: Any, name: str) -> tuple[Any, Any]:
    """`value` as a pair (source, target); TypeError if it is no sequence, ValueError if it is none of two."""
    if not isinstance(value, tuple | list):
        raise TypeError(f"{name} must be a pair (source, target), got {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"{name} must be a pair (source, target), got {len(value)} entries")
    return value[0], value[1]
