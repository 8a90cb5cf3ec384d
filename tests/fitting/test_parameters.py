"""Flat maps and the proximal optimiser: engine and torch twin against torch.optim and a NumPy proximal operator."""

import itertools
import math

import numpy as np
import pytest
import torch
from fits import use_engine

import lineas
from lineas import AffineMap
from lineas.fitting.parameters import MapParameters, ProximalOptimizer
from lineas.fitting.step_sizes import cosine_rate

WIDTHS = {"a": 4, "b": 7, "c": 1}
PENALTIES = dict(l1=0.2, group=0.1, l1_bias=0.05, group_bias=0.3)
NONE = dict.fromkeys(PENALTIES, 0.0)


def flat_maps(dtype=torch.float64, seed=0):
    maps = MapParameters(WIDTHS, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    maps.weight += torch.randn(12, dtype=torch.float64, generator=generator).to(dtype)
    maps.bias += torch.randn(12, dtype=torch.float64, generator=generator).to(dtype)
    return maps


def prox(x, tau, l1, group):
    """Soft threshold, then group shrinkage, written from the formulas."""
    soft = np.sign(x) * np.maximum(np.abs(x) - tau * l1, 0)
    norm = np.linalg.norm(soft)
    return soft if norm == 0 else max(1 - tau * group * math.sqrt(len(x)) / norm, 0) * soft


def reference_steps(maps, optimizer, betas, penalties, gradients, rates):
    """torch.optim for the gradient step, then the proximal operator."""
    params = [maps.weight.clone().requires_grad_(), maps.bias.clone().requires_grad_()]
    if optimizer == "sgd":
        stepper = torch.optim.SGD(params, lr=1.0)
    else:
        stepper = torch.optim.Adam(params, lr=1.0, betas=betas, eps=1e-8)
    for grads, rate in zip(gradients, rates, strict=True):
        stepper.param_groups[0]["lr"] = rate
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        stepper.step()
        penalty = 0.0
        for param, origin, kind in zip(params, (1, 0), ("", "_bias"), strict=True):
            l1, group = penalties[f"l1{kind}"], penalties[f"group{kind}"]
            values = param.detach().numpy()
            for start, stop in itertools.pairwise(maps.offsets):
                x = prox(values[start:stop] - origin, rate, l1, group)
                values[start:stop] = origin + x
                penalty += l1 * np.abs(x).sum() + group * math.sqrt(len(x)) * np.linalg.norm(x)
    weight, bias = (param.detach() for param in params)
    return weight, bias, penalty, int(((weight != 1) | (bias != 0)).sum())


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("penalties", [NONE, PENALTIES], ids=["plain", "penalties"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_torch_optim_and_numpy_prox(monkeypatch, dtype, optimizer, penalties, engine):
    use_engine(monkeypatch, engine)
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(2, 12, dtype=torch.float64, generator=generator).to(dtype) for _ in range(6)]
    rates = [cosine_rate(0.2, k, 6) for k in range(6)]
    maps = flat_maps(dtype)
    expected = reference_steps(maps, optimizer, (0.8, 0.95), penalties, gradients, rates)
    stepper = ProximalOptimizer(maps, tuple(penalties.values()), optimizer, (0.8, 0.95))
    for grads, rate in zip(gradients, rates, strict=True):
        penalty, support = stepper.step(*grads, rate)
    tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(maps.weight, expected[0], **tolerance)
    torch.testing.assert_close(maps.bias, expected[1], **tolerance)
    assert penalty == pytest.approx(expected[2], rel=1e-5)
    assert support == expected[3]
    assert torch.equal(maps.weight == 1, expected[0] == 1)
    assert torch.equal(maps.bias == 0, expected[1] == 0)
    assert stepper.taken == 6


@pytest.mark.parametrize("engine", [True, False])
def test_strong_penalties_make_exact_identities(monkeypatch, engine):
    use_engine(monkeypatch, engine)
    for penalties in (dict(NONE, l1=100.0, l1_bias=100.0), dict(NONE, group=100.0, group_bias=100.0)):
        maps = flat_maps()
        stepper = ProximalOptimizer(maps, tuple(penalties.values()))
        assert stepper.step(torch.zeros(12).double(), torch.zeros(12).double(), 0.5) == (0.0, 0)
        assert torch.equal(maps.weight, torch.ones(12).double())
        assert torch.equal(maps.bias, torch.zeros(12).double())


@pytest.mark.parametrize("engine", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch, engine):
    use_engine(monkeypatch, engine)
    maps = flat_maps()
    before = maps.weight.clone(), maps.bias.clone()
    stepper = ProximalOptimizer(maps, tuple(PENALTIES.values()), "adam")
    grad = torch.zeros(12).double()
    grad[5] = torch.nan
    with pytest.raises(ValueError, match=r"grad_bias.*5"):
        stepper.step(torch.zeros(12).double(), grad, 0.1)
    assert torch.equal(maps.weight, before[0]) and torch.equal(maps.bias, before[1])
    assert stepper.taken == 0
    assert not any(moment.any() for moment in stepper.moments)


def test_cosine_rate():
    rates = [cosine_rate(0.3, k, 20) for k in range(20)]
    assert rates[0] == pytest.approx(0.3)
    assert rates[10] == pytest.approx(0.3 * (1 + 1e-3) / 2)
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert cosine_rate(0.3, 20, 20) == pytest.approx(3e-4)


def test_leaves_share_the_flat_memory():
    maps = flat_maps()
    leaves = maps.leaves()
    assert {name: len(weight) for name, (weight, _) in leaves.items()} == WIDTHS
    assert all(weight.requires_grad and weight.is_leaf for weight, _ in leaves.values())
    maps.weight.zero_()
    maps.bias.fill_(3)
    assert all(not weight.any() and (bias == 3).all() for weight, bias in leaves.values())


def test_snapshot_is_a_copy_and_load_its_inverse():
    maps = flat_maps()
    taken = maps.snapshot()
    other = MapParameters(WIDTHS, torch.float64, torch.device("cpu"))
    assert other.snapshot() == {name: AffineMap(np.ones(d), np.zeros(d)) for name, d in WIDTHS.items()}
    other.load(lineas.SteeringMaps(taken))
    assert torch.equal(other.weight, maps.weight) and torch.equal(other.bias, maps.bias)
    maps.weight.zero_()
    assert taken == other.snapshot()


def test_load_refuses_other_modules():
    maps = MapParameters(WIDTHS, torch.float32, torch.device("cpu"))
    taken = maps.snapshot()
    with pytest.raises(ValueError, match=r"init must .* 3 mapped modules: missing \['c'\], not mapped \[\]"):
        maps.load({name: taken[name] for name in "ab"})
    with pytest.raises(ValueError, match=r"missing \[\], not mapped \['d'\]"):
        maps.load({**taken, "d": taken["a"]})
    with pytest.raises(ValueError, match="init: module 'b' has 7 neurons, its map has 4"):
        maps.load({**taken, "b": taken["a"]})
