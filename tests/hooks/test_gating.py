"""Gates in a model: what they do to the outputs, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from attached import FAMILIES, GREEDY, acted_on, encode, hooks_on, ids, language_model, logits, outputs_of, pickled
from caches import cached
from gates import WIDTH, by_hand, close, gated_model, in_steps, neurons, scalar
from torch import nn
from transformers import DynamicCache

import lineas
from lineas.hooks import gating

# --- what a gate does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_multiplies_the_strength(family, kind, strength):
    model, maps = gated_model(family, kind)
    name, batch = next(iter(maps)), encode()
    plain = outputs_of(model, [name], lambda: model(**batch))[name]
    with maps.attach(model, strength=strength):
        found = outputs_of(model, [name], lambda: model(**batch))[name]
    one, mask = maps[name], batch["attention_mask"]
    value = torch.tensor(by_hand(maps.gates[name], plain, mask))
    expected = plain + strength * value * (torch.tensor(one.weight) * plain + torch.tensor(one.bias) - plain)
    real = mask.bool()
    close(found[real], expected[real])


@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
def test_the_second_pass_does_what_the_first_did(kind):
    model, maps = gated_model(kind=kind)
    with maps.attach(model):
        first = logits(model)
        assert torch.equal(logits(model), first)
        assert torch.equal(logits(model), first)


def test_an_open_gate_gives_the_map_and_a_closed_one_the_activation_to_the_last_bit():
    model, maps = language_model("llama")
    plain = logits(model)
    with maps.attach(model):
        mapped = logits(model)
    for bias, expected in ((1e4, mapped), (-1e4, plain)):
        gate = lineas.Gate(np.zeros(WIDTH, np.float32), bias)
        with maps.gated(dict.fromkeys(maps, gate)).attach(model):
            assert torch.equal(logits(model), expected)
            assert torch.equal(logits(model), expected)  # now in a few steps


@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
@pytest.mark.parametrize("strength", [[0.0, 0.5, 1.0, 2.0], lambda tokens: 0.8**tokens.positions, "array"])
def test_arrays_and_schedules_are_multiplied_as_well(kind, strength):
    model, maps = gated_model(kind=kind)
    name, batch = next(iter(maps)), encode()
    shape = batch["input_ids"].shape
    if strength == "array":
        strength = np.linspace(0, 1, shape[0] * shape[1]).reshape(shape)
    gates = outputs_of(model, [name], lambda: model(**batch))[name]
    value = torch.tensor(by_hand(maps.gates[name], gates, batch["attention_mask"]))
    with maps.gated(None).attach(model, strength=strength):
        whole = outputs_of(model, [name], lambda: model(**batch))[name]
    with maps.attach(model, strength=strength):
        found = outputs_of(model, [name], lambda: model(**batch))[name]
    real = batch["attention_mask"].bool()
    close(found[real], (gates + value * (whole - gates))[real])


@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
def test_a_selection_says_where_a_gate_acts_and_not_what_it_reads(kind):
    model, maps = gated_model(kind=kind)
    name, batch = next(iter(maps)), encode()
    with maps.attach(model):
        whole = outputs_of(model, [name], lambda: model(**batch))[name]
    plain = outputs_of(model, [name], lambda: model(**batch))[name]
    with maps.attach(model, tokens="last"):
        found = outputs_of(model, [name], lambda: model(**batch))[name]
    assert torch.equal(found[:, -1], whole[:, -1])  # the padding is on the left
    assert torch.equal(found[:, :-1], plain[:, :-1])


@pytest.mark.parametrize("kind", ["token", "mean", "neuron"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_gated_alone_as_in_a_batch(kind, side):
    model, maps = gated_model(kind=kind)
    batch = ids([5, 3, 7], side)
    with maps.attach(model) as handle, handle.recorded_gates() as gates:
        logits(model, batch)
        together = dict(gates)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            logits(model, {"input_ids": batch["input_ids"][row : row + 1, mask]})
            for name in maps:
                torch.testing.assert_close(gates[name][0], together[name][row, mask], atol=1e-5, rtol=1e-5)


def test_padding_may_hold_anything():
    class Norm(nn.Module):
        def forward(self, x):
            return x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm()

        def forward(self, input_ids, inputs_embeds, attention_mask):
            return self.norm(inputs_embeds)

    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(1, 4, 3)).astype(np.float32))
    broken = torch.cat([torch.full((1, 2, 3), torch.nan), x], dim=1)
    maps = lineas.SteeringMaps({"norm": lineas.AffineMap(np.ones(3, np.float32), np.ones(3, np.float32))})
    maps = maps.gated({"norm": lineas.Gate(rng.normal(size=3).astype(np.float32), 0.0, context="mean")})
    model = Model()
    with maps.attach(model):
        alone = model(torch.zeros(1, 4, dtype=torch.int64), x, torch.ones(1, 4))
        padded = model(torch.zeros(1, 6, dtype=torch.int64), broken, torch.tensor([[0, 0, 1, 1, 1, 1]]))
    close(padded[:, 2:], alone)


def test_bfloat16_is_rounded_once():
    model, maps = gated_model()
    name = next(iter(maps))
    model = model.to(torch.bfloat16)
    plain = outputs_of(model, [name], lambda: model(**encode()))[name]
    with maps.attach(model, strength=0.7):
        found = outputs_of(model, [name], lambda: model(**encode()))[name]
    assert found.dtype == torch.bfloat16
    expected = maps.transform({name: plain.float()}, 0.7)[name]
    torch.testing.assert_close(found, expected.to(torch.bfloat16), atol=0, rtol=0.01)


def test_gradients_go_through_the_gate():
    model, maps = gated_model(kind="mean")
    z = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for gate in (scalar(), scalar("mean"), neurons()):
        assert torch.autograd.gradcheck(lambda x, gate=gate: gating.values(gate, x, mask), z)
    with maps.attach(model):
        for _ in range(2):
            x = model.get_input_embeddings()(encode()["input_ids"]).detach().requires_grad_()
            model(inputs_embeds=x, attention_mask=encode()["attention_mask"]).logits.sum().backward()
            assert x.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["token", "mean"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model, maps = gated_model(kind=kind)
    model.train()
    found = []
    with maps.attach(model):
        for on in (False, True):
            if on:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            x = model.get_input_embeddings()(encode()["input_ids"]).detach().requires_grad_()
            model(inputs_embeds=x, attention_mask=encode()["attention_mask"], use_cache=False).logits.sum().backward()
            found.append(x.grad)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_values_on_convolutions():
    z = torch.randn(2, 4, 3, 5)
    gate = lineas.Gate(np.arange(4.0, dtype=np.float32), 0.5)
    expected = torch.sigmoid(torch.einsum("bchw,c->bhw", z, torch.arange(4.0)) + 0.5)[:, None]
    close(gating.values(gate, z, axis=1), expected)
    close(torch.tensor(gate.values(z.numpy(), axis=1)), expected)
    model = nn.Conv2d(3, 4, 3)
    maps = lineas.SteeringMaps({"part": lineas.AffineMap(np.ones(4), np.ones(4))})
    one = lineas.NeuronGate(*np.random.default_rng(0).normal(size=(3, 4)))
    wrapped = nn.Module()
    wrapped.part, wrapped.forward = model, lambda x: model(x)
    x = torch.randn(1, 3, 6, 6)
    for some in (gate, one):
        plain = wrapped(x)
        with maps.gated({"part": some}).attach(wrapped):
            close(wrapped(x), plain + torch.tensor(some.values(plain.detach().numpy(), axis=1)))


# --- one gate for all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["token", "mean"])
@pytest.mark.parametrize("site", ["model.layers.0.post_attention_layernorm", "model.layers.0.input_layernorm"])
def test_one_gate_reads_an_early_module_for_all(context, site):
    model, maps = language_model("llama")
    gate, batch = scalar(context, site=site), encode()
    read = outputs_of(model, [site], lambda: model(**batch))[site]
    with maps.gated(gate).attach(model) as handle, handle.recorded_gates() as gates:
        for _ in range(2):
            logits(model, batch)
            assert list(gates) == list(maps)
            real = batch["attention_mask"].bool()
            for name in maps:
                close(gates[name][real], by_hand(gate, read, batch["attention_mask"])[..., 0][real])
        whole = logits(model, ids([8, 8]))
        torch.testing.assert_close(in_steps(model, ids([8, 8]), [5, 1, 1, 1]), whole, atol=2e-4, rtol=2e-4)
    assert hooks_on(model) == 0


def test_a_gate_that_reads_a_later_module_is_an_error_that_names_both():
    model, maps = language_model("llama")
    first, *_, last = maps
    with maps.gated(scalar(site=last)).attach(model):
        with pytest.raises(ValueError, match=rf"{first}: its gate reads the output of '{last}', which has not run yet"):
            logits(model)
    logits(model)


def test_a_shared_gate_under_checkpointing_is_refused():
    model, maps = language_model("llama")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gate = scalar(site="model.layers.0.input_layernorm")
    with maps.gated(gate).attach(model), pytest.raises(RuntimeError, match="gradient checkpointing"):
        model(**encode(), use_cache=False)


# --- handles ----------------------------------------------------------------------------------------------------------


def test_maps_with_and_without_gates_can_be_set_while_they_are_on():
    model, maps = language_model("llama")
    sited = scalar(site="model.layers.0.input_layernorm")
    others = [maps, maps.gated({name: scalar("mean", seed=3) for name in maps}), maps.gated(sited), maps]
    expected = []
    for one in others:
        with one.attach(model):
            expected.append(logits(model))
    plain = logits(model)
    with maps.attach(model) as handle:
        for one, wanted in zip(others, expected, strict=True):
            handle.maps = one
            for _ in range(2):
                assert torch.equal(logits(model), wanted)
        handle.strength = 0
        assert torch.equal(logits(model), plain)
    assert hooks_on(model) == 0


def test_a_gate_for_another_width_changes_nothing():
    model, maps = language_model("llama")
    site = "model.layers.0.mlp.gate_proj"
    with pytest.raises(ValueError, match=f"{site}: the gate is for 16 neurons, the module has 32"):
        maps.gated(scalar(site=site)).attach(model)
    assert hooks_on(model) == 0
    with maps.attach(model) as handle:
        before = hooks_on(model)
        for bad, text in ((site, "the module has 32"), ("model.nowhere", "no module")):
            with pytest.raises(ValueError, match=text):
                handle.maps = maps.gated(scalar(site=bad))
        assert handle.maps is maps
        assert hooks_on(model) == before


def test_a_new_gate_does_not_know_what_is_in_a_cache():
    model, maps = gated_model(kind="mean")
    batch = ids([6])
    with maps.attach(model) as handle:
        cache = DynamicCache(config=model.config)
        in_steps(model, batch, [5], cache)
        handle.maps = maps.gated({name: scalar("mean", seed=9) for name in maps})
        with pytest.raises(ValueError, match="has 5 columns of it in a cache that this gate has not seen"):
            model(input_ids=batch["input_ids"][:, 5:], **cached(cache))


def test_a_cache_that_was_filled_without_the_maps_is_refused():
    model, maps = gated_model(kind="mean")
    batch = ids([6])
    cache = DynamicCache(config=model.config)
    in_steps(model, batch, [5], cache)
    with maps.attach(model), pytest.raises(ValueError, match="fill the cache with the maps on, at strength 0"):
        model(input_ids=batch["input_ids"][:, 5:], **cached(cache))


def test_copies_and_pickles_of_a_model_bring_their_gates():
    model, maps = gated_model(kind="mean")
    with maps.attach(model):
        expected = logits(model)
        for other in (copy.deepcopy(model), pickled(model)):
            assert torch.equal(logits(other), expected)
            (handle,) = lineas.attached(other)
            assert handle.maps == maps
            handle.remove()
            assert hooks_on(other) == 0
    with maps.gated(scalar(site="model.layers.0.input_layernorm")).attach(model):
        expected, other = logits(model), copy.deepcopy(model)
        assert torch.equal(logits(other), expected)
        assert lineas.detach(other) == 1
        assert hooks_on(other) == 0


def test_two_handles_have_their_own_gates_one_after_the_other():
    model, maps = gated_model(kind="mean")
    with maps.attach(model), maps.scaled(0.5).attach(model):
        whole = logits(model, ids([8]))
        torch.testing.assert_close(in_steps(model, ids([8]), [5, 1, 1, 1]), whole, atol=2e-4, rtol=2e-4)


def test_a_strength_for_one_thread_is_multiplied():
    model, maps = gated_model()
    with maps.attach(model, strength=0.3) as handle:
        expected = logits(model)
    with maps.attach(model) as handle:
        logits(model)
        with handle.at(strength=0.3):
            assert torch.equal(logits(model), expected)
            assert torch.equal(logits(model), expected)


def test_acted_knows_gated_modules():
    model, maps = gated_model()
    with maps.attach(model) as handle:
        logits(model)
        assert handle.acted == set(maps)


def test_recording_is_for_maps_that_are_on():
    model, maps = gated_model()
    handle = maps.attach(model)
    handle.remove()
    with pytest.raises(RuntimeError, match="attach them again"), handle.recorded_gates():
        pass


class Small(nn.Module):
    """The least that a model of texts can be."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(60, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, input_ids, attention_mask=None):
        return self.last(self.first(self.embed(input_ids)))


@pytest.mark.parametrize(("kind", "tokens"), [("token", "all"), ("neuron", "last"), ("mean", "all"), ("shared", "all")])
def test_compiled_models_have_gates(kind, tokens):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Small()
    maps = lineas.SteeringMaps({"last": lineas.AffineMap(np.full(WIDTH, 1.5), np.ones(WIDTH))})
    made = {"neuron": neurons(), "shared": scalar(site="first")}
    maps = maps.gated({"last": made.get(kind) or scalar(kind if kind == "mean" else "token")})
    batch = ids([6, 4])
    compiled = torch.compile(model, backend="eager", fullgraph=kind == "token")
    compiled(**batch)
    with torch.no_grad(), maps.attach(model, strength=0.7, tokens=tokens) as handle:
        assert (model(**batch) - compiled(**batch)).abs().max() < 1e-5
        for strength, one in ((0.2, maps), (0.0, maps), (1.0, maps.gated(None)), (1.0, maps)):
            handle.strength, handle.maps = strength, one
            torch.testing.assert_close(compiled(**batch), model(**batch), atol=1e-5, rtol=1e-5)
        handle.strength = 0.9
        whole = compiled(**batch)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch), model(**batch))
        assert (whole - model(**batch)).abs().max() > 0.1


# --- what is refused --------------------------------------------------------------------------------------------------


def test_encoders_and_decoders_have_no_mean():
    from families import FAMILIES as ALL

    family = next(family for family in ALL if family.name.startswith("T5"))
    model = family.model
    name = "encoder.block.0.layer.0.layer_norm"
    maps = lineas.SteeringMaps({name: lineas.AffineMap(np.ones(WIDTH), np.ones(WIDTH))})
    with pytest.raises(ValueError, match="a gate of context 'mean' needs a model with one text"):
        maps.gated({name: scalar("mean")}).attach(model)
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: gating.values(scalar(), torch.ones(2, 3)), "the gate needs 16 channels on axis -1, got shape"),
        (lambda: gating.values(scalar("mean"), torch.ones(2, WIDTH)), r"needs activations \[batch, tokens, 16\]"),
        (
            lambda: gating.values(scalar("mean"), torch.ones(2, 3, WIDTH), torch.ones(2, 4)),
            r"real_mask must have the shape \[2, 3\], got \[2, 4\]",
        ),
        (lambda: gating.values(scalar(), torch.ones(WIDTH, dtype=torch.int64)), "activations must be float16"),
    ],
)
def test_bad_inputs_of_values(call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call()


def test_nothing_of_a_text_is_left_after_generation():
    model, maps = gated_model(kind="mean")
    with maps.attach(model):
        assert acted_on(model, maps.gated(None), lambda: None) == []
        model.generate(**ids([5]), **GREEDY)
        assert not lineas.attached(model)[0]._tracker._of_cache
