"""Maps, paths and distances of streaming quantiles against those of the arrays that these have seen."""

import numpy as np
import pytest

import lineas
from lineas.notebook import plot

SIZE = 2048


def samples(rng, n, m, dtype=np.float64):
    """Two samples of 24 neurons: normal and drifting, skewed, half zero, with heavy tails; one is constant."""
    source = np.concatenate(
        [
            rng.normal(size=(n, 6)) + np.linspace(0, 2, n)[:, None],
            rng.lognormal(0, 0.5, size=(n, 6)),
            np.maximum(rng.normal(size=(n, 6)), 0),
            rng.standard_t(6, size=(n, 6)),
        ],
        axis=1,
    )
    target = np.concatenate(
        [
            1 + 2 * rng.normal(size=(m, 6)),
            rng.lognormal(0, 0.6, size=(m, 6)),
            rng.normal(size=(m, 6)) ** 2,
            rng.standard_t(8, size=(m, 6)),
        ],
        axis=1,
    )
    source[:, 3] = 2.5
    return source.astype(dtype), target.astype(dtype)


def sides(source, target, size=SIZE):
    """The samples as summaries on both sides, and on one."""
    u, v = lineas.quantiles(source, size=size), lineas.quantiles(target, size=size)
    return (u, v), (u, target), (source, v)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_exact_summaries_are_their_arrays(rng, dtype):
    source, target = samples(rng, 90, 70, dtype)
    if dtype == np.float16:
        source[:, 3] = 2.5
    rtol = 1e-12 if dtype == np.float64 else 2e-6
    for u, v in sides(source, target):
        for method in ("mean", "gaussian", "linear"):
            found, expected = lineas.fit(u, v, method=method), lineas.fit(source, target, method=method)
            assert found.weight.dtype == expected.weight.dtype
            np.testing.assert_allclose(found.weight, expected.weight, rtol=rtol, atol=rtol)
            np.testing.assert_allclose(found.bias, expected.bias, rtol=rtol, atol=rtol)
        distance = lineas.wasserstein(u, v)
        assert distance.dtype == lineas.wasserstein(source, target).dtype
        np.testing.assert_allclose(distance, lineas.wasserstein(source, target), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_maps_of_summaries(rng, dtype):
    source, target = samples(rng, 30_000, 20_000, dtype)
    for u, v in sides(source, target):
        for method in ("mean", "gaussian"):
            found, expected = lineas.fit(u, v, method=method), lineas.fit(source, target, method=method)
            np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-6)
            np.testing.assert_allclose(found.bias, expected.bias, rtol=1e-5, atol=1e-6)
        found, expected = lineas.fit(u, v), lineas.fit(source, target)
        np.testing.assert_allclose(found.weight, expected.weight, rtol=3e-3)
        assert found.weight[3] == 1  # constant
        moved = source.mean(0, dtype=np.float64) * found.weight + found.bias
        np.testing.assert_allclose(moved, target.mean(0, dtype=np.float64), atol=1e-5)
        np.testing.assert_allclose(lineas.wasserstein(u, v), lineas.wasserstein(source, target), rtol=5e-3, atol=2e-3)


def test_slopes_get_nearer_with_size(rng):
    source, target = samples(rng, 50_000, 50_000, np.float32)
    expected, errors = lineas.fit(source, target).weight, []
    for size in (512, 2048, 8192):
        u, v = lineas.quantiles(source, size=size), lineas.quantiles(target, size=size)
        errors.append(np.abs(lineas.fit(u, v).weight / expected - 1).mean())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 2e-4


def test_sparse_maps_and_paths(rng):
    source, target = samples(rng, 9000, 8000)
    source, target = {"a": source, "b": source[:, :5]}, {"a": target, "b": target[:, :5]}
    u, v = ({name: lineas.quantiles(x, size=SIZE) for name, x in side.items()} for side in (source, target))
    found, expected = lineas.fit(u, v, l1=0.2, group=0.1), lineas.fit(source, target, l1=0.2, group=0.1)
    assert list(found) == ["a", "b"] and found.metadata["l1"] == 0.2
    for name in found:
        np.testing.assert_allclose(found[name].weight, expected[name].weight, atol=5e-3)
        np.testing.assert_allclose(found[name].bias, expected[name].bias, atol=5e-3)
    held_out = {name: x[::2] for name, x in source.items()}, v
    path = lineas.sparse_path(u, v, n_penalties=9, held_out=held_out)
    whole = lineas.sparse_path(source, target, n_penalties=9, held_out=(held_out[0], target))
    np.testing.assert_allclose(path.penalties, whole.penalties, rtol=1e-3)
    np.testing.assert_allclose(path.loss, whole.loss, rtol=5e-3)
    np.testing.assert_allclose(path.held_out_loss, whole.held_out_loss, rtol=1e-2)
    mixed = lineas.fit({"a": u["a"], "b": source["b"]}, target)  # a summary beside an array
    assert np.array_equal(mixed["b"].weight, lineas.fit(source, target)["b"].weight)


def test_what_was_left_out_does_not_become_a_constant(rng):
    """The values kept of a neuron that is 0 but for a few rows may be 0 all; its spread is known all the same."""
    source, target = np.zeros((5000, 2)), rng.normal(size=(5000, 2))
    source[777] = 1e-3
    u, v = lineas.quantiles(source, size=512), lineas.quantiles(target, size=512)
    assert (lineas.fit(u, v).weight > 1).all()
    np.testing.assert_allclose(lineas.fit(u, v, method="gaussian").weight, target.std(0) / source.std(0), rtol=1e-9)


def test_the_same_summary_on_both_sides(rng):
    u = lineas.quantiles(rng.normal(size=(5000, 4)), size=512)
    assert (lineas.wasserstein(u, u) < 1e-12).all()
    found = lineas.fit(u, u)
    np.testing.assert_allclose(found.weight, 1, atol=1e-12)
    np.testing.assert_allclose(found.bias, 0, atol=1e-12)


def test_pictures(rng):
    pytest.importorskip("matplotlib").use("Agg")
    source, target = samples(rng, 5000, 4000)
    u, v = lineas.quantiles(source, size=512), lineas.quantiles(target, size=512)
    maps = lineas.fit(u, v)
    lines = plot.quantiles(u, v, maps, 1).get_lines()
    assert [len(line.get_xdata()) for line in lines] == [1000] * 3
    assert len(plot.most_changed(u, v, maps, 2)) == 2


def test_bad_use(rng):
    x, weights = rng.normal(size=(5, 3)), np.ones(5)
    seen, empty, other = lineas.quantiles(x), lineas.Quantiles(), lineas.quantiles(x[:, :2])
    for use, error, text in (
        (lambda: lineas.fit(seen, empty), ValueError, "target must have seen at least 2"),
        (
            lambda: lineas.fit({"a": lineas.quantiles(x[:1])}, {"a": x}),
            ValueError,
            r"source\['a'\] must have seen",
        ),
        (lambda: lineas.wasserstein(x, empty), ValueError, "v must have seen at least 1 row, got 0"),
        (lambda: lineas.fit(seen, other), ValueError, r"same number of columns, got shapes \(5, 3\) and \(5, 2\)"),
        (lambda: lineas.fit(seen, x[:1]), ValueError, "target must have at least 2 rows and 1 column"),
        (
            lambda: lineas.fit(seen, x, target_weights=weights),
            ValueError,
            "must be arrays to have row weights",
        ),
        (
            lambda: lineas.wasserstein(seen, x, v_weights=weights),
            ValueError,
            "must be arrays to have row weights",
        ),
        (lambda: lineas.wasserstein(seen, x, v_sorted=True), ValueError, "v_sorted is for arrays, got Quantiles"),
        (lambda: lineas.fit(seen, x, shrinkage="auto"), ValueError, "shrinkage is for arrays, got Quantiles"),
        (lambda: lineas.wasserstein_grad(seen, x), TypeError, "u must be float16, .* got dtype object"),
        (lambda: lineas.fit(seen, {"a": x}), TypeError, "source and target must both be arrays or both be mappings"),
        (lambda: lineas.fit(x, [*x, [np.nan, 0, 0]]), ValueError, "target: nan at row 5, column 0"),
    ):
        with pytest.raises(error, match=text):
            use()


def test_baselines_need_rows(rng):
    pytest.importorskip("sklearn")
    x = rng.normal(size=(5, 3))
    with pytest.raises(TypeError, match="source and target must be arrays here, got Quantiles"):
        lineas.baselines.iti_c(lineas.quantiles(x), x)


def test_iterators(rng):
    """What fits into memory is exact; what does not is a summary, and the metadata say so."""
    source, target = samples(rng, 3000, 2500, np.float32)
    exact = lineas.fit(iter(np.array_split(source, 7)), iter([target]))
    expected = lineas.fit(source, target)
    np.testing.assert_allclose(exact.weight, expected.weight, rtol=1e-6)
    blocks = lambda x: {"a": iter(np.array_split(x, 9))}  # noqa: E731
    memory = 2 * 1024 * 24 * 4  # 1024 values of each neuron and side
    for maps in (lineas.fit(blocks(source), blocks(target)), lineas.fit({"a": source}, {"a": target})):
        assert "rank_error" not in maps.metadata
    maps = lineas.fit(blocks(source), blocks(target), memory=memory)
    same = lineas.fit(*({"a": lineas.quantiles(x, size=1024)} for x in (source, target)))
    np.testing.assert_allclose(maps["a"].weight, same["a"].weight, rtol=1e-6)
    assert maps.metadata["rank_error"] == lineas.quantiles(source, size=1024).rank_error > 0
    path = lineas.sparse_path(blocks(source), blocks(target), n_penalties=3, memory=memory)
    assert path.metadata["rank_error"] == maps.metadata["rank_error"]
    distance = lineas.wasserstein(iter([source]), target, memory=memory)
    np.testing.assert_allclose(distance, lineas.wasserstein(source, target), rtol=0.05, atol=0.02)


def test_large_memory_maps(rng, tmp_path):
    source, target = samples(rng, 3000, 2500, np.float32)
    np.save(tmp_path / "source.npy", source)
    mapped = np.load(tmp_path / "source.npy", mmap_mode="r")
    for memory in (source.nbytes, 1 << 30):  # read as any array
        assert np.array_equal(lineas.fit(mapped, target, memory=memory).weight, lineas.fit(source, target).weight)
    summary = lineas.quantiles(source, size=1024)
    assert np.array_equal(
        lineas.fit(mapped, target, memory=2 * 1024 * 24 * 4).weight, lineas.fit(summary, target).weight
    )
    maps = lineas.fit({"a": mapped}, {"a": target}, memory=1)
    assert maps.metadata["rank_error"] == lineas.quantiles(source, size=512).rank_error


def test_bad_streams(rng):
    x = rng.normal(size=(5, 3))
    bad = np.full((1, 3), np.nan)
    for use, error, text in (
        (lambda: lineas.fit(iter([]), x), ValueError, "source gave no batches: an iterator can be read once, and this"),
        (lambda: lineas.fit({"m": x}, {"m": iter([])}), ValueError, r"target\['m'\] gave no batches"),
        (
            lambda: lineas.fit({"a": iter([x, x[:, :2]])}, {"a": x}),
            ValueError,
            r"^source\['a'\], batch 1 must have 3 col",
        ),
        (lambda: lineas.fit(iter([x, bad]), x), ValueError, "^source, batch 1: nan at row 0, column 0"),
        (lambda: lineas.fit(x, iter([x[:1]])), ValueError, "target must have seen at least 2 rows, got 1"),
        (lambda: lineas.fit(iter([x]), x, source_weights=np.ones(5)), ValueError, "must be arrays to have row weights"),
        (lambda: lineas.fit(x, x, memory=0), ValueError, "memory must be at least 1, got 0"),
        (lambda: lineas.wasserstein(x, x, memory=1e9), TypeError, "memory must be an int, got float"),
    ):
        with pytest.raises(error, match=text):
            use()
