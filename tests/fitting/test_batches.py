"""Steps of several batches, mini-batches of the source, and what both do to the gradient."""

import math
from functools import partial

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import QUIET, Trouble, interrupt, prompts, rows, same_maps, short_fit, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lineas
from lineas import fit_end_to_end
from lineas.fitting.end_to_end import prepare, read_sets
from lineas.fitting.objective import Objective, _join
from lineas.fitting.parameters import MapParameters
from lineas.fitting.settings import ObjectiveSettings
from lineas.hooks.capture import Capture
from lineas.inputs import batches, frozen
from lineas.inputs.prompts import Prompts, Sampler, read


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


def posed(model, source, target, layers, **settings):
    """An objective, its task, and maps near the identity."""
    mini_batch = settings.pop("mini_batch", None)
    settings = {"scaling": "layer-mean", **settings}
    settings = ObjectiveSettings(layers=layers, tokenizer=zoo.tokenizer(), seed=3, progress=False, **settings)
    sets = read_sets(None, (source, target), None, settings)
    objective, tasks, _, _ = prepare(model, [sets], settings, mini_batch)
    maps = MapParameters(objective.widths, objective.dtype, objective.device)
    generator = torch.Generator().manual_seed(4)
    for values in (maps.weight, maps.bias):
        values += 0.2 * torch.randn(values.shape, generator=generator, dtype=values.dtype)
    return objective, tasks, maps.leaves()


def gradient(model, *data, **settings):
    with frozen.frozen(model):
        objective, tasks, maps = posed(model, *data, **settings)
        loss, terms, grad_weight, grad_bias = objective.gradient(tasks, maps)
    return loss, terms[0], torch.cat([grad_weight, grad_bias])


def naive_gradient(model, *data, **settings):
    """The gradient by one backward pass, with the graphs of all batches kept."""
    with frozen.frozen(model), Capture() as capture:
        objective, (task,), maps = posed(model, *data, **settings)
        parts = [objective._at_losses(capture, batch, maps) for batch in task.batches]
        total, terms = objective._compare(task, _join(parts))
        weights, biases = zip(*maps.values(), strict=True)
        return total.item(), terms, torch.cat(torch.autograd.grad(total, [*weights, *biases]))


def same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# --- cached gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.LANGUAGE_MODELS)
@pytest.mark.parametrize(
    ("pooling", "batch_size", "scaling"),
    [("mean", 1, "layer-mean"), ("max", 2, "paper"), ("last", 3, "reference"), ("all", 4, "layer-mean")],
)
def test_parts_of_a_batch_have_the_gradient_of_the_whole(family, pooling, batch_size, scaling):
    data = zoo.texts(7, seed=1), zoo.texts(4, seed=2), zoo.NORMS[family]
    model = zoo.LANGUAGE_MODELS[family]()
    whole = gradient(model, *data, pooling=pooling, scaling=scaling)
    parts = gradient(model, *data, pooling=pooling, scaling=scaling, batch_size=batch_size)
    same(parts, whole, 1e-5)


def test_images_in_parts():
    data = zoo.images(5, seed=1), zoo.images(6, seed=2), ["bn", "conv2", "gn"]
    settings = dict(loss_layers=["gn", "head"], pooling="all")
    same(gradient(zoo.cnn(), *data, **settings, batch_size=2), gradient(zoo.cnn(), *data, **settings), 1e-5)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_any_split_has_the_gradient_of_the_whole(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (sum(sizes), 4))
    model = zoo.mlp().double()
    same(gradient(model, list(x.split(sizes)), y, "[024]"), gradient(model, x, y, "[024]"), 1e-12)


def noisy(model, x):
    """Adds noise before the model, and in the middle of it."""
    return model[2:](model[:2](x + torch.randn(x.shape)) + torch.rand(1))


def test_both_passes_draw_the_same_random_numbers():
    x, y = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    data = list(x.split([1, 3, 2])), y + 1, "[024]"
    found = gradient(zoo.mlp(), *data, forward=noisy)
    same(found, naive_gradient(zoo.mlp(), *data, forward=noisy), 1e-5)
    # afterwards they go on where one pass would have left them
    after = []
    for function in (gradient, naive_gradient):
        torch.manual_seed(0)
        with torch.random.fork_rng():
            model = zoo.mlp()
            objective, tasks, maps = posed(model, *data, forward=noisy)
            if function is gradient:
                objective.gradient(tasks, maps)
            else:
                [objective._at_losses(Capture(), batch, maps) for batch in tasks[0].batches]
            after.append(torch.rand(1))
    assert after[0] == after[1]


def test_random_numbers_from_elsewhere_are_an_error():
    generator = torch.Generator().manual_seed(0)

    def forward(model, x):
        return model(x + torch.randn(x.shape, generator=generator))

    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    model = zoo.mlp()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="source: module '0' gave other activations when its batch was run a second time"
    ):
        fit_end_to_end(model, x, x + 1, layers="[02]", forward=forward, batch_size=3, **QUIET)
    assert snapshot(model) == before
    fit_end_to_end(model, x, x + 1, layers="[02]", forward=forward, steps=1, **QUIET)  # one batch runs once


class Boxes:
    """Counts the tensors that are saved for backward passes and not yet let go."""

    def __init__(self):
        self.alive = self.most = 0

    def pack(self, tensor):
        boxes = self

        class Box:
            def __init__(self):
                self.tensor = tensor
                boxes.alive += 1
                boxes.most = max(boxes.most, boxes.alive)

            def __del__(self):
                boxes.alive -= 1

        return Box()


def test_the_graph_of_one_batch_is_alive_at_a_time(llama):
    batch = prompts(2, 1)
    most = []
    for count in (1, 2, 4):
        boxes = Boxes()
        with torch.autograd.graph.saved_tensors_hooks(boxes.pack, lambda box: box.tensor):
            gradient(llama, [batch] * count, prompts(3, 2), zoo.NORMS["llama"])
        assert boxes.alive == 0
        most.append(boxes.most)
    assert most[0] > 50
    assert most[2] == most[1] <= most[0]


def test_all_batches_but_the_last_run_twice():
    calls = []

    def forward(model, x):
        calls.append((len(x), torch.is_grad_enabled()))
        return model(x)

    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    for size, expected in (
        (None, [(6, True)]),
        (3, [(3, False), (3, True), (3, True)]),
        (2, [(2, False), (2, False), (2, True), (2, True), (2, True)]),
    ):
        calls.clear()
        fit_end_to_end(zoo.mlp(), x, x + 1, layers="[02]", forward=forward, batch_size=size, lr=0.1, steps=1, **QUIET)
        # before the step: the targets
        assert calls == [(size or 6, False)] * (6 // (size or 6)) + expected


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_in_parts():
    data = zoo.texts(6, seed=1), zoo.texts(5, seed=2), zoo.NORMS["llama"]
    expected = gradient(zoo.llama(), *data)
    model = zoo.llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same(gradient(model, *data, batch_size=2), expected, 1e-5)


# The targets take three calls, the first step three and two.
@pytest.mark.parametrize("call", [4, 6, 7, 8])
def test_an_interrupt_in_either_pass_leaves_no_hook(llama, call):
    before = snapshot(llama)
    result = short_fit(llama, forward=Trouble(call, interrupt), batch_size=2)
    assert (result.stopped, result.best_step) == ("interrupted", 0)
    assert snapshot(llama) == before


@pytest.mark.parametrize("call", [4, 6, 7, 8])
def test_an_error_in_either_pass_leaves_no_hook(llama, call):
    def fail(model):
        raise RuntimeError("out of luck")

    before = snapshot(llama)
    with pytest.raises(RuntimeError, match="out of luck"):
        short_fit(llama, forward=Trouble(call, fail), batch_size=2)
    assert snapshot(llama) == before


class Steep(nn.Module):
    """The identity, with an infinite gradient once ``steep`` is set."""

    steep = False

    def forward(self, x):
        if x.requires_grad and self.steep:
            x.register_hook(lambda grad: grad * math.inf)
        return x * 1


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_gradient_that_is_not_finite_names_the_module(batch_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), Steep(), nn.Linear(4, 3))
    model[1].steep = True
    x = torch.randn(6, 5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="before any step: source: 0: the gradient is not finite"):
        fit_end_to_end(model, x, x + 1, layers="[02]", batch_size=batch_size, **QUIET)
    assert snapshot(model) == before


def test_a_loss_that_is_not_finite_in_parts_keeps_the_maps():
    x = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(6, 5)
    # 3 calls, then five a step
    forward = Trouble(3 + 5 + 1, lambda model: model[2].weight.data.fill_(math.nan))
    with pytest.warns(RuntimeWarning, match="not finite at step 1: source: 2: nan at row 0"):
        result = fit_end_to_end(
            zoo.mlp().double(), x, x**2, layers="[02]", forward=forward, batch_size=2, lr=0.1, **QUIET
        )
    assert result.best_step == 0 and len(result.history["loss"]) == 1


def test_a_map_without_influence_is_found_in_parts():
    x = torch.randn(6, 5)
    with pytest.raises(ValueError, match="layers: no gradient reaches module '1'"):
        fit_end_to_end(
            zoo.mlp(), x, x, layers=["1", "2"], loss_layers="2", batch_size=2, **QUIET,
            forward=lambda model, x: (model[1](x), model[2](model[0](x)))[1],
        )  # fmt: skip


def test_a_fit_in_parts_is_the_fit_of_the_whole(llama):
    texts = dict(source=zoo.texts(7, seed=1), target=zoo.texts(5, seed=2), tokenizer=zoo.tokenizer())
    held_out = zoo.texts(4, seed=3), zoo.texts(6, seed=4)
    whole = short_fit(llama, **texts, held_out=held_out, l1=0.1)
    parts = short_fit(llama, **texts, held_out=held_out, l1=0.1, batch_size=3)
    same_maps(parts.maps, whole.maps, atol=1e-6)  # transformers' norms compute in float32
    for name, values in whole.history.items():
        np.testing.assert_allclose(parts.history[name], values, rtol=1e-6)
    assert parts.maps.metadata["settings"]["batch_size"] == 3


def test_a_path_in_parts_is_that_of_the_whole(llama):
    sets = dict(layers=zoo.NORMS["llama"], penalties=[0.3, 0.1], lr=0.02, **QUIET)
    whole = lineas.sparse_path_end_to_end(llama, prompts(6, 1), prompts(5, 2), **sets)
    parts = lineas.sparse_path_end_to_end(llama, prompts(6, 1), prompts(5, 2), **sets, batch_size=4)
    np.testing.assert_allclose(parts.weight, whole.weight, atol=1e-6)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-6)
    assert (whole.passes, parts.passes) == (1 + 3 * 5, 1 + 4 * 5)
    assert parts.metadata["settings"]["batch_size"] == 4


# --- taking batches apart ---------------------------------------------------------------------------------------------


def test_texts_are_padded_no_further_than_their_part_needs():
    texts = ["a", "a good day", "a b c d e", "the night"]
    for side in ("left", "right"):
        tokenizer = zoo.tokenizer(padding_side=side)
        for part, those in zip(
            read(texts, "source", tokenizer=tokenizer).parts(2), (texts[:2], texts[2:]), strict=True
        ):
            expected = tokenizer(those, padding=True, return_tensors="pt")
            assert torch.equal(part.kwargs["input_ids"], expected["input_ids"])
            assert torch.equal(part.mask, expected["attention_mask"])


def test_texts_are_tokenised_once(llama):
    calls = []

    class Counting:
        padding_side, pad_token_id = "left", 0

        def __call__(self, texts, **settings):
            calls.append(len(texts))
            return zoo.tokenizer()(texts, **settings)

    source, target = zoo.texts(9, seed=1), zoo.texts(7, seed=2)
    short_fit(llama, source, target, tokenizer=Counting(), mini_batch=4, batch_size=2, steps=3)
    assert calls == [9, 7]


def test_a_mapping_is_taken_apart_along_its_first_axis():
    batch = batches.Batch(kwargs={
        "x": torch.arange(6).reshape(3, 2), "names": ["a", "b", "c"], "y": np.arange(3.0), "size": (4, 4),
        "cache": None, "scale": torch.tensor(2.0),
    })  # fmt: skip
    assert batches.count(batch, "source") == 3
    part = batches.take(batch, [2, 0], "source").kwargs
    assert part["x"].tolist() == [[4, 5], [0, 1]] and part["names"] == ["c", "a"] and part["y"].tolist() == [2.0, 0.0]
    assert (part["size"], part["cache"], part["scale"]) == ((4, 4), None, 2.0)


def test_a_batch_of_the_user_keeps_its_padding():
    (batch,) = read(prompts(4, 1), "source").parts()
    part = batches.take(batch, [int(batch.mask.sum(dim=1).argmin())], "source")
    assert part.mask.shape == (1, batch.mask.shape[1]) and (part.mask == 0).any()
    assert part.mask is part.kwargs["attention_mask"]


# --- mini-batches -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), size=st.integers(2, 30), seed=st.integers(0, 9),
    batch_size=st.integers(1, 4),
)  # fmt: skip
def test_every_epoch_draws_every_prompt_once(sizes, size, seed, batch_size):
    total = sum(sizes)
    size = min(size, total)
    whole = Prompts([batches.Batch(args=(part,)) for part in torch.arange(total).split(sizes)], "source")
    make = partial(Sampler, whole, size, seed=seed)
    sampler, parted = make(batch_size=None), make(batch_size=batch_size)
    turns = total // size
    drawn = []
    for step in range(2 * turns):
        found = sampler.draw(step)
        assert len(found) <= len(sizes)
        rows = torch.cat([batch.args[0] for batch in found])
        assert len(rows) == size
        assert all(len(batch.args[0]) <= batch_size for batch in parted.draw(step))
        assert torch.equal(torch.cat([batch.args[0] for batch in parted.draw(step)]), rows)
        drawn.append(rows)
    for epoch in (drawn[:turns], drawn[turns:]):
        assert len(torch.cat(epoch).unique()) == turns * size
    # steps are drawn by their number alone
    assert torch.equal(torch.cat([batch.args[0] for batch in make(batch_size=None).draw(2 * turns - 1)]), drawn[-1])


def test_epochs_and_seeds_shuffle_anew():
    whole = Prompts([batches.Batch(args=(torch.arange(40),))], "source")
    first, other = (Sampler(whole, 20, batch_size=None, seed=seed) for seed in (0, 1))
    draws = [tuple(sampler.draw(step)[0].args[0].tolist()) for sampler in (first, other) for step in (0, 2)]
    assert len(set(draws)) == 4


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_step_sees_its_mini_batch_and_the_whole_target(llama, batch_size):
    source, target = zoo.texts(9, seed=1), zoo.texts(7, seed=2)
    data = dict(target=target, tokenizer=zoo.tokenizer(), steps=1)
    (drawn,) = Sampler(read(source, "source", tokenizer=zoo.tokenizer()), 4, batch_size=None, seed=5).draw(0)
    expected = short_fit(llama, dict(drawn.kwargs), **data)
    found = short_fit(llama, source, **data, mini_batch=4, batch_size=batch_size, seed=5)
    same_maps(found.maps, expected.maps, atol=1e-6)
    assert found.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-6)
    assert found.maps.metadata["settings"]["mini_batch"] == 4


def test_steps_go_through_the_mini_batches(llama):
    source = [rows(prompts(10, 1), 0, 6), rows(prompts(10, 1), 6, 10)]
    found = short_fit(llama, source, mini_batch=3, steps=4, lr=1e-9)
    sampler = Sampler(read(source, "source"), 3, batch_size=None, seed=0)
    for step, loss in enumerate(found.history["loss"]):
        expected = short_fit(llama, [dict(batch.kwargs) for batch in sampler.draw(step)], steps=1)
        assert loss == pytest.approx(expected.history["loss"][0], rel=1e-6)
    assert len(set(found.history["loss"])) == 4


def test_mini_batches_of_all_prompts_are_the_whole(llama):
    same_maps(short_fit(llama, mini_batch=6).maps, short_fit(llama).maps, atol=1e-6)


def test_mini_batches_lower_the_loss_of_the_whole_set(llama):
    source, target = zoo.texts(48, seed=1), zoo.texts(40, seed=2)
    data = dict(tokenizer=zoo.tokenizer(), held_out=(source, target), mini_batch=16, lr=0.05, steps=12)
    result = short_fit(llama, source, target, **data)
    assert result.held_out_loss < 0.7 * result.history["held_out_loss"][0]
    again = short_fit(llama, source, target, **data)
    assert again.maps == result.maps


# --- errors -----------------------------------------------------------------------------------------------------------

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
BAD = [
    (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    (dict(batch_size=2.0), TypeError, "batch_size must be an int, got float"),
    (dict(batch_size=True), TypeError, "batch_size must be an int, got bool"),
    (dict(mini_batch=1), ValueError, "mini_batch must be at least 2, got 1"),
    (dict(mini_batch="4"), TypeError, "mini_batch must be an int, got str"),
    (dict(mini_batch=7), ValueError, "mini_batch must be at most the 6 prompts of source, got 7"),
    (
        dict(source={"input": X, "other": X[:1]}, mini_batch=2),
        ValueError,
        "source: a batch can be split into prompts only where every tensor, array and list has an entry for each: "
        "'input' has 6, 'other' has 1",
    ),
    (
        dict(target=(X, X[:2]), batch_size=2),
        ValueError,
        "target: a batch can be split into prompts only .* entry 0 has 6, entry 1 has 2",
    ),
    (
        dict(source={"input": {"x": X}}, mini_batch=2),
        ValueError,
        "source: 'input' is a dict of tensors, which cannot be split into prompts",
    ),
    (
        dict(held_out=(X, {"scale": 2}), batch_size=2),
        ValueError,
        "held_out target: a batch without tensors, arrays or lists cannot be split into prompts",
    ),
]


@pytest.mark.parametrize(("settings", "error", "text"), BAD, ids=[text[:40] for *_, text in BAD])
def test_errors(settings, error, text):
    model = zoo.mlp()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        fit_end_to_end(model, **{"source": X, "target": X + 1, "layers": "[02]", **QUIET, **settings})
    assert snapshot(model) == before


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_half_precision_gradients_are_near_those_of_float32(family, dtype, tolerance, batch_size):
    data = zoo.texts(6, seed=1), zoo.texts(5, seed=2), zoo.NORMS[family]
    loss, _, exact = gradient(zoo.LANGUAGE_MODELS[family](), *data)
    found_loss, _, found = gradient(zoo.LANGUAGE_MODELS[family]().to(dtype), *data, batch_size=batch_size)
    assert found.dtype == torch.float32
    assert found_loss == pytest.approx(loss, rel=tolerance)
    assert (found - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_fit_lowers_the_loss_as_much(dtype):
    settings = dict(layers=zoo.NORMS["gpt2"], batch_size=4, steps=5)
    losses = short_fit(zoo.gpt2().to(dtype), **settings).history["loss"]
    exact = short_fit(zoo.gpt2(), **settings).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, exact, rtol=0.02)


def scaled(monkeypatch, exponents, model, *data, **settings):
    monkeypatch.setattr(Objective, "_exponents", lambda self, cached: exponents)
    try:
        return gradient(model, *data, **settings)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("batch_size", [None, 2])
def test_scaling_by_powers_of_two_changes_no_bit(monkeypatch, batch_size):
    data = zoo.texts(6, seed=1), zoo.texts(5, seed=2), zoo.NORMS["llama"]
    expected = gradient(zoo.llama(), *data, batch_size=batch_size)
    for exponent in (-20, 9, 30):
        found = scaled(monkeypatch, [exponent], zoo.llama(), *data, batch_size=batch_size)
        assert found[0] == expected[0] and torch.equal(found[2], expected[2])


def test_float16_gradients_are_scaled_out_of_the_underflow(monkeypatch):
    # Many long prompts: each token gets a small share of the gradient.
    x, y = torch.randn(2, 16, 512, 5, generator=torch.Generator().manual_seed(1))
    data = x, y + 0.01, "[024]"
    _, _, exact = gradient(zoo.mlp(), *data)
    errors = [
        ((found[2] - exact).norm() / exact.norm()).item()
        for found in (
            scaled(monkeypatch, [0], zoo.mlp().half(), x.half(), (y + 0.01).half(), "[024]"),
            gradient(zoo.mlp().half(), x.half(), (y + 0.01).half(), "[024]"),
        )
    ]
    assert errors[1] < 0.02
    assert errors[0] > 3 * errors[1]


def test_scales_go_by_the_largest_gradient():
    objective = Objective(zoo.mlp(), ["0"], ["0"], ObjectiveSettings())
    grads = [torch.tensor([0.1, -0.6]), torch.tensor([0.0])]
    assert list(objective._exponents(grads)) == [0]
    objective.seen = {torch.float32, torch.float16}
    assert [math.ldexp(0.6, k) for k in objective._exponents(grads)] == [38.4, 2.4, 0.15, 0.6 / 64]
    for factor, exponent in ((1e-40, 120), (1e38, -120), (0.0, 6)):
        assert objective._exponents([factor * grads[0]])[0] == exponent


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_scale_that_overflows_is_lowered(monkeypatch, batch_size):
    data = zoo.texts(6, seed=1), zoo.texts(5, seed=2), zoo.NORMS["llama"]
    model = zoo.llama().half()
    expected = scaled(monkeypatch, [2], model, *data, batch_size=batch_size)
    with frozen.frozen(model):
        objective, tasks, maps = posed(model, *data, batch_size=batch_size)
        monkeypatch.setattr(objective, "_exponents", lambda cached: [30, 25, 2, -10])
        runs = []
        kept = objective._pull_back
        monkeypatch.setattr(objective, "_pull_back", lambda *args: runs.append(args[-1]) or kept(*args))
        found = objective.gradient(tasks, maps)
    assert runs == [2.0**30, 2.0**25, 4.0]
    assert torch.equal(torch.cat(found[2:]), expected[2])
