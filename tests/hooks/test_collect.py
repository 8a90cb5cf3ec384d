"""Pooled activations out of a model."""

import gc
import re
import warnings

import models_zoo
import numpy as np
import pytest
import torch

import lineas
from lineas.arrays.activations import Activations
from lineas.hooks import modules, pooling

FAMILIES = list(models_zoo.LANGUAGE_MODELS)
TEXTS = models_zoo.texts(7)


def by_hand(model, family, text, pooling):
    """Activations of one prompt, without padding, pooled in NumPy."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.update({name: output[0].numpy()})
        )
        for name in names_of(model, family)
    ]
    with torch.no_grad():
        model(**models_zoo.tokenizer()(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    reduce = {"mean": np.mean, "min": np.min, "max": np.max, "last": lambda x, axis: x[-1], "all": lambda x, axis: x}
    return {name: np.atleast_2d(reduce[pooling](value, axis=0)) for name, value in found.items()}


def names_of(model, family):
    return modules.resolve(model, models_zoo.NORMS[family])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "min", "max", "last", "all"])
def test_the_attention_mask_is_used_in_every_pooling_with_left_and_right_padding(family, side, pooling):
    model = models_zoo.LANGUAGE_MODELS[family]()
    tokenizer = models_zoo.tokenizer(padding_side=side)
    settings = {"layers": models_zoo.NORMS[family], "tokenizer": tokenizer, "pooling": pooling}
    found = lineas.collect(model, TEXTS, batch_size=4, **settings)
    assert list(found) == names_of(model, family)
    alone = [by_hand(model, family, text, pooling) for text in TEXTS]
    for name, value in found.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, np.concatenate([one[name] for one in alone]), atol=1e-5)


@pytest.mark.parametrize("axis_name", ["conv1", "bn", "conv2", "gn"])
def test_channels_of_a_cnn_are_pooled_over_space(axis_name):
    model, images = models_zoo.cnn(), models_zoo.images(5)
    seen = []
    handle = getattr(model, axis_name).register_forward_hook(lambda module, args, output: seen.append(output))
    found = lineas.collect(model, [images[:3], images[3:]], layers=["conv1", "bn", "conv2", "gn"])
    handle.remove()
    assert list(found) == ["conv1", "bn", "conv2", "gn"]
    expected = torch.cat(seen).mean(dim=(2, 3))
    np.testing.assert_allclose(found[axis_name], expected.detach(), atol=1e-6)


def test_outputs_without_tokens_are_taken_as_they_are():
    model, images = models_zoo.cnn(), models_zoo.images(5)
    np.testing.assert_array_equal(lineas.collect(model, images, layers="head")["head"], model(images).detach())
    # A mask speaks of tokens that such outputs do not have.
    found = lineas.collect(
        model,
        {"x": images, "attention_mask": torch.ones(5, 9)},
        layers=["bn", "head"],
        forward=lambda model, batch: model(batch["x"]),
    )
    np.testing.assert_array_equal(found["head"], model(images).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arrays_are_float32_whatever_the_model_computes_in(dtype):
    model = models_zoo.llama()
    settings = {"layers": models_zoo.NORMS["llama"], "tokenizer": models_zoo.tokenizer()}
    expected = lineas.collect(model, TEXTS, **settings)
    found = lineas.collect(model.to(dtype), TEXTS, **settings)
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-5}[dtype]
    for name, value in found.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[name], atol=tolerance)


def test_a_mask_of_another_length_than_the_activation_is_an_error_that_names_the_module():
    model = models_zoo.mlp()
    batch = {"x": torch.ones(2, 4, 5), "attention_mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"^0: the attention mask must have the shape \[2, 4\] .*, got \[2, 3\]"):
        lineas.collect(model, batch, layers="0", forward=lambda model, batch: model(batch["x"]))
    flat = {"x": torch.ones(7, 5), "attention_mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"^0: the output must have a row for each of the 2 prompts .*, got 7 rows"):
        lineas.collect(model, flat, layers="0", forward=lambda model, batch: model(batch["x"]))
    assert not any(module._forward_hooks for module in model.modules())


def test_tokens_in_one_axis_are_pooled_by_prompt():
    # So see the experts of a mixture, and OPT, all tokens.
    model, batch = models_zoo.mlp(), {"x": torch.randn(2, 3, 5), "input_ids": torch.ones(2, 3, dtype=torch.long)}

    def flat(model, batch):
        return model(batch["x"].flatten(0, 1))

    masked = batch | {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    for data, rows in ((batch, [[0, 1, 2], [0, 1, 2]]), (masked, [[1, 2], [0, 1, 2]])):
        expected = [model[0](x)[kept].mean(dim=0).detach().numpy() for x, kept in zip(data["x"], rows, strict=True)]
        found = lineas.collect(model, data, layers="0", forward=flat)["0"]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_rows_for_neither_prompts_nor_tokens_are_an_error_without_a_mask_too():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    match = r"^0: the output must have a row for each of the 2 prompts or 6 tokens to be pooled, got 5 rows"
    with pytest.raises(ValueError, match=match):
        lineas.collect(models_zoo.mlp(), batch, layers="0", forward=lambda model, batch: model(torch.ones(5, 5)))


def test_a_prompt_without_real_tokens_is_an_error():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}
    with pytest.raises(ValueError, match=r"^data\[0\]: row 1 of 'attention_mask' has no real token"):
        lineas.collect(models_zoo.llama(), [batch], layers="model.norm")


def test_decoder_layers_that_return_a_tensor_and_attention_that_returns_a_tuple():
    model = models_zoo.llama()
    settings = {"tokenizer": models_zoo.tokenizer()}
    found = lineas.collect(model, TEXTS, layers=["model.layers.?", "model.layers.*.self_attn"], **settings)
    assert list(found) == [f"model.layers.{i}{part}" for i in range(3) for part in (".self_attn", "")]
    assert all(value.shape == (len(TEXTS), models_zoo.WIDTH) for value in found.values())


def test_modules_come_in_execution_order():
    found = lineas.collect(
        models_zoo.llama(), TEXTS, layers=["**.*_layernorm", "**.mlp", "**.self_attn"], tokenizer=models_zoo.tokenizer()
    )
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    assert list(found) == [f"model.layers.{i}.{part}" for i in range(3) for part in parts]


def test_maps_that_are_on_are_seen():
    model, x = models_zoo.mlp(), torch.randn(4, 5)
    plain = lineas.collect(model, x, layers="0")["0"]
    double = lineas.AffineMap(np.full(7, 2, np.float32), np.zeros(7, np.float32))
    with lineas.SteeringMaps({"0": double}).attach(model):
        np.testing.assert_array_equal(lineas.collect(model, x, layers="0")["0"], 2 * plain)


def test_collecting_inside_inference_mode():
    model, x = models_zoo.mlp(), torch.randn(4, 5)
    with torch.inference_mode():
        found = lineas.collect(model, x, layers="2")
    np.testing.assert_array_equal(found["2"], lineas.collect(model, x, layers="2")["2"])


def test_nothing_is_kept_no_gradient_no_tensor_no_hook():
    model = models_zoo.llama()
    settings = {"layers": models_zoo.NORMS["llama"], "tokenizer": models_zoo.tokenizer()}

    def tensors():
        gc.collect()
        # type(), not isinstance(): the latter asks every object for its __class__, and some warn.
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    lineas.collect(model, TEXTS, **settings)
    before = tensors()
    kept = [lineas.collect(model, TEXTS, **settings) for _ in range(3)]
    assert tensors() <= before  # what earlier tests left may go in the meantime
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    # The arrays own their memory: none of the model's activations lives on in them.
    assert all(value.base is None or value.base.nbytes == value.nbytes for found in kept for value in found.values())


def test_a_model_called_in_its_own_way():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = torch.nn.Linear(2, 3)

        def forward(self, left, right):
            return self.part(left + right)

    model, left, right = Two(), torch.randn(4, 2), torch.randn(4, 2)
    expected = model.part(left + right).detach()
    np.testing.assert_array_equal(lineas.collect(model, (left, right), layers="part")["part"], expected)
    found = lineas.collect(
        model, {"both": (left, right)}, layers="part", forward=lambda model, batch: model(*batch["both"])
    )
    np.testing.assert_array_equal(found["part"], expected)


def test_progress_is_shown_for_several_batches_unless_told_otherwise(capfd):
    settings = {"layers": "model.norm", "tokenizer": models_zoo.tokenizer(), "batch_size": 2}
    lineas.collect(models_zoo.llama(), TEXTS, progress=False, **settings)
    lineas.collect(models_zoo.llama(), TEXTS[:2], **settings)
    assert capfd.readouterr().err == ""
    lineas.collect(models_zoo.llama(), TEXTS, **settings)
    assert "4/4" in capfd.readouterr().err


def test_texts_run_in_parts_of_32_and_batches_as_they_are():
    model, texts = models_zoo.llama(), models_zoo.texts(70)
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    settings = {"layers": "model.norm", "tokenizer": models_zoo.tokenizer(), "progress": False}
    found = lineas.collect(model, texts, **settings)["model.norm"]
    assert sizes == [32, 32, 6]
    batch = dict(settings["tokenizer"](texts, return_tensors="pt", padding=True))
    np.testing.assert_allclose(lineas.collect(model, batch, **settings)["model.norm"], found, atol=1e-5)
    lineas.collect(model, batch, **settings, batch_size=40)
    assert sizes[3:] == [70, 40, 30]


def test_metadata_say_what_was_collected():
    model = models_zoo.llama()
    model.config._name_or_path = "some/model"
    settings = {"tokenizer": models_zoo.tokenizer(), "progress": False}
    found = lineas.collect(
        model, TEXTS, layers=re.compile("model.norm"), tokens=slice(1, None), pooling="max", **settings
    )
    assert isinstance(found, dict) and type(found) is Activations
    tokens = {"slice": [1, None, None]}
    assert found.metadata == {"model": "some/model", "layers": "model.norm", "pooling": "max", "tokens": tokens}
    found = lineas.collect(model, TEXTS, **settings)
    suggested = lineas.sites(model).suggested
    assert list(found) == modules.resolve(model, suggested) == names_of(model, "llama")
    assert found.metadata == {"model": "some/model", "layers": suggested, "pooling": "mean", "tokens": "all"}


def test_an_unknown_pooling_is_refused_before_the_model_runs():
    with pytest.raises(ValueError, match=r"^pooling must be one of 'mean', 'min', 'max', 'last', 'all', got 'median'"):
        lineas.collect(models_zoo.mlp(), torch.ones(1, 5), layers="0", pooling="median")


def test_the_error_of_a_model_leaves_no_hook():
    model = models_zoo.mlp().train()
    with pytest.raises(RuntimeError):
        lineas.collect(model, torch.ones(2, 4), layers="*")
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_pool_output_keeps_gradients():
    x = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    pooling.pool_output("m", torch.nn.Identity(), x, mask, "mean").sum().backward()
    expected = (mask / mask.sum(dim=1, keepdim=True))[:, :, None].expand(2, 3, 4)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("function", [lineas.collect, lineas.fit_incremental, lineas.fit_end_to_end])
def test_a_second_call_of_a_module_is_warned_of_once(function):
    sets = [torch.randn(4, 2), torch.randn(4, 2) + 1]
    sets = [list(one.split(2)) for one in (sets[:1] if function is lineas.collect else sets)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        function(models_zoo.Twice(), *sets, layers=["shared", "end"], progress=False)
    assert [one.category for one in seen] == [UserWarning] and seen[0].filename == __file__
    assert re.match(r"module 'shared' runs more than once in a forward pass: .* the first call", str(seen[0].message))


def test_a_recomputation_is_no_second_call():
    model = models_zoo.llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batches = [dict(models_zoo.tokenizer()(TEXTS[k : k + 2], return_tensors="pt", padding=True)) for k in (0, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        layers = models_zoo.NORMS["llama"]
        lineas.fit_end_to_end(model, batches, batches, layers=layers, steps=1, progress=False)
