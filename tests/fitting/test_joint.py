"""One set of maps for several tasks: what the fit computes, checkpoints, mini-batches, errors."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import QUIET, prompts, rows, same_maps, snapshot, tokens

import lineas
from lineas import AffineMap, SteeringMaps, fit_end_to_end, fit_jointly

X = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(12, 5)
# Of different numbers of rows.
MLP_TASKS = {"square": (X[:6], X[:6] ** 2), "flip": (X[4:8] + 1, torch.cos(3 * X[:4])), "shift": (X[3:], X[3:] + 0.2)}
TASKS = {"a": (prompts(6, 1), prompts(6, 2)), "b": (prompts(7, 3), prompts(5, 4))}
HELD_OUT = {"b": (prompts(6, 5), prompts(6, 6)), "a": (prompts(4, 7), prompts(6, 8))}  # in another order
KINDS = {"auto": {"lr": "auto", "l1": 0.05}, "adam": {"optimizer": "adam", "group": 0.01}, "mini": {"mini_batch": 3}}


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


@pytest.fixture
def fit(llama):
    def short(tasks=TASKS, **settings):
        settings = {"layers": zoo.NORMS["llama"], "lr": 0.02, "steps": 4, "patience": None, **QUIET, **settings}
        return fit_jointly(llama, tasks, **settings)

    return short


def same_fit(a, b):
    same_maps(a.maps, b.maps)
    assert a.history.keys() == b.history.keys()
    for name, values in a.history.items():
        np.testing.assert_array_equal(values, b.history[name])
    assert (a.best_step, a.stopped, a.held_out_loss) == (b.best_step, b.stopped, b.held_out_loss)
    assert (a.passes, a.held_out_passes, a.held_out_task_loss) == (b.passes, b.held_out_passes, b.held_out_task_loss)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_two_equal_tasks_give_the_fit_of_one(fit, llama, settings):
    """To the bit: half of a sum of two equal numbers is the number."""
    settings = {"layers": zoo.NORMS["llama"], "lr": 0.02, "steps": 4, "patience": 2, **settings, **QUIET}
    joint = fit_jointly(
        llama, {"a": TASKS["b"], "b": TASKS["b"]}, held_out={"a": HELD_OUT["b"], "b": HELD_OUT["b"]}, **settings
    )
    one = fit_end_to_end(llama, *TASKS["b"], held_out=HELD_OUT["b"], **settings)
    same_maps(joint.maps, one.maps)
    for name, values in one.history.items():
        seen = joint.history[name]
        if name == "layer_loss":
            np.testing.assert_array_equal(seen[:, 0], values)
            seen = seen[:, 1]
        np.testing.assert_array_equal(seen, values)
    assert (joint.best_step, joint.held_out_loss) == (one.best_step, one.held_out_loss)
    assert (joint.passes, joint.held_out_passes) == (2 * one.passes, 2 * one.held_out_passes)


def naive_loss(model, source, target, maps, loss_names):
    def outputs(x, maps):
        found = {}
        for name, module in model.named_children():
            x = module(x)
            if name in maps:
                x = maps[name][0] * x + maps[name][1]
            found[name] = x.sort(dim=0).values
        return found

    ours, wanted = outputs(source, maps), outputs(target, {})
    return torch.stack([(ours[name] - wanted[name]).square().mean(dim=0).sum() for name in loss_names])


@pytest.mark.parametrize("scaling", ["layer-mean", "paper"])
def test_a_step_follows_the_mean_of_the_losses(scaling):
    model = zoo.mlp().double()
    rng = np.random.default_rng(0)
    widths = {"0": 7, "2": 4}
    start = SteeringMaps({n: AffineMap(rng.normal(1, 0.3, d), rng.normal(0, 0.3, d)) for n, d in widths.items()})
    leaves = {name: [torch.tensor(x, requires_grad=True) for x in (m.weight, m.bias)] for name, m in start.items()}
    terms = torch.stack([naive_loss(model, *task, leaves, ["2", "4"]) for task in MLP_TASKS.values()])
    tasks = terms.sum(dim=1) if scaling == "paper" else terms.mean(dim=1)
    grads = torch.autograd.grad(tasks.mean(), [x for pair in leaves.values() for x in pair])
    found = fit_jointly(
        model, MLP_TASKS, layers="[02]", loss_layers="[24]", init=start, scaling=scaling, lr=0.1, steps=1, **QUIET
    )
    expected = [x.detach() - 0.1 * grad for x, grad in zip([x for p in leaves.values() for x in p], grads, strict=True)]
    seen = [x for m in found.maps.values() for x in (m.weight, m.bias)]
    for a, b in zip(seen, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.history["layer_loss"][0], terms.detach(), rtol=1e-12)
    np.testing.assert_allclose(found.history["task_loss"][0], tasks.detach(), rtol=1e-12)
    np.testing.assert_allclose(found.history["loss"][0], tasks.mean().item(), rtol=1e-12)


@pytest.mark.parametrize("lr", ["auto", 0.02])
def test_the_order_of_the_tasks_does_not_matter(fit, lr):
    plain = fit(held_out=HELD_OUT, lr=lr)
    turned = fit(dict(reversed(TASKS.items())), held_out=HELD_OUT, lr=lr)
    same_maps(plain.maps, turned.maps, rtol=1e-9, atol=1e-12)
    for name in ("task_loss", "held_out_task_loss"):
        np.testing.assert_allclose(plain.history[name], turned.history[name][:, ::-1], rtol=1e-9)
    assert turned.held_out_task_loss == pytest.approx(plain.held_out_task_loss)


def test_the_result(fit, llama):
    before = snapshot(llama)
    result = fit(held_out=HELD_OUT, steps=5)
    assert snapshot(llama) == before
    history = result.history
    assert {name: values.shape for name, values in history.items()} == {
        "loss": (5,), "layer_loss": (5, 2, 3), "task_loss": (5, 2), "held_out_loss": (5,), "held_out_task_loss": (5, 2),
        "lr": (5,), "penalty": (5,), "support": (5,), "kept": (5,),
            "held_out_strength": (5,),
    }  # fmt: skip
    np.testing.assert_allclose(history["task_loss"].mean(axis=1), history["loss"])
    np.testing.assert_allclose(history["held_out_task_loss"].mean(axis=1), history["held_out_loss"])
    assert list(result.held_out_task_loss) == ["a", "b"]
    assert np.mean(list(result.held_out_task_loss.values())) == pytest.approx(result.held_out_loss)
    assert (result.passes, result.held_out_passes) == (2 * 3 * 5, 2 * 6)
    assert result.maps.metadata["tasks"] == ["a", "b"] and result.maps.metadata["method"] == "joint end-to-end"
    assert history["loss"][-1] < history["loss"][0]
    assert len(result.plot().get_lines()) == 3  # both losses, and the step of the maps

    without = fit(steps=2)
    assert without.held_out_task_loss is None and without.history["held_out_task_loss"].shape == (0, 2)


def test_the_losses_of_the_kept_maps_are_those_of_their_step(fit):
    held_out = {name: (rows(source, 0, 4), rows(target, 1, 5)) for name, (source, target) in TASKS.items()}
    result = fit(held_out=held_out, steps=12, lr=0.5, patience=1)
    assert 0 < result.best_step < len(result.history["loss"])
    expected = result.history["held_out_task_loss"][result.best_step]
    assert list(result.held_out_task_loss.values()) == expected.tolist()


def test_texts(llama):
    texts = {name: (zoo.texts(5, seed=k), zoo.texts(6, seed=k + 10)) for k, name in enumerate("ab")}
    batches = {name: tuple(map(tokens, pair)) for name, pair in texts.items()}
    settings = {"layers": zoo.NORMS["llama"], "steps": 2, **QUIET}
    same_maps(
        fit_jointly(llama, texts, tokenizer=zoo.tokenizer(), **settings).maps,
        fit_jointly(llama, batches, **settings).maps,
        rtol=1e-9, atol=1e-12,
    )  # fmt: skip


# --- large sets, checkpoints ------------------------------------------------------------------------------------------


def test_batch_size_does_not_change_the_fit(fit):
    whole, split = fit(held_out=HELD_OUT), fit(held_out=HELD_OUT, batch_size=2)
    same_maps(whole.maps, split.maps, rtol=1e-9, atol=1e-12)
    assert split.passes > whole.passes


def test_mini_batches_are_of_every_task(fit, llama):
    seen = []

    def forward(model, batch):
        seen.append(len(batch["input_ids"]))
        return model(**batch)

    fit(mini_batch=3, forward=forward, steps=2)
    # Targets in parts of at most 3; then 3 prompts of each task a step.
    assert seen == [3, 3, 3, 2, 3, 3, 3, 3]
    # A mini-batch of all prompts is the whole set in another order.
    tasks = {name: (rows(source, 0, 5), target) for name, (source, target) in TASKS.items()}
    same_maps(fit(tasks, mini_batch=5).maps, fit(tasks).maps, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("done", [1, 3])
def test_a_fit_that_was_cut_off_goes_on_to_the_same_bits(fit, tmp_path, settings, done):
    path = tmp_path / "fit.safetensors"
    settings = {"held_out": HELD_OUT, "forward": lambda model, batch: model(**batch), "steps": 5, **settings}
    whole = fit(**settings)

    def cut(model, batch):
        if path.exists() and len(lineas.fitting.checkpoint.load(path)[1]["records"]) == done:
            raise KeyboardInterrupt
        return model(**batch)

    assert fit(**{**settings, "forward": cut}, checkpoint=path).stopped == "interrupted"
    same_fit(fit(**settings, checkpoint=path), whole)
    same_fit(fit(**settings, checkpoint=path), whole)


def test_the_checkpoint_of_other_tasks(fit, llama, tmp_path):
    path = tmp_path / "fit.safetensors"
    fit(checkpoint=path)
    with pytest.raises(ValueError, match=r"the tasks differs: it was \['a', 'b'\], and is \['b', 'a'\]"):
        fit(dict(reversed(TASKS.items())), checkpoint=path)
    with pytest.raises(ValueError, match="the digest of the prompts differs"):
        fit({"a": TASKS["a"], "b": TASKS["a"]}, checkpoint=path)
    with pytest.raises(ValueError, match=r"the tasks differs: it was \['a', 'b'\], and is \[None\]"):
        fit_end_to_end(
            llama, *TASKS["a"], layers=zoo.NORMS["llama"], lr=0.02, steps=4, patience=None, checkpoint=path, **QUIET
        )


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "settings", "error", "text"),
    [
        (list(TASKS.values()), {}, TypeError, r"^tasks must map names to pairs \(source, target\), got list"),
        ({"a": TASKS["a"]}, {}, ValueError, "^tasks must have at least 2 entries, got 1: fit_end_to_end fits one"),
        ({}, {}, ValueError, "^tasks must have at least 2 entries, got 0"),
        ({1: TASKS["a"], "b": TASKS["b"]}, {}, TypeError, "^tasks must have names as keys, got 1"),
        ({**TASKS, "c": "text"}, {}, TypeError, r"^tasks\['c'\] must be a pair \(source, target\), got str"),
        ({**TASKS, "c": (1, 2, 3)}, {}, ValueError, r"^tasks\['c'\] must be a pair \(source, target\), got 3 entries"),
        (TASKS, {"held_out": HELD_OUT["a"]}, TypeError, "^held_out must map names to pairs .*, got tuple"),
        (TASKS, {"held_out": {"a": HELD_OUT["a"]}}, ValueError,
         r"^held_out must have the tasks of tasks, \['a', 'b'\]: it lacks 'b'"),
        (TASKS, {"held_out": {**HELD_OUT, "c": HELD_OUT["a"]}}, ValueError, r"^held_out must have .*: it has 'c'"),
        (TASKS, {"held_out": {**HELD_OUT, "a": 3}}, TypeError, r"^held_out\['a'\] must be a pair .*, got int"),
        ({**TASKS, "b": (["x"], prompts(3, 1))}, {}, ValueError, r"tasks\['b'\] source holds texts: pass tokenizer="),
        ({**TASKS, "b": (prompts(1, 1), prompts(3, 1))}, {}, ValueError,
         r"tasks\['b'\] source must give at least 2 samples after pooling, got 1"),
        ({**TASKS, "b": (prompts(3, 1), prompts(1, 1))}, {}, ValueError, r"tasks\['b'\] target must give at least 2"),
        (TASKS, {"held_out": {**HELD_OUT, "b": (prompts(3, 1), prompts(1, 1))}}, ValueError,
         r"held_out\['b'\] target must give at least 2"),
        (TASKS, {"mini_batch": 7}, ValueError,
         r"mini_batch must be at most the 6 prompts of tasks\['a'\] source, got 7"),
        (TASKS, {"l1": -1}, ValueError, "^l1 must not be negative, got -1"),
    ],
)  # fmt: skip
def test_errors_name_the_task(fit, llama, tasks, settings, error, text):
    before = snapshot(llama)
    with pytest.raises(error, match=text):
        fit(tasks, **settings)
    assert snapshot(llama) == before


def test_a_value_that_is_not_finite_names_the_task_and_the_warning_points_here():
    model, calls = zoo.mlp().double(), []

    def forward(model, batch):
        calls.append(1)
        return model(batch * (torch.nan if len(calls) == 8 else 1))  # three targets, three sources, then two

    with pytest.warns(RuntimeWarning, match="fit_jointly stopped, not finite at step 1: ") as caught:
        found = fit_jointly(model, MLP_TASKS, layers="[02]", forward=forward, steps=4, lr=0.1, **QUIET)
    assert found.stopped.startswith("not finite at step 1: tasks['flip'] source: 0: nan")
    assert (found.best_step, caught[0].filename) == (0, __file__)
