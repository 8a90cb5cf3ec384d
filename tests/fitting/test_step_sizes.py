"""Fits that find their own rate and stop by themselves."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import Trouble, interrupt, prompts, same_maps, short_fit, snapshot

import lineas
from lineas import fit_end_to_end, sparse_path_end_to_end
from lineas.fitting.step_sizes import MOST_RETREATS

HELD_OUT = (prompts(6, 3), prompts(6, 4))


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


@pytest.fixture
def fit(llama):
    """Fits of the tiny Llama at automatic rates."""
    return lambda *sets, model=llama, **settings: short_fit(model, *sets, **{"lr": "auto", "steps": 8, **settings})


def cases():
    for family in ("llama", "gpt2", "qwen2", "gemma2"):
        yield family, zoo.LANGUAGE_MODELS[family](), prompts(6, 1), prompts(6, 2), zoo.NORMS[family]
    yield "cnn", zoo.cnn(), zoo.images(6, seed=1), 2 * zoo.images(5, seed=2) + 1, ["bn", "gn"]
    yield "mlp", zoo.mlp(), zoo.images(3, seed=3)[..., 0, 1:], 3 * zoo.images(3, seed=4)[..., 0, 1:] - 2, "0"


CASES = {name: case for name, *case in cases()}


@pytest.mark.parametrize("name", CASES)
def test_no_rate_is_needed_for_any_model(fit, name):
    model, source, target, layers = CASES[name]
    result = fit(source, target, model=model, layers=layers, steps=40)
    loss = result.history["loss"]
    assert result.stopped == "finished" and loss[-1] < 0.75 * loss[0]
    assert (np.diff(loss) <= 0).all()  # without penalties no step that was kept makes it larger


@pytest.mark.parametrize("factor", [1e-4, 1.0, 100.0])
def test_rates_follow_the_scale_of_activations(fit, factor):
    model = zoo.mlp().double()
    with torch.no_grad():
        model[0].weight *= factor
        model[0].bias *= factor
    source, target = (zoo.images(20, seed=seed)[:, 0, 0, 1:].double() for seed in (3, 4))
    loss = fit(source, 2 * target + 1, model=model, layers="0", steps=40).history["loss"]
    assert loss[-1] < 0.6 * loss[0]


def test_rates_are_inverse_to_the_scale_of_the_loss(fit):
    mean, paper = fit(), fit(scaling="paper")  # three modules
    np.testing.assert_allclose(3 * paper.history["lr"], mean.history["lr"], rtol=1e-4)  # the model sums in float32
    same_maps(paper.maps, mean.maps, atol=1e-5)
    lasso, thrice = fit(l1=0.05), fit(scaling="paper", l1=0.15)
    np.testing.assert_allclose(3 * thrice.history["lr"], lasso.history["lr"], rtol=1e-4)
    same_maps(thrice.maps, lasso.maps, atol=1e-5)


def near_the_minimum(shift):
    """A fit of one module whose least loss is far above 0, from its closed-form solution, shifted a little."""
    source, target = zoo.images(40, seed=5)[:, 0, 0, 1:].double(), (zoo.images(30, seed=6)[:, 0, 0, 1:] ** 3).double()
    model = zoo.mlp().double()
    before, after = (lineas.collect(model, data, layers="0") for data in (source, target))
    best = lineas.fit(before, after)["0"]
    init = lineas.SteeringMaps({"0": lineas.AffineMap(best.weight, best.bias + np.float32(shift))})
    return {"model": model, "source": source, "target": target, "layers": "0", "init": init}


def test_a_step_that_makes_things_worse_is_taken_back(fit):
    """Near a minimum that is above 0 the first step, towards 0, is far too long."""
    result = fit(**near_the_minimum(0.01), steps=12)
    loss, kept, rates = (result.history[name] for name in ("loss", "kept", "lr"))
    assert not kept[0] and kept[1:].all()  # the step taken back tells the curvature
    assert loss[1] == loss[0] and (np.diff(loss[1:]) < 0).all()
    assert rates[1] < rates[0] / 4
    exact = fit(**near_the_minimum(0.0), steps=1, lr=1e-9).history["loss"][0]
    assert loss[0] - exact > 1e-4 and loss[-1] - exact < 0.1 * (loss[0] - exact)


def test_a_fit_that_cannot_get_better_says_so(fit):
    settings = near_the_minimum(0.0)
    result = fit(**settings, steps=200)
    assert result.stopped == "no step lowers the loss" and len(result.history["loss"]) < 100
    same_maps(result.maps, settings["init"], atol=1e-3)


def test_a_fit_ends_where_no_step_leads_on(fit):
    same = prompts(6, 1)
    result = fit(same, same)  # nothing to do
    assert result.stopped == "no step lowers the loss"
    assert result.maps.support == 0 and len(result.history["loss"]) == 0
    far = fit(l1=100.0, steps=40)  # the penalty keeps every map the identity
    assert far.stopped == "no step lowers the loss" and far.maps.support == 0


class Overflow:
    """A forward whose activations are infinite in some of its calls, counted from 1: order, targets, start, steps."""

    def __init__(self, calls):
        self.calls, self.seen = calls, 0

    def __call__(self, model, batch):
        self.seen += 1
        if self.seen not in self.calls:
            return model(**batch)
        handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * torch.inf)
        try:
            return model(**batch)
        finally:
            handle.remove()


def test_a_step_into_infinity_is_taken_back(fit):
    result, plain = fit(forward=Overflow({3})), fit(forward=Overflow(()))
    assert result.stopped == "finished"
    assert result.history["kept"].tolist()[:2] == [False, True]
    assert result.history["lr"][1] == plain.history["lr"][0] / 4
    assert result.history["loss"][1] == plain.history["loss"][0]


def test_infinities_for_ever_end_the_fit_with_the_last_finite_maps(fit):
    with pytest.warns(RuntimeWarning, match="fit_end_to_end stopped, not finite at step"):
        result = fit(forward=Overflow(range(5, 100)), steps=20)
    assert result.stopped.startswith(f"not finite at step {2 + MOST_RETREATS - 1}: source: ")
    same_maps(result.maps, fit(forward=Overflow(()), steps=2).maps)


def test_passes_are_counted(fit):
    plain = fit(steps=5)
    assert (plain.passes, plain.held_out_passes) == (3 * (5 + 1), 0)
    given = fit(steps=5, lr=0.02, held_out=HELD_OUT, patience=None)
    assert (given.passes, given.held_out_passes) == (3 * 5, 6)
    split = fit(steps=5, batch_size=2)
    assert split.passes == 4 * (5 + 1)
    near = near_the_minimum(0.01)
    held_out = near["source"][:9], near["target"][:9]
    worse = fit(**near, steps=6, held_out=held_out, patience=None)
    assert worse.held_out_passes == worse.history["kept"].sum() + 1 == 6  # no new maps, no new loss


def test_a_fit_stops_where_held_out_prompts_gain_nothing(fit):
    backwards = (prompts(6, 2), prompts(6, 1))
    result = fit(held_out=backwards, steps=50, patience=4)
    assert result.stopped == "no lower held-out loss in 4 steps"
    assert len(result.history["loss"]) == result.best_step + 4
    assert result.held_out_loss == result.history["held_out_loss"].min()
    assert fit(held_out=backwards, steps=12, patience=None).stopped == "finished"
    assert fit(steps=12, patience=1).stopped == "finished"  # nothing held out, nothing to be patient with


def test_steps_taken_back_try_no_patience(fit):
    near = near_the_minimum(0.01)
    held_out = near["source"], near["target"]
    result = fit(**near, steps=6, held_out=held_out, patience=1)
    assert result.history["kept"].tolist() == [False] + 5 * [True]  # the first one told the curvature
    assert result.stopped == "finished" and result.best_step == 6


def test_mini_batches_are_judged_by_themselves(fit):
    source = prompts(12, 1)
    result = fit(source, prompts(12, 2), mini_batch=4, steps=12)
    assert result.passes == 2 * 3 * 12
    whole = lambda maps: fit(source, prompts(12, 2), init=maps, steps=1).history["loss"][0]  # noqa: E731
    assert whole(result.maps) < 0.8 * whole(None)


def test_an_interrupt_in_a_step_keeps_the_maps_before_it(fit, llama):
    before = snapshot(llama)
    plain = {"forward": lambda model, batch: model(**batch)}
    # Calls of the model: targets, start, then one a step.
    result = fit(forward=Trouble(2 + 3, interrupt), steps=6)
    assert (result.stopped, result.best_step) == ("interrupted", 2)
    same_maps(result.maps, fit(steps=2, **plain).maps)
    assert snapshot(llama) == before


def test_the_path_finds_its_rate_too(llama):
    sets = prompts(6, 1), prompts(6, 2)
    settings = {"layers": zoo.NORMS["llama"], "progress": False, "n_penalties": 5, "min_ratio": 0.01}
    path = sparse_path_end_to_end(llama, *sets, **settings)
    assert path.history["kept"].mean() > 0.5 and path.loss[-1] < 0.8 * path.loss[0]
    assert path.metadata["settings"]["lr"] == "auto"


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"lr": "fast"}, ValueError, "lr must be 'auto' or a number, got 'fast'"),
        ({"optimizer": "adam"}, ValueError, "lr must be a number for optimizer 'adam': 'auto' is for 'sgd'"),
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"patience": 1.5}, TypeError, "patience must be an int, got float"),
    ],
)
def test_errors(llama, settings, error, text):
    with pytest.raises(error, match=text):
        fit_end_to_end(llama, prompts(6, 1), prompts(6, 2), layers=zoo.NORMS["llama"], **settings)
