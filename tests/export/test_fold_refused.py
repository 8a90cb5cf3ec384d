"""What cannot be folded is refused with the reason, and the model is left as it was."""

from functools import partial

import numpy as np
import pytest
import torch
from fold_cases import language_model, one_map, random_maps, run, same_state, state
from torch import nn

import lineas

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LLAMA_NORMS = ["**.input_layernorm", "**.post_attention_layernorm"]


def refused(model, maps, message, **settings):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        maps.fold(model, inplace=True, **settings)
    assert same_state(model, before)


def test_maps_for_some_tokens_are_refused():
    model = language_model("llama")
    maps = random_maps(model, LLAMA_NORMS)
    for metadata in ({"tokens": "last"}, {"parts": [{"method": "x"}, {"parts": [{"tokens": "last"}]}]}):
        some = lineas.SteeringMaps(dict(maps), metadata)
        refused(model, some, "were fitted for the tokens 'last'; weights act on all tokens.*use maps.attach")
        refused(model, some.scaled(0.5), "were fitted for the tokens 'last'")
    for metadata in ({"tokens": "all"}, {"tokens": "all", "parts": [{"tokens": "last"}]}, {"parts": 1}, None):
        lineas.SteeringMaps(dict(maps), metadata).fold(model)


def test_a_model_with_maps_on_it_is_refused():
    model = language_model("llama")
    maps = random_maps(model, "**.input_layernorm")
    with maps.attach(model):
        message = r"maps are attached to 'model.layers.0.input_layernorm' of this model: detach them first"
        refused(model, random_maps(model, "**.post_attention_layernorm"), message)
    maps.fold(model)


def test_tied_weights_are_refused():
    model = language_model("llama", tie_word_embeddings=True)
    message = "lm_head: weight of 'lm_head' is tied to 'model.embed_tokens.weight', which would change with it"
    refused(model, one_map("lm_head", 50, bias=0.0), message)


def test_modules_without_a_gain_are_refused():
    model = language_model("llama")
    maps = one_map("model.layers.0", 16)
    refused(model, maps, r"model.layers.0: LlamaDecoderLayer has no gain of its own that could hold the map")
    refused(
        nn.Sequential(nn.LayerNorm(4, elementwise_affine=False)), one_map("0", 4), "LayerNorm has no gain of its own"
    )
    one_map("model.layers.0", 16, weight=1.0, bias=0.0).fold(model)  # does nothing there


def test_a_linear_without_a_place_for_a_bias_is_refused():
    refused(
        nn.Sequential(nn.Linear(4, 4, bias=False)), one_map("0", 4), "'0' has no bias, and Sequential is no transform"
    )
    one_map("0", 4, bias=0.0).fold(nn.Sequential(nn.Linear(4, 4, bias=False)))
    model = language_model("llama")
    model.model.extra = nn.Linear(2, 2)
    maps = random_maps(model, LLAMA_NORMS)
    refused(model, maps, "has no bias, and this LlamaForCausalLM is not as its configuration says")


class Subclass(torch.Tensor):
    """Stands for the tensor classes of quantisation libraries."""


def quantised(kind):
    model = language_model("llama")
    for layer in model.model.layers:
        linear = layer.self_attn.q_proj
        if kind == "class":
            layer.self_attn.q_proj = type("Linear4bit", (nn.Linear,), {})(16, 16, bias=False).double()
        elif kind == "tensor":
            linear.weight = nn.Parameter(linear.weight.data.as_subclass(Subclass), requires_grad=False)
        elif kind == "bytes":
            linear.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)
        elif kind == "meta":
            layer.self_attn.q_proj = nn.Linear(16, 16, bias=False, device="meta", dtype=torch.float64)
        else:
            nn.utils.parametrizations.weight_norm(linear)
    return model


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("class", r"'model.layers.0.self_attn.q_proj' is a .*Linear4bit, no plain Linear"),
        ("tensor", "weight of .* is torch.float64 in a Subclass: quantised or sharded weights cannot be read"),
        ("bytes", "is torch.uint8 in a Tensor: quantised"),
        ("meta", "is offloaded: load the model without offloading"),
        ("parametrised", "is computed by a parametrization"),
    ],
)
def test_weights_that_cannot_be_read_are_refused_but_gains_fold(kind, reason):
    model = quantised(kind)
    maps = random_maps(model, "**.input_layernorm")
    with pytest.raises(ValueError, match=reason):
        maps.fold(model, inplace=True)
    gains = random_maps(model, "**.input_layernorm", shift=False)
    old = model.model.layers[0].input_layernorm.weight.clone()
    gains.fold(model, inplace=True)
    expected = old * torch.tensor(gains["model.layers.0.input_layernorm"].weight)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, expected)


def test_an_adapter_on_the_linears_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(language_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    maps = random_maps(language_model("llama"), "**.input_layernorm").rename(prefix="base_model.model.")
    with pytest.raises(ValueError, match=r"q_proj' is a peft\..*, no plain Linear: merge the adapter first"):
        maps.fold(model)


def test_wrong_arguments():
    model, maps = language_model("llama"), one_map("model.layers.0.input_layernorm", 16)
    for settings, kind, message in (
        ({"strength": [1]}, TypeError, "strength must be a real number, got list"),
        ({"strength": "1"}, ValueError, "strength must be a number or 'calibrated', got '1'"),
        ({"strength": "calibrated"}, ValueError, "strength='calibrated' is for maps that were calibrated"),
        ({"inplace": 1}, TypeError, "inplace must be True or False, got 1"),
        ({"convert": None}, TypeError, "convert must be True or False, got None"),
        ({"readers": ["x"]}, TypeError, "readers must be a mapping from module name to names, got list"),
        ({"readers": {"nrm": ["x"]}}, ValueError, "readers: there is no map for module 'nrm'"),
        ({"readers": {"model.layers.0.input_layernorm": "q"}}, TypeError, "must be a list of module names, got 'q'"),
        ({"readers": {"model.layers.0.input_layernorm": []}}, ValueError, "input_layernorm'] is empty"),
        (
            {"readers": {"model.layers.0.input_layernorm": ["q"]}},
            ValueError,
            "input_layernorm']: .* has no module 'q'",
        ),
        (
            {"readers": {"model.layers.0.input_layernorm": ["model.layers.0.mlp.down_proj"]}},
            ValueError,
            "'model.layers.0.mlp.down_proj' reads 24 neurons, not 16",
        ),
        ({"check": ["a text"], "tokenizer": "gpt2"}, TypeError, "tokenizer must be a loaded tokenizer, .*, got str"),
        ({"check": ["a text"]}, ValueError, "check holds texts: pass tokenizer="),
    ):
        with pytest.raises(kind, match=message):
            maps.fold(model, **{"strength": 1.0, **settings})
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        maps.fold("model")
    with pytest.raises(ValueError, match=r"has no module 'model\.layer'"):
        one_map("model.layer", 16).fold(model)
    with pytest.raises(ValueError, match="input_layernorm: the map is for 15 neurons, the module has 16"):
        one_map("model.layers.0.input_layernorm", 15).fold(model)


def test_slopes_do_not_reach_a_shift_that_was_folded_before(tmp_path):
    name = "model.layers.0.input_layernorm"
    first = random_maps(language_model("llama"), name)
    slope = lineas.SteeringMaps({name: lineas.AffineMap(np.full(16, 3.0), np.zeros(16))})
    shift = lineas.SteeringMaps({name: lineas.AffineMap(np.ones(16), np.arange(16.0))})
    folded = first.fold(language_model("llama"))
    folded.save_pretrained(tmp_path)
    loaded = type(folded).from_pretrained(tmp_path, dtype=torch.float64)
    for model in (folded, loaded):
        for use in (slope.fold, partial(slope.to_peft_lora, folder=tmp_path / "lora")):
            with pytest.raises(
                ValueError, match=f"{name}: earlier maps are folded into this model, .* slopes would not"
            ):
                use(model)
        with pytest.warns(UserWarning, match="earlier maps are folded into this model, .* slopes do not reach it"):
            slope.attach(model).remove()
    model = language_model("llama")  # shifts add up
    with first.attach(model), shift.attach(model):
        expected = run(model)
    torch.testing.assert_close(run(shift.fold(folded)), expected)
    other = random_maps(language_model("llama"), "model.layers.1.input_layernorm")
    assert set(other.fold(folded).config.lineas_folded_shifts) == {name, "model.layers.1.input_layernorm"}
