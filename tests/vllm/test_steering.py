"""Rows of a batch against the hooks of maps.attach, request by request."""

import logging
import re

import numpy as np
import pytest
import torch
from torch import nn

import lineas
from lineas.export.vllm import steering as under_test
from lineas.export.vllm.steering import ModuleHook, Steering

D = 5
CPU = torch.device("cpu")


class Both(nn.Module):
    """A model of two modules, whose outputs are what hooks make of its input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, z):
        return self.second(self.first(z))


def some_maps(rng, *names):
    return lineas.SteeringMaps(
        {name: lineas.AffineMap(rng.uniform(0.5, 2.0, D), rng.normal(0.0, 1.0, D)) for name in names}
    )


@pytest.fixture
def maps(rng):
    return {"a": some_maps(rng, "first"), "b": some_maps(rng, "first", "second"), "c": some_maps(rng, "second")}


def steered_model(maps, stream=False):
    steering, model = Steering(maps, logging.getLogger("test")), Both()
    for name, module in (("first", model.first), ("second", model.second)):
        here = {label: of[name] for label, of in maps.items() if name in of}
        steering.hooks[name] = ModuleHook(steering, name, here, stream)
        module.register_forward_hook(steering.hooks[name])
    return steering, model


def expected(maps, z, strengths):
    """What hooks of lineas make of the rows of one request."""
    model = Both()
    for name, strength in strengths.items():
        maps[name].attach(model, strength=strength)
    return model(z)


REQUESTS = {
    "off": {},
    "one": {"a": 0.7},
    "other": {"a": 1.3},
    "elsewhere": {"c": 0.4},
    "two": {"a": 0.5, "b": 1.5},
    "turned": {"b": 1.5, "a": 0.5},
    "three": {"c": -1.0, "b": 0.1, "a": 2.0},
}


@pytest.mark.parametrize("chunk", [1, 3, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_request_of_a_batch_gets_what_the_hooks_give(maps, rng, dtype, chunk, monkeypatch):
    monkeypatch.setattr(under_test, "CHUNK", chunk)
    steering, model = steered_model(maps)
    for request, strengths in REQUESTS.items():
        steering.add(request, strengths)
    for order in (list(REQUESTS), list(REQUESTS)[::-1], ["one"], ["one", "one"], ["off"], ["three", "off"]):
        counts = rng.integers(1, 6, len(order))
        z = torch.from_numpy(rng.normal(size=(counts.sum() + 2, D))).to(dtype)  # two rows of padding
        before = z.clone()
        steering.begin(order, counts, CPU)
        given = model(z)
        steering.end()
        assert torch.equal(z, before)
        assert torch.equal(given[counts.sum() :], z[counts.sum() :])
        pieces = zip(order, z.split([*counts, 2]), given.split([*counts, 2]), strict=False)
        for request, rows, mapped in pieces:
            assert torch.equal(mapped, expected(maps, rows, REQUESTS[request]))


def test_more_strengths_than_places_are_kept_apart(maps, rng):
    steering, model = steered_model(maps)
    strengths = rng.uniform(0, 2, 100)
    for chosen in (range(100), range(40), range(5, 95), range(100)):
        for k in chosen:
            steering.add(str(k), {"b": strengths[k]})
        z = torch.from_numpy(rng.normal(size=(len(chosen), D)).astype(np.float32))
        steering.begin([str(k) for k in chosen], [1] * len(chosen), CPU)
        given = model(z)
        steering.end()
        for row, k in enumerate(chosen):
            assert torch.equal(given[row], expected(maps, z[row : row + 1], {"b": strengths[k]})[0])
    assert steering.slots.size == 128


def test_places_of_a_batch_that_is_over_are_given_away(maps, rng):
    steering, model = steered_model(maps)
    for k in range(60):
        steering.add("one", {"a": 0.1 * k + 0.1})
        z = torch.from_numpy(rng.normal(size=(2, D)).astype(np.float32))
        steering.begin(["one"], [2], CPU)
        assert torch.equal(model(z), expected(maps, z, {"a": 0.1 * k + 0.1}))
    assert steering.slots.size == 16


def test_nothing_happens_between_batches_and_without_steered_requests(maps, rng):
    steering, model = steered_model(maps)
    steering.add("one", {"a": 1.0})
    z = torch.from_numpy(rng.normal(size=(3, D)).astype(np.float32))
    assert model(z) is z
    steering.begin(["off"], [3], CPU)
    assert steering.batch is None and model(z) is z
    steering.begin(["one"], [3], CPU)
    assert model(z) is not z
    steering.end()
    assert model(z) is z
    steering.remove("one")
    steering.begin(["one"], [3], CPU)
    assert model(z) is z


def test_rows_that_are_not_steered_keep_their_bits(maps):
    steering, model = steered_model(maps)
    steering.add("one", {"a": 1.0})
    z = torch.full((4, D), -0.0)
    z[0] = torch.nan
    steering.begin(["off", "one", "off"], [2, 1, 1], CPU)
    given = model(z)
    assert given[0].isnan().all()
    assert torch.equal(torch.signbit(given[[1, 3]]), torch.ones(2, D, dtype=torch.bool))


class Fused(nn.Module):
    """A norm as vLLM has it: its output, and the residual to which it added its input."""

    def forward(self, x, residual):
        return x * 2, x + residual


@pytest.mark.parametrize("request_name", ["one", "two", "off"])
def test_of_a_norm_that_adds_the_residual_only_the_output_is_mapped(maps, rng, request_name):
    steering, _ = steered_model(maps)
    module = Fused()
    module.register_forward_hook(steering.hooks["first"])
    steering.add(request_name, REQUESTS[request_name])
    x, residual = (torch.from_numpy(rng.normal(size=(4, D)).astype(np.float32)) for _ in range(2))
    steering.begin([request_name, "off"], [3, 1], CPU)
    out, rest = module(x, residual)
    only_first = {name: maps[name].select("first") for name in REQUESTS[request_name]}
    assert torch.equal(out[:3], expected(only_first, 2 * x[:3], REQUESTS[request_name]))
    assert torch.equal(out[3:], 2 * x[3:])
    assert torch.equal(rest, x + residual)


class Layer(nn.Module):
    """A decoder layer as vLLM has it: the residual stream is the sum of what it gives."""

    def forward(self, x, residual):
        return x, residual


def test_of_a_decoder_layer_the_sum_is_mapped(maps, rng):
    steering, _ = steered_model(maps, stream=True)
    module = Layer()
    module.register_forward_hook(steering.hooks["second"])
    wanted = [{"b": 0.7}, {}, {"a": 0.5, "b": 1.5}, {"a": 2.0}]  # the last has no map here
    for k, strengths in enumerate(wanted):
        steering.add(str(k), strengths)
    x, residual = (torch.from_numpy(rng.normal(size=(8, D)).astype(np.float32)) for _ in range(2))
    steering.begin(["0", "1", "2", "3"], [2, 2, 2, 2], CPU)
    out, rest = module(x, residual)
    for k, strengths in enumerate(wanted):
        rows = slice(2 * k, 2 * k + 2)
        here = {name: maps[name].select("second") for name in strengths if "second" in maps[name]}
        z = expected(here, (x + residual)[rows], {name: strengths[name] for name in here})
        assert torch.equal((out + rest)[rows], z)
    assert torch.equal(out[2:4], x[2:4])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(2, D), "its maps are for 3 tokens of 5 neurons, its output is \\[2, 5\\]"),
        (torch.zeros(3, D + 1), "its maps are for 3 tokens of 5 neurons, its output is \\[3, 6\\]"),
        (torch.zeros(3, D, dtype=torch.int64), "torch.int64"),
        ({"z": torch.zeros(3, D)}, "it gives a dict"),
        ((None, torch.zeros(3, D)), "it gives a tuple"),
    ],
)
def test_an_output_of_another_kind_is_left_and_reported_once(maps, output, message, caplog):
    steering, _ = steered_model(maps)
    steering.add("one", {"a": 1.0})
    steering.begin(["one"], [3], CPU)
    for _ in range(2):
        assert steering.hooks["first"](nn.Identity(), (), output) is None
    (record,) = caplog.records
    assert re.search(f"module 'first' is left unsteered: .*{message}", record.getMessage())


def test_a_module_that_does_not_run_is_reported_once(maps, caplog):
    steering, _ = steered_model(maps)
    steering.add("one", {"c": 1.0})
    for _ in range(2):
        steering.begin(["one"], [3], CPU)
        steering.end()
    assert [record.getMessage() for record in caplog.records] == [
        "lineas: module 'second' is left unsteered: vLLM does not call it"
    ]
