"""Freezing a model while it is used, and gradients through checkpointed layers."""

import models_zoo
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lineas
from lineas.hooks import modules
from lineas.hooks.affine import affine
from lineas.hooks.capture import Capture
from lineas.hooks.pooling import pool_output
from lineas.inputs import frozen
from lineas.inputs.prompts import read

FAMILIES = list(models_zoo.LANGUAGE_MODELS)


def hooks_on(model):
    return sum(len(module._forward_hooks) for module in model.modules())


# --- freezing ---------------------------------------------------------------------------------------------------------


def state_of(model):
    return (
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
    )


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_flags_modes_and_random_state_are_restored_on_any_exit(gradients, error):
    model = models_zoo.gpt2(training=True)
    model.transformer.h[1].eval()  # a mixed model
    model.transformer.wte.weight.requires_grad_(False)
    before, seed = state_of(model), torch.get_rng_state()
    try:
        with frozen.frozen(model, gradients=gradients):
            assert not any(module.training for module in model.modules())
            assert torch.is_grad_enabled() is gradients
            if gradients:
                assert not any(parameter.requires_grad for parameter in model.parameters())
            torch.rand(3)
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.is_grad_enabled()


def test_a_freshly_built_gpt2_in_training_mode_gives_what_it_gives_in_eval_mode():
    tokenizer = models_zoo.tokenizer()
    settings = {"layers": models_zoo.NORMS["gpt2"], "tokenizer": tokenizer}
    model = models_zoo.gpt2(training=True)
    found = lineas.collect(model, models_zoo.texts(4), **settings)
    assert all(module.training for module in model.modules())
    expected = lineas.collect(models_zoo.gpt2(), models_zoo.texts(4), **settings)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_gradients_can_be_taken_inside_no_grad_and_inference_mode():
    model = models_zoo.mlp()
    with torch.inference_mode(), frozen.frozen(model):
        x = torch.ones(2, 5, requires_grad=True)
        model(x).sum().backward()
        assert x.grad is not None
    with torch.no_grad(), frozen.frozen(model):
        assert torch.is_grad_enabled()


def test_weights_made_under_inference_mode_are_a_clear_error_where_gradients_are_wanted():
    with torch.inference_mode():
        model = models_zoo.mlp()
    with pytest.raises(ValueError, match=r"^model: parameter '0.weight' was made under torch.inference_mode\(\)"):
        with frozen.frozen(model):
            raise AssertionError("not reached")
    found = lineas.collect(model, torch.ones(2, 5), layers="2")  # needs no gradient
    assert found["2"].shape == (2, 4)


def test_buffers_made_under_inference_mode_are_an_error_too():
    model = models_zoo.cnn()
    with torch.inference_mode():
        model.bn.running_mean = torch.zeros(6)
    with pytest.raises(ValueError, match=r"buffer 'bn.running_mean' was made under"):
        with frozen.frozen(model):
            raise AssertionError("not reached")


# --- gradient checkpointing -------------------------------------------------------------------------------------------


def switch_on_checkpointing(model, **settings):
    # Older transformers know the method by its older name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


@pytest.mark.parametrize("mode", [{"use_reentrant": True}, "torch's default"])
def test_reentrant_checkpointing_is_refused(mode):
    model = models_zoo.llama()
    if mode == "torch's default":
        for layer in model.model.layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, checkpoint
    else:
        switch_on_checkpointing(model, **mode)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"^model: reentrant gradient checkpointing .*use_reentrant=False"):
        with frozen.frozen(model):
            raise AssertionError("not reached")
    assert state_of(model) == before


def checkpointed(family):
    model = models_zoo.LANGUAGE_MODELS[family]()
    switch_on_checkpointing(model, use_reentrant=False)
    return model


def test_checkpointed_modules_stay_in_training_mode_without_dropout():
    model = checkpointed("gpt2")
    model.transformer.h[0].mlp_dropout = 0.3  # a rate for functional dropout
    with frozen.frozen(model):
        training = {name for name, module in model.named_modules() if module.training}
        assert training == {"transformer", *(f"transformer.h.{i}" for i in range(models_zoo.LAYERS))}
        assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))
        assert model.transformer.h[0].mlp_dropout == 0
    assert model.transformer.h[0].mlp_dropout == 0.3
    assert not any(module.training for module in model.modules())
    with frozen.frozen(model, gradients=False):
        assert not any(module.training for module in model.modules())


def gradients_through(model, family, texts):
    """Gradients of a loss in the maps of every norm, over several batches, and how often the hooks were called."""
    names = modules.resolve(model, models_zoo.NORMS[family])
    weights = {name: torch.full((models_zoo.WIDTH,), 1.1, requires_grad=True) for name in names}
    bias = torch.full((models_zoo.WIDTH,), 0.1)
    calls = []
    loss = 0.0
    with frozen.frozen(model), Capture() as capture:
        for batch in read(texts, "x", tokenizer=models_zoo.tokenizer()).parts(3):
            pooled = {}

            def on_output(name, module, tensor, batch=batch, pooled=pooled):
                calls.append(name)
                out = affine(tensor, weights[name], bias)
                if name not in pooled:  # not when layers run again, so what it saves must not count there
                    pooled[name] = pool_output(name, module, out.square(), batch.mask, "mean")
                return out

            capture.run(model, batch, names, on_output, last=names[-1])
            loss = loss + sum(value.sum() for value in pooled.values())
        loss.backward()
    return [weight.grad for weight in weights.values()], len(calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_checkpointed_layers_are_the_same(family):
    texts = models_zoo.texts(5)
    expected, calls = gradients_through(models_zoo.LANGUAGE_MODELS[family](), family, texts)
    assert calls == 2 * models_zoo.LAYERS
    model = checkpointed(family)
    hooks = hooks_on(model)
    found, calls = gradients_through(model, family, texts)
    if family != "gemma2":  # its hooked norm is the last thing of a layer: recomputation stops before it
        assert calls > 2 * models_zoo.LAYERS  # layers did run again in the backward pass
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert hooks_on(model) == hooks
