"""Maps at a strength on tensors: the engine, its twin in torch, and what hooks do, against one another."""

import numpy as np
import pytest
import torch
from attached import random_maps
from torch import nn

import lineas
from lineas.hooks import affine
from lineas.maps.affine import at_strength

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STRENGTHS = np.random.default_rng(0).uniform(-3, 3, 200).tolist()


def values(dtype, rows=40, d=8):
    """Numbers of all sizes, without negative zeros: adding a shift of 0 makes zeros of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    x = (x * 10.0 ** torch.randint(-5, 4, x.shape, generator=generator)).to(dtype)
    x[0, :4] = torch.tensor([0.0, float("inf"), float("-inf"), float("nan")]).to(dtype)
    return torch.where(x == 0, 0, x)


def same_bits(a, b):
    return a.dtype == b.dtype and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def bits(x):
    return x.view(torch.int16) if x.dtype in (torch.float16, torch.bfloat16) else x


def hooked(x, maps, strength):
    model = nn.Sequential(nn.Identity())
    with maps.attach(model, strength=strength):
        return model(x)


WAYS = {
    "engine": lambda x, one, s: affine.affine(x, torch.tensor(one.weight), torch.tensor(one.bias), s),
    "twin": lambda x, one, s: one.transform(x, s),
    "hook": lambda x, one, s: hooked(x, lineas.SteeringMaps({"0": one}), s),
    "hook, by row": lambda x, one, s: hooked(x, lineas.SteeringMaps({"0": one}), [s] * len(x)),
    "hook, compiled": lambda x, one, s: affine.blend(
        x, *affine.parameters(one, 1.0, x.device, affine.working_dtype(x.dtype)), torch.tensor(s), -1
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", list(WAYS))
def test_neurons_that_a_map_leaves_alone_keep_their_bits_at_any_strength(way, dtype, monkeypatch):
    monkeypatch.setattr(affine, "on_engine", lambda tensor: way == "engine")
    x, work = values(dtype), np.float64 if dtype == torch.float64 else np.float32
    weight, bias = np.ones(8, work), np.zeros(8, work)
    identity, some = lineas.AffineMap(weight, bias), lineas.AffineMap(np.append(weight[:7], 0.3), bias)
    for strength in STRENGTHS:
        assert same_bits(bits(WAYS[way](x, identity, strength)), bits(x)), strength
        assert same_bits(bits(WAYS[way](x, some, strength)[:, :7]), bits(x[:, :7])), strength


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_gives_the_map_at_the_strength(way, dtype, monkeypatch):
    monkeypatch.setattr(affine, "on_engine", lambda tensor: way == "engine")
    one, x = random_maps({"0": 8})["0"], values(dtype)[1:]
    for strength in (1.0, *STRENGTHS[:5]):
        weight, bias = at_strength(one.weight.astype(np.float64), one.bias.astype(np.float64), strength)
        expected = torch.tensor(weight) * x.double() + torch.tensor(bias)
        error = 2 * torch.finfo(dtype).eps if dtype in DTYPES[:2] else 1e-5
        torch.testing.assert_close(WAYS[way](x, one, strength).double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0, 0.0])
@pytest.mark.parametrize("axis", [-1, 1])
def test_slopes_of_1_have_the_gradient_that_the_engine_gives_them(strength, axis, monkeypatch):
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    found = {}
    for engine in (True, False):
        monkeypatch.setattr(affine, "on_engine", lambda tensor, engine=engine: engine)
        inputs = [t.requires_grad_() for t in (x.clone(), torch.tensor([1.0, 0.5, 1.0]), torch.tensor([0.0, 0.2, 0.0]))]
        out = affine.affine(*inputs, strength, axis)
        found[engine] = torch.autograd.grad(out.square().sum(), inputs)
    for ours, twins in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, twins, atol=1e-6, rtol=1e-6)
    assert (found[False][1][0] != 0) == (strength != 0)
