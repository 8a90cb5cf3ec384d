"""The scaling "standardized": what it computes, that units of neurons do not matter, and slopes or shifts alone."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import prompts, same_maps, short_fit
from torch import nn

import lineas
from lineas.fitting.end_to_end import prepare, read_sets
from lineas.fitting.objective import Standards
from lineas.fitting.parameters import MapParameters, parameters_of
from lineas.fitting.settings import FitSettings
from lineas.inputs.frozen import frozen

SITE = zoo.NORMS["llama"]


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


def fit(model, *sets, **settings):
    return short_fit(model, *sets, **{"scaling": "standardized", "lr": "auto", "patience": None, **settings})


class Units(nn.Module):
    """Two linear layers, of which the activations between are in units of their own."""

    def __init__(self, units):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        second = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        self.first, self.second = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()
        self.first.weight.data, self.second.weight.data = units[:, None] * first, second / units
        self.first.bias.data, self.second.bias.data = 0.3 * units, torch.zeros(4, dtype=torch.float64)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def test_units_of_neurons_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randn(9, 5, generator=generator, dtype=torch.float64) + k for k in (0, 0.5))
    how = dict(layers=["first", "second"], steps=8, l1=0.02, group=0.01)
    plain = fit(Units(torch.ones(6, dtype=torch.float64)), source, target, **how)
    units = torch.tensor([1.0, 1.0, 1e3, 10.0, 1.0, 300.0], dtype=torch.float64)
    # A hundredth of the median variance is added to all variances, which such units leave nearly as it is.
    other = fit(Units(units), source, target, **how)
    assert 0.9 < other.history["loss"][-1] / plain.history["loss"][-1] < 1.1
    assert plain.history["loss"][-1] < 0.7 * plain.history["loss"][0]
    uniform = fit(Units(torch.full((6,), 1e3, dtype=torch.float64)), source, target, **how)
    np.testing.assert_allclose(uniform.history["loss"], plain.history["loss"], rtol=1e-6)
    np.testing.assert_array_equal(uniform.history["support"], plain.history["support"])
    np.testing.assert_allclose(uniform.maps["first"].weight, plain.maps["first"].weight, rtol=1e-6)
    np.testing.assert_allclose(uniform.maps["first"].bias, 1e3 * plain.maps["first"].bias, rtol=1e-5, atol=1e-9)


def naive_standards(model, batch):
    """Mean and variance of tokens, and variance of pooled activations, text by text without padding."""
    found = {}
    for name in lineas.hooks.modules.resolve(model, SITE):
        rows = []
        hook = model.get_submodule(name).register_forward_hook(lambda m, args, out, rows=rows: rows.append(out[0]))
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            model(input_ids=ids[mask != 0][None])
        hook.remove()
        tokens, pooled = torch.cat(rows).detach(), torch.stack([row.mean(dim=0) for row in rows]).detach()
        found[name] = tokens.mean(dim=0), tokens.var(dim=0, correction=0), pooled.var(dim=0, correction=0)
    return found


@pytest.mark.parametrize("batch_size", [None, 3])
def test_standards_are_those_of_the_target(llama, batch_size):
    source, target = prompts(5, 1), prompts(7, 2)
    settings = FitSettings(layers=SITE, batch_size=batch_size, progress=False)
    with frozen(llama):
        objective, *_ = prepare(llama, [read_sets(None, (source, target), None, settings)], settings)
        expected = naive_standards(llama, target)
    standards = objective.standards()
    for k, (center, tokens, pooled) in enumerate(expected.values()):
        variance = pooled + pooled.median() / 100
        part = slice(16 * k, 16 * (k + 1))
        torch.testing.assert_close(standards.center[part], center, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(standards.spread[part], variance.sqrt(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(standards.scale[part], (tokens + variance).sqrt(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(objective.precisions[k], 1 / variance, rtol=1e-4, atol=1e-6)


def test_the_loss_is_that_of_standardized_activations(llama):
    source, target = prompts(6, 1), prompts(6, 2)
    found = fit(llama, source, target, steps=1).history["layer_loss"][0]
    us, vs = (lineas.collect(llama, data, layers=SITE, progress=False) for data in (source, target))
    for term, name in zip(found, us, strict=True):
        variance = vs[name].astype(np.float64).var(axis=0)
        variance += np.sort(variance)[(len(variance) - 1) // 2] / 100
        w2 = np.square(np.sort(us[name].astype(np.float64), axis=0) - np.sort(vs[name], axis=0)).mean(axis=0)
        assert term == pytest.approx((w2 / variance).sum(), rel=1e-4)


def standardized(widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(widths.values())
    values = [torch.randn(total, generator=generator, dtype=torch.float64) for _ in range(3)]
    standards = Standards(values[0], values[1].abs() + 0.1, values[2].abs() + 0.2)
    return MapParameters(widths, torch.float64, torch.device("cpu"), standards), generator


def test_maps_go_into_parameters_and_back():
    maps, generator = standardized({"a": 3, "b": 5})
    given = {
        name: lineas.AffineMap(*torch.randn(2, d, generator=generator, dtype=torch.float64).numpy())
        for name, d in maps.widths.items()
    }
    given["b"] = lineas.AffineMap(
        np.r_[1.0, given["b"].weight[1:]], np.r_[0.0, given["b"].bias[1:]]
    )  # a neuron that is left alone
    maps.load(given)
    same_maps(maps.snapshot(), given, atol=1e-12)
    assert maps.weight[3] == 1 and maps.bias[3] == 0
    assert maps.support().tolist() == [True] * 3 + [False] + [True] * 4


def test_gradients_are_those_of_the_parameters():
    maps, generator = standardized({"a": 4})
    maps.weight += 0.1 * torch.randn(4, generator=generator, dtype=torch.float64)
    weight, bias = maps.weight.clone().requires_grad_(), maps.bias.clone().requires_grad_()
    slopes, shifts = maps.maps(weight, bias)
    value = (slopes.sin() * shifts.exp()).sum()
    expected = torch.autograd.grad(value, [weight, bias], retain_graph=True)
    found = maps.gradients(*torch.autograd.grad(value, [slopes, shifts]))
    torch.testing.assert_close(found, expected)


def test_strengths_act_on_parameters_as_on_maps():
    maps, generator = standardized({"a": 4})
    maps.weight += 0.1 * torch.randn(4, generator=generator, dtype=torch.float64)
    maps.bias += 0.1 * torch.randn(4, generator=generator, dtype=torch.float64)
    whole = lineas.SteeringMaps(maps.snapshot()).scaled(0.6)["a"]
    slopes, shifts = maps.leaves(0.6)["a"]
    np.testing.assert_allclose(slopes.detach(), whole.weight, rtol=1e-12)
    np.testing.assert_allclose(shifts.detach(), whole.bias, rtol=1e-12)


def test_constant_neurons_and_constant_targets_are_no_trouble():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    model[0].weight.data[2] = 0
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for target in (x + 1, x[:1].repeat(6, 1)):
        result = fit(model, x, target, layers=["0", "1"], steps=4)
        assert all(np.isfinite(one.weight).all() and np.isfinite(one.bias).all() for one in result.maps.values())
        assert result.history["loss"][-1] < result.history["loss"][0]


@pytest.mark.parametrize("scaling", ["standardized", "layer-mean"])
@pytest.mark.parametrize("optimizer", [{"lr": "auto"}, {"lr": 0.02, "optimizer": "adam"}], ids=["auto", "adam"])
def test_shifts_or_slopes_alone(llama, scaling, optimizer):
    vectors = fit(llama, scaling=scaling, slopes=False, **optimizer).maps
    assert all((one.weight == 1).all() and (one.bias != 0).all() for one in vectors.values())
    slopes = fit(llama, scaling=scaling, shifts=False, **optimizer).maps
    assert all((one.bias == 0).all() and (one.weight != 1).all() for one in slopes.values())
    some = fit(llama, scaling=scaling, slopes="model.layers.1.*", shifts=np.True_, **optimizer).maps
    assert [(one.weight != 1).any() for one in some.values()] == [False, True, False]
    assert all((one.bias != 0).all() for one in some.values())


def test_a_path_of_shifts(llama):
    path = lineas.sparse_path_end_to_end(
        llama, prompts(6, 1), prompts(6, 2), layers=SITE, slopes=False, n_penalties=5, progress=False
    )
    assert path.support[0] == 0 < path.support[-1]
    assert (path.weight == 1).all() and (path.loss[-1] < path.loss[0])


def test_a_path_has_the_losses_of_its_maps(llama):
    sets = prompts(6, 1), prompts(6, 2)
    path = lineas.sparse_path_end_to_end(llama, *sets, layers=SITE, n_penalties=5, min_ratio=0.01, progress=False)
    for k in (0, 2, 4):
        seen = fit(llama, *sets, init=path[k], steps=1).history["loss"][0]
        assert seen == pytest.approx(path.loss[k], rel=1e-5)


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (ValueError, "slopes and shifts are both False: nothing is left", {"slopes": False, "shifts": False}),
        (ValueError, "slopes: 'model.norm' matches none of the modules that are mapped", {"slopes": "model.norm"}),
        (ValueError, "no module matches 'model.nrom'", {"slopes": "model.nrom"}),
        (
            ValueError,
            "slopes and shifts: neither is to be fitted in module 'model.layers.0.post_attention_layernorm'",
            {"slopes": "model.layers.1.*", "shifts": "model.layers.2.*"},
        ),
        (TypeError, "slopes must be", {"slopes": 3}),
    ],
)  # fmt: skip
def test_bad_input(llama, error, words, settings):
    with pytest.raises(error, match=words):
        fit(llama, **settings)


def test_init_with_slopes_where_none_are_fitted(llama):
    maps = fit(llama, steps=2).maps
    with pytest.raises(ValueError, match=r"init: the map of module 'model.layers.0\S+' has slopes, and none are to be"):
        fit(llama, init=maps, slopes=False)
    fit(llama, init=fit(llama, steps=2, slopes=False).maps, slopes=False)


def test_parameters_without_standards_are_the_maps(llama):
    settings = FitSettings(layers=SITE, scaling="paper", progress=False)
    with frozen(llama):
        objective, *_ = prepare(llama, [read_sets(None, (prompts(4, 1), prompts(4, 2)), None, settings)], settings)
    maps = parameters_of(objective, settings)
    assert maps.standards is None and objective.precisions is None
    weight, bias = maps.maps(maps.weight, maps.bias)
    assert weight is maps.weight and bias is maps.bias
