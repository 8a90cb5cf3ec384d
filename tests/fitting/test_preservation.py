"""Preservation in end-to-end fits: the divergences and their gradients, budgets, held-out prompts, bad input."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import same_maps, short_fit
from torch import nn
from torch.nn import functional as F

import lineas
from lineas.fitting.end_to_end import prepare, read_sets
from lineas.fitting.parameters import parameters_of
from lineas.fitting.preservation import KeepWeight, Preservation
from lineas.fitting.settings import FitSettings
from lineas.inputs.frozen import frozen
from lineas.inputs.prompts import read

SITE = "model.layers.*.post_attention_layernorm"


def ids(count, seed):
    """Random prompts of 3 to 9 tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, zoo.VOCABULARY, rng.integers(3, 10)).tolist() for _ in range(count)]


SETS = ids(6, 1), ids(7, 2)
HELD_OUT = ids(6, 3), ids(5, 4)
KEEP = ids(9, 5)


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama whose predictions are as sharp as those of a trained model."""
    model = zoo.llama().double()
    model.lm_head.weight.data *= 5
    return model


@pytest.fixture
def fit(llama):
    return lambda model=llama, **settings: short_fit(
        model,
        *SETS,
        **{"layers": SITE, "scaling": "standardized", "lr": "auto", "steps": 6, "patience": None, **settings},
    )


def made(model, keep, **given):
    """A preservation of `keep`, and maps that are no identities."""
    settings = FitSettings(layers=SITE, keep_weight=1.0, progress=False, **given)
    with frozen(model):
        objective, *_ = prepare(model, [read_sets(None, SETS, None, settings)], settings)
        maps = parameters_of(objective, settings)
        generator = torch.Generator().manual_seed(0)
        maps.weight.add_(0.1 * torch.randn(len(maps.weight), generator=generator, dtype=maps.weight.dtype))
        maps.bias.add_(0.1 * torch.randn(len(maps.bias), generator=generator, dtype=maps.bias.dtype))
    return Preservation(objective, read(keep, "keep")), maps


def naive_kl(model, keep, leaves):
    """KL(unsteered || steered), by torch's own function, text by text without padding."""
    total, count = 0.0, 0
    for ids in keep:
        batch = torch.tensor([ids])
        before = model(batch).logits.log_softmax(-1).detach()
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda m, args, out, w=w, b=b: w * out + b)
            for name, (w, b) in leaves.items()
        ]
        after = model(batch).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        total = total + F.kl_div(after, before, log_target=True, reduction="sum")
        count += len(ids)
    return total / count


def naive_change(model, keep, leaves, precisions):
    """The squared change of the activations at the loss modules, text by text without padding."""
    total, count = 0.0, 0
    for ids in keep:
        found = {False: [], True: []}
        for on in (False, True):

            def hook(module, args, out, w, b, on=on, seen=found[on]):
                seen.append(w * out + b if on else out)
                return seen[-1]

            hooks = [
                model.get_submodule(name).register_forward_hook(lambda *a, w=w, b=b, f=hook: f(*a, w, b))
                for name, (w, b) in leaves.items()
            ]
            model(torch.tensor([ids]))
            for one in hooks:
                one.remove()
        pairs = zip(found[False], found[True], precisions, strict=True)
        total = total + sum(((a.detach() - b).square() * p).sum() for a, b, p in pairs) / len(precisions)
        count += len(ids)
    return total / count


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("keep_loss", ["kl", "activations"])
def test_divergence_and_gradients_are_those_of_a_naive_implementation(llama, keep_loss, batch_size):
    preservation, maps = made(llama, KEEP, keep_loss=keep_loss, batch_size=batch_size)
    leaves = maps.leaves()
    with frozen(llama):
        value, grad_weight, grad_bias = preservation.gradient(leaves)
        assert preservation.measure(maps.leaves()) == pytest.approx(value, rel=1e-12)
        if keep_loss == "kl":
            expected = naive_kl(llama, KEEP, leaves)
        else:
            expected = naive_change(llama, KEEP, leaves, preservation.objective.precisions)
        assert value == pytest.approx(expected.item(), rel=1e-9)
        flat = torch.autograd.grad(expected, [leaf for pair in leaves.values() for leaf in pair])
    for found, parts in ((grad_weight, flat[::2]), (grad_bias, flat[1::2])):
        torch.testing.assert_close(found, torch.cat(parts), rtol=1e-3, atol=1e-6)  # norms compute in float32


def test_nothing_is_remembered_beyond_the_room(llama, monkeypatch):
    monkeypatch.setattr("lineas.fitting.preservation.REMEMBERED", 0)
    preservation, maps = made(llama, KEEP)
    with frozen(llama):
        first, second = preservation.gradient(maps.leaves()), preservation.gradient(maps.leaves())
    assert preservation.passes == 4
    monkeypatch.undo()
    other, maps = made(llama, KEEP)
    with frozen(llama):
        remembered = [other.gradient(maps.leaves()) for _ in range(2)]
    assert other.passes == 3
    for a, b in zip([first, second], remembered, strict=True):
        assert a[0] == pytest.approx(b[0], rel=1e-12)
        torch.testing.assert_close(a[1], b[1])


def test_a_larger_weight_preserves_more_and_moves_less(fit):
    plain, little, much = (fit(held_out=HELD_OUT, keep_weight=weight) for weight in (1e-9, 1.0, 100.0))
    keep = [result.history["keep"][-1] for result in (plain, little, much)]
    assert keep[0] > keep[1] > keep[2] > 0
    losses = [result.history["loss"][-1] for result in (plain, little, much)]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("how", [{}, {"lr": 1e-3}, {"lr": 0.02, "optimizer": "adam"}], ids=["auto", "sgd", "adam"])
def test_all_kinds_of_steps_preserve(fit, how):
    result = fit(keep=KEEP, keep_weight=100.0, steps=12, **how)
    assert np.isfinite(result.history["keep"]).all() and result.history["keep"][0] == 0
    assert (result.history["keep_weight"] == 100.0).all()
    assert result.history["keep"][-1] < fit(keep=KEEP, keep_weight=1e-9, steps=12, **how).history["keep"][-1] / 2


@pytest.mark.parametrize("max_kl", [1e-3, 3e-3])
def test_a_budget_holds_on_held_out_prompts_and_on_any_other_measure(llama, fit, max_kl):
    plain = fit(held_out=HELD_OUT, steps=25, keep_weight=1e-9)
    result = fit(held_out=HELD_OUT, steps=25, max_kl=max_kl)
    assert 0 < result.held_out_keep <= max_kl < plain.held_out_keep
    assert f"held_out_keep={result.held_out_keep:.3g}, best_step=" in repr(result)
    with frozen(llama):
        leaves = {name: (torch.tensor(one.weight), torch.tensor(one.bias)) for name, one in result.maps.items()}
        found = naive_kl(llama, HELD_OUT[1], leaves).item()
    assert result.held_out_keep == pytest.approx(found, rel=1e-6)
    assert result.held_out_loss < result.history["held_out_loss"][0]


def test_every_fourth_of_given_prompts_is_held_out(llama, fit):
    result = fit(held_out=HELD_OUT, keep=KEEP, keep_weight=100.0)
    with frozen(llama):
        leaves = {name: (torch.tensor(one.weight), torch.tensor(one.bias)) for name, one in result.maps.items()}
        found = naive_kl(llama, KEEP[3::4], leaves).item()
    assert result.held_out_keep == pytest.approx(found, rel=1e-6)


def test_several_tasks_keep_all_their_targets(llama):
    tasks = {"a": SETS, "b": HELD_OUT}
    common = {"layers": SITE, "steps": 4, "progress": False, "patience": None}
    every = lineas.fit_jointly(llama, tasks, keep_weight=50.0, **common)
    given = lineas.fit_jointly(llama, tasks, keep_weight=50.0, keep=[*SETS[1], *HELD_OUT[1]], **common)
    same_maps(every.maps, given.maps)


def test_in_batches_it_is_the_same_fit(fit):
    whole, parts = (fit(held_out=HELD_OUT, max_kl=1e-3, batch_size=size) for size in (None, 3))
    for name in whole.history:
        np.testing.assert_allclose(whole.history[name], parts.history[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("how", [{"lr": "auto"}, {"lr": 0.02}, {"lr": "auto", "mini_batch": 3}], ids=str)
@pytest.mark.parametrize("kept", [{"max_kl": 1e-3}, {"keep": KEEP, "keep_weight": 10.0, "keep_loss": "activations"}])
def test_a_fit_that_preserves_goes_on_from_its_checkpoint(tmp_path, fit, monkeypatch, how, kept):
    how = {**how, **kept, "held_out": HELD_OUT}
    whole = fit(**how)
    path = tmp_path / "fit.safetensors"
    taken = []

    def stop(self, *args, save=lineas.fitting.checkpoint.Checkpoint.save):
        save(self, *args)
        taken.append(None)
        if len(taken) == 4:
            raise SystemExit("killed")

    monkeypatch.setattr("lineas.fitting.checkpoint.Checkpoint.save", stop)
    with pytest.raises(SystemExit):
        fit(**how, checkpoint=path)
    monkeypatch.undo()
    resumed = fit(**how, checkpoint=path)
    same_maps(whole.maps, resumed.maps)
    for name, values in whole.history.items():
        np.testing.assert_array_equal(values, resumed.history[name])
    assert whole.held_out_keep == resumed.held_out_keep
    if "keep" in kept:
        with pytest.raises(ValueError, match="the digest of keep differs"):
            fit(**{**how, "keep": KEEP[::-1]}, checkpoint=path)


def test_results_are_saved_with_what_was_kept(tmp_path, fit):
    result = fit(held_out=HELD_OUT, max_kl=1e-3)
    result.save(tmp_path / "fit.safetensors")
    loaded = lineas.load(tmp_path / "fit.safetensors")
    assert loaded.held_out_keep == result.held_out_keep
    np.testing.assert_array_equal(loaded.history["keep_weight"], result.history["keep_weight"])


def test_a_model_of_images_preserves_activations():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).double()
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64) + k for k in (0, 1))
    kept = [
        lineas.fit_end_to_end(model, source, target, layers=["0", "2"], keep_loss="activations", keep_weight=weight,
                              steps=8, progress=False).history["keep"][-1]
        for weight in (1e-9, 10.0)
    ]  # fmt: skip
    assert 0 < kept[1] < kept[0] / 2
    with pytest.raises(ValueError, match=r"target: keep_loss='kl' needs a model that gives logits .* gives Tensor"):
        lineas.fit_end_to_end(model, source, target, layers=["0", "2"], keep_weight=1.0, progress=False)


def test_an_automatic_weight_follows_its_budget():
    weight = KeepWeight(0.0, 0.1)
    weight.start(8.0)
    first = weight.value
    assert first == pytest.approx(2.4)
    weight.follow(0.15)
    assert weight.value == pytest.approx(1.5 * first)
    weight.follow(9.0)
    assert weight.value == pytest.approx(3 * first)
    for _ in range(50):
        weight.follow(0.0)
    assert 0 < weight.value < first
    fixed = KeepWeight(2.0)
    fixed.start(8.0)
    fixed.follow(9.0)
    assert fixed.value == 2.0


@pytest.mark.parametrize(
    ("error", "words", "settings"),
    [
        (ValueError, "keep: give keep_weight=, or max_kl= for one that is found", {"keep": KEEP}),
        (ValueError, "keep_weight must be 'auto' or a number, got 'much'", {"keep_weight": "much"}),
        (ValueError, "keep_weight='auto' needs a budget: give max_kl=", {"keep_weight": "auto"}),
        (ValueError, "keep_weight must not be negative, got -1", {"keep_weight": -1}),
        (ValueError, "max_kl must be above 0, got 0", {"max_kl": 0}),
        (ValueError, "max_kl is for keep_weight='auto', got keep_weight=2", {"max_kl": 0.1, "keep_weight": 2}),
        (
            ValueError,
            "max_kl is a budget for keep_loss='kl', got keep_loss='activations'",
            {"max_kl": 0.1, "keep_loss": "activations"},
        ),
        (ValueError, "keep_loss must be one of 'kl', 'activations', got 'l2'", {"keep_loss": "l2"}),
        (ValueError, "keep is empty", {"keep": [], "keep_weight": 1}),
        (TypeError, "keep is one string: give a list of texts", {"keep": "a text", "keep_weight": 1}),
        (
            ValueError,
            "keep must have at least 4 prompts, of which every fourth is held out, got 3",
            {"keep": KEEP[:3], "keep_weight": 1, "held_out": HELD_OUT},
        ),
    ],
)
def test_bad_input(llama, fit, error, words, settings):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        fit(**settings)
    assert not any(module._forward_hooks for module in llama.modules())


def test_logits_that_are_not_finite(llama):
    model = zoo.llama().double()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="target: the logits are not finite"):
        short_fit(model, *SETS, layers=SITE, keep_weight=1.0)
