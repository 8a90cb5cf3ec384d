"""End-to-end fits that end early, models that are special, and bad arguments."""

import math

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import QUIET, Trouble, interrupt, prompts, rows, same_maps, short_fit, snapshot
from torch import nn

from lineas import AffineMap, SteeringMaps, fit_end_to_end


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


@pytest.fixture
def fit(llama):
    """Short fits, of the tiny Llama unless ``model`` is given."""
    return lambda *sets, model=llama, **settings: short_fit(model, *sets, **settings)


# --- early ends -------------------------------------------------------------------------------------------------------


# Calls of the model: 1 takes the targets, then one a step; with held-out data 2 takes their targets, then two a step.
@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupt_keeps_the_maps(fit, llama, done):
    before = snapshot(llama)
    plain = {"forward": lambda model, batch: model(**batch)}
    result = fit(forward=Trouble(2 + done, interrupt), steps=5)
    assert (result.stopped, result.best_step) == ("interrupted", done)
    full = fit(steps=5, **plain)
    np.testing.assert_array_equal(result.history["loss"], full.history["loss"][:done])
    assert result.history["layer_loss"].shape == (done, 3)
    if done == 0:
        assert all((m.weight == 1).all() and (m.bias == 0).all() for m in result.maps.values())
        assert "no step" in repr(result)
    else:
        # the loss of the next step is that of the maps that were kept
        assert fit(init=result.maps, steps=1, **plain).history["loss"][0] == full.history["loss"][done]
    assert snapshot(llama) == before


def test_an_interrupt_keeps_the_best_held_out_maps(fit):
    held_out = (prompts(6, 1), prompts(6, 1))  # the best maps are the first
    result = fit(forward=Trouble(3 + 2 * 2, interrupt), held_out=held_out)
    assert (result.stopped, result.best_step, len(result.history["loss"])) == ("interrupted", 0, 2)
    assert result.held_out_loss == result.history["held_out_loss"][0]


def test_an_interrupt_before_any_step_is_passed_on(fit, llama):
    before = snapshot(llama)
    with pytest.raises(KeyboardInterrupt):
        fit(forward=Trouble(1, interrupt))
    assert snapshot(llama) == before


def test_an_error_is_passed_on(fit, llama):
    def fail(model):
        raise RuntimeError("out of luck")

    before = snapshot(llama)
    for call in (1, 2, 3):
        with pytest.raises(RuntimeError, match="out of luck"):
            fit(forward=Trouble(call, fail))
        assert snapshot(llama) == before


@pytest.fixture
def poisoned():
    """A model and a forward that gives NaN from a call on."""

    def make(at):
        return zoo.mlp().double(), Trouble(at, lambda model: model[2].weight.data.fill_(math.nan))

    return make


X = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(6, 5)


def test_a_loss_that_is_not_finite_keeps_the_last_maps_with_one(poisoned):
    model, forward = poisoned(2 + 2)
    before = snapshot(model)
    with pytest.warns(RuntimeWarning, match=r"not finite at step 2: source: 2: nan at row 0.*maps after 1 steps"):
        result = fit_end_to_end(model, X, X**2, layers="[02]", forward=forward, steps=5, lr=0.1, **QUIET)
    assert result.stopped.startswith("not finite at step 2: source: 2: nan at row 0, column 0")
    assert (result.best_step, len(result.history["loss"])) == (1, 2)
    assert snapshot(model) == before
    assert fit_end_to_end(zoo.mlp().double(), X, X**2, layers="[02]", init=result.maps, steps=1, **QUIET).history[
        "loss"
    ][0] == pytest.approx(result.history["loss"][1])


def test_a_held_out_loss_that_is_not_finite_keeps_the_best_maps(poisoned):
    model, forward = poisoned(3 + 3)
    sets = dict(held_out=(X, X**2), layers="[02]", forward=forward)
    with pytest.warns(RuntimeWarning, match="not finite at step 1: held_out source: 2: nan"):
        result = fit_end_to_end(model, X, X**2, steps=5, lr=1e-3, **sets, **QUIET)
    assert (result.best_step, result.held_out_loss) == (0, result.history["held_out_loss"][0])


def test_maps_that_overflow_are_not_kept():
    model = zoo.mlp()
    with pytest.warns(RuntimeWarning, match="not finite at step"):
        result = fit_end_to_end(model, X.float(), X.float() + 1, layers="[02]", lr=1e30, steps=8, **QUIET)
    assert all(np.isfinite(m.weight).all() and np.isfinite(m.bias).all() for m in result.maps.values())
    assert result.best_step < len(result.history["loss"])


def test_activations_that_are_not_finite_to_begin_with_are_an_error(poisoned):
    settings = dict(layers="[02]", steps=5, **QUIET)
    model, forward = poisoned(1)
    with pytest.raises(ValueError, match="target: 2: nan at row 0, column 0"):
        fit_end_to_end(model, X, X**2, forward=forward, **settings)
    model, forward = poisoned(2)
    with pytest.raises(ValueError, match="not finite before any step: source: 2: nan at row 0, column 0"):
        fit_end_to_end(model, X, X**2, forward=forward, **settings)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_get_float32_maps(dtype):
    model = zoo.llama().to(dtype)
    sets = prompts(6, 1), prompts(6, 2)
    settings = dict(layers=zoo.NORMS["llama"], lr=0.02, steps=6, **QUIET)
    result = fit_end_to_end(model, *sets, **settings)
    exact = fit_end_to_end(zoo.llama(), *sets, **settings)
    assert all(m.weight.dtype == m.bias.dtype == np.float32 for m in result.maps.values())
    # Far below the 8 bits of a bfloat16: the parameters are not rounded to the model's dtype.
    weights = [torch.tensor(m.weight) for m in result.maps.values()]
    assert any((weight != weight.to(dtype).float()).any() for weight in weights)
    np.testing.assert_allclose(result.history["loss"], exact.history["loss"], rtol=0.05)
    assert result.history["loss"][-1] < result.history["loss"][0]


def test_a_freshly_built_model_is_fitted_without_its_dropout():
    sets = prompts(6, 1), prompts(6, 2)
    settings = dict(layers=zoo.NORMS["gpt2"], lr=0.02, steps=4, **QUIET)
    model = zoo.gpt2(training=True)
    result = fit_end_to_end(model, *sets, **settings)
    same_maps(result.maps, fit_end_to_end(zoo.gpt2(), *sets, **settings).maps)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("batches", [1, 2])
def test_gradient_checkpointing_changes_nothing(fit, batches):
    source = prompts(6, 1)
    data = [rows(source, 0, 2), rows(source, 2, 6)] if batches == 2 else source
    model = zoo.llama().double().train()
    expected = fit(data, model=model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = snapshot(model)
    same_maps(fit(data, model=model).maps, expected.maps, atol=1e-12)
    assert snapshot(model) == before


def test_maps_already_attached_take_part(fit, llama):
    first = fit(steps=3)
    with first.maps.attach(llama):
        # Source and target both go through the attached maps.
        result = fit(steps=1)
    assert result.history["loss"][0] != first.history["loss"][0]
    assert not any(module._forward_hooks for module in llama.modules())


def test_the_caller_may_be_in_inference_mode_or_without_gradients(fit):
    expected = fit()
    with torch.inference_mode():
        same_maps(fit().maps, expected.maps)
    with torch.no_grad():
        same_maps(fit().maps, expected.maps)


def test_the_model_is_left_as_it_was(fit):
    model = zoo.llama().double()
    model.model.layers[0].train()
    model.model.embed_tokens.weight.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = snapshot(model)
    fit(model=model, held_out=(prompts(3, 3), prompts(3, 4)))
    assert snapshot(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# --- errors -----------------------------------------------------------------------------------------------------------

BAD = [
    (dict(pooling="median"), ValueError, "pooling must be one of 'mean', 'min', 'max', 'last', 'all', got 'median'"),
    (
        dict(scaling="sum"),
        ValueError,
        "scaling must be one of 'standardized', 'layer-mean', 'paper', 'reference', got 'sum'",
    ),
    (dict(optimizer="lbfgs"), ValueError, "optimizer must be one of 'sgd', 'adam', got 'lbfgs'"),
    (dict(l1=-1), ValueError, "l1 must not be negative, got -1"),
    (dict(group=-0.5), ValueError, "group must not be negative, got -0.5"),
    (dict(l1_bias=math.nan), ValueError, "l1_bias must be finite, got nan"),
    (dict(group_bias=math.inf), ValueError, "group_bias must be finite, got inf"),
    (dict(l1="1"), TypeError, "l1 must be a real number, got str"),
    (dict(lr=0), ValueError, "lr must be above 0, got 0"),
    (dict(lr=True), TypeError, "lr must be a real number, got bool"),
    (dict(steps=0), ValueError, "steps must be at least 1, got 0"),
    (dict(steps=2.0), TypeError, "steps must be an int, got float"),
    (dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
    (dict(betas=0.9), ValueError, "betas must be a pair of numbers, got 0.9"),
    (dict(betas=(0.9, 1.0)), ValueError, r"betas must be < 1, got \(0.9, 1.0\)"),
    (dict(betas=(-0.1, 0.9)), ValueError, "betas must not be negative, got -0.1"),
    (dict(layers="model.layer.*"), ValueError, "layers: no module matches 'model.layer.*'"),
    (dict(loss_layers="nothing"), ValueError, "loss_layers: no module matches 'nothing'"),
    (dict(source=[]), ValueError, "source is empty"),
    (dict(target=[]), ValueError, "target is empty"),
    (dict(source=prompts(1, 1)), ValueError, "source must give at least 2 samples after pooling, got 1"),
    (dict(target=prompts(1, 1)), ValueError, "target must give at least 2 samples after pooling, got 1"),
    (dict(source=["a text", "two"]), ValueError, "source holds texts: pass tokenizer="),
    (dict(held_out=prompts(4, 1)), TypeError, r"held_out must be a pair \(source, target\), got dict"),
    (dict(held_out=(prompts(4, 1),)), ValueError, r"held_out must be a pair \(source, target\), got 1 entries"),
    (dict(held_out=(prompts(4, 1), prompts(1, 1))), ValueError, "held_out target must give at least 2 samples"),
    (dict(held_out=(prompts(1, 1), prompts(4, 1))), ValueError, "held_out source must give at least 2 samples"),
    (dict(held_out=(prompts(4, 1), [])), ValueError, "held_out target is empty"),
    (dict(init=[1]), TypeError, "init must be a SteeringMaps or a string, got list"),
    (
        dict(init=SteeringMaps({"model.norm": AffineMap(np.ones(16), np.zeros(16))})),
        ValueError,
        r"init must have one map for each of the 3 mapped modules: missing \['model.layers.0.*not mapped \['model.norm",
    ),
    (
        dict(init=SteeringMaps({"model.norm": AffineMap(np.ones(4), np.zeros(4))}), layers="model.norm"),
        ValueError,
        "init: module 'model.norm' has 16 neurons, its map has 4",
    ),
    (
        dict(layers=["model.norm"], loss_layers="model.layers.1.mlp"),
        ValueError,
        "layers: module 'model.norm' runs after 'model.layers.1.mlp', the last of loss_layers: no gradient reaches it",
    ),
    (dict(layers="model.layers.0.self_attn.rotary_emb"), ValueError, "layers: no module matches"),
]


@pytest.mark.parametrize(("settings", "error", "text"), BAD, ids=[text[:40] for *_, text in BAD])
def test_errors(fit, llama, settings, error, text):
    before = snapshot(llama)
    with pytest.raises(error, match=text):
        fit(**settings)
    assert snapshot(llama) == before


def test_a_map_without_influence_is_an_error():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.aside, self.main = nn.Linear(5, 4), nn.Linear(5, 4)

        def forward(self, x):
            self.aside(x)
            return self.main(x)

    with pytest.raises(ValueError, match="layers: no gradient reaches module 'aside': no loss module depends on"):
        fit_end_to_end(Branches(), X.float(), X.float(), layers="*", loss_layers="main", **QUIET)
    with pytest.raises(ValueError, match="layers: no gradient reaches module 'aside'"):
        fit_end_to_end(Branches(), X.float(), X.float(), layers="aside", loss_layers="main", **QUIET)


def test_a_module_of_changing_width_is_an_error():
    model = nn.Sequential(nn.Identity(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="module '0' has 4 neurons in one call and 5 in another"):
        fit_end_to_end(
            model, X.float(), [X.float(), X.float()[:, :4]], layers="0", loss_layers="1", **QUIET,
            forward=lambda model, x: model[1](torch.nn.functional.pad(model[0](x), (0, 5 - x.shape[1]))),
        )  # fmt: skip
