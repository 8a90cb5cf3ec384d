"""Models that are copied, saved, offloaded or compiled with maps on them."""

import copy

import models_zoo
import pytest
import torch
from attached import language_model, logits, pickled, random_maps


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_steered_model_is_steered_by_itself(duplicate):
    model, maps = language_model("llama")
    plain = logits(model)
    with maps.attach(model, strength=0.5) as handle:
        steered = logits(model)
        other = duplicate(model)
        handle.strength = 1.0
        assert torch.equal(logits(other), steered)
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(other), steered)


def test_saving_a_steered_model_saves_its_weights_alone(tmp_path):
    model, maps = language_model("llama")
    plain = logits(model)
    with maps.attach(model):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), plain)


def test_offloaded_models_are_steered():
    accelerate = pytest.importorskip("accelerate")
    model, maps = language_model("llama")
    with maps.attach(model):
        expected = logits(model)
    model = accelerate.cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).is_meta
    with maps.attach(model):
        assert torch.equal(logits(model), expected)


def test_steering_works_in_a_compiled_model():
    model, x = models_zoo.mlp(), torch.randn(3, 5)
    maps = random_maps({"0": 7})
    with maps.attach(model), torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
