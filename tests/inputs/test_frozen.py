"""Freezing a model while it is used, and gradients through checkpointed layers."""

import functools

import models_zoo
import numpy as np
import pytest
import torch
import transformers as tf
from fits import same_maps
from torch import nn
from torch.nn import functional as F
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


# --- nothing is dropped -----------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": models_zoo.VOCABULARY,
    "initializer_range": 0.2,
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim", "d_model", "n_embd"), models_zoo.WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "decoder_layers", "encoder_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "decoder_attention_heads", "n_head"), 2),
    **dict.fromkeys(("encoder_attention_heads", "num_key_value_heads", "num_experts_per_tok"), 2),
    **{"d_kv": 8, "num_local_experts": 4, "num_experts": 4, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1},
}


def dropping(name, kind="ForCausalLM"):
    """A checkpointed model of transformers in training mode, every rate of whose configuration is 0.4."""
    config = getattr(tf, f"{name}Config")(**SIZES)
    for key, value in list(vars(config).items()):
        if ("drop" in key or "jitter" in key) and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, key, 0.4)
    torch.manual_seed(3)
    model = getattr(tf, f"{name}{kind}")(config).train()
    switch_on_checkpointing(model, use_reentrant=False)
    return model


class Dropping(nn.Module):
    """A layer that drops in every way that torch has, and checkpoints by itself, as layers of older models do."""

    def __init__(self):
        super().__init__()
        self.linear, self.config = nn.Linear(8, 8), {"rate": 0.5}
        self.gradient_checkpointing, self._gradient_checkpointing_func = (
            True,
            functools.partial(checkpoint, use_reentrant=False),
        )
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def drop(self, x):
        on = self.training
        x = F.dropout(x, 0.1, on) + F.dropout(x, p=self.config["rate"], training=on) + torch.dropout(x, 0.5, on)
        x = F.alpha_dropout(x, 0.5, on) + F.feature_alpha_dropout(x, 0.5, on) + F.dropout1d(x, 0.5, on)
        x = x + torch.feature_dropout(x, 0.5, on)
        x = F.rrelu(x, training=on) + F.batch_norm(x, self.mean, self.variance, training=on)
        q, rate = x[None], 0.5 if on else 0.0
        x = x + F.scaled_dot_product_attention(q, q, q, None, rate)[0]
        return x + F.scaled_dot_product_attention(q, q, q, dropout_p=rate)[0]

    def checkpointed(self, x):
        x = self.linear(torch.tanh(self.drop(x)))
        return x * torch.empty_like(x).uniform_(0.5, 1.5) if self.training else x  # as routers jitter

    def forward(self, x):
        x = self.drop(torch.tanh(x))
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.checkpointed, x)
        return self.checkpointed(x)


def own_layers():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), Dropping(), Dropping()).train()


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (functools.partial(dropping, "Falcon"), "transformer.h.*.input_layernorm"),
        (functools.partial(dropping, "GPT2", "LMHeadModel"), "transformer.h.*.ln_2"),
        (functools.partial(dropping, "OPT"), "model.decoder.layers.*.final_layer_norm"),
        (functools.partial(dropping, "Bart"), "model.decoder.layers.*.final_layer_norm"),
        (functools.partial(dropping, "Qwen2"), "model.layers.*.post_attention_layernorm"),
        (functools.partial(dropping, "Mixtral"), "model.layers.*.post_attention_layernorm"),
        (own_layers, ["0", "1", "2"]),
    ],
    ids=["Falcon", "GPT-2", "OPT", "Bart", "Qwen2", "Mixtral", "own layers"],
)
def test_nothing_is_dropped_in_checkpointed_models_in_training_mode(build, layers):
    model = build()
    text = not isinstance(model, nn.Sequential)
    source, target = (models_zoo.texts(4, seed=k) if text else torch.randn(4, 5) + k for k in (1, 2))
    settings = {"tokenizer": models_zoo.tokenizer()} if text else {}
    before, attributes = state_of(model), [dict(vars(module)) for module in model.modules()]
    configuration = dict(vars(model.config)) if text else {}
    buffers = [buffer.clone() for buffer in model.buffers()]

    def fit(model, seed):
        torch.manual_seed(seed)
        short = {"layers": layers, "steps": 3, "lr": 1e-3, "progress": False}
        return lineas.fit_end_to_end(model, source, target, seed=seed, **short, **settings)

    one, other = fit(model, 0), fit(model, 1)
    assert state_of(model) == before and [dict(vars(module)) for module in model.modules()] == attributes
    assert not text or dict(vars(model.config)) == configuration
    assert all(map(torch.equal, buffers, model.buffers()))
    evaluated = fit(model.eval(), 2)
    for found in (other, evaluated):
        np.testing.assert_array_equal(found.history["loss"], one.history["loss"])
        same_maps(found.maps, one.maps)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_rates_and_checkpointing_functions_are_restored_on_any_exit(error):
    model = dropping("OPT")
    before = [dict(vars(module)) for module in model.modules()], dict(vars(model.config)), state_of(model)
    with pytest.raises(error), frozen.frozen(model):
        assert model.config.layerdrop == model.model.decoder.layerdrop == 0
        raise error
    assert before == ([dict(vars(module)) for module in model.modules()], dict(vars(model.config)), state_of(model))
    x = torch.ones(200)
    assert not F.dropout(x).all()  # the functions of torch are themselves again


def test_recomputed_layers_are_in_eval_mode_and_others_go_on_as_they_are():
    model, modes = own_layers(), []
    layer = model[1]
    layer.drop = lambda x: (modes.append(layer.training), x)[1]
    with frozen.frozen(model):
        x = torch.randn(3, 5, requires_grad=True)
        model(x).sum().backward()
        assert layer.training
    assert modes == [True, False, False]  # beside what is checkpointed, in it, and once more for the gradient
