"""Statistics of continuations against counting by hand, intervals against scipy."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lineas.evaluation.metrics import (
    as_numbers,
    bootstrap_weights,
    harmonic_mean,
    interval,
    ngram_statistics,
    ratio_interval,
)

NAN = np.nan


# --- n-grams ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=12))
def test_ngrams_are_counted(tokens):
    found = ngram_statistics(tokens)
    assert list(found) == ["distinct_1", "distinct_2", "distinct_3", "repetition_4"]
    for n in (1, 2, 3, 4):
        counts = Counter(tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1))
        total = sum(counts.values())
        if n < 4:
            expected, seen = len(counts) / total if total else NAN, found[f"distinct_{n}"]
        else:  # each 4-gram, but for the first of its kind, has occurred before
            expected, seen = sum(c - 1 for c in counts.values()) / total if total else NAN, found["repetition_4"]
        assert seen == pytest.approx(expected, abs=1e-15, nan_ok=True)


def test_ngrams_of_a_loop_and_of_one_that_never_repeats():
    assert ngram_statistics([5, 6] * 8) == {
        "distinct_1": 2 / 16,
        "distinct_2": 2 / 15,
        "distinct_3": 2 / 14,
        "repetition_4": pytest.approx(11 / 13),
    }
    assert ngram_statistics(range(9)) == {"distinct_1": 1, "distinct_2": 1, "distinct_3": 1, "repetition_4": 0}


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: np.array(x, np.uint16)])
def test_ngrams_take_any_sequence_of_ints(kind):
    assert ngram_statistics(kind([1, 1, 2, 1, 1])) == ngram_statistics([1, 1, 2, 1, 1])


def test_ngrams_of_short_continuations_are_nan():
    assert ngram_statistics([7, 7, 7]) == {
        "distinct_1": 1 / 3,
        "distinct_2": 1 / 2,
        "distinct_3": 1,
        "repetition_4": pytest.approx(NAN, nan_ok=True),
    }
    assert all(np.isnan(value) for value in ngram_statistics([]).values())


@pytest.mark.parametrize(
    ("tokens", "kind", "message"),
    [
        ([1.0, 2.0], TypeError, "tokens must be token ids, got dtype float64"),
        ("a text", TypeError, "tokens must be token ids, got dtype <U6"),
        ([True], TypeError, "tokens must be token ids, got dtype bool"),
        ([[1, 2], [3, 4]], ValueError, r"tokens must have shape \[T\], got shape \(2, 2\)"),
        (3, ValueError, r"tokens must have shape \[T\], got shape \(\)"),
    ],
)
def test_bad_tokens(tokens, kind, message):
    with pytest.raises(kind, match=message):
        ngram_statistics(tokens)


# --- harmonic mean ----------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-300, 1e300)), min_size=1, max_size=5))
def test_harmonic_mean_is_that_of_scipy(values):
    assert harmonic_mean(values) == pytest.approx(stats.hmean(values), rel=1e-12)


def test_harmonic_mean_is_zero_where_one_is():
    ratings = np.array([[2, 2, 2], [1, 2, 2], [0, 2, 2], [0, 0, 0]])
    np.testing.assert_allclose(harmonic_mean(ratings), [2, 1.5, 0, 0])
    np.testing.assert_allclose(harmonic_mean(ratings.T, axis=0), [2, 1.5, 0, 0])
    assert harmonic_mean(np.zeros((0, 3))).shape == (0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, -0.5], "values must be finite and not negative, got -0.5"),
        ([1, np.inf], "values must be finite and not negative, got inf"),
        ([1, NAN], "values must be finite and not negative, got nan"),
        ([], r"values must have an entry along axis -1, got shape \(0,\)"),
        (2.0, r"values must have an entry along axis -1, got shape \(\)"),
    ],
)
def test_bad_values_of_a_harmonic_mean(values, message):
    with pytest.raises(ValueError, match=message):
        harmonic_mean(values)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_counts_of_samples():
    weights = bootstrap_weights(30, draws=50, seed=3)
    assert weights.shape == (50, 30) and weights.dtype == np.float64
    counts = weights * 30
    np.testing.assert_allclose(counts, counts.round(), atol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    np.testing.assert_array_equal(weights, bootstrap_weights(30, draws=50, seed=3))
    assert (weights != bootstrap_weights(30, draws=50, seed=4)).any()


def test_weights_of_a_row_are_binomial():
    counts = bootstrap_weights(10, draws=20_000)[:, 9] * 10  # the last row: what the others leave
    assert counts.mean() == pytest.approx(1, abs=0.03)
    assert counts.var() == pytest.approx(0.9, abs=0.04)


def test_one_row_has_all_the_weight():
    np.testing.assert_array_equal(bootstrap_weights(1, draws=3), np.ones((3, 1)))


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": 3, "draws": 0}, ValueError, "draws must be at least 1, got 0"),
        ({"n": 3, "seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"n": 3.0}, TypeError, "n must be an int, got float"),
    ],
)
def test_bad_settings_of_weights(settings, kind, message):
    with pytest.raises(kind, match=message):
        bootstrap_weights(**settings)


# --- intervals --------------------------------------------------------------------------------------------------------

DRAWS = 100_000


def by_scipy(data, statistic, level, **settings):
    found = stats.bootstrap(
        data,
        statistic,
        n_resamples=DRAWS,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(1),
        **settings,
    )
    # Of so many samples, an end of the interval is known to within a twentieth of their standard deviation.
    return found.confidence_interval, 0.05 * found.standard_error


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_interval_is_that_of_scipy(rng, level):
    values = rng.exponential(size=40)
    mean, *bounds = interval(values, bootstrap_weights(40, draws=DRAWS), level)
    expected, error = by_scipy((values,), np.mean, level)
    assert mean == pytest.approx(values.mean(), rel=1e-14)
    assert bounds == pytest.approx(list(expected), abs=error)
    assert bounds[0] < mean < bounds[1]


def test_interval_of_a_sample_is_the_quantile_of_its_means(rng):
    values, weights = rng.normal(size=7), bootstrap_weights(7, draws=301, seed=5)
    means = sorted((weights * values).sum(axis=1))
    assert interval(values, weights, 0.9)[1:] == pytest.approx((means[15], means[285]), rel=1e-12)


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(NAN)), min_size=1, max_size=8), st.floats(0, 1))
def test_interval_holds_the_rest_where_values_are_nan(values, level):
    values, weights = np.array(values), bootstrap_weights(len(values), draws=60)
    found = interval(values, weights, level)
    rest = values[~np.isnan(values)]
    if not rest.size:
        assert np.isnan(found).all()
        return
    mean, low, high = found
    assert mean == pytest.approx(rest.mean(), rel=1e-12, abs=1e-9)
    assert rest.min() <= low <= high <= rest.max()
    drawn = weights[:, ~np.isnan(values)]
    drawn = drawn[drawn.sum(axis=1) > 0]
    if len(drawn):
        means = [np.average(rest, weights=row) for row in drawn]
        bounds = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        assert [low, high] == pytest.approx(list(bounds), rel=1e-9, abs=1e-6)


def test_interval_where_no_sample_has_a_value():
    assert interval([1.0, NAN], [[0.0, 1.0]]) == (1.0, pytest.approx(NAN, nan_ok=True), pytest.approx(NAN, nan_ok=True))


def test_interval_of_equal_values_is_a_point():
    assert interval([0.1] * 11, bootstrap_weights(11)) == (0.1, 0.1, 0.1)


def test_interval_with_an_infinite_value_reaches_it_where_samples_do(recwarn):
    weights = bootstrap_weights(20)
    mean, low, high = interval([1.0] * 19 + [np.inf], weights)
    assert (mean, low, high) == (np.inf, 1.0, np.inf)
    assert interval([1.0] * 19 + [np.inf], weights, 0.0)[1] == np.inf  # 64 % of the samples hold it
    assert interval([1.0] * 19 + [-np.inf], weights) == (-np.inf, -np.inf, 1.0)
    assert not recwarn.list


def test_interval_takes_shares_and_tensors():
    held, weights = [True, False, True, True], bootstrap_weights(4)
    expected = interval([1.0, 0.0, 1.0, 1.0], weights)
    assert interval(held, weights) == interval(torch.tensor(held), torch.tensor(weights)) == expected


def test_ratio_interval_is_that_of_scipy(rng):
    counts = rng.integers(1, 30, size=40)
    losses = counts * rng.gamma(9, 0.3, size=40)
    found = ratio_interval(losses, counts, bootstrap_weights(40, draws=DRAWS), transform=np.exp)

    def perplexity(losses, counts, axis=-1):
        return np.exp(losses.sum(axis=axis) / counts.sum(axis=axis))

    expected, error = by_scipy((losses, counts), perplexity, 0.95, paired=True)
    assert found[0] == pytest.approx(np.exp(losses.sum() / counts.sum()), rel=1e-13)
    assert found[1:] == pytest.approx(tuple(expected), abs=error)


def test_ratio_interval_of_equal_denominators_is_that_of_the_mean(rng):
    values, weights = rng.normal(size=12), bootstrap_weights(12)
    np.testing.assert_allclose(ratio_interval(3 * values, [3] * 12, weights), interval(values, weights), rtol=1e-12)


def test_ratio_interval_leaves_out_rows_with_nan(rng):
    above, below = rng.uniform(1, 2, size=6), rng.uniform(1, 2, size=6)
    weights = bootstrap_weights(6, draws=200)
    found = ratio_interval([*above, NAN, 5.0], [*below, 1.0, NAN], np.hstack([weights, np.full((200, 2), 0.3)]))
    assert found == ratio_interval(above, below, weights)


def test_ratio_interval_without_a_denominator(recwarn):
    nothing = pytest.approx((NAN, NAN, NAN), nan_ok=True)
    weights = bootstrap_weights(2, draws=50)
    assert ratio_interval([0.0, 0.0], [0, 0], weights) == nothing
    assert ratio_interval([1.0, 0.0], [0, 0], weights, transform=np.exp) == nothing  # not infinite
    assert ratio_interval([NAN, 1.0], [1.0, NAN], weights) == nothing
    # Samples of the row without tokens alone do not count: every other one has the same ratio.
    assert ratio_interval([0.0, 6.0], [0, 3], weights) == pytest.approx((2, 2, 2))
    assert not recwarn.list


def test_a_perplexity_beyond_the_numbers_is_infinite(recwarn):
    assert ratio_interval([1e4, 1e4], [1, 1], bootstrap_weights(2), transform=np.exp) == (np.inf, np.inf, np.inf)
    assert not recwarn.list


WEIGHTS = np.full((5, 3), 1 / 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: interval([1, 2], WEIGHTS), ValueError, r"weights must have shape \[draws, 2\], got shape \(5, 3\)"),
        (
            lambda: interval([1, 2, 3], WEIGHTS[0]),
            ValueError,
            r"weights must have shape \[draws, 3\], got shape \(3,\)",
        ),
        (
            lambda: interval([1, 2, 3], WEIGHTS[:0]),
            ValueError,
            r"weights must have shape \[draws, 3\], got shape \(0, ",
        ),
        (lambda: interval([1, 2, 3], -WEIGHTS), ValueError, "weights must be finite and not negative"),
        (lambda: interval([1, 2, 3], WEIGHTS * NAN), ValueError, "weights must be finite and not negative"),
        (lambda: interval([[1, 2, 3]], WEIGHTS), ValueError, r"values must have shape \[n\], got shape \(1, 3\)"),
        (lambda: interval("abc", WEIGHTS), TypeError, "values must be float16"),
        (lambda: interval([1, 2, 3], WEIGHTS, 1.5), ValueError, "level must be from 0 to 1, got 1.5"),
        (lambda: interval([1, 2, 3], WEIGHTS, "95 %"), TypeError, "level must be a real number, got str"),
        (
            lambda: ratio_interval([1, 2, 3], [1, 2], WEIGHTS),
            ValueError,
            r"numerator and denominator must have one shape, got \(3,\) and \(2,\)",
        ),
        (
            lambda: ratio_interval([1, 2, 3], [1, -2, 3], WEIGHTS),
            ValueError,
            "denominator must not be negative, got -2",
        ),
        (
            lambda: ratio_interval([1, 2, 3], [1, 2, 3], WEIGHTS, transform=lambda x: x[:2]),
            ValueError,
            r"transform must return shape \(6,\), got \(2,\)",
        ),
        (
            lambda: ratio_interval([1, 2, 3], [1, 2, 3], WEIGHTS, transform=np.sum),
            ValueError,
            r"what transform returns must have shape \[n\], got shape \(\)",
        ),
    ],
)
def test_bad_arguments_of_intervals(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        [0.5, 1],
        (0.5, True),
        np.array([0.5, 1], np.float16),
        np.array([0.5, 1], object),
        torch.tensor([0.5, 1]),
        torch.tensor([0.5, 1], dtype=torch.bfloat16),
        torch.tensor([0.5, 1], requires_grad=True),
        [torch.tensor(0.5, requires_grad=True), 1.0],
    ],
    ids=str,
)
def test_numbers_of_any_kind(given):
    found = as_numbers(given, "x")
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [0.5, 1])


@pytest.mark.parametrize("given", [np.array([True, False]), [True, False], torch.tensor([True, False])])
def test_booleans_are_numbers(given):
    np.testing.assert_array_equal(as_numbers(given, "x"), [1, 0])


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (None, TypeError, "x must be float16.*got dtype object"),
        (["a"], TypeError, "x must be float16.*got dtype <U1"),
        ([1, None], TypeError, "x must be float16.*got dtype object"),
        ([1j], TypeError, "x must be float16.*got dtype complex128"),
        ([[1], [1, 2]], ValueError, "x must be array_like, got list"),
        (np.ma.masked_array([1, 2], [True, False]), TypeError, "x must be a plain array, got a masked array"),
        (torch.ones(2).to_sparse(), TypeError, "x must be a dense tensor"),
    ],
)
def test_what_are_no_numbers(given, kind, message):
    with pytest.raises(kind, match=message):
        as_numbers(given, "x")
