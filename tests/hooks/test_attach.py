"""Maps into a model: one test for each rule of how the hooks behave."""

import models_zoo
import numpy as np
import pytest
import torch
from attached import FAMILIES, TEXTS, TOKENIZER, encode, hooks_on, language_model, logits, outputs_of, random_maps
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import lineas
from lineas.hooks import attach, modules, outputs

# --- what a map does --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5, 2.0])
def test_every_token_of_a_mapped_module_is_mapped_at_the_strength(family, strength):
    model, maps = language_model(family)
    name = next(iter(maps))
    plain = outputs_of(model, [name], lambda: model(**encode()))[name]
    with maps.attach(model, strength=strength):
        found = outputs_of(model, [name], lambda: model(**encode()))[name]
    weight, bias = (torch.tensor(x) for x in (maps[name].weight, maps[name].bias))
    torch.testing.assert_close(found, plain + strength * (weight * plain + bias - plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_goes_on_with_the_mapped_output(family):
    model, maps = language_model(family)
    expected = logits(model)
    with maps.attach(model):
        assert (logits(model) - expected).abs().max() > 0.01
        chained = outputs_of(model, list(maps), lambda: model(**encode()))
    # The same by hand: each map from the outside, one after the other.
    handles = [
        modules.get_module(model, name).register_forward_hook(
            lambda module, args, output, one=one: one.transform(output)
        )
        for name, one in maps.items()
    ]
    by_hand = outputs_of(model, list(maps), lambda: model(**encode()))
    for handle in handles:
        handle.remove()
    for name in maps:
        torch.testing.assert_close(chained[name], by_hand[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_strength_0_gives_the_same_bits(family):
    model, maps = language_model(family)
    expected = logits(model)
    with maps.attach(model, strength=0):
        assert torch.equal(logits(model), expected)


def test_strength_0_does_not_touch_the_output():
    model, x = Returns(lambda x: (x, 1)), torch.tensor([[-0.0, float("nan"), 2.0]])
    with random_maps({"part": 3}).attach(model, strength=0):
        assert model(x)[0] is x


def test_neurons_outside_the_support_keep_their_bits_at_any_strength():
    model = models_zoo.mlp()
    weight, bias = np.ones(7, np.float32), np.zeros(7, np.float32)
    weight[2], bias[4] = 0.3, 1.0
    maps = lineas.SteeringMaps({"0": lineas.AffineMap(weight, bias)})
    x = torch.randn(20, 5)
    kept = [0, 1, 3, 5, 6]
    for strength in (1.0, 0.7, 1 / 3):
        with maps.attach(model, strength=strength), torch.no_grad():
            assert torch.equal(model[0](x)[:, kept], nn.functional.linear(x, model[0].weight, model[0].bias)[:, kept])


@pytest.mark.parametrize("shape", [(3, 3, 6, 6), (1, 3, 4, 5)])
@pytest.mark.parametrize("name", ["conv1", "bn", "conv2", "gn"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channels_of_a_cnn_are_on_axis_1(shape, name, memory_format):
    model = models_zoo.cnn().to(memory_format=memory_format)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(memory_format=memory_format)
    maps = random_maps({name: modules.output_width(getattr(model, name))})
    plain = outputs_of(model, [name], lambda: model(x))[name]
    with maps.attach(model):
        found = outputs_of(model, [name], lambda: model(x))[name]
    weight, bias = (torch.tensor(x)[:, None, None] for x in (maps[name].weight, maps[name].bias))
    torch.testing.assert_close(found, weight * plain + bias, atol=1e-6, rtol=1e-5)
    assert found.is_contiguous(memory_format=memory_format)


# --- outputs ----------------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """A model whose part gives what `shape` makes of a tensor."""

    def __init__(self, shape):
        super().__init__()
        self.part, self.shape = nn.Module(), shape
        self.part.forward = lambda x: shape(x)

    def forward(self, x):
        return self.part(x)


@pytest.mark.parametrize(
    "shape",
    [
        lambda x: (x, "more", None),
        lambda x: [x, 3],
        lambda x: BaseModelOutput(last_hidden_state=x, attentions=(x,)),
        lambda x: x,
    ],
    ids=["tuple", "list", "ModelOutput", "tensor"],
)
def test_tuples_and_model_outputs_are_handled(shape):
    model, x = Returns(shape), torch.randn(1, 2, 3)
    maps = random_maps({"part": 3})
    with maps.attach(model):
        found = model(x)
    expected = maps["part"].transform(x)
    plain = shape(x)
    assert type(found) is type(plain)
    torch.testing.assert_close(outputs.take(found), expected)
    if isinstance(found, BaseModelOutput):
        torch.testing.assert_close(found.last_hidden_state, expected)
        assert found.attentions[0] is x
    elif not isinstance(found, torch.Tensor):
        assert found[1:] == plain[1:]


def test_attention_modules_that_return_tuples_and_layers_that_return_tensors():
    model = models_zoo.llama()
    names = ["model.layers.0.self_attn", "model.layers.1"]
    maps = random_maps(dict.fromkeys(names, models_zoo.WIDTH))
    plain = outputs_of(model, names[:1], lambda: model(**encode()))[names[0]]
    with maps.attach(model):
        found = outputs_of(model, names, lambda: model(**encode()))
    assert isinstance(found[names[0]], tuple) and isinstance(found[names[1]], torch.Tensor)
    torch.testing.assert_close(found[names[0]][0], maps[names[0]].transform(plain[0]))
    assert found[names[1]].shape == (len(TEXTS), encode()["input_ids"].shape[1], models_zoo.WIDTH)


def test_an_output_without_a_hidden_state_names_the_module():
    model = Returns(lambda x: {"x": x})
    with random_maps({"part": 3}).attach(model), pytest.raises(TypeError, match=r"^part: the output must be a tensor"):
        model(torch.ones(1, 3))
    assert hooks_on(model) == 0


def test_the_output_is_never_written_to_in_place():
    class Shares(nn.Module):
        """Gives its input back, so that a write would be seen by the caller."""

        def __init__(self):
            super().__init__()
            self.part = nn.Identity()

        def forward(self, x):
            return self.part(x)

    model, x = Shares(), torch.randn(2, 3)
    kept = x.clone()
    with random_maps({"part": 3}).attach(model):
        found = model(x)
    assert torch.equal(x, kept) and not torch.equal(found, kept)
    assert found.data_ptr() != x.data_ptr()


def test_modules_are_neither_wrapped_nor_replaced():
    model, maps = language_model("llama")
    before = {name: (id(module), type(module), module.forward) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with maps.attach(model):
        logits(model)
        assert {n: (id(m), type(m), m.forward) for n, m in model.named_modules()} == before
        assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# --- dtype, device, gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("map_dtype", [np.float32, np.float64])
def test_the_dtype_of_the_output_is_kept_and_rounded_to_once(dtype, map_dtype):
    model = Returns(lambda x: x)
    maps = random_maps({"part": 64}, dtype=map_dtype)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with maps.attach(model):
        found = model(x)
    assert found.dtype == dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.tensor(value).to(work) for value in (maps["part"].weight, maps["part"].bias))
    expected = weight * x.to(work) + bias
    if dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(found, expected)
    else:
        # Rounding the exact value once: at most half a unit in the last place away, but for float32's own rounding.
        unit = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(expected.abs()))
        assert ((found.float() - expected).abs() <= 0.5001 * unit).all()


def test_the_device_of_the_output_is_followed():
    model = Returns(lambda x: x)
    with random_maps({"part": 3}).attach(model):
        assert model(torch.ones(2, 3, device="meta")).device.type == "meta"
        assert model(torch.ones(2, 3)).device.type == "cpu"
        assert model(torch.ones(2, 3, device="meta")).device.type == "meta"


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_models(family):
    model, maps = language_model(family)
    with maps.attach(model):
        expected = logits(model)
    model.to(torch.bfloat16)
    with maps.attach(model):
        found = logits(model)
    assert found.dtype == torch.bfloat16
    plain = logits(model)
    assert (found - expected).abs().mean() < 0.2 * (found - plain).abs().mean()


@pytest.mark.parametrize("training", [False, True])
def test_gradients_pass_through_the_maps(training):
    model, maps = models_zoo.mlp().train(training), random_maps({"0": 7, "2": 4})
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    model.double()
    with maps.attach(model, strength=0.6):
        assert torch.autograd.gradcheck(model, (x,))
        assert torch.autograd.gradgradcheck(model, (x,))
        model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_works_and_is_kept(family):
    model, maps = language_model(family)
    model.train()
    with maps.attach(model):
        batch = encode()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        assert all(module.training for module in model.modules())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_first_run_in_inference_mode_does_not_spoil_later_gradients():
    model, maps = models_zoo.mlp(), random_maps({"0": 7})
    x = torch.randn(3, 5)
    with maps.attach(model):
        with torch.inference_mode():
            first = model(x)
        second = model(x)
        second.sum().backward()
    assert torch.equal(first, second.detach())


# --- padding and the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_text_with_and_without_the_cache(family):
    model, maps = language_model(family)
    prompt = TOKENIZER(TEXTS[:1], return_tensors="pt")
    texts = {}
    with maps.attach(model) as handle:
        for strength in (1.0, 0.0):
            handle.strength = strength
            for cache in (True, False):
                texts[strength, cache] = model.generate(
                    **prompt, do_sample=False, max_new_tokens=12, min_new_tokens=12, use_cache=cache
                ).tolist()
    assert texts[1.0, True] == texts[1.0, False]
    assert texts[0.0, True] == texts[0.0, False]
    assert texts[1.0, True] != texts[0.0, True]
    assert len(texts[1.0, True][0]) == prompt["input_ids"].shape[1] + 12


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_of_a_left_padded_batch_gives_each_prompt_its_own_text(family):
    model, maps = language_model(family)
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    with maps.attach(model):
        together = model.generate(**encode(), **settings)[:, -8:]
        alone = [model.generate(**TOKENIZER([text], return_tensors="pt"), **settings)[0, -8:] for text in TEXTS]
    assert together.tolist() == [one.tolist() for one in alone]


@pytest.mark.parametrize("family", FAMILIES)
def test_left_and_right_padding_give_the_same_steered_logits(family):
    model, maps = language_model(family)
    found = {}
    with maps.attach(model):
        for side in ("left", "right"):
            batch = encode(tokenizer=models_zoo.tokenizer(padding_side=side))
            mask = batch["attention_mask"]
            batch["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
            found[side] = logits(model, batch)[mask.bool()]
    torch.testing.assert_close(found["left"], found["right"], atol=1e-4, rtol=1e-4)


def test_a_strength_changed_between_decoding_steps_holds_from_the_next_one():
    model, maps = language_model("llama")
    name = next(iter(maps))
    module = modules.get_module(model, name)
    before, after, strengths = [], [], [1.0, 0.25, 0.0, 2.0]
    module.register_forward_hook(lambda module, args, output: before.append(output))
    with maps.attach(model) as handle:
        module.register_forward_hook(lambda module, args, output: after.append(output))

        def change(input_ids, scores):
            handle.strength = strengths[len(after) % len(strengths)]
            return scores

        batch = TOKENIZER(TEXTS[:1], return_tensors="pt")
        model.generate(**batch, do_sample=False, max_new_tokens=4, min_new_tokens=4, logits_processor=[change])
    assert [output.shape[1] for output in before] == [batch["input_ids"].shape[1], 1, 1, 1]
    for plain, found, strength in zip(before, after, strengths, strict=True):
        torch.testing.assert_close(found, maps[name].transform(plain, strength=strength))


# --- coming and going -------------------------------------------------------------------------------------------------


def test_maps_are_on_at_once_and_off_after_remove():
    model, maps = language_model("qwen2")
    plain = logits(model)
    handle = maps.attach(model)
    assert not torch.equal(logits(model), plain)
    assert handle.attached and hooks_on(model) == len(maps) + 1  # on the model itself as well
    assert repr(handle) == "Handle(3 modules, strength=1.0)"
    handle.remove()
    handle.remove()  # nothing to do
    assert torch.equal(logits(model), plain)
    assert not handle.attached and hooks_on(model) == 0
    assert repr(handle) == "Handle(3 modules, removed)"


def test_the_handle_is_the_object_of_the_with_block():
    model, maps = language_model("qwen2")
    handle = maps.attach(model, strength=0.4)
    with handle as same:
        assert same is handle and handle.maps is maps and handle.strength == 0.4
        with handle:  # hooks are not put on twice
            assert hooks_on(model) == len(maps) + 1
    assert hooks_on(model) == 0
    with pytest.raises(RuntimeError, match=r"^these maps were removed from the model: attach them again"):
        handle.__enter__()
    with pytest.raises(RuntimeError, match="these maps were removed from the model"):
        handle.strength = 0.7
    assert handle.strength == 0.4


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_leave_on_exceptions(error):
    model, maps = language_model("llama")
    plain = logits(model)
    with pytest.raises(error), maps.attach(model):
        logits(model)
        raise error
    assert hooks_on(model) == 0 and torch.equal(logits(model), plain)


def test_hooks_of_others_stay():
    model, maps = language_model("llama")
    calls = []
    mine = modules.get_module(model, next(iter(maps))).register_forward_hook(lambda *_: calls.append(1))
    with maps.attach(model):
        logits(model)
    logits(model)
    assert len(calls) == 2 and hooks_on(model) == 1
    mine.remove()


def test_strength_is_live():
    model, maps = models_zoo.mlp(), random_maps({"0": 7})
    x = torch.randn(3, 5)
    plain = model[0](x)
    handle = maps.attach(model, strength=0.5)
    for strength in (0.5, 0, 1, -2.5, np.float32(0.25)):
        handle.strength = strength
        assert handle.strength == strength and type(handle.strength) is float
        torch.testing.assert_close(model[0](x), maps["0"].transform(plain, strength=float(strength)))
    handle.remove()


@pytest.mark.parametrize(
    ("strength", "error"),
    [(float("nan"), ValueError), (float("inf"), ValueError), (b"1", TypeError), (None, TypeError), (1j, TypeError)],
)
def test_a_strength_must_be_a_finite_number(strength, error):
    model, maps = models_zoo.mlp(), random_maps({"0": 7})
    with pytest.raises(error, match=r"^strength must be"):
        maps.attach(model, strength=strength)
    assert hooks_on(model) == 0
    with maps.attach(model, strength=0.5) as handle:
        with pytest.raises(error, match=r"^strength must be"):
            handle.strength = strength
        assert handle.strength == 0.5


def test_words_are_no_strengths():
    model, maps = models_zoo.mlp(), random_maps({"0": 7})
    with pytest.raises(ValueError, match=r"^strength must be a number or 'calibrated', got '1'"):
        maps.attach(model, strength="1")
    with pytest.raises(ValueError, match=r"^strength='calibrated' is for maps that were calibrated"):
        maps.attach(model, strength="calibrated")
    with pytest.raises(ValueError, match=r"^strength='calibrated' is for maps that were calibrated"):
        attach.attach(dict(maps), model, "calibrated")  # without metadata
    assert hooks_on(model) == 0
    with maps.attach(model, strength=0.5) as handle:
        with pytest.raises(TypeError, match=r"^strength must be a real number, got str"):
            handle.strength = "1"
        assert handle.strength == 0.5


def test_nested_attach_composes_in_order():
    model, x = models_zoo.mlp(), torch.randn(3, 5)
    first, second = random_maps({"0": 7}, seed=1), random_maps({"0": 7}, seed=2)
    plain = model[0](x)
    with first.attach(model), second.attach(model):
        found = model[0](x)
    torch.testing.assert_close(found, second["0"].transform(first["0"].transform(plain)))
    torch.testing.assert_close(found, (second @ first)["0"].transform(plain))
    assert (found - first["0"].transform(second["0"].transform(plain))).abs().max() > 0.01


def test_the_same_maps_attached_twice_act_twice():
    model, x = models_zoo.mlp(), torch.randn(3, 5)
    maps = random_maps({"0": 7})
    plain = model[0](x)
    with maps.attach(model), maps.attach(model, strength=0.5):
        torch.testing.assert_close(model[0](x), maps["0"].transform(maps["0"].transform(plain), strength=0.5))


@pytest.mark.parametrize("removed", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_attached_maps_are_removed_in_any_order(removed):
    model, x = models_zoo.mlp(), torch.randn(3, 5)
    plain = model[0](x)
    several = [random_maps({"0": 7}, seed=seed) for seed in range(3)]
    handles = [maps.attach(model) for maps in several]
    left = list(range(3))
    for k in removed:
        handles[k].remove()
        left.remove(k)
        expected = plain
        for other in left:
            expected = several[other]["0"].transform(expected)
        torch.testing.assert_close(model[0](x), expected)
    assert hooks_on(model) == 0


def test_a_module_called_twice_in_one_forward_is_mapped_at_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(3, 3)

        def forward(self, x):
            return self.shared(self.shared(x))

    model, x = Twice(), torch.randn(2, 3)
    maps = random_maps({"shared": 3})
    once = maps["shared"].transform(model.shared(x))
    expected = maps["shared"].transform(model.shared(once))
    with maps.attach(model):
        torch.testing.assert_close(model(x), expected)
