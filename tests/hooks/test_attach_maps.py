"""A handle that takes other maps of the same modules while they are on."""

import numpy as np
import pytest
import torch
from attached import hooks_on, language_model, logits, random_maps
from models_zoo import LAYERS, mlp

import lineas


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_live_handle_takes_other_maps_and_keeps_its_strength(family):
    model, first = language_model(family)
    second = random_maps({name: one.d for name, one in first.items()}, seed=1)
    with second.attach(model, strength=0.7):
        expected = logits(model)
    with first.attach(model, strength=0.7) as handle:
        before, hooks = logits(model), hooks_on(model)
        handle.maps = second
        assert handle.maps is second and handle.strength == 0.7
        assert hooks_on(model) == hooks == LAYERS + 1
        assert torch.equal(logits(model), expected)
        handle.maps = first
        assert torch.equal(logits(model), before)
    assert hooks_on(model) == 0


def test_maps_put_on_later_stay_after_the_others_when_those_are_exchanged():
    model, x = mlp(), torch.randn(3, 5)
    one, two, late = (random_maps({"0": 7}, seed) for seed in range(3))
    with torch.no_grad(), (late @ two).attach(model):
        expected = model(x)
    with torch.no_grad(), one.attach(model) as handle, late.attach(model):
        handle.maps = two
        torch.testing.assert_close(model(x), expected)


def test_a_compiled_model_sees_the_other_maps():
    model, x = mlp(), torch.randn(3, 5)
    one, two = (random_maps({"0": 7}, seed) for seed in range(2))
    with torch.no_grad(), two.attach(model):
        expected = model(x)
    with torch.no_grad(), one.attach(model) as handle:
        compiled = torch.compile(model, backend="eager")
        compiled(x)
        handle.maps = two
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        (3, TypeError, r"maps must be a mapping from module name to AffineMap, got int"),
        (
            random_maps({"0": 7, "4": 3}),
            ValueError,
            r"maps must be of the modules that are attached: 1 missing \['2'\], 1 not attached \['4'\]",
        ),
        (random_maps({"0": 7, "2": 5}), ValueError, r"2: the map must be for 4 neurons as before, got 5"),
        ({"0": lineas.AffineMap.identity(7), "2": np.ones(4)}, TypeError, r"maps\['2'\] must be an AffineMap, got nd"),
    ],
)
def test_maps_that_do_not_fit_are_refused_and_change_nothing(maps, error, message):
    model, x = mlp(), torch.randn(3, 5)
    first = random_maps({"0": 7, "2": 4})
    with torch.no_grad(), first.attach(model) as handle:
        expected = model(x)
        with pytest.raises(error, match=message):
            handle.maps = maps
        assert handle.maps is first
        assert torch.equal(model(x), expected)
