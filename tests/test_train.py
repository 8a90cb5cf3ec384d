"""End-to-end fits: what they compute, against a naive implementation in plain torch."""

import math

import models_zoo as zoo
import numpy as np
import pytest
import torch
from torch import nn

import lineas
from lineas import AffineMap, SteeringMaps, fit_end_to_end
from lineas.models import autograd, optim, sites
from lineas.models.optim import cosine_rate

QUIET = dict(progress=False)


def tokens(texts, **settings):
    return dict(zoo.tokenizer(**settings)(texts, return_tensors="pt", padding=True))


def prompts(count, seed):
    return tokens(zoo.texts(count, seed=seed))


def snapshot(model):
    """What a fit must leave as it was."""
    return (
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        torch.get_rng_state().tolist(),
    )


# --- against a naive implementation -----------------------------------------------------------------------------------


def naive_loss(u, v):
    size = math.lcm(len(u), len(v))
    u, v = (x.sort(dim=0).values.repeat_interleave(size // len(x), dim=0) for x in (u, v))
    return (u - v).square().mean(dim=0).sum()


def naive_prox(x, tau, l1, group):
    soft = x.sign() * (x.abs() - tau * l1).clamp(min=0)
    return soft * (1 - tau * group * math.sqrt(len(x)) / soft.norm()).clamp(min=0) if soft.any() else soft


def naive_pooled(model, batch, names, maps, pool):
    """Pooled outputs of modules, by whole forward passes and hooks that do not leave early."""
    found, handles = {}, []
    for name in names:

        def hook(module, args, output, name=name):
            if name in maps:
                shape = [1] * output.ndim
                shape[sites.channel_axis(module, output)] = -1
                weight, bias = maps[name]
                output = weight.view(shape) * output + bias.view(shape)
            found[name] = pool(output)
            return output

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        model(**batch) if isinstance(batch, dict) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def naive_fit(model, source, target, map_names, loss_names, pools, *, optimizer, lr, steps, penalties, scale):
    """Losses and maps of a fit; ``scale(n, m, d)`` is the factor of a module's term."""
    names = list(dict.fromkeys([*map_names, *loss_names]))
    with torch.no_grad():
        wanted = naive_pooled(model, target, names, {}, pools[1])
    maps = {
        name: (torch.ones(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64))
        for name, d in ((name, model.get_submodule(name).weight.shape[0]) for name in map_names)
    }
    params = [x.requires_grad_() for pair in maps.values() for x in pair]
    stepper = (torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam)(params, lr=lr)
    losses = []
    for step in range(steps):
        rate = stepper.param_groups[0]["lr"] = cosine_rate(lr, step, steps)
        found = naive_pooled(model, source, names, maps, pools[0])
        pairs = [(found[name], wanted[name]) for name in loss_names]
        loss = sum(naive_loss(u, v) * scale(len(u), len(v), u.shape[1]) for u, v in pairs)
        losses.append(loss.item())
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.grad = grad
        stepper.step()
        with torch.no_grad():
            for weight, bias in maps.values():
                weight.copy_(1 + naive_prox(weight - 1, rate, *penalties[:2]))
                bias.copy_(naive_prox(bias, rate, *penalties[2:]))
    return losses, maps


def masked_mean(mask):
    real = mask[:, :, None].double()
    return lambda x: (x * real).sum(dim=1) / real.sum(dim=1)


def check_fit(result, losses, maps):
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-9)
    assert list(result.maps) == list(maps)
    for name, (weight, bias) in maps.items():
        np.testing.assert_allclose(result.maps[name].weight, weight.detach(), rtol=0, atol=1e-9)
        np.testing.assert_allclose(result.maps[name].bias, bias.detach(), rtol=0, atol=1e-9)


SCALES = {
    "layer-mean": lambda layers: lambda n, m, d: 1 / layers,
    "paper": lambda layers: lambda n, m, d: 1.0,
    "reference": lambda layers: lambda n, m, d: min(n, m) / d / layers,
}


def positions(batch):
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}


@pytest.mark.parametrize(
    ("family", "optimizer", "scaling", "sizes"),
    [
        ("llama", "sgd", "layer-mean", (6, 3)),
        ("llama", "adam", "paper", (6, 4)),
        ("gpt2", "sgd", "reference", (5, 7)),
        ("qwen2", "adam", "layer-mean", (4, 8)),
        ("gemma2", "sgd", "paper", (7, 6)),
    ],
)
def test_language_model_fit_equals_the_naive_one(family, optimizer, scaling, sizes):
    model = zoo.LANGUAGE_MODELS[family]().double()
    # In float64 Gemma's attention gives NaN at padded positions: its prompts are of one length.
    shortest = 9 if family == "gemma2" else 3
    source, target = (tokens(zoo.texts(n, seed=n, shortest=shortest)) for n in sizes)
    names = sites.resolve(model, zoo.NORMS[family])
    lr = {"sgd": 0.02, "adam": 0.01}[optimizer]
    result = fit_end_to_end(
        model, source, target, layers=zoo.NORMS[family], optimizer=optimizer, scaling=scaling,
        lr=lr, steps=5, l1=0.3, group=0.1, l1_bias=0.2, group_bias=0.05, **QUIET,
    )  # fmt: skip
    losses, maps = naive_fit(
        model, positions(source), positions(target), names, names,
        [masked_mean(batch["attention_mask"]) for batch in (source, target)],
        optimizer=optimizer, lr=lr, steps=5, penalties=(0.3, 0.1, 0.2, 0.05), scale=SCALES[scaling](len(names)),
    )  # fmt: skip
    check_fit(result, losses, maps)


@pytest.mark.parametrize(
    ("map_names", "loss_names"), [(["bn", "gn"], ["bn", "gn"]), (["conv1", "bn"], ["gn"]), (["bn"], ["gn", "head"])]
)
def test_image_model_fit_equals_the_naive_one(map_names, loss_names):
    model = zoo.cnn().double()
    source, target = zoo.images(6, seed=1).double(), zoo.images(8, seed=2).double() + 0.3
    result = fit_end_to_end(
        model, source, target, layers=map_names, loss_layers=loss_names, lr=0.05, steps=5, l1=0.01, **QUIET
    )
    losses, maps = naive_fit(
        model, source, target, map_names, loss_names, [lambda x: x.flatten(2).mean(dim=2) if x.ndim == 4 else x] * 2,
        optimizer="sgd", lr=0.05, steps=5, penalties=(0.01, 0, 0.01, 0), scale=SCALES["layer-mean"](len(loss_names)),
    )  # fmt: skip
    check_fit(result, losses, maps)
    assert result.history["layer_loss"].shape == (5, len(loss_names))


@pytest.mark.parametrize("pooling", ["min", "max", "last", "all"])
def test_other_poolings_equal_the_naive_fit(pooling):
    model = zoo.llama().double()
    source, target = prompts(5, 1), prompts(6, 2)
    names = sites.resolve(model, zoo.NORMS["llama"])

    def pool(mask):
        real = mask.bool()[:, :, None]
        return {
            "min": lambda x: x.masked_fill(~real, math.inf).amin(dim=1),
            "max": lambda x: x.masked_fill(~real, -math.inf).amax(dim=1),
            "last": lambda x: x[:, -1],  # padded on the left
            "all": lambda x: x[mask.bool()],
        }[pooling]

    result = fit_end_to_end(
        model, source, target, layers=zoo.NORMS["llama"], pooling=pooling, lr=0.01, steps=4, **QUIET
    )
    losses, maps = naive_fit(
        model, positions(source), positions(target), names, names,
        [pool(batch["attention_mask"]) for batch in (source, target)],
        optimizer="sgd", lr=0.01, steps=4, penalties=(0, 0, 0, 0), scale=SCALES["layer-mean"](len(names)),
    )  # fmt: skip
    check_fit(result, losses, maps)


def test_the_torch_twins_give_the_same_fit(monkeypatch):
    settings = dict(layers=zoo.NORMS["llama"], lr=0.05, steps=5, optimizer="adam", l1=0.02, group=0.02, **QUIET)
    model, sets = zoo.llama().double(), (prompts(5, 1), prompts(7, 2))
    expected = fit_end_to_end(model, *sets, **settings)
    for module in (autograd, optim):
        monkeypatch.setattr(module, "on_engine", lambda tensor: False)
    result = fit_end_to_end(model, *sets, **settings)
    for key, values in expected.history.items():
        np.testing.assert_allclose(result.history[key], values, rtol=1e-9)
    for name, found in result.maps.items():
        np.testing.assert_allclose(found.weight, expected.maps[name].weight, atol=1e-9)
        np.testing.assert_allclose(found.bias, expected.maps[name].bias, atol=1e-9)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


@pytest.fixture
def fit(llama):
    """Fit a tiny language model, a few steps unless told otherwise."""

    def run(source=None, target=None, *, model=llama, **settings):
        settings = {"layers": zoo.NORMS["llama"], "lr": 0.02, "steps": 4, **QUIET, **settings}
        source = prompts(6, 1) if source is None else source
        return fit_end_to_end(model, source, prompts(6, 2) if target is None else target, **settings)

    return run


def same_maps(a, b, **tolerance):
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_allclose(a[name].weight, b[name].weight, **{"rtol": 0, "atol": 0, **tolerance})
        np.testing.assert_allclose(a[name].bias, b[name].bias, **{"rtol": 0, "atol": 0, **tolerance})


def rows(batch, start, stop):
    return {name: value[start:stop] for name, value in batch.items()}


def test_several_batches_form_one_step(fit):
    source, target = prompts(7, 1), prompts(6, 2)
    whole = fit(source, target, held_out=(source, target))
    parts = fit(
        [rows(source, 0, 3), rows(source, 3, 7)],
        [rows(target, 0, 1), rows(target, 1, 6)],
        held_out=([rows(source, 0, 5), rows(source, 5, 7)], [rows(target, 0, 3), rows(target, 3, 6)]),
    )
    same_maps(whole.maps, parts.maps, atol=1e-10)
    for key in ("loss", "held_out_loss"):
        np.testing.assert_allclose(parts.history[key], whole.history[key], rtol=1e-10)


def test_texts_equal_their_tokens(fit):
    source, target = zoo.texts(6, seed=1), zoo.texts(5, seed=2)
    by_text = fit(source, target, tokenizer=zoo.tokenizer())
    same_maps(by_text.maps, fit(tokens(source), tokens(target)).maps)
    # a model that sees positions from the first real token on does not mind on which side the padding is
    right = fit(source, target, tokenizer=zoo.tokenizer(padding_side="right", pad_token=False))
    same_maps(by_text.maps, right.maps, atol=1e-8)


def test_max_length_cuts_texts(fit):
    source = zoo.texts(6, seed=1, shortest=6)
    cut = fit(source, zoo.texts(6, seed=2), tokenizer=zoo.tokenizer(), max_length=3)
    first = [" ".join(text.split()[:3]) for text in source]
    same_maps(cut.maps, fit(first, zoo.texts(6, seed=2), tokenizer=zoo.tokenizer(), max_length=3).maps)
    assert cut.maps.metadata["settings"]["max_length"] == 3


def test_forward_calls_a_model_in_its_own_way():
    model = zoo.mlp().double()
    source, target = torch.randn(6, 5).double(), torch.randn(6, 5).double() + 1
    expected = fit_end_to_end(model, source, target, layers="[02]", steps=3, **QUIET)
    result = fit_end_to_end(
        model, {"data": source / 2}, {"data": target / 2}, layers="[02]", steps=3,
        forward=lambda model, batch: model(2 * batch["data"]), **QUIET,
    )  # fmt: skip
    same_maps(result.maps, expected.maps)


def test_the_last_loss_module_ends_the_forward():
    model, calls = zoo.mlp().double(), []
    model[3].register_forward_hook(lambda *_: calls.append(3))
    model[2].register_forward_hook(lambda *_: calls.append(2))
    x = torch.randn(4, 5).double()
    fit_end_to_end(model, x, x + 1, layers="0", loss_layers="2", steps=3, **QUIET)
    # the search for the order, the targets and three steps
    assert calls == [2] * 5


# --- settings ---------------------------------------------------------------------------------------------------------


def test_scalings_differ_by_factors_of_rate_and_penalties(fit):
    layers, n, d = zoo.LAYERS, 6, zoo.WIDTH
    base = fit(lr=0.02, l1=0.3, group=0.1)
    for scaling, factor in (("paper", layers), ("reference", n / d)):
        other = fit(lr=0.02 / factor, l1=0.3 * factor, group=0.1 * factor, scaling=scaling)
        same_maps(other.maps, base.maps, atol=1e-7)  # transformers' norms compute in float32
        np.testing.assert_allclose(other.history["loss"], factor * base.history["loss"], rtol=1e-7)


def test_history(fit):
    result = fit(steps=6, l1=0.2)
    history = result.history
    assert {name: values.shape for name, values in history.items()} == {
        "loss": (6,), "layer_loss": (6, 3), "held_out_loss": (0,), "lr": (6,), "penalty": (6,), "support": (6,),
    }  # fmt: skip
    np.testing.assert_allclose(history["layer_loss"].mean(axis=1), history["loss"])
    np.testing.assert_allclose(history["lr"], [cosine_rate(0.02, k, 6) for k in range(6)])
    assert history["loss"][-1] < history["loss"][0]
    assert history["support"][-1] == sum(found.support for found in result.maps.values())
    expected = sum(0.2 * (np.abs(m.weight - 1).sum() + np.abs(m.bias).sum()) for m in result.maps.values())
    assert history["penalty"][-1] == pytest.approx(expected)
    assert (result.best_step, result.stopped, result.held_out_loss) == (6, "finished", None)


def test_l1_gives_exact_zeros_and_more_of_them_the_stronger_it_is(fit):
    supports = []
    for l1 in (0.0, 0.2, 1.0):
        result = fit(l1=l1, steps=8)
        supports.append(int(result.history["support"][-1]))
        identities = sum(np.count_nonzero((m.weight == 1) & (m.bias == 0)) for m in result.maps.values())
        assert identities == zoo.LAYERS * zoo.WIDTH - supports[-1]
    assert supports[0] == zoo.LAYERS * zoo.WIDTH > supports[1] > supports[2] > 0


@pytest.mark.parametrize("penalty", ["l1", "group"])
def test_a_strong_penalty_leaves_the_identity(fit, penalty):
    result = fit(**{penalty: 1e3})
    assert result.history["support"].tolist() == [0, 0, 0, 0]
    assert result.history["penalty"].tolist() == [0, 0, 0, 0]
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in result.maps.values())
    np.testing.assert_array_equal(result.history["loss"], result.history["loss"][0])


def test_shifts_can_have_penalties_of_their_own(fit):
    only_slopes = fit(l1_bias=1e3)
    assert all((m.bias == 0).all() and (m.weight != 1).all() for m in only_slopes.maps.values())
    only_shifts = fit(group=1e3, group_bias=0.0)
    assert all((m.weight == 1).all() and (m.bias != 0).all() for m in only_shifts.maps.values())
    same_maps(fit(l1=0.4, group=0.1).maps, fit(l1=0.4, group=0.1, l1_bias=0.4, group_bias=0.1).maps)


def test_a_fit_can_start_from_maps(fit):
    first = fit(steps=3)
    second = fit(init=first.maps, steps=3, held_out=(prompts(6, 1), prompts(6, 2)))
    again = fit(steps=3, held_out=(prompts(6, 1), prompts(6, 2)))
    # the loss of the first step is that of the maps the fit starts from
    assert second.history["loss"][0] == again.held_out_loss
    assert first.maps == again.maps


def test_map_modules_and_loss_modules_may_differ(fit):
    result = fit(layers="model.layers.0.*_layernorm", loss_layers=["model.layers.1.mlp", "model.norm"])
    assert list(result.maps) == ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
    assert result.history["layer_loss"].shape == (4, 2)
    assert result.maps.metadata["loss_layers"] == ["model.layers.1.mlp", "model.norm"]
    assert result.history["loss"][-1] < result.history["loss"][0]


def test_maps_come_in_execution_order():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(4, 3), nn.Linear(5, 4)

        def forward(self, x):
            return self.second(self.first(x))

    x = torch.randn(6, 5)
    result = fit_end_to_end(Backwards(), x, x + 1, layers="*", steps=2, **QUIET)
    assert list(result.maps) == ["first", "second"]
    assert [len(m.weight) for m in result.maps.values()] == [4, 3]


def test_a_module_called_twice_is_mapped_twice_and_its_first_call_pooled():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.layer(self.layer(x)))

    torch.manual_seed(0)
    model = Twice().double()
    u, v = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    result = fit_end_to_end(model, u, v, layers="layer", loss_layers=["layer", "head"], lr=0.1, steps=1, **QUIET)
    weight, bias = torch.ones(3).double().requires_grad_(), torch.zeros(3).double().requires_grad_()

    def through(x):
        first = weight * model.layer(x) + bias
        return first, model.head(weight * model.layer(first) + bias)

    loss = sum(map(naive_loss, through(u), through(v))) / 2
    # the targets have no gradient
    targets = [x.detach() for x in through(v)]
    grads = torch.autograd.grad(sum(map(naive_loss, through(u), targets)) / 2, [weight, bias])
    assert result.history["loss"][0] == pytest.approx(loss.item())
    np.testing.assert_allclose(result.maps["layer"].weight, 1 - 0.1 * grads[0].numpy(), atol=1e-12)
    np.testing.assert_allclose(result.maps["layer"].bias, -0.1 * grads[1].numpy(), atol=1e-12)


# --- held-out data ----------------------------------------------------------------------------------------------------


def test_held_out_loss_follows_the_convention_of_the_loss(fit):
    source, target = prompts(6, 1), prompts(6, 2)
    for scaling in ("layer-mean", "paper", "reference"):
        result = fit(source, target, held_out=(source, target), scaling=scaling, l1=0.1, lr=1e-3)
        np.testing.assert_array_equal(result.history["held_out_loss"], result.history["loss"])


def test_the_held_out_loss_is_that_of_attached_maps(fit, llama):
    source, target = prompts(6, 3), prompts(6, 4)
    result = fit(held_out=(source, target))
    with result.maps.attach(llama):
        mapped = lineas.collect(llama, source, layers=zoo.NORMS["llama"])
    plain = lineas.collect(llama, target, layers=zoo.NORMS["llama"])
    loss = np.mean([lineas.wasserstein(mapped[name], plain[name]).sum() for name in result.maps])
    assert result.held_out_loss == pytest.approx(loss, rel=1e-4)  # collect gives float32


def test_the_maps_with_the_lowest_held_out_loss_are_kept(fit):
    # The held-out target is the unmoved source: every step makes it worse.
    away = fit(held_out=(prompts(6, 1), prompts(6, 1)))
    assert away.best_step == 0 and away.held_out_loss == away.history["held_out_loss"][0]
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in away.maps.values())
    towards = fit(held_out=(prompts(6, 1), prompts(6, 2)), lr=1e-3)
    assert towards.best_step == 4
    assert towards.held_out_loss < towards.history["held_out_loss"].min()
    same_maps(towards.maps, fit(lr=1e-3).maps)
    # The held-out target lies on the way, so the best maps are neither the first nor the last.
    near = [rows(prompts(6, 1), 0, 5), rows(prompts(6, 2), 0, 1)]
    between = fit(held_out=(prompts(6, 1), near), lr=0.1, steps=10)
    assert between.held_out_loss == between.history["held_out_loss"].min()
    assert between.best_step == between.history["held_out_loss"].argmin() > 0
    assert fit(init=between.maps, steps=1).history["loss"][0] == between.history["loss"][between.best_step]


# --- early ends -------------------------------------------------------------------------------------------------------


class Trouble:
    """A forward that meets with something at its n-th call."""

    def __init__(self, at, act):
        self.at, self.act, self.calls = at, act, 0

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.at:
            self.act()
        return model(**batch)


def interrupt():
    raise KeyboardInterrupt


# Calls of the model: 1 finds the order, 2 takes the targets, then one a step; with held-out data 3 takes their
# targets, then two a step.
@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_interrupt_keeps_the_maps(fit, llama, done):
    before = snapshot(llama)
    plain = {"forward": lambda model, batch: model(**batch)}
    result = fit(forward=Trouble(3 + done, interrupt), steps=5)
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
    result = fit(forward=Trouble(4 + 2 * 2, interrupt), held_out=held_out)
    assert (result.stopped, result.best_step, len(result.history["loss"])) == ("interrupted", 0, 2)
    assert result.held_out_loss == result.history["held_out_loss"][0]


def test_an_interrupt_before_any_step_is_passed_on(fit, llama):
    before = snapshot(llama)
    with pytest.raises(KeyboardInterrupt):
        fit(forward=Trouble(2, interrupt))
    assert snapshot(llama) == before


def test_an_error_is_passed_on(fit, llama):
    def fail():
        raise RuntimeError("out of luck")

    before = snapshot(llama)
    for call in (1, 2, 4):
        with pytest.raises(RuntimeError, match="out of luck"):
            fit(forward=Trouble(call, fail))
        assert snapshot(llama) == before


@pytest.fixture
def poisoned():
    """A model and a forward that gives NaN from a call on."""

    def make(at):
        model = zoo.mlp().double()
        trouble = Trouble(at, lambda: model[2].weight.data.fill_(math.nan))
        return model, lambda model, batch: trouble(model, {"input": batch})

    return make


X = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(6, 5)


def test_a_loss_that_is_not_finite_keeps_the_last_maps_with_one(poisoned):
    model, forward = poisoned(3 + 2)
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
    model, forward = poisoned(4 + 3)
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
    model, forward = poisoned(2)
    with pytest.raises(ValueError, match="target: 2: nan at row 0, column 0"):
        fit_end_to_end(model, X, X**2, forward=forward, **settings)
    model, forward = poisoned(3)
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


# --- seeds ------------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x):
        return self.layer(x + torch.randn(x.shape))


def test_the_same_seed_gives_the_same_bits():
    torch.manual_seed(0)
    model = Noisy()
    x = torch.randn(6, 5)
    fits = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(fits))  # what the caller does with torch's random numbers is of no effect
        before = torch.get_rng_state()
        fits.append(fit_end_to_end(model, x, x + 1, layers="layer", steps=3, seed=seed, **QUIET))
        assert torch.equal(torch.get_rng_state(), before)
    assert fits[0].maps == fits[1].maps
    assert fits[0].maps["layer"] != fits[2].maps["layer"]


def test_threads_do_not_change_the_bits(fit):
    kept = lineas.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            lineas.set_num_threads(threads)
            found.append(fit(l1=0.1).maps)
    finally:
        lineas.set_num_threads(kept)
    assert found[0] == found[1]


# --- the result -------------------------------------------------------------------------------------------------------


def test_metadata_tell_how_the_maps_were_made(fit, tmp_path):
    result = fit(l1=0.1, group_bias=0.2, held_out=(prompts(4, 3), prompts(4, 4)), seed=3)
    metadata = dict(result.maps.metadata)
    assert metadata.pop("history") == {
        "loss": result.history["loss"].tolist(),
        "held_out_loss": result.history["held_out_loss"].tolist(),
        "best_step": result.best_step,
        "stopped": "finished",
    }
    assert metadata == {
        "method": "end-to-end",
        "version": lineas.__version__,
        "model": None,
        "layers": zoo.NORMS["llama"],
        "loss_layers": zoo.NORMS["llama"],
        "pooling": "mean",
        "settings": {
            "scaling": "layer-mean", "optimizer": "sgd", "lr": 0.02, "betas": [0.9, 0.999], "steps": 4, "seed": 3,
            "max_length": None, "l1": 0.1, "group": 0.0, "l1_bias": 0.1, "group_bias": 0.2,
        },
    }  # fmt: skip
    result.maps.save(tmp_path / "maps.safetensors")
    assert lineas.load(tmp_path / "maps.safetensors") == result.maps


def test_the_name_of_the_model_is_kept(fit):
    model = zoo.llama().double()
    model.config.name_or_path = "tiny/llama"
    assert fit(model=model, steps=1).maps.metadata["model"] == "tiny/llama"


def test_repr(fit):
    text = repr(fit(held_out=(prompts(4, 3), prompts(4, 4))))
    assert text.startswith("FitResult(3 maps, loss ") and "in 4 steps, held-out " in text
    assert text.endswith("stopped='finished')")


def test_plot_draws_the_history(fit):
    pytest.importorskip("matplotlib").use("Agg")
    result = fit()
    line = result.plot().lines[0]
    np.testing.assert_array_equal(line.get_ydata(), result.history["loss"])


def test_progress_is_shown_unless_told_otherwise(fit, capsys):
    fit(progress=False)
    assert capsys.readouterr() == ("", "")
    fit(progress=True)
    assert "4/4" in capsys.readouterr().err


# --- errors -----------------------------------------------------------------------------------------------------------

BAD = [
    (dict(pooling="median"), ValueError, "pooling must be one of 'mean', 'min', 'max', 'last', 'all', got 'median'"),
    (dict(scaling="sum"), ValueError, "scaling must be one of 'layer-mean', 'paper', 'reference', got 'sum'"),
    (dict(optimizer="lbfgs"), ValueError, "optimizer must be one of 'sgd', 'adam', got 'lbfgs'"),
    (dict(l1=-1), ValueError, "l1 must be finite and >= 0, got -1"),
    (dict(group=-0.5), ValueError, "group must be finite and >= 0, got -0.5"),
    (dict(l1_bias=math.nan), ValueError, "l1_bias must be finite and >= 0, got nan"),
    (dict(group_bias=math.inf), ValueError, "group_bias must be finite and >= 0, got inf"),
    (dict(l1="1"), TypeError, "l1 must be a number, got str"),
    (dict(lr=0), ValueError, "lr must be finite and > 0, got 0"),
    (dict(lr=True), TypeError, "lr must be a number, got bool"),
    (dict(steps=0), ValueError, "steps must be >= 1, got 0"),
    (dict(steps=2.0), TypeError, "steps must be an integer, got float"),
    (dict(seed=-1), ValueError, "seed must be >= 0, got -1"),
    (dict(betas=0.9), ValueError, "betas must be a pair of numbers, got 0.9"),
    (dict(betas=(0.9, 1.0)), ValueError, r"betas must be < 1, got \(0.9, 1.0\)"),
    (dict(betas=(-0.1, 0.9)), ValueError, "betas must be finite and >= 0, got -0.1"),
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
    (dict(init=[1]), TypeError, "init must be a SteeringMaps, got list"),
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
