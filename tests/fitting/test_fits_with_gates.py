"""End-to-end fits with gates on: losses are those of attached maps, gradients are exact, and gates stay on the maps."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import prompts, short_fit

import lineas
from lineas import Gate, NeuronGate
from lineas.fitting.end_to_end import prepare, read_sets
from lineas.fitting.parameters import parameters_of
from lineas.fitting.settings import FitSettings
from lineas.inputs.frozen import frozen

SITE = zoo.NORMS["llama"]
NAMES = [f"model.layers.{k}.post_attention_layernorm" for k in range(3)]
RNG = np.random.default_rng(0)


def scalar(context, site=None, d=16):
    return Gate(RNG.normal(size=d), 0.3, context=context, site=site)


GATES = {
    "token": {name: scalar("token") for name in NAMES},
    "mean": {name: scalar("mean") for name in NAMES[1:]},
    "neurons": {NAMES[0]: NeuronGate(*RNG.normal(size=(3, 16)))},
    "early": scalar("mean", "model.layers.0.input_layernorm"),
    "first": scalar("token", NAMES[0]),
}


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("kind", GATES)
def test_the_loss_is_that_of_attached_maps(llama, kind, tokens):
    source, target = prompts(6, 1), prompts(6, 2)
    how = dict(gates=GATES[kind], tokens=tokens, scaling="paper")
    first = short_fit(llama, source, target, steps=2, lr=0.1, **how)
    assert dict(first.maps.gates) == dict(first.maps.gated(GATES[kind]).gates)
    loss = short_fit(llama, source, target, steps=1, init=first.maps, **how).history["loss"][0]
    collected = dict(layers=SITE, progress=False, tokens=tokens)
    with first.maps.attach(llama, tokens=tokens):
        us = lineas.collect(llama, source, **collected)
    vs = lineas.collect(llama, target, **collected)
    expected = sum(lineas.wasserstein(us[name], vs[name]).sum() for name in us)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_a_start_with_gates_is_refused_where_the_fit_has_none(llama):
    pair = prompts(4, 1), prompts(4, 2)
    maps = lineas.SteeringMaps({name: lineas.AffineMap.identity(16) for name in NAMES}, gates=GATES["token"])
    text = (
        r"^init has gates, which a fit takes from gates= alone: .*init=maps.gated\(None\) to start from the maps with"
    )
    with pytest.raises(ValueError, match=text):
        short_fit(llama, *pair, init=maps)
    assert not short_fit(llama, *pair, init=maps.gated(None), steps=1).maps.gates
    settings = dict(layers=SITE, progress=False, init={"b": maps}, gates={"a": GATES["token"]})
    with pytest.raises(ValueError, match=r"^init\['b'\] has gates, which a fit takes from gates\['b'\]= alone"):
        lineas.fit_sequence(llama, {"a": pair, "b": pair}, **settings)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("kind", GATES)
def test_gradients_are_exact(llama, kind, batch_size):
    settings = FitSettings(layers=SITE, gates=GATES[kind], batch_size=batch_size, progress=False)
    with frozen(llama):
        sets = read_sets(None, (prompts(5, 1), prompts(6, 2)), None, settings)
        objective, tasks, _, _ = prepare(llama, [sets], settings)
        maps = parameters_of(objective, settings)
        objective.put_gates(settings.gates)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(2, len(maps.weight), generator=generator, dtype=torch.float64)
        maps.weight += 0.05 * direction[0]
        _, _, *gradients = objective.gradient(tasks, maps.leaves())
        grad_weight, grad_bias = maps.gradients(*gradients)
        along = (grad_weight @ direction[0] + grad_bias @ direction[1]).item()
        errors = []
        for eps in (1e-3, 3e-4, 1e-4):  # the norms compute in float32
            found = []
            for sign in (1, -1):
                maps.weight += sign * eps * direction[0]
                maps.bias += sign * eps * direction[1]
                found.append(objective.loss(tasks, maps.leaves())[0])
                maps.weight -= sign * eps * direction[0]
                maps.bias -= sign * eps * direction[1]
            errors.append(abs((found[0] - found[1]) / (2 * eps) / along - 1))
    assert min(errors) < 0.01


def test_preservation_with_gates_on(llama):
    closed = {name: Gate(np.zeros(16), -60.0) for name in NAMES}
    result = short_fit(llama, gates=closed, keep_weight=1.0, steps=3)
    assert (result.history["keep"] < 1e-12).all()
    opened = {name: Gate(np.zeros(16), 60.0) for name in NAMES}
    with_gates = short_fit(llama, gates=opened, keep_weight=1.0, steps=3)
    plain = short_fit(llama, keep_weight=1.0, steps=3)
    np.testing.assert_allclose(with_gates.history["keep"], plain.history["keep"], rtol=1e-9)


def test_saved_results_have_their_gates(tmp_path, llama):
    result = short_fit(llama, gates=GATES["early"], steps=1)
    result.save(tmp_path / "fit.safetensors")
    assert lineas.load(tmp_path / "fit.safetensors").maps == result.maps


def test_a_checkpoint_of_other_gates(tmp_path, llama):
    path = tmp_path / "fit.safetensors"
    short_fit(llama, gates=GATES["token"], steps=2, checkpoint=path)
    other = {**GATES["token"], NAMES[0]: scalar("token")}
    with pytest.raises(ValueError, match="the digest of gates differs"):
        short_fit(llama, gates=other, steps=2, checkpoint=path)


@pytest.mark.parametrize(
    ("error", "words", "gates"),
    [
        (ValueError, "no map for module 'lm_head'", {"lm_head": Gate(np.zeros(16), 0.0)}),
        (ValueError, r"is for 3 neurons, module \S+ has 16", {NAMES[0]: Gate(np.zeros(3), 0.0)}),
        (TypeError, "gates must be a mapping from module name to gate, or a Gate, got float", 0.5),
        (ValueError, "gates: module 'model.norm' had not run before", scalar("token", "model.norm")),
    ],
)
def test_bad_gates(llama, error, words, gates):
    with pytest.raises(error, match=words):
        short_fit(llama, gates=gates)
    assert not any(module._forward_hooks for module in llama.modules())
