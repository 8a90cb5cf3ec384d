"""Source and target samples of one or several modules: checked and paired, handed to the engine, and made maps of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import as_mass, as_sample, same_working_type, working_dtype
from .._threads import get_num_threads
from ..maps.affine import AffineMap, rounded
from ..maps.steering import SteeringMaps

Samples = ArrayLike | Mapping[str, ArrayLike]
Weights = ArrayLike | Mapping[str, ArrayLike] | None


class Pair(NamedTuple):
    """Source and target of one module in one working type, the weights of their rows, and their names in messages."""

    u: NDArray
    v: NDArray
    u_mass: NDArray | None
    v_mass: NDArray | None
    u_name: str
    v_name: str


def two_samples(u: Any, v: Any, u_name: str, v_name: str, *, min_rows: int = 1) -> tuple[NDArray, NDArray]:
    """`as_sample` of both, in one working type; ValueError if their numbers of columns differ."""
    u, v = as_sample(u, u_name, min_rows=min_rows), as_sample(v, v_name, min_rows=min_rows)
    if u.shape[1] != v.shape[1]:
        shapes = f"{u.shape} and {v.shape}"
        raise ValueError(f"{u_name} and {v_name} must have the same number of columns, got shapes {shapes}")
    return same_working_type(u, v)


def paired_samples(
    source: Samples, target: Samples, source_weights: Weights = None, target_weights: Weights = None, prefix: str = ""
) -> dict[Any, Pair]:
    """The samples of `fit` by module, None for one array, checked; `prefix` goes before their names in messages."""
    if isinstance(source, Mapping) != isinstance(target, Mapping):
        kinds = f"{type(source).__name__} and {type(target).__name__}"
        raise TypeError(f"{prefix}source and target must both be arrays or both be mappings, got {kinds}")
    sources: Mapping[Any, Any] = source if isinstance(source, Mapping) else {None: source}
    targets: Mapping[Any, Any] = target if isinstance(target, Mapping) else {None: target}
    if not sources:
        raise ValueError(f"{prefix}source must hold at least one module")
    check_modules(list(sources), targets, f"{prefix}target")
    for argument, given in (("source_weights", source_weights), ("target_weights", target_weights)):
        if isinstance(given, Mapping):
            if not isinstance(source, Mapping):
                raise TypeError(f"{argument} must be an array where source is one, got a mapping")
            check_modules(list(sources), given, argument)
    pairs = {}
    for module, x in sources.items():
        at = "" if module is None else f"[{module!r}]"
        u_name, v_name = f"{prefix}source{at}", f"{prefix}target{at}"
        u, v = two_samples(x, targets[module], u_name, v_name, min_rows=2)
        u_mass = _mass(source_weights, module, len(u), "source_weights")
        v_mass = _mass(target_weights, module, len(v), "target_weights")
        pairs[module] = Pair(u, v, u_mass, v_mass, u_name, v_name)
    return pairs


def _mass(weights: Weights, module: Any, rows: int, argument: str) -> NDArray | None:
    """Row weights of one module, where `weights` is one array for all modules or one for each."""
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        weights, argument = weights[module], f"{argument}[{module!r}]"
    return as_mass(weights, rows, argument)


def check_modules(wanted: Sequence[Any], seen: Iterable[Any], argument: str) -> None:
    """ValueError unless `seen` holds the modules that are wanted and no other, in any order."""
    seen = list(seen)
    missing = [name for name in wanted if name not in seen]
    extra = [name for name in seen if name not in wanted]
    if missing or extra:
        parts = [f"it lacks {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"it also has {', '.join(map(repr, extra))}"] if extra else []
        raise ValueError(f"{argument} must have the modules of source: {', '.join(parts)}")


def by_working_type(pairs: Mapping[Any, Pair], kernel: Callable[..., Iterable[Any]]) -> dict[Any, Any]:
    """What `kernel` gives for each module: the engine takes many at once, but of one working type.

    It is called with six lists, one for each field of `Pair`, and the number of threads.
    """
    found: dict[Any, Any] = {}
    for dtype in (np.float32, np.float64):
        batch = {module: pair for module, pair in pairs.items() if working_dtype(pair.u) == dtype}
        if batch:
            columns = map(list, zip(*batch.values(), strict=True))
            found |= zip(batch, kernel(*columns, get_num_threads()), strict=True)
    return {module: found[module] for module in pairs}


def moments_of(pairs: Mapping[Any, Pair]) -> list[NDArray]:
    """The moments [5, d] of the paired quantiles of every module; ValueError if a value or its square is not finite."""
    found = by_working_type(pairs, _core.quantile_moments)
    for module, moments in found.items():
        if not np.isfinite(moments).all():
            raise ValueError(f"the squares of {pairs[module].u_name} or its target overflow float64")
    return list(found.values())


def as_maps(
    pairs: Mapping[Any, Pair], parameters: Mapping[Any, tuple[NDArray, NDArray]], metadata: dict[str, Any]
) -> AffineMap | SteeringMaps:
    """Slopes and shifts by module as maps in the working types of the samples; one map for samples that are arrays."""
    maps = {}
    for module, (weight, bias) in parameters.items():
        pair, dtype = pairs[module], working_dtype(pairs[module].u)
        try:
            maps[module] = rounded(weight, bias, dtype)
        except ValueError as error:
            raise ValueError(f"the map of {pair.u_name} overflows {dtype}: {error}") from None
    return maps[None] if None in maps else SteeringMaps(maps, metadata)
