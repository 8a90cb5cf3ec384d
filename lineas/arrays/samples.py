"""Source and target samples of one or several modules, checked and paired, and their moments."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import as_mass, as_sample, same_working_type, working_dtype
from .._threads import get_num_threads

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
