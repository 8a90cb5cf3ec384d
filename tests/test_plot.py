"""lineas.plot: what is drawn, read back from the axes."""

from typing import ClassVar

import numpy as np
import pytest

from lineas import AffineMap, SteeringMaps, plot

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


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "lineas\[plot\]"'):
        plot.history({"loss": [1.0]})
