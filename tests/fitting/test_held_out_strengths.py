"""Fits that hold maps back: which strength of them is best is told by held-out sets."""

import math

import models_zoo as zoo
import numpy as np
import pytest
from fits import Trouble, interrupt, prompts, rows, same_maps, short_fit

import lineas
from lineas import fit_jointly

STRENGTHS = (0.4, 0.7, 1.0)
LAYERS = zoo.NORMS["llama"]
SOURCE, TARGET = prompts(6, 1), prompts(6, 2)
# Texts of both sides: what is to be reached lies on the way to the target.
HELD_OUT = SOURCE, [rows(SOURCE, 0, 5), rows(TARGET, 0, 1)]


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


def held_out_loss(model, maps, strength):
    """By attached maps, and by the public functions alone."""
    with maps.attach(model, strength=strength):
        moved = lineas.collect(model, HELD_OUT[0], layers=LAYERS)
    wanted = lineas.collect(model, HELD_OUT[1], layers=LAYERS)
    return np.mean([lineas.wasserstein(moved[name], wanted[name]).sum() for name in moved])


def test_the_best_maps_at_their_best_strength_are_kept(llama):
    settings = dict(steps=4, lr=0.2)
    result = short_fit(llama, held_out=HELD_OUT, strengths=STRENGTHS, patience=None, **settings)
    # a fit without the choice, as far as that one went
    through = short_fit(llama, held_out=HELD_OUT, patience=None, **settings)
    np.testing.assert_array_equal(through.history["loss"], result.history["loss"])
    assert result.best_strength < 1 and result.best_step > 0
    assert result.held_out_loss < through.held_out_loss
    tried = {s: held_out_loss(llama, result.maps, s / result.best_strength) for s in STRENGTHS}
    assert min(tried, key=tried.get) == result.best_strength
    assert result.held_out_loss == pytest.approx(tried[result.best_strength], rel=1e-4)
    history = result.history
    assert set(history["held_out_strength"][1:]) <= set(STRENGTHS) and history["held_out_strength"][0] == 1
    assert result.held_out_loss <= history["held_out_loss"].min()
    assert result.maps.metadata["history"]["best_strength"] == result.best_strength
    assert result.maps.metadata["settings"]["strengths"] == list(STRENGTHS)
    # nothing to choose at the identity
    assert (through.held_out_passes, result.held_out_passes) == (5, 1 + 4 * len(STRENGTHS))


def test_the_maps_are_those_of_the_steps_held_back(llama):
    settings = dict(held_out=HELD_OUT, lr="auto", steps=3)
    result = short_fit(llama, strengths=(0.5,), **settings)
    full = short_fit(llama, SOURCE, TARGET, lr="auto", steps=result.best_step)
    assert result.best_strength == 0.5 and "best_strength=0.5," in repr(result)
    half = {name: found.scaled(0.5) for name, found in full.maps.items()}
    same_maps(result.maps, half, rtol=1e-15, atol=1e-15)


def test_strength_one_is_the_default_to_the_bit(llama):
    one, default = (short_fit(llama, held_out=HELD_OUT, **extra) for extra in ({"strengths": [1]}, {}))
    assert one.maps == default.maps and one.best_strength == default.best_strength == 1.0
    np.testing.assert_array_equal(one.history["held_out_loss"], default.history["held_out_loss"])


def test_what_was_not_mapped_stays_so(llama):
    result = short_fit(llama, held_out=HELD_OUT, strengths=(0.5,), l1=0.2, steps=3)
    assert 0 < result.maps.support == result.history["support"][result.best_step - 1] < result.maps.d


@pytest.mark.parametrize("lr", ["auto", 0.05])
def test_a_fit_goes_on_with_its_strengths(llama, lr, tmp_path):
    settings = dict(held_out=HELD_OUT, strengths=STRENGTHS, patience=None, lr=lr, steps=4)
    path = tmp_path / "fit.safetensors"
    whole = short_fit(llama, forward=Trouble(0, interrupt), **settings)
    part = short_fit(llama, checkpoint=path, forward=Trouble(13, interrupt), **settings)
    assert part.stopped == "interrupted"
    again = short_fit(llama, checkpoint=path, forward=Trouble(0, interrupt), **settings)
    assert again.maps == whole.maps and again.best_strength == whole.best_strength
    for name, values in whole.history.items():
        np.testing.assert_array_equal(values, again.history[name])
    with pytest.raises(ValueError, match="of which the strengths differs"):
        short_fit(llama, checkpoint=path, **{**settings, "strengths": (1.0,)})


def test_several_tasks_share_a_strength(llama):
    tasks = {"a": (SOURCE, TARGET), "b": (prompts(5, 3), prompts(5, 4))}
    held_out = {"a": HELD_OUT, "b": (tasks["b"][0], tasks["b"][0])}
    settings = dict(layers=LAYERS, steps=3, progress=False, held_out=held_out)
    result, full = fit_jointly(llama, tasks, strengths=STRENGTHS, **settings), fit_jointly(llama, tasks, **settings)
    assert result.best_strength in STRENGTHS
    assert result.held_out_loss <= full.held_out_loss
    assert np.mean(list(result.held_out_task_loss.values())) == pytest.approx(result.held_out_loss)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"strengths": ()}, ValueError, "strengths is empty"),
        ({"strengths": 0.5}, TypeError, "strengths must be a list of numbers, got float"),
        ({"strengths": "1"}, TypeError, "strengths must be a list of numbers, got str"),
        ({"strengths": ("1",)}, TypeError, "strengths must be a real number, got '1'|strengths must be"),
        ({"strengths": (math.inf,)}, ValueError, "strengths must be finite, got inf"),
        (
            {"strengths": (0.5, 1.0), "held_out": None},
            ValueError,
            "strengths: there are no held_out sets to choose among them by",
        ),
    ],
)
def test_errors(llama, settings, error, message):
    with pytest.raises(error, match=message):
        short_fit(llama, **{"held_out": HELD_OUT, **settings})
