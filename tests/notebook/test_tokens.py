"""Gates over the tokens of a text: what is drawn, and what the explorer is told."""

import matplotlib

matplotlib.use("agg")

import models_zoo as zoo
import numpy as np
import pytest
from attached import hooks_on, language_model
from matplotlib import pyplot as plt

import lineas
from lineas.notebook import tokens

TOKENIZER = zoo.tokenizer()
TEXT = "the dog was very good today but the weather was poor"


@pytest.fixture(autouse=True)
def _figures():
    yield
    plt.close("all")


def gated(kind="token"):
    model, maps = language_model("llama")
    rng = np.random.default_rng(0)
    if kind == "neuron":
        parts = rng.normal(size=(3, zoo.WIDTH)).astype(np.float32)
        one = lineas.NeuronGate(*parts, closed=np.arange(zoo.WIDTH) < 4)
        return model, maps.gated(dict.fromkeys(maps, one))
    gates = {name: lineas.Gate(rng.normal(size=zoo.WIDTH).astype(np.float32), 0.0, context=kind) for name in maps}
    return model, maps.gated(gates)


@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
def test_every_token_is_drawn_on_a_box_of_its_gates_mean(kind):
    model, maps = gated(kind)
    ids = TOKENIZER(TEXT, return_tensors="pt")
    with maps.attach(model) as handle, handle.recorded_gates() as found:
        model(**ids)
    values = [x[0].detach().numpy() for x in found.values()]
    if kind == "neuron":
        values = [x[:, 4:].mean(axis=1) for x in values]
    ax = lineas.plot_gate(model, maps, TEXT, tokenizer=TOKENIZER)
    words = [text.get_text() for text in ax.texts]
    assert words == [*TEXT.split(), "closed", "open"]
    expected = np.mean(values, axis=0)
    count = len(TEXT.split())
    shut, wide = (np.array(matplotlib.colors.to_rgb(colour)) for colour in (tokens.CLOSED, tokens.OPEN))
    for box, value in zip(ax.patches[:count], expected, strict=True):
        np.testing.assert_allclose(box.get_facecolor()[:3], shut + value * (wide - shut), atol=0.01)
    assert hooks_on(model) == 0


def test_lines_are_broken_between_tokens():
    places, lines = tokens._laid_out(["a" * 6, "b" * 6, "c" * 4, "d\n", "e", "f" * 20, "g"], 10)
    assert places == [(0, 0), (0, 1), (6, 1), (0, 2), (0, 3), (0, 4), (0, 5)]
    assert lines == 6


def test_signs_of_mathematics_are_text():
    ax = tokens.draw_tokens(["$x$", "a_b", ""], np.array([0.0, 0.5, 1.0]), 20)
    ax.figure.canvas.draw()
    assert [text.get_text() for text in ax.texts[:3]] == ["$x$", "a_b", "∅"]


def test_a_given_axes_is_drawn_into():
    ax = plt.figure().add_subplot()
    assert tokens.draw_tokens(["a"], np.array([0.5]), 20, ax) is ax


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"maps": 3}, "maps must be SteeringMaps, got int"),
        ({"maps": "plain"}, "maps have no gates"),
        ({"text": ""}, "text must not be empty"),
        ({"text": ["a"]}, "text must be a string, got list"),
        ({"tokenizer": "name"}, "tokenizer must be a loaded tokenizer"),
        ({"columns": 3}, "columns must be at least 10, got 3"),
        ({"strength": np.nan}, "strength must be finite, got nan"),
    ],
)
def test_bad_inputs(change, text):
    model, maps = gated()
    given = {"maps": maps, "text": TEXT, "tokenizer": TOKENIZER} | change
    if given["maps"] == "plain":
        given["maps"] = maps.gated(None)
    with pytest.raises((TypeError, ValueError), match=text):
        lineas.plot_gate(model, **given)
    assert hooks_on(model) == 0


def test_the_explorer_is_told_how_far_the_gates_are_open():
    pytest.importorskip("anywidget")
    model, maps = gated("mean")
    with lineas.explore(maps, model, TOKENIZER, prompt=TEXT, max_new_tokens=2) as view:
        view.generate()
        shown = view._text_data["gate"]
    with maps.attach(model) as handle:
        words, values = tokens.gate_of_tokens(handle, model, TEXT, TOKENIZER)
    assert [token for token, _ in shown] == words == TEXT.split()
    np.testing.assert_allclose([value for _, value in shown], values, rtol=1e-6)
    with lineas.explore(maps.gated(None), model, TOKENIZER, prompt=TEXT, max_new_tokens=2) as view:
        view.generate()
        assert view._text_data["gate"] == []
