"""Maps in models that are compiled, traced or exported: a real run for each row of docs/compatibility.md."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import language_model, random_maps
from fits import prompts, same_maps, short_fit
from surroundings import row
from torch import nn

import lineas

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def whole(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place(model, backend):
    model.compile(backend=backend, fullgraph=True)
    return model


def by_part(model, backend):
    for part in model.layers:
        part.compile(backend=backend, fullgraph=True)
    return model


class Block(nn.Module):
    """Dynamo does not compile a module of torch by itself."""

    def __init__(self, width, out):
        super().__init__()
        self.linear = nn.Linear(width, out)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(5, 7), Block(7, 4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
MAPS, OTHERS = (random_maps({"layers.0.linear": 7, "layers.1.linear": 4}, seed) for seed in range(2))
STRENGTHS = (1.0, 0.5, 2.0, -1.0, 0.0, 0.3)


def steered(strength, maps=MAPS):
    """What the model gives; not to be asked for between two compiled runs, which would be compiled anew."""
    model = net()
    with torch.no_grad(), maps.attach(model, strength=strength):
        return model(X)


@pytest.fixture(scope="module")
def known():
    return {strength: steered(strength) for strength in STRENGTHS}, steered(1.0, OTHERS)


def check_live(model, handle, backend, known):
    """Every strength and other maps hold at once, and nothing is compiled again for them."""
    at, exchanged = known
    close = dict(atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(X), at[1.0], **close)
    graphs = backend.graphs
    for strength in (*STRENGTHS, 1.0):
        handle.strength = strength
        torch.testing.assert_close(model(X), at[strength], **close)
    handle.maps = OTHERS
    torch.testing.assert_close(model(X), exchanged, **close)
    assert backend.graphs == graphs
    handle.remove()
    torch.testing.assert_close(model(X), at[0.0], **close)


@row(
    "`torch.compile`, `model.compile()`, compiled layers: maps before",
    "works",
    "one graph; strengths and maps stay live",
)
@pytest.mark.parametrize("compiled", [whole, in_place, by_part])
def test_maps_attached_before_a_model_is_compiled(compiled, known):
    model, backend = net(), Backend()
    with torch.no_grad():
        handle = MAPS.attach(model)
        model = compiled(model, backend)
        check_live(model, handle, backend, known)


@row("the same: maps after it ran", "works", "all is compiled again: better leave them on and set the strength to 0")
@pytest.mark.parametrize(
    ("compiled", "inner"), [(whole, False), (whole, True), (in_place, True), (by_part, True)]
)  # but for "whole", what is compiled is the model itself
def test_maps_attached_after_a_model_ran_compiled(compiled, inner, known):
    original, backend = net(), Backend()
    model = compiled(original, backend)
    with torch.no_grad():
        for _ in range(2):  # and taken off, and on again
            assert torch.equal(model(X), known[0][0.0])
            handle = MAPS.attach(original if inner else model)
            check_live(model, handle, backend, known)


def test_a_compiled_language_model_takes_maps_and_gradients_go_through_them():
    model, maps = language_model("llama")
    batch = prompts(3, 1)
    with torch.no_grad():
        compiled = whole(model, Backend())
        plain = compiled(**batch).logits
    with maps.attach(model, strength=0.7):
        loss = model(**batch).logits.square().mean()
        want = torch.autograd.grad(loss, model.lm_head.weight)[0]
        found = compiled(**batch).logits.square().mean()
        torch.testing.assert_close(torch.autograd.grad(found, model.lm_head.weight)[0], want, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(compiled(**batch).logits, plain)


@row(
    "compiled models: `collect` and fits",
    "works",
    "they run eagerly there; names are those of the model inside",
)
@pytest.mark.parametrize("kind", ["whole", "in place", "layers"])
def test_compiled_models_are_collected_from_and_fitted(kind):
    model, backend = zoo.llama(), Backend()
    if kind == "whole":
        model = whole(model, backend)
    elif kind == "in place":
        model.compile(backend=backend)
    else:
        for layer in model.model.layers:
            layer.compile(backend=backend)
    layers, batch = zoo.NORMS["llama"], prompts(6, 1)
    with torch.no_grad():
        before, graphs = model(**batch).logits, backend.graphs
    texts = dict(data=zoo.texts(4), tokenizer=zoo.tokenizer(padding_side="left"))
    found = lineas.collect(model, layers=layers, **texts)
    for name, rows in lineas.collect(zoo.llama(), layers=layers, **texts).items():
        np.testing.assert_array_equal(found[name], rows)
    same_maps(short_fit(model, steps=2).maps, short_fit(zoo.llama(), steps=2).maps)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    assert backend.graphs == graphs  # what was compiled is still there


@row(
    "`torch.export`, `torch.onnx.export` of a model with maps",
    "works",
    "maps are constants; the strength, too, or an input ([onnx.md](onnx.md)); the model stays usable",
)
@pytest.mark.parametrize("strict", [False, True])
def test_models_are_exported_with_their_maps(strict):
    model = net()
    handle = MAPS.attach(model, strength=0.5)
    with torch.no_grad():
        exported = torch.export.export(model, (X,), strict=strict).module()
        torch.testing.assert_close(exported(X), steered(0.5))
        assert torch.equal(model(X), steered(0.5))
        handle.strength = 1.0
        assert torch.equal(model(X), steered(1.0))
        torch.testing.assert_close(exported(X), steered(0.5))


@row("`torch.jit.trace` of a model with maps", "works", "the maps are constants at the strength of then")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean", "ignore:`torch.jit.trace")
def test_models_are_traced_with_their_maps():
    model = net()
    with torch.no_grad(), MAPS.attach(model) as handle:
        model(X)
        traced = torch.jit.trace(model, X)
        handle.strength = 0.5
        torch.testing.assert_close(traced(X), steered(1.0))


def test_fake_tensors_leave_nothing_in_the_hooks():
    from torch._subclasses import FakeTensorMode

    model = net()
    with torch.no_grad(), MAPS.attach(model, strength=0.5):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(X)).shape == (3, 4)
        assert torch.equal(model(X), steered(0.5))
