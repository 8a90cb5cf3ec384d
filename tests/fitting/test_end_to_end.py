"""End-to-end fits: what they compute, against a naive implementation in plain torch; data, settings and results."""

import math
import warnings

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import QUIET, prompts, rows, same_maps, short_fit, tokens, use_engine
from torch import nn

import lineas
from lineas import fit_end_to_end
from lineas.fitting.step_sizes import cosine_rate
from lineas.hooks import modules, outputs


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


@pytest.fixture
def fit(llama):
    """Short fits, of the tiny Llama unless ``model`` is given."""
    return lambda *sets, model=llama, **settings: short_fit(model, *sets, **settings)


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
                shape[outputs.channel_axis(module, output)] = -1
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
    names = modules.resolve(model, zoo.NORMS[family])
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
        model,
        source,
        target,
        layers=map_names,
        loss_layers=loss_names,
        scaling="layer-mean",
        lr=0.05,
        steps=5,
        l1=0.01,
        **QUIET,
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
    names = modules.resolve(model, zoo.NORMS["llama"])

    def pool(mask):
        real = mask.bool()[:, :, None]
        return {
            "min": lambda x: x.masked_fill(~real, math.inf).amin(dim=1),
            "max": lambda x: x.masked_fill(~real, -math.inf).amax(dim=1),
            "last": lambda x: x[:, -1],  # padded on the left
            "all": lambda x: x[mask.bool()],
        }[pooling]

    result = fit_end_to_end(
        model,
        source,
        target,
        layers=zoo.NORMS["llama"],
        pooling=pooling,
        scaling="layer-mean",
        lr=0.01,
        steps=4,
        **QUIET,
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
    use_engine(monkeypatch, False)
    result = fit_end_to_end(model, *sets, **settings)
    for key, values in expected.history.items():
        np.testing.assert_allclose(result.history[key], values, rtol=1e-9)
    for name, found in result.maps.items():
        np.testing.assert_allclose(found.weight, expected.maps[name].weight, atol=1e-9)
        np.testing.assert_allclose(found.bias, expected.maps[name].bias, atol=1e-9)


# --- data -------------------------------------------------------------------------------------------------------------


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
    # the targets, the start and three steps
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
        "kept": (6,), "held_out_strength": (0,),
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


@pytest.mark.parametrize("pooling", ["mean", "all"])
def test_a_module_may_work_in_place_on_what_a_map_gives(pooling):
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        relu = nn.ReLU(inplace)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), relu, nn.Conv2d(4, 2, 3), relu)
        source, target = zoo.images(6, seed=1), zoo.images(5, seed=2) + 1
        found.append(fit_end_to_end(model, source, target, layers=["1", "3"], pooling=pooling, steps=4, **QUIET).maps)
    assert found[0]["1"].support == 4
    same_maps(*found)


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
    result = fit_end_to_end(
        model, u, v, layers="layer", loss_layers=["layer", "head"], scaling="layer-mean", lr=0.1, steps=1, **QUIET
    )
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
        "best_strength": 1.0,
        "stopped": "finished",
    }
    assert metadata == {
        "method": "end-to-end",
        "version": lineas.__version__,
        "model": None,
        "layers": zoo.NORMS["llama"],
        "loss_layers": zoo.NORMS["llama"],
        "pooling": "mean",
        "tokens": "all",
        "settings": {
            "scaling": "layer-mean", "optimizer": "sgd", "lr": 0.02, "betas": [0.9, 0.999], "steps": 4,
            "patience": 5, "strengths": [1.0], "seed": 3,
            "max_length": None, "batch_size": None, "mini_batch": None,
            "l1": 0.1, "group": 0.0, "l1_bias": 0.1, "group_bias": 0.2,
            "slopes": True, "shifts": True, "keep_weight": 0.0, "keep_loss": "kl", "max_kl": None, "disjoint": False,
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
    assert text.startswith("FitResult(3 maps, loss ") and " in 4 steps, held-out " in text
    assert text.endswith("stopped='finished')")


def test_the_loss_of_the_maps_is_told_where_it_is_known(fit):
    automatic = fit(lr="auto", steps=3)
    more = fit(lr="auto", steps=4)  # it sees the loss after the third step
    assert automatic.loss == more.history["loss"][3] < automatic.history["loss"][-1]
    first = automatic.history["loss"][0]
    assert f"loss {first:.4g} -> {automatic.loss:.4g} in 3 steps, best" in repr(automatic)
    assert " in 1 step, best_step=1" in repr(fit(lr="auto", steps=1))
    given = fit(steps=3)
    assert given.loss is None
    assert f"-> {given.history['loss'][-1]:.4g} before the last of 3 steps, best" in repr(given)
    assert f"loss {first:.4g} before the only step, best" in repr(fit(steps=1))
    held_out = fit(steps=3, lr=1.0, held_out=(prompts(6, 1), prompts(6, 1)))  # the identity is best
    assert held_out.best_step == 0 and held_out.loss == held_out.history["loss"][0]
    assert fit(steps=3, mini_batch=3, lr="auto").loss is None


def test_a_loss_that_went_far_up_is_warned_of(fit):
    with pytest.warns(RuntimeWarning, match=r"^fit_end_to_end went up: loss and penalties were .* smaller lr") as seen:
        found = fit(lr=1e6, steps=2)
    assert seen[0].filename == __file__ or seen[0].filename.endswith("fits.py")
    assert found.history["loss"][1] > 1e3 * found.history["loss"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        close = fit(lr="auto", steps=8).maps
        # A penalty that is new takes maps back on purpose.
        fit(lr=0.02, steps=4, l1=10.0, init=close)
        fit(lr=1e6, steps=2, held_out=(prompts(6, 1), prompts(6, 2)))


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
