"""Starts of end-to-end fits: closed-form maps to the same prompts, and the best of them by the held-out sets."""

import importlib.util

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import QUIET, Trouble, interrupt, prompts, same_maps, short_fit, snapshot

import lineas
from lineas import baselines, fit_jointly
from lineas.fitting import initial
from lineas.fitting.settings import INITS

pytest.importorskip("sklearn")

LAYERS = zoo.NORMS["llama"]
SOURCE, TARGET = prompts(6, 1), prompts(6, 2)
# Of the same two distributions as the prompts that are fitted, so that a step towards the target helps.
HELD_OUT = prompts(6, 1), prompts(6, 2)


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


def public_maps(model, source, target, method):
    """The start of a method by the public functions alone."""
    if method == "linear-incremental":
        return lineas.fit_incremental(model, source, target, layers=LAYERS, shrinkage="auto", **QUIET)
    acts = [lineas.collect(model, side, layers=LAYERS, **QUIET) for side in (source, target)]
    return baselines.iti_c(*acts) if method == "iti-c" else lineas.fit(*acts, method=method, shrinkage="auto")


def distance(model, maps, strength, held_out=HELD_OUT):
    """The loss of maps by public functions."""
    wanted = lineas.collect(model, held_out[1], layers=LAYERS, **QUIET)
    with maps.attach(model, strength=strength):
        moved = lineas.collect(model, held_out[0], layers=LAYERS, **QUIET)
    return np.mean([lineas.wasserstein(moved[name], wanted[name]).sum() for name in moved])


@pytest.mark.parametrize("method", INITS[:-1])
def test_a_fit_starts_from_the_maps_of_the_method(llama, method):
    found = short_fit(llama, init=method, steps=2)
    maps = public_maps(llama, SOURCE, TARGET, method)
    given = short_fit(llama, init=maps, steps=2)
    same_maps(found.maps, given.maps)
    np.testing.assert_array_equal(found.history["loss"], given.history["loss"])
    assert found.history["loss"][0] == pytest.approx(distance(llama, maps, 1.0, (SOURCE, TARGET)), rel=1e-4)
    assert found.history["loss"][0] < distance(llama, maps, 0.0, (SOURCE, TARGET))
    assert found.maps.metadata["init"] == {"method": method, "strength": 1.0}
    assert "init_losses" not in found.maps.metadata and "init" not in given.maps.metadata


def test_the_batches_are_those_of_the_steps(llama):
    for method in ("linear", "linear-incremental"):
        whole, parts = (short_fit(llama, init=method, steps=1, batch_size=size) for size in (None, 4))
        same_maps(whole.maps, parts.maps, rtol=1e-5, atol=1e-6)
        drawn = short_fit(llama, init=method, steps=1, mini_batch=4, lr=1e-12)
        same_maps(whole.maps, drawn.maps, atol=0.05)  # of all prompts, whatever a step draws


def test_the_best_is_found_and_all_losses_are_told(llama):
    result = short_fit(llama, init="best", steps=3, held_out=HELD_OUT)
    metadata = result.maps.metadata
    assert list(metadata["init_losses"]) == ["identity", *INITS[:-1]]
    for method, losses in metadata["init_losses"].items():
        if method != "identity":
            strengths = [strength for strength, _ in losses]
            assert strengths == list(initial.STRENGTHS[: len(losses)]) and len(losses) > 1
            maps = public_maps(llama, SOURCE, TARGET, method)
        for strength, loss in losses:
            assert loss == pytest.approx(distance(llama, maps if strength else result.maps, strength), rel=1e-4)
    every = [
        (loss, {"method": method, "strength": strength})
        for method, losses in metadata["init_losses"].items()
        for strength, loss in losses
    ]
    lowest, best = min(every, key=lambda pair: pair[0])
    assert metadata["init"] == best and best["method"] != "identity"
    assert result.history["held_out_loss"][0] == lowest  # to the bit
    assert result.held_out_loss <= lowest
    assert result.held_out_passes == len(every) + 4


def test_no_start_is_worse_than_the_best_on_the_held_out_sets(llama):
    best = short_fit(llama, init="best", steps=1, lr=1e-9, held_out=HELD_OUT).held_out_loss
    for method in INITS[:-1]:
        assert best <= short_fit(llama, init=method, steps=1, lr=1e-9, held_out=HELD_OUT).held_out_loss
    assert best <= short_fit(llama, steps=1, lr=1e-9, held_out=HELD_OUT).held_out_loss


def test_where_all_are_worse_the_identity_is_kept(llama):
    result = short_fit(llama, init="best", steps=1, lr=0.5, held_out=(TARGET, SOURCE))
    assert result.maps.metadata["init"] == {"method": "identity", "strength": 0.0}
    assert result.maps.support == 0 and result.best_step == 0
    # tried at two strengths each, since the second was worse
    assert [len(losses) for losses in result.maps.metadata["init_losses"].values()] == [1] + 5 * [2]
    assert result.held_out_passes == 11 + 2


def test_a_map_that_is_not_finite_is_passed_over(llama, monkeypatch):
    def overflowing(source, target, **settings):
        maps = lineas.fit(source, target, **settings)
        huge = lineas.AffineMap(np.full(16, 1e308), np.zeros(16))
        return lineas.SteeringMaps(dict.fromkeys(maps, huge)) if settings["method"] == "gaussian" else maps

    monkeypatch.setattr(initial, "fit", overflowing)
    metadata = short_fit(llama, init="best", steps=1, held_out=HELD_OUT).maps.metadata
    assert metadata["init_losses"]["gaussian"] == [] and len(metadata["init_losses"]["mean"]) > 1
    assert metadata["init"]["method"] != "gaussian"


def test_without_scikit_learn_the_best_is_that_of_the_others(llama, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "sklearn" else found(name))
    metadata = short_fit(llama, init="best", steps=1, held_out=HELD_OUT).maps.metadata
    assert list(metadata["init_losses"]) == ["identity", *(name for name in INITS[:-1] if name != "iti-c")]


@pytest.mark.parametrize("method", ["mean", "linear-incremental", "best"])
def test_several_tasks_start_from_the_mean_of_their_maps(llama, method):
    tasks = {"a": (SOURCE, TARGET), "b": (prompts(5, 3), prompts(7, 4))}
    settings = dict(layers=LAYERS, steps=1, lr=1e-12, init=method, **QUIET)
    held_out = dict.fromkeys(tasks, HELD_OUT)
    result = fit_jointly(llama, tasks, held_out=held_out if method == "best" else None, **settings)
    if method != "best":
        both = [public_maps(llama, *task, method) for task in tasks.values()]
        for name, found in result.maps.items():
            for part in ("weight", "bias"):
                wanted = np.mean([getattr(maps[name], part) for maps in both], axis=0)
                np.testing.assert_allclose(getattr(found, part), wanted, rtol=1e-6, atol=1e-7)
    else:
        losses = result.maps.metadata["init_losses"]
        lowest = min(loss for tried in losses.values() for _, loss in tried)
        assert result.history["held_out_loss"][0] == lowest
        assert result.held_out_passes == 2 * (sum(map(len, losses.values())) + 2)


@pytest.mark.parametrize("method", ["linear", "best"])
def test_a_fit_goes_on_with_its_start(llama, method, tmp_path):
    settings = dict(init=method, held_out=HELD_OUT, steps=3, lr="auto")
    path = tmp_path / "fit.safetensors"
    whole = short_fit(llama, forward=Trouble(0, interrupt), **settings)
    counted = Trouble(0, interrupt)
    short_fit(llama, forward=counted, **settings)
    part = short_fit(llama, checkpoint=path, forward=Trouble(counted.calls - 2, interrupt), **settings)
    assert part.stopped == "interrupted"
    again = short_fit(llama, checkpoint=path, forward=Trouble(0, interrupt), **settings)
    assert again.maps == whole.maps and again.held_out_passes == whole.held_out_passes
    assert again.maps.metadata == whole.maps.metadata
    with pytest.raises(ValueError, match="of which the digest of init differs"):
        short_fit(llama, checkpoint=path, **{**settings, "init": "mean"})


def test_random_numbers_of_the_steps_are_those_without_a_start():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x + torch.randn_like(x))

    torch.manual_seed(0)
    model, source, target = Noisy(), torch.randn(8, 4), torch.randn(8, 4) + 1
    settings = dict(layers="inner", steps=1, lr=1e-30, **QUIET)  # a step that moves nothing
    found = lineas.fit_end_to_end(model, source, target, init="mean", **settings)
    given = lineas.fit_end_to_end(model, source, target, init=found.maps, **settings)
    assert found.maps == given.maps and found.maps.support == 4
    np.testing.assert_array_equal(found.history["loss"], given.history["loss"])


def test_the_model_is_left_as_it_was(llama):
    before = snapshot(llama)
    short_fit(llama, init="best", steps=1, held_out=HELD_OUT)
    with pytest.raises(RuntimeError, match="broken"):
        short_fit(llama, init="linear-incremental", forward=Trouble(4, broken))
    assert snapshot(llama) == before


def broken(model):
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"init": "median"}, ValueError, "^init must be one of 'mean', 'gaussian', .*, 'best', got 'median'$"),
        ({"init": "best"}, ValueError, "^init='best': there are no held_out sets to choose by$"),
        ({"init": 3}, TypeError, "^init must be a SteeringMaps or a string, got int$"),
    ],
)
def test_errors(llama, settings, error, message):
    with pytest.raises(error, match=message):
        short_fit(llama, **settings)
