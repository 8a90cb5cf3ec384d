"""Streaming quantiles of the engine against their NumPy twin."""

import numpy as np
import pytest
from samples import DTYPES, assert_close, assert_same_bits, empty_summary, encode, sample

from lineas import _core
from lineas.arrays import reference
from lineas.arrays.quantiles import ERROR
from lineas.arrays.reference import widen


def same_summaries(ours, theirs):
    """Values kept, their weights and the error to the bit, moments to rounding."""
    assert ours[0] == theirs[0]
    for a, b in zip(ours[5:], theirs[5:], strict=True):
        assert_same_bits(a, b)
    for a, b in zip(ours[1:5], theirs[1:5], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
def test_quantiles(rng, dtype, ties):
    for d in (1, 17, 40):
        ours, theirs, others = (empty_summary(d, 8, widen(encode(np.ones(1), dtype)).dtype) for _ in range(3))
        for n in (1, 30, 1, 33, 200, 6, 7, 611):
            x = sample(rng, n, d, dtype, ties=ties)
            ours[0] = _core.quantiles_update(x, *ours, "x", 1)
            theirs[0] = reference.quantiles_update(x, *theirs)
            same_summaries(ours, theirs)
        assert ours[6][ERROR] > 0  # values were left out
        for n in (70, 300):
            x = sample(rng, n, d, dtype, ties=ties)
            others[0] = _core.quantiles_update(x, *others, "x", 1)
            ours[0] = _core.quantiles_merge(*ours, *others, 1)
            theirs[0] = reference.quantiles_merge(*theirs, *[np.copy(x) if np.ndim(x) else x for x in others])
            same_summaries(ours, theirs)
        for a, b in zip(_core.quantiles_rows(*ours, 1), reference.quantiles_rows(*ours), strict=True):
            assert_same_bits(a, b)
        ranks = np.arange(1, ours[0] + 1, 3)
        assert np.array_equal(_core.quantiles_read(*ours, ranks, 1, 1), reference.quantiles_read(*ours, ranks, 1))
        for parts in (1, 2, 7, 64, ours[0], 3 * ours[0]):
            means, expected = _core.quantiles_read(*ours, None, parts, 1), reference.quantiles_read(*ours, None, parts)
            assert_close(means, expected, scale=10)
            assert (np.diff(means, axis=0) >= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_quantiles_of_numbers_at_the_ends_of_the_range(rng, dtype):
    """Means of neighbours stay between them: zeros of both signs, subnormal numbers, and the largest."""
    info = np.finfo(dtype)
    numbers = np.array([0.0, -0.0, info.smallest_subnormal, -3 * info.smallest_subnormal, info.max, info.min], dtype)
    for few in (numbers[:2], numbers[:4], numbers[4:], numbers):
        x = rng.choice(few, size=(700, 20))
        ours, theirs = empty_summary(20, 8, dtype), empty_summary(20, 8, dtype)
        ours[0] = _core.quantiles_update(x, *ours, "x", 1)
        with np.errstate(over="ignore", invalid="ignore"):
            theirs[0] = reference.quantiles_update(x, *theirs)
        assert_same_bits(ours[5], theirs[5])
        rows = _core.quantiles_rows(*ours, 1)[0]
        assert (rows >= few.min()).all() and (rows <= few.max()).all()
        assert np.isfinite(_core.quantiles_read(*ours, None, 9, 1)).all()


def test_a_summary_that_is_full(rng):
    """It refuses what it could not find a slot for, whatever comes, and stays as it was."""
    ours = empty_summary(2, 3, "float64")
    ours[0] = _core.quantiles_update(rng.normal(size=(95, 2)), *ours, "x", 1)
    ours[0] = _core.quantiles_update(rng.normal(size=(1, 2)), *ours, "x", 1)
    before = [np.copy(part) for part in ours]
    with pytest.raises(ValueError, match=r"^x: a size is zero, negative or too large"):
        _core.quantiles_update(rng.normal(size=(1, 2)), *ours, "x", 1)
    with pytest.raises(ValueError, match=r"^a size is zero, negative or too large"):
        _core.quantiles_merge(*ours, *before[:1], *[part.copy() for part in before[1:]], 1)
    for a, b in zip(ours, before, strict=True):
        assert np.array_equal(a, b)
