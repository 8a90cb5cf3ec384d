"""lineas.plot: what is drawn, read back from the axes."""

from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest

from lineas import AffineMap, SteeringMaps, fit, plot
from lineas.maps.path import SparsePath

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def make_maps():
    weight = np.ones(8, np.float32)
    weight[:2] = 0.5
    bias = np.zeros(8, np.float32)
    bias[1:3] = 1.0
    identity = AffineMap(np.ones(8, np.float32), np.zeros(8, np.float32))
    return SteeringMaps({"model.layers.0.norm": AffineMap(weight, bias), "model.layers.1.norm": identity})


class Result:
    """As much of a FitResult as is drawn."""

    history: ClassVar = {"loss": np.array([3.0, 2.0, 1.0]), "held_out_loss": np.array([4.0, 3.0, 3.5])}
    best_step = 1


def test_history_draws_both_losses_and_marks_the_maps_that_were_kept():
    ax = plot.history(Result())
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_array_equal(lines["fitted sets"].get_ydata(), [3.0, 2.0, 1.0])
    np.testing.assert_array_equal(lines["held-out sets"].get_ydata(), [4.0, 3.0, 3.5])
    assert lines["maps kept: step 1"].get_xdata()[0] == 1
    assert ax.get_xlabel() == "step" and "loss" in ax.get_ylabel()


def test_history_takes_a_dict_and_draws_no_held_out_line_without_a_held_out_set():
    ax = plot.history({"loss": np.array([3.0, 2.0]), "held_out_loss": np.array([])})
    assert [line.get_label() for line in ax.get_lines()] == ["fitted sets"]


def test_history_refuses_other_things():
    with pytest.raises(TypeError, match="result must be a FitResult or a history dict, got int"):
        plot.history(3)
    with pytest.raises(ValueError, match=r"result: the history has no 'loss', only \['lr'\]"):
        plot.history({"lr": []})


def test_support_draws_percentages_and_shortens_names():
    ax = plot.support(make_maps())
    assert [bar.get_height() for bar in ax.patches] == [pytest.approx(37.5), 0.0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1"]
    assert ax.get_xlabel() == "module (model.layers.*.norm)"


def test_support_of_many_modules_thins_the_labels():
    identity = AffineMap(np.ones(2, np.float32), np.zeros(2, np.float32))
    ax = plot.support(SteeringMaps({f"layers.{k}.norm": identity for k in range(40)}))
    assert len(ax.patches) == 40
    assert [label.get_text() for label in ax.get_xticklabels()][:3] == ["0", "3", "6"]


def test_support_keeps_names_that_share_nothing():
    identity = AffineMap(np.ones(2, np.float32), np.zeros(2, np.float32))
    ax = plot.support(SteeringMaps({"a": identity, "b": identity}))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert ax.get_xlabel() == "module"


def test_quantiles_draws_the_three_curves():
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(20, 3)), rng.normal(2.0, 0.5, size=(10, 3))
    affine = AffineMap(np.array([1.0, 0.5, 1.0]), np.array([0.0, 2.0, 0.0]))
    ax = plot.quantiles(source, target, affine, 1)
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    np.testing.assert_allclose(lines["source"], np.sort(source[:, 1]))
    np.testing.assert_allclose(lines["target"], np.sort(target[:, 1]))
    np.testing.assert_allclose(lines["source, mapped"], np.sort(0.5 * source[:, 1] + 2.0))


def test_quantiles_at_a_strength_and_into_given_axes():
    import matplotlib.pyplot as plt

    given = plt.subplots()[1]
    source = np.arange(4.0).reshape(4, 1)
    ax = plot.quantiles(source, source, AffineMap(np.array([3.0]), np.array([2.0])), 0, strength=0.5, ax=given)
    assert ax is given
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    np.testing.assert_allclose(lines["source, mapped at strength 0.5"], 2.0 * source[:, 0] + 1.0)


@pytest.mark.parametrize(
    ("source", "target", "neuron", "message"),
    [
        (np.zeros(3), np.zeros((2, 3)), 0, r"source: expected shape \(n, 3\) .* got \(3,\)"),
        (np.zeros((2, 3)), np.zeros((2, 4)), 0, r"target: expected shape \(n, 3\) .* got \(2, 4\)"),
        (np.zeros((0, 3)), np.zeros((2, 3)), 0, r"source: expected shape \(n, 3\) with n >= 1.* got \(0, 3\)"),
        (np.zeros((2, 3)), np.zeros((2, 3)), 3, "neuron: expected 0 <= neuron < 3, got 3"),
        (np.zeros((2, 3)), np.zeros((2, 3)), -1, "neuron: expected 0 <= neuron < 3, got -1"),
    ],
)
def test_quantiles_refuses_bad_input(source, target, neuron, message):
    with pytest.raises(ValueError, match=message):
        plot.quantiles(source, target, AffineMap(np.ones(3), np.zeros(3)), neuron)


def test_most_changed_draws_the_neurons_that_move_most_first():
    rng = np.random.default_rng(0)
    source = rng.normal(size=(20, 5))
    target = rng.normal(size=(10, 5)) + np.array([0.0, 3.0, 1.0, -5.0, 2.0])
    affine = fit(source, target)
    axes = plot.most_changed(source, target, affine, 4)
    assert [ax.get_title() for ax in axes] == ["neuron 3", "neuron 1", "neuron 4", "neuron 2"]
    mapped = {line.get_label(): line.get_ydata() for line in axes[1].get_lines()}["source, mapped"]
    np.testing.assert_allclose(mapped, np.sort(affine.transform(source)[:, 1]))
    assert len(axes[0].figure.axes) == 4  # the spare panels of the second row are gone
    assert [t.get_text() for t in axes[0].figure.legends[0].get_texts()] == ["source", "target", "source, mapped"]
    assert [bool(ax.get_ylabel()) for ax in axes] == [True, False, False, True]


def test_most_changed_into_given_axes():
    import matplotlib.pyplot as plt

    given = plt.subplots(1, 2)[1]
    sample = np.arange(6.0).reshape(3, 2)
    axes = plot.most_changed(sample, sample, AffineMap(np.ones(2), np.array([0.0, 1.0])), 2, axes=given)
    assert list(axes) == list(given) and axes[0].get_legend() is not None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "n: expected 1 <= n <= 3, the map's width, got 0"),
        ({"n": 4}, ValueError, "n: expected 1 <= n <= 3, the map's width, got 4"),
        ({"n": 1.5}, TypeError, "n must be an int, got float"),
        ({"n": 2, "axes": [None]}, ValueError, "axes must be 2, one a neuron, got 1"),
    ],
)
def test_most_changed_refuses_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        plot.most_changed(np.zeros((2, 3)), np.zeros((2, 3)), AffineMap(np.ones(3), np.zeros(3)), **arguments)


def make_path(modules, d, points=12, held_out=True):
    """Slopes that a soft threshold of falling penalties leaves, with the losses that belong to them."""
    count = 1 if modules is None else len(modules)
    penalties = np.geomspace(1.0, 1e-3, points)
    size = np.random.default_rng(0).exponential(0.2, count * d)
    size[0] = 0.9
    weight = 1 + np.maximum(size - penalties[:, None], 0)
    loss = np.sum((1 + size - weight) ** 2, axis=1)
    held_out_loss = loss + 0.3 * np.sum((weight - 1) ** 2, axis=1) if held_out else None
    return SparsePath(penalties, 1.0, loss, held_out_loss, modules, (d,) * count, weight, np.zeros_like(weight))


def test_path_draws_losses_support_and_modules():
    names = tuple(f"model.layers.{k}.post_attention_layernorm" for k in range(57))
    path = make_path(names, 16)
    loss, support, modules = path.plot()
    lines = {line.get_label(): line for line in loss.get_lines()}
    np.testing.assert_array_equal(lines["fitted data"].get_xdata(), path.penalties)
    np.testing.assert_array_equal(lines["fitted data"].get_ydata(), path.loss)
    np.testing.assert_array_equal(lines["held-out data"].get_ydata(), path.held_out_loss)
    np.testing.assert_allclose(support.get_lines()[0].get_ydata(), 100 * path.support / (57 * 16))
    np.testing.assert_allclose(modules.collections[0].get_array(), 100 * path.module_support.T / 16)
    best = path.penalties[path.index(best=True)]
    assert 0 < path.index(best=True) < len(path) - 1
    label = f"least held-out loss: penalty {best:.3g}"
    for ax in (loss, support, modules):
        assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_label() == label] == [best]
        assert ax.get_xscale() == "log" and ax.get_xlim()[0] > ax.get_xlim()[1]  # penalties fall to the right
    assert modules.get_title(loc="left") == "model.layers.*.post_attention_layernorm"
    assert [t.get_text() for t in modules.get_yticklabels()] == [str(k) for k in range(0, 57, 4)]
    assert modules.get_ylim() == (56.5, -0.5)  # the first module on top
    assert modules.collections[0].colorbar.ax.get_ylabel() == support.get_ylabel() == "neurons changed (%)"
    assert loss.get_ylabel() == "loss (squared W2)" and modules.get_xlabel().startswith("penalty")


def test_path_puts_each_penalty_inside_its_cell():
    path = make_path(("a",), 8, points=5)
    mesh = path.plot()[2].collections[0]
    edges = mesh.get_coordinates()[0, :, 0]
    assert (edges[:-1] > path.penalties).all() and (path.penalties > edges[1:]).all()


def test_path_of_one_array_without_held_out_data():
    loss, support, modules = make_path(None, 8, held_out=False).plot()
    assert [line.get_label() for line in loss.get_lines()] == ["fitted data"]
    assert len(support.get_lines()) == 1 and not modules.get_lines()
    assert [t.get_text() for t in modules.get_yticklabels()] == ["array"]


def test_path_of_a_single_penalty():
    loss, _, modules = make_path(("a", "b"), 4, points=1, held_out=False).plot()
    assert loss.get_xlim()[0] > 1 > loss.get_xlim()[1]
    assert modules.collections[0].get_array().shape == (2, 1)


def test_path_into_given_axes():
    import matplotlib.pyplot as plt

    given = plt.subplots(1, 3)[1]
    axes = make_path(("a", "b"), 4).plot(axes=given)
    assert list(axes) == list(given)
    assert len(axes[0].get_legend().get_texts()) == 3 and not axes[0].figure.legends
    assert axes[1].get_xscale() == "log"
    with pytest.raises(ValueError, match="axes must be 3, for loss, support and modules, got 2"):
        plot.path(make_path(("a",), 4), axes=given[:2])


@pytest.mark.parametrize("count", [1, 3, 57])
def test_path_keeps_its_texts_apart(count):
    axes = make_path(tuple(f"model.layers.{k}.mlp.down_proj_norm" for k in range(count)), 4).plot()
    figure = axes[0].figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    legend = figure.legends[0].get_window_extent(renderer)
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
    assert legend.y0 >= axes[0].get_window_extent(renderer).y1
    labels = [t.get_window_extent(renderer) for t in axes[2].get_yticklabels()]
    assert all(below.y1 <= above.y0 + 1 for above, below in pairwise(labels))
    assert all(label.x0 >= axes[2].yaxis.label.get_window_extent(renderer).x1 for label in labels)


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "lineas\[plot\]"'):
        plot.history({"loss": [1.0]})
