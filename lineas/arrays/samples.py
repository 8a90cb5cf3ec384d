"""Source and target samples of one or several modules: checked and paired, handed to the engine, and made maps of."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import as_engine, as_int, as_mass, as_sample, check_sample_shape, same_working_type, working_dtype
from .._threads import get_num_threads
from ..maps.affine import AffineMap, rounded
from ..maps.steering import SteeringMaps
from .dask_arrays import Work, check_dask, computed, is_dask, summaries
from .quantiles import LEAST_SIZE, MOST_SIZE, Quantiles
from .streams import check_no_path, is_stored, take_batches
from .summaries import paired_moments

Sample = ArrayLike | Quantiles | Iterator[ArrayLike]
Samples = Sample | Mapping[str, Sample]
# Bytes of the values kept of a module, both sides together, where streams are summarised; what is stored elsewhere is a
# stream if it takes more, all modules together.
MEMORY = 1 << 30
_NONE = object()
Weights = ArrayLike | Mapping[str, ArrayLike] | None


class Pair(NamedTuple):
    """Source and target of one module in one working type, the weights of their rows, and their names in messages.

    Of a pair with a `Quantiles` there are the moments of the paired quantiles and the numbers of rows, but no rows:
    those of all modules at once would take too much memory.
    """

    u: NDArray
    v: NDArray
    u_mass: NDArray | None
    v_mass: NDArray | None
    u_name: str
    v_name: str
    moments: NDArray | None = None
    counts: tuple[int, int] = (0, 0)
    rank_error: float = 0.0


def two_samples(u: Any, v: Any, u_name: str, v_name: str, *, min_rows: int = 1) -> tuple[NDArray, NDArray]:
    """`as_sample` of both, in one working type; ValueError if their numbers of columns differ."""
    u, v = as_sample(u, u_name, min_rows=min_rows), as_sample(v, v_name, min_rows=min_rows)
    if u.shape[1] != v.shape[1]:
        shapes = f"{u.shape} and {v.shape}"
        raise ValueError(f"{u_name} and {v_name} must have the same number of columns, got shapes {shapes}")
    return same_working_type(u, v)


def read_if_small(sides: Sequence[Mapping[Any, Any]], names: Sequence[str], memory: int) -> list[dict[Any, Any]]:
    """Source and target by module, what is stored elsewhere in memory if all of it takes at most `memory` bytes.

    Stored elsewhere are dask arrays, which are checked here, and what `is_stored` finds. Larger ones stay as they are.
    """
    memory = as_int(memory, "memory", low=1)
    found = [dict(side) for side in sides]
    dask: dict[tuple[int, Any], Any] = {}
    stored: dict[tuple[int, Any], Any] = {}
    for side, samples in enumerate(found):
        for module, x in samples.items():
            check_no_path(x, _name(names[side], module))
            if is_dask(x, _name(names[side], module)):
                check_dask(x, _name(names[side], module))
                dask[side, module] = x
            elif is_stored(x):
                check_sample_shape(x.shape, _name(names[side], module))
                stored[side, module] = x
    if sum(int(x.nbytes) for x in chain(dask.values(), stored.values())) <= memory:
        arrays = chain(computed(list(dask.values())), stored.values())
        for (side, module), x in zip(chain(dask, stored), arrays, strict=True):
            found[side][module] = as_sample(x, _name(names[side], module))
    return found


def _name(side: str, module: Any) -> str:
    """What messages call the sample of a module; None is the module of a single array."""
    return side if module is None else f"{side}[{module!r}]"


def _streamed(samples: Sequence[tuple[Any, str]], memory: int) -> list[Any]:
    """The samples, with their names, or a `Quantiles` in the place of one that is a stream.

    Streams are iterators, memory maps of more than `memory` bytes and what `read_if_small` has left. What a `Quantiles`
    keeps takes half of `memory` at most: the other side of the pair takes as much.
    """
    dask, found = {}, []
    for k, (x, name) in enumerate(samples):
        if is_dask(x, name):
            dask[k] = Work(x, Quantiles(_size_within(memory, np.empty((1, x.shape[1]), x.dtype))), name)
        elif isinstance(x, Iterator):
            batch = next(x, _NONE)
            if batch is _NONE:
                raise ValueError(
                    f"{name} gave no batches: an iterator can be read once, and this one is used up or empty"
                )
            first = as_sample(batch, f"{name}, batch 0")
            x = take_batches(Quantiles(_size_within(memory, first)), chain([first], x), None, name)
        elif is_stored(x) or (isinstance(x, np.memmap) and x.ndim == 2 and x.nbytes > memory):
            x = take_batches(Quantiles(_size_within(memory, as_sample(x[:1], name))), x, None, name)
        found.append(x)
    for k, summary in zip(dask, summaries(list(dask.values())) if dask else [], strict=True):
        found[k] = summary
    return found


def _size_within(memory: int, rows: NDArray) -> int:
    """The most values of each neuron that half of `memory` holds, as far as a `Quantiles` takes it."""
    itemsize = working_dtype(as_engine(rows, "rows")).itemsize
    return min(max(memory // (2 * rows.shape[1] * itemsize), LEAST_SIZE), MOST_SIZE)


def summarised(
    u: Any,
    v: Any,
    u_name: str,
    v_name: str,
    weights: tuple[Any, Any] = (None, None),
    *,
    min_rows: int = 1,
    memory: int = MEMORY,
) -> Pair | None:
    """The pair of samples of which one at least is a `Quantiles`, or one is made of it; None if none is.

    What is stored elsewhere becomes one: see `read_if_small`.

    ValueError for weights, which rows that were seen have not, and as `two_samples`.
    """
    u, v = _streamed([(u, u_name), (v, v_name)], as_int(memory, "memory", low=1))
    if not (isinstance(u, Quantiles) or isinstance(v, Quantiles)):
        return None
    if any(given is not None for given in weights):
        raise ValueError(f"{u_name} and {v_name} must be arrays to have row weights, got Quantiles or a stream")
    sides, shapes = [], []
    for x, name in ((u, u_name), (v, v_name)):
        if not isinstance(x, Quantiles):
            x = as_sample(x, name, min_rows=min_rows)
        elif x.count < min_rows:
            raise ValueError(f"{name} must have seen at least {min_rows} row{'s' * (min_rows > 1)}, got {x.count}")
        sides.append(x)
        shapes.append((x.count, x.d) if isinstance(x, Quantiles) else x.shape)
    if shapes[0][1] != shapes[1][1]:
        both = " and ".join(map(str, shapes))
        raise ValueError(f"{u_name} and {v_name} must have the same number of columns, got shapes {both}")
    moments = paired_moments(sides[0], sides[1], [u_name, v_name])
    dtypes = [x.dtype if isinstance(x, Quantiles) else working_dtype(x) for x in sides]
    error = max(x.rank_error for x in sides if isinstance(x, Quantiles))
    empty = np.empty((0, moments.shape[1]), np.result_type(*dtypes))
    return Pair(empty, empty, None, None, u_name, v_name, moments, (shapes[0][0], shapes[1][0]), error)


def paired_samples(
    source: Samples,
    target: Samples,
    source_weights: Weights = None,
    target_weights: Weights = None,
    prefix: str = "",
    *,
    memory: int | None = None,
) -> dict[Any, Pair]:
    """The samples of `fit` by module, None for one array, checked; `prefix` goes before their names in messages.

    TypeError for a `Quantiles` where there is no `memory` for summaries.
    """
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
    if memory is not None:
        sources, targets = read_if_small([sources, targets], [f"{prefix}source", f"{prefix}target"], memory)
    pairs = {}
    for module, x in sources.items():
        u_name, v_name = _name(f"{prefix}source", module), _name(f"{prefix}target", module)
        y, weights = targets[module], (source_weights, target_weights)
        if memory is None and (isinstance(x, Quantiles) or isinstance(y, Quantiles)):
            raise TypeError(f"{u_name} and {v_name} must be arrays here, got Quantiles")
        if memory is not None:
            pair = summarised(x, y, u_name, v_name, weights, min_rows=2, memory=memory)
            if pair is not None:
                pairs[module] = pair
                continue
        u, v = two_samples(x, y, u_name, v_name, min_rows=2)
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

    It is called with six lists, of samples, weights and names, and the number of threads; not with summaries.
    """
    found: dict[Any, Any] = {}
    for dtype in (np.float32, np.float64):
        batch = {
            module: pair for module, pair in pairs.items() if pair.moments is None and working_dtype(pair.u) == dtype
        }
        if batch:
            columns = map(list, zip(*(pair[:6] for pair in batch.values()), strict=True))
            found |= zip(batch, kernel(*columns, get_num_threads()), strict=True)
    return found


def moments_of(pairs: Mapping[Any, Pair]) -> list[NDArray]:
    """The moments [5, d] of the paired quantiles of every module; ValueError if a value or its square is not finite."""
    summaries = {module: pair.moments for module, pair in pairs.items() if pair.moments is not None}
    found = by_working_type(pairs, _core.quantile_moments) | summaries
    found = {module: found[module] for module in pairs}
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
    return maps[None] if None in maps else SteeringMaps(maps, metadata | rank_error_of(pairs))


def rank_error_of(pairs: Mapping[Any, Pair]) -> dict[str, Any]:
    """What metadata say of summaries that do not hold all values: the largest `Quantiles.rank_error`."""
    error = max(pair.rank_error for pair in pairs.values())
    return {"rank_error": error} if error > 0 else {}
