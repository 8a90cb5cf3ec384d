"""Maps in graphs of torch.export that run without lineas: what is exact in them, and what is refused."""

import numpy as np
import pytest
import torch
from attached import language_model
from caches import cached
from onnx_files import TEXT, real_logits, texts
from torch import nn

import lineas

WIDTH = 8
NORMS = ("first", "second")


class Text(nn.Module):
    """As small as a model of text can be."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.linear, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 50)

    def forward(self, input_ids, attention_mask):
        x = torch.tanh(self.linear(self.first(self.embedding(input_ids))))
        return self.head(self.second(x * attention_mask[:, :, None]))


class Steered(nn.Module):
    def __init__(self, model, handle):
        super().__init__()
        self.model, self.handle = model, handle

    def forward(self, input_ids, attention_mask, strength):
        with self.handle.at(strength):
            return self.model(input_ids, attention_mask)


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Text().eval()


MADE_WITH = texts(2, 6, 2)
OTHERS = (texts(2, 6), texts(3, 9, 4), texts(1, 2))


def some_maps(gates=None):
    rng = np.random.default_rng(0)
    maps = {name: lineas.AffineMap(rng.uniform(0.5, 1.5, WIDTH), rng.normal(0, 0.5, WIDTH)) for name in NORMS}
    maps = lineas.SteeringMaps(maps)
    return maps if gates is None else maps.gated(gates)


def scalar_gate(seed, **settings):
    return lineas.Gate(np.random.default_rng(seed).normal(size=WIDTH), 0.1, **settings)


def neuron_gate(seed):
    return lineas.NeuronGate(*np.random.default_rng(seed).normal(size=(3, WIDTH)))


GATES = {
    "none": None,
    "token": {name: scalar_gate(k) for k, name in enumerate(NORMS)},
    "mean": {name: scalar_gate(k, context="mean") for k, name in enumerate(NORMS)},
    "another module's": {"second": scalar_gate(1, site="first", context="mean")},
    "neurons": {name: neuron_gate(k) for k, name in enumerate(NORMS)},
}


def export(model, inputs, shapes, strict=False):
    with torch.no_grad():
        return torch.export.export(model, (), kwargs=inputs, dynamic_shapes=shapes, strict=strict).module()


def check(model, graph, handle, at, **given):
    """The graph gives what hooks give, which is something else than without maps."""
    for inputs in OTHERS:
        handle.strength = at
        hooked, found = real_logits(model, inputs), real_logits(graph, inputs, **given)
        torch.testing.assert_close(found, hooked, atol=1e-6, rtol=1e-6)
        handle.strength = 0.0
        changed = real_logits(model, inputs) - hooked
        assert at == 0 or changed.abs().max() > 0.05


@pytest.mark.parametrize(("gates", "tokens"), [("none", "all"), *[(kind, slice(1, 7, 2)) for kind in GATES]], ids=str)
def test_graphs_do_what_hooks_do_with_a_strength_as_input(model, gates, tokens):
    with some_maps(GATES[gates]).attach(model, tokens=tokens) as handle:
        inputs = {**MADE_WITH, "strength": torch.tensor(1.0)}
        graph = export(Steered(model, handle), inputs, {**TEXT, "strength": None})
        assert handle.strength == 1.0
        for strength in (0.7, -1.5, 0.0):
            check(model, graph, handle, strength, strength=torch.tensor(strength))


@pytest.mark.parametrize("gates", ["none", "mean"])
def test_without_an_input_the_strength_is_a_constant(model, gates):
    with some_maps(GATES[gates]).attach(model, strength=0.7, tokens=slice(1, None)) as handle:
        with torch.no_grad():
            before = model(**OTHERS[1])
        graph = export(model, MADE_WITH, TEXT)
        with torch.no_grad():  # the graph has left nothing behind
            assert torch.equal(model(**OTHERS[1]), before)
        check(model, graph, handle, 0.7)


def test_strength_inputs_of_other_dtypes(model):
    with some_maps().attach(model) as handle:
        for dtype in (torch.int64, torch.float64):
            inputs = {**MADE_WITH, "strength": torch.ones((), dtype=dtype)}
            graph = export(Steered(model, handle), inputs, {**TEXT, "strength": None})
            check(model, graph, handle, 2.0, strength=torch.full((), 2, dtype=dtype))


def test_the_same_module_runs_without_a_graph(model):
    with some_maps().attach(model) as handle, torch.no_grad():
        handle.strength = 0.3
        expected = model(**MADE_WITH)
        handle.strength = 1.0
        found = Steered(model, handle)(**MADE_WITH, strength=torch.tensor(0.3, dtype=torch.float64))
        assert torch.equal(found, expected)


def test_a_cache_among_the_inputs():
    """Maps on all tokens hold; which tokens are where is told by what is beside the cache, and so it is refused."""
    from transformers import DynamicCache

    model, maps = language_model("llama")
    config = model.config
    heads = config.num_key_value_heads
    keys = torch.randn(config.num_hidden_layers, 2, heads, 5, config.hidden_size // config.num_attention_heads)

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, keys):
            cache = DynamicCache()
            for k, one in enumerate(keys):
                cache.update(one, one, k)
            return self.model(input_ids=input_ids, **cached(cache), use_cache=True).logits

    inputs, others = ({"input_ids": torch.full((2, 3), k), "keys": k * keys} for k in (3, 4))
    shapes = {"input_ids": {1: torch.export.Dim("new")}, "keys": {3: torch.export.Dim("past")}}
    with maps.attach(model, strength=0.7), torch.no_grad():
        graph = export(Cached(), inputs, shapes)
        torch.testing.assert_close(graph(**others), Cached()(**others), atol=1e-5, rtol=1e-5)
    gated = maps.gated({name: lineas.Gate(np.ones(one.d), 0.0, context="mean") for name, one in maps.items()})
    for given, tokens in ((maps, slice(1, None)), (gated, "all")):
        with (
            given.attach(model, tokens=tokens),
            pytest.raises(ValueError, match="a cache is one of its inputs"),
        ):
            export(Cached(), inputs, shapes)


# --- refused: a graph would do something else than the hooks ----------------------------------------------------------


@pytest.mark.parametrize("tokens", ["prompt", "generated", "last", slice(0, -1)], ids=str)
def test_the_end_of_the_prompt_is_refused(model, tokens):
    with some_maps().attach(model, tokens=tokens):
        with pytest.raises(ValueError, match=r"first: tokens=.* where the prompt ends, but a graph is for any text"):
            export(model, MADE_WITH, TEXT)
        with torch.no_grad():
            model(**MADE_WITH)


def test_functions_that_would_be_called_once_are_refused(model):
    once = "would be called once, while the graph is made, and be a constant of it"
    with some_maps().attach(model, tokens=lambda tokens: tokens.ids > 3), pytest.raises(ValueError, match=once):
        export(model, MADE_WITH, TEXT)
    for schedule in (lambda tokens: 0.9**tokens.step, lambda tokens: 0.9**tokens.positions):
        with some_maps().attach(model, strength=schedule), pytest.raises(ValueError, match=f"strength: .*{once}"):
            export(model, MADE_WITH, TEXT)


def test_other_strength_inputs_are_refused(model):
    with some_maps().attach(model) as handle:
        for given, error, message in (
            (torch.ones(1), ValueError, r"a tensor \[\], got the shape \[1\]"),
            (torch.tensor(1j), TypeError, "strength must be real, got torch.complex64"),
        ):
            with pytest.raises(error, match=message):
                export(Steered(model, handle), {**MADE_WITH, "strength": given}, {**TEXT, "strength": None})
        assert handle.strength == 1.0
        with torch.no_grad():
            model(**MADE_WITH)


def test_a_strength_for_each_row_is_for_so_many_rows(model):
    with some_maps().attach(model, strength=[0.2, 0.9]):
        with pytest.raises(torch._dynamo.exc.UserError, match="specialized it to be a constant"):
            export(model, MADE_WITH, TEXT)


@pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_traced_graphs_have_no_positions(model):
    names = tuple(MADE_WITH)
    values = tuple(MADE_WITH[name] for name in names)
    refused = "of torch.jit.trace has them as constants: use torch.export"
    for maps, tokens in ((some_maps(), slice(1, None)), (some_maps(GATES["mean"]), "all")):
        with maps.attach(model, tokens=tokens), pytest.raises(ValueError, match=refused):
            torch.jit.trace(model, values)
    with some_maps().attach(model, strength=lambda tokens: 1.0), pytest.raises(ValueError, match=refused):
        torch.jit.trace(model, values)
    with some_maps(GATES["token"]).attach(model) as handle:
        model(*values)
        traced = torch.jit.trace(Steered(model, handle), (*values, torch.tensor(1.0)))
        for strength in (0.4, 1.5):
            check(model, lambda strength, **inputs: traced(*inputs.values(), strength), handle, strength,
                  strength=torch.tensor(strength))  # fmt: skip
