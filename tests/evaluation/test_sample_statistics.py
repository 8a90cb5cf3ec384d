"""Statistics of few prompts: against other implementations, formulas and simulations."""

import itertools

import numpy as np
import pytest

import lineas

pytest.importorskip("sklearn")
stats = pytest.importorskip("scipy.stats")

from lineas.evaluation import sample_statistics as statistics  # noqa: E402


def sets(rng, n, m, d=8, shift=0.0, moved=0.0):
    """Normal source and target rows apart by `shift` in every neuron, and the source moved by a share of that."""
    source, target = rng.normal(size=(n, d)), rng.normal(size=(m, d)) + shift
    return {"a": source}, {"a": source + moved * shift}, {"a": target}


# --- distances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(10, 10), (13, 20), (20, 11)])
def test_distances_of_halves_against_pot(rng, n, m):
    ot = pytest.importorskip("ot")
    samples = [{"a": rng.normal(size=(size, 3)), "b": 50 * rng.normal(size=(size, 2))} for size in (n, n, m)]
    found = statistics.half_distances(statistics.compared(*samples), draws=2, seed=4)
    order, k = np.random.default_rng(4), min(n, m) // 2
    for draw in range(2):
        ours, theirs = order.permutation(n)[:k], order.permutation(m)
        for place, name in enumerate("ab"):
            source, steered, target = (one[name] for one in samples)
            total = (source.var(axis=0, ddof=1) + target.var(axis=0, ddof=1)).sum() / 2
            half, other = target[theirs[:k]], target[theirs[k : 2 * k]]
            for values, rows in zip(found, (source[ours], steered[ours], other), strict=True):
                expected = ot.wasserstein_1d(rows, half, p=2).sum() / total
                np.testing.assert_allclose(values[draw, place], expected, rtol=1e-5)


def test_floor_is_what_two_samples_of_one_distribution_are_apart(rng):
    found = [
        [values.mean() for values in statistics.half_distances(statistics.compared(*sets(rng, n, m)), draws=20, seed=0)]
        for n, m in [(16, 16), (16, 40)] * 30
    ]
    unsteered, _, floor = np.array(found).T
    # Of one distribution: as far apart as halves of the target are, though these exclude each other.
    assert abs((unsteered - floor).mean()) < 3 * (unsteered - floor).std() / np.sqrt(len(found))
    assert floor.mean() > 10 * abs((unsteered - floor).mean())


def test_modules_count_alike_whatever_their_scale(rng):
    source, steered, target = ({"a": one["a"], "b": 1000 * one["a"]} for one in sets(rng, 12, 12, shift=1, moved=0.5))
    for values in statistics.half_distances(statistics.compared(source, steered, target), draws=3, seed=0):
        np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-4)


@pytest.mark.parametrize("moved", [0.2, 0.7])
@pytest.mark.parametrize(("n", "m"), [(16, 16), (16, 40)])
def test_interval_of_the_share_holds_the_true_one(rng, n, m, moved):
    held, true = [], 1 - (1 - moved) ** 2
    for _ in range(60):
        compared = statistics.compared(*sets(rng, n, m, shift=1.2, moved=moved))
        found = statistics.closed(compared, statistics.half_distances(compared, draws=20, seed=0))
        held.append(found.share_interval[0] <= true <= found.share_interval[1])
        assert found.distance_interval[0] < found.distance < found.distance_interval[1]
    assert np.mean(held) >= 0.88
    assert abs(found.share - true) < 0.3


def test_a_gap_that_may_be_none_has_no_bounds(rng):
    compared = statistics.compared(*sets(rng, 10, 10))
    found = statistics.closed(compared, statistics.half_distances(compared, draws=20, seed=0))
    assert found.share_interval == (-np.inf, np.inf)
    assert found.distance == 0 and found.distance_interval == (0, 0)


def test_neurons_that_do_not_vary_are_an_error_only_if_all_are(rng):
    source, steered, target = sets(rng, 10, 10)
    for one in (source, steered, target):
        one["a"][:, 1:] = 3.0
    assert statistics.compared(source, steered, target).source.shape == (10, 8)
    with pytest.raises(ValueError, match="a: no neuron differs between the prompts of source or of target"):
        statistics.compared(*({"a": np.ones((10, 8))} for _ in range(3)))


def test_permutation_test_has_its_level_and_finds_what_is_there(rng):
    found = [
        statistics.chance_of_distance(statistics.compared(*sets(rng, 12, 20)), shuffles=39, seed=k) for k in range(60)
    ]
    assert np.mean(np.array(found) <= 0.05) <= 0.12 and 0.4 < np.mean(found) < 0.6
    apart = statistics.compared(*sets(rng, 12, 20, shift=1.5))
    assert statistics.chance_of_distance(apart, shuffles=39, seed=0) == 1 / 40


# --- separability -----------------------------------------------------------------------------------------------------


def test_a_probe_is_not_judged_by_the_rows_it_was_fitted_to(rng):
    # 200 neurons tell any 24 rows apart, so a probe that saw them would be right about all.
    found = [
        statistics.cross_validated_auc(rng.normal(size=(12, 200)), rng.normal(size=(12, 200)), seed=k)
        for k in range(20)
    ]
    assert abs(np.mean(found) - 0.5) < 0.1
    apart = rng.normal(size=(12, 200)) + 2
    assert statistics.cross_validated_auc(rng.normal(size=(12, 200)), apart, seed=0) == 1


@pytest.mark.parametrize("auc", [0.0, 0.3, 0.5, 0.86, 1.0])
@pytest.mark.parametrize("n", [10, 40])
def test_ends_of_the_interval_are_widened_standard_errors_away(auc, n):
    low, high = statistics.auc_interval(auc, n, n)
    assert 0 <= low <= auc <= high <= 1 and high - low > 0.05
    for end in (low, high):
        if end in (0.0, 1.0):
            continue
        # Hanley and McNeil 1982, equation 1, which Newcombe's symmetric form agrees with for equal sizes.
        q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
        error = np.sqrt((end * (1 - end) + (n - 1) * (q1 - end**2 + q2 - end**2)) / n**2)
        np.testing.assert_allclose(abs(end - auc), 1.5 * stats.norm.isf(0.025) * error, atol=1e-9)
    mirrored = statistics.auc_interval(1 - auc, n, n)
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=1e-9)


def test_intervals_are_narrower_with_more_rows_and_wider_for_many_modules():
    widths = [np.ptp(statistics.auc_interval(0.8, n, n)) for n in (10, 20, 80)]
    assert widths == sorted(widths, reverse=True)
    assert np.ptp(statistics.auc_interval(0.8, 20, 20, level=1 - 0.05 / 30)) > widths[1]


def test_interval_of_the_auc_holds_the_true_one(rng):
    held, shift = [], np.where(np.arange(60) < 20, 0.35, 0.0)
    for k in range(40):
        source, target = rng.normal(size=(16, 60)), rng.normal(size=(16, 60)) + shift
        low, high = statistics.auc_interval(statistics.cross_validated_auc(source, target, seed=k), 16, 16)
        # A probe of all rows, whose true area is known, is a little better than those of the folds.
        probe = target.mean(axis=0) - source.mean(axis=0)
        held.append(low <= stats.norm.cdf(probe @ shift / np.sqrt(2 * probe @ probe)) <= high)
    assert np.mean(held) >= 0.85


# --- stability of the support -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(12, 12), (12, 17)])
def test_neurons_enter_as_on_the_sparse_path(rng, sizes):
    n, m = sizes
    source = rng.normal(size=(n, 40)) * rng.uniform(0.2, 3, 40)
    target = rng.normal(size=(m, 40)) * rng.uniform(0.2, 3, 40) + rng.normal(size=40)
    entries = statistics.entry_penalties({"a": source}, {"a": target})["a"]
    path = lineas.sparse_path(source, target, n_penalties=30)
    np.testing.assert_allclose(entries.max(), path.penalties[0], rtol=1e-6)
    for count in (1, 3, 10, 25):
        changed = np.flatnonzero((path.at(support=count).weight != 1) | (path.at(support=count).bias != 0))
        assert set(changed) == set(np.argsort(-entries)[:count]), count


def test_planted_neurons_are_found_again_and_noise_is_not(rng):
    planted = np.arange(60) < 6
    source, target = {"a": rng.normal(size=(20, 60))}, {"a": rng.normal(size=(20, 60)) + 3.0 * planted}
    found = statistics.support_stability(source, target, {"a": planted}, bootstraps=10, shuffles=5, seed=0)
    assert found.between > 0.9 and found.to_fitted > 0.9 and found.by_module[0] == found.between
    assert found.shuffled.max() < 0.8 and found.shuffled_to_fitted.shape == (5,)
    other = np.roll(planted, 6)
    elsewhere = statistics.support_stability(source, target, {"a": other}, bootstraps=10, shuffles=5, seed=0)
    assert elsewhere.between > 0.9 and elsewhere.to_fitted < 0.1


def test_without_a_concept_refits_are_as_alike_as_those_of_shuffled_prompts(rng):
    scale = np.exp(rng.normal(size=60))  # neurons of large variance come first whatever the prompts
    higher = []
    for k in range(20):
        source, target = ({"a": rng.normal(size=(16, 60)) * scale} for _ in range(2))
        fitted = {"a": np.arange(60) < 12}
        found = statistics.support_stability(source, target, fitted, bootstraps=6, shuffles=5, seed=k)
        assert found.between > found.chance  # so chance alone would call it stable
        higher.append(found.between > found.shuffled.max())
    assert np.mean(higher) < 0.45  # 1/6 expected


def test_chance_is_what_random_neurons_have_in_common(rng):
    fitted = {"a": np.arange(50) < 10, "b": np.arange(30) < 20, "c": np.zeros(5, dtype=bool)}
    samples = [{name: rng.normal(size=(10, one.size)) for name, one in fitted.items()} for _ in range(2)]
    found = statistics.support_stability(*samples, fitted, bootstraps=2, shuffles=2, seed=0)
    drawn = [[rng.permutation(one) for one in fitted.values()] for _ in range(60)]
    pairs = [statistics.jaccard(*pair) for pair in itertools.combinations(drawn, 2)]
    np.testing.assert_allclose(found.chance, np.mean(pairs), rtol=0.03)
    assert np.isnan(found.by_module[2])  # a module that is left alone has no support to compare


# --- damage -----------------------------------------------------------------------------------------------------------


def test_damage_by_its_definition(rng):
    z = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5))
    change = 0.1 * z + rng.normal(size=5)
    found = statistics.damage(z, change)
    sigma, delta = np.cov(z.T), change.mean(axis=0)
    np.testing.assert_allclose(found.damage, 5 * delta @ sigma @ delta / np.trace(sigma) ** 2, rtol=1e-10)
    centred = np.sum((z - z.mean(axis=0)) ** 2)
    np.testing.assert_allclose(found.change, np.sum(change**2) / centred, rtol=1e-10)
    for scale in (1e-3, 1e4):
        np.testing.assert_allclose(statistics.damage(scale * z, scale * change), found, rtol=1e-8)
    np.testing.assert_allclose(statistics.damage(z, 3 * change), 9 * np.array(found), rtol=1e-10)


def test_a_shift_by_a_standard_deviation_in_every_independent_neuron_has_damage_1(rng):
    z = rng.normal(size=(4000, 6))
    np.testing.assert_allclose(statistics.damage(z, np.ones_like(z)), (1, 1), atol=0.06)
    # In the direction of a large variance the same length does more, across it less.
    z[:, 0] *= 5
    along, across = (statistics.damage(z, np.ones_like(z) * (np.arange(6) == k)) for k in (0, 1))
    assert along.damage > 20 * across.damage and along.change == pytest.approx(across.change)


def test_activations_that_do_not_vary():
    assert statistics.damage(np.ones((5, 3)), np.zeros((5, 3))) == (0, 0)
    assert statistics.damage(np.ones((5, 3)), np.ones((5, 3))) == (np.inf, np.inf)
