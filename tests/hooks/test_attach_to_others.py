"""Maps and models that do not belong together, or do not seem to."""

import warnings

import models_zoo
import pytest
import torch
from attached import FAMILIES, hooks_on, language_model, random_maps

import lineas
from lineas.hooks import modules


def test_a_missing_module_is_an_error_before_anything_is_changed():
    model = models_zoo.llama()
    names = ["model.layers.0.post_attention_layernorm", "layers.1.post_attention_layernorm"]
    maps = random_maps(dict.fromkeys(names, models_zoo.WIDTH))
    message = (
        r"^LlamaForCausalLM has no module 'layers.1.post_attention_layernorm'; similar names: model.layers.\*.post"
    )
    with pytest.raises(ValueError, match=message):
        maps.attach(model)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_another_width_is_an_error_before_anything_is_changed(family):
    model, maps = language_model(family)
    names = list(maps)
    wrong = random_maps({names[0]: models_zoo.WIDTH, names[1]: 12})
    with pytest.raises(ValueError, match=rf"^{names[1]}: the map is for 12 neurons, the module has 16"):
        wrong.attach(model)
    assert hooks_on(model) == 0


def test_another_width_of_a_module_that_does_not_tell_is_an_error_at_its_first_call():
    model = models_zoo.mlp()
    with random_maps({"1": 6}).attach(model):
        message = r"^1: the map is for 6 neurons, the output has 7 \(shape \(2, 7\)\)"
        with pytest.raises(ValueError, match=message):
            model(torch.ones(2, 5))
    assert hooks_on(model) == 0


def test_a_width_of_one_is_not_spread_over_all_channels():
    model = models_zoo.mlp()
    with random_maps({"1": 1}).attach(model), pytest.raises(ValueError, match=r"^1: the map is for 1 neurons"):
        model(torch.ones(2, 5))


def test_something_that_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got dict"):
        random_maps({"0": 7}).attach({})


def test_hooks_put_on_before_a_failure_are_taken_off_again(monkeypatch):
    model, maps = language_model("llama")
    module = modules.get_module(model, list(maps)[1])

    def fails(hook):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "register_forward_hook", fails, raising=False)
    with pytest.raises(KeyboardInterrupt):
        maps.attach(model)
    assert hooks_on(model) == 0


# --- models of another name -------------------------------------------------------------------------------------------


def said(maps, model, **settings):
    """The warnings of one attach."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with maps.attach(model, **settings) as handle:
            handle.strength = 0.5
            model(torch.ones(1, 5))
    return [warning for warning in seen if "fitted to" in str(warning.message)]


def named_model(name):
    model = models_zoo.mlp()
    model.config = type("Config", (), {"_name_or_path": name})()
    return model


def fitted_to(*names):
    """Maps with these models in their metadata; several: composed."""
    one = random_maps({"0": 7})
    several = [lineas.SteeringMaps(one, {"model": name}) for name in names]
    return several[0] if len(several) == 1 else several[1].scaled(0.5).inverse() @ several[0]


CACHED = "/home/me/.cache/huggingface/hub/models--{}/snapshots/0123abcd"


@pytest.mark.parametrize(
    ("fitted", "model"),
    [
        (["meta/llama-1"], "meta/llama-2"),
        (["meta/llama-1"], "/models/llama-2/"),
        (["meta/llama"], "/models/llama/checkpoint-500"),
        (["a/b"], CACHED.format("a--c")),
        (["a/b", "a/c"], "a/b"),  # composed
        (["a/c", "a/b"], "a/b"),
    ],
)
def test_a_model_of_another_name_is_warned_of_once_at_the_line_of_the_caller(fitted, model):
    [warning] = said(fitted_to(*fitted), named_model(model))
    other = next(name for name in fitted if name != "a/b" or len(fitted) == 1)
    assert warning.category is UserWarning and warning.filename == __file__
    assert str(warning.message) == (
        f"these maps were fitted to {other!r}, not to {model!r}: its modules have these names and widths, but they may "
        "do something else"
    )


@pytest.mark.parametrize(
    ("fitted", "model"),
    [
        (["meta/llama-1"], "meta/llama-1"),
        (["meta/Llama-1"], "/models/llama-1"),
        (["/models/llama-1/"], "meta/llama-1"),
        (["C:\\models\\llama-1"], "meta/llama-1"),
        (["a/b"], CACHED.format("a--b")),
        ([CACHED.format("gpt2")], "gpt2"),
        (["a/b", "other/b"], "a/b"),
        ([None], "a/b"),
        ([3], "a/b"),
        (["a/b"], None),
        (["a/b"], ""),
    ],
)
def test_the_same_model_elsewhere_or_an_unknown_one_is_not_warned_of(fitted, model):
    assert not said(fitted_to(*fitted), named_model(model))


def test_maps_without_metadata_are_not_warned_of():
    assert not said(random_maps({"0": 7}), named_model("a/b"))
    assert not said(lineas.SteeringMaps(random_maps({"0": 7}), {"parts": 3}), named_model("a/b"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lineas.hooks.attach.attach(dict(random_maps({"0": 7})), named_model("a/b")).remove()
